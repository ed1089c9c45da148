"""Several cameras' footage, brought to one size, moment and length.

Stage: videos as they were filmed + calibrated rig -> VIEWS. Offsets tell which of each video's
pictures show the same moment.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import Rig
from .views import SIZE_STEP, resize_frames, snap_size, to_bytes

SAME_SHAPE = 0.01
"""Share by which width over height of footage and calibration may differ."""


def rig_of_size(
    rig: Rig,
    longest: int,  # pixels of the longer side; 0 = the rig's own
) -> Rig:
    """The cameras at a size that views can have, in the rig's shape as nearly as that allows."""
    scale = longest / max(rig.width, rig.height) if longest else 1.0
    size = snap_size(round(rig.width * scale), round(rig.height * scale))
    return rig if size == (rig.width, rig.height) else rig.filled(*size)


def same_shape(width: int, height: int, rig: Rig) -> bool:
    """Whether pictures of this size can be those that the rig was calibrated for, at any scale.

    A rig's own size may have been rounded to multiples of 16.
    """
    rounded = SIZE_STEP / 2 * (1 / rig.width + 1 / rig.height)
    return abs(width * rig.height / (height * rig.width) - 1) <= max(SAME_SHAPE, rounded)


def as_calibrated(
    picture: Tensor,  # [3, H, W] bytes, as filmed
    calibrated: Rig,
    width: int,
    height: int,
) -> Tensor:  # [3, height, width] bytes
    """A picture as `calibrated.filled(width, height)` has it: first filled to the calibration's shape
    (its nearest whole pixels), then to the new size; never stretched."""
    H, W = picture.shape[-2:]
    w = min(W, round(H * calibrated.width / calibrated.height))
    h = min(H, round(W * calibrated.height / calibrated.width))
    top, left = (H - h) // 2, (W - w) // 2
    shaped = picture[None, :, top : top + h, left : left + w].float() / 255
    return to_bytes(resize_frames(shaped, width, height)[0])


def read_offsets(text: str, count: int) -> list[int]:
    """'12, 15, 10, 12': in each video the number of the picture that shows one and the same moment.
    Gives how many pictures of each to leave out, so that all begin together; empty = none."""
    parts = re.split(r"[,;\s]+", text.strip(" ,;\t\n"))
    try:
        frames = [int(part) for part in parts] if parts != [""] else [0] * count
    except ValueError:
        raise ValueError(
            f"'offsets' is {reprlib.repr(text)}, but it takes whole numbers with commas between them, one a "
            f"camera, such as {', '.join(['0', '3', '-2', '0'][:count])}: in each video the number of "
            "the frame in which the same clap is seen; or leave it empty."
        ) from None
    if len(frames) != count:
        raise ValueError(
            f"'offsets' has {len(frames)} numbers, but there are {count} videos: give one number a "
            "video, or leave it empty."
        )
    return [frame - min(frames) for frame in frames]


@dataclass(frozen=True)
class Together:
    """What cameras saw at the same moments."""

    frames: Tensor
    """[V, F, 3, H, W] bytes."""
    ended: int | None
    """The camera whose footage ended before all was read; None = none did."""


def read_together(
    readers: list[Iterator[Tensor]],  # V of [3, H, W] bytes, all of one size
    count: int,
    size: tuple[int, int],  # width, height
    on_moment: Callable[[int, Tensor], None],  # (moments done, [V, 3, H, W] bytes)
) -> Together:
    """At most `count` moments, as many as all of the readers have."""
    width, height = size
    frames = torch.empty(len(readers), count, 3, height, width, dtype=torch.uint8)
    for f in range(count):
        for v, reader in enumerate(readers):
            picture = next(reader, None)
            if picture is None:
                return Together(frames[:, :f].clone(), v)
            frames[v, f] = picture
        on_moment(f + 1, frames[:, f])
    return Together(frames, None)
