"""Cameras: signs and axes against hand calculations and three.js's own formulas, round trips."""

import math

import numpy as np
import pytest
import torch
from turnaround.models import cameras as c
from turnaround.models.cameras import Rig, look_at, orbit_angles, orbit_rig, project
from turnaround.models.cameras_picture import CAMERA, FIRST, SIZE, rig_picture
from turnaround.models.views import resize_frames

DEGREES = math.pi / 180
FLOAT = 2e-5
"""Poses of a few metres pass through some ten float32 operations (relative error 1.2e-7 each)."""


def ring(*azimuths: float, elevation: float = 0.0, distance: float = 3.0, fov: float = 35.0):
    turns = torch.tensor(azimuths) * DEGREES
    heights = torch.full_like(turns, elevation * DEGREES)
    return orbit_rig(turns, heights, distance, fov * DEGREES, 128, 160)


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(noise.double())[0]
    return (q * torch.linalg.det(q)[:, None, None].sign()).float()


def random_rig(count: int, seed: int = 0) -> Rig:
    """Cameras in any place and any rotation, rolled ones too, with plain lenses."""
    generator = torch.Generator().manual_seed(seed)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, :3, :3] = rotations(count, seed)
    pose[:, :3, 3] = torch.randn(count, 3, generator=generator) * 3
    fovs = 0.3 + torch.rand(count, generator=generator)
    return Rig(torch.stack([c.intrinsics(float(f), 96, 64) for f in fovs]), pose, 96, 64)


def assert_same(a: Rig, b: Rig):
    torch.testing.assert_close(a.T_camera_world, b.T_camera_world, atol=FLOAT, rtol=0)
    torch.testing.assert_close(a.K, b.K, atol=0, rtol=FLOAT)
    assert (a.width, a.height) == (b.width, b.height)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "eye"),
    [
        (0, 0, (0, 0, -3)), (90, 0, (3, 0, 0)), (180, 0, (0, 0, 3)), (-90, 0, (-3, 0, 0)),
        (0, 90, (0, -3, 0)), (0, -30, (0, 1.5, -3 * math.cos(30 * DEGREES))),
    ],
)  # fmt: skip
def test_azimuth_turns_towards_x_and_elevation_lifts_against_y(azimuth, elevation, eye):
    rig = ring(azimuth, elevation=elevation)
    torch.testing.assert_close(rig.centers, torch.tensor([eye]).float(), atol=FLOAT, rtol=0)
    assert abs(float(rig.elevations) - elevation * DEGREES) < 1e-3
    if elevation < 90:  # above the pole there is no azimuth
        assert round(float(rig.azimuths) / DEGREES) % 360 == azimuth % 360
    pixels, depth = project(torch.zeros(1, 3), rig)
    torch.testing.assert_close(pixels[0, 0], torch.tensor([64.0, 80.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(depth, torch.tensor([[3.0]]), atol=FLOAT, rtol=0)


def test_orbit_goes_around_its_target():
    target = torch.tensor([1.0, -2.0, 4.0])
    rig = orbit_rig(torch.tensor([0.0, 2.0]), torch.tensor([0.3, -0.5]), 2.0, 0.6, 32, 48, target)
    torch.testing.assert_close((rig.centers - target).norm(dim=1), torch.full((2,), 2.0))
    middle = torch.tensor([16.0, 24.0]).expand(2, 1, 2)
    torch.testing.assert_close(project(target[None], rig)[0], middle, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("given", "azimuths", "elevations"),
    [
        ((4, 0, 360, 0), [0, 90, 180, 270], [0] * 4),  # a closed ring has no double
        ((3, -45, 90, 10), [-45, 0, 45], [10] * 3),  # an open arc reaches both ends
        ((1, 30, 90, 0), [30], [0]),
        ((2, 0, 0, 0), [0, 0], [0, 0]),
        ((5, 0, 360, -20, 2, 40), [0, 120, 240, 0, 180], [-20] * 3 + [20] * 2),
        ((2, 0, 360, 50, 2, 40), [0, 0], [50, 90]),
    ],
)
def test_orbit_angles(given, azimuths, elevations):
    views, start, span, elevation, *layers = given
    step = [layers[0], layers[1] * DEGREES] if layers else []
    got = orbit_angles(views, start * DEGREES, span * DEGREES, elevation * DEGREES, *step)
    for angles, wanted in zip(got, (azimuths, elevations), strict=True):
        torch.testing.assert_close(angles / DEGREES, torch.tensor(wanted).float())


@pytest.mark.parametrize("forward", [-1.0, 1.0])
def test_straight_up_and_down_keep_x_on_the_right_and_continue_the_orbit(forward):
    # forward = +1 looks along +y: straight down from above.
    down = look_at(torch.tensor([[0.0, -2.0 * forward, 0.0]]), torch.zeros(3))[0, :3, :3]
    torch.testing.assert_close(down[0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(down[2], torch.tensor([0, forward, 0]))
    nearly = ring(0, elevation=forward * 89.9).T_camera_world[0, :3, :3]
    torch.testing.assert_close(down, nearly, atol=2e-3, rtol=0)  # 0.1 degrees


def test_look_at_gives_rotations_that_hold_the_horizon():
    eyes = torch.randn(20, 3, generator=torch.Generator().manual_seed(3)) * 4
    R = look_at(eyes, torch.tensor([0.2, 0.1, 0.0]))[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(20, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(R) > 0).all()
    assert (R[:, 0, 1].abs() < 1e-6).all() and (R[:, 1, 1] > 0).all()


def cylinder_rims(half_width: float, half_height: float) -> torch.Tensor:
    turn = torch.arange(24) * (2 * math.pi / 24)
    x, z = half_width * turn.sin(), half_width * turn.cos()
    return torch.cat([torch.stack([x, torch.full_like(x, y), z], 1)
                      for y in (-half_height, half_height)])  # fmt: skip


@pytest.mark.parametrize("elevation", [-60, 0, 20, 45, 80])
@pytest.mark.parametrize("size", [(128, 160), (320, 96), (96, 320)])
@pytest.mark.parametrize("body", [(0.4, 0.9), (0.9, 0.9), (1.2, 0.4)])
def test_framing_distance_shows_the_whole_cylinder_and_is_not_far(body, size, elevation):
    def fits(distance: float) -> bool:
        azimuths, elevations = torch.zeros(1), torch.tensor([elevation * DEGREES])
        pixels, depth = project(
            cylinder_rims(*body), orbit_rig(azimuths, elevations, distance, 0.7, *size)
        )
        inside = (pixels >= 0) & (pixels <= torch.tensor(size))
        return bool(inside.all() and (depth > 0).all())

    distance = c.framing_distance(*body, 0.7, *size, elevation * DEGREES)
    assert fits(distance)
    # The margin is 12 percent; nearer than 1 / 1.25 of the distance, something is cut off.
    assert not fits(distance / 1.25)


def test_project_is_the_hand_calculation():
    K = torch.tensor([[[100.0, 0, 30], [0, 200, 40], [0, 0, 1]]])
    T = torch.eye(4)[None].clone()
    T[0, :3, 3] = torch.tensor([1.0, -2.0, 5.0])
    # Camera point (2, 2, 8): 100 * 2 / 8 + 30 and 200 * 2 / 8 + 40.
    pixels, depth = project(torch.tensor([[1.0, 4.0, 3.0]]), Rig(K, T, 64, 96))
    assert pixels.tolist() == [[[55.0, 90.0]]] and depth.tolist() == [[8.0]]


def test_vertical_fov_reaches_the_upper_border():
    rig = ring(0, distance=2.0, fov=60)
    top = torch.tensor([[0.0, -2 * math.tan(30 * DEGREES), 0.0]])
    torch.testing.assert_close(project(top, rig)[0][0, 0], torch.tensor([64.0, 0.0]), atol=1e-3,
                               rtol=0)  # fmt: skip


def three_js(camera: dict, points: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """three.js's PerspectiveCamera, written out: pixels [N, 2] of points in its y-up world."""
    x, y, z, w = (camera["quaternion"][k] for k in "xyzw")
    local = points.double() - torch.tensor([camera["position"][k] for k in "xyz"]).double()
    axis = torch.tensor([-x, -y, -z]).double().expand_as(local)  # the inverse turn
    twist = 2 * torch.linalg.cross(axis, local)
    local = local + w * twist + torch.linalg.cross(axis, twist)
    top = math.tan(math.radians(camera["fov"]) / 2) / camera["zoom"]  # of the near plane at 1
    right = top * size[0] / size[1]
    x_ndc, y_ndc = local[:, 0] / -local[:, 2] / right, local[:, 1] / -local[:, 2] / top
    return torch.stack([(x_ndc + 1) / 2 * size[0], (1 - y_ndc) / 2 * size[1]], 1)


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.mark.parametrize(
    ("azimuth", "left", "right"),
    [(0, None, "red"), (180, "red", None), (90, None, "white"), (-90, "white", None)],
)
def test_known_scene_appears_as_it_should_through_the_3d_camera(azimuth, left, right):
    """Red stands on the performer's +x side, green above, blue below, white behind."""
    world = {"red": (0.5, 0, 0), "green": (0, -0.5, 0), "blue": (0, 0.5, 0), "white": (0, 0, 0.5)}
    y_up = torch.tensor([(x, -y, -z) for x, y, z in world.values()])
    camera = c.opencv_to_load3d(ring(azimuth))[0]
    picture = np.zeros((160, 128, 3), np.uint8)
    pixels = three_js(camera, y_up, (128, 160)).floor().int().tolist()
    for (column, row), name in zip(pixels, world, strict=True):
        picture[row - 2 : row + 3, column - 2 : column + 3] = COLOURS[name]

    def shown(part: np.ndarray) -> set[str]:
        seen = {tuple(p) for p in part.reshape(-1, 3).tolist()} - {(0, 0, 0)}
        return {name for name, colour in COLOURS.items() if colour in seen}

    assert shown(picture[:60]) == {"green"} and shown(picture[100:]) == {"blue"}
    assert shown(picture[60:100, :52]) == ({left} if left else set())
    assert shown(picture[60:100, 76:]) == ({right} if right else set())


def test_3d_cameras_see_the_pixels_that_the_rig_sees():
    rig = random_rig(12)
    # Points before each camera, so that they stand in front of it.
    ahead = torch.randn(12, 6, 3, generator=torch.Generator().manual_seed(1)) * 0.4
    ahead[..., 2] += 4
    R, t = rig.T_camera_world[:, :3, :3], rig.T_camera_world[:, :3, 3]
    for v, camera in enumerate(c.opencv_to_load3d(rig)):
        points = (ahead[v] - t[v]) @ R[v]
        mine = project(points, rig.select([v]))[0][0].double()
        theirs = three_js(camera, points * torch.tensor([1.0, -1, -1]), (96, 64))
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)  # pixels
        # A zoom is a longer lens.
        back = c.load3d_to_opencv([camera | {"zoom": 2}], 96, 64)
        torch.testing.assert_close(back.K[0, 1, 1], rig.K[v, 1, 1] * 2)


def test_rig_survives_the_way_through_3d_cameras():
    rig = random_rig(64)
    cameras = c.opencv_to_load3d(rig)
    assert all(camera["quaternion"]["w"] >= 0 for camera in cameras)
    assert_same(c.load3d_to_opencv(cameras, 96, 64), rig)


def test_3d_camera_of_the_viewer_stands_where_it_shows():
    half = math.sqrt(0.5)
    cameras = [
        {"position": {"x": 0, "y": 0, "z": 4}, "quaternion": {"x": 0, "y": 0, "z": 0, "w": 1}},
        {"position": {"x": 4, "y": 0, "z": 0}, "quaternion": {"x": 0, "y": half, "z": 0, "w": half}},
        {"position": {"x": 0, "y": 4, "z": 4}, "target": {"x": 0, "y": 0, "z": 0}},
    ]  # fmt: skip
    rig = c.load3d_to_opencv(cameras, 128, 160)
    assert [round(a) for a in (rig.azimuths / DEGREES).tolist()] == [0, 90, 0]
    assert [round(e) for e in (rig.elevations / DEGREES).tolist()] == [0, 0, 45]
    pixels, _ = project(torch.zeros(1, 3), rig)
    torch.testing.assert_close(pixels[:, 0], torch.tensor([[64.0, 80]]).expand(3, 2))
    assert float(rig.K[0, 1, 1]) == pytest.approx(80 / math.tan(c.LOAD3D_FOV / 2 * DEGREES))


PLACE = {"position": {"x": 0, "y": 0, "z": 4}, "target": {"x": 0, "y": 0, "z": 0}}


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        ("a camera", "is a str, not a 3D camera"),
        ({}, "no usable position"),
        ({"position": {"x": 0, "y": math.nan, "z": 1}}, "no usable position"),
        ({"position": PLACE["position"]}, "no usable target"),
        ({"position": {"x": 10**400, "y": 0, "z": 0}}, "no usable position"),
        (PLACE | {"target": PLACE["position"]}, "stands on its target"),
        (PLACE | {"cameraType": "orthographic"}, "is orthographic"),
        (PLACE | {"quaternion": dict.fromkeys("xyzw", 0)}, "quaternion of zeros"),
        (PLACE | {"quaternion": {"x": 1}}, "no usable quaternion"),
        (PLACE | {"zoom": -1}, "the zoom -1; it must be a number above 0"),
        (PLACE | {"fov": "wide"}, "the fov 'wide'"),
        (PLACE | {"fov": 179}, "field of view is 179.0 degrees"),
    ],
)
def test_unusable_3d_cameras_are_refused_in_a_sentence(camera, message):
    with pytest.raises(ValueError, match=message):
        c.load3d_to_opencv([camera], 64, 64)


@pytest.mark.parametrize("size", [(128, 96), (48, 48), (200, 33)])
def test_resized_keeps_the_ray_through_a_point(size):
    rig, point = ring(0, 70, elevation=20), torch.tensor([[0.2, -0.4, 0.1]])
    scale = torch.tensor([size[0] / 128, size[1] / 160])
    moved = project(point, rig.resized(*size))[0]
    torch.testing.assert_close(moved, project(point, rig)[0] * scale, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (256, 160), (96, 200)])
def test_filled_follows_the_point_in_the_resized_picture(size):
    """A white block around the point's pixel is still around its pixel after the resize."""
    rig, point = ring(0), torch.tensor([[0.2, -0.3, 0.1]])
    x, y = project(point, rig)[0][0, 0].tolist()
    picture = torch.zeros(1, 3, 160, 128)
    block = 5
    picture[..., int(y) - block : int(y) + block + 1, int(x) - block : int(x) + block + 1] = 1
    weight = resize_frames(picture, *size)[0, 0]
    middle = torch.stack([
        (weight.sum(0) * (torch.arange(size[0]) + 0.5)).sum(),
        (weight.sum(1) * (torch.arange(size[1]) + 0.5)).sum(),
    ]) / weight.sum()  # fmt: skip
    filled = rig.filled(*size)
    # The block's middle is the middle of a pixel: up to half a pixel off, times the scale (<= 2).
    torch.testing.assert_close(project(point, filled)[0][0, 0], middle, atol=1.05, rtol=0)
    stretch = filled.K[0, 0, 0] / filled.K[0, 1, 1]
    assert abs(float(stretch) - 1) < 0.02  # rounded sizes, no distortion


def test_select_merge_and_labels():
    a, b = ring(0, 90, -90), ring(45, elevation=20)
    assert a.labels == ("0°", "90°", "270°")
    both = c.merge_rigs([a, b])
    assert both.labels == both.names == ("0°", "90°", "270°", "45°")
    picked = both.select([3, 0, 0])
    assert picked.names == ("45°", "0°", "0°")
    torch.testing.assert_close(picked.centers, both.centers[[3, 0, 0]])
    unnamed = Rig(both.K, both.T_camera_world, 128, 160)
    assert unnamed.labels == ("0° +0°", "90° +0°", "270° +0°", "45° +20°")
    assert a.get_ram_usage() == 3 * (9 + 16) * 4
    with pytest.raises(ValueError, match=r"different picture sizes \(64x64, 128x160\)"):
        c.merge_rigs([a, b.resized(64, 64)])


def test_recentred_finds_the_middle_of_a_moved_and_turned_ring():
    """Recentring undoes any turn and shift of the whole world."""
    rig = ring(0, 60, 120, 180, 240, 300, elevation=15)
    world = torch.eye(4)
    world[:3, :3], world[:3, 3] = rotations(1, seed=5)[0], torch.tensor([4.0, -7.0, 2.0])
    moved = Rig(rig.K, rig.T_camera_world @ world, 128, 160)
    assert (moved.centers - rig.centers).norm(dim=1).min() > 1
    assert_same(c.recentred(moved), rig)


@pytest.mark.parametrize("first", [0.0, 200.0])
def test_recentred_turns_camera_0_to_azimuth_0(first):
    rig = c.recentred(ring(first, first + 90, first + 180, first + 270))
    around = (rig.azimuths / DEGREES).tolist()
    assert [round(a) % 360 for a in around] == [0, 90, 180, 270]


@pytest.mark.parametrize(
    "rig",
    [ring(30, elevation=10), ring(0, elevation=90), c.merge_rigs([ring(0), ring(0)])],
    ids=["one", "one from above", "parallel"],
)
def test_recentred_without_a_meeting_point_stands_before_the_origin(rig):
    result = c.recentred(rig)
    torch.testing.assert_close(
        result.centers, torch.tensor([[0.0, 0, -3]]).expand(len(rig), 3), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("elevation", [-90, 90])
def test_recentred_knows_the_azimuth_of_a_camera_0_that_looks_straight_down_or_up(elevation):
    rig = c.merge_rigs([ring(0, 0, elevation=elevation), ring(0, 90, 180, 270)])
    poses = rig.T_camera_world.clone()
    poses[1, :2] *= -1  # turned half around, so that the common up stays upright
    rig = Rig(rig.K, poses, 128, 160)
    assert_same(c.recentred(rig), rig)


@pytest.mark.parametrize("azimuths", [(0, 180), (0, 0, 180), (0, 180, 180)])
def test_recentred_stands_midway_between_cameras_that_face_each_other(azimuths):
    rig = ring(*azimuths)
    moved = rig.T_camera_world.clone()
    moved[:, :3, 3:] -= moved[:, :3, :3] @ torch.tensor([[1.0], [2.0], [5.0]])
    assert_same(c.recentred(Rig(rig.K, moved, 128, 160)), rig)


def test_recentred_cameras_without_a_common_up_stand_as_the_first():
    rig = ring(0, 180)
    rolled = rig.T_camera_world.clone()
    rolled[1, :2] *= -1  # upside down
    result = c.recentred(Rig(rig.K, rolled, 128, 160))
    torch.testing.assert_close(result.T_camera_world, rolled, atol=FLOAT, rtol=0)


@pytest.mark.parametrize("azimuths", [(0, 120, 240), (0, 180)])
def test_recentred_refuses_cameras_that_look_away_from_each_other(azimuths):
    rig = ring(*azimuths)
    outward = rig.T_camera_world.clone()
    outward[:, [0, 2]] *= -1  # about-turn on the spot: x and z of the camera
    with pytest.raises(ValueError, match="look away from each other"):
        c.recentred(Rig(rig.K, outward, 128, 160))


def test_plain_lenses_are_told_from_calibrated_ones():
    rig = ring(0)
    shifted, stretched = rig.K.clone(), rig.K.clone()
    shifted[0, 0, 2] += 2
    stretched[0, 0, 0] *= 1.1
    assert c.has_plain_lenses(rig)
    for K in (shifted, stretched):
        assert not c.has_plain_lenses(Rig(K, rig.T_camera_world, 128, 160))


def changed(matrix: str, at: tuple, value: float) -> dict:
    rig = ring(0, 90)
    parts = {"K": rig.K.clone(), "T_camera_world": rig.T_camera_world.clone()}
    parts[matrix][at] = value
    return parts


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (changed("K", (0, 0, 2), math.nan), "NaN or infinity"),
        (changed("T_camera_world", (1, 2, 3), math.inf), "NaN or infinity"),
        (changed("K", (0, 1, 1), 0), "focal length of nearly zero"),
        (changed("K", (0, 0, 0), -100), "focal length of nearly zero"),
        (changed("T_camera_world", (0, 0, 0), -1), "scaled, sheared or mirrored"),
        (changed("T_camera_world", (0, 0, 0), 2), "scaled, sheared or mirrored"),
        ({"width": 0}, "picture size is 0x160"),
        ({"names": ("a",)}, "2 cameras but 1 names"),
        ({"K": torch.eye(3)[None]}, "shape"),
        ({"K": torch.zeros(0, 3, 3)}, "1 to 256 cameras, got 0"),
        ({"K": torch.zeros(257, 3, 3)}, "1 to 256 cameras, got 257"),
    ],
)
def test_impossible_rigs_are_refused(parts, message):
    rig = ring(0, 90)
    whole = {"K": rig.K, "T_camera_world": rig.T_camera_world, "width": 128, "height": 160} | parts
    with pytest.raises(ValueError, match=message):
        Rig(**whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ring(0, distance=0), "must be above 0 metres, got 0"),
        (lambda: ring(0, distance=math.nan), "must be above 0 metres"),
        (lambda: ring(0, fov=0.1), "field of view is 0.1 degrees"),
        (lambda: orbit_angles(2, 0, 6, 0, 3), "3 layers need at least 3 views, got 2"),
        (lambda: orbit_angles(9, 0, 6, 1, 3, 0.5), "elevation of 115 degrees, beyond the pole"),
        (lambda: look_at(torch.zeros(1, 3), torch.zeros(3)), "stands on its target"),
        (lambda: c.load3d_to_opencv([], 64, 64), "is empty"),
    ],
)
def test_impossible_orbits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def spots(rig: Rig, colour: tuple) -> np.ndarray:
    """The middle of each panel's dots of one colour, -1..1 from its middle, right and down."""
    picture = np.array(rig_picture(rig))[:SIZE]
    panels = picture[:, :SIZE], picture[:, SIZE:]
    found = [np.argwhere((panel == colour).all(-1)).mean(0)[::-1] for panel in panels]
    return np.array(found) / (SIZE / 2) - 1


@pytest.mark.parametrize(
    ("azimuth", "elevation", "above", "side"),
    [
        (0, 0, (0, 1), (-1, 0)),  # the source camera: below in the plan, left in the side view
        (90, 0, (1, 0), (0, 0)),
        (180, 0, (0, -1), (1, 0)),
        (0, 90, (0, 0), (0, -1)),
    ],
)
def test_rig_picture_draws_camera_0_where_it_stands(azimuth, elevation, above, side):
    drawn = spots(ring(azimuth, elevation=elevation), FIRST)
    # The picture reaches 1.25 times as far as the camera; its stroke points inward.
    assert np.abs(drawn - np.array([above, side]) * 0.8).max() < 0.1


@pytest.mark.parametrize("views", [1, 64])
def test_rig_picture_shows_any_number_of_cameras(views):
    rig = ring(*(360 / views * v for v in range(views)))
    picture = rig_picture(rig)
    blue = (np.array(picture) == CAMERA).all(-1).any()
    assert picture.size == (2 * SIZE, SIZE + 28) and blue == (views > 1)
