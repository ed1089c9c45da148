/** What the rig editor says of its cameras. */

import { radians, turned } from "./rig_edits.js";
import { t } from "./words.js";

export const short = (value, digits = 1) => String(+value.toFixed(digits));
export const counted = (count) => (count === 1 ? t("1 camera") : t("{count} cameras", { count }));

const sides = () => [
  t("in front"), t("front right"), t("right"), t("back right"), t("behind"), t("back left"), t("left"), t("front left"),
];
/** Where an azimuth is, in a word. */
const sideOf = (azimuth) => sides()[Math.round(turned(azimuth) / 45) % 8];

const called = (i, name) => (name ? t("Camera {i} \"{name}\"", { i, name }) : t("Camera {i}", { i }));

export function cameraAsWords({ azimuth, elevation, distance, fov, name }, i) {
  const values = {
    camera: called(i, name), side: sideOf(azimuth), azimuth: short(azimuth), elevation: short(elevation),
    distance: short(distance, 2),
  };
  const place = t("{camera}: {side} {azimuth}°, elevation {elevation}°, {distance} m", values);
  return place + (fov == null ? "" : t(", view {fov}°", { fov: short(fov) }));
}

/** What is chosen, and what its picture shows; of a RigPanel. */
export function statusOf({ isLinked, fault, chosen, cameras, active, fov, aspect }) {
  if (isLinked) return t("The cameras come from the connected text.");
  if (fault || !cameras.length) return "";
  const values = { cameras: counted(cameras.length), chosen: chosen.size, total: cameras.length, active };
  if (!chosen.size) return t("{cameras}; the picture is camera 0's. Click one to change it.", values);
  if (chosen.size > 1) return t("{chosen} of {total} cameras chosen; the picture is camera {active}'s.", values);
  const { azimuth, distance, name, ...camera } = cameras[active];
  const high = 2 * distance * Math.tan(radians(camera.fov ?? fov) / 2);
  const seen = { camera: called(active, name), side: sideOf(azimuth), wide: short(high * aspect, 1), high: short(high, 1) };
  return t("{camera}: {side}, sees {wide} x {high} m at the performer.", seen);
}
