/**
 * What can be done to the cameras of a rig. Every function takes a list of cameras { azimuth,
 * elevation, distance, fov, name } (degrees, metres; fov null = the rig's) and the set of the chosen
 * numbers, changes neither, and gives { cameras, chosen }.
 */

import { LIMITS, MOST } from "./rig_lines.js";

const STEEPEST = 89; // straight above, an azimuth has no meaning
const SAME = 0.5; // degrees and centimetres within which two cameras stand on one spot
const BESIDE = 15; // degrees between a camera and its duplicate
const MARGIN = 1.12; // free space around the performer, as models/cameras.framing_distance has it

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
export const radians = (degrees) => (degrees * Math.PI) / 180;
export const degrees = (radians) => (radians * 180) / Math.PI;
/** 0 to 360. */
export const turned = (azimuth) => ((+azimuth.toFixed(4) % 360) + 360) % 360;
/** -180 to 180. */
export const turnBetween = (from, to) => turned(to - from + 180) - 180;

const limits = { ...LIMITS, elevation: [-STEEPEST, STEEPEST] };
const within = (key, value) => (key === "azimuth" ? turned(value) : clamp(value, ...limits[key]));
const everyone = (cameras, chosen) => (chosen.size ? [...chosen].sort((a, b) => a - b) : [...cameras.keys()]);
const last = (cameras, count) => new Set(Array.from({ length: count }, (_, i) => cameras.length - count + i));

function isTaken(cameras, { azimuth, elevation, distance }) {
  return cameras.some(
    (other) =>
      Math.abs(turnBetween(other.azimuth, azimuth)) < SAME &&
      Math.abs(other.elevation - elevation) < SAME &&
      Math.abs(other.distance - distance) < SAME / 100,
  );
}

/** Numbers of the chosen: `change` gives a camera's new ones from its old. */
export function alter(cameras, chosen, change) {
  const changed = cameras.map((camera, i) => {
    if (!chosen.has(i)) return camera;
    const entries = Object.entries(change(camera)).map(([key, value]) => [key, value == null ? null : within(key, value)]);
    return { ...camera, ...Object.fromEntries(entries) };
  });
  return { cameras: changed, chosen };
}

function appended(cameras, more) {
  const grown = [...cameras, ...more.slice(0, Math.max(0, MOST - cameras.length))];
  return { cameras: grown, chosen: last(grown, grown.length - cameras.length) };
}

/** One more, like the model camera; without an azimuth in the middle of the widest gap. */
export function add(cameras, model, azimuth = null) {
  const start = model ?? cameras.at(-1) ?? { elevation: 0, distance: 3.2, fov: null };
  const place = azimuth ?? middleOfWidestGap(cameras);
  return appended(cameras, [{ ...start, azimuth: turned(place), name: "" }]);
}

/** The azimuths in order, each with the gap up to the next. */
function gaps(azimuths) {
  const order = azimuths.map(turned).sort((a, b) => a - b);
  return order.map((from, i) => ({ from, gap: turned((order[i + 1] ?? order[0]) - from) || (order.length === 1 ? 360 : 0) }));
}

function middleOfWidestGap(cameras) {
  if (!cameras.length) return 0;
  const widest = gaps(cameras.map((c) => c.azimuth)).reduce((a, b) => (b.gap > a.gap + 1e-6 ? b : a));
  return Math.round(widest.from + widest.gap / 2);
}

export function duplicate(cameras, chosen) {
  const copies = [];
  for (const i of [...chosen].sort((a, b) => a - b)) {
    const copy = { ...cameras[i], name: "" };
    do copy.azimuth = turned(copy.azimuth + BESIDE);
    while (isTaken([...cameras, ...copies], copy) && copies.length + cameras.length < 360 / BESIDE);
    copies.push(copy);
  }
  return appended(cameras, copies);
}

export function remove(cameras, chosen) {
  return { cameras: cameras.filter((_, i) => !chosen.has(i)), chosen: new Set() };
}

/** For every chosen camera (none = all) one on the other side, where none stands yet. */
export function mirror(cameras, chosen) {
  const copies = [];
  for (const i of everyone(cameras, chosen)) {
    const copy = { ...cameras[i], azimuth: turned(-cameras[i].azimuth), name: "" };
    if (!isTaken([...cameras, ...copies], copy)) copies.push(copy);
  }
  return copies.length ? appended(cameras, copies) : { cameras, chosen };
}

/**
 * Even azimuths. All cameras: a closed ring that begins where camera 0 stands. Some: between the
 * outer two of them, which are those beside the widest gap.
 */
export function spread(cameras, chosen) {
  const numbers = everyone(cameras, chosen);
  const isRing = numbers.length === cameras.length;
  if (numbers.length < (isRing ? 2 : 3)) return { cameras, chosen };
  const widest = gaps(numbers.map((i) => cameras[i].azimuth)).reduce((a, b) => (b.gap > a.gap + 1e-6 ? b : a));
  const begin = turned(isRing ? cameras[numbers[0]].azimuth : widest.from + widest.gap);
  const step = isRing ? 360 / numbers.length : (360 - widest.gap) / (numbers.length - 1);
  // Those on one spot follow each other in the order of their numbers.
  const order = [...numbers].sort(
    (a, b) => turned(cameras[a].azimuth - begin) - turned(cameras[b].azimuth - begin) || a - b,
  );
  const places = new Map(order.map((number, i) => [number, turned(begin + i * step)]));
  const even = cameras.map((c, i) => (places.has(i) ? { ...c, azimuth: places.get(i) } : c));
  return { cameras: even, chosen };
}

/** Numbers in order around the ring, from azimuth 0 on; lower cameras first. */
export function renumber(cameras, chosen) {
  const order = [...cameras.keys()].sort(
    (a, b) => turned(cameras[a].azimuth) - turned(cameras[b].azimuth) || cameras[a].elevation - cameras[b].elevation || a - b,
  );
  const kept = new Set(order.flatMap((old, i) => (chosen.has(old) ? [i] : [])));
  return { cameras: order.map((i) => cameras[i]), chosen: kept };
}

/**
 * Metres from which an upright cylinder around the middle just fits into the picture, plus 12 %: the
 * rule of models/cameras.framing_distance.
 */
export function fittingDistance({ halfWidth, halfHeight }, elevation, fov, aspect) {
  const tall = Math.tan(radians(fov) / 2);
  const [level, steep] = [Math.cos(radians(elevation)), Math.abs(Math.sin(radians(elevation)))];
  const rims = [-halfHeight, halfHeight].flatMap((end) => [-halfWidth, halfWidth].map((side) => [end, side]));
  const high = Math.max(...rims.map(([e, s]) => e * steep + s * level + Math.abs(e * level - s * steep) / tall));
  const wide = halfHeight * steep + halfWidth * Math.hypot(level, 1 / (tall * aspect));
  return MARGIN * Math.max(high, wide);
}

/** The chosen (none = all) at the distance from which the figure just fits. */
export function fit(cameras, chosen, figure, fov, aspect) {
  const nearest = (camera) =>
    Math.ceil(fittingDistance(figure, camera.elevation, camera.fov ?? fov, aspect) * 100 - 1e-6) / 100;
  const changed = alter(cameras, new Set(everyone(cameras, chosen)), (c) => ({ distance: nearest(c) }));
  return { cameras: changed.cameras, chosen };
}
