/**
 * The order in which Gaussians are laid over each other: from the farthest to the nearest, by a
 * counting sort of 16 bits of their depth.
 */

const STEPS = 65536;

/** Keeps the places of frames, and sorts them. */
export class DepthOrder {
  constructor(count) {
    this.count = count;
    this.frames = [];
    this.depths = new Float32Array(count);
    this.keys = new Uint16Array(count);
    this.starts = new Uint32Array(STEPS + 1);
  }

  /** Places of frame f: [N, 3] uint16 of the box. */
  setFrame(f, places) {
    this.frames[f] = places;
  }

  /**
   * Numbers of the Gaussians, the farthest first, in `order` [N] uint32; of equally far ones the last
   * comes first, so that the first lies in front, as models/rasterize_splats.py has it.
   * `toward` is the direction of the view times the box's size: depth per step of a place.
   */
  sort(low, high, share, toward, order) {
    const { count, depths, keys, starts } = this;
    const [a, b] = [this.frames[low], this.frames[high]];
    const [x, y, z] = toward;
    let least = Infinity;
    let most = -Infinity;
    for (let i = 0, j = 0; i < count; i++, j += 3) {
      let depth = x * a[j] + y * a[j + 1] + z * a[j + 2];
      if (share > 0) depth += share * (x * (b[j] - a[j]) + y * (b[j + 1] - a[j + 1]) + z * (b[j + 2] - a[j + 2]));
      depths[i] = depth;
      if (depth < least) least = depth;
      if (depth > most) most = depth;
    }
    const scale = most > least ? (STEPS - 1) / (most - least) : 0;
    starts.fill(0);
    for (let i = 0; i < count; i++) {
      const key = (most - depths[i]) * scale; // 0 = farthest; whole numbers are cut off by the array
      keys[i] = key;
      starts[keys[i] + 1]++;
    }
    for (let k = 0; k < STEPS; k++) starts[k + 1] += starts[k];
    for (let i = count - 1; i >= 0; i--) order[starts[keys[i]]++] = i;
    return order;
  }
}
