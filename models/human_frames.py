"""People in frames: the human net on clips of any size, one performer followed through all frames.

Stage: before the geometry, from pictures alone. `estimate_humans` finds the performer in each
frame, cuts a steady crop, asks the net (human_net.py) and puts everything back into the frame's
pixels and camera.

Depth: the net tells the relief (metres before and behind the performer's middle) and how many
pixels of the crop a metre spans there. The distance follows from the camera: focal length in pixels
over pixels a metre. So it is as metric as the focal length is right and the performer as tall as
the net believes; a known height corrects the latter.

Frames: keypoints in pixels, pixel centres at +0.5; depth along the optical axis and normals of the
frame's own camera, OpenCV axes (x right, y down, z away).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip_masks import refine_masks
from .human_net import (
    CROP,
    MEAN_HEIGHT,
    STRIDE,
    HumanNet,
    box_to_crop,
    crop_frames,
    inside_box,
    paste,
    to_frame,
)
from .performer_truth import COCO17, KEYPOINTS
from .points import unproject_depth

LOOKS = (96, 160, 256)
"""Longer sides of the frame in the first look for people: large bodies are best known from small
pictures, small ones from large pictures; the answers' logits are averaged."""
SECOND_CROP = (96, 96)
"""Width and height of the crop that is asked for the mask beside `CROP`, for the same reason."""
SMALLEST_PERSON = 0.0008
"""Share of the frame that anybody must fill to be one."""
ONE_COLOUR = 2 / 255
"""Standard deviation below which a frame shows nobody: the net takes the edge between a black frame
and the grey around it for people."""

Choice = Literal["largest", "centre", "from the left"]
CHOICES: tuple[Choice, ...] = ("largest", "centre", "from the left")


def find_people(
    mask: Tensor,  # [h, w] 0..1
    smallest: float = SMALLEST_PERSON,
) -> list[Tensor]:
    """Connected parts of a mask, largest first: [5] left, top, right, bottom, pixels."""
    inside = (mask > 0.5).float()
    h, w = mask.shape
    number = torch.arange(1, h * w + 1, device=mask.device, dtype=torch.float32).view(h, w)
    label = number * inside
    for _ in range(8 * (h + w)):  # enough for any limb that winds
        spread = F.max_pool2d(label[None, None], 5, 1, 2)[0, 0] * inside
        if torch.equal(spread, label):
            break
        label = spread
    people = []
    names, counts = label[label > 0].unique(return_counts=True)
    big = counts >= max(1, smallest * h * w)
    for name, count in zip(names[big], counts[big], strict=True):
        rows, columns = (label == name).nonzero().unbind(1)
        people.append(
            torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, count])
        )
    return [p.float() for p in sorted(people, key=lambda p: -float(p[4]))]


def choose_person(
    people: list[Tensor],  # of `find_people`
    size: tuple[int, int],  # width, height
    choice: Choice,
    index: int,
    previous: Tensor | None,  # [4] box one frame before
) -> Tensor | None:
    """The box that is meant; the one that goes on from the frame before, when there was one."""
    if not people:
        return None
    if previous is not None:
        overlaps = [_overlap(p[:4], previous) for p in people]
        best = max(range(len(people)), key=overlaps.__getitem__)
        if overlaps[best] > 0.15:
            return people[best][:4]
    if choice == "centre":
        middle = torch.tensor(size, device=people[0].device) / 2
        return min(people, key=lambda p: float(((p[:2] + p[2:4]) / 2 - middle).norm()))[:4]
    if choice == "from the left":
        # Crumbs beside a person are none: only what is at least a tenth of the largest counts.
        real = [p for p in people if p[4] >= 0.1 * people[0][4]]
        return sorted(real, key=lambda p: float(p[0] + p[2]))[min(index, len(real) - 1)][:4]
    return people[0][:4]


def _overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes."""
    size = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    both = float(size.prod())
    return both / max(float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - both, 1e-6)


def smooth_over_time(
    values: Tensor,  # [F, C]
    known: Tensor,  # [F] bool
    frames: float,  # standard deviation
    jumps: Tensor | None = None,  # [F] bool, True where something new begins
) -> Tensor:  # [F, C]
    """Gaussian mean over the known frames; never across a jump. Unknown frames get the nearest."""
    if not known.any():
        return values
    time = torch.arange(len(values), device=values.device, dtype=torch.float32)
    apart = (time[:, None] - time).abs()
    weight = torch.exp(-0.5 * (apart / max(frames, 1e-3)) ** 2) + 1e-9 * torch.exp(-apart)
    weight = weight * known
    if jumps is not None:
        part = jumps.long().cumsum(0)
        same = (part[:, None] == part) & known
        weight = torch.where(same.any(1, keepdim=True), weight * same, weight)
    weight = weight.clamp(min=0)
    total = weight.sum(1, keepdim=True)
    nearest = torch.where(known, apart, torch.inf).argmin(1)
    return torch.where(total > 1e-30, (weight @ values) / total.clamp(min=1e-30), values[nearest])


@dataclass(frozen=True)
class Humans:
    """What was found in F frames of H x W."""

    masks: Tensor
    """[F, H, W] 0..1."""
    depth: Tensor
    """[F, H, W] metres along the optical axis; 0 outside the mask."""
    normals: Tensor
    """[F, 3, H, W] unit, camera frame; 0 outside the mask."""
    keypoints: Tensor
    """[F, P, 2] pixels; names in KEYPOINTS."""
    confidence: Tensor
    """[F, P] 0..1; about 0.5 = covered by something."""
    boxes: Tensor
    """[F, 4] the crops, for `estimate_keypoints`."""
    present: Tensor
    """[F] bool."""
    height: float
    """Metres that the performer was taken to be tall."""
    note: str
    """What was chosen or not found."""


Step = Callable[[int, int, Tensor | None], None]


@dataclass(frozen=True)
class Looking:
    """How to look: the options of `estimate_humans`."""

    choice: Choice = "largest"
    index: int = 0
    """Which person from the left, from 0."""
    height: float = 0.0
    """Metres, when known."""
    steadiness: float = 1.5
    """Frames over which crop and distance are averaged; 0 for unrelated pictures."""
    refine: bool = True
    """Whether masks follow the colours of the clip (clip_masks.py)."""
    chunk: int = 8


def estimate_humans(
    net: HumanNet,
    frames: Tensor,  # [F, 3, H, W]
    focal: float | Tensor,  # pixels
    looking: Looking = Looking(),  # noqa: B008  (frozen)
    centre: tuple[float, float] | None = None,  # principal point, pixels
    device: torch.device | None = None,
    on_step: Step | None = None,
) -> Humans:
    """Mask, metric depth, normals and keypoints of one performer in frames of any size."""
    device = device or frames.device
    total, _, H, W = frames.shape
    if min(H, W) < 8:
        raise ValueError(f"The frames are {W}x{H}: the human net needs at least 8x8 pixels.")
    step = _Counter(on_step, (3 if looking.refine else 2) * total)
    boxes, known, jumps, crowd = _first_look(net, frames, looking, device, step)
    if not known.any():
        return _nobody(frames)
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=2)
    smooth = torch.cat([(boxes[:, 2:] + boxes[:, :2]) / 2, size.log()], 1)
    smooth = smooth_over_time(smooth, known, looking.steadiness, jumps)
    half = smooth[:, 2:].exp() / 2
    boxes = torch.cat([smooth[:, :2] - half, smooth[:, :2] + half], 1)
    crops = torch.stack([box_to_crop(b) for b in boxes])
    parts: list[_Found] = []
    pictures: list[Tensor] = []
    for some in torch.arange(total).split(looking.chunk):
        shown = frames[some].to(device).float()
        pictures.append(crop_frames(shown, crops[some], *CROP))
        parts.append(_ask(net, shown, pictures[-1], crops[some]))
        step(len(some), pictures[-1][-1])
    found = _Found(*(torch.cat(t) for t in zip(*parts, strict=True)))
    if looking.refine:
        masks = refine_masks(torch.cat(pictures).cpu(), found.masks, bool(looking.steadiness), step)
        found = found._replace(masks=masks)
    return _to_frames(found, crops.cpu(), known.cpu(), jumps.cpu(), crowd, looking,
                      float(focal), centre or (W / 2, H / 2), W, H)  # fmt: skip


class _Found(NamedTuple):
    """Results on crops, all frames."""

    masks: Tensor
    relief: Tensor
    normals: Tensor
    keypoints: Tensor
    confidence: Tensor
    scale: Tensor


def _ask(net: HumanNet, frames: Tensor, pictures: Tensor, crops: Tensor) -> _Found:
    """The net's answers on crops."""
    out = net(pictures)
    small = net(crop_frames(frames, crops, *SECOND_CROP)).mask
    small = F.interpolate(small[:, None], out.mask.shape[-2:], mode="bilinear")[:, 0]
    answers = (
        ((out.mask + small) / 2).sigmoid(), out.relief, out.normals, out.keypoints,
        out.confidence.sigmoid(), out.scale,
    )  # fmt: skip
    return _Found(*(t.float().cpu() for t in answers))


class _Counter:
    def __init__(self, on_step: Step | None, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0

    def __call__(self, count: int, preview: Tensor | None = None) -> None:
        self.done += count
        if self.on_step:
            self.on_step(self.done, self.total, preview)


def _first_look(net, frames: Tensor, looking: Looking, device, step: _Counter):
    """The performer's box in every frame: boxes [F, 4], known [F], jumps [F], most people."""
    H, W = frames.shape[-2:]
    box_of_frame = torch.tensor([0.0, 0, W, H], device=device)
    boxes, known, jumps, crowd = [], [], [], 0
    previous = None
    for some in frames.split(looking.chunk):
        pictures = some.to(device).float()
        shares, pixel = where_people_are(net, pictures)
        for picture, share in zip(pictures, shares, strict=True):
            people = find_people(share) if _shows_anything(picture) else []
            crowd = max(crowd, sum(p[4] >= 0.1 * people[0][4] for p in people) if people else 0)
            sized = [torch.cat([p[:4] * pixel, p[4:]]) for p in people]
            box = choose_person(sized, (W, H), looking.choice, looking.index,
                                previous if looking.steadiness else None)  # fmt: skip
            if box is not None:
                box = _look_again(net, picture, box)
            jump = box is not None and previous is not None and _overlap(box, previous) < 0.15
            boxes.append(box if box is not None else box_of_frame)
            known.append(box is not None)
            jumps.append(jump or not looking.steadiness)
            previous = box if box is not None else previous
        step(len(some))
    return torch.stack(boxes), torch.tensor(known, device=device), torch.tensor(
        jumps, device=device
    ), int(crowd)  # fmt: skip


def _shows_anything(
    picture: Tensor,  # [3, H, W] 0..1
) -> bool:
    return bool((picture.flatten(1).std(1) > ONE_COLOUR).any())


def where_people_are(
    net: HumanNet,
    pictures: Tensor,  # [B, 3, H, W] 0..1
) -> tuple[Tensor, float]:
    """Shares [B, h, w] of any person, over the frame and some grey beyond it, and how many of the
    frame's pixels one of theirs is."""
    H, W = pictures.shape[-2:]
    side = max(H, W)
    h, w = (max(1, n * LOOKS[-1] // (2 * side)) for n in (H, W))
    logits = []
    for look in LOOKS:
        # The canvas is the frame and some grey, so that its sides are multiples of the stride.
        width, height = (max(STRIDE, math.ceil(n * look / side / STRIDE) * STRIDE) for n in (W, H))
        canvas = torch.tensor([0, 0, width, height], device=pictures.device) * (side / look)
        found = net(crop_frames(pictures, canvas.expand(len(pictures), 4), width, height)).anyone
        grid = (math.ceil(n * LOOKS[-1] / look / 2) for n in (height, width))
        found = F.interpolate(found[:, None], tuple(grid), mode="bilinear", antialias=True)
        logits.append(found[:, 0, :h, :w])
    return torch.stack(logits).mean(0).sigmoid(), 2 * side / LOOKS[-1]


def _look_again(net: HumanNet, picture: Tensor, box: Tensor) -> Tensor:
    """The box from a closer look, which sees thin arms that the first one missed."""
    crop = box_to_crop(box, 1.5)
    mask = net(crop_frames(picture[None], crop[None], *CROP)).mask[0].sigmoid()
    people = find_people(F.avg_pool2d(mask[None, None], 2)[0, 0])
    if not people:
        return box
    scale = (crop[2:] - crop[:2]) * 2 / box.new_tensor(CROP)
    found = people[0][:4] * scale.repeat(2) + crop[:2].repeat(2)
    return found if _overlap(found, box) > 0.2 else box


def _nobody(frames: Tensor) -> Humans:
    total, _, H, W = frames.shape
    P = len(KEYPOINTS)
    return Humans(
        masks=torch.zeros(total, H, W),
        depth=torch.zeros(total, H, W),
        normals=torch.zeros(total, 3, H, W),
        keypoints=torch.zeros(total, P, 2),
        confidence=torch.zeros(total, P),
        boxes=torch.tensor([0.0, 0, W, H]).repeat(total, 1),
        present=torch.zeros(total, dtype=torch.bool),
        height=MEAN_HEIGHT,
        note="no person was found in any frame",
    )


def _to_frames(
    found: _Found, crops: Tensor, known: Tensor, jumps: Tensor, crowd: int, looking: Looking,
    focal: float, centre: tuple[float, float], W: int, H: int,
) -> Humans:  # fmt: skip
    """Back to the frames' pixels and camera."""
    total = len(crops)
    present = known & ((found.masks > 0.5).flatten(1).float().mean(1) > 0.005)
    if not present.any():
        return _nobody(torch.empty(total, 3, H, W))
    zoom = (crops[:, 2] - crops[:, 0]) / CROP[0]
    height = float(found.scale[present, 1].median().exp())
    true_height = looking.height or height
    # Pixels a metre of the frame -> distance.
    logs = math.log(focal * true_height / height) - found.scale[:, :1] - zoom.log()[:, None]
    distance = smooth_over_time(logs, present, looking.steadiness, jumps).exp()[:, 0]
    masks, depth = torch.zeros(total, H, W), torch.zeros(total, H, W)
    normals = torch.zeros(total, 3, H, W)
    keypoints = to_frame(found.keypoints, crops, CROP)
    for f in present.nonzero()[:, 0].tolist():
        inside = inside_box(crops[f], W, H)
        pasted = paste(found.masks[f][None], crops[f], W, H)[0]
        masks[f] = torch.where(inside, pasted, 0.0).clamp(0, 1)
        body = masks[f] > 0.5
        relief = paste(found.relief[f][None], crops[f], W, H)[0] * (true_height / height)
        aim, rays = aimed_camera(crops[f], focal, centre, W, H)
        along = torch.einsum("k,khw->hw", aim[:, 2], rays)  # depth of the aimed camera's ray
        near = (distance[f] + relief).clamp(min=0.05)
        depth[f] = torch.where(body, near / along.clamp(min=0.1), 0.0)
        turned = torch.einsum("ij,jhw->ihw", aim, paste(found.normals[f], crops[f], W, H))
        normals[f] = torch.where(body, F.normalize(turned, dim=0), 0.0)
    x, y = keypoints.unbind(-1)
    visible = (x >= 0) & (x < W) & (y >= 0) & (y < H) & present[:, None]
    notes = []
    if crowd > 1:
        which = {"largest": "the largest", "centre": "the one nearest to the centre",
                 "from the left": f"number {looking.index} from the left"}[looking.choice]  # fmt: skip
        notes.append(f"up to {crowd} people are in the picture: {which} was taken")
    missing = (~present).nonzero()[:, 0].tolist()
    if missing:
        notes.append(f"no person was found in frames {_ranges(missing)}: they stay empty")
    return Humans(
        masks, depth, normals, keypoints, found.confidence * visible, crops, present,
        true_height, "; ".join(notes),
    )  # fmt: skip


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as '1-3, 7'."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def aimed_camera(
    box: Tensor,  # [4]
    focal: float,
    centre: tuple[float, float],
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:  # R [3, 3] aimed -> own camera, rays [3, H, W] with z = 1
    """The camera turned to the box's middle, as the net believes it is, and the frame's rays."""
    cx, cy = centre
    K = torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
    rays = unproject_depth(torch.ones(1, height, width), K)[0]
    middle = torch.cat([(box[:2] + box[2:]) / 2, torch.ones(1)])
    to_box = torch.linalg.solve(K, middle.float())
    z = F.normalize(to_box, dim=0)
    x = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), z), dim=0)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=1), rays


# --- other people's formats -----------------------------------------------------------------------

OPENPOSE18 = (
    "nose", "neck", "shoulder.R", "elbow.R", "wrist.R", "shoulder.L", "elbow.L", "wrist.L",
    "hip.R", "knee.R", "ankle.R", "hip.L", "knee.L", "ankle.L", "eye.R", "eye.L", "ear.R", "ear.L",
)  # fmt: skip
"""OpenPose's body points in its order. Its neck is the middle between the shoulders."""
OPENPOSE_BONES = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
    (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip


def to_openpose(
    keypoints: Tensor,  # [F, P, 2]
    confidence: Tensor,  # [F, P]
) -> tuple[Tensor, Tensor]:  # [F, 18, 2], [F, 18]
    """The 18 points of OpenPose's body."""
    order = [KEYPOINTS.index(name) for name in OPENPOSE18]
    points, sure = keypoints[:, order].clone(), confidence[:, order].clone()
    shoulders = [KEYPOINTS.index("shoulder.L"), KEYPOINTS.index("shoulder.R")]
    points[:, 1] = keypoints[:, shoulders].mean(1)
    sure[:, 1] = confidence[:, shoulders].amin(1)
    return points, sure


def openpose_json(humans: Humans, width: int, height: int, sure_from: float = 0.3) -> list[dict]:
    """One dictionary a frame, as OpenPose writes them; points below `sure_from` are left out."""
    points, sure = to_openpose(humans.keypoints, humans.confidence)
    frames = []
    for f in range(len(points)):
        flat: list[float] = []
        for (x, y), c in zip(points[f].tolist(), sure[f].tolist(), strict=True):
            flat += [x, y, c] if c >= sure_from else [0.0, 0.0, 0.0]
        person = {"pose_keypoints_2d": flat, "face_keypoints_2d": [],
                  "hand_left_keypoints_2d": [], "hand_right_keypoints_2d": []}  # fmt: skip
        people = [person] if bool(humans.present[f]) else []
        frames.append({"people": people, "canvas_width": width, "canvas_height": height})
    return frames


def coco17(humans: Humans) -> tuple[Tensor, Tensor]:  # [F, 17, 2], [F, 17]
    """The 17 points of COCO."""
    order = list(COCO17.indices)
    return humans.keypoints[:, order], humans.confidence[:, order]
