"""Flow: where every picture point of a clip lies in the next frame, and in the one before.

Frames: pixels of the picture, x right, y down, centres at +0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flow_both_ways(pictures: Tensor, cv2) -> tuple[Tensor, Tensor]:
    """OpenCV's DIS flow of one view's pictures [F, 3, h, w], forwards and backwards [F - 1, 2, h, w]."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = (pictures.mean(1) * 255).round().clamp(0, 255).byte().cpu().numpy()
    pairs = list(zip(grey[:-1], grey[1:], strict=True))
    ways = [
        torch.stack([torch.from_numpy(dis.calc(*order, None)) for order in orders])
        for orders in (pairs, [(b, a) for a, b in pairs])
    ]
    there, back = (way.movedim(-1, 1).to(pictures) for way in ways)
    return there, back
