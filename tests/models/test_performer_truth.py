"""Keypoints, normals and surface flow of the synthetic performers, against hand computations."""

import math

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.cameras import orbit_rig
from turnaround.models.performer import JOINTS, draw_appearance, pose_performer, render_geometry
from turnaround.models.performer_truth import (
    COCO17,
    KEYPOINTS,
    keypoint_visibility,
    keypoints_3d,
    project_keypoints,
    surface_flow,
    surface_truth,
)

W, H = 96, 120


@pytest.fixture(scope="module")
def scene():
    body = pose_performer("ben", "walk", torch.tensor([0.3, 0.36]), draw_appearance(3))
    azimuths = torch.tensor([0.0, 0.3, math.pi])
    rig = orbit_rig(azimuths, torch.zeros(3), 3.2, math.radians(38), W, H)
    return body, rig, surface_truth(body, rig)


def point(name: str) -> int:
    return KEYPOINTS.index(name)


def test_coco_is_17_known_points_with_left_and_right_in_place():
    assert len(COCO17.names) == len(set(COCO17.indices)) == 17
    assert KEYPOINTS[: len(JOINTS)] == JOINTS
    sides = {"left": "L", "right": "R"}
    for name, index in zip(COCO17.names, COCO17.indices, strict=True):
        side, _, part = name.rpartition("_")
        assert KEYPOINTS[index] == (f"{part}.{sides[side]}" if side else part)


def test_keypoints_fall_where_a_hand_computation_puts_them(scene):
    body, rig, _ = scene
    points = keypoints_3d(body)
    pixels, depth = project_keypoints(points, rig)
    # Camera 0 stands at (0, 0, -3.2) and looks along +z; camera 2 opposite looks along -z.
    x, y, z = points[1, point("knee.L")]
    focal, middle = rig.K[0, 0, 0], rig.K[0, :2, 2]
    for v, sign in ((0, 1), (2, -1)):
        ahead = 3.2 + sign * z
        expected = middle + focal * torch.stack([sign * x, y]) / ahead
        torch.testing.assert_close(pixels[v, 1, point("knee.L")], expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(depth[v, 1, point("knee.L")], ahead, rtol=0, atol=1e-5)


def test_face_points_are_arranged_as_in_a_face(scene):
    body, _, _ = scene
    at = dict(zip(KEYPOINTS, keypoints_3d(body)[0], strict=True))
    assert at["ear.L"][0] > at["eye.L"][0] > at["nose"][0] > at["eye.R"][0] > at["ear.R"][0]
    assert at["nose"][1] > at["eye.L"][1]  # y points down
    assert at["nose"][2] < at["eye.L"][2] < at["ear.L"][2]  # the face is towards -z
    assert 0.1 < (at["hand.L"] - at["wrist.L"]).norm() < 0.25


def test_the_nose_shows_from_the_front_and_not_from_behind(scene):
    body, rig, truth = scene
    visible = keypoint_visibility(*project_keypoints(keypoints_3d(body), rig), truth.depth)
    for name in ("nose", "eye.L", "eye.R"):
        assert visible[0, :, point(name)].all()
        assert not visible[2, :, point(name)].any()
    for name in ("shoulder.L", "shoulder.R", "knee.L", "neck"):
        assert visible[0, :, point(name)].all()


def test_points_out_of_the_picture_or_behind_the_camera_are_not_visible():
    P = len(KEYPOINTS)
    pixels, depth = torch.full((1, 1, P, 2), 5.0), torch.full((1, 1, P), 2.0)
    empty = torch.zeros(1, 1, 10, 10)
    pixels[..., 0, 0], pixels[..., 1, 1], pixels[..., 2, 0] = -0.1, 10.0, torch.nan
    depth[..., 3] = -2.0
    visible = keypoint_visibility(pixels, depth, empty)[0, 0]
    assert visible.tolist() == [False] * 4 + [True] * (P - 4)
    # A wall a metre in front hides everything; one a metre behind, nothing.
    pixels, depth = torch.full((1, 1, P, 2), 5.0), torch.full((1, 1, P), 2.0)
    assert not keypoint_visibility(pixels, depth, empty + 1).any()
    assert keypoint_visibility(pixels, depth, empty + 3).all()


def test_depth_and_normals_are_those_of_the_renderer(scene):
    body, rig, truth = scene
    depth, normals = render_geometry(body, 1, rig.K[2], rig.T_camera_world[2], W, H)
    assert torch.equal(truth.depth[2, 1], depth)
    assert torch.equal(truth.normals_world[2, 1], normals)


def test_camera_normals_are_the_world_normals_turned_into_the_camera(scene):
    _, rig, truth = scene
    turned = torch.einsum("vab,vfbhw->vfahw", rig.T_camera_world[:, :3, :3], truth.normals_world)
    torch.testing.assert_close(truth.normals_camera, turned, rtol=0, atol=1e-6)
    hit = truth.depth > 0
    assert (truth.normals_camera[:, :, 2][hit] < 0.1).float().mean() > 0.98  # towards the camera


def test_batched_truth_is_the_truth_one_by_one(scene):
    body, rig, truth = scene
    batched = surface_truth(body, rig, batch=4)
    assert all(torch.equal(a, b) for a, b in zip(vars(truth).values(), vars(batched).values()))  # noqa: B905


def test_a_performer_who_stands_still_has_no_flow():
    body = pose_performer("ada", "walk", torch.tensor([0.3, 0.3]), draw_appearance(3))
    rig = orbit_rig(torch.tensor([0.4]), torch.zeros(1), 3.2, math.radians(38), W, H)
    truth = surface_truth(body, rig)
    flow, visible = surface_flow(truth, body, rig, (0, 0), (0, 1))
    assert flow.abs().max() < 1e-3
    assert torch.equal(visible, truth.faces[0, 0] >= 0)


@pytest.mark.parametrize("source, target", [((0, 0), (0, 1)), ((0, 1), (1, 1)), ((1, 0), (0, 1))])
def test_flow_there_and_back_returns_to_the_pixel(scene, source, target):
    body, rig, truth = scene
    forward, visible = surface_flow(truth, body, rig, source, target)
    back, seen = surface_flow(truth, body, rig, target, source)
    y, x = visible.nonzero().unbind(-1)
    start = torch.stack([x, y], -1) + 0.5
    landed = start + forward[:, y, x].T
    corner = (landed - 0.5).floor().long()
    steps = [(i, j) for i in (0, 1) for j in (0, 1)]
    around = [(corner[:, 1] + j, corner[:, 0] + i) for i, j in steps]
    flows = torch.stack([back[:, b, a] for b, a in around])
    # Between pixels the flow is interpolated, which has a meaning inside one smooth surface only.
    smooth = torch.stack([seen[b, a] for b, a in around]).all(0)
    smooth &= (flows.amax(0) - flows.amin(0)).amax(0) < 0.5
    grid = landed / torch.tensor([W, H]) * 2 - 1
    returned = F.grid_sample(back[None], grid[None, None], align_corners=False)[0, :, 0].T
    error = (landed + returned - start).norm(dim=-1)[smooth]
    assert len(error) > 300
    assert error.median() < 0.02
    assert error.quantile(0.99) < 0.15


def test_flow_leads_to_the_same_place_of_the_body(scene):
    body, rig, truth = scene
    flow, visible = surface_flow(truth, body, rig, (0, 0), (1, 0))
    y, x = visible.nonzero().unbind(-1)
    to = (torch.stack([x, y], -1) + 0.5 + flow[:, y, x].T).floor().long()
    there = truth.places[1, 0][:, to[:, 1], to[:, 0]]
    gap = (there - truth.places[0, 0][:, y, x]).norm(dim=0)
    # The nearest pixel's centre is up to 0.7 pixels off; a pixel spans about 2.3 cm here.
    assert gap.median() < 0.02
    assert gap.quantile(0.95) < 0.05


def test_the_back_is_not_visible_from_the_front_and_pairs_come_as_a_batch(scene):
    body, rig, truth = scene
    views = torch.tensor([2, 1])
    flow, visible = surface_flow(truth, body, rig, (0, torch.tensor([0, 1])), (views, 0))
    for i, (f, w) in enumerate(((0, 2), (1, 1))):
        single = surface_flow(truth, body, rig, (0, f), (w, 0))
        torch.testing.assert_close(flow[i], single[0], rtol=0, atol=1e-4)
        assert (visible[i] == single[1]).float().mean() > 0.999
    hit = truth.faces[0, 0] >= 0
    assert visible[0][hit].float().mean() < 0.05
    assert flow[0].abs().amax(0)[~hit].max() == 0
