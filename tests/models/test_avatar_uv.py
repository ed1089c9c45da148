"""Maps of the skin, and the net that reads them."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models.avatar_mesh import (
    Skin,
    SkinPose,
    SkinSpots,
    pose_spots,
    posed,
    splats_on_body,
    spots_of,
)
from turnaround.models.avatar_uv import (
    LIMITS,
    OUTPUTS,
    Atlas,
    DetailNet,
    calm_loss,
    detailed,
    moved_maps,
    shown_by,
)
from turnaround.models.body import Body
from turnaround.models.body_sources import sample_body
from turnaround.models.quats import rotvecs_to_quats
from turnaround.models.splats import Splats, rotation_matrices

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = sum(OUTPUTS.values())


def hung(body: Body, count: int, degree: int = 0) -> tuple[Splats, SkinSpots]:
    splats, places = splats_on_body(body, count, degree)
    return splats, spots_of(places, body.rest, body.faces)


def stand(splats: Splats, spots: SkinSpots, pose: SkinPose) -> Splats:
    return posed(splats, spots, pose_spots(spots, pose))


@pytest.fixture(scope="module")
def kira() -> Body:
    return sample_body("kira", "dance_a", torch.tensor([0.2, 0.9]), 1_000_003, 16.0)


@pytest.fixture(scope="module")
def atlas(kira) -> Atlas:
    return Atlas(kira.rest, kira.faces)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_gaussian_reads_its_own_place(kira, atlas):
    """A map of the template's coordinates, read at a Gaussian, gives where the Gaussian is."""
    splats, spots = hung(kira, 5000)
    places = atlas.places(spots)
    assert (places.at.abs() < 1).all()
    read = places.read(atlas.drawn(kira.rest))
    # Along the picture: to the chart's resolution everywhere.
    along = (read - splats.means)[:, :2].norm(dim=1)
    assert along.quantile(0.9) < 0.5 * atlas.texel and along.max() < 2 * atlas.texel
    # Into it: but for what lies behind other skin of its chart (the inside of hands, the ears), or
    # where both charts count.
    deep = (read - splats.means)[:, 2].abs()
    clear = (places.back < 0.01) | (places.back > 0.99)
    assert deep[clear].median() < 0.3 * atlas.texel
    assert (deep[clear] < 2 * atlas.texel).float().mean() > 0.93


def test_two_places_of_a_chart_are_two_places_of_the_map(kira, atlas):
    """Gaussians of one chart that share a texel lie within a texel of each other on the skin, but
    for what hides behind other skin."""
    splats, spots = hung(kira, 20000)
    places = atlas.places(spots)
    size = torch.tensor([atlas.width, atlas.height])
    texel = ((places.at + 1) / 2 * size).long()
    for chart in (places.back < 0.5, places.back >= 0.5):
        number = texel[chart] @ torch.tensor([1, atlas.width])
        order = number.argsort(stable=True)
        same = number[order].diff() == 0
        apart = splats.means[chart][order].diff(dim=0).norm(dim=1)[same]
        assert (apart < 3 * atlas.texel).float().mean() > 0.9


def test_charts_join_without_a_seam(kira, atlas):
    """What is read changes little between neighbours on either side of a silhouette."""
    splats, spots = hung(kira, 20000)
    places = atlas.places(spots)
    maps = atlas.drawn(torch.stack([kira.rest[:, 2], torch.ones(len(kira.rest))], 1))
    read = places.read(maps)
    assert (read[:, 1] - 1).abs().max() < 1e-5
    rim = (places.back - 0.5).abs() < 0.2
    assert 100 < rim.sum() < 8000
    near = torch.cdist(splats.means[rim], splats.means[rim]).fill_diagonal_(math.inf).argmin(1)
    step = (read[rim, 0] - read[rim, 0][near]).abs()
    assert step.quantile(0.9) < 0.5 * atlas.texel * 3


def test_a_template_that_only_moves_has_not_moved(kira, atlas):
    turn = rotation_matrices(rotvecs_to_quats(torch.tensor([[0.2, 1.0, 0.1]])))[0]
    pose = Skin(kira.rest, kira.faces).pose(kira.rest @ turn.T + 2)
    maps = moved_maps(atlas, kira.rest, pose)
    assert maps.shape == (2, 6, atlas.height, atlas.width)
    assert maps[:, :3].abs().max() < 1e-5
    expected = atlas.drawn(atlas.normals @ turn.T)
    assert (maps[:, 3:] - expected).abs().max() < 1e-4
    danced = moved_maps(atlas, kira.rest, Skin(kira.rest, kira.faces).pose(kira.vertices[0]))
    assert danced[:, :3].abs().max() > 0.1


def test_an_untrained_net_changes_nothing(kira, atlas):
    net = DetailNet()
    splats, spots = hung(kira, 500)
    maps = moved_maps(atlas, kira.rest, Skin(kira.rest, kira.faces).pose(kira.vertices[0]))
    offsets = net(maps)
    assert offsets.abs().max() == 0
    same = detailed(splats, atlas.places(spots).read(offsets), 1.8)
    for before, after in zip(splats.tensors(), same.tensors(), strict=True):
        assert (before - after).abs().max() < 1e-6
    (offsets + 1).sum().backward()
    assert net.last.weight.grad.abs().max() > 0


def test_offsets_stay_within_their_limits(atlas):
    net = DetailNet(seed=1)
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.add_(noise(*p.shape, seed=n))
        offsets = net(100 * noise(2, 6, atlas.height, atlas.width))
    for part, limit in zip(offsets.split(list(OUTPUTS.values()), 1), LIMITS.values(), strict=True):
        assert limit * 0.99 < part.abs().max() <= limit * (1 + 1e-6)


def test_the_same_seed_gives_the_same_net():
    state = torch.random.get_rng_state()
    one, same, other = (DetailNet(seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["down.0.weight"], other["down.0.weight"])


def test_unseen_poses_are_held_within_what_was_seen():
    seen = [noise(2, 6, 8, 8, seed=n) for n in range(3)]
    shown = shown_by(seen)
    assert all(torch.equal(shown.hold(maps), maps) for maps in seen)
    held = shown.hold(10 * noise(2, 6, 8, 8, seed=9))
    assert (held <= torch.stack(seen).amax(0)).all() and (held >= torch.stack(seen).amin(0)).all()


def test_offsets_of_the_template_go_with_the_skin(kira):
    """A Gaussian lifted along its normal stays on its normal wherever its limb turns."""
    splats, spots = hung(kira, 1000)
    normals = rotation_matrices(splats.rotations)[..., 2]
    offsets = torch.cat([0.01 * normals, torch.zeros(1000, COUNT - 3)], 1)
    lifted = detailed(splats, offsets, 1.5)
    pose = Skin(kira.rest, kira.faces).pose(kira.vertices[1])
    there, on_skin = stand(lifted, spots, pose), stand(splats, spots, pose)
    goes = there.means - on_skin.means
    axis = rotation_matrices(there.rotations)[..., 2]
    assert ((goes * axis).sum(1) / goes.norm(dim=1)).min() > 0.999


def test_turns_scales_and_colors_have_their_units():
    body = sample_body("kira", "dance_a", torch.tensor([0.2]), 1_000_003, 16.0)
    splats, _ = hung(body, 10, degree=1)
    offsets = torch.zeros(10, COUNT)
    offsets[:, 5], offsets[:, 6:9], offsets[:, 9] = 0.3, 0.2, 0.1
    changed = detailed(splats, offsets, 1.5)
    turn = rotation_matrices(rotvecs_to_quats(torch.tensor([[0.0, 0, 0.3]])))[0]
    expected = turn @ splats.covariances() @ turn.T * math.exp(0.4)
    torch.testing.assert_close(changed.covariances(), expected, rtol=1e-4, atol=1e-7)
    there = torch.zeros(3)
    before, after = (one.colors(there) for one in (splats, changed))
    open_range = (before[:, 0] > 0) & (after[:, 0] > 0)
    assert (after - before)[open_range, 0].sub(0.1).abs().max() < 1e-6


def test_calm_offsets_cost_nothing_and_wild_ones_much(atlas):
    h, w = atlas.height, atlas.width
    flat = torch.zeros(2, COUNT, h, w)
    flat[:, :3] = 0.01
    assert calm_loss(flat, atlas) == 0
    slope = torch.zeros(2, COUNT, h, w)
    slope[:, 0] = 0.01 * torch.linspace(-1, 1, w)
    wild = torch.zeros(2, COUNT, h, w)
    wild[:, 0] = 0.01 * (torch.arange(w) % 2 * 2 - 1.0)
    assert 0 < calm_loss(slope, atlas) < 1e-3 * calm_loss(wild, atlas)
    # By hand: a step of 2 x 0.01 in limits between neighbours across, 4 x in the Laplacian.
    share = 0.01 / LIMITS["move"]
    expected = (0.4 * (2 * share) ** 2 + (4 * share) ** 2) / COUNT
    torch.testing.assert_close(calm_loss(wild, atlas), torch.tensor(expected))


def test_a_map_of_a_size_that_cannot_be_halved_is_refused(kira):
    with pytest.raises(ValueError, match="size that 8 divides, got 100"):
        Atlas(kira.rest, kira.faces, 100)
