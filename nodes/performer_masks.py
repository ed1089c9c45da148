"""Performer Masks: one performer's masks in all views and frames at once."""

from dataclasses import replace

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..models.human_net import CROP
from ..models.performer_masks import PerformerMasks, performer_masks
from ..models.performer_places import TURNS
from ..models.views import Views, as_pictures, contact_sheet, resize_frames
from . import run
from .geometry import CATEGORY
from .human import BYTES_A_CROP_PIXEL, HUMAN
from .sockets import VIEWS
from .views import frames_to_image

BYTES_A_PIXEL = 24
"""Of every view and frame: evidence of two rounds and the masks, as float."""
LARGEST_PREVIEW = 320
"""Pixels of the longer side of one picture in the preview."""
MUCH_ALONE = 0.6
"""Share of a view's mask that the others must confirm, or the note says so."""


class PerformerMasksNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundPerformerMasks",
            display_name="Performer Masks",
            category=CATEGORY,
            description="Masks of one performer in all views and frames of calibrated cameras at "
            "once: what one camera misses, the other cameras and the clip's colours know. For footage "
            "of several cameras that stand still; needs two at least, better four.",
            inputs=[
                VIEWS.Input("views", tooltip="The same moments from two or more cameras, straightened "
                            "and with their rig (Straighten Views). Masks that they have count as a "
                            "first guess when no human net is connected."),
                HUMAN.Input("human_net", optional=True,
                            tooltip="From Load Human Net: it finds the performer. Leave it out when "
                            "'views' have masks from elsewhere that should be improved."),
                VIEWS.Input("empty_stage", optional=True,
                            tooltip="The stage without anybody: one picture of every camera, in the "
                            "order and size of 'views' and straightened like them. What differs from "
                            "it is the performer: finer masks."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="The same views with the new masks."),
                io.Image.Output(display_name="preview", tooltip="Five moments of every view, all but "
                                "the performer dimmed: look here for missing hands and feet."),
                io.String.Output(display_name="note", tooltip="Where nobody was found, and which views "
                                 "disagree."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, views: Views, human_net: ModelPatcher | None = None, empty_stage: Views | None = None
    ) -> io.NodeOutput:
        _check(views, human_net)
        plates = None if empty_stage is None else _plates(views, empty_stage)
        run.check_memory("Masks", views.rig, views.frames.shape[1], BYTES_A_PIXEL)
        device = torch.device("cpu")
        if human_net is not None:
            memory = BYTES_A_CROP_PIXEL * CROP[0] * CROP[1] * 2 * len(TURNS)
            mm.load_models_gpu([human_net], memory_required=memory)
            device = human_net.load_device
        found = performer_masks(
            views.frames,
            views.rig,
            human_net.model if human_net is not None else None,
            None if human_net is not None else views.masks,
            plates,
            device,
            run.progress(len(views) * views.frames.shape[1]),  # the model says how many there are
        )
        if found is None:
            raise ValueError(
                "There is no place in space where two views show the same person: check that 'views' "
                "show the same moments, in the order of the rig's cameras, and that somebody is in them."
            )
        masked = replace(views, masks=found.masks)
        note = run.say(cls, _note(masked, found, plates is not None))
        return io.NodeOutput(masked, frames_to_image(_preview(masked)[None]), note)


def _check(views: Views, human_net: ModelPatcher | None) -> None:
    """One sentence about what is missing."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' carry depth, not colours: connect the footage itself.")
    if len(views) < 2:
        raise ValueError(
            "'views' has one view; Performer Masks compares several cameras: connect two or more, or "
            "use Human Geometry for a single clip."
        )
    if views.rig is None:
        raise ValueError(
            "'views' know no cameras: connect the rig of your calibration (Rig from File) to the node "
            "that makes them."
        )
    if any(not lens.straight for lens in views.rig.lenses):
        raise ValueError(
            "'views' are still bent by their lenses: put Straighten Views before Performer Masks."
        )
    if human_net is None and views.masks is None:
        raise ValueError(
            "Connect a 'human_net' (Load Human Net), or 'views' that have masks to start from."
        )


def _plates(views: Views, empty_stage: Views) -> Tensor:  # [V, 3, H, W]
    """The first frame of every camera."""
    wanted, given = views.frames.shape, empty_stage.frames.shape
    if given[2] != 3 or (given[0], *given[-2:]) != (wanted[0], *wanted[-2:]):
        raise ValueError(
            f"'empty_stage' has {given[0]} views of {given[-1]}x{given[-2]}, but 'views' {wanted[0]} of "
            f"{wanted[-1]}x{wanted[-2]}: give one picture of the empty stage for every camera, loaded "
            "and straightened like the footage."
        )
    return as_pictures(empty_stage, frames=slice(0, 1))[:, 0]


def _preview(views: Views) -> Tensor:  # [3, h, w]
    """A sheet of a few moments, all but the performer dimmed."""
    V, count, _, H, W = views.frames.shape
    chosen = torch.linspace(0, count - 1, min(5, count)).round().long()
    scale = min(1.0, LARGEST_PREVIEW / max(H, W))
    size = (max(1, round(W * scale)), max(1, round(H * scale)))
    small = []
    for v in range(V):
        shown = as_pictures(
            replace(views, frames=views.frames[v : v + 1, chosen], masks=None, rig=None), 0
        )
        shown = shown * (0.35 + 0.65 * views.masks[v, chosen, None])
        small.append(resize_frames(shown, *size))
    labelled = Views(torch.stack(small), None, views.rig.resized(*size), views.fps)
    return contact_sheet(labelled)


def _note(views: Views, found: PerformerMasks, with_plates: bool) -> str:
    how = "with the empty stage" if with_plates else "from the clip alone"
    V, count = views.frames.shape[:2]
    parts = [f"masks of one performer in {V} views x {count} frames, {how}"]
    missing = (~found.place.known).nonzero()[:, 0].tolist()
    if missing:
        parts.append(f"nobody was found in frames {missing}: their masks are empty")
    for label, share, shown in zip(
        views.rig.labels, found.agreement.tolist(), found.place.shown.tolist(), strict=True
    ):
        if shown < 0.2:
            parts.append(
                f"{label} hardly shows the performer where the others do: check its camera"
            )
        elif share < MUCH_ALONE:
            parts.append(f"{label}: {100 * (1 - share):.0f} % of the mask fits no other view")
    return "; ".join(parts)


NODES: list[type[io.ComfyNode]] = [PerformerMasksNode]
