"""A learned subject: its reference pictures with cameras, and what carries them into a DiT.

Stage: Train Subject -> TURNAROUND_SUBJECT -> Apply Subject (MVCustom's pose-conditioned blocks, after
CustomDiffusion360). The references run through the frozen DiT once; what its chosen blocks make of
them goes into one feature field a block, rendered from the target's cameras and added behind that
block. A field depends on references and cameras alone, not on what is being sampled: it is rendered
once a sampling.

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
Renderings = dict[int, Rendering]


@dataclass(frozen=True)
class Pictures:
    """R clean pictures of a subject from known cameras."""

    latents: Tensor
    """[R, c, 1, 2 h, 2 w] as the VAE gives them."""
    colors: Tensor
    """[R, 3, h, w] 0..1, mean of the subject in each token, times its mask."""
    masks: Tensor
    """[R, h, w] 0..1, the share of each token that is subject."""
    rig: Rig
    """The R cameras, at the pictures' size."""

    def __post_init__(self) -> None:
        R, (h, w) = len(self.latents), self.size
        if self.masks.shape != (R, h, w) or self.colors.shape != (R, 3, h, w) or len(self.rig) != R:
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
    """Pictures with the means over tokens that a field is compared with."""
    masks = masks[:, None].float()
    return Pictures(
        latents, F.avg_pool2d(frames * masks, TOKEN), F.avg_pool2d(masks, TOKEN)[:, 0], rig
    )


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


class SubjectNet(nn.Module):
    """All that is learned: fields, injections, words, a LoRA. Without blocks, words and LoRA alone."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.fields = nn.ModuleDict(
            {
                str(i): FeatureField(shape.width, shape.hidden, shape.reach, generator=generator)
                for i in shape.blocks
            }
        )
        self.injections = nn.ModuleDict({str(i): Injection(shape.width) for i in shape.blocks})
        self.words = nn.Parameter(torch.zeros(shape.tokens, shape.text_width))
        self.lora = None
        if shape.rank:
            self.lora = LoRA(shape.width, shape.depth, shape.rank, generator)
        # A DiT's residual stream grows with depth: injections see and give tokens near unit size.
        self.register_buffer("scales", torch.ones(len(shape.blocks)))

    @torch.no_grad()
    def measure(self, features: Features) -> None:
        """Take the size of each block's features from these."""
        for n, i in enumerate(self.shape.blocks):
            self.scales[n] = features[i].float().std().clamp(min=1e-6)

    def render(
        self,
        features: Features,
        cameras: tuple[Tensor, Tensor],  # K [R, 3, 3], T_camera_world [R, 4, 4] of the references
        targets: tuple[Tensor, Tensor],  # of N targets
        size: tuple[int, int],  # rows and columns of the targets' tokens
        generator: torch.Generator | None = None,  # places samples at random, for training
        chunk: int | None = None,  # rays at a time
    ) -> Renderings:
        """Every block's field; each draws its samples where the one before found something."""
        found: Renderings = {}
        earlier = None
        for i in self.shape.blocks:
            references = References(features[i], *cameras)
            earlier = self.fields[str(i)].render(
                references, *targets, size, earlier=earlier, generator=generator, chunk=chunk
            )
            found[i] = earlier
        return found

    def inject(
        self,
        block: int,
        x: Tensor,  # [..., L, C] tokens of targets
        features: Tensor,  # [..., L, C] what the field has there
    ) -> Tensor:
        """The tokens with the subject in them, in their own precision."""
        injection = self.injections[str(block)]
        precise = injection.change.weight.dtype
        scale = self.scales[self.shape.blocks.index(block)].to(precise)
        return (scale * injection(x.to(precise) / scale, features)).to(x)


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
