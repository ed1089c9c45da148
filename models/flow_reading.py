"""Flow of other nodes: tensors, arrays, bundles and coded pictures -> FLOW.

What other packs' flow sockets carry (by the socket's type):
- FLOW, OPTICAL_FLOW: [N, H, W, 2] pixels, as one tensor or a list of arrays, one a pair of frames;
- RAFT_FLOW: [N, 2, H, W] pixels;
- FLOW_FIELD, FLOW: a bundle with one or both ways, as attributes or under names;
- BACKWARD_FLOW: [H, W, 2] pixels, from a frame to the one before.
ComfyUI's own OPTICAL_FLOW is a network, and some packs' FLOW says when nodes run: no flow at all.

Pictures code a step as colours around 0.5, red for x and green for y; colour wheels lose the length.

Frames: pixels of the picture, x right, y down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import Flow, Step, flow_picture, how_sure, inverse, returned

FORWARD = ("forward", "flow_fwd", "forward_flow", "fwd", "flow")
BACKWARD = ("backward", "flow_bwd", "backward_flow", "bwd")
"""Names of the two ways in bundles."""
Coding = Literal["pixels around grey", "picture sizes around grey", "raw pixels"]
SMALLEST = 8
"""Pixels a side from which a tensor counts as pictures."""
STILL = 0.6 / 255
"""Colours so near 0.5 mean no motion: bytes have no middle, but 127 and 128 beside it."""
FARTHEST = 4.0
"""Picture widths beyond which a step is no motion of a clip."""


def raw_flow(
    value: object, name: Literal["forward", "backward"]
) -> dict[str, Tensor]:  # [N, 2, H, W] pixels, under 'forward' and 'backward'
    """A flow as it comes from a socket of another pack: one way, named as its socket, or a bundle.

    Raises ValueError with one sentence that starts with the socket's name."""
    parts = _bundle(value)
    if parts is None:
        return {name: _steps(value, name)}
    ways = {"forward": _first(parts, FORWARD), "backward": _first(parts, BACKWARD)}
    found = {way: _steps(part, name) for way, part in ways.items() if part is not None}
    if not found:
        raise ValueError(
            f"'{name}' carries a {type(value).__name__} without a flow in it: connect the node's "
            "flow tensor, one step of x and y for every pixel."
        )
    return found


def _bundle(value: object) -> dict | None:
    """The parts of a value that holds several, by their names."""
    if isinstance(value, Mapping):
        return dict(value)
    if torch.is_tensor(value) or isinstance(value, np.ndarray | list | tuple):
        return None
    return {n: getattr(value, n) for n in (*FORWARD, *BACKWARD) if hasattr(value, n)}


def _first(parts: dict, names: tuple[str, ...]) -> object | None:
    return next((parts[n] for n in names if parts.get(n) is not None), None)


def _steps(value: object, name: str) -> Tensor:  # [N, 2, H, W]
    """One tensor or array, or a list of them, whatever the place of its two channels."""
    if isinstance(value, list | tuple) and value:
        parts = [_steps(part, name) for part in value]
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"'{name}' holds flows of several sizes: make them of one clip.")
        return torch.cat(parts)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not torch.is_tensor(value):
        raise ValueError(
            f"'{name}' carries a {type(value).__name__}, not a flow: connect a tensor with one step "
            "of x and y for every pixel, such as that of a RAFT or Unimatch node, or coded pictures."
        )
    shape = list(value.shape)
    value = value.detach().cpu().float()
    if value.ndim == 5:
        value = value.flatten(0, 1)
    elif value.ndim == 3:
        value = value[None]
    if value.ndim == 4 and value.shape[1] == 2 and min(value.shape[2:]) >= SMALLEST:
        steps = value
    elif value.ndim == 4 and value.shape[3] == 2 and min(value.shape[1:3]) >= SMALLEST:
        steps = value.movedim(3, 1)
    else:
        raise ValueError(
            f"'{name}' has shape {shape}, but a flow has two numbers for every pixel: [frames, 2, "
            "height, width] or [frames, height, width, 2]."
        )
    if not len(steps):
        raise ValueError(f"'{name}' is empty: give its node two frames or more.")
    _check_steps(steps, name)
    return steps


def _check_steps(steps: Tensor, name: str) -> None:
    if not steps.isfinite().all():
        raise ValueError(f"'{name}' holds NaN or infinity: make that flow again.")
    longest, width = float(steps.abs().max()), max(steps.shape[2:])
    if longest > FARTHEST * width:
        raise ValueError(
            f"'{name}' has steps of {longest:.0f} pixels in pictures of {steps.shape[3]}x"
            f"{steps.shape[2]}: it is no flow in pixels."
        )


def coded_flow(
    pictures: Tensor,  # [N, 3, H, W] 0..1
    coding: Coding,
    scale: float,
    name: str,
) -> Tensor:  # [N, 2, H, W] pixels
    """Flow from colours: red and green are 0.5 + 0.5 step / scale, in pixels or in widths and heights,
    or the step itself (pictures of float files).

    Raises ValueError for a colour wheel, whose ground is white or black: it does not tell lengths."""
    if coding == "raw pixels":
        steps = pictures[:, :2].float()
        _check_steps(steps, name)
        return steps
    if not pictures.isfinite().all():
        raise ValueError(f"'{name}' holds NaN or infinity: make that flow again.")
    ground = [
        float(c.flatten()[:: max(1, c.numel() >> 16)].median()) for c in pictures[:, :2].unbind(1)
    ]
    if min(ground) > 0.9 or max(ground) < 0.1:
        raise ValueError(
            f"'{name}' looks like a colour wheel (its ground is "
            f"{'white' if ground[0] > 0.5 else 'black'}), which does not tell how far things move: "
            "connect the flow itself, or pictures with x in red and y in green around grey."
        )
    away = pictures[:, :2].float() - 0.5
    away = torch.where(away.abs() <= STILL, 0.0, away)
    H, W = pictures.shape[-2:]
    full = (W * scale, H * scale) if coding == "picture sizes around grey" else (scale, scale)
    return 2 * away * away.new_tensor(full)[:, None, None]


def resized_flow(flow: Tensor, width: int, height: int) -> Tensor:  # [N, 2, h, w] -> [N, 2, H, W]
    """For pictures of another size: the steps grow along."""
    h, w = flow.shape[-2:]
    if (w, h) == (width, height):
        return flow
    smooth = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False)
    return smooth * flow.new_tensor([width / w, height / h])[:, None, None]


def by_view(flow: Tensor, views: int, frames: int, name: str) -> Tensor:  # -> [V, F - 1, 2, H, W]
    """Pair after pair, view after view. One too many a view leads from the last frame back to the
    first, as some nodes make it, and is left out."""
    if len(flow) == views * frames:
        return flow.unflatten(0, (views, frames))[:, :-1]
    if len(flow) == views * (frames - 1):
        return flow.unflatten(0, (views, frames - 1))
    raise ValueError(
        f"'{name}' has {len(flow)} steps, but {views} x {frames} frames have {frames - 1} between "
        "neighbours in each view: make the flow of the same clip, every frame to its next."
    )


def assembled(
    there: Tensor | None,  # [V, F - 1, 2, H, W]
    back: Tensor | None,
    pictures: Tensor | None,  # [V, F, 3, H, W] 0..1
    on_step: Step | None = None,
) -> Flow:
    """Both ways with their confidence; a way that is missing is the other one turned round.

    Confidence comes from the way there and back, and from the colours where pictures are known."""
    if there is None and back is None:
        raise ValueError("No flow is connected: connect 'forward', 'backward', or both.")
    if there is not None and back is not None and there.shape != back.shape:
        raise ValueError(
            f"'forward' has steps of shape {list(there.shape)}, but 'backward' {list(back.shape)}: "
            "make both of the same clip."
        )
    given = back if there is None else there
    V, pairs = given.shape[:2]

    def tick(v: int, f: int) -> None:
        if on_step:
            on_step(v * pairs + f, V * pairs, flow_picture(given[v, f : f + 1])[0])

    parts = []
    for v in range(V):
        tick(v, 0)
        to = inverse(back[v]) if there is None else there[v]
        fro = inverse(to) if back is None else back[v]
        if pictures is None:
            sure = returned(to, fro), returned(fro, to)
        else:
            sure = how_sure(pictures[v], to, fro, lambda f, v=v: tick(v, f))
        parts.append((to, fro, *sure))
    return Flow(*(torch.stack(part) for part in zip(*parts, strict=True)))
