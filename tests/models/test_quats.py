"""Quaternions against matrices."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models.quats import (
    blended,
    matrices_to_quats,
    multiplied,
    rotvecs_to_quats,
    turned,
)
from turnaround.models.splats import rotation_matrices


def some(count: int = 200, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    quats = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(quats, dim=1)


def test_matrices_and_quats_are_the_same_turns():
    quats = torch.cat([some(), torch.eye(4).double(), -torch.eye(4).double()])
    back = matrices_to_quats(rotation_matrices(quats))
    assert ((back * quats).sum(1).abs() - 1).abs().max() < 1e-12


def test_products_and_turned_vectors_are_those_of_matrices():
    a, b = some(seed=1), some(seed=2)
    v = torch.randn(200, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    A, B = rotation_matrices(a), rotation_matrices(b)
    assert (rotation_matrices(multiplied(a, b)) - A @ B).abs().max() < 1e-12
    assert (turned(a, v) - (A @ v[..., None])[..., 0]).abs().max() < 1e-12


def test_rotation_vectors_turn_about_their_axes():
    angles = torch.tensor([0.0, 1e-9, 0.5, 3.0], dtype=torch.float64)
    quats = rotvecs_to_quats(angles[:, None] * torch.tensor([0.0, 0.0, 1.0]).double())
    points = turned(quats, torch.tensor([1.0, 0.0, 0.0]).double().expand(4, 3))
    torch.testing.assert_close(
        points, torch.stack([angles.cos(), angles.sin(), 0 * angles], 1), atol=1e-12, rtol=0
    )


def test_rotation_vectors_have_gradients_at_none():
    vectors = torch.zeros(2, 3, dtype=torch.float64)
    vectors[1] = torch.tensor([0.3, -1.0, 0.2])
    assert torch.autograd.gradcheck(rotvecs_to_quats, vectors.requires_grad_())


@pytest.mark.parametrize("flip", [False, True])
def test_the_mean_turn_lies_half_way_whatever_the_signs(flip):
    z = torch.tensor([0.0, 0.0, 1.0])
    ends = rotvecs_to_quats(torch.stack([0.2 * z, 1.2 * z]))
    if flip:
        ends = ends * torch.tensor([[1.0], [-1.0]])
    mean = blended(ends, torch.tensor([0.5, 0.5]))
    v = turned(mean, torch.tensor([1.0, 0, 0]))
    assert math.isclose(math.atan2(float(v[1]), float(v[0])), 0.7, abs_tol=1e-6)
