/** Mouse, pen and fingers over a picture: click, drag, pinch. */

const STILL = 4; // pixels that a click may move

/**
 * `at(event)` turns a pointer's place into whatever the deeds want. `click(place)`, `pinch(factor,
 * place)`, `back()` (double click) and `drag(dx, dy)` in CSS pixels; `grab(place)` is asked first and may
 * give a function that gets the places of this drag instead.
 */
export function listenPicture(canvas, at, { click, drag, pinch, grab, back }) {
  const fingers = new Map(); // pointer -> where it is
  let begun = null; // of the first finger: where, and whether it has moved
  const spread = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]);

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return; // the middle button moves the graph, as everywhere
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    begun = fingers.size === 1 ? { x: event.clientX, y: event.clientY, held: grab(at(event)) } : { moved: true };
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    event.stopPropagation();
    const before = [...fingers.values()];
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (fingers.size > 1) return pinch(spread([...fingers.values()]) / Math.max(spread(before), 1), at(event));
    if (!begun.moved && Math.hypot(event.clientX - begun.x, event.clientY - begun.y) < STILL) return;
    begun.moved = true;
    if (begun.held) begun.held(at(event));
    else drag(event.clientX - last[0], event.clientY - last[1]);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (fingers.delete(event.pointerId) && !begun.moved) click(at(event));
  });
  for (const kind of ["pointercancel", "lostpointercapture"]) {
    canvas.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", back);
}
