/** Files that a node left in ComfyUI's temp folder, read while they come. */

import { api } from "../../scripts/api.js";
import { t } from "./words.js";

export function storedFileURL(file) {
  const { filename, subfolder, type, checksum } = file;
  // Another file of this name is not taken from the browser's cache.
  const query = new URLSearchParams({ filename, subfolder, type, checksum });
  return api.apiURL(`/view?${query}`);
}

/** A function that gives the next `count` bytes of a stream. */
function byteReader(stream) {
  const reader = stream.getReader();
  let rest = new Uint8Array(0);
  return async function take(count) {
    const whole = new Uint8Array(count);
    for (let filled = 0; filled < count; ) {
      if (!rest.length) {
        const { done, value } = await reader.read();
        if (done) throw new Error(t("The file of this view is cut off: run the node again."));
        rest = value;
      }
      const part = rest.subarray(0, count - filled);
      whole.set(part, filled);
      filled += part.length;
      rest = rest.subarray(part.length);
    }
    return whole;
  };
}

/**
 * Open a file of ours: eight letters, the length of a JSON header, the header. Gives the header and
 * `take(count)`, which gives the bytes that follow.
 */
export async function openStoredFile(file, magic, signal) {
  const answer = await fetch(storedFileURL(file), { signal });
  if (answer.status === 404) {
    throw new Error(t("The file of this view is gone, as ComfyUI clears its temp folder: run the node again."));
  }
  if (!answer.ok) {
    const { status } = answer;
    throw new Error(t("ComfyUI did not hand out the file of this view ({status}): run the node again.", { status }));
  }
  const take = byteReader(answer.body);
  if (new TextDecoder().decode(await take(8)) !== magic) {
    throw new Error(t("The file of this view was written by another version of Turnaround: run the node again."));
  }
  const size = new DataView((await take(4)).buffer).getUint32(0, true);
  return { header: JSON.parse(new TextDecoder().decode(await take(size))), take };
}

/** What went wrong in a sentence for the creator. */
export function sentenceOf(error) {
  const isNetwork = error instanceof TypeError; // as fetch has it
  return isNetwork ? t("ComfyUI did not answer: start it and run the node again.") : error.message;
}
