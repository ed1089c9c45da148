"""A VAE decoder tuned to one clip, and its difference as a small file (DiffPerformer Sec. 4.3).

Stage: VAE and clean frames -> weights that decode the latents of these frames better. The encoder
stays as it is, so latents keep their meaning and any model goes on working with them; a smoother and
a sampler that pass frames through the VAE again and again then lose less each time. 2,000 steps of
Adam at 5e-5 are the paper's; windows in place of whole clips and the L1 loss are ours, since it says
nothing of either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .whole_file import whole_file

Weights = dict[str, Tensor]
Decode = Callable[[Weights, Tensor], Tensor]
"""Weights and latents [C, T, h, w] of one window -> its frames [F, 3, H, W] 0..1, with gradients."""

MARGIN, LEAD = 1, 2
"""Latent cells along a window's sides, and latent frames at its beginning, whose pixels don't count:
the decoder lacks their neighbours there, which it has in the whole clip. Measured on Turnaround-Tiny's
decoder: pictures of the first latent frames are off by as much as its error, by a tenth of it after."""


@dataclass(frozen=True)
class Tuning:
    """How a decoder is tuned."""

    steps: int = 2000
    rate: float = 5e-5
    window: int = 16
    """Latent cells a side of what is decoded in a step; more than twice MARGIN."""
    moments: int = 4
    """Latent frames of it; more than LEAD."""


@dataclass(frozen=True)
class Clips:
    """What the decoder learns: what it is given, and what it should have made of it."""

    latents: Tensor
    """[V, C, T, h, w], of the untouched encoder."""
    frames: Tensor
    """[V, F, 3, H, W] 0..1."""

    def __post_init__(self) -> None:
        T, F = self.latents.shape[2], self.frames.shape[1]
        if T > 1 and (F - 1) % (T - 1):
            raise ValueError(
                f"The VAE packs {F} frames into {T} latent frames, which can't be told apart: use a "
                f"clip of {(F - 1) // (T - 1) * (T - 1) + 1} frames."
            )

    @property
    def per_latent(self) -> int:
        """Frames that one latent frame holds, after the first, which holds one."""
        T, F = self.latents.shape[2], self.frames.shape[1]
        return (F - 1) // (T - 1) if T > 1 else 1


@dataclass(frozen=True)
class Window:
    """A piece of one view, and what of its pictures counts."""

    latents: Tensor
    """[C, t, a, b]."""
    frames: Tensor
    """[f, 3, A, B] that count."""
    counts: tuple[slice, slice, slice]
    """Where they are in what the decoder makes: frames, rows, columns."""


def _span(length: int, size: int, generator: torch.Generator) -> slice:
    size = min(length, size)
    start = int(torch.randint(length - size + 1, (), generator=generator))
    return slice(start, start + size)


def _inner(cells: slice, length: int, scale: int) -> slice:
    """Pixels of a window without its margin; the picture's own border is no margin."""
    first = cells.start + (MARGIN if cells.start > 0 else 0)
    last = cells.stop - (MARGIN if cells.stop < length else 0)
    return slice(first * scale, last * scale)


def draw_window(clips: Clips, tuning: Tuning, generator: torch.Generator) -> Window:
    """A random window of a random view, and what of it the decoder can know."""
    V, _, T, h, w = clips.latents.shape
    v = int(torch.randint(V, (), generator=generator))
    t, y, x = (
        _span(length, size, generator)
        for length, size in ((T, tuning.moments), (h, tuning.window), (w, tuning.window))
    )
    s, scale = clips.per_latent, clips.frames.shape[-1] // w
    # Latent frame n ends with frame s n, in the clip and in the window. Pictures need no lead.
    lead = s * (LEAD - 1) + 1 if s > 1 and t.start > 0 else 0
    rows, columns = (_inner(a, n, scale) for a, n in ((y, h), (x, w)))
    return Window(
        clips.latents[v, :, t, y, x],
        clips.frames[v, s * t.start + lead : s * (t.stop - 1) + 1, :, rows, columns],
        (
            slice(lead, None),
            slice(rows.start - y.start * scale, rows.stop - y.start * scale),
            slice(columns.start - x.start * scale, columns.stop - x.start * scale),
        ),
    )


def window_loss(made: Tensor, window: Window) -> Tensor:  # []
    """Mean absolute difference of what counts of the window, pictures 0..1."""
    frames, rows, columns = window.counts
    return (made[frames, :, rows, columns] - window.frames).abs().mean()


def decoding_weights(decode: Decode, weights: Weights, window: Window) -> list[str]:
    """Names of the weights that have a part in decoding: those that a loss reaches."""
    tracked = {name: value.detach().requires_grad_() for name, value in weights.items()}
    loss = window_loss(decode(tracked, window.latents), window)
    found = torch.autograd.grad(loss, list(tracked.values()), allow_unused=True)
    return [name for name, gradient in zip(tracked, found, strict=True) if gradient is not None]


SHOWN = 20
"""Steps between two pictures."""


def tune_decoder(
    decode: Decode,
    weights: Weights,  # of the whole VAE, float32; not changed
    clips: Clips,
    tuning: Tuning,
    seed: int = 0,
    on_step: Callable[[int, int, Tensor | None], None] | None = None,
) -> tuple[Weights, list[float]]:
    """What to add to the weights so that the decoder makes the frames of their latents, and the loss
    of every step. `on_step` gets done, total and at times a picture: what it shall be, what it is."""
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(weights.values())).device

    def draw() -> Window:
        w = draw_window(clips, tuning, generator)
        return Window(w.latents.to(device), w.frames.to(device), w.counts)

    names = decoding_weights(decode, weights, draw())
    tuned = {name: weights[name].clone().requires_grad_() for name in names}
    adam = torch.optim.Adam(tuned.values(), lr=tuning.rate)
    losses = []
    for step in range(tuning.steps):
        window = draw()
        made = decode({**weights, **tuned}, window.latents)
        loss = window_loss(made, window)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
        if on_step:
            shown = _side_by_side(made, window) if step % SHOWN == 0 else None
            on_step(step + 1, tuning.steps, shown)
    return {n: (value.detach() - weights[n]).cpu() for n, value in tuned.items()}, losses


@torch.no_grad()
def _side_by_side(made: Tensor, window: Window) -> Tensor:  # [3, A, 2 B]
    frames, rows, columns = window.counts
    return torch.cat([window.frames[-1], made[frames, :, rows, columns][-1].detach()], -1)


# --- the difference as a file ---------------------------------------------------------------------

KIND = "turnaround vae decoder delta 1"
UP, DOWN, WHOLE = ".up", ".down", ".diff"
ALIKE = 0.01
"""Share by which the length of an untuned weight may differ from that of the VAE the file was made
with: half precision changes it by less, other training by more."""


def low_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:  # [a, r], [r, b]
    """The two factors whose product is nearest to a weight's difference, seen as a matrix of one row
    an output; None where they would be no smaller."""
    matrix = difference.flatten(1) if difference.ndim > 1 else difference[:, None]
    a, b = matrix.shape
    if not rank or rank * (a + b) >= a * b:
        return None
    matrix = matrix.double()
    wide = a <= b
    # The leading eigenvectors of the smaller Gram matrix are the singular vectors of that side.
    gram = matrix @ matrix.mT if wide else matrix.mT @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    up, down = (vectors, vectors.mT @ matrix) if wide else (matrix @ vectors, vectors.mT)
    # Both of the same size, so that half precision serves both.
    balance = (down.norm() / up.norm().clamp(min=1e-30)).sqrt()
    return (up * balance).float(), (down / balance.clamp(min=1e-30)).float()


@dataclass(frozen=True)
class Packed:
    """A difference ready for a file."""

    tensors: Weights
    metadata: dict[str, str]
    kept: float
    """Share of the difference's square that the file holds, 0..1."""

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def pack_delta(
    delta: Weights,
    untuned: Mapping[str, Tensor],  # the VAE's own weights of these names
    rank: int,  # of the factors; 0 = every number
) -> Packed:
    """The difference in half precision, with what is needed to recognise the VAE it belongs to."""
    tensors, lost, total = {}, 0.0, 0.0
    for name, difference in delta.items():
        total += float(difference.double().square().sum())
        if factors := low_rank(difference, rank):
            tensors[name + UP], tensors[name + DOWN] = (f.half().contiguous() for f in factors)
            difference = difference - (factors[0] @ factors[1]).view_as(difference)
            lost += float(difference.double().square().sum())
        else:
            tensors[name + WHOLE] = difference.half().contiguous()
    made_with = {n: [list(d.shape), float(untuned[n].float().norm())] for n, d in delta.items()}
    metadata = {"kind": KIND, "weights": json.dumps(made_with)}
    return Packed(tensors, metadata, 1 - lost / total if total else 1.0)


def save_delta(path: Path, packed: Packed) -> None:
    with whole_file(path) as partial:
        save_file(packed.tensors, partial, metadata=packed.metadata)


MALFORMED = (KeyError, TypeError, AttributeError, json.JSONDecodeError, RuntimeError)
"""What a file raises whose header says one thing and whose contents another."""


def load_delta(path: Path, untuned: Mapping[str, Tensor]) -> Weights:
    """The difference in a file, for a VAE of these weights; ValueError when it is not for this one."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(
                    f"'{path.name}' is no decoder delta: choose a file that Save VAE Decoder Delta "
                    "has written, not a whole VAE."
                )
            made_with = json.loads(metadata["weights"])
            _check_same_vae(path.name, made_with, untuned)
            names = set(file.keys())
            return {n: _read(file, names, n, shape) for n, (shape, _) in made_with.items()}
    except (SafetensorError, *MALFORMED) as error:
        raise ValueError(
            f"'{path.name}' can't be read as a decoder delta ({error}): save it again with Save VAE "
            "Decoder Delta, or copy it anew."
        ) from error


def _check_same_vae(file: str, made_with: dict, untuned: Mapping[str, Tensor]) -> None:
    for name, (shape, norm) in made_with.items():
        if name not in untuned:
            raise ValueError(
                f"'{file}' was made with another kind of VAE: '{name}' is not in this one. Load the "
                "VAE that was tuned."
            )
        weight = untuned[name]
        if list(weight.shape) != shape:
            raise ValueError(
                f"'{file}' was made with another kind of VAE: '{name}' is {shape} there and "
                f"{list(weight.shape)} here. Load the VAE that was tuned."
            )
        if abs(float(weight.float().norm()) - norm) > ALIKE * norm + 1e-6:
            raise ValueError(
                f"'{file}' was made with a VAE of the same build but other weights ('{name}' "
                "differs). Load the VAE that was tuned."
            )


def _read(file, names: set[str], name: str, shape: list[int]) -> Tensor:
    if name + WHOLE in names:
        difference = file.get_tensor(name + WHOLE).float()
    else:
        up, down = (file.get_tensor(name + end).float() for end in (UP, DOWN))
        if len(up) * down.shape[-1] != math.prod(shape):
            raise RuntimeError(f"the factors of '{name}' don't make its shape")
        difference = up @ down
    if not difference.isfinite().all():
        raise RuntimeError(f"'{name}' holds NaN or infinity")
    return difference.reshape(shape)
