"""Relative depth brought to a metric one: a scale and a shift a frame, robust, over the whole clip.

Stage: depth -> metres, before the points. MV-Performer aligns per-frame relative depth to a metric
one in closed form, by least squares over the performer. Departures: what lies off counts less
(Huber's weights, by iterated least squares), and the lines of neighbouring frames are held together,
because a scale that trembles makes a performer breathe. Depth nodes that stretch every frame to
black and white by itself tremble too: that is measured on the background, which stands still, and
undone first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .points import OrientedPoints, erode

ROUNDS = 12
HUBER = 1.345
"""Huber's constant for 95 % efficiency on clean Gaussian errors, in standard deviations."""
FARTHEST = 3.0
"""Standard deviations beyond which a point is left out."""
EXACT = 1e-4
"""Metres: errors below it are all the same, so that rounding makes no outliers."""
MAD_TO_DEVIATION = 1.4826
FEWEST = 8
"""Points in a frame below which its line comes from its neighbours alone."""
SAMPLES = 8192
"""Points of a frame that are looked at, by chance: two numbers need no more."""
TRIES, JUDGES = 200, 500
"""Lines through two points by chance, and points that judge them: where half of the points are bad,
200 pairs hold some 50 of two good ones."""
NEAREST, FARTHEST_METRES = 0.05, 1000.0
FLAT = 1e-6
"""Values that differ by less than this share of their size have no shape."""
BLANK = 0.004
"""Share of the range at its two ends: black and white may stand for nothing (one step of 8 bit)."""
STEADINESS = 1.0
"""A metric depth that is 2 % off a frame trembles by 10 cm at 0.1 and by 5 cm at 1; the shape, which
drifts with the pictures, loses a tenth of its depth."""
EDGE = 160
"""One pixel for so many of the picture's shorter side, at least two: depth nodes draw ramps at outlines.
Left in the fit, it flattened synthetic people to 42 % of their depth; without it, 97 %."""
CLEAR = 0.1
"""Share of a frame's points that must be clear of edges, or all of them count."""
LEAST_BACKGROUND = 0.02
"""Share of the picture below which the background tells nothing about a drift."""


@dataclass(frozen=True)
class Alignment:
    """What brought the clip to metres."""

    metres: Tensor
    """[F, H, W] along the optical axis; 0 = unknown."""
    scale: Tensor
    """[F] metres (or 1/metres, when the values are inverse depth) a unit of the values."""
    shift: Tensor
    """[F] metres or 1/metres."""
    error: Tensor
    """[F] median distance to the target in metres; NaN where a frame has none."""
    misfit: float
    """Mean distance in metres, outliers cut short: tells conventions apart where the median can't."""


def align_depth(
    values: Tensor,  # [F, H, W] relative: grows (or falls) with depth, or with 1/depth
    target: Tensor,  # [F, H, W] metres; not finite or <= 0 = unknown, may be sparse
    masks: Tensor,  # [F, H, W] 0..1, the performer
    inverse: bool = False,  # values go with 1/depth (disparity)
    steadiness: float = STEADINESS,  # 0 = every frame by itself
) -> Alignment:
    """scale * values + shift = target (or 1/target), solved for all frames together.

    `steadiness` weighs, against one frame's points, how far its line may lie from its neighbours',
    measured at the 10th and 90th percentile of the values.
    """
    inside = (masks > 0.5) & values.isfinite()
    known = inside & target.isfinite() & (target > 0)
    check_overlap(values, inside, known)
    gain, offset = drift(values, inside)
    chosen, picked = _sampled(_clear_of_edges(inside, known))
    d = values.flatten(1).gather(1, picked).double() * gain[:, None] + offset[:, None]
    z = torch.where(chosen, target.flatten(1).gather(1, picked).double(), 1.0)
    d = torch.where(chosen, d, 0.0)
    scale, shift = _robust_lines(d, z, chosen, inverse, steadiness)
    away = (_metres(scale[:, None] * d + shift[:, None], inverse) - z).abs()
    error = torch.where(chosen, away, torch.nan).nanmedian(1).values
    far = FARTHEST * MAD_TO_DEVIATION * away[chosen].median()
    misfit = float(away[chosen].clamp(max=far).mean())
    scale, shift = scale * gain, scale * offset + shift
    fitted = values * scale[:, None, None].to(values) + shift[:, None, None].to(values)
    metres = _metres(fitted, inverse)
    usable = inside & (fitted > 0) & (metres < FARTHEST_METRES)
    metres = torch.where(usable, metres.clamp(min=NEAREST), 0.0)
    return Alignment(metres.float(), scale.float(), shift.float(), error.float(), misfit)


def check_overlap(values: Tensor, inside: Tensor, known: Tensor) -> None:
    """One sentence where there is nothing to align."""
    if not inside.any():
        raise ValueError(
            "'depth' has no finite value inside the mask in any frame: check that depth and mask "
            "belong to the same clip, and that the mask shows the performer in white."
        )
    told = values[inside]
    if not float(told.max() - told.min()) > FLAT * max(float(told.abs().max()), 1e-12):
        raise ValueError(
            f"'depth' is {float(told[0]):.3g} all over the performer, so it has no shape: check that "
            "the depth node ran on these frames."
        )
    if known.sum() < FEWEST:
        raise ValueError(
            f"'depth' and the metric depth share {int(known.sum())} points inside the mask, but at "
            f"least {FEWEST} are needed: give a metric depth of the same clip that shows the "
            "performer."
        )


def _clear_of_edges(inside: Tensor, known: Tensor) -> Tensor:  # [F, H, W] bool
    """The known pixels without those at the mask's edge, where there are enough others."""
    clear = known & erode(inside, max(2, round(min(inside.shape[-2:]) / EDGE)))
    left, count = clear.sum((1, 2)), known.sum((1, 2))
    enough = (left >= FEWEST) & (left > CLEAR * count)
    return torch.where(enough[:, None, None], clear, known)


def _sampled(known: Tensor) -> tuple[Tensor, Tensor]:  # [F, n] bool, [F, n] places
    """Up to SAMPLES known pixels of every frame, the same ones every time."""
    flat = known.flatten(1)
    generator = torch.Generator().manual_seed(0)
    lots = torch.rand(flat.shape[1], generator=generator).to(known.device) * flat
    picked = lots.topk(min(SAMPLES, flat.shape[1]), dim=1).indices
    return flat.gather(1, picked), picked


def _metres(fitted: Tensor, inverse: bool) -> Tensor:
    return 1 / fitted.clamp(min=1e-6) if inverse else fitted


def _robust_lines(
    d: Tensor,  # [F, n]
    z: Tensor,  # [F, n] metres
    chosen: Tensor,  # [F, n] bool
    inverse: bool,
    steadiness: float,
) -> tuple[Tensor, Tensor]:  # [F], [F]
    """From what most points agree on: Huber's weights for what lies near."""
    wanted = 1 / z if inverse else z
    spots = _percentiles(d[chosen], (0.1, 0.9))
    fitted = z[chosen].median().expand_as(z)
    weights = _agreed(d, wanted, chosen, EXACT / fitted[0, 0] ** 2 if inverse else EXACT)
    for _ in range(ROUNDS):
        # An error e of 1/z is one of e z^2 metres; z as fitted, for a wrong target must not weigh.
        unit = fitted.square() if inverse else torch.ones_like(z)
        scale, shift = _solve(d, wanted, weights * unit.square(), chosen, spots, steadiness)
        line = scale[:, None] * d + shift[:, None]
        away = ((line - wanted) * unit).abs()
        spread = (MAD_TO_DEVIATION * away[chosen].median()).clamp(min=EXACT)
        weights = chosen * (HUBER * spread / away.clamp(min=1e-12)).clamp(max=1.0)
        # Far off in depth, even Huber's weight would turn the line.
        weights = weights * (away <= FARTHEST * spread)
        if inverse:
            fitted = 1 / line.clamp(min=1 / FARTHEST_METRES)
    return scale, shift


def _agreed(d: Tensor, wanted: Tensor, chosen: Tensor, exact: float) -> Tensor:  # [F, n]
    """1 for the points near the line that at least half of them are nearest to (least median).

    A coarse mask takes in some background; so far off in depth, it turns any line that starts out
    from all points.
    """
    generator = torch.Generator().manual_seed(0)
    weights = chosen.double()
    for f in (chosen.sum(1) >= FEWEST).nonzero()[:, 0].tolist():
        x, y = d[f, chosen[f]], wanted[f, chosen[f]]
        some = torch.randint(len(x), (2, TRIES), generator=generator).to(x.device)
        apart = x[some[0]] - x[some[1]]
        slope = (y[some[0]] - y[some[1]]) / torch.where(apart == 0, torch.inf, apart)
        offset = y[some[0]] - slope * x[some[0]]
        judges = slice(None, None, max(1, len(x) // JUDGES))
        medians = (slope * x[judges, None] + offset - y[judges, None]).abs().median(0).values
        best = medians.argmin()
        away = (slope[best] * x + offset[best] - y).abs()
        near = away <= FARTHEST * (MAD_TO_DEVIATION * medians[best]).clamp(min=exact)
        weights[f, chosen[f]] = near.double()
    return weights


def _percentiles(values: Tensor, shares: tuple[float, ...]) -> Tensor:
    order = values.sort().values  # torch.quantile refuses more than 16 million values
    return order[[int(share * (len(order) - 1)) for share in shares]]


def _solve(
    d: Tensor, wanted: Tensor, weights: Tensor, known: Tensor, spots: Tensor, steadiness: float
) -> tuple[Tensor, Tensor]:
    """[F] scale and [F] shift: one system of two equations a frame, as frames lean on their neighbours."""
    count = len(d)
    w, y = weights, wanted
    moments = [(w * d * d).sum(1), (w * d).sum(1), w.sum(1)]
    right = torch.stack([(w * d * y).sum(1), (w * y).sum(1)], 1)
    enough = known.sum(1) >= FEWEST
    own = torch.stack([*moments[:2], *moments[1:]], 1).view(count, 2, 2) * enough[:, None, None]
    total = moments[2].mean()
    system = torch.zeros(count, 2, count, 2, dtype=d.dtype, device=d.device)
    index = torch.arange(count, device=d.device)
    system[index, :, index] = own
    at = torch.stack([spots, torch.ones_like(spots)], 1)  # a line's values at the spots
    hold = at.T @ at / len(spots) * total
    # Frames without points follow their neighbours even when the others are free.
    share = torch.full((count - 1,), steadiness, dtype=d.dtype, device=d.device)
    share = torch.where(enough[1:] & enough[:-1], share, max(steadiness, 1e-3))
    part = share[:, None, None] * hold
    system[index[:-1], :, index[:-1]] += part
    system[index[1:], :, index[1:]] += part
    system[index[:-1], :, index[1:]] -= part
    system[index[1:], :, index[:-1]] -= part
    flat = system.view(2 * count, 2 * count)
    flat = flat + torch.eye(2 * count, dtype=d.dtype, device=d.device) * 1e-12 * total
    line = torch.linalg.solve(flat, (right * enough[:, None]).flatten()).view(count, 2)
    return line[:, 0], line[:, 1]


def drift(
    values: Tensor,  # [F, H, W]
    inside: Tensor,  # [F, H, W] bool, the performer
) -> tuple[Tensor, Tensor]:  # [F] gain, [F] offset, float64
    """gain * values + offset shows the background as in the first frame.

    From frame to frame a robust line through the background's values; no change where there is
    none, or where the frames' values are those of the clip (same black and white throughout).
    """
    count = len(values)
    gain, offset = torch.ones(count).double(), torch.zeros(count).double()
    told = values.flatten(1).double().nan_to_num(0, 0, 0)
    low, high = told.amin(), told.amax()
    room = BLANK * (high - low)
    behind = ~inside.flatten(1) & (told > low + room) & (told < high - room)
    for f in range(1, count):
        both = (behind[f] & behind[f - 1]).nonzero()[:, 0]
        a, b = 1.0, 0.0
        if len(both) > LEAST_BACKGROUND * told.shape[1]:
            both = both[:: max(1, len(both) // SAMPLES)]
            a, b = _line_through(told[f, both], told[f - 1, both])
        gain[f], offset[f] = gain[f - 1] * a, gain[f - 1] * b + offset[f - 1]
    return gain.to(values.device), offset.to(values.device)


def _line_through(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and offset of y over x, by least absolute distance (reweighted); a flat x has slope 1."""
    weights = torch.ones_like(x)
    for _ in range(ROUNDS):
        share = weights / weights.sum()
        mx, my = (share * x).sum(), (share * y).sum()
        spread = (share * (x - mx) ** 2).sum()
        slope = (share * (x - mx) * (y - my)).sum() / spread if spread > 1e-9 else x.new_tensor(1)
        away = (y - my - slope * (x - mx)).abs()
        weights = 1 / away.clamp(min=1e-4)
    if not 0.5 < float(slope) < 2:  # another shot, not another stretch
        return 1.0, 0.0
    return float(slope), float(my - slope * mx)


# ---------------------------------------------------------------- what to align with

UNDER_THE_SKIN = 0.05
"""Metres: how far a joint lies behind the surface that the camera sees, roughly."""
SURE = 0.3
"""A 2D keypoint less sure than this is none."""
NECK, HIPS, KNEES, ANKLES = 1, (8, 11), (9, 12), (10, 13)
"""OpenPose's numbers."""
NECK_TO_ANKLE, NECK_TO_HIPS = 0.78, 0.29
"""Shares of a grown-up's height, along the bones."""
STRETCH_WINDOW = 9
"""Frames over which the longest picture of the bones counts: a bone seen from its end is short."""


def cloud_depth(
    cloud: OrientedPoints,
    width: int,
    height: int,
) -> Tensor:  # [F, height, width] metres; 0 = no point
    """The seen points' depth in their own camera; the nearest wins."""
    seen = cloud.confidences > 0
    frame, points = cloud.frame_numbers()[seen], cloud.in_source(width, height)[seen]
    return _scattered(frame, points, cloud.frame_count, width, height)


def _scattered(frame: Tensor, points: Tensor, count: int, width: int, height: int) -> Tensor:
    """Homogeneous pixels [N, 3] (last: metres) as a sparse depth picture."""
    z = points[:, 2]
    x, y = ((points[:, i] / z.clamp(min=NEAREST)).floor() for i in (0, 1))
    shown = (z > NEAREST) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = ((frame * height + y.long()) * width + x.long())[shown]
    depth = z.new_full((count * height * width,), torch.inf)
    depth = depth.scatter_reduce(0, place, z[shown], "amin").view(count, height, width)
    return torch.where(depth.isfinite(), depth, 0.0)


def body_keypoint_depth(
    pose: dict,  # MHR_POSE_DATA: SAM 3D Body's people, frame by frame
    count: int,
    width: int,
    height: int,
    focal: float,  # pixels
) -> Tensor:  # [F, height, width] metres; 0 = no keypoint
    """The keypoints' depth at their pixels, brought from that node's lens to ours."""
    scale = torch.tensor([width / pose["image_size"][1], height / pose["image_size"][0]])
    frames, points = [], []
    for f, people in enumerate(pose["frames"][:count]):
        if not people:
            continue
        person = max(people, key=lambda p: float(_tensor(p["pred_keypoints_2d"])[:, 1].std()))
        xy = _tensor(person["pred_keypoints_2d"])[:, :2] * scale
        xyz = _tensor(person["pred_keypoints_3d"]) + _tensor(person["pred_cam_t"]).view(1, 3)
        across = xyz[:, :2] / xyz[:, 2:]
        lens = (xy - xy.mean(0)).norm() / (across - across.mean(0)).norm().clamp(min=1e-6)
        z = xyz[:, 2:] * focal / lens - UNDER_THE_SKIN
        points.append(torch.cat([xy * z, z], 1))
        frames.append(torch.full((len(z),), f))
    if not points:
        raise ValueError("'pose' shows nobody in any frame: check the node that made it.")
    points, frames = torch.cat(points), torch.cat(frames)
    good = points.isfinite().all(1)
    return _scattered(frames[good], points[good], count, width, height)


def _tensor(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).cpu()


def pose_distance(
    pose: list[dict],  # POSE_KEYPOINT: OpenPose's JSON, one a frame
    count: int,
    picture_height: int,  # pixels
    focal: float,  # pixels
    person_height: float,  # metres
) -> Tensor:  # [F] metres
    """How far the performer stands, from how long the bones from neck to ankle are in the picture."""
    lengths = torch.tensor([picture_height * _body_length(frame) for frame in pose[:count]])
    if not (lengths > 0).any():
        raise ValueError(
            "'pose' shows neck and hips in no frame: check the pose node, or align with another "
            "depth."
        )
    half = STRETCH_WINDOW // 2
    longest = F.max_pool1d(lengths[None], STRETCH_WINDOW, 1, half)[0]
    longest = torch.where(longest > 0, longest, longest[longest > 0].median())
    steady = F.avg_pool1d(longest[None], STRETCH_WINDOW, 1, half, count_include_pad=False)[0]
    return focal * person_height / steady


def _body_length(frame: dict) -> float:
    """The largest person's height when standing straight, as a share of the picture's; 0 = unknown."""
    width, height = (float(frame.get(f"canvas_{side}") or 1) for side in ("width", "height"))
    lengths = [0.0]
    for person in frame.get("people", []):
        joints = torch.tensor(person.get("pose_keypoints_2d") or [])[: 18 * 3].view(-1, 3)
        if len(joints) < 14:
            continue
        if float(joints[:, :2].max()) <= 2:  # shares of the canvas
            joints = joints * joints.new_tensor([width, height, 1.0])
        lengths.append(_person_length(joints) / height)
    return max(lengths)


def _person_length(joints: Tensor) -> float:  # [>= 14, 3] pixels, pixels, certainty
    def known(*which: int) -> bool:
        return bool((joints[list(which), 2] >= SURE).all())

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b)[:2].norm())

    if not known(NECK, *HIPS):
        return 0.0
    hips = joints[list(HIPS)].mean(0)
    torso = apart(joints[NECK], hips)
    legs = [
        apart(joints[h], joints[k]) + apart(joints[k], joints[a])
        for h, k, a in zip(HIPS, KNEES, ANKLES, strict=True) if known(h, k, a)
    ]  # fmt: skip
    return (torso + max(legs)) / NECK_TO_ANKLE if legs else torso / NECK_TO_HIPS
