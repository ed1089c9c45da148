"""Gaussians as files: the PLY of 3DGS and `.splat`, which nearly every splat viewer opens.

Frame: the world of the pack (x right, y down, z forward, metres) is what most splat viewers take a
PLY or `.splat` to be in, since 3DGS trains in COLMAP's frame: written so, numbers pass unchanged. For
programs that take numbers as they are, a file may be turned upright; positions, rotations and
view-dependent colour turn together.

PLY (Kerbl et al. 2023, its reference code): little-endian floats x y z, nx ny nz (zero), f_dc_0..2,
f_rest_* (all coefficients of red, then green, then blue), opacity (logit), scale_0..2 (logarithm),
rot_0..3 (w x y z).

`.splat`: 32 bytes a Gaussian: position 3 x float32, scale 3 x float32, red green blue alpha 4 x
uint8, rotation w x y z 4 x uint8 as 128 + 128 q; the most important first. Colour is the mean one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cloud_file import AXES, AXES_ROTATIONS, Axes
from .splat_turn import turned
from .splats import C0, Splats
from .views import to_bytes
from .whole_file import whole_file

WORLD: Axes = AXES[2]
MAX_SPLATS = 5_000_000
"""1.2 GB with spherical harmonics of degree 3."""
MAX_HEADER = 65_535
"""Bytes. Viewers look for a header's end no further."""
CHUNK_BYTES = 16_000_000
"""Of rows in memory at a time, beside the Gaussians themselves."""
MAX_LOG_SCALE = 20.0
"""Half a million kilometres: surely no size of a Gaussian, and near it numbers overflow."""


# ---- Gaussians as rows of numbers ----


def property_names(coefficients: int) -> list[str]:
    """Properties of one Gaussian, in the order of the columns of `to_rows`."""
    return [
        *"xyz",
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(3 * (coefficients - 1))),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]


def to_rows(splats: Splats) -> Tensor:  # [N, 11 + 3 (d + 1)^2] float32 on the CPU
    """Gaussians as the numbers that a PLY holds, without normals."""
    columns = [
        splats.means,
        splats.sh[:, 0],
        splats.sh[:, 1:].transpose(1, 2).flatten(1),
        splats.opacities[:, None],
        splats.log_scales,
        splats.rotations,
    ]
    return torch.cat([c.detach().float().cpu() for c in columns], 1)


def from_rows(
    rows: Tensor,  # [N, 11 + 3 (d + 1)^2]
) -> Splats:
    """The Gaussians that `to_rows` gave."""
    N, coefficients = len(rows), (rows.shape[1] - 11) // 3
    means, mean_colors, rest, opacities, log_scales, rotations = (
        part.contiguous() for part in rows.split([3, 3, 3 * (coefficients - 1), 1, 3, 4], 1)
    )
    rest = rest.reshape(N, 3, coefficients - 1).transpose(1, 2)
    sh = torch.cat([mean_colors[:, None], rest], 1)
    return Splats(means, rotations, log_scales, opacities[:, 0], sh)


def check_rows(rows: Tensor, where: str) -> None:
    """Refuse what holds NaN or infinity, and more than fit."""
    if len(rows) > MAX_SPLATS:
        raise ValueError(f"{where}: {len(rows):,} Gaussians, {MAX_SPLATS:,} fit: keep fewer.")
    if rows.sum().isfinite():  # one number that is not would show: 20 times as fast
        return
    wrong = int((~rows.isfinite().all(1)).sum())
    if wrong:  # or the sum was too large
        raise ValueError(
            f"{where}: {wrong:,} of {len(rows):,} Gaussians hold NaN or infinity: remove them first."
        )


def in_axes(splats: Splats, axes: Axes) -> Splats:
    """The Gaussians of the pack's world, in a file's axes."""
    return splats if axes == WORLD else turned(splats, torch.tensor(AXES_ROTATIONS[axes]))


def from_axes(splats: Splats, axes: Axes) -> Splats:
    """The Gaussians of a file with these axes, in the pack's world."""
    return splats if axes == WORLD else turned(splats, torch.tensor(AXES_ROTATIONS[axes]).T)


# ---- PLY ----


def write_ply(path: Path, splats: Splats, axes: Axes = WORLD) -> None:
    """Write the Gaussians as 3DGS does; the file appears only when whole."""
    rows = to_rows(in_axes(splats, axes))
    check_rows(rows, path.name)
    write_rows(path, property_names(splats.sh.shape[1]), [f"Turnaround: metres, {axes}"], rows)


def write_rows(
    path: Path,
    names: list[str],
    comments: list[str],
    rows: Tensor,  # [N, columns]
    more: Callable[[slice], Tensor] | None = None,  # further columns of these rows
) -> None:
    """Write a PLY of rows and what belongs to them, piece by piece; whole or not at all."""
    header = ply_header(len(rows), names, comments)
    at_a_time = max(1, CHUNK_BYTES // (4 * len(names)))
    with whole_file(path) as partial, partial.open("wb") as out:
        out.write(header)
        for start in range(0, len(rows), at_a_time):
            part = slice(start, start + at_a_time)
            some = rows[part]
            columns = [some[:, :3], torch.zeros(len(some), 3), some[:, 3:]]
            columns += [more(part)] if more else []
            out.write(torch.cat(columns, 1).numpy().astype("<f4", copy=False).tobytes())


def ply_header(
    count: int,
    names: list[str],  # without the normals, which come after the position
    comments: list[str],
) -> bytes:
    """The header of a binary PLY of floats."""
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {c}" for c in comments),
        f"element vertex {count}",
        *(f"property float {n}" for n in [*names[:3], "nx", "ny", "nz", *names[3:]]),
        "end_header",
    ]
    return ("\n".join(lines) + "\n").encode("ascii")


def read_ply(path: Path, axes: Axes = WORLD) -> Splats:
    """The Gaussians of a binary 3DGS PLY of any program, in the pack's world; of a clip, the rest.

    Raises ValueError, one sentence, if the file is cut, is no PLY of Gaussians or holds NaN.
    """
    with path.open("rb") as file:
        table = read_table(file, path.name)
        rows = torch.from_numpy(table.read(file, table.gaussian_names()))
    check_rows(rows, path.name)
    return from_axes(from_rows(rows), axes)


PLY_NUMBERS = {
    "char": "<i1", "uchar": "<u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4",
    "float": "<f4", "double": "<f8", "int8": "<i1", "uint8": "<u1", "int16": "<i2",
    "uint16": "<u2", "int32": "<i4", "uint32": "<u4", "float32": "<f4", "float64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class VertexTable:
    """The vertices of a PLY: what a row holds, how many there are and where they begin."""

    name: str
    comments: list[str]
    count: int
    row: np.dtype
    start: int

    def gaussian_names(self) -> list[str]:
        """The properties that make a Gaussian, which must all be there."""
        rest = sum(bool(re.fullmatch(r"f_rest_\d+", n)) for n in self.row.names)
        if rest not in (0, 9, 24, 45):
            raise ValueError(
                f"{self.name} has {rest} properties f_rest_*; 0, 9, 24 or 45 are colour that "
                "depends on the view: export it again."
            )
        names = property_names(rest // 3 + 1)
        missing = [n for n in names if n not in self.row.names]
        if missing:
            raise ValueError(
                f"{self.name} is a PLY without {', '.join(missing[:4])}: it holds points, a mesh or "
                "compressed Gaussians; export it as uncompressed Gaussians (3DGS)."
            )
        return names

    def read(self, file: BinaryIO, names: list[str]) -> np.ndarray:  # [count, names] float32
        """Some properties of every vertex; rows are in memory a piece at a time."""
        values = np.empty((self.count, len(names)), np.float32)
        at_a_time = max(1, CHUNK_BYTES // self.row.itemsize)
        file.seek(self.start)
        for start in range(0, self.count, at_a_time):
            stop = min(start + at_a_time, self.count)
            content = file.read((stop - start) * self.row.itemsize)
            if len(content) < (stop - start) * self.row.itemsize:
                raise ValueError(f"{self.name} was cut while it was read: is it being written?")
            some = np.frombuffer(content, self.row)
            with np.errstate(over="ignore"):  # a double beyond floats is infinite, which is refused
                for column, name in enumerate(names):
                    values[start:stop, column] = some[name]
        return values


def read_table(file: BinaryIO, name: str) -> VertexTable:
    """What a PLY's header promises, once the file is known to be long enough for it."""
    head = file.read(MAX_HEADER + 1)
    if not re.match(rb"ply\r?\n", head):
        raise ValueError(f"{name} is no PLY: its first line is not 'ply'.")
    end = re.search(rb"\nend_header\r?\n", head)
    if not end:
        why = "is cut" if len(head) <= MAX_HEADER else f"is longer than {MAX_HEADER + 1} bytes"
        raise ValueError(f"{name}: the PLY's header {why}; copy or export the file again.")
    lines = head[: end.start()].decode("ascii", "replace").splitlines()[1:]
    comments = [line[8:] for line in lines if line.startswith("comment ")]
    words = [line.split() for line in lines]
    _check_format(name, words)
    count, row = _vertex(name, words)
    if count > MAX_SPLATS:
        raise ValueError(f"{name} promises {count:,} Gaussians; {MAX_SPLATS:,} fit at most.")
    there = (file.seek(0, 2) - end.end()) // row.itemsize
    if there < count:
        raise ValueError(
            f"{name} promises {count:,} Gaussians and holds {there:,}: it is cut; copy it again."
        )
    return VertexTable(name, comments, count, row, end.end())


def _check_format(name: str, words: list[list[str]]) -> None:
    format = next((w[1:] for w in words if w[:1] == ["format"]), [])
    if format != ["binary_little_endian", "1.0"]:
        raise ValueError(
            f"{name} is a PLY of format '{' '.join(format)}'; export it as binary_little_endian 1.0."
        )


def _vertex(name: str, words: list[list[str]]) -> tuple[int, np.dtype]:  # count, row
    """The first element, which must be the vertices; what comes after them is passed over."""
    elements = [i for i, w in enumerate(words) if w[:1] == ["element"]]
    first = words[elements[0]][1:] if elements else []
    if len(first) != 2 or first[0] != "vertex" or not re.fullmatch(r"[0-9]{1,18}", first[1]):
        raise ValueError(
            f"{name}: the PLY begins with '{' '.join(first)[:40]}' and not with its vertices; export "
            "it as uncompressed Gaussians (3DGS)."
        )
    part = words[elements[0] + 1 : elements[1] if len(elements) > 1 else None]
    properties = [w[1:] for w in part if w[:1] == ["property"]]
    known = [p for p in properties if len(p) == 2 and p[0] in PLY_NUMBERS]
    fields = {p[1]: PLY_NUMBERS[p[0]] for p in known}
    if not fields or len(fields) < len(properties):
        raise ValueError(
            f"{name}: the PLY's vertices have lists, double names or unknown types of numbers; "
            "export it as uncompressed Gaussians (3DGS)."
        )
    return int(first[1]), np.dtype(list(fields.items()))


# ---- .splat ----

SPLAT_ROW = np.dtype(
    [("place", "<f4", 3), ("scale", "<f4", 3), ("color", "u1", 4), ("rotation", "u1", 4)]
)


def linear_scales(splats: Splats, name: str) -> Tensor:  # [N, 3] metres
    """Standard deviations for a file that holds them as they are."""
    if len(splats) and splats.log_scales.max() > MAX_LOG_SCALE:
        raise ValueError(
            f"{name}: a Gaussian is wider than half a million kilometres (its logarithmic scale is "
            f"{float(splats.log_scales.max()):.3g}): remove it first."
        )
    return splats.log_scales.float().exp()


def mean_colors(splats: Splats) -> Tensor:  # [N, 3] 0..1
    """Colour without what depends on the view."""
    return (0.5 + C0 * splats.sh[:, 0]).clamp(0, 1)


def write_splat(path: Path, splats: Splats, axes: Axes = WORLD) -> None:
    """Write the Gaussians as `.splat`, the largest and most opaque first, so that a viewer which
    loads step by step shows them first; whole or not at all."""
    check_rows(to_rows(splats), path.name)
    importance = splats.log_scales.sum(1) + F.logsigmoid(splats.opacities)
    order = importance.argsort(descending=True, stable=True)
    splats = in_axes(splats.select(order), axes)
    paint = torch.cat([mean_colors(splats), splats.opacities.sigmoid()[:, None]], 1)
    quats = F.normalize(splats.rotations.detach(), dim=1)
    content = np.empty(len(splats), SPLAT_ROW)
    content["place"] = splats.means.detach().float().cpu().numpy()
    content["scale"] = linear_scales(splats, path.name).detach().float().cpu().numpy()
    content["color"] = to_bytes(paint.detach()).cpu().numpy()
    content["rotation"] = (128 + 128 * quats).round().clamp(0, 255).byte().cpu().numpy()
    with whole_file(path) as partial:
        partial.write_bytes(content.tobytes())


def read_splat(path: Path, axes: Axes = WORLD) -> Splats:
    """The Gaussians of a `.splat`, in the pack's world, with colours of degree 0.

    Positions are exact and colours as fine as 8 bits; rotations are off by up to 0.9 degrees, as the
    format rounds them. Raises ValueError, one sentence, if the file is cut or none.
    """
    size = path.stat().st_size
    if size % SPLAT_ROW.itemsize or size > MAX_SPLATS * SPLAT_ROW.itemsize:
        raise ValueError(
            f"{path.name} is no .splat, or cut: {size:,} bytes are not up to {MAX_SPLATS:,} Gaussians "
            f"of {SPLAT_ROW.itemsize} bytes."
        )
    content = np.fromfile(path, SPLAT_ROW)
    numbers = {n: torch.from_numpy(content[n].astype(np.float32)) for n in SPLAT_ROW.names}
    scales = numbers["scale"]
    check_rows(torch.cat([numbers["place"], scales], 1), path.name)
    if (scales < 0).any():
        raise ValueError(f"{path.name} is no .splat: sizes of its Gaussians are below 0.")
    # A size or opacity of 0 has no logarithm: the smallest number, a quarter of a step.
    log_scales = scales.clamp(min=torch.finfo(torch.float32).tiny).log()
    paint = numbers["color"].clamp(0.25, 254.75) / 255
    sh = ((numbers["color"][:, :3] / 255 - 0.5) / C0)[:, None]
    quats = F.normalize((numbers["rotation"] - 128) / 128, dim=1)
    splats = Splats(numbers["place"], quats, log_scales, paint[:, 3].logit(), sh)
    return from_axes(splats, axes)
