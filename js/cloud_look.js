/**
 * Where the view of a cloud looks from: radians and shares of the first look's distance, relative to the
 * first look, which is the source camera's. A look is never changed; turning gives another one.
 */

import {
  STEEPEST,
  add,
  axesOf,
  clamp,
  directionOf,
  length,
  niceStep,
  projectionMatrix,
  unit,
  viewMatrix,
} from "./vectors.js";

const MARGIN = 1.12; // free space around the performer
const ZOOMS = [0.08, 6]; // share of the first distance
const TURN = 3.5; // radians a view's height

/** What never changes while a cloud is shown: its box, its source camera, the first look at it. */
export function stageOf(header) {
  const { inner_low: low, inner_high: high, source } = header;
  const middle = low.map((v, i) => (v + high[i]) / 2);
  const half = low.map((v, i) => Math.max((high[i] - v) / 2, 1e-4));
  const girth = Math.max(half[0], half[2]); // turned to the side, the performer is as wide
  const away = add(source.center, middle, -1);
  const size = Math.hypot(girth, half[1]);
  // A source camera inside the body is no place to look from.
  const distance = Math.max(length(away), 1.5 * size);
  const [x, y, z] = length(away) > 1e-6 ? unit(away) : [0, 0, -1];
  const ahead = Math.max(distance - girth, 0.2 * distance);
  const depths = [middle[2] - half[2], middle[2] + half[2]].map((v) => v - source.center[2]);
  return {
    middle,
    size,
    distance,
    azimuth: Math.atan2(x, -z),
    elevation: clamp(Math.asin(clamp(-y, -1, 1)), -STEEPEST, STEEPEST),
    tanHigh: (MARGIN * half[1]) / ahead,
    tanWide: (MARGIN * girth) / ahead,
    ground: high[1],
    cell: niceStep(size / 2),
    depths,
    corners: cameraCorners(source, 0.16 * length(away)),
  };
}

/** The source camera's tip and the corners of its picture at a depth, world. */
function cameraCorners({ center, rotation, K, width, height }, depth) {
  const corner = ([u, v]) => {
    const ray = [(u - K[0][2]) / K[0][0], (v - K[1][2]) / K[1][1], 1].map((r) => r * depth);
    return add(center, [0, 1, 2].map((i) => rotation[0][i] * ray[0] + rotation[1][i] * ray[1] + rotation[2][i] * ray[2]));
  };
  return [center, ...[[0, 0], [width, 0], [width, height], [0, height]].map(corner)];
}

/** The uniforms that follow from where the eye stands; `look` is relative to the first look. */
export function lookFrom(stage, look, aspect) {
  const tan = clamp(Math.max(stage.tanHigh, stage.tanWide / aspect), 0.02, 1.2);
  const distance = stage.distance * look.zoom;
  const azimuth = stage.azimuth + look.azimuth;
  const elevation = clamp(stage.elevation + look.elevation, -STEEPEST, STEEPEST);
  const target = add(stage.middle, look.shift, stage.distance);
  const eye = add(target, directionOf(azimuth, elevation), distance);
  const axes = axesOf(eye, target);
  const range = [0.02 * distance, distance + 2 * stage.distance + 8 * stage.size];
  return {
    eye,
    axes,
    tan,
    range,
    view: viewMatrix(eye, axes),
    projection: projectionMatrix(tan, aspect, ...range),
  };
}

export const firstLook = () => ({ azimuth: 0, elevation: 0, zoom: 1, shift: [0, 0, 0] });

/** Turned by shares of the view's height. */
export function turned(stage, look, dx, dy) {
  const elevation = clamp(stage.elevation + look.elevation + TURN * dy, -STEEPEST, STEEPEST) - stage.elevation;
  return { ...look, azimuth: look.azimuth - TURN * dx, elevation };
}

/** Moved by shares of the view's height. */
export function moved(stage, look, aspect, dx, dy) {
  const { axes, tan } = lookFrom(stage, look, aspect);
  const scale = 2 * tan * look.zoom;
  return { ...look, shift: add(add(look.shift, axes[0], -dx * scale), axes[1], -dy * scale) };
}

export const zoomed = (look, factor) => ({ ...look, zoom: clamp(look.zoom * factor, ...ZOOMS) });
