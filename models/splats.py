"""Gaussian splats: a cloud of soft ellipsoids with colours that depend on the direction of view.

As in 3D Gaussian Splatting (Kerbl et al. 2023, Sec. 4): a Gaussian has a mean, a rotation, three
scales whose logarithms are kept, an opacity kept as a logit, and spherical harmonics for its colour.
Order, signs and factors of the harmonics are those of the files that 3DGS writes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_DEGREE = 3
C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
C3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154)
C3_MIDDLE = 1.445305721320277
"""Factors of the real spherical harmonics of degrees 0 to 3."""


@dataclass(frozen=True)
class Splats:
    """N Gaussians in the world. Tensors of one floating dtype on one device."""

    means: Tensor
    """[N, 3] metres."""
    rotations: Tensor
    """[N, 4] quaternions (w, x, y, z), of any length above 0: turn a Gaussian's axes into the world."""
    log_scales: Tensor
    """[N, 3] logarithms of the standard deviations along its axes, metres."""
    opacities: Tensor
    """[N] logits: 0 is half opaque."""
    sh: Tensor
    """[N, (degree + 1)², 3] harmonics' coefficients of red, green and blue, degree 0 to 3."""

    def __post_init__(self) -> None:
        N = len(self.means)
        shapes = {"means": (N, 3), "rotations": (N, 4), "log_scales": (N, 3), "opacities": (N,)}
        for name, shape in shapes.items():
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(
                    f"{name} of {N} Gaussians need the shape {list(shape)}, not {list(got)}."
                )
        counts = [(degree + 1) ** 2 for degree in range(MAX_DEGREE + 1)]
        if self.sh.ndim != 3 or len(self.sh) != N or self.sh.shape[2] != 3:
            raise ValueError(f"sh of {N} Gaussians is [{N}, n, 3], not {list(self.sh.shape)}.")
        if self.sh.shape[1] not in counts:
            raise ValueError(
                f"sh has {self.sh.shape[1]} coefficients a colour; degrees 0 to {MAX_DEGREE} have "
                f"{', '.join(map(str, counts))}."
            )
        kinds = {(t.dtype, t.device) for t in self.tensors()}
        if len(kinds) > 1 or not self.means.is_floating_point():
            listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"Gaussians need one floating type on one device, got {listed}.")

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        """Of the harmonics, 0 to 3."""
        return round(self.sh.shape[1] ** 0.5) - 1

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def select(self, chosen: Tensor) -> Splats:
        """Some of the Gaussians: by number [n] or by mask [N]."""
        return Splats(*(t[chosen] for t in self.tensors()))

    def covariances(self) -> Tensor:  # [N, 3, 3] square metres
        """Sigma = R S Sᵀ Rᵀ, Eq. 6 of 3DGS."""
        axes = rotation_matrices(self.rotations) * self.log_scales.exp()[:, None]
        return axes @ axes.mT

    def colors(
        self,
        eye: Tensor,  # [3] world, where the camera stands
    ) -> Tensor:  # [N, 3], 0 and above
        """What colours the Gaussians show to a camera: 0.5 + harmonics, not below 0."""
        if self.degree == 0:
            seen = C0 * self.sh[:, 0]
        else:
            basis = sh_basis(F.normalize(self.means - eye, dim=1), self.degree)
            seen = (basis[..., None] * self.sh).sum(1)
        return (seen + 0.5).relu()


def cat_splats(parts: list[Splats]) -> Splats:
    """All Gaussians of several clouds, in order; they need one degree."""
    if len({part.degree for part in parts}) != 1:
        raise ValueError(
            f"Gaussians with harmonics of degrees {[part.degree for part in parts]} can't be joined: "
            "fill the lower ones' sh with zeros first."
        )
    return Splats(*map(torch.cat, zip(*(part.tensors() for part in parts), strict=True)))


def rotation_matrices(
    quats: Tensor,  # [N, 4] w, x, y, z; any length
) -> Tensor:  # [N, 3, 3], in memory [3, 3, N]: torch is slow where the innermost axis is short
    w, x, y, z = quats.T.contiguous()
    n = 2 / (w * w + x * x + y * y + z * z).clamp(min=1e-30)
    nx, ny, nz = n * x, n * y, n * z
    xx, yy, zz = nx * x, ny * y, nz * z
    xy, xz, yz, wx, wy, wz = nx * y, nx * z, ny * z, nx * w, ny * w, nz * w
    entries = [
        1 - yy - zz,
        xy - wz,
        xz + wy,
        xy + wz,
        1 - xx - zz,
        yz - wx,
        xz - wy,
        yz + wx,
        1 - xx - yy,
    ]
    return torch.stack(entries).view(3, 3, -1).permute(2, 0, 1)


def sh_basis(
    directions: Tensor,  # [N, 3] of length 1, from the camera
    degree: int,
) -> Tensor:  # [N, (degree + 1)²]
    """Real spherical harmonics, with the signs of 3DGS (Condon-Shortley phase)."""
    x, y, z = directions.unbind(1)
    basis = [torch.full_like(x, C0)]
    if degree > 0:
        basis += [-C1 * y, C1 * z, -C1 * x]
    if degree > 1:
        xx, yy, zz = x * x, y * y, z * z
        basis += [
            C2[0] * x * y,
            -C2[0] * y * z,
            C2[1] * (2 * zz - xx - yy),
            -C2[0] * x * z,
            C2[2] * (xx - yy),
        ]
    if degree > 2:
        basis += [
            -C3[0] * y * (3 * xx - yy),
            C3[1] * x * y * z,
            -C3[2] * y * (4 * zz - xx - yy),
            C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            -C3[2] * x * (4 * zz - xx - yy),
            C3_MIDDLE * z * (xx - yy),
            -C3[0] * x * (xx - 3 * yy),
        ]
    return torch.stack(basis, 1)
