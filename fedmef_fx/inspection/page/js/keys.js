// What keys do, and the list of them that `?` opens.

const KEY_MAP = [
  ["/", "search; up and down choose, Enter leads to the layer"],
  ["↑ ↓", "the box before, the next box"],
  ["→ ←", "open a module or go into it; close it or go out"],
  ["Home End", "the first box, the last box"],
  ["Enter", "details of a box"],
  ["Space", "open or close a module"],
  ["b", "before or after the passes"],
  ["+ −", "larger, smaller"],
  ["0", "everything that can be read at once"],
  ["Esc", "close the details; then show all passes again"],
  ["?", "this list"],
];

/** What each key does where the focus is in no field. */
function keysOf(app) {
  const inGraph = app.hasGraph && document.body.dataset.tab === "graph";
  const both = app.content.views.some((view) => view.when === "before");
  return {
    "/": app.hasGraph && (() => byId("search").focus()),
    Escape: inGraph && (() => app.clear()),
    "+": inGraph && (() => app.canvas.zoom(1.25)),
    "-": inGraph && (() => app.canvas.zoom(0.8)),
    0: inGraph && (() => app.canvas.fit()),
    b: inGraph && both && (() => app.setView({ when: app.when === "after" ? "before" : "after" })),
  };
}

function setUpKeyMap() {
  byId("keys").replaceChildren(
    el("h2", { id: "keys-title" }, "Keys"),
    el(
      "dl",
      { class: "facts" },
      KEY_MAP.map(([keys, what]) => [
        el(
          "dt",
          {},
          keys.split(" ").map((key) => [el("kbd", {}, key), " "]),
        ),
        el("dd", {}, what),
      ]),
    ),
    el("form", { method: "dialog" }, el("button", { class: "plain-button" }, "Close")),
  );
  byId("help").addEventListener("click", showKeyMap);
}

/** The list as a dialog: the browser keeps the focus in it and Escape closes it. */
function showKeyMap() {
  if (!byId("keys").open) byId("keys").showModal();
}
