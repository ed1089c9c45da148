/**
 * Edit Rig: the rig editor as the widget of a text input. The text is the widget's value, so saving,
 * copying, undo, subgraphs and both of ComfyUI's node renderers treat it as any other text.
 */

import { app } from "../../scripts/app.js";

import { placeOf, takePlace } from "./node_places.js";
import { RigPanel } from "./rig_panel.js";
import { MIN_HEIGHT, STYLE } from "./rig_style.js";

const NODE = "TurnaroundRigEditor";
const WIDGET = "TURNAROUND_RIG_EDITOR";
const OUTPUT = "turnaround_rig";
const FIRST_SIZE = [540, 640]; // of a new node
const AGAIN = 2000; // milliseconds within which undo has built a node anew

const panels = new WeakMap(); // node -> its RigPanel
const memories = new Map(); // place of a node -> what its editor remembers beyond the node's life

function memoryOf(node) {
  const place = placeOf(node);
  if (!memories.has(place)) memories.set(place, { chosen: [], active: null, tab: "above", start: null });
  return memories.get(place);
}

/** One step of undo: the page compares the graph with what it was before. */
function noteChange() {
  app.canvas?.emitBeforeChange?.();
  app.canvas?.emitAfterChange?.();
}

function makeWidget(node, name, [, options = {}]) {
  const panel = new RigPanel({
    onEdit(text, isDone) {
      widget.callback?.(text);
      if (isDone) noteChange();
    },
    onTake(start) {
      for (const key of ["width", "height"]) setNumber(node, key, start[key]);
    },
  });
  const widget = node.addDOMWidget(name, WIDGET, panel.root, {
    hideOnZoom: false,
    getMinHeight: () => MIN_HEIGHT,
    getValue: () => panel.text,
    setValue: (text) => text !== panel.text && panel.setText(text),
  });
  panel.setText(options.default ?? "");
  panels.set(node, panel);
  return { widget, minWidth: 250, minHeight: MIN_HEIGHT + 150 };
}

const numberOf = (node, name) => Number(node.widgets?.find((w) => w.name === name)?.value);

function setNumber(node, name, value) {
  const widget = node.widgets?.find((w) => w.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
}

const isLinked = (node, name) => Boolean(node.inputs?.some((input) => input.name === name && input.link != null));

/** The node's own numbers, and what comes by links. */
function follow(node, panel) {
  panel.setLinked(isLinked(node, "cameras"));
  panel.setStart(isLinked(node, "rig") ? panel.memory.start : null);
  const aspect = numberOf(node, "width") / numberOf(node, "height");
  panel.setLens(numberOf(node, "fov") || 35, aspect > 0 && aspect < Infinity ? aspect : 1);
}

function chain(target, name, after) {
  const before = target[name];
  target[name] = function (...given) {
    const result = before?.apply(this, given);
    after.apply(this, given);
    return result;
  };
}

function settle(node, panel) {
  if (!node.graph) return; // a copy that is nowhere yet
  const memory = memoryOf(node);
  takePlace(node, WIDGET, panel.root, (old) => {
    if (old.contains(document.activeElement)) memory.hadKeysAt = performance.now();
  });
  panel.remember(memory);
  follow(node, panel);
  if (performance.now() - memory.hadKeysAt < AGAIN) panel.onShown = () => refocus(panel, memory);
}

/** After an undo the keyboard goes on where it was. */
function refocus(panel, memory) {
  panel.onShown = null;
  memory.hadKeysAt = -Infinity;
  const isFree = !document.activeElement || document.activeElement === document.body;
  if (isFree) panel.top.marks[panel.active ?? 0]?.focus({ preventScroll: true });
}

function attach(node, panel) {
  for (const name of ["fov", "width", "height"]) {
    const widget = node.widgets.find((w) => w.name === name);
    if (widget) chain(widget, "callback", () => follow(node, panel));
  }
  chain(node, "onAdded", () => settle(node, panel));
  chain(node, "onConfigure", () => settle(node, panel));
  chain(node, "onConnectionsChange", () => follow(node, panel));
  chain(node, "onExecuted", (output) => {
    panel.memory.start = output?.[OUTPUT]?.[0] ?? null;
    follow(node, panel);
  });
  chain(node, "onRemoved", () => panel.dispose());
  panel.root.addEventListener("focusout", () => {
    queueMicrotask(() => {
      if (!panel.root.isConnected) panel.memory.hadKeysAt = performance.now();
    });
  });
  node.setSize([Math.max(node.size[0], FIRST_SIZE[0]), Math.max(node.size[1], FIRST_SIZE[1])]);
}

app.registerExtension({
  name: "Turnaround.RigEditor",
  init() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
  },
  getCustomWidgets: () => ({ [WIDGET]: makeWidget }),
  nodeCreated(node) {
    if (node.comfyClass === NODE) attach(node, panels.get(node));
  },
});
