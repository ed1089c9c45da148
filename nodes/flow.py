"""Motion from picture to picture: optical flow, flow of a body, flow of other nodes."""

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.body import Body
from ..models.body_flow import body_flow
from ..models.cameras import Rig
from ..models.flow import Flow, beside, check_clip, flow_picture, optical_flow
from ..models.flow_reading import (
    Coding,
    assembled,
    by_view,
    coded_flow,
    raw_flow,
    resized_flow,
)
from ..models.reshape_body import reshaped
from ..models.views import Views, as_pictures
from . import run
from .sockets import BODY, FLOW, RIG, VIEWS
from .views import frames_to_image, image_to_frames

CATEGORY = "Turnaround/6 smooth"
FLOW_BYTES = 80
"""A pixel and frame: the flow, its confidence, its picture, and what is needed to make them."""
DRAWING_BYTES = 2 * 10**9
STILL = 0.05
"""Pixels a frame below which a clip counts as still."""

OUTPUTS = [
    FLOW.Output(display_name="flow", tooltip="The motion between neighbouring frames, there and "
                "back, with how sure it is."),
    io.Image.Output(display_name="picture", tooltip="The way to the next frame: hue tells where "
                    "to, strength how far; white = still. One picture fewer than frames, view "
                    "after view."),
    io.Mask.Output(display_name="confidence", tooltip="White = sure; black = hidden in the next "
                   "frame, or not known. One mask a picture."),
    io.String.Output(display_name="note", tooltip="How fast and how sure; what was changed."),
]  # fmt: skip


def clip_pictures(value: Tensor | Views, name: str) -> Tensor:  # [V, F, 3, H, W] 0..1
    """A clip from an IMAGE or all clips of VIEWS, checked."""
    if isinstance(value, Views):
        if value.frames.shape[2] != 3:
            raise ValueError(f"'{name}' carries depth, not colour: connect the coloured views.")
        pictures = as_pictures(value)
    else:
        pictures = image_to_frames(value)[None].float()
    bad = [f for f, frame in enumerate(pictures.movedim(1, 0)) if not frame.isfinite().all()]
    if bad:
        raise ValueError(
            f"'{name}' holds NaN or infinity in frames {bad[:5]}: make them again; often the VAE or "
            "a half-precision model is the cause."
        )
    return pictures.clamp(0, 1)


def check_memory(views: int, frames: int, width: int, height: int) -> None:
    """One sentence instead of a computer that runs out of memory."""
    need = views * frames * width * height * FLOW_BYTES
    total = mm.get_total_memory(torch.device("cpu"))
    if need > total:
        raise ValueError(
            f"The flow of {views} views x {frames} frames of {width}x{height} needs "
            f"{need / 1e9:.0f} GB, but this computer has {total / 1e9:.0f} GB: use fewer frames, or "
            "smaller ones."
        )


def _shown(node: type, flow: Flow, notes: list[str]) -> io.NodeOutput:
    """A flow with its picture, its confidence, and what there is to say."""
    there, sure = flow.there.flatten(0, 1), flow.sure_there.flatten(0, 1)
    length, weight = there.norm(dim=1), float(sure.mean())
    mean = float((length * sure).mean()) / max(weight, 1e-6)
    speed = "nothing moves" if mean < STILL else f"{mean:.1f} pixels a frame"
    note = run.say(node, "; ".join([f"{speed}, {weight:.0%} sure", *notes]))
    return io.NodeOutput(flow, frames_to_image(flow_picture(there)), sure, note)


class OpticalFlow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundOpticalFlow",
            display_name="Optical Flow",
            category=CATEGORY,
            description="Finds how every point of a clip moves from frame to frame, both ways, and "
            "how sure that is. Flicker of exposure and colour does not mislead it.",
            inputs=[
                io.MultiType.Input("images", types=[io.Image, VIEWS],
                                   tooltip="A clip, or views; every view is followed by itself."),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, images: Tensor | Views) -> io.NodeOutput:
        pictures = clip_pictures(images, "images")
        V, count, _, H, W = pictures.shape
        check_clip(count, W, H)
        check_memory(V, count, W, H)
        return _shown(cls, optical_flow(pictures, run.progress(1)), [])


class BodyFlow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundBodyFlow",
            display_name="Body Flow",
            category=CATEGORY,
            description="Draws how the surface of a body in motion moves in every camera's "
            "pictures: exact, and blind to flicker. For clips that were made with this body's "
            "motion.",
            inputs=[
                BODY.Input("body", tooltip="The body whose motion the clip shows, from Sample Body, "
                           "Load Body, Body from Mesh, Body from SAM 3D Body or Anny Body."),
                RIG.Input("rig", tooltip="The cameras that see it."),
                BODY.Input("reference", optional=True,
                           tooltip="A body of the performer in the reference picture, in any pose, "
                           "from the same kind of node: 'body' then moves as before, but is built "
                           "like this one."),
                io.MultiType.Input("clip", types=[io.Image, VIEWS], optional=True,
                                   tooltip="The clip that the flow is for: the flow gets its size, "
                                   "and both must have as many frames."),
                FLOW.Input("elsewhere", optional=True,
                           tooltip="The flow of what is not body, from Optical Flow of the same "
                           "clip. Without it, nothing is known there."),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, body: Body, rig: Rig, reference: Body | None = None,
        clip: Tensor | Views | None = None, elsewhere: Flow | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        notes: list[str] = []
        rig = _rig_of_clip(body, rig, clip, notes)
        check_memory(len(rig), body.frame_count, rig.width, rig.height)
        _check_elsewhere(elsewhere, body, rig)
        if reference is not None:
            body = reshaped(body, reference)
            notes.append("built like 'reference'")
        device = run.drawing_device(DRAWING_BYTES)
        flow = body_flow(body, rig, device, run.progress(1))
        if elsewhere is not None:
            flow = beside(flow, elsewhere)
        return _shown(cls, flow, notes)


def _rig_of_clip(body: Body, rig: Rig, clip: Tensor | Views | None, notes: list[str]) -> Rig:
    """The cameras with pictures of the clip's size."""
    if clip is None:
        return rig
    if isinstance(clip, Views):
        V, count, _, H, W = clip.frames.shape
    else:
        V, (count, H, W) = 1, clip.shape[:3]
    if count != body.frame_count:
        raise ValueError(
            f"'body' has {body.frame_count} frames but 'clip' {count}: make both of the same "
            "motion, with as many frames a second."
        )
    if len(rig) != V:
        raise ValueError(
            f"'rig' has {len(rig)} cameras but 'clip' {V} views: connect the rig of the clip."
        )
    if (rig.width, rig.height) == (W, H):
        return rig
    notes.append(f"the rig's pictures of {rig.width}x{rig.height} became {W}x{H}")
    return rig.filled(W, H)


def _check_elsewhere(elsewhere: Flow | None, body: Body, rig: Rig) -> None:
    if elsewhere is None:
        return
    V, pairs, _, H, W = elsewhere.there.shape
    if (V, pairs + 1, W, H) != (len(rig), body.frame_count, rig.width, rig.height):
        raise ValueError(
            f"'elsewhere' is the flow of {V} views x {pairs + 1} frames of {W}x{H}, but the body has "
            f"{len(rig)} x {body.frame_count} of {rig.width}x{rig.height}: make it of the same clip, "
            "and connect that clip to 'clip'."
        )


class FlowFromOtherNodes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def flow_input(name: str, tooltip: str) -> io.AnyType.Input:
            return io.AnyType.Input(name, optional=True, tooltip=tooltip)

        return io.Schema(
            node_id="TurnaroundFlowFromOtherNodes",
            display_name="Flow from Other Nodes",
            category=CATEGORY,
            description="Takes the flow of RAFT, Unimatch and other packs' nodes, or pictures that "
            "code motion as colours, as a flow of this pack.",
            inputs=[
                flow_input("forward", "From every frame to its next: a flow tensor or array of any "
                           "pack, a bundle of both ways, or pictures with x in red and y in green."),
                flow_input("backward", "From every frame to the one before, in the same form. "
                           "Without it, the way there is turned round."),
                io.Combo.Input("coding", options=list(Coding.__args__),
                               tooltip="For pictures. pixels around grey: 'scale' pixels at the ends "
                               "of the colours. picture sizes around grey: so many widths and "
                               "heights. raw pixels: the numbers are pixels, as in EXR files."),
                io.Float.Input("scale", default=64.0, min=0.001, max=4096.0, step=0.01,
                               tooltip="For pictures around grey: how far black or full red and "
                               "green go; in sizes, often 0.1."),
                io.Boolean.Input("y_up", default=False,
                                 tooltip="Green, or the second number, counts upwards, as in game "
                                 "engines and Blender."),
                io.MultiType.Input("clip", types=[io.Image, VIEWS], optional=True,
                                   tooltip="The clip that moves: the flow gets its size and its "
                                   "views, and its colours tell how sure the flow is."),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, coding: Coding, scale: float, y_up: bool, forward=None, backward=None,
        clip: Tensor | Views | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        notes: list[str] = []
        pictures = None if clip is None else clip_pictures(clip, "clip")
        found: dict[str, Tensor] = {}
        for name, value in (("forward", forward), ("backward", backward)):
            if value is not None:
                found |= _read(value, name, coding, scale)
        ways = [
            _fitted(found[name], name, y_up, pictures, notes) if name in found else None
            for name in ("forward", "backward")
        ]
        if len(found) == 1:
            notes.append("one way is the other turned round")
        flow = assembled(*ways, pictures, run.progress(1))
        return _shown(cls, flow, list(dict.fromkeys(notes)))


def _read(value: object, name: str, coding: Coding, scale: float) -> dict[str, Tensor]:
    """One or both ways [N, 2, H, W] of whatever a socket carries."""
    if isinstance(value, Flow):
        raise ValueError(
            f"'{name}' is a flow of this pack already: it needs no Flow from Other Nodes."
        )
    if torch.is_tensor(value) and value.ndim == 4 and value.shape[-1] in (3, 4):
        return {name: coded_flow(image_to_frames(value), coding, scale, name)}
    return raw_flow(value, name)


def _fitted(
    way: Tensor, name: str, y_up: bool, pictures: Tensor | None, notes: list[str]
) -> Tensor:  # [V, F - 1, 2, H, W]
    """The steps of the clip, at its size."""
    if y_up:
        way = way * way.new_tensor([1.0, -1.0])[:, None, None]
    if pictures is None:
        return way[None]
    V, count, _, H, W = pictures.shape
    h, w = way.shape[-2:]
    if (w, h) != (W, H):
        notes.append(f"the flow of {w}x{h} became {W}x{H}")
    return by_view(resized_flow(way, W, H), V, count, name)


NODES: list[type[io.ComfyNode]] = [OpticalFlow, BodyFlow, FlowFromOtherNodes]
