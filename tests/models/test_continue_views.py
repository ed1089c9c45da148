"""Which cameras are the same, what is known of new latents, how clips join."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.continue_views import (
    joined_in_time,
    overlap_pictures,
    same_cameras,
    settled_frames,
    with_known_start,
    with_known_views,
)
from turnaround.models.views import Views


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def ring(*degrees: float, distance: float = 3.0):
    azimuths = torch.tensor(degrees) * math.pi / 180
    return orbit_rig(azimuths, torch.zeros(len(degrees)), distance, 0.6, 32, 48)


def test_cameras_are_found_by_where_they_stand_in_any_order():
    wanted = ring(0, 45, 90, 135, 180, 225, 270, 315)
    assert same_cameras(ring(270, 0, 90), wanted) == [6, 0, 2]


def test_cameras_elsewhere_or_turned_away_are_not_the_same():
    wanted = ring(0, 90)
    assert same_cameras(ring(0, 3, 180), wanted) == [0, None, None]
    assert same_cameras(ring(0, distance=3.3), wanted) == [None]
    # On the spot, but looking three degrees aside.
    turned = ring(0)
    a = math.radians(3)
    aside = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    turned.T_camera_world[:, :3] = aside @ turned.T_camera_world[:, :3]
    assert same_cameras(turned, wanted) == [None]


def test_picture_size_and_lens_do_not_make_another_camera():
    assert same_cameras(ring(90).resized(64, 96), ring(0, 90)) == [1]


def test_known_views_are_kept_whole_and_the_others_made():
    empty, finished = torch.zeros(4, 16, 2, 3, 3), draw(2, 16, 2, 3, 3)
    samples, mask = with_known_views(empty, finished, [3, 1])
    assert torch.equal(samples[[3, 1]], finished) and samples[[0, 2]].abs().max() == 0
    assert mask.shape == (4, 1, 2, 3, 3)
    assert mask.flatten(1).mean(1).tolist() == [1, 0, 1, 0]
    assert empty.abs().max() == 0  # the creator's latent stays as it was


def test_latent_frames_that_later_pictures_change_are_not_settled():
    alone = draw(1, 16, 3, 4, 4)
    later = torch.cat([alone, draw(1, 16, 1, 4, 4, seed=1)], 2)
    assert settled_frames(alone, later) == 3
    rounded = later + 1e-3 * draw(1, 16, 4, 4, 4, seed=2)  # half precision
    assert settled_frames(alone, rounded) == 3
    open_end, open_middle = later.clone(), later.clone()
    open_end[0, 5, 2, 1, 1] += 0.5
    open_middle[0, 5, 1, 1, 1] -= 0.5
    assert settled_frames(alone, open_end) == 2
    assert settled_frames(alone, open_middle) == 1
    assert settled_frames(alone, torch.roll(later, 1, 2)) == 0


def test_known_start_is_kept_in_every_view():
    empty, start = torch.zeros(3, 16, 4, 2, 2), draw(3, 16, 2, 2, 2)
    samples, mask = with_known_start(empty, start)
    assert torch.equal(samples[:, :, :2], start) and samples[:, :, 2:].abs().max() == 0
    assert mask[:, 0, :, 0, 0].tolist() == 3 * [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("wanted", "available", "taken"),
    [(5, 13, 5), (6, 13, 5), (7, 13, 9), (9, 7, 5), (5, 3, 1), (1, 1, 1), (5, 5, 5)],
)
def test_overlap_is_the_nearest_that_fills_latent_frames(wanted, available, taken):
    assert overlap_pictures(wanted, available) == taken


def test_joined_clip_fades_over_the_overlap():
    """From brightness 0 to 1 over three shared frames: quarters."""
    dark, bright = Views(torch.zeros(2, 5, 3, 4, 4)), Views(torch.ones(2, 6, 3, 4, 4))
    joined = joined_in_time(dark, bright, 3)
    assert joined.frames.shape == (2, 8, 3, 4, 4)
    brightness = joined.frames.mean((0, 2, 3, 4))
    assert brightness.tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_clips_that_agree_where_they_overlap_join_as_they_were():
    whole = draw(2, 9, 3, 4, 4)
    masks = draw(2, 9, 4, 4) > 0.5
    first, second = (
        Views(whole[:, part], masks[:, part], fps=12.0) for part in (slice(0, 6), slice(3, 9))
    )
    joined = joined_in_time(first, second, 3)
    torch.testing.assert_close(joined.frames, whole)
    assert torch.equal(joined.masks, masks) and joined.fps == 12.0
    appended = joined_in_time(Views(whole[:, :6]), Views(whole[:, 6:]), 0)
    assert torch.equal(appended.frames, whole) and appended.masks is None


@pytest.mark.parametrize(
    ("second", "overlap", "said"),
    [
        ((3, 5, 3, 4, 4), 2, "2 views of 4x4 but 'second' 3 of 4x4"),
        ((2, 5, 3, 8, 4), 2, "2 views of 4x4 but 'second' 2 of 4x8"),
        ((2, 4, 3, 4, 4), 4, "5 and 4 frames, so they can't overlap by 4"),
    ],
)
def test_clips_that_do_not_join_are_refused(second, overlap, said):
    with pytest.raises(ValueError, match=said):
        joined_in_time(Views(draw(2, 5, 3, 4, 4)), Views(draw(*second)), overlap)
