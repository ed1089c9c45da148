"""Implicit Video Fit and Render Implicit Video in the real ComfyUI."""

from types import SimpleNamespace

import comfy.model_management as mm
import comfy.utils
import pytest
import torch
from turnaround.models.implicit_fit import Settings
from turnaround.models.views import Views
from turnaround.nodes import implicit
from turnaround.nodes.implicit import (
    ImplicitVideoFit,
    RenderImplicitVideo,
    settings_of,
    size_of,
    times_of,
    working_size,
)  # fmt: skip

F, H, W = 6, 40, 48

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(ImplicitVideoFit, "hidden", SimpleNamespace(unique_id="1"))


@pytest.fixture(scope="module")
def clip():
    """[F, H, W, 3] a still pattern, every frame of another exposure."""
    rough = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(3))
    picture = torch.nn.functional.interpolate(rough, (H, W), mode="bicubic")[0].clamp(0, 1)
    gains = torch.tensor([1.0, 0.8, 1.1, 0.9, 1.05, 0.85]).view(F, 1, 1, 1)
    return (0.1 + 0.7 * picture.movedim(0, -1) * gains).clamp(0, 1)


def fitted(images, **changes):
    """(images, views, canonical, deformation, residual, implicit, loss, note)"""
    given = dict(preset="fast", steps=3, flow_weight=1.0, strength=1.0, resolution=640, seed=0)
    return ImplicitVideoFit.execute(images, **{**given, **changes}).args


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


def brightness(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


def test_flickering_exposure_comes_out_steady_and_what_went_in_is_unchanged(clip):
    assert torch.is_inference_mode_enabled()
    before = clip.clone()
    images, views, canonical, deformation, residual, video, loss, note = fitted(clip)
    assert torch.equal(clip, before)
    assert images.shape == clip.shape and torch.equal(views.frames[0].movedim(1, -1), images)
    assert brightness(images).std() < 0.15 * brightness(clip).std()
    assert residual.shape == clip.shape and deformation.shape == clip.shape
    assert canonical.shape[-1] == 3 and canonical.shape[2] == round(1.6 * W)
    assert len(loss["loss"]) == 3 and "3 steps" in note
    for shown in (images, canonical, deformation, residual):
        assert shown.isfinite().all() and shown.min() >= 0 and shown.max() <= 1
    assert video.get_ram_usage() > 0


def test_no_strength_gives_the_clip_back(clip):
    # 1 / 255: the detail is kept in half precision and casts are divided out and back.
    assert (fitted(clip, strength=0.0)[0] - clip).abs().amax() < 1 / 255


def test_the_same_seed_gives_the_same_pictures(clip):
    assert torch.equal(fitted(clip, seed=5)[0], fitted(clip, seed=5)[0])
    assert fitted(clip, seed=5)[6] != fitted(clip, seed=6)[6]


def test_paper_preset_fits_from_scratch(clip, monkeypatch):
    small = Settings(
        canonical=implicit.FAST.canonical, deformation=implicit.FAST.deformation, steps=4, patch=0,
        squared=True, anneal=(0.4, 0.8), known=False, stride=0,
    )  # fmt: skip
    monkeypatch.setitem(implicit.PRESETS, "paper", small)
    images, *_, loss, note = fitted(clip, preset="paper", steps=0)
    assert images.shape == clip.shape and images.isfinite().all() and len(loss["loss"]) == 4


def test_views_with_masks_keep_their_masks_and_rate(clip):
    masks = torch.zeros(2, F, H, W)
    masks[..., 10:30, 10:30] = 1
    views = Views(clip.movedim(-1, 1).expand(2, -1, -1, -1, -1), masks, None, 24.0)
    images, out, *_, video, loss, note = fitted(views)
    assert len(images) == 2 * F and out.fps == 24.0 and out.masks is views.masks
    assert len(video.pieces[0][0].layers) == 2


def test_a_large_clip_is_fitted_smaller_and_keeps_its_size(clip):
    images, *_, video, _, note = fitted(clip, resolution=32)
    assert images.shape == clip.shape and video.size == (32, 27) and "32x27" in note
    assert brightness(images).std() < 0.2 * brightness(clip).std()


def test_two_frames_a_still_clip_and_a_single_frame_pass(clip):
    for part in (clip[:2], clip[:1].expand(4, -1, -1, -1), clip[:1]):
        images = fitted(part)[0]
        assert images.shape == part.shape and images.isfinite().all()
    still = clip[:1].expand(4, -1, -1, -1)
    assert (fitted(still)[0] - still).abs().amax() < 2 / 255


def test_cuts_are_named(clip):
    other = torch.rand(H // 8, W // 8, 3, generator=torch.Generator().manual_seed(8))
    other = other.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(F, -1, -1, -1)
    both = torch.cat([clip, other])
    images, *_, note = fitted(both)
    assert "2 shots, cut at frame 6" in note
    assert (images[F:] - other).abs().mean() < 0.02, "nothing of the first shot is in the second"


def test_what_does_not_belong_to_the_clip_is_said(clip):
    from turnaround.models.flow import optical_flow

    flow = optical_flow(clip[:4].movedim(-1, 1)[None])
    text = refusal(lambda: fitted(clip, flow=flow))
    assert "'flow'" in text and "4 frames" in text
    text = refusal(lambda: fitted(clip, mask=torch.zeros(3, H, W)))
    assert "'mask' has 3 masks" in text
    colour = Views(clip.movedim(-1, 1)[None])
    assert "not metres" in refusal(lambda: fitted(clip, depth=colour))
    assert "16 pixels" in refusal(lambda: fitted(clip[:, :10]))
    bad = clip.clone()
    bad[2, 0, 0, 0] = torch.nan
    assert "[2]" in refusal(lambda: fitted(bad))


def test_masks_of_another_size_are_scaled(clip):
    mask = torch.zeros(F, H // 2, W // 2)
    mask[:, 5:15, 5:15] = 1
    images, *_, video, _, note = fitted(clip, mask=mask)
    assert len(video.pieces[0][0].layers) == 2 and "'mask'" in note


def test_rendering_at_half_speed_passes_through_the_frames(clip):
    video = fitted(clip)[5]
    shown, views = RenderImplicitVideo.execute(video, 0.5, 0, 0, 0, "smooth").args
    own, _ = RenderImplicitVideo.execute(video, 1.0, 0, 0, 0, "smooth").args
    assert shown.shape == (2 * F - 1, H, W, 3) and torch.equal(shown[::2], own)
    large, _ = RenderImplicitVideo.execute(video, 1.0, 3, 2 * W, 0, "as it was").args
    assert large.shape == (3, 2 * H, 2 * W, 3) and large.isfinite().all()


def test_times_and_sizes():
    assert times_of(5, 1.0, 0) == [0, 1, 2, 3, 4] and times_of(5, 2.0, 0) == [0, 2, 4]
    assert len(times_of(3, 0.1, 0)) == 21 and times_of(5, 1.0, 3) == [0, 2, 4]
    assert times_of(1, 0.5, 0) == [0.0] and times_of(5, 1.0, 1) == [0.0]
    assert size_of((40, 30), 0, 0) == (40, 30) and size_of((40, 30), 80, 0) == (80, 60)
    assert size_of((40, 30), 0, 15) == (20, 15) and size_of((40, 30), 7, 9) == (7, 9)
    assert working_size(1000, 500, 200) == (200, 100) and working_size(50, 40, 200) == (50, 40)
    assert settings_of("paper", 0, 0.5, 1.0).flow == 0.5
    assert settings_of("paper", 0, 0.5, 1.0).steps == 10_000


def test_progress_shows_pictures_and_reaches_its_end(clip, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *a, **k: seen.append(a))
    video = fitted(clip)[5]
    assert seen[-1][0] == seen[-1][1] and any(a[2] is not None for a in seen)
    RenderImplicitVideo.execute(video, 1.0, 0, 0, 0, "smooth")
    assert seen[-1][0] == seen[-1][1] == F


def test_the_cancel_button_is_obeyed(clip):
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            fitted(clip)
    finally:
        mm.interrupt_current_processing(False)
