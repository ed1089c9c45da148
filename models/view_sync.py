"""View sync: attention between the views of a scene (MV-Performer's sync attention).

Two forms. Trained: a layer of our own after a DiT block, in which the tokens of all views attend to
each other, without any camera embedding; its last projection starts at zero, so an untrained layer
changes nothing. Training-free: the block's own self-attention with keys and values taken over the
views, added as A = (A_self + s A_views) / (1 + s) (MVAnimate's additive alignment of two
attentions, a non-expansive step).

Who looks at whom is the same three modes in both: "frame", all views of one latent frame (as
MV-Performer); "dense", all views at all latent frames; "weighted", as "frame" with MVAnimate's
weights, alpha = softmax over views of w_m <q, k_m>, which is scaling the keys of view m.

The performer's own video can be one more view, clean and at timestep 0: then it is in front of every
chunk, takes part in sync attention, and its tokens, normalised, follow the text in each block's text
cross-attention (MV-Performer's ref attention).

Tokens are [n V, L, C]: n conditioning chunks, each with its V items in order (clean references, where
there are some, first), L = T h w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEAD_DIM = 128
"""Wan's; ComfyUI derives the number of heads from it."""

MODES = ("frame", "dense", "weighted")

Attention = Callable[..., Tensor]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention, [B, L, C] each; the host's may take its place."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


@dataclass(frozen=True)
class Layout:
    """How tokens [n V, T h w, C] divide into chunks, views and moments, and who looks at whom."""

    views: int
    """V, the items of one chunk that take part."""
    grid: tuple[int, int, int]
    """T, h, w with T h w = L."""
    mode: str = "frame"
    weights: Tensor | None = None
    """[V] > 0, on the keys of every view; of mode "weighted"."""
    cameras: Tensor | None = None
    """[V, 4, 4] T_camera_world, for layers that were trained with cameras."""
    numbers: Tensor | None = None
    """[V] place of every item in its group, for layers whose RoPE counts views."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode}.")
        if self.mode == "weighted" and (self.weights is None or len(self.weights) != self.views):
            given = "none" if self.weights is None else str(len(self.weights))
            raise ValueError(
                f"Mode 'weighted' needs one weight for each of the {self.views} views, got {given}: "
                "connect View Weights made with the same rig."
            )


def across_views(
    attention: Attention,  # (q, k, v, heads) -> [B, L, C]
    q: Tensor,  # [n V, L, C]
    k: Tensor,
    v: Tensor,
    heads: int,
    layout: Layout,
) -> Tensor:  # [n V, L, C]
    """Every token's attention to the tokens of all views that its mode lets it see."""
    T, h, w = layout.grid
    sizes = {"v": layout.views, "t": T, "p": h * w}
    if layout.mode == "weighted":
        scale = layout.weights.to(k).repeat(len(k) // layout.views)
        k = k * scale[:, None, None]
    apart = "(n v) (t p) c"
    joined = "n (v t p) c" if layout.mode == "dense" else "(n t) (v p) c"
    q, k, v = (rearrange(x, f"{apart} -> {joined}", **sizes) for x in (q, k, v))
    return rearrange(attention(q, k, v, heads), f"{joined} -> {apart}", **sizes)


def aligned(own: Tensor, across: Tensor, strength: float) -> Tensor:
    """MVAnimate's additive alignment of two attentions, (A_self + s A_views) / (1 + s)."""
    return (own + strength * across) / (1 + strength)


def rotate(
    x: Tensor,  # [B, L, heads, d]
    pe: Tensor,  # [1, L, 1, d / 2, 2, 2]
) -> Tensor:
    """Rotary position embedding in ComfyUI's layout: pairs of neighbouring channels."""
    # As complex numbers in one pass: half the time of two products and a sum.
    turns = torch.complex(pe[..., 0, 0], pe[..., 1, 0])
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def per_token(rows: Tensor, length: int) -> Tensor:
    """Modulation rows [B, t, C] for tokens [B, L, C]: one for all, or one a latent frame."""
    if rows.shape[1] == 1:
        return rows
    # A reference frame in front has no row of its own: as ComfyUI, the last row then covers less.
    return rows.repeat_interleave(math.ceil(length / rows.shape[1]), dim=1)[:, :length]


class SyncLayer(nn.Module):
    """One trained sync layer: x + gate * projector(attention over the views of a latent frame)."""

    place = "after"
    """Where in the DiT block it acts."""

    def __init__(self, dim: int, device=None, dtype=None, operations=nn) -> None:
        super().__init__()
        self.heads = dim // HEAD_DIM
        where = {"device": device, "dtype": dtype}
        self.norm = operations.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **where)
        self.q = operations.Linear(dim, dim, **where)
        self.k = operations.Linear(dim, dim, **where)
        self.v = operations.Linear(dim, dim, **where)
        self.norm_q = operations.RMSNorm(dim, eps=1e-6, **where)
        self.norm_k = operations.RMSNorm(dim, eps=1e-6, **where)
        self.projector = operations.Linear(dim, dim, **where)
        self.modulation = nn.Parameter(torch.zeros(1, 3, dim, **where))
        nn.init.zeros_(self.projector.weight)
        nn.init.zeros_(self.projector.bias)

    def forward(
        self,
        x: Tensor,  # [n V, L, C]
        vec: Tensor,  # [n V, 6, C] or [n V, t, 6, C], the block's time modulation
        pe: Tensor,  # [1, L, 1, d / 2, 2, 2]
        layout: Layout,
    ) -> Tensor:  # [n V, L, C]
        if vec.ndim == 3:
            vec = vec[:, None]
        rows = self.modulation.to(x)[:, None] + vec[:, :, :3].to(x)
        shift, scale, gate = (per_token(r, x.shape[1]) for r in rows.unbind(2))
        y = torch.addcmul(shift, self.norm(x), 1 + scale)
        q, k = (
            rotate(norm(linear(y)).unflatten(-1, (self.heads, -1)), pe).flatten(-2)
            for norm, linear in ((self.norm_q, self.q), (self.norm_k, self.k))
        )
        y = across_views(plain_attention, q, k, self.v(y), self.heads, layout)
        return torch.addcmul(x, gate, self.projector(y))


class ViewSync(nn.Module):
    """The trained sync layers of a DiT, and what lets its blocks read a reference.

    Keys `blocks.<block index>.<layer>` and `references.<block index>.weight | bias`, the norm that
    brings a block's tokens to the scale of text.
    """

    def __init__(
        self,
        dim: int,
        blocks: Iterable[int],
        references: Iterable[int] = (),
        device=None,
        dtype=None,
        operations=nn,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.blocks = nn.ModuleDict(
            {str(i): SyncLayer(dim, device, dtype, operations) for i in blocks}
        )
        self.references = nn.ModuleDict(
            {str(i): operations.LayerNorm(dim, device=device, dtype=dtype) for i in references}
        )


def by_moments(
    layer: nn.Module,
    x: Tensor,  # [n V, L, C]
    vec: Tensor,  # [n V, 6, C] or [n V, t, 6, C]
    pe: Tensor,  # [1, L, 1, d / 2, 2, 2]
    layout: Layout,
) -> Tensor:  # [n V, L, C]
    """A sync layer on one latent frame after another, which saves memory and changes nothing:
    unless the mode is "dense", no frame looks at another."""
    T, h, w = layout.grid
    rows = vec.shape[1] if vec.ndim == 4 else 1
    if layout.mode == "dense" or rows not in (1, T):
        return layer(x, vec, pe, layout)
    moment, out = replace(layout, grid=(1, h, w)), torch.empty_like(x)
    for t in range(T):
        tokens = slice(t * h * w, (t + 1) * h * w)
        own = vec if rows == 1 else vec[:, t : t + 1]
        out[:, tokens] = layer(x[:, tokens], own, pe[:, tokens], moment)
    return out


def reference_context(
    text: Tensor,  # [n V, L_text, C]
    x: Tensor,  # [n V, L, C] the block's tokens; item 0 of every chunk is the reference
    norm: nn.Module,  # [C]
    views: int,
) -> Tensor:  # [n V, L_text + L, C]
    """The text, followed by the tokens of the reference, for every view."""
    tokens = norm(x[::views])
    return torch.cat([text, tokens.to(text).repeat_interleave(views, dim=0)], dim=1)


def sync_layout(
    state_dict: dict[str, Tensor],
) -> tuple[int, list[int], list[int]]:  # width, indices of synced blocks, of those with a reference
    """The layout of a sync file, or a sentence saying that it is none."""
    ends = {"blocks.": ".projector.weight", "references.": ".weight"}
    found = {
        start: [k for k in state_dict if k.startswith(start) and k.endswith(end)]
        for start, end in ends.items()
    }
    if not found["blocks."]:
        raise ValueError(
            "This file holds no view-sync weights (no 'blocks.<n>.projector.weight'): choose one "
            "whose name says sync, such as turnaround_tiny_sync.safetensors."
        )
    synced, referring = (sorted(int(k.split(".")[1]) for k in keys) for keys in found.values())
    return state_dict[found["blocks."][0]].shape[0], synced, referring


def extended_attention(
    attention: Attention,  # (q, k, v, heads) -> [B, L, C]
    q: Tensor,  # [n V, L, C]
    k: Tensor,
    v: Tensor,
    heads: int,
    layout: Layout,
    strength: float,
) -> Tensor:  # [n V, L, C]
    """Training-free sync: (A_self + s A_views) / (1 + s); s = 0 is the plain attention, to the bit."""
    own = attention(q, k, v, heads)
    if strength == 0:
        return own
    return aligned(own, across_views(attention, q, k, v, heads, layout), strength)
