"""Blurring, growing and reading pictures."""

import pytest
import torch
import torch.nn.functional as F
from turnaround.models import filters


@pytest.mark.parametrize("size", [(40, 56), (24, 530)])
@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_blur_is_the_convolution_with_the_border_repeated(size, sigma):
    pictures = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    reach = -int(-3 * sigma // 1)
    x = torch.arange(-reach, reach + 1).double()
    bell = torch.exp(-(x**2) / (2 * sigma**2))
    bell = torch.outer(bell, bell) / bell.sum() ** 2
    wide = F.pad(pictures[:, None].double(), (reach,) * 4, mode="replicate")
    expected = F.conv2d(wide, bell[None, None])[:, 0]
    torch.testing.assert_close(
        filters.gaussian(pictures, sigma).double(), expected, atol=2e-6, rtol=0
    )


def test_blur_can_be_learnt_through_after_it_ran_in_inference_mode():
    with torch.inference_mode():
        filters.gaussian(torch.rand(1, 19, 23), 1.3)
    picture = torch.rand(1, 19, 23, requires_grad=True)
    filters.gaussian(picture, 1.3).square().sum().backward()
    assert picture.grad.abs().sum() > 0


def test_what_is_grown_reaches_as_far_and_no_farther():
    masks = torch.zeros(1, 9, 9)
    masks[0, 4, 4] = 1
    square = torch.zeros(1, 9, 9)
    square[0, 2:7, 2:7] = 1
    assert torch.equal(filters.grown(masks, 2), square)


def test_reading_at_pixel_centres_gives_the_pixels():
    field = torch.rand(3, 5, 7)
    places = torch.tensor([[0.5, 0.5], [6.5, 4.5], [3.0, 2.5]])
    read = filters.read_at(field, places)
    torch.testing.assert_close(read[0], field[:, 0, 0])
    torch.testing.assert_close(read[1], field[:, 4, 6])
    torch.testing.assert_close(read[2], (field[:, 2, 2] + field[:, 2, 3]) / 2)
