/** Mouse, pen and fingers on the rig editor's drawings: clicks choose, drags turn, lift and move. */

import * as edits from "./rig_edits.js";

const REACH = { mouse: 14, pen: 16, touch: 24 }; // pixels around a camera that take hold of it
const STILL = 4; // pixels that a pointer may move in a click

const round = (value, step) => +(Math.round(value / step) * step).toFixed(4);

export class RigPointer {
  /** `panel` is a RigPanel; `gesture` is what a pointer does just now, or nothing. */
  constructor(panel) {
    this.panel = panel;
    this.gesture = null;
    this.#listenTop();
    this.#listenSide();
  }

  /** Which camera's place lies nearest to a pointer, within reach. */
  #nearest(places, at, event) {
    const reach = REACH[event.pointerType] ?? REACH.mouse;
    const away = places.map(([x, y]) => Math.hypot(x - at[0], y - at[1]));
    const least = Math.min(...away, Infinity);
    if (least > reach) return null;
    // Of cameras that cover each other the chosen one is meant.
    const close = away.flatMap((d, i) => (d <= least + 3 ? [i] : []));
    return close.find((i) => i === this.panel.active) ?? close.find((i) => this.panel.chosen.has(i)) ?? close[0];
  }

  #listenTop() {
    const { top } = this.panel;
    const begin = (event) => {
      const at = this.#nearest(top.places, top.pixels(event), event);
      if (at == null) return null;
      return { numbers: [at], move: this.#turning(at, top.azimuthAt(event)) };
    };
    this.#listenPad(top, begin);
    top.element.addEventListener("dblclick", (event) => {
      if (this.panel.isReadOnly || this.#nearest(top.places, top.pixels(event), event) != null) return;
      this.panel.edit(edits.add(this.panel.cameras, this.panel.cameras[this.panel.active], Math.round(top.azimuthAt(event))));
    });
  }

  /** A function that turns the chosen after the pointer; whole degrees, with shift of 15. */
  #turning(held, grip) {
    const from = this.panel.cameras;
    return (event) => {
      const now = from[held].azimuth + edits.turnBetween(grip, this.panel.top.azimuthAt(event));
      const turn = round(now, event.shiftKey ? 15 : 1) - from[held].azimuth;
      return edits.alter(from, this.panel.chosen, (c) => ({ azimuth: c.azimuth + turn }));
    };
  }

  #listenSide() {
    const { side } = this.panel;
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
    const from = this.panel.cameras;
    return (event) => {
      const now = this.panel.side.standAt(event);
      const { elevation, distance } = from[held];
      const [tilt, metres] = event.shiftKey ? [15, 0.5] : [1, 0.05];
      const lift = round(elevation + now.elevation - grip.elevation, tilt) - elevation;
      const away = round(distance + now.distance - grip.distance, metres) - distance;
      return edits.alter(from, this.panel.chosen, (c) => ({ elevation: c.elevation + lift, distance: c.distance + away }));
    };
  }

  /** Clicks choose, drags move; from an empty place a drag chooses what lies in its rectangle. */
  #listenPad(plan, begin) {
    const { element } = plan;
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.gesture) return;
      this.panel.finishKeys();
      const isMore = event.shiftKey || event.ctrlKey || event.metaKey;
      const held = begin(event);
      const before = this.panel.chosen;
      this.gesture = { plan, held, isMore, before, from: plan.pixels(event), isDrag: false, pointer: event.pointerId };
      element.setPointerCapture(event.pointerId);
      if (held) this.#grasp(held.numbers, isMore, before);
      event.preventDefault(); // no text is chosen; so the keyboard is told where it is
      this.panel.focusCamera(held ? this.panel.active ?? held.numbers[0] : (this.panel.active ?? 0));
      if (!held && !isMore) this.panel.choose([]);
    });
    element.addEventListener("pointermove", (event) => this.gesture?.pointer === event.pointerId && this.#drag(event));
    element.addEventListener("pointerup", (event) => this.gesture?.pointer === event.pointerId && this.#drop());
    for (const kind of ["pointercancel", "lostpointercapture"]) {
      element.addEventListener(kind, (event) => this.gesture?.pointer === event.pointerId && this.#drop());
    }
  }

  #grasp(numbers, isMore, before) {
    const isAllChosen = numbers.every((i) => before.has(i));
    const active = numbers.includes(this.panel.active) ? this.panel.active : numbers[0];
    if (!isAllChosen) this.panel.choose(isMore ? new Set([...before, ...numbers]) : numbers, active);
    else this.panel.choose(before, active);
  }

  #drag(event) {
    const { gesture } = this;
    const at = gesture.plan.pixels(event);
    gesture.isDrag ||= Math.hypot(at[0] - gesture.from[0], at[1] - gesture.from[1]) > STILL;
    if (!gesture.isDrag) return;
    if (gesture.held) {
      this.panel.top.held = this.panel.side.held = true;
      if (!this.panel.isReadOnly) this.panel.edit(gesture.held.move(event), false);
      return;
    }
    gesture.plan.showBand(gesture.from, at);
    const inside = gesture.plan.places.flatMap((place, i) =>
      [0, 1].every((k) => place[k] >= Math.min(gesture.from[k], at[k]) && place[k] <= Math.max(gesture.from[k], at[k])) ? [i] : [],
    );
    this.panel.choose(new Set(gesture.isMore ? [...gesture.before, ...inside] : inside));
  }

  #drop() {
    const { gesture } = this;
    this.gesture = null;
    this.panel.top.held = this.panel.side.held = false;
    gesture.plan.showBand(null);
    if (gesture.isDrag && gesture.held) this.panel.onEdit(this.panel.text, true);
    if (!gesture.isDrag && gesture.held) this.#clicked(gesture);
    this.panel.draw();
  }

  /** A click on what was chosen already: with shift or Ctrl it is let go, else it alone stays. */
  #clicked({ held, isMore, before }) {
    if (!held.numbers.every((i) => before.has(i))) return;
    if (isMore) this.panel.choose([...before].filter((i) => !held.numbers.includes(i)));
    else this.panel.choose(held.numbers, held.numbers.includes(this.panel.active) ? this.panel.active : held.numbers[0]);
  }
}
