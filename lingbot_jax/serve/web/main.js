// The page: joins the link to the server with what is seen, pressed and said.

import { bit, Input, typing } from "./input.js";
import { Link } from "./link.js";
import { WalkMap } from "./map.js";
import { Moments } from "./moments.js";
import { $, Chooser, curtain, Events, Latency, meter, openCurtain, setUpDialogs, state, toast } from "./panels.js";
import { Player, Screen } from "./player.js";
import { Recorder } from "./recorder.js";

const token = new URLSearchParams(location.hash.slice(1)).get("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};
const link = new Link(token);
const latency = new Latency();
const screen = new Screen($("view"), $("glow"));
const map = new WalkMap($("map"));
const input = new Input($("stage"), [$("move"), $("look")]);
const events = new Events((name, on) => link.send({ type: "event", name, on }));
const moments = new Moments($("moments"), $("tree"), {
  restore: (moment) => link.send({ type: "restore", moment }),
  forget: (moment) => link.send({ type: "forget", moment }),
});
const recorder = new Recorder(screen, showFilm);
const player = new Player(showFrame);
const chooser = new Chooser((picture) => begin({ ...picture, prompt: null }), upload);

let game = null; // what the server plays
let choice = { picture: 0, prompt: null }; // where this world began
let uploaded = null; // bytes of the player's own picture
let seq = 0;
let down = 0; // keys that the server was told of
let paused = false;
let expected = null; // {chunk, text}: what was told and is not yet seen
const captures = new Map(); // number of a frame -> moment to be pictured

// --- Beginning.

function begin(wanted = {}) {
  choice = { ...choice, ...wanted };
  curtain("Imagining the first frame");
  link.send({ type: "start", picture: choice.picture, prompt: choice.prompt, seed: seedNow() });
}

const seedNow = () => Math.min(Math.max(Math.trunc(Number($("seed").value)) || 0, 0), 2 ** 32 - 1);

async function upload(file) {
  const { picture_bytes: most } = game.limits;
  if (file.size > most) return toast(`That picture has ${(file.size / 2 ** 20).toFixed(1)} MiB; at most ${most / 2 ** 20}`, true);
  uploaded = await file.arrayBuffer();
  curtain("Looking at your picture");
  link.sendPicture(uploaded);
}

function newWorld(path = []) {
  player.reset();
  map.reset(path);
  latency.reset();
  expected = null;
  captures.clear();
}

// --- What the server says.

const heard = {
  hello({ game: about, ready }) {
    game = about;
    document.title = $("name").textContent = about.name;
    player.fps = about.fps;
    input.degrees = about.turn_rate;
    $("prompt").maxLength = about.limits.prompt;
    screen.fit(about.width, about.height);
    chooser.fill(about.pictures, headers);
    events.fill(about.events);
    moments.clear();
    if (!ready) curtain("The world is waking up", "Its programs are being compiled; the next start is quicker.");
  },
  ready() {
    state("live", "live");
    if (uploaded && choice.picture === "upload") link.sendPicture(uploaded);
    else begin();
  },
  uploaded: () => begin({ picture: "upload", prompt: null }),
  started({ prompt, events: on }) {
    newWorld();
    told(prompt, on);
    chooser.mark(choice.picture);
    sendKeys();
    if (paused) setPaused(false);
  },
  restored({ moment, prompt, events: on }) {
    newWorld(moments.arrive(moment));
    told(prompt, on);
    toast(`Back at moment ${moment}: another future begins`);
  },
  prompted({ prompt, events: on, chunk }) {
    told(prompt, on);
    expected = { chunk, text: [prompt, ...on].join(" · ") };
  },
  kept({ moment, number }) {
    captures.set((number - 1) >>> 0, moment);
  },
  forgotten: ({ moment }) => moments.remove(moment),
  error({ message }) {
    toast(message, true);
    events.set([...events.buttons].filter(([, b]) => b.getAttribute("aria-pressed") === "true").map(([name]) => name));
    if (player.starved) openCurtain();
  },
  busy({ message, retry_seconds: seconds }) {
    state("busy", "lost");
    curtain("One moment", `Sorry, ${message}. Trying again every ${seconds} seconds.`);
  },
  draining: ({ seconds }) => toast(`The server restarts in ${Math.round(seconds)} seconds`),
  bye({ why }) {
    const again = ["Walk on", () => link.connect()];
    const said = {
      idle: ["Are you still there?", "You stood still for long, and your place was given back."],
      over: ["Time is up", "A walk has an end here; begin another one."],
      stalled: ["The network is too slow", "Frames did not get through."],
      failed: ["Something broke", "It is our fault; the server has noted it."],
      refused: ["The server did not understand", "Reload the page."],
    }[why];
    if (!said) return; // a restart or a full house: the link tries again
    link.stop();
    state("ended", "lost");
    curtain(...said, again);
  },
};

link.addEventListener("message", ({ detail }) => heard[detail.type]?.(detail));
link.addEventListener("open", () => state("joining"));
link.addEventListener("lost", ({ detail }) => {
  if ($("state").textContent !== "busy") {
    state("lost", "lost");
    curtain("The connection was lost", `Trying again in ${Math.ceil(detail)} s.`);
  }
  player.reset();
});
link.addEventListener("frame", ({ detail }) => {
  input.arrived(detail.keys);
  player.push(detail, game.image);
});

// --- What is seen.

function showFrame(frame, now) {
  openCurtain();
  screen.draw(frame, now);
  recorder.add(frame);
  map.add(frame);
  light(frame.keys);
  latency.shown(frame.seq, now);
  if (expected && frame.chunk >= expected.chunk) {
    toast(expected.text);
    expected = null;
    $("stage").classList.remove("changed");
    requestAnimationFrame(() => $("stage").classList.add("changed"));
  }
  const moment = captures.get(frame.number);
  if (moment !== undefined) {
    captures.delete(frame.number);
    moments.add(moment, screen.thumbnail(), map.path);
    map.mark(moment);
  }
  walk.shown = { ...frame, bitmap: null, picture: null };
  walk.frames += 1;
}

const caps = [...document.querySelectorAll(".pad kbd")];
const light = (mask) => caps.forEach((cap) => cap.classList.toggle("lit", Boolean(mask & bit(cap.dataset.key))));

function tick(now) {
  requestAnimationFrame(tick);
  map.draw(now);
  if (now - tick.metered > 300) {
    tick.metered = now;
    meter(player, latency, link, now);
    if (recorder.running) $("record-time").textContent = clock(recorder.seconds);
  }
}
tick.metered = 0;
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;

function showFilm(blob, name) {
  $("badge").hidden = true;
  $("record").setAttribute("aria-pressed", false);
  const video = $("film").querySelector("video");
  URL.revokeObjectURL(video.src);
  video.src = URL.createObjectURL(blob);
  const save = $("film").querySelector("a");
  save.href = video.src;
  save.download = name;
  $("film").showModal();
  video.play().catch(() => {}); // where a browser wants a press first, there is a button
}

// --- What is pressed and said.

function sendKeys() {
  link.send({ type: "keys", seq, down: input.mask });
}

input.addEventListener("change", ({ detail: { mask, at } }) => {
  seq = (seq + 1) >>> 0;
  if (mask & ~down && link.open && player.shown.length && !paused) latency.press(seq, at);
  down = mask;
  caps.forEach((cap) => cap.classList.toggle("down", Boolean(mask & bit(cap.dataset.key))));
  sendKeys();
});
input.addEventListener("beat", sendKeys);
input.addEventListener("button", ({ detail }) => $(detail).click());

function told(prompt, on) {
  choice.prompt = prompt;
  if (document.activeElement !== $("prompt")) $("prompt").value = prompt;
  events.set(on);
}

function setPaused(on) {
  paused = on;
  $("pause").setAttribute("aria-pressed", on);
  link.send({ type: "pause", on });
}

$("places").onclick = () => $("chooser").showModal();
$("reset").onclick = () => begin();
$("pause").onclick = () => setPaused(!paused);
$("keep").onclick = () =>
  moments.count < (game?.limits.moments ?? 0) ? link.send({ type: "keep" }) : toast("Forget a moment first", true);
$("record").onclick = () => {
  if (!Recorder.type) return toast("This browser cannot record", true);
  if (recorder.running) return recorder.stop();
  recorder.start();
  $("badge").hidden = false;
  return $("record").setAttribute("aria-pressed", true);
};
$("dice").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 32);
  begin();
};
$("seed").onchange = () => begin();
$("crisp").onclick = () => {
  screen.crisp = !screen.crisp;
  $("crisp").setAttribute("aria-pressed", screen.crisp);
};
$("full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : $("stage").requestFullscreen());
$("help").onclick = () => $("manual").showModal();
$("say").onsubmit = (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (text) link.send({ type: "prompt", text });
  $("stage").focus({ preventScroll: true });
};

const shortcuts = { KeyR: "reset", KeyP: "pause", KeyM: "keep", KeyV: "record", KeyF: "full", KeyH: "help" };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.code === "Escape" && typing(event.target)) return $("stage").focus({ preventScroll: true });
  if (typing(event.target) || document.querySelector("dialog[open]")) return;
  if (event.code in shortcuts) $(shortcuts[event.code]).click();
  else if (/^Digit[1-9]$/.test(event.code)) events.pressNumber(Number(event.code.at(-1)) - 1);
  else if (event.code === "Enter" && event.target.tagName !== "BUTTON") {
    event.preventDefault();
    $("prompt").focus();
    $("prompt").select();
  }
});
document.addEventListener("visibilitychange", () => {
  if (!paused) link.send({ type: "pause", on: document.hidden });
});
addEventListener("resize", () => game && screen.fit(game.width, game.height));

setUpDialogs();
curtain("Connecting");
requestAnimationFrame(tick);
link.connect();

/** For tests and benches: what the page knows of itself. */
const walk = { player, latency, link, input, frames: 0, shown: null, recorder };
globalThis.walk = walk;
