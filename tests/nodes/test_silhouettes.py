"""Depth from Views in the real ComfyUI: from views to metres, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views
from turnaround.nodes.silhouettes import DepthFromViews

W, H = 24, 32
pytestmark = pytest.mark.usefixtures("one_thread")


class _Hidden:
    unique_id = "1"


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(DepthFromViews, "hidden", _Hidden())


def bar(views: int = 4, frames: int = 2) -> Views:
    """An upright bar in the middle of every view, half a metre wide."""
    rig = orbit_rig(torch.arange(views) * (2 * math.pi / views), torch.zeros(views), 3.0, 0.6, W, H)
    masks = torch.zeros(views, frames, H, W, dtype=torch.bool)
    masks[..., 4:-4, 8:-8] = True
    pictures = torch.full((views, frames, 3, H, W), 128, dtype=torch.uint8)
    return Views(pictures, masks, rig, 24.0)


def find(views: Views, **widgets) -> tuple[Views, str]:
    return DepthFromViews.execute(views, **widgets).args


@pytest.mark.parametrize("use_colours", [True, False])
def test_outlines_become_metres(use_colours):
    views = bar()
    depth, note = find(views, use_colours=use_colours)
    assert depth.frames.shape == (4, 2, 1, H, W) and depth.frames.dtype == torch.float32
    assert torch.equal(depth.frames[:, :, 0] > 0, views.masks)
    assert depth.masks is views.masks and depth.rig is views.rig and depth.fps == 24.0
    # Eight pixels of 52 focal lengths: the side views bound it 0.23 m before the middle.
    assert float(depth.frames[0, 0, 0, H // 2, W // 2]) == pytest.approx(2.77, abs=0.03)
    how = "outlines and colours" if use_colours else "outlines alone"
    assert note.startswith(f"depth from {how} of 4 views: 2.") and note.endswith(" m")


def test_note_names_empty_frames_and_views_that_fit_no_other():
    views = bar(8, 3)
    masks = views.masks.clone()
    masks[:, 1] = False
    masks[2, :, :, :6] = True  # what is beside the performer in one view only
    note = find(replace(views, masks=masks), use_colours=False)[1]
    assert "frames [1] stay empty" in note and "90°: " in note and "fits no other view" in note
    assert "45°" not in note


def test_plain_background_stands_in_for_masks():
    views = bar()
    colours = torch.where(views.masks[:, :, None], torch.tensor([200, 60, 40]).view(3, 1, 1), 128)
    depth, note = find(Views(colours.byte(), None, views.rig))
    shared = (depth.masks > 0.5) & views.masks
    assert shared.sum() > 0.95 * ((depth.masks > 0.5) | views.masks).sum()
    assert "guessed from the plain background" in note and depth.frames.any()


def test_depth_serves_where_metres_are_asked_for():
    from turnaround.nodes.geometry import depth_of

    depth = find(bar())[0]
    one = Views(depth.frames[:1], depth.masks[:1], depth.rig.select([0]))
    assert torch.equal(depth_of(one, "depth_views"), depth.frames[0, :, 0])


def test_views_that_cannot_give_depth_are_refused_in_one_sentence():
    views = bar()
    apart = torch.zeros_like(views.masks)
    apart[:2, :, :4] = apart[2:, :, -4:] = True
    noise = torch.rand(4, 2, 3, H, W, generator=torch.Generator().manual_seed(0))
    for broken, part in (
        (Views(noise, None, views.rig), "no masks"),
        (replace(views, rig=None), "no cameras"),
        (bar(2), "at least 3 cameras"),
        (replace(views, masks=torch.zeros_like(views.masks)), "meet nowhere"),
        (replace(views, masks=apart), "meet nowhere"),
        (Views(views.frames[:, :, :1].float(), views.masks, views.rig), "carry depth already"),
    ):
        with pytest.raises(ValueError, match=part) as caught:
            find(broken)
        said = str(caught.value)
        assert said.endswith(".") and ". " not in said, "not one sentence"
