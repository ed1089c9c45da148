"""Learning a subject: which pictures a step compares, what it is compared with, and where it stands.

Stage: Train Subject. A step takes a few targets and a few other pictures as their references, renders
the fields for the targets' cameras, lets the frozen model denoise the targets with that, and compares
(CustomDiffusion360 as MVCustom uses it: targets drawn towards high noise, five references, losses of
color and outline beside the diffusion loss).

Nothing random outlives a step: everything is drawn from (seed, step), so that training that goes on
from a file ends where training in one piece does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .subject import Features, Known, Pictures, Renderings, Subject, SubjectNet, nearest_to

COLOR, OUTLINE, LATENTS = 50.0, 10.0, 1.0
"""Weights of the fields' own losses. Published: 5 and 10 (inside and outside of the outline alike); ten
times as much for color takes a field 2.7 dB further in 250 steps. The latents that it predicts tell it
of detail that colors in cells of 8 pixels don't."""
POOL = 0.5
"""Share of the other pictures that a step's references are the nearest of: near ones show most, and that
it is not always the same ones keeps the field from needing them."""
SURROUNDINGS = 0.1
"""What an error outside the subject counts: its surroundings are the prompt's to choose."""
LEAST_SIGMA = 0.05
"""Below, the model's own error over sigma says little about the subject."""
WARM_UP, LAST_RATE = 20, 0.1
"""Steps until the learning rate is full; its share at the end of a cosine."""
LONGEST_GRADIENT = 1.0
RAISED = 2.0**12
"""The loss on its way back, so that small gradients don't vanish in a model that computes in float16."""
SLOW = 0.2
"""Of the fields' learning rate: for injections, words and a LoRA."""


@dataclass(frozen=True)
class Settings:
    """How it is learned."""

    steps: int
    rate: float = 6e-3
    targets: int = 2
    """Pictures denoised in a step."""
    references: int = 5
    """As published; never one of the targets."""
    seed: int = 0

    def rate_at(self, step: int) -> float:
        done = min(1.0, step / max(1, self.steps))
        falling = LAST_RATE + (1 - LAST_RATE) * (0.5 + 0.5 * math.cos(math.pi * done))
        return self.rate * min(1.0, (step + 1) / WARM_UP) * falling


@dataclass(frozen=True)
class Drawn:
    """What one step looks at."""

    targets: list[int]
    references: list[int]
    levels: list[float]
    """[targets] 0..1 of the noise schedule, 0 = all noise; one to a stratum."""
    generator: torch.Generator
    """For noise, and for places along rays."""


def draw(
    settings: Settings,
    step: int,
    T_camera_world: Tensor,  # [R, 4, 4] of the pictures, in the subject's space
) -> Drawn:
    """Of R pictures; at least one of them is left as a reference."""
    count = len(T_camera_world)
    rng = np.random.default_rng([settings.seed % 2**63, step])
    order = rng.permutation(count).tolist()
    targets = order[: max(1, min(settings.targets, count - 1))]
    others = order[len(targets) :] or targets
    pool = sorted(others[: max(settings.references, round(POOL * len(others)))])
    T = T_camera_world.cpu()
    nearest = nearest_to(T[pool], T[targets], settings.references)
    references = [pool[n] for n in nearest.unique().tolist()]
    levels = (rng.permutation(len(targets)) + rng.random(len(targets))) / len(targets)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    return Drawn(targets, references, levels.tolist(), generator)


def diffusion_loss(
    denoised: Tensor,  # [n, c, 1, 2 h, 2 w] what the model takes for the clean latents
    clean: Tensor,  # the same shape
    sigma: Tensor,  # [n] noise levels
    masks: Tensor,  # [n, 4 h, 4 w] 0..1
) -> Tensor:
    """Squared error over sigma: of the flow (flow matching) or of the noise (eps), mostly inside the
    subject."""
    error = (denoised - clean) / sigma.clamp(min=LEAST_SIGMA).view(-1, 1, 1, 1, 1)
    return (error.square() * _weights(masks)[:, :, None]).mean()


def _weights(masks: Tensor) -> Tensor:  # [n, 4 h, 4 w] -> [n, 1, 2 h, 2 w]
    """What an error in a cell of the latent counts: all of it in tokens with any of the subject."""
    inside = F.interpolate((F.max_pool2d(masks[:, None], 4) > 0).float(), scale_factor=2)
    return SURROUNDINGS + (1 - SURROUNDINGS) * inside


def field_loss(net: SubjectNet, found: Renderings, seen: Pictures) -> Tensor:
    """Errors of the fields' colors, outlines and predicted latents, squared and weighted."""
    colors, masks = seen.colors.to(found.latents), seen.masks.to(found.latents)
    loss = torch.zeros((), device=colors.device)
    for field in (found.coarse, found.fine):
        rgb, alpha = (
            F.adaptive_avg_pool2d(x, field.alpha.shape[1:]) for x in (colors, masks[:, None])
        )
        loss = loss + COLOR / 2 * (field.rgb - rgb).square().mean()
        loss = loss + OUTLINE / 2 * (field.alpha - alpha[:, 0]).square().mean()
    clean = net.normed(seen.latents[:, :, 0].to(found.latents))
    error = (found.latents - clean).square() * _weights(masks)
    return loss + LATENTS * error.mean()


Denoise = Callable[[Drawn], tuple[Tensor, Tensor, Tensor, Renderings | None]]
"""What a step looks at -> its targets [n, c, 1, 2 h, 2 w] as the model cleans them of noise, and as they
are; the noise's sigmas [n]; what `SubjectTraining.render` gave on the way, None without fields."""


class SubjectTraining:
    """A subject that is being learned, step after step."""

    def __init__(self, subject: Subject, settings: Settings) -> None:
        self.net, self.pictures, self.settings = subject.net, subject.pictures, settings
        self.known = subject.known()
        # Injections speak straight into the model: at the fields' rate they carry its noise along.
        quick = [*self.net.fields.parameters(), *self.net.heads.parameters()]
        slow = [*self.net.injections.parameters(), self.net.words]
        slow += list(self.net.lora.parameters()) if self.net.lora is not None else []
        groups = [
            {"params": [w for w in weights if w.numel()], "share": share}
            for weights, share in ((quick, 1.0), (slow, SLOW))
        ]
        self.optimizer = torch.optim.Adam(groups, lr=settings.rate, fused=True)
        self.losses = list(subject.losses)
        if subject.training:
            self._go_on(subject.training)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def subject(self) -> Subject:
        """As it is now; shares the weights."""
        return Subject(self.net, self.pictures, tuple(self.losses), self.state())

    def state(self) -> dict[str, Tensor]:
        """What is needed to go on, beside the subject itself: Adam's moments."""
        moments = self.optimizer.state_dict()["state"]
        return {f"{n}.{k}": v.cpu() for n, state in moments.items() for k, v in state.items()}

    def _go_on(self, state: Mapping[str, Tensor]) -> None:
        """From where `state` was taken."""
        loaded = self.optimizer.state_dict()
        weights = [w for group in self.optimizer.param_groups for w in group["params"]]
        for name, value in state.items():
            n, key = name.split(".")
            if int(n) >= len(weights) or value.shape not in ((), weights[int(n)].shape):
                raise ValueError(
                    "'subject' holds what another training left, so going on is not possible: leave "
                    "'subject' free and learn it anew."
                )
            # A copy: each step changes them in place, and the subject stays what it was.
            loaded["state"].setdefault(int(n), {})[key] = value.clone()
        self.optimizer.load_state_dict(loaded)

    def render(self, features: Features, drawn: Drawn) -> Renderings:
        """The targets' cameras from the features of the step's references."""
        if not self.losses:
            self.net.measure(features, self.known.latents)
        there = self.net.words.device
        known = Known(*(part[drawn.references].to(there) for part in vars(self.known).values()))
        targets = tuple(
            part[drawn.targets].to(there) for part in (self.known.K, self.known.T_camera_world)
        )
        return self.net.render(
            features, known, targets, self.pictures.size, drawn.generator,
            nearest=self.settings.references,
        )  # fmt: skip

    def learn(self, denoise: Denoise) -> float:
        """One step; gives its loss."""
        drawn = draw(self.settings, self.step, self.known.T_camera_world)
        denoised, clean, sigma, renderings = denoise(drawn)
        seen = self.pictures.select(drawn.targets)
        loss = diffusion_loss(denoised, clean, sigma, seen.masks.to(denoised))
        if renderings is not None:
            loss = loss + field_loss(self.net, renderings, seen)
        self.optimizer.zero_grad(set_to_none=True)
        (RAISED * loss).backward()
        for weights in self.net.parameters():
            if weights.grad is not None:
                weights.grad /= RAISED
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), LONGEST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.settings.rate_at(self.step)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]
