/** Preview Cloud: a 3D view of the points inside the node. The file is described in models/cloud_file.py. */

import { firstLook, lookFrom, moved, stageOf, turned, zoomed } from "./cloud_look.js";
import { CloudScene } from "./cloud_scene.js";
import { GROUNDS } from "./graphics.js";
import { StageView, clockMarkup, stageMarkup } from "./stage_view.js";
import { openStoredFile, sentenceOf } from "./stored_file.js";
import { add, length } from "./vectors.js";
import { icon, options, registerView } from "./view_widget.js";
import { t } from "./words.js";

const MAGIC = "TURNCLD1";
const POINT = 13; // bytes of a point

/** [key, label, legend], in the order of the shader's modes. */
const modes = () => [
  ["color", t("Colour"), ""],
  ["normals", t("Normals"), t("red right, green up, blue towards you; black = not seen from the front")],
  ["seen", t("Seen / guessed"), [["head-on", t("seen head-on")], ["grazing", t("grazing")], ["guessed", t("guessed")]]],
  ["depth", t("Depth"), [["near", t("near the camera")], ["far", t("far")]]],
];

const STYLE = `
.turnaround-cloud .legend b { display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin: 0 4px 0 8px; }
.turnaround-cloud .legend b:first-child { margin-left: 0; }
.turnaround-cloud .head-on { background: #1775d1; } .turnaround-cloud .grazing { background: #cce6f7; }
.turnaround-cloud .guessed { background: #f28c33; } .turnaround-cloud .near { background: #fce88c; }
.turnaround-cloud .far { background: #3d2a6b; }`;

const markup = () => `${stageMarkup()}
<div class="bar">${clockMarkup(1)}
  <select class="mode" title="${t("What the colours mean")}">${options(modes())}</select>
  <button class="ground" title="${t("Dark or light background")}">${icon("ground")}</button>
  <button class="home" title="${t("Back to the source camera's view (double-click)")}">${icon("home")}</button>
</div>`;

/** The view inside one node. */
class CloudView extends StageView {
  /** `memory` keeps the choices of a creator with the node: mode and ground. */
  constructor(memory) {
    const words = { label: t("3D view of the cloud"), empty: t("Run the graph to see the cloud here.") };
    super(memory, { name: "turnaround-cloud", markup: markup(), ...words });
    this.look = firstLook();
    this.modes = modes();
    this.parts.mode = this.root.querySelector(".mode");
    this.#listen();
    this.say(this.empty, "empty");
    this.showControls();
  }

  get pictures() {
    return this.scene?.frames.length ?? 0;
  }

  get awaited() {
    return this.header.counts.length;
  }

  // -- loading --

  /** Show the cloud of a node's output; the same one is not loaded twice. */
  show(file) {
    const isShown = this.file?.filename === file.filename && this.file?.checksum === file.checksum;
    if (!isShown || !this.scene) this.#load(file);
  }

  async #load(file) {
    this.release();
    this.file = file;
    const { signal } = (this.loading = new AbortController());
    this.say(t("Loading the cloud …"));
    try {
      this.makeCanvas();
      this.scene = new CloudScene(this.canvas);
      const { header, take } = await openStoredFile(file, MAGIC, signal);
      this.#begin(header);
      for (const [f, count] of header.counts.entries()) {
        this.#receive(f, await take(Math.ceil((POINT * count) / 4) * 4), count);
      }
      this.root.dataset.state = "ready";
      this.showControls();
    } catch (error) {
      if (signal.aborted) return;
      this.release();
      this.say(sentenceOf(error), "failed");
    }
  }

  #begin(header) {
    this.header = header;
    this.stage = stageOf(header);
    this.scene.setCamera(this.stage.corners);
    this.timeline.total = header.counts.length;
    this.timeline.fps = header.fps || 1;
    this.timeline.hold(this.timeline.time);
    this.showHint();
    this.showControls();
  }

  #receive(f, bytes, count) {
    this.scene.setFrame(f, bytes, count);
    if (f > 0 && f !== this.timeline.frame) {
      if (f % 8 === 0) this.showControls();
      return;
    }
    this.say("");
    this.redraw();
  }

  /** All that was on the graphics card is gone. */
  onLost() {
    const { file } = this;
    this.release();
    this.sayAsleep();
    const wake = () => this.file === file && !this.scene && this.#load(file);
    this.parts.stage.addEventListener("pointerdown", wake, { once: true });
  }

  /** Let go of everything but the file's name; `show` begins anew. */
  release() {
    this.loading?.abort();
    this.letGoOfCanvas();
    this.header = this.stage = null;
  }

  // -- controls --

  get mode() {
    return Math.max(0, this.modes.findIndex(([key]) => key === this.memory.colors));
  }

  get ground() {
    return GROUNDS[this.memory.ground] ? this.memory.ground : "dark";
  }

  #listen() {
    const { parts, root } = this;
    const remember = (key, value) => {
      this.memory[key] = value;
      this.redraw();
    };
    parts.mode.addEventListener("change", () => remember("colors", parts.mode.value));
    const other = () => (this.ground === "dark" ? "light" : "dark");
    root.querySelector(".ground").addEventListener("click", () => remember("ground", other()));
    root.querySelector(".home").addEventListener("click", () => this.goHome());
  }

  showControls() {
    this.showTime();
    const [key, , legend] = this.modes[this.mode];
    this.parts.mode.value = key;
    this.parts.legend.hidden = !this.header || !legend;
    if (this.parts.legend.dataset.mode !== key) this.#fillLegend(key, legend);
  }

  #fillLegend(key, legend) {
    const pairs = Array.isArray(legend) ? legend : [["", legend]];
    const dot = (name) => Object.assign(document.createElement("b"), { className: name });
    this.parts.legend.replaceChildren(...pairs.flatMap(([name, text]) => (name ? [dot(name), `${text} `] : [text])));
    this.parts.legend.dataset.mode = key;
  }

  deedOf(event) {
    const { frame, total } = this.timeline;
    return {
      ArrowLeft: () => this.standAt(frame - 1),
      ArrowRight: () => this.standAt(frame + 1),
      Home: () => this.standAt(0),
      End: () => this.standAt(total - 1),
    }[event.key];
  }

  goHome() {
    this.look = firstLook();
    this.redraw();
  }

  zoomBy(factor) {
    this.look = zoomed(this.look, factor);
    this.learned();
  }

  turn(dx, dy) {
    if (!this.stage) return;
    this.look = turned(this.stage, this.look, dx, dy);
    this.learned();
  }

  move(dx, dy) {
    if (!this.stage) return;
    this.look = moved(this.stage, this.look, this.aspect(), dx, dy);
    this.learned();
  }

  // -- drawing --

  draw(isStill) {
    const { scene, stage, header, canvas } = this;
    if (!stage) return;
    const density = this.fitCanvas();
    // Without a graphics card a moving picture is drawn coarsely.
    const fineness = scene.isSoftware && !isStill ? 0.5 : density < 2 ? 2 : 1;
    const look = lookFrom(stage, this.look, canvas.width / canvas.height);
    const source = header.source;
    const values = {
      ...look, ...GROUNDS[this.ground], low: header.low, size: header.size, radius: header.radius,
      source: source.center, sourceForward: source.rotation[2], depths: stage.depths, mode: this.mode,
      ground: stage.ground, cell: stage.cell, reach: 3.2 * stage.size,
      middle: [stage.middle[0], stage.ground, stage.middle[2]],
    };
    // While loading, the last frame that has come before the wanted one.
    scene.draw(Math.min(this.timeline.frame, this.pictures - 1), values, fineness, {
      shadow: look.eye[1] < stage.ground,
      camera: length(add(look.eye, source.center, -1)) > 0.35 * stage.distance,
    });
  }
}

registerView({
  extension: "Turnaround.PreviewCloud",
  nodeClass: "TurnaroundPreviewCloud",
  widget: "cloud_view",
  output: "turnaround_cloud",
  minHeight: 280,
  firstSize: [420, 640],
  style: STYLE,
  make: (memory) => new CloudView(memory),
});
