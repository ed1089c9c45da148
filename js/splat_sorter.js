/**
 * A worker that sorts the Gaussians of one view. Every script of the pack is also imported by
 * ComfyUI's page, where this one does nothing.
 */

import { DepthOrder } from "./splat_order.js";

function answer(sorter, { data }) {
  if (data.count !== undefined) return new DepthOrder(data.count);
  if (data.places) sorter.setFrame(data.f, data.places);
  else {
    const order = sorter.sort(...data.wanted, data.order);
    self.postMessage({ order, wanted: data.wanted }, [order.buffer]);
  }
  return sorter;
}

if (typeof document === "undefined") {
  let sorter = null;
  self.onmessage = (event) => {
    sorter = answer(sorter, event);
  };
}
