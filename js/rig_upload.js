/** A button on Rig from File that brings a calibration into ComfyUI's input folder and chooses it. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { t } from "./words.js";

const NODE = "TurnaroundRigFromFile";
const KINDS = [".json", ".toml", ".txt", ".xml"]; // RIG_FILES of nodes/cameras.py

function complain(detail) {
  const life = 10_000;
  app.extensionManager.toast.add({ severity: "error", summary: "Turnaround", detail, life });
}

/** Stores a file under a name that is free, which it gives; ComfyUI's own route for pictures. */
async function store(file) {
  const body = new FormData();
  body.append("image", file);
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) {
    const { status } = answer;
    throw new Error(t("ComfyUI did not take the file ({status}): copy it into its input folder yourself.", { status }));
  }
  return (await answer.json()).name;
}

/** Every Rig from File of the graph may choose the file now; after a reload the server lists it. */
function list(name, node) {
  for (const other of new Set([node, ...node.graph.nodes])) {
    if (other.comfyClass !== NODE) continue;
    const { options } = other.widgets.find((w) => w.name === "file");
    if (!options.values.includes(name)) options.values = [...options.values, name].sort();
  }
}

async function bring(file, node) {
  const isKnown = KINDS.some((kind) => file.name.toLowerCase().endsWith(kind));
  if (!isKnown) {
    complain(t("{name} is no calibration: choose a .json, .toml, .txt or .xml file.", { name: file.name }));
    return;
  }
  try {
    const name = await store(file);
    list(name, node);
    const widget = node.widgets.find((w) => w.name === "file");
    widget.value = name;
    widget.callback?.(name);
    node.graph.setDirtyCanvas(true, true);
  } catch (error) {
    complain(error instanceof TypeError ? t("ComfyUI did not answer: start it and try again.") : error.message);
  }
}

function choose(node) {
  const input = Object.assign(document.createElement("input"), { type: "file", accept: KINDS.join() });
  input.onchange = () => bring(input.files[0], node);
  input.click();
}

app.registerExtension({
  name: "Turnaround.RigUpload",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const options = { serialize: false }; // neither in prompts
    const button = node.addWidget("button", t("choose a file to upload"), null, () => choose(node), options);
    button.serialize = false; // nor in the workflow file
  },
});
