"""Triangulate Pose in ComfyUI: the net's and other nodes' keypoints, the picture, what is refused."""

import math
from types import SimpleNamespace

import comfy.model_management as mm
import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.human_frames import OPENPOSE18
from turnaround.models.performer import draw_appearance, pose_performer, render_performer
from turnaround.models.performer_truth import KEYPOINTS, keypoints_3d, project_keypoints
from turnaround.models.pose import MHR_POINTS
from turnaround.models.views import Views
from turnaround.nodes import embedded, human
from turnaround.nodes import pose as nodes
from turnaround.nodes.pose import TriangulatePose

V, F, W, H = 4, 3, 96, 128
ANGLES = torch.arange(V) * math.pi / 2
RIG = orbit_rig(ANGLES, torch.full((V,), 0.2), 3.2, 0.65, W, H)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(TriangulatePose, "hidden", SimpleNamespace(unique_id="1"))


@pytest.fixture(scope="module")
def posed():
    return pose_performer("leo", "walk", 0.2 + torch.arange(F) / 16, draw_appearance(5))


@pytest.fixture(scope="module")
def true(posed):
    return keypoints_3d(posed)


@pytest.fixture(scope="module")
def performer(posed):
    """Three views of two frames."""
    rig = RIG.select([0, 1, 2])
    clip = render_performer(posed, draw_appearance(5), rig)
    return Views(clip.frames[:, :2], clip.masks[:, :2], rig)


@pytest.fixture(scope="module")
def net():
    return human.load_human(str(embedded.TINY / "human" / "turnaround_tiny_human.safetensors"))


def grey(frames=F, rig=RIG, views=V):
    return Views(torch.full((views, frames, 3, H, W), 0.5), rig=rig)


def openpose(pixels, certain=1.0):  # pixels [V, F, 26, 2]
    order = [KEYPOINTS.index(name) for name in OPENPOSE18]
    joints = torch.cat([pixels, torch.full_like(pixels[..., :1], certain)], -1)[:, :, order]
    return [
        {"people": [{"pose_keypoints_2d": frame.flatten().tolist()}], "canvas_width": W,
         "canvas_height": H} for frame in joints.flatten(0, 1)
    ]  # fmt: skip


def places(pose, true):
    """Metres between the pose and the truth, [F, P]."""
    return (pose.points - true[:, [KEYPOINTS.index(name) for name in pose.names]]).norm(dim=-1)


def test_the_human_nets_keypoints_meet_in_space_closer_than_it_sees_them(performer, true, net):
    pose, picture, note = TriangulatePose.execute(performer, net).result
    assert pose.names == KEYPOINTS and pose.pixels.shape == (3, 2, 26, 2)
    assert float(places(pose, true[:2]).median()) < 0.05
    exact, _ = project_keypoints(true[:2], performer.rig)
    agreed, _ = project_keypoints(pose.points, performer.rig)
    assert float((agreed - exact).norm(dim=-1).mean()) < 0.9 * float(
        (pose.pixels - exact).norm(dim=-1).mean()
    )
    assert picture.shape == (2, nodes.TILE, 3 * 240, 3)
    assert "% of 26 keypoints x 2 frames" in note and "pixels" in note


def test_openpose_json_gives_the_exact_places_and_wins_over_the_net(true, net):
    pixels, _ = project_keypoints(true, RIG)
    pose, picture, note = TriangulatePose.execute(grey(rig=None), net, openpose(pixels), RIG).result
    assert pose.names == OPENPOSE18
    off = places(pose, true)
    # JSON's neck is the joint here; the truth's own pixels were given.
    assert float(off.max()) < 1e-3
    assert "agree to 0.0 pixels" in note
    # Where each view and all views agree, blue covers orange, and nothing white is between.
    orange, blue = ((picture - torch.tensor(c) / 255).abs().amax(-1) < 0.02
                    for c in (nodes.SEEN, nodes.AGREED))  # fmt: skip
    assert blue.sum() > 1000 and orange.sum() < 0.02 * blue.sum()


def test_sam_3d_bodys_keypoints_do_too(true):
    pixels, _ = project_keypoints(true, RIG)
    points = torch.zeros(V, F, 70, 2)
    for name, index in MHR_POINTS.items():
        points[:, :, index] = pixels[:, :, KEYPOINTS.index(name)]
    frames = [[{"pred_keypoints_2d": p}] for p in points.flatten(0, 1)]
    pose, *_ = TriangulatePose.execute(grey(), pose={"frames": frames, "image_size": (H, W)}).result
    assert pose.names == tuple(MHR_POINTS) and float(places(pose, true).max()) < 1e-3


def tile(picture, v):
    """One view of the preview's two rows of three, [N, h, w, 3]."""
    rows, columns = (picture.shape[n] // k for n, k in ((1, 2), (2, 3)))
    return picture.unflatten(1, (2, rows)).unflatten(3, (3, columns))[:, v // 3, :, v % 3]


def test_what_a_wrong_view_shows_is_outvoted_and_drawn_apart(true):
    pixels, _ = project_keypoints(true, RIG)
    moved = pixels.clone()
    moved[1] += 12
    pose, picture, _ = TriangulatePose.execute(grey(), pose=openpose(moved)).result
    assert float(places(pose, true).max()) < 0.01
    orange = [
        int(((tile(picture, v) - torch.tensor(nodes.SEEN) / 255).abs().amax(-1) < 0.02).sum())
        for v in range(V)
    ]
    assert orange[1] > 300 and max(orange[0], *orange[2:]) < 0.05 * orange[1]


def test_an_empty_view_is_named_and_left_out(true):
    pixels, _ = project_keypoints(true, RIG)
    given = openpose(pixels)[: 3 * F] + [{"people": []}] * F
    pose, _, note = TriangulatePose.execute(grey(), pose=given).result
    assert "nobody was seen in 270°: left out" in note
    assert (pose.sure[3] == 0).all() and float(places(pose, true).max()) < 1e-3


def test_frames_without_people_are_filled_in_between(true):
    pixels, _ = project_keypoints(true[:1].expand(F, -1, -1), RIG)
    given = openpose(pixels)
    for v in range(V):
        given[v * F + 1] = {"people": []}
    pose, _, note = TriangulatePose.execute(grey(), pose=given).result
    assert (pose.found[1] == 0).all() and "67%" in note
    assert float(places(pose, true[:1])[1].max()) < 1e-3


def many(**changes):
    """What the node takes, with something wrong."""
    pixels = torch.full((V, F, 26, 2), 40.0)
    return {"views": grey(), "pose": openpose(pixels), **changes}


NO_ONE = [{"people": []}] * (V * F)
REFUSED = {
    "one view": (dict(views=Views(torch.zeros(1, F, 3, H, W), rig=RIG.select([0]))), "one view"),
    "depth": (dict(views=Views(torch.ones(V, F, 1, H, W), rig=RIG)), "depth, not colour"),
    "no rig": (dict(views=grey(rig=None)), "connect 'rig'"),
    "rig of others": (dict(rig=RIG.select([0, 1])), "2 cameras but 'views' 4 views"),
    "rig of another size": (dict(rig=RIG.resized(64, 64)), "Resize Rig"),
    "no source": (dict(pose=None), "connect 'human_net'"),
    "wrong count": (dict(pose=NO_ONE[:-1]), "holds 11 frames, but 4 views x 3 frames need 12"),
    "no list": (dict(pose="pose"), "holds 0 frames"),
    "other things": (dict(pose=[1] * (V * F)), "neither OpenPose"),
    "nobody": (dict(pose=NO_ONE), "No view shows a performer"),
    "zero confidence": (
        dict(pose=openpose(torch.full((V, F, 26, 2), 40.0), 0.0)),
        "No view shows a performer",
    ),
    "nan": (dict(pose=openpose(torch.full((V, F, 26, 2), torch.nan))), "No view shows a performer"),
    "views that disagree": (
        dict(pose=openpose(100 * torch.rand(V, F, 26, 2, generator=torch.Generator().manual_seed(0))
                           * torch.tensor([0.2, 0.3, 3.0, 1.2]).view(V, 1, 1, 1)),
             views=grey(rig=RIG.select([0, 0, 0, 0]))),
        "No keypoint is seen alike",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_sentence(case):
    changes, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        TriangulatePose.execute(**many(**changes))


def test_views_where_the_net_sees_nobody_are_refused(net):
    with pytest.raises(ValueError, match="No view shows a performer"):
        TriangulatePose.execute(grey(1), net)


def test_the_preview_stays_small_however_long_the_clip(true):
    pixels, _ = project_keypoints(true[:1].expand(17, -1, -1), RIG)
    _, picture, _ = TriangulatePose.execute(grey(17), pose=openpose(pixels)).result
    assert picture.shape == (nodes.MOMENTS, 2 * nodes.TILE, 3 * 240, 3)
    many = TriangulatePose.execute(
        grey(1, RIG.select([n % V for n in range(60)]), 60), pose=openpose(pixels[:, :1]) * 15
    ).result[1]
    assert max(many.shape) <= nodes.SIDE


def test_the_cancel_button_stops_the_search(net):
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            TriangulatePose.execute(grey(), net)
    finally:
        mm.interrupt_current_processing(False)
