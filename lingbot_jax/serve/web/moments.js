// Moments that were kept, as thumbnails: going back to one and walking on makes another branch (paper, 5.1).

export class Moments {
  /** `restore(moment)` and `forget(moment)` ask the server. */
  constructor(section, list, { restore, forget }) {
    this.section = section;
    this.list = list;
    this.restore = restore;
    this.forget = forget;
    this.clear();
  }

  clear() {
    this.kept = new Map();
    this.here = null; // the moment that this future grew from
    this.list.replaceChildren();
    this.section.hidden = true;
  }

  get count() {
    return this.kept.size;
  }

  /** Adds a moment: its picture, and the walked path up to it. */
  add(moment, picture, path) {
    const parent = this.here;
    const item = document.createElement("li");
    const visit = document.createElement("button");
    visit.className = "visit";
    visit.setAttribute("aria-label", `Go back to moment ${moment}${parent ? `, which came after ${parent}` : ""}`);
    const image = new Image();
    image.src = picture;
    image.alt = "";
    const label = document.createElement("span");
    label.textContent = `${moment}`;
    const origin = document.createElement("em");
    origin.textContent = parent ? `after ${parent}` : "from the start";
    label.append(origin);
    visit.append(image, label);
    visit.onclick = () => this.restore(moment);
    const drop = document.createElement("button");
    drop.className = "drop";
    drop.textContent = "×";
    drop.setAttribute("aria-label", `Forget moment ${moment}`);
    drop.onclick = () => this.forget(moment);
    item.append(visit, drop);
    this.list.append(item);
    this.kept.set(moment, { item, visit, path: [...path], parent });
    this.section.hidden = false;
    this.arrive(moment);
    this.list.scrollTo({ left: this.list.scrollWidth, top: this.list.scrollHeight });
  }

  /** This future grows from `moment` from now on. Returns the path that led to it. */
  arrive(moment) {
    this.here = this.kept.has(moment) ? moment : null;
    for (const [number, { visit }] of this.kept) visit.classList.toggle("here", number === this.here);
    return this.kept.get(moment)?.path ?? [];
  }

  remove(moment) {
    this.kept.get(moment)?.item.remove();
    this.kept.delete(moment);
    if (this.here === moment) this.here = null;
    this.section.hidden = !this.kept.size;
  }
}
