/** The looks of the 4D view, and the controls below it: speed, cameras, backgrounds. */

import { GROUNDS } from "./graphics.js";
import { clockMarkup, stageMarkup } from "./stage_view.js";
import { endings } from "./timeline.js";
import { niceStep } from "./vectors.js";
import { icon, options } from "./view_widget.js";
import { t } from "./words.js";

const CHECKER = { inner: [0.42, 0.42, 0.42], outer: [0.54, 0.54, 0.54], cell: 12 };
const GREEN = "#00b140";
const SPEEDS = [["0.1", "0.1 ×"], ["0.25", "0.25 ×"], ["0.5", "0.5 ×"], ["1", "1 ×"], ["2", "2 ×"]];
const TOLD = 2600; // milliseconds that a sentence stays

const backgrounds = () => [
  ["dark", t("Dark")],
  ["light", t("Light")],
  ["checker", t("Checker (snapshots: none)")],
  ["colour", t("Colour …")],
];
const sides = () => [[t("Front"), 0], [t("Right side"), 90], [t("Back"), 180], [t("Left side"), -90]];
const rgbOf = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);

export const STYLE = `
.turnaround-avatar { min-height: 320px; }
.turnaround-avatar .frame { position: absolute; inset: 0; margin: auto; pointer-events: none; opacity: .28;
  outline: 1px dashed #9fb4cc; outline-offset: -1px; max-width: 100%; max-height: 100%; }
.turnaround-avatar .stage img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.turnaround-avatar .stage.with-still .words { place-items: end center; text-shadow: 0 0 3px #000, 0 0 3px #000; color: #fff; }
.turnaround-avatar .bar .keep { width: auto; padding: 0 8px; }
.turnaround-avatar .bar select { flex: 0 1 auto; max-width: 92px; }
.turnaround-avatar .bar .cameras { flex: 1 1 60px; max-width: none; }
.turnaround-avatar .bar input[type=color] { width: 26px; height: 24px; padding: 0; border: 0; background: none; }`;

export const markup = () => `${stageMarkup('<div class="frame" hidden></div>')}
<div class="bar">${clockMarkup("any")}
  <select class="speed" title="${t("Speed")}">${options(SPEEDS)}</select>
  <select class="ending" title="${t("After the last frame")}">${options(endings())}</select>
</div>
<div class="bar">
  <select class="cameras" title="${t("Go to a camera (number keys: those of the rig)")}"></select>
  <select class="background" title="${t("Background")}">${options(backgrounds())}</select>
  <input class="colour" type="color" title="${t("Background colour")}" hidden>
  <button class="home" title="${t("Back to the first look (double-click, or 0)")}">${icon("home")}</button>
  <button class="save" title="${t("Save this picture as PNG, as large as the node's width and height (p)")}">${icon("save")}</button>
  <button class="keep" title="${t("Give this camera out at the node's 'camera' (c)")}">${t("Use camera")}</button>
</div>`;

export class AvatarBars {
  /** `view` keeps the choices in `memory` and is told of deeds; see js/avatar_view.js. */
  constructor(view) {
    this.view = view;
    const part = (name) => view.root.querySelector(`.${name}`);
    const names = ["legend", "frame", "speed", "ending", "cameras", "background", "colour", "home", "save", "keep"];
    this.parts = Object.fromEntries(names.map((name) => [name, part(name)]));
    this.#listen();
  }

  #listen() {
    const { parts, view } = this;
    const remember = (key) => {
      view.memory[key] = parts[key].value;
      view.redraw();
    };
    for (const key of ["speed", "ending", "background"]) parts[key].addEventListener("change", () => remember(key));
    parts.colour.addEventListener("input", () => remember("colour"));
    parts.cameras.addEventListener("change", () => view.goToCamera(parts.cameras.value));
    parts.home.addEventListener("click", () => view.goHome());
    parts.save.addEventListener("click", () => view.save());
    parts.keep.addEventListener("click", () => view.keepCamera());
  }

  /** A sentence over the picture, for a while. */
  tell(text) {
    const { legend } = this.parts;
    legend.textContent = text;
    legend.hidden = false;
    clearTimeout(this.telling);
    this.telling = setTimeout(() => (legend.hidden = true), TOLD);
  }

  /** `named` are the rig's cameras. */
  listCameras(named) {
    const { cameras } = this.parts;
    const list = (label, items) => {
      const group = document.createElement("optgroup");
      group.label = label;
      group.append(...items.map(([name, value]) => new Option(name, value)));
      return group;
    };
    const around = list(t("Around"), sides().map(([name], i) => [name, `side ${i}`]));
    cameras.replaceChildren(new Option(t("Cameras …"), ""), around);
    if (!named.length) return;
    cameras.append(list(t("Rig"), named.map(({ name }, i) => [`${i + 1}: ${name}`, `rig ${i}`])));
  }

  /** The azimuth of a side in the list. */
  azimuthOf(side) {
    return sides()[side][1];
  }

  /** Which camera of the list the view stands at; "" = none. */
  standAt(value) {
    this.parts.cameras.value = value;
  }

  /** What the creator chose before; the clock follows. */
  recall() {
    const { speed, ending, background, colour } = this.parts;
    const { memory, timeline } = this.view;
    const one = (select, key, otherwise) => {
      select.value = memory[key] ?? otherwise;
      if (select.selectedIndex < 0) select.value = otherwise;
    };
    one(speed, "speed", "1");
    one(ending, "ending", "loop");
    one(background, "background", "dark");
    colour.value = /^#[0-9a-f]{6}$/.test(memory.colour) ? memory.colour : GREEN;
    colour.hidden = background.value !== "colour";
    timeline.speed = Number(speed.value);
    if (timeline.ending !== ending.value) timeline.end(ending.value);
  }

  enable(isThere) {
    for (const name of ["home", "save", "keep", "cameras"]) this.parts[name].disabled = !isThere;
  }

  /** The dashed frame of what the node's pictures show; `shape` and `aspect` are width / height. */
  showFrame(shape, aspect) {
    const { style } = this.parts.frame;
    style.aspectRatio = shape;
    style.width = shape > aspect ? "100%" : "auto";
    style.height = shape > aspect ? "auto" : "100%";
  }

  /** What the avatar stands before, for the shaders; null = nothing, in saved pictures. */
  ground({ low, size }, isSeen) {
    const { background, colour } = this.parts;
    if (background.value === "checker") return isSeen ? CHECKER : null;
    if (background.value === "colour") return { inner: rgbOf(colour.value), outer: [0, 0, 0], cell: 0 };
    const extent = Math.max(...size);
    return {
      ...GROUNDS[background.value], middle: [low[0] + size[0] / 2, low[1] + size[1], low[2] + size[2] / 2],
      reach: 1.6 * extent, cell: niceStep(extent / 4),
    };
  }
}
