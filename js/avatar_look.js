/**
 * Where the 4D view looks from: degrees and metres, as models/looks.py has them. A look is never
 * changed; turning, moving and zooming give another one.
 */

import { STEEPEST, add, axesOf, clamp, directionOf, projectionMatrix, viewMatrix } from "./vectors.js";

const DISTANCES = [0.02, 500]; // metres
const TURN = (3.5 * 180) / Math.PI; // degrees a view's height

export const lookFrom = ([azimuth, elevation, distance, fov, ...at]) => ({ azimuth, elevation, distance, fov, at });

/** A look as the node's 'camera' has it. */
export function lookAsText({ azimuth, elevation, distance, fov, at }) {
  const short = (v, digits) => String(Number(v.toFixed(digits)));
  const around = ((((azimuth + 180) % 360) + 360) % 360) - 180;
  return (
    `azimuth ${short(around, 2)}, elevation ${short(elevation, 2)}, distance ${short(distance, 4)}, ` +
    `fov ${short(fov, 2)}, at ${at.map((v) => short(v, 4)).join(" ")}`
  );
}

/**
 * What the shaders want to know of a look. The picture of `shape` (width / height) is whole within a
 * canvas of `aspect`.
 */
export function eyeOf(look, shape, aspect) {
  const [azimuth, elevation] = [look.azimuth, look.elevation].map((v) => (v * Math.PI) / 180);
  const eye = add(look.at, directionOf(azimuth, elevation), look.distance);
  const axes = axesOf(eye, look.at);
  const tan = Math.tan((look.fov * Math.PI) / 360) * Math.max(1, shape / aspect);
  const range = [0.01 * look.distance, 20 * look.distance + 50];
  return { eye, axes, tan, view: viewMatrix(eye, axes), projection: projectionMatrix(tan, aspect, ...range) };
}

/** Turned by shares of the view's height. */
export function turned(look, dx, dy) {
  const steepest = (STEEPEST * 180) / Math.PI;
  return {
    ...look,
    azimuth: look.azimuth - TURN * dx,
    elevation: clamp(look.elevation + TURN * dy, -steepest, steepest),
  };
}

/** Moved by shares of the view's height; `eye` is what `eyeOf` gave. */
export function moved(look, { axes, tan }, dx, dy) {
  const scale = 2 * tan * look.distance;
  return { ...look, at: add(add(look.at, axes[0], -dx * scale), axes[1], -dy * scale) };
}

export const zoomed = (look, factor) => ({ ...look, distance: clamp(look.distance * factor, ...DISTANCES) });
