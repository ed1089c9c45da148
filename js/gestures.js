/** Mouse and fingers over a 3D view: one turns, two (or the right button, or shift) move and zoom. */

import { add, length } from "./vectors.js";

/**
 * `turn(dx, dy)` and `move(dx, dy)` get shares of the canvas's height, `zoom(factor)` that of the
 * distance, `home()` nothing.
 */
export function listenGestures(canvas, { turn, move, zoom, home }) {
  const fingers = new Map(); // pointer -> where it is
  const middleOf = (places) => places.reduce((a, b) => add(a, b)).map((v) => v / places.length);
  const spreadOf = ([a, b]) => length(add(a, b, -1));
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button === 1) return; // moves the graph, as everywhere
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    event.stopPropagation();
    const before = [...fingers.values()].slice(0, 2);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    const after = [...fingers.values()].slice(0, 2);
    const { height } = canvas.getBoundingClientRect();
    const [dx, dy] = add(middleOf(after), middleOf(before), -1).map((v) => v / height);
    if (after.length > 1) {
      move(dx, dy);
      zoom(spreadOf(before) / Math.max(spreadOf(after), 1));
    } else if (event.buttons & 2 || event.shiftKey) move(dx, dy);
    else turn(dx, dy);
  });
  for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
    canvas.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", home);
}

/** The share of the distance that a turn of the wheel leaves. */
export function wheelZoom(event) {
  const lines = event.deltaMode === 1 ? 16 : 1; // some browsers count in lines
  return Math.exp(0.0012 * lines * event.deltaY);
}
