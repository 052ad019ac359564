// Where the picture of the graph stands on the screen, and how large it is drawn.

const READABLE = 0.78; // the smallest scale at which names are still read
const EDGE = 14;

/** What can be moved and scaled: `node` is the window, `stage` the picture, `size` its width and height. */
class Movable {
  constructor() {
    this.scale = 1;
    this.x = 0;
    this.y = 0;
  }

  move(x, y, scale = this.scale) {
    const [width, height] = this.size;
    const { clientWidth, clientHeight } = this.node;
    const margin = 80; // so much of the picture always stays in sight
    this.scale = Math.min(2.5, Math.max(0.08, scale));
    this.x = Math.min(clientWidth - margin, Math.max(margin - width * this.scale, x));
    this.y = Math.min(clientHeight - margin, Math.max(margin - height * this.scale, y));
    this.stage.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
    this.moved?.();
  }

  /** Scale around a point of the screen. */
  zoom(factor, x = this.node.clientWidth / 2, y = this.node.clientHeight / 2) {
    const scale = Math.min(2.5, Math.max(0.08, this.scale * factor));
    this.move(x - ((x - this.x) / this.scale) * scale, y - ((y - this.y) / this.scale) * scale, scale);
  }

  /** The scale at which the whole picture is seen, at most natural size. */
  wholeScale([width, height]) {
    return Math.min(1, (this.node.clientWidth - 2 * EDGE) / width, (this.node.clientHeight - 2 * EDGE) / height);
  }

  /** As much of the picture as can be read, from the top and around its main chain. */
  place() {
    const [width, height] = this.size;
    const { clientWidth: room, clientHeight } = this.node;
    const scale = Math.max(this.wholeScale(this.size), READABLE);
    const fits = width * scale <= room;
    const x = fits ? (room - width * scale) / 2 : Math.min(EDGE, room / 2 - this.view.root.place.port * scale);
    this.move(x, Math.max(EDGE, Math.min(40, (clientHeight - height * scale) / 2)), scale);
  }

  centre(part) {
    const scale = Math.max(this.scale, READABLE);
    const { clientWidth, clientHeight } = this.node;
    this.move(clientWidth / 2 - (part.x + part.place.port) * scale, clientHeight / 2 - (part.y + 20) * scale, scale);
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
