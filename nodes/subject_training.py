"""Train Subject's inside: ComfyUI loads and conditions the model, this learns in the place of a sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import comfy.samplers
import torch
from torch import Tensor, nn

from ..models.subject import Features, Renderings
from ..models.subject_training import Drawn, SubjectTraining
from .patch_subject import SubjectWrapper


@contextlib.contextmanager
def learnable_through(module: nn.Module) -> Iterator[None]:
    """Nodes load models in inference mode, and no gradient passes what was made there: for a while the
    same memory stands behind ordinary parameters."""
    originals = []
    try:
        for owner in module.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None and parameter.is_inference():
                    originals.append((owner, name, parameter))
                    alias = torch.from_dlpack(parameter.detach())
                    owner._parameters[name] = nn.Parameter(alias, requires_grad=False)
        yield
    finally:
        for owner, name, parameter in originals:
            owner._parameters[name] = parameter


def of_items(conds: list[dict], chosen: list[int], count: int) -> list[dict]:
    """What is told of some of the items alone."""

    def some(cond):
        tensor = getattr(cond, "cond", None)
        if not isinstance(tensor, Tensor) or not tensor.ndim or len(tensor) != count:
            return cond
        return cond._copy_with(tensor[chosen])

    return [
        {**told, "model_conds": {k: some(v) for k, v in told["model_conds"].items()}}
        for told in conds
    ]


class Learning(comfy.samplers.Sampler):
    """Stands where a sampler stands: gets the loaded model, and learns instead of sampling."""

    def __init__(
        self,
        training: SubjectTraining,
        wrapper: SubjectWrapper,
        after_step: Callable[[float], None],
    ) -> None:
        self.training, self.wrapper, self.after_step = training, wrapper, after_step

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
        disable_pbar=False,
    ):  # fmt: skip
        inner, sampling = model_wrap.inner_model, model_wrap.inner_model.model_sampling
        conds, clean = model_wrap.conds["positive"], latent_image

        def denoise(drawn: Drawn) -> tuple[Tensor, Tensor, Tensor, Renderings]:
            kept: list[Renderings] = []

            def render(features: Features, _size: tuple[int, int]) -> Renderings:
                kept.append(self.training.render(features, drawn))
                return kept[-1]

            self.wrapper.render = render
            x0 = clean[drawn.targets]
            sigma = torch.tensor([float(sampling.percent_to_sigma(p)) for p in drawn.levels]).to(x0)
            noise = torch.randn(x0.shape, generator=drawn.generator).to(x0)
            x = sampling.noise_scaling(sigma.view(-1, *[1] * (x0.ndim - 1)), noise, x0)
            told = of_items(conds, drawn.targets, len(clean))
            options = extra_args["model_options"]
            (denoised,) = comfy.samplers.calc_cond_batch(inner, [told], x, sigma, options)
            return denoised, x0, sigma, kept[-1]

        with learnable_through(inner.diffusion_model):
            while self.training.step < self.training.settings.steps:
                self.after_step(self.training.learn(denoise))
        return latent_image
