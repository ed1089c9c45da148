/** The widgets' words in the language that a creator chose for ComfyUI's page. */

import { app } from "../../scripts/app.js";
import { ZH } from "./words_zh.js";

const TABLES = { zh: ZH };

/**
 * The words for `english`, where "{name}" stands for `values.name`; English where a language has none.
 * Written out at every call, so that a test finds those that have no words yet.
 */
export function t(english, values = {}) {
  const table = TABLES[app.ui.settings.getSettingValue("Comfy.Locale")];
  return (table?.[english] ?? english).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
