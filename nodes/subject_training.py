"""Train Subject's inside: ComfyUI loads and conditions the model, this learns in the place of a sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import comfy.model_management as mm
import comfy.samplers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.cameras import Rig
from ..models.subject import Features, Known, Renderings
from ..models.subject_training import Drawn, SubjectTraining
from ..models.subject_views import look, on_grey, references_of
from .patch import ReplacedBlock
from .patch_subject import SubjectWrapper

SHOWN = 8
"""References of pictures from unseen cameras; as published for applying a subject."""
EULER_STEPS = 6
"""Of those pictures: enough to see what was learned."""


@contextlib.contextmanager
def learnable_through(module: nn.Module) -> Iterator[None]:
    """Nodes load models in inference mode, and no gradient passes what was made there: for a while the
    same memory stands behind ordinary parameters."""
    originals = []
    try:
        for owner in module.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None and type(parameter.detach()) is not Tensor:
                    raise ValueError(
                        "'model' has packed weights (such as GGUF), and nothing can be learned through "
                        "them: load it in bf16, fp16 or fp8 with Load Diffusion Model."
                    )
                if parameter is not None and parameter.is_inference():
                    originals.append((owner, name, parameter))
                    alias = _ordinary(parameter.detach())
                    owner._parameters[name] = nn.Parameter(alias, requires_grad=False)
        yield
    finally:
        for owner, name, parameter in originals:
            owner._parameters[name] = parameter


def _ordinary(tensor: Tensor) -> Tensor:
    """The same memory, outside of inference mode."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        # Numbers of eight bits can't be handed over as what they are.
        return torch.from_dlpack(tensor.view(torch.uint8)).view(tensor.dtype)
    return torch.from_dlpack(tensor)


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Newer ComfyUI then leaves out quick paths that know no gradient."""
    before = getattr(mm, "in_training", None)
    try:
        if before is not None:
            mm.in_training = True
        yield
    finally:
        if before is not None:
            mm.in_training = before


def of_items(
    conds: list[dict], chosen: list[int], count: int, as_frames: bool = False
) -> list[dict]:
    """What is told of some of the items alone; as one item, whose latent frames they are."""

    def some(cond):
        tensor = getattr(cond, "cond", None)
        if not isinstance(tensor, Tensor) or not tensor.ndim or len(tensor) not in (1, count):
            return cond
        if len(tensor) == count:
            tensor = tensor[chosen]
        if as_frames and tensor.ndim >= 5:
            tensor = tensor.expand(len(chosen), *tensor.shape[1:]).transpose(0, -3)
        elif as_frames:
            tensor = tensor[:1]
        return cond._copy_with(tensor)

    return [
        {**told, "model_conds": {k: some(v) for k, v in told["model_conds"].items()}}
        for told in conds
    ]


class LearningBlock(ReplacedBlock):
    """Whatever was there, and a look at the cancel button on the way there and back."""

    def __call__(self, args: dict, extra: dict) -> dict:
        mm.throw_exception_if_processing_interrupted()
        out = self._kept(args, extra)
        if out["img"].requires_grad:
            out["img"].register_hook(lambda _: mm.throw_exception_if_processing_interrupted())
        return out

    def _kept(self, args: dict, extra: dict) -> dict:
        return self._inner(args, extra)


class RecomputedBlock(LearningBlock):
    """What it keeps for its gradient, most of a step's memory, is computed anew on the way back."""

    def _kept(self, args: dict, extra: dict) -> dict:
        if not torch.is_grad_enabled():
            return self._inner(args, extra)

        def inner(img: Tensor, txt: Tensor) -> Tensor:
            return self._inner({**args, "img": img, "txt": txt}, extra)["img"]

        how = {"use_reentrant": False, "preserve_rng_state": False}
        return {"img": checkpoint(inner, args["img"], args["txt"], **how)}


@dataclass(frozen=True)
class Unseen:
    """Cameras that no picture was taken with."""

    rig: Rig
    near: list[int]
    """For each of them a picture from beside it."""


class Learning(comfy.samplers.Sampler):
    """Stands where a sampler stands: gets the loaded model, and learns instead of sampling.

    `wrapper` is that of the model; its references are all the training's pictures, as the model takes
    them. `as_frames`: a step's targets are the latent frames of one item, with one level of noise.
    """

    def __init__(
        self,
        training: SubjectTraining,
        wrapper: SubjectWrapper,
        after_step: Callable[[], None],
        as_frames: bool = False,
    ) -> None:
        self.training, self.wrapper, self.after_step = training, wrapper, after_step
        self.as_frames = as_frames
        self.references = wrapper.references
        # With a LoRA they run anew for every look.
        count = SHOWN if training.net.lora is not None else len(training.pictures)
        self.spread = self.chosen = references_of(training.subject, count)

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
        disable_pbar=False,
    ):  # fmt: skip
        self.inner, self.conds = model_wrap.inner_model, model_wrap.conds["positive"]
        self.clean, self.options = latent_image, extra_args["model_options"]
        dit, lora = self.inner.diffusion_model, self.training.net.lora
        with contextlib.ExitStack() as during:
            during.enter_context(training_mode())
            during.enter_context(learnable_through(dit))
            if lora is not None:
                during.enter_context(lora.in_place(dit.blocks))
            while self.training.step < self.training.settings.steps:
                self.training.learn(self._denoised)
                self.after_step()
            self.at_end()
        return latent_image

    def at_end(self) -> None:
        """While the model is still there."""

    def _denoised(self, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor, Renderings]:
        """A step's targets through the model, with what the fields have for them."""
        kept: list[Renderings] = []

        def render(features: Features, _size: tuple[int, int]) -> Renderings:
            kept.append(self.training.render(self._of(features, drawn.references), drawn))
            return kept[-1]

        self._show(drawn.references)
        self.wrapper.render = render
        x0 = self.clean[drawn.targets]
        levels = drawn.levels[:1] * len(x0) if self.as_frames else drawn.levels
        sampling = self.inner.model_sampling
        sigma = torch.tensor([float(sampling.percent_to_sigma(p)) for p in levels]).to(x0)
        noise = torch.randn(x0.shape, generator=drawn.generator).to(x0)
        x = sampling.noise_scaling(sigma.view(-1, *[1] * (x0.ndim - 1)), noise, x0)
        return self._predicted(x, sigma, drawn.targets), x0, sigma, kept[-1] if kept else None

    def _predicted(self, x: Tensor, sigma: Tensor, items: list[int]) -> Tensor:
        """Clean latents [n, c, 1, h, w], told what is told of `items`."""
        told = of_items(self.conds, items, len(self.clean), self.as_frames)
        if self.as_frames:
            x, sigma = x.transpose(0, 2), sigma[:1]
        (denoised,) = comfy.samplers.calc_cond_batch(self.inner, [told], x, sigma, self.options)
        return denoised.transpose(0, 2) if self.as_frames else denoised

    def _show(self, chosen: list[int]) -> None:
        """References of what comes next: with a LoRA, which changes all the time, they run anew."""
        self.chosen = chosen
        if self.training.net.lora is not None:
            self.wrapper.references, self.wrapper.features = self.references[chosen], None

    def _of(self, features: Features, chosen: list[int]) -> Features:
        if self.training.net.lora is not None:
            return features
        return {i: f[chosen] for i, f in features.items()}

    def _cameras(self, rig: Rig) -> tuple[Tensor, Tensor]:
        there = self.training.net.words.device
        return tuple(t.to(there) for t in self.training.subject.cameras(rig))

    def _known(self, chosen: list[int]) -> Known:
        return self.training.subject.known(chosen).to(self.training.net.words.device)

    @torch.no_grad()
    def seen(self, rig: Rig, detail: int) -> Tensor | None:
        """[n, 3, detail h, detail w] on grey: what the fields see from other cameras, `detail` rays
        along a token. None without fields."""
        if not self.wrapper.features:
            return None
        pictures, net = self.training.pictures, self.training.net
        chosen = self.spread if net.lora is None else self.chosen
        K, T = self._cameras(rig)
        K = K * K.new_tensor([detail, detail, 1.0])[:, None]
        size = tuple(detail * n for n in pictures.size)
        features, known = self._of(self.wrapper.features, chosen), self._known(chosen)
        stop = mm.throw_exception_if_processing_interrupted
        rgb, alpha, _ = look(net, features, known, (K, T), size, lambda _: stop())
        return on_grey(rgb, alpha)

    @torch.no_grad()
    def sampled(self, unseen: Unseen, seed: int = 0) -> Tensor:
        """Latents [n, c, 1, h, w] as the VAE decodes them, from noise through the model."""
        kept: list[Renderings] = []

        def render(features: Features, size: tuple[int, int]) -> Renderings:
            if not kept:
                known, features = self._known(self.spread), self._of(features, self.spread)
                wanted = self._cameras(unseen.rig)
                kept.append(self.training.net.render(features, known, wanted, size))
            return kept[-1]

        self._show(self.spread)
        self.wrapper.render = render
        sampling, clean = self.inner.model_sampling, self.clean
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", EULER_STEPS).to(clean)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(unseen.rig), *clean.shape[1:], generator=generator).to(clean)
        x = sampling.noise_scaling(sigmas[:1], noise, torch.zeros_like(noise))
        for now, then in pairwise(sigmas):
            x0 = self._predicted(x, now.expand(len(x)), unseen.near)
            x = x0 + (x - x0) * (then / now)
        return self.inner.process_latent_out(x)
