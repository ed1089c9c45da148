"""Depth refined by normals: an exact sphere stays, noise goes, holes fill, jumps stay."""

import pytest
import torch
import torch.nn.functional as F
from turnaround.models import refine_depth as module
from turnaround.models.metrics import normal_angle
from turnaround.models.points import normals_from_depth, unproject_depth
from turnaround.models.refine_depth import (
    decode_normals,
    likelier_axes,
    refine_depth,
    smoothed_normals,
)

SIZE, FOCAL = 64, 80.0
K = torch.tensor([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])


@pytest.fixture(scope="module")
def sphere():
    """Depth, normals and mask of a sphere of 0.8 m, 3 m away."""
    rays = F.normalize(unproject_depth(torch.ones(1, SIZE, SIZE), K)[0], dim=0)
    centre, radius = torch.tensor([0.0, 0, 3])[:, None, None], 0.8
    along = (rays * centre).sum(0)
    inside = (under := along**2 - 9 + radius**2) > 0.02
    points = rays * (along - under.clamp(min=0).sqrt())
    normals = torch.where(inside, (points - centre) / radius, 0.0)
    return torch.where(inside, points[2], 0.0), normals, inside


def refine(depth, normals, inside, reach=12.0):
    return refine_depth(depth[None], normals[None], inside[None].float(), K, reach)[0]


def error(a, b, inside) -> float:
    return float((a - b)[inside].square().mean().sqrt())


def test_exact_depth_with_exact_normals_stays(sphere):
    depth, normals, inside = sphere
    assert float((refine(*sphere) - depth).abs().max()) < 1e-4


def test_noise_goes_and_the_distance_stays(sphere):
    depth, normals, inside = sphere
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    noisy = depth + 0.01 * noise * inside
    errors = [error(refine(noisy, normals, inside, reach), depth, inside) for reach in (2, 6, 20)]
    # The mean over a disc of radius r pixels leaves about 1 / (r sqrt(pi)) of white noise.
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.001
    refined = refine(noisy, normals, inside)
    assert float((refined - depth)[inside].mean()) == pytest.approx(0, abs=3e-4)


def test_a_slow_error_of_the_depth_is_kept(sphere):
    depth, normals, inside = sphere
    moved = torch.where(inside, depth + 0.5, 0.0)
    assert error(refine(moved, normals, inside), moved, inside) < 0.05  # not pulled back to 3 m


def test_normals_fill_a_hole(sphere):
    depth, normals, inside = sphere
    holed = depth.clone()
    holed[25:40, 25:40] = 0
    filled = refine(holed, normals, inside)[25:40, 25:40]
    assert float((filled - depth[25:40, 25:40]).abs().max()) < 1e-3
    assert float(depth[25:40, 25:40].max() - depth[25:40, 25:40].min()) > 0.04  # no flat filling


def test_a_part_without_any_depth_stays_unknown(sphere):
    depth, normals, inside = sphere
    inside = inside.clone()
    inside[:5, :5] = True  # an island that no pair ties to the sphere
    assert not refine(depth, normals, inside)[:5, :5].any()


def test_a_jump_stays(sphere):
    inside = torch.ones(SIZE, SIZE, dtype=torch.bool)
    depth = torch.full((SIZE, SIZE), 3.0)
    depth[:, SIZE // 2 :] = 4.0
    normals = torch.tensor([0.0, 0, -1])[:, None, None].expand(3, SIZE, SIZE)
    assert float((refine(depth, normals, inside) - depth).abs().max()) < 1e-3


def test_the_solver_reaches_the_minimum_of_the_objective(sphere):
    """Against a dense float64 solution of the same sum, term by term."""
    size, reach = 8, 5.0
    k = torch.tensor([[10.0, 0, 4], [0, 10, 4], [0, 0, 1]])
    g = torch.Generator().manual_seed(0)
    depth = 2 + 0.02 * torch.rand(size, size, generator=g)
    tilt = torch.randn(3, size, size, generator=g) * 0.1
    normals = F.normalize(tilt + torch.tensor([0.0, 0, -1])[:, None, None], dim=0)
    found = refine_depth(depth[None], normals[None], torch.ones(1, size, size), k, reach)[0]
    rays = unproject_depth(torch.ones(1, size, size), k)[0].double()
    n = normals.double()
    rows, right = [], []
    for i in range(size * size):
        row = torch.zeros(size * size, dtype=torch.float64)
        row[i] = 1
        rows.append(row), right.append(float(depth.flatten()[i]))
    for y in range(size):
        for x in range(size):
            for dy, dx in ((0, 1), (1, 0)):
                if y + dy < size and x + dx < size:
                    middle = F.normalize(n[:, y, x] + n[:, y + dy, x + dx], dim=0)
                    row = torch.zeros(size, size, dtype=torch.float64)
                    row[y, x] = -reach * (middle @ rays[:, y, x])
                    row[y + dy, x + dx] = reach * (middle @ rays[:, y + dy, x + dx])
                    rows.append(row.flatten()), right.append(0.0)
    A, b = torch.stack(rows), torch.tensor(right, dtype=torch.float64)
    exact = torch.linalg.lstsq(A, b[:, None]).solution.view(size, size)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


def test_not_unit_and_faint_normals_do_no_harm(sphere):
    depth, normals, inside = sphere
    assert error(refine(depth, 3 * normals, inside), depth, inside) < 1e-4
    assert error(refine(depth, 0 * normals, inside), depth, inside) < 1e-6


def test_normals_of_nan_say_nothing(sphere):
    depth, normals, inside = sphere
    broken = normals.clone()
    broken[:, 20:30, 20:30] = torch.nan
    refined = refine(depth, broken, inside)
    assert refined.isfinite().all() and error(refined, depth, inside) < 1e-4


def test_a_gap_between_two_surfaces_is_filled_from_both_sides_and_bridged_by_none():
    depth = torch.full((SIZE, SIZE), 3.0)
    depth[:, SIZE // 2 :] = 4.0
    truth = depth.clone()
    depth[:, SIZE // 2 - 3 : SIZE // 2 + 3] = 0  # what a blur smeared is taken away
    inside = torch.ones(SIZE, SIZE, dtype=torch.bool)
    normals = torch.tensor([0.0, 0, -1])[:, None, None].expand(3, SIZE, SIZE)
    refined = refine(depth, normals, inside)
    assert ((refined - 3).abs().minimum((refined - 4).abs()) < 1e-3).all()
    assert float((refined - truth).abs().max(0).values[[0, SIZE // 2 - 4, -1]].max()) < 1e-3


def test_frames_do_not_know_of_each_other_in_whatever_chunks(sphere, monkeypatch):
    depth, normals, inside = sphere
    noise = 0.01 * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    clip = torch.where(inside, depth + noise, 0.0)
    clip[1] = 0  # nothing known
    many = (clip, normals.expand(3, -1, -1, -1), inside.float().expand(3, -1, -1), K)
    together = refine_depth(*many)
    monkeypatch.setitem(module.CHUNK_PIXELS, "cpu", 1)
    steps = []
    alone = refine_depth(*many, on_step=lambda done, total: steps.append((done, total)))
    # Frames of one chunk are solved until all of them are; the tolerance is 1e-4 of 0.2 m.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert not together[1].any() and (together[0] != together[2]).any()
    assert steps[-1] == (3, 3) and len(steps) > 6  # the cancel button is looked at within frames


def test_normals_that_contradict_themselves_throw_nothing_out_of_the_room(sphere):
    depth, normals, inside = sphere
    wild = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    holed = torch.where(inside, depth, 0.0)
    holed[20:50, 20:50] = 0
    refined = refine(holed, wild, inside, reach=100.0)
    told = refined[refined > 0]
    assert refined.isfinite().all() and not (refined < 0).any()
    assert told.min() > 0.8 * depth[inside].min() and told.max() < 1.2 * depth.max()


def test_no_depth_at_all_stays_none(sphere):
    depth, normals, inside = sphere
    for value in (0.0, torch.nan, torch.inf):
        assert not refine(torch.full_like(depth, value), normals, inside).any()


def surface_angle(depth, normals, inside):
    rim = F.avg_pool2d(inside.float()[None], 5, 1, 2)[0] > 0.99
    found = normals_from_depth(unproject_depth(depth[None], K), inside[None], float(K[0, 0]))
    return normal_angle(found, normals[None], rim[None])


@pytest.mark.parametrize("error", ["noise", "steps of 8 mm"])
def test_smoothed_normals_of_the_depth_itself_are_better_than_its_own(sphere, error):
    depth, normals, inside = sphere
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    poor = depth + 0.008 * noise if error == "noise" else (depth / 0.008).round() * 0.008
    poor = torch.where(inside, poor, 0.0)
    given = smoothed_normals(poor[None], inside[None].float(), K, 12.0)
    refined = refine(poor, given[0], inside)
    # A pixel is 37 mm wide here, so 8 mm of noise turn a normal by 9 degrees.
    assert surface_angle(refined, normals, inside) < 0.5 * surface_angle(poor, normals, inside)


def test_smoothed_normals_reach_over_small_holes_and_not_far_beyond(sphere):
    depth, normals, inside = sphere
    holed = torch.where(inside, depth, 0.0)
    holed[30:33, 30:33] = 0
    found = smoothed_normals(holed[None], inside[None].float(), K, 12.0)[0]
    assert (found[:, 30:33, 30:33].norm(dim=0) - 1).abs().max() < 1e-5
    assert (found[:, 30:33, 30:33] * normals[:, 30:33, 30:33]).sum(0).min() > 0.99
    assert not found[:, ~inside].any()


def test_axes_that_contradict_the_depth_are_named(sphere):
    depth, normals, inside = sphere
    surface = normals_from_depth(unproject_depth(depth[None], K), inside[None], float(K[0, 0]))
    colours = torch.where(
        inside, 0.5 + 0.5 * normals * torch.tensor([1.0, -1, -1])[:, None, None], 0.5
    )
    for right in (1.0, -1.0):
        for up in (1.0, -1.0):
            given = decode_normals(colours[None], right, up)
            assert likelier_axes(given, surface, inside[None]) == (right, up, False)
    away = normals * torch.tensor([1.0, 1, -1])[:, None, None]
    assert likelier_axes(away[None], surface, inside[None])[2]
    assert likelier_axes(0 * surface, surface, inside[None]) == (1.0, 1.0, False)
