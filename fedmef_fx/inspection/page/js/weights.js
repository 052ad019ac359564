// What is said about a weight: facts, the picture of its mask, the histogram of its values.

/** Only the present weights are known; next to the original graph they say so. */
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
      [
        "Active",
        !hasMask(row)
          ? `all ${count(row.weights)} (no mask)`
          : `${count(row.active)} of ${count(row.weights)}, ${percent(row.active / Math.max(row.weights, 1))}`,
      ],
      ["Operations", row.flops_dense ? `${count(row.flops_dense)} dense, ${count(row.flops_sparse)} sparse` : null],
      [
        "Saved for backward",
        known(row.saved)
          ? `${bytes(row.saved)}${known(row.saved_before) ? `, ${bytes(row.saved_before)} before` : ""}`
          : null,
      ],
      [
        "Rewritten as",
        row.tier &&
          {
            graph: "nodes of a graph",
            module: "a single layer that Python calls",
            hook: "an opaque module: masked by hooks",
          }[row.tier],
      ],
      ["Stored as", row.codec && `${bytes(row.nbytes)} ${row.codec}`],
      ["Why not better", row.reason && shorten(row.reason, 400)],
    ]),
    row.mask && maskFigure(row),
    row.histogram && histogramFigure(row),
  );
}

function maskFigure(row) {
  const { parameter, mask, shape } = row;
  const [width, height] = mask.size;
  const [down, across] = [mask.step[1], mask.step[0]];
  const exact = down === 1 && across === 1;
  const kernel = shape.length > 2 ? ` (${shape.slice(1).join(" × ")})` : "";
  const scale =
    mask.brightest === 1 && row.active === row.weights
      ? "every weight is active"
      : exact
        ? "light: active, dark: pruned"
        : `a pixel is ${down} × ${across} weights; brightest: ${percent(mask.brightest)} active`;
  const image = el("img", {
    src: mask.url,
    width,
    height,
    alt: `Mask of ${shorten(parameter, 80)}: ${mask.weights[1]} output channels by ${mask.weights[0]} inputs`,
  });
  image.style.aspectRatio = `${width} / ${Math.min(Math.max(height, width / 6), width * 1.4)}`;
  return el(
    "figure",
    { class: "mask" },
    image,
    el(
      "figcaption",
      {},
      el("b", {}, "Mask. "),
      `${mask.weights[1]} outputs ↓ by ${mask.weights[0]} inputs${kernel} →; ${scale}.`,
    ),
  );
}

function histogramFigure(row) {
  const [low, high, counts] = row.histogram;
  const [width, height] = [320, 110];
  const most = Math.max(...counts, 1);
  const x = (value) => ((value - low) / (high - low)) * width;
  const bars = counts.map((number, index) =>
    svg("rect", {
      x: (index * width) / counts.length + 0.5,
      y: height - (number / most) * (height - 8),
      width: width / counts.length - 1,
      height: (number / most) * (height - 8),
    }),
  );
  const cut = row.threshold;
  const band = cut && svg("rect", { class: "band", x: x(-cut), y: 0, width: x(cut) - x(-cut), height });
  const lines = cut
    ? [-cut, cut].map((at) => svg("line", { class: "cut", x1: x(at), x2: x(at), y1: 0, y2: height }))
    : [];
  const name = `Histogram of ${row.parameter.slice(0, 80)}`;
  const what = row.tier === null ? (row.sample ? "A sample of its values" : "Its values") : "Its active values";
  return el(
    "figure",
    { class: "histogram" },
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name, preserveAspectRatio: "none" },
      band,
      bars,
      lines,
    ),
    el(
      "div",
      { class: "axis", "aria-hidden": "true" },
      el("span", {}, decimal(low)),
      el("span", {}, "0"),
      el("span", {}, decimal(high)),
    ),
    el(
      "figcaption",
      {},
      el("b", {}, "Weights. "),
      `${what}.`,
      cut ? ` An adjustment at round 0 prunes the ${percent(row.rate)} below |w| = ${decimal(cut)} (shaded).` : "",
    ),
  );
}
