"""Conditions against a ball seen from the front: seen, unseen and empty from every side."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from turnaround.models import geometry, rasterize
from turnaround.models.cameras import Rig, intrinsics, orbit_rig
from turnaround.models.geometry import DRAW, Look, encode_normals, render_conditions
from turnaround.models.points import OrientedPoints, points_from_depth, unproject_depth

SIZE, RADIUS, DISTANCE = 64, 0.5, 3.0
SEEN, UNSEEN_SIDE, GREY = 255, 128, 128
FOV = math.radians(30)


def rig(*degrees, size=SIZE, fov=FOV):
    azimuths = torch.tensor([math.radians(d) for d in degrees])
    return orbit_rig(azimuths, torch.zeros(len(degrees)), DISTANCE, fov, size, size)


def front_half(frames=1, count=6000):
    """The half of a ball that the source sees, evenly covered (a Fibonacci spiral)."""
    i = torch.arange(count) + 0.5
    height, turn = i / count, i * math.pi * (3 - 5**0.5)
    flat = (1 - height**2).sqrt()
    normals = torch.stack([flat * turn.cos(), flat * turn.sin(), -height], dim=1)
    N = count * frames
    return OrientedPoints(
        (RADIUS * normals).repeat(frames, 1),
        normals.repeat(frames, 1),
        torch.tensor([0.8, 0.3, 0.1]).expand(N, 3),
        # Half the spacing of points that share the half ball's area evenly.
        torch.full((N,), RADIUS * (2 * math.pi / count) ** 0.5 / 2),
        torch.ones(N),
        torch.arange(frames + 1) * count,
        rig(0),
    )


def disc(size=SIZE, fov=FOV):
    """Pixels whose ray meets the ball."""
    K = intrinsics(fov, size, size)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    slope = ((x - K[0, 2]) ** 2 + (y - K[1, 2]) ** 2).sqrt() / K[0, 0]
    return slope < math.tan(math.asin(RADIUS / DISTANCE))


def overlap(a, b):
    return float((a & b).sum() / (a | b).sum())


def test_from_the_front_everything_is_seen_and_its_outline_is_right():
    drawn = render_conditions(front_half(), rig(0))
    # A ball's outline from 3 m lies a little before its equator; splats add half a pixel.
    assert overlap(drawn.visibility[0, 0] == SEEN, disc()) > 0.92
    assert (drawn.visibility[0, 0] == UNSEEN_SIDE).float().mean() < 0.03


def test_normals_from_the_front_are_right_to_three_degrees():
    # A pixel of 128 spans 1.5 degrees in the ball's middle, 3 at the rim that is looked at.
    size = 2 * SIZE
    drawn = render_conditions(front_half(count=24000), rig(0, size=size))
    K = intrinsics(FOV, size, size)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1)
    a, b = rays.square().sum(-1), rays[..., 2] * DISTANCE
    depth = (b - (b * b - a * (DISTANCE**2 - RADIUS**2)).clamp(min=0).sqrt()) / a
    true = F.normalize(rays * depth[..., None] - torch.tensor([0, 0, DISTANCE]), dim=-1)
    colors = drawn.normals[0, 0].permute(1, 2, 0) / 127.5 - 1
    got = F.normalize(colors * torch.tensor([1.0, -1.0, -1.0]), dim=-1)
    # Away from the outline, where one pixel spans many degrees.
    inside = (true[..., 2] < -0.5) & disc(size)
    angle = torch.rad2deg(torch.acos((true * got).sum(-1)[inside].clamp(-1, 1)))
    assert angle.median() < 1.5 and angle.mean() < 2 and angle.quantile(0.9) < 3


def test_from_behind_everything_is_black_with_the_right_silhouette():
    drawn = render_conditions(front_half(), rig(180), Look("blanked"))
    body = drawn.visibility[0, 0] > 0
    assert (drawn.visibility[0, 0] == SEEN).sum() == 0
    assert overlap(body, disc()) > 0.92
    for picture in (drawn.normals[0, 0], drawn.partial[0, 0]):
        assert (picture[:, body] == 0).all() and (picture[:, ~body] == GREY).all()


def test_from_the_side_half_of_the_ball_is_there_and_seen():
    drawn = render_conditions(front_half(), rig(90))
    body = drawn.visibility[0, 0] > 0
    # Half of the ball, and the half pixel that splats add around it.
    assert abs(float(body.sum() / disc().sum()) - 0.5) < 0.08
    assert (drawn.visibility[0, 0] == SEEN).sum() > 0.9 * body.sum()
    # The camera at +x has the source's side, -z, on its left; splats add a pixel.
    assert body[:, : SIZE // 2 + 1].sum() > 0.97 * body.sum()


def test_colours_of_the_unseen_side_are_kept_on_request():
    drawn = render_conditions(front_half(), rig(180))
    body = drawn.visibility[0, 0] == UNSEEN_SIDE
    color = (255 * torch.tensor([[0.8], [0.3], [0.1]])).round()
    assert (drawn.partial[0, 0][:, body] == color).all()
    assert (drawn.normals[0, 0][:, body] == 0).all()


def test_normal_colours_are_right_green_up_and_blue_towards_the_camera():
    axes = torch.tensor([[1.0, 0, 0], [0, -1.0, 0], [0, 0, -1.0]])
    assert torch.equal(encode_normals(axes), torch.eye(3) * 0.5 + 0.5)


def from_one_side(size=SIZE, far_side=False):
    """The ball as one point a source pixel, from its exact depth."""
    K = intrinsics(FOV, size, size)
    rays = unproject_depth(torch.ones(1, size, size), K)[0]
    a, b = rays.square().sum(0), rays[2] * DISTANCE
    inner = (b * b - a * (DISTANCE**2 - RADIUS**2)).clamp(min=0)
    depth = torch.where(inner > 0, (b - inner.sqrt()) / a, 0.0)[None]
    frames = torch.full((1, 3, size, size), 0.4)
    return points_from_depth(frames, depth, (depth > 0).float(), K, far_side=far_side)


def holes(body):
    """Empty pixels that the body encloses."""
    empty = np.pad(~body.numpy(), 1, constant_values=True).astype(np.uint8)
    count, labels = cv2.connectedComponents(empty, connectivity=4)
    return int(((labels > 0) & (labels != labels[0, 0])).sum()) if count > 1 else 0


@pytest.mark.parametrize("zoom", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(
    "degrees, far_side",
    [(0, False), (30, False), (45, False), (180, False), (0, True), (60, True), (90, True),
     (135, True), (180, True)],
)  # fmt: skip
def test_no_holes_up_to_a_zoom_of_two(zoom, degrees, far_side):
    # The source's field of view in more pixels, so that the whole ball stays in the picture.
    points = from_one_side(far_side=far_side)
    distance = -float(points.source.centers[0, 2])
    camera = orbit_rig(
        torch.tensor([math.radians(degrees)]), torch.zeros(1), distance, FOV, SIZE, SIZE
    ).resized(int(zoom * SIZE), int(zoom * SIZE))
    body = render_conditions(points, camera).visibility[0, 0] > 0
    assert body.sum() > 100 and holes(body) == 0


def test_depth_is_that_of_the_nearest_point():
    drawn = render_conditions(front_half(), rig(0))
    middle = drawn.depth[0, 0, SIZE // 2, SIZE // 2]
    assert abs(float(middle) - (DISTANCE - RADIUS)) < 0.01
    assert (drawn.depth[drawn.visibility == 0] == 0).all()


def one_frame(points, f):
    parts = ("positions", "normals", "colors", "radii", "confidences")
    chosen = {name: getattr(points, name)[points.frame(f)] for name in parts}
    return replace(points, frame_offsets=torch.tensor([0, len(chosen["radii"])]), **chosen)


def test_views_and_frames_together_equal_one_at_a_time():
    points, cameras = front_half(3, 500), rig(0, 100, 200)
    whole = render_conditions(points, cameras)
    for v in range(3):
        for f in range(3):
            one = render_conditions(one_frame(points, f), cameras.select([v]))
            for name in ("partial", "normals", "visibility", "depth"):
                assert torch.equal(getattr(one, name)[0, 0], getattr(whole, name)[v, f])


def test_turning_rig_and_world_together_changes_nothing():
    points, cameras = front_half(count=1500), rig(20, 140)
    turn = torch.eye(4)
    turn[0, 0] = turn[2, 2] = math.cos(0.7)
    turn[0, 2], turn[2, 0] = math.sin(0.7), -math.sin(0.7)
    turned = OrientedPoints(
        points.positions @ turn[:3, :3].T, points.normals @ turn[:3, :3].T, points.colors,
        points.radii, points.confidences, points.frame_offsets, points.source,
    )  # fmt: skip
    moved = Rig(cameras.K, cameras.T_camera_world @ turn.T, SIZE, SIZE)
    a, b = render_conditions(points, cameras), render_conditions(turned, moved)
    # Rounding may move a splat over a pixel's border here and there.
    assert (a.visibility != b.visibility).float().mean() < 1e-3
    assert ((a.normals.float() - b.normals.float()).abs() > 1).float().mean() < 5e-3


def test_progress_counts_views():
    steps = []
    render_conditions(
        front_half(count=50), rig(0, 90), on_step=lambda done, total, _: steps.append((done, total))
    )
    assert steps == [(1, 2), (2, 2)]


def test_empty_cloud_is_refused():
    points = front_half(count=50)
    none = torch.zeros(0, 3)
    empty = OrientedPoints(
        none, none, none, none[:, 0], none[:, 0], torch.tensor([0, 0]), points.source
    )
    with pytest.raises(ValueError, match="The cloud has no points"):
        render_conditions(empty, rig(0))


def test_a_guessed_far_side_is_never_drawn_as_seen_and_hides_nothing():
    closed, opened = (
        render_conditions(from_one_side(far_side=far_side), rig(0, 90, 180))
        for far_side in (True, False)
    )
    assert torch.equal(closed.partial[0], opened.partial[0])  # from the source camera
    assert torch.equal(closed.normals[0], opened.normals[0])
    behind = closed.visibility[2]
    assert (behind == UNSEEN_SIDE).sum() > 100 and not (behind == SEEN).any()
    body = closed.visibility[1] > 0
    assert body.sum() > 1.3 * (opened.visibility[1] > 0).sum()  # fuller from the side


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_chunks_do_not_change_the_pictures(backend, monkeypatch):
    if backend == "numba":
        pytest.importorskip("numba")
    points, cameras = front_half(5, 300), rig(0, 100)
    whole = render_conditions(points, cameras, backend=backend)
    monkeypatch.setattr(geometry, "POINTS_AT_ONCE", {"cpu": 500})
    monkeypatch.setattr(rasterize, "CHUNK", 64)
    pieces = []
    small = render_conditions(points, cameras, backend=backend, on_step=lambda *s: pieces.append(s))
    assert len(pieces) == 2 * 5
    for name in ("partial", "normals", "visibility", "depth"):
        assert torch.equal(getattr(small, name), getattr(whole, name))


def test_a_cancelled_drawing_ends_at_once():
    class Cancelled(Exception):
        pass

    def cancel(*_):
        raise Cancelled

    for backend in DRAW.keys() - {"triton"}:
        with pytest.raises(Cancelled):
            render_conditions(front_half(count=50), rig(0, 90), on_step=cancel, backend=backend)


def test_what_cannot_be_seen_leaves_empty_pictures_and_no_nan():
    """Cameras behind the subject's back turned away, inside the body, and of nearly no focal length."""
    away = rig(0).T_camera_world.clone()
    away[0, :3, :3] = torch.diag(torch.tensor([-1.0, 1, -1])) @ away[0, :3, :3]
    away[0, :3, 3] = torch.diag(torch.tensor([-1.0, 1, -1])) @ away[0, :3, 3]
    tiny = rig(0).K.clone()
    tiny[0, 0, 0] = tiny[0, 1, 1] = 1e-3 * SIZE  # the least that a rig takes
    inside = torch.diag(torch.tensor([-1.0, 1, -1, 1]))[None]  # looks at the half ball's inner face
    T = torch.cat([away, inside, rig(0).T_camera_world])
    cameras = Rig(torch.cat([rig(0, 0).K, tiny]), T, SIZE, SIZE)
    points = front_half(count=500)
    broken = points.positions.clone()
    broken[::7] = torch.nan
    for backend in DRAW.keys() - {"triton"}:
        drawn = render_conditions(replace(points, positions=broken), cameras, backend=backend)
        assert not (drawn.visibility[0] > 0).any()
        assert (drawn.visibility[1] > 0).any()
        assert 0 < (drawn.visibility[2] > 0).sum() <= 9  # all in the middle
        assert drawn.depth.isfinite().all()


def test_normals_space_turns_the_colours_and_nothing_else():
    target, world = (
        render_conditions(front_half(), rig(40), Look(normals_space=space))
        for space in ("target camera", "world")
    )
    assert torch.equal(target.visibility, world.visibility)
    seen = world.visibility[0, 0] == SEEN
    axes = torch.tensor([1.0, -1, -1])
    n = (world.normals[0, 0][:, seen].T / 127.5 - 1) * axes
    turned = n @ rig(40).T_camera_world[0, :3, :3].T * axes * 127.5 + 127.5
    # Each of the two is rounded to a byte.
    assert (turned - target.normals[0, 0][:, seen].T).abs().max() < 3


def test_view_vector_per_camera_looks_along_the_axis():
    """Two points off the axis, turned a little towards the camera and much outwards or inwards."""
    lean = torch.tensor([[0.995, 0.0, -0.1], [-0.995, 0.0, -0.1]])
    points = OrientedPoints(
        torch.tensor([[0.5, -0.2, 0.0], [0.5, 0.2, 0.0]]), lean, torch.ones(2, 3),
        torch.full((2,), 0.05), torch.ones(2), torch.tensor([0, 2]), rig(0),
    )  # fmt: skip
    exact, axis = (
        render_conditions(points, rig(0), Look(view_vector=v)).visibility[0, 0]
        for v in ("per point", "per camera")
    )
    upper = slice(None, SIZE // 2)
    assert set(axis.unique().tolist()) == {0, SEEN}
    # The line of sight to the upper point meets it from behind: 0.5 * 0.995 > 3 * 0.1.
    assert set(exact[upper].unique().tolist()) == {0, UNSEEN_SIDE}
    assert set(exact[SIZE // 2 :].unique().tolist()) == {0, SEEN}


def test_the_unseen_side_can_be_drawn():
    """Normals that face away have less blue than grey."""
    drawn = render_conditions(front_half(), rig(180), Look(back_normals="drawn"))
    body = drawn.visibility[0, 0] == UNSEEN_SIDE
    assert (drawn.normals[0, 0, 2][body] < 128).float().mean() > 0.97
    assert (drawn.normals[0, 0, 2][body] > 0).float().mean() > 0.9


@pytest.mark.parametrize("ground, byte", [("grey", 128), ("black", 0), ("white", 255)])
def test_background_is_as_asked(ground, byte):
    drawn = render_conditions(front_half(count=500), rig(0), Look(ground=ground))
    empty = drawn.visibility[0, 0] == 0
    for picture in (drawn.partial[0, 0], drawn.normals[0, 0]):
        assert (picture[:, empty] == byte).all()


LARGE = geometry.COMPILING


def test_a_broken_optional_package_leaves_the_drawing_to_torch(monkeypatch):
    def broken(*_):
        raise OSError("no compiler")

    monkeypatch.setitem(DRAW, "numba", broken)
    geometry._works.cache_clear()
    assert geometry.fastest_backend(torch.device("cpu"), LARGE) == "torch"
    geometry._works.cache_clear()


def test_the_compiled_way_is_taken_where_it_works_and_pays():
    pytest.importorskip("numba")
    geometry._works.cache_clear()
    assert geometry.fastest_backend(torch.device("cpu"), LARGE) == "numba"
    assert geometry.fastest_backend(torch.device("cpu"), LARGE - 1) == "torch"
