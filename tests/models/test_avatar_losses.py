"""The performer cut out of pictures, and what pictures and Gaussians cost."""

import pytest
import torch
from torch import Tensor
from turnaround.models.avatar_losses import (
    FAR,
    LARGE,
    SSIM_SHARE,
    box_around,
    cut_out,
    order_loss,
    picture_loss,
    structure_loss,
)
from turnaround.models.metrics import ssim
from turnaround.models.splats import Splats

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def disc(size: int = 64) -> Tensor:  # [size, size], soft at its rim
    at = torch.arange(size) + 0.5 - size / 2
    return (size / 4 - (at[:, None].square() + at.square()).sqrt() + 0.5).clamp(0, 1)


def test_the_performer_is_cut_out_of_its_background():
    """A red disc before a slope of blue: what is left is red times alpha, at its rim too."""
    mask = disc()
    red = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    slope = torch.stack(
        [torch.zeros(64, 64), torch.zeros(64, 64), torch.linspace(0, 1, 64).expand(64, 64)]
    )
    picture = mask * red + (1 - mask) * slope
    cut = cut_out(picture, mask, (0, 0, 64, 64))
    assert (cut.color - mask * red).abs().max() < 0.06
    assert (cut.color - mask * red).abs().mean() < 2e-3
    ground = torch.tensor([0.3, 0.6, 0.9])
    assert (cut.over(ground) - mask * red - (1 - mask) * ground[:, None, None]).abs().max() < 0.06


def test_a_part_has_its_own_camera():
    mask = torch.zeros(40, 60)
    mask[10:30, 20:30] = 1
    box = box_around(mask)
    assert box == (12, 2, 38, 38)
    K = torch.tensor([[50.0, 0, 30], [0, 50, 20], [0, 0, 1]])
    moved = cut_out(noise(3, 40, 60), mask, box).camera(K)
    assert moved[0, 2] == 18 and moved[1, 2] == 18 and K[0, 2] == 30
    assert cut_out(noise(3, 40, 60), mask, box).alpha.shape == (36, 26)
    assert box_around(torch.zeros(4, 4)) is None


def test_structure_is_that_of_the_metric():
    """Of the inner pixels, whose windows lie inside; the metric repeats the border."""
    a, b = noise(3, 40, 30), noise(3, 40, 30, seed=1) * 0.3 + 0.4
    where = torch.zeros(40, 30)
    where[5:-5, 5:-5] = 1
    assert abs(float(structure_loss(a, b)) - (1 - ssim(a, b, where))) < 1e-5
    assert structure_loss(a, a).abs() < 1e-6


def test_small_pictures_have_a_structure_too():
    assert 0 < structure_loss(noise(3, 6, 4), noise(3, 6, 4, seed=1)) < 2


def test_pictures_cost_pixels_and_structure():
    a, b = noise(3, 30, 30), noise(3, 30, 30, seed=1)
    expected = (1 - SSIM_SHARE) * (a - b).abs().mean() + SSIM_SHARE * structure_loss(a, b)
    torch.testing.assert_close(picture_loss(a, b), expected)
    x = noise(3, 14, 13).double().requires_grad_()
    assert torch.autograd.gradcheck(structure_loss, (x, b[:, :14, :13].double()))


def test_only_gaussians_out_of_order_cost_anything():
    zeros = torch.zeros(4, 3)
    scales = torch.full((4, 3), 0.009)
    splats = Splats(
        zeros + 0.01, torch.ones(4, 4), scales.log(), torch.zeros(4), torch.zeros(4, 1, 3)
    )
    units = torch.full((4,), 0.01)
    assert order_loss(splats, zeros, units) == 0
    scales[0, 1] = 0.03
    means = zeros.clone()
    means[1, 0] = 0.05
    splats = Splats(means, torch.ones(4, 4), scales.log(), torch.zeros(4), torch.zeros(4, 1, 3))
    expected = LARGE * (3 - 1) ** 2 / 4 + FAR * (5 - 2) ** 2 / 4
    torch.testing.assert_close(order_loss(splats, zeros, units), torch.tensor(expected))
