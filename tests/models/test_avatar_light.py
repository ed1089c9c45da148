"""Light on Gaussians, by the way that they face."""

import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.avatar_light import even_light, lit
from turnaround.models.performer_light import DEFAULT_LIGHTING
from turnaround.models.splats import C0, Splats, sh_basis


def some(count: int, degree: int = 1) -> tuple[Splats, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    sh = 0.2 * noise(count, (degree + 1) ** 2, 3)
    splats = Splats(noise(count, 3), noise(count, 4), noise(count, 3), noise(count), sh)
    return splats, F.normalize(noise(count, 3), dim=1)


def test_even_light_changes_nothing():
    splats, normals = some(50)
    same = lit(splats, normals, even_light(normals))
    assert (same.sh - splats.sh).abs().max() < 1e-6
    assert same.means is splats.means


def test_colors_are_multiplied_from_every_side():
    splats, normals = some(50)
    light = even_light(normals)
    light[0] *= torch.tensor([0.5, 0.8, 1.0])
    eye = torch.tensor([3.0, -2.0, 5.0])
    before, after = splats.colors(eye), lit(splats, normals, light).colors(eye)
    assert (after - before * torch.tensor([0.5, 0.8, 1.0])).abs().max() < 1e-5


def test_nine_numbers_tell_the_light_of_far_lamps():
    """The lamps of the synthetic performers, least squares over all directions."""
    _, normals = some(3000)
    truth = DEFAULT_LIGHTING.shade(torch.full((3000, 3), 0.9), normals) / 0.9
    light = torch.linalg.lstsq(sh_basis(normals, 2), truth).solution
    splats, _ = some(3000)
    sh = torch.zeros(3000, 1, 3)
    sh[:, 0] = 0.4 / C0  # colour 0.9
    white = Splats(*splats.tensors()[:4], sh)
    error = lit(white, normals, light).colors(torch.zeros(3)) / 0.9 - truth
    assert truth.amax() - truth.amin() > 0.3
    assert error.square().mean().sqrt() < 0.02


def test_light_is_never_negative():
    splats, normals = some(20)
    dark = lit(splats, normals, -even_light(normals))
    assert torch.isfinite(dark.sh).all() and (dark.colors(torch.zeros(3)) >= 0).all()
