/** Preview Avatar: a 4D view of the avatar inside the node, and a camera that goes back into the graph. */

import { AvatarBars, STYLE, markup } from "./avatar_bars.js";
import { eyeOf, lookAsText, lookFrom, moved, turned, zoomed } from "./avatar_look.js";
import { NoGraphics, SplatScene } from "./splat_scene.js";
import { SplatSorting } from "./splat_sorting.js";
import { MAGIC, kept, readStream } from "./splat_stream.js";
import { StageView } from "./stage_view.js";
import { openStoredFile, sentenceOf, storedFileURL } from "./stored_file.js";
import { registerView, savePicture } from "./view_widget.js";
import { t } from "./words.js";

const PAUSE = 800; // milliseconds between two pictures after which nothing has moved in between
const SLOW = 45; // milliseconds a picture while something moves, above which it is drawn more coarsely
const QUICK = 20; // and below which more finely
const COARSEST = 0.35; // share of the pixels along one side

/** The view inside one node. */
class AvatarView extends StageView {
  /** `memory` keeps the choices of a creator with the node: background, colour, speed, ending. */
  constructor(memory, node) {
    const words = { label: t("4D view of the avatar"), empty: t("Run the graph to see the avatar here.") };
    super(memory, { name: "turnaround-avatar", markup: markup(), ...words });
    this.node = node;
    this.frames = [];
    this.fineness = 1;
    this.bars = new AvatarBars(this);
    this.say(this.empty, "empty");
    this.showControls();
  }

  get pictures() {
    return this.frames.length;
  }

  get awaited() {
    return this.header.times.length;
  }

  // -- loading --

  /** Show a node's output; the avatar that is there already is not loaded twice. */
  show(shown) {
    const isSame = this.shown?.checksum === shown.checksum;
    // A camera that somebody has typed is gone to; the one that this view has written is where we are.
    const goes = !isSame || (shown.camera !== this.shown.camera && shown.camera !== this.written);
    this.shown = shown;
    this.bars.listCameras(shown.cameras);
    if (goes) this.look = lookFrom(shown.look);
    if (isSame && (this.header || this.isLoading)) this.redraw();
    else this.#load();
  }

  async #load() {
    this.release();
    const { signal } = (this.loading = new AbortController());
    this.isLoading = true;
    this.say(t("Loading the avatar …"));
    try {
      const { header, take } = await openStoredFile(this.shown, MAGIC, signal);
      await readStream(
        header,
        take,
        (still) => !signal.aborted && this.#begin(header, still),
        (f, frame) => !signal.aborted && this.#receive(f, frame),
      );
      if (signal.aborted) return;
      this.isLoading = false;
      if (this.scene) this.say("", "ready"); // else the view was put to sleep meanwhile
      this.redraw();
    } catch (error) {
      if (signal.aborted) return;
      this.release();
      this.say(sentenceOf(error), "failed");
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
    this.sorting = new SplatSorting(header.count, (order) => this.#takeOrder(order), () => {
      this.release();
      this.say(t("The browser refused to sort the avatar in a worker: allow workers for ComfyUI's page."), "failed");
    });
    this.makeCanvas();
    this.#fillScene();
    this.showControls();
    this.showHint();
  }

  #fillScene() {
    this.scene = new SplatScene(this.canvas, this.header);
    this.scene.setStill(this.still);
    this.sorting.forget(); // the order on the card is gone
    this.fineness = this.scene.isSoftware ? 0.5 : 1;
  }

  #receive(f, frame) {
    this.frames[f] = frame;
    this.sorting.addFrame(f, new Uint16Array(frame.texels.buffer));
    if (f === 0 && this.scene) this.say("");
    if (f % 8 === 0) this.redraw();
  }

  // -- losing and giving back --

  /** The graphics card's part is gone: by itself it comes back, or with a click. */
  onLost() {
    this.stopDrawing();
    this.scene = null;
    this.sayAsleep();
    this.parts.stage.addEventListener("pointerdown", () => this.#wakeAnew(), { once: true });
  }

  onRestored() {
    if (this.scene || !this.header) return;
    try {
      this.#fillScene();
      this.say("", this.isLoading ? "loading" : "ready");
      this.redraw();
    } catch (error) {
      this.say(error.message, "failed");
    }
  }

  #wakeAnew() {
    if (this.scene || !this.header) return;
    this.letGoOfCanvas();
    this.makeCanvas();
    this.onRestored();
  }

  /** Let go of everything but the output's name; `show` begins anew. */
  release() {
    this.loading?.abort();
    this.isLoading = false;
    this.letGoOfCanvas();
    this.sorting?.end();
    this.sorting = this.header = this.still = null;
    this.frames = [];
    this.#hideStill();
  }

  #showStill() {
    const still = document.createElement("img");
    still.alt = t("The avatar from its camera");
    still.src = storedFileURL(this.shown.still);
    this.parts.stage.prepend(still);
    this.parts.stage.classList.add("with-still");
  }

  #hideStill() {
    this.parts.stage.querySelector("img")?.remove();
    this.parts.stage.classList.remove("with-still");
  }

  // -- controls --

  say(text, state) {
    super.say(text, state);
    this.bars.parts.frame.hidden = !this.scene;
  }

  showControls() {
    this.showTime();
    this.bars.parts.frame.hidden = !this.scene;
    this.bars.enable(Boolean(this.header));
    this.bars.recall();
  }

  deedOf(event) {
    const { timeline } = this;
    const turn = (dx, dy) => () => this.turn(dx, dy);
    const step = (by) => () => this.standAt(Math.round(timeline.time) + by);
    const number = Number(event.key);
    if (number >= 1 && number <= this.shown?.cameras.length) return () => this.goToCamera(`rig ${number - 1}`);
    return {
      ArrowLeft: event.shiftKey ? turn(-0.05, 0) : step(-1),
      ArrowRight: event.shiftKey ? turn(0.05, 0) : step(1),
      ArrowUp: event.shiftKey ? turn(0, -0.05) : null,
      ArrowDown: event.shiftKey ? turn(0, 0.05) : null,
      Home: () => this.standAt(0),
      End: () => this.standAt(timeline.total - 1),
      "+": () => this.zoomBy(0.9),
      "=": () => this.zoomBy(0.9),
      "-": () => this.zoomBy(1 / 0.9),
      0: () => this.goHome(),
      c: () => this.keepCamera(),
      p: () => this.save(),
    }[event.key];
  }

  // -- the camera --

  goToCamera(value) {
    const [kind, number] = value.split(" ");
    if (kind === "rig") this.look = lookFrom(this.shown.cameras[number].look);
    else if (kind === "side") this.look = { ...lookFrom(this.shown.first), azimuth: this.bars.azimuthOf(number) };
    this.bars.standAt(value);
    this.redraw();
  }

  goHome() {
    if (!this.shown) return;
    this.look = lookFrom(this.shown.first);
    this.bars.standAt("");
    this.redraw();
  }

  /** Look from elsewhere, by the creator's hand. */
  #lookFrom(look) {
    this.look = look;
    this.bars.standAt("");
    this.learned();
  }

  zoomBy(factor) {
    if (this.look) this.#lookFrom(zoomed(this.look, factor));
  }

  turn(dx, dy) {
    if (this.look) this.#lookFrom(turned(this.look, dx, dy));
  }

  move(dx, dy) {
    if (this.look) this.#lookFrom(moved(this.look, eyeOf(this.look, this.#shape(), this.aspect()), dx, dy));
  }

  /** Write the camera into the node's widget, whose rig the next run gives out. */
  keepCamera() {
    const widget = this.node.widgets?.find((w) => w.name === "camera");
    if (!widget || !this.look) return;
    if (this.node.inputs?.find((i) => i.name === "camera")?.link != null) {
      this.bars.tell(t("'camera' comes from another node: disconnect it to use this one."));
      return;
    }
    this.written = lookAsText(this.look);
    widget.value = this.written;
    widget.callback?.(this.written);
    this.node.graph?.setDirtyCanvas?.(true, true);
    this.node.graph?.afterChange?.(this.node);
    this.bars.tell(t("The node's 'camera' is this one now: run the graph to use it."));
  }

  /** A PNG as large as the node's pictures; over a checker without any background. */
  save() {
    if (!this.scene || !this.frames.length) return;
    const { canvas, shown } = this;
    const before = [canvas.width, canvas.height];
    [canvas.width, canvas.height] = shown.picture;
    this.#paint(this.bars.ground(this.header, false));
    savePicture(canvas, `avatar_frame${String(this.timeline.frame).padStart(4, "0")}.png`);
    [canvas.width, canvas.height] = before;
    this.redraw();
  }

  // -- drawing --

  #shape() {
    return this.shown.picture[0] / this.shown.picture[1];
  }

  /** A picture that takes long to draw has fewer pixels while something moves. */
  onPicture(took) {
    if (took > PAUSE) return;
    if (took > SLOW) this.fineness = Math.max(COARSEST, 0.85 * this.fineness);
    else if (took < QUICK) this.fineness = Math.min(1, 1.03 * this.fineness);
  }

  draw(isStill) {
    this.fitCanvas(isStill ? 1 : this.fineness);
    this.bars.showFrame(this.#shape(), this.aspect());
    this.#paint(this.bars.ground(this.header, true));
  }

  #paint(ground) {
    const { scene, canvas, header, sorting } = this;
    const eye = eyeOf(this.look, this.#shape(), canvas.width / canvas.height);
    // The moment as the file has it: two frames and the share of the later one.
    const moment = kept(header.times, this.timeline.time, this.frames.length);
    const toward = eye.axes[2].map((v, i) => v * header.size[i]);
    this.root.dataset.sorted = sorting.ask(moment, toward);
    if (sorting.held) scene.draw(this.frames, moment, eye, ground);
  }

  #takeOrder(order) {
    if (!this.scene) return this.sorting.forget();
    this.scene.setOrder(order);
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
