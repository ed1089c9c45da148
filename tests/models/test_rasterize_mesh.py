"""The triangle rasteriser against planes and spheres, whose depth is a formula."""

import pytest
import torch
from torch import Tensor
from turnaround.models.rasterize_mesh import MAX_CELLS, NEAR, Fragments, rasterize_mesh

W, H = 48, 40
K = torch.tensor([[50.0, 0, 23.3], [0, 52.0, 20.6], [0, 0, 1]])


def rays() -> Tensor:  # [H, W, 3], z = 1
    """Directions through the pixel centres."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    return torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1)


def quad(slope: float, z: float, half: float) -> tuple[Tensor, Tensor]:
    """A square in the plane depth = z + slope * x."""
    x = torch.tensor([-half, half, half, -half])
    y = torch.tensor([-half, -half, half, half])
    return torch.stack([x, y, z + slope * x], 1), torch.tensor([[0, 1, 2], [0, 2, 3]])


def sphere(center: Tensor, radius: float, rings: int) -> tuple[Tensor, Tensor]:
    theta = torch.linspace(0, torch.pi, rings + 1)[:, None]
    phi = torch.arange(2 * rings) * torch.pi / rings
    points = torch.stack(
        [theta.sin() * phi.cos(), theta.cos().expand(-1, 2 * rings), theta.sin() * phi.sin()], -1
    )
    ring, step = torch.meshgrid(torch.arange(rings), torch.arange(2 * rings), indexing="ij")
    a = ring * 2 * rings + step
    b = ring * 2 * rings + (step + 1) % (2 * rings)
    c, d = a + 2 * rings, b + 2 * rings
    faces = torch.cat([torch.stack([a, b, d], -1), torch.stack([a, d, c], -1)]).reshape(-1, 3)
    return center + radius * points.reshape(-1, 3), faces


def draw(mesh: tuple[Tensor, Tensor]) -> Fragments:
    return rasterize_mesh(*mesh, K, W, H)


def test_slanted_plane_has_the_depth_of_its_formula_at_pixel_centres():
    # x = depth * ray_x and depth = z + slope * x, so depth = z / (1 - slope * ray_x).
    drawn = draw(quad(slope=0.4, z=2.0, half=3.0))
    expected = 2.0 / (1 - 0.4 * rays()[..., 0])
    assert (drawn.faces >= 0).all()
    torch.testing.assert_close(drawn.depth, expected, rtol=2e-5, atol=0)


def test_interpolated_positions_lie_on_the_pixel_rays():
    vertices, faces = quad(slope=0.4, z=2.0, half=3.0)
    drawn = draw((vertices, faces))
    positions = drawn.interpolate(vertices, faces)
    torch.testing.assert_close(positions, rays() * drawn.depth[..., None], rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn.barycentrics.sum(-1), torch.ones(H, W), rtol=0, atol=1e-5)


def test_sphere_has_the_depth_of_the_nearer_intersection():
    center, radius = torch.tensor([0.1, -0.05, 3.0]), 0.7
    drawn = draw(sphere(center, radius, rings=60))
    d = rays()
    a, b = (d * d).sum(-1), d @ center
    root = b**2 - a * (center @ center - radius**2)
    expected = (b - root.clamp(min=0).sqrt()) / a
    # Away from the rim, where the facets' sagitta is not stretched by the grazing view.
    inner = root > 0.25 * root.max()
    assert inner.sum() > 100
    assert (drawn.faces[inner] >= 0).all()
    sagitta = radius * (1 - torch.cos(torch.tensor(torch.pi / 120))) * 2
    assert (drawn.depth - expected)[inner].abs().max() < 2 * sagitta
    assert (drawn.faces[root < -0.02 * root.max()] == -1).all()


def test_nearer_triangle_wins_whatever_the_order():
    near, faces = quad(0.0, 1.0, 0.2)
    far, _ = quad(0.0, 2.0, 3.0)
    a = draw((torch.cat([near, far]), torch.cat([faces, faces + 4])))
    b = draw((torch.cat([far, near]), torch.cat([faces, faces + 4])))
    torch.testing.assert_close(a.depth, b.depth, rtol=0, atol=0)
    assert set(a.depth.mul(1e4).round().unique().tolist()) == {1e4, 2e4}


def test_shared_edges_leave_no_holes():
    drawn = draw(sphere(torch.tensor([0.0, 0.0, 3.0]), 0.8, rings=24))
    hit = drawn.faces >= 0
    for row in hit[hit.any(1)]:
        columns = row.nonzero()[:, 0]
        assert len(columns) == columns[-1] - columns[0] + 1


def test_a_pixel_is_covered_only_when_its_centre_is():
    # A square from pixel 10.6 to 13.4: the centres 11.5 and 12.5 are inside, 10.5 and 13.5 not.
    low, high = (10.6 - K[0, 2]) / K[0, 0], (13.4 - K[0, 2]) / K[0, 0]
    vertices = torch.tensor([[low, -1.0, 1], [high, -1, 1], [high, 1, 1], [low, 1, 1]])
    drawn = draw((vertices, torch.tensor([[0, 1, 2], [0, 2, 3]])))
    assert (drawn.faces >= 0).any(0).nonzero()[:, 0].tolist() == [11, 12]


def test_where_nothing_is_hit_everything_is_zero():
    mesh = quad(0.0, 2.0, 0.2)
    drawn = draw(mesh)
    empty = drawn.faces < 0
    assert empty.any()
    assert drawn.depth[empty].abs().max() == 0
    assert drawn.interpolate(mesh[0], mesh[1])[empty].abs().max() == 0


@pytest.mark.parametrize("z", [-2.0, NEAR / 2])
def test_triangles_behind_the_camera_or_too_near_are_dropped(z):
    assert (draw(quad(0.0, z, 0.5)).faces == -1).all()


def test_a_batch_is_its_single_pictures_to_the_bit(monkeypatch):
    ball, faces = sphere(torch.tensor([0.1, -0.05, 3.0]), 0.7, rings=16)
    vertices = torch.stack([ball, ball + torch.tensor([0.3, 0.2, 1.0]), -ball])  # last: behind
    cameras = torch.stack([K, K * torch.tensor([[1.4], [1.4], [1.0]]), K])
    batch = rasterize_mesh(vertices, faces, cameras, W, H)
    # Cutting the work into more passes changes nothing either.
    monkeypatch.setitem(MAX_CELLS, "cpu", 50)
    for i in range(3):
        single = rasterize_mesh(vertices[i], faces, cameras[i], W, H)
        for name in ("faces", "barycentrics", "depth"):
            assert torch.equal(getattr(batch, name)[i], getattr(single, name))
        assert torch.equal(
            batch.interpolate(vertices, faces)[i], single.interpolate(vertices[i], faces)
        )
    assert (batch.faces[2] == -1).all() and (batch.faces[:2] >= 0).flatten(1).any(1).all()
