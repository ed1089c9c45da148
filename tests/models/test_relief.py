"""Guessed relief and guessed mask: shapes whose answer is known."""

import sys

import pytest
import torch
from turnaround.models.relief import (
    inflate,
    mask_from_plain_background,
    person_scale,
    relief_depth,
)

HEIGHT = 1.7


def disc(radius=30, size=81):
    y, x = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
    return (x * x + y * y < radius * radius).float()[None]


def test_long_limb_becomes_a_half_cylinder():
    masks = torch.zeros(1, 61, 201)
    masks[:, 20:41, 4:197] = 1
    across = inflate(masks)[0, 20:41, 100]
    # 10.5 px of half-width; the border's zero lies in the pixel after it, so a little fuller.
    true = (10.5**2 - torch.arange(-10, 11).float() ** 2).sqrt()
    assert (across - true).abs().max() < 1.8
    # Forty sweeps leave less than a pixel of slant.
    assert 9 <= across.argmax() <= 11


def test_disc_becomes_a_dome_of_seven_tenths_of_its_radius():
    assert abs(float(inflate(disc())[0, 40, 40]) / 30 - 0.5**0.5) < 0.05


def test_relief_is_nearest_in_the_middle_and_zero_outside():
    masks = disc()
    depth = relief_depth(masks, 100.0, HEIGHT)[0]
    inside = masks[0] > 0.5
    assert (depth[~inside] == 0).all()
    # Forty sweeps leave a few millimetres of slant.
    assert depth[40, 40] <= depth[inside].min() + 0.005
    # Never thicker than the limit, 12 percent of the height.
    assert depth[inside].max() - depth[inside].min() < 0.121 * HEIGHT


def test_performer_of_known_height_stands_at_the_pinhole_distance():
    masks = disc(30)
    rows = int((masks[0] > 0.5).any(-1).sum())
    depth = relief_depth(masks, 100.0, HEIGHT)
    # Half a pixel inside its rim the dome is sqrt(30² - 29.5²) / sqrt(2) = 3.9 pixels high, 0.11 m.
    assert abs(float(depth[masks > 0.5].max()) - 100.0 * HEIGHT / rows) < 0.12


def test_relief_is_smooth_over_time():
    masks = disc(14, 41).repeat(3, 1, 1)
    masks[1] = disc(8, 41)
    middle = relief_depth(masks, 100.0, HEIGHT)[:, 20, 20]
    steady = relief_depth(masks[:1].repeat(3, 1, 1), 100.0, HEIGHT)[1, 20, 20]
    # The same small disc three times, with the first frame's scale: no neighbour to follow.
    small = torch.cat([masks[:1], masks[1:2].repeat(3, 1, 1)])
    alone = relief_depth(small, 100.0, HEIGHT)[2, 20, 20]
    # The odd frame is drawn from its own thin relief towards its thick neighbours.
    assert steady < middle[1] < alone


def test_black_masks_are_refused():
    with pytest.raises(ValueError, match="black in every frame"):
        person_scale(torch.zeros(2, 8, 8), HEIGHT)


def test_mask_of_a_shape_on_a_plain_backdrop_is_found():
    masks = disc(20, 64 + 1)
    frames = torch.where(masks[:, None] > 0.5, 0.8, torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1))
    generator = torch.Generator().manual_seed(0)
    frames = (frames + 0.02 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    found = mask_from_plain_background(frames) > 0.5
    true = masks > 0.5
    assert (found & true).sum() / (found | true).sum() > 0.95


def test_only_the_largest_thing_is_kept():
    frames = torch.full((1, 3, 64, 64), 0.5)
    frames[:, :, 20:50, 20:45] = 0.9
    frames[:, :, 5:12, 52:60] = 0.9
    found = mask_from_plain_background(frames)[0]
    assert found[35, 32] == 1 and found[8, 56] == 0


def test_plain_picture_has_an_empty_mask():
    assert mask_from_plain_background(torch.full((2, 3, 32, 32), 0.4)).sum() == 0


def test_without_opencv_a_mask_cannot_be_guessed_and_the_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="connect a 'mask', or install opencv-python"):
        mask_from_plain_background(torch.rand(1, 3, 16, 16))
