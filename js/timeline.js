/** Which moment a view shows, and how it goes on while it plays. */

import { clamp } from "./vectors.js";
import { t } from "./words.js";

/** [key, label]: what comes after the last frame. */
export const endings = () => [
  ["loop", t("Loop")],
  ["swing", t("To and fro")],
  ["once", t("Once")],
];
const LONGEST_GAP = 250; // milliseconds between two pictures that count; a hidden page draws none

/** Time in frames, 0 to the last one; a loop holds the last frame as long as every other. */
export class Timeline {
  constructor() {
    this.total = 1;
    this.fps = 24;
    this.speed = 1;
    this.ending = "loop";
    this.isPlaying = false;
    this.gone = 0; // frames since the start, before loops are taken off
  }

  get period() {
    return this.ending === "swing" ? Math.max(2 * (this.total - 1), 1) : this.total;
  }

  get time() {
    const last = this.total - 1;
    if (this.ending === "swing") return last - Math.abs(last - (this.gone % this.period));
    return Math.min(this.ending === "once" ? this.gone : this.gone % this.period, last);
  }

  /** The picture of the time; to and fro, every one but the two at the ends comes twice, all as long. */
  get frame() {
    if (this.ending !== "swing") return Math.floor(this.time + 1e-6);
    const last = this.total - 1;
    return last - Math.abs(last - Math.floor((this.gone % this.period) + 1e-6));
  }

  /** Stand at a time; beyond an end it goes on from the other one. */
  seek(time) {
    const inside = ((time % this.total) + this.total) % this.total;
    this.gone = clamp(inside, 0, Math.max(this.total - 1, 0));
  }

  /** As `seek`, but times beyond an end stay at it. */
  hold(time) {
    this.gone = clamp(time, 0, this.total - 1);
  }

  play(isPlaying) {
    this.isPlaying = isPlaying && this.total > 1;
    this.last = null;
    if (this.isPlaying && this.ending === "once" && this.gone >= this.total - 1) this.gone = 0;
  }

  end(ending) {
    const { time } = this;
    this.ending = ending;
    this.gone = time;
  }

  /** Go on to `now` (milliseconds). */
  advance(now) {
    if (!this.isPlaying) return;
    const gap = clamp(now - (this.last ?? now), 0, LONGEST_GAP);
    this.last = now;
    this.gone += (gap / 1000) * this.fps * this.speed;
    if (this.ending === "once" && this.gone >= this.total - 1) this.play(false);
    else if (this.ending !== "once") this.gone %= this.period;
  }
}
