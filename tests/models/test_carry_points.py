"""Points carried by a body: rigid motion, the true surface of later frames, cloth, the far side."""

import math
from dataclasses import replace

import pytest
import torch
import trimesh
from torch import Tensor
from turnaround.models import performer
from turnaround.models.body import Body, performer_centre
from turnaround.models.body_sources import sample_body
from turnaround.models.cameras import framing_distance, orbit_rig
from turnaround.models.carry_points import (
    GUESSED_RADIUS,
    STANDS_OFF,
    Turning,
    bind,
    carry_points,
    centred,
    nearest_places,
    outward_normals,
    same_size,
)
from turnaround.models.fit_body import (
    Ground,
    Places,
    Stand,
    body_height,
    skin,
    spread_evenly,
    stood,
)
from turnaround.models.geometry import SEEN, UNSEEN_SIDE, render_conditions
from turnaround.models.performer_truth import surface_truth
from turnaround.models.points import OrientedPoints, points_from_depth

pytestmark = pytest.mark.usefixtures("one_thread")

CLOTHES, FRAMES, WIDTH, HEIGHT = 1_000_003, 5, 96, 120
FOV = math.radians(35)
STEP = 3 / 16
"""Seconds between frames: far enough for arms and legs to have gone somewhere."""


@pytest.fixture(scope="module")
def photo():
    """A picture of a performer as a cloud, the true surface behind its pixels (`Places`), and the
    body in motion, standing in the cloud's world."""
    times = 1.2 + torch.arange(FRAMES) * STEP
    look = performer.draw_appearance(CLOTHES)
    posed = performer.pose_performer("kira", "dance_b", times, look)
    half = posed.vertices.abs().amax((0, 1))
    away = framing_distance(float(half[[0, 2]].norm()), float(half[1]), FOV, WIDTH, HEIGHT)
    source = orbit_rig(torch.zeros(1), torch.zeros(1), away, FOV, WIDTH, HEIGHT)
    first = replace(posed, vertices=posed.vertices[:1], normals=posed.normals[:1])
    clip = performer.render_performer(first, look, source)
    cloud = points_from_depth(clip.frames[0], clip.depth[0], clip.masks[0], source.K[0])
    truth = surface_truth(first, source)
    at = cloud.in_source(WIDTH, HEIGHT)
    x, y = ((at[:, i] / at[:, 2]).long() for i in (0, 1))
    places = Places(truth.faces[0, 0, y, x], truth.barycentrics[0, 0, y, x])
    shift = (source.T_camera_world - cloud.source.T_camera_world)[0, :3, 3]
    body = sample_body("kira", "dance_b", times, CLOTHES, 16.0)
    body = replace(body, vertices=body.vertices + shift, fps=1 / STEP)
    return cloud, places, body


def first_frame(cloud: OrientedPoints) -> OrientedPoints:
    return cloud.select(cloud.frame(0), cloud.frame_offsets[:2])


def turned(yaw: float, pitch: float = 0.0) -> Tensor:  # [3, 3]
    c, s, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    about_y = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return about_y @ torch.tensor([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])


def cloud_of(
    positions: Tensor, normals: Tensor, colors: Tensor | None = None, guessed: Tensor | None = None
) -> OrientedPoints:
    """Points as one picture of a camera 4 m before them would show them."""
    N = len(positions)
    camera = orbit_rig(torch.zeros(1), torch.zeros(1), 4.0, FOV, 400, 500)
    confidences = torch.ones(N) if guessed is None else 1.0 - guessed.float()
    return OrientedPoints(
        positions, normals, torch.full((N, 3), 0.5) if colors is None else colors,
        torch.full((N,), 0.004), confidences, torch.tensor([0, N]), camera,
    )  # fmt: skip


def balls(*middles: tuple[float, float, float], radius: float = 0.1) -> tuple[Tensor, Tensor]:
    """Balls as one mesh: [V, 3], [M, 3]."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=radius)
    one, faces = torch.from_numpy(ball.vertices).float(), torch.from_numpy(ball.faces)
    vertices = torch.cat([one + torch.tensor(m) for m in middles])
    return vertices, torch.cat([faces + len(one) * n for n in range(len(middles))])


def of_height(vertices: Tensor, faces: Tensor) -> Body:
    """A body of these frames [F, V, 3] whose template is 1.7 m high."""
    rest = vertices[0].clone()
    rest[0], rest[1] = torch.tensor([0, -0.85, 0]), torch.tensor([0, 0.85, 0])
    return Body(vertices, faces, rest)


@pytest.mark.parametrize("far_side", ["of the body", "of the cloud"])
def test_rigid_motion_is_exact(photo, far_side):
    cloud, _, body = photo
    # Some points stand off, so that neighbours are heard; some very far.
    off = torch.rand(len(cloud.positions), 1, generator=torch.Generator().manual_seed(0)) ** 4
    cloud = replace(cloud, positions=cloud.positions + 0.2 * off * cloud.normals)
    R, t = turned(1.1, 0.4), torch.tensor([0.7, -0.2, 1.5])
    start = body.vertices[:1]
    moving = replace(body, vertices=torch.cat([start, start @ R.T + t]))
    carried = carry_points(cloud, moving, 0, moving, far_side)
    before, after = (carried.positions[carried.frame(f)] for f in (0, 1))
    assert (after - (before @ R.T + t)).abs().max() < 1e-5
    before, after = (carried.normals[carried.frame(f)] for f in (0, 1))
    assert (after - before @ R.T).abs().max() < 1e-5


@pytest.mark.parametrize("frame", [0, 3])
def test_in_its_own_frame_the_cloud_is_the_cloud(photo, frame):
    cloud, _, body = photo
    stands = replace(body, vertices=body.vertices.roll(frame, 0))
    carried = carry_points(cloud, stands, frame, stands, "of the cloud", "as it is")
    there = carried.frame(frame)
    assert carried.frame_count == FRAMES and carried.fps == body.fps
    torch.testing.assert_close(carried.positions[there], cloud.positions, atol=2e-6, rtol=0)
    torch.testing.assert_close(carried.normals[there], cloud.normals, atol=2e-6, rtol=0)
    for name in ("colors", "radii", "confidences"):
        assert torch.equal(getattr(carried, name)[there], getattr(cloud, name))


def test_points_lie_where_the_true_surface_has_gone(photo):
    cloud, places, body = photo
    carried = carry_points(cloud, body, 0, body)
    seen = cloud.confidences > 0
    N = int(seen.sum())
    for f in range(1, FRAMES):
        truth = places.of(body.vertices[f], body.faces)[seen]
        part = slice(carried.frame(f).start, carried.frame(f).start + N)
        error = (carried.positions[part] - truth).norm(dim=1)
        moved = (truth - cloud.positions[seen]).norm(dim=1)
        assert moved.median() > 0.1
        # Depth and surface are exact at pixel centres; where a triangle nearby faces the pixel's
        # normal better, a point hangs there, millimetres away.
        assert error.median() < 2e-4 and error.quantile(0.99) < 0.02
        assert torch.equal(carried.colors[part], cloud.colors[seen])


def test_normals_turn_with_the_true_surface(photo):
    cloud, places, body = photo
    carried = carry_points(cloud, body, 0, body)
    posed = performer.vertex_normals(body.vertices, body.faces)
    seen = cloud.confidences > 0
    N = int(seen.sum())

    def cosine(normals: Tensor, f: int) -> Tensor:
        truth = places.of(posed[f], body.faces)[seen]
        return (normals * torch.nn.functional.normalize(truth, dim=1)).sum(1)

    at_start = cosine(cloud.normals[seen], 0)
    for f in range(1, FRAMES):
        part = slice(carried.frame(f).start, carried.frame(f).start + N)
        now = cosine(carried.normals[part], f)
        # The picture's normals are a few degrees off themselves; carrying adds little.
        assert now.acos().rad2deg().median() < at_start.acos().rad2deg().median() + 3
        assert cosine(cloud.normals[seen], f).median() < now.median()  # not turned: worse


def test_a_hand_before_the_hip_goes_with_the_hand():
    """Points of the hand's back, a few centimetres nearer to the hip than to the hand's front."""
    vertices, faces = balls((0, 0, 0), (0, 0, -0.15), radius=0.1)
    far = vertices.clone()
    far[len(far) // 2 :] += torch.tensor([0.8, 0, 0])  # the hand leaves
    body = of_height(torch.stack([vertices, far]), faces)
    # In the gap behind the hand, and facing backwards as the hand's back does.
    positions = torch.tensor([[0.0, 0.0, -0.065], [0.0, 0.02, -0.068]])
    normals = torch.tensor([[0.0, 0, 1], [0.0, 0, 1]])
    cloud = cloud_of(positions, -normals, guessed=torch.tensor([True, True]))
    torch.testing.assert_close(outward_normals(cloud)[:1], normals[:1], atol=1e-4, rtol=0)
    carried = carry_points(cloud, body, 0, body, "of the cloud")
    gone = carried.positions[carried.frame(1)] - positions
    torch.testing.assert_close(gone, torch.tensor([[0.8, 0, 0]]).expand(2, 3), atol=1e-4, rtol=0)


def test_far_points_follow_the_nearest_limb():
    vertices, faces = balls((0, -0.5, 0), (0, 0.5, 0))
    up = vertices.clone()
    up[: len(up) // 2] -= torch.tensor([0, 0.3, 0])
    body = of_height(torch.stack([vertices, up]), faces)
    # Hair half a metre over the head, and a skirt round the feet.
    positions = torch.tensor([[0.0, -1.1, 0], [0.4, 0.6, 0]])
    cloud = cloud_of(positions, torch.tensor([[0.0, 0, -1], [0, 0, -1]]))
    carried = carry_points(cloud, body, 0, body, "of the cloud", "as it is")
    gone = carried.positions[carried.frame(1)] - positions
    torch.testing.assert_close(gone, torch.tensor([[0, -0.3, 0], [0.0, 0, 0]]), atol=1e-4, rtol=0)


def sheet(depth: float) -> OrientedPoints:
    """Cloth of 30 x 30 cm, a centimetre between points, before the plane z = 0."""
    x, y = torch.meshgrid(*[torch.arange(-15, 16) / 100] * 2, indexing="xy")
    positions = torch.stack([x, y, torch.full_like(x, -depth)], -1).view(-1, 3)
    return cloud_of(positions, torch.tensor([[0.0, 0, -1]]).expand(len(positions), 3))


def gaps(positions: Tensor) -> Tensor:  # [31, 30] metres between neighbours along x
    return positions.view(31, 31, 3).diff(dim=1).norm(dim=-1)


def parted(apart: float) -> Body:
    """Two balls side by side; in frame 1 the right one has gone to the right."""
    vertices, faces = balls((-0.1, 0, 0), (0.1, 0, 0))
    moved = vertices.clone()
    moved[len(moved) // 2 :] += torch.tensor([apart, 0, 0])
    return of_height(torch.stack([vertices, moved]), faces)


def test_cloth_over_two_limbs_stretches_and_does_not_tear():
    body = parted(0.04)
    carried = carry_points(sheet(0.3), body, 0, body, "of the cloud", "as it is")
    stretched = gaps(carried.positions[carried.frame(1)])
    # Torn, one gap would be five centimetres wide; shared by neighbours, it is about half.
    assert stretched.amax() < 0.04 and stretched.amax(1).median() < 0.03
    torch.testing.assert_close(stretched.sum(1), torch.full((31,), 0.34), atol=2e-3, rtol=0)


def test_nothing_hangs_between_limbs_that_have_parted():
    body = parted(0.6)
    carried = carry_points(sheet(0.16), body, 0, body, "of the cloud", "as it is")
    gone = carried.positions[carried.frame(1)][:, 0] - sheet(0.16).positions[:, 0]
    stayed, went = gone.abs() < 0.01, (gone - 0.6).abs() < 0.01
    assert (stayed | went).all() and stayed.any() and went.any()


def test_points_on_the_skin_hear_nobody(photo):
    cloud, _, body = photo
    seen = cloud.select(
        cloud.confidences > 0, torch.tensor([0, int((cloud.confidences > 0).sum())])
    )
    height = body_height(body)
    own, away = nearest_places(seen, seen.normals, body.vertices[0], body.faces, height)
    binding = bind(seen.positions, seen.normals, own, away, height)
    torch.testing.assert_close(binding.weights.sum(1), torch.ones(len(own.faces)))
    assert (binding.weights >= 0).all()
    assert (binding.weights[away < 0.003 * height, 0] == 1).all()
    off = replace(seen, positions=seen.positions + 0.06 * seen.normals)
    own, away = nearest_places(off, off.normals, body.vertices[0], body.faces, height)
    binding = bind(off.positions, off.normals, own, away, height)
    assert binding.weights[away > 0.03 * height, 0].max() < 1e-6


def test_turns_of_a_mesh_are_those_of_its_motion(photo):
    _, _, body = photo
    R = turned(0.5, -1.0)
    turning = Turning(body.vertices[0], body.faces)
    found = turning(body.vertices[0] @ R.T + 2)
    torch.testing.assert_close(found, R.expand_as(found), atol=1e-4, rtol=0)
    assert (torch.linalg.det(turning(body.vertices[4])) > 0.999).all()


def test_slivers_and_loose_vertices_turn_with_the_body():
    vertices, faces = balls((0, 0, 0))
    # Triangles without surface, in all directions, and a vertex that no triangle uses.
    ways = torch.randn(20, 1, 3, generator=torch.Generator().manual_seed(0))
    lines = 1 + ways * torch.tensor([0.1, 0.2, 0.3])[:, None]
    n = len(vertices)
    vertices = torch.cat([vertices, lines.view(-1, 3), torch.full((1, 3), 9.0)])
    faces = torch.cat([faces, n + torch.arange(60).view(20, 3)])
    R = turned(0.9, 0.6)
    found = Turning(vertices, faces)(vertices @ R.T)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:-1], R.expand(n + 60, 3, 3), atol=1e-3, rtol=0)


def test_far_side_of_the_body_is_its_skin_in_every_frame(photo):
    cloud, _, body = photo
    carried = carry_points(cloud, body, 0, body)
    seen = int((cloud.confidences > 0).sum())
    assert (carried.confidences.view(FRAMES, -1)[:, seen:] == 0).all()
    for f in (0, 4):
        part = slice(carried.frame(f).start + seen, carried.frame(f).stop)
        ground = Ground(body.vertices[f], body.faces, body_height(body))
        at = carried.positions[part]
        _, away = ground.places(at, torch.zeros_like(at))  # whatever it faces
        assert away.quantile(0.999) < 1e-4
    # In colours of the picture alone.
    given = {tuple(c) for c in cloud.colors[cloud.confidences > 0].tolist()}
    assert {tuple(c) for c in carried.colors[seen : carried.frame(0).stop].tolist()} <= given


def test_far_side_does_not_cover_what_the_picture_shows(photo):
    cloud, _, body = photo
    # Clothes off the skin, or depth that lies behind it: no second skin must show through.
    rays = torch.nn.functional.normalize(cloud.positions - cloud.source.centers[0], dim=1)
    for moved in (0.0, 0.03 * cloud.normals, 0.03 * rays):
        given = replace(cloud, positions=cloud.positions + moved)
        alone, closed = (
            first_frame(carry_points(given, body, 0, body, far_side, "as it is"))
            for far_side in ("of the cloud", "of the body")
        )
        seen = [
            (render_conditions(c, given.source).visibility == SEEN).sum() for c in (alone, closed)
        ]
        # The rim is the body's: there a guessed point is as large as a pixel, and pixels are coarse.
        assert seen[1] > 0.8 * seen[0]
        # From behind, nearly all of it is a guess.
        pose = given.source.T_camera_world.clone()
        pose[0, :3, :3] = torch.diag(torch.tensor([-1.0, 1, -1]))
        drawn = render_conditions(closed, replace(given.source, T_camera_world=pose)).visibility
        assert (drawn == UNSEEN_SIDE).sum() > 0.9 * (drawn > 0).sum()


def test_body_behind_fills_only_what_no_point_hangs_on():
    vertices, faces = balls((0, 0, 0), radius=0.3)
    body = of_height(vertices[None], faces)
    spots = spread_evenly(vertices[faces], 20_000).of(vertices, faces)
    spots = spots[spots[:, 2] < -0.05]
    normals = torch.nn.functional.normalize(spots, dim=1)
    carried = carry_points(cloud_of(spots, normals, colors=0.5 + spots), body, 0, body)
    added = carried.positions[len(spots) :]
    reach = 0.004 + GUESSED_RADIUS * 0.008 + 0.01  # discs, and the spacing of places
    assert (added[:, 2] > -0.05 - reach).all() and (added[:, 2] > -0.05).float().mean() > 0.9
    # As densely as the picture's pixels, and in the colour of the front: the same x and y.
    area = float(skin(vertices, faces)) * (0.3 + 0.05) / 0.6
    assert len(added) == pytest.approx(area / 0.008**2, rel=0.15)
    deep = added[:, 2] > 0.1
    like = carried.colors[len(spots) :][deep] - 0.5
    assert (like[:, :2] - added[deep, :2]).norm(dim=1).median() < 0.06


def test_wrong_depth_is_brought_to_the_body_along_the_line_of_sight(photo):
    cloud, _, body = photo
    eye = cloud.source.centers[0]
    rays = torch.nn.functional.normalize(cloud.positions - eye, dim=1)
    seen = cloud.confidences > 0
    wrong = seen & (torch.arange(len(seen)) % 5 == 0)
    torn = replace(cloud, positions=cloud.positions + 0.1 * wrong[:, None] * rays)
    N, limit = int(seen.sum()), STANDS_OFF * body_height(body)
    mended = carry_points(torn, body, 0, body, depth="near the body").positions[:N]
    kept = carry_points(torn, body, 0, body, depth="as it is").positions[:N]
    bad = wrong[seen]
    torch.testing.assert_close(kept, torn.positions[seen], atol=2e-6, rtol=0)
    torch.testing.assert_close(mended[~bad], cloud.positions[seen][~bad], atol=2e-6, rtol=0)
    left = (mended - cloud.positions[seen])[bad]
    assert left.norm(dim=1).median() < limit + 0.01 and left.norm(dim=1).quantile(0.9) < 0.1
    sideways = left - (left * rays[seen][bad]).sum(1, keepdim=True) * rays[seen][bad]
    assert sideways.norm(dim=1).max() < 1e-5


def test_another_pose_and_person_can_carry_the_picture(photo):
    cloud, places, body = photo
    other = sample_body("leo", "walk", torch.tensor([0.2, 0.6]), CLOTHES, 16.0)
    motion = same_size(other, body, 0)
    assert float(skin(motion.vertices[0], body.faces)) == pytest.approx(
        float(skin(body.vertices[0], body.faces)), rel=1e-4
    )
    carried = carry_points(cloud, body, 0, motion)
    seen = cloud.confidences > 0
    for f in (0, 1):
        truth = places.of(motion.vertices[f], body.faces)[seen]
        at = carried.positions[carried.frame(f)][: int(seen.sum())]
        assert (at - truth).norm(dim=1).median() < 5e-4


def test_centre_is_the_bodys_and_the_camera_stays_with_the_picture(photo):
    cloud, _, body = photo
    carried = carry_points(cloud, body, 0, body, "of the cloud")
    made, standing = centred(carried, body, body)
    torch.testing.assert_close(
        performer_centre(standing.vertices), torch.zeros(3), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        first_frame(made).in_source(WIDTH, HEIGHT),
        cloud.in_source(WIDTH, HEIGHT),
        atol=1e-3,
        rtol=1e-5,
    )
    # Another body's motion: the camera looks at it as it looked at the picture's.
    held = stood(body, Stand(place=(0.3, 0.1, -0.2)))
    made, _ = centred(carried, body, replace(held, vertices=held.vertices[:1]))
    middle = made.source.T_camera_world[0] @ torch.tensor([0.0, 0, 0, 1])
    there = cloud.source.T_camera_world[0] @ torch.cat(
        [performer_centre(held.vertices[:1]), torch.ones(1)]
    )
    torch.testing.assert_close(middle, there)


def test_progress_counts_frames_and_one_point_is_enough(photo):
    cloud, _, body = photo
    one = cloud.select(cloud.confidences.argmax()[None], torch.tensor([0, 1]))
    steps = []
    carried = carry_points(
        one, body, 0, body, "of the cloud", on_step=lambda done, total: steps.append((done, total))
    )
    assert steps == [(n + 1, FRAMES) for n in range(FRAMES)]
    assert carried.positions.shape == (FRAMES, 3) and carried.positions.isfinite().all()
