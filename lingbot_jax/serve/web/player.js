// Shows frames evenly. They come in bursts of a chunk; a small buffer, as long as the bursts are uneven, and a pace that
// gives way (half to one and a tenth of the frame's time) keep the picture moving and the answer to a key early.

const PAST = 40; // chunks whose lateness sets the buffer
const LEAST_BUFFER = 6; // ms
const MOST_BUFFER = 160;

export class Player {
  /** `show(frame)` draws a frame; called from animation frames. */
  constructor(show) {
    this.show = show;
    this.fps = 16;
    this.queue = [];
    this.late = [];
    this.shown = [];
    this.gaps = [];
    this.reset();
    const tick = (now) => {
      requestAnimationFrame(tick);
      this.tick(now);
    };
    requestAnimationFrame(tick);
  }

  /** Forgets what is queued: another world begins. */
  reset() {
    this.queue.forEach((frame) => frame.bitmap?.close());
    this.queue = [];
    this.due = 0;
    this.burst = null;
    this.starved = true;
  }

  get period() {
    return 1000 / this.fps;
  }

  /** ms that a frame waits on purpose: what nineteen in twenty bursts were late by. */
  get buffer() {
    const sorted = this.late.toSorted((a, b) => a - b);
    const usual = sorted[Math.floor(0.95 * sorted.length)] ?? 20;
    return Math.min(Math.max(usual * 1.2, LEAST_BUFFER), MOST_BUFFER);
  }

  push(frame, type) {
    const entry = { ...frame, bitmap: null };
    if (!this.burst || frame.chunk !== this.burst.chunk) {
      if (this.burst) {
        const expected = this.burst.arrived + this.burst.frames * this.period;
        this.late.push(Math.max(frame.arrived - expected, 0));
        if (this.late.length > PAST) this.late.shift();
      }
      this.burst = { chunk: frame.chunk, arrived: frame.arrived, frames: 0 };
    }
    this.burst.frames += 1;
    this.queue.push(entry);
    createImageBitmap(new Blob([frame.picture], { type })).then(
      (bitmap) => (entry.bitmap = bitmap),
      () => (entry.broken = true),
    );
  }

  tick(now) {
    while (this.queue[0]?.broken) this.queue.shift();
    const first = this.queue[0];
    if (!first) {
      this.starved = true;
      return;
    }
    if (!first.bitmap) return;
    if (this.starved) {
      this.due = Math.max(this.due, first.arrived + this.buffer);
      this.starved = false;
    }
    if (now < this.due - 4) return; // nearer to this refresh of the screen than to the next
    this.queue.shift();
    this.due = Math.max(this.due, now - this.period) + this.period * this.pace(now);
    if (this.shown.length) this.gaps.push(now - this.shown.at(-1));
    this.shown.push(now);
    if (this.shown.length > 240) this.shown.shift();
    if (this.gaps.length > 240) this.gaps.shift();
    this.show(first, now);
    first.bitmap.close();
  }

  /** Below 1: too much is queued for when the next burst is expected. Above: too little. */
  pace(now) {
    if (!this.burst) return 1;
    const next = this.burst.arrived + this.burst.frames * this.period - now;
    const spare = this.queue.length * this.period - Math.max(next, 0) - this.buffer;
    return spare > 0 ? Math.max(0.5, 1 - spare / (2 * this.period)) : Math.min(1.1, 1 - spare / (20 * this.period));
  }

  /** Frames shown per second, over the last two seconds. */
  rate(now) {
    const recent = this.shown.filter((t) => now - t < 2000);
    return recent.length < 2 ? 0 : (1000 * (recent.length - 1)) / (recent.at(-1) - recent[0]);
  }
}

/** Draws frames on a canvas at a whole multiple of their size, crisp or smooth. */
export class Screen {
  constructor(canvas, glow) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false, desynchronized: true });
    this.glow = glow.getContext("2d", { alpha: false });
    this.crisp = true;
    this.glowing = 0;
  }

  fit(width, height) {
    this.size = [width, height];
    const wanted = Math.min(this.canvas.clientWidth * devicePixelRatio, 1280);
    const times = Math.max(1, Math.round(wanted / width));
    if (this.canvas.width !== width * times || this.canvas.height !== height * times) {
      this.canvas.width = width * times;
      this.canvas.height = height * times;
    }
    document.documentElement.style.setProperty("--aspect", width / height);
  }

  draw(frame, now) {
    const { canvas, context } = this;
    context.imageSmoothingEnabled = !this.crisp;
    context.imageSmoothingQuality = "high";
    context.drawImage(frame.bitmap, 0, 0, canvas.width, canvas.height);
    if (now - this.glowing > 240) {
      this.glowing = now;
      this.glow.drawImage(frame.bitmap, 0, 0, 16, 12);
    }
  }

  /** The picture as a small data URL. */
  thumbnail(width = 192) {
    const small = document.createElement("canvas");
    small.width = width;
    small.height = Math.round((width * this.size[1]) / this.size[0]);
    const context = small.getContext("2d", { alpha: false });
    context.imageSmoothingEnabled = false;
    context.drawImage(this.canvas, 0, 0, small.width, small.height);
    return small.toDataURL("image/png");
  }
}
