// What is said about the chosen part, or about the whole model while nothing is chosen.

/** A refusal's reason without the place, which is shown next to it. */
const reasonOf = (where, reason) =>
  shorten(reason.startsWith(`${where}: `) ? reason.slice(where.length + 2) : reason, 400);

/** Refusals that differ in the numbers of nodes only, as one entry: places, reason, pass. */
function gathered(refusals) {
  const entries = new Map();
  for (const [pass, where, reason] of refusals) {
    const text = reasonOf(where, reason);
    const kind = `${pass} ${text.replace(/_\d+\b|\b\d+\b/g, "")}`;
    if (entries.has(kind)) entries.get(kind).places.push(where);
    else entries.set(kind, { pass, places: [where], text });
  }
  return [...entries.values()];
}

function refusalItem({ pass, places, text }, withPass) {
  const [first, ...rest] = places;
  return el(
    "li",
    {},
    el("b", {}, shorten(first, 60)),
    rest.length
      ? el("span", { class: "muted", title: shorten(places.join(", "), 2000) }, ` and ${rest.length} like it`)
      : null,
    ` ${text}`,
    withPass ? el("span", { class: "muted" }, ` ${pass}`) : null,
  );
}

const facts = (rows) =>
  el(
    "dl",
    { class: "facts" },
    rows
      .filter((row) => row && row[1] !== null && row[1] !== undefined && row[1] !== "")
      .map(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]),
  );

const section = (title, ...children) => el("section", {}, el("h3", {}, title), ...children);

/** A pass in its colour; a click shows only what it did. */
function passChip(app, index) {
  const pass = app.content.passes[index];
  const inside = [el("i", { "aria-hidden": "true" }), pass.name];
  const style = { "--pass": passColour(index) };
  if (!app.hasGraph || pass.name === "capture") return el("span", { class: "chip", style }, inside);
  return el(
    "button",
    {
      type: "button",
      class: "chip",
      "data-pass": index,
      "aria-pressed": String(app.canvas.onlyPass === index),
      style,
      on: { click: () => app.choosePass(index) },
    },
    inside,
  );
}

/** Names of nodes as buttons that lead to them. */
function links(app, ids, most = 24) {
  const shown = ids.slice(0, most).map((id) => {
    const node = app.view.nodes[id];
    return el("button", { type: "button", class: "link", on: { click: () => app.goTo(node) } }, shorten(node.n, 48));
  });
  const more = ids.length > most ? [el("span", { class: "muted" }, `and ${ids.length - most} more`)] : [];
  return shown.length ? el("span", { class: "links" }, shown, more) : null;
}

/** What a node keeps between forward and backward; memory that several nodes keep counts at the first of them. */
function savedBy(node) {
  const parts = (node.sv ?? []).map(([codec, size, elsewhere]) =>
    elsewhere ? `${codec}, counted at ${shorten(elsewhere, 60)}` : `${bytes(size)} ${codec}`,
  );
  return parts.length ? parts.join("; ") : null;
}

function nodePanel(app, part) {
  const { node } = part;
  const shapes = (node.s ?? []).map(([dtype, shape]) => `${dtype} [${shape.join(", ")}]`).join("   ");
  const inside = node.folded.filter((id) => app.view.nodes[id].o !== "get_attr" || !app.view.nodes[id].w);
  return [
    heading(
      app,
      shorten(titleOf(part), 80),
      node.o === "opaque" ? "a module that runs as Python" : `${node.o} ${shorten(node.x, 60)}`,
      part,
    ),
    passChips(app, part),
    ...weightSections(
      app,
      node.weights.map((index) => app.content.parameters[index]),
    ),
    node.code && section("Code", el("pre", { tabindex: "0" }, el("code", {}, shorten(node.code, 4000)))),
    section(
      "Facts",
      facts([
        ["Value", shapes || (node.o === "opaque" ? null : "shape not known without example inputs")],
        ["Kept for backward", savedBy(node)],
        ["Module", node.m && shorten(node.m, 200)],
        ["Made by", node.by],
        ["Made from", node.from && shorten(node.from, 200)],
        ["Reads", links(app, node.inputs)],
        ["Read by", links(app, node.users)],
        ["Folded in", links(app, inside)],
      ]),
    ),
  ];
}

function passChips(app, part) {
  if (!part.changes.length) return null;
  return el(
    "p",
    { class: "chips" },
    part.changes.map((index) => passChip(app, index)),
  );
}

function groupPanel(app, part) {
  const rows = part.weights.map((index) => app.content.parameters[index]);
  const sum = (key) => rows.reduce((total, row) => total + (row[key] ?? 0), 0);
  const density = densityOf(part.weights, app.content.parameters);
  return [
    heading(
      app,
      shorten(titleOf(part), 80),
      part.run === "python" ? "a module whose forward Python runs" : "a module",
      part,
    ),
    passChips(app, part),
    section(
      "Facts",
      facts([
        ["Path", part.p && shorten(part.p, 200)],
        ["Nodes", String(part.boxes)],
        ["Weights", rows.length ? `${count(sum("weights"))}, of which ${count(sum("active"))} active` : null],
        ["Density", density === null ? null : percent(density)],
        [
          "Operations",
          sum("flops_dense") ? `${count(sum("flops_dense"))} dense, ${count(sum("flops_sparse"))} sparse` : null,
        ],
      ]),
    ),
    ...(rows.length <= 2 ? weightSections(app, rows) : []),
    rows.length > 2
      ? section(
          "Density of its layers",
          el(
            "ul",
            { class: "bars" },
            rows.map((row) => barRow(app, row)),
          ),
        )
      : null,
  ];
}

function heading(app, title, sub, part) {
  return el(
    "header",
    {},
    el("div", {}, el("h2", {}, title), el("p", { class: "muted" }, sub)),
    part &&
      el("a", { class: "quiet", href: addressOf(app, part), "aria-label": "Link to this box", title: "Link to this box" }, "#"),
    part &&
      el(
        "button",
        { type: "button", class: "quiet close", "aria-label": "Close the details", on: { click: () => app.clear() } },
        "✕",
      ),
  );
}

function barRow(app, row) {
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", class: "link", on: { click: () => app.goToParameter(row) } },
      elided(row.parameter),
    ),
    !hasMask(row) ? el("span", { class: "muted" }, "dense") : densityBar(row.active / Math.max(row.weights, 1)),
  );
}

