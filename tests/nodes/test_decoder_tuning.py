"""Tuning, saving and loading a decoder in the real ComfyUI, with Turnaround-Tiny's VAE and others."""

import copy
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.taesd.taesd import TAESD
from torch import Tensor
from turnaround.models.views import Views
from turnaround.nodes import decoder_tuning, embedded

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES, H, W = 5, 32, 48


def clip(views: int = 1, seed: int = 0) -> Views:
    """Coarse random colours, which the tiny VAE has never seen."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(views * FRAMES, 3, 8, 12, generator=generator)
    large = torch.nn.functional.interpolate(small, size=(H, W), mode="bilinear")
    return Views(large.unflatten(0, (views, FRAMES)))


@pytest.fixture(scope="module")
def vae():
    path = embedded.TINY / "vae" / "turnaround_tiny_vae.safetensors"
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch) -> Path:
    """A ComfyUI whose output/vae is among its VAE folders, as main.py sees to."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    folders, kinds = folder_paths.folder_names_and_paths["vae"]
    there = ([*folders, str(embedded.TINY / "vae"), str(tmp_path / "vae")], kinds)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae", there)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def tune(vae, views=None, steps=6, rate=3e-4, seed=0, **more):
    more = more or {"views": views or clip()}
    return decoder_tuning.TuneVAEDecoder.execute(vae, steps, rate, 64, seed, **more).args


@pytest.fixture(scope="module")
def tuned(vae):
    with torch.inference_mode():
        return tune(vae, steps=4)


def round_trip(vae, views: Views | None = None) -> tuple[Tensor, Tensor]:
    """Latents, and what is decoded of them."""
    z = vae.encode((views or clip()).frames[0].movedim(1, -1))
    return z, vae.decode(z)


def error(vae, views: Views) -> float:
    return float((round_trip(vae, views)[1][0].movedim(-1, 1) - views.frames[0]).square().mean())


def test_clip_comes_back_better(vae, tuned):
    better, loss, note = tuned
    assert error(better, clip()) < 0.9 * error(vae, clip())
    assert len(loss["loss"]) == 4 and loss["loss"][-1] < loss["loss"][0]
    assert "the clip keeps" in note and "untuned" in note


def test_encoder_and_the_vae_given_stay_as_they_are(vae):
    before = round_trip(vae)
    better = tune(vae, steps=1)[0]
    after_tuning = round_trip(vae)
    latents, pictures = round_trip(better)
    again = round_trip(vae)
    for found in (after_tuning, again):
        assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))
    assert torch.equal(latents, before[0])
    assert not torch.equal(pictures, before[1])
    assert not vae.patcher.patches
    assert not vae.first_stage_model.parallel and vae.first_stage_model.show_progress_bar


def test_only_the_decoder_is_in_the_difference(tuned):
    names = decoder_tuning.delta_of(tuned[0])
    assert names and all(name.startswith("decoder.") for name in names)


def test_same_seed_same_vae(vae):
    first, again = (tune(vae, steps=1, seed=4)[0] for _ in range(2))
    assert torch.equal(round_trip(first)[1], round_trip(again)[1])


def test_tuning_goes_on_from_a_tuned_vae(vae, tuned):
    first, again = tuned[1]["loss"], tune(tuned[0], steps=1)
    assert again[1]["loss"][0] < first[-1]
    # One of its weights: five steps of Adam reach further than one.
    both, one = (
        decoder_tuning.delta_of(v)["decoder.1.weight"] for v in (again[0], tune(vae, steps=1)[0])
    )
    assert both.norm() > 1.5 * one.norm()


def test_images_are_one_view(vae):
    images = clip().frames[0].movedim(1, -1)
    first, same = tune(vae, steps=1, images=images)[0], tune(vae, steps=1)[0]
    assert torch.equal(round_trip(first)[1], round_trip(same)[1])


def test_vaes_for_pictures_are_tuned_frame_by_frame(randomise):
    vae = comfy.sd.VAE(sd={n: 0.5 * w for n, w in randomise(TAESD(latent_channels=4), 0).items()})
    better, loss, _ = tune(vae, clip(2), steps=3, rate=1e-3)
    assert loss["loss"][-1] < loss["loss"][0]
    # Both scale and shift what the encoder makes, for decoding alone.
    plain = {"vae_scale", "vae_shift"}
    names = decoder_tuning.delta_of(better)
    assert all(n.startswith("taesd_decoder.") or n in plain for n in names)


@pytest.mark.parametrize("rank", [0, 16])
def test_file_brings_the_tuned_vae_back(vae, tuned, output, rank):
    note = decoder_tuning.SaveVAEDecoderDelta.execute(tuned[0], "vae/mine", rank).args[0]
    assert note.startswith("output/vae/mine_00001_.delta.safetensors")
    (name,) = decoder_tuning.delta_files()
    back = decoder_tuning.LoadVAEDecoderDelta.execute(vae, name, 1.0).args[0]
    plain, wanted, found = (round_trip(v)[1] for v in (vae, tuned[0], back))
    # Half precision of the change, or what its first 16 directions hold.
    assert (found - wanted).norm() < (0.01 if rank == 0 else 0.9) * (plain - wanted).norm()
    size = (output / "vae" / "mine_00001_.delta.safetensors").stat().st_size
    assert size < (20e6 if rank == 0 else 2e6)
    half = decoder_tuning.LoadVAEDecoderDelta.execute(vae, name, 0.0).args[0]
    assert torch.equal(round_trip(half)[1], plain)


def test_untuned_vae_has_nothing_to_save(vae):
    with pytest.raises(ValueError, match="'vae' is not tuned"):
        decoder_tuning.SaveVAEDecoderDelta.execute(vae, "vae/mine", 0)


def test_files_stay_in_the_output_folder(tuned):
    with pytest.raises(ValueError, match="'filename_prefix'"):
        decoder_tuning.SaveVAEDecoderDelta.execute(tuned[0], "../mine", 0)


def test_files_of_other_vaes_are_refused(vae, tuned, output, randomise):
    decoder_tuning.SaveVAEDecoderDelta.execute(tuned[0], "vae/mine", 16)
    name = "mine_00001_.delta.safetensors"
    other = comfy.sd.VAE(sd=randomise(TAESD(latent_channels=4), 0))
    with pytest.raises(ValueError, match="another kind of VAE"):
        decoder_tuning.LoadVAEDecoderDelta.execute(other, name, 1.0)
    with pytest.raises(ValueError, match="is no decoder delta"):
        decoder_tuning.LoadVAEDecoderDelta.execute(vae, "turnaround_tiny_vae.safetensors", 1.0)


def test_vae_without_decoder_is_refused(vae):
    blind = copy.copy(vae)
    blind.first_stage_model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no decoder"):
        tune(blind)


def test_too_large_crops_are_refused_before_memory_ends(vae, monkeypatch):
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 1e6)
    with pytest.raises(ValueError, match="make 'crop' smaller"):
        tune(vae)


def test_cancel_stops_at_the_next_step_and_leaves_the_vae(vae, monkeypatch):
    before, calls = round_trip(vae)[1], []

    def stop():
        calls.append(1)
        if len(calls) > 4:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(mm.InterruptProcessingException):
        tune(vae, steps=100)
    assert len(calls) == 5
    monkeypatch.undo()
    assert torch.equal(round_trip(vae)[1], before)
    assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
