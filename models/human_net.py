"""The human net: mask, depth, normals and keypoints of a performer from one picture.

Stage: before the geometry. A small encoder-decoder works on a crop of `CROP` pixels around the
performer; human_frames.py finds the crop in frames of any size and puts everything back.

Frames: pictures are [B, 3, H, W] in 0..1; keypoints in pixels, pixel centres at +0.5; normals in
the OpenCV camera frame (x right, y down, z away) of a camera aimed at the performer.
Soft-argmax: Sun et al. 2018, "Integral human pose regression"; it and the cropping carry gradients
from keypoints back to the picture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .performer_truth import KEYPOINTS

CROP = (160, 192)
"""Width and height of the crop that the net was trained on."""
STRIDE = 32
"""Sides of the net's input are multiples of this."""
WIDTHS = (24, 48, 96, 160, 160)
"""Channels at strides 2, 4, 8, 16, 32."""
HEAT_STRIDE = 4
CROP_MARGIN = 1.3
"""The crop is this much larger than the performer's box: a first look may miss a hand."""
MEDIAN_PIXELS_A_METRE = 70.0
"""Of the training crops: the net tells the ratio to it."""
MEAN_HEIGHT = 1.68
OUTSIDE = 0.5
"""Grey beyond the frame's edges, in training as well."""


class HumanOutput(NamedTuple):
    """What the net tells of a batch of crops [B, 3, H, W]."""

    mask: Tensor
    """[B, H, W] logits, the performer."""
    anyone: Tensor
    """[B, H, W] logits, any person."""
    relief: Tensor
    """[B, H/2, W/2] metres behind the performer's middle."""
    normals: Tensor
    """[B, 3, H/2, W/2] unit."""
    heat: Tensor
    """[B, P, H/4, W/4] logits of where each keypoint is."""
    keypoints: Tensor
    """[B, P, 2] pixels of the crop."""
    confidence: Tensor
    """[B, P] logits."""
    scale: Tensor
    """[B, 2] logarithms: pixels a metre at the performer's middle; height in metres."""


def soft_argmax(
    heat: Tensor,  # [B, P, h, w] logits
    stride: float,
) -> tuple[Tensor, Tensor]:  # [B, P, 2] pixels, [B, P, h, w] probabilities
    """The expected place under each map's softmax; differentiable."""
    h, w = heat.shape[-2:]
    share = heat.flatten(2).float().softmax(-1).view(heat.shape)
    y = (torch.arange(h, device=heat.device, dtype=share.dtype) + 0.5) * stride
    x = (torch.arange(w, device=heat.device, dtype=share.dtype) + 0.5) * stride
    return torch.stack([share.sum(-2) @ x, share.sum(-1) @ y], -1), share


def _groups(channels: int) -> int:
    return 8 if channels % 8 == 0 else 1


class ResBlock(nn.Module):
    """x + conv(act(conv(norm(x))))."""

    def __init__(self, channels: int, device=None, dtype=None, operations=nn) -> None:
        super().__init__()
        place = dict(device=device, dtype=dtype)
        self.norm = operations.GroupNorm(_groups(channels), channels, **place)
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1, **place)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1, **place)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Up(nn.Module):
    """Twice the size, the encoder's features of that size added."""

    def __init__(self, below: int, skip: int, out: int, device=None, dtype=None, operations=nn):
        super().__init__()
        place = dict(device=device, dtype=dtype)
        self.from_below = operations.Conv2d(below, out, 1, **place)
        self.from_skip = operations.Conv2d(skip, out, 1, **place)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(self.from_below(x), scale_factor=2, mode="bilinear")
        return x + self.from_skip(skip)


class HumanNet(nn.Module):
    """Encoder-decoder with one head a question; sides of the input are multiples of 32."""

    def __init__(
        self,
        widths: tuple[int, ...] = WIDTHS,
        keypoints: int = len(KEYPOINTS),
        device=None,
        dtype=None,
        operations=nn,
    ) -> None:
        super().__init__()
        place = dict(device=device, dtype=dtype, operations=operations)
        conv = dict(device=device, dtype=dtype)
        w2, w4, w8, w16, w32 = widths
        out4, out2 = max(8, w4 * 4 // 3), max(8, w2 * 4 // 3)
        self.stem = operations.Conv2d(5, w2, 5, stride=2, padding=2, **conv)
        self.down = nn.ModuleList(
            [
                operations.Conv2d(a, b, 3, stride=2, padding=1, **conv)
                for a, b in ((w2, w4), (w4, w8), (w8, w16), (w16, w32))
            ]
        )
        self.blocks = nn.ModuleList(
            [
                nn.ModuleList([ResBlock(width, **place) for _ in range(count)])
                for width, count in ((w4, 2), (w8, 2), (w16, 2), (w32, 1))
            ]
        )
        self.up16 = Up(w32, w16, w16, **place)
        self.up8, self.block8 = Up(w16, w8, w8, **place), ResBlock(w8, **place)
        self.up4, self.block4 = Up(w8, w4, out4, **place), ResBlock(out4, **place)
        self.up2 = Up(out4, w2, out2, **place)
        self.norm2 = operations.GroupNorm(_groups(out2), out2, **conv)
        self.fine = operations.Conv2d(out2, out2, 3, padding=1, **conv)
        self.surface = operations.Conv2d(out2, 4 + 1 + 1 + 3, 1, **conv)
        self.norm4 = operations.GroupNorm(_groups(out4), out4, **conv)
        self.joints = operations.Conv2d(out4, 2 * keypoints, 3, padding=1, **conv)
        self.scale1 = operations.Linear(w16 + w32, 64, **conv)
        self.scale2 = operations.Linear(64, 2, **conv)

    def features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Decoder features at strides 2, 4, and encoder features at 16, 32."""
        B, _, H, W = pictures.shape
        y = torch.linspace(-1, 1, H, device=pictures.device, dtype=pictures.dtype)
        x = torch.linspace(-1, 1, W, device=pictures.device, dtype=pictures.dtype)
        place = torch.stack([x.expand(H, W), y[:, None].expand(H, W)]).expand(B, -1, -1, -1)
        f2 = F.relu(self.stem(torch.cat([pictures * 2 - 1, place], 1)))
        skips, f = [], f2
        for down, blocks in zip(self.down, self.blocks, strict=True):
            f = down(f)
            for block in blocks:
                f = block(f)
            skips.append(f)
        f4, f8, f16, f32 = skips
        g16 = self.up16(f32, f16)
        g8 = self.block8(self.up8(g16, f8))
        g4 = self.block4(self.up4(g8, f4))
        return self.up2(g4, f2), g4, g16, f32

    def forward(self, pictures: Tensor) -> HumanOutput:
        H, W = pictures.shape[-2:]
        if H % STRIDE or W % STRIDE:
            raise ValueError(
                f"The human net takes sides that are multiples of {STRIDE}, not {W}x{H}: use "
                "estimate_humans for other sizes."
            )
        g2, g4, g16, f32 = self.features(pictures)
        fine = F.relu(self.fine(F.relu(self.norm2(g2))))
        surface = self.surface(fine).float()
        mask = F.pixel_shuffle(surface[:, :4], 2)[:, 0]
        anyone = F.interpolate(surface[:, 4:5], scale_factor=2, mode="bilinear")[:, 0]
        heat, sure = self.joints(F.silu(self.norm4(g4))).float().chunk(2, dim=1)
        keypoints, share = soft_argmax(heat, HEAT_STRIDE)
        # Where the performer is tells the size; the rest of the room does not.
        weight = F.adaptive_avg_pool2d(mask.detach().sigmoid()[:, None], g16.shape[-2:])
        on_body = (g16 * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-3)
        hidden = F.silu(self.scale1(torch.cat([on_body.to(f32), f32.mean((2, 3))], 1)))
        usual = MEDIAN_PIXELS_A_METRE * H / CROP[1]
        typical = hidden.new_tensor([usual, MEAN_HEIGHT]).float().log()
        return HumanOutput(
            mask=mask,
            anyone=anyone,
            relief=surface[:, 5] * 0.25,
            normals=F.normalize(surface[:, 6:9], dim=1, eps=1e-6),
            heat=heat,
            keypoints=keypoints,
            confidence=(share * sure).sum((2, 3)),
            scale=typical + self.scale2(hidden).float() * 0.5,
        )


def human_layout(weights: dict[str, Tensor]) -> tuple[tuple[int, ...], int]:
    """Widths and keypoints of the net that a file holds, or a sentence."""
    needed = ["stem.weight", "joints.weight", *(f"down.{i}.weight" for i in range(4))]
    if any(key not in weights for key in needed):
        raise ValueError(
            "This file is not a human net of Turnaround: choose turnaround_tiny_human.safetensors, "
            "or train one with train_human."
        )
    widths = (len(weights["stem.weight"]), *(len(weights[f"down.{i}.weight"]) for i in range(4)))
    return widths, len(weights["joints.weight"]) // 2


# --- crops ----------------------------------------------------------------------------------------


def crop_frames(
    frames: Tensor,  # [B, 3, H, W]
    boxes: Tensor,  # [B, 4] left, top, right, bottom in pixels; may reach beyond the frame
    width: int,
    height: int,
) -> Tensor:  # [B, 3, height, width]
    """Cut boxes out and scale them; grey beyond the frame. Differentiable in the frames."""
    H, W = frames.shape[-2:]
    crops = []
    for frame, box in zip(frames, boxes, strict=True):
        left, top, right, bottom = box.tolist()
        # Sampling single pixels of a large picture would flicker: shrink it first.
        shrink = max(1, round(min((right - left) / width, (bottom - top) / height) - 0.1))
        x0, x1 = (int(min(max(v, 0), W)) for v in (left - 2 * shrink, right + 2 * shrink + 1))
        y0, y1 = (int(min(max(v, 0), H)) for v in (top - 2 * shrink, bottom + 2 * shrink + 1))
        piece = frame[None, :, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        if piece.shape[-1] == 0 or piece.shape[-2] == 0:
            crops.append(frame.new_full((1, 3, height, width), OUTSIDE))
            continue
        h, w = piece.shape[-2:]
        if shrink > 1:
            h, w = max(1, round(h / shrink)), max(1, round(w / shrink))
            piece = F.interpolate(piece, (h, w), mode="area")
        sx, sy = w / max(1, x1 - x0), h / max(1, y1 - y0)
        grid = _grid((left - x0) * sx, (right - x0) * sx, (top - y0) * sy, (bottom - y0) * sy,
                     width, height, w, h, frame)  # fmt: skip
        known = F.grid_sample(torch.ones_like(piece[:, :1]), grid, align_corners=False)
        crop = F.grid_sample(piece, grid, padding_mode="border", align_corners=False)
        crops.append(OUTSIDE + (crop - OUTSIDE) * known)
    return torch.cat(crops)


def _grid(left, right, top, bottom, width: int, height: int, w: int, h: int, like: Tensor):
    """[1, height, width, 2] places of a box in a picture of w x h, as grid_sample wants them."""
    x = left + (torch.arange(width, device=like.device) + 0.5) * ((right - left) / width)
    y = top + (torch.arange(height, device=like.device) + 0.5) * ((bottom - top) / height)
    x, y = (2 * x / w - 1).to(like.dtype), (2 * y / h - 1).to(like.dtype)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)[None]


def paste(
    values: Tensor,  # [C, h, w] of the crop
    box: Tensor,  # [4]
    width: int,
    height: int,
) -> Tensor:  # [C, height, width]
    """Put a crop back into a frame; the crop's border goes on outside of the box."""
    left, top, right, bottom = box.tolist()
    # The frame as seen from the box, whose sides are 1.
    grid = _grid(-left / (right - left), (width - left) / (right - left),
                 -top / (bottom - top), (height - top) / (bottom - top),
                 width, height, 1, 1, values)  # fmt: skip
    return F.grid_sample(values[None], grid, padding_mode="border", align_corners=False)[0]


def inside_box(box: Tensor, width: int, height: int) -> Tensor:  # [height, width] bool
    left, top, right, bottom = box.tolist()
    x = torch.arange(width, device=box.device) + 0.5
    y = torch.arange(height, device=box.device)[:, None] + 0.5
    return (x > left) & (x < right) & (y > top) & (y < bottom)


def box_to_crop(
    box: Tensor,  # [4] around the performer
    margin: float = CROP_MARGIN,
) -> Tensor:  # [4] of the net's shape
    """The crop around a box, in the shape that the net works on."""
    width, height = box[2:] - box[:2]
    tall = margin * max(float(height), float(width) * CROP[1] / CROP[0], 4.0)
    half = torch.tensor([tall * CROP[0] / CROP[1], tall], device=box.device) / 2
    centre = (box[2:] + box[:2]) / 2
    return torch.cat([centre - half, centre + half])


def estimate_keypoints(
    net: HumanNet,
    frames: Tensor,  # [B, 3, H, W]
    boxes: Tensor,  # [B, 4] crops, as `Humans.boxes`
) -> tuple[Tensor, Tensor]:  # pixels of the frame [B, P, 2], confidence [B, P] 0..1
    """Keypoints with gradients back to the frames."""
    out = net(crop_frames(frames, boxes, *CROP))
    return to_frame(out.keypoints, boxes, CROP), out.confidence.sigmoid()


def to_frame(points: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, P, 2] pixels of the crop as pixels of the frame."""
    scale = (boxes[:, 2:] - boxes[:, :2]) / boxes.new_tensor(size)
    return boxes[:, None, :2] + points * scale[:, None]
