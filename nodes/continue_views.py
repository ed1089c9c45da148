"""Finished views fed back: more views of the same performance, or its continuation in time."""

from collections.abc import Iterator

import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import Rig
from ..models.continue_views import (
    joined_in_time,
    overlap_pictures,
    same_cameras,
    settled_frames,
    with_known_start,
    with_known_views,
)
from ..models.views import (
    LATENT_STRIDE,
    Views,
    as_pictures,
    resize_frames,
    snap_frames,
    view_labels,
)
from . import run
from .conditioning import CATEGORY
from .sockets import RIG, VIEWS
from .views import encode_views, snapped

MORE_VIEWS, LONGER = "more views", "longer"


class ContinueViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundContinueViews",
            display_name="Continue Views",
            category=CATEGORY,
            description="Feeds finished views back: any sampler after it keeps them as they are and "
            "makes what is missing to go with them, more views of the same clip or the clip's "
            "continuation.",
            inputs=[
                io.Latent.Input("latent", tooltip="Empty, from the conditioning of the new task: "
                                "all views, old and new, or the next stretch of the clip."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                VIEWS.Input("finished", tooltip="What is there already, from Decode Views."),
                io.Combo.Input("use", options=[MORE_VIEWS, LONGER],
                               tooltip="more views: the finished views are found in the new rig by "
                               "their cameras. longer: the last frames of the finished clip become "
                               "the first of the new one."),
                io.Int.Input("overlap", default=5, min=1, max=401, step=4,
                             tooltip="For 'longer': how many frames the two clips share; 4n+1. The "
                             "new conditions must begin that many frames before the old clip ends."),
                RIG.Input("rig", optional=True, tooltip="For 'more views': the rig of the new task."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="With what is known and a mask of "
                                 "what is to be made; for any sampler."),
                io.Latent.Output(display_name="reference", tooltip="For 'more views': the finished "
                                 "views as clean clips, to try as 'reference' of View Sync."),
                io.String.Output(display_name="note", tooltip="What was recognised."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, latent, vae, finished: Views, use, overlap, rig: Rig | None = None
    ) -> io.NodeOutput:
        empty = latent["samples"]
        if empty.ndim != 5:
            raise ValueError(
                f"'latent' holds pictures (shape {list(empty.shape)}), not one video a view: take "
                "it from a Multi-View Conditioning."
            )
        bar = run.progress(len(finished))
        if use == MORE_VIEWS:
            places = _places(finished, rig, len(empty))
            known = encode_views(vae, _clips(finished, 0), len(finished), bar)
            _check_size(known, empty, empty.shape[2])
            samples, mask = with_known_views(empty, known, places)
            labels = ", ".join(rig.labels[place] for place in places)
            note = f"{len(places)} of {len(empty)} views are known: {labels}"
            reference = {"samples": known}
        else:
            samples, mask, note = _continued(empty, vae, finished, overlap, bar)
            reference = None
        run.say(cls, note)
        # None, so that a graph that asks for what there is not hears of it.
        return io.NodeOutput({**latent, "samples": samples, "noise_mask": mask}, reference, note)


def _places(finished: Views, rig: Rig | None, views: int) -> list[int]:
    """Where the finished views stand among the new ones, or a sentence."""
    if rig is None or finished.rig is None:
        name = "'rig' is" if rig is None else "The cameras of 'finished' are"
        raise ValueError(
            f"{name} not connected, so the finished views can't be found among the new ones: connect "
            "the rig of the new task here, and its old one to Decode Views."
        )
    if len(rig) != views:
        raise ValueError(
            f"The rig has {len(rig)} cameras but the latent {views} views: connect the rig of the "
            "new task, in which old and new views stand together (Merge Rigs)."
        )
    places = same_cameras(finished.rig, rig)
    lost = [label for label, p in zip(view_labels(finished), places, strict=True) if p is None]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(finished)} finished views ({', '.join(lost)}) have no camera in "
            "the new rig: make it of the old one and the new cameras with Merge Rigs."
        )
    if len(set(places)) < len(places):
        raise ValueError(
            f"{len(places)} finished views stand at {len(set(places))} cameras of the new rig: use "
            "a rig whose cameras differ."
        )
    return places


def _continued(
    empty: Tensor, vae, finished: Views, overlap: int, bar
) -> tuple[Tensor, Tensor, str]:
    """The end of the finished clip as the beginning of the new one."""
    if len(finished) != len(empty):
        raise ValueError(
            f"'finished' has {len(finished)} views but the latent {len(empty)}: continue a clip with "
            "the views it has."
        )
    pictures = overlap_pictures(overlap, finished.frames.shape[1])
    known = encode_views(vae, _clips(finished, pictures), len(finished), bar)
    if known.shape[2] >= empty.shape[2]:
        raise ValueError(
            f"An overlap of {pictures} frames fills {known.shape[2]} latent frames, but the new clip "
            f"has {empty.shape[2]}: make the new clip longer or 'overlap' smaller."
        )
    _check_size(known, empty, known.shape[2])
    kept = _settled(vae, known, next(_clips(finished, pictures)))
    samples, mask = with_known_start(empty, known[:, :, :kept])
    changed = f" ({overlap} were asked for)" if pictures != overlap else ""
    note = (
        f"the last {pictures} frames of {len(finished)} views lead into the new clip{changed}: "
        f"{kept} of its {empty.shape[2]} latent frames are known"
    )
    return samples, mask, note


def _settled(vae, known: Tensor, clip: Tensor) -> int:
    """Of the latent frames of a clip [F, 3, H, W], those that what follows can't change."""
    later = (1 - clip[-1:]).expand(LATENT_STRIDE, -1, -1, -1)  # anything that looks different
    settled = settled_frames(known[:1], encode_views(vae, [torch.cat([clip, later])], 1))
    if not settled:
        raise ValueError(
            f"An overlap of {len(clip)} frames is too short for this VAE, which packs them with the "
            f"ones after: use {len(clip) + LATENT_STRIDE} or more."
        )
    return settled


def _clips(views: Views, last: int) -> Iterator[Tensor]:
    """Every view at the size that the VAE takes: its last frames, or (0) all."""
    frames, _, H, W = views.frames.shape[1:]
    _, width, height, _ = snapped(frames, W, H)
    part = slice(-last, None) if last else slice(0, snap_frames(frames))
    return (resize_frames(as_pictures(views, v)[part], width, height) for v in range(len(views)))


def _check_size(known: Tensor, empty: Tensor, frames: int) -> None:
    wanted = (empty.shape[1], frames, *empty.shape[3:])
    if known.shape[1:] != wanted:
        a, b = known.shape, empty.shape
        raise ValueError(
            f"'finished' becomes {a[2]} latent frames of {a[4]}x{a[3]} in {a[1]} channels, but the "
            f"latent has {b[2]} of {b[4]}x{b[3]} in {b[1]}: use the size, length and VAE of the new "
            "task."
        )


class JoinViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundJoinViews",
            display_name="Join Views in Time",
            category="Turnaround/1 views",
            description="Puts two clips of the same views behind each other; where they overlap, "
            "one fades into the other.",
            inputs=[
                VIEWS.Input("first", tooltip="The clip that comes first."),
                VIEWS.Input("second", tooltip="The clip that follows."),
                io.Int.Input("overlap", default=5, min=0, max=401,
                             tooltip="Frames that both have: the overlap of Continue Views."),
            ],
            outputs=[VIEWS.Output(display_name="views", tooltip="One longer clip of every view.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, first: Views, second: Views, overlap: int) -> io.NodeOutput:
        return io.NodeOutput(joined_in_time(first, second, overlap))


NODES: list[type[io.ComfyNode]] = [ContinueViews, JoinViews]
