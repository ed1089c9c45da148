/** Asks a worker (js/splat_sorter.js) for the order of the Gaussians; one question at a time, the newest. */

export class SplatSorting {
  /** `onOrder(order)` gets an order that was asked for, to be used at once; `onFail()` tells of no worker. */
  constructor(count, onOrder, onFail) {
    this.onOrder = onOrder;
    this.order = new Uint32Array(count); // null while the worker has it
    this.wish = null; // to be asked for once the worker has answered
    this.held = null; // what the last order was asked for
    this.worker = new Worker(new URL("./splat_sorter.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.#take(data);
    this.worker.onerror = (event) => {
      event.preventDefault();
      onFail();
    };
    this.worker.postMessage({ count });
  }

  /** Texels of frame f: [N, 8] uint16, of which the first three are the place within the box. */
  addFrame(f, words) {
    const places = new Uint16Array((3 * words.length) / 8);
    for (let from = 0, to = 0; to < places.length; from += 8) {
      places[to++] = words[from];
      places[to++] = words[from + 1];
      places[to++] = words[from + 2];
    }
    this.worker.postMessage({ f, places }, [places.buffer]);
  }

  /**
   * Ask for the order at a moment [low, high, share], unless it is the last one given; `toward` as
   * DepthOrder.sort has it. Gives whether it is.
   */
  ask(moment, toward) {
    const wanted = [...moment, toward];
    const isThere = Boolean(this.held) && String(this.held) === String(wanted);
    this.wish = isThere ? null : wanted;
    this.#post();
    return isThere;
  }

  #post() {
    if (!this.wish || !this.order) return; // nothing to ask, or the worker has not answered yet
    this.worker.postMessage({ wanted: this.wish, order: this.order }, [this.order.buffer]);
    this.order = null;
    this.wish = null;
  }

  #take({ order, wanted }) {
    this.order = order;
    this.held = wanted;
    this.onOrder(order);
    this.#post();
  }

  /** Whoever used the last order has lost it. */
  forget() {
    this.held = null;
  }

  end() {
    this.worker.terminate();
  }
}
