/**
 * The player of views inside a node: all views on one clock, or one of them alone; before and after
 * with a wipe. A picture is drawn only when all its parts are of the same frame, so views can't
 * drift apart; where a computer is too slow, frames are left out and the clock stays right.
 */

import { WHOLE, drawCell, drawText, drawWipe, inside, layOut, nameOf, zoomed } from "./views_drawing.js";
import { Frames } from "./views_frames.js";
import { listenPicture } from "./views_gestures.js";
import { sentenceOf } from "./stored_file.js";
import { Timeline, endings } from "./timeline.js";
import { clamp } from "./vectors.js";
import { densityOf, options, savePicture, watchStage } from "./view_widget.js";
import { t } from "./words.js";

const REST = 160; // milliseconds without a change until pictures are fetched in full size
const AHEAD = 4; // frames unpacked before they are needed
const NEAR = 12; // pixels from the wipe that still take hold of it
const SHARPER = 1.15; // times more pixels on screen than a sheet has: worth the single views
const EXPORTED = 4096; // pixels a side of an exported grid
const SPEEDS = [["0.1", "0.1×"], ["0.25", "¼×"], ["0.5", "½×"], ["1", "1×"], ["2", "2×"]];

const DRAWN = {
  play: "M4 2.5v11l9-5.5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  back: "M3.5 3h1.6v10H3.5zM13 3v10L6 8z",
  on: "M10.9 3h1.6v10h-1.6zM3 3v10l7-5z",
  grid: "M2 2.5h5.4v5H2zM8.6 2.5H14v5H8.6zM2 8.5h5.4v5H2zM8.6 8.5H14v5H8.6z",
  save: "M7.2 2h1.6v6.2l2.1-2.1 1.1 1.1L8 11.2 4 7.2l1.1-1.1 2.1 2.1zM3 12.4h10V14H3z",
};
const glyph = (name) =>
  `<svg viewBox="0 0 16 16" width="14" height="14" fill="currentColor"><path d="${DRAWN[name]}"/></svg>`;

const markup = () => `
<div class="stage"><div class="words"></div></div>
<div class="bar time">
  <button class="back" title="${t("One frame back (←; with shift 10)")}">${glyph("back")}</button>
  <button class="play" title="${t("Play or pause (space)")}"></button>
  <button class="on" title="${t("One frame on (→; with shift 10)")}">${glyph("on")}</button>
  <input type="range" min="0" max="0" value="0" step="1" title="${t("Frame (arrow keys, Home, End)")}">
  <output></output>
</div>
<div class="bar more">
  <select class="source" title="${t("Which output")}"></select>
  <select class="compare" title="${t("Before and after: drag the white line (c = on and off)")}"></select>
  <span class="room"></span>
  <select class="speed" title="${t("Speed")}">${options(SPEEDS)}</select>
  <select class="ending" title="${t("After the last frame")}">${options(endings())}</select>
  <button class="all" title="${t("All views (0 or Escape); a view alone: click it, or 1 to 9")}">${glyph("grid")}</button>
  <button class="save" title="${t("Save what is shown as PNG: this frame of the view, or the whole grid")}">${glyph("save")}</button>
</div>`;

export const PLAYER_STYLE = `
.turnaround-view.turnaround-views { min-height: 0; }
.turnaround-views .bar { flex-wrap: wrap; }
.turnaround-views .room { flex: 1; }
.turnaround-views .bar select { max-width: 110px; }
.turnaround-views canvas, .turnaround-views canvas:active { cursor: default; }
.turnaround-views .stage { min-height: 60px; }
.turnaround-views .head { all: unset; display: flex; gap: 6px; align-items: center; padding: 3px 8px; cursor: pointer;
  font: 12px/18px sans-serif; flex: none; white-space: nowrap; overflow: hidden; }
.turnaround-views .head:focus-visible { outline: 1px solid #4a90d9; outline-offset: -1px; }`;

/** One player; `root` is filled by it. `recall`/`remember` keep a creator's choices with the node. */
export class ViewsPlayer {
  constructor(root, { recall, remember, title }) {
    Object.assign(this, { root, recall, remember, title });
    this.time = new Timeline();
    this.end = new AbortController();
    this.zoom = WHOLE;
    this.alone = null; // number of the view that is shown alone
    this.isVisible = false;
    root.insertAdjacentHTML("beforeend", markup());
    this.parts = { stage: root.querySelector(".stage") };
    for (const name of ["words", "play", "back", "on", "source", "compare", "speed", "ending", "all", "save"]) {
      this.parts[name] = root.querySelector(`.${name}`);
    }
    this.parts.slider = root.querySelector("input");
    this.parts.count = root.querySelector("output");
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("aria-label", t("Views"));
    this.parts.stage.prepend(this.canvas);
    this.#listen();
    this.#watch();
    this.#say(t("Run the graph to see the views here."), "empty");
    this.#showControls();
  }

  // -- what is shown --

  /** Show the items of a node's output; those already shown are not loaded again. */
  show(items) {
    const key = JSON.stringify(items.map((i) => [i.filename, i.checksum]));
    if (key === this.key) return;
    this.key = key;
    this.items = items;
    this.#load();
  }

  /** The item called what the creator chose, or the first; the second is what it is compared with. */
  #chosen() {
    const { items, recall } = this;
    const first = items.find((i) => i.name === recall("source")) ?? items[0];
    const others = items.filter((i) => i !== first && i.views === first.views);
    const given = items.length > 1 && items[1].name === "compare" ? "compare" : "";
    const second = others.find((i) => i.name === (recall("compare") ?? given));
    return { first, second, others };
  }

  #load() {
    this.#release();
    if (!this.items || !this.isVisible) return; // nothing is fetched for nobody
    const { first, second } = this.#chosen();
    this.first = this.#open(first);
    this.second = second && this.#open(second);
    this.time.total = first.frames;
    this.time.hold(Math.min(this.time.time, first.frames - 1));
    this.time.speed = Number(this.recall("speed") ?? 1);
    this.time.ending = this.recall("ending") ?? "loop";
    if (this.alone >= first.views) this.alone = null;
    this.#say(t("Loading the views …"), "loading");
    this.#showControls();
  }

  #open(item) {
    const frames = new Frames(item, () => this.#onCome(frames));
    frames.open().catch((error) => {
      if (frames.stop.signal.aborted) return;
      this.#release();
      this.#say(sentenceOf(error), "failed");
      this.#showControls();
    });
    return frames;
  }

  #onCome(frames) {
    if (frames !== this.first && frames !== this.second) return;
    if (frames === this.first && frames.header) this.time.fps = frames.header.fps;
    if (this.first?.isWhole && (!this.second || this.second.isWhole)) this.root.dataset.state = "ready";
    this.redraw(false);
  }

  #release() {
    this.first?.close();
    this.second?.close();
    this.first = this.second = this.shown = null;
    cancelAnimationFrame(this.ticket);
    clearTimeout(this.rest);
    this.ticket = null;
    delete this.root.dataset.frame;
    this.canvas.width = this.canvas.height = 1; // gives its pixels back, too
  }

  dispose() {
    this.time.play(false);
    this.end.abort();
    this.#release();
    this.items = this.key = null;
    this.unwatch();
    this.root.replaceChildren();
  }

  // -- controls --

  #say(text, state) {
    this.parts.words.textContent = text;
    this.root.dataset.state = state;
  }

  #showControls() {
    const { parts, time, first } = this;
    const total = first ? time.total : 0;
    parts.play.innerHTML = glyph(time.isPlaying ? "pause" : "play");
    for (const name of ["play", "back", "on", "slider"]) parts[name].disabled = total < 2;
    for (const name of ["save", "all"]) parts[name].disabled = !total;
    parts.all.style.visibility = this.alone == null && this.zoom.k === 1 ? "hidden" : "";
    parts.slider.max = Math.max(total - 1, 0);
    parts.slider.value = time.frame;
    parts.count.textContent = total ? `${time.frame + 1} / ${total}` : "";
    parts.speed.value = String(time.speed);
    parts.ending.value = time.ending;
    this.#showChoices();
  }

  #showChoices() {
    const { source, compare } = this.parts;
    source.hidden = !this.items || this.items.length < 2;
    if (!this.items) return void (compare.hidden = true);
    const { first, second, others } = this.#chosen();
    const names = (items) => items.map((i) => [i.name, i.name]);
    this.#fill(source, names(this.items), first.name);
    this.#fill(compare, [["", t("no wipe")], ...names(others).map(([k, n]) => [k, `| ${n}`])], second?.name ?? "");
    compare.hidden = !others.length;
  }

  /** Options as text, never as HTML: names come from nodes. */
  #fill(select, pairs, value) {
    const key = JSON.stringify(pairs);
    if (select.dataset.key !== key) {
      select.replaceChildren(...pairs.map(([k, text]) => new Option(text, k)));
      select.dataset.key = key;
    }
    select.value = value;
  }

  #listen() {
    const { parts, root } = this;
    root.addEventListener("keydown", (event) => this.#onKey(event), { signal: this.end.signal });
    parts.play.addEventListener("click", () => this.play(!this.time.isPlaying));
    parts.back.addEventListener("click", () => this.step(-1));
    parts.on.addEventListener("click", () => this.step(1));
    parts.all.addEventListener("click", () => this.showAll());
    parts.save.addEventListener("click", () => this.save());
    parts.slider.addEventListener("input", () => this.seek(parts.slider.valueAsNumber));
    const keep = (name, then) =>
      parts[name].addEventListener("change", () => {
        this.remember(name, parts[name].value);
        then(parts[name].value);
        this.redraw();
      });
    keep("speed", (value) => (this.time.speed = Number(value)));
    keep("ending", (value) => this.time.end(value));
    keep("source", () => this.#load());
    keep("compare", () => this.#load());
    listenPicture(this.canvas, (event) => this.#placeOf(event), {
      click: (place) => place && this.showAlone(this.alone == null ? place.view : null),
      drag: (dx, dy) => this.#move(dx, dy),
      pinch: (factor, place) => place && this.#zoomBy(factor, place),
      grab: (place) => (place && this.#isOnWipe(place) ? (at) => at && this.setWipe(at.u) : null),
      back: () => this.#setZoom(WHOLE),
    });
  }

  #watch() {
    const onSight = (isVisible) => {
      this.isVisible = isVisible;
      if (!isVisible) this.#sleep();
      else if (this.first) this.redraw();
      else if (this.items) this.#load();
    };
    this.unwatch = watchStage(this.parts.stage, () => this.redraw(), onSight);
    const { signal } = this.end;
    document.addEventListener("visibilitychange", () => document.hidden && this.play(false), { signal });
  }

  /** Out of sight, unpacked pictures go; out of the page (nodes of a closed subgraph), all. */
  #sleep() {
    this.first?.sleep();
    this.second?.sleep();
    if (!this.root.isConnected) this.#release();
  }

  play(isPlaying) {
    if (this.first) this.time.play(isPlaying);
    this.redraw();
  }

  /** Stand at a frame; beyond an end it goes on from the other one. */
  seek(frame) {
    this.time.play(false);
    this.time.seek(frame);
    this.redraw();
  }

  step(count) {
    this.seek(this.time.frame + count);
  }

  showAlone(view) {
    this.alone = view != null && this.first && view < this.first.item.views ? view : null;
    this.redraw();
  }

  showAll() {
    this.zoom = WHOLE;
    this.showAlone(null);
  }

  setWipe(share) {
    this.remember("wipe", clamp(share, 0, 1));
    this.redraw();
  }

  get wipe() {
    return this.recall("wipe") ?? 0.5;
  }

  #setZoom(zoom) {
    this.zoom = zoom;
    this.redraw();
  }

  #zoomBy(factor, { u, v }) {
    this.#setZoom(zoomed(this.zoom, factor, [u, v]));
  }

  /** The wheel, handed on by the page. */
  wheel(event) {
    const place = this.#placeOf(event);
    const lines = event.deltaMode === 1 ? 16 : 1; // some browsers count in lines
    if (place) this.#zoomBy(Math.exp(-0.0015 * lines * event.deltaY), place);
  }

  #move(dx, dy) {
    const [, , w, h] = this.cells?.[0] ?? [0, 0, 1, 1];
    const { k, x, y } = this.zoom;
    if (k > 1) this.#setZoom(inside({ k, x: x - (dx * this.#scale) / (k * w), y: y - (dy * this.#scale) / (k * h) }));
  }

  /** Canvas pixels a CSS pixel on screen. */
  get #scale() {
    return this.canvas.width / (this.canvas.getBoundingClientRect().width || 1);
  }

  /** Which view is under the pointer, and where in its cell (shares); null beside all. */
  #placeOf(event) {
    const box = this.canvas.getBoundingClientRect();
    const [px, py] = [(event.clientX - box.left) * this.#scale, (event.clientY - box.top) * this.#scale];
    const cells = this.cells ?? [];
    const n = cells.findIndex(([x, y, w, h]) => px >= x && px <= x + w && py >= y && py <= y + h);
    if (n < 0) return null;
    const [x, y, w, h] = cells[n];
    return { view: this.views[n], u: (px - x) / w, v: (py - y) / h, width: w / this.#scale };
  }

  #isOnWipe({ u, width }) {
    return Boolean(this.second) && Math.abs(u - this.wipe) * width < NEAR;
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const stride = event.shiftKey ? 10 : 1;
    const middle = { u: 0.5, v: 0.5 };
    const deeds = {
      " ": () => this.play(!this.time.isPlaying),
      ArrowLeft: () => this.step(-stride),
      ArrowRight: () => this.step(stride),
      Home: () => this.seek(0),
      End: () => this.seek(this.time.total - 1),
      0: () => this.showAll(),
      Escape: () => this.showAll(),
      "+": () => this.#zoomBy(1.25, middle),
      "-": () => this.#zoomBy(0.8, middle),
      c: () => this.#switchCompare(),
    };
    for (let n = 1; n <= 9; n++) deeds[n] = () => this.showAlone(this.alone === n - 1 ? null : n - 1);
    const deed = deeds[event.key];
    // A focused button answers the space bar by itself.
    if (!deed || (event.key === " " && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    event.stopPropagation();
    deed();
  }

  #switchCompare() {
    if (!this.items) return;
    const { second, others } = this.#chosen();
    if (!others.length) return;
    this.remember("compare", second ? "" : others[0].name);
    this.#load();
  }

  // -- drawing --

  /** Draw soon; while playing, go on. `isChange`: the creator did something, so rest begins anew. */
  redraw(isChange = true) {
    if (isChange) {
      clearTimeout(this.rest);
      this.isResting = false;
      this.rest = setTimeout(() => this.#onRest(), REST);
      this.#showControls();
    }
    this.ticket ??= requestAnimationFrame((now) => this.#tick(now));
  }

  #onRest() {
    if (this.time.isPlaying || !this.first) return;
    this.isResting = true;
    this.redraw(false);
  }

  #tick(now) {
    this.ticket = null;
    const { time, first } = this;
    if (!first?.header || !this.isVisible || document.hidden || !this.parts.stage.clientWidth) return;
    // The clock waits for the picture it stands at; then it goes on by all the time that has gone.
    if (time.isPlaying && this.shown === time.frame) {
      time.advance(now);
      this.#showControls();
    }
    this.#draw(time.frame);
    if (time.isPlaying) this.ticket = requestAnimationFrame((later) => this.#tick(later));
  }

  /** Everything a picture of `frame` is made of; null while something is on its way. */
  #sources(frame) {
    const { first, second } = this;
    const sheets = [first, second].map((f) => f && f.header && f.sheet(f.held(frame)));
    if (!sheets[0] || (second && !sheets[1])) return null;
    const of = (frames, sheet, v) => {
      const single = this.#wantsSingles(frames) && frames.single(v, frames.held(frame));
      return single
        ? { picture: single, from: [0, 0, single.width, single.height], isSingle: true }
        : { picture: sheet, from: frames.cell(v) };
    };
    return this.views.map((v) => [of(first, sheets[0], v), second && of(second, sheets[1], v)]);
  }

  /** Whether pictures in full size would show more, and there is time for them. */
  #wantsSingles(frames) {
    if (!frames.hasSingles || !(this.isResting || this.alone != null)) return false;
    if (this.alone == null && !frames.canHoldAll(this.views.length * (this.second ? 2 : 1))) return false;
    return this.zoom.k * (this.cells[0]?.[2] ?? 0) > SHARPER * frames.header.cell[0];
  }

  #fitCanvas() {
    const { canvas, first } = this;
    const density = (this.density = densityOf(canvas));
    const size = [canvas.clientWidth, canvas.clientHeight].map((v) => clamp(Math.round(v * density), 1, 4096));
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    this.views = this.alone == null ? first.header.views.map((_, v) => v) : [this.alone];
    this.cells = layOut(this.views.length, first.item.size[0] / first.item.size[1], ...size, 2 * density);
  }

  #draw(frame) {
    this.#fitCanvas();
    const sources = this.#sources(frame);
    this.#lookAhead(frame);
    if (!sources) return;
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.#paint(context, this.cells, sources, this.zoom, this.density);
    this.shown = frame;
    this.parts.words.textContent = "";
    const told = { frame, alone: this.alone ?? "", sharp: sources.every(([a]) => a.isSingle), zoom: this.zoom.k };
    Object.assign(this.root.dataset, told);
  }

  #paint(context, cells, sources, zoom, density) {
    cells.forEach((cell, n) => {
      const [a, b] = sources[n];
      drawCell(context, cell, zoom, a, b, this.wipe);
      if (b) drawWipe(context, cell, this.wipe, density);
      if (cell[2] < 40 * density) return;
      drawText(context, nameOf(this.first.header.views[this.views[n]]), cell, density);
      if (b && n === 0) {
        drawText(context, this.first.item.name, cell, density, "left", "bottom");
        drawText(context, this.second.item.name, cell, density, "right", "bottom");
      }
    });
    if (zoom.k > 1) drawText(context, `${zoom.k.toFixed(1)}×`, cells[0], density, "right", "top");
  }

  /** Unpack what comes next, so that playing doesn't wait. */
  #lookAhead(frame) {
    const { time, first, second } = this;
    if (!time.isPlaying) return;
    const ahead = time.ending === "swing" && time.gone % time.period >= time.total - 1 ? -1 : 1;
    for (let n = 1; n <= AHEAD; n++) {
      const next = (frame + ahead * n + time.total) % time.total;
      for (const frames of [first, second]) {
        if (!frames?.header) continue;
        frames.sheet(frames.held(next));
        if (this.alone != null && this.#wantsSingles(frames)) frames.single(this.alone, frames.held(next));
      }
    }
  }

  // -- saving --

  /** Save the frame that is shown: a view alone at its own size, or the grid with labels. */
  async save() {
    if (!this.first?.isWhole) return;
    const frame = this.shown ?? 0;
    const views = [...this.views];
    const picture = await this.#exported(frame, views);
    const what = views.length === 1 ? nameOf(this.first.header.views[views[0]]) : "all";
    const name = `${this.title()}_${what}_frame${String(frame).padStart(4, "0")}.png`;
    await savePicture(picture, name.replace(/[^\p{L}\p{N}_.+-]+/gu, "_"));
  }

  async #exported(frame, views) {
    const best = (frames, v) => frames?.best(v, frames.held(frame));
    const sources = [];
    for (const v of views) {
      const pictures = await Promise.all([best(this.first, v), best(this.second, v)]);
      sources.push(pictures.map((p) => p && { picture: p, from: [0, 0, p.width, p.height] }));
    }
    const { width: w, height: h } = sources[0][0].picture;
    const canvas = document.createElement("canvas");
    const columns = this.cells.filter(([, y]) => y === this.cells[0][1]).length; // as on screen
    const rows = Math.ceil(views.length / columns);
    const scale = Math.min(1, EXPORTED / (columns * w), EXPORTED / (rows * h));
    [canvas.width, canvas.height] = [Math.round(columns * w * scale), Math.round(rows * h * scale)];
    const [wide, high] = [canvas.width / columns, canvas.height / rows];
    const cells = views.map((_, n) => [(n % columns) * wide, Math.floor(n / columns) * high, wide, high]);
    const context = canvas.getContext("2d");
    if (views.length > 1) this.#paint(context, cells, sources, WHOLE, Math.max(1, cells[0][2] / 300));
    else drawCell(context, cells[0], WHOLE, ...sources[0], this.wipe); // a clean picture
    for (const p of sources.flat()) p?.picture.close();
    return canvas;
  }
}
