"""Flow: pictures that move by known steps, bodies whose surface is known exactly."""

import cv2
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.flow import flow_both_ways

W, H = 64, 48

pytestmark = pytest.mark.usefixtures("one_thread")


def texture(*shape: int, seed: int = 0) -> Tensor:
    """Smooth noise, 0..1."""
    coarse = torch.rand(1, *shape[:-2], shape[-2] // 4, shape[-1] // 4,
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return F.interpolate(coarse, shape[-2:], mode="bicubic")[0].clamp(0, 1)


def test_flow_there_and_back_of_a_picture_that_moves():
    big = texture(3, H + 8, W + 8)
    frames = torch.stack([big[:, 4 : 4 + H, 4 - s : 4 - s + W] for s in (0, 2, 3)])
    there, back = flow_both_ways(frames, cv2)
    assert there.shape == back.shape == (2, 2, H, W)
    middle = (slice(8, -8), slice(8, -8))
    for n, step in enumerate((2.0, 1.0)):
        for way, sign in ((there, 1), (back, -1)):
            x, y = way[n][(slice(None), *middle)].flatten(1).median(1).values
            assert float(x) == pytest.approx(sign * step, abs=0.15) and abs(float(y)) < 0.15
