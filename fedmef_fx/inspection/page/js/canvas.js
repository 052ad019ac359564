// The picture of the graph: boxes as buttons of a tree, ways as SVG, moved and scaled as one.

class Canvas {
  /**
   * @param {object} content parameters and passes of the document
   * @param {function} onSelect called with the part that was chosen, or null
   */
  constructor(content, onSelect) {
    this.content = content;
    this.onSelect = onSelect;
    this.open = new Map(); // view -> keys of open groups
    this.elements = new Map(); // part -> its element
    this.selected = null;
    this.focused = null;
    this.hits = new Set();
    this.onlyPass = null;
    this.scale = 1;
    this.x = 0;
    this.y = 0;
    this.grounds = el("div", { class: "layer-grounds", "aria-hidden": "true" });
    this.ways = svg("svg", { class: "layer-ways", "aria-hidden": "true" });
    this.boxes = el("div", {
      class: "layer-boxes",
      role: "tree",
      "aria-label": "Graph",
      on: { keydown: (event) => this.key(event) },
    });
    this.stage = el("div", { class: "stage" }, this.grounds, this.ways, this.boxes);
    this.node = el("div", { class: "canvas" }, this.stage);
    pannable(this);
  }

  /** Show a view; what was open and chosen stays so where the view has it too. */
  show(view) {
    const old = this.view;
    this.view = view;
    if (!this.open.has(view)) {
      const open = firstOpen(view);
      if (old) {
        for (const key of old.groups.keys()) {
          if (!view.groups.has(key)) continue;
          if (this.open.get(old).has(key)) open.add(key);
          else open.delete(key);
        }
      }
      this.open.set(view, open);
    }
    this.focused = null;
    this.draw();
  }

  get opened() {
    return this.open.get(this.view);
  }

  draw() {
    const place = measure(this.view.root, this.opened);
    this.elements.clear();
    this.size = [place.w, place.h];
    this.stage.style.width = `${place.w}px`;
    this.stage.style.height = `${place.h}px`;
    set(this.ways, { width: place.w, height: place.h, viewBox: `0 0 ${place.w} ${place.h}` });
    const drawn = { grounds: [], boxes: [], plain: [], skips: [] };
    this.collect(place, 0, 0, 0, drawn);
    this.grounds.replaceChildren(...drawn.grounds);
    this.boxes.replaceChildren(...drawn.boxes);
    this.ways.replaceChildren(
      svg("defs", {}, arrow("arrow"), arrow("arrow-skip")),
      svg("g", { class: "plain" }, drawn.plain),
      svg("g", { class: "skips" }, drawn.skips),
    );
    this.mark();
  }

  collect(place, x, y, level, drawn) {
    const { part } = place;
    Object.assign(part, { place, x, y });
    if (part.parent) {
      const node = part.c ? this.groupElement(place, level) : this.boxElement(place, level);
      set(node, {
        style: {
          left: `${x}px`,
          top: `${y}px`,
          width: `${place.w}px`,
          height: `${place.kids ? SIZE.head : place.h}px`,
        },
      });
      this.elements.set(part, node);
      drawn.boxes.push(node);
    }
    if (!place.kids) return;
    if (part.parent) {
      const style = { left: `${x}px`, top: `${y}px`, width: `${place.w}px`, height: `${place.h}px` };
      drawn.grounds.push(el("div", { class: `ground ${part.run}`, style }));
    }
    place.kids.forEach((kid) => this.collect(kid, x + kid.x, y + kid.y, level + 1, drawn));
    for (const edge of part.e) {
      const { path, skips } = route(place, edge);
      const ends =
        edge[1] < 0 || place.kids[edge[1]].kids ? {} : { "marker-end": `url(#${skips ? "arrow-skip" : "arrow"})` };
      drawn[skips ? "skips" : "plain"].push(svg("path", { d: path, transform: `translate(${x} ${y})`, ...ends }));
    }
  }

  item(part, classes, level, children, extra = {}) {
    return el(
      "div",
      {
        class: `item ${classes}`,
        role: "treeitem",
        tabindex: "-1",
        "aria-level": level,
        "aria-selected": "false",
        style: { "--pass": part.changes.length ? passColour(part.changes[part.changes.length - 1]) : "transparent" },
        on: { click: () => this.select(part), focus: () => this.focus(part) },
        ...extra,
      },
      stripe(part.changes),
      children,
    );
  }

  boxElement({ part }, level) {
    const { node } = part;
    const kind = kindOf(node);
    const classes = `${kind}${part.changes.length ? " changed" : ""}`;
    const shape = node.s ? node.s[0][1].join("×") : "";
    const density = densityOf(node.weights, this.content.parameters);
    const label = shorten(titleOf(part), 40);
    if (kind === "op" || kind === "port") {
      return this.item(part, classes, level, [el("span", { class: "name" }, label)], { title: shape });
    }
    return this.item(part, classes, level, [
      el("span", { class: "name" }, label),
      el(
        "span",
        { class: "sub" },
        el("span", {}, kind === "opaque" ? "runs as Python" : shorten(node.x, 40)),
        shape && el("b", {}, shape),
      ),
      density !== null && this.view.when === "after" && densityBar(density),
    ]);
  }

  groupElement({ part, kids }, level) {
    const open = Boolean(kids);
    const density = densityOf(part.weights, this.content.parameters);
    const toggle = el("span", {
      class: "chevron",
      "aria-hidden": "true",
      on: { click: (event) => this.toggleBy(event, part) },
    });
    const what = [part.run === "python" ? "Python" : "", part.note ?? "", `${part.boxes} nodes`]
      .filter(Boolean)
      .join(" · ");
    return this.item(
      part,
      `group ${part.run}${open ? " open" : ""}${part.changes.length ? " changed" : ""}`,
      level,
      [
        toggle,
        el("span", { class: "name" }, shorten(titleOf(part), 40)),
        el("span", { class: "sub" }, what),
        !open && density !== null && this.view.when === "after" && densityBar(density),
      ],
      {
        "aria-expanded": String(open),
        on: { click: () => this.clickGroup(part), dblclick: () => this.toggle(part), focus: () => this.focus(part) },
      },
    );
  }

  /** A closed group opens when it is chosen; an open one is only chosen. */
  clickGroup(part) {
    if (!this.opened.has(part.k)) this.toggle(part);
    this.select(part);
  }

  toggleBy(event, part) {
    event.stopPropagation();
    this.toggle(part);
  }

  /** Open or close a group; it stays where it is on the screen. */
  toggle(part) {
    const [x, y] = [part.x + part.place.port, part.y];
    if (this.opened.has(part.k)) this.opened.delete(part.k);
    else this.opened.add(part.k);
    const hadFocus = this.boxes.contains(document.activeElement);
    this.draw();
    this.move(this.x + (x - part.x - part.place.port) * this.scale, this.y + (y - part.y) * this.scale);
    if (hadFocus) this.elements.get(part)?.focus({ preventScroll: true });
    announce(`${part.l} ${this.opened.has(part.k) ? "opened" : "closed"}`);
  }

  setAll(open) {
    this.opened.clear();
    this.opened.add(this.view.root.k);
    if (open) for (const key of this.view.groups.keys()) this.opened.add(key);
    this.draw();
    this.fit();
  }

  /** Make a part visible: open what it lies in. */
  reveal(part) {
    for (let group = part.parent; group; group = group.parent) this.opened.add(group.k);
    this.draw();
    this.centre(part);
  }

  select(part) {
    this.selected = part;
    if (part) this.focused = part;
    this.mark();
    this.onSelect(part);
  }

  focus(part) {
    this.focused = part;
    for (const [other, node] of this.elements) node.tabIndex = other === part ? 0 : -1;
    this.keepVisible(part);
  }

  /** Give the focus to a part, or to the first one where it is not drawn. */
  focusFirst(part) {
    const node = this.elements.get(part) ?? this.elements.values().next().value;
    node?.focus({ preventScroll: true });
  }

  /** Classes that change without a new layout: chosen, found, dimmed. */
  mark() {
    const first = this.elements.has(this.focused) ? this.focused : this.elements.keys().next().value;
    for (const [part, node] of this.elements) {
      node.tabIndex = part === first ? 0 : -1;
      node.setAttribute("aria-selected", String(part === this.selected));
      node.classList.toggle("hit", this.hits.has(part));
      node.classList.toggle("dim", this.onlyPass !== null && !part.changes.includes(this.onlyPass));
    }
  }

  key(event) {
    const order = [...this.elements.keys()];
    const part = this.focused ?? order[0];
    const at = order.indexOf(part);
    const isGroup = Boolean(part?.c);
    const isOpen = isGroup && this.opened.has(part.k);
    const go = (next) => next && this.elements.get(next)?.focus({ preventScroll: true });
    const moves = {
      ArrowDown: () => go(order[at + 1]),
      ArrowUp: () => go(order[at - 1]),
      ArrowRight: () => (isGroup && !isOpen ? this.toggle(part) : isOpen && go(part.c[0])),
      ArrowLeft: () => (isOpen ? this.toggle(part) : go(part.parent)),
      Home: () => go(order[0]),
      End: () => go(order[order.length - 1]),
      Enter: () => this.select(part),
      " ": () => (isGroup ? this.toggle(part) : this.select(part)),
    };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moves[event.key]();
  }

  move(x, y, scale = this.scale) {
    const [width, height] = this.size;
    const { clientWidth, clientHeight } = this.node;
    const margin = 80; // so much of the picture always stays in sight
    this.scale = Math.min(2.5, Math.max(0.08, scale));
    this.x = Math.min(clientWidth - margin, Math.max(margin - width * this.scale, x));
    this.y = Math.min(clientHeight - margin, Math.max(margin - height * this.scale, y));
    this.stage.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
  }

  /** Scale around a point of the screen. */
  zoom(factor, x = this.node.clientWidth / 2, y = this.node.clientHeight / 2) {
    const scale = Math.min(2.5, Math.max(0.08, this.scale * factor));
    this.move(x - ((x - this.x) / this.scale) * scale, y - ((y - this.y) / this.scale) * scale, scale);
  }

  /** The whole width from the top, but no larger than natural size and no smaller than can be read. */
  fit() {
    const [width] = this.size;
    const room = this.node.clientWidth;
    const scale = Math.min(1, Math.max((room - 32) / width, 0.66));
    const x =
      width * scale <= room ? (room - width * scale) / 2 : Math.min(16, room / 2 - this.view.root.place.port * scale);
    this.move(x, 16, scale);
  }

  /** Everything at once. */
  fitAll() {
    const [width, height] = this.size;
    const scale = Math.min(1, (this.node.clientWidth - 32) / width, (this.node.clientHeight - 32) / height);
    this.move((this.node.clientWidth - width * scale) / 2, 16, scale);
  }

  centre(part) {
    const scale = Math.max(this.scale, 0.7);
    const { clientWidth, clientHeight } = this.node;
    this.move(clientWidth / 2 - (part.x + part.place.port) * scale, clientHeight / 2 - (part.y + 29) * scale, scale);
  }

  keepVisible(part) {
    const left = part.x * this.scale + this.x;
    const top = part.y * this.scale + this.y;
    const right = left + part.place.w * this.scale;
    const bottom = top + Math.min(part.place.h, 60) * this.scale;
    const inside = left >= 0 && top >= 0 && right <= this.node.clientWidth && bottom <= this.node.clientHeight;
    if (!inside) this.centre(part);
  }
}
