/**
 * A view inside a node, as a DOM widget: the same for every view of the pack, in ComfyUI's classic
 * canvas and in its newer nodes.
 *
 * A view has `root` (its element), `canvas` (where the wheel is the view's; null = nowhere), `memory`
 * (choices that are kept with the node), `show(output)`, `zoom(event)`, `redraw()` and `dispose()`.
 */

import { app } from "../../scripts/app.js";
import { takePlace } from "./node_places.js";

const ICONS = {
  play: "M4 2.5v11l9-5.5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  ground: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM8 3v10A5 5 0 0 1 8 3z",
  home: "M8 2.2 14 8h-1.8v5.5H9.4V9.8H6.6v3.7H3.8V8H2z",
  save: "M7.2 2h1.6v6.2l2.1-2.1 1.1 1.1L8 11.2 4 7.2l1.1-1.1 2.1 2.1zM3 12.4h10V14H3z",
};
export const icon = (name) => `<svg viewBox="0 0 16 16" width="14" height="14" fill="currentColor" fill-rule="evenodd"><path d="${ICONS[name]}"/></svg>`;
export const options = (pairs) => pairs.map(([key, label]) => `<option value="${key}">${label}</option>`).join("");

const STYLE = `
.turnaround-view { display: flex; flex-direction: column; width: 100%; height: 100%; min-height: 260px;
  box-sizing: border-box; overflow: hidden; border-radius: 6px; font: 12px/1.3 sans-serif;
  border: 1px solid var(--border-color, #4e4e4e); color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); user-select: none; }
.turnaround-view .stage { position: relative; flex: 1 1 0; min-height: 0; background: #17181b; overflow: hidden; }
.turnaround-view canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block;
  cursor: grab; touch-action: none; outline: none; }
.turnaround-view canvas:active { cursor: grabbing; }
.turnaround-view .stage:focus-within { box-shadow: inset 0 0 0 1px #4a90d9; }
.turnaround-view .words { position: absolute; inset: 0; display: grid; place-items: center; padding: 16px;
  text-align: center; color: #b9bcc4; pointer-events: none; }
.turnaround-view .legend { position: absolute; left: 8px; top: 6px; right: 8px; color: #fff; opacity: .85;
  text-shadow: 0 0 3px #000, 0 0 3px #000; pointer-events: none; }
.turnaround-view .hint { position: absolute; left: 0; right: 0; bottom: 6px; text-align: center; opacity: .6;
  color: #fff; text-shadow: 0 0 3px #000; pointer-events: none; font-size: 11px; }
.turnaround-view .bar { display: flex; align-items: center; gap: 6px; padding: 5px 6px; flex: none; }
.turnaround-view .bar + .bar { padding-top: 0; }
.turnaround-view .bar input[type=range] { flex: 1 1 40px; min-width: 30px; accent-color: #4a90d9; }
.turnaround-view .bar button, .turnaround-view .bar select { height: 24px; color: inherit; cursor: pointer;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; font: inherit;
  background: var(--comfy-menu-bg, #353535); }
.turnaround-view .bar select { min-width: 0; }
.turnaround-view .bar button { width: 28px; padding: 0; display: grid; place-items: center; flex: none; }
.turnaround-view .bar output { min-width: 44px; text-align: right; font-variant-numeric: tabular-nums; }
.turnaround-view [hidden] { display: none !important; }`;

const views = new Map(); // node -> its view

/** The element of a view; `name` is its own class. */
export function makeRoot(name, markup) {
  const root = document.createElement("div");
  // ComfyUI's newer nodes give the room that is left to what expands.
  root.className = `turnaround-view ${name} widget-expands`;
  root.innerHTML = markup;
  // What happens in here is not for the graph below: neither dragging nodes nor zooming the graph.
  for (const kind of ["pointerdown", "pointerup", "dblclick", "contextmenu", "click"]) {
    root.addEventListener(kind, (event) => event.button !== 1 && event.stopPropagation());
  }
  return root;
}

/**
 * `onSize()` when an element has another size, `onSight(isVisible)` when it comes into sight or leaves
 * it. Gives a function that ends it.
 */
export function watchStage(stage, onSize, onSight) {
  const size = new ResizeObserver(onSize);
  // On a busy page several come together.
  const sight = new IntersectionObserver((entries) => onSight(entries.at(-1).isIntersecting));
  size.observe(stage);
  sight.observe(stage);
  return () => {
    size.disconnect();
    sight.disconnect();
  };
}

/** Let the browser save a canvas's picture. */
export async function savePicture(canvas, name) {
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** How many pixels of a canvas there are to draw: the graph's zoom scales the node. */
export function densityOf(canvas) {
  const zoom = canvas.getBoundingClientRect().width / canvas.clientWidth;
  return Math.min(2, Math.max(0.5, zoom)) * devicePixelRatio;
}

/** The items of an output that the page holds for a node; nodes of subgraphs are named by both ids. */
export function outputOf(node, outputs, key) {
  const isInside = node.graph && node.graph.isRootGraph === false;
  return outputs?.[isInside ? `${node.graph.id}:${node.id}` : String(node.id)]?.[key];
}

function addView(node, { widget: name, output, minHeight, firstSize, make }) {
  const view = make((node.properties[name] ??= {}), node);
  const widget = node.addDOMWidget(name, output, view.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => minHeight,
  });
  widget.serialize = false; // not in the workflow file either
  const { onExecuted, onRemoved, onAdded, onConfigure } = node;
  node.onAdded = function (...given) {
    onAdded?.apply(this, given);
    views.set(node, { view, output });
    takePlace(node, name, view.root);
  };
  node.onConfigure = function (...given) {
    onConfigure?.apply(this, given);
    view.memory = node.properties[name] ??= {}; // a loaded workflow brings its own
    if (node.graph) takePlace(node, name, view.root);
    view.redraw();
  };
  node.onExecuted = function (shown, ...given) {
    onExecuted?.call(this, shown, ...given);
    if (shown?.[output]?.[0]) view.show(shown[output][0]);
  };
  node.onRemoved = function (...given) {
    onRemoved?.apply(this, given);
    views.delete(node);
    view.dispose();
  };
  node.setSize([Math.max(node.size[0], firstSize[0]), Math.max(node.size[1], firstSize[1])]);
}

/** After a change of workflow, undo or a look into the history, no node runs, but outputs are there. */
function showHeldOutput(node, outputs) {
  const held = views.get(node);
  const shown = held && outputOf(node, outputs, held.output)?.[0];
  if (shown) held.view.show(shown);
}

/** The wheel over a view is the view's; caught early, as ComfyUI's newer nodes take it on its way. */
function onWheel(event) {
  const held = [...views.values()].find(({ view }) => view.canvas && view.canvas === event.target);
  if (!held) return;
  event.preventDefault();
  event.stopPropagation();
  held.view.zoom(event);
}

/** So are fingers, with which ComfyUI moves and zooms the graph. */
function onTouch(event) {
  if (event.target.closest?.(".turnaround-view")) event.stopPropagation();
}

function listenOnce() {
  if (document.querySelector("style.turnaround-view-style")) return;
  window.addEventListener("wheel", onWheel, { capture: true, passive: false });
  for (const kind of ["touchstart", "touchmove", "touchend", "touchcancel"]) {
    window.addEventListener(kind, onTouch, { capture: true, passive: true });
  }
  const style = document.createElement("style");
  style.className = "turnaround-view-style";
  style.textContent = STYLE;
  document.head.append(style);
}

/**
 * Give every node of a class a view. `output` names what the node's ui holds, `widget` the widget and
 * the node's property with the view's memory; `make(memory, node)` makes a view; `style` is its own.
 */
export function registerView({ extension, nodeClass, style = "", ...view }) {
  app.registerExtension({
    name: extension,
    init() {
      listenOnce();
      const own = document.createElement("style");
      own.textContent = style;
      document.head.append(own);
    },
    nodeCreated(node) {
      if (node.comfyClass === nodeClass) addView(node, view);
    },
    loadedGraphNode(node) {
      if (node.comfyClass === nodeClass) showHeldOutput(node, app.nodeOutputs);
    },
    onNodeOutputsUpdated(outputs) {
      for (const node of views.keys()) if (node.comfyClass === nodeClass) showHeldOutput(node, outputs);
    },
  });
}
