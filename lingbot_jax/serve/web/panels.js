// What is around the picture: the curtain, toasts, the chooser, prompt and events, meters.

export const $ = (id) => document.getElementById(id);

/** An icon of icons.svg; one that it lacks gets the star. */
export function icon(name) {
  const known = ["sun", "dusk", "night", "fog", "snow"].includes(name) ? name : "event";
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `/web/icons.svg#${known}`);
  svg.append(use);
  return svg;
}

/** Over the picture while there is nothing to see. `action` is [label, function]. */
export function curtain(title, text = "", action = null) {
  $("curtain").classList.remove("open");
  $("curtain").classList.toggle("still", Boolean(action));
  $("curtain-title").textContent = title;
  $("curtain-text").textContent = text;
  $("curtain-button").hidden = !action;
  if (action) {
    $("curtain-button").textContent = action[0];
    $("curtain-button").onclick = action[1];
  }
}

export const openCurtain = () => $("curtain").classList.add("open");

export function toast(text, wrong = false) {
  const line = document.createElement("p");
  line.className = wrong ? "toast wrong" : "toast";
  line.textContent = text;
  $("toasts").append(line);
  while ($("toasts").children.length > 3) $("toasts").firstChild.remove();
  setTimeout(() => line.remove(), wrong ? 6000 : 3200);
}

export function state(text, kind = "") {
  $("state").textContent = text;
  $("state").className = kind;
}

/** Dialogs close by their cross, Escape or a press beside them. */
export function setUpDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelectorAll(".close").forEach((button) => (button.onclick = () => dialog.close()));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => $("stage").focus({ preventScroll: true }));
  }
}

export class Chooser {
  /** `choose({picture})` with a number or, after `upload(file)`, "upload". */
  constructor(choose, upload) {
    this.choose = choose;
    const area = $("upload");
    const input = area.querySelector("input");
    const take = (file) => {
      if (!file) return;
      $("chooser").close();
      upload(file);
    };
    input.onchange = () => {
      take(input.files[0]);
      input.value = "";
    };
    const over = (event, on) => {
      event.preventDefault();
      area.classList.toggle("over", on);
    };
    for (const target of [document.body, area]) {
      target.addEventListener("dragover", (event) => over(event, true));
      target.addEventListener("dragleave", (event) => over(event, false));
      target.addEventListener("drop", (event) => {
        over(event, false);
        event.stopPropagation();
        take(event.dataTransfer.files[0]);
      });
    }
  }

  async fill(pictures, headers) {
    const tiles = pictures.map(({ prompt }, number) => {
      const tile = document.createElement("button");
      tile.className = "tile";
      const image = new Image();
      image.alt = "";
      const label = document.createElement("span");
      label.textContent = prompt;
      tile.append(image, label);
      tile.onclick = () => {
        $("chooser").close();
        this.choose({ picture: number });
      };
      fetch(`/api/pictures/${number}`, { headers })
        .then((answer) => answer.blob())
        .then((blob) => (image.src = URL.createObjectURL(blob)));
      return tile;
    });
    $("pictures").replaceChildren(...tiles);
  }

  mark(picture) {
    [...$("pictures").children].forEach((tile, i) => tile.setAttribute("aria-pressed", i === picture));
  }
}

export class Events {
  /** `toggle(name, on)` asks the server; the button answers when the server has. */
  constructor(toggle) {
    this.toggle = toggle;
    this.buttons = new Map();
  }

  fill(events) {
    this.buttons = new Map(
      events.map(({ name, text }, i) => {
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-pressed", false);
        button.title = `${text} (${i + 1})`;
        button.append(icon(name), name);
        button.onclick = () => this.press(name);
        return [name, button];
      }),
    );
    $("events").replaceChildren(...this.buttons.values());
  }

  press(name) {
    const button = this.buttons.get(name);
    if (!button) return;
    button.setAttribute("aria-busy", true);
    this.toggle(name, button.getAttribute("aria-pressed") !== "true");
  }

  pressNumber(i) {
    this.press([...this.buttons.keys()][i]);
  }

  set(on) {
    for (const [name, button] of this.buttons) {
      button.setAttribute("aria-pressed", on.includes(name));
      button.removeAttribute("aria-busy");
    }
  }
}

export const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];

/** From a press to the first shown frame that was made with it. */
export class Latency {
  constructor() {
    this.pressed = new Map(); // seq -> when
    this.measured = [];
  }

  press(seq, at) {
    this.pressed.set(seq, at);
  }

  shown(seq, now) {
    for (const [mine, at] of this.pressed) {
      if (mine > seq) continue;
      this.measured.push(now - at);
      this.pressed.delete(mine);
    }
  }

  reset() {
    this.pressed.clear();
  }

  get usual() {
    return this.measured.length ? median(this.measured.slice(-15)) : null;
  }
}

export function meter(player, latency, link, now) {
  const ms = (value) => (value === null ? "–" : `${Math.round(value)} ms`);
  $("fps").textContent = player.rate(now).toFixed(0);
  $("key-to-frame").textContent = ms(latency.usual);
  $("round-trip").textContent = ms(link.roundTrip);
  $("buffer").textContent = ms(player.buffer);
}
