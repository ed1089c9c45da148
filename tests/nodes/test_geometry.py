"""The geometry nodes: what is guessed is said, what cannot work is one sentence."""

import math
import os
import sys

import pytest
import torch
from turnaround.models.cameras import intrinsics, orbit_rig
from turnaround.models.points import unproject_depth
from turnaround.models.views import Views
from turnaround.nodes import run
from turnaround.nodes.conditions import RenderConditions
from turnaround.nodes.geometry import CONVENTIONS, PerformerGeometry

# Notes go out through ComfyUI's server, which wants its own package `utils`, as main.py imports it;
# ComfyUI's nodes.py has put comfy/, with its utils.py, before it on the path.
if not hasattr(sys.modules.get("utils"), "__path__"):
    sys.modules.pop("utils", None)
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    import utils.install_util  # noqa: F401

    sys.path.pop(0)

SIZE, FRAMES = 48, 5
FOV = math.radians(30)


class _Hidden:
    unique_id = "1"


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(PerformerGeometry, "hidden", _Hidden())
    monkeypatch.setattr(RenderConditions, "hidden", _Hidden())


def ball():
    """Depth and mask [F, H, W] of a ball of half a metre, 3 m away, before a wall at 5 m."""
    rays = unproject_depth(torch.ones(1, SIZE, SIZE), intrinsics(FOV, SIZE, SIZE))[0]
    a, b = rays.square().sum(0), rays[2] * 3
    inner = b * b - a * (9 - 0.25)
    depth = torch.where(inner > 0, (b - inner.clamp(min=0).sqrt()) / a, 5.0)
    return depth.repeat(FRAMES, 1, 1), (inner > 0).float().repeat(FRAMES, 1, 1)


def clip(masks=True):
    frames = torch.where(ball()[1][:, None] > 0.5, 0.8, 0.2).expand(-1, 3, -1, -1)
    return Views(frames[None], ball()[1][None] if masks else None, None, 16.0)


def image(depth):
    return depth[..., None].expand(-1, -1, -1, 3)


def geometry(video=None, convention="metres", height=1.0, erosion=1, **sockets):
    return PerformerGeometry.execute(
        video or clip(), convention, math.degrees(FOV), height, erosion, **sockets
    ).result[:3]


def test_exact_depth_gives_points_depth_and_no_note():
    depth, masks = ball()
    cloud, used, note = geometry(depth_views=Views(depth[None, :, None]))
    assert cloud.frame_count == FRAMES and note == ""
    assert used.frames.shape == (1, FRAMES, 1, SIZE, SIZE)
    assert torch.equal(used.frames[0, :, 0][masks > 0.5], depth[masks > 0.5])


def test_performer_is_the_clip_with_the_mask_that_was_used():
    _, masks = ball()
    video = clip(masks=False)
    *_, performer, _ = PerformerGeometry.execute(
        video, "metres", math.degrees(FOV), 1.0, 1, mask=masks
    ).result
    assert torch.equal(performer.frames, video.frames)
    assert torch.equal(performer.masks[0], masks)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_of_the_menu_runs(convention):
    depth, _ = ball()
    pictures = {
        "metres": depth, "inverse (1/metres)": 1 / depth,
        "near is white": 1 - (depth - 2) / 3, "near is black": (depth - 2) / 3,
    }[convention]  # fmt: skip
    cloud, _, note = geometry(convention=convention, depth=image(pictures))
    assert len(cloud.positions) and "inside out" not in note


def test_missing_depth_and_mask_are_guessed_and_said():
    _, _, note = geometry(clip(masks=False))
    assert "no mask" in note and "no depth" in note and "guess" in note


def test_depth_of_another_size_is_scaled_and_said():
    depth, _ = ball()
    _, _, note = geometry(depth=image(depth[:, ::2, ::2]))
    assert f"'depth' was scaled from 24x24 to {SIZE}x{SIZE}" in note


def test_longer_depth_is_cut_and_said():
    depth, _ = ball()
    _, _, note = geometry(depth=image(torch.cat([depth, depth])))
    assert "'depth' had 10 frames, the first 5 are used" in note


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_depth_frames_are_refused_with_both_numbers(count):
    with pytest.raises(ValueError, match=f"'depth' has {count} frames but the video has 5"):
        geometry(depth=image(ball()[0][:count]))


def test_depth_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="'depth' is 24x48 but the video is 48x48"):
        geometry(depth=image(ball()[0][:, :, :24]))


def test_colour_in_the_depth_views_socket_is_refused():
    with pytest.raises(ValueError, match="carries colour, not depth"):
        geometry(depth_views=clip())


def test_depth_of_several_views_is_refused():
    depth = ball()[0][None, :, None].repeat(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="'depth_views' has 2 views"):
        geometry(depth_views=Views(depth))


def test_several_source_views_are_refused():
    two = Views(clip().frames.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="'video' has 2 views"):
        geometry(two)


def test_black_mask_is_refused_and_a_few_empty_frames_are_not():
    with pytest.raises(ValueError, match="black in every frame"):
        geometry(mask=torch.zeros(FRAMES, SIZE, SIZE))
    masks = ball()[1]
    masks[2] = 0
    cloud, _, note = geometry(depth=image(ball()[0]), mask=masks)
    assert "frames [2]" in note and cloud.frame_offsets.diff()[2] == 0


def test_depth_of_nothing_but_nan_is_refused():
    with pytest.raises(ValueError, match="no usable depth inside the mask"):
        geometry(depth=image(ball()[0] * float("nan")))


def test_metres_read_as_inverse_are_refused():
    with pytest.raises(ValueError, match="choose another depth convention"):
        geometry(convention="inverse (1/metres)", depth=image(ball()[0]))


def test_swapped_near_and_far_are_said():
    _, _, note = geometry(convention="near is black", depth=image(1 - (ball()[0] - 2) / 3))
    assert "inside out" in note


def rig(distance=3.0):
    return orbit_rig(torch.tensor([0.0, math.pi]), torch.zeros(2), distance, FOV, 32, 40)


def test_conditions_are_views_of_the_rig():
    cloud, _, _ = geometry(depth=image(ball()[0]))
    partial, normals, visibility, depth = RenderConditions.execute(cloud, rig(), "blanked").result
    for views in (partial, normals, visibility):
        assert views.frames.shape == (2, FRAMES, 3, 40, 32) and len(views.rig) == 2
    assert depth.frames.shape == (2, FRAMES, 1, 40, 32)
    assert torch.isin(visibility.frames, torch.tensor([0, 128, 255])).all()
    assert torch.equal(visibility.masks, visibility.frames[:, :, 0] == 255)
    assert partial.masks[0].sum() > 0 and partial.masks[1].sum() == 0


def test_cameras_that_look_elsewhere_are_refused():
    cloud, _, _ = geometry(depth=image(ball()[0]))
    away = orbit_rig(
        torch.zeros(1), torch.zeros(1), 3.0, FOV, 32, 32, target=torch.tensor([50.0, 0, 0])
    )
    with pytest.raises(ValueError, match="No camera of the rig sees the performer"):
        RenderConditions.execute(cloud, away, "blanked")


def test_the_cancel_button_stops_the_drawing(monkeypatch):
    import comfy.model_management as mm

    cloud, _, _ = geometry(depth=image(ball()[0]))
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            RenderConditions.execute(cloud, rig(), "blanked")
    finally:
        mm.interrupt_current_processing(False)
    assert callable(run.progress)
