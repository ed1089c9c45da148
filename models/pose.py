"""Pose: a performer's keypoints in space over time, from what the cameras of a rig saw of them.

Stage: views (or another node's keypoints) -> POSE -> refiner. `detect_keypoints` reads every view,
`triangulate` finds the places that the views agree on, `smooth_motion` takes the noise out without
rounding off what is fast, `triangulated_pose` does both.

Frames: world of the pack (x right, y down, z forward, metres); pixels with centres at +0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cameras import Rig
from .human_frames import OPENPOSE18, OPENPOSE_BONES, Looking, estimate_humans
from .human_net import CROP, HEAT_STRIDE, HumanNet, crop_frames, soft_argmax, to_frame
from .performer_truth import project_keypoints
from .views import Views, as_pictures

BONES = tuple((OPENPOSE18[a], OPENPOSE18[b]) for a, b in OPENPOSE_BONES)
"""What a picture of a skeleton joins, by name."""


@dataclass(frozen=True)
class Pose:
    """P keypoints of one performer over F frames."""

    points: Tensor
    """[F, P, 3] world, metres: triangulated and smoothed."""
    found: Tensor
    """[F, P] 0..1; 0 = not known (points then hold a filled-in place)."""
    pixels: Tensor | None
    """[V, F, P, 2] what was seen in every view, centres at +0.5; None = a driving motion alone."""
    sure: Tensor | None
    """[V, F, P] 0..1; 0 = not seen (pixels then mean nothing)."""
    names: tuple[str, ...]
    """P names, those of performer_truth.KEYPOINTS where they are the same spot."""

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[-1] != 3 or not self.points.numel():
            raise ValueError(
                "A pose needs points of shape [frames, keypoints, 3], got "
                f"{list(self.points.shape)}: its source holds no keypoints."
            )
        F, P, _ = self.points.shape
        if tuple(self.found.shape) != (F, P) or len(self.names) != P:
            raise ValueError(
                f"A pose of {P} keypoints in {F} frames needs as many confidences and names, got "
                f"{list(self.found.shape)} and {len(self.names)}."
            )
        if (self.pixels is None) != (self.sure is None):
            raise ValueError("A pose holds both pixels and their confidences, or neither.")
        if self.pixels is not None:
            shape = (len(self.pixels), F, P)
            if tuple(self.pixels.shape) != (*shape, 2) or tuple(self.sure.shape) != shape:
                raise ValueError(
                    f"A pose of {P} keypoints in {F} frames needs pixels of shape [views, {F}, "
                    f"{P}, 2] and confidences of shape [views, {F}, {P}], got "
                    f"{list(self.pixels.shape)} and {list(self.sure.shape)}."
                )
        if not all(part.isfinite().all() for part in self._comfy_cache_tensors()):
            raise ValueError("A pose holds NaN or infinity: check the node that made it.")
        for part in (self.found, self.sure):
            if part is not None and part.numel() and (part.min() < 0 or part.max() > 1):
                raise ValueError(
                    f"Confidences of a pose lie between 0 and 1, got {float(part.min()):.2f} to "
                    f"{float(part.max()):.2f}."
                )

    def _comfy_cache_tensors(self) -> list[Tensor]:
        parts = (self.points, self.found, self.pixels, self.sure)
        return [part for part in parts if part is not None]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


# --- what the views show --------------------------------------------------------------------------

TAUGHT_SPREAD = 1.2 * HEAT_STRIDE * math.sqrt(2)
"""Pixels of the crop: root mean square radius of the spots that the human net was taught to draw.
What its maps are wider than that, it does not know."""
HALF_SURE = 4.0
"""Pixels of the crop by which a map is too wide when its keypoint is half as sure."""
PEAK_REACH = 2
"""Cells around the highest one that tell the place: the mean of the whole map lies between two
hands when the net wavers between them."""
CHUNK = 8
"""Crops in one batch."""

Step = Callable[..., None]


class Detected(NamedTuple):
    """What was seen in V views of F frames."""

    pixels: Tensor
    """[V, F, P, 2]."""
    sure: Tensor
    """[V, F, P] 0..1; 0 = not seen."""
    boxes: Tensor
    """[V, F, 4] crops, for human_net.estimate_keypoints."""
    present: Tensor
    """[V, F] bool: somebody is there."""


def read_heat(
    heat: Tensor,  # [B, P, h, w] logits
) -> tuple[Tensor, Tensor]:  # pixels of the crop [B, P, 2], how sure [B, P] 0..1
    """The place of every map's peak, and how sure it is: one over its variance beyond the taught.

    The net's own confidence says whether a keypoint is in view, which tells nothing of how far off
    it is (rank correlation with the error 0.0 and -0.2); the width of the map does (0.7 and 0.6).
    """
    h, w = heat.shape[-2:]
    top = heat.flatten(2).argmax(-1)
    row, column = torch.arange(h, device=heat.device), torch.arange(w, device=heat.device)
    near_row = (row - (top // w)[..., None]).abs() <= PEAK_REACH
    near_column = (column - (top % w)[..., None]).abs() <= PEAK_REACH
    near = near_row[..., :, None] & near_column[..., None, :]
    place, _ = soft_argmax(heat.masked_fill(~near, -torch.inf), HEAT_STRIDE)
    middle, share = soft_argmax(heat, HEAT_STRIDE)
    x, y = ((cells + 0.5) * HEAT_STRIDE for cells in (column, row))
    variance = share.sum(-2) @ (x * x) + share.sum(-1) @ (y * y) - middle.square().sum(-1)
    return place, 1 / (1 + (variance - TAUGHT_SPREAD**2).clamp(min=0) / HALF_SURE**2)


@torch.no_grad()
def detect_keypoints(
    net: HumanNet,
    views: Views,
    device: torch.device | None = None,
    on_step: Step | None = None,  # done, total, preview
) -> Detected:
    """Keypoints (KEYPOINTS) of the largest person in every view, each view followed on its own."""
    count = views.frames.shape[1]
    H, W = views.frames.shape[-2:]
    found: list[Detected] = []
    for v in range(len(views)):
        frames = as_pictures(views, v)
        whole = frames.isfinite().flatten(1).all(1)
        frames = frames.nan_to_num(0.5)

        def step(done: int, total: int, preview: Tensor | None = None, before=3 * count * v):
            if on_step:
                on_step(before + done, 3 * count * len(views), preview)

        # Where the performer is does not depend on the lens; the distance, which does, is unused.
        humans = estimate_humans(net, frames, float(H), Looking(refine=False), None, device, step)
        parts = []
        for some in torch.arange(count).split(CHUNK):
            shown, boxes = (t[some].to(device or t.device) for t in (frames, humans.boxes))
            place, sure = read_heat(net(crop_frames(shown.float(), boxes, *CROP)).heat.float())
            parts.append((to_frame(place, boxes, CROP).cpu(), sure.cpu()))
            step(2 * count + int(some[-1]) + 1, 0, shown[-1])
        pixels, sure = (torch.cat(part) for part in zip(*parts, strict=True))
        inside = ((pixels >= 0) & (pixels < pixels.new_tensor([W, H]))).all(-1)
        present = humans.present & whole.cpu()
        found.append(Detected(pixels, sure * inside * present[:, None], humans.boxes, present))
    return Detected(*(torch.stack(part) for part in zip(*found, strict=True)))


def openpose_keypoints(
    frames: list[dict],  # POSE_KEYPOINT: OpenPose's JSON, V * F frames, view by view
    views: int,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:  # pixels [V, F, 18, 2], sure [V, F, 18]
    """The largest person's 18 body points (OPENPOSE18) in every picture."""
    joints = torch.stack([_largest_person(frame, width, height) for frame in frames])
    return _seen(joints, views)


def _largest_person(frame: dict, width: int, height: int) -> Tensor:  # [18, 3]
    """x, y in pixels of the views, and how sure; zeros where nobody is."""
    canvas = [float(frame.get(f"canvas_{side}") or 0) for side in ("width", "height")]
    best, largest = torch.zeros(18, 3), 0.0
    for person in frame.get("people") or []:
        joints = torch.tensor(person.get("pose_keypoints_2d") or [], dtype=torch.float32)
        joints = joints[: len(joints) // 3 * 3].view(-1, 3)
        if len(joints) == 25:  # OpenPose's newer body: the middle of the hips is number 8
            joints = torch.cat([joints[:8], joints[9:]])
        joints = joints[:18]
        known = joints.isfinite().all(1) & (joints[:, 2] > 0)
        if len(joints) < 18 or not known.any():
            continue
        if float(joints[known, :2].max()) <= 2:  # shares of the canvas
            scale = (width, height)
        else:
            scale = (width / (canvas[0] or width), height / (canvas[1] or height))
        joints = joints * joints.new_tensor([*scale, 1.0])
        extent = joints[known, :2].amax(0) - joints[known, :2].amin(0)
        if float(extent.norm()) >= largest:
            best, largest = joints, float(extent.norm())
    return best


MHR_POINTS = {
    "nose": 0, "eye.L": 1, "eye.R": 2, "ear.L": 3, "ear.R": 4, "shoulder.L": 5, "shoulder.R": 6,
    "elbow.L": 7, "elbow.R": 8, "hip.L": 9, "hip.R": 10, "knee.L": 11, "knee.R": 12, "ankle.L": 13,
    "ankle.R": 14, "toe.L": 15, "toe.R": 18, "wrist.R": 41, "wrist.L": 62, "neck": 69,
}  # fmt: skip
"""SAM 3D Body's numbers of the points that the pack knows too."""


def sam3d_keypoints(
    pose: dict,  # MHR_POSE_DATA of V * F frames, view by view
    views: int,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:  # pixels [V, F, 20, 2], sure [V, F, 20]
    """The largest person's body points (MHR_POINTS) in every picture; all seen ones count alike."""
    if pose.get("image_size") is None or len(pose["image_size"]) != 2:
        raise ValueError("'pose' doesn't say the size of its pictures: run SAM 3D Body again.")
    tall, wide = (float(n) for n in pose["image_size"])
    order = list(MHR_POINTS.values())
    frames = []
    for people in pose["frames"]:
        best, largest = torch.zeros(len(order), 3), 0.0
        for person in people:
            points = torch.as_tensor(person.get("pred_keypoints_2d", []), dtype=torch.float32).cpu()
            if points.ndim != 2 or len(points) <= max(order):
                raise ValueError(
                    f"A person in 'pose' has {len(points)} keypoints in the picture, not the 70 of "
                    "SAM 3D Body: connect the pose data of SAM 3D Body itself."
                )
            points = points[order, :2] * points.new_tensor([width / wide, height / tall])
            extent = float((points.amax(0) - points.amin(0)).norm())
            if extent >= largest:
                best, largest = torch.cat([points, torch.ones(len(order), 1)], 1), extent
        frames.append(best)
    return _seen(torch.stack(frames), views)


def _seen(joints: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """[V * F, P, 3] as pixels and how sure; what is NaN was not seen."""
    good = joints.isfinite().all(-1, keepdim=True)
    joints = torch.where(good, joints, 0.0).unflatten(0, (views, -1))
    return joints[..., :2], joints[..., 2].clamp(0, 1)


# --- where the views agree ------------------------------------------------------------------------

SURE_FROM = 0.005
"""A keypoint less sure than this was not seen."""
NEAR = 0.05
"""Metres before a camera from which on things can be seen."""
SMALLEST_ANGLE = math.radians(5)
"""Two rays closer than this don't tell a distance: one pixel would move the point by decimetres."""
WIDEST, USUAL, FINEST = 0.25, 0.03, 0.004
"""Reprojection errors, share of the picture's height: with which the search starts, up to which
keypoints may be noisy, and which the best detectors stay above."""
OUTSIDE = 2.5
"""A view this many times farther off than the middle one counts a quarter."""


class Triangulated(NamedTuple):
    points: Tensor
    """[F, P, 3] world, metres; 0 where not found."""
    found: Tensor
    """[F, P] s / (1 + s), s = views that agree, each counted by how sure it is; 0 = fewer than two,
    or too small an angle between them."""
    error: Tensor
    """[V, F, P] pixels between what was seen and the point; 0 where nothing was seen."""


class _Cameras(NamedTuple):
    """A rig in double precision."""

    K: Tensor
    R: Tensor
    t: Tensor

    def see(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[F, P, 3] -> pixels [V, F, P, 2], their slopes [V, F, P, 2, 3], depth [V, F, P].

        Behind a camera the pixels are far out, so that no view agrees with what it can't see.
        """
        place = torch.einsum("vij,fpj->vfpi", self.R, points) + self.t[:, None, None]
        depth = place[..., 2]
        z = depth.clamp(min=NEAR)[..., None]
        pixels = torch.einsum("vij,vfpj->vfpi", self.K, place)[..., :2] / z
        KR = (self.K @ self.R)[:, None, None]
        return pixels, (KR[..., :2, :] - pixels[..., None] * KR[..., 2:, :]) / z[..., None], depth


def triangulate(
    pixels: Tensor,  # [V, F, P, 2]
    sure: Tensor,  # [V, F, P] 0..1, one over the variance, up to a factor
    rig: Rig,
) -> Triangulated:
    """Every keypoint's place: linear first, then the robust least squares of reprojection errors.

    Views that disagree lose their weight (Geman-McClure), from generous to strict, so that a wrong
    start doesn't decide; how strict follows from how well all keypoints of the clip agree.
    """
    kind = pixels.dtype
    good = pixels.isfinite().all(-1) & sure.isfinite()
    weights = torch.where(good & (sure > SURE_FROM), sure, 0.0).double()
    pixels = torch.where(good[..., None], pixels, 0.0).double()
    T = rig.T_camera_world.to(pixels)
    cameras = _Cameras(rig.K.to(pixels), T[:, :3, :3], T[:, :3, 3])
    points = _linear(pixels, weights, cameras)
    points = _descend(points, pixels, weights, cameras, WIDEST * rig.height, USUAL * rig.height)
    scale = _usual_error(points, pixels, weights, cameras) * OUTSIDE
    scale = min(max(scale, FINEST * rig.height), USUAL * rig.height)
    points = _descend(points, pixels, weights, cameras, USUAL * rig.height, scale, last=12)
    error, agree = _agreement(points, pixels, weights, cameras, scale)
    # Behind a camera there is no picture: an error there is no number.
    error = error.clamp(max=math.hypot(rig.width, rig.height)) * (weights > 0)
    weights = weights * agree
    enough = (((agree > 0.25) & (weights > 0)).sum(0) >= 2) & _crossing(points, weights, cameras)
    support = weights.sum(0) * enough
    points = torch.where(enough[..., None], points, 0.0)
    return Triangulated(points.to(kind), (support / (1 + support)).to(kind), error.to(kind))


def _linear(pixels: Tensor, weights: Tensor, cameras: _Cameras) -> Tensor:  # [F, P, 3]
    """The linear solution on normalised coordinates, reweighted to errors in the picture."""
    K, R, t = cameras
    flat = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)
    rays = torch.einsum("vij,vfpj->vfpi", K.inverse(), flat)[..., :2, None]
    A = R[:, None, None, :2, :] - rays * R[:, None, None, 2:, :]
    b = rays[..., 0] * t[:, None, None, 2:] - t[:, None, None, :2]
    W = weights
    for _ in range(3):
        points = _solve(A, b, W)
        depth = torch.einsum("vj,fpj->vfp", R[:, 2], points) + t[:, None, None, 2]
        W = weights / depth.clamp(min=NEAR).square()
    return points


def _solve(A: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Weighted least squares over views: [V, F, P, 2, 3], [V, F, P, 2], [V, F, P] -> [F, P, 3]."""
    M = torch.einsum("vfp,vfpki,vfpkj->fpij", weights, A, A)
    y = torch.einsum("vfp,vfpki,vfpk->fpi", weights, A, b)
    # What no view tells stays where it is.
    ridge = 1e-9 * M.diagonal(dim1=-1, dim2=-2).sum(-1) + 1e-12
    M = M + ridge[..., None, None] * torch.eye(3, dtype=M.dtype, device=M.device)
    return torch.linalg.solve(M, y[..., None])[..., 0]


def _descend(
    points: Tensor, pixels: Tensor, weights: Tensor, cameras: _Cameras,
    start: float, end: float, last: int = 4,
) -> Tensor:  # fmt: skip
    """Gauss-Newton steps while the error that counts as large, in pixels, halves down to `end`."""
    scale = start
    while True:
        for _ in range(last if scale == end else 3):
            seen, slopes, depth = cameras.see(points)
            away = pixels - seen
            step = _solve(slopes, away, weights * _weight(away, scale))
            reach = 0.25 * depth.clamp(min=NEAR).mean(0)[..., None]
            points = points + step * (
                reach / step.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            ).clamp(max=1)
        if scale == end:
            return points
        scale = max(end, scale / 2)


def _weight(away: Tensor, scale: float) -> Tensor:  # [V, F, P]
    """How much a view agrees: 1, a quarter at `scale` pixels."""
    return 1 / (1 + away.square().sum(-1) / scale**2).square()


def _usual_error(points: Tensor, pixels: Tensor, weights: Tensor, cameras: _Cameras) -> float:
    """The median error in pixels; fewer views fit closer, which is made up for."""
    seen, _, _ = cameras.see(points)
    views = (weights > 0).sum(0)
    free = (2 * views / (2 * views - 3).clamp(min=1)).sqrt()
    error = (pixels - seen).norm(dim=-1) * free
    error = error[(weights > 0) & (views >= 2)]
    return float(error.median()) if len(error) else 0.0


def _agreement(
    points: Tensor, pixels: Tensor, weights: Tensor, cameras: _Cameras, scale: float
) -> tuple[Tensor, Tensor]:  # error, weight: [V, F, P]
    seen, _, _ = cameras.see(points)
    away = pixels - seen
    return away.norm(dim=-1), _weight(away, scale) * (weights > 0)


def _crossing(points: Tensor, weights: Tensor, cameras: _Cameras) -> Tensor:  # [F, P] bool
    """Whether the rays that count cross at an angle that tells the distance."""
    centers = -(cameras.R.mT @ cameras.t[..., None])[..., 0]
    ray = torch.nn.functional.normalize(points - centers[:, None, None], dim=-1)
    M = weights.sum(0)[..., None, None] * torch.eye(3).to(ray)
    M = M - torch.einsum("vfp,vfpi,vfpj->fpij", weights, ray, ray)
    # The mean squared sine to the direction that fits all rays best: that of half the angle for two.
    least = torch.linalg.eigvalsh(M)[..., 0] / weights.sum(0).clamp(min=1e-12)
    return least > math.sin(SMALLEST_ANGLE / 2) ** 2


def project(points: Tensor, rig: Rig) -> Tensor:  # [F, P, 3] world -> [V, F, P, 2] pixels
    """Where keypoints fall on every picture."""
    return project_keypoints(points, rig)[0]


def epipolar_error(
    a: Tensor,  # [..., 2] pixels in the pair's first view
    b: Tensor,  # [..., 2] the same keypoints in the second
    pair: Rig,
) -> Tensor:  # [...] pixels
    """How far keypoints of two views are from being one point: the mean distance to each other's
    epipolar lines. For cameras side by side that look level, it is the difference in height."""
    K, T = pair.K.double(), pair.T_camera_world.double()
    turn = T[1] @ torch.linalg.inv(T[0])
    x, y, z = turn[:3, 3].tolist()
    cross = K.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    fundamental = torch.linalg.inv(K[1]).mT @ cross @ turn[:3, :3] @ torch.linalg.inv(K[0])
    fundamental = fundamental.to(a)
    first, second = (torch.cat([p, torch.ones_like(p[..., :1])], -1) for p in (a, b))
    in_second, in_first = first @ fundamental.mT, second @ fundamental
    apart = (second * in_second).sum(-1).abs()
    near, far = (line[..., :2].norm(dim=-1).clamp(min=1e-12) for line in (in_first, in_second))
    return (apart / near + apart / far) / 2


# --- over time ------------------------------------------------------------------------------------

RATIOS = torch.logspace(-5, 5, 21, dtype=torch.float64)
"""Variance of the motion's second difference over that of the noise: the choice."""
TAILS = 3.0
"""Degrees of freedom of both: low, so that an outlier is no noise and a kick no jitter."""
SHARED = 0.5
"""Share that all keypoints have in the evidence for one keypoint's ratio."""
ROUNDS = 6
UNKNOWN = 1e-10
"""Weight of a frame where a keypoint was not found, to that of its best frame."""
FEWEST = 4
"""Frames that tell noise from motion."""
WINDOW, OVERLAP = 120, 24
"""Frames that are smoothed at once: the cost grows with their third power."""


def smooth_motion(
    points: Tensor,  # [F, P, 3]
    found: Tensor,  # [F, P] 0..1, as `triangulate` gives it
) -> Tensor:  # [F, P, 3]
    """The likeliest motion behind noisy places; frames without a place are filled in.

    Noise and second differences are both taken to be heavy-tailed (Student's t), and how large each
    is, is chosen for every keypoint by the likelihood of the clip. So a still keypoint is held
    still, a fast one keeps its speed, and exact places stay. Looking both ways, it can't lag.
    """
    known = found > 0
    if not known.any():
        return points
    filled = _interpolated(points.double(), known)
    odds = (found / (1 - found).clamp(min=0.05)).double()
    # Squared: where few views agree, they are often wrong.
    weights = torch.where(known, odds.square(), 0.0)
    count = len(points)
    total, smooth = torch.zeros(count, 1, 1).to(filled), torch.zeros_like(filled)
    for at in range(0, max(1, count - OVERLAP), WINDOW - OVERLAP):
        part = slice(at, min(count, at + WINDOW))
        ramp = torch.arange(1, part.stop - at + 1).to(filled)
        share = torch.minimum(ramp, ramp.flip(0)).clamp(max=OVERLAP)[:, None, None]
        smooth[part] += share * _smoothed(filled[part], weights[part])
        total[part] += share
    # Beyond its first and last frame a keypoint rests; nothing says where it went.
    return _held(smooth / total, known).to(points.dtype)


def _smoothed(points: Tensor, weights: Tensor) -> Tensor:  # [F, P, 3], [F, P] -> [F, P, 3]
    """Places as they are where too few are known to tell noise from motion."""
    enough = (weights > 0).sum(0) >= FEWEST
    if not enough.any():
        return points
    seen, weights = points[:, enough].movedim(0, 1), weights[:, enough].mT  # [P, F, 3], [P, F]
    free = 3.0 * ((weights > 0).sum(1) - 2)
    weights = (weights / weights.amax(1, keepdim=True)).clamp(min=UNKNOWN)
    bend = torch.eye(len(points)).to(points).diff(dim=0).diff(dim=0)  # [F - 2, F]
    steady, calm = torch.ones_like(weights), torch.ones_like(weights[:, 2:])
    for _ in range(ROUNDS):
        motion, spread, ratio, variance = _likeliest(seen, weights * steady, calm, free, bend)
        # Squares as expected, with what is still unknown, or the weights would run away.
        noise = (seen - motion).square().sum(-1) + 3 * spread.diagonal(dim1=1, dim2=2)
        turns = (bend @ motion).square().sum(-1)
        turns = turns + 3 * (bend @ spread @ bend.mT).diagonal(dim1=1, dim2=2)
        steady = (TAILS + 3) / (TAILS + noise * weights / variance[:, None])
        calm = (TAILS + 3) / (TAILS + turns / (variance * ratio)[:, None])
    smooth = points.clone()
    smooth[:, enough] = motion.movedim(1, 0)
    return smooth


def _likeliest(
    seen: Tensor,  # [P, F, 3]
    weights: Tensor,  # [P, F] of what was seen, one over the variance of its noise, up to a factor
    calm: Tensor,  # [P, F - 2] of second differences, likewise
    free: Tensor,  # [P] numbers seen, less those of a straight motion
    bend: Tensor,  # [F - 2, F] second differences
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The motion [P, F, 3], its covariance [P, F, F] along one axis, and what makes the seen
    likeliest: the ratio [P] and the noise's variance [P]."""
    rough = bend.mT @ (calm[..., None] * bend)

    def solved(ratio: Tensor):  # [P] or [1]
        root = torch.linalg.cholesky(torch.diag_embed(weights) + rough / ratio[:, None, None])
        motion = torch.cholesky_solve(weights[..., None] * seen, root)
        misfit = (weights[..., None] * (seen - motion).square()).sum((1, 2))
        effort = (calm[..., None] * (bend @ motion).square()).sum((1, 2)) / ratio
        return root, motion, ((misfit + effort) / free).clamp(min=1e-14)

    likelihood = []
    for ratio in RATIOS.to(seen)[:, None]:
        root, _, variance = solved(ratio)
        volume = len(bend) * ratio.log() + 2 * root.diagonal(dim1=1, dim2=2).log().sum(1)
        # Where nothing speaks for noise, places stay.
        likelihood.append(-0.5 * (free * variance.log() + 3 * volume) + 1e-3 * ratio.log())
    likelihood = torch.stack(likelihood)  # [ratios, P]
    shared = likelihood.mean(1, keepdim=True)
    ratio = RATIOS.to(seen)[((1 - SHARED) * likelihood + SHARED * shared).argmax(0)]
    root, motion, variance = solved(ratio)
    return motion, torch.cholesky_inverse(root) * variance[:, None, None], ratio, variance


def _interpolated(points: Tensor, known: Tensor) -> Tensor:  # [F, P, 3]
    """Straight from one known frame to the next; a keypoint never known is the others' middle."""
    count = len(points)
    frame = torch.arange(count, device=points.device)[:, None].expand_as(known)
    before = torch.where(known, frame, -1).cummax(0).values
    after = torch.where(known, frame, count).flip(0).cummin(0).values.flip(0)
    before, after = (
        torch.where(before < 0, after, before),
        torch.where(after == count, before, after),
    )
    never = ~known.any(0)
    before, after = (index.masked_fill(never, 0) for index in (before, after))
    low, high = (points.gather(0, i[..., None].expand_as(points)) for i in (before, after))
    part = (frame - before) / (after - before).clamp(min=1)
    filled = low + (high - low) * part[..., None]
    if never.any():
        middle = filled[:, ~never].mean(1, keepdim=True)
        filled = torch.where(never[:, None], middle, filled)
    return filled


def _held(points: Tensor, known: Tensor) -> Tensor:
    """The first and last known place before and after them."""
    frame = torch.arange(len(points), device=points.device)[:, None]
    ever = known.any(0)
    first = torch.where(ever, known.int().argmax(0), 0)
    last = torch.where(ever, len(points) - 1 - known.flip(0).int().argmax(0), len(points) - 1)
    index = frame.maximum(first).minimum(last)
    return points.gather(0, index[..., None].expand_as(points))


def triangulated_pose(
    pixels: Tensor,  # [V, F, P, 2]
    sure: Tensor,  # [V, F, P]
    rig: Rig,
    names: tuple[str, ...],
) -> tuple[Pose, Triangulated]:
    """The pose, and what it was smoothed from."""
    if len(rig) < 2:
        raise ValueError(
            "There is one view, but places in space need at least two cameras that see the "
            "performer from different sides: give more views."
        )
    raw = triangulate(pixels, sure, rig)
    if not (raw.found > 0).any():
        raise ValueError(
            "No keypoint is seen alike by two views: nobody may be in them, the confidences may "
            "all be 0, or the rig may not be the one that the views were made with."
        )
    good = pixels.isfinite().all(-1) & sure.isfinite()
    pixels = torch.where(good[..., None], pixels, 0.0)
    sure = torch.where(good, sure, 0.0)
    return Pose(smooth_motion(raw.points, raw.found), raw.found, pixels, sure, names), raw
