"""Oriented points against a sphere of known place and size; depth conventions."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.cameras import intrinsics
from turnaround.models.depth import CONVENTIONS, depth_to_metres
from turnaround.models.points import erode, points_from_depth, unproject_depth

SIZE, RADIUS, DISTANCE = 64, 0.5, 3.0
K = intrinsics(math.radians(30), SIZE, SIZE)
CENTRE = torch.tensor([0.0, 0.0, DISTANCE])


def sphere(count=1):
    """Exact depth [F, H, W] and mask of a ball in front of the camera."""
    rays = unproject_depth(torch.ones(1, SIZE, SIZE), K)[0]
    a, b = rays.square().sum(0), rays[2] * DISTANCE
    inner = b * b - a * (DISTANCE**2 - RADIUS**2)
    depth = torch.where(inner > 0, (b - inner.clamp(min=0).sqrt()) / a, 0.0)
    return depth.repeat(count, 1, 1), (inner > 0).float().repeat(count, 1, 1)


def cloud(count=1, **changed):
    depth, masks = sphere(count)
    given = {
        "frames": torch.full((count, 3, SIZE, SIZE), 0.25), "depth": depth, "masks": masks,
        "far_side": False,
    }  # fmt: skip
    return points_from_depth(**{**given, **changed}, K=K)


def true_normals(points):
    return F.normalize(points.positions - points.source.centers[0] - CENTRE, dim=1)


def test_points_lie_on_the_sphere():
    points = cloud()
    from_camera = points.positions - points.source.centers[0]
    assert ((from_camera - CENTRE).norm(dim=1) - RADIUS).abs().max() < 1e-4


def test_normals_are_right_to_three_degrees():
    points = cloud()
    angle = torch.rad2deg(torch.acos((points.normals * true_normals(points)).sum(1).clamp(-1, 1)))
    assert angle.max() < 3 and angle.mean() < 0.5


def test_normals_face_the_source_camera():
    points = cloud()
    to_camera = points.source.centers[0] - points.positions
    assert ((points.normals * to_camera).sum(1) > 0).all()
    assert points.confidences.min() > 0 and points.confidences.max() <= 1


def test_origin_is_inside_the_performer_and_the_source_looks_along_z():
    points = cloud()
    x, y, z = points.source.centers[0].tolist()
    assert abs(x) < 1e-4 and abs(y) < 1e-4 and z < 0
    assert torch.equal(points.source.T_camera_world[0, :3, :3], torch.eye(3))
    assert points.positions[:, 2].amin() < 0 < points.positions[:, 2].amax()


def test_points_across_a_depth_jump_keep_their_own_normals():
    depth = torch.full((1, SIZE, SIZE), 2.0)
    depth[..., SIZE // 2 :] = 4.0
    points = cloud(depth=depth, masks=torch.ones(1, SIZE, SIZE))
    assert torch.allclose(points.normals[:, 2], torch.tensor(-1.0), atol=1e-4)


def test_grazing_surfaces_are_dropped():
    # A wall that runs away from the camera: 87 degrees off its view.
    rays = unproject_depth(torch.ones(1, SIZE, SIZE), K)[0]
    normal = torch.tensor([math.cos(math.radians(2)), 0.0, -math.sin(math.radians(2))])
    wall = 0.3 / (rays * normal.view(3, 1, 1)).sum(0)
    wall = torch.where((wall > 0) & (wall < 8), wall, 0.0)[None]
    with pytest.raises(ValueError, match="No point of the performer is left"):
        cloud(depth=wall, masks=(wall > 0).float())


def test_erosion_takes_pixels_off_the_mask_but_not_off_the_border():
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[:, :, :6] = True
    assert torch.equal(erode(masks, 2)[0].sum(1), torch.full((10,), 4))
    assert len(cloud(erosion=0).positions) > len(cloud(erosion=2).positions)


def test_empty_frames_have_no_points():
    depth, masks = sphere(3)
    masks[1] = 0
    points = cloud(3, masks=masks)
    counts = points.frame_offsets.diff().tolist()
    assert counts[1] == 0 and counts[0] == counts[2] > 0
    assert len(points.positions[points.frame(1)]) == 0


def test_nan_and_infinite_depth_pixels_are_dropped():
    depth, _ = sphere()
    depth[0, 30:33, 30:33], depth[0, 20, 32] = float("nan"), float("inf")
    points = cloud(depth=depth)
    for name in ("positions", "normals", "radii", "confidences"):
        assert getattr(points, name).isfinite().all()


def test_depth_of_nothing_but_nan_is_refused():
    with pytest.raises(ValueError, match="no usable depth inside the mask"):
        cloud(depth=torch.full((1, SIZE, SIZE), float("nan")))


def test_cloud_refuses_parts_that_do_not_fit():
    points = cloud()
    with pytest.raises(ValueError, match="radii"):
        replace(points, radii=points.radii[:-1])
    with pytest.raises(ValueError, match="frame offsets"):
        replace(points, frame_offsets=points.frame_offsets + 1)


def test_extent_and_size_are_those_of_the_sphere():
    points = cloud()
    across, up = points.extent()
    assert 0.4 < across < 0.52 and 0.4 < up < 0.52
    assert points.get_ram_usage() > 11 * 4 * len(points.positions)


# ---------------------------------------------------------------- the far side

THIN, HALF_LENGTH = 0.05, 0.7


def limb(**changed):
    """Seen points of an upright round limb of 5 cm radius, 1.4 m long."""
    rays = unproject_depth(torch.ones(1, SIZE * 4, SIZE * 4), K4)[0]
    a, b = rays[0] ** 2 + rays[2] ** 2, rays[2] * DISTANCE
    inner = b * b - a * (DISTANCE**2 - THIN**2)
    depth = torch.where(inner > 0, (b - inner.clamp(min=0).sqrt()) / a, 0.0)
    depth = torch.where((rays[1] * depth).abs() < HALF_LENGTH, depth, 0.0)[None]
    frames = torch.full((1, 3, SIZE * 4, SIZE * 4), 0.25)
    return points_from_depth(frames, depth, (depth > 0).float(), K4, erosion=0, **changed)


K4 = intrinsics(math.radians(30), SIZE * 4, SIZE * 4)


def test_a_round_limb_is_closed_to_about_its_true_thickness():
    points = limb()
    across = (points.positions - points.source.centers[0] - CENTRE)[:, [0, 2]]
    far = (points.confidences == 0) & (across[:, 1] > 0.5 * THIN)  # walls stand nearer
    radii = across[far].norm(dim=1)
    assert far.sum() > 500 and radii.median() == pytest.approx(THIN, rel=0.2)


def test_the_far_side_has_the_colour_of_the_front_and_never_counts_as_seen():
    seen, points = limb(far_side=False), limb()
    front = points.confidences > 0
    assert front.sum() == len(seen.positions) and (seen.confidences > 0).all()
    assert torch.equal(points.positions[front], seen.positions)
    assert (~front).sum() > front.sum() and points.colors[~front].unique().tolist() == [0.25]


def test_every_frame_keeps_its_own_far_side():
    depth, masks = sphere(3)
    masks[1] = 0
    points = cloud(3, masks=masks, far_side=True)
    first, second, third = (points.positions[points.frame(f)] for f in range(3))
    assert len(second) == 0 and torch.equal(first, third)


# ---------------------------------------------------------------- depth conventions

FOCAL = float(K[1, 1])


def pictures(convention):
    """The sphere before a wall at 5 m, as a depth node would give it."""
    depth, masks = sphere()
    depth = torch.where(masks > 0.5, depth, 5.0)
    near, far = float(depth.min()), float(depth.max())
    drawn = {
        "metres": depth,
        "inverse (1/metres)": 1 / depth,
        "near is white": (far - depth) / (far - near),
        "near is black": (depth - near) / (far - near),
    }[convention]
    return drawn, masks, depth


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_gives_a_convex_performer_at_a_plausible_distance(convention):
    drawn, masks, depth = pictures(convention)
    metres, note = depth_to_metres(drawn, masks, convention, FOCAL, 2 * RADIUS)
    inside = masks > 0.5
    assert torch.corrcoef(torch.stack([metres[inside], depth[inside]]))[0, 1] > 0.99
    assert (metres[inside].median() - depth[inside].median()).abs() < 0.5
    assert "inside out" not in note
    assert ("guess" in note) == (convention in ("near is white", "near is black"))


@pytest.mark.parametrize(
    ("sent", "read"), [("near is white", "near is black"), ("near is black", "near is white")]
)
@pytest.mark.parametrize("background", [True, False])
def test_swapped_near_and_far_are_noticed(sent, read, background):
    drawn, masks, _ = pictures(sent)
    if not background:
        drawn = torch.where(masks > 0.5, drawn, float("nan"))
    _, note = depth_to_metres(drawn, masks, read, FOCAL, 2 * RADIUS)
    assert "inside out" in note and "opposite depth convention" in note


def test_metres_read_as_inverse_are_refused_with_both_distances():
    drawn, masks, _ = pictures("metres")
    with pytest.raises(ValueError, match=r"0\.\d+ m away.*choose another depth convention"):
        depth_to_metres(drawn, masks, "inverse (1/metres)", FOCAL, 2 * RADIUS)


def test_relative_depth_without_a_finite_value_is_refused():
    _, masks, _ = pictures("metres")
    with pytest.raises(ValueError, match="no finite value inside the mask"):
        depth_to_metres(masks * float("nan"), masks, "near is white", FOCAL, 1.0)
