// What is said about the whole model, or about one pass, while no box is chosen.

function overviewPanel(app) {
  const { content } = app;
  const { passes, notices } = content;
  const refused = gathered(
    passes.flatMap((pass) => pass.refusals.map(([where, reason]) => [pass.name, where, reason])),
  );
  const total = passes.reduce((sum, pass) => sum + pass.refusals.length, 0);
  const most = Math.max(...passes.map((pass) => pass.rewrites), 1);
  return [
    figures(app.content),
    content.parameters[0]?.codec
      ? heading(app, "What is in the file", "Choose a box for what it reads and the tensors it takes.")
      : heading(app, "What was rewritten", "Choose a pass to see only what it did, a box for its code, mask and weights."),
    passes.length
      ? el(
          "ul",
          { class: "passes" },
          passes.map((pass, index) =>
            el(
              "li",
              {},
              passChip(app, index),
              el(
                "span",
                { class: "meter" },
                el("i", { style: { width: `${(pass.rewrites / most) * 100}%`, background: passColour(index) } }),
              ),
              el("b", {}, String(pass.rewrites)),
            ),
          ),
        )
      : el("p", { class: "muted" }, content.parameters[0]?.codec
            ? "A file: these are its own nodes, without those that decode weights."
            : "The model is not transformed: these are its own nodes."),
    refused.length
      ? section(
          `Left as it was (${total})`,
          el(
            "ul",
            { class: "refusals" },
            refused.slice(0, 12).map((entry) => refusalItem(entry, true)),
          ),
        )
      : null,
    refused.length > 12
      ? el(
          "button",
          { type: "button", class: "link", on: { click: () => app.openTab("passes") } },
          `All ${total} with reasons`,
        )
      : null,
    notices.length
      ? section(
          content.parameters[0]?.codec ? "The file" : "Not known",
          el(
            "ul",
            { class: "refusals" },
            notices.map((notice) => el("li", {}, shorten(notice, 400))),
          ),
        )
      : null,
    aboutSection(app),
  ];
}

/** What made the page: versions, date, configuration, command. */
function aboutSection({ content }) {
  const { about } = content;
  if (!about) return null;
  return el(
    "details",
    { class: "about" },
    el("summary", {}, "How this page was made"),
    facts([
      ["Written", about.date],
      ["By", about.versions],
      ["Command", about.command && el("code", {}, shorten(about.command, 2000))],
    ]),
    about.config && el("pre", { tabindex: "0", "aria-label": "Configuration" }, el("code", {}, about.config)),
  );
}

/** What one pass did: its boxes in order, and what it refused. */
function passPanel(app, index) {
  const pass = app.content.passes[index];
  const changed = app.view.nodes.filter((node) => node.part && node.changes.includes(index)).map((node) => node.id);
  const refused = gathered(pass.refusals.map(([where, reason]) => [pass.name, where, reason]));
  return [
    heading(app, pass.name, `${pass.rewrites} rewritten, ${pass.refusals.length} refused`),
    pass.options && el("p", { class: "options" }, shorten(pass.options, 400)),
    section(
      app.when === "after" ? "Boxes that it changed" : "Boxes that it was to change",
      changed.length ? links(app, changed, 200) : el("p", { class: "muted" }, "None in this view."),
    ),
    refused.length &&
      section(
        "Left as it was",
        el(
          "ul",
          { class: "refusals" },
          refused.slice(0, 40).map((entry) => refusalItem(entry, false)),
        ),
      ),
    el("button", { type: "button", class: "link", on: { click: () => app.choosePass(index) } }, "Show all passes"),
  ];
}
