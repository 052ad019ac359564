// What is said about the chosen part, or about the whole model while nothing is chosen.

/** A refusal's reason without the place, which stands beside it. */
const reasonOf = (where, reason) => shorten(reason.startsWith(`${where}: `) ? reason.slice(where.length + 2) : reason, 400);

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
  return el("li", {}, el("b", {}, shorten(first, 60)), rest.length ? el("span", { class: "muted", title: shorten(places.join(", "), 2000) }, ` and ${rest.length} like it`) : null, ` ${text}`, withPass ? el("span", { class: "muted" }, ` ${pass}`) : null);
}

const facts = (rows) =>
  el("dl", { class: "facts" }, rows.filter((row) => row && row[1] !== null && row[1] !== undefined && row[1] !== "").map(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]));

const section = (title, ...children) => el("section", {}, el("h3", {}, title), ...children);

function passChip(app, index) {
  const pass = app.content.passes[index];
  return el("span", { class: "chip", style: { "--pass": passColour(index) } }, el("i", { "aria-hidden": "true" }), pass.name);
}

/** Names of nodes as buttons that lead to them. */
function links(app, ids) {
  const shown = ids.slice(0, 24).map((id) => {
    const node = app.view.nodes[id];
    return el("button", { type: "button", class: "link", on: { click: () => app.goTo(node) } }, shorten(node.n, 48));
  });
  const more = ids.length > 24 ? [el("span", { class: "muted" }, `and ${ids.length - 24} more`)] : [];
  return shown.length ? el("span", { class: "links" }, shown, more) : null;
}

function nodePanel(app, part) {
  const { node } = part;
  const shapes = (node.s ?? []).map(([dtype, shape]) => `${dtype} [${shape.join(", ")}]`).join("   ");
  const inside = node.folded.filter((id) => app.view.nodes[id].o !== "get_attr" || !app.view.nodes[id].w);
  return [
    heading(app, shorten(titleOf(part), 80), node.o === "opaque" ? "a module that runs as Python" : `${node.o} ${shorten(node.x, 60)}`, part),
    part.changes.length ? el("p", { class: "chips" }, part.changes.map((index) => passChip(app, index))) : null,
    ...weightSections(app, node.weights.map((index) => app.content.parameters[index])),
    node.code && section("Code", el("pre", { tabindex: "0" }, el("code", {}, shorten(node.code, 4000)))),
    section(
      "Facts",
      facts([
        ["Value", shapes || (node.o === "opaque" ? null : "shape not known without example inputs")],
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

function groupPanel(app, part) {
  const rows = part.weights.map((index) => app.content.parameters[index]);
  const sum = (key) => rows.reduce((total, row) => total + (row[key] ?? 0), 0);
  const density = densityOf(part.weights, app.content.parameters);
  return [
    heading(app, shorten(titleOf(part), 80), part.run === "python" ? "a module whose forward Python runs" : "a module", part),
    part.changes.length ? el("p", { class: "chips" }, part.changes.map((index) => passChip(app, index))) : null,
    section(
      "Facts",
      facts([
        ["Path", part.p && shorten(part.p, 200)],
        ["Nodes", String(part.boxes)],
        ["Weights", rows.length ? `${count(sum("weights"))}, of which ${count(sum("active"))} active` : null],
        ["Density", density === null ? null : percent(density)],
        ["Operations", sum("flops_dense") ? `${count(sum("flops_dense"))} dense, ${count(sum("flops_sparse"))} sparse` : null],
      ]),
    ),
    ...(rows.length <= 2 ? weightSections(app, rows) : []),
    rows.length > 2 ? section("Density of its layers", el("ul", { class: "bars" }, rows.map((row) => barRow(app, row)))) : null,
  ];
}

function heading(app, title, sub, part) {
  return el(
    "header",
    {},
    el("div", {}, el("h2", {}, title), el("p", { class: "muted" }, sub)),
    part && el("button", { type: "button", class: "quiet close", "aria-label": "Close the details", on: { click: () => app.clear() } }, "✕"),
  );
}

function barRow(app, row) {
  return el(
    "li",
    {},
    el("button", { type: "button", class: "link", on: { click: () => app.goToParameter(row) } }, shorten(row.parameter, 60)),
    row.tier === null ? el("span", { class: "muted" }, "dense") : densityBar(row.active / Math.max(row.weights, 1)),
  );
}

/** Weights are known as they are now, so beside the original graph they say so. */
function weightSections(app, rows) {
  const note = app.when === "before" && rows.some((row) => row.tier !== null);
  return [note ? el("p", { class: "muted" }, "Its weights after the passes:") : null, ...rows.map(weightSection)];
}

function weightSection(row) {
  const known = (value) => value !== undefined && value !== null;
  return el(
    "section",
    { class: "weight" },
    el("h3", {}, shorten(row.parameter, 80)),
    facts([
      ["Shape", sizes(row.shape)],
      ["Active", row.tier === null ? `all ${count(row.weights)} (no mask)` : `${count(row.active)} of ${count(row.weights)}, ${percent(row.active / Math.max(row.weights, 1))}`],
      ["Operations", row.flops_dense ? `${count(row.flops_dense)} dense, ${count(row.flops_sparse)} sparse` : null],
      ["Saved for backward", known(row.saved) ? `${bytes(row.saved)}${known(row.saved_before) ? `, ${bytes(row.saved_before)} before` : ""}` : null],
      ["Rewritten as", row.tier && { graph: "nodes of a graph", module: "a single layer that Python calls", hook: "an opaque module: masked by hooks" }[row.tier]],
      ["Why not better", row.reason && shorten(row.reason, 400)],
    ]),
    row.mask && maskFigure(row),
    row.histogram && histogramFigure(row),
  );
}

function maskFigure({ parameter, mask, shape }) {
  const [width, height] = mask.size;
  const [down, across] = [mask.step[1], mask.step[0]];
  const exact = down === 1 && across === 1;
  const kernel = shape.length > 2 ? ` (${shape.slice(1).join(" × ")})` : "";
  const scale = exact ? "light: active, dark: pruned" : `a pixel is ${down} × ${across} weights; brightest: ${percent(mask.brightest)} active`;
  const image = el("img", { src: mask.url, width, height, alt: `Mask of ${shorten(parameter, 80)}: ${mask.weights[1]} output channels by ${mask.weights[0]} inputs` });
  image.style.aspectRatio = `${width} / ${Math.min(Math.max(height, width / 6), width * 1.4)}`;
  return el(
    "figure",
    { class: "mask" },
    image,
    el("figcaption", {}, el("b", {}, "Mask. "), `${mask.weights[1]} outputs ↓ by ${mask.weights[0]} inputs${kernel} →; ${scale}.`),
  );
}

function histogramFigure(row) {
  const [low, high, counts] = row.histogram;
  const [width, height] = [320, 110];
  const most = Math.max(...counts, 1);
  const x = (value) => ((value - low) / (high - low)) * width;
  const bars = counts.map((number, index) =>
    svg("rect", { x: (index * width) / counts.length + 0.5, y: height - (number / most) * (height - 8), width: width / counts.length - 1, height: (number / most) * (height - 8) }));
  const cut = row.threshold;
  const band = cut && svg("rect", { class: "band", x: x(-cut), y: 0, width: x(cut) - x(-cut), height });
  const lines = cut ? [-cut, cut].map((at) => svg("line", { class: "cut", x1: x(at), x2: x(at), y1: 0, y2: height })) : [];
  const name = `Histogram of ${row.parameter.slice(0, 80)}`;
  const what = row.tier === null ? (row.sample ? "a sample of its values" : "its values") : "its active values";
  return el(
    "figure",
    { class: "histogram" },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name, preserveAspectRatio: "none" }, band, bars, lines),
    el("div", { class: "axis", "aria-hidden": "true" }, el("span", {}, decimal(low)), el("span", {}, "0"), el("span", {}, decimal(high))),
    el("figcaption", {}, el("b", {}, "Weights. "), `${what}.`, cut ? ` An adjustment at round 0 prunes the ${percent(row.rate)} below |w| = ${decimal(cut)} (shaded).` : ""),
  );
}

function overviewPanel(app) {
  const { passes } = app.content;
  const refused = gathered(passes.flatMap((pass) => pass.refusals.map(([where, reason]) => [pass.name, where, reason])));
  const total = passes.reduce((sum, pass) => sum + pass.refusals.length, 0);
  const most = Math.max(...passes.map((pass) => pass.rewrites), 1);
  return [
    heading(app, "What was rewritten", "Choose a box for its code, shapes, mask and weights."),
    passes.length
      ? el("ul", { class: "passes" }, passes.map((pass, index) =>
          el("li", {}, passChip(app, index), el("span", { class: "meter" }, el("i", { style: { width: `${(pass.rewrites / most) * 100}%`, background: passColour(index) } })), el("b", {}, String(pass.rewrites)))))
      : el("p", { class: "muted" }, "The model is not transformed: these are its own nodes."),
    refused.length
      ? section(`Left as it was (${total})`, el("ul", { class: "refusals" }, refused.slice(0, 12).map((entry) => refusalItem(entry, true))))
      : null,
    refused.length > 12 ? el("button", { type: "button", class: "link", on: { click: () => app.openTab("passes") } }, `All ${total} with reasons`) : null,
    section("Keys", el("p", { class: "keys" }, ...[["/", "search"], ["↑ ↓", "go through"], ["→ ←", "open, close"], ["Enter", "details"], ["+ − 0", "zoom"], ["b", "before, after"]].map(([key, what]) => el("span", {}, el("kbd", {}, key), ` ${what}`)))),
  ];
}
