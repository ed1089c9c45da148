"""What an avatar is compared with, and how its Gaussians are kept in order.

Stage: VIEWS -> the performer cut out of a picture -> losses of a rendered picture (L1 and SSIM, as
CAP4D and 3DGS weigh them) and of Gaussians that grow too large or leave the skin (GaussianAvatars).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import SSIM_C1, SSIM_C2, SSIM_SIGMA, SSIM_WINDOW
from .splats import Splats

BESIDE = 0.1
"""Share of the performer's box that is looked at around it, so that nothing grows there."""
LEAST_BESIDE = 8
"""Pixels."""
NEARBY = 16
"""Pixels from which a rim's background is guessed."""
SSIM_SHARE = 0.4
"""Of the loss of pictures, as published."""
LARGEST, FARTHEST = 1.0, 2.0
"""In units of the skin's triangles, as published: beyond, scales and distances from the skin cost."""
LARGE, FAR = 1.0, 0.01
"""What they cost."""


@dataclass(frozen=True)
class Cutout:
    """The performer in a part of a picture."""

    color: Tensor
    """[3, h, w] times alpha."""
    alpha: Tensor
    """[h, w] 0..1."""
    corner: tuple[int, int]
    """x, y of the part in the picture."""

    def over(self, ground: Tensor) -> Tensor:  # [3] -> [3, h, w]
        return self.color + (1 - self.alpha) * ground[:, None, None]

    def camera(self, K: Tensor) -> Tensor:  # [3, 3]
        """Of the part alone."""
        moved = K.clone()
        moved[:2, 2] -= moved.new_tensor(self.corner)
        return moved


def box_around(mask: Tensor) -> tuple[int, int, int, int] | None:  # [H, W]
    """Left, top, right, bottom of the performer with its surroundings; None where nobody is."""
    there = mask > 0.5
    rows, columns = there.any(1).nonzero()[:, 0], there.any(0).nonzero()[:, 0]
    if not len(rows):
        return None
    (H, W), ends = mask.shape, (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    top, bottom, left, right = (int(n) for n in ends)
    aside = max(LEAST_BESIDE, round(BESIDE * max(bottom - top, right - left)))
    return max(left - aside, 0), max(top - aside, 0), min(right + aside, W), min(bottom + aside, H)


def cut_out(
    frame: Tensor,  # [3, H, W] 0..1
    mask: Tensor,  # [H, W] 0..1
    box: tuple[int, int, int, int],  # left, top, right, bottom
) -> Cutout:
    """The performer alone. At a rim, where a pixel shows both, the background is taken to be what is
    around: color times alpha = pixel - (1 - alpha) background."""
    left, top, right, bottom = box
    pixel, alpha = frame[:, top:bottom, left:right], mask[top:bottom, left:right]
    outside = (alpha < 0.02).to(pixel)
    coarse = F.avg_pool2d(
        torch.cat([pixel * outside, outside[None]])[None], NEARBY, NEARBY // 4, ceil_mode=True,
        padding=NEARBY // 2, count_include_pad=False,
    )  # fmt: skip
    sums = F.interpolate(coarse, alpha.shape, mode="bilinear", align_corners=False)[0]
    behind = torch.where(sums[3] > 0, sums[:3] / sums[3].clamp(min=1e-6), 0.5)
    color = (pixel - (1 - alpha) * behind).clamp(min=0)
    # Not brighter than white where it is opaque.
    return Cutout(torch.minimum(color, alpha.expand_as(color)) * (1 - outside), alpha, (left, top))


def structure_loss(
    picture: Tensor,  # [3, h, w]
    truth: Tensor,  # [3, h, w]
) -> Tensor:
    """1 - SSIM (`metrics.ssim`), of the pixels whose whole window lies inside."""
    reach = min(SSIM_WINDOW, *picture.shape[1:])
    x = torch.arange(reach, dtype=picture.dtype, device=picture.device) - (reach - 1) / 2
    kernel = torch.exp(-x.square() / (2 * SSIM_SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(15, 1, 1, -1)
    both = [picture, truth, picture * picture, truth * truth, picture * truth]
    across = F.conv2d(torch.cat(both)[None], kernel, groups=15)
    mx, my, xx, yy, xy = F.conv2d(across, kernel.mT, groups=15)[0].unflatten(0, (5, 3))
    top = (2 * mx * my + SSIM_C1) * (2 * (xy - mx * my) + SSIM_C2)
    sizes = mx * mx + my * my
    return 1 - (top / ((sizes + SSIM_C1) * (xx + yy - sizes + SSIM_C2))).mean()


def picture_loss(
    picture: Tensor,  # [3, h, w] over a ground
    truth: Tensor,  # [3, h, w] over the same
) -> Tensor:
    """(1 - 0.4) L1 + 0.4 (1 - SSIM)."""
    pixels = (picture - truth).abs().mean()
    return (1 - SSIM_SHARE) * pixels + SSIM_SHARE * structure_loss(picture, truth)


def order_loss(
    splats: Splats,  # [n] on the template
    anchors: Tensor,  # [n, 3]
    units: Tensor,  # [n] metres, of the skin's triangles
) -> Tensor:
    """Squares of what is larger or farther from the skin than it should be, in units."""
    size = splats.log_scales.exp().amax(1) / units
    away = (splats.means - anchors).square().sum(1).clamp(min=1e-24).sqrt() / units
    large, far = (
        F.relu(v - most).square().mean() for v, most in ((size, LARGEST), (away, FARTHEST))
    )
    return LARGE * large + FAR * far
