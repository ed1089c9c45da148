"""Depth refined by normals: an exact sphere stays, noise goes, holes fill, jumps stay."""

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.points import unproject_depth
from turnaround.models.refine_depth import refine_depth, without_floaters

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


def test_pixels_that_float_between_two_surfaces_are_dropped_and_surfaces_kept(sphere):
    depth, _, inside = sphere
    wall = torch.where(inside, depth, 5.0)
    # A blurred edge: the outermost ring of the ball is drawn between ball and wall.
    ring = inside & ~(F.avg_pool2d(inside.float()[None, None], 3, 1, 1)[0, 0] > 0.99)
    smeared = torch.where(ring, 0.5 * depth + 2.5, wall)
    kept = without_floaters(smeared[None], torch.ones(1, SIZE, SIZE))[0]
    assert (kept[ring] == 0).float().mean() > 0.8  # on diagonals the ring is two pixels wide
    assert (kept[~ring] > 0).float().mean() > 0.99


def test_a_slanted_plane_and_noise_are_no_floaters():
    x = torch.linspace(0, 1, SIZE).expand(SIZE, SIZE)
    noise = 0.002 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    depth = (3 + x + noise)[None]
    assert (without_floaters(depth, torch.ones_like(depth)) > 0).float().mean() > 0.999
