"""Train the human net: `python -m turnaround.models.tiny.train_human --help`.

On pictures of human_batches.py. Losses, by source:
- masks: binary cross-entropy and soft Dice (Milletari et al. 2016, V-Net), of the performer and, at
  half the weight, of anybody;
- relief: L1 and multi-scale gradient matching (Ranftl et al. 2020, MiDaS; without its scale and
  shift, for the relief is metric), inside the mask;
- pixels a metre and height: L1 of logarithms, the scale-invariant split of Eigen et al. 2014 into
  one number for the distance and a map for the shape;
- normals: 1 - cosine;
- keypoints: cross-entropy of the heat map with a Gaussian around the truth and L1 of the
  soft-argmax (Sun et al. 2018, integral regression, with the regularised map of Nibali et al. 2018,
  DSNT), for keypoints inside the picture; confidence: binary cross-entropy with 1 = seen,
  0.5 = covered, 0 = outside.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras import orbit_rig
from ..geometry import encode_normals
from ..human_frames import OPENPOSE_BONES, estimate_humans, to_openpose
from ..human_net import CROP, HEAT_STRIDE, HumanNet, HumanOutput
from ..metrics import depth_errors, mask_iou, normal_angle
from ..performer import render_color
from ..performer_light import draw_lighting
from ..performer_truth import (
    keypoint_visibility,
    keypoints_3d,
    project_keypoints,
    surface_truth,
)
from .human_batches import HARD, HumanBatch, HumanBatches, halve
from .human_pool import draw_pose
from .training import Run, Settings, common_options, prepare, run_options

log = logging.getLogger(__name__)

HEAT_SIGMA = 1.2
"""Cells of the heat map."""
STAGES = ((0.6, (64, 64)), (0.9, (96, 96)), (1.0, CROP))
"""Share of the run until which crops have this size: the first learn what a body is at a sixth of
the cost (progressive resizing: Karras et al. 2018 and Tan and Le 2021, EfficientNetV2)."""
HARD_SHARE = 0.5
"""Share of the run over which difficult pictures become as many as they will be (Bengio et al. 2009,
curriculum learning)."""
REFRESH_STEPS = 200
"""Between looks for people that were rendered meanwhile."""


def _mask_loss(logits: Tensor, truth: Tensor) -> Tensor:  # [B, H, W] each
    p = logits.sigmoid()
    both = (p * truth).flatten(1).sum(1)
    dice = 1 - (2 * both + 50) / (p.flatten(1).sum(1) + truth.flatten(1).sum(1) + 50)
    return F.binary_cross_entropy_with_logits(logits, truth) + 0.5 * dice.mean()


def _gradient_matching(error: Tensor, known: Tensor) -> Tensor:  # [B, h, w] each
    """L1 of the error's slopes at four scales, where both neighbours are known."""
    total = error.new_zeros(())
    for scale in range(4):
        e, k = error[:, :: 2**scale, :: 2**scale], known[:, :: 2**scale, :: 2**scale]
        for dim in (1, 2):
            size = e.shape[dim] - 1
            both = k.narrow(dim, 0, size) & k.narrow(dim, 1, size)
            slope = e.diff(dim=dim).abs() * both
            total = total + slope.sum() / both.sum().clamp(min=1)
    return total


def _heat_targets(keypoints: Tensor, height: int, width: int) -> Tensor:  # [B, P, h, w], sum 1
    y = (torch.arange(height, device=keypoints.device) + 0.5) * HEAT_STRIDE
    x = (torch.arange(width, device=keypoints.device) + 0.5) * HEAT_STRIDE
    spread = 2 * (HEAT_SIGMA * HEAT_STRIDE) ** 2
    gx = torch.exp(-((keypoints[..., :1] - x) ** 2) / spread)
    gy = torch.exp(-((keypoints[..., 1:] - y) ** 2) / spread)
    heat = gy[..., :, None] * gx[..., None, :]
    return heat / heat.sum((2, 3), keepdim=True).clamp(min=1e-6)


def loss_terms(out: HumanOutput, truth: HumanBatch) -> dict[str, Tensor]:
    """The weighted terms."""
    relief, surface, normals = halve(truth)
    pixels = surface.sum().clamp(min=1)
    error = (out.relief - relief) * surface
    angle = (1 - (out.normals * normals).sum(1)) * surface
    inside = (truth.confidence > 0).float()
    count = inside.sum().clamp(min=1)
    heat = _heat_targets(truth.keypoints, *out.heat.shape[-2:])
    entropy = -(heat * out.heat.flatten(2).log_softmax(-1).view(out.heat.shape)).sum((2, 3))
    away = (out.keypoints - truth.keypoints).abs().sum(-1) / HEAT_STRIDE
    here = truth.present.float()[:, None]
    scale = (out.scale - truth.scale).abs() * here
    return {
        "mask": 2 * _mask_loss(out.mask, truth.masks),
        "anyone": _mask_loss(out.anyone, truth.anyone),
        "relief": 8 * error.abs().sum() / pixels,
        "slope": 2 * _gradient_matching(error, surface),
        "normals": 3 * angle.sum() / pixels,
        "heat": 3 * (entropy * inside).sum() / count,
        "keypoints": 0.3 * (away.clamp(max=12) * inside).sum() / count,
        "sure": 0.5 * F.binary_cross_entropy_with_logits(out.confidence, truth.confidence),
        "scale": 2 * (scale / scale.new_tensor([1.0, 2.0])).sum() / here.sum().clamp(min=1),
    }


@torch.no_grad()
def scores(net: HumanNet, batches: list[HumanBatch]) -> dict[str, float]:
    """How well crops are answered: the means over all pictures with a performer."""
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        if not math.isnan(value):
            rows.setdefault(name, []).append(value)

    for truth in batches:
        out = net(truth.pictures)
        relief, surface, normals = halve(truth)
        for b in range(len(truth.pictures)):
            if not truth.present[b]:
                add("nobody: share of pixels taken", float((out.mask[b] > 0).float().mean()))
                continue
            add("mask IoU", mask_iou(out.mask[b].sigmoid(), truth.masks[b]))
            where = surface[b]
            true_scale, true_height = truth.scale[b].exp().tolist()
            scale, height = out.scale[b].exp().tolist()
            # Any focal length serves: it cancels. A camera as far as most clips are filmed from.
            focal = 3.0 * true_scale
            near = (focal / scale + out.relief[b], focal / true_scale + relief[b])
            relative, metric = depth_errors(*near, where)
            add("depth, relative, median scaled", relative)
            add("depth, relative, metric", metric)
            add("distance, relative", abs(true_scale / scale - 1))
            add("height, relative", abs(height / true_height - 1))
            add("relief, cm", float(100 * (out.relief[b] - relief[b]).abs()[where].mean()))
            add("normals, degrees", normal_angle(out.normals[b], normals[b], where))
            reach = 0.1 * true_scale * true_height
            for name, counts in (
                ("seen", truth.confidence[b] > 0.75),
                ("in the picture", truth.confidence[b] > 0),
            ):
                away = (out.keypoints[b] - truth.keypoints[b]).norm(dim=-1)[counts]
                add(f"PCK@0.1 of height, {name}", float((away < reach).float().mean()))
                add(f"keypoint pixels, {name}", float(away.mean()))
    return {name: float(np.mean(values)) for name, values in sorted(rows.items())}


def score_pool(
    net: HumanNet, folder: Path, split: str, count: int, batch: int = 16
) -> dict[str, float]:
    """Scores on pictures of a split that are the same every time."""
    source = HumanBatches(folder, split, CROP)
    sizes = [min(batch, count - at) for at in range(0, count, batch)]
    batches = [source.batch(np.random.default_rng((7, i)), n) for i, n in enumerate(sizes)]
    return scores(net.eval(), batches)


FRAME_SIZES = ((320, 240), (240, 426), (512, 384), (256, 320))


def draw_frame(rng: np.random.Generator, split: str, background: np.ndarray) -> Frame:
    """Somebody of a split anywhere in a frame of another size than the net's."""
    posed, look, height = draw_pose(rng, split, new_pose=False)
    width, tall = FRAME_SIZES[rng.integers(len(FRAME_SIZES))]
    fov = math.radians(rng.uniform(28, 60))
    extent = posed.vertices[0].amax(0) - posed.vertices[0].amin(0)
    reach = max(float(extent[1]), float(extent[[0, 2]].norm()) * tall / width)
    distance = reach / rng.uniform(0.35, 0.85) / 2 / math.tan(fov / 2) + 0.3
    room = 0.5 - 0.5 * reach / (2 * distance * math.tan(fov / 2))
    aside = (
        torch.tensor([rng.uniform(-1, 1), rng.uniform(-1, 1)]) * room * distance * math.tan(fov / 2)
    )
    rig = orbit_rig(
        torch.tensor([rng.uniform(-math.pi, math.pi)]), torch.tensor([rng.uniform(-0.1, 0.3)]),
        distance, fov, width, tall,
    )  # fmt: skip
    rig.T_camera_world[0, :2, 3] += aside.float()
    behind = cv2.resize(background, (width, tall), interpolation=cv2.INTER_LINEAR)
    behind = torch.from_numpy(behind).permute(2, 0, 1) / 255
    light = draw_lighting(int(rng.integers(1 << 30)))
    camera = (rig.K[0], rig.T_camera_world[0], width, tall)
    picture, mask = render_color(posed, 0, look, *camera, behind, light)
    truth = surface_truth(posed, rig)
    pixels, depth = project_keypoints(keypoints_3d(posed), rig)
    seen = keypoint_visibility(pixels, depth, truth.depth)[0, 0]
    return Frame(picture, mask, truth.depth[0, 0], truth.normals_camera[0, 0], pixels[0, 0], seen,
                 rig.K[0], height)  # fmt: skip


class Frame(NamedTuple):
    """A picture as a camera gives it, and the truth."""

    picture: Tensor
    """[3, H, W]"""
    mask: Tensor
    """[H, W]"""
    depth: Tensor
    """[H, W] metres; 0 = background."""
    normals: Tensor
    """[3, H, W] camera frame."""
    keypoints: Tensor
    """[P, 2] pixels."""
    seen: Tensor
    """[P] bool."""
    K: Tensor
    """[3, 3]"""
    height: float
    """Metres of the person standing."""


@torch.no_grad()
def score_frames(net: HumanNet, folder: Path, split: str, count: int) -> dict[str, float]:
    """The whole way, `estimate_humans` with the true focal length, on frames of many sizes."""
    backgrounds = np.load(folder / f"{split}_backgrounds.npy", mmap_mode="r")
    rows: dict[str, list[float]] = {}
    for i in range(count):
        rng = np.random.default_rng((11, i))
        frame = draw_frame(rng, split, backgrounds[rng.integers(len(backgrounds))])
        focal, centre = float(frame.K[1, 1]), (float(frame.K[0, 2]), float(frame.K[1, 2]))
        found = estimate_humans(net, frame.picture[None], focal, centre=centre)
        iou = mask_iou(found.masks[0], frame.mask)
        where = (found.masks[0] > 0.5) & (frame.mask > 0.5) & (frame.depth > 0)
        relative, metric = depth_errors(found.depth[0], frame.depth, where)
        away = (found.keypoints[0] - frame.keypoints).norm(dim=-1)[frame.seen]
        tall = focal * frame.height / float(frame.depth[frame.depth > 0].median())
        here = bool(found.present[0])
        row = {
            "found": float(here),
            "mask IoU": iou,
            "mask IoU above 0.8": float(iou > 0.8),
            "depth, relative, median scaled": relative,
            "depth, relative, metric": metric,
            "normals, degrees": normal_angle(found.normals[0], frame.normals, where),
            "PCK@0.1 of height, seen": float((away < 0.1 * tall).float().mean()) if here else 0.0,
            "keypoint error, share of height": float(away.mean()) / tall if here else math.nan,
        }
        for name, value in row.items():
            if not math.isnan(value):
                rows.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in rows.items()}


def contact_sheet(pictures: Tensor, out: HumanOutput) -> Tensor:  # [3, H, W]
    """A column a picture: itself, the mask, relief, normals, keypoints."""
    from PIL import Image, ImageDraw

    size = pictures.shape[-2:]
    mask = (out.mask.sigmoid() > 0.5).float()[:, None]
    shown = pictures * (0.25 + 0.75 * mask)
    shown[:, 1:] = shown[:, 1:] + 0.25 * (out.anyone.sigmoid() > 0.5).float()[:, None] * (1 - mask)
    relief = F.interpolate(out.relief[:, None], size, mode="bilinear")
    normals = F.interpolate(encode_normals(out.normals.movedim(1, -1)).movedim(-1, 1), size)
    points, sure = to_openpose(out.keypoints, out.confidence.sigmoid())
    drawn = []
    for picture, xy, c in zip(pictures, points.tolist(), sure.tolist(), strict=True):
        pixels = (picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(pixels)
        pen = ImageDraw.Draw(image)
        for n, (a, b) in enumerate(OPENPOSE_BONES):
            if min(c[a], c[b]) > 0.3:
                color = (int(255 * (n % 3 == 0)), 255 if n % 2 else 120, int(255 * (n % 3 == 2)))
                pen.line([*xy[a], *xy[b]], fill=color, width=2)
        drawn.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    rows = [
        pictures,
        shown,
        ((0.5 - relief) * mask).expand(-1, 3, -1, -1),
        normals * mask + 0.5 * (1 - mask),
        torch.stack(drawn).to(pictures),
    ]
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1)


@torch.no_grad()
def initialise(net: HumanNet) -> None:
    """Unit gain everywhere (He et al. 2015), quiet residual branches, answers near zero.

    With torch's default, a third of the variance, the signal fades on its way through the
    convolutions that no norm follows, and keypoints hardly start to be learned.
    """
    for name, module in net.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            continue
        quiet = name in ("surface", "joints", "scale2") or name.endswith("conv2")
        # Two paths meet in the decoder at every size: their sum is to be of unit size.
        gain = 0.3 if quiet else 0.7 if "from_" in name else 1.4 if name == "stem" else 1.1
        module.weight.normal_(0, gain * module.weight[0].numel() ** -0.5)
        module.bias.zero_()


def main() -> None:
    parser = common_options(__doc__, steps=9_000, batch=16, lr=2e-3)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of `python models/tiny people`"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--export", type=Path, help="write the net here in float16 at the end")
    parser.add_argument(
        "--score", choices=("validation", "test"), help="score the net, don't train"
    )
    parser.add_argument("--pictures", type=int, default=320, help="to score on")
    args = parser.parse_args()
    prepare(args)
    net = HumanNet()
    initialise(net)
    log.info("%.2f million parameters", sum(p.numel() for p in net.parameters()) / 1e6)
    run = Run(
        net.to(memory_format=torch.channels_last),
        Settings.of(args, warmup=200),
        **run_options(args),
    )
    if args.score:
        with run.averaged():
            found = {
                "crops": score_pool(net, args.data, args.score, args.pictures),
                "whole frames": score_frames(net, args.data, args.score, args.pictures // 4),
            }
        log.info("%s, step %d: %s", args.score, run.step, json.dumps(found, indent=1))
    else:
        train(net, run, args)
    if args.export:
        run.export(args.export)


class Prefetch(torch.utils.data.Dataset):
    """Batches by step number, the same ones with and without worker processes."""

    def __init__(self, load, seed: int, first: int, steps: int, workers: int) -> None:
        self.load, self.seed, self.first, self.steps = load, seed, first, steps
        self.ready = None
        if workers:  # one batch is one item; a GPU wants many loaded at once
            cv2.setNumThreads(0)  # threads of its own don't survive in the workers
            loader = torch.utils.data.DataLoader(
                self, batch_size=None, num_workers=workers, prefetch_factor=4, pin_memory=False
            )
            self.ready = iter(loader)

    def __len__(self) -> int:
        return max(0, self.steps - self.first)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step = self.first + index
        return vars(self.load(np.random.default_rng((self.seed, step)), step))

    def __call__(self, rng: np.random.Generator, step: int) -> HumanBatch:
        return HumanBatch(**next(self.ready)) if self.ready else self.load(rng, step)


def train(net: HumanNet, run: Run, args) -> None:
    """The run itself."""
    source = HumanBatches(args.data, "train", CROP)
    log.info("%d people", len(source))
    stages = [(share, source.of_size(size)) for share, size in STAGES]
    shown = source.batch(np.random.default_rng(1), 12).pictures.to(run.device)

    def load(rng: np.random.Generator, step: int) -> HumanBatch:
        done = step / args.steps
        hard = HARD * (0.15 + 0.85 * min(1.0, done / HARD_SHARE))
        return next(s for share, s in stages if done < share).batch(rng, args.batch, hard)

    batches = Prefetch(load, args.seed, run.step, args.steps, args.workers)

    def step_loss(rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        if step % REFRESH_STEPS == 0 and not args.workers:
            source.refresh()
        truth = batches(rng, step).to(run.device)
        pictures = truth.pictures.contiguous(memory_format=torch.channels_last)
        return loss_terms(net(pictures), truth)

    run.fit(step_loss, lambda _step: contact_sheet(shown, net(shown)))


if __name__ == "__main__":
    main()
