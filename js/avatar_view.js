/**
 * Preview Avatar: a 4D view of the avatar inside the node, and a camera that goes back into the graph.
 * Drawn only when something changed.
 */

import { densityOf, icon, makeRoot, options, registerView } from "./view_widget.js";
import { GROUNDS } from "./graphics.js";
import { listenGestures, wheelZoom } from "./gestures.js";
import { NoGraphics, SplatScene } from "./splat_scene.js";
import { MAGIC, kept, readStream } from "./splat_stream.js";
import { openStoredFile, sentenceOf, storedFileURL } from "./stored_file.js";
import { ENDINGS, Timeline } from "./timeline.js";
import { STEEPEST, add, axesOf, clamp, directionOf, niceStep, projectionMatrix, viewMatrix } from "./vectors.js";

const REST = 160; // milliseconds without a change until the picture is drawn finely
const SLOW = 45; // milliseconds a picture while something moves, above which it is drawn more coarsely
const QUICK = 20; // and below which more finely
const COARSEST = 0.35; // share of the pixels along one side
const DISTANCES = [0.02, 500]; // metres
const TOLD = 2600; // milliseconds that a sentence stays
const GREYS = { dark: GROUNDS.dark, light: GROUNDS.light };
const CHECKER = { inner: [0.42, 0.42, 0.42], outer: [0.54, 0.54, 0.54], cell: 12 };
const BACKGROUNDS = [
  ["dark", "Dark"],
  ["light", "Light"],
  ["checker", "Checker (snapshots: none)"],
  ["colour", "Colour …"],
];
const SPEEDS = [["0.1", "0.1 ×"], ["0.25", "0.25 ×"], ["0.5", "0.5 ×"], ["1", "1 ×"], ["2", "2 ×"]];
const SIDES = [["Front", 0], ["Right side", 90], ["Back", 180], ["Left side", -90]];

// ---- looks: degrees and metres, as models/looks.py has them ----

const lookFrom = ([azimuth, elevation, distance, fov, ...at]) => ({ azimuth, elevation, distance, fov, at });

function wordsOf({ azimuth, elevation, distance, fov, at }) {
  const short = (v, digits) => String(Number(v.toFixed(digits)));
  const around = ((((azimuth + 180) % 360) + 360) % 360) - 180;
  return (
    `azimuth ${short(around, 2)}, elevation ${short(elevation, 2)}, distance ${short(distance, 4)}, ` +
    `fov ${short(fov, 2)}, at ${at.map((v) => short(v, 4)).join(" ")}`
  );
}

/**
 * What the shaders want to know of a look. The picture of `shape` (width / height) is whole within a
 * canvas of `aspect`.
 */
function eyeOf(look, shape, aspect) {
  const [azimuth, elevation] = [look.azimuth, look.elevation].map((v) => (v * Math.PI) / 180);
  const eye = add(look.at, directionOf(azimuth, elevation), look.distance);
  const axes = axesOf(eye, look.at);
  const tan = Math.tan((look.fov * Math.PI) / 360) * Math.max(1, shape / aspect);
  const range = [0.01 * look.distance, 20 * look.distance + 50];
  return { eye, axes, tan, view: viewMatrix(eye, axes), projection: projectionMatrix(tan, aspect, ...range) };
}

const rgbOf = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);

// ---- the widget ----

const STYLE = `
.turnaround-avatar { min-height: 320px; }
.turnaround-avatar .frame { position: absolute; inset: 0; margin: auto; pointer-events: none; opacity: .28;
  outline: 1px dashed #9fb4cc; outline-offset: -1px; max-width: 100%; max-height: 100%; }
.turnaround-avatar .stage img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.turnaround-avatar .stage.with-still .words { place-items: end center; text-shadow: 0 0 3px #000, 0 0 3px #000; color: #fff; }
.turnaround-avatar .bar .keep { width: auto; padding: 0 8px; }
.turnaround-avatar .bar select { flex: 0 1 auto; max-width: 92px; }
.turnaround-avatar .bar .cameras { flex: 1 1 60px; max-width: none; }
.turnaround-avatar .bar input[type=color] { width: 26px; height: 24px; padding: 0; border: 0; background: none; }`;

const MARKUP = `
<div class="stage">
  <div class="frame" hidden></div>
  <div class="legend" hidden></div>
  <div class="hint" hidden>drag = turn · wheel = zoom · right-drag = move · double-click = back</div>
  <div class="words"></div>
</div>
<div class="bar">
  <button class="play" title="Play or pause (space)"></button>
  <input class="time" type="range" min="0" max="0" value="0" step="any" title="Frame (arrow keys)">
  <output></output>
  <select class="speed" title="Speed">${options(SPEEDS)}</select>
  <select class="ending" title="After the last frame">${options(ENDINGS)}</select>
</div>
<div class="bar">
  <select class="cameras" title="Go to a camera (number keys: those of the rig)"></select>
  <select class="background" title="Background">${options(BACKGROUNDS)}</select>
  <input class="colour" type="color" title="Background colour" hidden>
  <button class="home" title="Back to the first look (double-click, or 0)">${icon("home")}</button>
  <button class="save" title="Save this picture as PNG, as large as the node's width and height (p)">${icon("save")}</button>
  <button class="keep" title="Give this camera out at the node's 'camera' (c)">Use camera</button>
</div>`;

const EMPTY = "Run the graph to see the avatar here.";

/** The view inside one node. */
class AvatarView {
  /** `memory` keeps the choices of a creator with the node: background, colour, speed, ending. */
  constructor(memory, node) {
    this.memory = memory;
    this.node = node;
    this.timeline = new Timeline();
    this.isVisible = true;
    this.fineness = 1;
    this.root = makeRoot("turnaround-avatar", MARKUP);
    const part = (name) => this.root.querySelector(name);
    this.parts = Object.fromEntries(
      ["stage", "frame", "legend", "hint", "words", "play", "time", "speed", "ending", "cameras", "background", "colour"].map(
        (name) => [name, part(`.${name}`)],
      ),
    );
    this.parts.count = part("output");
    this.#listen(part(".home"), part(".save"), part(".keep"));
    this.#say(EMPTY);
    this.#showControls();
  }

  // -- loading --

  /** Show a node's output; the avatar that is there already is not loaded twice. */
  show(shown) {
    const isSame = this.shown?.checksum === shown.checksum;
    // A camera that somebody has typed is gone to; the one that this view has written is where we are.
    const goes = !isSame || (shown.camera !== this.shown.camera && shown.camera !== this.written);
    this.shown = shown;
    this.#listCameras();
    if (goes) this.look = lookFrom(shown.look);
    if (isSame && (this.header || this.isLoading)) this.redraw();
    else this.#load();
  }

  async #load() {
    this.#release();
    const { signal } = (this.loading = new AbortController());
    this.isLoading = true;
    this.#say("Loading the avatar …");
    try {
      const { header, take } = await openStoredFile(this.shown, MAGIC, "avatar", signal);
      await readStream(
        header,
        take,
        (still) => !signal.aborted && this.#begin(header, still),
        (f, frame) => !signal.aborted && this.#receive(f, frame),
      );
      if (signal.aborted) return;
      this.isLoading = false;
      this.#say("", "ready");
      this.redraw();
    } catch (error) {
      if (signal.aborted) return;
      this.#release();
      this.#say(sentenceOf(error), "failed");
      if (error instanceof NoGraphics) this.#showStill();
    }
  }

  #begin(header, still) {
    this.header = header;
    this.still = still;
    this.frames = [];
    this.timeline.total = header.frames;
    this.timeline.fps = header.fps;
    this.timeline.hold(this.timeline.time);
    this.#makeSorter(header.count);
    this.#makeCanvas();
    this.#fillScene();
    this.#recall();
    this.parts.hint.hidden = Boolean(this.memory.knowsHow);
  }

  #makeSorter(count) {
    this.sorter = new Worker(new URL("./splat_sorter.js", import.meta.url), { type: "module" });
    this.sorter.onmessage = ({ data }) => this.#takeOrder(data);
    this.sorter.onerror = (event) => {
      event.preventDefault();
      this.#release();
      this.#say("The browser refused to sort the avatar in a worker: allow workers for ComfyUI's page.", "failed");
    };
    this.sorter.postMessage({ count });
    this.order = new Uint32Array(count); // null while the worker has it
    this.wish = null;
    this.held = null;
  }

  #makeCanvas() {
    const canvas = (this.canvas = document.createElement("canvas"));
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", "4D view of the avatar");
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault();
      if (this.canvas === canvas) this.#sleep();
    });
    canvas.addEventListener("webglcontextrestored", () => this.canvas === canvas && this.#wake());
    listenGestures(canvas, {
      turn: (dx, dy) => this.#turn(dx, dy),
      move: (dx, dy) => this.#move(dx, dy),
      zoom: (factor) => this.#zoom(factor),
      home: () => this.#goHome(),
    });
    this.parts.stage.prepend(canvas);
    this.watch = new ResizeObserver(() => this.redraw());
    this.watch.observe(this.parts.stage);
    this.sight = new IntersectionObserver((entries) => {
      this.isVisible = entries.at(-1).isIntersecting; // on a busy page several come together
      if (this.isVisible) this.redraw();
    });
    this.sight.observe(this.parts.stage);
    this.onPage = () => this.redraw();
    document.addEventListener("visibilitychange", this.onPage);
  }

  #fillScene() {
    this.scene = new SplatScene(this.canvas, this.header);
    this.scene.setStill(this.still);
    this.held = null; // the order on the card is gone
    this.fineness = this.scene.isSoftware ? 0.5 : 1;
  }

  #receive(f, frame) {
    this.frames[f] = frame;
    const { count } = this.header;
    const words = new Uint16Array(frame.texels.buffer);
    const places = new Uint16Array(3 * count);
    for (let i = 0; i < count; i++) {
      for (let c = 0; c < 3; c++) places[3 * i + c] = words[8 * i + c];
    }
    this.sorter.postMessage({ f, places }, [places.buffer]);
    if (f === 0) this.#say("");
    if (f === 0 || f % 8 === 0) this.redraw();
  }

  // -- losing and giving back --

  /** The graphics card's part is gone: by itself it comes back, or with a click. */
  #sleep() {
    cancelAnimationFrame(this.ticket);
    clearTimeout(this.rest);
    this.ticket = null;
    this.scene = null;
    this.#say("The browser put this view to sleep to spare memory: click here to wake it.", "asleep");
    this.parts.stage.addEventListener("pointerdown", () => this.#wakeAnew(), { once: true });
  }

  #wake() {
    if (this.scene || !this.header) return;
    try {
      this.#fillScene();
      this.#say("", this.isLoading ? "loading" : "ready");
      this.redraw();
    } catch (error) {
      this.#say(error.message, "failed");
    }
  }

  #wakeAnew() {
    if (this.scene || !this.header) return;
    this.#letGoOfCanvas();
    this.#makeCanvas();
    this.#wake();
  }

  #letGoOfCanvas() {
    this.watch?.disconnect();
    this.sight?.disconnect();
    document.removeEventListener("visibilitychange", this.onPage);
    cancelAnimationFrame(this.ticket);
    clearTimeout(this.rest);
    this.ticket = null;
    const { scene, canvas } = this;
    this.scene = this.canvas = null;
    scene?.dispose();
    canvas?.remove();
  }

  /** Let go of everything but the output's name; `show` begins anew. */
  #release() {
    this.loading?.abort();
    this.isLoading = false;
    this.#letGoOfCanvas();
    this.sorter?.terminate();
    this.sorter = this.order = this.wish = this.held = null;
    this.header = this.still = null;
    this.frames = [];
    this.#hideStill();
  }

  dispose() {
    this.timeline.play(false);
    this.#release();
    this.#say(EMPTY);
    this.#showControls();
  }

  #showStill() {
    const still = document.createElement("img");
    still.alt = "The avatar from its camera";
    still.src = storedFileURL(this.shown.still);
    this.parts.stage.prepend(still);
    this.parts.stage.classList.add("with-still");
  }

  #hideStill() {
    this.parts.stage.querySelector("img")?.remove();
    this.parts.stage.classList.remove("with-still");
  }

  // -- controls --

  #say(text, state = text === EMPTY ? "empty" : "loading") {
    this.parts.words.textContent = text;
    this.root.dataset.state = state;
    if (!this.scene) for (const name of ["legend", "hint", "frame"]) this.parts[name].hidden = true;
  }

  /** A sentence over the picture, for a while. */
  #tell(text) {
    const { legend } = this.parts;
    legend.textContent = text;
    legend.hidden = false;
    clearTimeout(this.telling);
    this.telling = setTimeout(() => (legend.hidden = true), TOLD);
  }

  #listCameras() {
    const { cameras } = this.parts;
    const list = (label, items) => {
      const group = document.createElement("optgroup");
      group.label = label;
      group.append(...items.map(([name, value]) => new Option(name, value)));
      return group;
    };
    const named = this.shown.cameras.map(({ name }, i) => [`${i + 1}: ${name}`, `rig ${i}`]);
    cameras.replaceChildren(new Option("Cameras …", ""), list("Around", SIDES.map(([name], i) => [name, `side ${i}`])));
    if (named.length) cameras.append(list("Rig", named));
  }

  #goToCamera(value) {
    const [kind, number] = value.split(" ");
    if (kind === "rig") this.look = lookFrom(this.shown.cameras[number].look);
    else if (kind === "side") this.look = { ...lookFrom(this.shown.first), azimuth: SIDES[number][1] };
    this.redraw();
    this.parts.cameras.value = value;
  }

  /** What the creator chose before. */
  #recall() {
    const { speed, ending, background, colour } = this.parts;
    const one = (select, key, otherwise) => {
      select.value = this.memory[key] ?? otherwise;
      if (select.selectedIndex < 0) select.value = otherwise;
    };
    one(speed, "speed", "1");
    one(ending, "ending", "loop");
    one(background, "background", "dark");
    colour.value = /^#[0-9a-f]{6}$/.test(this.memory.colour) ? this.memory.colour : "#00b140";
    colour.hidden = background.value !== "colour";
    this.timeline.speed = Number(speed.value);
    if (this.timeline.ending !== ending.value) this.timeline.end(ending.value);
  }

  #remember(key, value) {
    this.memory[key] = value;
    this.redraw();
  }

  #showControls() {
    const { play, time, count, frame } = this.parts;
    const { total } = this.timeline;
    const isThere = Boolean(this.header);
    play.innerHTML = icon(this.timeline.isPlaying ? "pause" : "play");
    play.disabled = time.disabled = !isThere || total < 2;
    time.max = isThere ? total - 1 : 0;
    time.value = this.timeline.time;
    const come = isThere ? this.frames.length / this.header.times.length : 1;
    count.textContent = come < 1 ? `${Math.round(100 * come)} %` : isThere ? `${this.timeline.frame + 1} / ${total}` : "";
    this.root.dataset.frame = this.timeline.frame;
    frame.hidden = !this.scene;
    for (const button of this.root.querySelectorAll(".home, .save, .keep, .cameras")) button.disabled = !isThere;
    this.#recall();
  }

  setPlaying(isPlaying) {
    this.timeline.play(isPlaying);
    this.redraw();
  }

  #standAt(time) {
    this.timeline.play(false);
    this.timeline.seek(time);
    this.redraw();
  }

  #listen(home, save, keep) {
    const { root, parts } = this;
    root.addEventListener("keydown", (event) => this.#onKey(event));
    parts.play.addEventListener("click", () => this.setPlaying(!this.timeline.isPlaying));
    parts.time.addEventListener("input", () => this.#standAt(parts.time.valueAsNumber));
    for (const name of ["speed", "ending", "background"]) {
      parts[name].addEventListener("change", () => this.#remember(name, parts[name].value));
    }
    parts.colour.addEventListener("input", () => this.#remember("colour", parts.colour.value));
    parts.cameras.addEventListener("change", () => this.#goToCamera(parts.cameras.value));
    home.addEventListener("click", () => this.#goHome());
    save.addEventListener("click", () => this.#save());
    keep.addEventListener("click", () => this.#keepCamera());
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const { timeline } = this;
    const turn = (dx, dy) => () => this.#turn(dx, dy);
    const step = (by) => () => this.#standAt(Math.round(timeline.time) + by);
    const deeds = {
      " ": () => this.setPlaying(!timeline.isPlaying),
      ArrowLeft: event.shiftKey ? turn(-0.05, 0) : step(-1),
      ArrowRight: event.shiftKey ? turn(0.05, 0) : step(1),
      ArrowUp: event.shiftKey ? turn(0, -0.05) : null,
      ArrowDown: event.shiftKey ? turn(0, 0.05) : null,
      Home: () => this.#standAt(0),
      End: () => this.#standAt(timeline.total - 1),
      "+": () => this.#zoom(0.9),
      "=": () => this.#zoom(0.9),
      "-": () => this.#zoom(1 / 0.9),
      0: () => this.#goHome(),
      c: () => this.#keepCamera(),
      p: () => this.#save(),
    };
    let deed = deeds[event.key];
    const number = Number(event.key);
    if (number >= 1 && number <= this.shown?.cameras.length) deed = () => this.#goToCamera(`rig ${number - 1}`);
    // A focused button answers the space bar by itself.
    if (!deed || !this.header || (event.key === " " && event.target.tagName === "BUTTON")) return;
    event.preventDefault();
    event.stopPropagation();
    deed();
  }

  // -- the camera --

  #goHome() {
    if (!this.shown) return;
    this.look = lookFrom(this.shown.first);
    this.#looked();
  }

  #looked() {
    this.parts.cameras.value = "";
    this.redraw();
  }

  #learned() {
    this.memory.knowsHow = true;
    this.parts.hint.hidden = true;
    this.#looked();
  }

  zoom(event) {
    this.#zoom(wheelZoom(event));
  }

  #zoom(factor) {
    if (!this.look) return;
    this.look.distance = clamp(this.look.distance * factor, ...DISTANCES);
    this.#learned();
  }

  /** Turn by shares of the view's height. */
  #turn(dx, dy) {
    if (!this.look) return;
    const degrees = (3.5 * 180) / Math.PI;
    const steepest = (STEEPEST * 180) / Math.PI;
    this.look.azimuth -= degrees * dx;
    this.look.elevation = clamp(this.look.elevation + degrees * dy, -steepest, steepest);
    this.#learned();
  }

  #move(dx, dy) {
    if (!this.look) return;
    const { axes, tan } = eyeOf(this.look, this.#shape(), this.#aspect());
    const scale = 2 * tan * this.look.distance;
    this.look.at = add(add(this.look.at, axes[0], -dx * scale), axes[1], -dy * scale);
    this.#learned();
  }

  /** Write the camera into the node's widget, whose rig the next run gives out. */
  #keepCamera() {
    const widget = this.node.widgets?.find((w) => w.name === "camera");
    if (!widget || !this.look) return;
    if (this.node.inputs?.find((i) => i.name === "camera")?.link != null) {
      this.#tell("'camera' comes from another node: disconnect it to use this one.");
      return;
    }
    this.written = wordsOf(this.look);
    widget.value = this.written;
    widget.callback?.(this.written);
    this.node.graph?.setDirtyCanvas?.(true, true);
    this.node.graph?.afterChange?.(this.node);
    this.#tell("The node's 'camera' is this one now: run the graph to use it.");
  }

  /** A PNG as large as the node's pictures; over a checker without any background. */
  #save() {
    if (!this.scene || !this.frames.length) return;
    const { canvas, shown } = this;
    const before = [canvas.width, canvas.height];
    [canvas.width, canvas.height] = shown.picture;
    this.#paint(this.#ground(false));
    canvas.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `avatar_frame${String(this.timeline.frame).padStart(4, "0")}.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    }, "image/png");
    [canvas.width, canvas.height] = before;
    this.redraw();
  }

  // -- drawing --

  #aspect() {
    const { clientWidth, clientHeight } = this.parts.stage;
    return clientWidth / clientHeight || 1;
  }

  #shape() {
    return this.shown.picture[0] / this.shown.picture[1];
  }

  /** The moment as the file has it: two frames and the share of the later one. */
  #moment() {
    return kept(this.header.times, this.timeline.time, this.frames.length);
  }

  #ground(isSeen) {
    const kind = this.parts.background.value;
    if (kind === "checker") return isSeen ? CHECKER : null;
    if (kind === "colour") return { inner: rgbOf(this.parts.colour.value), outer: [0, 0, 0], cell: 0 };
    const { low, size } = this.header;
    const extent = Math.max(...size);
    return {
      ...GREYS[kind], middle: [low[0] + size[0] / 2, low[1] + size[1], low[2] + size[2] / 2],
      reach: 1.6 * extent, cell: niceStep(extent / 4),
    };
  }

  /** Draw once, soon; while playing, go on. */
  redraw() {
    this.#showControls();
    clearTimeout(this.rest);
    if (this.ticket == null && this.scene) this.ticket = requestAnimationFrame((now) => this.#tick(now));
  }

  #tick(now) {
    this.ticket = null;
    if (!this.scene || !this.frames.length || !this.isVisible || document.hidden || !this.parts.stage.clientWidth) {
      this.timeline.last = this.drawn = null; // no time goes by where nobody looks
      return;
    }
    const { isPlaying } = this.timeline;
    this.timeline.advance(now);
    if (isPlaying) this.#showControls();
    this.#adapt(now);
    this.#draw(false);
    if (this.timeline.isPlaying) this.ticket = requestAnimationFrame((later) => this.#tick(later));
    else this.rest = setTimeout(() => this.#draw(true), REST);
  }

  /** A picture that takes long to draw has fewer pixels while something moves. */
  #adapt(now) {
    const took = now - (this.drawn ?? -Infinity);
    this.drawn = now;
    if (took > 5 * REST) return; // nothing moved in between
    if (took > SLOW) this.fineness = Math.max(COARSEST, 0.85 * this.fineness);
    else if (took < QUICK) this.fineness = Math.min(1, 1.03 * this.fineness);
  }

  /** `isStill`: nothing moves, so the picture may cost more. */
  #draw(isStill) {
    const { scene, canvas } = this;
    if (!scene || !canvas.clientWidth) return;
    const density = densityOf(canvas) * (isStill ? 1 : this.fineness);
    const size = [canvas.clientWidth, canvas.clientHeight].map((v) => clamp(Math.round(v * density), 1, 4096));
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    const shape = this.#shape();
    this.parts.frame.style.aspectRatio = shape;
    this.parts.frame.style[shape > this.#aspect() ? "width" : "height"] = "100%";
    this.parts.frame.style[shape > this.#aspect() ? "height" : "width"] = "auto";
    this.#paint(this.#ground(true));
  }

  #paint(ground) {
    const { scene, canvas } = this;
    const eye = eyeOf(this.look, this.#shape(), canvas.width / canvas.height);
    const moment = this.#moment();
    this.#wishOrder(moment, eye.axes[2]);
    if (this.held) scene.draw(this.frames, moment, eye, ground);
  }

  // -- the order --

  /** Ask the worker for the order at a moment and in a direction, unless it is there. */
  #wishOrder(moment, forward) {
    const toward = forward.map((v, i) => v * this.header.size[i]);
    const wanted = [...moment, toward];
    const isThere = this.held && String(this.held) === String(wanted);
    this.root.dataset.sorted = Boolean(isThere);
    this.wish = isThere ? null : wanted;
    this.#askForOrder();
  }

  #askForOrder() {
    if (!this.wish || !this.order) return; // nothing to ask, or the worker has not answered yet
    this.sorter.postMessage({ wanted: this.wish, order: this.order }, [this.order.buffer]);
    this.order = null;
    this.wish = null;
  }

  #takeOrder({ order, wanted }) {
    this.order = order;
    if (!this.scene) return;
    this.scene.setOrder(order);
    this.held = wanted;
    this.#askForOrder();
    this.redraw();
  }
}

registerView({
  extension: "Turnaround.PreviewAvatar",
  nodeClass: "TurnaroundPreviewAvatar",
  widget: "avatar_view",
  output: "turnaround_avatar",
  minHeight: 340,
  firstSize: [460, 720],
  style: STYLE,
  make: (memory, node) => new AvatarView(memory, node),
});
