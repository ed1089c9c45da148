"""Performer Masks in the real ComfyUI: from views to masks, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.lenses import Lens
from turnaround.models.views import Views
from turnaround.nodes.performer_masks import PerformerMasksNode

W, H = 48, 64
pytestmark = pytest.mark.usefixtures("one_thread")


class _Hidden:
    unique_id = "1"


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(PerformerMasksNode, "hidden", _Hidden())


def bars(views: int = 4, frames: int = 2) -> Views:
    """A green bar before a dark room in every view; view 1 has lost its lower half."""
    angles = torch.arange(views) * (2 * math.pi / views)
    rig = orbit_rig(angles, torch.zeros(views), 3.0, 0.8, W, H)
    masks = torch.zeros(views, frames, H, W, dtype=torch.bool)
    masks[..., 12:-12, 19:-19] = True
    noise = torch.rand(1, 1, 3, H, W, generator=torch.Generator().manual_seed(0))
    pictures = (60 + 40 * noise).expand(views, frames, -1, -1, -1).clone()
    green = torch.tensor([40.0, 190.0, 70.0])[:, None, None]
    pictures = torch.where(masks[:, :, None], green, pictures).byte()
    masks[1, :, H // 2 :] = False
    return Views(pictures, masks, rig, 24.0)


def find(views: Views, **inputs) -> tuple[Views, torch.Tensor, str]:
    with torch.inference_mode():
        return PerformerMasksNode.execute(views, **inputs).args


def test_masks_from_elsewhere_are_completed():
    views = bars()
    better, preview, note = find(views)
    assert better.masks.shape == (4, 2, H, W) and better.frames is views.frames
    assert better.rig is views.rig and better.fps == 24.0
    whole = (better.masks[:, :, 12:-12, 19:-19] > 0.5).float().mean((1, 2, 3))
    assert bool((whole > 0.9).all()) and float(views.masks[1].float().mean()) < 0.1
    assert float(better.masks[..., :8].mean()) < 0.02
    assert preview.ndim == 4 and preview.shape[-1] == 3
    assert note.startswith("masks of one performer in 4 views x 2 frames, from the clip alone")


def test_empty_stage_is_used_and_said():
    views = bars()
    room = replace(views, frames=views.frames[:, :1].roll(W // 2, -1), masks=None)
    assert "with the empty stage" in find(views, empty_stage=room)[2]


def test_what_is_missing_is_one_sentence():
    views = bars()
    small = Views(torch.zeros(3, 1, 3, 8, 8, dtype=torch.uint8))
    for broken, inputs, words in (
        (replace(views, rig=None), {}, "Rig from File"),
        (replace(views, masks=None), {}, "Load Human Net"),
        (Views(views.frames[:1], views.masks[:1], views.rig.select([0])), {}, "two or more"),
        (Views(torch.ones(4, 2, 1, H, W), views.masks, views.rig), {}, "footage itself"),
        (views, {"empty_stage": small}, "3 views of 8x8"),
        (replace(views, masks=torch.zeros(4, 2, H, W)), {}, "same person"),
    ):
        with pytest.raises(ValueError, match=words):
            find(broken, **inputs)


def test_bent_footage_is_sent_to_straighten_views():
    views = bars()
    bent = replace(views, rig=replace(views.rig, lenses=(Lens((-0.2,)),) * 4))
    with pytest.raises(ValueError, match="Straighten Views"):
        find(bent)
