/**
 * The rig editor itself: its text is the only state, everything else is drawn from it. Knows nothing
 * of ComfyUI's graph; js/rig_editor.js puts it into a node.
 */

import { cameraAsWords, counted, short, statusOf } from "./rig_descriptions.js";
import * as edits from "./rig_edits.js";
import { FIGURE } from "./rig_figure.js";
import { readLines, writeLines } from "./rig_lines.js";
import { markup } from "./rig_markup.js";
import { drawPicture, SidePlan, TopPlan } from "./rig_pads.js";
import { RigPointer } from "./rig_pointer.js";
import { t } from "./words.js";

const KEYS_REST = 500; // milliseconds after the last key until its change is done
const LETTERS = { a: "add", d: "duplicate", m: "mirror", s: "spread", n: "renumber", f: "fit" };
/** Azimuth, elevation, distance of one step of a key. */
const STEPS = {
  ArrowRight: [1, 0, 0], ArrowLeft: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
  PageUp: [0, 0, 0.05], PageDown: [0, 0, -0.05], "+": [0, 0, 0.05], "-": [0, 0, -0.05],
};

export class RigPanel {
  /**
   * `onEdit(text, isDone)`: the creator changed the text; isDone once a drag or a row of keys ended.
   * `onTake(start)`: the connected rig's cameras are taken over.
   */
  constructor({ onEdit, onTake }) {
    Object.assign(this, { onEdit, onTake, text: "", fov: 35, aspect: 1, start: null, isLinked: false });
    this.memory = { chosen: [], active: null, tab: "above" };
    this.root = document.createElement("div");
    this.root.className = "turnaround-rig widget-expands";
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", t("Rig editor"));
    this.root.innerHTML = markup();
    this.part = (selector) => this.root.querySelector(selector);
    this.top = new TopPlan();
    this.side = new SidePlan();
    this.part(".above").prepend(this.top.element);
    this.part(".side").append(this.side.element);
    this.#listen();
    this.watch = new ResizeObserver(() => this.#resize());
    for (const place of [".above", ".side", ".picture"]) this.watch.observe(this.part(place));
    this.setText("");
  }

  dispose() {
    this.watch.disconnect();
    clearTimeout(this.rest);
  }

  // -- state --

  get chosen() {
    return new Set(this.memory.chosen.filter((i) => i < this.cameras.length));
  }

  /** The camera that picture and side view show: the chosen one that was touched last. */
  get active() {
    const { chosen, memory } = this;
    return chosen.has(memory.active) ? memory.active : ([...chosen][0] ?? null);
  }

  /** The text from outside: a loaded graph, undo, a script. */
  setText(text) {
    this.text = String(text ?? "");
    this.#read();
    this.draw();
  }

  #read() {
    Object.assign(this, readLines(this.text));
    if (this.fault) this.#showWords(true);
  }

  /** What the node's other widgets say. */
  setLens(fov, aspect) {
    Object.assign(this, { fov, aspect });
    this.draw();
  }

  /** The cameras of the connected rig: { cameras: text, width, height, whole }, or null. */
  setStart(start) {
    this.start = start;
    this.draw();
  }

  setLinked(isLinked) {
    this.isLinked = isLinked;
    this.draw();
  }

  /** Choices of an editor that stood here before, as undo builds nodes anew. */
  remember(memory) {
    this.memory = memory;
    this.#showTab(memory.tab);
    this.draw();
  }

  choose(numbers, active = null) {
    this.memory.chosen = [...numbers];
    this.memory.active = active ?? this.memory.chosen.at(-1) ?? null;
    this.draw();
  }

  get isReadOnly() {
    return Boolean(this.fault) || this.isLinked;
  }

  edit({ cameras, chosen }, isDone = true) {
    if (this.isReadOnly) return;
    const text = writeLines(cameras, this.notes);
    const isChange = text !== this.text && cameras !== this.cameras;
    if (isChange) {
      this.text = text;
      this.#read();
    }
    this.memory.chosen = [...chosen];
    this.draw();
    if (isChange || isDone) this.onEdit(this.text, isDone);
  }

  /** What a button or a letter does. */
  do(deed) {
    const { cameras, chosen } = this;
    const deeds = {
      add: () => edits.add(cameras, cameras[this.active]),
      duplicate: () => edits.duplicate(cameras, chosen),
      remove: () => edits.remove(cameras, chosen),
      mirror: () => edits.mirror(cameras, chosen),
      spread: () => edits.spread(cameras, chosen),
      renumber: () => edits.renumber(cameras, chosen),
      fit: () => edits.fit(cameras, chosen, FIGURE, this.fov, this.aspect),
    };
    if (deed === "all") this.choose(cameras.keys(), this.active);
    else if (deed === "take") this.#take();
    else {
      const focus = this.active;
      this.edit(deeds[deed]());
      if (deed === "remove" && this.#hasKeys) this.focusCamera(Math.min(focus, this.cameras.length - 1));
    }
  }

  #take() {
    this.onTake(this.start);
    this.text = this.start.cameras;
    this.#read();
    this.choose([]);
    this.onEdit(this.text, true);
  }

  // -- listening --

  #listen() {
    const { root } = this;
    // What happens in here is not for the graph below; the middle button moves it, as everywhere.
    for (const kind of ["pointerdown", "pointerup", "pointermove", "dblclick", "contextmenu", "click"]) {
      root.addEventListener(kind, (event) => event.button !== 1 && event.stopPropagation());
    }
    // The page shows the input's tooltip while the mouse is anywhere in here: it would hide the
    // drawings. The buttons and numbers have their own.
    root.title = "";
    root.addEventListener("mouseenter", () => root.parentElement?.dispatchEvent(new MouseEvent("mouseleave")));
    root.addEventListener("keydown", (event) => this.#onKey(event));
    root.addEventListener("keyup", (event) => event.key in STEPS && this.finishKeys());
    root.addEventListener("click", (event) => this.#onClick(event.target.closest("button")));
    for (const input of root.querySelectorAll("[data-number]")) this.#listenNumber(input);
    const area = this.part("textarea");
    area.addEventListener("input", () => this.#onWords(area.value, false));
    area.addEventListener("change", () => this.#onWords(area.value, true));
    this.pointer = new RigPointer(this);
    this.top.element.addEventListener("focusin", ({ target }) => this.#onFocus(target));
  }

  #onClick(target) {
    if (!target) return;
    if (target.dataset.tab) this.#showTab(target.dataset.tab);
    if ("words" in target.dataset) this.#showWords(this.part(".words").hidden);
    if (target.dataset.deed) this.do(target.dataset.deed);
  }

  #showTab(tab) {
    this.memory.tab = tab;
    this.part(".middle").dataset.tab = tab;
    for (const each of this.root.querySelectorAll("[data-tab]:is(button)")) {
      each.setAttribute("aria-pressed", each.dataset.tab === tab);
    }
  }

  #showWords(isShown) {
    this.part(".words").hidden = !isShown;
    for (const pad of [".above", ".side"]) this.part(pad).hidden = isShown;
    this.part("[data-words]").setAttribute("aria-pressed", isShown);
    this.draw();
  }

  #onWords(text, isDone) {
    this.text = text;
    Object.assign(this, readLines(text));
    this.draw();
    this.onEdit(text, isDone);
  }

  #listenNumber(input) {
    const key = input.dataset.number;
    const enter = (isDone) => {
      const value = input.valueAsNumber;
      if (Number.isNaN(value)) return isDone && this.draw();
      // The rig's own field of view is no camera's own.
      const kept = key === "fov" && value === this.fov ? null : value;
      this.edit(edits.alter(this.cameras, this.chosen, () => ({ [key]: kept })), isDone);
    };
    input.addEventListener("input", () => {
      // The browser's own undo reaches into fields that were left long ago.
      if (document.activeElement === input) enter(false);
      else this.draw();
    });
    input.addEventListener("change", () => enter(true));
    input.addEventListener("blur", () => this.draw());
  }

  #onFocus(target) {
    const number = Number(target.closest?.("[data-camera]")?.dataset.camera);
    if (Number.isNaN(number) || this.pointer.gesture) return;
    this.choose(this.chosen.size > 1 ? this.chosen : [number], number);
  }

  get #hasKeys() {
    return this.part(".middle").contains(document.activeElement) && document.activeElement.tagName !== "TEXTAREA";
  }

  focusCamera(number) {
    const target = this.top.marks[number] ?? this.part("[data-deed=add]");
    target.focus({ preventScroll: true });
  }

  #onKey(event) {
    const { target, key } = event;
    if (target.matches("input, textarea")) return this.#onKeyInField(event);
    if (event.ctrlKey || event.metaKey || event.altKey) {
      if (["z", "y"].includes(key.toLowerCase())) event.preventDefault(); // no undo in the fields
      if (key.toLowerCase() !== "a") return; // undo, copy and the others are the page's
      this.#keep(event);
      return this.do("all");
    }
    if (key === "Tab" || (target.matches("button") && [" ", "Enter"].includes(key))) return event.stopPropagation();
    const deed = LETTERS[key.toLowerCase()] ?? (["Delete", "Backspace"].includes(key) ? "remove" : null);
    if (deed) this.#act(event, () => this.do(deed));
    else if (key in STEPS) this.#act(event, () => this.#step(STEPS[key], event.shiftKey ? 10 : 1));
    else if (key === "Escape") this.#act(event, () => this.choose([]));
  }

  #keep(event) {
    event.preventDefault();
    event.stopPropagation();
  }

  #act(event, deed) {
    this.#keep(event);
    deed();
  }

  #onKeyInField(event) {
    const { target, key } = event;
    event.stopPropagation();
    const isField = target.matches("input");
    if (isField && (key === "Enter" || key === "Escape")) {
      target.blur(); // the browser tells of the change
      this.focusCamera(this.active);
    }
  }

  #step([azimuth, elevation, distance], times) {
    const change = (c) => ({
      azimuth: c.azimuth + azimuth * times, elevation: c.elevation + elevation * times, distance: c.distance + distance * times,
    });
    if (this.chosen.size) this.edit(edits.alter(this.cameras, this.chosen, change), false);
    this.waits = true;
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.finishKeys(), KEYS_REST);
  }

  finishKeys() {
    clearTimeout(this.rest);
    if (this.waits) this.onEdit(this.text, true);
    this.waits = false;
  }

  // -- drawing --

  #resize() {
    for (const [plan, place] of [[this.top, ".above"], [this.side, ".side"]]) {
      const { clientWidth, clientHeight } = this.part(place);
      if (clientWidth && clientHeight) plan.resize(clientWidth, clientHeight);
    }
    this.draw();
    if (this.root.checkVisibility?.() && this.top.size[0]) this.onShown?.();
  }

  draw() {
    const { cameras, chosen, active, fov, aspect } = this;
    const start = this.start ? readLines(this.start.cameras).cameras : [];
    const state = { cameras, chosen, active, fov, aspect, start, describe: (i) => cameraAsWords(cameras[i], i) };
    // With a fault in the text the drawings hide behind it.
    if (!this.fault) for (const plan of [this.top, this.side]) if (plan.size[0]) plan.draw(state);
    const { clientWidth, clientHeight } = this.part(".picture");
    const shown = this.fault ? null : (cameras[active] ?? cameras[0]);
    drawPicture(this.part(".picture svg"), [clientWidth, clientHeight], shown, fov, aspect);
    this.part(".picture svg").setAttribute("aria-label", shown ? t("What camera {i} sees of a person of 1.70 m", { i: active ?? 0 }) : t("No camera"));
    this.#drawButtons();
    this.#drawNumbers();
    this.#drawWords();
  }

  #drawButtons() {
    const { isReadOnly, chosen, cameras } = this;
    const isOff = { duplicate: !chosen.size, remove: !chosen.size };
    for (const each of this.root.querySelectorAll(".bar [data-deed]")) {
      const { deed } = each.dataset;
      each.disabled = (isReadOnly && deed !== "all") || Boolean(isOff[deed]) || (deed !== "add" && !cameras.length);
    }
  }

  #drawNumbers() {
    const { chosen, cameras, fov } = this;
    for (const input of this.root.querySelectorAll("[data-number]")) {
      const key = input.dataset.number;
      const values = new Set([...chosen].map((i) => short(cameras[i][key] ?? fov, 4)));
      input.disabled = this.isReadOnly || !chosen.size;
      input.placeholder = values.size > 1 ? t("mixed") : "";
      const value = values.size === 1 ? [...values][0] : "";
      // What is being typed is not touched.
      if (document.activeElement !== input || input.disabled) input.value = value;
    }
    this.part("output").textContent = statusOf(this);
  }

  #drawWords() {
    const area = this.part("textarea");
    if (area.value !== this.text) area.value = this.text;
    area.readOnly = this.isLinked;
    this.part(".fault").hidden = !this.fault;
    this.part(".fault").textContent = this.fault;
    const empty = this.part(".empty");
    empty.hidden = this.cameras.length > 0;
    empty.textContent = this.start
      ? t("The connected rig goes through. Take it over, or add a camera.")
      : t("No camera: add one, or double-click here.");
    const { start } = this;
    const count = start ? readLines(start.cameras).cameras.length : 0;
    this.part(".start").hidden = !start || this.isLinked || start.cameras === this.text;
    this.part(".start span").textContent = start?.whole === false
      ? t("Connected rig (dashed); its cameras will look at the middle, with plain lenses")
      : t("Connected rig (dashed)");
    this.part(".start button").textContent = t("Take over {cameras}", { cameras: counted(count) });
  }
}
