/** How views are laid out and drawn on a 2D canvas: grid, zoom in step, wipe, labels. */

import { clamp } from "./vectors.js";

const GAP = 2; // pixels between views
const LABEL = 11; // pixels of the labels' letters
export const MOST = 16; // times that pictures can be enlarged

/** Rectangles [x, y, w, h] for `count` pictures of one shape: as large as they can be. */
export function layOut(count, aspect, width, height, gap = GAP) {
  let best = { w: 0 };
  for (let columns = 1; columns <= count; columns++) {
    const rows = Math.ceil(count / columns);
    const w = Math.min((width - gap * (columns - 1)) / columns, ((height - gap * (rows - 1)) / rows) * aspect);
    if (w > best.w) best = { w, h: w / aspect, columns, rows };
  }
  const { w, h, columns, rows } = best;
  if (!w) return [];
  const left = (width - columns * w - gap * (columns - 1)) / 2;
  const top = (height - rows * h - gap * (rows - 1)) / 2;
  return Array.from({ length: count }, (_, n) => [
    left + (n % columns) * (w + gap),
    top + Math.floor(n / columns) * (h + gap),
    w,
    h,
  ]);
}

/** The zoom after a step of `factor` around a place of a cell, both in shares of it. */
export function zoomed({ k, x, y }, factor, [u, v]) {
  const next = clamp(k * factor, 1, MOST);
  // The same spot of the picture stays under the pointer.
  return inside({ k: next, x: x + (u - 0.5) * (1 / k - 1 / next), y: y + (v - 0.5) * (1 / k - 1 / next) });
}

/** `x`, `y`: which place of the picture is in the middle, 0 to 1; nothing beyond its edges is shown. */
export function inside({ k, x, y }) {
  const edge = 0.5 / k;
  return { k, x: clamp(x, edge, 1 - edge), y: clamp(y, edge, 1 - edge) };
}

export const WHOLE = { k: 1, x: 0.5, y: 0.5 };

/** Draw a source, { picture, from: [x, y, w, h] }, zoomed, into the part [left, right] of a cell. */
function drawPart(context, { picture, from }, [x, y, w, h], zoom, left, right) {
  context.save();
  context.beginPath();
  context.rect(x + left * w, y, (right - left) * w, h);
  context.clip();
  const scale = (zoom.k * w) / from[2];
  context.imageSmoothingEnabled = scale < 4; // then single pixels are what one wants to see
  context.imageSmoothingQuality = "high";
  const place = [x + w / 2 - zoom.x * zoom.k * w, y + h / 2 - zoom.y * zoom.k * h, zoom.k * w, zoom.k * h];
  context.drawImage(picture, ...from, ...place);
  context.restore();
}

/** One view: `a`, and right of the wipe `b` if there is one. */
export function drawCell(context, cell, zoom, a, b, wipe) {
  if (!b) return drawPart(context, a, cell, zoom, 0, 1);
  drawPart(context, a, cell, zoom, 0, wipe);
  drawPart(context, b, cell, zoom, wipe, 1);
}

export function drawWipe(context, [x, y, w, h], wipe, density) {
  context.fillStyle = "#fff";
  context.fillRect(Math.round(x + wipe * w - density / 2), y, Math.max(1, Math.round(density)), h);
  context.beginPath();
  context.arc(x + wipe * w, y + h / 2, 5 * density, 0, 7);
  context.fill();
}

/** A small text in a cell's corner: "left" or "right", "top" or "bottom". */
export function drawText(context, text, [x, y, w, h], density, side = "left", end = "top") {
  const size = LABEL * density;
  context.font = `${size}px sans-serif`;
  const wide = context.measureText(text).width + 0.8 * size;
  if (wide > w || 1.5 * size > h / 2) return;
  const left = side === "left" ? x : x + w - wide;
  const top = end === "top" ? y : y + h - 1.5 * size;
  context.fillStyle = "rgba(0, 0, 0, 0.55)";
  context.fillRect(left, top, wide, 1.5 * size);
  context.fillStyle = "#fff";
  context.textBaseline = "middle";
  context.fillText(text, left + 0.4 * size, top + 0.78 * size);
}

/** What a view is called: its label, with the camera's azimuth if that is not in it. */
export function nameOf({ label, azimuth }) {
  return azimuth == null || label.startsWith(`${azimuth}°`) ? label : `${label} · ${azimuth}°`;
}
