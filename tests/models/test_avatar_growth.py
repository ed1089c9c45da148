"""Gaussians that are fitted: splitting, dying out, Adam's moments."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models.avatar_growth import APART, SMALLER, GrowingSplats, opaque
from turnaround.models.splats import Splats, rotation_matrices

pytestmark = pytest.mark.usefixtures("one_thread")


def some(count: int = 8, degree: int = 1) -> Splats:
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    return Splats(
        noise(count, 3), noise(count, 4), noise(count, 3) - 2, noise(count),
        noise(count, (degree + 1) ** 2, 3),
    )  # fmt: skip


@pytest.mark.parametrize("degree", [0, 1])
def test_gaussians_are_those_that_were_given(degree):
    splats = some(degree=degree)
    for given, held in zip(
        splats.tensors(), GrowingSplats(splats, 1.0).splats.tensors(), strict=True
    ):
        assert torch.equal(given, held) and held.requires_grad


def test_the_halves_of_a_gaussian_lie_where_it_lay():
    splats, chosen = some(), torch.tensor([2, 5])
    growing = GrowingSplats(splats, 1.0)
    parents = growing.split(chosen)
    after = growing.splats
    assert parents.tolist() == [*range(8), 2, 5] and len(growing) == 10
    pairs = torch.stack([after.means[[2, 5]], after.means[[8, 9]]])
    assert (pairs.mean(0) - splats.means[chosen]).abs().max() < 1e-6
    longest = splats.log_scales[chosen].argmax(1)
    axes = rotation_matrices(splats.rotations)[chosen][torch.arange(2), :, longest]
    expected = 2 * APART * splats.log_scales[chosen].exp().amax(1)[:, None] * axes
    assert (pairs[0] - pairs[1] - expected).abs().max() < 1e-6
    for half in (chosen, torch.tensor([8, 9])):
        change = after.log_scales[half] - splats.log_scales[chosen]
        assert (change[torch.arange(2), longest] - math.log(SMALLER)).abs().max() < 1e-6
        assert (change.abs().sum(1) + math.log(SMALLER)).abs().max() < 1e-6
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    assert torch.equal(after.means[others], splats.means[others])


def test_fitting_goes_on_after_a_split():
    growing = GrowingSplats(some(), 1.0)

    def step() -> None:
        (growing.splats.means.square().sum() + growing.splats.sh.square().sum()).backward()
        growing.step(1.0)

    step()
    moments = growing.adam.state[growing.values["means"]]["exp_avg"].clone()
    growing.split(torch.tensor([1]))
    growing.keep(torch.tensor([8, 1, 0]))
    kept = growing.adam.state[growing.values["means"]]["exp_avg"]
    assert kept[0].abs().max() == 0 and torch.equal(kept[1:], moments[[1, 0]])
    before = growing.splats.means.detach().clone()
    step()
    assert len(growing) == 3 and (growing.splats.means - before).abs().min() > 0


def test_what_is_pulled_most_is_split_first():
    growing = GrowingSplats(some(4), 1.0)
    visible = torch.tensor([True, True, False, True])
    growing.watch(torch.tensor([[0.0, 1], [3, 4], [9, 9], [0, 0]]) * visible[:, None], visible)
    growing.watch(torch.tensor([[0.0, 1], [0, 0], [0, 7.0], [0, 0]]), torch.ones(4).bool())
    # Means over the pictures that showed them: 1, 2.5, 7, 0.
    assert growing.most_pulled(2).tolist() == [1, 2]
    assert growing.most_pulled(9).tolist() == [0, 1, 2]
    assert growing.most_pulled(-1).tolist() == []
    growing.forget()
    assert growing.most_pulled(9).tolist() == []


def test_what_cannot_be_seen_dies_out():
    splats = some(5)
    splats.opacities[:] = torch.tensor([0.0, -9.0, 2.0, 1.0, 1.0])
    splats.means[3, 0] = math.nan
    assert opaque(splats, 0.02).tolist() == [0, 2, 4]


def test_rates_of_places_are_in_units():
    ways = []
    for unit in (1.0, 0.01):
        growing = GrowingSplats(some(), unit)
        before = growing.splats.means.detach().clone()
        growing.splats.means.sum().backward()
        growing.step(0.5)
        ways.append((growing.splats.means - before).abs().mean())
    torch.testing.assert_close(ways[0] / ways[1], torch.tensor(100.0), rtol=1e-2, atol=0)
