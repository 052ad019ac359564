// The address of the page says which box is chosen: it can be kept, and sent with the file.

/** The address of a part: version, mode, kind, and what names it in its view. */
function addressOf(app, part) {
  const { when, mode } = app.view;
  const names = part.c ? ["module", part.k] : ["node", part.node.r ?? "", part.node.n];
  return `#${[when, mode, ...names].map(encodeURIComponent).join("/")}`;
}

/** The part that an address names; nothing where it names none. */
function partAt(app, address) {
  let names;
  try {
    names = address.slice(1).split("/").map(decodeURIComponent);
  } catch {
    return null; // no address of this page
  }
  const [when, mode, kind, ...rest] = names;
  const view = app.content.views.find((one) => one.when === when && one.mode === mode);
  if (!view) return null;
  if (kind === "module") return { view, part: view.groups.get(rest[0]) };
  return { view, part: view.nodes.find((node) => node.part && (node.r ?? "") === rest[0] && node.n === rest[1])?.part };
}

/** Choose what the address names, now and when it changes. */
function setUpLinks(app) {
  const follow = () => {
    const found = partAt(app, window.location.hash);
    if (!found?.part || found.part === app.canvas.selected) return;
    if (found.view !== app.view) app.setView({ when: found.view.when, mode: found.view.mode });
    app.goToPart(found.part);
  };
  window.addEventListener("hashchange", follow);
  app.followsLinks = true;
  follow();
}

/** Put the chosen part into the address, without a step in the browser's history. */
function rememberPart(app, part) {
  if (!app.followsLinks) return; // while the page is set up, the address is still to be read
  const { pathname, search } = window.location;
  window.history.replaceState(null, "", part ? addressOf(app, part) : `${pathname}${search}`);
}
