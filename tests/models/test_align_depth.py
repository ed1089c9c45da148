"""Relative depth to metres: exact on exact input, steady and unmoved by outliers."""

import pytest
import torch
from turnaround.models.align_depth import align_depth

FRAMES, SIZE = 7, 24


@pytest.fixture(params=[False, True], ids=["depth", "inverse depth"])
def inverse(request):
    return request.param


def clip(inverse: bool):
    """Metres of a bump that walks away; values with another scale and shift each frame."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    metres = 3 - 0.4 * (1 - x**2 - y**2) + 0.1 * torch.arange(FRAMES)[:, None, None]
    scale, shift = torch.linspace(0.5, 1.5, FRAMES), torch.linspace(-0.2, 0.3, FRAMES)
    wanted = 1 / metres if inverse else metres
    return metres, (wanted - shift[:, None, None]) / scale[:, None, None], scale, shift


def test_exact_input_gives_exact_metres_scale_and_shift(inverse):
    metres, values, scale, shift = clip(inverse)
    found = align_depth(values, metres, torch.ones_like(metres), inverse, steadiness=0)
    torch.testing.assert_close(found.metres, metres, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scale, scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.shift, shift, rtol=0, atol=1e-4)
    assert float(found.error.max()) < 1e-5


def test_a_fifth_of_wrong_points_hardly_moves_the_result(inverse):
    metres, values, *_ = clip(inverse)
    torch.manual_seed(0)
    coarse = metres * (1 + 0.01 * torch.randn_like(metres))
    coarse = torch.where(torch.rand_like(metres) < 0.2, coarse + 1, coarse)
    found = align_depth(values, coarse, torch.ones_like(metres), inverse, steadiness=0)
    # Least squares would be off by the mean of what is wrong, 0.2 m.
    assert float((found.metres - metres).abs().mean()) < 0.005


def test_values_that_fall_with_depth_are_found_by_a_negative_scale():
    metres, values, *_ = clip(False)
    found = align_depth(-values, metres, torch.ones_like(metres), steadiness=0)
    torch.testing.assert_close(found.metres, metres, rtol=0, atol=1e-5)
    assert float(found.scale.max()) < 0


def test_a_frame_without_target_follows_its_neighbours():
    metres, *_ = clip(False)
    target = metres.clone()
    target[3] = 0
    found = align_depth((metres - 0.3) / 0.7, target, torch.ones_like(metres))
    torch.testing.assert_close(found.metres, metres, rtol=0, atol=1e-4)
    assert found.error[3].isnan() and float(found.error[2]) < 1e-5


def test_steadiness_takes_trembling_of_the_target_away():
    metres, *_ = clip(False)
    torch.manual_seed(0)
    trembling = metres + 0.1 * torch.randn(FRAMES, 1, 1)
    jumps = [
        float((align_depth(metres, trembling, torch.ones_like(metres), steadiness=s).metres - metres)
              .mean((1, 2)).diff().abs().mean())
        for s in (0.0, 0.1, 1.0, 100.0)
    ]  # fmt: skip
    assert jumps == sorted(jumps, reverse=True)
    assert jumps[0] == pytest.approx(
        float(trembling.sub(metres)[:, 0, 0].diff().abs().mean()), rel=0.05
    )
    assert jumps[-1] < 0.1 * jumps[0]


def test_outside_the_mask_and_where_values_are_not_finite_nothing_is_known():
    metres, values, *_ = clip(False)
    masks = torch.ones_like(metres)
    masks[:, :5] = 0
    values[0, 10, 10] = torch.inf
    found = align_depth(values, metres, masks, steadiness=0).metres
    assert not found[:, :5].any() and found[0, 10, 10] == 0
    assert found.isfinite().all()


def test_no_common_point_is_one_sentence():
    metres, values, *_ = clip(False)
    with pytest.raises(ValueError, match="share 0 points inside the mask"):
        align_depth(values, torch.zeros_like(metres), torch.ones_like(metres))
