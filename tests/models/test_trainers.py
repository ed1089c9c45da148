"""Each trainer's command from scenes on disk to the file that ComfyUI loads, in a few tiny steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from turnaround.models.tiny import train_dit, train_vae
from turnaround.models.tiny.autoencoder import TinyVAE
from turnaround.models.tiny.multi_view_dit import MultiViewDiT
from turnaround.models.tiny.render_scenes import render_scene
from turnaround.models.tiny.scenes import save_scene

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for seed in range(2):
        scene = render_scene(seed, "train", views=3, frames=9, width=32, height=48)
        save_scene(folder / f"{seed}.npz", scene)
    return folder


@pytest.fixture
def run(monkeypatch, data):
    def of(module, *options) -> None:
        common = ("--data", data, "--threads", 1, "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["train", *map(str, (*common, *options))])
        module.main()

    return of


def test_vae_trains_its_decoder_and_keeps_its_encoder(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "START_CLIPS", (8, 4))
    out = tmp_path / "vae.safetensors"
    options = ("--folder", tmp_path, "--size", 16, "--batch", 1, "--frames", 5)
    run(train_vae, *options, "--steps", 2, "--export", out)
    start, trained = load_file(tmp_path / "start.safetensors"), load_file(out)
    # float16 would be taken for a VAE of another family.
    assert {t.dtype for t in trained.values()} == {torch.bfloat16}
    same = {k for k in start if torch.equal(start[k].bfloat16(), trained[k])}
    assert {k for k in start if k.startswith("encoder.")} <= same
    assert any(k.startswith("decoder.") for k in start.keys() - same)
    assert list((tmp_path / "pictures").glob("*.png"))


def test_dit_trains_then_its_sync_layers_with_what_works_on_the_same_tokens(run, tmp_path):
    pytest.importorskip("diffusers")
    vae, whole, native, sync = (tmp_path / f"{n}.safetensors" for n in ("v", "w", "d", "s"))
    torch.manual_seed(0)
    save_file(TinyVAE().state_dict(), vae)
    common = ("--vae", vae, "--batch", 1, "--views", 2, "--steps", 2, "--whole", whole)
    run(train_dit, *common, "--folder", tmp_path / "dit", "--export", native)
    before = load_file(whole)
    assert not before["sync.blocks.0.projector.weight"].any()  # untouched so far
    options = ("--sync", "--start", whole, "--folder", tmp_path / "sync", "--export-sync", sync)
    run(train_dit, *common, *options)
    after = load_file(whole)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {"sync.blocks.7.projector.weight", "dit.blocks.7.attn1.to_q.weight"} <= changed
    rests = ("sync.references", "text_embedder", "attn2", "proj_out")
    assert not [k for k in changed if any(part in k for part in rests)]
    assert "blocks.7.self_attn.q.weight" in load_file(native)
    assert {"blocks.7.q.weight", "references.7.weight"} <= load_file(sync).keys()


def test_sync_layers_start_as_copies_of_self_attention_and_change_nothing():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = MultiViewDiT().eval()
    torch.nn.init.normal_(model.dit.proj_out.weight, std=0.02)
    model.start_sync()
    x, sigma = torch.randn(3, 48, 1, 4, 4), torch.tensor([0.0, 0.5, 0.5])
    with torch.no_grad():
        alone = model(x, sigma, 3, with_reference=True, synced=False)
        together = model(x, sigma, 3, with_reference=True, synced=True)
    assert alone.std() > 0.01
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    block, layer = model.dit.blocks[3], model.sync.blocks["3"]
    assert torch.equal(layer.k.weight, block.attn1.to_k.weight)
    assert torch.equal(layer.modulation, block.scale_shift_table[:, :3])


def test_command_lists_the_trainers_and_runs_one():
    def command(*arguments: str):
        call = [sys.executable, str(ROOT / "models" / "tiny"), *arguments]
        return subprocess.run(call, capture_output=True, text=True)

    assert "Usage: python models/tiny {scenes,vae,dit,people,human}" in command().stderr
    assert "--first-seed" in command("scenes", "--help").stdout
