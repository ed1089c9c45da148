/**
 * What the views of a performer in space share: a canvas of the graphics card that comes and goes, a
 * clock, sentences over the picture, mouse, fingers and keys, and when to draw: only if something
 * changed, and finely once nothing moves.
 *
 * A view adds `scene` (what is on the graphics card; null = nothing), `header` (the file's; null = no
 * file), `pictures` (how many frames have come), `draw(isStill)`, `showControls()`, `deedOf(event)` (what
 * a key does, or nothing), `turn(dx, dy)`, `move(dx, dy)`, `zoomBy(factor)`, `goHome()`, `release()` and
 * `onLost()`; it may add `onRestored()` and `onPicture(now)`.
 */

import { listenGestures, wheelZoom } from "./gestures.js";
import { Timeline } from "./timeline.js";
import { clamp } from "./vectors.js";
import { densityOf, icon, makeRoot, watchStage } from "./view_widget.js";
import { t } from "./words.js";

const REST = 160; // milliseconds without a change until the picture is drawn finely
const LARGEST = 4096; // pixels along a side of the canvas

/** The picture's part of a view's markup; `over` lies on the picture, below the words. */
export const stageMarkup = (over = "") => `
<div class="stage">${over}
  <div class="legend" hidden></div>
  <div class="hint" hidden>${t("drag = turn · wheel = zoom · right-drag = move · double-click = back")}</div>
  <div class="words"></div>
</div>`;

/** The clock's part of a bar; `step` of the slider in frames, or "any". */
export const clockMarkup = (step) => `
  <button class="play" title="${t("Play or pause (space)")}"></button>
  <input class="time" type="range" min="0" max="0" value="0" step="${step}" title="${t("Frame (arrow keys)")}">
  <output></output>`;

export class StageView {
  /** `memory` keeps the choices of a creator with the node; `label` says what the canvas shows. */
  constructor(memory, { name, markup, label, empty }) {
    Object.assign(this, { memory, label, empty });
    this.timeline = new Timeline();
    this.isVisible = true;
    this.root = makeRoot(name, markup);
    const names = ["stage", "legend", "hint", "words", "play", "time"];
    this.parts = Object.fromEntries(names.map((each) => [each, this.root.querySelector(`.${each}`)]));
    this.parts.count = this.root.querySelector("output");
    this.root.addEventListener("keydown", (event) => this.#onKey(event));
    this.parts.play.addEventListener("click", () => this.setPlaying(!this.timeline.isPlaying));
    this.parts.time.addEventListener("input", () => this.standAt(this.parts.time.valueAsNumber));
  }

  dispose() {
    this.timeline.play(false);
    this.release();
    this.say(this.empty, "empty");
    this.showControls();
  }

  // -- words and controls --

  say(text, state = "loading") {
    const { words, legend, hint } = this.parts;
    words.textContent = text;
    this.root.dataset.state = state;
    if (!this.scene) legend.hidden = hint.hidden = true;
  }

  sayAsleep() {
    this.say(t("The browser put this view to sleep to spare memory: click here to wake it."), "asleep");
  }

  /** The clock's part of the controls. */
  showTime() {
    const { play, time, count } = this.parts;
    const total = this.header ? this.timeline.total : 0;
    const come = this.header ? this.pictures / this.awaited : 1;
    const drawn = this.timeline.isPlaying ? "pause" : "play";
    if (play.dataset.drawn !== drawn) play.innerHTML = icon((play.dataset.drawn = drawn));
    play.disabled = time.disabled = total < 2;
    time.max = Math.max(total - 1, 0);
    time.value = time.step === "any" ? this.timeline.time : this.timeline.frame;
    const place = total ? `${this.timeline.frame + 1} / ${total}` : "";
    count.textContent = come < 1 ? `${Math.round(100 * come)} %` : place;
    this.root.dataset.frame = this.timeline.frame;
  }

  setPlaying(isPlaying) {
    this.timeline.play(isPlaying);
    this.redraw();
  }

  standAt(time) {
    this.timeline.play(false);
    this.timeline.seek(time);
    this.redraw();
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const deed = event.key === " " ? () => this.setPlaying(!this.timeline.isPlaying) : this.deedOf(event);
    // A focused button answers the space bar by itself.
    if (!deed || !this.header || (event.key === " " && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    event.stopPropagation();
    deed();
  }

  /** The wheel, handed on by the page. */
  zoom(event) {
    this.zoomBy(wheelZoom(event));
  }

  /** The creator has moved the camera, and needs no hint any more. */
  learned() {
    this.memory.knowsHow = true;
    this.parts.hint.hidden = true;
    this.redraw();
  }

  showHint() {
    this.parts.hint.hidden = Boolean(this.memory.knowsHow);
  }

  // -- the canvas --

  makeCanvas() {
    const canvas = (this.canvas = document.createElement("canvas"));
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", this.label);
    // Browsers keep 16 such canvases alive and drop the oldest.
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault();
      if (this.canvas === canvas) this.onLost();
    });
    canvas.addEventListener("webglcontextrestored", () => this.canvas === canvas && this.onRestored?.());
    listenGestures(canvas, {
      turn: (dx, dy) => this.turn(dx, dy),
      move: (dx, dy) => this.move(dx, dy),
      zoom: (factor) => this.zoomBy(factor),
      home: () => this.goHome(),
    });
    const { stage } = this.parts;
    stage.prepend(canvas);
    const redraw = () => this.redraw();
    const unwatch = watchStage(stage, redraw, (isVisible) => {
      this.isVisible = isVisible;
      if (isVisible) this.redraw();
    });
    document.addEventListener("visibilitychange", redraw);
    this.unwatch = () => {
      unwatch();
      document.removeEventListener("visibilitychange", redraw);
    };
  }

  letGoOfCanvas() {
    this.unwatch?.();
    this.stopDrawing();
    const { scene, canvas } = this;
    this.scene = this.canvas = this.unwatch = null;
    scene?.dispose();
    canvas?.remove();
  }

  aspect() {
    const { clientWidth, clientHeight } = this.parts.stage;
    return clientWidth / clientHeight || 1;
  }

  /** The canvas as large as it is on screen, times `fineness`; gives pixels a CSS pixel. */
  fitCanvas(fineness = 1) {
    const { canvas } = this;
    const density = densityOf(canvas) * fineness;
    const size = [canvas.clientWidth, canvas.clientHeight].map((v) => clamp(Math.round(v * density), 1, LARGEST));
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    return density;
  }

  // -- when to draw --

  /** Draw once, soon; while playing, go on. */
  redraw() {
    this.showControls();
    clearTimeout(this.rest);
    if (this.ticket == null && this.scene) this.ticket = requestAnimationFrame((now) => this.#tick(now));
  }

  stopDrawing() {
    cancelAnimationFrame(this.ticket);
    clearTimeout(this.rest);
    this.ticket = null;
  }

  #tick(now) {
    this.ticket = null;
    const isSeen = this.isVisible && !document.hidden && this.parts.stage.clientWidth;
    if (!this.scene || !this.pictures || !isSeen) {
      this.timeline.last = this.drawnAt = null; // no time goes by where nobody looks
      return;
    }
    const { isPlaying } = this.timeline;
    this.timeline.advance(now);
    if (isPlaying) this.showTime();
    this.onPicture?.(now - (this.drawnAt ?? -Infinity));
    this.drawnAt = now;
    this.#draw(false);
    if (this.timeline.isPlaying) this.ticket = requestAnimationFrame((later) => this.#tick(later));
    else this.rest = setTimeout(() => this.#draw(true), REST);
  }

  #draw(isStill) {
    if (this.scene && this.canvas.clientWidth) this.draw(isStill);
  }
}
