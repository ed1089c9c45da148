"""Carried features against lines of sight that are cut with planes in float64, one by one."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from turnaround.models.cameras import Rig, intrinsics, look_at, orbit_rig
from turnaround.models.feature_mesh import (
    COVERED,
    SAMPLES,
    carried,
    corner_depths,
    middle_view,
)
from turnaround.models.feature_mesh_picture import carried_pictures
from turnaround.models.unseen import STRENGTH, TINT

GRID = (6, 8)
WIDTH, HEIGHT = 128, 96
"""16 depth pixels along a token."""


def rig_at(*eyes, target=(0.0, 0.0, 0.0)):
    """Cameras at these places that look at the target."""
    K = intrinsics(math.radians(40), WIDTH, HEIGHT).expand(len(eyes), 3, 3).clone()
    return Rig(K, look_at(torch.tensor(eyes), torch.tensor(target)), WIDTH, HEIGHT)


def rays(rig, v, across, down):
    """[down, across, 3] float64 lines of sight in the world, of length 1 along the optical axis."""
    fine = rig.resized(across, down)
    y, x = torch.meshgrid(torch.arange(down) + 0.5, torch.arange(across) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).double()
    camera = pixels @ torch.linalg.inv(fine.K[v].double()).T
    return camera @ fine.T_camera_world[v, :3, :3].double()


class Rectangle:
    """Part of a plane z = far + tilt * x, with |x| and |y| up to so much."""

    def __init__(self, far, tilt=0.0, half=math.inf):
        self.far, self.tilt, self.half = far, tilt, half

    def distance(self, eye, ray):
        """Along the ray; infinite where it passes by."""
        away = (self.far + self.tilt * eye[0] - eye[2]) / (ray[..., 2] - self.tilt * ray[..., 0])
        place = eye + away[..., None] * ray
        hit = (away > 0) & (place[..., :2].abs() <= self.half).all(-1)
        return torch.where(hit, away, torch.inf)


def seen_by(rig, v, scene, across=WIDTH, down=HEIGHT):
    """Depth [down, across] float64 along the optical axis, infinite where nothing is; world points."""
    eye, ray = rig.centers[v].double(), rays(rig, v, across, down)
    depth = torch.stack([part.distance(eye, ray) for part in scene]).amin(0)
    return depth, eye + depth.nan_to_num(posinf=0.0)[..., None] * ray


def expected_shares(rig, scene, grid=GRID):
    """[h w, h w]: of view 1's samples, the tokens of view 0 in which their surface is seen."""
    h, w = grid
    far, points = seen_by(rig, 1, scene, w * SAMPLES, h * SAMPLES)
    eye = rig.centers[0].double()
    T, K = rig.T_camera_world[0].double(), rig.K[0].double()
    camera = points @ T[:3, :3].T + T[:3, 3]
    pixels = camera @ K.T
    place = pixels[..., :2] / pixels[..., 2:] / torch.tensor([WIDTH, HEIGHT])
    # Nothing else on the line from the anchor, and inside of its picture.
    nearest = torch.stack([part.distance(eye, points - eye) for part in scene]).amin(0)
    known = far.isfinite() & (nearest > 1 - 1e-6) & ((place > 0) & (place < 1)).all(-1)
    y, x = known.nonzero(as_tuple=True)
    column, row = (place[y, x] * torch.tensor([w, h])).long().unbind(1)
    shares = torch.zeros(h * w, h * w, dtype=torch.float64)
    token = (y // SAMPLES) * w + x // SAMPLES
    shares.index_put_((token, row * w + column), torch.tensor(1.0).double(), accumulate=True)
    return shares


def table(made):
    """[V, T h w, T h w]: what every token takes of every token of the anchor."""
    return made.rendered(torch.eye(made.shares.shape[1])[None])[0]


def check_shares(made, expected, misses=4):
    """But for a few samples of a token that lie on a border."""
    samples = SAMPLES**2
    count = expected.sum(1)
    found = table(made)[1].double() * count.clamp(min=1)[:, None]
    sure = (count - COVERED * samples).abs() > misses
    assert sure.float().mean() > 0.7
    assert (made.seen[1].flatten() == (count > COVERED * samples))[sure].all()
    told = sure & (count > COVERED * samples)
    assert told.any() and (found - expected)[told].abs().max() <= misses


def slanted():
    scene = [Rectangle(0.0, tilt=0.3)]
    rig = rig_at((0.0, 0.0, -3.0), (1.2, -0.3, -2.6))
    return scene, rig, seen_by(rig, 0, scene)[0][None]


EDGE = SAMPLES + 2
"""Samples of a token that an edge may take: its place is known to a pixel of the thinned depth."""


def two_squares():
    """A square half a metre in front of a wall."""
    scene = [Rectangle(0.0), Rectangle(-0.8, half=0.35)]
    rig = rig_at((0.0, 0.0, -3.0), (1.5, 0.0, -2.5))
    return scene, rig, seen_by(rig, 0, scene)[0][None]


def test_a_plane_goes_where_lines_of_sight_say():
    scene, rig, depth = slanted()
    check_shares(carried(depth, rig, 0, GRID), expected_shares(rig, scene))


def test_what_a_square_hides_is_not_carried_and_edges_are_cut():
    scene, rig, depth = two_squares()
    expected = expected_shares(rig, scene)
    holes = (expected.sum(1) == 0).view(GRID)[2:4, 1:-1]
    assert holes.any()  # the anchor's shadow behind the square, which the other camera sees
    check_shares(carried(depth, rig, 0, GRID), expected, EDGE)


def test_a_square_alone_leaves_the_background_free():
    scene = [Rectangle(-0.8, half=0.35)]
    rig = rig_at((0.0, 0.0, -3.0), (1.5, 0.0, -2.5))
    depth = seen_by(rig, 0, scene)[0][None]
    check_shares(carried(depth, rig, 0, GRID), expected_shares(rig, scene), EDGE)


@pytest.mark.parametrize("size", [(96, 128), (24, 32), (6, 8)])
def test_onto_itself_everything_stays_and_m_is_one_where_depth_is(size):
    scene, rig, _ = slanted()
    twice = rig.select([0, 0])
    depth = seen_by(rig, 0, scene, size[1], size[0])[0][None]
    depth[..., size[1] // 2 :] = 0
    made, x = carried(depth, twice, 0, GRID), torch.randn(2, 48, 5)
    half = torch.zeros(1, *GRID, dtype=torch.bool)
    half[..., : GRID[1] // 2] = True
    assert (made.seen == half).all()
    inside = half.flatten()
    assert (made.rendered(x)[:, 1] - x)[:, inside].abs().max() < 1e-5
    assert (made.rendered(x)[:, 1, ~inside] == 0).all()


def test_depth_as_coarse_as_the_tokens_tells_nearly_the_same():
    scene, rig, fine = slanted()
    coarse = seen_by(rig, 0, scene, GRID[1], GRID[0])[0][None]
    x = torch.linspace(0, 1, 8).expand(6, 8).reshape(1, 48, 1)
    a, b = (carried(depth, rig, 0, GRID) for depth in (fine, coarse))
    assert (a.seen == b.seen).float().mean() > 0.97
    both = a.seen[1] & b.seen[1]
    assert (a.rendered(x) - b.rendered(x))[0, 1, both.flatten()].abs().max() < 0.02


def test_corners_of_a_plane_are_exact():
    _, rig, depth = slanted()
    ways = rays(rig, 0, 2 * WIDTH, 2 * HEIGHT)  # its samples 1, 3, 5... straddle the pixel corners
    corners = corner_depths(depth[0].float(), 0.03)
    # Of a plane, inverse depth is linear: half way between two samples is their mean.
    scene, eye = slanted()[0][0], rig.centers[0].double()
    inverse = 1 / scene.distance(eye, ways)
    quarter = inverse[0::2, 0::2]
    step_x, step_y = inverse[0::2, 1::2] - quarter, inverse[1::2, 0::2] - quarter
    top_left = quarter - step_x / 2 - step_y / 2
    assert (corners[0].double() * top_left - 1).abs().max() < 1e-5


def test_the_back_of_a_surface_is_not_its_front():
    scene, rig, depth = slanted()
    around = rig_at((0.0, 0.0, -3.0), (0.0, 0.0, 3.0))
    made = carried(depth, around, 0, GRID)
    assert made.seen[0].all() and not made.seen[1].any()


def test_shares_of_a_token_sum_to_one_where_it_is_seen():
    _, rig, depth = two_squares()
    made = carried(depth, rig, 0, GRID)
    assert torch.allclose(table(made).sum(2), made.seen.flatten(1).float(), atol=1e-6)


def test_m_replaces_and_does_not_blend():
    _, rig, depth = two_squares()
    made, x = carried(depth, rig, 0, GRID), torch.randn(3, 2, 48, 7)
    out, there = made.replaced(x), made.seen[1].flatten()
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[:, 1, ~there], x[:, 1, ~there])
    assert torch.equal(out[:, 1, there], made.rendered(x[:, 0])[:, 1, there])
    assert (out[:, 1, there] != x[:, 1, there]).all()


def test_newly_visible_is_the_complement_and_nothing_of_the_anchor():
    _, rig, depth = two_squares()
    made = carried(depth, rig, 0, GRID)
    assert torch.equal(made.newly_visible()[1], ~made.seen[1])
    assert not made.newly_visible()[0].any()


def test_moments_do_not_mix():
    _, rig, one = slanted()
    two = two_squares()[2]
    rig = two_squares()[1]
    empty = torch.zeros_like(one)
    both, x = carried(torch.cat([one, empty, two]), rig, 0, GRID), torch.randn(1, 3 * 48, 4)
    alone = [carried(d, rig, 0, GRID).rendered(x[:, 48 * t : 48 * t + 48])
             for t, d in ((0, one), (2, two))]  # fmt: skip
    made = both.rendered(x).unflatten(2, (3, 48))
    assert torch.equal(made[:, :, 0], alone[0]) and torch.equal(made[:, :, 2], alone[1])
    assert not both.seen[:, 1].any()


def test_half_precision_features_stay_so_and_gradients_flow():
    _, rig, depth = slanted()
    made = carried(depth, rig, 0, GRID)
    x = torch.randn(1, 48, 3, requires_grad=True)
    assert made.rendered(x.bfloat16()).dtype == torch.bfloat16
    (slope,) = torch.autograd.grad(made.rendered(x).sum(), x)
    assert torch.allclose(slope[0, :, 0], table(made).sum((0, 1)), atol=1e-5)


def test_gradients_reach_all_views_that_are_replaced():
    _, rig, depth = two_squares()
    made = carried(depth, rig, 0, GRID)
    x = torch.randn(1, 2, 48, 2, dtype=torch.float32, requires_grad=True)
    (slope,) = torch.autograd.grad(made.replaced(x)[:, 1].sum(), x)
    there = made.seen[1].flatten()
    assert (slope[0, 1, there] == 0).all() and (slope[0, 1, ~there] == 1).all()
    assert torch.allclose(slope[0, 0, :, 0], table(made)[1].sum(0), atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_unit_of_length_does_not_matter(scale):
    _, rig, depth = two_squares()
    T = rig.T_camera_world.clone()
    T[:, :3, 3] *= scale
    made = carried(depth, rig, 0, GRID)
    other = carried(depth * scale, replace(rig, T_camera_world=T), 0, GRID)
    assert (made.seen == other.seen).float().mean() > 0.98


def test_true_colours_arrive_at_the_next_camera_of_a_ring():
    from turnaround.models import performer

    look = performer.draw_appearance(3)
    posed = performer.pose_performer("leo", "dance_a", torch.tensor([1.0]), look)
    angles = torch.tensor([0.0, 45.0]).deg2rad()
    rig = orbit_rig(angles, torch.zeros(2), 3.2, math.radians(38), 96, 120)
    clip = performer.render_performer(posed, look, rig)
    grid = (30, 24)
    made = carried(clip.depth[0], rig, 0, grid)
    colours = F.avg_pool2d(clip.frames[:, 0], 4)
    x = rearrange(colours, "v c h w -> v (h w) c")[None]
    there = made.seen[1].flatten()
    body = F.avg_pool2d(clip.masks[1], 4).flatten() > 0.5
    assert there.sum() > 0.6 * body.sum()
    error = (made.replaced(x)[0, 1] - x[0, 1])[there].square().mean()
    unmoved = (x[0, 0] - x[0, 1])[there].square().mean()
    assert error < unmoved / 3


def test_pictures_show_the_anchors_colours_and_in_orange_what_is_newly_visible():
    _, rig, depth = two_squares()
    blue = torch.tensor([0.1, 0.2, 0.9])[None, :, None, None].expand(1, 3, HEIGHT, WIDTH)
    shown = carried_pictures(depth, rig, 0, GRID, blue)
    assert shown.shape == (2, 1, 3, HEIGHT, WIDTH)
    assert torch.allclose(shown[0], blue, atol=1e-5)
    seen = carried(depth, rig, 0, GRID).seen[1]
    orange = F.interpolate((~seen)[None].float(), (HEIGHT, WIDTH))[0] > 0.5
    tint = torch.tensor(TINT) / 255
    strength = (shown[1, 0] * tint[:, None, None]).sum(0) / tint.square().sum()
    assert orange.any() and (strength[orange[0]] > STRENGTH).all()
    inside = shown[1, 0][:, ~orange[0]] - blue[0, :, :1, 0]
    assert inside.abs().mean() < 0.05


def test_without_a_picture_depth_is_shown():
    _, rig, depth = two_squares()
    depth = depth.float()
    shown = carried_pictures(depth, rig, 0, GRID)
    near, far = shown[0, 0, :, HEIGHT // 2, WIDTH // 2], shown[0, 0, :, HEIGHT // 2, 5]
    assert (near > far + 0.3).all()


def test_the_middle_of_an_arc_is_the_anchor():
    arc = torch.linspace(-60, 60, 5).deg2rad()
    rig = orbit_rig(arc, torch.zeros(5), 3.0, 0.6, 64, 64)
    assert middle_view(rig) == 2
    ring = orbit_rig(2 * math.pi * torch.arange(8) / 8, torch.zeros(8), 3.0, 0.6, 64, 64)
    assert middle_view(ring) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"anchor": 2}, "give 0 to 1"),
        ({"anchor": -1}, "view -1"),
        ({"depth": torch.ones(1, 100, 100)}, "another shape"),
        ({"depth": torch.zeros(1, 96, 128)}, "no surface"),
        ({"depth": torch.full((1, 96, 128), torch.nan)}, "no surface"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(changed, words):
    _, rig, depth = slanted()
    given = {"depth": depth, "rig": rig, "anchor": 0, "grid": GRID} | changed
    with pytest.raises(ValueError, match=words):
        carried(**given)


@pytest.mark.parametrize("shape", [(1, 3, 48, 4), (1, 2, 40, 4), (2, 48, 4)])
def test_features_of_another_size_get_a_sentence(shape):
    _, rig, depth = slanted()
    with pytest.raises(ValueError, match="2 views of 48 tokens"):
        carried(depth, rig, 0, GRID).replaced(torch.zeros(shape))
