"""The packed pack in a ComfyUI that comfy-cli installed into a fresh workspace from a local git path."""

import importlib.util
import json
import os
import re
import shutil
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("packing", ROOT / "tests" / "packing.py")
packing = importlib.util.module_from_spec(spec)
sys.modules["packing"] = packing
spec.loader.exec_module(packing)


@pytest.fixture(scope="module")
def installed(dev, tmp_path_factory):
    """A running ComfyUI: installed by `comfy install`, its packages those of .venv."""
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not dev.venv_python().exists():
        pytest.skip("no ComfyUI here: run the tests through `python dev.py test`")
    if not packing.COMFY.exists():
        pytest.skip(packing.NONE_HERE)
    folder = tmp_path_factory.mktemp("installed")
    files = [
        str(p.relative_to(tree)) for p in Path(tree).rglob("*") if "__pycache__" not in p.parts
    ]
    (folder / "core").mkdir()
    core = packing.repository(Path(tree), folder / "core", files)
    space = folder / "space"
    packing.comfy(
        f"--workspace={space}", "install", "--url", str(core), "--version", "nightly",
        "--skip-manager", "--cpu", "--skip-torch-or-directml", "--skip-requirement",
        home=folder / "home", cwd=folder,
    )  # fmt: skip
    packed, _ = packing.pack(folder)
    target = space / "custom_nodes" / dev.PACK_FOLDER
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(target)
    for name in ("input", "output", "temp", "user", "models"):
        (space / name).mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dev, "workspace", lambda: space)
        with dev.running_host(space) as host:
            yield host
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def object_info(installed):
    return installed.get("/object_info")


def test_every_node_of_the_golden_file_is_there(installed, object_info, dev):
    ours = [x for x in installed.log_text().splitlines() if dev.PACK_FOLDER in x]
    assert ours and not [x for x in ours if "FAILED" in x or "Cannot import" in x], ours
    wanted = json.loads((ROOT / "tests" / "golden" / "nodes.json").read_text(encoding="utf-8"))
    assert [node for node in wanted if node not in object_info] == []


def test_its_own_models_are_listed(object_info):
    for node, name, file in (
        ("UNETLoader", "unet_name", "turnaround_tiny_dit.safetensors"),
        ("VAELoader", "vae_name", "turnaround_tiny_vae.safetensors"),
        ("TurnaroundLoadViewSync", "name", "turnaround_tiny_sync.safetensors"),
        ("TurnaroundLoadHumanNet", "name", "turnaround_tiny_human.safetensors"),
    ):
        assert file in str(object_info[node]["input"]["required"][name]), node


def test_help_scripts_and_templates_are_served(installed, object_info, dev):
    def read(path: str) -> bytes:
        with urllib.request.urlopen(installed.url + path, timeout=20) as answer:
            return answer.read()

    pack = dev.PACK_FOLDER
    ours = [node for node in object_info if node.startswith("Turnaround")]
    for node in ours:
        assert read(f"/extensions/{pack}/docs/{node}.md").startswith(b"# ")
    listed = [path for path in installed.get("/extensions") if f"/{pack}/" in path]
    assert listed and all(read(path) for path in listed)
    templates = installed.get("/workflow_templates")[pack]
    assert sorted(templates) == sorted(p.stem for p in (ROOT / "workflows").glob("*.json"))
    blueprints = [entry["name"] for entry in installed.get("/global_subgraphs").values()]
    assert sorted(blueprints) == sorted(p.stem for p in (ROOT / "subgraphs").glob("*.json"))


def test_chinese_words_reach_the_page(installed):
    told = installed.get("/i18n")["zh"]
    wanted = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {node: told["nodeDefs"].get(node) for node in wanted} == wanted
    assert told["nodeCategories"]["1 views"] == "1 视角"


def test_a_graph_runs(installed):
    """Nothing that was left out is needed: a performer drawn, its geometry found by the net."""
    graph = {
        "1": {"class_type": "TurnaroundSamplePerformer", "inputs": {
            "performer": "kira (unseen)", "motion": "dance_a (unseen)", "frames": 1, "width": 64,
            "height": 64, "start": 0.0, "clothes_seed": 1}},
        "2": {"class_type": "TurnaroundGetModels",
              "inputs": {"what": "Wan 2.1 VACE 1.3B", "download": False}},
        "3": {"class_type": "TurnaroundPreviewViews", "inputs": {"views": ["1", 0], "moments": 1}},
    }  # fmt: skip
    entry = installed.wait(installed.queue(graph), seconds=120)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    assert re.search(r"Turnaround: Wan 2.1 VACE 1.3B", installed.log_text())
