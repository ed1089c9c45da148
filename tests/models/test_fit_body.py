"""A body brought to the cloud of a picture: nearest places, and where it must stand."""

import math
from dataclasses import replace

import pytest
import torch
import trimesh
from turnaround.models.body import Body
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.fit_body import (
    FREE,
    Ground,
    Places,
    Stand,
    body_height,
    closest_on_triangles,
    fit_body,
    shown_triangles,
    skin,
    spread,
    spread_evenly,
    stood,
    triangle_normals,
)
from turnaround.models.points import OrientedPoints, points_from_depth
from turnaround.models.rasterize_mesh import rasterize_mesh

pytestmark = pytest.mark.usefixtures("one_thread")

FOV = math.radians(35)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BOX = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1.0, 1) for z in (-1.0, 1)])
BOX_FACES = torch.tensor(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6],
     [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
)  # fmt: skip
PARTS = (  # middle and half size, metres
    ((0, -0.3, 0), (0.2, 0.38, 0.13)), ((0, -0.8, -0.02), (0.1, 0.13, 0.1)),
    ((-0.11, 0.45, 0.05), (0.09, 0.45, 0.1)), ((0.11, 0.45, -0.05), (0.09, 0.45, 0.1)),
    ((-0.3, -0.3, 0), (0.06, 0.34, 0.06)), ((0.3, -0.3, -0.05), (0.06, 0.34, 0.06)),
)  # fmt: skip
SHOULDER = torch.tensor([0.3, -0.6, 0.0])


def figure(*raised: float) -> Body:
    """A person of ellipsoids; a frame for every angle (radians) by which the left arm is raised."""
    ball = trimesh.creation.icosphere(subdivisions=2)
    rest, moved = [], []
    for n, (middle, half) in enumerate(PARTS):
        part = torch.from_numpy(ball.vertices).float() * torch.tensor(half) + torch.tensor(middle)
        rest.append(part)
        turns = [turned(angle if n == 5 else 0.0) for angle in raised]
        moved.append(torch.stack([(part - SHOULDER) @ t.T + SHOULDER for t in turns]))
    triangles = torch.from_numpy(ball.faces)
    faces = torch.cat([triangles + len(ball.vertices) * n for n in range(len(PARTS))])
    return Body(torch.cat(moved, 1), faces, torch.cat(rest))


def turned(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1.0]])


def photographed(body: Body, width: int = 64, height: int = 80) -> OrientedPoints:
    """The cloud of a picture of a body's first frame, with exact depth, in the body's own world."""
    camera = orbit_rig(torch.tensor([0.3]), torch.tensor([0.1]), 3.2, FOV, width, height)
    T, K = camera.T_camera_world[0], camera.K[0]
    drawn = rasterize_mesh(body.vertices[0] @ T[:3, :3].T + T[:3, 3], body.faces, K, width, height)
    colors = torch.full((1, 3, height, width), 0.5)
    cloud = points_from_depth(colors, drawn.depth[None], (drawn.depth[None] > 0).float(), K)
    at_camera = cloud.positions + cloud.source.T_camera_world[0, :3, 3]
    positions = at_camera @ T[:3, :3] + camera.centers[0]
    return replace(cloud, positions=positions, normals=cloud.normals @ T[:3, :3], source=camera)


@pytest.fixture(scope="module")
def person():
    body = figure(0.4)
    return photographed(body), body


def test_closest_places_on_triangles_beat_a_dense_search():
    corners, points = draw(40, 3, 3), 2 * draw(40, 3, seed=1)
    weights = closest_on_triangles(points, corners)
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, dtype=torch.float64))
    assert (weights > -1e-12).all()
    n = 60
    i, j = torch.meshgrid(torch.arange(n + 1), torch.arange(n + 1), indexing="ij")
    grid = torch.stack([n - i - j, i, j], -1)[i + j <= n].double() / n
    tried = torch.einsum("gc,tcd->tgd", grid, corners)
    best = (tried - points[:, None]).norm(dim=-1).amin(1)
    found = ((corners * weights[..., None]).sum(1) - points).norm(dim=-1)
    assert (found <= best + 1e-9).all()
    assert (found >= best - 6 / n).all()  # no nearer than the grid's cells allow


@pytest.mark.parametrize("flat", [[0, 0, 0], [0, 0, 1], [0, 1, 1]])
def test_triangles_without_surface_are_points_and_lines(flat):
    ends = torch.tensor([[0.0, 0, 0], [2.0, 0, 0]])
    weights = closest_on_triangles(torch.tensor([0.5, 1.0, 0]), ends[flat])
    place = weights @ ends[flat]
    expected = torch.tensor([0.5, 0, 0]) if len(set(flat)) == 2 else torch.zeros(3)
    torch.testing.assert_close(place, expected)


def test_large_triangles_are_looked_up_all_over():
    corners = torch.tensor(
        [[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], [[2, 0, 0], [2.01, 0, 0], [2, 0.01, 0]]]
    )
    places = spread(corners, 0.1)
    assert (places.faces == 1).sum() == 1
    spots = (corners[places.faces] * places.weights[..., None]).sum(1)
    anywhere = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    anywhere = anywhere[anywhere.sum(1) < 1]
    assert torch.cdist(anywhere, spots[:, :2]).amin(1).max() < 0.1


def test_even_places_fall_on_triangles_by_their_surface():
    corners = draw(200, 3, 3)
    places = spread_evenly(corners, 50_000)
    a, b, c = corners.unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1)
    wanted = 50_000 * area / area.sum()
    got = torch.bincount(places.faces, minlength=len(area))
    assert (got - wanted).abs().max() <= 1.0
    assert (places.weights >= 0).all()
    # Within the triangles too: the mean of all places is the middle of the skin.
    middle = (corners.mean(1) * area[:, None]).sum(0) / area.sum()
    spots = (corners[places.faces] * places.weights[..., None]).sum(1)
    torch.testing.assert_close(spots.mean(0), middle, atol=5e-3, rtol=0)


def plates(gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two squares of 1 m facing each other across a gap along z: outwards is towards the gap."""
    square = torch.tensor([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    vertices = torch.cat([square, square + torch.tensor([0, 0, gap])])
    near = torch.tensor([[0, 1, 2], [0, 2, 3]])  # normal +z
    return vertices, torch.cat([near, near.flip(1) + 4])


def test_a_point_lies_on_the_nearest_place_that_faces_its_way():
    vertices, faces = plates(0.06)
    normals = triangle_normals(vertices[faces])
    assert (normals[:, 2].sign() == torch.tensor([1.0, 1, -1, -1])).all()
    # Two centimetres before the near plate, but facing as the far one does.
    point, facing = torch.tensor([[0.1, 0.2, 0.02]]), torch.tensor([[0.0, 0, -1]])
    ground = Ground(vertices, faces, 1.7)
    places, away = ground.places(point, facing)
    assert places.faces[0] >= 2
    torch.testing.assert_close(away, torch.tensor([0.04]))
    places, away = ground.places(point, -facing)
    assert places.faces[0] < 2
    torch.testing.assert_close(places.of(vertices, faces), torch.tensor([[0.1, 0.2, 0]]))


def test_through_a_lens_hidden_surface_does_not_count():
    vertices, faces = plates(0.1)
    faces = torch.cat([faces, faces.flip(1)])  # both plates face both ways
    camera = orbit_rig(torch.zeros(1), torch.zeros(1), 3.0, 0.6, 64, 64)  # looks along +z
    shown = shown_triangles(vertices, faces, camera)
    assert set(shown.tolist()) == {0, 1, 4, 5}  # of the near plate
    # Nearer to the far plate, which the near one hides.
    point, facing = torch.tensor([[0.0, 0, 0.09]]), torch.tensor([[0.0, 0, -1]])
    assert Ground(vertices, faces, 1.7).places(point, facing)[0].faces[0] in (2, 3)
    places, _ = Ground(vertices, faces, 1.7, camera).places(point, facing)
    assert places.faces[0] in (4, 5)


def test_through_a_lens_a_wrong_depth_keeps_its_pixel():
    vertices, faces = plates(5.0)
    faces = faces[:2].flip(1)  # the near plate, facing the camera
    camera = orbit_rig(torch.zeros(1), torch.zeros(1), 3.0, 0.6, 64, 64)
    eye = camera.centers[0]
    spot = torch.tensor([[0.3, -0.2, 0.0]])
    point = eye + 1.2 * (spot - eye)  # 60 cm behind the plate, on the same ray
    facing = torch.tensor([[0.0, 0, -1]])
    places, _ = Ground(vertices, faces, 1.7, camera).places(point, facing)
    torch.testing.assert_close(places.of(vertices, faces), spot, atol=2e-3, rtol=0)
    places, _ = Ground(vertices, faces, 1.7).places(point, facing)
    expected = point * torch.tensor([1.0, 1, 0])
    torch.testing.assert_close(places.of(vertices, faces), expected, atol=1e-6, rtol=0)


def test_places_carry_values_of_any_shape():
    places = Places(torch.tensor([0]), torch.tensor([[0.5, 0.25, 0.25]]))
    values = torch.arange(27.0).view(3, 3, 3)
    expected = 0.5 * values[0] + 0.25 * values[1] + 0.25 * values[2]
    torch.testing.assert_close(places.of(values, torch.tensor([[0, 1, 2]]))[0], expected)


def test_a_stand_and_its_inverse_cancel():
    stand = Stand(1.3, 0.4, (0.1, -0.2, 0.3))
    points = draw(10, 3)
    torch.testing.assert_close(stand.back(stand.moved(points)), points)
    # What faces the camera (-z) turns towards -x.
    assert Stand(turn=0.1).moved(torch.tensor([[0.0, 0, -1]]))[0, 0] < 0


@pytest.mark.parametrize("align", ["place", "place and size", "place, size and turn"])
def test_body_is_brought_back_to_where_the_picture_shows_it(person, align):
    cloud, body = person
    moved = Stand(1.0, 0.0, (0.4, -0.2, 0.3))
    if align != "place":
        moved = replace(moved, size=0.7)
    if align == "place, size and turn":
        moved = replace(moved, turn=0.15)
    fit = fit_body(cloud, stood(body, moved), 0, align)
    # The depth is exact: what is left is what the pixels' size leaves open.
    assert (fit.body.vertices[0] - body.vertices[0]).norm(dim=-1).max() < 5e-4
    assert fit.distance < 1e-4 and fit.overlap > 0.98
    assert abs(fit.stand.size * moved.size - 1) < 5e-4
    torch.testing.assert_close(fit.body.rest, body.rest, atol=1e-3, rtol=0)


def test_a_picture_of_the_upper_half_fits_as_well(person):
    cloud, body = person
    at = cloud.in_source(64, 80)
    upper = at[:, 1] / at[:, 2] < 40
    half = cloud.select(upper, torch.tensor([0, int(upper.sum())]))
    half = replace(half, source=replace(half.source, height=40))
    away = stood(body, Stand(place=(0.1, 0.2, 0.3)))
    fit = fit_body(half, away, 0, "place and size")
    assert (fit.body.vertices[0] - body.vertices[0]).norm(dim=-1).max() < 2e-3


def test_where_the_depth_is_wrong_the_picture_decides(person):
    cloud, body = person
    # Depth as nets err: too flat, and tilted; every point stays on its pixel.
    eye = cloud.source.centers[0]
    rays = cloud.positions - eye
    factor = 1 + 0.5 * (cloud.positions[:, 2:].mean() - cloud.positions[:, 2:]) / rays[:, 2:]
    factor += 0.04 * cloud.positions[:, 1:2]
    wrong = replace(cloud, positions=eye + rays * factor)
    away = stood(body, Stand(0.8, 0.0, (0.2, 0.1, 0.2)))
    fit = fit_body(wrong, away, 0, "place and size")
    assert fit.overlap > 0.93
    assert fit.distance > 0.005


def test_outlines_alone_find_size_and_place(person):
    cloud, body = person
    eye, middle = cloud.source.centers[0], cloud.source.T_camera_world[0, 2, 3]
    forward = cloud.source.T_camera_world[0, 2, :3]
    rays = cloud.positions - eye
    cut_out = replace(  # of cardboard
        cloud,
        positions=eye + rays * (middle / (rays @ forward))[:, None],
        normals=-forward.expand(len(rays), 3),
    )
    fit = fit_body(cut_out, stood(body, Stand(0.8, 0.0, (0.1, 0.1, 0.1))), 0, "place and size")
    assert fit.overlap > 0.95
    assert fit.stand.size == pytest.approx(1.25, rel=0.1)


def test_switched_off_nothing_moves(person):
    cloud, body = person
    away = stood(body, Stand(place=(0.5, 0.0, 0.0)))
    fit = fit_body(cloud, away, 0, "off")
    assert torch.equal(fit.body.vertices, away.vertices) and fit.stand == Stand()
    assert fit.overlap < 0.6


def test_another_pose_overlaps_less_than_the_right_one(person):
    cloud, body = person
    right, wrong = (fit_body(cloud, figure(0.4, 2.6), f, "place and size").overlap for f in (0, 1))
    assert right > 0.98 and wrong < 0.9


def test_cloud_of_guesses_alone_is_refused(person):
    cloud, body = person
    guessed = replace(cloud, confidences=torch.zeros_like(cloud.confidences))
    with pytest.raises(ValueError, match="No point of the cloud was seen"):
        fit_body(guessed, body, 0, "place")


def test_every_way_to_align_is_known():
    assert set(FREE.values()) == {0, 3, 4, 5}


def test_height_and_skin_of_a_box():
    corners = BOX * torch.tensor([0.2, 0.8, 0.1])
    assert body_height(Body(corners[None], BOX_FACES, corners)) == pytest.approx(1.6)
    assert float(skin(corners, BOX_FACES)) == pytest.approx(2 * (0.4 * 1.6 + 0.4 * 0.2 + 1.6 * 0.2))


def test_camera_that_sees_none_of_the_body_takes_all_of_it():
    vertices, faces = plates(0.1)
    away = orbit_rig(torch.zeros(1), torch.zeros(1), 3.0, 0.6, 16, 16)
    T = away.T_camera_world.clone()
    T[0, 0, 3] += 50
    elsewhere = Rig(away.K, T, 16, 16)
    assert len(shown_triangles(vertices, faces, elsewhere)) == len(faces)


def test_one_point_is_enough_to_measure(person):
    cloud, body = person
    one = cloud.select(torch.tensor([0]), torch.tensor([0, 1]))
    assert isinstance(one, OrientedPoints)
    assert math.isfinite(fit_body(one, body, 0, "place").distance)
