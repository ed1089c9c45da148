"""A learned subject inside a MODEL: its references run through the DiT once, then every step has it.

Block patches chain with those already there, and all per-run state rides in `transformer_options`, as
in patch.py. References never meet the views: they have a pass of their own, without other packs'
wrappers, whose blocks' outputs are kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..models.cameras import Rig
from ..models.feature_mesh import Carried
from ..models.subject import Features, Renderings, Subject, SubjectNet
from ..models.subject_views import fitted
from .patch import REFERENCE, TILE, ReplacedBlock, known_items

KEY = "turnaround_subject"
OFF = "turnaround_subject_off"
"""In `transformer_options`: keys of subjects that are left out of this run."""
CARRIED = "turnaround_carried"
"""In `transformer_options`: a models.feature_mesh.Carried at the tokens' size for every anchor whose
rendered features show in the other views (Depth-Aware Rendering)."""
OURS = "turnaround_"
"""How what this pack tells its own blocks of a run begins, in `transformer_options`."""
SLACK = 0.01
"""Of all steps."""
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
    """By block: [N, L, C + 1] of the N cameras in this run, as the subject gives them; or
    [N, T, L, C + 1], other at every moment."""
    chunks: int
    views: int
    """Batch items of a chunk that are sampled; references of other patches stand before them."""

    def after(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens [n (guests + V), T L, C] of V views with a camera each, or of one item whose T
        latent frames have one each."""
        there = self.rendered[block].to(tokens)
        there = there if there.ndim == 4 else there[:, None]  # [N, T or 1, L, C]
        N, _, L, C = there.shape
        chunks = tokens.unflatten(0, (self.chunks, -1))
        guests = chunks.shape[1] - self.views
        views = chunks[:, guests:].unflatten(2, (-1, L))  # [n, V, T, L, C]
        seen = there if self.views == N else there.transpose(0, 1)
        seen = seen.expand(*views.shape[:-1], C)
        changed = self.net.inject(block, views, seen).flatten(2, 3)
        return torch.cat([chunks[:, :guests], changed], 1).flatten(0, 1)


class SubjectBlock(ReplacedBlock):
    """Whatever was there, then what this run does behind it."""

    def __call__(self, args: dict, extra: dict) -> dict:
        mm.throw_exception_if_processing_interrupted()
        out, run = self._inner(args, extra), args["transformer_options"].get(self.key)
        if run is None:  # off at this step
            return out
        return {**out, "img": run.after(self.index, out["img"])}


def put_inside(previous, index: int, net: ModelPatcher | None, key: str) -> ReplacedBlock:
    """A subject's block right around the model's own (or another pack's), inside this pack's View Sync,
    so that the order of nodes does not matter."""
    if isinstance(previous, ReplacedBlock) and not isinstance(previous, SubjectBlock):
        inner = put_inside(previous.previous, index, net, key)
        return type(previous)(previous.index, inner, previous.weights, previous.key)
    return SubjectBlock(index, previous, net, key)


def told_of_references(value, x: Tensor, references: Tensor):
    """What else the model is told, for references of which nothing else is known: pictures of the
    views, at the latent's size or at a multiple of it, become empty ones of the references; the rest
    is the first view's."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(x):
        return value
    first = value[:1].expand(len(references), *value.shape[1:])
    finer = value.shape[-1] // x.shape[-1]
    if value.ndim < 5 or list(value.shape[-2:]) != [finer * n for n in x.shape[-2:]]:
        return first
    frames = max(1, value.shape[-3] * references.shape[2] // x.shape[2])
    size = [finer * n for n in references.shape[-2:]]
    return first.new_zeros(*first.shape[:-3], frames, *size)


Render = Callable[[Features, tuple[int, int]], Renderings]
"""(the references' features, rows and columns of tokens) -> the subject from every camera sampled."""


class Once:
    """Renders a subject for a rig; again only when the references' features are others.

    `chosen`: which of the subject's pictures the features are of; None = all."""

    def __init__(self, subject: Subject, rig: Rig, chosen: Sequence[int] | None = None) -> None:
        self.subject, self.rig = subject, rig
        self.known = subject.known(chosen)
        self.features: Features | None = None
        self.renderings: Renderings | None = None

    def __call__(self, features: Features, size: tuple[int, int]) -> Renderings:
        if features is not self.features:
            there, subject = next(iter(features.values())), self.subject
            wanted = tuple(t.to(there.device) for t in subject.cameras(fitted(self.rig, size)))
            known = self.known.to(there.device)
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
        off = self.key in options.get(OFF, ())
        if off or not self.sigma_end <= sigma <= self.sigma_start:
            return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

        def record() -> Features:
            return self._run_references(executor, x, context, clip_fea, options, kwargs)

        size = tuple(math.ceil(n / 2) for n in x.shape[3:])
        if self.net.shape.blocks:  # else words alone
            tokens = self.tokens(record, size, options.get(CARRIED, ()))
            chunks = len(options.get("cond_or_uncond", [0]))
            views = len(x) // chunks - options.get(REFERENCE, {}).get("count", 0)
            count = len(next(iter(tokens.values())))
            cameras, moments = _part_of(count, views, x.shape[2], options.get(TILE))
            tokens = {i: _at(t[cameras], moments) for i, t in tokens.items()}
            options[self.key] = Injecting(self.net, tokens, chunks, views)
        words = self.net.words.to(context).expand(len(context), -1, -1)
        context = torch.cat([context, words], 1)
        return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def tokens(
        self, record: Callable[[], Features], size: tuple[int, int], carried: Sequence[Carried]
    ) -> dict[int, Tensor]:
        """By block: what every camera sees, [N, L, C + 1]; with something carried [N, T, L, C + 1]."""
        if self.features is None:
            self.features = record()
        rendered = self.render(self.features, size)
        return with_carried({i: f.flatten(2).mT for i, f in rendered.features.items()}, carried)

    @torch.no_grad()
    def _run_references(self, executor, x, context, clip_fea, options, kwargs) -> dict[int, Tensor]:
        """The references' own pass, clean and without a text: by block [R, C, h, w]."""
        recording = Recording({})
        size = self.references.shape[3] // 2, self.references.shape[4] // 2
        # What this pack's patches do to views, other subjects too, is none of theirs.
        options = {k: v for k, v in options.items() if not k.startswith(OURS)}
        options |= {self.key: recording, "cond_or_uncond": [0]}
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


def with_carried(
    tokens: dict[int, Tensor],  # by block: [N, L, C + 1]
    carried: Sequence[Carried],
) -> dict[int, Tensor]:  # [N, L, C + 1], or [N, T, L, C + 1]
    """What each anchor sees, also where the other cameras see the same surface."""
    for here in carried:
        T = here.seen.shape[1]
        tokens = {
            i: here.to(t.device)
            .replaced((t if t.ndim == 4 else t[:, None].expand(-1, T, -1, -1)).flatten(1, 2)[None])[
                0
            ]
            .unflatten(1, (T, -1))
            for i, t in tokens.items()
        }
    return tokens


def _part_of(
    count: int, views: int, frames: int, tile: dict | None
) -> tuple[slice | Tensor, slice | Tensor]:
    """Which of `count` cameras, and which of their moments, a run samples."""
    everything = slice(None)
    if tile is not None and tile["of_views"] == count:
        return tile["views"], tile["frames"]
    if tile is not None and tile["of_views"] == 1 and tile["of_frames"] == count:
        return tile["frames"], everything
    if views == count or (views == 1 and frames == count):
        return everything, everything
    raise ValueError(
        f"'rig' of Apply Subject has {count} cameras, but {views} views of {frames} latent frames "
        "are sampled: connect the rig of the views that are sampled."
    )


def _at(tokens: Tensor, moments: slice | Tensor) -> Tensor:
    """[N, L, ...] or [N, 1, L, ...] are the same at every moment; else those of [N, T, L, ...]."""
    return tokens if tokens.ndim == 3 or tokens.shape[1] == 1 else tokens[:, moments]


class AppliedWrapper(SubjectWrapper):
    """Of Apply Subject: keeps what the cameras see while sampling, no longer, and nothing else."""

    seen: dict[int, Tensor] | None = None
    _with: tuple[Sequence[Carried], dict[int, Tensor]] = ((), {})

    def sampling(self, executor, *args, **kwargs):
        """Around every sampling."""
        self._forget()
        try:
            return executor(*args, **kwargs)
        finally:
            self._forget()

    def _forget(self) -> None:
        self.seen, self._with = None, ((), {})

    def tokens(
        self, record: Callable[[], Features], size: tuple[int, int], carried: Sequence[Carried]
    ) -> dict[int, Tensor]:
        if self.seen is None:
            self.features = None
            self.seen = super().tokens(record, size, ())
            # A gigabyte for a large model, and of no more use.
            self.features, self.render.features, self.render.renderings = None, None, None
        if not carried:
            return self.seen
        if len(carried) != len(self._with[0]) or any(
            a is not b for a, b in zip(carried, self._with[0], strict=True)
        ):
            self._with = carried, with_carried(self.seen, carried)
        return self._with[1]


def end_of_share(model: ModelPatcher, share: float) -> float:
    """The noise level above which a step lies in the first share of the steps. A step that begins
    where the share ends does not; schedulers place their steps a little away."""
    if share == 1:
        return 0.0
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(max(share - SLACK, share / 2)))


def with_subject(model: ModelPatcher, wrapper: SubjectWrapper, net: ModelPatcher | None):
    """A clone of MODEL with the wrapper around it; `net` is loaded and offloaded with the model."""
    blocks, chosen = blocks_of(model), wrapper.net.shape.blocks
    dim = model.get_model_object("diffusion_model").dim
    needed = max(chosen, default=-1) + 1
    if dim != wrapper.net.shape.width or needed > len(blocks):
        raise ValueError(
            f"'subject' was learned with a model of width {wrapper.net.shape.width} with at least "
            f"{needed} blocks, but 'model' has width {dim} and {len(blocks)} blocks: load "
            "the model that it was learned with."
        )
    patched = model.clone()
    replaced = patched.model_options["transformer_options"].get("patches_replace", {})
    before = replaced.get("dit", {})
    for index in chosen:
        block = put_inside(before.get(("double_block", index)), index, net, wrapper.key)
        patched.set_model_patch_replace(block, "dit", "double_block", index)
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, wrapper.prepare)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)
    return patched


def blocks_of(model: ModelPatcher) -> list:
    """The transformer blocks that a subject can go into, or a sentence."""
    dit = model.get_model_object("diffusion_model")
    if not (hasattr(dit, "blocks") and hasattr(dit, "patch_embedding")):
        raise ValueError(
            "'model' is not a Wan-type video model, so no subject can be put into it: load "
            "Turnaround-Tiny or a Wan 2.1 / 2.2 checkpoint with Load Diffusion Model."
        )
    return dit.blocks
