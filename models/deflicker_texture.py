"""Deflicker, texture: noise that every frame has anew is averaged away along the motion.

Stage: frames whose colours and places are right -> frames without grain and blotches. Non-local
means along flow (after Liu and Freeman 2010, "A high-quality video denoising algorithm based on
reliable motion estimation"): what the frames around show of the same thing is averaged, each place
weighted by how alike it looks, against the clip's own noise. What persists is kept; what no other
frame shows (uncovered ground, a flow that failed) stays as it is.

Frames: flows in pixels of the working pictures, centres at +0.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import gaussian
from .implicit_start import structure
from .metrics import sample

LOOK, AROUND = 1.0, 3.0
"""Working pixels (sigma): how far pictures are smoothed before they are compared, and over which
neighbourhood differences are."""
FALL = 0.5
"""How quickly trust falls with differences beyond the noise's own."""
CRISP = 0.02
"""Share of the Laplacian that makes up for a bicubic reading at random places."""
FINEST = 0.0015
"""Standard deviation of smoothed colours that is never called noise: a third of a step of 8 bits."""


def read(pictures: Tensor, flow: Tensor) -> Tensor:
    """Pictures [C, H, W] where flow [2, H, W] leads; bilinear."""
    x, y = _targets(flow)
    return sample(pictures[None], x[None], y[None])[0]


def read_sharply(pictures: Tensor, flow: Tensor) -> Tensor:
    """The same, bicubic."""
    x, y = _targets(flow)
    H, W = flow.shape[-2:]
    grid = torch.stack([2 * x / W - 1, 2 * y / H - 1], -1)[None]
    return F.grid_sample(
        pictures[None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )[0]


def crisp(picture: Tensor, share: float | Tensor = CRISP) -> Tensor:  # [3, H, W], or [h, w]
    """Gives back what reading between pixels takes from the finest detail, or averaging pictures that
    are bent: a share of the Laplacian, the same everywhere or of every place."""
    if isinstance(share, Tensor):
        size = picture.shape[-2:]
        share = F.interpolate(share[None, None], size, mode="bilinear")[0]
    near = F.pad(picture[None], (1, 1, 1, 1), mode="replicate")[0]
    around = near[:, 1:-1, :-2] + near[:, 1:-1, 2:] + near[:, :-2, 1:-1] + near[:, 2:, 1:-1]
    return picture + share * (4 * picture - around)


def _targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    H, W = flow.shape[-2:]
    x = torch.arange(W, device=flow.device) + 0.5
    y = torch.arange(H, device=flow.device)[:, None] + 0.5
    return x + flow[0], y + flow[1]


def enlarged(flow: Tensor, height: int, width: int) -> Tensor:  # [2, h, w] -> [2, height, width]
    """A flow for pictures of another size."""
    h, w = flow.shape[-2:]
    if (h, w) == (height, width):
        return flow
    scale = flow.new_tensor([width / w, height / h])[:, None, None]
    return scale * F.interpolate(flow[None], (height, width), mode="bicubic")[0]


def smoothed(small: Tensor) -> Tensor:  # [F, 3, h, w]
    """Pictures as they are compared."""
    return gaussian(small.flatten(0, 1), LOOK).view_as(small)


def difference(here: Tensor, there: Tensor, flow: Tensor) -> Tensor:  # [3, h, w] twice -> [h, w]
    """Mean squared difference of what one smoothed picture shows and what another shows where the
    flow leads."""
    return gaussian((read(there, flow) - here).square().mean(0)[None], AROUND)[0]


def noise_of(looks: Tensor, there: Tensor) -> float:  # [F, 3, h, w], [F - 1, 2, h, w]
    """Usual mean squared difference of neighbouring frames along the motion: half of the picture
    differs by less, so what moves too fast for the flow does not count."""
    found = [difference(looks[f], looks[f + 1], flow).median() for f, flow in enumerate(there)]
    return max(float(torch.stack(found).median()), FINEST**2) if found else FINEST**2


def misplaced(look: Tensor, sigma: Tensor) -> Tensor:  # [3, h, w], [h, w] pixels -> [h, w]
    """Mean squared difference of two pictures that are bent by so much along each axis, each for
    itself."""
    xx, _, yy = structure(look)
    return gaussian((2 / 3 * sigma.square() * (xx + yy))[None], AROUND)[0]


def averaged(
    f: int,
    frame: Callable[[int], Tensor],  # -> [3, H, W], the frame of a number
    looks: Tensor,  # [F, 3, h, w] smoothed working pictures
    flows: tuple[Tensor, Tensor],  # there, back [F - 1, 2, h, w]
    noise: float | Tensor,  # mean squared difference that means nothing, or of every place [h, w]
    reach: int,
) -> Tensor:  # [3, H, W]
    """Frame f, averaged with up to `reach` frames before and after it."""
    there, back = flows
    total = frame(f).clone()
    H, W = total.shape[-2:]
    weight = torch.ones_like(total[:1])
    for way in (1, -1):
        flow = torch.zeros_like(there[0])
        for g in range(f + way, f + way * (reach + 1), way):
            if not 0 <= g < len(looks):
                break
            flow = flow + read(there[g - 1] if way > 0 else back[g], flow)
            away = difference(looks[f], looks[g], flow)
            trust = torch.exp(-FALL * (away / noise - 1).clamp(min=0))[None]
            if trust.shape[-2:] != (H, W):
                trust = F.interpolate(trust[None], (H, W), mode="bilinear")[0]
            total += trust * read_sharply(frame(g), enlarged(flow, H, W))
            weight += trust
    return total / weight
