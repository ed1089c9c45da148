"""A clip of Gaussians in one PLY: the rest, which any viewer shows, and every frame's deltas.

The PLY is that of `splat_files` with more properties of its vertices: `d<frame>_<property>` is what
frame `frame` adds to `<property>`; what no frame changes has none, `sh_<i>` stands for `f_rest_<i>`.

Elements after `vertex`, or bytes at the end, would halve the file (16 bits are enough), but fewer
viewers open it: several take every property for one of a vertex, or the rest of the file for more
Gaussians. A property that they don't know is passed over by all that we tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cloud_file import Axes
from .splat_files import (
    MAX_HEADER,
    WORLD,
    VertexTable,
    check_rows,
    from_axes,
    from_rows,
    in_axes,
    ply_header,
    property_names,
    read_table,
    to_rows,
    write_rows,
)
from .splats import Splats

MAX_CLIP_VALUES = 500_000_000
"""Of all frames together: 2 GB."""
CLIP = "Turnaround clip: {} frames at {!r} frames a second; d<frame>_<property> is added"
CLIP_PATTERN = r"Turnaround clip: ([0-9]{1,6}) frames at ([0-9.e+-]{1,24}) frames a second;.*"


@dataclass(frozen=True)
class SplatClip:
    """Gaussians at rest and what every frame adds to their numbers, as a file holds them."""

    rows: Tensor
    """[N, 11 + 3 (d + 1)^2] float32: the rest, in the file's axes."""
    deltas: Tensor
    """[F, N, P] float32: added to P of the columns."""
    columns: Tensor
    """[P] int64: which."""
    fps: float
    """Frames a second."""
    axes: Axes
    """Of the file."""

    def __len__(self) -> int:
        return len(self.deltas)

    @property
    def rest(self) -> Splats:
        """The Gaussians that other programs show, in the pack's world."""
        return from_axes(from_rows(self.rows), self.axes)

    def frame(self, f: int) -> Splats:
        """The Gaussians of frame f, in the pack's world."""
        rows = self.rows.clone()
        rows[:, self.columns] += self.deltas[f]
        return from_axes(from_rows(rows), self.axes)


def _delta_name(f: int, name: str) -> str:
    # Viewers count what is called f_rest_*, wherever it stands.
    return f"d{f}_{name.replace('f_rest_', 'sh_')}"


def write_clip_ply(
    path: Path,
    rest: Splats,
    frames: Iterable[Splats],  # the same Gaussians at other times
    fps: float,
    axes: Axes = WORLD,
    on_frame: Callable[[int], None] | None = None,
) -> None:
    """Write the rest as a PLY that any viewer opens, with every frame's deltas; whole or not at
    all. Memory: the deltas, 4 bytes for each number of a Gaussian that changes, a frame."""
    if not 0 < fps < float("inf"):
        raise ValueError(
            f"{path.name}: a clip of {fps} frames a second can't be played; 24 is usual."
        )
    rest = in_axes(rest, axes)
    rows, names = to_rows(rest), property_names(rest.sh.shape[1])
    check_rows(rows, path.name)
    changed, deltas = _deltas(path.name, rows, (in_axes(s, axes) for s in frames), on_frame)
    columns = changed.nonzero()[:, 0]
    total = len(deltas)
    delta_names = [_delta_name(f, names[c]) for f in range(total) for c in columns.tolist()]
    comments = [f"Turnaround: metres, {axes}", CLIP.format(total, float(fps))]
    length = len(ply_header(len(rows), [*names, *delta_names], comments))
    if length > MAX_HEADER:
        raise ValueError(
            f"{path.name}: {total} frames of {len(columns)} changing numbers need a header of "
            f"{length:,} bytes; viewers read {MAX_HEADER:,}: save at most about "
            f"{total * MAX_HEADER // length} frames in one file."
        )

    def more(part: slice) -> Tensor:
        wide = torch.zeros(len(rows[part]), total, len(columns))
        for f, (which, values) in enumerate(deltas):
            wide[:, f, which[columns]] = values[part]
        return wide.flatten(1)

    write_rows(path, [*names, *delta_names], comments, rows, more)


def _deltas(
    name: str,
    rest: Tensor,  # [N, C]
    frames: Iterator[Splats],
    on_frame: Callable[[int], None] | None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """[C] whether a column ever changes, and of every frame which do [C] and by what [N, changed]."""
    changed, found, total = torch.zeros(rest.shape[1], dtype=torch.bool), [], 0
    for f, splats in enumerate(frames):
        rows = to_rows(splats)
        if rows.shape != rest.shape:
            raise ValueError(
                f"{name}: frame {f} has {len(rows):,} Gaussians of {rows.shape[1]} numbers, the rest "
                f"{len(rest):,} of {rest.shape[1]}: a clip moves the same Gaussians."
            )
        check_rows(rows, f"{name}, frame {f}")
        # q and -q turn alike: the nearer one, so that what lies between frames is no detour.
        side = (rows[:, -4:] * rest[:, -4:]).sum(1, keepdim=True)
        rows[:, -4:] = torch.where(side < 0, -rows[:, -4:], rows[:, -4:])
        delta = rows - rest
        which = (delta != 0).any(0)
        changed |= which
        found.append((which, delta[:, which]))
        total += found[-1][1].numel()
        if total > MAX_CLIP_VALUES:
            raise ValueError(
                f"{name}: the first {f + 1} frames of {len(rest):,} Gaussians are more than fit into "
                "one file (2 GB): save fewer frames, or each as a file of its own."
            )
        if on_frame:
            on_frame(f)
    if not found:
        raise ValueError(f"{name}: a clip needs at least one frame.")
    return changed, found


def read_clip_ply(path: Path, axes: Axes = WORLD) -> SplatClip:
    """The clip that `write_clip_ply` wrote with these axes.

    Raises ValueError, one sentence, as `read_ply` does, or if the PLY holds no frames.
    """
    with path.open("rb") as file:
        table = read_table(file, path.name)
        names = table.gaussian_names()
        total, fps = _clip_length(table)
        changing = [n for n in names if _delta_name(0, n) in table.row.names]
        held = min(total, len(table.row.names))  # no more than can be there
        wanted = [_delta_name(f, n) for f in range(held) for n in changing]
        if (changing and held < total) or not set(wanted) <= set(table.row.names):
            raise ValueError(
                f"{path.name} lacks numbers of some of its {total} frames: save it again."
            )
        if table.count * len(wanted) > MAX_CLIP_VALUES:
            raise ValueError(f"{path.name} holds more than 2 GB of frames: save fewer in one file.")
        rows = torch.from_numpy(table.read(file, names))
        deltas = torch.from_numpy(table.read(file, wanted))
    check_rows(rows, path.name)
    check_rows(deltas, path.name)
    columns = torch.tensor([names.index(n) for n in changing], dtype=torch.int64)
    deltas = deltas.reshape(table.count, total, len(changing)).transpose(0, 1)
    return SplatClip(rows, deltas, columns, fps, axes)


def _clip_length(table: VertexTable) -> tuple[int, float]:  # frames, frames a second
    found = [m for m in (re.fullmatch(CLIP_PATTERN, c) for c in table.comments) if m]
    try:
        total, fps = int(found[0][1]), float(found[0][2])
    except (IndexError, ValueError):
        total, fps = 0, 0.0
    if not (total > 0 and 0 < fps < float("inf")):
        raise ValueError(
            f"{table.name} holds no frames of a clip, or another program saved it again without its "
            "comments: save it from its avatar."
        )
    return total, fps
