// Tables that their headings sort.

const isKnown = (value) => value !== undefined && value !== null;
const parameterLink = (app, row) =>
  el(
    "button",
    { type: "button", class: "link", on: { click: () => app.goToParameter(row) } },
    elided(row.parameter),
  );

/**
 * A table that its headings sort.
 * @param {Array} columns name, heading, value to sort by, content of a cell, whether any row has it
 */
function sortable(label, allColumns, rows) {
  const columns = allColumns.filter(([, , , , isShown = true]) => isShown);
  const body = el("tbody", { role: "rowgroup" });
  let [sortedBy, direction] = [null, 1];
  const headers = columns.map(([name, title, value]) =>
    el(
      "th",
      { scope: "col", role: "columnheader", class: `c-${name}`, "aria-sort": "none" },
      el("button", { type: "button", on: { click: () => sort(name, value) } }, title),
    ),
  );
  const fill = (shown) =>
    body.replaceChildren(
      ...shown.map((row) =>
        el(
          "tr",
          { role: "row" },
          columns.map(([name, title, , cell]) =>
            el("td", { class: `c-${name}`, role: "cell", "data-title": title }, cell(row)),
          ),
        ),
      ),
    );
  const sort = (name, value) => {
    [sortedBy, direction] = [name, sortedBy === name ? -direction : 1];
    const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * direction;
    fill([...rows].sort((a, b) => order(value(a), value(b))));
    headers.forEach((header, index) =>
      header.setAttribute(
        "aria-sort",
        columns[index][0] !== name ? "none" : direction > 0 ? "ascending" : "descending",
      ),
    );
  };
  fill(rows);
  // Narrow windows show rows as cards: the roles keep it a table for readers who do not see it.
  const head = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, headers));
  const table = el("table", { class: "data", role: "table", "aria-label": label }, head, body);
  return el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}
