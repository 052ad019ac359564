// The page as a whole: tabs, search, theme, and what leads from one view to another.

class App {
  constructor(content) {
    this.content = content;
    passColours = content.passes.map((pass) => pass.colour);
    content.views.forEach(prepare);
    this.when = "after";
    this.heads();
    setUpTheme();
    this.hasGraph = content.views.length > 0;
    this.panel = el("aside", { class: "panel", "aria-label": "Details" });
    this.canvas = new Canvas(content, (part) => this.describe(part));
    if (this.hasGraph) this.mode = content.views.find((view) => view.when === "after").mode;
    this.tabs();
    document.addEventListener("keydown", (event) => this.shortcut(event));
    byId("search").parentElement.hidden = !this.hasGraph;
    setUpKeyMap(this);
    if (!this.hasGraph) return;
    setUpSearch(this);
    window.addEventListener("resize", () => this.canvas.move(this.canvas.x, this.canvas.y));
    this.showView();
    this.canvas.place();
    this.describe(null);
    setUpLinks(this);
  }

  get view() {
    const { views } = this.content;
    const fitting = views.filter((view) => view.when === this.when);
    return fitting.find((view) => view.mode === this.mode) ?? fitting[0];
  }

  heads() {
    const { content } = this;
    const passes = content.passes.length;
    const note = passes
      ? `rewritten by ${passes - 1} passes`
      : content.views.length
        ? content.parameters[0]?.codec
          ? "an ONNX file"
          : "not transformed"
        : "two states of one model";
    byId("title").replaceChildren(elided(content.title));
    byId("subtitle").textContent = note;
  }

  tabs() {
    const { content } = this;
    const list = [
      this.hasGraph && ["graph", "Graph", () => this.graphSection()],
      content.parameters.length && ["layers", "Layers", () => layersSection(this)],
      content.passes.length && ["passes", "Passes", () => passesSection(this)],
      content.memory && ["memory", "Memory", () => memorySection(this)],
      content.history && ["training", "Training", () => trainingSection(this)],
      content.comparison && ["compare", "Comparison", () => compareSection(this)],
    ].filter(Boolean);
    this.panels = new Map();
    const buttons = list.map(([name, label, build], index) => {
      const panel = el("div", {
        id: `panel-${name}`,
        class: `view view-${name}`,
        role: "tabpanel",
        "aria-labelledby": `tab-${name}`,
        hidden: index > 0,
      });
      const button = el(
        "button",
        {
          id: `tab-${name}`,
          type: "button",
          role: "tab",
          "aria-controls": `panel-${name}`,
          "aria-selected": String(index === 0),
          tabindex: index ? "-1" : "0",
          on: { click: () => this.openTab(name) },
        },
        label,
      );
      this.panels.set(name, { panel, button, build });
      return button;
    });
    byId("tabs").replaceChildren(...buttons);
    byId("tabs").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const at = buttons.indexOf(document.activeElement);
      if (!step || at < 0) return;
      const next = buttons[(at + step + buttons.length) % buttons.length];
      next.click();
      next.focus();
    });
    byId("main").replaceChildren(...[...this.panels.values()].map(({ panel }) => panel));
    this.openTab(list[0][0]);
  }

  openTab(name) {
    for (const [other, entry] of this.panels) {
      const chosen = other === name;
      entry.panel.hidden = !chosen;
      entry.button.setAttribute("aria-selected", String(chosen));
      entry.button.tabIndex = chosen ? 0 : -1;
      if (chosen && entry.build) {
        entry.panel.append(...entry.build().filter(Boolean));
        entry.build = null;
      }
    }
    document.body.dataset.tab = name;
  }

  graphSection() {
    const { content, canvas } = this;
    const both = content.views.some((view) => view.when === "before");
    const modes = [...new Set(content.views.filter((view) => view.when === "after").map((view) => view.mode))];
    this.whenControl =
      both &&
      segmented(
        "Version",
        [
          ["before", "Before"],
          ["after", "After"],
        ],
        "after",
        (value) => this.setView({ when: value }),
      );
    const mode =
      modes.length > 1 &&
      segmented(
        "Mode",
        modes.map((name) => [name, name === "eval" ? "Eval" : "Train"]),
        this.mode,
        (value) => this.setView({ mode: value }),
      );
    const legend = el(
      "div",
      { class: "legend", role: "group", "aria-label": "Colours of passes; choose one to see only what it changed" },
      content.passes.map((pass, index) => this.legendChip(pass, index)),
    );
    const tool = (text, label, act) =>
      el("button", { type: "button", class: "tool", "aria-label": label, title: label, on: { click: act } }, text);
    const tools = el(
      "div",
      { class: "tools", role: "group", "aria-label": "Zoom" },
      tool("+", "Zoom in", () => canvas.zoom(1.25)),
      tool("−", "Zoom out", () => canvas.zoom(0.8)),
      tool("⤢", "Show everything that can be read at once", () => canvas.fit()),
      tool("⊞", "Open every module", () => canvas.setAll(true)),
      tool("⊟", "Close every module", () => canvas.setAll(false)),
    );
    canvas.node.append(tools);
    return [
      (both || mode || content.passes.length > 0) && el("div", { class: "bar" }, this.whenControl, mode, legend),
      el("div", { class: "split" }, canvas.node, this.panel),
    ];
  }

  legendChip(pass, index) {
    return pass.name === "capture" ? null : passChip(this, index);
  }

  /** Show what one pass did: everything else is dimmed, and listed beside the graph. The same pass again ends that. */
  choosePass(index) {
    const chosen = this.canvas.onlyPass === index ? null : index;
    this.canvas.onlyPass = chosen;
    this.openTab("graph");
    this.markPass();
    this.canvas.mark();
    this.canvas.selected = null;
    this.describe(null);
    announce(chosen === null ? "All passes" : `Only what ${this.content.passes[index].name} changed`);
  }

  markPass() {
    for (const chip of document.querySelectorAll(".chip[data-pass]"))
      chip.setAttribute("aria-pressed", String(Number(chip.dataset.pass) === this.canvas.onlyPass));
  }

  setView({ when = this.when, mode = this.mode }) {
    const { selected } = this.canvas;
    const hadFocus = this.canvas.boxes.contains(document.activeElement);
    Object.assign(this, { when, mode });
    this.showView();
    const input = this.whenControl && this.whenControl.querySelector(`input[value="${when}"]`);
    if (input) input.checked = true;
    const same = selected && this.counterpart(selected);
    this.canvas.select(same ?? null);
    if (hadFocus) this.canvas.focusFirst(same);
    announce(`Graph ${when} the passes`);
  }

  /** The same module in the view that is shown now. */
  counterpart(part) {
    if (part.c) return this.view.groups.get(part.k);
    const fitting = this.view.nodes.filter((node) => node.part && node.m === part.node.m && node.m !== "");
    return (fitting.find((node) => node.weights.length) ?? fitting[0])?.part;
  }

  showView() {
    this.canvas.hits.clear();
    this.canvas.show(this.view);
  }

  describe(part) {
    const pass = this.canvas.onlyPass;
    const whole = () => (pass === null ? overviewPanel(this) : passPanel(this, pass));
    const content = !part ? whole() : part.c ? groupPanel(this, part) : nodePanel(this, part);
    this.panel.replaceChildren(...content.filter(Boolean));
    this.markPass();
    rememberPart(this, part);
    this.panel.classList.toggle("chosen", Boolean(part));
    this.panel.scrollTop = 0;
  }

  clear() {
    this.canvas.hits.clear();
    if (!this.canvas.selected) this.canvas.onlyPass = null;
    this.canvas.select(null);
    this.canvas.focusFirst(this.canvas.focused);
  }

  /** Lead to a node; a folded one lies in the box that uses it. */
  goTo(node) {
    const part = node.part ?? this.view.nodes[(node.h ?? [])[0]]?.part;
    if (part) this.goToPart(part);
  }

  goToPart(part) {
    this.openTab("graph");
    this.canvas.selected = part;
    this.canvas.focused = part;
    this.canvas.reveal(part);
    this.canvas.select(part);
    announce(`${part.l} chosen`);
  }

  goToParameter(row) {
    const index = this.content.parameters.indexOf(row);
    const reader = () =>
      this.view.nodes
        .filter((other) => other.part && other.weights.includes(index))
        .sort((a, b) => inFallback(a.part) - inFallback(b.part))[0];
    let node = reader();
    if (!node && this.when === "before") {
      this.setView({ when: "after" });
      node = reader();
    }
    if (node) return this.goTo(node);
    this.openTab("graph");
    this.panel.replaceChildren(heading(this, shorten(row.parameter, 80), "read by no graph", null), weightSection(row));
  }

  shortcut(event) {
    const typing = event.target instanceof HTMLInputElement && event.target.type !== "radio";
    if (typing || byId("keys").open || event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = { ...keysOf(this), "?": showKeyMap };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  }
}

new App(JSON.parse(byId("document").textContent));
