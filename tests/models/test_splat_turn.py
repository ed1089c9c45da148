"""Turned Gaussians are the same ones, seen from elsewhere."""

import math

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.splat_turn import turned
from turnaround.models.splats import Splats, rotation_matrices


def splats(N=20, degree=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    return Splats(some(N, 3), some(N, 4), some(N, 3) - 4, some(N), some(N, (degree + 1) ** 2, 3))


def a_rotation(seed):
    quat = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rotation_matrices(quat)[0]


@pytest.mark.parametrize("degree", range(4))
def test_a_turned_camera_sees_turned_gaussians_in_the_same_colours(degree):
    before, R = splats(degree=degree), a_rotation(1)
    eye = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)
    after = turned(before, R)
    assert torch.allclose(after.means, before.means @ R.T, atol=1e-12)
    assert torch.allclose(after.covariances(), R @ before.covariances() @ R.T, atol=1e-12)
    # The harmonics are the same functions up to their factors' fifteen digits.
    assert torch.allclose(after.colors(R @ eye), before.colors(eye), atol=1e-9)
    if degree:  # or the turn of the coefficients was not needed at all
        assert not torch.allclose(after.sh, before.sh, atol=0.1)


def test_two_turns_are_one():
    R, S = a_rotation(2), a_rotation(3)
    twice, once = turned(turned(splats(), R), S), turned(splats(), S @ R)
    assert torch.allclose(twice.sh, once.sh, atol=1e-9)
    side = (twice.rotations * once.rotations).sum(1, keepdim=True).sign()  # q and -q are one
    assert torch.allclose(twice.rotations, side * once.rotations, atol=1e-12)


def test_half_a_turn_only_changes_signs():
    before = splats(dtype=torch.float32)
    after = turned(before, torch.diag(torch.tensor([1.0, -1.0, -1.0])))
    for old, new in zip(before.tensors(), after.tensors(), strict=True):
        assert torch.equal(old.abs().flatten(1 - (old.ndim < 2)).sort()[0],
                           new.abs().flatten(1 - (new.ndim < 2)).sort()[0])  # fmt: skip


def test_a_quarter_turn_about_x_is_known():
    R = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    unturned = torch.tensor([[1.0, 0, 0, 0]])
    one = Splats(
        torch.zeros(1, 3), unturned, torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 1, 3)
    )
    quat = F.normalize(turned(one, R).rotations, dim=1)
    half = math.sqrt(0.5)
    assert torch.allclose(quat.abs(), torch.tensor([[half, half, 0, 0]]))
    assert torch.allclose(rotation_matrices(quat)[0], R, atol=1e-6)
