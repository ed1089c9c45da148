"""A learned subject inside a MODEL: its references run through the DiT once, then every step has it.

Block patches chain with those already there, and all per-run state rides in `transformer_options`, as
in patch.py. References never meet the views: they have a pass of their own, without other packs'
wrappers, whose blocks' outputs are kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..models.cameras import Rig
from ..models.subject import Features, Renderings, Subject, SubjectNet
from .patch import REFERENCE, TILE, ReplacedBlock, dit_blocks, known_items, replace_blocks

KEY = "turnaround_subject"
AT_ONCE = 8
"""References that run through the DiT together."""


@dataclass
class Recording:
    """What the blocks make of the references that are running through."""

    found: dict[int, list[Tensor]]

    def after(self, block: int, tokens: Tensor) -> Tensor:
        self.found.setdefault(block, []).append(tokens.detach())
        return tokens


@dataclass
class Injecting:
    """The subject, behind the blocks, as each of the cameras sees it."""

    net: SubjectNet
    rendered: dict[int, Tensor]
    """By block: [N, L, C] of the N cameras in this run."""
    chunks: int
    views: int
    """Batch items of a chunk that are sampled; references of other patches stand before them."""

    def after(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens [n (guests + V), T L, C] of V views with a camera each, or of one item whose T
        latent frames have one each."""
        there = self.rendered[block].to(tokens)
        N, L, C = there.shape
        chunks = tokens.unflatten(0, (self.chunks, -1))
        guests = chunks.shape[1] - self.views
        views = chunks[:, guests:].unflatten(2, (-1, L))  # [n, V, T, L, C]
        seen = there[:, None] if self.views == N else there[None]
        changed = self.net.inject(block, views, seen.expand_as(views)).flatten(2, 3)
        return torch.cat([chunks[:, :guests], changed], 1).flatten(0, 1)


class SubjectBlock(ReplacedBlock):
    """Whatever was there, then what this run does behind it."""

    def __call__(self, args: dict, extra: dict) -> dict:
        mm.throw_exception_if_processing_interrupted()
        out, run = self._inner(args, extra), args["transformer_options"].get(self.key)
        if run is None:  # off at this step
            return out
        return {**out, "img": run.after(self.index, out["img"])}


def told_of_references(value, x: Tensor, references: Tensor):
    """What else the model is told, for references of which nothing else is known: pictures of the
    views' size become empty ones of the references' size, the rest is the first view's."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(x):
        return value
    first = value[:1].expand(len(references), *value.shape[1:])
    if value.ndim < 5 or value.shape[-2:] != x.shape[-2:]:
        return first
    return first.new_zeros(*first.shape[:-3], *references.shape[-3:])


Render = Callable[[Features, tuple[int, int]], Renderings]
"""(the references' features, rows and columns of tokens) -> the subject from every camera sampled."""


class Once:
    """Renders a subject for a rig; again only when the references' features are others."""

    def __init__(self, subject: Subject, rig: Rig) -> None:
        self.subject, self.rig = subject, rig
        self.features: Features | None = None
        self.renderings: Renderings = {}

    def __call__(self, features: Features, size: tuple[int, int]) -> Renderings:
        if features is not self.features:
            there, subject = next(iter(features.values())), self.subject
            known, wanted = (
                tuple(t.to(there.device) for t in subject.cameras(rig))
                for rig in (subject.pictures.rig, self.rig)
            )
            self.renderings = subject.net.render(features, known, wanted, size)
            self.features = features
        return self.renderings


class SubjectWrapper:
    """Around every run of the DiT: the references' pass in the first, the subject in every one.

    `references`: [R, c, 1, h, w] clean latents as the model takes them."""

    def __init__(
        self, key: str, net: SubjectNet, references: Tensor, render: Render,
        sigmas: tuple[float, float] = (math.inf, 0.0),
    ) -> None:  # fmt: skip
        self.key, self.net, self.references, self.render = key, net, references, render
        self.sigma_start, self.sigma_end = sigmas
        self.features: Features | None = None

    def prepare(self, executor, *args, **kwargs):
        """Before every sampling: what was kept may be of other weights."""
        self.features = None
        return executor(*args, **kwargs)

    def __call__(
        self, executor, x, timestep, context, clip_fea=None, time_dim_concat=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        options = dict(transformer_options or {})
        sigma = float(options["sigmas"][0]) if "sigmas" in options else self.sigma_start
        if not self.sigma_end <= sigma <= self.sigma_start:
            return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)
        if self.features is None:
            self.features = self._run_references(executor, x, context, clip_fea, options, kwargs)
        size = tuple(math.ceil(n / 2) for n in x.shape[3:])
        rendered = self.render(self.features, size)
        chunks = len(options.get("cond_or_uncond", [0]))
        views = len(x) // chunks - options.get(REFERENCE, {}).get("count", 0)
        count = len(next(iter(rendered.values())).features)
        chosen = _cameras_of(count, views, x.shape[2], options.get(TILE))
        tokens = {i: r.features[chosen].flatten(2).mT for i, r in rendered.items()}
        options[self.key] = Injecting(self.net, tokens, chunks, views)
        words = self.net.words.to(context).expand(len(context), -1, -1)
        context = torch.cat([context, words], 1)
        return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    @torch.no_grad()
    def _run_references(self, executor, x, context, clip_fea, options, kwargs) -> dict[int, Tensor]:
        """The references' own pass, clean and without a text: by block [R, C, h, w]."""
        recording = Recording({})
        size = self.references.shape[3] // 2, self.references.shape[4] // 2
        options = {**options, self.key: recording}
        for start in range(0, len(self.references), AT_ONCE):
            clean = self.references[start : start + AT_ONCE].to(x)
            items = known_items(clean, x.shape[1])
            told = {k: told_of_references(v, x, items) for k, v in kwargs.items()}
            text = context.new_zeros(len(items), *context.shape[1:])
            seen = told_of_references(clip_fea, x, items)
            # Not through the executor: other wrappers would take them for views.
            executor.original(items, x.new_zeros(len(items)), text, seen, None, options, **told)
        # A picture of the model's own, before the clip's tokens, is none of theirs.
        own = size[0] * size[1]
        return {
            i: torch.cat(parts)[:, -own:].mT.unflatten(2, size).contiguous()
            for i, parts in recording.found.items()
        }


def _cameras_of(count: int, views: int, frames: int, tile: dict | None) -> slice | Tensor:
    """Which of `count` cameras a run samples."""
    if tile is not None and tile["of_views"] == count:
        return tile["views"]
    if views == count or (views == 1 and frames == count):
        return slice(None)
    raise ValueError(
        f"'rig' of Apply Subject has {count} cameras, but {views} views of {frames} latent frames "
        "are sampled: connect the rig of the views that are sampled."
    )


def with_subject(model: ModelPatcher, wrapper: SubjectWrapper, net: ModelPatcher | None):
    """A clone of MODEL with the wrapper around it; `net` is loaded and offloaded with the model."""
    blocks, chosen = dit_blocks(model), wrapper.net.shape.blocks
    dim = model.get_model_object("diffusion_model").dim
    if dim != wrapper.net.shape.width or max(chosen) >= len(blocks):
        raise ValueError(
            f"'subject' was learned with a model of width {wrapper.net.shape.width} with at least "
            f"{max(chosen) + 1} blocks, but 'model' has width {dim} and {len(blocks)} blocks: load "
            "the model that it was learned with."
        )
    patched = model.clone()
    replace_blocks(patched, SubjectBlock, chosen, net, wrapper.key)
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, wrapper.prepare)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)
    return patched
