"""The scoreboard: how close sampled views come to the truth, all from one run.

    python dev.py evaluate [--quick] [--picture sheet.jpg]

Rows are what a graph has before sampling, the full model, the model with one part taken away, and
what the VAE alone loses. Everything starts from the same noise. Two tables: people and motions that
no training saw, fixed here before any result was seen; and a real man from four calibrated cameras
(tests/real_clip.py). The full run writes docs/SCOREBOARD.md; --quick (one clip, four views, five
frames) only shows it.
"""

import argparse
import datetime
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import in_comfyui
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SCOREBOARD = ROOT / "docs" / "SCOREBOARD.md"
CLIPS = [(p, m) for p in ("kira", "leo") for m in ("dance_a", "dance_b")]
FIRST_CLOTHES, START = 1_000_003, 0.2
STEPS, SEED = 6, 7
SIZE, SOURCE_SIZE = (192, 240), (384, 480)
"""Width and height of the views, and of the clip that they are made from."""
GRAZING = 0.4
"""Surface seen at a smaller cosine (flatter than 66 degrees) is left out of the cross-view error: a
pixel there covers so much of it that even the truth disagrees with itself."""
DRAWN = 0.06
"""A pixel further than this from the background's grey counts as performer."""


@dataclass(frozen=True)
class Amount:
    """How much is evaluated."""

    clips: int = 4
    views: int = 8
    frames: int = 13


@dataclass(frozen=True)
class Method:
    """A row that is sampled."""

    name: str
    normals: bool = True
    sync: str = "trained"
    reference: bool = True


METHODS = (
    Method("full model"),
    Method("without normals", normals=False),
    Method("without sync", sync="off"),
    Method("training-free sync", sync="training-free"),
    Method("without reference", reference=False),
)
PARTIAL, ROUND_TRIP, TRUTH = "partial rendering alone", "VAE round trip", "the truth itself"
GIVEN = "the same, far side guessed"
COLUMNS = {
    "person": ("PSNR ↑", 2), "seen": ("seen side ↑", 2), "unseen": ("unseen side ↑", 2),
    "behind": ("beyond 90° ↑", 2), "ssim": ("SSIM ↑", 3), "haarpsi": ("HaarPSI ↑", 3),
    "iou": ("mask IoU ↑", 3), "normals": ("normals ° ↓", 1), "keypoints": ("keypoints % ↓", 2),
    "flicker": ("flicker ×100 ↓", 2), "cross": ("cross-view ×100 ↓", 2),
    "cross_db": ("cross-view dB ↑", 2),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One clip: what the graph is given, and what is true."""

    name: str
    source: object  # Views, one camera
    rig: object  # Rig of the views
    front: object  # Views, the seen points alone
    partial: object  # Views, what the model is given
    normals: object
    seen: Tensor  # [V, F, H, W] bool: the source camera saw this side
    truth: object  # Views
    scored: list[int]
    """Views that count."""
    depth: Tensor | None
    """[V, F, H, W] true metres of surface that is not seen at a grazing angle; None = not known."""
    flow: Tensor
    """[V, F - 1, 2, H, W] pixels, from one frame to the next."""
    flow_seen: Tensor
    """[V, F - 1, H, W] bool."""
    normals_true: Tensor | None = None
    """[V, F, 3, H, W] camera axes."""
    keypoints_true: Tensor | None = None
    """[V, F, 17, 2] pixels, COCO's order."""
    keypoints_seen: Tensor | None = None
    """[V, F, 17] bool."""
    depth_drawn: Tensor | None = None
    """[V, F, H, W] metres: Render Conditions' depth of the cloud."""
    depth_true: Tensor | None = None
    """[V, F, H, W] metres, grazing surface too."""
    points_true: Tensor | None = None
    """[F, P, 3] all of performer_truth.KEYPOINTS, world."""


def say(text: str) -> None:
    sys.stdout.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stdout.flush()


def drawn_conditions(source, depth, rig_of_cloud):
    """Performer Geometry and Render Conditions, as the flagship graph has them."""
    from turnaround.nodes import conditions, geometry

    clouds = [
        geometry.PerformerGeometry.execute(
            source, "near is white", 40.0, 1.7, 1, far_side, depth_views=depth
        ).args[0]
        for far_side in ("guessed", "open")
    ]
    rig = rig_of_cloud(clouds[0])
    (partial, normals, visibility, drawn), (front, *_) = (
        conditions.RenderConditions.execute(cloud, rig, "kept").args for cloud in clouds
    )
    return clouds[0], rig, front, partial, normals, visibility.masks, drawn.frames[:, :, 0]


def synthetic_task(performer_name: str, motion: str, clothes: int, amount: Amount) -> Task:
    """A held-out person in a held-out motion."""
    from turnaround.models import performer, performer_truth
    from turnaround.models.points import unproject_depth
    from turnaround.models.views import Views
    from turnaround.nodes import cameras, views

    look = performer.draw_appearance(clothes)
    times = START + torch.arange(amount.frames) / views.SAMPLE_FPS
    posed = performer.pose_performer(performer_name, motion, times, look)
    video, depth, _ = views.SamplePerformer.execute(
        performer_name, motion, amount.frames, *SOURCE_SIZE, START, clothes
    ).args

    def orbit(cloud):
        return cameras.OrbitRig.execute(
            amount.views, 0.0, 360.0, 0.0, 1, 20.0, 35.0, 0.0, *SIZE, cloud
        ).args[0]

    cloud, rig, front, partial, normals, seen, drawn = drawn_conditions(video, depth, orbit)
    # The cloud's origin is where the geometry found the performer's middle, a few centimetres from
    # the middle of the body; the truth has to stand where the cloud stands.
    shift = (video.rig.T_camera_world - cloud.source.T_camera_world)[0, :3, 3]
    posed = replace(posed, vertices=posed.vertices + shift, joints=posed.joints + shift)
    clip = performer.render_performer(posed, look, rig)
    surface = performer_truth.surface_truth(posed, rig)
    V, F = amount.views, amount.frames
    v, f = torch.arange(V).repeat_interleave(F - 1), torch.arange(F - 1).repeat(V)
    flow, visible = performer_truth.surface_flow(surface, posed, rig, (v, f), (v, f + 1))
    covered = moved_masks(clip.masks, flow.unflatten(0, (V, F - 1)))
    rays = unproject_depth(torch.ones(1, SIZE[1], SIZE[0]), rig.K[0])[0]
    cosine = -(surface.normals_camera * torch.nn.functional.normalize(rays, dim=0)).sum(2)
    points = performer_truth.keypoints_3d(posed)
    pixels, far = performer_truth.project_keypoints(points, rig)
    shown = performer_truth.keypoint_visibility(pixels, far, surface.depth)
    coco = list(performer_truth.COCO17.indices)
    return Task(
        f"{performer_name} {motion}", video, rig, front, partial, normals, seen,
        Views(clip.frames, clip.masks, rig, views.SAMPLE_FPS), list(range(V)),
        torch.where(cosine > GRAZING, surface.depth, 0.0),
        flow.unflatten(0, (V, F - 1)), visible.unflatten(0, (V, F - 1)) & covered, surface.normals_camera,
        pixels[:, :, coco], shown[:, :, coco], drawn, surface.depth, points,
    )  # fmt: skip


def moved_masks(masks: Tensor, flow: Tensor) -> Tensor:  # [V, F - 1, H, W] bool
    """Pixels that the performer covers fully, before and after they move: no background mixed in."""
    from turnaround.models.metrics import sample

    H, W = masks.shape[-2:]
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    dx, dy = flow.flatten(0, 1).unbind(1)
    after = sample(masks[:, 1:].flatten(0, 1)[:, None], x + dx, y + dy)[:, 0]
    return (masks[:, :-1] > 0.999) & (after > 0.999).view_as(flow[:, :, 0])


def optical_flow(frames: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """OpenCV's DIS flow of the true pictures (twice the views' size), where there and back agree."""
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = (frames.mean(2) * 255).byte().numpy()
    flows, kept = [], []
    for view, inside in zip(grey, masks > 0.5, strict=True):
        for f in range(len(view) - 1):
            there = dis.calc(view[f], view[f + 1], None)
            back = dis.calc(view[f + 1], view[f], None)
            h, w = view[f].shape
            place = there + np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)
            returned = cv2.remap(back, place, None, cv2.INTER_LINEAR)
            agrees = torch.from_numpy(there + returned).norm(dim=-1) < 1.0
            flows.append(torch.from_numpy(there).movedim(-1, 0))
            kept.append(agrees & inside[f])
    shape = (len(frames), frames.shape[1] - 1)
    half = torch.nn.functional.avg_pool2d(torch.stack(flows), 2) / 2
    whole = torch.nn.functional.avg_pool2d(torch.stack(kept).float()[:, None], 2)[:, 0] == 1
    return half.unflatten(0, shape), whole.unflatten(0, shape)


def real_task(folder: Path, amount: Amount) -> tuple[Task, float]:
    """Camera 1 of the real clip in, cameras 2 to 4 to be compared; and the error of the rig."""
    import real_clip
    from turnaround.models.cameras import Rig
    from turnaround.models.geometry import BACKGROUND
    from turnaround.models.relief import person_scale, relief_depth
    from turnaround.models.rig_files import rig_from_text
    from turnaround.models.views import Views, resize_frames

    clip = real_clip.load(folder, rig_from_text, amount.frames, *SOURCE_SIZE)
    names = tuple(f"cam0{n + 1}" for n in range(len(clip.K)))
    big = Rig(clip.K, clip.T_camera_first, *SOURCE_SIZE, names)
    source = Views(clip.frames[:1], clip.masks[:1], big.select([0]), clip.fps)
    # The relief at the distance that the cameras give, not at one guessed from a body height.
    focal, masks = float(clip.K[0, 1, 1]), clip.masks[0]
    height = float(clip.centre[2]) / (focal * person_scale(masks, 1.0))
    depth = Views(relief_depth(masks, focal, height)[None, :, None], clip.masks[:1], None, clip.fps)

    def around(cloud):
        pose = clip.T_camera_first @ cloud.source.T_camera_world[0]
        return replace(big, T_camera_world=pose).resized(*SIZE)

    _, rig, front, partial, normals, seen, _ = drawn_conditions(source, depth, around)
    grey = torch.where(clip.masks[:, :, None] > 0.5, clip.frames, BACKGROUND)
    frames = torch.stack([resize_frames(view, *SIZE) for view in grey])
    small = torch.stack([resize_frames(m[:, None], *SIZE)[:, 0] for m in clip.masks])
    flow, flow_seen = optical_flow(clip.frames, clip.masks)
    task = Task(
        "real clip", source, rig, front, partial, normals, seen, Views(frames, small, rig, clip.fps),
        [1, 2, 3], None, flow, flow_seen,
    )  # fmt: skip
    return task, clip.rig_error


def sampled(task: Task, method: Method, models) -> Tensor:  # [V, F, 3, H, W]
    """The views of one row, through the pack's own nodes."""
    from turnaround.models.geometry import BACKGROUND
    from turnaround.nodes import conditioning, sampler, views

    model, vae, sync = models
    normals = task.normals
    if not method.normals:
        plain = torch.full_like(normals.frames, BACKGROUND, dtype=torch.float32)
        normals = replace(normals, frames=plain)
    positive, negative, latent, _, reference = conditioning.MultiViewConditioning.execute(
        vae, task.partial, normals, reference=task.source if method.reference else None
    ).args
    samples = sampler.MultiViewSampler.execute(
        model, positive, negative, latent, SEED, STEPS, 1.0, "euler", "simple", 1.0,
        0.0 if method.sync == "off" else 1.0, sync=None if method.sync == "training-free" else sync,
        rig=task.rig, reference=reference,
    ).args[0]  # fmt: skip
    return views.DecodeViews.execute(samples, vae, task.truth.fps, task.rig).args[0].frames


def body_reader(focal: float):
    """What reads normals and keypoints off finished pictures: the embedded human net.

    frames [N, 3, H, W] -> normals [N, 3, H, W] (unit, camera axes: x right, y down, z away; 0 where
    it sees nobody) and keypoints [N, 17, 2] (pixels, COCO's order; the picture's middle where it
    sees nobody).
    """
    from turnaround.models.human_frames import Looking, coco17, estimate_humans
    from turnaround.nodes import embedded, human

    weights = embedded.TINY / "human" / "turnaround_tiny_human.safetensors"
    net = human.load_human(str(weights)).model

    def read(frames: Tensor) -> tuple[Tensor, Tensor]:
        found = estimate_humans(net, frames, focal, Looking(steadiness=0))
        H, W = frames.shape[-2:]
        middle = torch.tensor([W / 2, H / 2])
        points = torch.where(found.present[:, None, None], coco17(found)[0], middle)
        return found.normals, points

    return read


def scores(result: Tensor, task: Task, reader=None) -> dict[str, float]:
    """Every column of one row."""
    from turnaround.models import metrics
    from turnaround.models.geometry import BACKGROUND

    use = task.scored
    result, truth = result.float().cpu()[use], task.truth.frames[use]
    inside, seen = task.truth.masks[use] > 0.5, task.seen[use]
    towards = torch.nn.functional.normalize(task.rig.centers, dim=1)
    behind = (towards @ towards[0])[use] < -1e-3  # strictly beyond a right angle
    drawn = (result - BACKGROUND).abs().amax(2) > DRAWN
    found = {
        "person": metrics.psnr(result, truth, inside),
        "seen": metrics.psnr(result, truth, inside & seen),
        "unseen": metrics.psnr(result, truth, inside & ~seen),
        "behind": metrics.psnr(result[behind], truth[behind], inside[behind]),
        "ssim": metrics.ssim(result, truth, inside),
        "haarpsi": metrics.haarpsi(result, truth, inside),
        "iou": metrics.mask_iou(drawn.float(), inside.float()),
        "flicker": 100 * metrics.flicker(result, task.flow[use], task.flow_seen[use]),
    }
    if task.depth is not None:
        agreed = metrics.cross_view_consistency(result, task.depth[use], task.rig.select(use))
        found |= {"cross": 100 * agreed.rmse, "cross_db": agreed.psnr}
    if reader is not None and task.normals_true is not None:
        normals, points = reader(result.flatten(0, 1))
        rows = inside.any(-1).sum(-1).float()
        shape = result.shape[:2]
        error = metrics.keypoint_error(
            points.unflatten(0, shape), task.keypoints_true[use], rows, task.keypoints_seen[use]
        )
        found |= {
            "normals": metrics.normal_angle(
                normals.unflatten(0, shape), task.normals_true[use], inside
            ),
            "keypoints": 100 * error.share,
        }
    return found


def condition_angle(task: Task) -> float:
    """Mean angle (degrees) of the drawn normal maps to the truth, on the seen side."""
    from turnaround.models import metrics
    from turnaround.models.views import as_pictures

    n = 2 * as_pictures(task.normals) - 1
    n = n * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    where = task.seen & (task.truth.masks > 0.5)
    return metrics.normal_angle(n, task.normals_true, where)


def evaluate(task: Task, models, sheets: list) -> dict[str, dict[str, float]]:
    """All rows of one clip."""
    from turnaround.models.views import Views, as_pictures, contact_sheet
    from turnaround.nodes import views

    reader = body_reader(float(task.rig.K[0, 1, 1])) if task.normals_true is not None else None
    rows = {PARTIAL: as_pictures(task.front), GIVEN: as_pictures(task.partial)}
    for method in METHODS:
        began = time.monotonic()
        say(f"  {task.name}: {method.name}")
        rows[method.name] = sampled(task, method, models)
        say(f"    {time.monotonic() - began:.0f} s")
    say(f"  {task.name}: {ROUND_TRIP}")
    clips, _ = views.fit_to_vae(task.truth)
    latents = views.encode_views(models[1], clips, len(task.truth))
    rows[ROUND_TRIP] = views.decode_views(models[1], latents.split(1))
    rows[TRUTH] = task.truth.frames
    say(f"  {task.name}: scores")
    shown = (rows[TRUTH], rows[PARTIAL], rows[GIVEN], rows["full model"], rows["without sync"])
    sheets.append(torch.cat([contact_sheet(Views(x.cpu(), None, task.rig), 4) for x in shown], 2))
    return {name: scores(x, task, reader) for name, x in rows.items()}


def cell(values: list[float], digits: int) -> str:
    """Mean and spread over the clips."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return "–"
    if any(math.isinf(v) for v in values):
        return "∞"
    numbers = torch.tensor(values)
    spread = f" ± {float(numbers.std()):.{digits}f}" if len(values) > 1 else ""
    return f"{float(numbers.mean()):.{digits}f}{spread}"


def table(found: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: one row a method, mean ± standard deviation over the clips."""
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name in found[0]:
        cells = [
            cell([clip[name].get(key, math.nan) for clip in found], digits)
            for key, (_, digits) in COLUMNS.items()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commit() -> str:
    """The commit, and whether files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = [x for x in git("status", "--porcelain").splitlines() if "SCOREBOARD" not in x]
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    named = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return f"{named or platform.machine()}, {os.cpu_count()} cores"


def page(synthetic, real, amount: Amount, angles: list[float], rig_error: float, minutes: float):
    """docs/SCOREBOARD.md"""
    people = ", ".join(f"{p} {m}" for p, m in CLIPS[: amount.clips])
    pose = (
        " `normals` and `keypoints` are read off the pictures by the embedded human net, which makes "
        "errors of its own: its figures for the truth itself are the least that any row can have."
    )
    return f"""# Scoreboard

Written by `python dev.py evaluate`, everything in one run; not edited by hand.
{datetime.date.today().isoformat()}, commit {commit()}, {machine()}, torch {torch.__version__},
{minutes:.0f} minutes. Turnaround-Tiny through the pack's own nodes: {STEPS} steps, euler, simple,
cfg 1, seed {SEED}, views of {SIZE[0]}x{SIZE[1]}, {amount.frames} frames, from a clip of
{SOURCE_SIZE[0]}x{SOURCE_SIZE[1]}.

One network serves every row: "without" means that its input is taken away when sampling (normal
maps replaced by the background's grey; view sync off; no reference), not that a network was trained
without it, as the paper's ablation does.

## People and motions that no training saw

{amount.clips} clip(s) ({people}), {amount.views} views around the performer, with exact depth of
the source view. Mean ± standard deviation over the clips.

{table(synthetic)}

The drawn normal maps lie {sum(angles) / len(angles):.1f}° from the truth on the seen side.{pose}

## A real man, four calibrated cameras

Pose2Sim's demo clip (BSD-3): camera 1 in; the result from where cameras 2, 3 and 4 stand (47°,
140° and 109° from camera 1) against their pictures, background taken away. Depth is a relief of
the mask at the calibrated distance. Calibration check, before any of this: the middle of the man's
cap in the four pictures meets in one point to {rig_error:.1f} pixels of 1088x1920 (median).

{table([real])}

What can't be measured here: normals, keypoints and cross-view agreement, for want of true geometry.
Masks are estimates (tests/real_clip.py), so the IoU has their errors too; cameras differ in
exposure and white balance, which costs every row some PSNR; flicker follows OpenCV's DIS flow.

## Columns

- *PSNR*: dB inside the true performer; of its side that the source camera saw; of the side it did
  not see; of views more than 90° from the source. All pixels of a clip are averaged before the
  logarithm.
- *SSIM*: Wang et al. 2004, inside the performer. *HaarPSI*: Reisenhofer et al. 2018, a perceptual
  similarity without a network, weighted by the performer. Both 1 when equal.
- *mask IoU*: what is not background grey against the true performer.
- *normals*, *keypoints*: read off the result; degrees, and percent of the body's height.
- *flicker*: 100 x RMS difference between a frame and the next one brought back by the surface's own
  motion (exact for synthetic people), where both show it and no background is mixed in. Blur lowers
  it: below the truth's own figure it is no merit.
- *cross-view*: 100 x RMS difference (and dB) between the colours that two views give to the same
  surface point, over all pairs of views and all points that both see (true depth, within 2 cm;
  surface seen flatter than 66° left out).
- *{TRUTH}* shows what resampling alone costs the last columns; *{ROUND_TRIP}* is what the VAE
  loses, so the most that sampling could reach. *{PARTIAL}* are the points that the source
  camera saw, drawn from the other cameras, their colours shining through from behind; *{GIVEN}*
  is what the model is given: the body closed by **Performer Geometry**.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--picture", type=Path, help="truth | seen points | given | full | without sync"
    )
    parser.add_argument("--quick", action="store_true", help="one clip, 4 views, 5 frames")
    args = parser.parse_args()
    amount = Amount(1, 4, 5) if args.quick else Amount()
    began = time.monotonic()
    say("Starting ComfyUI in process")
    threads = torch.get_num_threads()
    in_comfyui.start()
    torch.set_num_threads(threads)  # the tests keep to two
    from turnaround_dev import ensure_real_clip

    found, angles, sheets = [], [], []
    with torch.inference_mode():
        models = in_comfyui.tiny_models()
        for n, (performer, motion) in enumerate(CLIPS[: amount.clips]):
            say(f"Unseen person {n + 1} of {amount.clips}: {performer} {motion}")
            task = synthetic_task(performer, motion, FIRST_CLOTHES + n, amount)
            angles.append(condition_angle(task))
            found.append(evaluate(task, models, sheets))
        say("Real clip: pictures, masks and cameras")
        task, rig_error = real_task(ensure_real_clip(), amount)
        real = evaluate(task, models, sheets)
    text = page(found, real, amount, angles, rig_error, (time.monotonic() - began) / 60)
    if args.quick:
        sys.stdout.write(text)
    else:
        SCOREBOARD.write_text(text, encoding="utf-8")
        say(f"Written: {SCOREBOARD.relative_to(ROOT)}")
    if args.picture:
        from turnaround.nodes.run import to_pil

        width = max(s.shape[2] for s in sheets)
        padded = [torch.nn.functional.pad(s, (0, width - s.shape[2])) for s in sheets]
        to_pil(torch.cat(padded, 1)).save(args.picture, quality=88)


if __name__ == "__main__":
    main()
