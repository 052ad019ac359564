// The page as a whole: tabs, search, theme, and what leads from one view to another.

class App {
  constructor(content) {
    this.content = content;
    content.views.forEach((view) => prepare(view, content.parameters));
    this.when = "after";
    this.mode = content.views.find((view) => view.when === "after").mode;
    this.canvas = new Canvas(content, (part) => this.describe(part));
    this.panel = el("aside", { class: "panel", "aria-label": "Details" });
    this.heads();
    this.tabs();
    this.search();
    this.theme();
    document.addEventListener("keydown", (event) => this.shortcut(event));
    window.addEventListener("resize", () => this.canvas.view && this.canvas.move(this.canvas.x, this.canvas.y));
    this.showView();
    this.canvas.fit();
    this.describe(null);
  }

  get view() {
    const { views } = this.content;
    const fitting = views.filter((view) => view.when === this.when);
    return fitting.find((view) => view.mode === this.mode) ?? fitting[0];
  }

  heads() {
    const { content } = this;
    const rows = content.parameters;
    const sum = (key) => rows.reduce((total, row) => total + (row[key] ?? 0), 0);
    byId("title").textContent = shorten(content.title, 80);
    const masked = rows.filter((row) => row.tier !== null);
    byId("subtitle").textContent = content.passes.length ? `rewritten by ${content.passes.length - 1} passes` : "not transformed";
    const refusals = content.passes.reduce((total, pass) => total + pass.refusals.length, 0);
    const inGraph = rows.filter((row) => row.tier === "graph").reduce((total, row) => total + row.weights, 0);
    const figures = [
      ["Weights active", masked.length ? percent(sum("active") / Math.max(sum("weights"), 1)) : "100 %", `${count(sum("active"))} of ${count(sum("weights"))}`],
      sum("flops_dense") && ["Operations", count(sum("flops_sparse")), `of ${count(sum("flops_dense"))} dense`],
      sum("saved_before") && ["Saved for backward", bytes(sum("saved")), `of ${bytes(sum("saved_before"))} before`],
      content.memory?.before && ["Peak memory", bytes(memoryChart(content.memory).peaks[1]), `of ${bytes(memoryChart(content.memory).peaks[0])} before`],
      content.passes.length && ["In graphs", percent(inGraph / Math.max(sum("weights"), 1)), "of the weights"],
      content.passes.length && ["Left as it was", String(refusals), refusals === 1 ? "refusal, with its reason" : "refusals, with reasons"],
    ].filter(Boolean);
    byId("stats").replaceChildren(...figures.map(([term, value, rest]) => el("div", {}, el("dt", {}, term), el("dd", {}, el("b", {}, value), el("span", {}, ` ${rest}`)))));
  }

  tabs() {
    const { content } = this;
    const list = [
      ["graph", "Graph", () => this.graphSection()],
      content.parameters.length && ["layers", "Layers", () => layersSection(this)],
      content.passes.length && ["passes", "Passes", () => passesSection(this)],
      content.memory && ["memory", "Memory", () => memorySection(this)],
      content.history && ["training", "Training", () => trainingSection(this)],
    ].filter(Boolean);
    this.panels = new Map();
    const buttons = list.map(([name, label, build], index) => {
      const panel = el("div", { id: `panel-${name}`, class: `view view-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}`, hidden: index > 0 });
      const button = el("button", { id: `tab-${name}`, type: "button", role: "tab", "aria-controls": `panel-${name}`, "aria-selected": String(index === 0), tabindex: index ? "-1" : "0", on: { click: () => this.openTab(name) } }, label);
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
    this.openTab("graph");
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
    this.whenControl = both && segmented("Version", [["before", "Before"], ["after", "After"]], "after", (value) => this.setView({ when: value }));
    const mode = modes.length > 1 && segmented("Mode", modes.map((name) => [name, name === "eval" ? "Eval" : "Train"]), this.mode, (value) => this.setView({ mode: value }));
    const legend = el("div", { class: "legend", role: "group", "aria-label": "Colours of passes; choose one to see only what it changed" }, content.passes.map((pass, index) => this.legendChip(pass, index)));
    const tool = (text, label, act) => el("button", { type: "button", class: "tool", "aria-label": label, title: label, on: { click: act } }, text);
    const tools = el("div", { class: "tools", role: "group", "aria-label": "Zoom" },
      tool("+", "Zoom in", () => canvas.zoom(1.25)), tool("−", "Zoom out", () => canvas.zoom(0.8)), tool("⤢", "Show everything", () => canvas.fitAll()),
      tool("⊞", "Open every module", () => canvas.setAll(true)), tool("⊟", "Close every module", () => canvas.setAll(false)));
    canvas.node.append(tools);
    return [el("div", { class: "bar" }, this.whenControl, mode, legend), el("div", { class: "split" }, canvas.node, this.panel)];
  }

  legendChip(pass, index) {
    if (pass.name === "capture") return null;
    const chip = el("button", { type: "button", class: "chip", "aria-pressed": "false", style: { "--pass": passColour(index) }, on: { click: () => this.onlyPass(index, chip) } }, el("i", { "aria-hidden": "true" }), pass.name);
    return chip;
  }

  onlyPass(index, chip) {
    this.canvas.onlyPass = this.canvas.onlyPass === index ? null : index;
    for (const other of chip.parentElement.children) other.setAttribute("aria-pressed", String(other === chip && this.canvas.onlyPass !== null));
    this.canvas.mark();
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
    const content = !part ? overviewPanel(this) : part.c ? groupPanel(this, part) : nodePanel(this, part);
    this.panel.replaceChildren(...content.filter(Boolean));
    this.panel.classList.toggle("chosen", Boolean(part));
    this.panel.scrollTop = 0;
  }

  clear() {
    this.canvas.hits.clear();
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
    const reader = () => this.view.nodes.filter((other) => other.part && other.weights.includes(index)).sort((a, b) => inFallback(a.part) - inFallback(b.part))[0];
    let node = reader();
    if (!node && this.when === "before") {
      this.setView({ when: "after" });
      node = reader();
    }
    if (node) return this.goTo(node);
    this.openTab("graph");
    this.panel.replaceChildren(heading(this, shorten(row.parameter, 80), "read by no graph", null), weightSection(row));
  }

  search() {
    const input = byId("search");
    const list = byId("results");
    let found = [];
    let at = 0;
    const mark = () => {
      [...list.children].forEach((option, index) => option.setAttribute("aria-selected", String(index === at)));
      if (found.length) input.setAttribute("aria-activedescendant", `result-${at}`);
      else input.removeAttribute("aria-activedescendant");
      list.children[at]?.scrollIntoView({ block: "nearest" });
    };
    const close = () => {
      list.hidden = true;
      input.setAttribute("aria-expanded", "false");
      input.removeAttribute("aria-activedescendant");
    };
    const choose = (part) => {
      close();
      this.canvas.hits.clear();
      this.goToPart(part);
    };
    const look = () => {
      const all = input.value.trim() ? this.find(input.value.trim().toLowerCase()) : [];
      this.canvas.hits = new Set(all.map(({ part }) => part));
      this.canvas.mark();
      found = all.slice(0, 12);
      at = 0;
      const options = found.map(({ part, label, sub }, index) =>
        el("div", { id: `result-${index}`, role: "option", on: { pointerdown: (event) => event.preventDefault(), click: () => choose(part) } }, el("b", {}, shorten(label, 56)), el("span", {}, shorten(sub, 56))));
      list.replaceChildren(...options, all.length > found.length ? el("p", {}, `and ${all.length - found.length} more`) : "", input.value.trim() && !all.length ? el("p", {}, "Nothing of that name in this view") : "");
      list.hidden = !input.value.trim();
      input.setAttribute("aria-expanded", String(!list.hidden));
      announce(input.value.trim() ? `${all.length} found` : "");
      mark();
    };
    set(input, {
      on: {
        input: look,
        focus: () => input.value && look(),
        blur: close,
        keydown: (event) => {
          if (event.key === "ArrowDown" || event.key === "ArrowUp") {
            event.preventDefault();
            at = (at + (event.key === "ArrowDown" ? 1 : -1) + found.length) % Math.max(found.length, 1);
            mark();
          } else if (event.key === "Enter" && found[at]) {
            choose(found[at].part);
            this.canvas.elements.get(found[at].part)?.focus({ preventScroll: true });
          } else if (event.key === "Escape") {
            input.value = "";
            look();
            input.blur();
          }
        },
      },
    });
  }

  /** Parts whose names hold a text, the best first: whole names, then starts, then the rest; stand-ins last. */
  find(text) {
    const found = new Map();
    const offer = (part, names, label, sub) => {
      const ranks = names.filter((name) => name.toLowerCase().includes(text)).map((name) => {
        const other = name.toLowerCase();
        return other === text ? 0 : other.startsWith(text) ? 1 : 2;
      });
      if (!part || !ranks.length) return;
      const rank = Math.min(...ranks) + (inFallback(part) ? 10 : 0);
      if (!found.has(part) || found.get(part).rank > rank) found.set(part, { part, label, sub, rank });
    };
    for (const group of this.view.groups.values()) {
      if (group.parent) offer(group, [group.p, group.l], group.p || group.l, `module, ${group.boxes} nodes`);
    }
    for (const node of this.view.nodes) {
      const part = node.part ?? this.view.nodes[(node.h ?? [])[0]]?.part;
      const isLayer = node.part && node.weights.length;
      const reads = node.o === "get_attr" || node.o === "call_module";
      const sub = node.part ? node.x : `${node.x}, folded into ${part?.l ?? "nothing"}`;
      offer(part, [node.n, node.m ?? "", reads ? node.x : ""], isLayer ? node.m || node.n : node.n, sub);
    }
    return [...found.values()].sort((a, b) => a.rank - b.rank || a.label.length - b.label.length);
  }

  theme() {
    const root = document.documentElement;
    const button = byId("theme");
    const system = window.matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const label = () => {
      button.textContent = isDark() ? "☀" : "☾";
      button.setAttribute("aria-pressed", String(isDark()));
    };
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      label();
    });
    system.addEventListener("change", label);
    label();
  }

  shortcut(event) {
    const typing = event.target instanceof HTMLInputElement && event.target.type !== "radio";
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const inGraph = document.body.dataset.tab === "graph";
    const both = this.content.views.some((view) => view.when === "before");
    const acts = {
      "/": () => byId("search").focus(),
      Escape: () => this.clear(),
      "+": inGraph && (() => this.canvas.zoom(1.25)),
      "-": inGraph && (() => this.canvas.zoom(0.8)),
      0: inGraph && (() => this.canvas.fit()),
      b: inGraph && both && (() => this.setView({ when: this.when === "after" ? "before" : "after" })),
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  }
}

/** Whether a part lies in the group of layers that stand in for graphs. */
function inFallback(part) {
  return part.run === "fallback" || Boolean(part.parent && inFallback(part.parent));
}

new App(JSON.parse(byId("document").textContent));
