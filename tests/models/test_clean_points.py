"""Floaters: a blurred outline's ring goes, and every surface stays, rims and thin parts included."""

import math

import pytest
import torch
import torch.nn.functional as F
from turnaround.models import clean_points
from turnaround.models.clean_points import (
    FATES,
    TILE,
    accumulate_static,
    floaters,
    smeared,
    stage_pictures,
)
from turnaround.models.points import (
    GRAZING_COSINE,
    points_from_depth,
    surface_from_depth,
    unproject_depth,
)

SIZE, FOCAL = 64, 80.0
K = torch.tensor([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])


@pytest.fixture(scope="module")
def ball():
    """Depth and mask [1, H, W] of a ball of 0.8 m, 3 m away."""
    rays = F.normalize(unproject_depth(torch.ones(1, SIZE, SIZE), K)[0], dim=0)
    along = 3 * rays[2]
    inside = (under := along**2 - 9 + 0.8**2) > 0.02
    depth = rays[2] * (along - under.clamp(min=0).sqrt())
    return torch.where(inside, depth, 0.0)[None], inside[None]


def everywhere(depth):
    return torch.ones_like(depth)


def smeared_scene(ball):
    """Ball before a wall at 5 m; the ball's outermost ring is drawn between the two."""
    depth, inside = ball
    ring = inside & ~(F.avg_pool2d(inside.float(), 3, 1, 1) > 0.99)
    return torch.where(ring, 0.5 * depth + 2.5, torch.where(inside, depth, 5.0)), ring


def test_pixels_that_float_between_two_surfaces_are_dropped_and_surfaces_kept(ball):
    depth, ring = smeared_scene(ball)
    dropped = floaters(depth, everywhere(depth), K)
    assert dropped[ring].float().mean() > 0.8  # on diagonals the ring is two pixels wide
    assert dropped[~ring].float().mean() < 0.01


def test_a_ring_at_the_mask_s_edge_is_dropped_with_nothing_known_behind(ball):
    depth, ring = smeared_scene(ball)
    dropped = floaters(depth, ball[1].float(), K)
    assert dropped[ring].float().mean() > 0.8
    assert dropped[ball[1] & ~ring].float().mean() < 0.01


def test_the_steep_rim_of_a_ball_stays(ball):
    depth, inside = ball
    assert floaters(depth, inside.float(), K).sum() < 0.005 * inside.sum()


def test_a_slanted_plane_and_noise_are_no_floaters():
    x = torch.linspace(0, 1, SIZE).expand(SIZE, SIZE)
    noise = 0.002 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    depth = (3 + x + noise)[None]
    assert floaters(depth, everywhere(depth), K).float().mean() < 0.001


def test_a_strip_two_pixels_wide_stays_and_a_single_pixel_in_the_air_goes():
    depth = torch.full((1, SIZE, SIZE), 5.0)
    depth[:, :, 30:32] = 3.0
    depth[:, 10, 10] = 4.0
    dropped = floaters(depth, everywhere(depth), K)
    assert not dropped[:, :, 30:32].any() and dropped[0, 10, 10]


def test_a_straight_ramp_is_no_surface_although_every_pixel_continues_the_last():
    depth = torch.full((1, SIZE, SIZE), 3.0)
    depth[..., 30:35] = torch.linspace(3.0, 5.0, 7)[1:-1]
    depth[..., 35:] = 5.0
    dropped = floaters(depth, everywhere(depth), K * torch.tensor([[10.0], [10.0], [1.0]]))
    assert dropped[..., 31:34].all() and dropped.sum() <= 5 * SIZE


def test_chunks_of_frames_give_the_same(ball, monkeypatch):
    depth = torch.cat([smeared_scene(ball)[0] + 0.1 * f for f in range(5)])
    whole = floaters(depth, everywhere(depth), K)
    monkeypatch.setattr(clean_points, "CHUNK_PIXELS", 2 * SIZE * SIZE)
    assert torch.equal(floaters(depth, everywhere(depth), K), whole)


def test_unknown_depth_is_neither_a_floater_nor_company(ball):
    depth, inside = ball[0].clone(), ball[1]
    depth[0, 30, 30:33] = torch.tensor([torch.nan, torch.inf, 0.0])
    dropped = floaters(depth, inside.float(), K)
    assert not dropped[0, 28:34, 28:35].any()
    assert not floaters(torch.full_like(depth, torch.nan), inside.float(), K).any()


# ---------------------------------------------------------------- smears


def test_a_wide_ramp_between_two_surfaces_is_smeared():
    lens = K * torch.tensor([[10.0], [10.0], [1.0]])  # 4 mm a pixel, as in a real picture
    # Half as steep again as the steepest surface that is believed (83 degrees) at 3 m.
    step = 1.5 * math.tan(math.acos(GRAZING_COSINE)) * 3 / (10 * FOCAL)
    depth = torch.full((1, SIZE, SIZE), 3.0)
    depth[..., 28:36] = 3 + step * torch.arange(8)
    depth[..., 36:] = 3 + 7 * step
    found = smeared(depth, everywhere(depth), lens)
    assert found[..., 29:35].all()
    assert not found[..., :26].any() and not found[..., 38:].any()


def test_noise_is_not_smeared(ball):
    depth, inside = ball
    noise = 0.005 * torch.randn(depth.shape, generator=torch.Generator().manual_seed(0))
    inner = F.avg_pool2d(inside.float(), 9, 1, 4) > 0.99
    assert not smeared(depth + noise * inside, inside.float(), K)[inner].any()


# ---------------------------------------------------------------- what stands still

FRAMES = 10
COLORS = {"wall": 0.2, "card": 0.9}


def scene(card, wall=4.0):
    """A wall, and a card 1 m before it whose columns `card(f)` are; cloud and masks."""
    depth = torch.full((FRAMES, SIZE, SIZE), wall)
    colors = torch.full((FRAMES, 3, SIZE, SIZE), COLORS["wall"])
    for f in range(FRAMES):
        depth[f, 20:40, card(f)] = wall - 1
        colors[f, :, 20:40, card(f)] = COLORS["card"]
    return depth, colors


def cloud_of(depth, colors, masks=None):
    masks = torch.ones_like(depth) if masks is None else masks
    return points_from_depth(colors, depth, masks, K, erosion=0, far_side=False), masks


def seen_at(cloud, f, row, column):
    """Depths of the points of one pixel in one frame, near to far, and their colours."""
    pixel, frame, depth = clean_points._source_pixels(cloud, SIZE, SIZE)
    here = (pixel == row * SIZE + column) & (frame == f)
    order = depth[here].argsort()
    return depth[here][order].tolist(), cloud.colors[here][order, 0].tolist()


def test_a_wall_behind_something_that_passes_is_filled_from_the_nearest_frame():
    depth, colors = scene(lambda f: slice(5 * f, 5 * f + 8))
    colors[:, 2] += 0.01 * torch.arange(FRAMES)[:, None, None]  # tells the frames apart
    cloud, masks = cloud_of(depth, colors)
    kept = accumulate_static(cloud, masks)
    depths, looks = seen_at(
        kept, 4, 30, 24
    )  # the card covers it in frames 4 and, with its first column, 5
    assert depths == pytest.approx([3.0, 4.0], abs=1e-3)
    assert looks == pytest.approx([COLORS["card"], COLORS["wall"]])
    pixel, frame, z = clean_points._source_pixels(kept, SIZE, SIZE)
    filled = (pixel == 30 * SIZE + 24) & (frame == 4) & (z > 3.5)
    frame_seen = round(float(kept.colors[filled, 2] - COLORS["wall"]) / 0.01)
    assert frame_seen == 3
    # Nothing else changes, and every frame's own points are all there.
    assert len(kept.positions) - len(cloud.positions) == int((depth < 3.5).sum())


def test_a_limb_that_rests_and_moves_away_leaves_no_ghost():
    # Away in the last two frames: there the wall is seen past where it rested.
    depth, colors = scene(lambda f: slice(10, 18) if f < 8 else slice(40, 48))
    kept = accumulate_static(*cloud_of(depth, colors))
    assert seen_at(kept, 9, 30, 12)[0] == pytest.approx([4.0], abs=1e-3)
    # Where it passed at the end, the wall behind is kept; where it rested too long, nothing is known.
    assert len(seen_at(kept, 9, 30, 44)[0]) == 2
    assert seen_at(kept, 3, 30, 12)[0] == pytest.approx([3.0], abs=1e-3)


def test_a_limb_before_an_empty_background_leaves_no_ghost():
    depth, colors = scene(lambda f: slice(5 * f, 5 * f + 8))
    masks = (depth < 3.5).float()
    cloud, masks = cloud_of(depth, colors, masks)
    kept = accumulate_static(cloud, masks)
    assert torch.equal(kept.positions, cloud.positions)


def test_an_arm_that_was_away_for_a_while_is_not_filled_behind_a_hand():
    # One pixel: an arm at 4 m in half of the frames, background in three, a hand at 3 m in two.
    depth = torch.full((FRAMES, 8, 8), 4.0)
    masks = torch.ones_like(depth)
    depth[:2], masks[5:8] = 3.0, 0.0
    cloud, _ = cloud_of(depth, torch.full((FRAMES, 3, 8, 8), 0.5), masks)
    assert len(accumulate_static(cloud, masks).positions) == len(cloud.positions)


def test_where_the_background_is_seen_nothing_is_filled_even_if_only_for_a_moment():
    depth = torch.full((40, 8, 8), 4.0)
    masks = torch.ones_like(depth)
    depth[0], masks[7] = 3.0, 0.0
    cloud, _ = cloud_of(depth, torch.full((40, 3, 8, 8), 0.5), masks)
    kept = accumulate_static(cloud, masks)
    added = (kept.frame_offsets.diff() - cloud.frame_offsets.diff()).tolist()
    assert added == [64] + [0] * 39


def test_a_wall_that_comes_nearer_is_not_still():
    depth, colors = scene(lambda f: slice(5 * f, 5 * f + 8))
    depth = depth - 0.1 * torch.arange(FRAMES)[:, None, None]
    cloud, masks = cloud_of(depth, colors)
    assert len(accumulate_static(cloud, masks).positions) == len(cloud.positions)


def test_a_pattern_that_moves_along_its_own_plane_is_not_still():
    depth, colors = scene(lambda f: slice(5 * f, 5 * f + 8))
    far = depth > 3.5
    stripes = (torch.arange(SIZE) // 4 % 2).float().expand(SIZE, SIZE)
    for f in range(FRAMES):
        colors[f] = torch.where(far[f], torch.roll(stripes, 3 * f, 1), colors[f])
    cloud, masks = cloud_of(depth, colors)
    assert len(accumulate_static(cloud, masks).positions) == len(cloud.positions)


def test_holes_are_filled_with_what_stands_still_guessed_far_side_included():
    depth, colors = scene(lambda f: slice(0, 0))
    depth[5, 30, 30] = 0
    masks = torch.ones_like(depth)
    cloud = points_from_depth(colors, depth, masks, K, erosion=0, far_side=True)
    kept = accumulate_static(cloud, masks)
    assert len(kept.positions) > len(cloud.positions)
    assert len(seen_at(kept, 5, 30, 30)[0]) == len(seen_at(kept, 4, 30, 30)[0]) >= 2


# ---------------------------------------------------------------- how it is seen


def test_stage_pictures_show_every_fate_in_its_own_colour(ball):
    depth, _ = smeared_scene(ball)
    surface = surface_from_depth(depth, ball[1].float(), K, 1, floaters(depth, ball[1].float(), K))
    pictures = stage_pictures(torch.full((1, 3, SIZE, SIZE), 0.5), ball[1].float(), surface)
    assert pictures.shape[2] == TILE and pictures.shape[3] % 5 == 0
    last = pictures[0, :, TILE // 3 :, -pictures.shape[3] // 5 :].flatten(1).T
    for fate, (_, color) in FATES.items():
        there = (last - last.new_tensor(color)).abs().amax(1) < 0.01
        assert there.any() == (surface.fate == fate).any()
    assert pictures.isfinite().all() and pictures.min() >= 0 and pictures.max() <= 1
