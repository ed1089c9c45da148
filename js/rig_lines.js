/**
 * A rig as text, one camera a line: azimuth elevation distance [fov] [# name]. The same rules as in
 * models/camera_lines.py, which says them in full; degrees and metres.
 */

import { t } from "./words.js";

export const LIMITS = { elevation: [-90, 90], distance: [0.1, 100], fov: [1, 170] };
export const MOST = 256;
const NAMES = ["azimuth", "elevation", "distance", "fov"];
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

const calledIn = (name) =>
  ({ azimuth: t("azimuth"), elevation: t("elevation"), distance: t("distance"), fov: t("field of view") })[name];

/** What is wrong with the numbers of a line; "" = nothing. */
function faultOf(words, number) {
  const line = words.join(" ").slice(0, 60);
  if (words.length < 3 || words.length > 4 || !words.every((word) => NUMBER.test(word))) {
    return t("Line {number} is \"{line}\": write azimuth, elevation and distance (degrees, degrees, metres), such as 90 0 3.2; a fourth number is this camera's field of view.", { number, line });
  }
  for (const [i, name] of NAMES.entries()) {
    const [low, high] = LIMITS[name] ?? [-Infinity, Infinity];
    if (words[i] < low || words[i] > high) {
      const values = { number, line, called: calledIn(name), value: words[i], low, high };
      return t("Line {number} is \"{line}\", so its {called} is {value}, but it must lie between {low} and {high}.", values);
    }
  }
  return "";
}

/** The cameras of a text, the lines that are only words about them, and the first fault or "". */
export function readLines(text) {
  const [cameras, notes] = [[], []];
  let fault = "";
  for (const [i, line] of String(text ?? "").split(/\r?\n/).entries()) {
    const [numbers, ...names] = line.split("#");
    const words = numbers.replaceAll(",", " ").split(/\s+/).filter(Boolean);
    if (!words.length) {
      if (line.trim()) notes.push(line.trim());
      continue;
    }
    fault ||= faultOf(words, i + 1);
    const [azimuth, elevation, distance, fov = null] = words.map(Number);
    cameras.push({ azimuth, elevation, distance, fov, name: names.join("#").trim() });
  }
  if (cameras.length > MOST) {
    const values = { count: cameras.length, most: MOST };
    fault ||= t("There are {count} cameras, but a rig has at most {most}: remove some.", values);
  }
  return { cameras, notes, fault };
}

const word = (number) => String(+number.toFixed(4));

export function writeLines(cameras, notes = []) {
  const lines = cameras.map(({ azimuth, elevation, distance, fov, name }) => {
    const words = [azimuth, elevation, distance, ...(fov == null ? [] : [fov])].map(word);
    return [...words, ...(name ? ["#", name] : [])].join(" ");
  });
  return [...notes, ...lines].join("\n");
}
