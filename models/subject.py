"""A learned subject: its reference pictures with cameras, and what carries them into a DiT.

Stage: Train Subject -> TURNAROUND_SUBJECT -> Apply Subject (MVCustom's pose-conditioned blocks, after
CustomDiffusion360). The references run through the frozen DiT once; what its chosen blocks make of
them goes into a feature field, rendered from the target's cameras and added behind each of these
blocks. A field depends on references and cameras alone, not on what is being sampled: it is rendered
once a sampling.

Departs from the published: not a field of one ray a token for every block, but one for all of them,
which a coarse one shows where to look, with four rays a token, since one ray can't tell what lies where
inside of 16 pixels (a truck on Turnaround-Tiny, 300 steps, less time a step: 17.1 for 16.5 dB); it also
reads the references' latents and outlines, and learns to predict the targets' latents; and every target
reads the references that stand nearest to it. Injections act as far as the subject covers a token: what
is around it stays the model's own, also when it was learned before surroundings that change (the truck,
before rooms: 19.4 dB after 160 steps for 19.2 after 400, and no speckles around it).

Frames: cameras are OpenCV; fields work in the subject's space (feature_rays.SubjectSpace); the token
grid is the picture's divided by TOKEN, its centres at +0.5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .cameras import Rig
from .feature_field import FeatureField, Injection, References, Rendering
from .feature_rays import SubjectSpace, subject_space
from .subject_lora import LoRA
from .whole_file import whole_file

TOKEN = 16
"""Pixels a token's side: 8 in the VAE, 2 in the transformer's patches."""
TOKENS = 4
"""Learned words that stand for the subject, behind the text."""

Features = Mapping[int, Tensor]
"""By block: [R, C, h, w] of the references, as the block gives them."""
RAYS = 2
"""Along a token: one for each of the latent's cells."""
FINE_SAMPLES = 12
"""A ray of the fine field, where the coarse one found something."""
NEAREST = 8
"""References that a target reads, as many as published at inference."""
LEAST_SCALE = 1e-6


@dataclass(frozen=True)
class Pictures:
    """R clean pictures of a subject from known cameras."""

    latents: Tensor
    """[R, c, 1, 2 h, 2 w] as the VAE gives them."""
    colors: Tensor
    """[R, 3, 2 h, 2 w] 0..1, mean of the subject in each of the latent's cells, times its mask."""
    masks: Tensor
    """[R, 4 h, 4 w] 0..1, the share of subject in cells of half that size."""
    rig: Rig
    """The R cameras, at the pictures' size."""

    def __post_init__(self) -> None:
        R, (h, w) = len(self.latents), self.size
        shapes = (R, 4 * h, 4 * w), (R, 3, 2 * h, 2 * w)
        if (self.masks.shape, self.colors.shape) != shapes or len(self.rig) != R:
            raise ValueError(
                f"{R} latents of {list(self.latents.shape)}, masks of {list(self.masks.shape)}, "
                f"colors of {list(self.colors.shape)} and {len(self.rig)} cameras don't belong "
                "together."
            )

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.latents.shape[3] // 2, self.latents.shape[4] // 2

    def select(self, chosen: Sequence[int]) -> Pictures:
        """Some of them."""
        chosen = list(chosen)
        return Pictures(
            self.latents[chosen], self.colors[chosen], self.masks[chosen], self.rig.select(chosen)
        )


def pictures_of(
    frames: Tensor,  # [R, 3, H, W] 0..1
    masks: Tensor,  # [R, H, W] 0..1
    latents: Tensor,  # [R, c, 1, H / 8, W / 8]
    rig: Rig,
) -> Pictures:
    """Pictures with the means that a field reads and is compared with."""
    masks = masks[:, None].float()
    colors = F.avg_pool2d(frames * masks, TOKEN // 2)
    return Pictures(latents, colors, F.avg_pool2d(masks, TOKEN // 4)[:, 0], rig)


@dataclass(frozen=True)
class Known:
    """References as fields read them."""

    K: Tensor
    """[R, 3, 3] in tokens."""
    T_camera_world: Tensor
    """[R, 4, 4] of the subject's space."""
    latents: Tensor
    """[R, c, 2 h, 2 w] as the VAE gives them."""
    masks: Tensor
    """[R, 4 h, 4 w]"""

    def to(self, device: torch.device) -> Known:
        return Known(*(t.to(device) for t in vars(self).values()))


@dataclass(frozen=True)
class Renderings:
    """A subject from N cameras."""

    features: dict[int, Tensor]
    """By block: [N, C + 1, h, w]; last, how much of the token the subject covers: the most that any of
    its rays meets."""
    coarse: Rendering
    """One ray a token."""
    fine: Rendering
    """RAYS x RAYS rays a token."""
    latents: Tensor
    """[N, c, 2 h, 2 w] what the field takes for the latents, in units of `SubjectNet.normed`."""


@dataclass(frozen=True)
class Shape:
    """What determines the sizes of the weights."""

    width: int
    """Of the DiT."""
    blocks: tuple[int, ...]
    """Of the DiT that the subject goes into, rising."""
    hidden: int
    """Inside the fields."""
    reach: float
    """Radius of the subject's ball, in its space."""
    text_width: int = 4096
    """Of a word of the model's text, before its text embedding."""
    tokens: int = TOKENS
    rank: int = 0
    """Of a LoRA on the DiT's attention; 0 = none."""
    depth: int = 0
    """Blocks of the DiT, which a LoRA goes through."""
    channels: int = 16
    """Of the latents."""


class SubjectNet(nn.Module):
    """All that is learned: fields, injections, words, a LoRA. Without blocks, words and LoRA alone."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        count, c = len(shape.blocks), shape.channels
        how = {"generator": generator, "outputs": shape.hidden, "groups": count, "details": c}
        size = (count * shape.width, shape.hidden, shape.reach)
        self.fields, self.heads = nn.ModuleDict(), nn.ModuleDict()
        if shape.blocks:
            self.fields["coarse"] = FeatureField(*size, **how)
            self.fields["fine"] = FeatureField(*size, FINE_SAMPLES, **how)
            self.heads["latents"] = _linear(shape.hidden, c, generator)
        for i in shape.blocks:
            self.heads[str(i)] = _linear(RAYS**2 * shape.hidden, shape.width, generator)
        self.injections = nn.ModuleDict({str(i): Injection(shape.width) for i in shape.blocks})
        self.words = nn.Parameter(torch.zeros(shape.tokens, shape.text_width))
        self.lora = None
        if shape.rank:
            self.lora = LoRA(shape.width, shape.depth, shape.rank, generator)
        # A DiT's residual stream grows with depth: injections see and give tokens near unit size.
        self.register_buffer("scales", torch.ones(count))
        self.register_buffer("latent_mean", torch.zeros(c))
        self.register_buffer("latent_scale", torch.ones(()))

    @torch.no_grad()
    def measure(self, features: Features, latents: Tensor) -> None:  # latents [R, c, 2 h, 2 w]
        """Take the size of each block's features, and of the latents, from these."""
        for n, i in enumerate(self.shape.blocks):
            self.scales[n] = features[i].float().std().clamp(min=LEAST_SCALE)
        self.latent_mean.copy_(latents.float().mean((0, 2, 3)))
        self.latent_scale.copy_(latents.float().std().clamp(min=LEAST_SCALE))

    def normed(self, latents: Tensor) -> Tensor:  # [N, c, 2 h, 2 w]
        """Latents about zero, at unit size."""
        return (latents - self.latent_mean[:, None, None]) / self.latent_scale

    def render(
        self,
        features: Features,
        known: Known,  # the references that the features are of
        targets: tuple[Tensor, Tensor],  # K [N, 3, 3] in tokens, T_camera_world [N, 4, 4]
        size: tuple[int, int],  # rows and columns of the targets' tokens
        generator: torch.Generator | None = None,  # places samples at random, for training
        chunk: int | None = None,  # rays at a time
        nearest: int = NEAREST,  # references that each target reads
    ) -> Renderings:
        """What is injected behind the blocks, and what it was made from."""
        coarse = self._each(
            "coarse", features, known, targets, size, None, generator, chunk, nearest
        )
        K, T = targets
        K = K * K.new_tensor([RAYS, RAYS, 1.0])[:, None]
        finer = (RAYS * size[0], RAYS * size[1])
        fine = self._each("fine", features, known, (K, T), finer, coarse, generator, chunk, nearest)
        packed = F.pixel_unshuffle(fine.features, RAYS).movedim(1, -1)
        # Injections are not to bargain with the outline.
        covered = F.max_pool2d(fine.alpha.detach()[:, None], RAYS).to(packed)
        heads = {i: self.heads[str(i)](packed).movedim(-1, 1) for i in self.shape.blocks}
        tokens = {i: torch.cat([head, covered], 1) for i, head in heads.items()}
        latents = self.heads["latents"](fine.features.movedim(1, -1)).movedim(-1, 1)
        return Renderings(tokens, coarse, fine, latents)

    def look(
        self,
        features: Features,
        known: Known,
        targets: tuple[Tensor, Tensor],  # of N targets, K in rays
        size: tuple[int, int],  # rows and columns of rays
    ) -> Rendering:
        """The fine field on any grid of rays."""
        coarse = self._each("coarse", features, known, targets, size, None)
        return self._each("fine", features, known, targets, size, coarse)

    def _each(
        self, name: str, features: Features, known: Known, targets: tuple[Tensor, Tensor],
        size: tuple[int, int], earlier: Rendering | None,
        generator: torch.Generator | None = None, chunk: int | None = None, nearest: int = NEAREST,
    ) -> Rendering:  # fmt: skip
        """One of the fields, target after target where each has its own references."""
        maps = torch.cat([features[i] for i in self.shape.blocks], 1)
        details = self.normed(known.latents.to(self.latent_mean))
        given = References(maps, known.K, known.T_camera_world, details, known.masks)
        how = {"generator": generator, "chunk": chunk}
        field, (K, T) = self.fields[name], targets
        if len(maps) <= nearest:
            return field.render(given, K, T, size, earlier=earlier, **how)
        chosen = nearest_to(known.T_camera_world, T, nearest)
        parts = []
        for n in range(len(K)):
            before = None if earlier is None else earlier.select(n)
            one = given.select(chosen[n])
            parts.append(field.render(one, K[n : n + 1], T[n : n + 1], size, earlier=before, **how))
        return Rendering(
            *(torch.cat(p) for p in zip(*(vars(p).values() for p in parts), strict=True))
        )

    def inject(
        self,
        block: int,
        x: Tensor,  # [..., L, C] tokens of targets
        features: Tensor,  # [..., L, C + 1] what the field has there, and how much the subject covers
    ) -> Tensor:
        """The tokens with the subject in them, in their own precision; where it is not, as they were."""
        injection = self.injections[str(block)]
        precise = injection.change.weight.dtype
        scale = self.scales[self.shape.blocks.index(block)].to(precise)
        given, covered = x.to(precise), features[..., -1:].to(precise)
        changed = scale * injection(given / scale, features[..., :-1])
        return torch.lerp(given, changed, covered).to(x)


def directions(T_camera_world: Tensor) -> Tensor:  # [N, 4, 4] -> [N, 3] unit
    """Where cameras stand, seen from the origin."""
    R, t = T_camera_world[:, :3, :3], T_camera_world[:, :3, 3:]
    return F.normalize(-(R.mT @ t)[..., 0], dim=-1)


def nearest_to(
    references: Tensor,  # [R, 4, 4] T_camera_world of the subject's space
    targets: Tensor,  # [N, 4, 4]
    count: int,
) -> Tensor:  # [N, count] rising
    """The references that stand nearest to each target, by angle as seen from the origin."""
    # Rounded, so that of two at one angle their order decides.
    angles = (directions(targets) @ directions(references).mT).round(decimals=5)
    chosen = angles.sort(dim=1, descending=True, stable=True).indices
    return chosen[:, :count].sort(dim=1).values


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """At unit variance."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.normal_(layer.weight, 0.0, inputs**-0.5, generator)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True)
class Subject:
    """What Train Subject gives and Apply Subject takes."""

    net: SubjectNet
    pictures: Pictures
    losses: tuple[float, ...]
    """Of every step so far."""
    training: Mapping[str, Tensor] = field(default_factory=dict)
    """What going on needs beside the rest, from SubjectTraining.state; empty: it begins anew there."""

    @property
    def space(self) -> SubjectSpace:
        return subject_space(self.pictures.rig.T_camera_world)

    def cameras(self, rig: Rig) -> tuple[Tensor, Tensor]:
        """A rig as the fields know it: K [N, 3, 3] in tokens, T_camera_world [N, 4, 4]."""
        K = rig.K / rig.K.new_tensor([TOKEN, TOKEN, 1.0])[:, None]
        return K, self.space.normalised(rig.T_camera_world)

    def known(self, chosen: Sequence[int] | None = None) -> Known:
        """Its pictures as references; None = all."""
        seen = self.pictures if chosen is None else self.pictures.select(chosen)
        return Known(*self.cameras(seen.rig), seen.latents[:, :, 0], seen.masks)

    def _comfy_cache_tensors(self) -> list[Tensor]:
        seen = self.pictures
        shown = [seen.latents, seen.colors, seen.masks]
        return [*self.net.state_dict().values(), *shown, *self.training.values()]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


KIND = "turnaround_subject"
NET, TRAINING = "net.", "training."
"""How the names of a file's tensors begin."""


def save_subject(path: Path, subject: Subject) -> None:
    """Write it whole or not at all."""
    seen, rig = subject.pictures, subject.pictures.rig
    tensors = {
        "latents": seen.latents, "colors": seen.colors, "masks": seen.masks,
        "K": rig.K, "T_camera_world": rig.T_camera_world,
        "losses": torch.tensor(subject.losses, dtype=torch.float64),
        **{NET + k: v for k, v in subject.net.state_dict().items()},
        **{TRAINING + k: v for k, v in subject.training.items()},
    }  # fmt: skip
    metadata = {
        "kind": KIND, "shape": json.dumps(asdict(subject.net.shape)),
        "size": json.dumps([rig.width, rig.height]),
    }  # fmt: skip
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_subject(path: Path) -> Subject:
    """ValueError when the file holds none."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(
                    f"'{path.name}' is no subject: choose a file that Save Subject has written."
                )
            shape = json.loads(metadata["shape"])
            width, height = json.loads(metadata["size"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)
        net = SubjectNet(Shape(**{**shape, "blocks": tuple(shape["blocks"])}))
        net.load_state_dict(_below(NET, tensors))
        rig = Rig(tensors["K"], tensors["T_camera_world"], width, height)
        pictures = Pictures(tensors["latents"], tensors["colors"], tensors["masks"], rig)
        losses = tuple(tensors["losses"].tolist())
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{path.name}' can't be read as a subject ({error}): save it again with Save Subject, "
            "or copy it anew."
        ) from error
    return Subject(net, pictures, losses, _below(TRAINING, tensors))


def _below(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
