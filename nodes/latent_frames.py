"""Views as the latent frames of one clip, for models whose own attention then sees all of them."""

import comfy.utils
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from . import run
from .train_subject import CATEGORY

LISTS = ("vace_frames", "vace_mask")
"""Of a CONDITIONING: lists of pictures; others are tensors."""

REFERENCES = "reference_latents"
"""A picture for the clip as a whole: the first view's."""


def in_time(value: Tensor, views: int) -> Tensor:  # [V or 1, c, t, h, w] -> [1, c, V t, h, w]
    """What every view is told, one after another in time; what is told once is told of all."""
    return rearrange(value.expand(views, *value.shape[1:]), "v c t h w -> 1 c (v t) h w")


def in_batch(value: Tensor, views: int) -> Tensor:  # [1, c, V t, h, w] -> [V, c, t, h, w]
    return rearrange(value, "1 c (v t) h w -> v c t h w", v=views)


def _mask(mask: Tensor, views: int, frames: int) -> Tensor:  # -> [V, 1, T, h, w]
    """A noise mask as ComfyUI understands it, with all its dimensions."""
    if mask.ndim < 5:  # [V, h, w] or [V, 1, h, w]
        mask = mask.reshape(-1, 1, 1, *mask.shape[-2:])
    mask = mask.expand(-1, -1, frames, -1, -1) if mask.shape[2] == 1 else mask
    return comfy.utils.repeat_to_batch_size(mask, views)


def as_frames(latent: dict) -> dict:
    """[V, c, 1, h, w] -> [1, c, V, h, w]."""
    samples = latent["samples"]
    if samples.ndim != 5 or samples.shape[2] != 1:
        brings = f"{samples.shape[2]} latent frames" if samples.ndim == 5 else "no frames"
        raise ValueError(
            f"'latent' has shape {list(samples.shape)}, that is {brings} a view, but a view must be "
            "one picture: make the latent from views of one frame, with Encode Views or Multi-View "
            "Conditioning."
        )
    made = _others(latent) | {"samples": in_time(samples, len(samples))}
    if latent.get("noise_mask") is not None:
        made["noise_mask"] = in_time(_mask(latent["noise_mask"], len(samples), 1), len(samples))
    return made


def as_items(latent: dict) -> dict:
    """[1, c, V, h, w] -> [V, c, 1, h, w]."""
    samples = latent["samples"]
    if samples.ndim != 5 or len(samples) != 1:
        raise ValueError(
            f"'latent' has shape {list(samples.shape)}, but one clip whose latent frames are views is "
            "needed: connect what was sampled from Views as Latent Frames."
        )
    V = samples.shape[2]
    made = _others(latent) | {"samples": in_batch(samples, V)}
    if latent.get("noise_mask") is not None:
        made["noise_mask"] = in_batch(_mask(latent["noise_mask"], 1, V), V)
    return made


def _others(latent: dict) -> dict:
    """What stays as it is. Not `batch_index`: which items were picked means nothing in the other
    layout, where noise is drawn anew."""
    return {k: v for k, v in latent.items() if k not in ("samples", "noise_mask", "batch_index")}


def told_as_frames(name: str, conditioning: list, views: int) -> list:
    """A conditioning that tells something of every view, for one clip of them."""
    made = []
    for text, told in conditioning:
        if len(text) != 1:
            raise ValueError(
                f"'{name}' has {len(text)} texts, one a view, but one clip has one text: leave View "
                "Prompts out."
            )
        made.append([text, {k: _told(name, k, v, views) for k, v in told.items()}])
    return made


def _told(name: str, key: str, value, views: int):
    if isinstance(value, list) and key in LISTS:
        return [_told(name, key, v, views) for v in value]
    if key == REFERENCES:
        return [v[:1] for v in value]
    if not isinstance(value, Tensor) or value.ndim != 5:
        return value
    if len(value) not in (1, views) or (len(value) == 1 and value.shape[2] == views > 1):
        raise ValueError(
            f"'{key}' of '{name}' is of {len(value)} views with {value.shape[2]} frames, but 'latent' "
            f"has {views} views of one: make both with the same views."
        )
    return in_time(value, views)


class ViewsAsLatentFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewsAsLatentFrames",
            display_name="Views as Latent Frames",
            category=CATEGORY,
            description="Lines up views of one moment as the latent frames of one clip, so that the "
            "own attention of a Wan-type model goes over all of them, without View Sync. Every view "
            "stays a picture of its own for the VAE.",
            inputs=[
                io.Latent.Input("latent", tooltip="One batch item a view, each of one picture, from "
                                "Encode Views or a conditioning node."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="What belongs to the views in it is lined up, too."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="What belongs to the views in it is lined up, too."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="One clip, a latent frame a view, for "
                                 "KSampler."),
                io.Conditioning.Output(display_name="positive", tooltip="For the same sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the same sampler."),
                io.String.Output(display_name="note", tooltip="How many views became latent frames."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, positive=None, negative=None) -> io.NodeOutput:
        made, views = as_frames(latent), len(latent["samples"])
        lined_up = (
            None if c is None else told_as_frames(name, c, views)
            for name, c in (("positive", positive), ("negative", negative))
        )
        note = f"{views} views became {views} latent frames of one clip"
        return io.NodeOutput(made, *lined_up, run.say(cls, note))


class LatentFramesAsViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLatentFramesAsViews",
            display_name="Latent Frames as Views",
            category=CATEGORY,
            description="Takes a clip whose latent frames are views apart again, so that Decode Views "
            "decodes every view as a picture of its own.",
            inputs=[
                io.Latent.Input("latent", tooltip="What was sampled from Views as Latent Frames."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="One batch item a view, for Decode "
                                 "Views."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        return io.NodeOutput(as_items(latent))


NODES: list[type[io.ComfyNode]] = [ViewsAsLatentFrames, LatentFramesAsViews]
