// The views next to the graph: layers, passes and coverage, memory, training.

function layersSection(app) {
  const { parameters } = app.content;
  const density = (row) => row.active / Math.max(row.weights, 1);
  const some = (test) => parameters.some(test);
  const saved = (row) =>
    isKnown(row.saved_before)
      ? change(bytes(row.saved_before), bytes(row.saved ?? 0))
      : isKnown(row.saved)
        ? bytes(row.saved)
        : "–";
  const columns = [
    ["parameter", "Layer", (row) => row.parameter, (row) => parameterLink(app, row)],
    ["shape", "Shape", (row) => row.weights, (row) => row.shape.join("×")],
    ["density", "Density", density, (row) => densityBar(density(row))],
    ["weights", "Weights", (row) => row.weights, (row) => count(row.weights)],
    ["active", "Active", (row) => row.active, (row) => count(row.active)],
    [
      "flops",
      "Operations",
      (row) => row.flops_sparse ?? -1,
      (row) => (row.flops_dense ? change(count(row.flops_dense), count(row.flops_sparse)) : "–"),
      some((row) => row.flops_dense),
    ],
    ["saved", "Saved bytes", (row) => row.saved ?? -1, saved, some((row) => isKnown(row.saved))],
    ["codec", "Codec", (row) => row.codec ?? "", (row) => row.codec ?? "–", some((row) => row.codec)],
    ["bytes", "Bytes in the file", (row) => row.nbytes ?? 0, (row) => bytes(row.nbytes ?? 0), some((row) => row.codec)],
    [
      "tier",
      "Rewritten in",
      (row) => row.tier ?? "",
      (row) => el("span", { class: `tier ${row.tier ?? "dense"}` }, row.tier ?? "dense"),
      some((row) => row.tier),
    ],
    ["reason", "Why not better", (row) => row.reason, (row) => shorten(row.reason, 300), some((row) => row.reason)],
  ];
  return [
    intro(
      "Layers",
      "What sparsity does to each weight. Choose a name to see its mask in the graph; choose a heading to sort.",
    ),
    figures(app.content),
    sortable("Table of layers", columns, parameters),
  ];
}

function compareSection(app) {
  const { before, after, parameters, total, only_before, only_after } = app.content.comparison;
  const known = new Map(app.content.parameters.map((row) => [row.parameter, row]));
  const masked = parameters.filter((row) => row.is_masked);
  const rows = masked.length ? masked : parameters;
  const columns = [
    [
      "parameter",
      "Layer",
      (row) => row.parameter,
      (row) => (known.has(row.parameter) ? parameterLink(app, known.get(row.parameter)) : shorten(row.parameter, 60)),
    ],
    [
      "density",
      "Overlap of masks",
      (row) => row.overlap,
      (row) => densityBar(row.overlap, "of the weights that are active in either are active in both"),
      masked.length > 0,
    ],
    ["grown", "Grown", (row) => row.grown, (row) => count(row.grown), masked.length > 0],
    ["pruned", "Pruned", (row) => row.pruned, (row) => count(row.pruned), masked.length > 0],
    ["active", "Active", (row) => row.active_after, (row) => change(count(row.active_before), count(row.active_after))],
    [
      "distance",
      "Distance",
      (row) => row.distance ?? -1,
      (row) => (isKnown(row.distance) ? decimal(row.distance) : "–"),
    ],
    [
      "relative",
      "of the norm",
      (row) => row.relative_distance ?? -1,
      (row) => (isKnown(row.relative_distance) ? percent(row.relative_distance) : "–"),
    ],
  ];
  const only = [
    [before, only_before],
    [after, only_after],
  ].filter(([, names]) => names.length);
  const summary = masked.length
    ? `${percent(total.overlap)} of the active weights are the same (Jaccard); ${count(total.grown)} grown, ${count(total.pruned)} pruned.`
    : "Neither side has masks: all weights are active.";
  return [
    intro("Comparison", `From ${shorten(before, 80)} to ${shorten(after, 80)}. ${summary}`),
    sortable("What changed per layer", columns, rows),
    ...only.map(([name, names]) =>
      el(
        "p",
        { class: "muted only" },
        `Only in ${shorten(name, 80)}: ${names.map((other) => shorten(other, 60)).join(", ")}`,
      ),
    ),
  ];
}

const intro = (title, text) => el("header", { class: "intro" }, el("h2", {}, title), el("p", { class: "muted" }, text));
const change = (before, after) => el("span", { class: "change" }, el("span", { class: "muted" }, before), " → ", after);

function passesSection(app) {
  const { passes, parameters } = app.content;
  const tiers = [
    ["graph", "Nodes of a graph: masks, kernels, packed activations"],
    ["module", "Single layers that Python calls: masks, packed activations"],
    ["hook", "Opaque modules: masked by hooks"],
    [null, "Left dense"],
  ];
  const total = parameters.reduce((sum, row) => sum + row.weights, 0) || 1;
  const shares = tiers
    .map(([tier, meaning]) => [tier ?? "dense", meaning, parameters.filter((row) => row.tier === tier)])
    .filter(([, , rows]) => rows.length);
  const coverage = el(
    "div",
    { class: "card" },
    el("h3", {}, "Where the weights are rewritten"),
    el(
      "div",
      { class: "stack", "aria-hidden": "true" },
      shares.map(([tier, , rows]) =>
        el("i", {
          class: `tier-${tier}`,
          style: { "flex-grow": String(rows.reduce((sum, row) => sum + row.weights, 0) / total) },
        }),
      ),
    ),
    el(
      "ul",
      { class: "plain-list" },
      shares.map(([tier, meaning, rows]) => {
        const held = rows.reduce((sum, row) => sum + row.weights, 0);
        const reasons = [...new Set(rows.map((row) => row.reason).filter(Boolean))];
        return el(
          "li",
          {},
          el("span", { class: `tier ${tier}` }, tier),
          el("b", {}, ` ${percent(held / total)} `),
          el("span", {}, `of the weights, ${rows.length} parameters. ${meaning}.`),
          reasons.length
            ? el(
                "details",
                {},
                el("summary", {}, `${reasons.length} ${reasons.length > 1 ? "reasons" : "reason"}`),
                el(
                  "ul",
                  {},
                  reasons.slice(0, 200).map((reason) => el("li", {}, shorten(reason, 400))),
                ),
              )
            : null,
        );
      }),
    ),
  );
  const cards = passes.map((pass, index) =>
    el(
      "div",
      { class: "card pass", style: { "--pass": passColour(index) } },
      el("h3", {}, passChip(app, index)),
      pass.options ? el("p", { class: "options" }, shorten(pass.options, 400)) : null,
      el(
        "p",
        {},
        el("b", {}, String(pass.rewrites)),
        ` rewritten, `,
        el("b", {}, String(pass.refusals.length)),
        " refused",
      ),
      pass.refusals.length
        ? el(
            "details",
            { open: pass.refusals.length <= 6 },
            el("summary", {}, "What was refused, and why"),
            el(
              "ul",
              { class: "refusals" },
              pass.refusals.map(([where, reason]) =>
                el("li", {}, el("b", {}, shorten(where, 100)), ` ${reasonOf(where, reason)}`),
              ),
            ),
          )
        : null,
    ),
  );
  return [
    intro("Passes and coverage", "Each pass in the order in which it ran: what it rewrote, what it refused and why."),
    parameters.some((row) => row.tier) ? coverage : null,
    el("div", { class: "cards" }, cards),
  ];
}

function memorySection(app) {
  const chart = memoryChart(app.content.memory);
  const place = el("div");
  const [before, after] = chart.peaks;
  const options = [
    ["after", "After", chart.after],
    ["before", "Before", chart.before],
  ].filter(([, , draw]) => draw);
  const control = segmented(
    "Model",
    options.map(([value, label]) => [value, label]),
    "after",
    (value) => place.replaceChildren(options.find(([name]) => name === value)[2]()),
  );
  place.replaceChildren(chart.after());
  const text = before
    ? `Peak ${bytes(after)} instead of ${bytes(before)}: ${percent(Math.abs(1 - after / before))} ${after > before ? "more" : "less"}.`
    : `Peak ${bytes(after)}.`;
  return [
    intro("Memory over one training step", `${text} Each moment is one operation; what is alive then, by category.`),
    app.content.memory.hint && el("p", { class: "hint" }, app.content.memory.hint),
    options.length > 1 ? control : null,
    place,
    largestLayers(app.content.memory),
  ];
}

/** The layers that keep most for backward, each beside what the layer of that name kept before. */
function largestLayers({ after, before }) {
  if (!after.layers.length) return null;
  const earlier = new Map(before?.layers ?? []);
  const most = after.layers[0][1];
  const rows = after.layers.map(([path, kept]) =>
    el(
      "li",
      {},
      elided(path || "the model itself"),
      el("span", { class: "meter" }, el("i", { class: "kept", style: { width: `${(kept / most) * 100}%` } })),
      el("b", {}, bytes(kept)),
      before && el("span", { class: "muted" }, earlier.has(path) ? `${bytes(earlier.get(path))} before` : ""),
    ),
  );
  return el(
    "div",
    { class: "card largest" },
    el("h3", {}, "Layers that keep most between forward and backward"),
    el("ul", {}, rows),
  );
}

function trainingSection(app) {
  const { rounds } = app.content.history;
  if (!rounds.length) return [intro("Training", "The history has no rounds.")];
  const index = rounds.map((round) => round.round_index);
  const values = (name) => rounds.map((round) => round[name]);
  const marks = rounds.map((round, at) => (round.adjusted ? at : -1)).filter((at) => at >= 0);
  const options = { rounds: index, marks };
  const known = (name) => values(name).some((value) => value !== null);
  const charts = [
    known("test_accuracy") &&
      lineChart("Accuracy on the test set", [["accuracy", values("test_accuracy"), SERIES[0]]], {
        ...options,
        format: percent,
        fromZero: false,
      }),
    lineChart(
      "Loss",
      [
        ["training", values("train_loss"), SERIES[0]],
        known("test_loss") && ["test", values("test_loss"), SERIES[1]],
      ].filter(Boolean),
      { ...options, format: decimal },
    ),
    lineChart(
      "Traffic per round",
      [
        ["to clients", values("bytes_down"), SERIES[0]],
        ["to the server", values("bytes_up"), SERIES[1]],
      ],
      { ...options, format: bytes },
    ),
    lineChart("Density", [["density", values("density"), SERIES[2]]], { ...options, format: percent }),
    lineChart("Saved for backward, largest client", [["bytes", values("peak_saved_bytes"), SERIES[3]]], {
      ...options,
      format: bytes,
    }),
  ];
  const note = marks.length ? " Dotted lines are adjustment rounds." : "";
  return [
    intro("Training", `${rounds.length} rounds.${note}`),
    el("div", { class: "charts" }, charts.filter(Boolean), churnMap(app.content.history, app.content.parameters)),
  ];
}

/** A choice of few, as radio buttons side by side. */
function segmented(label, options, chosen, onChange) {
  const name = `choice-${label.toLowerCase().replace(/\W/g, "-")}`;
  return el(
    "fieldset",
    { class: "segmented" },
    el("legend", { class: "unseen" }, label),
    options.map(([value, text]) =>
      el(
        "label",
        {},
        el("input", { type: "radio", name, value, checked: value === chosen, on: { change: () => onChange(value) } }),
        el("span", {}, text),
      ),
    ),
  );
}
