"""Optical flow: pictures that move by known steps, flicker or not, and what is known of them."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models import flow as flows
from turnaround.models.flow import (
    Flow,
    beside,
    colour_gap,
    flow_both_ways,
    flow_picture,
    how_sure,
    inverse,
    optical_flow,
    returned,
    warped,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_faults  # noqa: E402  (a module beside the tests' folders)

W, H = 64, 48

pytestmark = pytest.mark.usefixtures("one_thread")


def texture(*shape: int, seed: int = 0) -> Tensor:
    """Smooth noise, 0..1."""
    coarse = torch.rand(1, *shape[:-2], shape[-2] // 4, shape[-1] // 4,
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return F.interpolate(coarse, shape[-2:], mode="bicubic")[0].clamp(0, 1)


def sliding(steps: tuple[int, ...] = (0, 2, 3)) -> Tensor:  # [F, 3, H, W]
    """A texture that slides to the right, to so many pixels."""
    big = texture(3, H + 8, W + 8)
    return torch.stack([big[:, 4 : 4 + H, 4 - s : 4 - s + W] for s in steps])


def constant(x: float, y: float, frames: int = 2) -> Flow:
    there = (
        torch.tensor([x, y], dtype=torch.float32)
        .view(1, 1, 2, 1, 1)
        .expand(1, frames - 1, 2, H, W)
        .clone()
    )
    sure = torch.ones(1, frames - 1, H, W)
    return Flow(there, -there, sure, sure)


def test_flow_there_and_back_of_a_picture_that_moves():
    there, back = flow_both_ways(sliding(), cv2)
    assert there.shape == back.shape == (2, 2, H, W)
    middle = (slice(8, -8), slice(8, -8))
    for n, step in enumerate((2.0, 1.0)):
        for way, sign in ((there, 1), (back, -1)):
            x, y = way[n][(slice(None), *middle)].flatten(1).median(1).values
            assert float(x) == pytest.approx(sign * step, abs=0.15) and abs(float(y)) < 0.15


# --- the socket's content ---------------------------------------------------------------------------


def test_a_flow_says_how_long_it_is_and_what_it_holds():
    flow = constant(1, 2, frames=4)
    assert len(flow) == 1 and flow.frame_count == 4
    assert flow.get_ram_usage() == 4 * 3 * H * W * (2 + 2 + 1 + 1)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"there": torch.zeros(1, 0, 2, H, W)}, "at least two frames"),
        ({"there": torch.zeros(1, 1, 3, H, W)}, "steps of shape"),
        ({"back": torch.zeros(1, 2, 2, H, W)}, "both ways"),
        ({"sure_there": torch.zeros(1, 1, W, H)}, "confidences of shape"),
        ({"sure_back": torch.full((1, 1, H, W), 1.5)}, "between 0 and 1"),
        ({"sure_back": torch.full((1, 1, H, W), torch.nan)}, "between 0 and 1"),
        ({"back": torch.full((1, 1, 2, H, W), torch.inf)}, "NaN or infinity"),
    ],
)
def test_what_is_no_flow_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Flow(**(vars(constant(0, 0)) | change))


def test_one_flow_beside_another():
    body, rest = constant(3, 0), constant(1, 1)
    step, sure = body.there.clone(), body.sure_there.clone()
    step[..., : W // 2], sure[..., : W // 2 + 4] = 0, 0
    both = beside(Flow(step, body.back, sure, body.sure_back), rest)
    # Hidden body (moves, not sure) stays body; where there is none, the other flow takes over.
    assert (both.there[..., 0, :, : W // 2] == 1).all() and (
        both.there[..., 0, :, W // 2 :] == 3
    ).all()
    assert (both.sure_there[..., W // 2 : W // 2 + 4] == 0).all()
    assert (both.sure_there[..., : W // 2] == 1).all()
    with pytest.raises(ValueError, match="same clip"):
        beside(body, constant(1, 1, frames=3))


# --- along a flow -----------------------------------------------------------------------------------


def test_warping_reads_where_the_flow_leads():
    ramp = torch.arange(W).float().expand(1, 1, H, W) + 0.5
    flow = torch.zeros(1, 2, H, W)
    flow[:, 0], flow[:, 1] = 2.5, 7.0
    read = warped(ramp, flow)
    assert torch.allclose(read[..., : W - 4], ramp[..., : W - 4] + 2.5, atol=1e-4)
    assert torch.allclose(read[..., -1], torch.tensor(W - 0.5))  # the border is repeated


def test_the_inverse_of_a_smooth_flow_leads_back():
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    there = torch.stack([2 * torch.sin(y / 9), 1.5 * torch.cos(x / 11)])[None]
    back = inverse(there)
    home = (there + warped(back, there))[..., 6:-6, 6:-6]
    # Bilinear reading of a curve of radius 9 px and amplitude 2 is off by up to 2 / 81 / 8.
    assert float(home.norm(dim=1).max()) < 0.01


# --- how sure ---------------------------------------------------------------------------------------


def test_points_that_come_back_are_believed_and_others_are_not():
    there = torch.zeros(1, 2, H, W)
    there[:, 0] = 4.0
    back = -there
    back[..., W // 2 :] = 0.0
    sure = returned(there, back)
    assert (sure[..., : W // 2 - 5] == 1).all()
    # 4 pixels off against sqrt(0.5 + 0.01 * 16) allowed.
    assert (sure[..., W // 2 : W - 4] < 1e-6).all()
    assert (sure[..., W - 3 :] == 0).all()  # outside


def test_gain_and_offset_are_no_difference_but_another_colour_is():
    now = texture(3, H, W)[None]
    light = torch.linspace(0.8, 1.2, W)
    trust = torch.ones(1, H, W)
    # 16 cells a side follow a slope of 0.4 over the picture but for their own share of it.
    assert float(colour_gap(now * light + 0.05, now, trust).mean()) < 0.01
    other = now.clone()
    other[..., 20:26, 20:26] = 1 - other[..., 20:26, 20:26]
    gap = colour_gap(now, other, trust)[0]
    assert float(gap[21:25, 21:25].mean()) > 4 * float(gap[32:, 40:].mean()) + 0.02


def test_confidence_falls_where_a_square_hides_what_was_there():
    frames = texture(3, H, W).repeat(2, 1, 1, 1)
    frames[1, :, 16:32, 24:40] = texture(3, 16, 16, seed=5)
    still = torch.zeros(1, 2, H, W)
    there, back = how_sure(frames, still, still)
    for sure in (there, back):
        assert float(sure[0, 18:30, 26:38].mean()) < 0.5
        assert float(sure[0, :, :16].min()) > 0.9


@pytest.mark.parametrize("fault", ["exposure", "colour"])
def test_flicker_neither_bends_the_flow_nor_shakes_the_confidence(fault):
    frames = sliding((0, 1, 3, 4))
    clean = optical_flow(frames[None])
    flow = optical_flow(clip_faults.flickering(frames, fault, 1)[None])
    middle = (..., slice(8, -8), slice(8, -8))
    assert float((flow.there - clean.there)[middle].norm(dim=2).mean()) < 0.1
    assert float(flow.sure_there[middle].mean()) > float(clean.sure_there[middle].mean()) - 0.1


def test_at_a_cut_nothing_is_sure():
    clip = torch.cat([sliding((0, 1, 2)), texture(3, H, W, seed=9)[None]])
    sure = optical_flow(clip[None]).sure_there[0].mean((1, 2))
    assert sure[2] < 0.2 and (sure[:2] > 0.8).all()


# --- OpenCV's flow ----------------------------------------------------------------------------------


def test_every_view_has_the_flow_that_it_has_alone():
    clips = torch.stack([sliding((0, 2, 3)), sliding((3, 1, 0))])
    both = optical_flow(clips)
    for v in range(2):
        alone = optical_flow(clips[v : v + 1])
        for a, b in zip(both._comfy_cache_tensors(), alone._comfy_cache_tensors(), strict=True):
            assert torch.equal(a[v], b[0])


@pytest.mark.parametrize("noise", [0.0, 0.06])
def test_grain_does_not_make_still_parts_crawl(noise):
    """A square slides over a faint wall; every frame has its own grain."""
    frames = (0.4 + 0.1 * texture(3, 64, 96)).repeat(7, 1, 1, 1)
    square = texture(3, 24, 24, seed=3)
    for f in range(7):
        frames[f, :, 20:44, 20 + 2 * f : 44 + 2 * f] = square
    grain = F.interpolate(
        torch.randn(7, 1, 32, 48, generator=torch.Generator().manual_seed(1)), (64, 96)
    )
    flow = optical_flow((frames + noise * grain).clamp(0, 1)[None]).there[0]
    wall = flow[..., :, 60:].norm(dim=1)
    assert float((wall == 0).float().mean()) > 0.9 and float(wall.mean()) < 0.2
    inner = torch.stack([flow[f, :, 26:38, 26 + 2 * f : 38 + 2 * f] for f in range(6)])
    x, y = inner.movedim(1, 0).flatten(1).median(1).values
    assert float(x) == pytest.approx(2, abs=0.3) and abs(float(y)) < 0.2


def test_what_moves_is_not_taken_as_still_beside_a_cut():
    clip = torch.cat([sliding((0, 1, 2, 3)), 1 - sliding((0, 1, 2, 3)).flip(3)])
    flow = optical_flow(clip[None]).there[0, [0, 1, 2, 4, 5, 6]]
    x = flow[:, 0, 8:-8, 8:-8].flatten(1).median(1).values
    assert torch.allclose(x, torch.tensor([1.0, 1, 1, -1, -1, -1]), atol=0.2)


def test_a_still_clip_has_no_flow_and_is_sure():
    flow = optical_flow(texture(3, H, W).expand(1, 3, 3, H, W))
    assert (flow.there == 0).all() and (flow.back == 0).all()
    assert (flow.sure_there == 1).all() and (flow.sure_back == 1).all()
    plain = optical_flow(torch.full((1, 2, 3, H, W), 0.5))
    assert (plain.there == 0).all() and (plain.sure_there == 1).all()


def test_progress_is_told_and_may_stop():
    seen = []
    optical_flow(sliding()[None], lambda done, total, preview=None: seen.append((done, total)))
    assert seen[-1] == (6, 6) and [s[0] for s in seen] == sorted(s[0] for s in seen)

    def stop(done, total, preview=None):
        assert preview is None or preview.shape == (3, H, W)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        optical_flow(sliding()[None], stop)


def test_clips_in_which_nothing_can_move_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="one frame"):
        optical_flow(torch.rand(1, 1, 3, H, W))
    with pytest.raises(ValueError, match="16 pixels a side"):
        optical_flow(torch.rand(1, 2, 3, 8, W))
    optical_flow(torch.rand(1, 2, 3, 16, 16))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="opencv-python"):
        optical_flow(sliding()[None])


def test_large_pictures_are_searched_at_half_their_size(monkeypatch):
    scales: list[int] = []
    real = cv2.DISOpticalFlow_create

    def watched(preset):
        dis = real(preset)
        return SimpleNamespace(setFinestScale=scales.append, calc=dis.calc)

    monkeypatch.setattr(cv2, "DISOpticalFlow_create", watched)
    optical_flow(sliding()[None])
    monkeypatch.setattr(flows, "FINE", 1)
    optical_flow(sliding()[None])
    assert scales == [0, 1]


# --- its picture ------------------------------------------------------------------------------------


def test_hue_tells_where_to_and_strength_how_far():
    ways = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [0.5, 0]])
    flow = (8 * ways)[:, :, None, None].expand(-1, -1, 4, 4)
    colours = flow_picture(flow, longest=8.0)[:, :, 0, 0]
    expected = [[1, 0, 0], [0.5, 1, 0], [0, 1, 1], [0.5, 0, 1], [1, 1, 1], [1, 0.5, 0.5]]
    assert torch.allclose(colours, torch.tensor(expected), atol=1e-5)
    assert torch.equal(flow_picture(torch.zeros(1, 2, 4, 4)), torch.ones(1, 3, 4, 4))
    turned = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    picture = flow_picture(turned)
    assert picture.min() >= 0 and picture.max() <= 1
    # Full colour is the length that 99 percent stay below.
    pure = (picture.amin(1) < 1e-6).float().mean()
    assert 0 < float(pure) <= 2 / 81 + 1e-6 and math.isfinite(float(picture.sum()))
