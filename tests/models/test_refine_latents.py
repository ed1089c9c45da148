"""Views that agree in latent space: against planes and spheres by hand, and against invariants."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models import refine_latents
from turnaround.models.cameras import Rig, look_at, orbit_angles, orbit_rig
from turnaround.models.refine_latents import (
    LatentGrid,
    agreed,
    brought_back,
    correspond,
    front_to_back,
    grid_of,
)

W, H, STRIDE = 48, 64, 8
w, h = W // STRIDE, H // STRIDE
FOCAL = 80.0
RADIUS = 0.8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid(frames: int = 1, per_frame: int = 4) -> LatentGrid:
    return LatentGrid(frames, h, w, STRIDE, per_frame)


def side_by_side(*shifts: float, distance: float = 2.0) -> Rig:
    """Cameras that look along +z, moved sideways by so many metres."""
    K = torch.tensor([[FOCAL, 0, W / 2], [0, FOCAL, H / 2], [0, 0, 1]]).repeat(len(shifts), 1, 1)
    T = torch.eye(4).repeat(len(shifts), 1, 1)
    T[:, 0, 3], T[:, 2, 3] = -torch.tensor(shifts), distance
    return Rig(K, T, W, H)


def plane(views: int, distance: float = 2.0, frames: int = 1) -> Tensor:
    return torch.full((views, frames, H, W), distance)


def ring(views: int = 8, elevation: float = 0.2) -> Rig:
    return orbit_rig(*orbit_angles(views, 0.0, 2 * math.pi, elevation), 3.0, 0.6, W, H)


def sphere(rig: Rig, frames: int = 1) -> Tensor:  # [V, F, H, W] metres
    """Depth of a ball around the origin, by the quadratic formula."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1)
    rays = torch.einsum("hwc,vdc->vhwd", pixels, torch.linalg.inv(rig.K))
    centre = rig.T_camera_world[:, None, None, :3, 3]
    a, b = rays.square().sum(-1), (rays * centre).sum(-1)
    root = b.square() - a * (centre.square().sum(-1) - RADIUS**2)
    depth = torch.where(root > 0, (b - root.clamp(min=0).sqrt()) / a, 0.0)
    return depth[:, None].expand(-1, frames, -1, -1)


def disagreement(latents: Tensor, found) -> float:
    """Mean squared difference of what two views show of one place."""
    squares = [
        (refine_latents._read(latents[b], pair) - latents[a].flatten(1)[:, pair.at.long()]).square()
        for (a, b), pair in found.pairs.items()
    ]
    return float(torch.cat([s.flatten() for s in squares]).mean())


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


# --- correspondences ------------------------------------------------------------------------------


def test_a_plane_seen_one_latent_pixel_further_is_shifted_by_one():
    # A latent pixel covers 8 / 80 of the distance of 2 m.
    found = correspond(plane(2), side_by_side(0.0, 0.2), grid())
    latents = draw(2, 3, 1, h, w)
    pair = found.pairs[0, 1]
    columns = pair.at.long() % w
    # The first column of view 0 lies outside of what view 1 shows.
    assert sorted(set(columns.tolist())) == list(range(1, w)) and len(columns) == h * (w - 1)
    expected = latents[1].flatten(1)[:, pair.at.long() - 1]
    # Pixels of the plane are exact; rounding of the projection is 1e-5 of a latent pixel.
    torch.testing.assert_close(refine_latents._read(latents[1], pair), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(pair.share, torch.ones(len(columns)), atol=1e-5, rtol=0)


def test_every_pair_on_a_ball_is_the_same_place_and_is_seen_by_both():
    rig = ring()
    depth = sphere(rig)
    found = correspond(depth, rig, grid())
    # What stands in the latents is where the surface is: read elsewhere, it must be the same place.
    where = refine_latents._surface(depth, rig, STRIDE).points.movedim(-1, 1)
    footprint = 3.0 * STRIDE / float(rig.K[0, 1, 1])
    for (a, b), pair in found.pairs.items():
        own = where[a].flatten(1)[:, pair.at.long()]
        full = pair.share > 0.999  # towards the edge bilinear reading mixes in the background
        away = (refine_latents._read(where[b], pair) - own).norm(dim=0)[full]
        assert len(away) == 0 or away.max() < 0.5 * footprint
        # A place is seen where the ball faces the camera.
        facing = (own * torch.nn.functional.normalize(rig.centers[b], dim=0)[:, None]).sum(0)
        assert (facing > -0.1 * RADIUS).all()
    # Opposite cameras share nothing but the rim.
    opposite = found.pairs[0, 4].at if (0, 4) in found.pairs else ()
    assert len(found.pairs[0, 1].at) > 3 * len(opposite)
    assert 0.9 < found.shared <= 1


def test_what_something_nearer_hides_is_not_paired():
    depth = plane(2)
    depth[1, :, :, : W // 2] = 1.0  # before the left half of the other camera
    found = correspond(depth, side_by_side(0.0, 0.0), grid())
    assert (found.pairs[0, 1].at % w >= w // 2).all() and len(found.pairs[0, 1].at) == h * w // 2


def test_every_place_is_listed_once_and_in_order():
    rig = ring()
    for pair in correspond(sphere(rig, 5), rig, grid(2)).pairs.values():
        assert (pair.at.diff() > 0).all()


def test_latent_frames_take_the_depth_of_a_picture_they_hold():
    """Latent frame 0 holds picture 0, latent frame 2 pictures 5 to 8."""
    for seen_at, per_frame in (((0, 2, 6), 4), ((0, 1, 2), 1)):
        depth = torch.zeros(2, 9, H, W)
        depth[:, list(seen_at)] = 2.0
        found = correspond(depth, side_by_side(0.0, 0.0), grid(3, per_frame))
        assert len(found.pairs[0, 1].at) == 3 * h * w
        assert bool((found.cover == 1).all())


def test_chunks_of_frames_change_nothing(monkeypatch):
    rig = ring(4)
    depth = sphere(rig, 13) * torch.linspace(1, 1.05, 13)[:, None, None]
    whole, done = correspond(depth, rig, grid(4)), []
    monkeypatch.setattr(refine_latents, "CHUNK_PIXELS", 4 * W * H)
    parts = correspond(depth, rig, grid(4), lambda *step: done.append(step))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)] and whole.pairs.keys() == parts.pairs.keys()
    for key, pair in whole.pairs.items():
        for name in ("at", "corner", "within", "share"):
            # Rounding of the projection in pixels.
            same = (getattr(x, name) for x in (pair, parts.pairs[key]))
            torch.testing.assert_close(*same, atol=1e-4, rtol=0)


def test_depth_that_is_no_number_is_no_surface():
    depth = plane(2)
    depth[0, :, : H // 2], depth[1, :, :, : W // 2] = math.nan, math.inf
    found = correspond(depth, side_by_side(0.0, 0.0), grid())
    assert len(found.pairs[0, 1].at) == h * w // 4 and found.cover.isfinite().all()


def test_pictures_of_another_size_give_the_same_correspondences():
    rig = ring(4)
    big = rig.resized(2 * W, 2 * H)
    latents = draw(4, 3, 1, h, w)
    small = agreed(latents, correspond(sphere(rig), rig, grid()), 1.0)
    doubled = sphere(rig).repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(agreed(latents, correspond(doubled, big, grid()), 1.0), small)


def test_front_view_is_first_then_front_to_back_whatever_the_order_of_the_batch():
    rig = ring()
    assert front_to_back(rig) == (0, 7, 1, 6, 2, 5, 3, 4)
    mixed = [3, 0, 4, 1, 2, 7, 6, 5]
    assert [mixed[v] for v in front_to_back(rig.select(mixed))] == [0, 7, 1, 6, 2, 5, 3, 4]


# --- agreement ------------------------------------------------------------------------------------


def test_one_sweep_over_two_flat_views_is_the_formula():
    """Front first: 0 goes to s/(1 + s) of the way to 1; then 1 comes to meet what 0 has become."""
    found = correspond(plane(2), side_by_side(0.0, 0.0), grid())
    latents = torch.stack([torch.zeros(2, 1, h, w), torch.ones(2, 1, h, w)])
    for strength, weights in ((1.0, (1.0, 1.0)), (3.0, (1.0, 1.0)), (1.0, (1.0, 0.25))):
        result = agreed(latents, found, strength, torch.tensor(weights))
        first = weights[1] / (weights[1] + weights[0] / strength)
        second = 1 + (first - 1) * weights[0] / (weights[0] + weights[1] / strength)
        # Corner pixels' mean of 3 x 3 is taken of what there is, so all are alike.
        torch.testing.assert_close(result[0], torch.full((2, 1, h, w), first))
        torch.testing.assert_close(result[1], torch.full((2, 1, h, w), second))


def test_only_the_slow_part_of_a_difference_is_taken_over():
    """Of stripes one latent pixel wide, the mean of 3 x 3 leaves a third."""
    found = correspond(plane(2), side_by_side(0.0, 0.0), grid())
    stripes = (-1.0) ** torch.arange(w).expand(1, 1, h, w)
    latents = torch.stack([torch.zeros(1, 1, h, w), stripes])
    inner = agreed(latents, found, 1.0)[0, :, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner.abs(), torch.full_like(inner, 0.5 / 3))


def test_strength_zero_is_the_identity_to_the_bit():
    rig = ring(4)
    latents = draw(4, 3, 1, h, w)
    assert torch.equal(agreed(latents, correspond(sphere(rig), rig, grid()), 0.0), latents)


def test_views_of_other_colours_agree_more_after_every_sweep_and_nothing_changes_in_place():
    rig = ring()
    found = correspond(sphere(rig), rig, grid())
    latents = draw(8, 4, 1, 1, 1).expand(8, 4, 1, h, w).clone()
    before, values, result = latents.clone(), [disagreement(latents, found)], latents
    for _ in range(3):
        result = agreed(result, found, 1.0)
        values.append(disagreement(result, found))
    assert values == sorted(values, reverse=True) and values[1] < 0.5 * values[0]
    assert torch.equal(latents, before)


def test_views_that_agree_already_stay_as_they_are():
    rig = ring()
    found = correspond(sphere(rig), rig, grid())
    latents = torch.full((8, 4, 1, h, w), 0.7)
    torch.testing.assert_close(agreed(latents, found, 1.0), latents, atol=1e-6, rtol=0)


def test_background_is_left_alone_to_the_bit():
    rig = ring()
    found, latents = correspond(sphere(rig), rig, grid()), draw(8, 4, 1, h, w)
    changed = (agreed(latents, found, 1.0) != latents).any(1)
    assert changed.any() and not changed[found.cover == 0].any()


def test_views_in_another_order_give_the_same_views():
    rig, mixed = ring(), [3, 0, 4, 1, 2, 7, 6, 5]
    latents, weights = draw(8, 4, 1, h, w), torch.linspace(0.2, 1, 8)
    result = agreed(latents, correspond(sphere(rig), rig, grid()), 1.0, weights)
    found = correspond(sphere(rig.select(mixed)), rig.select(mixed), grid())
    other = agreed(latents[mixed], found, 1.0, weights[mixed])
    torch.testing.assert_close(other, result[mixed], atol=1e-5, rtol=0)


def test_moments_do_not_mix():
    rig = ring(4)
    found, latents = correspond(sphere(rig, 9), rig, grid(3)), draw(4, 3, 3, h, w)
    result = agreed(latents, found, 1.0)
    alone = agreed(latents[:, :, 1:2], correspond(sphere(rig), rig, grid()), 1.0)
    torch.testing.assert_close(result[:, :, 1:2], alone)


def test_without_common_surface_the_very_same_latents_come_back():
    latents = draw(2, 3, 1, h, w)
    found = correspond(plane(2), side_by_side(0.0, 9.0), grid())
    assert not found.pairs and found.shared == 0 and agreed(latents, found, 1.0) is latents
    alone = correspond(plane(1), side_by_side(0.0), grid())
    assert agreed(latents[:1], alone, 1.0).equal(latents[:1])


def test_a_view_that_is_no_number_does_not_take_the_others_with_it():
    found, latents = correspond(plane(2), side_by_side(0.0, 0.0), grid()), draw(2, 3, 1, h, w)
    latents[1, 0, 0, 0, 0] = math.nan
    assert agreed(latents, found, 1.0)[0].equal(latents[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1)])
def test_latents_of_a_single_row_or_column_work(size):
    rows, columns = size
    rig = side_by_side(0.0, 0.0).resized(8 * columns, 8 * rows)
    found = correspond(
        torch.full((2, 1, 8 * rows, 8 * columns), 2.0), rig, LatentGrid(1, rows, columns, 8)
    )
    latents = torch.stack([torch.zeros(1, 1, rows, columns), torch.ones(1, 1, rows, columns)])
    assert torch.allclose(agreed(latents, found, 1.0)[0], torch.tensor(0.5))


def test_cameras_above_each_other_are_told_apart():
    rig = Rig(
        side_by_side(0.0, 0.0).K,
        look_at(torch.tensor([[0.0, -1.0, -3.0], [0.0, 1.0, -3.0]]), torch.zeros(3)),
        W,
        H,
    )
    assert front_to_back(rig) == front_to_back(rig.select([1, 0]))[::-1]


# --- latents and pictures -------------------------------------------------------------------------


def test_grids_of_all_kinds_of_latents():
    depth = torch.zeros(2, 13, 1, 480, 832)
    assert grid_of((4, 60, 104), depth).stride == 8
    assert grid_of((4, 30, 52), depth).stride == 16
    assert grid_of((4, 20, 30), torch.zeros(2, 15, 1, 163, 235)).stride == 8  # 160 x 240
    assert grid_of((4, 60, 104), torch.zeros(2, 13, 1, 960, 1664)).stride == 16
    assert grid_of((13, 60, 104), depth, per_frame=1).pictures == 13


def test_latents_of_other_pictures_are_refused_in_one_sentence():
    depth = torch.zeros(2, 13, 1, 240, 192)
    for latent, told in (((4, 24, 30), "30x24"), ((3, 30, 24), "9 pictures"), ((5, 30, 24), "17")):
        text = refusal(lambda latent=latent: grid_of(latent, depth))
        assert told in text and "'depth'" in text and "'rig'" in text
    assert "14 pictures" in refusal(lambda: grid_of((14, 30, 24), depth, per_frame=1))


# --- pictures back into latents -------------------------------------------------------------------

SHAPE = (1, 8)
MIX = draw(8, 12, seed=3).double() / 3
"""Of a toy decoder: linear, and no picture's encoding is exact."""


def decode(z: Tensor) -> Tensor:  # [1, 8] -> [2, 3, 1, 2]
    return (z @ MIX).reshape(2, 3, 1, 2)


def encode(pictures: Tensor) -> Tensor:
    """Twenty percent off, as a VAE's way there and back loses something."""
    return 0.8 * pictures.reshape(1, 12) @ torch.linalg.pinv(MIX)


LATENT, TARGET = draw(*SHAPE, seed=1).double(), draw(2, 3, 1, 2, seed=2).double()


def test_pictures_that_nobody_changed_come_back_as_the_very_same_latents():
    result = brought_back(LATENT, decode(LATENT), encode, decode, 0, 0.0)
    assert torch.equal(result.latents, LATENT) and result.history == (0.0, 0.0)


def test_start_comes_closer_than_encoding_anew():
    target = decode(LATENT) + 0.1 * TARGET
    result = brought_back(LATENT, target, encode, decode, 0, 0.0)
    anew = float((decode(encode(target)) - target).square().mean())
    assert result.history[1] < 0.5 * anew and result.history[1] < result.history[0]


@pytest.mark.parametrize("fidelity", [0.0, 0.01, 1.0])
def test_loss_never_rises_and_ends_at_the_least_squares_solution(fidelity):
    result = brought_back(LATENT, TARGET, encode, decode, 400, fidelity)
    assert list(result.history) == sorted(result.history, reverse=True)
    A = MIX @ MIX.T / 12 + fidelity / 8 * torch.eye(8, dtype=torch.float64)
    b = TARGET.reshape(1, 12) @ MIX.T / 12 + fidelity / 8 * LATENT
    best = torch.linalg.solve(A, b.T).T
    torch.testing.assert_close(result.latents, best, atol=1e-3, rtol=1e-3)


def test_an_encoder_that_misleads_does_no_harm():
    result = brought_back(LATENT, TARGET, lambda p: -encode(p), decode, 3, 0.0)
    assert list(result.history) == sorted(result.history, reverse=True)
    far = brought_back(LATENT, TARGET, lambda p: -1e6 * encode(p), decode, 0, 0.0)
    assert torch.equal(far.latents, LATENT) and far.history[0] == far.history[1]


def test_every_step_is_reported():
    done = []
    brought_back(LATENT, TARGET, encode, decode, 4, 0.0, done.append)
    assert done == [1, 2, 3, 4]


def test_pictures_of_another_size_or_length_are_refused_in_one_sentence():
    for other, told in ((TARGET[:1], "1 frames"), (torch.zeros(2, 3, 5, 4), "4x5")):
        text = refusal(lambda other=other: brought_back(LATENT, other, encode, decode, 0, 0.0))
        assert told in text and "2 frames of 2x1" in text and "'views'" in text
