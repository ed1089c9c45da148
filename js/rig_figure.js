/**
 * A person of 1.70 m to judge cameras by, as rounded sticks, and the ways to look at it.
 *
 * World: x right, y down, z forward, metres; the origin is the figure's middle, and it faces the
 * source camera at azimuth 0, towards -z.
 */

import { radians } from "./rig_edits.js";

export const FIGURE = { halfWidth: 0.35, halfHeight: 0.85 };
const NEAREST = 0.05; // metres before a lens within which nothing is drawn

const both = (sticks) => sticks.flatMap(([a, b, r]) => [[a, b, r], ...[[a, b].map(([x, y, z]) => [-x, y, z])].map(([c, d]) => [c, d, r])]);
/** [from, to, radius, part]. */
const STICKS = [
  [[0, -0.73, 0.01], [0, -0.75, 0.01], 0.1],
  [[0, -0.66, 0.02], [0, -0.56, 0.01], 0.05],
  [[-0.13, -0.51, 0], [0.13, -0.51, 0], 0.075],
  [[-0.06, -0.46, 0], [-0.05, -0.12, 0], 0.1],
  [[0.06, -0.46, 0], [0.05, -0.12, 0], 0.1],
  [[-0.07, -0.05, 0], [0.07, -0.05, 0], 0.105],
  ...both([
    [[0.19, -0.52, 0.01], [0.26, -0.24, 0.03], 0.045],
    [[0.26, -0.24, 0.03], [0.29, 0.0, -0.05], 0.038],
    [[0.09, 0.0, 0], [0.1, 0.4, -0.02], 0.075],
    [[0.1, 0.4, -0.02], [0.1, 0.77, 0.03], 0.055],
    [[0.1, 0.81, 0.02], [0.12, 0.815, -0.14], 0.035],
  ]),
  // What shows which way the figure faces.
  [[0, -0.73, -0.1], [0, -0.72, -0.11], 0.03, "nose"],
];

const sum = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

/** Where a camera stands, world. */
export function placeOf({ azimuth, elevation, distance }) {
  const [a, e] = [radians(azimuth), radians(elevation)];
  return [distance * Math.sin(a) * Math.cos(e), -distance * Math.sin(e), -distance * Math.cos(a) * Math.cos(e)];
}

/**
 * Ways to look: functions from a point of the world to { x, y, scale, depth }: pixels from the
 * drawing's middle (y down), pixels a metre there, and how far behind others it lies.
 */
export const fromAbove = (scale) => ([x, y, z]) => ({ x: x * scale, y: -z * scale, scale, depth: y });

/** From the side, so that a camera at this azimuth stands to the right. */
export function fromTheSide(scale, azimuth) {
  const [sin, cos] = [Math.sin(radians(azimuth)), Math.cos(radians(azimuth))];
  return ([x, y, z]) => ({ x: (x * sin - z * cos) * scale, y: y * scale, scale, depth: x * cos + z * sin });
}

/** Through a camera's lens, onto a picture of so many pixels height; null = behind the lens. */
export function throughLens(camera, fov, height) {
  const eye = placeOf(camera);
  const [a, e] = [radians(camera.azimuth), radians(camera.elevation)];
  const forward = [-Math.sin(a) * Math.cos(e), Math.sin(e), Math.cos(a) * Math.cos(e)];
  const right = [Math.cos(a), 0, Math.sin(a)];
  const down = [Math.sin(a) * Math.sin(e), Math.cos(e), -Math.cos(a) * Math.sin(e)];
  const focal = height / 2 / Math.tan(radians(fov) / 2);
  return (point) => {
    const ray = point.map((v, i) => v - eye[i]);
    const depth = sum(ray, forward);
    if (depth < NEAREST) return null;
    return { x: (sum(ray, right) * focal) / depth, y: (sum(ray, down) * focal) / depth, scale: focal / depth, depth };
  };
}

/** The figure's sticks as lines { x1, y1, x2, y2, width, part }, the farthest first. */
export function drawnFigure(look) {
  return STICKS.flatMap(([from, to, radius, part]) => {
    const [a, b] = [look(from), look(to)];
    if (!a || !b) return [];
    const width = radius * (a.scale + b.scale);
    return [{ x1: a.x, y1: a.y, x2: b.x, y2: b.y, width, part, depth: (a.depth + b.depth) / 2 }];
  }).sort((a, b) => b.depth - a.depth);
}

/** A circle on the ground around the figure's feet, as an outline; null = partly behind the lens. */
export function drawnGround(look, radius) {
  const points = Array.from({ length: 48 }, (_, i) => {
    const turn = (i * Math.PI) / 24;
    return look([radius * Math.sin(turn), FIGURE.halfHeight, radius * Math.cos(turn)]);
  });
  return points.includes(null) ? null : points;
}
