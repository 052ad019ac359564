// The graph: which boxes are open, where each one stands, and the way of each value. Rows, columns and lanes come from the
// document; here they only get sizes, which depend on what is open.

const SIZE = { layer: [204, 40], group: [204, 40], op: [140, 26], head: 28, pad: 12, row: 15, column: 22, lane: 13 };

/** What a node is drawn as. */
function kindOf(node) {
  if (node.o === "opaque") return "opaque";
  if (node.o === "placeholder" || node.o === "output") return "port";
  return node.weights.length ? "layer" : "op";
}

/** A number says nothing without the name of the list that it counts. */
const titleOf = (part) => (/^\d+(\.|$)/.test(part.l) && part.parent?.parent ? `${part.parent.l}.${part.l}` : part.l);

/** Prepare a view of the document: parents, what is folded into what, weights of nodes and groups. */
function prepare(view) {
  const groups = new Map();
  for (const [id, node] of view.nodes.entries()) {
    Object.assign(node, {
      id,
      inputs: node.in ?? [],
      users: [],
      folded: [],
      weights: node.w ?? [],
      changes: node.ch ?? [],
    });
  }
  for (const node of view.nodes) {
    for (const input of node.inputs) view.nodes[input].users.push(node.id);
    for (const host of node.h ?? []) view.nodes[host].folded.push(node.id);
  }
  for (const node of view.nodes) {
    if (!node.folded.length) continue;
    const inside = node.folded.map((id) => view.nodes[id]);
    node.weights = [...new Set([...node.weights, ...inside.flatMap((other) => other.w ?? [])])];
    node.changes = [...new Set([...node.changes, ...inside.flatMap((other) => other.ch ?? [])])].sort((a, b) => a - b);
  }
  const visit = (part, parent) => {
    part.parent = parent;
    if (!part.c) {
      const node = view.nodes[part.i];
      node.part = part;
      Object.assign(part, { node, boxes: 1, weights: node.weights, changes: node.changes });
      return;
    }
    groups.set(part.k, part);
    part.c.forEach((child) => visit(child, part));
    part.boxes = part.c.reduce((sum, child) => sum + child.boxes, 0);
    part.weights = [...new Set(part.c.flatMap((child) => child.weights))];
    part.changes = [...new Set(part.c.flatMap((child) => child.changes))].sort((a, b) => a - b);
  };
  visit(view.root, null);
  view.groups = groups;
  return view;
}

/**
 * The groups to open so that everything can be seen and read at once: level by level, as many of a level as fit. A model
 * whose parts Python calls stays closed, because its parts are what one wants to see first.
 * @param {function} fits whether a picture of a width and height does
 */
function openThatFits(view, fits) {
  const open = new Set([view.root.k]);
  if (view.root.run === "python") return open;
  const isFine = () => {
    const { w, h } = measure(view.root, open);
    return fits([w, h]);
  };
  let level = [view.root];
  while (level.length) {
    const next = level.flatMap((group) => group.c.filter((child) => child.c && child.run !== "fallback"));
    level = next.filter((group) => {
      open.add(group.k);
      return isFine() || (open.delete(group.k), false);
    });
  }
  return open;
}

/** Density of some parameters together; null where there are none with a mask. */
function densityOf(indices, parameters) {
  const rows = indices.map((index) => parameters[index]).filter(hasMask);
  const total = rows.reduce((sum, row) => sum + row.weights, 0);
  return total ? rows.reduce((sum, row) => sum + row.active, 0) / total : null;
}

/** Sizes and places of a part and all it holds, relative to the part; `port` is where its values come in and leave. */
function measure(part, open) {
  if (!part.c) {
    const [w, h] = kindOf(part.node) === "layer" || kindOf(part.node) === "opaque" ? SIZE.layer : SIZE.op;
    return { part, w, h, port: w / 2 };
  }
  if (!open.has(part.k)) return { part, w: SIZE.group[0], h: SIZE.group[1], port: SIZE.group[0] / 2 };
  const kids = part.c.map((child) => measure(child, open));
  const before = new Array(part.cols).fill(0);
  const behind = new Array(part.cols).fill(0);
  const heights = [];
  kids.forEach((kid, index) => {
    const [row, column] = part.at[index];
    before[column] = Math.max(before[column], kid.port);
    behind[column] = Math.max(behind[column], kid.w - kid.port);
    heights[row] = Math.max(heights[row] ?? 0, kid.h);
  });
  const ports = [];
  let x = SIZE.pad;
  for (let column = 0; column < part.cols; column += 1) {
    ports.push(x + before[column]);
    x += before[column] + behind[column] + SIZE.column;
  }
  x -= SIZE.column;
  const lanes = Array.from({ length: part.lanes }, (_, lane) => x + SIZE.lane * (lane + 1));
  const w = Math.max(x + SIZE.lane * part.lanes + SIZE.pad, 170);
  const tops = [];
  let y = (part.parent ? SIZE.head : 0) + SIZE.row * 0.8;
  heights.forEach((height, row) => {
    tops[row] = y;
    y += height + SIZE.row;
  });
  kids.forEach((kid, index) => {
    const [row, column] = part.at[index];
    kid.x = ports[column] - kid.port;
    kid.y = tops[row];
  });
  const h = y - SIZE.row * 0.2;
  return { part, w, h, port: ports[0] ?? w / 2, kids, ports, lanes, tops, heights };
}

/** A way along corners, with round bends. */
function roundedPath(points, radius = 9) {
  const turns = points.filter((point, index) => {
    const last = points[index - 1];
    return !last || last[0] !== point[0] || last[1] !== point[1];
  });
  let path = `M${turns[0][0]} ${turns[0][1]}`;
  for (let index = 1; index < turns.length - 1; index += 1) {
    const [[x0, y0], [x1, y1], [x2, y2]] = [turns[index - 1], turns[index], turns[index + 1]];
    const into = Math.hypot(x1 - x0, y1 - y0);
    const out = Math.hypot(x2 - x1, y2 - y1);
    const r = Math.min(radius, into / 2, out / 2);
    const [ax, ay] = [x1 - ((x1 - x0) / into) * r, y1 - ((y1 - y0) / into) * r];
    const [bx, by] = [x1 + ((x2 - x1) / out) * r, y1 + ((y2 - y1) / out) * r];
    path += `L${ax} ${ay}Q${x1} ${y1} ${bx} ${by}`;
  }
  const [x, y] = turns[turns.length - 1];
  return `${path}L${x} ${y}`;
}

/** The way of one value inside an open group, relative to the group. */
function route(place, [source, target, column, lane]) {
  const { part, kids, tops, heights, ports, lanes, port, h } = place;
  const last = tops.length;
  const row = (index, outside) => (index < 0 ? outside : part.at[index][0]);
  const [from, to] = [row(source, -1), row(target, last)];
  const top = part.parent ? SIZE.head : 0;
  const bottomOf = (at) => (at < 0 ? top : tops[at] + heights[at]);
  const topOf = (at) => (at >= last ? h : tops[at]);
  const [x1, y1] = source < 0 ? [port, top] : [kids[source].x + kids[source].port, kids[source].y + kids[source].h];
  const x2 = target < 0 ? port : kids[target].x + kids[target].port;
  const gap = (above, share) => bottomOf(above) + (topOf(above + 1) - bottomOf(above)) * share;
  if (column === null && lane === null) {
    const y = gap(from, 0.5);
    return {
      path: roundedPath([
        [x1, y1],
        [x1, y],
        [x2, y],
        [x2, topOf(to)],
      ]),
      skips: false,
    };
  }
  const x = lane === null ? ports[column] : lanes[lane];
  const points = [
    [x1, y1],
    [x1, gap(from, 0.35)],
    [x, gap(from, 0.35)],
    [x, gap(to - 1, 0.6)],
    [x2, gap(to - 1, 0.6)],
    [x2, topOf(to)],
  ];
  return { path: roundedPath(points), skips: true };
}
