"""What MV-Opt takes out of pictures: `.venv/bin/python tests/evaluate_refine.py [--quick]`.

True clips of people that no training saw get the faults of tests/faults.py, are refined, and are
compared with the truth again: fault by fault, term by term, beside the simple ways a creator would
try first, on the output of Turnaround-Tiny and on a real man in four cameras. What jitters is not
asked of the refiner's own pose: every true keypoint is looked for in the result, patch by patch. The
full run writes docs/REFINE.md and docs/pictures/refine.jpg; --quick (one small clip, four views, five
frames, three faults) only shows the page.
"""

import argparse
import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import evaluate
import evaluate_sync
import faults
import in_comfyui
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "REFINE.md", ROOT / "docs" / "pictures" / "refine.jpg"
LARGEST_PICTURE = 300_000
"""Bytes."""
SEED = 11
NOTHING, ALL, FAULTY = "nothing", "all together", "faulty"
COLOURS, PLACES = ("colour", "flicker", "flash", "blotches"), ("jitter", "wobble", "limb")
MIXED = {"colours": COLOURS, "places": PLACES}
"""Several faults at once, for the table of terms."""
ORDER = (*PLACES, "ghost", *COLOURS)
"""Of all faults together: first what moves pixels, then what tints them."""
LEFT_WRIST = 9
"""Of COCO's 17 points: the hand that the fault `limb` moves."""
TERMS = ("temporal", "pose", "surface", "fidelity")
READ_VIEWS = [1, 3]
"""Views that the human net reads: some 0.1 s a picture."""


# How far keypoints lie from where they belong

COARSE, FINE = (21, 5.0), (11, 2.5)
"""Edge of a patch and sigma of its weights, pixels of a view 192 wide: the large one finds the place,
the small one is not misled by surroundings that move differently."""
SEARCH, NEARER = 10, 0.003
"""How far a patch is looked for (pixels); what a likeness of -1..1 loses per squared pixel, so that
of two equal places the nearer one is taken."""
STIFF = {COARSE: 1.0, FINE: 0.5}
"""How much a patch resists being bent, beside how well it can be placed."""
ROUNDS = 6
OUTLINE = 3
"""Pixels beyond the performer that belong to a patch: the outline shows best where a limb is."""
TOLD_APART = 0.1
"""Curvature (per squared pixel) of a patch's likeness to its own surroundings, in its flattest
direction: where it is less, plain clothes say little about the place."""
STRAYS = 2.0
"""Pixels: a small patch that ends this far from the large one has found something else."""


def read(
    pictures: Tensor,  # [N, C, H, W]
    picture: Tensor,  # [M] which one
    places: Tensor,  # [M, h, w, 2] pixels
) -> Tensor:  # [M, C, h, w]
    """Bilinear readings, the border repeated outwards."""
    H, W = pictures.shape[-2:]
    grid = 2 * places / places.new_tensor([W, H]) - 1
    result = pictures.new_empty(len(picture), pictures.shape[1], *places.shape[1:3])
    for n in picture.unique().tolist():
        chosen = picture == n
        window = grid[chosen].flatten(0, 1)[None]
        found = F.grid_sample(
            pictures[n : n + 1], window, padding_mode="border", align_corners=False
        )
        result[chosen] = found[0].unflatten(1, (-1, places.shape[1])).movedim(0, 1)
    return result


def window(size: int) -> Tensor:  # [size, size, 2] pixels from the middle: x, y
    along = torch.arange(size) - (size - 1) / 2
    return torch.stack(torch.meshgrid(along, along, indexing="xy"), -1)


@dataclass(frozen=True)
class Patches:
    """What true pictures show around some places."""

    picture: Tensor  # [N] which picture
    places: Tensor  # [N, 2] pixels
    shown: Tensor  # [N, 3, size, size]
    weights: Tensor  # [N, 1, size, size], their sum is 1
    stiff: float

    @classmethod
    def of(cls, truth: Tensor, masks: Tensor, picture: Tensor, places: Tensor, kind) -> "Patches":
        """`truth` [N, 3, H, W], `masks` [N, H, W]; kind: COARSE or FINE."""
        size, sigma = kind
        around = places[:, None, None] + window(size)
        body = F.max_pool2d(masks[:, None], 2 * OUTLINE + 1, 1, OUTLINE)
        weights = torch.exp(-window(size).square().sum(-1) / (2 * sigma**2))
        weights = weights * read(body, picture, around) + 1e-6
        weights = weights / weights.sum((-2, -1), keepdim=True)
        return cls(picture, places, read(truth, picture, around), weights, STIFF[kind])

    def select(self, chosen: Tensor) -> "Patches":
        parts = (self.picture, self.places, self.shown, self.weights)
        return Patches(*(p[chosen] for p in parts), self.stiff)

    def centred(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, size, size] less its mean, and its spread: colour casts and exposure don't count."""
        seen = seen - (self.weights * seen).sum((-2, -1), keepdim=True)
        spread = (self.weights * seen.square()).sum((-2, -1), keepdim=True)
        return seen, spread.clamp(min=1e-6).sqrt()

    def likeness(self, reach: int, pictures: Tensor) -> Tensor:  # [N, 2 reach + 1, 2 reach + 1]
        """Weighted correlation (-1..1) with every place up to `reach` pixels away."""
        N, C, size = self.shown.shape[:3]
        near = self.places[:, None, None] + window(size + 2 * reach)
        seen = read(pictures, self.picture, near).reshape(1, N * C, *near.shape[1:3])

        def sums(kernel: Tensor, of: Tensor) -> Tensor:
            kernel = kernel.expand(N, C, size, size).reshape(N * C, 1, size, size)
            return F.conv2d(of, kernel, groups=N * C)[0].unflatten(0, (N, C))

        mine, spread = self.centred(self.shown)
        mean = sums(self.weights, seen)
        theirs = (sums(self.weights, seen.square()) - mean.square()).clamp(min=1e-6).sqrt()
        alike = sums(self.weights * mine, seen) / (spread * theirs)
        share = spread.square()
        return (alike * share).sum(1) / share.sum(1)

    def told_apart(self, truth: Tensor) -> Tensor:  # [N]
        """Smallest curvature of the patch's likeness to its surroundings."""
        z = self.likeness(1, truth)
        xx = z[:, 1, 2] + z[:, 1, 0] - 2 * z[:, 1, 1]
        yy = z[:, 2, 1] + z[:, 0, 1] - 2 * z[:, 1, 1]
        xy = (z[:, 2, 2] + z[:, 0, 0] - z[:, 2, 0] - z[:, 0, 2]) / 4
        hessian = torch.stack([torch.stack([xx, xy], -1), torch.stack([xy, yy], -1)], -2)
        return torch.linalg.eigvalsh(-hessian)[:, 0]

    def searched(self, pictures: Tensor) -> Tensor:  # [N, 2] whole pixels
        alike = self.likeness(SEARCH, pictures) - NEARER * window(2 * SEARCH + 1).square().sum(-1)
        best = alike.flatten(1).argmax(1)
        edge = 2 * SEARCH + 1
        return torch.stack([best % edge, best // edge], -1).float() - SEARCH

    def followed(self, pictures: Tensor, shift: Tensor) -> Tensor:  # [N, 2] pixels
        """The shift by Gauss-Newton (Lucas and Kanade's), the patch being bent by a matrix too."""
        size = self.shown.shape[-1]
        wide = window(size + 2)
        x, y = wide[1:-1, 1:-1].unbind(-1)
        truth, spread = self.centred(self.shown)
        weights = self.weights.expand_as(truth).flatten(1)
        bend = shift.new_zeros(len(shift), 2, 2)
        for _ in range(ROUNDS):
            bent = wide + (bend[:, None, None] * wide[..., None, :]).sum(-1)
            seen = read(pictures, self.picture, (self.places + shift)[:, None, None] + bent)
            dx = (seen[..., 1:-1, 2:] - seen[..., 1:-1, :-2]) / 2
            dy = (seen[..., 2:, 1:-1] - seen[..., :-2, 1:-1]) / 2
            seen, theirs = self.centred(seen[..., 1:-1, 1:-1])
            slopes = torch.stack([dx, dy, dx * x, dx * y, dy * x, dy * y], -1)
            slopes = slopes - (self.weights[..., None] * slopes).sum((2, 3), keepdim=True)
            slopes = (slopes * (spread / theirs)[..., None]).flatten(1, 3)
            away = (truth - seen * (spread / theirs)).flatten(1)
            weighted = (slopes * weights[..., None]).mT
            normal, right = weighted @ slopes, (weighted @ away[..., None])[..., 0]
            sure = (normal[:, 0, 0] + normal[:, 1, 1]) / 2 + 1e-9
            ridge = sure[:, None] * shift.new_tensor([1e-3] * 2 + [self.stiff] * 4)
            right[:, 2:] -= ridge[:, 2:] * bend.flatten(1)
            step = torch.linalg.solve(normal + torch.diag_embed(ridge), right)
            shift = shift + step[:, :2].clamp(-2, 2)
            bend = (bend + step[:, 2:].view(-1, 2, 2)).clamp(-0.3, 0.3)
        return shift


@dataclass(frozen=True)
class Marks:
    """Places of the performer that can be found again in a result."""

    kept: Tensor
    """[V, F, P] bool: shown by the true picture, and told apart from the surroundings."""
    velocity: Tensor
    """[V, F, P, 2] pixels a frame."""
    coarse: Patches
    fine: Patches

    @classmethod
    def of(
        cls,
        truth: Tensor,  # [V, F, 3, H, W]
        masks: Tensor,  # [V, F, H, W]
        places: Tensor,  # [V, F, P, 2] pixels, known in every frame
        seen: Tensor,  # [V, F, P] bool
    ) -> "Marks":
        v, f, p = seen.nonzero().unbind(1)
        flat, body = truth.flatten(0, 1), masks.float().flatten(0, 1)
        where = (flat, body, v * truth.shape[1] + f, places[v, f, p])
        coarse, fine = Patches.of(*where, COARSE), Patches.of(*where, FINE)
        apart = torch.minimum(coarse.told_apart(flat), fine.told_apart(flat)) > TOLD_APART
        kept = torch.zeros_like(seen)
        kept[v[apart], f[apart], p[apart]] = True
        velocity = torch.gradient(places, dim=1)[0]
        return cls(kept, velocity, coarse.select(apart), fine.select(apart))

    def shifts(self, result: Tensor) -> Tensor:  # [V, F, P, 2] pixels; 0 where not kept
        """Where `result` [V, F, 3, H, W] shows every mark, less where the truth does."""
        flat = result.flatten(0, 1)
        large = self.coarse.followed(flat, self.coarse.searched(flat))
        small = self.fine.followed(flat, large)
        strays = (small - large).norm(dim=1, keepdim=True) > STRAYS
        found = torch.zeros_like(self.velocity)
        found[self.kept] = torch.where(strays, large, small)
        return found


def jitter(
    shifts: Tensor,  # [V, F, P, 2] pixels
    kept: Tensor,  # [V, F, P] bool
) -> float:
    """RMS of the second difference over time of how far marks lie off, in pixels."""
    bends = shifts[:, 2:] - 2 * shifts[:, 1:-1] + shifts[:, :-2]
    whole = kept[:, 2:] & kept[:, 1:-1] & kept[:, :-2]
    return rms(bends[whole])


def lag(shifts: Tensor, velocity: Tensor, kept: Tensor) -> float:
    """Frames by which marks follow the truth: a result that is n frames late lies -n velocity off."""
    s, v = shifts[kept].double(), velocity[kept].double()
    return -float((s * v).sum() / v.square().sum()) if len(v) else math.nan


def rms(vectors: Tensor) -> float:  # [N, 2]
    return float(vectors.double().square().sum(-1).mean().sqrt()) if len(vectors) else math.nan


# Clips and their faults


@dataclass(frozen=True)
class Clip:
    """True pictures, what the refiner is told beside them, and how results are judged."""

    name: str
    truth: object
    """Views with masks and rig."""
    flow: Tensor
    flow_seen: Tensor
    """As of evaluate.Task."""
    hand: Tensor
    """[V, F, 2] pixels: what the fault `limb` moves."""
    marks: Marks
    masks: Tensor
    """[V, F, H, W] that the refiner gets."""
    depths: dict[str, Tensor | None]
    """Name -> [V, F, H, W] metres."""
    poses: dict[str, object | None]
    """Name -> models.pose.Pose."""
    judged: Tensor | None = None
    """[V, F, H, W] metres, for the cross-view error; None = not known."""
    keypoints_seen: Tensor | None = None
    """[V, F, 17] bool, for the human net."""


def faulty(
    frames: Tensor,  # [V, F, 3, H, W]
    hand: Tensor,  # [V, F, 2] pixels
    fault: str,
) -> Tensor:
    """Pictures with a fault, with several (of MIXED), with all or with none."""
    generator = torch.Generator().manual_seed(SEED)
    for name in {NOTHING: (), ALL: ORDER, **MIXED}.get(fault, (fault,)):
        frames = faults.FAULTS[name](frames, hand, generator)
    return frames


def taken_from(frames: Tensor, hand: Tensor, fault: str) -> Tensor:  # [V F, 2, H, W] pixels
    """How far from every pixel lies what a fault shows there: the same fault, drawn into pictures
    that show coordinates."""
    H, W = frames.shape[-2:]
    x, y = torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy")
    plain = torch.stack([x / W, y / H, torch.zeros_like(x)]).expand_as(frames)
    away = (faulty(plain, hand, fault) - plain).flatten(0, 1)[:, :2]
    return away * torch.tensor([W, H])[:, None, None]


SETTLED = 20
"""Rounds after which a place is found to a thousandth of a pixel: bends are gentle."""


def shown_at(
    away: Tensor,  # [N, 2, H, W] of `taken_from`
    picture: Tensor,  # [M] which of N
    places: Tensor,  # [M, h, w, 2] pixels of the true pictures
) -> Tensor:  # [M, h, w, 2]
    """Where a faulty picture shows these places: p is sought with p + away(p) = place."""
    found = places
    for _ in range(SETTLED):
        found = places - read(away, picture, found).movedim(1, -1)
    return found


def shifts_put_in(clip: Clip, fault: str) -> Tensor:  # [V, F, P, 2] pixels; 0 where not kept
    """What `Marks.shifts` should find."""
    marks = clip.marks.fine
    away = taken_from(clip.truth.frames, clip.hand, fault)
    places = marks.places[:, None, None]
    result = torch.zeros_like(clip.marks.velocity)
    result[clip.marks.kept] = (shown_at(away, marks.picture, places) - places)[:, 0, 0]
    return result


def undone(clip: Clip, fault: str) -> Tensor:  # [V, F, 3, H, W]
    """A fault that moves pixels, taken back by who knows the shift: the most that moving can give."""
    frames = faulty(clip.truth.frames, clip.hand, fault)
    number, (H, W) = len(frames.flatten(0, 1)), frames.shape[-2:]
    x, y = torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy")
    pixels = torch.stack([x, y], -1).expand(number, -1, -1, -1)
    away = taken_from(frames, clip.hand, fault)
    places = shown_at(away, torch.arange(number), pixels)
    shift = (places - pixels).movedim(-1, 1)
    return faults.moved(frames.flatten(0, 1), shift).view_as(frames)


def synthetic_clip(n: int, amount: evaluate.Amount) -> tuple[Clip, evaluate.Task]:
    """One of evaluate.CLIPS."""
    from turnaround.models.performer_truth import KEYPOINTS
    from turnaround.models.pose import Pose
    from turnaround.models.silhouettes import depth_from_silhouettes

    task = evaluate.synthetic_task(*evaluate.CLIPS[n], evaluate.FIRST_CLOTHES + n, amount)
    places, seen = task.keypoints_true, task.keypoints_seen
    body = task.normals.masks.float()
    driving = Pose(task.points_true, torch.ones(task.points_true.shape[:2]), None, None, KEYPOINTS)
    clip = Clip(
        task.name, task.truth, task.flow, task.flow_seen, places[:, :, LEFT_WRIST],
        Marks.of(task.truth.frames, task.truth.masks, places, seen), body,
        {
            "none": None,
            "outlines": depth_from_silhouettes(body, task.rig),
            "cloud": task.depth_drawn,
            "exact": task.depth_true,
        },
        {"none": None, "driving": driving}, task.depth, seen,
    )  # fmt: skip
    return clip, task


CORNERS = 40
"""Marks of a real view."""


def tracked(
    truth: Tensor,  # [V, F, 3, H, W]
    masks: Tensor,  # [V, F, H, W]
    flow: Tensor,  # [V, F - 1, 2, H, W]
    flow_seen: Tensor,  # [V, F - 1, H, W]
) -> tuple[Tensor, Tensor]:  # places [V, F, P, 2], seen [V, F, P]
    """Corners of the performer's first pictures, followed along the true pictures' own motion."""
    import cv2

    V, count = truth.shape[:2]
    places = torch.zeros(V, count, CORNERS, 2)
    seen = torch.zeros(V, count, CORNERS, dtype=torch.bool)
    for v in range(V):
        inside = cv2.erode((masks[v, 0] > 0.5).byte().numpy(), np.ones((5, 5)))
        grey = (truth[v, 0].mean(0) * 255).byte().numpy()
        corners = cv2.goodFeaturesToTrack(grey, CORNERS, 0.02, 5, mask=inside)
        if corners is None:
            continue
        number = len(corners)
        places[v, 0, :number] = torch.from_numpy(corners)[:, 0] + 0.5
        seen[v, 0, :number] = True
        for f in range(count - 1):
            picture = torch.zeros(CORNERS, dtype=torch.long)
            at = places[v, f][:, None, None]
            there = torch.cat([flow[v, f], flow_seen[v, f, None].float()])[None]
            moved = read(there, picture, at)[..., 0, 0]
            places[v, f + 1] = places[v, f] + moved[:, :2]
            seen[v, f + 1] = seen[v, f] & (moved[:, 2] > 0.99)
    return places, seen


def real_clip(amount: evaluate.Amount) -> Clip:
    """Four cameras around a real man: his pictures are the truth."""
    from turnaround.models.silhouettes import depth_from_silhouettes
    from turnaround_dev import ensure_real_clip

    task, _ = evaluate.real_task(ensure_real_clip(), amount)
    truth = task.truth
    marks = tracked(truth.frames, truth.masks, task.flow, task.flow_seen)
    # Nobody marked his hands: what `limb` moves is where he reaches furthest to the left.
    columns = (truth.masks > 0.5).any(-2).float().argmax(-1)
    rows = [[(m[:, x] > 0.5).nonzero().float().mean() for m, x in zip(ms, xs, strict=True)]
            for ms, xs in zip(truth.masks, columns.tolist(), strict=True)]  # fmt: skip
    hand = torch.stack([columns.float(), torch.tensor(rows)], -1).median(1, keepdim=True).values
    return Clip(
        task.name, truth, task.flow, task.flow_seen, hand.expand(-1, truth.frames.shape[1], 2),
        Marks.of(truth.frames, truth.masks, *marks), truth.masks,
        {"none": None, "outlines": depth_from_silhouettes(truth.masks, task.rig)}, {"none": None},
    )  # fmt: skip


# Ways to make pictures better


Refiner = Callable[[Tensor, Clip], Tensor]
"""Pictures [V, F, 3, H, W] and their clip -> better pictures."""


@dataclass(frozen=True)
class Row:
    """The refiner, told something and set in some way."""

    name: str
    settings: dict = field(default_factory=dict)
    depth: str = "cloud"
    pose: str = "found"

    def __call__(self, frames: Tensor, clip: Clip) -> Tensor:
        from turnaround.models.mv_opt import Settings, refine
        from turnaround.models.views import Views

        views = Views(frames, clip.masks, clip.truth.rig, clip.truth.fps)
        depth, pose = clip.depths[self.depth], clip.poses[self.pose]
        return refine(views, depth, pose, None, Settings(**self.settings)).frames


@dataclass(frozen=True)
class AsPublished:
    """The losses to the letter, on pixels, with the embedded human net."""

    name: str

    def __call__(self, frames: Tensor, clip: Clip) -> Tensor:
        from turnaround.models.mv_opt import paper_order
        from turnaround.models.mv_opt_paper import refine_paper
        from turnaround.models.pose import detect_keypoints
        from turnaround.models.views import Views

        net, rig = human_net(), clip.truth.rig
        seen = detect_keypoints(net, Views(frames, None, rig))
        boxes = torch.where(seen.present[..., None], seen.boxes, torch.nan)
        return refine_paper(frames, boxes, net, paper_order(rig, len(rig)))[0]


def human_net():
    from turnaround.nodes import embedded, human

    weights = embedded.TINY / "human" / "turnaround_tiny_human.safetensors"
    return human.load_human(str(weights)).model


def with_found_pose(clip: Clip, frames: Tensor) -> Clip:
    """The clip, and the pose that **Triangulate Pose** finds in these pictures of it."""
    from turnaround.models.performer_truth import KEYPOINTS
    from turnaround.models.pose import detect_keypoints, triangulated_pose
    from turnaround.models.views import Views

    rig = clip.truth.rig
    seen = detect_keypoints(human_net(), Views(frames, None, rig))
    found, _ = triangulated_pose(seen.pixels, seen.sure, rig, KEYPOINTS)
    return replace(clip, poses=clip.poses | {"found": found})


def of_median(frames: Tensor, clip: Clip) -> Tensor:
    """Every pixel's middle value of three frames."""
    padded = torch.cat([frames[:, :1], frames, frames[:, -1:]], 1)
    return torch.stack([padded[:, :-2], frames, padded[:, 2:]]).median(0).values


def of_colour_match(frames: Tensor, clip: Clip) -> Tensor:
    """Every view's mean and spread of colours are made those of the front view (Reinhard et al. 2001,
    "Color transfer between images", in CIE Lab), performer only."""
    import cv2

    def lab(view: Tensor, code: int) -> Tensor:  # [F, 3, H, W]
        pictures = view.movedim(1, -1).contiguous().numpy()
        return torch.from_numpy(np.stack([cv2.cvtColor(p, code) for p in pictures])).movedim(-1, 1)

    body = clip.masks > 0.5
    views = [lab(view, cv2.COLOR_RGB2LAB) for view in frames]
    means, spreads = zip(
        *(
            (v.movedim(1, -1)[b].mean(0), v.movedim(1, -1)[b].std(0))
            for v, b in zip(views, body, strict=True)
        ),
        strict=True,
    )
    result = []
    for n, view in enumerate(views):
        away = (view - means[n][:, None, None]) * (spreads[0] / spreads[n])[:, None, None]
        back = lab(away + means[0][:, None, None], cv2.COLOR_LAB2RGB).clamp(0, 1)
        result.append(torch.where(body[n][:, None], back, frames[n]))
    return torch.stack(result)


BLEND_SIGMA, BLEND_REACH = 1.0, 2
"""Frames."""


def of_flow_blend(frames: Tensor, clip: Clip) -> Tensor:
    """A Gaussian mean over time along OpenCV's DIS flow of the faulty pictures themselves."""
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    V, count, _, H, W = frames.shape
    grey = (frames.mean(2) * 255).byte().numpy()
    pixels = torch.stack(
        torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy"), -1
    )
    total, weights = torch.zeros_like(frames), torch.zeros(count)
    for f in range(count):
        for g in range(max(0, f - BLEND_REACH), min(count, f + BLEND_REACH + 1)):
            weight = math.exp(-((g - f) ** 2) / (2 * BLEND_SIGMA**2))
            there = [torch.from_numpy(dis.calc(view[f], view[g], None)) for view in grey]
            places = pixels + torch.stack(there) if g != f else pixels.expand(V, -1, -1, -1)
            total[:, f] += weight * read(frames[:, g], torch.arange(V), places)
            weights[f] += weight
    return total / weights[:, None, None, None]


REFINED = Row("MV-Opt Refine")
SIMPLE: dict[str, Refiner] = {
    "median of three frames": of_median,
    "colours matched to the front view": of_colour_match,
    "blended along optical flow": of_flow_blend,
}
PAPER = AsPublished("mode paper")
TERM_ROWS = (
    Row("all terms"),
    *(Row(f"{t} alone", {u: 0.0 for u in TERMS if u != t}) for t in TERMS),
    *(Row(f"without {t}", {t: 0.0}) for t in TERMS),
    PAPER,
)
GIVEN_ROWS = (
    Row("nothing but the rig", depth="none", pose="none"),
    Row("depth from outlines", depth="outlines", pose="none"),
    Row("depth of the cloud", depth="cloud", pose="none"),
    Row("exact depth", depth="exact", pose="none"),
    Row("depth of the cloud, pose found in the faulty views"),
    Row("depth of the cloud, pose of the driving motion", pose="driving"),
    Row("exact depth, pose of the driving motion", depth="exact", pose="driving"),
)


# Scores


Scores = dict[str, float]
COLUMNS = {
    "person": ("PSNR ↑", 2), "cross": ("cross-view ×100 ↓", 2), "flicker": ("flicker ×100 ↓", 2),
    "jitter": ("jitter px ↓", 2), "off": ("off px ↓", 2), "lag": ("lag frames", 2),
    "detail": ("detail %", 1),
}  # fmt: skip
CROSS_FIRST, CROSS_STEP = 1, 3
"""The frames whose cross-view error is taken: of all it would take longer than all other scores. Not
the first, which nothing precedes."""


def scores(result: Tensor, clip: Clip) -> Scores:
    from turnaround.models import metrics

    truth = clip.truth
    shifts, kept = clip.marks.shifts(result), clip.marks.kept
    found = {
        "person": metrics.psnr(result, truth.frames, truth.masks > 0.5),
        "flicker": 100 * metrics.flicker(result, clip.flow, clip.flow_seen),
        "jitter": jitter(shifts, kept),
        "off": rms(shifts[kept]),
        "lag": lag(shifts, clip.marks.velocity, kept),
        "detail": evaluate_sync.detail(result, truth.frames, truth.masks),
        "cross": math.nan,
    }
    if clip.judged is not None:
        part = slice(CROSS_FIRST, None, CROSS_STEP)
        agreed = metrics.cross_view_consistency(result[:, part], clip.judged[:, part], truth.rig)
        found["cross"] = 100 * agreed.rmse
    return found


def read_jitter(result: Tensor, clip: Clip, reader) -> float:
    """Jitter of the human net's keypoints, less what it makes of the true pictures; pixels."""
    views = READ_VIEWS
    shape = (len(views), result.shape[1])

    def points(frames: Tensor) -> Tensor:
        return reader(frames[views].flatten(0, 1))[1].unflatten(0, shape)

    return jitter(points(result) - points(clip.truth.frames), clip.keypoints_seen[views])


def errors_of_measure(clip: Clip) -> dict[str, tuple[float, float]]:
    """Fault -> RMS of the shifts that it puts in, and RMS by which `Marks.shifts` misses them."""
    found = {}
    for fault in PLACES:
        known = shifts_put_in(clip, fault)[clip.marks.kept]
        result = faulty(clip.truth.frames, clip.hand, fault)
        found[fault] = (rms(known), rms(clip.marks.shifts(result)[clip.marks.kept] - known))
    return found


# The goals


BETTER, STEADIER, PUNCTUAL, SHARP, WORSE = 3.0, 0.5, 0.1, 0.97, 0.1
"""dB gained on faults of colour; share of jitter that may be left; frames of lag; share of the detail
that must be left; dB that may be lost anywhere."""
BRIGHTNESS, SHAKES = ("colour", "flicker", "flash"), ("jitter", "wobble")


@dataclass(frozen=True)
class Goal:
    """Something that was promised, and whether it is so."""

    text: str
    met: bool
    figures: str


def gain(pair: tuple[Scores, Scores]) -> float:  # dB
    before, after = pair
    return after["person"] - before["person"]


def goals(found: dict[str, tuple[Scores, Scores]]) -> list[Goal]:
    """Fault -> scores before and after."""

    def each(faults_: tuple[str, ...], figure: Callable, fits: Callable, text: str) -> Goal:
        figures = {f: figure(found[f]) for f in faults_ if f in found}
        listed = ", ".join(f"{f} {value:.2f}" for f, value in figures.items())
        # NaN fits nowhere.
        return Goal(text, bool(figures) and all(fits(v) for v in figures.values()), listed)

    spoiled = tuple(f for f in found if f != NOTHING)
    return [
        each(BRIGHTNESS, gain, lambda x: x >= BETTER, f"PSNR rises by at least {BETTER:g} dB"),
        each(
            SHAKES, lambda p: p[1]["jitter"] / p[0]["jitter"], lambda x: x <= STEADIER,
            f"at most {100 * STEADIER:g} % of the jitter of keypoints is left (share)",
        ),
        each(
            SHAKES, lambda p: p[1]["lag"], lambda x: abs(x) <= PUNCTUAL,
            f"keypoints lag by at most {PUNCTUAL:g} frames",
        ),
        each(
            (NOTHING, *spoiled), lambda p: p[1]["detail"] / min(p[0]["detail"], 100.0),
            lambda x: x >= SHARP,
            f"at least {100 * SHARP:g} % of the detail is left, of the input's or the truth's, "
            "whichever is less (share)",
        ),
        each(
            spoiled, gain, lambda x: x >= -WORSE,
            f"no fault is worse than before by more than {WORSE:g} dB (gain)",
        ),
    ]  # fmt: skip


def goals_table(checked: list[Goal]) -> str:
    lines = ["| goal | | |", "|---|---|---|"]
    for goal in checked:
        lines.append(f"| {goal.text} | {'pass' if goal.met else '**miss**'} | {goal.figures} |")
    return "\n".join(lines)


# Tables


def number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.{digits}f}"


def markdown(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def mean_of(clips: list[Scores]) -> Scores:
    return {key: sum(c[key] for c in clips) / len(clips) for key in clips[0]}


def pairs_table(found: dict[str, tuple[Scores, Scores]]) -> str:
    """Fault by fault, before -> after."""
    rows = {
        fault: [
            f"{number(before[key], digits)} → {number(after[key], digits)}"
            for key, (_, digits) in COLUMNS.items()
        ]
        for fault, (before, after) in found.items()
    }
    return markdown([title for title, _ in COLUMNS.values()], rows)


def scores_table(rows: dict[str, Scores]) -> str:
    cells = {
        name: [number(found[key], digits) for key, (_, digits) in COLUMNS.items()]
        for name, found in rows.items()
    }
    return markdown([title for title, _ in COLUMNS.values()], cells)


def gains_table(
    before: dict[str, Scores],  # of every fault
    rows: dict[str, dict[str, Scores]],  # name -> fault -> scores after
) -> str:
    """dB gained on every fault; jitter and detail of the last one."""
    last = list(before)[-1]
    head = [*before, f"jitter px, {last}", f"detail %, {last}"]

    def ends(found: Scores) -> list[str]:
        return [number(found["jitter"], 2), number(found["detail"], 1)]

    cells = {
        "*before: PSNR*": [number(b["person"], 2) for b in before.values()] + ends(before[last])
    }
    for name, found in rows.items():
        gains = [after["person"] - before[f]["person"] for f, after in found.items()]
        gains = [
            found[f]["person"] if math.isinf(g) else g for f, g in zip(found, gains, strict=True)
        ]
        signed = [
            f"{g:.1f} dB" if math.isinf(before[f]["person"]) else f"{g:+.2f}"
            for f, g in zip(found, gains, strict=True)
        ]
        cells[name] = signed + ends(found[last])
    return markdown(head, cells)


def lowest_cell(before: dict[str, Scores], rows: dict[str, dict[str, Scores]]) -> str:
    """The smallest gain of a `gains_table`, and whether it is a loss that nobody should have."""
    cells = {
        f"{name}, {fault}": gain((before[fault], after))
        for name, found in rows.items()
        for fault, after in found.items()
    }
    where = min(cells, key=cells.get)
    met = "pass" if cells[where] >= -WORSE else "**miss**"
    return f"{where} ({cells[where]:+.2f} dB; at least -{WORSE:g}: {met})"


# The run


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    size: tuple[int, int]
    amount: evaluate.Amount
    chosen: tuple[int, ...]
    """Of evaluate.CLIPS."""
    faults: tuple[str, ...]
    small: tuple[int, int] = (128, 160)
    small_amount: evaluate.Amount = evaluate.Amount(1, 6, 5)
    small_faults: tuple[str, ...] = (*MIXED, ALL)
    """Of the clip of the tables with many rows."""
    all: bool = True
    """The tables with many rows, Turnaround-Tiny, the real clip and the human net, too."""


EVERY = (NOTHING, *faults.FAULTS, ALL)
FULL = Plan((192, 240), evaluate.Amount(1, 8, 9), (0,), EVERY)
QUICK = Plan(
    (96, 128), evaluate.Amount(1, 4, 5), (0,), (NOTHING, "flicker", "jitter", ALL), all=False
)
REAL_FAULTS = (NOTHING, "colour", "flicker", "jitter", ALL)


def at_size(size: tuple[int, int]) -> None:
    evaluate.SIZE, evaluate.SOURCE_SIZE = size, (2 * size[0], 2 * size[1])


def timed(name: str, way: Refiner, frames: Tensor, clip: Clip) -> Tensor:
    began = time.monotonic()
    result = way(frames, clip)
    evaluate.say(f"  {name} ({time.monotonic() - began:.0f} s)")
    return result


def before_and_after(
    clip: Clip,
    chosen: tuple[str, ...],
    ways: dict[str, Refiner],
    kept: tuple[str, ...] = (),
) -> tuple[dict[str, Scores], dict[str, dict[str, Scores]], dict[str, dict[str, Tensor]]]:
    """Scores of every fault, and of what every way makes of it; its pictures, those of `kept` alone
    as every way makes them."""
    before, after = {}, {name: {} for name in ways}
    shown: dict[str, dict[str, Tensor]] = {}
    looks = any(isinstance(way, Row) and way.pose == "found" for way in ways.values())
    for fault in chosen:
        frames = faulty(clip.truth.frames, clip.hand, fault)
        before[fault] = scores(frames, clip)
        shown[fault] = {FAULTY: frames}
        told = with_found_pose(clip, frames) if looks else clip
        for name, way in ways.items():
            result = timed(f"{fault}: {name}", way, frames, told)
            after[name][fault] = scores(result, clip)
            if fault in kept:
                shown[fault][name] = result
    return before, after, shown


def mean_scores(clips: list[dict[str, Scores]]) -> dict[str, Scores]:
    """Row -> means over the clips."""
    return {
        row: {key: sum(c[row][key] for c in clips) / len(clips) for key in clips[0][row]}
        for row in clips[0]
    }


Shown = dict[str, dict[str, Tensor]]
"""Fault -> way -> pictures [V, F, 3, H, W]."""


def fault_tables(plan: Plan) -> tuple[dict[str, str], Clip, evaluate.Task, Shown]:
    """Every fault, refined and treated in the simple ways; the first clip and some pictures."""
    at_size(plan.size)
    clips, first = [], None
    for n in plan.chosen:
        clip, task = synthetic_clip(n, plan.amount)
        evaluate.say(clip.name)
        ways = {REFINED.name: REFINED} | SIMPLE
        *found, shown = before_and_after(clip, plan.faults, ways, (*SHAKES, ALL))
        clips.append(found)
        first = first or (clip, task, shown)
    before = mean_scores([b for b, _ in clips])
    after = {w: mean_scores([a[w] for _, a in clips]) for w in (REFINED.name, *SIMPLE)}
    pairs = {f: (before[f], after[REFINED.name][f]) for f in plan.faults}
    errors = errors_of_measure(first[0])
    tables = {
        "faults": pairs_table(pairs),
        "goals": goals_table(goals(pairs)),
        "ways": gains_table(before, after),
        "measure": ", ".join(f"{f} {miss:.2f} of {put:.2f}" for f, (put, miss) in errors.items()),
    }
    return tables, *first


def known_table(clip: Clip) -> str:
    """What moving pixels could give at best, were the shifts known."""
    return scores_table({fault: scores(undone(clip, fault), clip) for fault in PLACES})


def net_table(clip: Clip, task: evaluate.Task, shown: Shown) -> str:
    """Jitter as the human net sees it."""
    reader = evaluate.body_reader(float(task.rig.K[0, 1, 1]))
    rows = {}
    for fault in SHAKES:
        evaluate.say(f"  {fault}: human net")
        pair = (shown[fault][FAULTY], shown[fault][REFINED.name])
        rows[fault] = [f"{read_jitter(x, clip, reader):.2f}" for x in pair]
    return markdown(["jitter px before", "after"], rows)


def small_tables(plan: Plan) -> dict[str, str]:
    """Told less or more, and term by term."""
    at_size(plan.small)
    clip, _ = synthetic_clip(plan.chosen[-1], plan.small_amount)
    evaluate.say(f"{clip.name}, small: what it is told")
    before, after, _ = before_and_after(clip, (ALL,), {row.name: row for row in GIVEN_ROWS})
    given = {"*before*": before[ALL]} | {name: found[ALL] for name, found in after.items()}
    evaluate.say(f"{clip.name}, small: terms")
    before, after, _ = before_and_after(
        clip, plan.small_faults, {row.name: row for row in TERM_ROWS}
    )
    return {
        "given": scores_table(given),
        "terms": gains_table(before, after),
        "lowest": lowest_cell(before, {n: a for n, a in after.items() if n != PAPER.name}),
    }


def tiny_table(clip: Clip, task: evaluate.Task) -> str:
    """Turnaround-Tiny's own pictures, refined."""
    models = in_comfyui.tiny_models()
    frames = evaluate.sampled(task, evaluate.METHODS[0], models).float().cpu()
    told = with_found_pose(clip, frames)
    refined = timed("Turnaround-Tiny: refined", REFINED, frames, told)
    return scores_table({"as sampled": scores(frames, clip), "refined": scores(refined, clip)})


def real_tables(plan: Plan) -> dict[str, str]:
    at_size(plan.size)
    clip = real_clip(plan.amount)
    evaluate.say(clip.name)
    row = Row(REFINED.name, depth="outlines", pose="none")
    before, after, _ = before_and_after(clip, REAL_FAULTS, {row.name: row})
    pairs = {f: (before[f], after[row.name][f]) for f in REAL_FAULTS}
    return {"real": pairs_table(pairs), "real_goals": goals_table(goals(pairs))}


def sheet(shown: dict[str, Tensor]) -> Tensor:  # [3, rows H, V W]
    """One row a way, one column a view; a middle frame."""
    middle = next(iter(shown.values())).shape[1] // 2
    return torch.cat([torch.cat(list(x[:, middle]), 2) for x in shown.values()], 1)


def save(picture: Tensor) -> None:
    """As good a JPEG as the limit allows."""
    from turnaround.nodes.run import to_pil

    for quality in range(90, 40, -5):
        to_pil(picture).save(PICTURE, quality=quality)
        if PICTURE.stat().st_size < LARGEST_PICTURE:
            return


def page(tables: dict[str, str], plan: Plan, minutes: float) -> str:
    people = ", ".join(" ".join(evaluate.CLIPS[n]) for n in plan.chosen)
    V, count = plan.amount.views, plan.amount.frames
    parts = [
        HEAD.format(
            date=datetime.date.today().isoformat(), commit=evaluate.commit(),
            machine=evaluate.machine(), torch=torch.__version__, minutes=minutes, people=people,
            V=V, count=count, width=plan.size[0], height=plan.size[1], **tables,
        )
    ]  # fmt: skip
    if plan.all:
        parts.append(
            REST.format(
                small="x".join(map(str, plan.small)), small_V=plan.small_amount.views,
                small_count=plan.small_amount.frames, **tables,
            )
        )  # fmt: skip
    return "\n".join(parts)


HEAD = """# What MV-Opt Refine does

Written by `tests/evaluate_refine.py`, everything in one run; not edited by hand.
{date}, commit {commit}, {machine}, torch {torch}, {minutes:.0f} minutes. People, motions and clothes
that no training saw ({people}), {V} views x {count} frames of {width}x{height}. The refiner is told
the cameras, the depth that **Render Conditions** draws of the performer's cloud, and the pose that is
found in the faulty views themselves.

## Goals

{goals}

## Fault by fault

True pictures, a fault put into them, and what **MV-Opt Refine** makes of it: before → after. Clean
pictures (*nothing*) have no error to be lowered: there the PSNR says how much of them is lost.

{faults}

- *colour*: every view but the first has a cast of its own. *flicker*: every frame of every view has a
  brightness of its own. *flash*: all views together change brightness from frame to frame.
  *jitter*: every frame of every view but the first is shifted. *wobble*: it is bent. *limb*: in one
  view a forearm lies elsewhere. *ghost*: the frame before shows through every other one. *blotches*:
  one view is covered by coloured blotches that change.
- *PSNR*: dB inside the true performer. *cross-view*, *flicker*: as in [SCOREBOARD.md](SCOREBOARD.md);
  resampling alone costs the truth what its row says before.
- *jitter*, *off*, *lag*: every true keypoint that a view shows is looked for in the result, patch by
  patch, whatever its colours. Off is the RMS distance from the truth, jitter the RMS of its second
  difference over time, lag how many frames a result trails behind the true motion. The refiner's own
  pose is not asked. What the search errs by, where the shift is known, RMS pixels: {measure}.
- *detail*: gradient energy inside the performer, in percent of the truth's. Blur lowers it; noise,
  bends and colours that are too bright raise it, so that mending them lowers it again.

## Beside simple ways

dB gained (clean pictures: PSNR left).

{ways}
"""

REST = """![Truth, all faults together, refined, blended along optical flow](pictures/refine.jpg)

*From top to bottom: the truth; all faults together; refined; blended along optical flow. One column a
view.*

## If the shifts were known

Faults that move pixels, taken back along the true shift by cubic interpolation: about as much as a
refiner that moves pixels could give. What is missing from 100 % of the detail went when the pixels
were moved there and back.

{known}

## What it is told

All faults together; {small_V} views x {small_count} frames of {small}. Outlines: depth from the
views' masks alone.

{given}

## Term by term

The same clip, dB gained. *colours*: colour, flicker, flash and blotches together; *places*: jitter,
wobble and limb together. A term is left out by a strength of 0.

{terms}

The lowest cell but for mode paper: {lowest}.

## Read by a network

The same jitter of keypoints, as the embedded human net sees it in two of the views (less what it
makes of the true pictures; its own error is larger than that of patches).

{net}

## The output of Turnaround-Tiny

No fault but the model's own; its pictures are softer than the truth everywhere.

{tiny}

## A real man, four calibrated cameras

Pose2Sim's demo clip: the four cameras' pictures are the truth, faults are put in, depth comes from
outlines, no pose is given. Marks are corners, followed along the true pictures' optical flow.

{real}

{real_goals}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small clip, three faults")
    plan = QUICK if parser.parse_args().quick else FULL
    threads, began = torch.get_num_threads(), time.monotonic()
    in_comfyui.start()
    torch.set_num_threads(threads)  # the tests keep to two
    with torch.inference_mode():
        tables, clip, task, shown = fault_tables(plan)
        if plan.all:
            tables["known"] = known_table(clip)
            tables["net"] = net_table(clip, task, shown)
            tables["tiny"] = tiny_table(clip, task)
            tables |= small_tables(plan)
            tables |= real_tables(plan)
    text = page(tables, plan, (time.monotonic() - began) / 60)
    if not plan.all:
        evaluate.sys.stdout.write(text)
        return
    save(sheet({"the truth": clip.truth.frames} | {n: shown[ALL][n] for n in SHOWN}))
    PAGE.write_text(text, encoding="utf-8")
    evaluate.say(f"Written: {PAGE.relative_to(ROOT)}")


SHOWN = (FAULTY, REFINED.name, "blended along optical flow")


if __name__ == "__main__":
    main()
