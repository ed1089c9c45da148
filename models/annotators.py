"""Depth, normals and pose by the nets of the optional library controlnet-aux.

Stage: before the geometry, from pictures alone, as human_frames.py, for people and places that the
embedded human net never saw. The library gives the networks and, for OpenPose, the search for
people in their answers; weights come in as tensors. Its detectors answer in 8 bits and scale each
frame by itself, which makes depth flicker and normals stepped: here answers stay floats and a clip
is scaled as a whole.

What the answers mean (read in controlnet-aux 0.0.10):

- MiDaS (dpt_hybrid): 1/depth up to an unknown scale and shift a frame; larger is nearer, never
  below 0. Pictures go in as -1..1.
- Zoe (ZoeD_M12_N): depth in metres, of an indoor camera that the net imagines; larger is farther.
  Pictures go in as 0..1; it works at 384x512 inside.
- NormalBae (scannet): unit vectors with x LEFT, y up, z towards the camera, and how sure it is.
  These axes are those of its training data, which users of the weights measured; no code states
  them. The library paints 0.5 + 0.5n without a change, so its pictures are red left, green up; they
  become OpenCV's axes by turning all three signs.
- OpenPose (body_pose_model): 18 points in pixels of the picture that was given, counted from the
  first pixel's centre, not as shares of the sides (the library's detector divides afterwards).
  Pictures go in as BGR bytes; it works at a height of 184.

The library's DWPose needs mmpose and mmdet, which load pickles and download by themselves, so it is
left out.
"""

from __future__ import annotations

import contextlib
import io
import math
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import encode_normals

Task = Literal["depth", "normals", "pose"]
OnStep = Callable[..., None]  # (done, total, preview [3, H, W])

STRIDE = 32
"""Sides of what MiDaS and NormalBae take are multiples of this."""
NARROWEST = 8
"""One side of the frames may be this many times the other: beyond, nets run out of memory."""
POSE_SIDE = 512
"""Shorter side of the largest picture that OpenPose's answers are blown up to, as in the library."""
NORMALBAE_TO_OPENCV = (-1.0, -1.0, -1.0)
NEAREST = 1e-3
"""Metres; Zoe's answers are enlarged by cubic curves, which may swing below 0."""
NOT_ASKED = ("num_batches_tracked", ".head.", ".fc_norm.", "pretrained.model.norm.")
"""Weights that files may lack: batch counters, and the classifier of a backbone, which is unused."""


@dataclass(frozen=True)
class Annotator:
    """One network of the library."""

    label: str
    task: Task
    file: str
    """How its file is called in the public repository."""
    key: str
    """A weight that only this network has."""
    build: Callable[[], nn.Module]
    bytes_a_pixel: int
    """Of working memory and of the pixels that the net gets, measured on the CPU."""


def _midas() -> nn.Module:
    from controlnet_aux.midas.midas.dpt_depth import DPTDepthModel

    return DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True)


def _zoe() -> nn.Module:
    from controlnet_aux.zoe import ZoeDepth, get_config

    return ZoeDepth.build_from_config(get_config("zoedepth", "infer"))


def _normalbae() -> nn.Module:
    from controlnet_aux.normalbae.nets.NNET import NNET

    # The ratios matter in training alone, but the network asks for them.
    settings = dict(architecture="BN", sampling_ratio=0.4, importance_ratio=0.7)
    return NNET(types.SimpleNamespace(**settings))


def _openpose() -> nn.Module:
    from controlnet_aux.open_pose.model import bodypose_model

    return bodypose_model()


REPOSITORY = "lllyasviel/Annotators"
MIDAS = Annotator(
    "MiDaS", "depth", "dpt_hybrid-midas-501f0c75.pt",
    "pretrained.model.patch_embed.backbone.stem.conv.weight", _midas, 2500,
)  # fmt: skip
ZOE = Annotator(
    "Zoe", "depth", "ZoeD_M12_N.pt", "core.core.pretrained.model.cls_token", _zoe, 6500,
)  # fmt: skip
NORMALBAE = Annotator(
    "NormalBae", "normals", "scannet.pt", "encoder.original_model.conv_stem.weight", _normalbae,
    4000,
)  # fmt: skip
OPENPOSE = Annotator(
    "OpenPose", "pose", "body_pose_model.pth", "model6_2.Mconv7_stage6_L2.weight", _openpose, 1000,
)  # fmt: skip
ANNOTATORS = (MIDAS, ZOE, NORMALBAE, OPENPOSE)


# --- networks -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Keeps the library's prints and warnings away, and says in a sentence why it can't be used."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise ValueError(
            f"This node needs the package controlnet-aux, and '{error.name}' is missing: run 'pip "
            "install controlnet-aux' with ComfyUI's own Python and start ComfyUI again."
        ) from None
    except Exception as error:
        # Importing it imports a dozen others, which fail in ways of their own when they are too
        # old or too new.
        raise ValueError(
            f"The package controlnet-aux does not work here ({type(error).__name__}: {error}): "
            "update it and timm with ComfyUI's own Python and start ComfyUI again."
        ) from None


def as_weights(loaded: object) -> dict[str, Tensor]:
    """The tensors of a file by the names that the library's networks have."""
    found = loaded if isinstance(loaded, dict) else {}
    if isinstance(found.get("model"), dict):
        found = found["model"]
    weights = {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}
    if "Mconv7_stage6_L2.weight" in weights:
        # OpenPose's own files leave out which branch of the network a layer is in.
        return {_branch(key) + "." + key: value for key, value in weights.items()}
    return weights


def _branch(key: str) -> str:
    """model0 for the first layers, model3_2 for the third stage's second branch."""
    layer = key.split(".")[0]
    if not layer.endswith(("_L1", "_L2")):
        return "model0"
    stage = layer.split("_stage")[1][0] if "_stage" in layer else "1"
    return f"model{stage}_{layer[-1]}"


def recognise(weights: dict[str, Tensor], task: Task, name: str) -> Annotator:
    """The network that a file is for, or a sentence."""
    wanted = [a for a in ANNOTATORS if a.task == task]
    for annotator in wanted:
        if annotator.key in weights:
            return annotator
    others = [a for a in ANNOTATORS if a.key in weights]
    holds = f"holds {others[0].label}, a net for {others[0].task}" if others else "is no known net"
    files = " or ".join(f"{a.file} ({a.label})" for a in wanted)
    raise ValueError(f"'{name}' {holds}, but {task} is asked for: choose {files}.")


def build_net(annotator: Annotator, weights: dict[str, Tensor], name: str) -> nn.Module:
    """The library's network with the weights of a file."""
    with _library():
        net = annotator.build()
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    asked = [k for k in shapes if not any(part in k for part in NOT_ASKED)]
    lacking = [k for k in asked if k not in weights]
    other = [k for k in asked if k in weights and weights[k].shape != shapes[k]]
    if lacking or other:
        raise ValueError(
            f"'{name}' looks like {annotator.label} but {len(lacking)} of its {len(asked)} weights "
            f"are missing and {len(other)} have another size: get {annotator.file} from "
            f"{REPOSITORY} again."
        )
    fitting = {k: v for k, v in weights.items() if k in shapes and v.shape == shapes[k]}
    net.load_state_dict(fitting, strict=False)
    return net.eval().requires_grad_(False)


def working_memory(annotator: Annotator, width: int, height: int, resolution: int) -> int:
    """Bytes that the net needs beside its weights for frames of a size."""
    if annotator is ZOE:
        w, h = 512, 384
    elif annotator is OPENPOSE:
        w, h = 184 * width / height, 184
    else:
        w, h = net_size(width, height, resolution)
    return int(annotator.bytes_a_pixel * w * h)


# --- depth and normals ----------------------------------------------------------------------------


def net_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Width and height of the picture that a net gets: its shorter side is about `resolution`."""
    scale = resolution / min(width, height)
    return tuple(max(STRIDE, round(n * scale / STRIDE) * STRIDE) for n in (width, height))


def estimate_depth(
    net: nn.Module,
    annotator: Annotator,
    frames: Tensor,  # [F, 3, H, W] 0..1
    resolution: int = 512,
    on_step: OnStep | None = None,
) -> Tensor:  # [F, H, W] metres (Zoe), or 1/depth in a unit of each frame's own (MiDaS)
    """What the net says of each frame, at the frames' size."""

    def ask(picture: Tensor) -> Tensor:
        if annotator is ZOE:
            return net.infer(picture).clamp(min=NEAREST)
        return net(picture * 2 - 1)[:, None]

    def show(answer: Tensor) -> Tensor:
        return near_is_white(answer, annotator).expand(3, -1, -1)

    return _each(net, ask, show, annotator, frames, resolution, on_step)[:, 0]


def estimate_normals(
    net: nn.Module,
    frames: Tensor,  # [F, 3, H, W] 0..1
    resolution: int = 512,
    on_step: OnStep | None = None,
) -> Tensor:  # [F, 3, H, W] unit, camera axes (x right, y down, z away)
    """NormalBae's normals at the frames' size, in our axes."""

    def ask(picture: Tensor) -> Tensor:
        return net(picture_for_normalbae(picture))[0][-1][:, :3]

    def show(answer: Tensor) -> Tensor:
        return encode_normals(normals_from_normalbae(answer[None])[0].movedim(0, -1)).movedim(-1, 0)

    answers = _each(net, ask, show, NORMALBAE, frames, resolution, on_step)
    return normals_from_normalbae(answers)


def picture_for_normalbae(pictures: Tensor) -> Tensor:  # [B, 3, H, W]
    """ImageNet's mean and deviation taken off."""
    mean, deviation = pictures.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (pictures - mean[:, None, None]) / deviation[:, None, None]


def normals_from_normalbae(answers: Tensor) -> Tensor:  # [F, 3, H, W] both
    """x left, y up, z towards the camera -> x right, y down, z away; unit length again."""
    return F.normalize(answers, dim=1) * answers.new_tensor(NORMALBAE_TO_OPENCV)[:, None, None]


def near_is_white(
    values: Tensor,  # [...] what a depth net said of a clip
    annotator: Annotator,
) -> Tensor:  # [...] 0..1
    """The nearest point of the clip is 1 and the farthest 0; in between it follows what the net
    said: depth itself for Zoe, 1/depth for MiDaS."""
    near = -values if annotator is ZOE else values
    return (near - near.min()) / (near.max() - near.min()).clamp(min=1e-6)


@torch.no_grad()
def _each(
    net: nn.Module, ask: Callable, show: Callable, annotator: Annotator, frames: Tensor,
    resolution: int, on_step: OnStep | None,
) -> Tensor:  # fmt: skip
    """[F, C, H, W] on the CPU: one frame after the other through the net."""
    height, width = check_frames(frames)
    device = next(net.parameters()).device
    size = net_size(width, height, resolution)[::-1]
    answers = []
    try:
        for number, frame in enumerate(frames):
            answer = ask(_resize(frame[None].to(device).float(), size).clamp(0, 1)).float()
            if not answer.isfinite().all():
                raise ValueError(
                    f"{annotator.label} gave no numbers for frame {number}: its file is damaged; "
                    f"get {annotator.file} from {REPOSITORY} again."
                )
            answers.append(_resize(answer, (height, width))[0].cpu())
            if on_step:
                on_step(number + 1, len(frames), show(answers[-1]))
    finally:
        _forget(net)
    return torch.stack(answers)


def _resize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    if pictures.shape[-2:] == size:
        return pictures
    smaller = size[0] < pictures.shape[-2]
    return F.interpolate(pictures, size, mode="bilinear", antialias=smaller)


def _forget(net: nn.Module) -> None:
    """MiDaS and Zoe keep the last frame's features in dictionaries of their own, on the GPU."""
    for module in net.modules():
        for name in ("activations", "core_out"):
            if isinstance(kept := getattr(module, name, None), dict):
                kept.clear()


def check_frames(frames: Tensor) -> tuple[int, int]:
    """Height and width of frames that nets can take, or a sentence."""
    height, width = frames.shape[-2:]
    if max(height, width) > NARROWEST * min(height, width):
        raise ValueError(
            f"The frames are {width}x{height}, too narrow to look at: crop them so that one side is "
            f"at most {NARROWEST} times the other."
        )
    bad = ~frames.isfinite().flatten(1).all(1)
    if bad.any():
        raise ValueError(
            f"Frame {int(bad.nonzero()[0])} of the clip holds values that are no numbers: check the "
            "node that made it."
        )
    return height, width


# --- pose -----------------------------------------------------------------------------------------


@torch.no_grad()
def estimate_poses(
    net: nn.Module,
    frames: Tensor,  # [F, 3, H, W] 0..1
    on_step: OnStep | None = None,
) -> list[Tensor]:  # F of [P, 18, 3] x, y in pixels (centres at +0.5), confidence; 0 = not found
    """Everybody that OpenPose finds in each frame, the largest first."""
    height, width = check_frames(frames)
    scale = min(1.0, POSE_SIDE / min(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    with _library():
        from controlnet_aux.open_pose.body import Body
    body = Body.__new__(Body)  # its constructor would read a file
    body.model = net
    found = []
    for number, frame in enumerate(frames):
        picture = _resize(frame[None].float(), size)[0].clamp(0, 1)
        pixels = (picture * 255).round().byte().flip(0).movedim(0, -1)  # BGR
        candidates, people = body(pixels.contiguous().cpu().numpy())
        points = _points(body.format_body_result(candidates, people))
        points[..., :2] = (points[..., :2] + 0.5) * points.new_tensor(
            [width / size[1], height / size[0]]
        )
        points[..., :2] *= points[..., 2:] > 0
        found.append(points[_extent(points).argsort(descending=True, stable=True)])
        if on_step:
            on_step(number + 1, len(frames), frame)
    return found


def _points(people: list) -> Tensor:  # [P, 18, 3]
    """The library's results as a tensor; confidence is what the heat map says there."""
    rows = [
        [[p.x, p.y, min(1.0, float(p.score))] if p is not None else [0.0] * 3 for p in r.keypoints]
        for r in people
    ]
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), 18, 3)


def _extent(points: Tensor) -> Tensor:  # [P] pixels
    """Diagonal of the box around the points that were found."""
    there = points[..., 2:] > 0
    low = torch.where(there, points[..., :2], math.inf).amin(1)
    high = torch.where(there, points[..., :2], -math.inf).amax(1)
    return (high - low).norm(dim=-1)


def poses_json(poses: list[Tensor], width: int, height: int) -> list[dict]:
    """One dictionary a frame, as OpenPose writes them, in pixels of the frame."""
    return [
        {
            "people": [
                {"pose_keypoints_2d": person.flatten().tolist(), "face_keypoints_2d": [],
                 "hand_left_keypoints_2d": [], "hand_right_keypoints_2d": []}
                for person in people
            ],
            "canvas_width": width,
            "canvas_height": height,
        }
        for people in poses
    ]  # fmt: skip
