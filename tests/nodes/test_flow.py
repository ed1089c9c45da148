"""The flow nodes: clips, bodies and other packs' flow in, a flow with its picture out."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management as mm
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.body import Body
from turnaround.models.body_sources import sample_body
from turnaround.models.cameras import orbit_rig
from turnaround.models.flow import Flow
from turnaround.models.flow_reading import Coding
from turnaround.models.views import Views
from turnaround.nodes import flow as nodes

W, H = 48, 40
RIG = orbit_rig(torch.tensor([0.0, 2.0]), torch.zeros(2), 4.0, math.radians(35), W, H)
CODED, SIZES, RAW = Coding.__args__


@pytest.fixture(autouse=True)
def _hosted(monkeypatch, caplog):
    """Nodes have an id, as in a run."""
    caplog.set_level(logging.INFO, logger="turnaround")
    for node in nodes.NODES:
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="1"))


def clip(steps=(0, 1, 3), seed: int = 0) -> Tensor:  # [F, H, W, 3]
    """A texture that slides to the right, as an IMAGE."""
    noise = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(seed))
    big = F.interpolate(noise, (H + 8, W + 8), mode="bicubic")[0].clamp(0, 1)
    frames = [big[:, 4 : 4 + H, 4 - s : 4 - s + W] for s in steps]
    return torch.stack(frames).movedim(1, 3)


def optical(images) -> tuple[Flow, Tensor, Tensor, str]:
    return nodes.OpticalFlow.execute(images).result


def other(forward=None, backward=None, coding=CODED, scale=16.0, y_up=False, clip=None):
    return nodes.FlowFromOtherNodes.execute(coding, scale, y_up, forward, backward, clip).result


@pytest.fixture(scope="module")
def body():
    return sample_body("kira", "dance_a", 1.2 + torch.arange(3) / 16, 7, 16.0)


def test_optical_flow_of_a_clip_and_of_views():
    flow, picture, confidence, note = optical(clip())
    assert flow.there.shape == (1, 2, 2, H, W)
    assert picture.shape == (2, H, W, 3) and confidence.shape == (2, H, W)
    assert float(flow.there[0, :, 0, 8:-8, 8:-8].mean()) == pytest.approx(1.5, abs=0.2)
    assert "1." in note and "pixels a frame" in note and "% sure" in note
    both = torch.stack([clip().movedim(3, 1), clip((3, 2, 0), 1).movedim(3, 1)])
    views, picture, confidence, _ = optical(Views(both))
    assert views.there.shape == (2, 2, 2, H, W)
    assert torch.equal(views.there[:1], flow.there)
    assert picture.shape == (4, H, W, 3) and confidence.shape == (4, H, W)
    as_bytes = Views((both * 255).round().to(torch.uint8))
    assert torch.allclose(optical(as_bytes)[0].there, views.there, atol=0.3)


def test_a_still_clip_is_said_to_stand():
    flow, picture, confidence, note = optical(clip((0, 0, 0)))
    assert (flow.there == 0).all() and (picture == 1).all() and (confidence == 1).all()
    assert note == "nothing moves, 100% sure"


def test_clips_without_a_flow_get_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="one frame"):
        optical(clip()[:1])
    with pytest.raises(ValueError, match="depth, not colour"):
        optical(Views(torch.ones(1, 3, 1, H, W)))
    broken = clip()
    broken[1, 3, 4, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in frames \[1\]"):
        optical(broken)
    monkeypatch.setattr(mm, "get_total_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="this computer has 0 GB"):
        optical(clip())


def test_cancelling_stops_every_node(monkeypatch, body):
    def cancelled():
        raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", cancelled)
    for run in (
        lambda: optical(clip()),
        lambda: nodes.BodyFlow.execute(body, RIG),
        lambda: other(torch.zeros(2, 2, H, W)),
    ):
        with pytest.raises(mm.InterruptProcessingException):
            run()


def test_body_flow_of_every_camera(body):
    flow, picture, confidence, note = nodes.BodyFlow.execute(body, RIG).result
    assert flow.there.shape == (2, 2, 2, H, W)
    assert picture.shape == (4, H, W, 3) and confidence.shape == (4, H, W)
    off = flow.sure_there == 0
    assert off.any() and not off.all() and "pixels a frame" in note
    assert (picture[0][(flow.there[0, 0] == 0).all(0)] == 1).all()


def test_body_flow_beside_another_flow(body):
    alone = nodes.BodyFlow.execute(body, RIG).result[0]
    rest = replace(
        alone,
        there=torch.ones_like(alone.there),
        back=-torch.ones_like(alone.back),
        sure_there=torch.full_like(alone.sure_there, 0.5),
        sure_back=torch.full_like(alone.sure_back, 0.5),
    )
    both = nodes.BodyFlow.execute(body, RIG, elsewhere=rest).result[0]
    empty = (alone.there == 0).all(2)
    assert (both.there.movedim(2, -1)[empty] == 1).all() and (both.sure_there[empty] == 0.5).all()
    assert torch.equal(both.there.movedim(2, -1)[~empty], alone.there.movedim(2, -1)[~empty])


def test_a_flow_of_another_clip_is_not_laid_beside_the_body(body):
    with pytest.raises(ValueError, match="'elsewhere' is the flow of 1 views x 3 frames of 48x40"):
        nodes.BodyFlow.execute(body, RIG, elsewhere=optical(clip())[0])


def test_body_flow_is_made_for_the_clip(body):
    wide = Views(torch.zeros(2, 3, 3, 60, 72))
    flow, *_, note = nodes.BodyFlow.execute(body, RIG, clip=wide).result
    assert flow.there.shape[-2:] == (60, 72) and "48x40 became 72x60" in note
    with pytest.raises(ValueError, match="'body' has 3 frames but 'clip' 4"):
        nodes.BodyFlow.execute(body, RIG, clip=torch.zeros(4, H, W, 3))
    with pytest.raises(ValueError, match="'rig' has 2 cameras but 'clip' 1 views"):
        nodes.BodyFlow.execute(body, RIG, clip=torch.zeros(3, H, W, 3))
    one = replace(body, vertices=body.vertices[:1])
    with pytest.raises(ValueError, match="'body' has one frame"):
        nodes.BodyFlow.execute(one, RIG)


def test_body_flow_with_the_build_of_a_reference():
    def box(height: float, frames: int) -> Body:
        corners = torch.tensor(
            [[x, y, z] for x in (-0.3, 0.3) for y in (-0.5, 0.5) for z in (-0.2, 0.2)]
        )
        faces = torch.tensor(
            [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6],
             [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
        )  # fmt: skip
        slide = torch.arange(frames)[:, None, None] * torch.tensor([0.1, 0, 0])
        return Body(corners * torch.tensor([1, height, 1]) + slide, faces, corners)

    plain = nodes.BodyFlow.execute(box(1.0, 3), RIG).result[0]
    flow, *_, note = nodes.BodyFlow.execute(box(1.0, 3), RIG, box(1.5, 1)).result
    assert "built like 'reference'" in note
    tall, usual = ((f.sure_there[0, 0] > 0).any(1).sum() for f in (flow, plain))
    assert float(tall / usual) == pytest.approx(1.5, abs=0.15)
    with pytest.raises(ValueError, match="same kind of source"):
        nodes.BodyFlow.execute(
            box(1.0, 3), RIG, sample_body("ada", "walk", torch.zeros(1), 3, 16.0)
        )


def test_flow_of_other_nodes_in_their_forms():
    steps = torch.zeros(2, 2, H, W)
    steps[:, 0], steps[:, 1] = 3.0, -1.0
    flow, picture, _, note = other(steps.movedim(1, 3))
    assert torch.allclose(flow.there[0], steps) and torch.allclose(flow.back[0], -steps, atol=1e-4)
    assert picture.shape == (2, H, W, 3) and "turned round" in note
    both, *_, note = other(steps, -steps)
    assert torch.equal(both.back[0], -steps) and "turned round" not in note
    assert torch.equal(other({"forward": steps, "backward": -steps})[0].back[0], -steps)
    assert torch.allclose(other(backward=-steps)[0].there[0], steps, atol=1e-4)
    up = other(steps, y_up=True)[0].there[0]
    assert (up[:, 1] == 1).all() and (up[:, 0] == 3).all()


def test_flow_of_coded_pictures():
    pictures = torch.full((2, H, W, 3), 0.5)
    pictures[..., 0] += 4 / 16 / 2
    flow = other(pictures)[0]
    assert torch.allclose(flow.there[0, :, 0], torch.tensor(4.0), atol=1e-4)
    assert (flow.there[0, :, 1] == 0).all()
    flow = other(pictures, coding=SIZES, scale=0.5)[0]
    assert torch.allclose(flow.there[0, :, 0], torch.tensor(0.125 * W), atol=1e-3)
    raw = torch.full((2, H, W, 3), 2.0)
    assert (other(raw, coding=RAW)[0].there == 2).all()


def test_flow_is_fitted_to_the_clip():
    steps = torch.zeros(6, 2, H // 2, W // 2)
    steps[:, 0] = 1.0
    both = Views(torch.stack([clip().movedim(3, 1)] * 2))
    flow, *_, note = other(steps, clip=both)  # as many steps as frames: the last leads back
    assert flow.there.shape == (2, 2, 2, H, W) and (flow.there[:, :, 0] == 2).all()
    assert "24x20 became 48x40" in note and note.count("became") == 1
    with pytest.raises(ValueError, match="'forward' has 6 steps"):
        other(steps, clip=clip())


def test_what_is_no_flow_gets_one_sentence():
    with pytest.raises(ValueError, match="No flow is connected"):
        other()
    with pytest.raises(ValueError, match="of this pack already"):
        other(optical(clip())[0])
    with pytest.raises(ValueError, match="colour wheel"):
        other(torch.ones(2, H, W, 3))
    with pytest.raises(ValueError, match="two numbers for every pixel"):
        other(torch.zeros(3, H, W))
    with pytest.raises(ValueError, match="'forward' carries a"):
        other(SimpleNamespace(raft=1))
