"""Deflicker: takes flicker out of any clip, quickly."""

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.deflicker import Deflickered, DeflickerSettings, deflicker
from ..models.views import Views
from . import run
from .flow import CATEGORY, clip_pictures
from .sockets import VIEWS
from .views import frames_to_image

BYTES = 100
"""A pixel and frame: what came, the result, what was taken out, and the small pictures."""
WINDOW_BYTES = 2 * 10**9
"""On the device that works: small pictures, and the frames around one."""
SHOWN = 4
"""How much stronger 'removed' shows what was taken out."""


class Deflicker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundDeflicker",
            display_name="Deflicker",
            category=CATEGORY,
            description="Takes flicker out of any clip, in a minute and without a model: exposure "
            "and tints that change from frame to frame, textures that crawl, and places that "
            "wobble. What moves stays sharp; light that really changes stays.",
            inputs=[
                io.MultiType.Input("images", types=[io.Image, VIEWS],
                                   tooltip="A clip, or views; every view, and every shot of it, is "
                                   "steadied by itself."),
                io.Float.Input("colour", default=1.0, min=0.0, max=1.0, step=0.05,
                               tooltip="How much of the flicker of exposure and tint is taken out. "
                               "0 = off."),
                io.Float.Input("places", default=1.0, min=0.0, max=1.0, step=0.05,
                               tooltip="How much of the wobble is taken out: small bends that are "
                               "new in every frame. 0 = off."),
                io.Float.Input("texture", default=1.0, min=0.0, max=1.0, step=0.05,
                               tooltip="How much of grain, blotches and crawling texture is taken "
                               "out. 0 = off, and faster."),
                io.Int.Input("reach", default=6, min=1, max=16,
                             tooltip="Frames before and after from which texture is averaged. More "
                             "is calmer and takes longer."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The steady clip; of views all "
                                "frames of the first, then of the second, ..."),
                VIEWS.Output(display_name="views", tooltip="The same as views, with the masks and "
                             "cameras that came in."),
                io.Image.Output(display_name="removed", tooltip="What was taken out, four times as "
                                "strong; grey = nothing."),
                io.String.Output(display_name="note", tooltip="How much flicker there was, and what "
                                 "was left alone."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, images: Tensor | Views, colour: float, places: float, texture: float, reach: int
    ) -> io.NodeOutput:
        pictures = clip_pictures(images, "images")
        V, count, _, H, W = pictures.shape
        _check_memory(V, count, W, H)
        settings = DeflickerSettings(colour, places, texture, reach)
        device = run.drawing_device(WINDOW_BYTES)
        bar = run.progress(V * 1000)
        results = []
        for v in range(V):

            def on_step(done: int, total: int, preview=None, view: int = v) -> None:
                bar(1000 * view + 1000 * done // max(total, 1), 1000 * V, preview)

            results.append(deflicker(pictures[v], settings, on_step, device))
        steady = torch.stack([result.frames for result in results])
        given = images if isinstance(images, Views) else Views(pictures)
        removed = (0.5 + SHOWN * (pictures - steady)).clamp(0, 1)
        note = run.say(cls, _note(results))
        return io.NodeOutput(
            frames_to_image(steady.flatten(0, 1)),
            Views(steady, given.masks, given.rig, given.fps),
            frames_to_image(removed.flatten(0, 1)),
            note,
        )


def _check_memory(views: int, frames: int, width: int, height: int) -> None:
    """One sentence instead of a computer that runs out of memory."""
    need = views * frames * width * height * BYTES
    total = mm.get_total_memory(torch.device("cpu"))
    if need > total:
        raise ValueError(
            f"Deflickering {views} views x {frames} frames of {width}x{height} needs "
            f"{need / 1e9:.0f} GB, but this computer has {total / 1e9:.0f} GB: cut the clip into "
            "shorter ones, or use smaller frames."
        )


def _note(results: list[Deflickered]) -> str:
    colour, wobble, noise = (
        max(getattr(result, what) for result in results) for what in ("colour", "wobble", "noise")
    )
    many = len(results) > 1
    worst = " (in the worst view)" if many else ""
    notes = [
        f"view {v}: {note}" if many else note
        for v, result in enumerate(results)
        for note in result.notes
    ]
    if all(len(result.frames) > 1 for result in results):
        says = (
            f"colours flickered by {colour:.1%}, places by {wobble:.1f} pixels, texture by "
            f"{noise:.1%}{worst}"
        )
        notes.insert(0, says)
    return "; ".join(notes)


NODES: list[type[io.ComfyNode]] = [Deflicker]
