"""Flicker as video models make it, put into true clips: what the smoothers have to take out again.

One clip of one camera, [F, 3, H, W] in 0..1, at least two frames. Every frame is spoiled by itself,
nothing lasts over time: what the clean clip shows is the exact answer. All is drawn from a generator,
at strengths that are seen at once but leave the performer recognisable.
"""

from collections.abc import Callable

import faults
import torch
import torch.nn.functional as F
from torch import Tensor

GAIN, OFFSET, PATCHES = 0.06, 0.02, 3
"""Root mean square of a colour cast's factor (less 1) and addend, a channel; cells of its grid across
and down, so that the sides of one picture are tinted differently."""
GRAIN, BLOTCH, BLOTCH_PIXELS = 0.02, 0.04, 4
"""Root mean square of noise of single pixels, and of blotches so many pixels wide."""
TINTED = 0.5
"""Share of their variance that differs between the channels: more would look like a bad sensor."""
WOBBLE = 1 / 192
"""Root mean square of a bend along an axis, share of the width: about a pixel of usual views."""


def _smooth(
    frames: Tensor,  # [F, 3, H, W]
    channels: int,
    rows: int,
    columns: int,
    generator: torch.Generator,
) -> Tensor:  # [F, channels, H, W], root mean square 1
    """Noise on a coarse grid, a new one every frame, made smooth."""
    coarse = torch.randn(len(frames), channels, rows, columns, generator=generator)
    field = F.interpolate(coarse, frames.shape[-2:], mode="bicubic", align_corners=False)
    return (field / field.square().mean().sqrt()).to(frames)


def exposure(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame has a brightness of its own."""
    return faults.flicker(frames[None], frames, generator)[0]


def colour(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame has colour casts of its own, which change slowly over the picture."""
    gain = 1 + GAIN * _smooth(frames, 3, PATCHES, PATCHES, generator)
    offset = OFFSET * _smooth(frames, 3, PATCHES, PATCHES, generator)
    return (frames * gain + offset).clamp(0, 1)


def texture(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame has a texture of its own on everything: grain, and blotches of a few pixels."""
    H, W = frames.shape[-2:]

    def noise(pixels: int) -> Tensor:  # [F, 3, H, W], root mean square 1
        field = _smooth(frames, 4, -(-H // pixels), -(-W // pixels), generator)
        return (1 - TINTED) ** 0.5 * field[:, :1] + TINTED**0.5 * field[:, 1:]

    return (frames + GRAIN * noise(1) + BLOTCH * noise(BLOTCH_PIXELS)).clamp(0, 1)


def bends(frames: Tensor, generator: torch.Generator) -> Tensor:  # [F, 2, H, W] pixels
    """The place (x, y) in a clean frame that `wobble` makes a pixel show, minus that pixel."""
    H, W = frames.shape[-2:]
    rows = max(2, round(faults.CELLS * H / W))
    return WOBBLE * W * _smooth(frames, 2, rows, faults.CELLS, generator)


def wobble(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame is bent a little, differently each time."""
    return faults.moved(frames, bends(frames, generator))


ORDER = (wobble, texture, colour, exposure)
"""Of all faults together: first what moves pixels, then what tints them."""


def together(frames: Tensor, generator: torch.Generator) -> Tensor:
    """All of it."""
    for fault in ORDER:
        frames = fault(frames, generator)
    return frames


FAULTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    fault.__name__: fault for fault in (exposure, colour, texture, wobble, together)
}
"""Name -> fault(frames [F, 3, H, W], generator)."""


def flickering(frames: Tensor, fault: str, seed: int) -> Tensor:  # [F, 3, H, W]
    """A clip with one of FAULTS."""
    return FAULTS[fault](frames, torch.Generator().manual_seed(seed))
