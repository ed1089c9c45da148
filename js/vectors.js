/**
 * Vectors, matrices and orbits of the pack's world: x right, y down, z forward, metres; cameras have
 * the same axes (OpenCV). Matrices are stored column by column, as WebGL takes them.
 */

export const add = (a, b, k = 1) => a.map((v, i) => v + k * b[i]);
export const length = (a) => Math.hypot(...a);
export const unit = (a) => a.map((v) => v / (length(a) || 1));
export const cross = (a, b) => [
  a[1] * b[2] - a[2] * b[1],
  a[2] * b[0] - a[0] * b[2],
  a[0] * b[1] - a[1] * b[0],
];
export const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
export const clamp = (v, low, high) => Math.min(high, Math.max(low, v));

/** Radians above or below the horizon at which one still knows where up is. */
export const STEEPEST = 1.5;

/** From the target towards a camera at these angles (radians; 0 0 = where the source camera stands). */
export function directionOf(azimuth, elevation) {
  const level = Math.cos(elevation);
  return [Math.sin(azimuth) * level, -Math.sin(elevation), -Math.cos(azimuth) * level];
}

/** Rows right, down, forward of a camera at `eye` that looks at `target`. */
export function axesOf(eye, target) {
  const forward = unit(add(target, eye, -1));
  const right = unit(cross([0, 1, 0], forward));
  return [right, cross(forward, right), forward];
}

export function viewMatrix(eye, axes) {
  const columns = [0, 1, 2].map((i) => [axes[0][i], axes[1][i], axes[2][i], 0]);
  return new Float32Array([...columns.flat(), ...axes.map((a) => -dot(a, eye)), 1]);
}

/** Camera space (y down, z forward) to WebGL's clip space; `tan` of half the picture's height. */
export function projectionMatrix(tan, aspect, near, far) {
  const depth = far - near;
  return new Float32Array([
    1 / (tan * aspect), 0, 0, 0,
    0, -1 / tan, 0, 0,
    0, 0, (far + near) / depth, 1,
    0, 0, (-2 * far * near) / depth, 0,
  ]);
}

/** 1, 2 or 5 times a power of ten. */
export function niceStep(v) {
  const ten = 10 ** Math.floor(Math.log10(v));
  return ten * ([5, 2].find((n) => n * ten <= v) ?? 1);
}
