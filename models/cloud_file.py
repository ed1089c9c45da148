"""Clouds as files: PLY for other programs, and the compact file that the 3D view in the page reads.

Frame of both: world of the pack (x right, y down, z forward, metres); a PLY may be turned upright.

The view's file, little-endian: "TURNCLD1", uint32 length of a JSON header, the header, then the
frames. Each frame of N points is planar: positions 3 x uint16 within the clip's box, red green blue
confidence 4 x uint8, octahedral normal 2 x uint8, radius uint8 as a share of the largest; padded to
4 bytes. 13 bytes a point.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import framing_distance, orbit_rig
from .geometry import render_conditions
from .points import OrientedPoints
from .views import to_bytes
from .whole_file import whole_file

Axes = Literal["y up (most programs)", "z up (Blender)", "y down (Turnaround, COLMAP)"]
AXES: tuple[str, ...] = get_args(Axes)
# What the file's x, y, z are in the pack's world; all three are rotations, nothing is mirrored.
AXES_ROTATIONS = {
    AXES[0]: [[1.0, 0, 0], [0, -1, 0], [0, 0, -1]],
    AXES[1]: [[1.0, 0, 0], [0, 0, 1], [0, -1, 0]],
    AXES[2]: [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
}
PLY_POINT = np.dtype(
    [(n, "<f4") for n in ("x", "y", "z", "nx", "ny", "nz")]
    + [(n, "u1") for n in ("red", "green", "blue")]
    + [(n, "<f4") for n in ("confidence", "radius")]
)
PLY_TYPES = {"<f4": "float", "|u1": "uchar"}


def finite(
    cloud: OrientedPoints,
) -> tuple[OrientedPoints, int]:  # and how many points were left out
    """The cloud without points that hold NaN or infinity."""
    values = torch.cat(
        [cloud.positions, cloud.normals, cloud.colors, cloud.radii[:, None],
         cloud.confidences[:, None]], 1,
    )  # fmt: skip
    keep = values.isfinite().all(1)
    if not keep.any():
        raise ValueError("The cloud has no points: check the mask and the depth it was made from.")
    if keep.all():
        return cloud, 0
    before = F.pad(keep.cumsum(0), (1, 0))
    return cloud.select(keep, before[cloud.frame_offsets]), int((~keep).sum())


def _bytes(values: Tensor) -> np.ndarray:
    """0..1 as uint8."""
    return to_bytes(values).cpu().numpy()


# ---- PLY ----


def ply_bytes(cloud: OrientedPoints, f: int, axes: Axes) -> bytes:
    """Frame f as a binary PLY."""
    part = cloud.frame(f)
    turn = cloud.positions.new_tensor(AXES_ROTATIONS[axes])
    numbers = torch.cat([cloud.positions[part] @ turn.T, cloud.normals[part] @ turn.T], 1)
    records = np.empty(len(numbers), PLY_POINT)
    for name, column in zip(PLY_POINT.names[:6], numbers.float().cpu().numpy().T, strict=True):
        records[name] = column
    for name, column in zip(PLY_POINT.names[6:9], _bytes(cloud.colors[part]).T, strict=True):
        records[name] = column
    records["confidence"] = cloud.confidences[part].float().cpu().numpy()
    records["radius"] = cloud.radii[part].float().cpu().numpy()
    return _ply_header(len(records), f, cloud.fps, axes).encode("ascii") + records.tobytes()


def _ply_header(count: int, f: int, fps: float, axes: str) -> str:
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment Turnaround: frame {f} at {fps:g} frames a second, metres, {axes}",
        "comment confidence 0 = guessed far side, 1 = seen head-on; radius = half a source pixel",
        f"element vertex {count}",
        *(f"property {PLY_TYPES[t.str]} {n}" for n, (t, *_) in PLY_POINT.fields.items()),
        "end_header",
    ]
    return "\n".join(lines) + "\n"


def read_ply(content: bytes) -> np.ndarray:  # [N] records of PLY_POINT
    """The points of a PLY that `ply_bytes` wrote."""
    head, mark, body = content.partition(b"end_header\n")
    lines = head.decode("ascii", "replace").splitlines()
    fields = [f"property {PLY_TYPES[t.str]} {n}" for n, (t, *_) in PLY_POINT.fields.items()]
    if not mark or [line for line in lines if line.startswith("property")] != fields:
        raise ValueError("This PLY was not written by Save Cloud: its columns are others.")
    count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    if len(body) != count * PLY_POINT.itemsize:
        raise ValueError(f"The PLY promises {count} points, but its length is another: it is cut.")
    return np.frombuffer(body, PLY_POINT)


def write_ply(path: Path, cloud: OrientedPoints, f: int, axes: Axes) -> None:
    """Write frame f; the file appears only when whole."""
    _write_whole(path, [ply_bytes(cloud, f, axes)])


def _write_whole(path: Path, parts: Iterator[bytes] | list[bytes]) -> int:
    """Write under a partial name, then rename; gives a checksum of the content."""
    checksum = 0
    with whole_file(path) as partial, partial.open("wb") as out:
        for part in parts:
            out.write(part)
            checksum = zlib.crc32(part, checksum)
    return checksum


# ---- the file of the 3D view ----

VIEW_MAGIC = b"TURNCLD1"
TOTAL_POINTS = 5_000_000
"""Points in one file (65 MB): what a page loads in seconds and any graphics card holds."""
LARGEST = 1e5
"""Metres. Beyond this, depth was surely not in metres, and 16 bits would show nothing."""
SEED = 0


@dataclass(frozen=True)
class CloudView:
    """What was written for the page."""

    frames: int
    points: int
    """Of all frames together."""
    fps: float
    low: list[float]
    """[3] the clip's box, world, metres."""
    high: list[float]
    checksum: int
    """Of the file: a page that holds an older file of this name knows it by this."""
    note: str


def even_subset(
    count: int,
    kept: int,
) -> Tensor:  # [min(count, kept)] int64, rising
    """One point of each of `kept` equal stretches, drawn at random: even, without a pattern."""
    if count <= kept:
        return torch.arange(count)
    bounds = torch.arange(kept + 1) * count // kept
    share = torch.rand(kept, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return bounds[:-1] + (share * bounds.diff()).long()


def encode_octahedral(
    normals: Tensor,  # [N, 3] unit
) -> Tensor:  # [N, 2] 0..1
    """Unit vectors unfolded onto a square."""
    flat = normals / normals.abs().sum(1, keepdim=True).clamp(min=1e-9)
    sign = torch.where(flat[:, :2] < 0, -1.0, 1.0)
    folded = (1 - flat[:, [1, 0]].abs()) * sign
    return 0.5 + 0.5 * torch.where(flat[:, 2:] < 0, folded, flat[:, :2])


def _frame_bytes(
    cloud: OrientedPoints,
    f: int,
    cap: int,
    low: Tensor,  # [3]
    size: Tensor,  # [3]
    largest_radius: float,
) -> bytes:
    part = cloud.frame(f)
    count = part.stop - part.start
    index = even_subset(count, cap).to(cloud.positions.device) + part.start
    places = ((cloud.positions[index] - low) / size * 65535).round().clamp(0, 65535)
    confidences = cloud.confidences[index]
    # Seen points stay apart from guessed ones, however flat they were seen.
    confidences = torch.where(confidences > 0, confidences.clamp(min=1 / 255), 0.0)
    # Fewer points cover the same surface.
    radii = cloud.radii[index] * max(1.0, count / cap) ** 0.5 / largest_radius
    paint = torch.cat([cloud.colors[index], confidences[:, None]], 1)
    content = b"".join(
        [
            places.to(torch.int32).cpu().numpy().astype("<u2").tobytes(),
            _bytes(paint).tobytes(),
            _bytes(encode_octahedral(cloud.normals[index])).tobytes(),
            _bytes(radii).tobytes(),
        ]
    )
    return content + bytes(-len(content) % 4)


def _trimmed_box(positions: Tensor) -> tuple[Tensor, Tensor]:  # low [3], high [3]
    """The box without the outermost half percent at each end: where the performer is."""
    # Every so many points: torch.quantile refuses more than 16 million values, and is slow.
    some = positions[:: max(1, len(positions) // 200_000)].float()
    return torch.quantile(some, 0.005, dim=0), torch.quantile(some, 0.995, dim=0)


def write_cloud_view(
    path: Path,
    cloud: OrientedPoints,  # finite
    max_points: int,  # a frame
    on_step: Callable[[int, int], None] | None = None,
) -> CloudView:
    """Write the view's file; it appears only when whole."""
    low, high = cloud.positions.amin(0), cloud.positions.amax(0)
    if (high - low).max() > LARGEST:
        raise ValueError(
            f"The cloud is {float((high - low).max()):.3g} metres wide: its depth is not in "
            "metres; choose another depth convention where the cloud was made."
        )
    size = (high - low).clamp(min=1e-6)
    frames = cloud.frame_count
    counts = cloud.frame_offsets.diff()
    cap = min(max_points, max(1, TOTAL_POINTS // frames))
    kept = counts.clamp(max=cap)
    growth = (counts / cap).clamp(min=1).sqrt().max()
    largest_radius = max(float(cloud.radii.max() * growth), 1e-9)
    header = _header(cloud, kept.tolist(), low, size, largest_radius)

    def parts() -> Iterator[bytes]:
        yield VIEW_MAGIC + struct.pack("<I", len(header)) + header
        for f in range(frames):
            yield _frame_bytes(cloud, f, cap, low, size, largest_radius)
            if on_step:
                on_step(f + 1, frames)

    checksum = _write_whole(path, parts())
    note = ""
    if counts.max() > cap:
        note = f"a frame has up to {int(counts.max()):,} points: the view draws an even {cap:,}"
        if cap < max_points:
            note += f" (so that {frames} frames stay quick to load)"
    return CloudView(
        frames, int(kept.sum()), cloud.fps, low.tolist(), high.tolist(), checksum, note
    )


def _header(
    cloud: OrientedPoints, counts: list[int], low: Tensor, size: Tensor, largest_radius: float
) -> bytes:
    source = cloud.source
    inner_low, inner_high = _trimmed_box(cloud.positions)
    text = json.dumps(
        {
            "counts": counts,
            "fps": cloud.fps,
            "low": low.tolist(),
            "size": size.tolist(),
            "radius": largest_radius,
            "inner_low": inner_low.tolist(),
            "inner_high": inner_high.tolist(),
            "source": {
                "center": source.centers[0].tolist(),
                "rotation": source.T_camera_world[0, :3, :3].tolist(),
                "K": source.K[0].tolist(),
                "width": source.width,
                "height": source.height,
            },
        }
    ).encode("ascii")
    return text + b" " * (-len(text) % 4)


# ---- turntable ----

TURNTABLE_VIEWS = 8
TURNTABLE_SIZE = (208, 320)
TURNTABLE_FOV = 0.52
"""Radians, 30 degrees: a portrait lens."""
NEAREST = 0.1
"""Metres from a cloud that is a single point."""


def turntable(
    cloud: OrientedPoints, on_step: Callable[[int, int, Tensor], None] | None = None
) -> Tensor:  # [3, H, 8 W] 0..1
    """Pictures from eight sides, side by side, of the frame in the middle that has points."""
    counts = cloud.frame_offsets.diff()
    filled = counts.nonzero()[:, 0]
    f = int(filled[(filled - cloud.frame_count // 2).abs().argmin()])
    one = cloud.select(cloud.frame(f), F.pad(counts[f : f + 1], (1, 0)))
    width, height = TURNTABLE_SIZE
    distance = framing_distance(*one.extent(), TURNTABLE_FOV, width, height)
    azimuths = torch.arange(TURNTABLE_VIEWS) * (2 * torch.pi / TURNTABLE_VIEWS)
    rig = orbit_rig(azimuths, 0 * azimuths, distance + NEAREST, TURNTABLE_FOV, width, height)
    pictures = render_conditions(one, rig, on_step=on_step).partial[:, 0].float() / 255
    return torch.cat(list(pictures), dim=-1)
