"""Cuts: found where the picture changes, and only there."""

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.performer import draw_appearance, pose_performer, render_performer
from turnaround.models.shots import cuts, shots

pytestmark = pytest.mark.usefixtures("one_thread")


def texture(seed: int, size: int = 96) -> torch.Tensor:  # [3, size, size]
    """Blobs of all sizes, as natural pictures have them."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(3, size, size)
    for cells in (3, 6, 12, 24, 48):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        picture += torch.nn.functional.interpolate(noise, (size, size), mode="bicubic")[0]
    return (0.5 + 0.1 * picture).clamp(0, 1)


def panning(seed: int, frames: int = 6, step: int = 3, size: int = 72) -> torch.Tensor:
    picture = texture(seed)
    return torch.stack(
        [picture[:, f : f + size, f * step : f * step + size] for f in range(frames)]
    )


@pytest.fixture(scope="module")
def dancers():
    """Two people in their fastest motions, before plain grey: little texture, much movement."""
    clips = []
    for name, motion, seed in (("kira", "dance_a", 5), ("leo", "dance_b", 9)):
        look = draw_appearance(seed)
        posed = pose_performer(name, motion, 0.2 + torch.arange(6) / 16, look)
        rig = orbit_rig(torch.zeros(1), torch.full((1,), 0.1), 3.2, 0.6, 96, 96)
        clips.append(render_performer(posed, look, rig).frames[0])
    return clips


def test_hard_cuts_are_found():
    clip = torch.cat([panning(0), panning(1), panning(2, 3)])
    assert cuts(clip) == [6, 12]
    assert shots(clip) == [range(0, 6), range(6, 12), range(12, 15)]


def test_a_cut_between_two_dancers_before_grey_is_found_and_their_motion_is_none(dancers):
    assert cuts(torch.cat(dancers)) == [6]


def test_two_frames():
    assert cuts(panning(0, 2)) == []
    assert cuts(torch.stack([texture(0), texture(1)])) == [1]
    assert cuts(texture(0)[None]) == []


def test_a_still_clip_and_a_blank_one_have_no_cuts():
    assert cuts(texture(3).expand(5, -1, -1, -1)) == []
    assert cuts(torch.full((4, 3, 40, 56), 0.3)) == []


@pytest.mark.parametrize("length", [1, 2])
def test_flashes_are_no_cuts(length):
    clip = panning(4, 7, 1)
    clip[3 : 3 + length] = 1.0
    assert cuts(clip) == []


def test_a_spoilt_frame_is_no_cut():
    clip = panning(4, 7, 1)
    clip[3] = torch.nan
    assert cuts(clip) == []
    clip[3] = texture(9)[:, :72, :72]
    assert cuts(clip) == []


def test_light_that_changes_is_no_cut():
    clip = panning(5)
    clip[3:] *= 0.3
    assert cuts(clip) == []
    cast = torch.tensor([1.3, 0.9, 0.7])[:, None, None]
    slope = torch.linspace(0.6, 1.2, 72)
    assert cuts((panning(5) * torch.where(torch.arange(6) % 2 == 0, 1.0, 0.7).view(6, 1, 1, 1) * cast * slope).clamp(0, 1)) == []  # fmt: skip


def test_fades_are_no_cuts_but_shots_after_flicker_are():
    fade = panning(6) * torch.linspace(0.05, 1, 6).view(6, 1, 1, 1)
    assert cuts(fade) == []
    flicker = 1 + 0.3 * torch.tensor([1.0, -1, 0.5, -0.7, 1, -1, 0.3, 0.8, -1, 1, -0.2, 0.6])
    assert cuts((torch.cat([panning(7), panning(8)]) * flicker.view(12, 1, 1, 1)).clamp(0, 1)) == [
        6
    ]


def test_noise_hides_neither_shot_nor_cut(dancers):
    generator = torch.Generator().manual_seed(0)
    clip = torch.cat(dancers)
    noisy = clip + 0.06 * torch.randn(clip.shape, generator=generator)
    assert cuts(noisy.clamp(0, 1)) == [6]


def test_fast_panning_is_no_cut():
    assert cuts(panning(10, 4, 8)) == []  # a ninth of the picture a frame


def test_size_does_not_matter():
    clip = torch.cat([panning(0), panning(1)])
    large = torch.nn.functional.interpolate(clip, scale_factor=3.0, mode="bilinear")
    wide = torch.nn.functional.interpolate(clip, size=(50, 110), mode="bilinear")
    assert cuts(large) == cuts(wide) == [6]
