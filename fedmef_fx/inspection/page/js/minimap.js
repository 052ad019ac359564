// The whole picture in a corner, with what the window shows of it.

const MAP = { width: 168, height: 132 };

/** A picture of boxes as dots; a click or a drag in it leads there. It says nothing that the boxes do not say. */
class Minimap {
  constructor(canvas) {
    this.canvas = canvas;
    this.picture = el("canvas", {});
    this.window = el("div", { class: "map-window" });
    this.node = el("div", { class: "map", "aria-hidden": "true", hidden: true }, this.picture, this.window);
    const go = (event) => {
      if (!event.buttons) return;
      event.preventDefault();
      event.stopPropagation();
      const { left, top } = this.picture.getBoundingClientRect();
      const { clientWidth, clientHeight } = canvas.node;
      const { scale } = canvas;
      const [x, y] = [(event.clientX - left) / this.scale, (event.clientY - top) / this.scale];
      canvas.move(clientWidth / 2 - x * scale, clientHeight / 2 - y * scale);
    };
    set(this.node, { on: { pointerdown: go, pointermove: go } });
    document.addEventListener("themechange", () => this.draw());
  }

  draw() {
    const { size, elements } = this.canvas;
    if (!size) return;
    this.scale = Math.min(MAP.width / size[0], MAP.height / size[1]);
    const [width, height] = size.map((length) => Math.max(1, Math.round(length * this.scale)));
    const sharp = window.devicePixelRatio || 1;
    Object.assign(this.picture, { width: width * sharp, height: height * sharp });
    set(this.picture, { style: { width: `${width}px`, height: `${height}px` } });
    const pen = this.picture.getContext("2d");
    const colours = getComputedStyle(document.documentElement);
    const colour = (name) => colours.getPropertyValue(name);
    pen.scale(sharp * this.scale, sharp * this.scale);
    for (const part of elements.keys()) {
      const { w, h, kids } = part.place;
      pen.globalAlpha = kids ? 0.12 : 1;
      const last = part.changes[part.changes.length - 1];
      pen.fillStyle = kids || last === undefined ? colour("--way") : passColour(last);
      pen.fillRect(part.x, part.y, w, h);
    }
    this.frame();
  }

  /** Where the window is; called for each step of a movement, so it only moves one element. */
  frame() {
    const { canvas, scale } = this;
    if (!canvas.size || !scale) return;
    const { clientWidth, clientHeight } = canvas.node;
    const [width, height] = canvas.size.map((length) => length * canvas.scale);
    this.node.hidden = width <= clientWidth && height <= clientHeight && canvas.x >= 0 && canvas.y >= 0;
    const ratio = scale / canvas.scale;
    this.window.style.transform = `translate(${-canvas.x * ratio}px, ${-canvas.y * ratio}px)`;
    this.window.style.width = `${clientWidth * ratio}px`;
    this.window.style.height = `${clientHeight * ratio}px`;
  }
}
