// The picture of the graph: boxes as buttons of a tree, ways as SVG, moved and scaled as one.

class Canvas extends Movable {
  /**
   * @param {object} content parameters and passes of the document
   * @param {function} onSelect called with the part that was chosen, or null
   */
  constructor(content, onSelect) {
    super();
    this.content = content;
    this.onSelect = onSelect;
    this.open = new Map(); // view -> keys of open groups
    this.elements = new Map(); // part -> its element
    this.selected = null;
    this.focused = null;
    this.hits = new Set();
    this.onlyPass = null;
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
    this.map = new Minimap(this);
    this.node.append(this.map.node);
    pannable(this);
  }

  /** Show a view; what was open and chosen stays so where the view has it too. */
  show(view) {
    const old = this.view;
    this.view = view;
    if (!this.open.has(view)) {
      const open = openThatFits(view, (size) => this.wholeScale(size) >= READABLE);
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
    this.map.draw();
  }

  moved() {
    this.map.frame();
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
    const name = elided(titleOf(part), "name");
    if (kind === "op" || kind === "port") return this.item(part, classes, level, [name], { title: shape });
    return this.item(part, classes, level, [
      el("span", { class: "line" }, name, shape && el("b", {}, shape)),
      el(
        "span",
        { class: "line sub" },
        kind === "opaque" ? el("span", { class: "what" }, "runs as Python") : elided(node.x),
        density !== null && this.view.when === "after" && densityBar(density),
      ),
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
        el("span", { class: "line" }, elided(titleOf(part), "name"), open && el("span", { class: "sub" }, what)),
        !open &&
          el(
            "span",
            { class: "line sub" },
            el("span", { class: "what" }, what),
            density !== null && this.view.when === "after" && densityBar(density),
          ),
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
    this.place();
  }

  /** Everything at once, so large that it can be read: modules close for that, and open where there is room. */
  fit() {
    this.open.set(this.view, openThatFits(this.view, (size) => this.wholeScale(size) >= READABLE));
    this.draw();
    this.place();
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
}
