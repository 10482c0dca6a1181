// The walked path from above: x to the right, z up, as the world began. The view follows the walker.

const TAU = 2 * Math.PI;
const MOST = 4000; // points that are kept

export class WalkMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.reset();
  }

  reset(path = []) {
    this.path = [...path];
    this.marks = new Map();
    this.scale = 60; // pixels per world unit
    this.drawn = 0;
  }

  /** The frame that is shown now. */
  add(frame) {
    const { x, z, yaw, pitch } = frame;
    const last = this.path.at(-1);
    if (!last || Math.hypot(last.x - x, last.z - z) > 0.01) this.path.push({ x, z });
    if (this.path.length > MOST) this.path = this.path.filter((_, i) => i % 2 === 0 || i > MOST / 2);
    this.here = { x, z, yaw, pitch };
  }

  mark(moment) {
    if (this.here) this.marks.set(moment, { x: this.here.x, z: this.here.z });
  }

  draw(now) {
    if (!this.here || now - this.drawn < 50) return;
    this.drawn = now;
    const { context: c, canvas, here } = this;
    const middle = canvas.width / 2;
    const far = this.path.slice(-900).reduce((most, p) => Math.max(most, Math.hypot(p.x - here.x, p.z - here.z)), 0.8);
    this.scale += 0.08 * ((0.82 * middle) / far - this.scale);
    const at = (p) => [middle + (p.x - here.x) * this.scale, middle - (p.z - here.z) * this.scale];
    c.clearRect(0, 0, canvas.width, canvas.height);
    c.save();
    c.beginPath();
    c.arc(middle, middle, middle, 0, TAU);
    c.clip();
    this.grid(c, middle, here);
    c.lineWidth = 3;
    c.lineCap = c.lineJoin = "round";
    c.strokeStyle = "rgb(94 231 200 / 85%)";
    c.beginPath();
    this.path.forEach((p, i) => c[i ? "lineTo" : "moveTo"](...at(p)));
    c.lineTo(middle, middle);
    c.stroke();
    for (const mark of this.marks.values()) this.spot(c, at(mark), 5, "#ffb454");
    if (this.path.length) this.spot(c, at(this.path[0]), 4, "#ffffff");
    c.translate(middle, middle);
    c.rotate(here.yaw);
    const view = c.createRadialGradient(0, 0, 4, 0, 0, 52);
    view.addColorStop(0, "rgb(255 255 255 / 55%)");
    view.addColorStop(1, "rgb(255 255 255 / 0%)");
    c.fillStyle = view;
    c.beginPath();
    c.moveTo(0, 0);
    c.arc(0, 0, 52, -TAU * 0.375, -TAU * 0.125);
    c.fill();
    c.fillStyle = "#fff";
    c.beginPath();
    c.moveTo(0, -10);
    c.lineTo(7, 8);
    c.lineTo(0, 4);
    c.lineTo(-7, 8);
    c.fill();
    c.restore();
  }

  /** Rings one world unit apart, so that standing and walking can be told apart in an empty place. */
  grid(c, middle, here) {
    const step = this.scale * (this.scale > 40 ? 0.5 : 2);
    c.strokeStyle = "rgb(255 255 255 / 9%)";
    c.lineWidth = 1;
    const shift = (v) => ((v * this.scale) % step + step) % step;
    c.beginPath();
    for (let i = -shift(here.x); i < 2 * middle; i += step) c.moveTo(i, 0), c.lineTo(i, 2 * middle);
    for (let i = shift(here.z); i < 2 * middle; i += step) c.moveTo(0, i), c.lineTo(2 * middle, i);
    c.stroke();
  }

  spot(c, [x, y], radius, colour) {
    c.fillStyle = colour;
    c.beginPath();
    c.arc(x, y, radius, 0, TAU);
    c.fill();
  }
}
