/** The three drawings of the rig editor as SVG: from above, from the side, through a camera's lens. */

import { clamp, degrees, radians } from "./rig_edits.js";
import { drawnFigure, drawnGround, FIGURE, fromAbove, fromTheSide, throughLens } from "./rig_figure.js";
import { t } from "./words.js";

const EDGE = 26; // pixels around a drawing, for words
const MARK = 9; // pixels, half a camera's mark
const LEAST_REACH = 1.2; // metres that a drawing shows at least

/** An SVG element; attributes that are null are left out. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null) element.removeAttribute(name);
    else element.setAttribute(name, value);
  }
}

const text = (words, x, y, more = {}) => svg("text", { x, y, ...more }, words);
const points = (list) => list.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");

function figure(look) {
  const lines = drawnFigure(look).map(({ x1, y1, x2, y2, width, part }) => [{ x1, y1, x2, y2 }, width, part]);
  return svg("g", { class: "figure", "aria-hidden": "true" },
    ...lines.map(([ends, width]) => svg("line", { ...ends, class: "rim", "stroke-width": width + 2 })),
    ...lines.map(([ends, width, part = "body"]) => svg("line", { ...ends, class: part, "stroke-width": width })));
}

/** 1, 2 or 5 times a power of ten metres, at most four rings in the reach. */
function ringStep(reach) {
  const ten = 10 ** Math.floor(Math.log10(reach / 4));
  return ten * [1, 2, 5, 10].find((n) => n * ten >= reach / 4);
}

/** A camera's mark: a number in a ring, or in a filled square once it is chosen. */
function mark(number, isChosen) {
  const shape = isChosen
    ? svg("rect", { x: -MARK, y: -MARK, width: 2 * MARK, height: 2 * MARK, rx: 3 })
    : svg("circle", { r: MARK });
  return [shape, text(number, 0, 0, { class: "number" })];
}

/** What both plans share: a drawing whose middle is the figure's, and pixels for metres. */
class Plan {
  constructor(label) {
    this.back = svg("g", { "aria-hidden": "true" });
    this.front = svg("g");
    this.band = svg("rect", { class: "band", visibility: "hidden" });
    this.element = svg("svg", { role: "listbox", "aria-multiselectable": "true", "aria-label": label }, this.back, this.front, this.band);
    this.size = [0, 0];
    this.held = false; // while a camera is dragged, the scale stays
  }

  resize(width, height) {
    this.size = [width, height];
    set(this.element, { viewBox: `0 0 ${width} ${height}`, width, height });
  }

  /** Pixels of the drawing (its corner is 0, 0) under a pointer. */
  pixels(event) {
    const box = this.element.getBoundingClientRect();
    return [(event.clientX - box.left) * (this.size[0] / box.width), (event.clientY - box.top) * (this.size[1] / box.height)];
  }

  /** Metres from the figure's middle, rightwards and downwards, under a pointer. */
  metres(event) {
    return this.pixels(event).map((v, i) => (v - this.middle[i]) / this.scale);
  }

  /** The rectangle between two places in pixels; null = none. */
  showBand(from, to) {
    if (!from) return set(this.band, { visibility: "hidden" });
    const [x, y] = [0, 1].map((i) => Math.min(from[i], to[i]));
    set(this.band, { visibility: "visible", x, y, width: Math.abs(to[0] - from[0]), height: Math.abs(to[1] - from[1]) });
  }
}

/** From above; the source camera stands at the bottom, as a creator stands before the performer. */
export class TopPlan extends Plan {
  constructor() {
    super(t("Cameras from above"));
    this.marks = []; // kept over changes, so that the keyboard stays on its camera
  }

  #place({ azimuth, elevation, distance }) {
    const out = distance * Math.cos(radians(elevation)) * this.scale;
    return [this.middle[0] + out * Math.sin(radians(azimuth)), this.middle[1] + out * Math.cos(radians(azimuth))];
  }

  draw({ cameras, chosen, active, fov, aspect, start, describe }) {
    const [width, height] = this.size;
    const out = [...cameras, ...start].map((c) => c.distance * Math.cos(radians(c.elevation)));
    if (!this.held) {
      this.reach = Math.max(LEAST_REACH, ...out) * 1.02;
      this.scale = Math.max(1, Math.min(width, height) / 2 - EDGE) / this.reach;
      this.middle = [width / 2, height / 2];
    }
    this.places = cameras.map((camera) => this.#place(camera));
    this.back.replaceChildren(
      ...this.#rings(),
      ...cameras.flatMap((camera, i) => (chosen.has(i) ? [this.#wedge(camera, camera.fov ?? fov, aspect, i === active)] : [])),
      svg("g", { transform: `translate(${this.middle})` }, figure(fromAbove(this.scale))),
      ...start.map((camera) => this.#ghost(camera)),
    );
    this.#drawMarks(cameras, chosen, active, describe);
  }

  #rings() {
    const [x, y] = this.middle;
    const [width, height] = this.size;
    const step = ringStep(this.reach);
    const rings = [];
    for (let r = step; r <= this.reach * 1.15; r += step) {
      const words = text(`${+r.toFixed(2)} m`, x + 0.38 * r * this.scale, y - 0.93 * r * this.scale - 2, { class: "small" });
      rings.push(svg("circle", { cx: x, cy: y, r: r * this.scale, class: "ring" }), words);
    }
    const source = y + Math.min(this.reach * this.scale + 13, height - y - 12);
    return [
      ...rings,
      svg("path", { d: `M${x} ${source - 5}l6 9h-12z`, class: "source" }),
      text(t("your camera, 0°"), x + 10, source + 4, { class: "word" }),
      text(t("behind, 180°"), x, 11, { class: "word centre" }),
      text(t("right, 90°"), width - 4, y - MARK - 9, { class: "word end" }),
      text(t("left, 270°"), 4, y - MARK - 9, { class: "word" }),
    ];
  }

  /** What a camera sees, from above. */
  #wedge(camera, fov, aspect, isActive) {
    const [x, y] = this.#place(camera);
    const half = Math.atan(Math.tan(radians(fov) / 2) * aspect);
    const far = (camera.distance * Math.cos(radians(camera.elevation)) + 0.5) * this.scale;
    const side = (turn) => [x - (far * Math.sin(radians(camera.azimuth) + turn)) / Math.cos(turn), y - (far * Math.cos(radians(camera.azimuth) + turn)) / Math.cos(turn)];
    return svg("polygon", { points: points([[x, y], side(half), side(-half)]), class: isActive ? "seen" : "seen beside" });
  }

  #ghost(camera) {
    const [cx, cy] = this.#place(camera);
    return svg("circle", { cx, cy, r: MARK + 3, class: "ghost" });
  }

  #drawMarks(cameras, chosen, active, describe) {
    while (this.marks.length > cameras.length) this.marks.pop().remove();
    while (this.marks.length < cameras.length) {
      const group = svg("g", { role: "option", tabindex: 0, class: "camera" });
      group.dataset.camera = this.marks.length;
      this.marks.push(group);
      this.front.append(group);
    }
    for (const [i, camera] of cameras.entries()) {
      const [x, y] = this.places[i];
      const group = this.marks[i];
      set(group, {
        transform: `translate(${x.toFixed(2)} ${y.toFixed(2)})`,
        class: `camera${chosen.has(i) ? " chosen" : ""}${i === active ? " active" : ""}`,
        "aria-selected": chosen.has(i), "aria-label": describe(i),
      });
      const tip = svg("path", { d: `M-5 ${-MARK - 1}L0 ${-MARK - 8}L5 ${-MARK - 1}z`, class: "tip", transform: `rotate(${-camera.azimuth})` });
      group.replaceChildren(svg("circle", { r: MARK + 5, class: "focus" }), tip, ...mark(i, chosen.has(i)));
    }
    // The chosen lie on top, but the order in which the tab key goes stays: so by a copy.
    this.over?.remove();
    if (active != null && this.marks[active]) {
      this.over = this.marks[active].cloneNode(true);
      for (const name of ["tabindex", "role", "aria-label", "aria-selected", "data-camera"]) this.over.removeAttribute(name);
      set(this.over, { "aria-hidden": "true", "pointer-events": "none" });
      this.element.insertBefore(this.over, this.band);
    }
  }

  azimuthAt(event) {
    const [right, down] = this.metres(event);
    return degrees(Math.atan2(right, down));
  }
}

/**
 * From the side: every camera is turned to the right of the figure, so height and distance can be
 * read and dragged for all of them. Cameras on one spot share a mark.
 */
export class SidePlan extends Plan {
  constructor() {
    super(t("Cameras from the side"));
    this.groups = [];
  }

  draw({ cameras, chosen, active, fov }) {
    const [width, height] = this.size;
    const corners = cameras.map((c) => [c.distance * Math.cos(radians(c.elevation)), c.distance * Math.sin(radians(c.elevation))]);
    if (!this.held) this.#frame(corners, width, height);
    this.places = corners.map(([out, up]) => [this.middle[0] + out * this.scale, this.middle[1] - up * this.scale]);
    this.groups = this.#grouped(cameras, chosen);
    const shown = cameras[active];
    this.back.replaceChildren(
      ...this.#grid(),
      ...(shown ? [this.#frustum(shown, shown.fov ?? fov)] : []),
      svg("g", { transform: `translate(${this.middle})` }, figure(fromTheSide(this.scale, shown?.azimuth ?? 0))),
    );
    this.front.replaceChildren(...this.groups.map((group) => this.#groupMark(group, active)));
  }

  #frame(corners, width, height) {
    const half = FIGURE.halfHeight;
    const left = 0.45; // metres beside the figure's middle
    this.reach = Math.max(LEAST_REACH, ...corners.map(([out]) => out)) * 1.04;
    const top = Math.max(half, ...corners.map(([, up]) => up));
    const bottom = Math.max(half, ...corners.map(([, up]) => -up));
    this.scale = Math.max(1, Math.min((width - EDGE - MARK) / (left + this.reach), (height - 2 * EDGE) / (top + bottom)));
    this.middle = [
      left * this.scale + (width - EDGE - (left + this.reach) * this.scale) / 2 + 4,
      height / 2 + ((top - bottom) / 2) * this.scale,
    ];
  }

  #grid() {
    const [x, y] = this.middle;
    const [width] = this.size;
    const ground = y + FIGURE.halfHeight * this.scale;
    const rays = [-60, -30, 0, 30, 60].map((angle) => {
      const far = this.reach * 1.1 * this.scale;
      return svg("line", { x1: x, y1: y, x2: x + far * Math.cos(radians(angle)), y2: y - far * Math.sin(radians(angle)), class: "ring" });
    });
    const rings = [];
    const step = ringStep(this.reach);
    for (let r = step; r <= this.reach * 1.1; r += step) {
      const p = r * this.scale;
      rings.push(svg("path", { d: `M${x} ${y - p}A${p} ${p} 0 0 1 ${x} ${y + p}`, class: "ring" }));
      rings.push(text(`${+r.toFixed(2)} m`, x + p - 3, ground + 11, { class: "small end" }));
    }
    return [...rays, ...rings, svg("line", { x1: 0, x2: width, y1: ground, y2: ground, class: "ground" })];
  }

  #frustum(camera, fov) {
    const far = (camera.distance + 0.5) * this.scale;
    const x = this.middle[0] + camera.distance * Math.cos(radians(camera.elevation)) * this.scale;
    const y = this.middle[1] - camera.distance * Math.sin(radians(camera.elevation)) * this.scale;
    const side = (sign) => {
      const angle = radians(camera.elevation + (sign * fov) / 2);
      const long = far / Math.cos(radians(fov / 2));
      return [x - long * Math.cos(angle), y + long * Math.sin(angle)];
    };
    return svg("polygon", { points: points([[x, y], side(1), side(-1)]), class: "seen" });
  }

  /** Cameras on one spot of the drawing, as lists of numbers. */
  #grouped(cameras, chosen) {
    const spots = new Map();
    for (const i of cameras.keys()) {
      const key = this.places[i].map((v) => Math.round(v / 3)).join(" ");
      if (!spots.has(key)) spots.set(key, { place: this.places[i], numbers: [] });
      spots.get(key).numbers.push(i);
    }
    return [...spots.values()].map((spot) => ({ ...spot, chosen: spot.numbers.filter((i) => chosen.has(i)) }));
  }

  #groupMark({ place: [x, y], numbers, chosen }, active) {
    const shown = numbers.includes(active) ? active : (chosen[0] ?? numbers[0]);
    const kind = `camera${chosen.length ? " chosen" : ""}${numbers.includes(active) ? " active" : ""}`;
    const group = svg("g", { class: kind, transform: `translate(${x.toFixed(2)} ${y.toFixed(2)})`, "aria-hidden": "true" }, ...mark(shown, chosen.length > 0));
    if (numbers.length > 1) group.append(text(`×${numbers.length}`, MARK + 2, -MARK + 1, { class: "word" }));
    return group;
  }

  /** Degrees and metres under a pointer. */
  standAt(event) {
    const [right, down] = this.metres(event);
    return { elevation: clamp(degrees(Math.atan2(-down, Math.max(right, 1e-6))), -89, 89), distance: Math.hypot(Math.max(right, 0), down) };
  }
}

/** The picture that a camera makes of the figure. */
export function drawPicture(element, [width, height], camera, fov, aspect) {
  const w = Math.min(width, height * aspect);
  const h = w / aspect;
  set(element, { viewBox: `${-width / 2} ${-height / 2} ${width} ${height}`, width, height });
  const frame = { x: -w / 2, y: -h / 2, width: w, height: h };
  if (!camera || w < 4) return element.replaceChildren(svg("rect", { ...frame, class: "frame" }));
  const look = throughLens(camera, camera.fov ?? fov, h);
  const grounds = [1, 0.5].map((radius) => drawnGround(look, radius)).filter(Boolean);
  element.replaceChildren(
    svg("rect", { ...frame, class: "frame" }),
    svg("svg", { ...frame, viewBox: `${-w / 2} ${-h / 2} ${w} ${h}` },
      ...grounds.map((ring) => svg("polygon", { points: points(ring.map(({ x, y }) => [x, y])), class: "ring" })),
      figure(look)),
    svg("rect", { ...frame, class: "frame edge" }),
  );
}
