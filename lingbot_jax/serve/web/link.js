// The WebSocket to the server: JSON both ways, frames one way (lingbot_jax/serve/messages.py has the layout).

const HEADER = 40;
const PING_MS = 250;

/** Reads a frame's header. Returns null for another version. */
export function readFrame(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength <= HEADER || view.getUint8(0) !== 1) return null;
  return {
    keys: view.getUint8(1),
    place: view.getUint16(2, true),
    number: view.getUint32(4, true),
    chunk: view.getUint32(8, true),
    seq: view.getUint32(12, true),
    made: view.getFloat64(16, true),
    x: view.getFloat32(24, true),
    z: view.getFloat32(28, true),
    yaw: view.getFloat32(32, true),
    pitch: view.getFloat32(36, true),
    picture: new Uint8Array(buffer, HEADER),
    arrived: performance.now(),
  };
}

export class Link extends EventTarget {
  /** Events: `message` (detail: a message), `frame` (a frame), `open`, `lost` (seconds until the next try). */
  constructor(token) {
    super();
    this.token = token;
    this.tries = 0;
    this.received = 0;
    this.roundTrip = null;
    this.stopped = false;
    setInterval(() => this.ping(), PING_MS);
  }

  connect() {
    this.stopped = false;
    clearTimeout(this.timer);
    const url = new URL("/ws", location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url, ["lingbot.v1", ...(this.token ? [`token.${this.token}`] : [])]);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.received = 0;
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      if (typeof data === "string") this.hear(JSON.parse(data));
      else this.see(data);
    };
    socket.onopen = () => this.tell("open");
    socket.onclose = () => socket === this.socket && this.lost();
  }

  /** Closes for good, until `connect`. */
  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    this.socket?.close();
  }

  tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  hear(message) {
    if (message.type === "pong") {
      const ms = performance.now() - message.t;
      this.roundTrip = this.roundTrip === null ? ms : 0.8 * this.roundTrip + 0.2 * ms;
      return;
    }
    if (message.type === "hello") this.tries = 0;
    if (message.type === "busy") this.retry = message.retry_seconds;
    this.tell("message", message);
  }

  see(data) {
    this.received += 1;
    const frame = readFrame(data);
    if (frame) this.tell("frame", frame);
  }

  lost() {
    if (this.stopped) return;
    const seconds = this.retry ?? Math.min(0.5 * 2 ** this.tries, 8);
    this.retry = undefined;
    this.tries += 1;
    this.timer = setTimeout(() => this.connect(), 1000 * seconds);
    this.tell("lost", seconds);
  }

  get open() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  send(message) {
    if (this.open) this.socket.send(JSON.stringify(message));
  }

  sendPicture(bytes) {
    if (this.open) this.socket.send(bytes);
  }

  ping() {
    this.send({ type: "ping", t: performance.now(), shown: this.received });
  }
}
