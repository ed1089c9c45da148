/**
 * The pictures of some views, as models/views_stream.py wrote them: sheets with all views of a frame,
 * kept packed (a few MB), and single views in full size, fetched one by one when somebody looks.
 * Unpacked ones are kept within a limit, so that a page with many players stays small.
 */

import { openStoredFile, storedFileURL } from "./stored_file.js";

const MAGIC = "TURNVWS1";
const SHEETS_KEPT = 48e6; // bytes of unpacked pictures
const SINGLES_KEPT = 96e6;
const AT_ONCE = 6; // requests on their way

/** Where picture `n` of a table lies: [first byte, byte after the last]. */
const placeOf = (table, n) => [table.getUint32(8 * n, true), table.getUint32(8 * n + 4, true)];

/** Unpacked pictures by number; the ones not asked for longest go first. */
class Pictures {
  /** `load(n)` gives a picture's Blob; `onCome` is called when one can be drawn. */
  constructor(limit, load, onCome) {
    Object.assign(this, { limit, load, onCome });
    this.there = new Map();
    this.coming = new Set();
    this.failed = new Set();
    this.bytes = 0;
  }

  /** Picture `n` if it is there; else it will come. */
  get(n) {
    const picture = this.there.get(n);
    if (!picture) this.#fetch(n);
    else if (this.there.delete(n)) this.there.set(n, picture); // now the youngest
    return picture;
  }

  async #fetch(n) {
    if (this.coming.has(n) || this.failed.has(n) || this.coming.size >= AT_ONCE || this.isClosed) return;
    this.coming.add(n);
    try {
      const picture = await createImageBitmap(await this.load(n));
      if (this.isClosed) picture.close();
      else this.#keep(n, picture);
    } catch {
      this.failed.add(n); // the smaller picture stays
    }
    this.coming.delete(n);
    if (!this.isClosed) this.onCome();
  }

  #keep(n, picture) {
    this.there.set(n, picture);
    this.bytes += 4 * picture.width * picture.height;
    for (const [old, oldest] of this.there) {
      if (this.bytes <= this.limit || old === n) break;
      this.there.delete(old);
      this.bytes -= 4 * oldest.width * oldest.height;
      oldest.close();
    }
  }

  clear() {
    for (const picture of this.there.values()) picture.close();
    this.there.clear();
    this.bytes = 0;
  }

  close() {
    this.isClosed = true;
    this.clear();
  }
}

/** The views of one item of a node's output. */
export class Frames {
  /** `onCome` is called whenever there is something new to draw. */
  constructor(item, onCome) {
    this.item = item;
    this.packed = []; // Blobs, a sheet each
    this.stop = new AbortController();
    const sheet = async (f) => this.packed[f];
    this.sheets = new Pictures(SHEETS_KEPT, sheet, onCome);
    this.singles = new Pictures(SINGLES_KEPT, (n) => this.#fetchSingle(n), onCome);
    this.onCome = onCome;
  }

  /** Read the sheets; frames can be shown while others are still on their way. */
  async open() {
    const { header, take } = await openStoredFile(this.item, MAGIC, this.stop.signal);
    this.header = header;
    const table = new DataView((await take(8 * header.frames)).buffer);
    for (let f = 0; f < header.frames; f++) {
      const [from, to] = placeOf(table, f);
      this.packed.push(new Blob([await take(to - from)], { type: "image/jpeg" }));
      this.onCome();
    }
  }

  get isWhole() {
    return Boolean(this.header) && this.packed.length === this.header.frames;
  }

  /** This frame, or the last one of a shorter clip. */
  held(frame) {
    return Math.min(frame, this.item.frames - 1);
  }

  /** The sheet of a frame if it is unpacked; else it will be. */
  sheet(frame) {
    return this.packed[frame] && this.sheets.get(frame);
  }

  /** Where view `v` lies on a sheet. */
  cell(v) {
    const { columns, cell: [w, h] } = this.header;
    return [(v % columns) * w, Math.floor(v / columns) * h, w, h];
  }

  /** Whether single views have more pixels than the sheets. */
  get hasSingles() {
    return Boolean(this.item.alone) && !this.lacksSingles;
  }

  /** View `v` at a frame in its own size, if it has come; else it will. */
  single(v, frame) {
    return this.hasSingles ? this.singles.get(v * this.item.frames + frame) : undefined;
  }

  /** All views of a frame can be held in their own size. */
  canHoldAll(count) {
    const [w, h] = this.item.alone?.cell ?? [1e4, 1e4];
    return 4 * w * h * count <= SINGLES_KEPT;
  }

  /** Wait for the best picture of a view: what is exported. The caller closes it. */
  async best(v, frame) {
    if (this.hasSingles) {
      try {
        return await createImageBitmap(await this.#fetchSingle(v * this.item.frames + frame));
      } catch {
        this.lacksSingles = true;
      }
    }
    return createImageBitmap(this.packed[frame], ...this.cell(v));
  }

  async #fetchSingle(n) {
    this.table ??= this.#part(0, this.item.alone.start).then((bytes) => {
      const headerLength = new DataView(bytes).getUint32(8, true);
      return new DataView(bytes, 12 + headerLength);
    });
    const [from, to] = placeOf(await this.table, n);
    const { start } = this.item.alone;
    return new Blob([await this.#part(start + from, start + to)], { type: "image/jpeg" });
  }

  /** Bytes of the single views' file. */
  async #part(from, to) {
    const headers = { Range: `bytes=${from}-${to - 1}` };
    const answer = await fetch(storedFileURL(this.item.alone), { headers, signal: this.stop.signal });
    if (answer.status !== 206) {
      this.lacksSingles = true; // gone, or a proxy that only knows whole files
      await answer.body?.cancel();
      throw new Error("single views are not to be had");
    }
    return answer.arrayBuffer();
  }

  /** Nobody looks: only what came packed is kept. */
  sleep() {
    this.sheets.clear();
    this.singles.clear();
  }

  close() {
    this.stop.abort();
    this.sheets.close();
    this.singles.close();
    this.packed = [];
  }
}
