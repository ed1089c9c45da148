/** The rig editor's buttons, numbers and places for drawings. */

import { t } from "./words.js";

const ICONS = {
  add: "M7 2h2v5h5v2H9v5H7V9H2V7h5z",
  duplicate: "M2 2h8v2H4v6H2zM6 6h8v8H6zm1.500 1.500v5h5v-5z",
  remove: "M5.500 1.500h5L11 3h3v1.500H2V3h3zM3.200 5.500h9.600l-.8 9H4z",
  mirror: "M7.300 1h1.400v14H7.300zM6 4v8L1 12zM10 4v8l5 0z",
  spread: "M8 1a2 2 0 1 1 0 4 2 2 0 0 1 0-4zM2.600 10a2 2 0 1 1 0 4 2 2 0 0 1 0-4zM13.400 10a2 2 0 1 1 0 4 2 2 0 0 1 0-4zM7.300 6h1.400v2.600l2.400 1.600-.8 1.200L8 9.800l-2.300 1.600-.8-1.200 2.400-1.600z",
  renumber: "M2 3.500 4 2h1.300v6H3.800V3.900L2 5zM9 2h5v1.400l-2.800 3.200H14V8H9V6.600l2.800-3.200H9zM2 11h9V9l4 3-4 3v-2H2z",
  fit: "M1 1h5v1.600H2.600V6H1zm9 0h5v5h-1.600V2.600H10zM1 10h1.600v3.400H6V15H1zm12.400 0H15v5h-5v-1.600h3.400zM8 4a1.600 1.600 0 1 1 0 3.200A1.600 1.600 0 0 1 8 4zM5.800 8h4.400v4H5.800z",
  all: "M2 2h4v1.500H3.500V6H2zm8 0h4v4h-1.500V3.500H10zM2 10h1.500v2.500H6V14H2zm10.500 0H14v4h-4v-1.500h2.500zM6 6h4v4H6z",
  text: "M2 3h12v1.500H2zm0 3h9v1.500H2zm0 3h12v1.500H2zm0 3h7v1.500H2z",
};

const buttons = () => [
  ["add", t("Add a camera in the widest gap (A, or double-click from above)")],
  ["duplicate", t("Duplicate the chosen cameras (D)")],
  ["remove", t("Delete the chosen cameras (Delete)")],
  ["mirror", t("Mirror: add the same cameras on the other side, left for right (M)")],
  ["spread", t("Spread evenly: all cameras around the ring, or the chosen between their outer two (S)")],
  ["renumber", t("Number the cameras in order around the ring (N)")],
  ["fit", t("Move to where a person of 1.70 m just fits the picture (F)")],
  ["all", t("Choose all cameras (Ctrl+A)")],
];

/** [key, label, the same in little room, step, title]. */
const numbers = () => [
  ["azimuth", t("azimuth °"), t("az. °"), 1, t("Degrees around: 0 = your camera, 90 = to its right, 180 = behind")],
  ["elevation", t("elevation °"), t("el. °"), 1, t("Degrees above the performer's middle; negative = below")],
  ["distance", t("distance m"), t("dist. m"), 0.05, t("Metres from the performer's middle")],
  ["fov", t("view °"), t("view °"), 1, t("Vertical field of view of the chosen cameras; others have the node's fov")],
];

const icon = (name) => `<svg viewBox="0 0 16 16" width="14" height="14" fill="currentColor" fill-rule="evenodd" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
const button = ([name, title]) => `<button type="button" data-deed="${name}" title="${title}" aria-label="${title}">${icon(name)}</button>`;
const number = ([key, label, short, step, title]) =>
  `<label title="${title}"><span data-short="${short}">${label}</span><input type="number" step="${step}" data-number="${key}" aria-label="${title}"></label>`;

export const markup = () => `
<div class="bar" role="toolbar" aria-label="${t("Cameras")}">
  ${buttons().map(button).join("")}
  <span class="gap"></span>
  <span class="tabs">
    <button type="button" data-tab="above" aria-pressed="true">${t("Above")}</button>
    <button type="button" data-tab="side" aria-pressed="false">${t("Side")}</button>
  </span>
  <button type="button" data-words aria-pressed="false" title="${t("Show the cameras as text")}" aria-label="${t("Show the cameras as text")}">${icon("text")}</button>
</div>
<div class="middle" data-tab="above">
  <div class="pad above"><div class="empty" hidden></div></div>
  <div class="pad side"></div>
  <div class="words" hidden>
    <textarea spellcheck="false" aria-label="${t("Cameras as text: azimuth, elevation, distance, field of view, # name")}"></textarea>
    <p class="fault" role="alert" hidden></p>
  </div>
</div>
<div class="foot">
  <div class="picture"><svg role="img"></svg></div>
  <div class="numbers">
    ${numbers().map(number).join("")}
    <output aria-live="polite"></output>
  </div>
</div>
<div class="start" hidden><span></span><button type="button" data-deed="take"></button></div>`;
