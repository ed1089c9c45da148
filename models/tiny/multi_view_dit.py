"""The tiny multi-view DiT in training: diffusers' Wan transformer with our sync layers hooked in.

Inside ComfyUI the same is done by `nodes/patch.py` to the native model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..view_sync import Layout, ViewSync, reference_context

DIM, BLOCKS = 256, 8
CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=DIM // 128,
    attention_head_dim=128,
    in_channels=48,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=4 * DIM,
    num_layers=BLOCKS,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
)


def build_dit() -> nn.Module:
    """The tiny DiT as diffusers' WanTransformer3DModel."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**CONFIG)


def build_sync() -> ViewSync:
    """Sync layers after every block, and a reference for every block."""
    return ViewSync(DIM, range(BLOCKS), range(BLOCKS))


def wan_rope(
    grid: tuple[int, int, int],  # latent frames, token rows, token columns
    head_dim: int = 128,
) -> Tensor:  # [1, L, 1, head_dim / 2, 2, 2]
    """Wan's rotation matrices, in the layout that ComfyUI hands to a block as `pe`."""
    axes = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    positions = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"), -1
    ).reshape(-1, 3)
    angles = torch.cat(
        [
            positions[:, i, None] * 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
            for i, d in enumerate(axes)
        ],
        dim=-1,
    )
    cos, sin = angles.cos(), angles.sin()
    pe = torch.stack([cos, -sin, sin, cos], dim=-1).reshape(*angles.shape, 2, 2)
    return pe.float()[None, :, None]


class MultiViewDiT(nn.Module):
    """DiT and sync weights as one module; items are scenes x views, a reference first."""

    def __init__(self) -> None:
        super().__init__()
        self.dit, self.sync = build_dit(), build_sync()
        nn.init.zeros_(self.dit.proj_out.weight)
        nn.init.zeros_(self.dit.proj_out.bias)
        for i, block in enumerate(self.dit.blocks):
            block.register_forward_pre_hook(self._refer(i))
            block.register_forward_hook(self._synchronise(i))

    @torch.no_grad()
    def start_sync(self) -> None:
        """Each sync layer begins as a copy of its block's self-attention, behind a projector of
        zero (as SynCamMaster's): it knows already which tokens belong together."""
        for block, layer in zip(self.dit.blocks, self.sync.blocks.values(), strict=True):
            for name in ("q", "k", "v"):
                getattr(layer, name).load_state_dict(
                    getattr(block.attn1, f"to_{name}").state_dict()
                )
            layer.norm_q.load_state_dict(block.attn1.norm_q.state_dict())
            layer.norm_k.load_state_dict(block.attn1.norm_k.state_dict())
            layer.modulation.copy_(block.scale_shift_table[:, :3])

    def _refer(self, index: int):
        def hook(_block, inputs):
            x, text, *rest = inputs
            if not self.with_reference:
                return None
            norm = self.sync.references[str(index)]
            return x, reference_context(text, x, norm, self.views), *rest

        return hook

    def _synchronise(self, index: int):
        def hook(_block, inputs, output):
            if not self.synced:
                return None
            layer = self.sync.blocks[str(index)]
            layout = Layout(self.views, self.grid)
            return layer(output, inputs[2], self.rope.to(output.device), layout)

        return hook

    def forward(
        self,
        x: Tensor,  # [scenes V, 48, T, h, w]
        sigma: Tensor,  # [scenes V], 0 for a reference
        views: int,  # V, the reference counted
        with_reference: bool,
        synced: bool,
    ) -> Tensor:  # [scenes V, 16, T, h, w]
        T, h, w = x.shape[2:]
        self.views, self.grid = views, (T, h // 2, w // 2)
        self.with_reference, self.synced = with_reference, synced
        self.rope = wan_rope(self.grid) if synced else None
        no_text = torch.zeros(len(x), 1, CONFIG["text_dim"], device=x.device)
        return self.dit(x, 1000 * sigma, no_text, return_dict=False)[0]
