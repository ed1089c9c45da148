"""Gaussians on a skin: at rest, moved, sized, bent, bound again."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.avatar_mesh import (
    Skin,
    SkinPose,
    SkinSpots,
    bound_again,
    pose_spots,
    posed,
    splats_on_body,
    spots_of,
)
from turnaround.models.body import Body
from turnaround.models.body_sources import sample_body
from turnaround.models.fit_body import triangle_normals
from turnaround.models.quats import matrices_to_quats, rotvecs_to_quats
from turnaround.models.splats import Splats, rotation_matrices

pytestmark = pytest.mark.usefixtures("one_thread")

AROUND, LENGTH, RADIUS = 24, 1.6, 0.1


def cylinder(rings: int = 33) -> tuple[Tensor, Tensor]:
    """Upright, open at its ends: [N, 3], [M, 3], seen from outside against the clock."""
    angle = torch.arange(AROUND) * (2 * math.pi / AROUND)
    y = torch.linspace(-LENGTH / 2, LENGTH / 2, rings)
    ring = torch.stack([angle.cos(), torch.zeros(AROUND), angle.sin()], 1) * RADIUS
    vertices = (ring + y[:, None, None] * torch.tensor([0.0, 1, 0])).flatten(0, 1)
    k, n = torch.meshgrid(torch.arange(rings - 1), torch.arange(AROUND), indexing="ij")
    a, b = k * AROUND + n, k * AROUND + (n + 1) % AROUND
    c, d = a + AROUND, b + AROUND
    faces = torch.stack([torch.stack([a, c, b], -1), torch.stack([b, c, d], -1)], 2)
    return vertices, faces.reshape(-1, 3)


def bent(vertices: Tensor, angle: float, length: float) -> Tensor:
    """The part below the middle turned by an angle, blended over `length` as skinning does."""
    share = (0.5 + vertices[:, 1] / length).clamp(0, 1)[:, None]
    c, s = math.cos(angle), math.sin(angle)
    turn = vertices.new_tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return (1 - share) * vertices + share * vertices @ turn.T


def hung(body: Body, count: int, degree: int = 0) -> tuple[Splats, SkinSpots]:
    splats, places = splats_on_body(body, count, degree)
    return splats, spots_of(places, body.rest, body.faces)


def stand(splats: Splats, spots: SkinSpots, pose: SkinPose) -> Splats:
    return posed(splats, spots, pose_spots(spots, pose))


@pytest.fixture(scope="module")
def kira() -> Body:
    return sample_body("kira", "dance_a", torch.tensor([0.2, 0.9]), 1_000_003, 16.0)


def displaced(splats: Splats, seed: int = 0) -> Splats:
    """Gaussians somewhere off the skin, turned and sized at random."""
    generator = torch.Generator().manual_seed(seed)
    N = len(splats)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Splats(
        splats.means + 0.03 * noise(N, 3), noise(N, 4), -4 + noise(N, 3), noise(N), noise(N, 4, 3)
    )


def test_the_template_leaves_gaussians_where_they_are(kira):
    splats, spots = hung(kira, 3000)
    splats = displaced(splats)
    there = stand(splats, spots, Skin(kira.rest, kira.faces).pose(kira.rest))
    assert (there.means - splats.means).abs().max() < 1e-6
    assert (there.log_scales - splats.log_scales).abs().max() < 1e-5
    same = (F.normalize(splats.rotations, dim=1) * there.rotations).sum(1).abs()
    assert (same - 1).abs().max() < 1e-6
    assert torch.equal(there.opacities, splats.opacities) and torch.equal(there.sh, splats.sh)


def test_a_rigid_motion_moves_gaussians_rigidly(kira):
    splats, spots = hung(kira, 2000)
    splats, skin = displaced(splats), Skin(kira.rest, kira.faces)
    turn = rotation_matrices(rotvecs_to_quats(torch.tensor([[0.4, 2.0, -0.7]])))[0]
    shift = torch.tensor([0.5, -1.0, 2.0])
    before = stand(splats, spots, skin.pose(kira.vertices[1]))
    after = stand(splats, spots, skin.pose(kira.vertices[1] @ turn.T + shift))
    assert (after.means - (before.means @ turn.T + shift)).abs().max() < 1e-5
    covariances = turn @ before.covariances() @ turn.T
    size = covariances.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    assert ((after.covariances() - covariances) / size).abs().max() < 1e-4
    assert torch.equal(after.sh, splats.sh)


def test_a_body_twice_as_large_has_gaussians_twice_as_large(kira):
    splats, spots = hung(kira, 2000)
    splats, skin = displaced(splats), Skin(kira.rest, kira.faces)
    once = stand(splats, spots, skin.pose(kira.vertices[0]))
    twice = stand(splats, spots, skin.pose(2 * kira.vertices[0]))
    assert (twice.means - 2 * once.means).abs().max() < 2e-5
    assert (twice.log_scales - once.log_scales - math.log(2)).abs().max() < 1e-4


def test_gaussians_grow_along_the_skin_as_far_as_it_stretches():
    vertices, faces = cylinder()
    body = Body(vertices[None], faces, vertices)
    splats, spots = hung(body, 1000)
    upright = torch.tensor([1.0, 0, 0, 0]).expand(len(splats), 4)
    splats = Splats(splats.means, upright, *splats.tensors()[2:])
    longer = torch.tensor([1.0, 1.5, 1.0])
    there = stand(splats, spots, Skin(vertices, faces).pose(vertices * longer))
    grown = (there.log_scales - splats.log_scales).exp()
    inner = splats.means[:, 1].abs() < 0.7
    assert (grown[inner, 1] - 1.5).abs().max() < 1e-4
    # Around it nothing is longer; outwards it grows by sqrt(1.5), half of that half way between.
    around = grown[inner][:, [0, 2]].amin(1)
    assert (around >= 1 - 1e-4).all() and (around < 1.13).all()
    assert (there.means - splats.means * longer)[inner].abs().max() < 1e-5


def gaps(means: Tensor, places: Tensor, spacing: float) -> Tensor:
    """How far apart Gaussians have come that were neighbours, in times of before."""
    near = torch.cdist(places, places)
    i, j = torch.nonzero((near < spacing) & (near > 0), as_tuple=True)
    return (means[i] - means[j]).norm(dim=1) / near[i, j]


def by_triangle(splats: Splats, spots, rest: Tensor, vertices: Tensor) -> Tensor:
    """Means as GaussianAvatars moves them: each with its triangle's own frame."""

    def frames(values: Tensor) -> tuple[Tensor, Tensor]:
        corners = values[spots.corners]
        edge = F.normalize(corners[:, 1] - corners[:, 0], dim=1)
        normal = triangle_normals(corners)
        return torch.stack([edge, torch.linalg.cross(normal, edge), normal], 2), spots.of(values)

    (start, anchors), (end, places) = frames(rest), frames(vertices)
    local = (start.mT @ (splats.means - anchors)[..., None])[..., 0]
    return places + (end @ local[..., None])[..., 0]


@pytest.mark.parametrize("angle", [60, 100])
def test_cloth_over_a_bend_does_not_tear(angle):
    """4 cm off a cylinder of 10 cm, bent over 24 cm, triangles of 5 x 2.6 cm."""
    vertices, faces = cylinder()
    body = Body(vertices[None], faces, vertices)
    splats, spots = hung(body, 2500)
    outward = F.normalize(splats.means * torch.tensor([1.0, 0, 1]), dim=1)
    off = Splats(splats.means + 0.04 * outward, *splats.tensors()[1:])
    goal = bent(vertices, math.radians(angle), 0.24)
    there = stand(off, spots, Skin(vertices, faces).pose(goal))
    spacing = 0.04
    blended = gaps(there.means, off.means, spacing)
    single = gaps(by_triangle(off, spots, vertices, goal), off.means, spacing)
    # Outside of the bend the cloth is longer by (radius + 4 cm) / radius at least.
    assert blended.amax() < 1.9 and blended.amax() < 0.5 * single.amax()
    assert blended.quantile(0.99) < 0.97 * single.quantile(0.99)


def test_gaussians_lie_flat_on_the_skin_in_its_colors(kira):
    splats, spots = hung(kira, 4000, degree=1)
    axes = rotation_matrices(splats.rotations)
    normals = triangle_normals(kira.rest[spots.corners])
    assert (axes[..., 2] * normals).sum(1).min() > 1 - 1e-5
    assert (splats.log_scales[:, 2] < splats.log_scales[:, 0]).all()
    assert (splats.means - spots.of(kira.rest)).abs().max() == 0
    seen = splats.colors(torch.zeros(3))
    assert (seen - spots.of(kira.colors)).abs().max() < 1e-5


def test_bound_again_a_gaussian_hangs_where_it_is_now(kira):
    splats, places = splats_on_body(kira, 3000)
    rest, faces = kira.rest, kira.faces
    again = bound_again(splats, places, rest, faces)
    away = (again.of(rest, faces) - splats.means).norm(dim=1)
    # Near an edge the neighbour may face its old triangle's normal better.
    assert away.quantile(0.95) < 1e-5 and away.max() < 1e-3
    a, b, _ = rest[faces[places.faces]].unbind(1)
    moved = Splats(splats.means + 0.02 * F.normalize(b - a, dim=1), *splats.tensors()[1:])
    before = (moved.means - splats.means).norm(dim=1)
    after = (moved.means - bound_again(moved, places, rest, faces).of(rest, faces)).norm(dim=1)
    assert (after <= before + 1e-6).float().mean() > 0.99 and after.mean() < 0.2 * before.mean()


def test_posed_gaussians_have_true_gradients():
    vertices, faces = cylinder(rings=5)
    body = Body(vertices[None], faces, vertices)
    splats, spots = hung(body, 4)
    pose = Skin(vertices.double(), faces).pose(bent(vertices.double(), 0.8, 0.5))
    spots = type(spots)(spots.corners, spots.weights.double(), spots.anchors.double())
    given = [t.double().requires_grad_() for t in displaced(splats).tensors()]

    def out(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(stand(Splats(*tensors), spots, pose).tensors())

    assert torch.autograd.gradcheck(out, given)


def test_a_folded_skin_gives_turns_not_mirror_images():
    vertices, faces = cylinder(rings=5)
    pose = Skin(vertices, faces).pose(vertices * torch.tensor([1.0, 1.0, -1.0]))
    R = rotation_matrices(pose.quats)
    assert torch.isfinite(pose.stretches).all()
    assert (torch.linalg.det(R) - 1).abs().max() < 1e-5
    assert (matrices_to_quats(R) * pose.quats).sum(1).abs().min() > 1 - 1e-5


def test_no_gaussians_are_no_avatar(kira):
    with pytest.raises(ValueError, match="at least 1 Gaussian, 0 were asked for"):
        splats_on_body(kira, 0)
