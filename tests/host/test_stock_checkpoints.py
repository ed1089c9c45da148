"""The VACE workflow in a running ComfyUI, on checkpoints of the published names and keys in small.

Only the loader of the text encoder is exchanged, for one that names a smaller width: ComfyUI fixes
that of umt5_xxl in a file of its own.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "05_wan_vace.json"
FRAMES, VIEWS, WIDTH, HEIGHT = 5, 3, 48, 64
SMALL = {
    "TurnaroundSamplePerformer": dict(frames=FRAMES, width=64, height=80),
    "TurnaroundOrbitRig": dict(views=VIEWS, width=WIDTH, height=HEIGHT),
    "KSampler": dict(steps=2),
}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@pytest.fixture(scope="module")
def stock(dev, tmp_path_factory):
    """A ComfyUI of its own, whose models are the small checkpoints."""
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not dev.venv_python().exists():
        pytest.skip("no ComfyUI here: run the tests through `python dev.py test`")
    base = tmp_path_factory.mktemp("stock")
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / folder).mkdir()
    shutil.copy(ROOT / "tests" / "small_checkpoints.py", base / "custom_nodes")
    (base / "custom_nodes" / dev.PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dev, "workspace", lambda: base)
        with dev.running_host(Path(tree)) as host:
            yield host


@pytest.fixture(scope="module")
def object_info(stock):
    return stock.get("/object_info")


@pytest.fixture(scope="module")
def workflow():
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


@pytest.fixture
def prompt(dev, workflow, object_info):
    """The workflow as the page would send it, with few small frames."""
    graph = copy.deepcopy(dev.api_graph(workflow, object_info))
    for node in graph.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "CLIPLoader":
            node["class_type"] = "SmallCLIPLoader"
    return graph


def one(prompt: dict, kind: str) -> str:
    """The number of the only node of a kind."""
    (number,) = (i for i, node in prompt.items() if node["class_type"] == kind)
    return number


def test_files_that_are_wanted_can_be_downloaded_and_chosen(workflow, object_info):
    wanted = {n["type"]: n for n in workflow["nodes"] if "models" in n["properties"]}
    assert set(wanted) == {"UNETLoader", "CLIPLoader", "VAELoader"}
    note = "".join(n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "MarkdownNote")
    for kind, node in wanted.items():
        (model,) = node["properties"]["models"]
        assert node["widgets_values"][0] == model["name"]
        assert model["url"].startswith(
            "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/"
        )
        assert model["url"].endswith(f"/{model['directory']}/{model['name']}")
        assert model["url"] in note and f"`{model['directory']}`" in note
        # The small files lie under the same names in the same folders.
        first = next(iter(object_info[kind]["input"]["required"].values()))
        assert model["name"] in first[0]


def test_workflow_names_every_widget_and_socket_of_its_nodes(workflow, object_info):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        sockets = object_info[node["type"]]["input"]
        specs = {**sockets.get("required", {}), **sockets.get("optional", {})}
        widgets = [k for k, s in specs.items() if isinstance(s[0], list) or s[0] in WIDGET_TYPES]
        named = [k for k in node["widgets_values_named"] if k != "control_after_generate"]
        assert named == widgets, node["type"]
        assert [i["name"] for i in node["inputs"] if "widget" not in i] == [
            k for k in specs if k not in widgets
        ], node["type"]


def test_workflow_runs_to_one_video_a_view_and_their_grid(stock, prompt):
    entry = stock.wait(stock.queue(prompt), seconds=300)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    videos = sorted((stock.base / "output" / "turnaround").glob("vace_*_view*.mp4"))
    assert len(videos) == VIEWS
    for video in videos:
        with av.open(str(video)) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert [f.shape for f in frames] == [(HEIGHT, WIDTH, 3)] * FRAMES
    (shown,) = entry["outputs"][one(prompt, "TurnaroundSaveViews")]["images"]
    grid = stock.base / shown["type"] / shown["subfolder"] / shown["filename"]
    with av.open(str(grid)) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == (VIEWS * WIDTH, HEIGHT)
    (listed,) = entry["outputs"][one(prompt, "PreviewAny")]["text"]
    assert [line.split(":")[0] for line in listed.splitlines()] == ["0°", "120°", "240°"]


def test_texts_of_another_rig_are_one_sentence(stock, prompt):
    rig = copy.deepcopy(prompt[one(prompt, "TurnaroundOrbitRig")])
    rig["inputs"]["views"] = 2
    prompt["other"] = rig
    prompt[one(prompt, "TurnaroundViewPrompts")]["inputs"]["rig"] = ["other", 0]
    entry = stock.wait(stock.queue(prompt), seconds=300)
    kind, error = entry["status"]["messages"][-1]
    assert kind == "execution_error"
    assert "'positive' brings 2 texts but there are 3 views" in error["exception_message"]
    assert stock.get("/system_stats")
