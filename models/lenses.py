"""How real lenses bend their pictures, as calibrations write it; `straighten` takes it out.

Coefficients as OpenCV's have them (Brown and Conrady): a direction (x, y) of a straight picture, in
units of the focal length, lies on the bent one at

    x' = x (1 + k1 r² + k2 r⁴ + ...) + 2 p1 x y + p2 (r² + 2 x²)
    y' = y (1 + k1 r² + k2 r⁴ + ...) + p1 (r² + 2 y²) + 2 p2 x y
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 1000
"""Radii at which a lens is asked whether it still grows."""


@dataclass(frozen=True)
class Lens:
    """How a camera bends its picture; the same for every size of it."""

    radial: tuple[float, ...] = ()
    """k1, k2, k3, ..."""
    tangential: tuple[float, float] = (0.0, 0.0)
    """p1, p2."""

    @property
    def straight(self) -> bool:
        """Whether it bends nothing."""
        return not any(abs(c) > 1e-6 for c in (*self.radial, *self.tangential))

    def reaches(self, places: Tensor) -> Tensor:  # [..., 2] -> [...] bool
        """Whether the lens shows these directions: beyond where the radial part stops growing, the
        formula would fold back into the picture."""
        grows = torch.linspace(0, 1, STEPS).to(places) * float(places.norm(dim=-1).amax())
        there = torch.stack([grows, torch.zeros_like(grows)], -1)
        radii = Lens(self.radial).bent(there)[..., 0]
        falls = (radii.diff() <= 0).nonzero()[:, 0]
        last = grows[falls[0]] if len(falls) else grows[-1]
        return places.norm(dim=-1) <= last

    def bent(self, places: Tensor) -> Tensor:  # [..., 2] both, in units of the focal length
        """Where directions of a straight picture lie on the lens's own."""
        x, y = places.unbind(-1)
        square = x * x + y * y
        grows, power = torch.ones_like(x), square
        for k in self.radial:
            grows, power = grows + k * power, power * square
        p1, p2 = self.tangential
        return torch.stack(
            [
                x * grows + 2 * p1 * x * y + p2 * (square + 2 * x * x),
                y * grows + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
            ],
            -1,
        )
