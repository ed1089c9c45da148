"""BVH: motion files as motion capture and 3D programs write them (stage: file -> joints over time).

A file holds a tree of joints with offsets (the rest pose, unturned) and, a line a frame, the numbers
of every joint's channels: turns in degrees about the parent's axes, applied in the order in which
they are listed, and places that stand for the joint's offset (Meredith, Maddock 2001). Nothing is
converted here: axes and units are the file's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MOST_NUMBERS = 60_000_000
"""In a file: 240 MB; ten minutes of 120 frames a second and a hundred joints of six channels are
43 million."""
MOST_JOINTS = 2000
CHANNELS = tuple(f"{axis}{kind}" for kind in ("position", "rotation") for axis in "xyz")
LINES_AT_ONCE = 4096


@dataclass(frozen=True)
class Bvh:
    """J joints over F frames; ends of limbs count as joints that never turn."""

    names: tuple[str, ...]
    parents: tuple[int, ...]
    """-1 = has none; parents come before their children."""
    offsets: Tensor
    """[J, 3] float64 from the parent, in the file's axes and unit."""
    channels: tuple[tuple[str, ...], ...]
    """Of every joint, of CHANNELS, in the order of their numbers."""
    values: Tensor
    """[F, C] float32, in the order of joints and their channels; places in the file's unit, degrees."""
    seconds: float
    """Of a frame."""

    @property
    def frame_count(self) -> int:
        return len(self.values)

    @property
    def travels(self) -> bool:
        """Whether any joint has places of its own, so that the figure can leave its spot."""
        return any(name.endswith("position") for own in self.channels for name in own)

    def rest(self) -> Tensor:  # [J, 3] float64
        """Where the joints are when nothing turns, the root at its offset."""
        places = []
        for offset, parent in zip(self.offsets, self.parents, strict=True):
            places.append(offset if parent < 0 else places[parent] + offset)
        return torch.stack(places)

    def pose(
        self,
        frames: Tensor,  # [n] int64
    ) -> tuple[Tensor, Tensor]:  # rotations [n, J, 3, 3], places [n, J, 3], both float64
        """The joints in some of the frames: turns from the rest pose, and places."""
        values = self.values[frames].double()
        rotations, places, first = [], [], 0
        for j, parent in enumerate(self.parents):
            own = self.channels[j]
            turn, moved = _joint(own, values[:, first : first + len(own)], self.offsets[j])
            first += len(own)
            if parent >= 0:
                moved = places[parent] + (rotations[parent] @ moved[..., None])[..., 0]
                turn = rotations[parent] @ turn
            rotations.append(turn)
            places.append(moved)
        return torch.stack(rotations, 1), torch.stack(places, 1)


def _joint(
    channels: tuple[str, ...],
    values: Tensor,  # [n, C] of this joint
    offset: Tensor,  # [3]
) -> tuple[Tensor, Tensor]:  # [n, 3, 3], [n, 3]
    turn = torch.eye(3, dtype=values.dtype).expand(len(values), 3, 3)
    place = offset.expand(len(values), 3).clone()
    for name, column in zip(channels, values.unbind(1), strict=True):
        axis = "xyz".index(name[0])
        if name.endswith("rotation"):
            turn = turn @ _about(axis, column.deg2rad())
        else:
            place[:, axis] = column
    return turn, place


def _about(axis: int, angles: Tensor) -> Tensor:  # [n] radians -> [n, 3, 3]
    """Right-handed turns about x, y or z."""
    one, two = (axis + 1) % 3, (axis + 2) % 3
    turns = angles.new_zeros(len(angles), 3, 3)
    turns[:, axis, axis] = 1
    turns[:, one, one] = turns[:, two, two] = angles.cos()
    turns[:, two, one] = angles.sin()
    turns[:, one, two] = -angles.sin()
    return turns


def read_bvh(path: Path) -> Bvh:
    """ValueError, naming the file, when it holds no motion that can be read."""
    if path.stat().st_size > 12 * MOST_NUMBERS:
        raise ValueError(
            f"'{path.name}' is {path.stat().st_size / 1e6:.0f} MB, more than a motion needs: export "
            "fewer frames, or fewer frames a second."
        )
    # Names of joints may be in any language's old code page; numbers and keywords are ASCII.
    return parse_bvh(path.read_text(encoding="utf-8-sig", errors="replace"), path.name)


def parse_bvh(text: str, name: str) -> Bvh:
    """A file's text; `name` is what sentences call it."""
    head, motion, body = _split(text)
    if not head.lstrip().upper().startswith("HIERARCHY") or not motion:
        raise ValueError(
            f"'{name}' is no BVH motion (it needs a HIERARCHY and a MOTION part): export it as BVH."
        )
    tree = _Tree(name)
    tree.read(head.split("\n"))
    frames, seconds, lines = _header(body, name)
    values = _numbers(lines, sum(len(own) for own in tree.channels), name)
    if frames is not None and 0 < frames < len(values):
        values = values[:frames]  # what some programs write behind the last frame
    offsets = torch.tensor(tree.offsets, dtype=torch.float64)
    bvh = Bvh(
        tuple(tree.names), tuple(tree.parents), offsets, tuple(tree.channels), values, seconds
    )
    return _settled(bvh)


def _split(text: str) -> tuple[str, bool, str]:
    found = re.search(r"^\s*MOTION\b", text, re.MULTILINE | re.IGNORECASE)
    return (text[: found.start()], True, text[found.end() :]) if found else (text, False, "")


class _Tree:
    """The HIERARCHY part, read line by line."""

    def __init__(self, name: str) -> None:
        self.file = name
        self.names: list[str] = []
        self.parents: list[int] = []
        self.offsets: list[list[float]] = []
        self.channels: list[tuple[str, ...]] = []
        self._open: list[int] = []
        self._last = -1

    def read(self, lines: list[str]) -> None:
        # Braces may stand on lines of their own or behind a name.
        for line in (part for row in lines[1:] for part in re.split(r"([{}])", row)):
            words = line.split()
            if words:
                self._take(words[0].lower(), words[1:])
        if not self.names:
            raise ValueError(f"'{self.file}' holds no joints: export it again.")

    def _take(self, word: str, rest: list[str]) -> None:
        if word in ("root", "joint"):
            self._begin(" ".join(rest) or f"joint {len(self.names)}")
        elif word == "end":
            above = self.names[self._open[-1]] if self._open else "figure"
            self._begin(f"{above} end")
        elif word == "{":
            self._open.append(self._last)
        elif word == "}":
            if not self._open:
                raise ValueError(
                    f"'{self.file}' closes more braces than it opens: export it again."
                )
            self._open.pop()
        elif word == "offset":
            self.offsets[self._now()] = self._offset(rest)
        elif word == "channels":
            self.channels[self._now()] = self._listed(rest)

    def _now(self) -> int:
        if not self._open or self._open[-1] < 0:
            raise ValueError(
                f"'{self.file}' has an offset or channels outside of a joint: export it again."
            )
        return self._open[-1]

    def _begin(self, name: str) -> None:
        if len(self.names) == MOST_JOINTS:
            raise ValueError(
                f"'{self.file}' has more than {MOST_JOINTS} joints: export a skeleton."
            )
        self._last = len(self.names)
        self.names.append(name)
        self.parents.append(self._open[-1] if self._open else -1)
        self.offsets.append([0.0, 0.0, 0.0])
        self.channels.append(())

    def _offset(self, words: list[str]) -> list[float]:
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) != 3 or not np.isfinite(values).all():
            raise ValueError(
                f"'{self.file}' gives joint '{self.names[self._open[-1]]}' the offset "
                f"'{' '.join(words)}', which are not 3 numbers: export it again."
            )
        return values

    def _listed(self, words: list[str]) -> tuple[str, ...]:
        names = tuple(word.lower() for word in words[1:])
        strange = [name for name in names if name not in CHANNELS]
        if strange or not words or words[0] != str(len(names)):
            raise ValueError(
                f"'{self.file}' gives joint '{self.names[self._open[-1]]}' the channels "
                f"'{' '.join(words)}': a count and as many of Xposition ... Zrotation are needed."
            )
        return names


def _header(body: str, name: str) -> tuple[int | None, float, list[str]]:
    """Promised frames (None = not said), seconds of a frame, and the lines of numbers."""
    lines = [line for line in (row.strip() for row in body.split("\n")) if line]
    frames, seconds = None, None
    while lines and lines[0][0].isalpha():
        word, _, value = lines.pop(0).partition(":")
        try:
            if word.lower().split() == ["frames"]:
                frames = int(float(value))
            elif word.lower().split() == ["frame", "time"]:
                seconds = float(value)
        except ValueError:
            seconds = 0.0
    if seconds is None or not 1e-5 < seconds < 60:
        raise ValueError(
            f"'{name}' doesn't say how long a frame lasts (a line 'Frame Time: 0.033'): export it "
            "again, or write that line."
        )
    return frames, seconds, lines


def _numbers(lines: list[str], columns: int, name: str) -> Tensor:  # [F, columns] float32
    """As a stream: some programs break a frame's line in several."""
    if not columns:
        raise ValueError(f"No joint of '{name}' has channels, so nothing in it moves.")
    parts = []
    for first in range(0, len(lines), LINES_AT_ONCE):
        words = " ".join(lines[first : first + LINES_AT_ONCE]).split()
        try:
            parts.append(np.array(words, dtype=np.float64))
        except ValueError as error:
            raise ValueError(
                f"'{name}' has something other than numbers among its frames ({error}): export it "
                "again, with points as decimal signs."
            ) from None
    values = np.concatenate(parts) if parts else np.zeros(0)
    whole = len(values) // columns
    if not whole:
        raise ValueError(f"'{name}' holds no whole frame of {columns} numbers: export it again.")
    values = values[: whole * columns].reshape(whole, columns)
    if not np.isfinite(values).all():
        raise ValueError(f"'{name}' holds NaN or infinity: export it again.")
    return torch.from_numpy(values.astype(np.float32))


def _settled(bvh: Bvh) -> Bvh:
    """Places of joints that have a parent: as offsets, or, as some programs write them, what is to
    be added to the offsets. They are the latter if they are near nothing and the offset is not."""
    offsets, first = bvh.offsets.float(), 0
    values = bvh.values.clone()
    for j, own in enumerate(bvh.channels):
        columns = [first + k for k, name in enumerate(own) if name.endswith("position")]
        first += len(own)
        if bvh.parents[j] < 0 or not columns:
            continue
        axes = ["xyz".index(name[0]) for name in own if name.endswith("position")]
        usual = values[:, columns].median(0).values
        if usual.norm() < 0.5 * (usual - offsets[j, axes]).norm():
            values[:, columns] += offsets[j, axes]
    return Bvh(bvh.names, bvh.parents, bvh.offsets, bvh.channels, values, bvh.seconds)
