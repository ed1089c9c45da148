"""View sync: attention between the views of one moment (MV-Performer's sync attention).

Two forms. Trained: a layer of our own after a DiT block, in which the tokens of all views at one
latent frame attend to each other, without any camera embedding; its last projection starts at zero,
so an untrained layer changes nothing. Training-free: the block's own self-attention with keys and
values extended over the views, added as A = (A_self + s A_views) / (1 + s) (MVAnimate's additive
alignment of two attentions, a non-expansive step).

The performer's own video can be one more view, clean and at timestep 0: then it is item 0 of every
chunk, takes part in sync attention, and its tokens, normalised, follow the text in each block's text
cross-attention (MV-Performer's ref attention).

Tokens are [n V, L, C]: n conditioning chunks, each with the V views in order (the reference, where
there is one, counted), L = T h w tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEAD_DIM = 128
"""Wan's; ComfyUI derives the number of heads from it."""


def rotate(
    x: Tensor,  # [B, L, heads, d]
    pe: Tensor,  # [1, L, 1, d / 2, 2, 2]
) -> Tensor:
    """Rotary position embedding in ComfyUI's layout: pairs of neighbouring channels."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2).to(x.dtype)


def _per_token(rows: Tensor, length: int) -> Tensor:
    """Modulation rows [B, t, C] for tokens [B, L, C]: one for all, or one a latent frame."""
    if rows.shape[1] == 1:
        return rows
    return rows.repeat_interleave(length // rows.shape[1], dim=1)


class SyncLayer(nn.Module):
    """One trained sync layer: x + gate * projector(attention over the views of a latent frame)."""

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
        views: int,
        grid: tuple[int, int, int],  # T, h, w with T h w = L
    ) -> Tensor:  # [n V, L, C]
        if vec.ndim == 3:
            vec = vec[:, None]
        rows = self.modulation.to(x)[:, None] + vec[:, :, :3].to(x)
        shift, scale, gate = (_per_token(r, x.shape[1]) for r in rows.unbind(2))
        y = self.norm(x) * (1 + scale) + shift
        q, k, v = self.norm_q(self.q(y)), self.norm_k(self.k(y)), self.v(y)
        q, k = (rearrange(rotate(rearrange(t, "b l (h d) -> b l h d", h=self.heads), pe),
                          "b l h d -> b l (h d)") for t in (q, k))  # fmt: skip
        q, k, v = (over_views(t, views, grid, self.heads) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + gate * self.projector(back_to_tokens(y, views, grid))


def over_views(tokens: Tensor, views: int, grid: tuple[int, int, int], heads: int) -> Tensor:
    """[n V, T h w, C] -> [n T, heads, V h w, d]: one attention a latent frame, over all views."""
    T, h, w = grid
    return rearrange(
        tokens, "(n v) (t h w) (a d) -> (n t) a (v h w) d", v=views, t=T, h=h, w=w, a=heads
    )


def back_to_tokens(tokens: Tensor, views: int, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `over_views`."""
    T, h, w = grid
    return rearrange(tokens, "(n t) a (v h w) d -> (n v) (t h w) (a d)", v=views, t=T, h=h, w=w)


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


Attention = Callable[..., Tensor]


def extended_attention(
    attention: Attention,  # (q, k, v, heads) -> [B, L, C]
    q: Tensor,  # [n V, L, C]
    k: Tensor,
    v: Tensor,
    heads: int,
    views: int,
    grid: tuple[int, int, int],
    strength: float,
) -> Tensor:  # [n V, L, C]
    """Training-free sync: (A_self + s A_views) / (1 + s); s = 0 is the plain attention, to the bit."""
    own = attention(q, k, v, heads)
    if strength == 0:
        return own
    T, h, w = grid

    def together(t: Tensor) -> Tensor:
        return rearrange(t, "(n v) (t p) c -> (n t) (v p) c", v=views, t=T, p=h * w)

    across = attention(together(q), together(k), together(v), heads)
    across = rearrange(across, "(n t) (v p) c -> (n v) (t p) c", v=views, t=T, p=h * w)
    return (own + strength * across) / (1 + strength)
