"""Faults as video models make them, put into true pictures: what MV-Opt has to take out again.

Every fault is drawn from a generator, at a strength that is seen at once but leaves the performer
recognisable. View 0 is the reference: faults that shift a whole clip leave it alone, since nothing
could tell which view is right.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GAIN, OFFSET = 0.12, 0.04
"""Standard deviation of a colour shift's factor and addend, a channel."""
EXPOSURE = 0.12
"""Standard deviation of a frame's brightness, as the logarithm of its factor."""
SHIFT = 1.5 / 192
"""Standard deviation of a jitter along an axis, as a share of the picture's width."""
WOBBLE, CELLS = 1.2 / 192, 12
"""Root mean square of a wobble along an axis, share of the width; cells of its grid across."""
LIMB, REACH = 8 / 192, 14 / 192
"""How far a limb is moved, and how far from its end it is taken along; share of the width."""
GHOST = 0.4
"""Share of the frame before in a ghosted frame."""
BLOTCH = 0.08
"""Standard deviation of blotches in one view, eight pixels wide."""


def moved(
    frames: Tensor,  # [N, 3, H, W]
    shift: Tensor,  # [N, 2, H, W] pixels: the place in `frames` that comes to lie here, minus here
) -> Tensor:
    H, W = frames.shape[-2:]
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    grid = torch.stack([2 * (x + shift[:, 0]) / W - 1, 2 * (y + shift[:, 1]) / H - 1], -1)
    return F.grid_sample(
        frames, grid, mode="bicubic", padding_mode="border", align_corners=False
    ).clamp(0, 1)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def colour(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Every view but the first has a colour cast of its own."""
    V = len(frames)
    gain = 1 + GAIN * _normal((V, 1, 3, 1, 1), generator)
    offset = OFFSET * _normal((V, 1, 3, 1, 1), generator)
    gain[0], offset[0] = 1, 0
    return (frames * gain + offset).clamp(0, 1)


def flicker(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame of every view has a brightness of its own."""
    gain = torch.exp(EXPOSURE * _normal((*frames.shape[:2], 1, 1, 1), generator))
    return (frames * gain).clamp(0, 1)


def flash(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """The brightness of all views changes from frame to frame: no view tells of it."""
    gain = torch.exp(EXPOSURE * _normal((1, frames.shape[1], 1, 1, 1), generator))
    return (frames * gain).clamp(0, 1)


def jitter(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame of every view but the first is shifted."""
    V, count, _, H, W = frames.shape
    shift = SHIFT * W * _normal((V, count, 2, 1, 1), generator)
    shift[0] = 0
    return moved(frames.flatten(0, 1), shift.flatten(0, 1).expand(-1, -1, H, W)).view_as(frames)


def wobble(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Every frame of every view but the first is bent, differently each time."""
    V, count, _, H, W = frames.shape
    coarse = _normal((V * count, 2, CELLS * H // W, CELLS), generator)
    field = F.interpolate(coarse, (H, W), mode="bicubic", align_corners=False)
    field = field * (WOBBLE * W / field.square().mean().sqrt())
    field[:count] = 0
    return moved(frames.flatten(0, 1), field).view_as(frames)


def limb(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """In one view a hand and its forearm are elsewhere; `points` [V, F, 2] says where the hand is."""
    _, _, _, H, W = frames.shape
    v = 1 + int(torch.randint(len(frames) - 1, (), generator=generator))
    angle = torch.rand((), generator=generator) * 2 * torch.pi
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    away = torch.stack([x, y]) - points[v][..., None, None]  # [F, 2, H, W]
    share = torch.exp(-away.square().sum(1) / (2 * (REACH * W) ** 2))
    shift = LIMB * W * torch.stack([angle.cos(), angle.sin()])[:, None, None] * share[:, None]
    result = frames.clone()
    result[v] = moved(frames[v], shift)
    return result


def ghost(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """In every other frame of every view but the first, the frame before shows through."""
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    share = torch.zeros(*frames.shape[:2], 1, 1, 1)
    share[1:, 1::2] = GHOST
    return frames + share * (before - frames)


def blotches(frames: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """One view is covered by coloured blotches that change from frame to frame."""
    _, count, _, H, W = frames.shape
    v = 1 + int(torch.randint(len(frames) - 1, (), generator=generator))
    coarse = _normal((count, 3, -(-H // 8), -(-W // 8)), generator)
    result = frames.clone()
    field = F.interpolate(coarse, (H, W), mode="bicubic", align_corners=False)
    field = field * (BLOTCH / field.square().mean().sqrt())
    result[v] = (frames[v] + field).clamp(0, 1)
    return result


FAULTS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    fault.__name__: fault
    for fault in (colour, flicker, flash, jitter, wobble, limb, ghost, blotches)
}
"""Name -> fault(frames [V, F, 3, H, W], the moved hand [V, F, 2] in pixels, generator)."""
