/**
 * A rig as text, one camera a line: azimuth elevation distance [fov] [# name]. The same rules as in
 * models/camera_lines.py, which says them in full; degrees and metres.
 */

export const LIMITS = { elevation: [-90, 90], distance: [0.1, 100], fov: [1, 170] };
export const MOST = 256;
const NAMES = ["azimuth", "elevation", "distance", "fov"];
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

/** What is wrong with the numbers of a line; "" = nothing. */
function faultOf(words, number) {
  const said = `Line ${number} is "${words.join(" ").slice(0, 60)}"`;
  if (words.length < 3 || words.length > 4 || !words.every((word) => NUMBER.test(word))) {
    return `${said}: write azimuth, elevation and distance (degrees, degrees, metres), such as 90 0 3.2; a fourth number is this camera's field of view.`;
  }
  for (const [i, name] of NAMES.entries()) {
    const [low, high] = LIMITS[name] ?? [-Infinity, Infinity];
    const called = name === "fov" ? "field of view" : name;
    if (words[i] < low || words[i] > high) {
      return `${said}, so its ${called} is ${words[i]}, but it must lie between ${low} and ${high}.`;
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
  if (cameras.length > MOST) fault ||= `There are ${cameras.length} cameras, but a rig has at most ${MOST}: remove some.`;
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
