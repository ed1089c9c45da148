/**
 * The rig editor itself: its text is the only state, everything else is drawn from it. Knows nothing
 * of ComfyUI; js/rig_editor.js puts it into a node.
 */

import * as edits from "./rig_edits.js";
import { FIGURE } from "./rig_figure.js";
import { readLines, writeLines } from "./rig_lines.js";
import { drawPicture, sideOf, SidePlan, TopPlan } from "./rig_pads.js";

const REACH = { mouse: 14, pen: 16, touch: 24 }; // pixels around a camera that take hold of it
const STILL = 4; // pixels that a pointer may move in a click
const KEYS_REST = 500; // milliseconds after the last key until its change is done

const ICONS = {
  add: "M7 2h2v5h5v2H9v5H7V9H2V7h5z",
  duplicate: "M2 2h8v2H4v6H2zM6 6h8v8H6zm1.500 1.500v5h5v-5z",
  remove: "M5.500 1.500h5L11 3h3v1.500H2V3h3zM3.200 5.500h9.600l-.8 9H4z",
  mirror: "M7.300 1h1.400v14H7.300zM6 4v8L1 12zM10 4v8l5 0z",
  spread: "M8 1a2 2 0 1 1 0 4 2 2 0 0 1 0-4zM2.600 10a2 2 0 1 1 0 4 2 2 0 0 1 0-4zM13.400 10a2 2 0 1 1 0 4 2 2 0 0 1 0-4zM7.300 6h1.400v2.600l2.400 1.600-.8 1.200L8 9.800l-2.300 1.600-.8-1.200 2.400-1.600z",
  renumber: "M2 3.500 4 2h1.300v6H3.800V3.900L2 5zM9 2h5v1.400l-2.800 3.200H14V8H9V6.600l2.800-3.200H9zM2 11h9V9l4 3-4 3v-2H2z",
  fit: "M1 1h5v1.600H2.600V6H1zm9 0h5v5h-1.600V2.600H10zM1 10h1.600v3.400H6V15H1zm12.400 0H15v5h-5v-1.600h3.400zM8 4a1.600 1.600 0 1 1 0 3.200A1.600 1.600 0 0 1 8 4zM5.800 8h4.400v4H5.800z",
  all: "M2 2h4v1.500H3.500V6H2zm8 0h4v4h-1.500V3.500H10zM2 10h1.500v2.500H6V14H2zm10.500 0H14v4h-4v-1.500h2.500zM6 6h4v4H6z",
  text: "M2 3h12v1.500H2zm0 3h9v1.500H2zm0 3h12v1.500H2zm0 3h7v1.500H2z",
};
const BUTTONS = [
  ["add", "Add a camera in the widest gap (A, or double-click from above)"],
  ["duplicate", "Duplicate the chosen cameras (D)"],
  ["remove", "Delete the chosen cameras (Delete)"],
  ["mirror", "Mirror: add the same cameras on the other side, left for right (M)"],
  ["spread", "Spread evenly: all cameras around the ring, or the chosen between their outer two (S)"],
  ["renumber", "Number the cameras in order around the ring (N)"],
  ["fit", "Move to where a person of 1.70 m just fits the picture (F)"],
  ["all", "Choose all cameras (Ctrl+A)"],
];
const NUMBERS = [
  ["azimuth", "azimuth °", "az. °", 1, "Degrees around: 0 = your camera, 90 = to its right, 180 = behind"],
  ["elevation", "elevation °", "el. °", 1, "Degrees above the performer's middle; negative = below"],
  ["distance", "distance m", "dist. m", 0.05, "Metres from the performer's middle"],
  ["fov", "view °", "view °", 1, "Vertical field of view of the chosen cameras; others have the node's fov"],
];
const LETTERS = { a: "add", d: "duplicate", m: "mirror", s: "spread", n: "renumber", f: "fit" };
/** Azimuth, elevation, distance of one step of a key. */
const STEPS = {
  ArrowRight: [1, 0, 0], ArrowLeft: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
  PageUp: [0, 0, 0.05], PageDown: [0, 0, -0.05], "+": [0, 0, 0.05], "-": [0, 0, -0.05],
};

const icon = (name) => `<svg viewBox="0 0 16 16" width="14" height="14" fill="currentColor" fill-rule="evenodd" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
const button = ([name, title]) => `<button type="button" data-deed="${name}" title="${title}" aria-label="${title}">${icon(name)}</button>`;
const MARKUP = `
<div class="bar" role="toolbar" aria-label="Cameras">
  ${BUTTONS.map(button).join("")}
  <span class="gap"></span>
  <span class="tabs">
    <button type="button" data-tab="above" aria-pressed="true">Above</button>
    <button type="button" data-tab="side" aria-pressed="false">Side</button>
  </span>
  <button type="button" data-words aria-pressed="false" title="Show the cameras as text" aria-label="Show the cameras as text">${icon("text")}</button>
</div>
<div class="middle" data-tab="above">
  <div class="pad above"><div class="empty" hidden></div></div>
  <div class="pad side"></div>
  <div class="words" hidden>
    <textarea spellcheck="false" aria-label="Cameras as text: azimuth, elevation, distance, field of view, # name"></textarea>
    <p class="fault" role="alert" hidden></p>
  </div>
</div>
<div class="foot">
  <div class="picture"><svg role="img"></svg></div>
  <div class="numbers">
    ${NUMBERS.map(([key, label, short, step, title]) => `<label title="${title}"><span data-short="${short}">${label}</span><input type="number" step="${step}" data-number="${key}" aria-label="${title}"></label>`).join("")}
    <output aria-live="polite"></output>
  </div>
</div>
<div class="start" hidden><span></span><button type="button" data-deed="take"></button></div>`;

const round = (value, step) => +(Math.round(value / step) * step).toFixed(4);
const counted = (count) => `${count} camera${count === 1 ? "" : "s"}`;
const short = (value, digits = 1) => String(+value.toFixed(digits));

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
    this.root.setAttribute("aria-label", "Rig editor");
    this.root.innerHTML = MARKUP;
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

  #edit({ cameras, chosen }, isDone = true) {
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
      this.#edit(deeds[deed]());
      if (deed === "remove" && this.#hasKeys) this.#focusCamera(Math.min(focus, this.cameras.length - 1));
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
    root.addEventListener("keyup", (event) => event.key in STEPS && this.#finishKeys());
    root.addEventListener("click", (event) => this.#onClick(event.target.closest("button")));
    for (const input of root.querySelectorAll("[data-number]")) this.#listenNumber(input);
    const area = this.part("textarea");
    area.addEventListener("input", () => this.#onWords(area.value, false));
    area.addEventListener("change", () => this.#onWords(area.value, true));
    this.#listenTop();
    this.#listenSide();
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
      this.#edit(edits.alter(this.cameras, this.chosen, () => ({ [key]: kept })), isDone);
    };
    input.addEventListener("input", () => {
      // The browser's own undo reaches into fields that were left long ago.
      if (document.activeElement === input) enter(false);
      else this.draw();
    });
    input.addEventListener("change", () => enter(true));
    input.addEventListener("blur", () => this.draw());
  }

  get #hasKeys() {
    return this.part(".middle").contains(document.activeElement) && document.activeElement.tagName !== "TEXTAREA";
  }

  #focusCamera(number) {
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
      this.#focusCamera(this.active);
    }
  }

  #step([azimuth, elevation, distance], times) {
    const change = (c) => ({
      azimuth: c.azimuth + azimuth * times, elevation: c.elevation + elevation * times, distance: c.distance + distance * times,
    });
    if (this.chosen.size) this.#edit(edits.alter(this.cameras, this.chosen, change), false);
    this.waits = true;
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.#finishKeys(), KEYS_REST);
  }

  #finishKeys() {
    clearTimeout(this.rest);
    if (this.waits) this.onEdit(this.text, true);
    this.waits = false;
  }

  // -- the pads --

  /** Which camera's place lies nearest to a pointer, within reach. */
  #nearest(places, at, event) {
    const reach = REACH[event.pointerType] ?? REACH.mouse;
    const away = places.map(([x, y]) => Math.hypot(x - at[0], y - at[1]));
    const least = Math.min(...away, Infinity);
    if (least > reach) return null;
    // Of cameras that cover each other the chosen one is meant.
    const close = away.flatMap((d, i) => (d <= least + 3 ? [i] : []));
    return close.find((i) => i === this.active) ?? close.find((i) => this.chosen.has(i)) ?? close[0];
  }

  #listenTop() {
    const { top } = this;
    const begin = (event) => {
      const at = this.#nearest(top.places, top.pixels(event), event);
      if (at == null) return null;
      return { numbers: [at], move: this.#turning(at, top.azimuthAt(event)) };
    };
    this.#listenPad(top, begin);
    top.element.addEventListener("dblclick", (event) => {
      if (this.isReadOnly || this.#nearest(top.places, top.pixels(event), event) != null) return;
      this.#edit(edits.add(this.cameras, this.cameras[this.active], Math.round(top.azimuthAt(event))));
    });
    top.element.addEventListener("focusin", ({ target }) => this.#onFocus(target));
  }

  #onFocus(target) {
    const number = Number(target.closest?.("[data-camera]")?.dataset.camera);
    if (Number.isNaN(number) || this.gesture) return;
    this.choose(this.chosen.size > 1 ? this.chosen : [number], number);
  }

  /** A function that turns the chosen after the pointer; whole degrees, with shift of 15. */
  #turning(held, grip) {
    const from = this.cameras;
    return (event) => {
      const now = from[held].azimuth + edits.turnBetween(grip, this.top.azimuthAt(event));
      const turn = round(now, event.shiftKey ? 15 : 1) - from[held].azimuth;
      return edits.alter(from, this.chosen, (c) => ({ azimuth: c.azimuth + turn }));
    };
  }

  #listenSide() {
    const { side } = this;
    this.#listenPad(side, (event) => {
      const places = side.groups.map((group) => group.place);
      const at = side.pixels(event);
      const near = this.#nearest(side.places, at, event);
      if (near == null) return null;
      const group = side.groups[places.findIndex((_, i) => side.groups[i].numbers.includes(near))];
      return { numbers: group.chosen.length ? group.chosen : group.numbers, move: this.#lifting(near, side.standAt(event)) };
    });
  }

  /** A function that lifts and moves the chosen after the pointer; whole degrees and 5 cm. */
  #lifting(held, grip) {
    const from = this.cameras;
    return (event) => {
      const now = this.side.standAt(event);
      const { elevation, distance } = from[held];
      const [tilt, metres] = event.shiftKey ? [15, 0.5] : [1, 0.05];
      const lift = round(elevation + now.elevation - grip.elevation, tilt) - elevation;
      const away = round(distance + now.distance - grip.distance, metres) - distance;
      return edits.alter(from, this.chosen, (c) => ({ elevation: c.elevation + lift, distance: c.distance + away }));
    };
  }

  /** Clicks choose, drags move; from an empty place a drag chooses what lies in its rectangle. */
  #listenPad(plan, begin) {
    const { element } = plan;
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.gesture) return;
      this.#finishKeys();
      const isMore = event.shiftKey || event.ctrlKey || event.metaKey;
      const held = begin(event);
      const before = this.chosen;
      this.gesture = { plan, held, isMore, before, from: plan.pixels(event), isDrag: false, pointer: event.pointerId };
      element.setPointerCapture(event.pointerId);
      if (held) this.#grasp(held.numbers, isMore, before);
      event.preventDefault(); // no text is chosen; so the keyboard is told where it is
      this.#focusCamera(held ? this.active ?? held.numbers[0] : (this.active ?? 0));
      if (!held && !isMore) this.choose([]);
    });
    element.addEventListener("pointermove", (event) => this.gesture?.pointer === event.pointerId && this.#drag(event));
    element.addEventListener("pointerup", (event) => this.gesture?.pointer === event.pointerId && this.#drop());
    for (const kind of ["pointercancel", "lostpointercapture"]) {
      element.addEventListener(kind, (event) => this.gesture?.pointer === event.pointerId && this.#drop());
    }
  }

  #grasp(numbers, isMore, before) {
    const isAllChosen = numbers.every((i) => before.has(i));
    const active = numbers.includes(this.active) ? this.active : numbers[0];
    if (!isAllChosen) this.choose(isMore ? new Set([...before, ...numbers]) : numbers, active);
    else this.choose(before, active);
  }

  #drag(event) {
    const { gesture } = this;
    const at = gesture.plan.pixels(event);
    gesture.isDrag ||= Math.hypot(at[0] - gesture.from[0], at[1] - gesture.from[1]) > STILL;
    if (!gesture.isDrag) return;
    if (gesture.held) {
      this.top.held = this.side.held = true;
      if (!this.isReadOnly) this.#edit(gesture.held.move(event), false);
      return;
    }
    gesture.plan.showBand(gesture.from, at);
    const inside = gesture.plan.places.flatMap((place, i) =>
      [0, 1].every((k) => place[k] >= Math.min(gesture.from[k], at[k]) && place[k] <= Math.max(gesture.from[k], at[k])) ? [i] : [],
    );
    this.choose(new Set(gesture.isMore ? [...gesture.before, ...inside] : inside));
  }

  #drop() {
    const { gesture } = this;
    this.gesture = null;
    this.top.held = this.side.held = false;
    gesture.plan.showBand(null);
    if (gesture.isDrag && gesture.held) this.onEdit(this.text, true);
    if (!gesture.isDrag && gesture.held) this.#clicked(gesture);
    this.draw();
  }

  /** A click on what was chosen already: with shift or Ctrl it is let go, else it alone stays. */
  #clicked({ held, isMore, before }) {
    if (!held.numbers.every((i) => before.has(i))) return;
    if (isMore) this.choose([...before].filter((i) => !held.numbers.includes(i)));
    else this.choose(held.numbers, held.numbers.includes(this.active) ? this.active : held.numbers[0]);
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
    const state = { cameras, chosen, active, fov, aspect, start, describe: (i) => this.#describe(i) };
    // With a fault in the text the drawings hide behind it.
    if (!this.fault) for (const plan of [this.top, this.side]) if (plan.size[0]) plan.draw(state);
    const { clientWidth, clientHeight } = this.part(".picture");
    const shown = this.fault ? null : (cameras[active] ?? cameras[0]);
    drawPicture(this.part(".picture svg"), [clientWidth, clientHeight], shown, fov, aspect);
    this.part(".picture svg").setAttribute("aria-label", shown ? `What camera ${active ?? 0} sees of a person of 1.70 m` : "No camera");
    this.#drawButtons();
    this.#drawNumbers();
    this.#drawWords();
  }

  #describe(i) {
    const { azimuth, elevation, distance, fov, name } = this.cameras[i];
    const lens = fov == null ? "" : `, view ${short(fov)}°`;
    const angles = `${sideOf(azimuth)} ${short(azimuth)}°, elevation ${short(elevation)}°, ${short(distance, 2)} m${lens}`;
    return `Camera ${i}${name ? ` "${name}"` : ""}: ${angles}`;
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
    const { chosen, cameras, fov, active } = this;
    for (const input of this.root.querySelectorAll("[data-number]")) {
      const key = input.dataset.number;
      const values = new Set([...chosen].map((i) => short(cameras[i][key] ?? fov, 4)));
      input.disabled = this.isReadOnly || !chosen.size;
      input.placeholder = values.size > 1 ? "mixed" : "";
      const value = values.size === 1 ? [...values][0] : "";
      // What is being typed is not touched.
      if (document.activeElement !== input || input.disabled) input.value = value;
    }
    this.part("output").textContent = this.#status(active);
  }

  #status(active) {
    const { chosen, cameras, fov, aspect } = this;
    if (this.isLinked) return "The cameras come from the connected text.";
    if (this.fault) return "";
    if (!chosen.size) return cameras.length ? `${counted(cameras.length)}; the picture is camera 0's. Click one to change it.` : "";
    if (chosen.size > 1) return `${chosen.size} of ${cameras.length} cameras chosen; the picture is camera ${active}'s.`;
    const camera = cameras[active];
    const high = 2 * camera.distance * Math.tan(edits.radians(camera.fov ?? fov) / 2);
    const name = camera.name ? ` "${camera.name}"` : "";
    return `Camera ${active}${name}: ${sideOf(camera.azimuth)}, sees ${short(high * aspect, 1)} x ${short(high, 1)} m at the performer.`;
  }

  #drawWords() {
    const area = this.part("textarea");
    if (area.value !== this.text) area.value = this.text;
    area.readOnly = this.isLinked;
    this.part(".fault").hidden = !this.fault;
    this.part(".fault").textContent = this.fault;
    const empty = this.part(".empty");
    empty.hidden = this.cameras.length > 0;
    empty.textContent = this.start ? "The connected rig goes through. Take it over, or add a camera." : "No camera: add one, or double-click here.";
    const { start } = this;
    const count = start ? readLines(start.cameras).cameras.length : 0;
    this.part(".start").hidden = !start || this.isLinked || start.cameras === this.text;
    this.part(".start span").textContent = start?.whole === false ? "Connected rig (dashed); its cameras will look at the middle, with plain lenses" : "Connected rig (dashed)";
    this.part(".start button").textContent = `Take over ${counted(count)}`;
  }
}
