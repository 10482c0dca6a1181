// Keys, mouse, touch and gamepad, as one mask: bit i is key i of W A S D I J K L.

const KEYS = "WASDIJKL";
const CODES = {
  KeyW: 0, KeyA: 1, KeyS: 2, KeyD: 3, KeyI: 4, KeyJ: 5, KeyK: 6, KeyL: 7,
  ArrowUp: 4, ArrowLeft: 5, ArrowDown: 6, ArrowRight: 7,
};
const DEGREES_PER_PIXEL = 0.22;
const DEAD = 0.35; // of a stick
const HEARTBEAT_MS = 500;

export const bit = (letter) => 1 << KEYS.indexOf(letter);
export const typing = (target) => target.matches?.("input:not([type=file]), textarea, select");

export class Input extends EventTarget {
  /** Events: `change` (detail: {mask, at}), `beat` while keys are held. */
  constructor(stage, pads) {
    super();
    this.held = { keyboard: 0, pads: 0, drag: 0, gamepad: 0 };
    this.mask = 0;
    this.turn = [0, 0]; // degrees right and up that a drag still asks for
    this.degrees = 2;
    this.pointers = new Map();
    this.codes = new Set();
    addEventListener("keydown", (e) => this.keyboard(e, true));
    addEventListener("keyup", (e) => this.keyboard(e, false));
    addEventListener("blur", () => this.release());
    document.addEventListener("visibilitychange", () => document.hidden && this.release());
    this.listenDrag(stage);
    pads.forEach((pad) => this.listenPad(pad));
    const poll = () => {
      requestAnimationFrame(poll);
      this.pollGamepad();
    };
    requestAnimationFrame(poll);
    setInterval(() => this.mask && this.dispatchEvent(new CustomEvent("beat")), HEARTBEAT_MS);
  }

  keyboard(event, down) {
    if (!(event.code in CODES)) return;
    if (down && (event.ctrlKey || event.metaKey || event.altKey || typing(event.target))) return;
    if (down && document.querySelector("dialog[open]")) return;
    if (down) event.preventDefault(); // arrows would scroll
    if (down) this.codes.add(event.code);
    else this.codes.delete(event.code);
    this.set("keyboard", [...this.codes].reduce((mask, code) => mask | (1 << CODES[code]), 0), event.timeStamp);
  }

  /** Lets go of everything: the page lost the keyboard. */
  release() {
    this.codes.clear();
    this.pointers.clear();
    this.turn = [0, 0];
    Object.keys(this.held).forEach((source) => this.set(source, 0));
  }

  set(source, mask, at = performance.now()) {
    this.held[source] = mask;
    const all = Object.values(this.held).reduce((a, b) => a | b, 0);
    if (all === this.mask) return;
    this.mask = all;
    this.dispatchEvent(new CustomEvent("change", { detail: { mask: all, at } }));
  }

  // A drag asks for degrees; the key is held until as many frames were made with it.
  listenDrag(stage) {
    let last = null;
    stage.addEventListener("pointerdown", (event) => {
      if (event.target.closest(".pad, #curtain")) return;
      last = [event.clientX, event.clientY];
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => {
      if (!last) return;
      this.turn[0] += (event.clientX - last[0]) * DEGREES_PER_PIXEL;
      this.turn[1] -= (event.clientY - last[1]) * DEGREES_PER_PIXEL;
      this.turn = this.turn.map((t) => Math.max(-60, Math.min(60, t)));
      last = [event.clientX, event.clientY];
      this.steer();
    });
    for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, () => (last = null));
  }

  steer() {
    const enough = 1.5 * this.degrees;
    const [right, up] = this.turn;
    let mask = Math.abs(right) > enough ? bit(right > 0 ? "L" : "J") : 0;
    mask |= Math.abs(up) > enough ? bit(up > 0 ? "I" : "K") : 0;
    this.set("drag", mask);
  }

  /** A frame that was made with these keys has come. */
  arrived(mask) {
    if (!this.held.drag) return;
    const done = (plus, minus) => this.degrees * (Boolean(mask & bit(plus)) - Boolean(mask & bit(minus)));
    const settle = (left, made) => (made && Math.sign(left) === Math.sign(made) ? Math.sign(left) * Math.max(Math.abs(left) - Math.abs(made), 0) : left);
    this.turn = [settle(this.turn[0], done("L", "J")), settle(this.turn[1], done("I", "K"))];
    this.steer();
  }

  // A pad is a stick of eight directions: where in it the finger is.
  listenPad(pad) {
    const letters = pad.id === "move" ? "WASD" : "IJKL";
    const update = () => {
      let mask = 0;
      for (const { pad: of, mask: theirs } of this.pointers.values()) mask |= of ? theirs : 0;
      this.set("pads", mask);
    };
    const follow = (event) => {
      const box = pad.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width - 0.5;
      const y = (event.clientY - box.top) / (box.height * 0.86) - 0.5; // without the word below
      const angle = Math.atan2(-y, x) / (Math.PI / 4);
      const way = Math.hypot(x, y) < 0.09 ? null : (Math.round(angle) + 8) % 8; // 0 right, 2 up, 4 left, 6 down
      const [up, left, down, right] = [...letters].map(bit);
      const mask = way === null ? 0 : [right, right | up, up, up | left, left, left | down, down, down | right][way];
      this.pointers.set(event.pointerId, { pad, mask });
      update();
    };
    pad.addEventListener("pointerdown", (event) => {
      pad.setPointerCapture(event.pointerId);
      event.preventDefault();
      follow(event);
    });
    pad.addEventListener("pointermove", (event) => this.pointers.has(event.pointerId) && follow(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      pad.addEventListener(kind, (event) => {
        this.pointers.delete(event.pointerId);
        update();
      });
    }
  }

  pollGamepad() {
    const pad = navigator.getGamepads?.().find((p) => p?.connected);
    if (!pad) {
      if (this.held.gamepad) this.set("gamepad", 0);
      return;
    }
    const [x = 0, y = 0, u = 0, v = 0] = pad.axes;
    const pressed = (i) => pad.buttons[i]?.pressed;
    let mask = 0;
    const when = (condition, letter) => (mask |= condition ? bit(letter) : 0);
    when(y < -DEAD || pressed(12), "W");
    when(y > DEAD || pressed(13), "S");
    when(x < -DEAD || pressed(14), "A");
    when(x > DEAD || pressed(15), "D");
    when(v < -DEAD, "I");
    when(v > DEAD, "K");
    when(u < -DEAD, "J");
    when(u > DEAD, "L");
    this.set("gamepad", mask);
    const buttons = { keep: pressed(0), record: pressed(3), pause: pressed(9) };
    for (const [name, down] of Object.entries(buttons)) {
      if (down && !this.buttons?.[name]) this.dispatchEvent(new CustomEvent("button", { detail: name }));
    }
    this.buttons = buttons;
  }
}
