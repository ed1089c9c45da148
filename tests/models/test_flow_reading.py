"""Flow of other nodes, in the forms that their sockets carry."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.flow_reading import (
    assembled,
    by_view,
    coded_flow,
    raw_flow,
    resized_flow,
)

N, H, W = 3, 24, 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps() -> Tensor:  # [N, 2, H, W]
    return 5 * torch.randn(N, 2, H, W, generator=torch.Generator().manual_seed(0))


def codes(steps: Tensor, scale: float) -> Tensor:
    """As bytes would hold them."""
    pictures = torch.full((len(steps), 3, H, W), 0.2)
    pictures[:, :2] = 0.5 + steps / scale / 2
    return (pictures * 255).round().clamp(0, 255) / 255


def test_tensors_arrays_and_lists_of_either_order(steps):
    last = steps.movedim(1, 3)
    forms = (
        steps,
        last,
        steps[None],
        last.half().float(),
        last.numpy(),
        [part.numpy() for part in last],
        [part[None] for part in steps],
        tuple(steps),
        last.numpy().astype(np.float64),
    )
    for form in forms:
        found = raw_flow(form, "forward")
        assert list(found) == ["forward"]
        torch.testing.assert_close(found["forward"], steps, atol=0.01, rtol=0.001)
    assert torch.equal(raw_flow(steps[0], "backward")["backward"], steps[:1])


def test_bundles_of_both_ways(steps):
    for bundle in (
        {"forward": steps, "backward": -steps, "forward_occlusions": steps[:, 0]},
        SimpleNamespace(flow_fwd=steps, flow_bwd=-steps, occlusion_fwd=None),
        {"fwd": steps.movedim(1, 3).numpy(), "bwd": list(-steps.movedim(1, 3).numpy())},
    ):
        found = raw_flow(bundle, "forward")
        assert torch.equal(found["forward"], steps) and torch.equal(found["backward"], -steps)
    assert list(raw_flow(SimpleNamespace(flow_bwd=steps), "forward")) == ["backward"]
    assert list(raw_flow({"flow": steps, "backward": None}, "forward")) == ["forward"]


@pytest.mark.parametrize(
    "value, sentence",
    [
        ("a text", "'forward' carries a str"),
        (SimpleNamespace(model=1), "SimpleNamespace without a flow"),
        ({"trajectories": [1]}, "dict without a flow"),
        ([], "carries a list"),
        ([None, None], "carries a NoneType"),
        (torch.zeros(3, H, W, 1), "two numbers for every pixel"),
        (torch.zeros(3, 2), "two numbers for every pixel"),
        (torch.zeros(0, 2, H, W), "'forward' is empty"),
        (torch.full((1, 2, H, W), torch.nan), "NaN or infinity"),
        (torch.full((1, 2, H, W), 999.0), "no flow in pixels"),
        ([torch.zeros(2, H, W), torch.zeros(2, H, H)], "several sizes"),
    ],
)
def test_what_is_no_flow_is_refused_with_its_socket(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        raw_flow(value, "forward")


def test_colours_around_grey_are_pixels_or_sizes(steps):
    steps = steps.clamp(-11, 11)
    # A byte stands for 2 x 16 / 255 pixels.
    found = coded_flow(codes(steps, 16.0), "pixels around grey", 16.0, "forward")
    assert float((found - steps).abs().max()) < 0.2
    share = steps / torch.tensor([W, H])[:, None, None]
    found = coded_flow(codes(share, 0.5), "picture sizes around grey", 0.5, "forward")
    assert float((found - steps).abs().max()) < 0.2
    still = coded_flow(torch.full((1, 3, H, W), 128 / 255), "pixels around grey", 64.0, "forward")
    assert (still == 0).all()  # bytes have no middle


def test_colours_may_be_pixels_themselves(steps):
    pictures = torch.cat([steps, torch.zeros(N, 1, H, W)], 1)
    assert torch.equal(coded_flow(pictures, "raw pixels", 1.0, "forward"), steps)
    with pytest.raises(ValueError, match="no flow in pixels"):
        coded_flow(999 * pictures, "raw pixels", 1.0, "forward")


@pytest.mark.parametrize("ground", [1.0, 0.0])
def test_colour_wheels_are_refused(ground):
    wheel = torch.full((2, 3, H, W), ground)
    wheel[:, :, 4:12, 4:12] = torch.tensor([1, 0.3, 0.3])[:, None, None]
    with pytest.raises(ValueError, match="'backward' looks like a colour wheel"):
        coded_flow(wheel, "pixels around grey", 64.0, "backward")
    with pytest.raises(ValueError, match="NaN"):
        coded_flow(wheel * torch.nan, "pixels around grey", 64.0, "backward")


def test_steps_grow_with_the_picture():
    flow = torch.tensor([2.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, H, W)
    grown = resized_flow(flow, 2 * W, 3 * H)
    assert grown.shape == (1, 2, 3 * H, 2 * W)
    assert torch.allclose(grown, torch.tensor([4.0, -9.0]).view(1, 2, 1, 1).expand_as(grown))
    assert resized_flow(flow, W, H) is flow


def test_pairs_are_sorted_into_views():
    numbered = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, H, W)
    assert by_view(numbered, 2, 4, "forward")[1, 0, 0, 0, 0] == 3
    # As many steps as frames: the last of each view leads back to its first frame.
    rounds = by_view(numbered, 2, 3, "forward")
    assert rounds.shape[:2] == (2, 2) and rounds[1, 1, 0, 0, 0] == 4
    with pytest.raises(ValueError, match="'forward' has 6 steps, but 1 x 9 frames have 8"):
        by_view(numbered, 1, 9, "forward")


def test_a_way_that_is_missing_is_the_other_turned_round():
    there = torch.zeros(1, 2, 2, H, W)
    there[:, :, 0], there[:, :, 1] = 3.0, -2.0
    for flow in (assembled(there, None, None), assembled(None, -there, None)):
        assert torch.allclose(flow.there, there) and torch.allclose(flow.back, -there)
        assert (flow.sure_there[..., 2:, : W - 3] == 1).all()
        assert (flow.sure_there[..., W - 3 :] == 0).all()  # leaves the picture
    with pytest.raises(ValueError, match="No flow is connected"):
        assembled(None, None, None)
    with pytest.raises(ValueError, match="both of the same clip"):
        assembled(there, there[:, :1], None)


def test_colours_tell_of_a_wrong_flow():
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    frames = F.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1).expand(2, -1, -1, -1)[None]
    still, wrong = torch.zeros(1, 1, 2, 64, 64), torch.zeros(1, 1, 2, 64, 64)
    wrong[:, :, 0] = 4.0
    assert float(assembled(still, None, frames).sure_there.min()) == 1
    assert float(assembled(wrong, None, None).sure_there.mean()) > 0.8
    assert float(assembled(wrong, None, frames).sure_there.mean()) < 0.5


def test_progress_is_told_and_may_stop():
    still = torch.zeros(2, 3, 2, H, W)
    seen = []
    pictures = torch.rand(2, 4, 3, H, W)
    assembled(still, None, pictures, lambda done, total, preview=None: seen.append((done, total)))
    assert seen == sorted(seen) and len(seen) > 6 and seen[-1][1] == 6

    def stop(done, total, preview=None):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        assembled(still, None, None, stop)
