/** Undo, and loading a graph, build nodes anew, with the numbers of those before. */

import { app } from "../../scripts/app.js";

const shown = new Map(); // number of a node and widget -> { node, root }, the last that was shown

const rootGraph = () => app.rootGraph ?? app.graph;

/** Where a node lives; a node built anew by undo lives in the same place. */
export const placeOf = (node) => `${rootGraph()?.id ?? ""}/${node.graph?.id ?? ""}/${node.id}`;

/** A node that can still be looked at; those of a graph that was replaced can't. */
function isAlive(node) {
  const { id, graph } = node;
  if (graph?.getNodeById(id) !== node) return false;
  return graph === rootGraph() || rootGraph()?.subgraphs?.get(graph.id) === graph;
}

/**
 * Put a widget's element where that of a node that is gone is still shown: ComfyUI 0.3.75's newer nodes
 * go on showing what a node of the same number had. `onLeave(old)` is asked before the old one goes.
 */
export function takePlace(node, widget, root, onLeave = () => {}) {
  const key = `${node.id}/${widget}`;
  const before = shown.get(key);
  shown.set(key, { node, root });
  if (!before || before.root === root || !before.root.isConnected || isAlive(before.node)) return;
  onLeave(before.root);
  before.root.replaceWith(root);
}
