/**
 * An avatar's frames from the file that models/splat_stream.py writes and describes. No page is needed.
 *
 * A frame is 16 bytes a Gaussian, as one texel of the graphics card holds them: x y z as uint16, a
 * quaternion w x y z as int8, three logarithms of scales and red green blue as uint8; scales of 0 0 0 are
 * those of a Gaussian whose turn it isn't. With harmonics
 * there are four bytes more: what the light makes of red, green and blue, and nothing.
 */

export const MAGIC = "TURNSPL2";

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The next chunk's bytes, out of zlib. */
async function nextPlanes(take) {
  const size = new DataView((await take(4)).buffer).getUint32(0, true);
  return inflated(await take(size));
}

/** Opacities [N] uint8 and harmonics' texels [N, K, 4] int8 (the fourth is nothing). */
export function readStill(planes, header) {
  const N = header.count;
  const K = (header.degree + 1) ** 2 - 1;
  const sheen = new Int8Array(4 * K * N);
  for (let plane = 0; plane < 3 * K; plane++) {
    const from = N * (1 + plane);
    const to = 4 * Math.floor(plane / 3) + (plane % 3);
    for (let i = 0; i < N; i++) sheen[4 * K * i + to] = planes[from + i];
  }
  return { opacities: planes.slice(0, N), sheen };
}

/** The frame that differs from `before` (null = from zeros) by these planes. */
export function readFrame(planes, header, before) {
  const N = header.count;
  const texels = new Uint8Array(16 * N);
  const places = new Uint16Array(texels.buffer);
  const gains = header.degree ? new Uint8Array(4 * N) : null;
  if (before) {
    texels.set(before.texels);
    gains?.set(before.gains);
  }
  for (let c = 0; c < 3; c++) {
    const [low, high] = [2 * c * N, (2 * c + 1) * N];
    for (let i = 0; i < N; i++) places[8 * i + c] += planes[low + i] | (planes[high + i] << 8);
  }
  for (let c = 0; c < 10; c++) {
    const from = (6 + c) * N;
    for (let i = 0; i < N; i++) texels[16 * i + 6 + c] += planes[from + i];
  }
  for (let c = 0; gains && c < 3; c++) {
    const from = (16 + c) * N;
    for (let i = 0; i < N; i++) gains[4 * i + c] += planes[from + i];
  }
  return { texels, gains };
}

/** All chunks: `onStill(opacities, sheen)` once, then `onFrame(f, frame)` for one after another. */
export async function readStream(header, take, onStill, onFrame) {
  onStill(readStill(await nextPlanes(take), header));
  let frame = null;
  for (let f = 0; f < header.times.length; f++) {
    frame = readFrame(await nextPlanes(take), header, frame);
    onFrame(f, frame);
  }
}

/** Between which two kept frames a time lies: [low, high, share of the high one]. */
export function kept(times, time, come = times.length) {
  const last = come - 1;
  if (time <= times[0] || last === 0) return [0, 0, 0];
  if (time >= times[last]) return [last, last, 0];
  let low = 0;
  for (let step = last; step > 0; step >>= 1) {
    while (low + step <= last && times[low + step] <= time) low += step;
  }
  return [low, low + 1, (time - times[low]) / (times[low + 1] - times[low])];
}
