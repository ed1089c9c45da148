"""What tests/evaluate_avatar.py learns avatars from, and the truth that they are compared with.

To be imported when the pack is there as `turnaround` (conftest or in_comfyui.start).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from turnaround.models import performer
from turnaround.models.body import Body
from turnaround.models.cameras import Rig, framing_distance, orbit_rig
from turnaround.models.views import Views, resize_frames, to_bytes

SIZE, FPS, FRAMES = 256, 8.0, 13
START = 0.05
"""Seconds into the motion: 13 frames at 8 a second are all of dance_a."""
MOTION = "dance_a"
CLOTHES = {"kira": 1_000_003, "leo": 1_000_011}
LEARNED = 8
"""Cameras that are learned from: the first ones."""
AZIMUTHS, ELEVATIONS = (0.125, 1.1, 0.6, 1.6), (0.2, 0.0, 0.35, -0.05)
"""Of the cameras that are held out, half turns and radians."""
SAMPLES = 2
"""A picture is drawn at this many times its size, each pixel of that from 2x2 samples: with 2x2 alone
truth differs from what a pixel shows by 31 to 34 dB inside the performer."""
BETWEEN = (2.5, 5.5, 8.5, 11.5)
"""Frames: moments that no frame shows."""
MOTIONS = (("dance_b", (0.5, 1.1, 1.7, 2.3)),)
STRONG = (("spinkick", (0.5, 0.7)), ("cartwheel", (1.0, 1.4)), ("backflip", (0.6, 0.8)))
BULGE, BULGE_ROUNDS = 0.08, 4
"""Metres that skin comes out where it is pressed to nothing; rounds of smoothing."""
GREY = (0.5, 0.5, 0.5)
GROUPS = ("learned", "camera", "moment", "between", "motion", "strong")


@dataclass(frozen=True)
class Scene:
    """A performer at M moments, of which the first ones are the frames that are learned."""

    frames: Tensor
    """[V, F, 3, H, W] uint8, what is learned from."""
    masks: Tensor
    """[V, F, H, W]"""
    K: Tensor
    """[V + held out, 3, 3]"""
    T: Tensor
    """[V + held out, 4, 4]"""
    vertices: Tensor
    """[M, N, 3]; of a real clip [0, 0, 3]."""
    faces: Tensor
    """[n, 3]"""
    rest: Tensor
    """[N, 3]"""
    shots: Tensor
    """[S, 3] what is compared: number of the group, camera, moment."""
    truths: Tensor
    """[S, 3, H, W] uint8 over grey."""
    insides: Tensor
    """[S, H, W] 0..1, the performer."""
    weights: Tensor
    """[V] how much every view counts, where that is made use of."""

    @property
    def rig(self) -> Rig:
        return Rig(self.K, self.T, self.frames.shape[-1], self.frames.shape[-2])

    @property
    def body(self) -> Body:
        """In the frames that are learned."""
        count = self.frames.shape[1]
        return Body(self.vertices[:count], self.faces, self.rest, fps=FPS)

    def views(self, chosen: list[int]) -> Views:
        return Views(self.frames[chosen], self.masks[chosen], self.rig.select(chosen), FPS)

    def save(self, path: Path) -> None:
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, path)


def load(path: Path) -> Scene:
    return Scene(**load_file(path))


def middled(vertices: Tensor) -> Tensor:  # [F, N, 3]
    """Every moment around the origin: motions go about in the room."""
    return vertices - ((vertices.amin(1) + vertices.amax(1)) / 2)[:, None]


def moments(who: str, motion: str, fps: float) -> Tensor:  # [M, N, 3]
    """Frames, moments between them, other motions, strong ones."""
    look = performer.draw_appearance(CLOTHES[who])

    def at(motion: str, seconds: Tensor) -> Tensor:
        return performer.pose_performer(who, motion, seconds, look).vertices

    frames = torch.cat([torch.arange(FRAMES).float(), torch.tensor(BETWEEN)])
    own = at(motion, START + frames / fps)
    low, high = own[:FRAMES].amin((0, 1)), own[:FRAMES].amax((0, 1))
    others = [middled(at(m, torch.tensor(t))) for m, t in (*MOTIONS, *STRONG)]
    return torch.cat([own - (low + high) / 2, *others])


def bulged(vertices: Tensor, faces: Tensor) -> Tensor:  # [M, N, 3] both
    """Skin and clothes that swell where a pose presses them together and sink where it stretches them,
    which the body that is given does not know."""
    areas = vertices.new_zeros(vertices.shape[:2])
    a, b, c = (vertices[:, faces[:, i]] for i in range(3))
    each = torch.linalg.cross(b - a, c - a).norm(dim=-1)
    for i in range(3):
        areas.index_add_(1, faces[:, i], each)
    pressed = (1 - areas / areas[:1].clamp(min=1e-12)).clamp(-1, 1)
    for _ in range(BULGE_ROUNDS):
        sums, counts = torch.zeros_like(pressed), torch.zeros_like(pressed[0])
        for i in range(3):
            sums.index_add_(1, faces[:, i], pressed[:, faces].mean(2))
            counts.index_add_(0, faces[:, i], torch.ones(len(faces)))
        pressed = sums / counts.clamp(min=1)
    return vertices + BULGE * pressed[..., None] * performer.vertex_normals(vertices, faces)


def drawn(
    vertices: Tensor, look, rig: Rig, shots: list[tuple[int, int]], samples: int
) -> tuple[Tensor, Tensor]:  # [S, 3, H, W], [S, H, W]
    """A picture of every camera and moment."""
    faces = performer.load_performers().faces
    normals = performer.vertex_normals(vertices, faces)
    scale = torch.tensor([[float(samples)], [float(samples)], [1.0]])
    size, pictures, masks = (samples * rig.width, samples * rig.height), [], []
    for camera, moment in shots:
        picture, mask = performer.render_colors(
            vertices[moment][None], normals[moment][None], [look], (rig.K[camera] * scale)[None],
            rig.T_camera_world[camera][None], *size, [GREY],
        )  # fmt: skip
        pictures.append(F.avg_pool2d(picture, samples)[0])
        masks.append(F.avg_pool2d(mask, samples)[0])
    return torch.stack(pictures), torch.stack(masks)


def shots_of(cameras: int, held_out: list[int]) -> list[tuple[int, int, int]]:
    """Group, camera, moment."""
    first, other = FRAMES + len(BETWEEN), sum(len(t) for _, t in MOTIONS)
    strong = sum(len(t) for _, t in STRONG)
    asked = (
        ([0, cameras // 2], range(0, FRAMES, 4)),
        (held_out, range(0, FRAMES, 4)),
        (held_out, range(FRAMES, first)),
        (held_out, range(FRAMES, first)),
        (held_out, range(first, first + other)),
        (held_out, range(first + other, first + other + strong)),
    )
    return [(g, v, m) for g, (some, times) in enumerate(asked) for m in times for v in some]


def synthetic(
    who: str = "kira",
    samples: int = SAMPLES,
    bulges: bool = False,
    motion: str = MOTION,
    fps: float = FPS,
) -> Scene:
    """Eight true views; held out are four more cameras and other moments."""
    vertices, look = moments(who, motion, fps), performer.draw_appearance(CLOTHES[who])
    faces = performer.load_performers().faces
    true = bulged(vertices, faces) if bulges else vertices
    fov, near = math.radians(35), vertices[: FRAMES + len(BETWEEN) + 4]
    distance = framing_distance(
        float(near[..., [0, 2]].norm(dim=-1).amax()),
        float(near[..., 1].abs().amax()),
        fov,
        SIZE,
        SIZE,
    )
    azimuths = torch.cat([torch.arange(LEARNED) * 2 / LEARNED, torch.tensor(AZIMUTHS)]) * math.pi
    elevations = torch.tensor([0.1] * LEARNED + list(ELEVATIONS))
    rig = orbit_rig(azimuths, elevations, distance, fov, SIZE, SIZE)
    every = [(v, f) for v in range(LEARNED) for f in range(FRAMES)]
    frames, masks = drawn(true, look, rig, every, samples)
    shots = shots_of(LEARNED, list(range(LEARNED, len(rig))))
    truths, insides = drawn(true, look, rig, [s[1:] for s in shots], SAMPLES)
    shape = (LEARNED, FRAMES)
    return Scene(
        to_bytes(frames).unflatten(0, shape), masks.unflatten(0, shape), rig.K, rig.T_camera_world,
        vertices, faces, performer.load_performers().canonical, torch.tensor(shots),
        to_bytes(truths), insides, torch.ones(LEARNED),
    )  # fmt: skip


FALLOFF = 0.92
"""Of View Weights, its default: what was never seen counts 0.4 as much."""


def generated(who: str, amount, models) -> Scene:
    """Eight views that Turnaround-Tiny makes of one camera's clip."""
    import evaluate
    from turnaround.models import performer_truth
    from turnaround.models.view_weights import share_by_angle, weight_of_share

    look = performer.draw_appearance(CLOTHES[who])
    task = evaluate.synthetic_task(who, MOTION, CLOTHES[who], amount)
    frames = evaluate.sampled(task, evaluate.METHODS[0], models).float().cpu().clamp(0, 1)
    # The outline of the body, which is given: a grey that is taken for background, as clothes may have
    # it, would make the performer transparent.
    masks = task.truth.masks.float()
    fps = task.truth.fps
    times = evaluate.START + torch.arange(amount.frames) / fps
    own = performer.pose_performer(who, MOTION, times, look)
    # The graph's cloud has another origin than the performer.
    shift = (task.points_true - performer_truth.keypoints_3d(own)).mean((0, 1))
    others = [
        middled(performer.pose_performer(who, m, torch.tensor(t), look).vertices)
        for m, t in (*MOTIONS, *STRONG)
    ]
    vertices = torch.cat([own.vertices + shift, *others])
    V, n, angle = amount.views, amount.frames, math.pi / amount.views
    turn = torch.eye(4)
    turn[0, 0] = turn[2, 2] = math.cos(angle)
    turn[0, 2], turn[2, 0] = math.sin(angle), -math.sin(angle)
    rig, held_out = task.rig, [0, V // 4, V // 2, 3 * V // 4]
    T = torch.cat([rig.T_camera_world, rig.T_camera_world[held_out] @ turn])
    whole = Rig(torch.cat([rig.K, rig.K[held_out]]), T, rig.width, rig.height)
    ours = list(range(V, V + len(held_out)))
    counts = [sum(len(t) for _, t in part) for part in (MOTIONS, STRONG)]
    asked = (
        ([0, V // 2], range(0, n, 4)), (ours, range(0, n, 4)), ((), ()), ((), ()),
        (ours, range(n, n + counts[0])), (ours, range(n + counts[0], n + sum(counts))),
    )  # fmt: skip
    shots = [(g, v, m) for g, (some, when) in enumerate(asked) for m in when for v in some]
    truths, insides = drawn(vertices, look, whole, [s[1:] for s in shots], SAMPLES)
    return Scene(
        to_bytes(frames), masks, whole.K, whole.T_camera_world, vertices,
        performer.load_performers().faces, performer.load_performers().canonical,
        torch.tensor(shots), to_bytes(truths), insides,
        weight_of_share(share_by_angle(rig), FALLOFF),
    )  # fmt: skip


REAL_FRAMES, REAL_SIZE, REAL_HELD_OUT = 13, (192, 256), 1
"""Of the real clip: width and height; the camera that is held out."""


def real(folder: Path) -> Scene:
    """A man from four calibrated cameras, three of which are learned from."""
    import real_clip
    from turnaround.models.rig_files import rig_from_text

    W, H = REAL_SIZE
    clip = real_clip.load(folder, rig_from_text, REAL_FRAMES, 2 * W, 2 * H)
    middle = torch.eye(4)
    middle[:3, 3] = clip.centre
    big = Rig(clip.K, clip.T_camera_first @ middle, 2 * W, 2 * H)
    frames = torch.stack([resize_frames(view, W, H) for view in clip.frames])
    masks = torch.stack([resize_frames(m[:, None], W, H)[:, 0] for m in clip.masks])
    order = [v for v in range(len(big)) if v != REAL_HELD_OUT] + [REAL_HELD_OUT]
    rig, frames, masks = big.resized(W, H).select(order), frames[order], masks[order]
    last, when = len(order) - 1, range(0, REAL_FRAMES, 3)
    shots = [(0, 0, f) for f in when] + [(1, last, f) for f in when]
    seen = frames * masks[:, :, None] + GREY[0] * (1 - masks[:, :, None])
    none = torch.zeros(0, 3)
    return Scene(
        to_bytes(frames[:last]), masks[:last], rig.K, rig.T_camera_world, none[None][:0],
        none.long(), none, torch.tensor(shots), to_bytes(torch.stack([seen[v, f] for _, v, f in shots])),
        torch.stack([masks[v, f] for _, v, f in shots]), torch.ones(last),
    )  # fmt: skip
