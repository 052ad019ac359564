// Small marks on boxes and in tables.

const TAIL = 6; // characters at the end of a name that are always shown

/** A name that gives up its middle where there is no room: both of its ends tell something. */
function elided(text, kind = "") {
  const short = shorten(text, 120);
  if (short.length < 3 * TAIL) return el("span", { class: kind }, short);
  return el(
    "span",
    { class: `mid ${kind}`, title: shorten(text, 400) },
    el("span", {}, short.slice(0, -TAIL)),
    el("span", {}, short.slice(-TAIL)),
  );
}

function arrow(id) {
  const shape = svg("path", { d: "M0 0L6 3L0 6z", class: id });
  return svg(
    "marker",
    { id, markerWidth: 6, markerHeight: 6, refX: 5.5, refY: 3, orient: "auto", markerUnits: "userSpaceOnUse" },
    shape,
  );
}

/** The passes that changed something, as colours one below the other. */
function stripe(changes) {
  const parts = changes.map((index) => el("i", { style: { background: passColour(index) } }));
  return el("span", { class: "stripe", "aria-hidden": "true" }, parts);
}

/** A share as a bar and a number; `meaning` is said after the number. */
function densityBar(density, meaning = "of the weights are active") {
  const bar = el("i", { style: { width: `${Math.max(density * 100, 1)}%` } });
  return el(
    "span",
    { class: "density", title: `${percent(density)} ${meaning}` },
    el("span", {}, bar),
    el("em", {}, percent(density)),
  );
}
