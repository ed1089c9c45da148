"""Body: a person's surface over time, as one mesh whose vertices move (the animatable route).

Stage: mesh sequence -> BODY -> condition maps of every camera (`body_maps`). Frame: world of the
pack (x right, y down, z forward, metres), origin at the performer's centre over the clip, a body
that faces the source camera faces -z. The template (`rest`) has the same axes and stands upright:
where on it a vertex lies names a spot of the skin in every frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_VERTEX_MOMENTS = 200_000_000
"""Vertices times frames: 2.4 GB of positions."""
MAX_REACH = 1000.0
"""Metres: what lies farther out was measured in another unit."""


@dataclass(frozen=True)
class Body:
    """A mesh of N vertices and M triangles over F frames."""

    vertices: Tensor
    """[F, N, 3] float32, world, metres."""
    faces: Tensor
    """[M, 3] int64; seen from outside, corners run against the clock."""
    rest: Tensor
    """[N, 3] float32, the template: the same body upright, metres."""
    colors: Tensor | None = None
    """[N, 3] float32, 0..1; None = not known."""
    neutral: Tensor | None = None
    """[F, N, 3] float32, world: posed alike, but without the deformation; None = not known."""
    fps: float = 16.0
    """Frames a second."""

    def __post_init__(self) -> None:
        if self.vertices.ndim != 3 or self.vertices.shape[-1] != 3 or not self.vertices.numel():
            raise ValueError(
                "A body needs vertices of shape [frames, vertices, 3], got "
                f"{list(self.vertices.shape)}: its source holds no mesh."
            )
        F, N, _ = self.vertices.shape
        if F * N > MAX_VERTEX_MOMENTS:
            raise ValueError(
                f"The body has {N} vertices in {F} frames, more than fit: use fewer frames or a "
                "coarser mesh (20,000 vertices are plenty)."
            )
        if self.faces.ndim != 2 or self.faces.shape[-1] != 3 or not len(self.faces):
            raise ValueError(
                "A body needs triangles: its source holds points or lines, or no faces at all."
            )
        if self.faces.min() < 0 or self.faces.max() >= N:
            raise ValueError(
                f"A triangle of the body names vertex {int(self.faces.max())}, but there are "
                f"{N}: the mesh file is damaged, export it again."
            )
        for name, shape in (("rest", (N, 3)), ("colors", (N, 3)), ("neutral", (F, N, 3))):
            values = getattr(self, name)
            if values is not None and tuple(values.shape) != shape:
                raise ValueError(
                    f"A body of {N} vertices in {F} frames needs {name} of shape {list(shape)}, "
                    f"got {list(values.shape)}."
                )
        for name in ("vertices", "rest", "neutral"):
            values = getattr(self, name)
            if values is not None and not (values.abs() < MAX_REACH).all():  # NaN is not below
                raise ValueError(
                    f"The {name} of the body hold NaN, infinity or places farther than "
                    f"{MAX_REACH:.0f} m: check the mesh and its unit (metres)."
                )
        if not self.fps > 0:
            raise ValueError(f"Frames a second must be above 0, got {self.fps}.")

    @property
    def frame_count(self) -> int:
        return self.vertices.shape[0]

    def extent(self) -> tuple[float, float]:
        """Half-width (largest horizontal distance from the up axis) and half-height, metres."""
        across = self.vertices[..., [0, 2]].norm(dim=-1).amax()
        return float(across), float(self.vertices[..., 1].abs().amax())

    def centred(self) -> Body:
        """The same with the world's origin at the performer's centre over the clip."""
        centre = performer_centre(self.vertices)
        neutral = None if self.neutral is None else self.neutral - centre
        return replace(self, vertices=self.vertices - centre, neutral=neutral)

    def resampled(self, frames: int) -> Body:
        """As many frames as wanted over the same time, vertices moving straight between frames."""
        if frames < 1:
            raise ValueError(f"A body needs at least 1 frame, {frames} were asked for.")
        count = self.frame_count
        if frames == count:
            return self
        place = torch.linspace(0, count - 1, frames, device=self.vertices.device)
        low = place.floor().long().clamp(max=max(count - 2, 0))
        part = (place - low)[:, None, None]
        high = (low + 1).clamp(max=count - 1)

        def between(values: Tensor) -> Tensor:
            return torch.lerp(values[low], values[high], part)

        # A clip of one frame has no length: it keeps its rate.
        rate = (frames - 1) / (count - 1) if count > 1 and frames > 1 else 1.0
        return replace(
            self,
            vertices=between(self.vertices),
            neutral=None if self.neutral is None else between(self.neutral),
            fps=self.fps * rate,
        )

    def to(self, device: torch.device) -> Body:
        """The same on another device."""
        moved = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)

    def _comfy_cache_tensors(self) -> list[Tensor]:
        parts = (self.vertices, self.faces, self.rest, self.colors, self.neutral)
        return [part for part in parts if part is not None]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


def performer_centre(
    vertices: Tensor,  # [F, N, 3]
) -> Tensor:  # [3]
    """The middle of the body's box, averaged over the clip."""
    return (vertices.amin(1) + vertices.amax(1)).mean(0) / 2


def facing_outwards(
    faces: Tensor,  # [M, 3]
    vertices: Tensor,  # [N, 3]
) -> Tensor:  # [M, 3]
    """The same triangles, all turned over if the mesh is inside out (its volume is negative)."""
    a, b, c = (vertices[faces[:, i]].double() - vertices.double().mean(0) for i in range(3))
    volume = (a * torch.linalg.cross(b, c)).sum()
    return faces.flip(1) if volume < 0 else faces


@dataclass(frozen=True)
class Placement:
    """For every frame, the rigid motion that brings the template nearest to the body."""

    rotations: Tensor
    """[F, 3, 3] template axes to world axes."""
    offsets: Tensor
    """[F, 3] metres: world = rotation @ template + offset."""


def vertex_areas(
    vertices: Tensor,  # [N, 3]
    faces: Tensor,  # [M, 3]
) -> Tensor:  # [N] float64, sum 1
    """The share of the surface around every vertex."""
    a, b, c = (vertices[faces[:, i]].double() for i in range(3))
    area = torch.linalg.cross(b - a, c - a).norm(dim=-1)
    shares = area.new_zeros(len(vertices)).index_add_(0, faces.flatten(), area.repeat_interleave(3))
    if not shares.sum() > 0:
        raise ValueError(
            "The body has no surface: all its triangles are flat, so export the mesh again."
        )
    return shares / shares.sum()


def place_template(
    rest: Tensor,  # [N, 3]
    vertices: Tensor,  # [F, N, 3] world
    shares: Tensor,  # [N] float64, sum 1
) -> Placement:
    """Least squares over the surface, without scale (Kabsch).

    By area, not by vertex: half of a body's vertices are in its hands and face.
    """
    shares = shares.to(vertices)
    middle, centres = shares @ rest, torch.einsum("n,fna->fa", shares, vertices)
    weighted = shares[:, None] * (rest - middle)
    covariance = ((vertices - centres[:, None]).mT @ weighted).double()
    u, _, vh = torch.linalg.svd(covariance)
    # A mirror image would fit a flat or symmetric body as well: turn its least axis back.
    signs = torch.ones_like(covariance[..., 0])
    signs[:, 2] = torch.linalg.det(u @ vh).sign()
    rotations = (u * signs[:, None]) @ vh
    rotations = rotations.to(vertices)
    return Placement(rotations, centres - rotations @ middle)


def deformation(
    body: Body,
) -> Tensor:  # [F, N, 3] metres, template axes
    """How far every vertex is from where the template, or the neutral body, has it.

    Neither walking nor turning is a deformation: the body is first brought back into the template's
    axes by the best rigid motion of each frame.
    """
    base = body.vertices if body.neutral is None else body.neutral
    placed = place_template(body.rest, base, vertex_areas(body.rest, body.faces))
    if body.neutral is not None:
        return (body.vertices - body.neutral) @ placed.rotations
    return (body.vertices - placed.offsets[:, None]) @ placed.rotations - body.rest
