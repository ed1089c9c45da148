"""Deflicker in the real ComfyUI: images and views, what is refused, what is said, the cancel button."""

import re
from types import SimpleNamespace

import comfy.model_management as mm
import pytest
import torch
from turnaround.models.deflicker import DeflickerSettings, deflicker
from turnaround.models.views import Views
from turnaround.nodes.deflicker import Deflicker, _check_memory

pytestmark = pytest.mark.usefixtures("one_thread")
F, H, W = 6, 48, 64


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(Deflicker, "hidden", SimpleNamespace(unique_id="1"))


@pytest.fixture(scope="module")
def clip():
    """A pan over blobs whose exposure flickers, [F, H, W, 3]."""
    generator = torch.Generator().manual_seed(3)
    cells = torch.randn(1, 3, 12, 20, generator=generator)
    wide = torch.nn.functional.interpolate(cells, (H, W + F), mode="bicubic")[0]
    wide = (0.5 + 0.12 * wide).clamp(0, 1)
    gain = torch.tensor([1.0, 1.2, 0.85, 1.1, 0.9, 1.05])
    return torch.stack([gain[f] * wide[:, :, f : f + W] for f in range(F)]).movedim(1, -1)


def node(images, **changes):
    """(images, views, removed, note)"""
    given = dict(colour=1.0, places=1.0, texture=1.0, reach=3)
    return Deflicker.execute(images, **{**given, **changes}).args


def brightness(images) -> torch.Tensor:
    return images.mean((1, 2, 3))


def test_a_clip_comes_out_steady_and_goes_in_unchanged(clip):
    assert torch.is_inference_mode_enabled()
    before = clip.clone()
    images, views, removed, note = node(clip)
    assert torch.equal(clip, before)
    assert images.shape == removed.shape == clip.shape
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
    assert brightness(images).std() < 0.3 * brightness(clip).std()
    assert torch.equal(views.frames[0].movedim(1, -1), images)
    assert torch.allclose(removed, (0.5 + 4 * (clip.clamp(0, 1) - images)).clamp(0, 1), atol=1e-6)
    assert re.match(r"colours flickered by [567]\.\d%, places by 0.0 pixels, texture by 0", note)


def test_settings_reach_the_model(clip):
    images, *_ = node(clip, colour=0.4, places=0.0, texture=0.5, reach=2)
    expected = deflicker(clip.movedim(-1, 1), DeflickerSettings(0.4, 0.0, 0.5, 2)).frames
    assert torch.equal(images, expected.movedim(1, -1))


def test_every_view_by_itself_with_its_masks_and_frame_rate(clip):
    frames = torch.stack([clip, clip.flip(2)]).movedim(-1, 2)
    masks = torch.rand(2, F, H, W, generator=torch.Generator().manual_seed(0))
    images, views, _, note = node(Views(frames, masks, None, 12.0))
    assert images.shape == (2 * F, H, W, 3)
    assert views.masks is masks and views.fps == 12.0
    alone = node(clip)[0]
    assert torch.equal(images[:F], alone)
    assert "worst view" in note


def test_one_frame_stays_as_it_is(clip):
    images, _, removed, note = node(clip[:1])
    assert torch.equal(images, clip[:1].clamp(0, 1)) and removed.std() == 0
    assert note == "1 shot(s) of a single frame left as they are"


def test_cuts_are_said(clip):
    other = clip.flip(1, 2).flip(-1)
    note = node(torch.cat([clip, other]))[3]
    assert "2 shots (cuts at frame 6), each by itself" in note


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_what_cannot_be_done_is_said_in_a_sentence(clip):
    bad = clip.clone()
    bad[2] = torch.nan
    assert "'images' holds NaN" in refusal(lambda: node(bad))
    assert "at least 16 pixels" in refusal(lambda: node(clip[:, :8, :8]))
    assert "depth" in refusal(lambda: node(Views(torch.ones(1, 3, 1, 32, 32))))
    huge = "cut the clip into shorter ones"
    assert huge in refusal(lambda: _check_memory(1, 100_000, 4000, 4000))


def test_cancelling_stops_it(clip, monkeypatch):
    def stop():
        raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(mm.InterruptProcessingException):
        node(clip)
