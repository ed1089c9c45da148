"""The pack inside a running ComfyUI: nodes, log, templates, workflows from queue to files."""

import json
import re
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PACK = "ComfyUI-Turnaround"
NODE_ID = re.compile(r'node_id="(Turnaround\w+)"')


def downloads(node: dict) -> set[str]:
    """Files that a node of a workflow says where to get."""
    return {model["name"] for model in node["properties"].get("models", [])}


SAMPLED_IN_FULL = ("01_performer_turnaround", "02_your_own_clip")
SHORTER = {
    "TurnaroundMultiViewSampler": {"steps": 2},
    "TurnaroundMVOptRefine": {"iterations": 1},
    "TurnaroundTrainSubject": {"steps": 60},  # fields with a surface, in a fifth of the time
    "TurnaroundDistillAvatar": {"steps": 100},
    "TurnaroundCamerasToViews": {"max_frames": 3},
}
"""What the other examples do to the end in a creator's hands."""
RUNNABLE = [
    p for p in WORKFLOWS if not any(map(downloads, json.loads(p.read_text())["nodes"]))
]  # fmt: skip
"""Those that need no download; test_stock_checkpoints.py runs the others on small stand-ins."""


NEWER = {"TurnaroundAvatarToSplats"}
"""Listed only where ComfyUI has the sockets that they need; 0.3.75 has not."""


def our_node_ids() -> list[str]:
    files = sorted((ROOT / "nodes").glob("*.py"))
    return [i for f in files for i in NODE_ID.findall(f.read_text()) if i not in NEWER]


def test_every_node_is_listed(object_info):
    ids = our_node_ids()
    assert len(ids) >= 20
    assert not [i for i in ids if i not in object_info]


def test_pack_loads_without_failure_in_under_half_a_second(server):
    line = next(x for x in server.log_text().splitlines() if "seconds" in x and PACK in x)
    assert "IMPORT FAILED" not in line
    assert float(line.split()[0]) < 0.5


def test_embedded_weights_are_listed_by_the_native_loaders(object_info):
    unets = object_info["UNETLoader"]["input"]["required"]["unet_name"][0]
    vaes = object_info["VAELoader"]["input"]["required"]["vae_name"][0]
    assert "turnaround_tiny_dit.safetensors" in unets
    assert "turnaround_tiny_vae.safetensors" in vaes


def test_the_page_adds_no_widget_that_a_node_does_not_know_of(object_info):
    """It puts control_after_generate behind every number called seed, asked or not: widgets after it
    would be one off in saved workflows."""
    for name in our_node_ids():
        sockets = object_info[name]["input"]
        for each, spec in {**sockets.get("required", {}), **sockets.get("optional", {})}.items():
            if each in ("seed", "noise_seed"):
                assert spec[1].get("control_after_generate"), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_template_and_thumbnail_are_served(server, path):
    assert path.stem in server.get("/workflow_templates")[PACK]
    base = f"{server.url}/api/workflow_templates/{PACK}/{path.stem}"
    with urllib.request.urlopen(base + ".jpg", timeout=10) as picture:
        assert picture.read(2) == b"\xff\xd8"  # the JPEG mark
    with urllib.request.urlopen(base + ".json", timeout=10) as served:
        assert json.load(served) == json.loads(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_fits_the_running_schema(object_info, fits_schema, path):
    workflow = json.loads(path.read_text())
    assert workflow["groups"] and any(n["type"] == "MarkdownNote" for n in workflow["nodes"])
    fits_schema(workflow["nodes"], [link[1:] for link in workflow["links"]], object_info)


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: p.stem)
def test_workflow_runs_to_its_files(server, dev, object_info, path):
    prompt = dev.api_graph(json.loads(path.read_text()), object_info)
    shorter = {} if path.stem in SAMPLED_IN_FULL else SHORTER
    for node in prompt.values():
        node["inputs"].update(shorter.get(node["class_type"], {}))
        # Where the browser ran this graph before, ComfyUI would skip a saver with the same inputs.
        if "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] = "turnaround/through_the_server"
    entry = server.wait(server.queue(prompt), seconds=900)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    files = [
        server.base / f["type"] / f["subfolder"] / f["filename"]
        for output in entry["outputs"].values()
        for f in output.get("images", [])
    ]
    assert any(f.suffix == ".mp4" and f.parts[-3] == "output" for f in files)
    assert all(f.stat().st_size > 1000 for f in files)


UNUSUAL = {
    "one frame for 64 views": dict(frames=1, views=64, width=64, height=64),
    "one view of 6 frames, 70x90": dict(frames=6, views=1, width=70, height=90),
}
"""Changes of the flagship that must go through, snapped where video models ask for it."""


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_counts_and_sizes_go_through(server, dev, object_info, case):
    flagship = json.loads((ROOT / "workflows" / "01_performer_turnaround.json").read_text())
    prompt = dev.api_graph(flagship, object_info)
    for node in prompt.values():
        inputs = node["inputs"]
        wanted = {**UNUSUAL[case], "steps": 1}
        inputs.update({k: v for k, v in wanted.items() if isinstance(inputs.get(k), int)})
    entry = server.wait(server.queue(prompt), seconds=300)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    saved = next(i for i, n in prompt.items() if n["class_type"] == "TurnaroundSaveViews")
    assert entry["outputs"][saved]["images"]


def test_bad_input_is_one_sentence_and_the_server_lives_on(server):
    """Depth that is far too near for the performer's size: the creator picked the wrong meaning."""
    prompt = {
        "1": {
            "class_type": "TurnaroundSamplePerformer",
            "inputs": {
                "performer": "kira (unseen)", "motion": "dance_a (unseen)", "frames": 1,
                "width": 64, "height": 64, "start": 0.0, "clothes_seed": 1,
            },
        },
        "2": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0x808080},
        },
        "3": {
            "class_type": "TurnaroundPerformerGeometry",
            "inputs": {
                "video": ["1", 0], "depth": ["2", 0], "depth_convention": "metres", "fov": 40.0,
                "performer_height": 1.7, "erosion": 1,
            },
        },
        "4": {"class_type": "TurnaroundPreviewViews", "inputs": {"views": ["3", 1], "moments": 1}},
    }  # fmt: skip
    entry = server.wait(server.queue(prompt), seconds=120)
    assert entry["status"]["status_str"] == "error"
    kind, error = entry["status"]["messages"][-1]
    assert kind == "execution_error"
    assert "choose another depth convention" in error["exception_message"]
    assert server.get("/system_stats")
