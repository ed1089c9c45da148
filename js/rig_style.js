/** The rig editor's looks, in the page's own colours; shapes and numbers say what colours say. */

export const MIN_HEIGHT = 340; // pixels of the whole widget
const PADS = 150; // pixels of the drawings at least

export const STYLE = `
.turnaround-rig { --ink: var(--input-text, #ddd); --paper: var(--comfy-input-bg, #222); --soft: var(--descrip-text, #999);
  --line: var(--border-color, #4e4e4e); --mark: color-mix(in srgb, #2f8fe6 66%, var(--ink));
  display: flex; flex-direction: column; width: 100%; height: 100%; min-height: ${MIN_HEIGHT - 20}px; box-sizing: border-box;
  overflow: hidden; border: 1px solid var(--line); border-radius: 6px; background: var(--paper); color: var(--ink);
  font: 12px/1.3 sans-serif; user-select: none; container-type: inline-size; }
.turnaround-rig [hidden] { display: none !important; }
.turnaround-rig .bar { display: flex; flex-wrap: wrap; gap: 4px; padding: 5px; flex: none; }
.turnaround-rig button, .turnaround-rig input, .turnaround-rig textarea { font: inherit; color: var(--ink); box-sizing: border-box;
  border: 1px solid var(--line); border-radius: 4px; background: var(--comfy-menu-bg, #353535); }
.turnaround-rig button { min-width: 28px; height: 28px; padding: 0 6px; display: inline-grid; place-items: center; cursor: pointer; }
.turnaround-rig button:disabled { opacity: .4; cursor: default; }
.turnaround-rig button[aria-pressed="true"] { border-color: var(--mark); box-shadow: inset 0 -2px 0 var(--mark); }
.turnaround-rig :is(button, input, textarea):focus-visible { outline: 2px solid var(--mark); outline-offset: 0; }
.turnaround-rig .gap { flex: 1 1 0; }
.turnaround-rig .tabs { display: none; gap: 4px; }
.turnaround-rig .middle { position: relative; display: flex; flex: 1 1 ${PADS}px; min-height: ${PADS}px; border-block: 1px solid var(--line); }
.turnaround-rig .pad { position: relative; flex: 1 1 0; min-width: 0; overflow: hidden; }
.turnaround-rig .pad + .pad { border-left: 1px solid var(--line); }
.turnaround-rig .pad svg { position: absolute; inset: 0; touch-action: none; cursor: crosshair; outline: none; }
.turnaround-rig .empty { position: absolute; inset: auto 0 30%; text-align: center; padding: 0 12px; pointer-events: none; }
.turnaround-rig .words { flex: 1 1 0; display: flex; flex-direction: column; min-width: 0; }
.turnaround-rig textarea { flex: 1 1 0; min-height: 0; resize: none; border: none; border-radius: 0; padding: 6px 8px; background: none;
  font: 12px/1.5 monospace; user-select: text; white-space: pre; }
.turnaround-rig .fault { flex: none; margin: 0; padding: 5px 8px; border-top: 2px dashed var(--error-text, #ff4444); }
.turnaround-rig .foot { display: flex; flex: none; gap: 8px; padding: 6px; height: 124px; box-sizing: border-box; }
.turnaround-rig .picture { flex: 0 0 34%; max-width: 190px; position: relative; }
.turnaround-rig .picture svg { position: absolute; inset: 0; display: block; }
.turnaround-rig .numbers { flex: 1 1 0; min-width: 0; display: grid; grid-template-columns: 1fr 1fr; grid-auto-rows: min-content; gap: 3px 8px; align-content: space-between; }
.turnaround-rig label { display: flex; align-items: center; gap: 4px; min-width: 0; color: var(--soft); }
.turnaround-rig label span { flex: 1 1 auto; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.turnaround-rig input { width: 58px; flex: none; height: 24px; padding: 0 4px; text-align: right; font-variant-numeric: tabular-nums; }
.turnaround-rig input:disabled { opacity: .5; }
.turnaround-rig output { grid-column: 1 / -1; line-height: 1.25; max-height: 2.5em; overflow: hidden; }
.turnaround-rig .start { display: flex; align-items: center; gap: 8px; padding: 4px 6px; flex: none; border-top: 1px solid var(--line); }
.turnaround-rig .start span { flex: 1 1 0; color: var(--soft); }
.turnaround-rig text { fill: var(--ink); font: 11px sans-serif; pointer-events: none; }
.turnaround-rig text.number { font-weight: 700; text-anchor: middle; dominant-baseline: central; }
.turnaround-rig text.small { font-size: 9px; fill: var(--soft); }
.turnaround-rig text.word { font-size: 10px; fill: var(--soft); }
.turnaround-rig text.centre { text-anchor: middle; } .turnaround-rig text.end { text-anchor: end; }
.turnaround-rig .ring { fill: none; stroke: var(--line); stroke-opacity: .6; }
.turnaround-rig .ground { stroke: var(--soft); stroke-dasharray: 1 3; }
.turnaround-rig .source { fill: var(--soft); }
.turnaround-rig .seen { fill: var(--mark); fill-opacity: .14; stroke: var(--mark); stroke-opacity: .7; }
.turnaround-rig .seen.beside { fill-opacity: .04; stroke-opacity: .35; }
.turnaround-rig .ghost { fill: none; stroke: var(--soft); stroke-dasharray: 3 3; }
.turnaround-rig .band { fill: var(--mark); fill-opacity: .12; stroke: var(--mark); stroke-dasharray: 4 3; }
.turnaround-rig .figure line { stroke-linecap: round; }
.turnaround-rig .figure .rim { stroke: color-mix(in srgb, var(--ink) 75%, var(--paper)); }
.turnaround-rig .figure .body { stroke: color-mix(in srgb, var(--ink) 28%, var(--paper)); }
.turnaround-rig .figure .nose { stroke: var(--ink); }
.turnaround-rig .camera { cursor: grab; outline: none; }
.turnaround-rig .camera :is(circle, rect) { fill: var(--paper); stroke: var(--ink); stroke-width: 1.5; }
.turnaround-rig .camera .tip { fill: var(--ink); }
.turnaround-rig .camera.chosen :is(circle, rect) { fill: var(--mark); stroke: var(--mark); }
.turnaround-rig .camera.chosen .tip { fill: var(--mark); }
.turnaround-rig .camera.chosen text.number { fill: var(--paper); }
.turnaround-rig .camera.active rect { stroke: var(--ink); stroke-width: 2; }
.turnaround-rig .camera .focus { visibility: hidden; fill: none !important; stroke: var(--ink); stroke-width: 2; stroke-dasharray: 3 2; }
.turnaround-rig .camera:focus-visible .focus { visibility: visible; }
.turnaround-rig .frame { fill: color-mix(in srgb, var(--ink) 6%, var(--paper)); }
.turnaround-rig .frame.edge { fill: none; stroke: var(--ink); stroke-width: 1.5; }
@container (max-width: 399px) {
  .turnaround-rig .tabs { display: flex; }
  .turnaround-rig .middle[data-tab="above"] .side, .turnaround-rig .middle[data-tab="side"] .above { display: none; }
  .turnaround-rig .pad + .pad { border-left: none; }
  .turnaround-rig .numbers { gap: 2px 6px; }
  .turnaround-rig label span { font-size: 0; }
  .turnaround-rig label span::after { content: attr(data-short); font-size: 12px; }
  .turnaround-rig input { width: 52px; appearance: textfield; }
  .turnaround-rig input::-webkit-inner-spin-button { display: none; }
}`;
