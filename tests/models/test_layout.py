"""Key names of the tiny DiT: from diffusers' to the native ones."""

import pytest
import torch
from turnaround.models.tiny.layout import dit_to_native


@pytest.mark.parametrize(
    ("key", "native"),
    [
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out.bias", "head.head.bias"),
        ("condition_embedder.time_embedder.linear_2.bias", "time_embedding.2.bias"),
        ("condition_embedder.time_proj.weight", "time_projection.1.weight"),
        ("condition_embedder.text_embedder.linear_1.weight", "text_embedding.0.weight"),
        ("blocks.7.scale_shift_table", "blocks.7.modulation"),
        ("blocks.0.attn1.to_q.weight", "blocks.0.self_attn.q.weight"),
        ("blocks.0.attn1.norm_k.weight", "blocks.0.self_attn.norm_k.weight"),
        ("blocks.0.attn2.to_out.0.bias", "blocks.0.cross_attn.o.bias"),
        ("blocks.0.norm2.weight", "blocks.0.norm3.weight"),
        ("blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.0.weight"),
        ("blocks.0.ffn.net.2.bias", "blocks.0.ffn.2.bias"),
    ],
)
def test_dit_key(key, native):
    assert list(dit_to_native({key: torch.zeros(1)})) == [native]
