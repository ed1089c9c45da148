/**
 * The player of views on Preview Views and, folded to one line where there is no room, on every node
 * that puts out views. Nothing is fetched before somebody sees it.
 */

import { app } from "../../scripts/app.js";
import { PLAYER_STYLE, ViewsPlayer } from "./views_player.js";
import { takePlace } from "./node_places.js";
import { makeRoot, outputOf } from "./view_widget.js";
import { t } from "./words.js";

const OUTPUT = "turnaround_views"; // as in nodes/node_previews.py
const SOCKET = "TURNAROUND_VIEWS";
const PREVIEW = "TurnaroundPreviewViews";
const SETTING = "Turnaround.ViewsOnNodes"; // nodes/node_previews.py reads it, too
const MEMORY = "views_player"; // the node's property with a creator's choices
const MARGIN = 4; // pixels around the widget, where ComfyUI's classic nodes draw it
const FOLDED = 26 + 2 * MARGIN; // pixels of the line
const OPEN = 240; // pixels of an open player
const PREVIEW_MIN = 280;
const PREVIEW_SIZE = [480, 560];
const TITLE = 34; // pixels of a node's title

const places = new Map(); // node in a graph -> its ViewsPlace

/**
 * Where a node's views are: the line, and the player below it while it is open. The widget is there
 * from the beginning, without height, as newer nodes of the page take no later ones.
 */
class ViewsPlace {
  constructor(node) {
    this.node = node;
    this.isPreview = node.comfyClass === PREVIEW;
    this.root = makeRoot("turnaround-views", "");
    this.widget = node.addDOMWidget(MEMORY, OUTPUT, this.root, {
      serialize: false,
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: () => this.minHeight,
      getMaxHeight: () => (this.isOpen ? undefined : this.minHeight),
    });
    this.widget.serialize = false; // not in the workflow file either
    if (this.isPreview) this.#open();
    else this.#addHead();
  }

  get minHeight() {
    if (this.isPreview) return PREVIEW_MIN;
    return this.isOpen ? OPEN : this.items ? FOLDED : 0;
  }

  get isOpen() {
    return Boolean(this.player);
  }

  recall = (key) => this.node.properties[MEMORY]?.[key];

  remember = (key, value) => {
    this.node.properties[MEMORY] = { ...this.node.properties[MEMORY], [key]: value };
  };

  #addHead() {
    this.head = document.createElement("button");
    this.head.className = "head";
    this.head.title = t("Show or hide the views that came out of this node");
    this.head.addEventListener("click", () => {
      this.remember("isOpen", !this.isOpen);
      this.#setOpen(!this.isOpen);
    });
    this.root.prepend(this.head);
    this.#limit();
    this.root.style.display = "none";
  }

  /** For newer nodes, which ask the element and not the widget. */
  #limit() {
    const height = `${(this.isOpen ? OPEN : FOLDED) - 2 * MARGIN}px`;
    Object.assign(this.root.style, { minHeight: height, maxHeight: this.isOpen ? "" : height });
  }

  #showHead() {
    if (!this.head) return;
    this.head.textContent = `${this.isOpen ? "▾" : "▸"} ${this.items ? sizeOf(this.items) : t("views")}`;
  }

  /** Items of the node's output came. */
  show(items) {
    if (!items?.length || !items[0]) return;
    if (!this.items && this.head) this.#unhide();
    this.items = items;
    if (!this.isPreview && !this.isOpen && this.#opensByItself()) this.#setOpen(true);
    this.#showHead();
    this.player?.show(items);
  }

  #unhide() {
    const { node, root } = this;
    root.style.display = "";
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1] + FOLDED)]);
  }

  /** As the creator left it; else where it covers nothing below. */
  #opensByItself() {
    return this.recall("isOpen") ?? (setting() === "open" && this.#hasRoom());
  }

  #hasRoom() {
    const { node } = this;
    const [x, y] = node.pos;
    const bottom = y + node.size[1] + OPEN - FOLDED;
    return !node.graph?.nodes.some((other) => {
      const [left, top] = other.pos;
      const isBeside = left >= x + node.size[0] || left + other.size[0] <= x;
      return other !== node && !isBeside && top - TITLE < bottom && top + other.size[1] > y;
    });
  }

  #setOpen(isOpen) {
    if (isOpen === this.isOpen) return;
    const { node } = this;
    const before = isOpen ? FOLDED : Math.max(OPEN, this.root.offsetHeight + 2 * MARGIN);
    if (isOpen) this.#open();
    else this.#close();
    this.#limit();
    this.#showHead();
    // A graph that comes back (another tab, undo, a file) brings sizes that hold the open player already.
    if (!isOpen || !this.recall("hasGrown")) {
      node.setSize([node.size[0], node.size[1] + this.minHeight - before]);
    }
    this.remember("hasGrown", isOpen);
    node.graph?.setDirtyCanvas(true, true);
  }

  #open() {
    const title = () => this.node.title ?? t("views");
    this.player = new ViewsPlayer(this.root, { recall: this.recall, remember: this.remember, title });
    if (this.items) this.player.show(this.items);
  }

  #close() {
    this.player.dispose();
    this.player = null;
    this.root.append(this.head);
    delete this.root.dataset.state;
  }

  /** A removed node was put back. */
  revive() {
    if (this.isPreview && !this.isOpen) this.#open();
  }

  dispose() {
    this.player?.dispose();
    this.player = this.items = null;
  }
}

const setting = () => app.ui.settings.getSettingValue(SETTING) ?? "open";

const givesViews = (node) =>
  node.comfyClass === PREVIEW || (node.comfyClass?.startsWith("Turnaround") && node.outputs?.some((o) => o.type === SOCKET));

/** How many views of which size, and how many more outputs there are. */
function sizeOf([{ views, frames, size }, ...others]) {
  const values = { views, frames, size: size.join("×") };
  const first = views === 1 ? t("1 view × {frames} of {size}", values) : t("{views} views × {frames} of {size}", values);
  return first + (others.length ? t(" and {more} more", { more: others.length }) : "");
}

function prepare(node) {
  const place = new ViewsPlace(node);
  const { onExecuted, onRemoved, onAdded } = node;
  node.onExecuted = function (output, ...given) {
    onExecuted?.call(this, output, ...given);
    place.show(output?.[OUTPUT]);
  };
  node.onAdded = function (...given) {
    onAdded?.apply(this, given);
    places.set(node, place);
    takePlace(node, MEMORY, place.root);
    place.revive();
  };
  node.onRemoved = function (...given) {
    onRemoved?.apply(this, given);
    places.delete(node);
    place.dispose();
  };
  if (!place.isPreview) return;
  node.setSize([Math.max(node.size[0], PREVIEW_SIZE[0]), Math.max(node.size[1], PREVIEW_SIZE[1])]);
}

/** The wheel over a player is the player's; caught early, as newer nodes take it on its way. */
function onWheel(event) {
  const place = [...places.values()].find(({ player }) => player?.canvas === event.target);
  if (!place?.player.first) return;
  event.preventDefault();
  event.stopPropagation();
  place.player.wheel(event);
}

// The page's own translations of packs come too early in ComfyUI 0.3.75, and are lost: so by our words.
app.registerExtension({
  name: "Turnaround.Views",
  settings: [
    {
      id: SETTING,
      name: t("Views on nodes"),
      category: ["Turnaround", t("Multi-view player"), "On nodes"],
      tooltip: [
        t("Every node that puts out views can play them, small. 'Folded': one line, open it with a click."),
        t("'Off': nothing is written for it (saves 1 to 3 seconds and a few MB for 8 views of 81 frames)."),
        t("Preview Views always shows its views."),
      ].join(" "),
      type: "combo",
      options: [
        { text: t("Open where there is room"), value: "open" },
        { text: t("Folded"), value: "folded" },
        { text: t("Off"), value: "off" },
      ],
      defaultValue: "open",
    },
  ],
  init() {
    window.addEventListener("wheel", onWheel, { capture: true, passive: false });
    const style = document.createElement("style");
    style.textContent = PLAYER_STYLE;
    document.head.append(style);
  },
  nodeCreated(node) {
    if (givesViews(node)) prepare(node);
  },
  loadedGraphNode(node) {
    places.get(node)?.show(outputOf(node, app.nodeOutputs, OUTPUT));
  },
  onNodeOutputsUpdated(outputs) {
    for (const [node, place] of places) place.show(outputOf(node, outputs, OUTPUT));
  },
});
