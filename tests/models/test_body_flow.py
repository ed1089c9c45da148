"""Body flow: against formulas of a rigid motion, and against the exact surface flow of performers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from turnaround.models.body import Body
from turnaround.models.body_flow import body_flow
from turnaround.models.body_sources import sample_body
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.performer import draw_appearance, pose_performer
from turnaround.models.performer_truth import surface_flow, surface_truth

W, H = 64, 80
FOCAL = 90.0

pytestmark = pytest.mark.usefixtures("one_thread")


def lens() -> Rig:
    """One camera at the origin that looks along +z."""
    K = torch.tensor([[FOCAL, 0, W / 2], [0, FOCAL, H / 2], [0, 0, 1]])
    return Rig(K[None], torch.eye(4)[None], W, H)


def card(*ways: tuple[float, float, float], size: float = 0.6, z: float = 3.0) -> Body:
    """A square that faces the camera, where it is in every frame."""
    corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * size
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    places = torch.tensor(ways)[:, None] + torch.tensor([0, 0, z])
    return Body(corners + places, faces, corners)


def joined(*bodies: Body) -> Body:
    faces, at = [], 0
    for body in bodies:
        faces.append(body.faces + at)
        at += len(body.rest)
    vertices = torch.cat([b.vertices for b in bodies], 1)
    return Body(vertices, torch.cat(faces), torch.cat([b.rest for b in bodies]))


def test_a_card_that_slides_moves_by_focal_length_over_distance():
    flow = body_flow(card((0.0, 0, 0), (0.1, -0.05, 0)), lens())
    on = flow.sure_there[0, 0] > 0
    assert int(on.sum()) == 36 * 36  # 2 x 0.6 m at 90 / 3 pixels a metre
    assert torch.allclose(flow.there[0, 0, 0][on], torch.tensor(3.0), atol=1e-4)
    assert torch.allclose(flow.there[0, 0, 1][on], torch.tensor(-1.5), atol=1e-4)
    assert (flow.there[0, 0][:, ~on] == 0).all()
    back = flow.sure_back[0, 0] > 0
    assert torch.allclose(flow.back[0, 0, 0][back], torch.tensor(-3.0), atol=1e-4)


def test_a_card_that_comes_nearer_grows_from_the_middle():
    flow = body_flow(card((0.0, 0, 0), (0, 0, -1.0)), lens())
    y, x = (flow.sure_there[0, 0] > 0).nonzero().unbind(1)
    away = torch.stack([x + 0.5 - W / 2, y + 0.5 - H / 2])
    # Three metres become two: places move half their distance from the middle outwards.
    assert torch.allclose(flow.there[0, 0][:, y, x], away / 2, atol=1e-4)


def test_what_goes_behind_something_is_not_sure_but_its_way_is_known():
    screen = card((0.0, 0, 0), (0.0, 0, 0), size=0.31, z=2.0)
    walker = card((-0.9, 0, 0), (0.0, 0, 0), size=0.25, z=3.0)  # 27 pixels to the right
    flow = body_flow(joined(screen, walker), lens())
    moving = flow.there[0, 0, 0] > 20
    assert int(moving.sum()) > 150
    assert (flow.sure_there[0, 0][moving] == 0).all()
    assert torch.allclose(flow.there[0, 0, 0][moving], torch.tensor(27.0), atol=1e-4)
    still = (flow.there[0, 0].abs() < 1e-3).all(0) & (flow.sure_there[0, 0] > 0)
    assert int(still.sum()) == 28 * 28  # the screen is seen in both frames
    assert not (flow.back[0, 0, 0] < -1).any()  # nobody is seen to come from behind it


def test_what_leaves_the_picture_is_not_sure():
    flow = body_flow(card((0.0, 0, 0), (1.2, 0, 0)), lens())  # 36 pixels to the right
    there = flow.there[0, 0, 0] > 0
    columns = torch.arange(W) + 0.5 + 36
    assert (flow.sure_there[0, 0][:, columns > W][there[:, columns > W]] == 0).all()
    assert (flow.sure_there[0, 0][:, columns < W][there[:, columns < W]] == 1).all()


@pytest.fixture(scope="module")
def performer():
    times = 1.2 + torch.arange(3) / 16
    rig = orbit_rig(torch.tensor([0.0, 2.0]), torch.tensor([0.1, 0.1]), 3.8, math.radians(35), W, H)
    posed = pose_performer("kira", "dance_a", times, draw_appearance(7))
    return sample_body("kira", "dance_a", times, 7, 16.0), posed, rig


def test_flow_is_the_exact_surface_flow_of_the_performer(performer):
    body, posed, rig = performer
    truth = surface_truth(posed, rig)
    flow = body_flow(body, rig)
    assert flow.there.shape == (2, 2, 2, H, W)
    for v in range(2):
        for f in range(2):
            for steps, sure, ends in (
                (flow.there, flow.sure_there, (f, f + 1)),
                (flow.back, flow.sure_back, (f + 1, f)),
            ):
                exact, visible = surface_flow(truth, posed, rig, *((v, end) for end in ends))
                assert float((steps[v, f] - exact).abs().max()) < 1e-3
                assert torch.equal(sure[v, f] > 0, visible)
    assert float(flow.there.norm(dim=2).max()) > 3  # it does dance


def test_the_nearest_vertex_would_be_off(performer):
    """Why places in triangles are taken, not the paper's vertices."""
    body, posed, rig = performer
    truth = surface_truth(posed, rig)
    flow = body_flow(body, rig).there[0, 0]

    def seen(vertices: Tensor) -> Tensor:
        T, K = rig.T_camera_world[0], rig.K[0]
        points = (vertices @ T[:3, :3].T + T[:3, 3]) @ K.T
        return points[:, :2] / points[:, 2:]

    way = seen(body.vertices[1]) - seen(body.vertices[0])
    nearest = truth.barycentrics[0, 0].argmax(-1, keepdim=True)
    vertex = body.faces[truth.faces[0, 0].clamp(min=0)].gather(-1, nearest)[..., 0]
    off = (way[vertex].movedim(-1, 0) - flow).norm(dim=0)[truth.depth[0, 0] > 0]
    assert float(off.mean()) > 0.03 and float(off.max()) > 0.2


def test_a_body_that_stands_still_has_no_flow_and_is_sure(performer):
    body, _, rig = performer
    still = replace(body, vertices=body.vertices[:1].expand(2, -1, -1).contiguous())
    flow = body_flow(still, rig)
    assert float(flow.there.abs().max()) < 1e-4
    on = flow.sure_there > 0
    assert torch.equal(on, flow.sure_back > 0) and int(on.sum()) > 500


def test_progress_is_told_and_may_stop(performer):
    body, _, rig = performer
    seen = []
    body_flow(body, rig, on_step=lambda done, total, preview=None: seen.append((done, total)))
    assert seen[-1] == (6, 6) and seen == sorted(seen)

    def stop(done, total, preview=None):
        assert preview.shape == (3, H, W)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        body_flow(body, rig, on_step=stop)


def test_bodies_without_a_flow_are_refused():
    with pytest.raises(ValueError, match="'body' has one frame"):
        body_flow(card((0.0, 0, 0)), lens())
    with pytest.raises(ValueError, match="No camera of 'rig' sees the body"):
        body_flow(card((0.0, 0, -9), (0.0, 0, -9)), lens())
