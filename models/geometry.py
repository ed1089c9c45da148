"""Per-view conditions: what the source camera's points look like from every camera of a rig.

Stage: oriented points -> partial colour, camera-dependent normals, visibility, depth
(MV-Performer, camera-dependent normal map: with o = n . d, points that face the target camera are
drawn with their normal as colour, points that face away are black). That tells the sampler the seen
side of the body from its unseen side. The background is mid grey, not black, so that the silhouette
of the unseen side stays readable.

Signs, tested: n points out of the body, d from the point (or along the optical axis) towards the
camera, o > 0 = seen. Red grows to the right, green upwards, blue towards the camera, in the axes of
the target camera, the source camera or the world (there "towards" is towards azimuth 0).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .cameras import Rig
from .points import OrientedPoints
from .rasterize import EMPTY as NO_POINT
from .rasterize import splat
from .views import to_bytes

log = logging.getLogger("turnaround")

BACKGROUND = 0.5
"""Grey behind pictures of floats; as a byte it is 128."""
SEEN, UNSEEN_SIDE, EMPTY = 255, 128, 0
"""The three states of visibility, as bytes."""

BackColors = Literal["kept", "blanked"]
BackNormals = Literal["black", "drawn"]
NormalsSpace = Literal["target camera", "source camera", "world"]
ViewVector = Literal["per point", "per camera"]
GROUNDS = {"grey": 128, "black": 0, "white": 255}


@dataclass(frozen=True)
class Look:
    """How conditions are drawn; the defaults are what Turnaround-Tiny was trained on."""

    back_colors: BackColors = "kept"
    """Partial colour of the unseen side: of the seen side, shining through; or black."""
    back_normals: BackNormals = "black"
    """Normal map of the unseen side: black, as the paper has it; or the normals' colours."""
    normals_space: NormalsSpace = "target camera"
    view_vector: ViewVector = "per point"
    """d of o = n . d: from each point to the camera, or the camera's axis for all."""
    ground: str = "grey"
    """Where nothing is, in partial colour and normals: one of GROUNDS."""


@dataclass(frozen=True)
class Conditions:
    """What V cameras are told about F frames. Bytes: 49 frames of 8 views are a gigabyte so."""

    partial: Tensor
    """[V, F, 3, H, W] uint8, the seen colours."""
    normals: Tensor
    """[V, F, 3, H, W] uint8, 127.5 + 127.5 n; black = unseen side."""
    visibility: Tensor
    """[V, F, H, W] uint8: 255 = seen side, 128 = the body's unseen side, 0 = nothing."""
    depth: Tensor
    """[V, F, H, W] float32, metres from the target camera; 0 = nothing."""

    @classmethod
    def empty(
        cls, views: int, frames: int, height: int, width: int, device: torch.device
    ) -> Conditions:
        def room(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(views, frames, *shape, height, width, dtype=dtype, device=device)

        return cls(room(3), room(3), room(), room(dtype=torch.float32))

    def of(self, view: int, frames: slice) -> Conditions:
        """A part of one view, sharing its memory: [F, 3, H, W] and [F, H, W]."""
        return Conditions(*(t[view, frames] for t in vars(self).values()))


def encode_normals(
    normals: Tensor,  # [..., 3] camera frame, unit
) -> Tensor:  # [..., 3] 0..1
    """Normal as colour: red = right, green = up, blue = towards the camera."""
    return 0.5 + 0.5 * normals * normals.new_tensor([1.0, -1.0, -1.0])


@dataclass(frozen=True)
class Splats:
    """A cloud as the rasterisers read it: one row a number."""

    positions: Tensor  # [3, N] world
    normals: Tensor  # [3, N] world
    radii: Tensor  # [N]
    front: Tensor  # [N] bool; the far side is a guess, never a seen one
    rgb: Tensor  # [N] int32: red, green, blue in its lowest three bytes
    offsets: Tensor  # [F + 1] int64

    @classmethod
    def of(cls, points: OrientedPoints, device: torch.device) -> Splats:
        bytes_ = torch.zeros(len(points.radii), 4, dtype=torch.uint8, device=points.radii.device)
        bytes_[:, :3] = to_bytes(points.colors)
        parts = (
            points.positions.T.contiguous(), points.normals.T.contiguous(), points.radii,
            points.confidences > 0, bytes_.view(torch.int32)[:, 0],
        )  # fmt: skip
        return cls(*(t.to(device) for t in parts), points.frame_offsets.cpu())

    def frames(self, chosen: slice) -> tuple[Tensor, ...]:
        """Positions, normals, radii, front, rgb of some frames, and which of them each belongs to."""
        ends = self.offsets[chosen.start : chosen.stop + 1]
        part = slice(int(ends[0]), int(ends[-1]))
        frame = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff())
        parts = (self.positions, self.normals, self.radii, self.front, self.rgb)
        return *(t[..., part] for t in parts), frame.to(self.radii.device)


@dataclass(frozen=True)
class Eye:
    """A target camera as the rasterisers read it."""

    M: Tensor  # [3, 4] world to pixels
    focal: float  # pixels
    axes: Tensor  # [3, 3] world to normal colours
    place: Tensor  # [3] d = place - x per point, or d = place for all
    per_point: bool

    @classmethod
    def of(cls, rig: Rig, v: int, source: Rig, look: Look) -> Eye:
        T, K = (t[v].float().cpu() for t in (rig.T_camera_world, rig.K))
        R, t = T[:3, :3], T[:3, 3]
        spaces = {
            "target camera": R,
            "source camera": source.T_camera_world[0, :3, :3].float().cpu(),
            "world": torch.eye(3),
        }
        axes = torch.tensor([[1.0], [-1.0], [-1.0]]) * spaces[look.normals_space]
        per_point = look.view_vector == "per point"
        place = -R.T @ t if per_point else -R[2]
        return cls(K @ T[:3], float(K.diagonal()[:2].max()), axes, place, per_point)


def _draw_torch(splats: Splats, eye: Eye, look: Look, frames: slice, out: Conditions) -> None:
    """Frames of one camera, in plain torch."""
    positions, normals, radii, front, rgb, frame = splats.frames(frames)
    device, N = radii.device, len(radii)
    M, axes, place = (t.to(device) for t in (eye.M, eye.axes, eye.place))
    count, height, width = out.depth.shape
    keys = splat(positions, radii, frame, M, eye.focal, count, width, height)
    d = place[:, None] - positions if eye.per_point else place[:, None]
    seen = (normals * d).sum(0).gt(0) & front
    # Eight bytes a point, normal, state and colour, so that a pixel fetches them at once; the last
    # row is what stands where no point is.
    table = torch.empty(N + 1, 8, dtype=torch.uint8, device=device)
    shown = seen if look.back_normals == "black" else torch.ones_like(seen)
    table[:N, :3] = ((128 + 127.5 * (axes @ normals)) * shown).T
    table[:N, 3] = torch.where(seen, SEEN, UNSEEN_SIDE)
    kept = rgb if look.back_colors == "kept" else torch.where(seen, rgb, 0)
    table[:N, 4:] = kept[:, None].contiguous().view(torch.uint8)
    ground = GROUNDS[look.ground]
    table[N] = torch.tensor([*[ground] * 3, EMPTY, *[ground] * 3, 0], dtype=torch.uint8)
    index = (keys & 0xFFFFFFFF).clamp_(max=N).flatten()
    bytes_ = table.view(torch.int64)[:, 0].index_select(0, index).view(torch.uint8)
    bytes_ = bytes_.view(count, height, width, 8)
    out.normals.copy_(bytes_[..., :3].permute(0, 3, 1, 2))
    out.visibility.copy_(bytes_[..., 3])
    out.partial.copy_(bytes_[..., 4:7].permute(0, 3, 1, 2))
    depth = (keys >> 32).int().view(torch.float32)
    out.depth.copy_(torch.where(keys == NO_POINT, 0.0, depth))


def _draw_numba(splats: Splats, eye: Eye, look: Look, frames: slice, out: Conditions) -> None:
    """Frames of one camera, compiled for the CPU."""
    from .rasterize_numba import draw_frames

    ground = GROUNDS[look.ground]
    coordinates = [row.numpy() for row in splats.positions]
    directions = [row.numpy() for row in splats.normals]
    draw_frames(
        splats.offsets[frames.start : frames.stop + 1].numpy(), *coordinates,
        splats.radii.numpy(), *directions, splats.front.numpy(), splats.rgb.numpy().view("uint32"),
        eye.M.numpy(), np.float32(eye.focal), eye.axes.numpy(), eye.place.numpy(), eye.per_point,
        look.back_normals == "drawn", look.back_colors == "blanked",
        np.uint32(ground * 0x010101), *out.depth.shape[:0:-1],
        out.partial.flatten(2).numpy(), out.normals.flatten(2).numpy(),
        out.visibility.flatten(1).numpy(), out.depth.flatten(1).view(torch.int32).numpy(),
    )  # fmt: skip


def _draw_triton(splats: Splats, eye: Eye, look: Look, frames: slice, out: Conditions) -> None:
    """Frames of one camera, as Triton kernels."""
    from .rasterize_triton import draw_frames

    positions, normals, radii, front, rgb, frame = splats.frames(frames)
    M, axes, place = (t.to(radii.device) for t in (eye.M, eye.axes, eye.place))
    drawn = draw_frames(
        positions, normals, radii, front, rgb, frame, M, eye.focal, axes, place, eye.per_point,
        look.back_normals == "drawn", look.back_colors == "blanked", GROUNDS[look.ground],
        *out.depth.shape,
    )  # fmt: skip
    for mine, part in zip(vars(out).values(), drawn, strict=True):
        mine.copy_(part)


Draw = Callable[[Splats, Eye, Look, slice, Conditions], None]
DRAW: dict[str, Draw] = {"torch": _draw_torch, "numba": _draw_numba, "triton": _draw_triton}


@cache
def _works(backend: str, device: str) -> bool:
    """Whether a way of DRAW is installed and draws one point: compilers may be missing or fail."""
    home = torch.device(device)
    one = torch.ones(3, 1, device=home)
    flag = torch.ones(1, dtype=torch.int32, device=home)
    splats = Splats(one, -one, one[0], flag > 0, flag, torch.tensor([0, 1]))
    eye = Eye(torch.eye(3, 4), 1.0, torch.eye(3), torch.zeros(3), True)
    out = Conditions.empty(1, 1, 4, 4, home).of(0, slice(0, 1))
    try:
        DRAW[backend](splats, eye, Look(), slice(0, 1), out)
    except Exception as reason:  # whatever an optional package raises, torch draws too
        log.info("Conditions are drawn by torch, as %s does not work here: %s", backend, reason)
        return False
    return bool((out.visibility == SEEN).any())


COMPILING = 20_000_000
"""Points times views from which numba's compiling, some 3 seconds once a process, pays off."""


def fastest_backend(device: torch.device, work: int) -> str:
    """The quickest of DRAW for so many points times views; all draw the same pictures."""
    if device.type == "cuda":
        return "triton" if _works("triton", str(device)) else "torch"
    return (
        "numba"
        if device.type == "cpu" and work >= COMPILING and _works("numba", "cpu")
        else "torch"
    )


POINTS_AT_ONCE = {"cpu": 1 << 20}
"""Points of one camera drawn between two looks at the cancel button: a fraction of a second."""
POINTS_AT_ONCE_ELSEWHERE = 1 << 24
PIXELS_AT_ONCE = 1 << 25
"""Bounds the z-buffers, of eight bytes a pixel, to 256 MB."""


def _frame_chunks(offsets: Tensor, size: int, points: int) -> Iterator[slice]:
    """Consecutive frames within the limits, at least one."""
    first, count = 0, len(offsets) - 1
    while first < count:
        room = max(1, PIXELS_AT_ONCE // size)
        last = int(torch.searchsorted(offsets, offsets[first] + points, right=True)) - 1
        last = min(max(last, first + 1), first + room, count)
        yield slice(first, last)
        first = last


def render_conditions(
    points: OrientedPoints,
    rig: Rig,
    look: Look = Look(),  # noqa: B008 (frozen)
    on_step: Callable[[int, int, Tensor], None] | None = None,
    device: torch.device | None = None,
    backend: str | None = None,
) -> Conditions:
    """Draw the points into every camera of the rig, a few frames of one camera at a time.

    `device` is where it is drawn (default: where the points are); the result lies where the points
    are. `on_step` gets pieces done, pieces in all, and a picture [3, H, W] 0..1.
    """
    if not len(points.positions):
        raise ValueError("The cloud has no points: check the mask and the depth it was made from.")
    device = device or points.positions.device
    work_load = len(points.positions) * len(rig)
    draw = DRAW[backend or fastest_backend(device, work_load)]
    home = points.positions.device
    out = Conditions.empty(len(rig), points.frame_count, rig.height, rig.width, home)
    splats = Splats.of(points, device)
    limit = POINTS_AT_ONCE.get(device.type, POINTS_AT_ONCE_ELSEWHERE)
    chunks = list(_frame_chunks(splats.offsets, rig.height * rig.width, limit))
    pieces = [(v, frames) for v in range(len(rig)) for frames in chunks]

    def work(piece: tuple[int, slice]) -> Conditions:
        v, frames = piece
        part = out.of(v, frames)
        with torch.inference_mode():
            draw(splats, Eye.of(rig, v, points.source, look), look, frames, part)
        return part

    # Compiled code runs beside other threads; torch has threads of its own.
    workers = torch.get_num_threads() if draw is _draw_numba else 1
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done, part in enumerate(pool.map(work, pieces), 1):
                if on_step:
                    on_step(done, len(pieces), part.partial[0].float() / 255)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out
