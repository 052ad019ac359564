// Charts over time, drawn as SVG. Values can be read with the pointer and with the arrow keys.

const SERIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a94a3"];
const BOX = { height: 240, left: 58, right: 12, top: 12, bottom: 28 };

/** Width in CSS pixels that a chart will have, so that its text keeps its size. */
const widthOf = (isWide) => Math.max(260, Math.min(isWide ? 1160 : 560, window.innerWidth - 66));

/** Round values for an axis from 0 or `low` to `high`. */
function ticks(low, high, most = 5) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const values = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) values.push(value);
  return values;
}

/** Scales and axes of a chart; `y` has its values' range and format, `x` the labels below. */
function frame(name, { low, high, format }, xLabels, isWide = false) {
  const width = widthOf(isWide);
  const { height, left, right, top, bottom } = BOX;
  const y = (value) => height - bottom - ((value - low) / (high - low || 1)) * (height - top - bottom);
  const x = (share) => left + share * (width - left - right);
  const lines = ticks(low, high).map((value) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)),
  ]);
  const labels = xLabels.map(([share, text, anchor = "middle"]) =>
    svg("text", { x: x(share), y: height - 8, "text-anchor": anchor }, text),
  );
  const node = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": name, tabindex: "0" },
    lines.flat(),
    labels,
  );
  return { node, x, y, width };
}

/** Show what `describe(share)` says at the pointer, and at the place that arrow keys move to; `first` before either. */
function readable(figure, { node, x, width }, steps, describe, first = 1) {
  const rule = svg("line", { class: "rule", y1: BOX.top, y2: BOX.height - BOX.bottom, visibility: "hidden" });
  const output = el("output", { class: "readout" }, ...describe(first));
  let at = first;
  const show = (share) => {
    at = Math.min(1, Math.max(0, share));
    set(rule, { x1: x(at), x2: x(at), visibility: "visible" });
    output.replaceChildren(...describe(at));
  };
  set(node, {
    on: {
      pointermove: (event) => {
        const place = node.getBoundingClientRect();
        const here = ((event.clientX - place.left) / place.width) * width;
        show((here - BOX.left) / (width - BOX.left - BOX.right));
      },
      keydown: (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!step) return;
        event.preventDefault();
        show(at + step / Math.max(steps, 1));
      },
    },
  });
  node.append(rule);
  figure.append(output);
}

const key = (colour, text, kind = "swatch") =>
  el("span", { class: "key" }, el("i", { class: kind, style: { "--series": colour } }), text);

/** Lines over rounds. `series`: name, values (null where unknown), colour. */
function lineChart(title, series, { format, rounds, fromZero = true, marks = [] }) {
  const known = series.flatMap(([, values]) => values.filter((value) => value !== null));
  const high = Math.max(...known);
  const low = fromZero ? Math.min(0, ...known) : Math.min(...known);
  const last = Math.max(rounds.length - 1, 1);
  const chart = frame(title, { low, high: high === low ? low + 1 : high, format }, [
    [0, `round ${rounds[0]}`, "start"],
    [1, String(rounds[rounds.length - 1]), "end"],
  ]);
  marks.forEach((index) =>
    chart.node.append(
      svg("line", {
        class: "mark",
        x1: chart.x(index / last),
        x2: chart.x(index / last),
        y1: BOX.top,
        y2: BOX.height - BOX.bottom,
      }),
    ),
  );
  series.forEach(([, values, colour]) => {
    const points = values
      .map((value, index) => (value === null ? null : [chart.x(index / last), chart.y(value)]))
      .filter(Boolean);
    chart.node.append(svg("polyline", { class: "line", points: points.join(" "), stroke: colour }));
    if (points.length <= 40)
      chart.node.append(...points.map(([cx, cy]) => svg("circle", { cx, cy, r: 2.6, fill: colour })));
  });
  const figure = el(
    "figure",
    { class: "card" },
    el(
      "figcaption",
      {},
      el("b", {}, title),
      el("span", { class: "keys" }, series.length > 1 ? series.map(([name, , colour]) => key(colour, name)) : []),
    ),
    chart.node,
  );
  readable(figure, chart, last, (share) => {
    const index = Math.round(share * last);
    return [
      el("b", {}, `round ${rounds[index]}`),
      ...series.map(([name, values]) =>
        el("span", {}, `${name} ${values[index] === null ? "–" : format(values[index])}`),
      ),
    ];
  });
  return figure;
}

const peakShare = (at, totals) => at[totals.indexOf(Math.max(...totals))];

/** A dot at the moment at which most is alive, with its bytes. */
function peakMark({ x, y, width }, at, totals) {
  const most = Math.max(...totals);
  const [left, top] = [x(peakShare(at, totals)), y(most)];
  const isRight = left > width * 0.75;
  return [
    svg("circle", { class: "peak", cx: left, cy: top, r: 4 }),
    svg(
      "text",
      { class: "peak-label", x: left + (isRight ? -9 : 9), y: Math.max(top + 4, 12), "text-anchor": isRight ? "end" : "start" },
      `peak ${bytes(most)}`,
    ),
  ];
}

/** Bytes over a training step: the categories of one model on top of one another, the total of the other as a line. */
function memoryChart(memory) {
  const { after, before } = memory;
  const total = (line) =>
    line.moments.map((_, index) => line.categories.reduce((sum, [, values]) => sum + values[index], 0));
  const high = Math.max(...total(after), ...(before ? total(before) : [0]));
  const phases = after.phases.map(([name]) => name);
  // Two models take different numbers of moments: a phase has the same width for both.
  const spread = (line) => {
    const starts = [...line.phases.map(([, start]) => start), line.moments.length];
    return line.moments.map((_, index) => {
      const phase = Math.max(
        starts.findLastIndex((start) => start <= index),
        0,
      );
      const size = Math.max(starts[phase + 1] - starts[phase], 1);
      return (phase + (index - starts[phase]) / size) / line.phases.length;
    });
  };
  const draw = (shown, other, otherName) => {
    const labels = phases.map((name, index) => [(index + 0.5) / phases.length, name]);
    const chart = frame("Bytes over a training step", { low: 0, high, format: bytes }, labels, true);
    const at = [...spread(shown), 1];
    let below = at.map(() => 0);
    shown.categories.forEach(([name, values], index) => {
      const upper = [...values, values[values.length - 1]].map((value, moment) => value + below[moment]);
      const up = at.map((share, moment) => `${chart.x(share)},${chart.y(upper[moment])}`);
      const down = at.map((share, moment) => `${chart.x(share)},${chart.y(below[moment])}`).reverse();
      chart.node.append(
        svg(
          "polygon",
          { class: "area", points: [...up, ...down].join(" "), fill: SERIES[index % SERIES.length] },
          svg("title", {}, name),
        ),
      );
      below = upper;
    });
    phases.slice(1).forEach((_, index) =>
      chart.node.append(
        svg("line", {
          class: "mark",
          x1: chart.x((index + 1) / phases.length),
          x2: chart.x((index + 1) / phases.length),
          y1: BOX.top,
          y2: BOX.height - BOX.bottom,
        }),
      ),
    );
    if (other) {
      const sums = total(other);
      chart.node.append(
        svg("polyline", {
          class: "line other",
          points: [...spread(other), 1]
            .map((share, moment) => `${chart.x(share)},${chart.y(sums[Math.min(moment, sums.length - 1)])}`)
            .join(" "),
        }),
      );
    }
    const keys = [
      ...shown.categories.map(([name], index) => key(SERIES[index % SERIES.length], name)),
      other && key("currentColor", otherName, "dash"),
    ];
    chart.node.append(...peakMark(chart, at, total(shown)));
    const figure = el(
      "figure",
      { class: "card wide" },
      el("figcaption", {}, el("span", { class: "keys" }, keys)),
      chart.node,
    );
    readable(
      figure,
      chart,
      shown.moments.length,
      (share) => {
        const moment = Math.max(
          at.slice(0, -1).findLastIndex((start) => start <= share + 1e-9),
          0,
        );
        return [
          el("b", {}, shorten(shown.moments[moment], 60)),
          ...shown.categories.map(([name, values]) => el("span", {}, `${name} ${bytes(values[moment])}`)),
          el("b", {}, bytes(total(shown)[moment])),
        ];
      },
      peakShare(at, total(shown)),
    );
    return figure;
  };
  return {
    after: () => draw(after, before, "total before"),
    before: before && (() => draw(before, after, "total after")),
    peaks: [before && Math.max(...total(before)), Math.max(...total(after))],
  };
}

/** Weights that changed places, per layer and adjustment round: the darker, the larger a share of the layer. */
function churnMap(history, parameters) {
  const rounds = history.rounds.filter((round) => Object.keys(round.churn).length);
  const names = [...new Set(rounds.flatMap((round) => Object.keys(round.churn)))];
  if (!rounds.length || !names.length) return null;
  const sizesOf = new Map(parameters.map((row) => [row.parameter, row.active]));
  const share = (round, name) =>
    (round.churn[name] ?? 0) /
    Math.max(sizesOf.get(name) ?? Math.max(...rounds.map((other) => other.churn[name] ?? 0)), 1);
  const most = Math.max(...rounds.flatMap((round) => names.map((name) => share(round, name))), 1e-9);
  const head = el(
    "tr",
    {},
    el("th", { scope: "col" }, "layer"),
    rounds.map((round) => el("th", { scope: "col", class: "number" }, String(round.round_index))),
  );
  const body = names.map((name) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, shorten(name, 40)),
      rounds.map((round) =>
        el(
          "td",
          {
            class: "heat",
            style: { "--heat": `${Math.round((share(round, name) / most) * 100)}%` },
            title: `${percent(share(round, name))} of the active weights`,
          },
          count(round.churn[name] ?? 0),
        ),
      ),
    ),
  );
  return el(
    "figure",
    { class: "card wide" },
    el("figcaption", {}, el("b", {}, "Weights that changed places, by adjustment round")),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Mask churn" },
      el("table", { class: "data" }, el("thead", {}, head), el("tbody", {}, body)),
    ),
  );
}
