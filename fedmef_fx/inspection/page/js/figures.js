// The few numbers that say what became of a model.

/** Name, value, and what it is compared with. */
function figuresOf({ parameters, passes, memory, saved }) {
  const sum = (key) => parameters.reduce((total, row) => total + (row[key] ?? 0), 0);
  const weights = Math.max(sum("weights"), 1);
  const refusals = passes.reduce((total, pass) => total + pass.refusals.length, 0);
  const inGraph = parameters.filter((row) => row.tier === "graph").reduce((total, row) => total + row.weights, 0);
  const peaks = memory ? memoryChart(memory).peaks : [];
  return [
    ["Weights active", percent(sum("active") / weights), `${count(sum("active"))} of ${count(sum("weights"))}`],
    sum("flops_dense") && ["Operations", count(sum("flops_sparse")), `of ${count(sum("flops_dense"))} dense`],
    saved?.[1] && ["Saved for backward", bytes(saved[0]), `of ${bytes(saved[1])} before`],
    peaks[0] && ["Peak memory", bytes(peaks[1]), `of ${bytes(peaks[0])} before`],
    parameters[0]?.codec && ["Tensors in the file", bytes(sum("nbytes")), `in ${parameters.length} tensors`],
    passes.length && ["In graphs", percent(inGraph / weights), "of the weights"],
    passes.length && [
      "Left as it was",
      String(refusals),
      refusals === 1 ? "refusal, with its reason" : "refusals, with reasons",
    ],
  ];
}

function comparedFigures({ total }) {
  return [
    ["Overlap of masks", percent(total.overlap), "of the active weights"],
    ["Grown", count(total.grown), `of ${count(total.active_after)} active`],
    ["Pruned", count(total.pruned), `of ${count(total.active_before)} active before`],
    isKnown(total.relative_distance) && ["Distance", percent(total.relative_distance), "of the norm before"],
  ];
}

/** The figures as a list of terms. */
function figures(content) {
  const list = content.views.length ? figuresOf(content) : comparedFigures(content.comparison);
  return el(
    "dl",
    { class: "stats" },
    list
      .filter(Boolean)
      .map(([term, value, rest]) =>
        el("div", {}, el("dt", {}, term), el("dd", {}, el("b", {}, value), el("span", {}, ` ${rest}`))),
      ),
  );
}
