"""Consistent-aware latent completion: newly visible parts go on from what was predicted for them.

Stage: inside a sampling step, around the model (MVCustom). Depth-aware feature rendering says what
the anchor saw; of the rest, which other views show for the first time, the model hears nothing. There
it is given, instead of the noisy latent, the clean latent that it predicted at the step before,
noised anew to the level of this step: what it once made of an unseen part comes back at every step
with other noise, until the part agrees with what is seen beside it. From the first step down to an
early noise level, at which shapes and colours are settled; details are then left alone.

The formula of noising is the model's: flow matching x_t = (1 - sigma) x0 + sigma noise, models of
noise or v in ComfyUI's scale x_t = x0 + sigma noise. The sampler's own latent is never written to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NoiseScaling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""sigma [], noise, x0 -> x_t, all of one shape."""

OWN_NOISE = 0x5EED
"""Added to the seed: with the sampler's, the first noise would be the one that it began with."""


def completed(
    x_t: Tensor,  # [B, C, T, h, w] what the sampler would show the model
    x0: Tensor,  # [B, C, T, h, w] predicted at the step before
    noise: Tensor,  # [B, C, T, h, w]
    sigma: Tensor,  # []
    newly_visible: Tensor,  # [B, 1, T, h, w] bool
    noise_scaling: NoiseScaling,
) -> Tensor:
    """The prediction, noised to `sigma`, where things are newly visible; elsewhere x_t to the bit."""
    return torch.where(newly_visible, noise_scaling(sigma, noise, x0), x_t)


class Completion:
    """Remembers the last prediction of one sampling. Ask `shown` before the model and tell `predicted`
    after it, every time it is called; `reset` before the next sampling."""

    def __init__(
        self,
        newly_visible: Tensor,  # [B, 1, T, h, w] bool, at the latent's resolution
        noise_scaling: NoiseScaling,
        until: float,  # sigma below which latents are left alone
        seed: int,
    ) -> None:
        self.newly_visible, self.noise_scaling = newly_visible, noise_scaling
        self.until, self.seed = until, seed
        self.reset()

    def reset(self) -> None:
        """Forget the prediction, and start the noise from the seed again."""
        self._x0: Tensor | None = None
        self._noise = torch.Generator().manual_seed((self.seed + OWN_NOISE) % 2**63)

    def shown(
        self,
        x_t: Tensor,  # [B, C, T, h, w]
        sigma: Tensor,  # any shape, one value
    ) -> Tensor:
        """What the model is to see at this step."""
        level = sigma.flatten()[0]
        if self._x0 is None or float(level) < self.until:
            return x_t
        self._check(x_t)
        # On the processor, so that every device gets the same noise.
        noise = torch.randn(x_t.shape, generator=self._noise).to(x_t)
        unseen = self.newly_visible.to(x_t.device)
        return completed(x_t, self._x0.to(x_t), noise, level, unseen, self.noise_scaling)

    def predicted(
        self,
        x0: Tensor,  # [B, C, T, h, w] the model's clean latent of this step, guidance applied
    ) -> None:
        self._x0 = x0.detach()

    def _check(self, x_t: Tensor) -> None:
        B, _, *size = self.newly_visible.shape
        if len(x_t) != B or list(x_t.shape[2:]) != size:
            raise ValueError(
                f"Latent completion was made for {B} items of {size} latent cells (frames, height, "
                f"width), but the latent has {len(x_t)} of {list(x_t.shape[2:])}: make it anew with "
                "the rig and the size of this latent."
            )
