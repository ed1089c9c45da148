"""How close pictures, bodies and cameras come to the truth: the scoreboard's numbers.

Stage: after everything; nothing here is trained or downloaded. Pictures are [..., C, H, W] in 0..1,
regions [..., H, W] (bool, or weights 0..1; None = everywhere). Every function returns one number
over all views and frames, so the order of views never counts. An empty region gives NaN: there is
nothing to judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Rig
from .points import unproject_depth


def _weights(
    pictures: Tensor,  # [..., C, H, W]
    where: Tensor | None,  # [..., H, W]
) -> Tensor:  # [N, H, W]
    """The region as weights, one picture after another."""
    H, W = pictures.shape[-2:]
    if where is None:
        return pictures.new_ones(pictures[..., 0, 0, 0].numel(), H, W)
    if where.shape != pictures.shape[:-3] + (H, W):
        raise ValueError(
            f"The region has shape {list(where.shape)} but the pictures "
            f"{list(pictures.shape)}: give one mask a picture, of the same size."
        )
    return where.to(pictures.dtype).reshape(-1, H, W)


def _check_pair(result: Tensor, truth: Tensor) -> None:
    if result.shape != truth.shape:
        raise ValueError(
            f"The result has shape {list(result.shape)} but the truth {list(truth.shape)}: "
            "compare pictures of the same views, frames and size."
        )


def _mean(values: Tensor, weights: Tensor) -> float:
    total = float(weights.double().sum())
    return float((values.double() * weights).sum()) / total if total > 0 else math.nan


def decibels(rmse: float) -> float:
    """Root mean square error (of values 0..1) as peak signal-to-noise ratio, -20 log10(rmse)."""
    return math.nan if math.isnan(rmse) else -20 * math.log10(rmse) if rmse > 0 else math.inf


def psnr(
    result: Tensor,  # [..., C, H, W]
    truth: Tensor,
    where: Tensor | None = None,  # [..., H, W]
) -> float:  # dB
    """Peak signal-to-noise ratio, 10 log10(1 / mean squared error), over the pixels of a region.

    The error is averaged over all pictures first, so one bad view cannot hide behind a perfect one.
    """
    _check_pair(result, truth)
    weights = _weights(result, where)
    error = (result - truth).square().mean(-3).reshape(weights.shape)
    return decibels(math.sqrt(_mean(error, weights)))


SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def _blur(pictures: Tensor) -> Tensor:  # [N, C, H, W]
    """Gaussian mean of 11 x 11 pixels; the border is repeated outwards."""
    reach = SSIM_WINDOW // 2
    x = torch.arange(-reach, reach + 1, dtype=pictures.dtype, device=pictures.device)
    kernel = torch.exp(-x.square() / (2 * SSIM_SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(pictures.shape[1], 1, 1, -1)
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(across, kernel.mT, groups=len(kernel))


def ssim(
    result: Tensor,  # [..., C, H, W]
    truth: Tensor,
    where: Tensor | None = None,  # [..., H, W]
) -> float:  # 1 = equal
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004, eq. 13): the mean over a region of

    (2 mx my + C1)(2 sxy + C2) / ((mx² + my² + C1)(sx² + sy² + C2)), with means, variances and
    covariance under a Gaussian of sigma 1.5 in 11 x 11 pixels, C1 = 0.01², C2 = 0.03², per channel.
    """
    _check_pair(result, truth)
    x, y = (p.reshape(-1, *p.shape[-3:]).double() for p in (result, truth))
    mx, my = _blur(x), _blur(y)
    sx, sy, sxy = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    top = (2 * mx * my + SSIM_C1) * (2 * sxy + SSIM_C2)
    bottom = (mx.square() + my.square() + SSIM_C1) * (sx + sy + SSIM_C2)
    return _mean((top / bottom).mean(1), _weights(result, where))


HAAR_C, HAAR_ALPHA = 30.0, 4.2
"""The constants of the paper, for values 0..255."""
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def _same(pictures: Tensor, kernel: Tensor) -> Tensor:  # [N, 1, H, W], [k, k]
    """Zero-padded correlation of the pictures' own size, for kernels of even edge."""
    k = kernel.shape[-1]
    padded = F.pad(pictures, ((k - 1) // 2, k // 2) * 2)
    return F.conv2d(padded, kernel[None, None])


def _haar(luma: Tensor) -> Tensor:  # [N, 1, H, W] -> [N, 2, 3, H, W]
    """Magnitudes of the Haar coefficients: orientation, then scale from fine to coarse."""
    scales = []
    for scale in (1, 2, 3):
        edge = 2**scale
        kernel = luma.new_full((edge, edge), 2.0**-scale)
        kernel[: edge // 2] *= -1
        scales.append(torch.cat([_same(luma, kernel), _same(luma, kernel.T)], 1).abs())
    return torch.stack(scales, 2)


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (2 * a * b + HAAR_C) / (a.square() + b.square() + HAAR_C)


def haarpsi(
    result: Tensor,  # [..., 3, H, W]
    truth: Tensor,
    where: Tensor | None = None,  # [..., H, W]
) -> float:  # 1 = equal
    """Haar wavelet-based perceptual similarity index (Reisenhofer, Bosse, Kutyniok, Wiegand 2018).

    l^-1( sum_k W_k l(HS_k) / sum_k W_k )², l the logistic function with alpha = 4.2. Per
    orientation, HS is the mean likeness (2ab + C)/(a² + b² + C), C = 30, of the Haar coefficients of
    luma at the two finest scales, and W the larger coefficient of the third; I and Q of YIQ,
    averaged over 2 x 2, are a third channel with the mean weight (eq. 10-14 of the paper). After
    halving the pictures, as the authors do. A region multiplies the weights.
    """
    _check_pair(result, truth)
    H, W = result.shape[-2:]
    region = F.avg_pool2d(_weights(result, where)[:, None].double(), 2, ceil_mode=True)
    matrix = torch.tensor(YIQ, dtype=torch.float64, device=result.device)
    box = torch.full((2, 2), 0.25, dtype=torch.float64, device=result.device)

    def channels(pictures: Tensor) -> list[Tensor]:
        yiq = torch.einsum("ac,nchw->nahw", matrix, 255 * pictures.reshape(-1, 3, H, W).double())
        return [_same(yiq[:, c : c + 1], box)[..., ::2, ::2] for c in range(3)]

    x, y = channels(result), channels(truth)
    a, b = _haar(x[0]), _haar(y[0])
    likeness = _alike(a[:, :, :2], b[:, :, :2]).mean(2)
    # Where both are flat the paper's weights vanish; this keeps the index defined there.
    weights = torch.maximum(a[:, :, 2], b[:, :, 2]) + 1e-6
    chroma = [_alike(_same(x[c], box).abs(), _same(y[c], box).abs()) for c in (1, 2)]
    likeness = torch.cat([likeness, sum(chroma) / 2], 1)
    weights = torch.cat([weights, weights.mean(1, keepdim=True)], 1) * region
    mean = _mean(torch.sigmoid(HAAR_ALPHA * likeness), weights)
    return math.nan if math.isnan(mean) else (math.log(mean / (1 - mean)) / HAAR_ALPHA) ** 2


def mask_iou(
    result: Tensor,  # [..., H, W] bool or 0..1
    truth: Tensor,
) -> float:  # 1 = equal
    """Intersection over union of two masks (Jaccard index), cut at one half."""
    _check_pair(result, truth)
    a, b = result > 0.5, truth > 0.5
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else math.nan


def normal_angle(
    result: Tensor,  # [..., 3, H, W] any length
    truth: Tensor,
    where: Tensor | None = None,  # [..., H, W]
) -> float:  # degrees
    """Mean angle between two fields of normals, in the same axes; pixels without a normal are left
    out (arctan2 of cross and dot product, which is exact for small angles too)."""
    _check_pair(result, truth)
    cross = torch.linalg.cross(result.double(), truth.double(), dim=-3).norm(dim=-3)
    dot = (result.double() * truth.double()).sum(-3)
    known = (result.norm(dim=-3) > 1e-6) & (truth.norm(dim=-3) > 1e-6)
    weights = _weights(result, where) * known.reshape(-1, *known.shape[-2:])
    angle = torch.rad2deg(torch.atan2(cross, dot)).reshape(weights.shape)
    return _mean(angle, weights)


def depth_errors(
    result: Tensor,  # [..., H, W] metres
    truth: Tensor,  # [..., H, W] metres
    where: Tensor,  # [..., H, W] bool, where both are known
) -> tuple[float, float]:
    """Mean relative error: after scaling to the true median (shape alone), and as it is (metric)."""
    _check_pair(result, truth)
    d, t = result[where], truth[where]
    if not len(d):
        return math.nan, math.nan
    scaled = d * (t.median() / d.median())
    return float(((scaled - t).abs() / t).mean()), float(((d - t).abs() / t).mean())


@dataclass(frozen=True)
class KeypointError:
    """How far keypoints lie from the truth."""

    pixels: float
    """Mean distance."""
    share: float
    """Mean distance as a share of the body's height in the same picture."""


def keypoint_error(
    result: Tensor,  # [..., J, 2] pixels
    truth: Tensor,  # [..., J, 2]
    heights: Tensor,  # [...] pixels: the body's height in each picture
    visible: Tensor | None = None,  # [..., J] 0..1 or bool
) -> KeypointError:
    """Mean end-point error of keypoints, in pixels and by body height (so that size doesn't count)."""
    _check_pair(result, truth)
    away = (result - truth).norm(dim=-1)
    weights = torch.ones_like(away) if visible is None else visible.to(away.dtype)
    return KeypointError(
        _mean(away, weights), _mean(away / heights.clamp(min=1e-6)[..., None], weights)
    )


def sample(
    pictures: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, h, w] pixels, centres at +0.5
    y: Tensor,
) -> Tensor:  # [N, C, h, w]
    """Bilinear reading; the border is repeated outwards."""
    H, W = pictures.shape[-2:]
    grid = torch.stack([2 * x / W - 1, 2 * y / H - 1], -1).to(pictures.dtype)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _pixel_grid(pictures: Tensor) -> tuple[Tensor, Tensor]:
    H, W = pictures.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(H, device=pictures.device) + 0.5,
        torch.arange(W, device=pictures.device) + 0.5,
        indexing="ij",
    )
    return x, y


def flicker(
    frames: Tensor,  # [V, F, C, H, W]
    flow: Tensor,  # [V, F - 1, 2, H, W] pixels (x, y) that a point of frame f moves until f + 1
    where: Tensor | None = None,  # [V, F - 1, H, W] points of frame f that are seen in f + 1 too
) -> float:  # 0 = the colours travel with the surface
    """Warping error between neighbouring frames (Lai et al. 2018, "Learning blind video temporal
    consistency", eq. 10, as a root): RMS of frame f at p minus frame f + 1 at p + flow(p)."""
    if (
        flow.shape[:2] != (frames.shape[0], frames.shape[1] - 1)
        or flow.shape[-2:] != (frames.shape[-2:])
    ):
        raise ValueError(
            f"The flow has shape {list(flow.shape)} but the video {list(frames.shape)}: give one "
            "flow for each pair of neighbouring frames, of the video's size."
        )
    now, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
    x, y = _pixel_grid(now)
    dx, dy = flow.flatten(0, 1).unbind(1)
    x, y = x + dx, y + dy
    H, W = now.shape[-2:]
    inside = (x > 0) & (x < W) & (y > 0) & (y < H)
    weights = _weights(frames[:, :-1], where) * inside
    return math.sqrt(_mean((now - sample(after, x, y)).square().mean(1), weights))


DEPTH_TOLERANCE = 0.02
"""Metres: a point is the same surface when the other camera's depth agrees this closely."""


def corresponding(
    depth: Tensor,  # [F, H, W] metres of one view; 0 = nothing
    depth_other: Tensor,  # [F, H, W] of the other
    rig: Rig,  # of the two
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:  # x, y [F, H, W] in the other view; whether both see it
    """Where the other view shows the surface points of one view: unproject, move, project, z-test."""
    H, W = depth.shape[-2:]
    (K, K_other), (T, T_other) = rig.K, rig.T_camera_world
    T_other_one = T_other @ torch.linalg.inv(T)
    points = unproject_depth(depth, K).movedim(1, -1) @ T_other_one[:3, :3].T + T_other_one[:3, 3]
    z = points[..., 2]
    pixels = points @ K_other.T / z.clamp(min=1e-6)[..., None]
    x, y = pixels[..., 0], pixels[..., 1]
    # All four pixels that bilinear reading mixes must show this surface.
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    both = (depth > 0) & (z > 0) & (left >= 0) & (top >= 0) & (left < W - 1) & (top < H - 1)
    flat = depth_other.flatten(1)
    for i in (0, 1):
        for j in (0, 1):
            index = (top + j).clamp(0, H - 1).long() * W + (left + i).clamp(0, W - 1).long()
            there = flat.gather(1, index.flatten(1)).view_as(depth)
            both &= (there > 0) & ((there - z).abs() < tolerance)
    return x, y, both


@dataclass(frozen=True)
class CrossView:
    """How well views agree about the colour of the surface that both see."""

    rmse: float
    """0..1."""
    psnr: float
    """The same in dB."""
    pairs: int
    """Surface points that were compared."""


def cross_view_consistency(
    frames: Tensor,  # [V, F, C, H, W]
    depth: Tensor,  # [V, F, H, W] true metres along each optical axis; 0 = nothing
    rig: Rig,
    where: Tensor | None = None,  # [V, F, H, W] pixels to start from
    tolerance: float = DEPTH_TOLERANCE,  # metres
) -> CrossView:
    """Reprojection error of co-visible surface: each view's colour at a pixel against the colour that
    every other view shows at the same surface point, found through depth and cameras. A point counts
    when the other view's depth agrees within `tolerance` at all four pixels around it."""
    V = len(frames)
    error, count = 0.0, 0
    for v in range(V):
        for w in range(V):
            if v == w:
                continue
            x, y, both = corresponding(depth[v], depth[w], rig.select([v, w]), tolerance)
            if where is not None:
                both = both & (where[v] > 0.5)
            away = (frames[v] - sample(frames[w], x, y)).square().mean(1)
            error += float(away[both].double().sum())
            count += int(both.sum())
    rmse = math.sqrt(error / count) if count else math.nan
    return CrossView(rmse, decibels(rmse), count)
