"""Gaussians that follow control nodes."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models.avatar_free import (
    FOLLOWED,
    Followed,
    Nodes,
    Ties,
    between,
    follow,
    moved,
    nodes_at_rest,
    spread_nodes,
)
from turnaround.models.quats import rotvecs_to_quats, turned
from turnaround.models.splats import Splats, rotation_matrices

pytestmark = pytest.mark.usefixtures("one_thread")


def some(count: int = 400, seed: int = 0, dtype=torch.float32) -> Splats:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return Splats(
        noise(count, 3), noise(count, 4), noise(count, 3) - 3, noise(count), noise(count, 4, 3)
    )


def rigid(nodes: Nodes, rotvec: Tensor, shift: Tensor) -> Nodes:
    """All nodes moved alike, in all frames."""
    quat = rotvecs_to_quats(rotvec)
    R = rotation_matrices(quat[None])[0]
    goes = nodes.places @ R.T + shift - nodes.places
    return Nodes(nodes.places, nodes.reach, quat.expand_as(nodes.quats), goes.expand_as(nodes.goes))


def test_nodes_at_rest_leave_gaussians_where_they_are():
    splats = some()
    nodes = nodes_at_rest(splats.means, 60, 3)
    there, _ = moved(splats, follow(splats.means, nodes), nodes, 1.3)
    assert (there.means - splats.means).abs().max() < 1e-6
    assert (there.covariances() - splats.covariances()).abs().max() < 1e-6


def test_a_rigid_motion_is_exact():
    splats = some()
    rotvec, shift = torch.tensor([0.8, -1.5, 0.4]), torch.tensor([3.0, 0, -1])
    nodes = rigid(nodes_at_rest(splats.means, 60, 2), rotvec, shift)
    there, turns = moved(splats, follow(splats.means, nodes), nodes, 0)
    R = rotation_matrices(rotvecs_to_quats(rotvec)[None])[0]
    assert (there.means - (splats.means @ R.T + shift)).abs().max() < 1e-5
    assert (there.covariances() - R @ splats.covariances() @ R.T).abs().max() < 1e-4
    assert torch.equal(there.sh, splats.sh)
    assert (turned(turns, splats.means) - splats.means @ R.T).abs().max() < 1e-5


def test_between_frames_lie_the_turns_and_places_between():
    splats = some()
    nodes = nodes_at_rest(torch.zeros(1, 3), 1, 3)
    z = torch.tensor([0.0, 0, 1.0])
    quats = rotvecs_to_quats(torch.stack([0 * z, 1.0 * z, 3 * z]))[:, None]
    # Half way between frames on Catmull and Rom's curve, which goes on beyond both ends as fast:
    # (-(-1) + 9 * 0 + 9 * 1 - 5) / 16 and (-0 + 9 * 1 + 9 * 5 - 9) / 16.
    goes = torch.tensor([0.0, 1, 5])[:, None, None] * torch.tensor([1.0, 0, 0])
    nodes = Nodes(nodes.places, nodes.reach, -quats, goes)
    followed = follow(splats.means, nodes)
    for time, angle, along in (
        (-2, 0, 0),
        (0.5, 0.5, 5 / 16),
        (1.5, 2, 45 / 16),
        (2, 3, 5),
        (9, 3, 5),
    ):
        c, s = math.cos(angle), math.sin(angle)
        R = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        there, _ = moved(splats, followed, nodes, time)
        goal = splats.means @ R.T + along * torch.tensor([1.0, 0, 0])
        assert (there.means - goal).abs().max() < 1e-5


def test_nodes_spread_over_all_points():
    points = some(2000).means
    chosen = spread_nodes(points, 100)
    assert len(chosen.unique()) == 100
    away = torch.cdist(points, points[chosen])
    between = torch.cdist(points[chosen], points[chosen]).fill_diagonal_(math.inf)
    # Farthest points: no point lies farther from the nodes than the nodes from each other.
    assert away.amin(1).max() <= between.min() + 1e-6


def test_equal_points_are_one_node():
    assert len(spread_nodes(torch.ones(5, 3), 4)) == 1


def test_influence_is_smooth_where_the_nearest_nodes_change():
    nodes = nodes_at_rest(some(300, seed=1).means, 40, 1)
    line = torch.linspace(-1.5, 1.5, 4001)[:, None] * torch.tensor([[1.0, 0.4, -0.3]])
    followed = follow(line, nodes)
    spread = torch.zeros(len(line), 40).scatter_(1, followed.nodes, followed.weights)
    assert (spread.sum(1) - 1).abs().max() < 1e-5
    assert followed.nodes.shape[1] == FOLLOWED
    assert spread.diff(dim=0).abs().max() < 0.02


def test_followers_have_true_gradients():
    splats = some(6, dtype=torch.float64)
    nodes = nodes_at_rest(splats.means, 5, 2)
    followed = follow(splats.means, nodes)
    noise = some(5, seed=3, dtype=torch.float64)
    quats = (nodes.quats + 0.3 * noise.rotations).requires_grad_()
    goes = (nodes.goes + noise.means).requires_grad_()
    means = splats.means.clone().requires_grad_()

    def out(means: Tensor, quats: Tensor, goes: Tensor) -> tuple[Tensor, ...]:
        there = Nodes(nodes.places, nodes.reach, quats, goes)
        found, _ = moved(Splats(means, *splats.tensors()[1:]), followed, there, 0.4)
        ties = Ties(nodes)
        return found.means, found.rotations, ties.rigidity(there, 1)

    assert torch.autograd.gradcheck(out, (means, quats, goes))


def test_rigid_nodes_are_rigid_and_bent_ones_are_not():
    nodes = nodes_at_rest(some(300).means, 40, 3)
    ties = Ties(nodes)
    going = rigid(nodes, torch.tensor([1.0, 2.0, 0.3]), torch.tensor([0.0, 4.0, 1.0]))
    assert ties.rigidity(going, 1) < 1e-8
    stretched = Nodes(nodes.places, nodes.reach, nodes.quats, 0.1 * nodes.places.expand(3, -1, -1))
    apart = (0.1 * ties.edges).square().sum(-1)
    expected = (apart * ties.weights).sum() / ties.size**2
    torch.testing.assert_close(ties.rigidity(stretched, 1), expected)
    assert expected > 1e-3


def test_steady_motion_is_not_jerky():
    nodes = nodes_at_rest(some(300).means, 40, 3)
    ties, z = Ties(nodes), torch.tensor([0.0, 0, 1])
    way = torch.arange(3.0)[:, None, None]
    quats = rotvecs_to_quats(0.4 * way * z).expand(3, 40, 4)
    signs = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    steady = Nodes(nodes.places, nodes.reach, signs * quats, (way * z).expand(3, 40, 3))
    assert ties.jerkiness(steady, 1) < 1e-6
    assert ties.jerkiness(steady, 0) == 0 and ties.jerkiness(steady, 2) == 0
    jump = torch.tensor([0.0, 0.1, 0])[:, None, None] * z
    shaken = Nodes(nodes.places, nodes.reach, nodes.quats, jump.expand(3, 40, 3))
    torch.testing.assert_close(ties.jerkiness(shaken, 1), 0.01 / ties.size**2)


def test_what_swings_on_an_arc_stays_on_it_between_frames():
    angles = torch.arange(6.0) * 0.6
    arc = torch.stack([angles.cos(), angles.sin(), angles * 0], 1)[:, None]
    for time in (1.5, 2.25, 3.7):
        curved = between(arc, time)[0]
        low = int(time)
        straight = torch.lerp(arc[low], arc[low + 1], time - low)[0]
        goal = torch.tensor([math.cos(0.6 * time), math.sin(0.6 * time), 0])
        assert (curved - goal).norm() < 0.25 * (straight - goal).norm()


def test_nodes_that_do_not_belong_together_are_refused():
    nodes = nodes_at_rest(some(30).means, 5, 2)
    with pytest.raises(ValueError, match="need goes of shape"):
        Nodes(nodes.places, nodes.reach, nodes.quats, nodes.goes[:1])
    with pytest.raises(ValueError, match="need points to stand on"):
        spread_nodes(torch.zeros(0, 3), 4)


def test_those_of_some_gaussians():
    splats = some(10)
    followed = follow(splats.means, nodes_at_rest(splats.means, 8, 1))
    few = followed.select(torch.tensor([3, 1]))
    assert isinstance(few, Followed) and torch.equal(few.nodes, followed.nodes[[3, 1]])
