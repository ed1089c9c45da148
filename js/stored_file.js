/** Files that a node left in ComfyUI's temp folder, read while they come. */

import { api } from "../../scripts/api.js";

export function storedFileURL(file) {
  const { filename, subfolder, type, checksum } = file;
  // Another file of this name is not taken from the browser's cache.
  const query = new URLSearchParams({ filename, subfolder, type, checksum });
  return api.apiURL(`/view?${query}`);
}

/** A function that gives the next `count` bytes of a stream. */
function byteReader(stream, cutOff) {
  const reader = stream.getReader();
  let rest = new Uint8Array(0);
  return async function take(count) {
    const whole = new Uint8Array(count);
    for (let filled = 0; filled < count; ) {
      if (!rest.length) {
        const { done, value } = await reader.read();
        if (done) throw new Error(cutOff);
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
 * `take(count)`, which gives the bytes that follow. `what` is the file's subject in sentences: "cloud".
 */
export async function openStoredFile(file, magic, what, signal) {
  const answer = await fetch(storedFileURL(file), { signal });
  if (answer.status === 404) {
    throw new Error(`The ${what}'s file is gone, as ComfyUI clears its temp folder: run the node again.`);
  }
  if (!answer.ok) throw new Error(`ComfyUI did not hand out the ${what} (${answer.status}): run the node again.`);
  const take = byteReader(answer.body, `The ${what}'s file is cut off: run the node again.`);
  if (new TextDecoder().decode(await take(8)) !== magic) {
    throw new Error(`The ${what} was written by another version of Turnaround: run the node again.`);
  }
  const size = new DataView((await take(4)).buffer).getUint32(0, true);
  return { header: JSON.parse(new TextDecoder().decode(await take(size))), take };
}

/** What went wrong in a sentence for the creator. */
export function sentenceOf(error) {
  const isNetwork = error instanceof TypeError; // as fetch has it
  return isNetwork ? "ComfyUI did not answer: start it and run the node again." : error.message;
}
