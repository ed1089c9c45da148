"""Turning Gaussians as a whole, their view-dependent colour with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quats import matrices_to_quats, multiplied
from .splats import Splats, sh_basis


def turned(
    splats: Splats,
    R: Tensor,  # [3, 3] rotation
) -> Splats:
    """The Gaussians turned about the origin, their view-dependent colour with them."""
    R = R.to(splats.means)
    sh = torch.einsum("ij,njc->nic", _turn_harmonics(R, splats.degree), splats.sh)
    rotations = multiplied(matrices_to_quats(R), splats.rotations)
    return Splats(splats.means @ R.T, rotations, splats.log_scales, splats.opacities, sh)


def _turn_harmonics(
    R: Tensor,  # [3, 3] rotation
    degree: int,
) -> Tensor:  # [(degree + 1)^2, (degree + 1)^2]
    """What coefficients become when their function is turned: the new function of a direction is
    the old one of the direction turned back, which many directions tell."""
    draw = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(64, 3, generator=draw, dtype=torch.float64), dim=1)
    new, old = (sh_basis(d, degree) for d in (directions, directions @ R.double().cpu()))
    matrix = torch.linalg.lstsq(new, old).solution
    # Turns by right angles swap and negate some coefficients, exactly.
    return torch.where(matrix.abs() < 1e-12, 0.0, matrix).to(R)
