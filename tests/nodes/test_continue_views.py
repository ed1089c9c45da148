"""Finished views fed back into ComfyUI's own samplers."""

import math

import comfy.sd
import comfy.utils
import pytest
import torch
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views
from turnaround.nodes import embedded, patch, views
from turnaround.nodes.continue_views import ContinueViews, JoinViews

import nodes as core

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def ring(*degrees: float, width: int = 48, height: int = 32):
    azimuths = torch.tensor(degrees) * math.pi / 180
    return orbit_rig(azimuths, torch.zeros(len(degrees)), 3.0, 0.6, width, height)


@pytest.fixture(scope="module")
def vae():
    path = embedded.TINY / "vae" / "turnaround_tiny_vae.safetensors"
    with torch.inference_mode():
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def latent(views: int, frames: int) -> dict:
    return {"samples": torch.zeros(views, 16, frames, 4, 6), "batch_index": list(range(views))}


def finished(views=(0.0, 180.0), frames=5, rig=True, seed=1) -> Views:
    pictures = draw(len(views), frames, 3, 32, 48, seed=seed)
    return Views(pictures, None, ring(*views) if rig else None)


def sample(model, given: dict, cfg=1.0) -> Tensor:
    shape = given["samples"].shape
    conditions = {"concat_latent_image": draw(shape[0], 32, *shape[2:], seed=4)}
    text = [[draw(1, 4, 4096, seed=5), conditions]]
    return core.common_ksampler(model, 3, 2, cfg, "euler", "simple", text, text, given)[0][
        "samples"
    ]


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


def test_finished_views_are_kept_and_seen_by_the_new_ones(wan, sync, vae):
    old, rig = finished(), ring(0, 90, 180)
    given, reference, note = ContinueViews.execute(
        latent(3, 2), vae, old, "more views", 5, rig
    ).args
    assert note == "2 of 3 views are known: 0°, 180°"
    known = views.EncodeViews.execute(old, vae).args[0]["samples"]
    assert torch.equal(reference["samples"], known)
    model = patch.apply_view_sync(wan, sync)
    result = sample(model, given)
    torch.testing.assert_close(result[[0, 2]], known, atol=1e-4, rtol=1e-4)
    others = ContinueViews.execute(latent(3, 2), vae, finished(seed=2), "more views", 5, rig).args[
        0
    ]
    assert (sample(model, others)[1] - result[1]).abs().max() > 1e-2
    # Without view sync the new view knows nothing of them.
    torch.testing.assert_close(sample(wan, others)[1], sample(wan, given)[1], atol=1e-5, rtol=1e-5)


def test_last_frames_lead_into_the_next_clip(wan, sync, vae):
    old = finished((0.0, 90.0), frames=9, rig=False)
    given, reference, note = ContinueViews.execute(latent(2, 4), vae, old, "longer", 5).args
    assert note.startswith("the last 5 frames of 2 views lead into the new clip: 1 of its 4")
    assert reference is None
    end = views.EncodeViews.execute(Views(old.frames[:, -5:]), vae).args[0]["samples"]
    result = sample(patch.apply_view_sync(wan, sync), given, cfg=2.0)
    torch.testing.assert_close(result[:, :, :1], end[:, :, :1], atol=1e-4, rtol=1e-4)
    assert (result[:, :, 1:]).abs().amin() > 0


def test_what_the_vae_packs_with_later_pictures_is_left_to_the_sampler(vae):
    """Turnaround-Tiny's VAE packs pictures 0 to 3, then 4 to 7: of five, the last is still open. Kept,
    its latent frame would show pictures 5 to 7 standing still."""
    walk = Views(draw(1, 13, 3, 32, 48, seed=3), None)
    whole = views.EncodeViews.execute(walk, vae).args[0]["samples"]
    for overlap, known in ((5, 1), (9, 2)):
        part = Views(walk.frames[:, :overlap], None)
        given, *_ = ContinueViews.execute(latent(1, 4), vae, part, "longer", overlap).args
        assert given["noise_mask"][0, 0, :, 0, 0].tolist() == [0] * known + [1] * (4 - known)
        # What is kept is what the whole clip would have there.
        torch.testing.assert_close(
            given["samples"][:, :, :known], whole[:, :, :known], atol=1e-4, rtol=1e-3
        )


def test_overlap_that_fills_no_latent_frame_is_rounded_and_said(vae):
    old = finished((0.0, 90.0), frames=8, rig=False)
    given, _, note = ContinueViews.execute(latent(2, 3), vae, old, "longer", 9).args
    assert "last 5 frames" in note and "(9 were asked for)" in note
    assert given["noise_mask"][0, 0, :, 0, 0].tolist() == [0, 1, 1]


def test_what_does_not_fit_is_refused_with_both_numbers(vae):
    def more(old=None, rig=None, views_of_latent=3, frames=2) -> str:
        old = old if old is not None else finished()
        given = latent(views_of_latent, frames)
        return refusal(lambda: ContinueViews.execute(given, vae, old, "more views", 5, rig))

    rig = ring(0, 90, 180)
    assert "'rig' is not connected" in more()
    assert "cameras of 'finished' are not connected" in more(finished(rig=False), rig)
    assert "3 cameras but the latent 4 views" in more(rig=rig, views_of_latent=4)
    assert "1 of 2 finished views (180°)" in more(rig=ring(0, 90, 170))
    assert "2 latent frames of 6x4" in more(rig=rig, frames=3)
    assert "2 finished views stand at 1 cameras" in more(finished((0.0, 0.0)), rig)

    def longer(old: Views, overlap=5, views_of_latent=2, frames=4) -> str:
        given = latent(views_of_latent, frames)
        return refusal(lambda: ContinueViews.execute(given, vae, old, "longer", overlap))

    assert "'finished' has 2 views but the latent 3" in longer(finished(), views_of_latent=3)
    assert "overlap of 5 frames fills 2 latent frames" in longer(finished(), frames=2)
    assert "overlap of 1 frames is too short" in longer(finished(frames=4))
    wide = Views(draw(2, 5, 3, 32, 64))
    assert "2 latent frames of 8x4 in 16 channels, but the latent has 4 of 6x4" in longer(wide)
    still = {"samples": torch.zeros(2, 4, 4, 6)}
    said = refusal(lambda: ContinueViews.execute(still, vae, finished(), "longer", 5))
    assert "'latent' holds pictures" in said


def test_two_clips_become_one():
    old, new = Views(draw(2, 9, 3, 16, 16)), Views(draw(2, 13, 3, 16, 16, seed=1))
    joined = JoinViews.execute(old, new, 5).args[0]
    assert joined.frames.shape == (2, 17, 3, 16, 16)
    assert torch.equal(joined.frames[:, :4], old.frames[:, :4])
    assert torch.equal(joined.frames[:, 9:], new.frames[:, 5:])
