"""Crop Views in the real ComfyUI: cameras, sizes, sentences."""

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views
from turnaround.nodes.crop_views import CropViews


def ring(views: int, width: int = 60, height: int = 80):
    return orbit_rig(torch.arange(views) * 1.0, torch.zeros(views), 3.0, 0.9, width, height)


def views_with_masks(rig=None) -> Views:
    masks = torch.zeros(2, 3, 80, 60)
    masks[:, :, 20:60, 15:40] = 1
    return Views(torch.rand(2, 3, 3, 80, 60), masks, rig, 12.0)


def test_the_rig_follows_and_the_size_is_one_that_views_can_have():
    cut = CropViews.execute(views_with_masks(ring(2)), 30, 47, 0.0).args[0]
    assert cut.frames.shape == (2, 3, 3, 48, 32) and cut.masks.shape == (2, 3, 48, 32)
    assert (cut.rig.width, cut.rig.height, cut.fps) == (32, 48, 12.0)
    # The window is 40 rows high from row 20 on.
    assert torch.allclose(cut.rig.K[0, 1, 1], ring(2).K[0, 1, 1] * 48 / 40)
    assert torch.allclose(cut.rig.K[0, 1, 2], (ring(2).K[0, 1, 2] - 20) * 48 / 40)


def test_a_rig_of_another_size_is_brought_to_the_views():
    one, rig = CropViews.execute(views_with_masks(ring(2)), 32, 48, 0.1).args
    assert rig is one.rig
    other = CropViews.execute(views_with_masks(), 32, 48, 0.1, ring(2, 120, 160)).args[0]
    assert torch.allclose(one.rig.K, other.rig.K, atol=1e-4)
    alone, rig = CropViews.execute(views_with_masks(), 32, 48, 0.1).args
    assert alone.rig is None and rig is None


def test_views_that_can_not_be_cut_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="have no masks"):
        CropViews.execute(Views(torch.rand(2, 1, 3, 80, 60)), 32, 48, 0.1)
    with pytest.raises(ValueError, match="2 views but 'rig' 3 cameras"):
        CropViews.execute(views_with_masks(), 32, 48, 0.1, ring(3))
