"""Injected flicker: each kind does what its words say, at the stated strength, anew in every frame."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_faults  # noqa: E402  (a module beside the tests' folders)
import faults  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, H, W = 6, 60, 48


def grey(count: int = COUNT, value: float = 0.5, height: int = H, width: int = W) -> torch.Tensor:
    """Far from black and white, so that nothing is cut off."""
    return torch.full((count, 3, height, width), value)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.fixture
def frames():
    return torch.rand(COUNT, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fault", clip_faults.FAULTS)
def test_pictures_change_but_stay_pictures(fault, frames):
    given = frames.clone()
    result = clip_faults.flickering(frames, fault, 0)
    assert torch.equal(frames, given)
    assert result.shape == frames.shape and result.dtype == frames.dtype
    assert result.min() >= 0 and result.max() <= 1
    assert (result - frames).abs().mean((1, 2, 3)).min() > 1e-3  # no frame is spared


@pytest.mark.parametrize("fault", clip_faults.FAULTS)
def test_a_seed_gives_one_result_and_another_another(fault, frames):
    first = clip_faults.flickering(frames, fault, 0)
    assert torch.equal(first, clip_faults.flickering(frames, fault, 0))
    assert not torch.equal(first, clip_faults.flickering(frames, fault, 1))


@pytest.mark.parametrize("fault", clip_faults.FAULTS)
def test_every_frame_of_a_still_clip_is_spoiled_by_itself(fault, frames):
    still = frames[:1].expand(COUNT, -1, -1, -1)
    away = clip_faults.flickering(still, fault, 0) - still
    # Independent errors differ by root 2 of what each is; lasting ones would not differ.
    assert rms(away[1:] - away[:-1]) > 1.1 * rms(away)


def test_exposure_is_one_factor_a_frame():
    factors = clip_faults.flickering(grey(500, 0.4, 4, 4), "exposure", 0) / 0.4
    assert torch.equal(factors, factors[:, :1, :1, :1].expand_as(factors))
    assert float(factors[:, 0, 0, 0].log().std()) == pytest.approx(faults.EXPOSURE, rel=0.1)


def test_a_colour_cast_is_as_strong_as_stated_and_slow_over_the_picture():
    dark, bright = (clip_faults.flickering(grey(40, v), "colour", 0) for v in (0.4, 0.6))
    gain = (bright - dark) / 0.2
    offset = dark - 0.4 * gain
    assert rms(gain - 1) == pytest.approx(clip_faults.GAIN, rel=0.05)
    assert rms(offset) == pytest.approx(clip_faults.OFFSET, rel=0.05)
    # Channels differ; neighbouring pixels hardly do; the two sides of a picture do.
    assert rms(gain[:, 0] - gain[:, 1]) > clip_faults.GAIN
    assert rms(gain[..., 1:] - gain[..., :-1]) < 0.15 * clip_faults.GAIN
    assert rms(gain[..., -1] - gain[..., 0]) > clip_faults.GAIN


def test_texture_is_grain_and_blotches_of_the_stated_strength():
    away = clip_faults.flickering(grey(), "texture", 0) - 0.5
    both = (clip_faults.GRAIN**2 + clip_faults.BLOTCH**2) ** 0.5
    assert rms(away) == pytest.approx(both, rel=0.03)
    # A mean of 3 x 3 leaves most of the blotches and a third of the grain.
    smooth = F.avg_pool2d(away, 3, 1)
    assert 0.6 * clip_faults.BLOTCH < rms(smooth) < clip_faults.BLOTCH
    # Channels share a part of it.
    shared = (away[:, 0] * away[:, 1]).mean() / away.square().mean()
    assert float(shared) == pytest.approx(1 - clip_faults.TINTED, abs=0.05)
    # Wider than blotches, nothing is alike.
    far = away[..., 3 * clip_faults.BLOTCH_PIXELS :]
    alike = (far * away[..., : far.shape[-1]]).mean() / away.square().mean()
    assert abs(float(alike)) < 0.05


def test_wobble_shows_the_bent_place():
    x, y = torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy")
    plain = torch.stack([x / W, y / H, 0 * x]).expand(COUNT, -1, -1, -1)
    away = (clip_faults.flickering(plain, "wobble", 3) - plain)[:, :2]
    bent = clip_faults.bends(plain, torch.Generator().manual_seed(3))
    inner = (..., slice(4, -4), slice(4, -4))  # the border is repeated outwards
    size = torch.tensor([W, H])[:, None, None]
    # Cubic interpolation moves a ramp by up to 0.06 pixels more or less.
    assert (away * size - bent)[inner].abs().max() < 0.08
    assert rms(bent) == pytest.approx(clip_faults.WOBBLE * W, rel=0.01)


def test_bends_are_smooth_but_no_shift_of_the_whole_picture():
    wide = grey(4, height=240, width=192)
    bent = clip_faults.bends(wide, torch.Generator().manual_seed(0))
    assert rms(bent) == pytest.approx(1.0, rel=0.01)  # a pixel at the usual width
    assert rms(bent[..., 1:] - bent[..., :-1]) < 0.2
    assert rms(bent.mean((-2, -1))) < 0.3


def test_all_together_is_worse_than_each(frames):
    error = {f: rms(clip_faults.flickering(frames, f, 0) - frames) for f in clip_faults.FAULTS}
    assert max(error, key=error.get) == "together"
