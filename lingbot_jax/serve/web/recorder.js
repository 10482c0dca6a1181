// Records what is seen, with the keys over it as in Figure 1, as MP4 where the browser can and WebM elsewhere.

const TYPES = [
  "video/mp4;codecs=avc1.42E01E",
  "video/mp4;codecs=avc1",
  "video/mp4",
  "video/webm;codecs=vp9",
  "video/webm;codecs=vp8",
  "video/webm",
];
const CAPS = [
  ["W", 1, 0], ["A", 0, 1], ["S", 1, 1], ["D", 2, 1],
  ["I", 1, 0], ["J", 0, 1], ["K", 1, 1], ["L", 2, 1],
];

export class Recorder {
  /** `done(blob, name)` is given the film. */
  constructor(screen, done) {
    this.screen = screen;
    this.done = done;
    this.canvas = document.createElement("canvas");
    this.context = this.canvas.getContext("2d", { alpha: false });
  }

  static get type() {
    return globalThis.MediaRecorder && TYPES.find((type) => MediaRecorder.isTypeSupported(type));
  }

  get running() {
    return this.recorder?.state === "recording";
  }

  get seconds() {
    return this.running ? (performance.now() - this.began) / 1000 : 0;
  }

  start() {
    const { width, height } = this.screen.canvas;
    const times = Math.min(1, 1280 / width);
    this.canvas.width = 2 * Math.round((width * times) / 2); // H.264 wants even sides
    this.canvas.height = 2 * Math.round((height * times) / 2);
    this.stream = this.canvas.captureStream(0);
    const chunks = [];
    this.recorder = new MediaRecorder(this.stream, { mimeType: Recorder.type, videoBitsPerSecond: 6e6 });
    this.recorder.ondataavailable = ({ data }) => data.size && chunks.push(data);
    this.recorder.onstop = () => {
      const kind = this.recorder.mimeType.split(";")[0];
      this.stream.getTracks().forEach((track) => track.stop());
      this.done(new Blob(chunks, { type: kind }), `walk.${kind.endsWith("mp4") ? "mp4" : "webm"}`);
    };
    this.recorder.start(1000);
    this.began = performance.now();
  }

  stop() {
    if (this.running) this.recorder.stop();
  }

  /** The frame that the screen has just drawn. */
  add(frame) {
    if (!this.running) return;
    const { canvas, context } = this;
    context.drawImage(this.screen.canvas, 0, 0, canvas.width, canvas.height);
    this.drawKeys(frame.keys);
    this.stream.getVideoTracks()[0].requestFrame();
  }

  drawKeys(mask) {
    const { canvas, context: c } = this;
    const size = canvas.height * 0.085;
    const gap = size * 0.16;
    c.font = `700 ${size * 0.5}px system-ui, sans-serif`;
    c.textAlign = "center";
    c.textBaseline = "middle";
    CAPS.forEach(([letter, column, row], i) => {
      const width = 3 * size + 2 * gap;
      const left = i < 4 ? size * 0.4 : canvas.width - size * 0.4 - width;
      const x = left + column * (size + gap);
      const y = canvas.height - size * 0.4 - (2 - row) * size - (1 - row) * gap;
      const lit = mask & (1 << i);
      c.fillStyle = lit ? "rgb(255 255 255 / 92%)" : "rgb(10 12 24 / 45%)";
      c.beginPath();
      c.roundRect(x, y, size, size, size * 0.24);
      c.fill();
      c.fillStyle = lit ? "#10131f" : "rgb(255 255 255 / 88%)";
      c.fillText(letter, x + size / 2, y + size * 0.53);
    });
  }
}
