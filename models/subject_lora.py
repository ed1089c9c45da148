"""A LoRA learned with a subject: small changes of a DiT's attention, besides or instead of fields.

Stage: Train Subject learns it through hooks, so that the model's own weights are never touched; Apply
Subject puts it on as ordinary patches of those weights (Hu et al. 2021: W x + up (down x), begun at
up = 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = tuple(f"{part}.{layer}" for part in ("self_attn", "cross_attn") for layer in "qkvo")
"""Of a block of a Wan-type DiT: linear, and as wide as the model on both sides."""


class LoRA(nn.Module):
    """Of all attention layers of a DiT: `width` wide, `depth` blocks."""

    def __init__(
        self, width: int, depth: int, rank: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        down = torch.empty(depth, len(LAYERS), rank, width)
        bound = math.sqrt(3 / width)  # unit variance, of inputs of unit variance
        self.down = nn.Parameter(down.uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(depth, len(LAYERS), width, rank))

    @contextmanager
    def in_place(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """While it lasts, the layers of these blocks give what they would with the LoRA on them."""

        def adding(block: int, layer: int):
            def hook(_module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
                low = F.linear(given[0].to(self.down), self.down[block, layer])
                return out + F.linear(low, self.up[block, layer]).to(out)

            return hook

        handles = []
        try:
            for i, block in enumerate(blocks):
                for n, name in enumerate(LAYERS):
                    layer = block.get_submodule(name)
                    handles.append(layer.register_forward_hook(adding(i, n)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By the layer's name, such as "blocks.0.self_attn.q": up [C, r] and down [r, C]."""
        return {
            f"blocks.{i}.{name}": (self.up[i, n].detach(), self.down[i, n].detach())
            for i in range(len(self.down))
            for n, name in enumerate(LAYERS)
        }
