"""MV-Opt Refine in the real ComfyUI: both modes, the loss, what is refused, the cancel button."""

from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.utils
import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.mv_opt import refine
from turnaround.models.mv_opt_objective import Settings
from turnaround.models.mv_opt_picture import HEIGHT, WIDTH
from turnaround.models.performer import draw_appearance, pose_performer, render_performer
from turnaround.models.pose import Pose
from turnaround.models.view_weights import ViewWeights
from turnaround.models.views import Views
from turnaround.nodes import embedded, human
from turnaround.nodes.refine import PAPER, SOUND, MVOptRefine

V, F, W, H = 3, 3, 48, 64
RIG = orbit_rig(0.5 * torch.arange(V), torch.full((V,), 0.1), 3.2, 0.6, W, H)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(MVOptRefine, "hidden", SimpleNamespace(unique_id="1"))


@pytest.fixture(scope="module")
def scene():
    """(views of which one has a cast, depth)"""
    look = draw_appearance(5)
    posed = pose_performer("kira", "walk", 0.2 + torch.arange(F) / 16, look)
    clip = render_performer(posed, look, RIG)
    bad = clip.frames.clone()
    bad[1] *= torch.tensor([1.2, 1.0, 0.8])[:, None, None]
    return Views(bad.clamp(0, 1), clip.masks, RIG, 12.0), Views(clip.depth[:, :, None], None, RIG)


@pytest.fixture(scope="module")
def net():
    return human.load_human(str(embedded.TINY / "human" / "turnaround_tiny_human.safetensors"))


def node(views, mode=SOUND, **changes):
    """(views, loss, picture, note)"""
    given = dict(
        surface=1.0, temporal=1.0, pose_strength=1.0, fidelity=1.0, iterations=2, sweeps=1, chunk=16
    )
    return MVOptRefine.execute(views, mode, **{**given, **changes}).args


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


def falls(loss: dict) -> bool:
    assert set(loss) == {"loss"} and all(isinstance(value, float) for value in loss["loss"])
    return all(a >= b for a, b in zip(loss["loss"][:-1], loss["loss"][1:], strict=True))


def some(views: Views, count: int, frames: int) -> Views:
    return Views(
        views.frames[:count, :frames], None if views.masks is None else views.masks[:count, :frames],
        views.rig.select(list(range(count))), views.fps,
    )  # fmt: skip


def test_views_come_out_refined_and_go_in_unchanged(scene):
    assert torch.is_inference_mode_enabled()
    views, depth = scene
    before = views.frames.clone(), depth.frames.clone()
    refined, loss, picture, note = node(views, depth=depth)
    assert torch.equal(views.frames, before[0]) and torch.equal(depth.frames, before[1])
    assert refined.frames.shape == views.frames.shape and refined.frames.isfinite().all()
    assert not torch.equal(refined.frames[1], views.frames[1])
    assert refined.rig is views.rig and refined.masks is views.masks and refined.fps == 12.0
    assert falls(loss) and loss["loss"][-1] < 0.9 * loss["loss"][0]
    assert picture.shape == (1, HEIGHT, WIDTH, 3) and 0 <= picture.min() < picture.max() <= 1
    fell = 1 - loss["loss"][-1] / loss["loss"][0]
    assert f"fell by {fell:.0%} in {len(loss['loss']) - 1} steps" in note


def test_what_no_term_pulls_at_comes_back_to_the_bit(scene):
    views, depth = scene
    off = node(views, depth=depth, surface=0.0, temporal=0.0, pose_strength=0.0)
    assert torch.equal(off[0].frames, views.frames) and "fell by nothing" in off[3]


def test_every_setting_reaches_the_refiner(scene):
    views, depth = scene
    options = dict(surface=1.5, temporal=0.4, fidelity=0.7, iterations=3, sweeps=2, chunk=2)
    refined, loss, *_ = node(views, depth=depth, pose_strength=2.0, **options)
    expected = refine(views, depth.frames[:, :, 0], None, None, Settings(pose=2.0, **options))
    assert torch.equal(refined.frames, expected.frames)
    assert loss["loss"] == expected.history.total


def test_the_rig_may_come_from_its_own_socket_of_another_size(scene):
    views, depth = scene
    bare = Views(views.frames, views.masks, None)
    refined, loss, *_ = node(bare, rig=RIG.resized(2 * W, 2 * H), depth=depth)
    assert refined.rig is not None and (refined.rig.width, refined.rig.height) == (W, H)
    assert loss["loss"] == pytest.approx(node(views, depth=depth)[1]["loss"], rel=1e-4)


def test_what_was_left_out_is_in_the_note(scene):
    views, depth = scene
    assert "one view" in node(some(views, 1, 2), depth=some(depth, 1, 2))[3]
    assert "no rig" in node(Views(views.frames, views.masks, None))[3]
    # Depth knows its cameras.
    bare = replace(views, rig=None)
    assert "no rig" not in node(bare, depth=depth)[3]
    empty = Views(torch.zeros_like(depth.frames), None, RIG)
    refined, loss, picture, note = node(views, depth=empty)
    assert "nobody was found" in note and loss == {"loss": []}
    assert picture.shape == (1, HEIGHT, WIDTH, 3) and torch.equal(refined.frames, views.frames)


def test_weights_and_pose_of_these_views_are_taken(scene):
    views, depth = scene
    names = tuple(f"point {n}" for n in range(9))
    pose = Pose(torch.zeros(F, 9, 3), torch.ones(F, 9), torch.full((V, F, 9, 2), 20.0),
                torch.ones(V, F, 9), names)  # fmt: skip
    weights = ViewWeights(torch.tensor([1.0, 0.1, 0.1]), RIG.labels)
    refined, loss, *_ = node(views, depth=depth, pose=pose, weights=weights)
    assert falls(loss) and refined.frames.isfinite().all()
    quiet = Pose(pose.points, 0 * pose.found, pose.pixels, pose.sure, names)
    assert "zero confidence" in node(views, depth=depth, pose=quiet)[3]


def test_paper_mode_follows_the_published_losses(scene, net):
    views = some(scene[0], 2, 2)
    refined, loss, picture, note = node(views, PAPER, human_net=net, iterations=1)
    assert refined.frames.shape == views.frames.shape and refined.frames.isfinite().all()
    assert falls(loss) and loss["loss"][-1] < loss["loss"][0]
    assert picture.shape == (1, HEIGHT, WIDTH, 3)
    assert "as published" in note and "fell by" in note


def test_paper_mode_needs_the_human_net(scene):
    text = refusal(lambda: node(scene[0], PAPER))
    assert "'human_net'" in text and SOUND in text


def test_what_does_not_belong_to_the_views_is_said(scene):
    views, depth = scene
    assert "holds depth" in refusal(lambda: node(depth))
    assert "not metres" in refusal(lambda: node(views, depth=views))
    text = refusal(lambda: node(views, depth=some(depth, V, 2)))
    assert f"{V} views x 2 frames" in text and f"{V} x {F}" in text
    wide = Views(depth.frames.repeat_interleave(2, -1), None, None)
    assert f"{2 * W}x{H}" in refusal(lambda: node(views, depth=wide))
    text = refusal(lambda: node(views, rig=RIG.select([0, 1]), depth=depth))
    assert "2 cameras" in text and f"{V} views" in text
    weights = ViewWeights(torch.ones(2), ("a", "b"))
    assert "2 weights" in refusal(lambda: node(views, depth=depth, weights=weights))
    pose = Pose(torch.zeros(F, 1, 3), torch.ones(F, 1), torch.zeros(2, F, 1, 2),
                torch.ones(2, F, 1), ("nose",))  # fmt: skip
    assert "2 views" in refusal(lambda: node(views, depth=depth, pose=pose))
    longer = replace(pose, points=torch.zeros(7, 1, 3), found=torch.ones(7, 1), pixels=None,
                     sure=None)  # fmt: skip
    assert "7 frames" in refusal(lambda: node(views, depth=depth, pose=longer))


def test_progress_shows_pictures_and_reaches_its_end(scene, monkeypatch):
    views, depth = scene
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *a, **k: seen.append(a))
    node(views, depth=depth, sweeps=2)
    assert seen[-1][0] == seen[-1][1] == 2 * F
    assert any(a[2] is not None for a in seen)


@pytest.mark.parametrize("mode", [SOUND, PAPER])
def test_the_cancel_button_is_obeyed(scene, net, mode):
    views, depth = scene
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            node(views, mode, depth=depth, human_net=net)
    finally:
        mm.interrupt_current_processing(False)
