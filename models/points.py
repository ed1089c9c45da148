"""Oriented points: what one camera saw of the performer, as coloured 3D points with normals.

Stage: depth + mask + intrinsics -> oriented partial point cloud (MV-Performer, geometry stage).
Frame: world of the pack (x right, y down, z forward, metres), origin at the performer's centre, the
source camera at (0, 0, -distance) looking along +z. Departure from the paper: normals come from
the depth itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .relief import HALF_THICKNESS, inflate

EDGE_JUMP, ONE_SURFACE = 0.03, 0.01
"""Shares of the depth: neighbours that differ by more than the first are different surfaces, by less
than the second one surface (noise, banding)."""
GRAZING_COSINE = 0.12
"""Surfaces seen at a flatter angle than this (about 83 degrees) are dropped: smeared edges."""
STEEPEST = (1 / GRAZING_COSINE**2 - 1) ** 0.5
"""Their slope: depth a pixel's footprint."""

CHUNK_PIXELS = 1 << 21
"""Pixels whose normals are found at once: about 0.2 GB."""


@dataclass(frozen=True)
class OrientedPoints:
    """The points of F frames, one frame after another (ragged: `frame_offsets`)."""

    positions: Tensor
    """[N, 3] float32, world, metres."""
    normals: Tensor
    """[N, 3] float32, world, unit length, turned towards the source camera."""
    colors: Tensor
    """[N, 3] float32, 0..1."""
    radii: Tensor
    """[N] float32, metres: half the footprint of the source pixel on the surface."""
    confidences: Tensor
    """[N] float32, 0..1: cosine between the normal and the ray to the source camera; 0 = a point of
    the far side, guessed, with the colour and normal of the seen point in front of it."""
    frame_offsets: Tensor
    """[F + 1] int64: points of frame f are [frame_offsets[f], frame_offsets[f + 1])."""
    source: Rig
    """The camera that saw them (one view)."""
    fps: float = 16.0
    """Frames a second."""

    def __post_init__(self) -> None:
        N = len(self.positions)
        for name, channels in (("positions", 3), ("normals", 3), ("colors", 3)):
            if getattr(self, name).shape != (N, channels):
                raise ValueError(
                    f"A cloud of {N} points needs {name} of shape [{N}, {channels}], got "
                    f"{list(getattr(self, name).shape)}."
                )
        for name in ("radii", "confidences"):
            if getattr(self, name).shape != (N,):
                raise ValueError(
                    f"A cloud of {N} points needs {name} of shape [{N}], got "
                    f"{list(getattr(self, name).shape)}."
                )
        offsets = self.frame_offsets
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != N or (offsets.diff() < 0).any():
            raise ValueError(f"The cloud's frame offsets must run from 0 to {N} without falling.")
        if len(self.source) != 1:
            raise ValueError(f"A cloud has one source camera, got {len(self.source)}.")

    @property
    def frame_count(self) -> int:
        return len(self.frame_offsets) - 1

    def frame(self, f: int) -> slice:
        """Where the points of frame f stand."""
        return slice(int(self.frame_offsets[f]), int(self.frame_offsets[f + 1]))

    def frame_numbers(self) -> Tensor:  # [N] int64
        """Which frame a point belongs to."""
        frames = torch.arange(self.frame_count, device=self.positions.device)
        return frames.repeat_interleave(self.frame_offsets.diff())

    def in_source(self, width: int, height: int) -> Tensor:  # [N, 3] x z, y z, z
        """Homogeneous pixels (last: metres) in the source camera with pictures of this size."""
        source = self.source.resized(width, height)
        T, K = source.T_camera_world[0], source.K[0]
        return (self.positions @ T[:3, :3].T + T[:3, 3]) @ K.T

    def select(
        self,
        chosen: Tensor | slice,  # [N] bool, [M] int64 or a slice: which points
        frame_offsets: Tensor,  # of what is left
    ) -> OrientedPoints:
        """Some of the points, in the order given."""
        parts = ("positions", "normals", "colors", "radii", "confidences")
        left = {name: getattr(self, name)[chosen] for name in parts}
        return replace(self, **left, frame_offsets=frame_offsets)

    def extent(self) -> tuple[float, float]:
        """Half-width (largest horizontal distance from the up axis) and half-height, metres.

        The outermost half percent of the points is ignored, so a stray point doesn't shrink the
        performer in every picture.
        """
        across = self.positions[:, [0, 2]].norm(dim=1)
        up = self.positions[:, 1].abs()
        # Sorting by hand: torch.quantile refuses more than 16 million values.
        place = int(0.995 * (len(up) - 1))
        return float(across.sort().values[place]), float(up.sort().values[place])

    def _comfy_cache_tensors(self) -> list[Tensor]:
        return [
            self.positions, self.normals, self.colors, self.radii, self.confidences,
            self.frame_offsets, *self.source._comfy_cache_tensors(),
        ]  # fmt: skip

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


def unproject_depth(
    depth: Tensor,  # [F, H, W] metres along the optical axis
    K: Tensor,  # [3, 3]
) -> Tensor:  # [F, 3, H, W] camera frame, metres
    """The 3D point behind every pixel centre."""
    H, W = depth.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(H, device=depth.device) + 0.5,
        torch.arange(W, device=depth.device) + 0.5,
        indexing="ij",
    )
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)])
    return rays * depth[:, None]


def edge_jump(focal: float) -> float:  # focal length in pixels
    """Share of the depth by which neighbours of one surface differ at most: in fine pictures a step
    that is steeper than any surface that is kept, and never less than noise."""
    return min(EDGE_JUMP, max(ONE_SURFACE, STEEPEST / focal))


def _tangent(points: Tensor, valid: Tensor, dim: int, jump: float) -> Tensor:
    """Difference of neighbours along an image axis, one-sided where the other side jumps."""
    step = points.diff(dim=dim)
    depth = points[:, 2:3]
    near = torch.minimum(
        depth.narrow(dim, 0, depth.shape[dim] - 1), depth.narrow(dim, 1, depth.shape[dim] - 1)
    )
    joined = (depth.diff(dim=dim).abs() < jump * near) & (
        valid.narrow(dim, 0, valid.shape[dim] - 1) & valid.narrow(dim, 1, valid.shape[dim] - 1)
    )
    step = torch.where(joined, step, 0.0)
    pad = (0, 0, 1, 0) if dim == 2 else (1, 0, 0, 0)
    back = (0, 0, 0, 1) if dim == 2 else (0, 1, 0, 0)
    count = F.pad(joined.float(), pad) + F.pad(joined.float(), back)
    return (F.pad(step, pad) + F.pad(step, back)) / count.clamp(min=1)


def normals_from_depth(
    points: Tensor,  # [F, 3, H, W] camera frame
    valid: Tensor,  # [F, H, W] bool
    focal: float,  # pixels
) -> Tensor:  # [F, 3, H, W] unit, towards the camera; 0 where undefined
    """Surface normals as the cross product of image-space tangents that don't cross depth jumps."""
    jump = edge_jump(focal)
    down = _tangent(points, valid[:, None], 2, jump)
    right = _tangent(points, valid[:, None], 3, jump)
    # Right x down points away from an OpenCV camera, so the order is turned round.
    normals = torch.linalg.cross(down, right, dim=1)
    normals *= _per_length(normals)
    away = (normals * points).sum(1, keepdim=True) > 0
    return torch.where(away, -normals, normals)


def _per_length(vectors: Tensor) -> Tensor:  # [F, 3, H, W] -> [F, 1, H, W]
    """1 / length; a vector of no length stays so. Torch's own norm is slow along this axis."""
    return vectors.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()


def erode(
    masks: Tensor,  # [F, H, W] bool
    pixels: int,
) -> Tensor:
    """Shrink masks; the picture's border does not count as background."""
    if pixels == 0:
        return masks
    outside = F.max_pool2d((~masks).float()[:, None], 2 * pixels + 1, stride=1, padding=pixels)
    return masks & (outside[:, 0] == 0)


def _body_box(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Middle [3] and size [3] of the seen surface, medians over the frames that show any."""
    shown = valid.flatten(1).any(1)
    points, outside = points[shown], ~valid[shown, None]
    low = points.masked_fill(outside, torch.inf).amin((2, 3))
    high = points.masked_fill(outside, -torch.inf).amax((2, 3))
    return ((low + high) / 2).median(0).values, (high - low).median(0).values


def _centre(points: Tensor, valid: Tensor, middle: Tensor, height: Tensor) -> Tensor:
    """[3] the performer's centre over the clip, behind the seen surface by half a body."""
    depth = points[:, 2].masked_fill(~valid, torch.nan).flatten(1).nanmedian(1).values
    middle_depth = depth[depth.isfinite()].median()
    return torch.stack([middle[0], middle[1], middle_depth + HALF_THICKNESS * height])


WALLS, RIM = 6, 2
"""Points between front and far side where the outline is near (pixels), and the rim's width: seen
from the side, the two would leave a gap there."""


def far_layers(
    keep: Tensor,  # [F, H, W] bool
) -> tuple[Tensor, Tensor]:  # [F, 2 + WALLS, H, W] bool; [2 + WALLS] shares of the thickness
    """Where points stand, and how far behind: the front, the far side, walls along the outline."""
    rim = (keep & ~erode(keep, RIM))[:, None].expand(-1, WALLS, -1, -1)
    walls = torch.arange(1, WALLS + 1, device=keep.device) / (WALLS + 1)
    shares = torch.cat([walls.new_tensor([0.0, 1.0]), walls])
    return torch.cat([keep[:, None], keep[:, None], rim], 1), shares


def body_thickness(
    solid: Tensor,  # [F, H, W] bool
    footprint: Tensor,  # [F, H, W] metres a pixel
    height: Tensor,  # metres, the performer's
) -> Tensor:  # [F, H, W] metres
    """A guess from the outline: round limbs, and no more than a body is thick."""
    limit = HALF_THICKNESS * height
    return 2 * limit * torch.tanh(inflate(solid.float()) * footprint / limit)


KEPT, NOTHING, ERODED, GRAZING, FLOATING = range(5)
"""What becomes of a pixel: a point; no depth or outside the mask; too near the mask's edge; surface
seen too flat; an outlier."""


@dataclass(frozen=True)
class Surface:
    """What the depth says, pixel by pixel, before it becomes points."""

    points: Tensor
    """[F, 3, H, W] camera frame, metres; 0 = nothing."""
    normals: Tensor
    """[F, 3, H, W] camera frame, unit, towards the camera; 0 = nothing."""
    cosine: Tensor
    """[F, H, W] between the normal and the ray to the camera."""
    fate: Tensor
    """[F, H, W] uint8, KEPT and the reasons why not."""

    @property
    def known(self) -> Tensor:  # [F, H, W] bool
        """Where there is depth inside the mask."""
        return self.fate != NOTHING


def surface_from_depth(
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    masks: Tensor,  # [F, H, W] 0..1
    K: Tensor,  # [3, 3] pixels
    erosion: int = 1,
    outliers: Tensor | None = None,  # [F, H, W] bool
) -> Surface:
    """Points and normals of every pixel, and which are fit to be kept."""
    known = depth.isfinite() & (depth > 0) & (masks > 0.5)
    if not known.any():
        raise ValueError(
            "There is no usable depth inside the mask in any frame: check that the mask shows the "
            "performer in white and that the depth is not all zero."
        )
    points = unproject_depth(torch.where(known, depth, 0.0).float(), K)
    normals, cosine = torch.empty_like(points), torch.empty_like(points[:, 0])
    step = max(1, CHUNK_PIXELS // points[0, 0].numel())
    for first in range(0, len(points), step):
        part = slice(first, first + step)
        chunk = points[part]
        normals[part] = normals_from_depth(chunk, known[part], float(K[0, 0]))
        cosine[part] = -((normals[part] * chunk).sum(1) * _per_length(chunk)[:, 0])
    fate = torch.where(cosine > GRAZING_COSINE, KEPT, GRAZING)
    if outliers is not None:
        fate = torch.where(outliers, FLOATING, fate)
    fate = torch.where(erode(known, erosion), fate, ERODED)
    return Surface(points, normals, cosine, torch.where(known, fate, NOTHING).byte())


def points_from_depth(
    frames: Tensor,  # [F, 3, H, W] 0..1
    depth: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown
    masks: Tensor,  # [F, H, W] 0..1
    K: Tensor,  # [3, 3] pixels
    erosion: int = 1,
    fps: float = 16.0,
    far_side: bool = True,
) -> OrientedPoints:
    """Unproject the masked depth to oriented, coloured points around the performer's centre."""
    surface = surface_from_depth(depth, masks, K, erosion)
    return points_from_surface(frames, surface, K, fps, far_side)


def points_from_surface(
    frames: Tensor,  # [F, 3, H, W] 0..1
    surface: Surface,
    K: Tensor,  # [3, 3] pixels
    fps: float = 16.0,
    far_side: bool = True,
) -> OrientedPoints:
    """Oriented, coloured points around the performer's centre.

    With `far_side`, each gets a guessed point behind it, as far as the performer is thick there, so
    that the body is closed and has its width from the side too.
    """
    keep, points, cosine = surface.fate == KEPT, surface.points, surface.cosine
    depth = points[:, 2]
    if not keep.any():
        raise ValueError(
            "No point of the performer is left after cleaning the depth: its surface is too rough "
            "or too small; give a smoother or larger depth map, or set mask erosion to 0."
        )
    middle, size = _body_box(points, keep)
    centre = _centre(points, keep, middle, size[1])
    # A pixel covers more of a slanted surface; cap it so that edges don't grow fans.
    footprint = depth / K[0, 0]
    radii = footprint / 2 / cosine.clamp(min=0.35)
    layers, shares, thickness = keep[:, None], depth.new_zeros(1), torch.zeros_like(depth)
    if far_side:
        layers, shares = far_layers(keep)
        thickness = body_thickness(surface.known, footprint, size[1])
    f, layer, y, x = layers.nonzero(as_tuple=True)
    away = 1 + thickness[f, y, x] * shares[layer] / depth[f, y, x]
    positions = points[f, :, y, x] * away[:, None]
    pose = torch.eye(4, device=centre.device)
    pose[:3, 3] = centre
    return OrientedPoints(
        positions=positions - centre,
        normals=surface.normals[f, :, y, x],
        colors=frames[f, :, y, x].float(),
        radii=radii[f, y, x],
        confidences=torch.where(layer == 0, cosine[f, y, x].clamp(0, 1), 0.0),
        frame_offsets=F.pad(layers.sum((1, 2, 3)).cumsum(0), (1, 0)),
        source=Rig(K[None].float(), pose[None], frames.shape[-1], frames.shape[-2]),
        fps=fps,
    )
