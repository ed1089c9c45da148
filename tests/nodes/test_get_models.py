"""Get Models: looks unless told to fetch, and fetches into the folder that ComfyUI would look into."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import save
from turnaround.models import checkpoints
from turnaround.nodes import get_models
from turnaround.nodes.get_models import GetModels, folder_for, found

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("small_hub", ROOT / "tests" / "small_hub.py")
small_hub = importlib.util.module_from_spec(spec)
sys.modules["small_hub"] = small_hub
spec.loader.exec_module(small_hub)

pytest.importorskip("huggingface_hub")
BODIES = {name: save({name: torch.arange(9000.0)}) for name in ("net", "vae")}


def checkpoint(name: str, folder: str) -> checkpoints.Checkpoint:
    sha = hashlib.sha256(BODIES[name]).hexdigest()
    size = len(BODIES[name])
    return checkpoints.Checkpoint(f"{name}.safetensors", folder, "a/b", "", size, "CC0", sha)


ROUTE = checkpoints.Route("Small", "a test", (checkpoint("net", "diffusion_models"), checkpoint("vae", "vae")))  # fmt: skip


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A ComfyUI/models of its own, with the route of two small files."""
    for kind in ("diffusion_models", "vae"):
        old = "unet" if kind == "diffusion_models" else kind
        paths = list(dict.fromkeys([str(tmp_path / old), str(tmp_path / kind)]))
        for path in paths:
            Path(path).mkdir()
        kinds = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (paths, kinds))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(checkpoints, "ROUTES", (ROUTE,))
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    with small_hub.running() as hub:
        hub.files = {f"a/b/{name}.safetensors": body for name, body in BODIES.items()}
        small_hub.place(monkeypatch, hub.url)
        yield hub


def run(download: bool) -> str:
    return GetModels.execute("Small", download).args[0]


def fetched(hub) -> list[str]:
    """Paths of files that were asked for (the library may ask the hub about itself besides)."""
    return [path for _, path, _ in hub.asked if path.endswith(".safetensors")]


def test_looking_fetches_nothing(models, hub):
    note = run(False)
    assert note.startswith("Small: 2 of 2 files missing, 0.0721 MB\n")
    assert (
        "net.safetensors: missing, 0.0361 MB, licence CC0, goes to models/diffusion_models" in note
    )
    assert hub.asked == [] and not list(models.rglob("*.safetensors"))


def test_its_switch_is_off_until_a_creator_turns_it_on():
    switch = next(i for i in GetModels.GET_SCHEMA().inputs if i.id == "download")
    assert switch.default is False
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            assert node["type"] != "TurnaroundGetModels" or True not in node["widgets_values"]


def test_fetching_brings_what_is_missing_and_nothing_else(models, hub):
    (models / "unet" / "sub").mkdir()
    (models / "unet" / "sub" / "net.safetensors").write_bytes(BODIES["net"])
    before = GetModels.fingerprint_inputs("Small", True)
    note = run(True)
    assert f"net.safetensors: there, in {models / 'unet' / 'sub'}" in note
    assert f"vae.safetensors: there, in {models / 'vae'}" in note
    assert note.startswith("Small: all files are there\n")
    assert {path.rpartition("/")[2] for path in fetched(hub)} == {"vae.safetensors"}
    assert GetModels.fingerprint_inputs("Small", True) != before
    hub.asked.clear()
    run(True)
    assert fetched(hub) == []


def test_files_go_into_the_folder_that_has_the_kind_s_name(models):
    assert folder_for("diffusion_models") == models / "diffusion_models"


def test_the_default_of_extra_model_paths_is_honoured(models, hub, tmp_path):
    other = tmp_path / "other disk" / "unet"
    folder_paths.add_model_folder_path("diffusion_models", str(other), is_default=True)
    run(True)
    assert (other / "net.safetensors").read_bytes() == BODIES["net"]
    assert found(ROUTE.checkpoints[0]) == str(other / "net.safetensors")


def test_the_pack_s_own_folder_gets_nothing(models):
    tiny = get_models.TINY / "vae"
    folder_paths.add_model_folder_path("vae", str(tiny), is_default=True)
    assert folder_for("vae") == models / "vae"


def test_an_older_comfyui_is_told_so(models):
    with pytest.raises(ValueError, match="no models of the kind 'hovering'"):
        folder_for("hovering")


def test_cancel_ends_it(models, hub):
    import comfy.model_management as mm

    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            run(True)
    finally:
        mm.interrupt_current_processing(False)
    assert not list(models.rglob("*.safetensors"))
