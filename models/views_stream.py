"""Views as small JPEG pictures in one file, which the page's player fetches, a frame or a part.

The file, little endian:
- 8 bytes `TURNVWS1`;
- uint32: length of the header; the header, JSON: `frames`, `fps`, `views` (label, azimuth and
  elevation in whole degrees or null), `cell` (width and height of a view), `columns`;
- for every picture two uint32: where it begins and ends, in bytes from the first picture;
- the pictures.

A *sheet* stream has one picture a frame with all views in rows of `columns`, so that what is shown
is of one moment by its make. A *single* stream (`columns` is 0) has picture v F + f for view v at
frame f. JPEG without halved colour: normal maps keep their edges. Every picture is decoded by
itself, so any frame can be shown at once, forwards or backwards, which videos can't.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .views import Views, as_pictures, grid_columns, grid_picture, view_labels
from .whole_file import whole_file

MAGIC = b"TURNVWS1"
CHUNK = 6 * 2**20
"""Bytes of float32 pictures that are worked on at once: what a processor's cache holds is done in
half the time."""


@dataclass(frozen=True)
class Size:
    """How large the pictures of a stream may be."""

    longest: int
    """Pixels of a view's longer side, at most."""
    pixels: float
    """Of all views and frames together, at most; JPEG needs 0.1 to 0.4 bytes a pixel."""
    quality: int
    """JPEG's, 1 to 95."""

    def cell(self, views: Views) -> tuple[int, int]:
        """Width and height of a view: never enlarged, shrunk until all fit."""
        V, frames, _, H, W = views.frames.shape
        all_pixels = V * frames * W * H
        scale = min(1.0, self.longest / max(W, H), math.sqrt(self.pixels / all_pixels))
        return max(1, round(W * scale)), max(1, round(H * scale))


NODE = Size(192, 24e6, 80)
"""On every node that puts out views: 8 x 81 frames of 832x480 become 192x111, 2 to 4 MB."""
GRID = Size(256, 48e6, 84)
"""The grid of Preview Views."""
ALONE = Size(1280, 300e6, 90)
"""One view alone in Preview Views; 8 x 81 frames of 832x480 stay as they are, 40 to 110 MB."""


@dataclass(frozen=True)
class Stream:
    """What the page must know of a written file."""

    start: int
    """Bytes before the first picture."""
    bytes: int
    """Of the whole file."""
    checksum: int
    """CRC-32 of the pictures: another run's file of the same name is told apart."""
    cell: tuple[int, int]
    """Width and height of a view."""


def write_streams(
    views: Views,
    sheet: Path,
    single: Path | None = None,
    sheet_size: Size = GRID,
    single_size: Size = ALONE,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Stream]:
    """Write the sheet stream and, with a path, the single one: the same pictures for any CHUNK.

    `on_step` gets (pictures done, all) and may raise. Files appear only when whole. NaN is black.
    """
    V, frames, _, H, W = views.frames.shape
    step = max(1, CHUNK // (3 * H * W * 4))
    with ExitStack() as stack:
        sheets = stack.enter_context(_Writer(sheet, views, sheet_size, grid_columns(V)))
        singles = stack.enter_context(_Writer(single, views, single_size, 0)) if single else None
        for first in range(0, frames, step):
            last = min(first + step, frames)
            small = []
            for v in range(V):
                chosen = slice(first, last)
                small.append(_shrunk(views, v, chosen, sheets.cell))
                if singles:
                    singles.write(v * frames + first, _shrunk(views, v, chosen, singles.cell))
                if on_step:
                    on_step(first * V + (v + 1) * (last - first), frames * V)
            at_once = torch.stack(small, 1)
            sheets.write(first, torch.stack([grid_picture(moment) for moment in at_once]))
    return [writer.stream for writer in (sheets, singles) if writer]


def _shrunk(
    views: Views, v: int, chosen: slice, cell: tuple[int, int]
) -> Tensor:  # [N, 3, h, w] uint8
    """Some frames of a view as bytes; depth is first made a picture, as 0 is no distance."""
    is_depth = views.frames.shape[2] == 1
    pictures = as_pictures(views, v, chosen) if is_depth else views.frames[v, chosen].float()
    width, height = cell
    if pictures.shape[-2:] != (height, width):
        pictures = F.interpolate(pictures, size=(height, width), mode="area")
    whole = pictures if views.frames.dtype == torch.uint8 else pictures * 255
    return whole.nan_to_num(0.0).round_().clamp_(0, 255).to(torch.uint8).cpu()


class _Writer:
    """A file that is being written: a table with a place for every picture, then pictures."""

    def __init__(self, path: Path, views: Views, size: Size, columns: int) -> None:
        V, frames = views.frames.shape[:2]
        self.cell = size.cell(views)
        self.quality = size.quality
        self.path = path
        self.places = [(0, 0)] * (frames if columns else V * frames)
        head = {
            "frames": frames, "fps": views.fps, "views": described(views),
            "cell": self.cell, "columns": columns,
        }  # fmt: skip
        self.head = json.dumps(head).encode()
        self.start = len(MAGIC) + 4 + len(self.head) + 8 * len(self.places)
        self.written = 0
        self.checksum = 0

    def __enter__(self) -> _Writer:
        self.stack = ExitStack()
        partial = self.stack.enter_context(whole_file(self.path))
        self.file = self.stack.enter_context(partial.open("wb"))
        self.file.seek(self.start)
        return self

    def write(self, first: int, pictures: Tensor) -> None:  # [N, 3, H, W] uint8
        """Pictures number `first`, `first` + 1, ..."""
        for n, picture in enumerate(pictures):
            packed = io.BytesIO()
            image = Image.fromarray(picture.movedim(0, -1).contiguous().numpy())
            image.save(packed, "JPEG", quality=self.quality, subsampling=0)
            data = packed.getbuffer()
            self.file.write(data)
            self.places[first + n] = (self.written, self.written + len(data))
            self.written += len(data)
            self.checksum = zlib.crc32(data, self.checksum)

    def __exit__(self, *error: object) -> None:
        if error == (None, None, None):
            self.file.seek(0)
            self.file.write(MAGIC + struct.pack("<I", len(self.head)) + self.head)
            self.file.write(struct.pack(f"<{2 * len(self.places)}I", *sum(self.places, ())))
            self.file.flush()
        self.stack.__exit__(*error)

    @property
    def stream(self) -> Stream:
        return Stream(self.start, self.start + self.written, self.checksum, self.cell)


def described(views: Views) -> list[dict]:
    """Label, azimuth and elevation (whole degrees, None without a rig) of every view."""
    labels = view_labels(views)
    if views.rig is None:
        return [{"label": label, "azimuth": None, "elevation": None} for label in labels]
    around = [round(math.degrees(a)) % 360 for a in views.rig.azimuths.tolist()]
    above = [round(math.degrees(e)) for e in views.rig.elevations.tolist()]
    return [
        {"label": label, "azimuth": a, "elevation": e}
        for label, a, e in zip(labels, around, above, strict=True)
    ]


def keep_below(folder: Path, limit: int, suffix: str) -> None:
    """Delete the oldest files of a kind until the rest has at most `limit` bytes."""
    files = [(path.stat(), path) for path in folder.glob(f"*{suffix}")]
    total = 0
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime, reverse=True):
        total += stat.st_size
        if total > limit:
            path.unlink(missing_ok=True)
