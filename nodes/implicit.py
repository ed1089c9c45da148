"""Implicit video: a clip as canonical pictures and a deformation, fitted and rendered."""

import copy
from dataclasses import replace

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..models.flow import Flow
from ..models.implicit_fit import A_FRAME, FAST, PAPER, ImplicitFit, Settings
from ..models.implicit_start import scaled_flow
from ..models.implicit_video import ImplicitVideo
from ..models.views import Views
from . import run
from .flow import CATEGORY, clip_pictures
from .geometry import fit_pictures
from .refine import LOSS
from .sockets import FLOW, IMPLICIT, VIEWS
from .views import frames_to_image, image_to_frames

PRESETS = {"fast": FAST, "paper": PAPER}
BYTES = 260
"""Of memory a pixel and frame, at the size that is fitted."""
START_SECONDS, STEP_SECONDS, PAPER_SECONDS = 15e-6, 0.04, 50e-6
"""On one CPU core: a pixel and frame before and after the steps, a step of patches, and a pixel of the
paper's steps."""
LONGEST = 16_384
SMOOTH, AS_WAS = "smooth", "as it was"


class ImplicitVideoFit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundImplicitVideoFit",
            display_name="Implicit Video Fit",
            category=CATEGORY,
            description="Learns a clip as pictures that hold still and a motion over them, and "
            "shows it again without what flickers: exposure, colour casts, noise and small shaking "
            "of single frames. The result can also be rendered as slow motion.",
            inputs=[
                io.MultiType.Input("images", types=[io.Image, VIEWS],
                                   tooltip="A clip, or all views of one performer, which are then "
                                   "fitted together."),
                io.Combo.Input("preset", options=list(PRESETS), tooltip="fast: starts at what "
                               "optical flow tells, and keeps the texture of every frame that "
                               "lasts. paper: CoDeF's and DiffPerformer's published sizes and "
                               "schedule from scratch, for comparison; slow, and softer."),
                io.Int.Input("steps", default=0, min=0, max=100_000, tooltip="Training steps. 0 = "
                             f"the preset's: {A_FRAME} for every frame (fast), {PAPER.steps} "
                             "(paper)."),
                io.Float.Input("flow_weight", default=1.0, min=0.0, max=10.0, step=0.1,
                               tooltip="How much the deformation is held to the flow (Eq. 7). "
                               "0 = pictures alone decide."),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05,
                               tooltip="How much of the flicker goes: 1 = all, 0 = the clip as it "
                               "is. Not used by 'paper'."),
                io.Int.Input("resolution", default=640, min=64, max=4096, step=16,
                             tooltip="Longest side, in pixels, at which is fitted. Larger clips "
                             "are fitted smaller, and what changes is carried to their own size."),
                io.Int.Input("seed", default=0, min=0, max=2**53,
                             control_after_generate=True,
                             tooltip="The same seed gives the same result on the same device."),
                FLOW.Input("flow", optional=True, tooltip="The motion of this clip, from Optical "
                           "Flow or Body Flow. Without it, optical flow is found here."),
                io.MultiType.Input("mask", types=[io.Mask, VIEWS], optional=True,
                                   tooltip="The performer in white: performer and background "
                                   "become layers of their own. Views may bring their masks "
                                   "themselves."),
                io.Image.Input("reference", optional=True, tooltip="One picture of what the first "
                               "frames show; the first canonical picture begins with it."),
                VIEWS.Input("depth", optional=True, tooltip="For views: depth from Render "
                            "Conditions or Depth from Views. Then views get the same colours "
                            "where they see the same surface."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The smoothed frames, view after "
                                "view."),
                VIEWS.Output(display_name="views", tooltip="The same as views, with what the views "
                             "knew."),
                io.Image.Output(display_name="canonical", tooltip="The pictures that hold still, "
                                "with a margin around the frame: one a key frame and view."),
                io.Image.Output(display_name="deformation", tooltip="From where every pixel reads "
                                "them: hue tells the direction, strength how far."),
                io.Image.Output(display_name="residual", tooltip="What was taken out, around "
                                "middle grey."),
                IMPLICIT.Output(display_name="implicit", tooltip="For Render Implicit Video."),
                LOSS.Output(display_name="loss", tooltip="The loss after every step, for nodes "
                            "that plot losses."),
                io.String.Output(display_name="note", tooltip="What was found and done, and what "
                                 "it cost."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, images: Tensor | Views, preset, steps, flow_weight, strength, resolution, seed,
        flow: Flow | None = None, mask: Tensor | Views | None = None, reference=None,
        depth: Views | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        frames = clip_pictures(images, "images")
        views = images if isinstance(images, Views) else Views(frames)
        notes: list[str] = []
        _check(frames, flow, depth)
        settings = settings_of(preset, steps, flow_weight, strength)
        size = working_size(frames.shape[-1], frames.shape[-2], resolution)
        device = _announced(cls, frames, size, settings, notes)
        masks = masks_given(views, mask, notes)
        rig = depth.rig if depth is not None and depth.rig is not None else views.rig
        if depth is not None and rig is None:
            notes.append("no rig: 'depth' could not be used")
        with torch.inference_mode(False), torch.enable_grad():
            small = _sized(frames, size)
            given = dict(
                flow=_sized_flow(flow, size, device),
                masks=_sized(masks, size).to(device) if masks is not None else None,
                depth=_sized(depth.frames.clone(), size, "nearest-exact")[:, :, 0].to(device)
                if depth is not None and rig is not None else None,
                rig=rig.resized(*size) if depth is not None and rig is not None else None,
                reference=image_to_frames(reference)[0].to(device, copy=True)
                if reference is not None else None,
            )  # fmt: skip
            fit, smooth = _fitted(small.to(device, copy=True), settings, seed, given)
            shown = _carried(frames, small, smooth)
            return _outputs(cls, fit, shown, smooth, views, notes)


def settings_of(preset: str, steps: int, flow_weight: float, strength: float) -> Settings:
    """A preset with what the creator chose."""
    chosen = PRESETS[preset]
    return replace(chosen, steps=steps or chosen.steps, flow=flow_weight, strength=strength)


def working_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) at which a clip is fitted."""
    scale = min(1.0, longest / max(width, height))
    return max(16, round(width * scale)), max(16, round(height * scale))


def _sized(pictures: Tensor, size: tuple[int, int], mode: str = "area") -> Tensor:
    """[V, F, (C,) H, W] at another (width, height)."""
    w, h = size
    if pictures.shape[-2:] == (h, w):
        return pictures.clone()
    lead = pictures.shape[:-2]
    flat = pictures.float().reshape(-1, 1, *pictures.shape[-2:])
    return F.interpolate(flat, (h, w), mode=mode).reshape(*lead, h, w)


def _sized_flow(flow: Flow | None, size: tuple[int, int], device) -> Flow | None:
    """A flow of pictures of another size."""
    if flow is None:
        return None
    steps = (scaled_flow(f.flatten(0, 1), size[::-1]).unflatten(0, f.shape[:2])
             for f in (flow.there, flow.back))  # fmt: skip
    sure = (_sized(f, size).clamp(0, 1) for f in (flow.sure_there, flow.sure_back))
    return Flow(*(t.to(device, copy=True) for t in (*steps, *sure)))


def _check(frames: Tensor, flow: Flow | None, depth: Views | None) -> None:
    """One sentence for what does not belong to the clip."""
    V, count, _, H, W = frames.shape
    if min(H, W) < 16:
        raise ValueError(f"'images' are {W}x{H}, but at least 16 pixels a side are needed.")
    if flow is not None and tuple(flow.there.shape) != (V, count - 1, 2, H, W):
        v, f, _, h, w = flow.there.shape
        raise ValueError(
            f"'flow' is of {v} views x {f + 1} frames of {w}x{h}, but 'images' are {V} x {count} of "
            f"{W}x{H}: connect the flow of the same clip."
        )
    if depth is None:
        return
    if depth.frames.shape[2] != 1:
        raise ValueError(
            "'depth' holds pictures, not metres: connect 'depth' of Render Conditions or Depth from "
            "Views."
        )
    if tuple(depth.frames.shape[:2]) != (V, count):
        raise ValueError(
            f"'depth' has {len(depth)} views x {depth.frames.shape[1]} frames, but 'images' {V} x "
            f"{count}: connect the depth of the same views."
        )


def masks_given(
    views: Views, mask: Tensor | Views | None, notes: list[str], clip: str = "'images'"
) -> Tensor | None:
    """The performer [V, F, H, W] 0..1, from the socket or the views."""
    V, count, _, H, W = views.frames.shape
    if mask is None:
        return views.masks.float() if views.masks is not None else None
    if isinstance(mask, Views):
        if mask.masks is None:
            raise ValueError(
                "'mask' is connected to views without masks: connect views that have them, or a "
                "MASK with the performer in white."
            )
        mask = mask.masks.flatten(0, 1)
    given = (mask[None] if mask.ndim == 2 else mask).cpu().float()
    if len(given) == 1:
        given = given.expand(V * count, -1, -1)
    if len(given) != V * count:
        raise ValueError(
            f"'mask' has {len(given)} masks but there are {V} views x {count} frames: give one mask "
            "a frame, view after view, or a single one for all."
        )
    if not given.isfinite().all():
        raise ValueError("'mask' holds NaN or infinity: make it again.")
    flat = fit_pictures("mask", given, (V * count, H, W), notes, clip)
    return flat.unflatten(0, (V, count)).clamp(0, 1)


def _announced(
    node: type, frames: Tensor, size: tuple[int, int], settings: Settings, notes: list[str]
) -> torch.device:
    """The device, with room made on it; the estimate is said before the work begins."""
    V, count = frames.shape[:2]
    values = V * count * size[0] * size[1]
    need, device = values * BYTES, mm.get_torch_device()
    if need > (total := mm.get_total_memory(device)):
        raise ValueError(
            f"Fitting {V} views x {count} frames at {size[0]}x{size[1]} needs {need / 1e9:.0f} GB, "
            f"but {device} has {total / 1e9:.0f} GB: lower 'resolution', or use fewer frames."
        )
    mm.free_memory(need, device)
    steps = settings.steps or A_FRAME * V * count
    a_step = STEP_SECONDS if settings.patch else size[0] * size[1] * PAPER_SECONDS
    text = f"{values / 1e6:.0f} million pixels, {need / 1e9:.1f} GB"
    if device.type == "cpu":
        text += f", about {_duration(values * START_SECONDS + steps * a_step)} on a processor"
    run.say(node, text)
    if size != (frames.shape[-1], frames.shape[-2]):
        notes.append(f"fitted at {size[0]}x{size[1]}, what changed was carried to the clip's size")
    return device


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _fitted(frames: Tensor, settings: Settings, seed: int, given: dict):
    """The fit and its smoothed frames [V, F, 3, h, w]."""
    planned = settings.steps or A_FRAME * frames.shape[0] * frames.shape[1]
    bar = run.progress(planned)
    bar(0, planned, frames[0, 0])
    fit = ImplicitFit(
        frames, settings, seed=seed, tick=mm.throw_exception_if_processing_interrupted, **given
    )
    fit.steps(planned, bar)
    smooth = fit.render()
    bar(planned, planned, smooth[0, 0])
    return fit, smooth


def _carried(frames: Tensor, small: Tensor, smooth: Tensor) -> Tensor:
    """The smoothed clip at its own size: what fitting changed, added to it."""
    if frames.shape == smooth.shape:
        return smooth
    change = F.interpolate((smooth - small).flatten(0, 1), frames.shape[-2:], mode="bicubic")
    return (frames + change.view_as(frames)).clamp(0, 1)


def _outputs(
    node: type, fit: ImplicitFit, shown: Tensor, smooth: Tensor, views: Views, notes: list[str]
) -> io.NodeOutput:
    video = fit.video
    residual = fit.residual(smooth)
    canonical = torch.stack(
        [video.canonical_picture(v, n) for v, p in enumerate(video.pieces) for n in range(len(p))]
    )
    ways = [video.deformation_picture(v, range(video.count)) for v in range(len(video))]
    video.fps = views.fps
    video.requires_grad_(False).to(mm.intermediate_device())
    history = fit.history.total
    if history:
        tail = max(1, len(history) // 10)
        early, late = (sum(part) / tail for part in (history[:tail], history[-tail:]))
        notes.insert(0, f"{len(history)} steps, loss {early:.4f} -> {late:.4f}")
    notes += fit.notes
    note = run.say(node, "; ".join(notes))
    result = Views(shown, views.masks, views.rig, views.fps)
    flat = frames_to_image(shown.flatten(0, 1))
    return io.NodeOutput(
        flat, result, frames_to_image(canonical), frames_to_image(torch.cat(ways)),
        frames_to_image(residual.flatten(0, 1)), video, {"loss": history}, note,
    )  # fmt: skip


class RenderImplicitVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRenderImplicitVideo",
            display_name="Render Implicit Video",
            category=CATEGORY,
            description="Shows a fitted clip again at any speed and size: slow motion, more or "
            "fewer frames.",
            inputs=[
                IMPLICIT.Input("implicit", tooltip="From Implicit Video Fit."),
                io.Float.Input("speed", default=1.0, min=0.05, max=16.0, step=0.05,
                               tooltip="1 = as it was, 0.5 = half as fast (twice the frames)."),
                io.Int.Input("frames", default=0, min=0, max=4096,
                             tooltip="Frames of the result, spread over the whole clip. 0 = as "
                             "'speed' says."),
                io.Int.Input("width", default=0, min=0, max=LONGEST, tooltip="0 = the clip's own "
                             "size as it was fitted, or what keeps its shape."),
                io.Int.Input("height", default=0, min=0, max=LONGEST, tooltip="0 = the clip's own "
                             "size as it was fitted, or what keeps its shape."),
                io.Combo.Input("show", options=[SMOOTH, AS_WAS], tooltip="smooth: without "
                               "flicker. as it was: with the flicker that was learned, to see what "
                               "the fields hold."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The rendered frames, view after "
                                "view."),
                VIEWS.Output(display_name="views", tooltip="The same as views."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, implicit: ImplicitVideo, speed, frames, width, height, show
    ) -> io.NodeOutput:  # fmt: skip
        times = times_of(implicit.count, speed, frames)
        size = size_of(implicit.size, width, height)
        need = len(implicit) * len(times) * size[0] * size[1] * 24
        if need > (total := mm.get_total_memory(torch.device("cpu"))):
            raise ValueError(
                f"{len(times)} frames of {size[0]}x{size[1]} need {need / 1e9:.0f} GB, but this "
                f"computer has {total / 1e9:.0f} GB: choose fewer frames or a smaller size."
            )
        device = mm.get_torch_device()
        mm.free_memory(implicit.get_ram_usage(), device)
        bar, total = run.progress(len(implicit) * len(times)), len(implicit) * len(times)
        done = iter(range(total))
        moved = copy.deepcopy(implicit).to(device) if device.type != "cpu" else implicit
        with torch.inference_mode(False), torch.no_grad():
            shown = moved.render(times, size, show == SMOOTH, lambda: bar(next(done), total))
        bar(total, total, shown[0, 0])
        views = Views(shown, None, None, implicit.fps)
        return io.NodeOutput(frames_to_image(shown.flatten(0, 1)), views)


def times_of(count: int, speed: float, frames: int) -> list[float]:
    """The moments that are shown, in frames of the clip."""
    if frames == 1 or count == 1:
        return [0.0] * max(1, frames)
    if frames:
        return torch.linspace(0, count - 1, frames, dtype=torch.float64).tolist()
    return [n * speed for n in range(int((count - 1) / speed + 1e-6) + 1)]


def size_of(own: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The asked size; a side that is 0 follows the other."""
    if not width and not height:
        return own
    w = width or max(1, round(height * own[0] / own[1]))
    return w, height or max(1, round(width * own[1] / own[0]))


NODES: list[type[io.ComfyNode]] = [ImplicitVideoFit, RenderImplicitVideo]
