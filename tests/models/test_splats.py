"""Gaussian splats: shapes and colours against formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from turnaround.models.splats import C0, C1, Splats, cat_splats, rotation_matrices, sh_basis


def some_splats(N=5, degree=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return Splats(draw(N, 3), draw(N, 4), draw(N, 3), draw(N), draw(N, (degree + 1) ** 2, 3))


@pytest.mark.parametrize(
    ("part", "shape", "said"),
    [
        ("rotations", (5, 3), r"rotations of 5 Gaussians need the shape \[5, 4\], not \[5, 3\]"),
        ("opacities", (5, 1), r"opacities of 5 Gaussians need the shape \[5\]"),
        ("sh", (5, 5, 3), "5 coefficients a colour; degrees 0 to 3 have 1, 4, 9, 16"),
        ("sh", (4, 4, 3), r"sh of 5 Gaussians is \[5, n, 3\]"),
    ],
)
def test_wrong_shapes_are_refused(part, shape, said):
    with pytest.raises(ValueError, match=said):
        replace(some_splats(), **{part: torch.zeros(shape, dtype=torch.float64)})


def test_mixed_types_are_refused():
    with pytest.raises(ValueError, match="one floating type on one device"):
        replace(some_splats(), sh=torch.zeros(5, 1, 3))


def test_quaternions_turn_as_they_should():
    half = math.sqrt(0.5)
    about_z = rotation_matrices(3.0 * torch.tensor([[half, 0, 0, half]]))[0]
    assert torch.allclose(about_z @ torch.eye(3)[0], torch.eye(3)[1], atol=1e-6)
    R = rotation_matrices(some_splats().rotations)
    assert torch.allclose(R @ R.mT, torch.eye(3, dtype=R.dtype).expand(5, 3, 3))
    assert torch.allclose(torch.linalg.det(R), torch.ones(5, dtype=R.dtype))


def test_covariances_have_the_scales_along_the_axes():
    splats = some_splats()
    axes = rotation_matrices(splats.rotations)
    turned_back = axes.mT @ splats.covariances() @ axes
    assert torch.allclose(turned_back, torch.diag_embed((2 * splats.log_scales).exp()))


def test_harmonics_are_orthonormal():
    """Integrated over the sphere by Gauss' rule, which is exact for polynomials of this degree."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(8))
    around = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    z, phi = (t.flatten() for t in torch.meshgrid(nodes, around, indexing="ij"))
    ring = (1 - z * z).sqrt()
    basis = sh_basis(torch.stack([ring * phi.cos(), ring * phi.sin(), z], 1), 3)
    areas = weights.repeat_interleave(16) * (2 * math.pi / 16)
    assert torch.allclose(basis.T @ (basis * areas[:, None]), torch.eye(16).double(), atol=1e-12)


def test_harmonics_have_the_order_and_signs_of_3dgs_files():
    signs = sh_basis(F.normalize(torch.tensor([[0.6, 0.3, 0.9]]), dim=1), 3)[0].sign().tolist()
    assert signs == [1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1]
    poles = sh_basis(torch.tensor([[0, 0, 1.0], [1.0, 0, 0], [0, 1.0, 0]]), 1)
    expected = [[C0, 0, C1, 0], [C0, 0, 0, -C1], [C0, -C1, 0, 0]]
    assert torch.allclose(poles, torch.tensor(expected))


def test_lower_degrees_are_the_beginning_of_higher_ones():
    directions = F.normalize(some_splats(9).means, dim=1)
    for degree in range(3):
        count = (degree + 1) ** 2
        assert torch.equal(sh_basis(directions, degree), sh_basis(directions, 3)[:, :count])


def test_colours_follow_the_direction_of_view():
    """Of degree 1 the colour is the scalar product of the direction with a vector."""
    sh = torch.zeros(1, 4, 3)
    towards = torch.tensor([0.1, -0.2, 0.3])  # red's slope along x, y and z
    sh[0, 1:, 0] = torch.stack([-towards[1], towards[2], -towards[0]]) / C1
    splats = Splats(torch.ones(1, 3), torch.ones(1, 4), torch.zeros(1, 3), torch.zeros(1), sh)
    for eye in (torch.tensor([0.0, 0, 0]), torch.tensor([3.0, 1, -2])):
        direction = F.normalize(1 - eye, dim=0)
        expected = torch.tensor([[0.5 + float(direction @ towards), 0.5, 0.5]])
        assert torch.allclose(splats.colors(eye), expected)


def test_colours_are_not_below_black():
    splats = some_splats(degree=0)
    dark = replace(splats, sh=torch.full_like(splats.sh, -9.0))
    assert dark.colors(torch.zeros(3, dtype=torch.float64)).eq(0).all()


def test_select_and_cat_keep_order():
    splats = some_splats()
    mask = torch.tensor([False, True, False, True, True])
    for a, b in zip(
        cat_splats([splats.select(mask), splats.select(torch.tensor([2, 0]))]).tensors(),
        splats.select(torch.tensor([1, 3, 4, 2, 0])).tensors(),
        strict=True,
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"degrees \[1, 0\]"):
        cat_splats([splats, some_splats(degree=0)])
