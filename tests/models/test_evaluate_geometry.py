"""The geometry's quality table: its errors and its measures, where the right number is known."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from turnaround.models import points
from turnaround.models.cameras import orbit_rig
from turnaround.models.points import points_from_depth, unproject_depth

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate_geometry as table  # noqa: E402  (a script beside the tests' folders)

SIZE, DISTANCE, RADIUS = 64, 3.0, 0.5
NO_ERRORS = table.Errors(0, 0, 0, 0, 0, 1 << 16)
V, FRAMES = 2, 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scene():
    """Two near squares before a wall of 4 m, standing still for 6 frames."""
    depth = torch.full((6, SIZE, SIZE), 4.0)
    depth[:, 20:44, 20:44] = 2.5
    depth[:, 28:36, 28:36] = 2.0
    return depth


# --- errors ---------------------------------------------------------------------------------------


def test_without_errors_a_map_is_inverse_depth_and_near_is_white(scene):
    values = table.relative_map(scene, generator(), NO_ERRORS)
    expected = 0.1 + 0.8 * (1 / scene - 1 / 4) / (1 / 2 - 1 / 4)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


def test_blur_spreads_an_edge_as_a_gaussian_does(scene):
    step = torch.zeros(1, 9, 32)
    step[..., 16:] = 1
    found = table.blurred(step, 2.0)[0, 4, 12:20]
    away = torch.arange(12, 20) + 0.5 - 16
    torch.testing.assert_close(found, torch.special.ndtr(away / 2.0), rtol=0, atol=0.01)
    values = table.relative_map(scene, generator(), replace(NO_ERRORS, blur=1.0))
    off = (values - table.relative_map(scene, generator(), NO_ERRORS)).abs()[0]
    assert off[20, 32] > 0.05 and off[28, 32] > 0.05  # silhouette and self-occlusion
    assert off[24, 24] < 1e-3 and off[4, 4] < 1e-3  # four pixels from any edge


def test_banding_has_no_more_than_its_levels_over_the_whole_scene(scene):
    ramp = torch.linspace(2, 4, SIZE).expand(1, SIZE, SIZE)
    values = table.relative_map(ramp, generator(), replace(NO_ERRORS, levels=11))
    assert values.unique().tolist() == pytest.approx([n / 10 for n in range(1, 10)])


def test_drift_scales_and_shifts_frames_and_changes_nothing_else(scene):
    errors = replace(NO_ERRORS, scale_drift=0.03, shift_drift=0.015)
    values = table.relative_map(scene, generator(), errors)
    still = table.relative_map(scene, generator(), NO_ERRORS)
    for frame, truth in zip(values, still, strict=True):
        basis = torch.stack([truth.flatten(), torch.ones(SIZE * SIZE)], 1)
        line = torch.linalg.lstsq(basis, frame.flatten()[:, None]).solution
        assert float((basis @ line - frame.flatten()[:, None]).abs().max()) < 1e-4
    assert float((values.flatten(1).mean(1)).std()) > 0.005


def test_wobble_is_as_large_as_it_says_and_slow():
    field = table.smooth_field((8, 60, 60), (4, 4, 4), generator())
    assert float(field.mean()) == pytest.approx(0, abs=1e-5)
    assert float(field.std()) == pytest.approx(1, abs=1e-4)
    assert float(field.diff(dim=2).abs().max()) < 0.3  # no edges: 20 pixels from cell to cell


def test_a_coarse_depth_knows_the_place_and_errs_by_its_share():
    depth = torch.zeros(40, 64, 64)
    depth[:, 8:56, 8:56] = 3.0
    exact = table.coarse_depth(depth, generator(), noise=0, tremble=0)
    torch.testing.assert_close(exact, depth)
    noisy = table.coarse_depth(depth, generator(), noise=0.05, tremble=0)[:, ::8, ::8]
    assert float(noisy[noisy > 0].std()) == pytest.approx(0.15, rel=0.1)
    trembling = table.coarse_depth(depth, generator(), noise=0, tremble=0.02)
    assert float(trembling[:, 30, 30].std()) == pytest.approx(0.06, rel=0.3)
    assert float(trembling[0, 8:56, 8:56].std()) < 1e-5


def test_rough_normals_are_off_by_ten_degrees_and_stay_unit():
    n = F.normalize(torch.tensor([0.2, -0.3, -1.0]), dim=0)[:, None, None]
    normals = n.expand(4, 3, 64, 64).clone()
    normals[:, :, :10] = 0
    rough = table.rough_normals(normals, generator())
    assert not rough[:, :, :10].any()
    body = (rough - normals)[:, :, 10:]
    off = table.angles(*(t[:, :, 10:].movedim(1, -1) for t in (rough, normals)))
    assert float(off.square().mean().sqrt()) == pytest.approx(10, abs=0.5)
    assert float(rough[:, :, 10:].norm(dim=1).sub(1).abs().max()) < 1e-5
    assert float(body.mean((0, 2, 3)).abs().max()) < 0.03  # no side is preferred


def test_the_room_is_a_floor_under_the_feet_and_a_wall():
    K = torch.tensor([[80.0, 0, 32], [0, 80, 32], [0, 0, 1]])
    body = torch.zeros(1, SIZE, SIZE)
    body[0, 30:34, 30:34] = 3.0
    room = table.with_room(body, 3.0, K, feet=1.0)
    assert (room > 0).all() and (room[body > 0] == 3).all()
    assert (room[0, :30] == 5.5).all()
    heights = unproject_depth(room, K)[0, 1]
    assert float((heights[50:] - 1).abs().max()) < 1e-4


# --- stages ---------------------------------------------------------------------------------------


def test_edge_filters_are_off_inside_only_and_come_back_after_an_error():
    def limits():
        return points.GRAZING_COSINE, points.EDGE_JUMP

    before = limits()
    with pytest.raises(KeyError), table.edge_filters(False):
        assert limits() == (0, math.inf)
        raise KeyError
    assert limits() == before
    with table.edge_filters(True):
        assert limits() == before


def test_depth_in_metres_has_no_rows_for_alignment():
    metric = table.Given("m", torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 3, 2, 2))
    relative = replace(metric, metric=torch.ones(1, 2, 2))
    assert set(table.ROWS) - set(table.rows_of(metric)) == set(table.NEEDS_RELATIVE)
    assert list(table.rows_of(relative)) == list(table.ROWS)


# --- measures -------------------------------------------------------------------------------------


def drawn_square():
    """A body of 20x20 pixels in two views, its left half seen by the source."""
    body = torch.zeros(V, FRAMES, 40, 40, dtype=torch.bool)
    body[..., 10:30, 10:30] = True
    seen = body.clone()
    seen[..., 20:] = False
    normals = torch.zeros(V, FRAMES, 3, 40, 40)
    normals[:, :, 2] = -1.0
    visibility = 0.5 * body.float() + 0.5 * seen.float()
    return visibility, normals, body, seen, normals


def test_a_perfect_drawing_has_no_mistake():
    found = table.view_scores(*drawn_square())
    assert found == {
        "angle": [0, 0], "angle_median": [0, 0], "coverage": [100, 100], "wrong": [0, 0],
        "outside": [0, 0],
    }  # fmt: skip


def test_angle_coverage_and_wrong_pixels_are_counted_view_by_view():
    visibility, normals, body, seen, truth = drawn_square()
    tilted = normals.clone()
    tilted[0, :, 1], tilted[0, :, 2] = 0.5, -(0.75**0.5)
    visibility[0, :, 10:20, 10:20] = 0.5  # a quarter of the body, half of the seen side
    visibility[1, :, 10:30, 20:25] = 1.0  # five columns too many, the first is forgiven
    found = table.view_scores(visibility, tilted, body, seen, truth)
    assert found["angle"] == pytest.approx([30, 0], abs=1e-3)
    assert found["coverage"] == [50, 100]
    assert found["wrong"] == [0, 100 * 4 * 20 / 400]


def test_drawn_pixels_beside_the_body_count_from_the_second_on():
    visibility, normals, body, seen, truth = drawn_square()
    visibility[0, :, 9:31, 9:31] = visibility[0, :, 9:31, 9:31].clamp(min=0.5)
    visibility[1, :, 8:32, 8:32] = visibility[1, :, 8:32, 8:32].clamp(min=0.5)
    found = table.view_scores(visibility, normals, body, seen, truth)
    assert found["outside"] == [0, 100 * (24**2 - 22**2) / 400]


def test_a_view_that_shares_nothing_with_the_source_has_no_angle():
    visibility, normals, body, seen, truth = drawn_square()
    seen[1] = False
    found = table.view_scores(visibility, normals, body, seen, truth)
    assert math.isnan(found["angle"][1]) and math.isnan(found["coverage"][1])
    assert found["wrong"][1] == 50  # half of the body is drawn as seen and was not
    assert table.mean(found["coverage"]) == 100


@pytest.fixture(scope="module")
def ball():
    """A ball at the origin, three frames of its exact depth from 3 m, and its surface."""
    rig = orbit_rig(
        torch.tensor([0, math.pi / 2]), torch.zeros(2), DISTANCE, math.radians(35), SIZE, SIZE
    )
    K = rig.K[0]
    rays = F.normalize(unproject_depth(torch.ones(1, SIZE, SIZE), K)[0], dim=0)
    along = rays[2] * DISTANCE
    under = along**2 - DISTANCE**2 + RADIUS**2
    depth = torch.where(under > 0, (along - under.clamp(min=0).sqrt()) * rays[2], 0.0)
    depth = depth.expand(3, -1, -1).clone()
    directions = torch.randn(40_000, 3, generator=generator())
    surface = cKDTree((RADIUS * F.normalize(directions, dim=1)).numpy())
    return SimpleNamespace(depth=depth, rig=rig, K=K, surfaces=[surface] * 3)


def ball_cloud(ball, depth):
    frames = torch.ones(len(depth), 3, SIZE, SIZE)
    return points_from_depth(frames, depth, (depth > 0).float(), ball.K, 1, far_side=False)


def scores(ball, cloud):
    to_world = ball.rig.T_camera_world[0].inverse()
    return table.depth_scores(cloud, ball.depth, to_world, ball.surfaces)


def test_exact_points_have_no_error_and_none_floats(ball):
    found = scores(ball, ball_cloud(ball, ball.depth))
    assert [found[c][0] for c in table.CLIP_COLUMNS] == pytest.approx([0, 0, 0, 100, 0], abs=1e-3)


def test_a_ball_that_is_too_far_has_a_depth_error_but_neither_floaters_nor_a_wrong_shape(ball):
    cloud = ball_cloud(ball, 1.1 * ball.depth)
    found = scores(ball, cloud)
    middle = float(ball.depth[ball.depth > 0].median())
    assert found["depth"][0] == pytest.approx(10 * middle, rel=0.02)
    assert found["shape"][0] < 1e-3 and found["floaters"][0] == 0
    z, truth = table.point_depths(table.at_true_distance(cloud, ball.depth), ball.depth)
    torch.testing.assert_close(z, truth, rtol=0, atol=1e-4)


def test_a_flattened_body_has_less_relief_whatever_flies_around():
    truth = 3 + 0.3 * torch.rand(3000, generator=generator())
    flat = 2 + 0.4 * truth
    assert table.resistant_slope(truth, flat) == pytest.approx(0.4, abs=1e-4)
    flat[::4] += 2.0  # a quarter flies
    assert table.resistant_slope(truth, flat) == pytest.approx(0.4, abs=0.03)


def test_swaying_is_tremble(ball):
    sway = torch.tensor([-0.02, 0.0, 0.02])[:, None, None]
    found = scores(ball, ball_cloud(ball, torch.where(ball.depth > 0, ball.depth + sway, 0.0)))
    assert found["tremble"][0] == pytest.approx(2.0, abs=0.01)


def test_floaters_are_counted_from_three_centimetres_on(ball):
    cloud = ball_cloud(ball, ball.depth)
    some = torch.zeros(len(cloud.positions), 1)
    some[::10] = 1
    for away, share in ((0.04, 10), (0.025, 0)):
        moved = replace(cloud, positions=cloud.positions + away * some * cloud.normals)
        assert scores(ball, moved)["floaters"][0] == pytest.approx(share, abs=0.1)


def test_targets_stand_around_the_true_middle_so_a_wrong_distance_is_drawn_beside(ball):
    exact = table.conditions_of(ball, ball_cloud(ball, ball.depth))
    far = table.conditions_of(ball, ball_cloud(ball, ball.depth + 0.3 * (ball.depth > 0)))

    def middle(drawn, view):  # pixels
        columns = (drawn.visibility[view, 0] > 0).any(0).nonzero()[:, 0].float()
        return float((columns.min() + columns.max()) / 2)

    focal = float(ball.K[0, 0])
    assert abs(middle(far, 0) - middle(exact, 0)) < 1
    moved = abs(middle(far, 1) - middle(exact, 1))
    assert moved == pytest.approx(0.3 * focal / DISTANCE, abs=1.5)
    ours = table.decoded(exact.normals[0, 0])[:, exact.visibility[0, 0] == 1]
    assert float((ours.norm(dim=0) - 1).abs().max()) < 0.02  # eight bits
    assert float(ours[2].max()) < 0  # towards the source camera


def test_the_rim_of_a_square_is_four_of_its_sides():
    mask = torch.zeros(1, 40, 40)
    mask[:, 10:30, 10:30] = 1
    assert table.rim_share(mask) == pytest.approx(100 * (400 - 18**2) / 400)


def test_what_a_stage_buys_and_costs_is_told_apart():
    def row(**changed):
        values = {c: [10.0] for c in table.COLUMNS} | {c: [v] for c, v in changed.items()}
        return [values | {table.MOVED + c: v for c, v in values.items()}]

    without = row(angle=12.0, coverage=15.0, depth=10.1, relief=-20.0)
    gains, losses = table.effects(without, row(), table.MOVED)
    assert gains == ["normals 12.0 → 10.0 °", "relief -20 → 10 %"]
    assert losses == ["coverage 15.0 → 10.0 %"]  # a millimetre of depth is not worth a word
