"""Injected faults: each does what its words say, at the strength that they say, and nothing else."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import faults  # noqa: E402  (a module beside the tests' folders)

V, COUNT, H, W = 4, 5, 60, 48
HAND = torch.tensor([30.5, 20.5])


def drawn(fault: str, frames: torch.Tensor, seed: int = 0) -> torch.Tensor:
    hand = HAND.expand(*frames.shape[:2], 2)
    return faults.FAULTS[fault](frames, hand, torch.Generator().manual_seed(seed))


@pytest.fixture
def frames():
    return torch.rand(V, COUNT, 3, H, W, generator=torch.Generator().manual_seed(1))


def grey(views: int, count: int, size: int = 4) -> torch.Tensor:
    """Far from black and white, so that nothing is cut off."""
    return torch.full((views, count, 3, size, size), 0.4)


def shifts(fault: str, seed: int = 0) -> torch.Tensor:  # [V, F, 2, H, W] pixels
    """How far a fault moves pixels: where every pixel of pictures of coordinates comes from."""
    x, y = torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy")
    plain = torch.stack([x / W, y / H, 0 * x]).expand(V, COUNT, 3, H, W)
    return (drawn(fault, plain, seed) - plain)[:, :, :2] * torch.tensor([W, H])[:, None, None]


def inner(field: torch.Tensor) -> torch.Tensor:
    """Without the border, which is repeated outwards."""
    return field[..., 8:-8, 8:-8]


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_pictures_change_but_stay_pictures(fault, frames):
    given = frames.clone()
    result = drawn(fault, frames)
    assert torch.equal(frames, given)
    assert result.shape == frames.shape
    assert result.min() >= 0 and result.max() <= 1
    assert (result - frames).abs().mean() > 1e-3


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_seed_gives_one_result(fault, frames):
    assert torch.equal(drawn(fault, frames), drawn(fault, frames))


@pytest.mark.parametrize("fault", [f for f in faults.FAULTS if f != "ghost"])
def test_another_seed_gives_another_result(fault, frames):
    assert not torch.equal(drawn(fault, frames), drawn(fault, frames, seed=5))


@pytest.mark.parametrize("fault", [f for f in faults.FAULTS if f not in ("flicker", "flash")])
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_is_left_alone(fault, seed, frames):
    # Not equal: what is shifted by nothing is still read at computed places.
    assert torch.allclose(drawn(fault, frames, seed)[0], frames[0], atol=1e-4)


def test_a_colour_cast_stays_the_same_over_time_and_differs_between_views():
    result = drawn("colour", grey(3, 4))
    assert torch.equal(result, result[:, :1, :, :1, :1].expand_as(result))
    assert (result[1, 0, :, 0, 0] - result[2, 0, :, 0, 0]).abs().min() > 1e-3


def test_a_colour_cast_is_as_strong_as_stated():
    dark, bright = (drawn("colour", grey(2000, 1, 1) + add)[1:, 0, :, 0, 0] for add in (-0.1, 0.1))
    gain = (bright - dark) / 0.2
    offset = dark - 0.3 * gain
    assert float(gain.std()) == pytest.approx(faults.GAIN, rel=0.05)
    assert float(offset.std()) == pytest.approx(faults.OFFSET, rel=0.05)


def test_flicker_is_a_brightness_a_frame_and_view():
    factors = drawn("flicker", grey(40, 50)) / 0.4
    assert torch.equal(factors, factors[:, :, :1, :1, :1].expand_as(factors))
    logs = factors[:, :, 0, 0, 0].log()
    assert float(logs.std()) == pytest.approx(faults.EXPOSURE, rel=0.05)
    # No view and no frame has a part of its own: means of n numbers spread by 1 / root n.
    assert float(logs.mean(1).std()) == pytest.approx(faults.EXPOSURE / 50**0.5, rel=0.4)
    assert float(logs.mean(0).std()) == pytest.approx(faults.EXPOSURE / 40**0.5, rel=0.4)


def test_a_flash_is_the_same_in_all_views():
    factors = drawn("flash", grey(3, 2000, 1)) / 0.4
    assert torch.equal(factors, factors[:1].expand_as(factors))
    assert float(factors[0, :, 0].log().std()) == pytest.approx(faults.EXPOSURE, rel=0.05)


def test_jitter_moves_whole_frames_each_by_itself():
    moved = inner(shifts("jitter"))
    one = moved[..., :1, :1]
    assert (moved - one).abs().max() < 1e-3
    # Neighbouring frames of a view, and views of a frame, are moved differently.
    assert (one[1:, 1:] - one[1:, :-1]).abs().mean() > 0.1
    assert (one[1:-1] - one[2:]).abs().mean() > 0.1


def test_jitter_is_as_strong_as_stated():
    # At the usual width: of a fraction of a pixel, cubic interpolation moves a ramp a little more.
    ramp = ((torch.arange(192) + 0.5) / 192).expand(40, 30, 3, 2, 192)
    shift = 192 * (drawn("jitter", ramp) - ramp)[1:, :, 0, 1, 96]
    assert float(shift.std()) == pytest.approx(faults.SHIFT * 192, rel=0.05)


def test_wobble_bends_by_the_stated_mean():
    bent = shifts("wobble")[1:]
    assert float(inner(bent).square().mean().sqrt()) == pytest.approx(faults.WOBBLE * W, rel=0.1)
    # It is no shift of the whole picture, and every frame is bent in a way of its own.
    assert float(inner(bent).std((-2, -1)).mean()) > 0.8 * faults.WOBBLE * W
    assert float((bent[:, 1:] - bent[:, :-1]).std()) > 1.2 * faults.WOBBLE * W


@pytest.mark.parametrize("seed", range(3))
def test_a_limb_is_moved_in_one_view_around_the_hand(seed):
    far = shifts("limb", seed).norm(dim=2)
    views = (far.amax((1, 2, 3)) > 0.1).nonzero()[:, 0].tolist()
    assert len(views) == 1
    moved = far[views[0]]
    x, y = HAND.long().tolist()
    assert float(moved[0, y, x]) == pytest.approx(faults.LIMB * W, rel=0.02)
    # Four reaches off, e^-8 of it is left; all frames alike.
    assert float(moved[0, y, x - int(4 * faults.REACH * W)]) < 0.01
    assert (moved - moved[:1]).abs().max() < 1e-4


def test_a_ghost_shows_the_frame_before(frames):
    result = drawn("ghost", frames)
    assert torch.equal(result[:, ::2], frames[:, ::2])
    expected = (1 - faults.GHOST) * frames[1:, 1::2] + faults.GHOST * frames[1:, :-1:2]
    assert torch.allclose(result[1:, 1::2], expected, atol=1e-6)


def test_blotches_cover_one_view_and_change_over_time():
    away = drawn("blotches", torch.full((V, COUNT, 3, H, W), 0.5)) - 0.5
    views = (away.abs().amax((1, 2, 3, 4)) > 0).nonzero()[:, 0].tolist()
    assert len(views) == 1
    blotches = away[views[0]]
    assert float(blotches.square().mean().sqrt()) == pytest.approx(faults.BLOTCH, rel=0.02)
    # Neighbouring pixels are alike, neighbouring frames are not.
    assert float((blotches[..., 1:] - blotches[..., :-1]).std()) < 0.4 * faults.BLOTCH
    assert float((blotches[1:] - blotches[:-1]).std()) > 1.2 * faults.BLOTCH
