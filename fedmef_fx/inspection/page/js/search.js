// The search box: a combobox over modules, nodes and parameters of the version that is shown.

/** Find parts while one types; Enter or a click leads to one. */
function setUpSearch(app) {
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
    app.canvas.hits.clear();
    app.goToPart(part);
  };
  const look = () => {
    const all = input.value.trim() ? findParts(app.view, input.value.trim().toLowerCase()) : [];
    app.canvas.hits = new Set(all.map(({ part }) => part));
    app.canvas.mark();
    found = all.slice(0, 12);
    at = 0;
    const options = found.map(({ part, label, sub }, index) =>
      el(
        "div",
        {
          id: `result-${index}`,
          role: "option",
          on: { pointerdown: (event) => event.preventDefault(), click: () => choose(part) },
        },
        el("b", {}, shorten(label, 56)),
        el("span", {}, shorten(sub, 56)),
      ),
    );
    list.replaceChildren(
      ...options,
      all.length > found.length ? el("p", {}, `and ${all.length - found.length} more`) : "",
      input.value.trim() && !all.length ? el("p", {}, "Nothing of that name in this view") : "",
    );
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
          app.canvas.elements.get(found[at].part)?.focus({ preventScroll: true });
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
function findParts(view, text) {
  const found = new Map();
  const offer = (part, names, label, sub) => {
    const ranks = names
      .filter((name) => name.toLowerCase().includes(text))
      .map((name) => {
        const other = name.toLowerCase();
        return other === text ? 0 : other.startsWith(text) ? 1 : 2;
      });
    if (!part || !ranks.length) return;
    const rank = Math.min(...ranks) + (inFallback(part) ? 10 : 0);
    if (!found.has(part) || found.get(part).rank > rank) found.set(part, { part, label, sub, rank });
  };
  for (const group of view.groups.values()) {
    if (group.parent) offer(group, [group.p, group.l], group.p || group.l, `module, ${group.boxes} nodes`);
  }
  for (const node of view.nodes) {
    const part = node.part ?? view.nodes[(node.h ?? [])[0]]?.part;
    const isLayer = node.part && node.weights.length;
    const reads = node.o === "get_attr" || node.o === "call_module";
    const sub = node.part ? node.x : `${node.x}, folded into ${part?.l ?? "nothing"}`;
    // A folded node is shown inside another layer's box: its own module is not there.
    offer(part, [node.n, node.part ? (node.m ?? "") : "", reads ? node.x : ""], isLayer ? node.m || node.n : node.n, sub);
  }
  return [...found.values()].sort((a, b) => a.rank - b.rank || a.label.length - b.label.length);
}

/** Whether a part lies in the group of layers that stand in for graphs. */
function inFallback(part) {
  return part.run === "fallback" || Boolean(part.parent && inFallback(part.parent));
}
