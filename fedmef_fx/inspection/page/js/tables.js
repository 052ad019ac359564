// Tables that their headings sort.

const isKnown = (value) => value !== undefined && value !== null;
const parameterLink = (app, row) =>
  el(
    "button",
    { type: "button", class: "link", on: { click: () => app.goToParameter(row) } },
    shorten(row.parameter, 60),
  );

/**
 * A table that its headings sort.
 * @param {Array} columns name, heading, value to sort by, content of a cell, whether any row has it
 */
function sortable(label, allColumns, rows) {
  const columns = allColumns.filter(([, , , , isShown = true]) => isShown);
  const body = el("tbody");
  let [sortedBy, direction] = [null, 1];
  const headers = columns.map(([name, title, value]) =>
    el(
      "th",
      { scope: "col", class: `c-${name}`, "aria-sort": "none" },
      el("button", { type: "button", on: { click: () => sort(name, value) } }, title),
    ),
  );
  const fill = (shown) =>
    body.replaceChildren(
      ...shown.map((row) =>
        el(
          "tr",
          {},
          columns.map(([name, , , cell]) => el("td", { class: `c-${name}` }, cell(row))),
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
  const table = el("table", { class: "data" }, el("thead", {}, el("tr", {}, headers)), body);
  return el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}
