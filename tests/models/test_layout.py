"""Key layouts of the tiny models: names, and the latent's affine map folded into the VAE."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.tiny.layout import (
    WAN21_LATENT_MEAN,
    WAN21_LATENT_STD,
    dit_to_native,
    vae_to_native,
)

Z = 16


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ends() -> dict[str, Tensor]:
    """The two 1x1x1 convolutions beside the latent, as diffusers names them."""
    return {
        "quant_conv.weight": draw(2 * Z, 2 * Z, 1, 1, 1, seed=0),
        "quant_conv.bias": draw(2 * Z, seed=1),
        "post_quant_conv.weight": draw(Z, Z, 1, 1, 1, seed=2),
        "post_quant_conv.bias": draw(Z, seed=3),
    }


def per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)


def test_native_encoder_gives_raw_wan_latents(ends):
    native, features = vae_to_native(ends), draw(1, 2 * Z, 2, 3, 3, seed=4)
    raw = F.conv3d(features, native["conv1.weight"], native["conv1.bias"])
    trained = F.conv3d(features, ends["quant_conv.weight"], ends["quant_conv.bias"])
    expected = trained[:, :Z] * per_channel(WAN21_LATENT_STD) + per_channel(WAN21_LATENT_MEAN)
    torch.testing.assert_close(raw[:, :Z], expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(raw[:, Z:], trained[:, Z:])  # the log variance is not scaled


def test_native_decoder_takes_raw_wan_latents(ends):
    native, latent = vae_to_native(ends), draw(1, Z, 2, 3, 3, seed=5)
    raw = latent * per_channel(WAN21_LATENT_STD) + per_channel(WAN21_LATENT_MEAN)
    out = F.conv3d(raw, native["conv2.weight"], native["conv2.bias"])
    expected = F.conv3d(latent, ends["post_quant_conv.weight"], ends["post_quant_conv.bias"])
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)


def test_conversion_leaves_the_trained_weights_alone(ends):
    before = {k: v.clone() for k, v in ends.items()}
    vae_to_native(ends)
    assert all(torch.equal(ends[k], before[k]) for k in ends)


@pytest.mark.parametrize(
    ("key", "native"),
    [
        ("encoder.conv_in.weight", "encoder.conv1.weight"),
        ("encoder.down_blocks.3.norm1.gamma", "encoder.downsamples.3.residual.0.gamma"),
        ("encoder.down_blocks.5.time_conv.bias", "encoder.downsamples.5.time_conv.bias"),
        ("encoder.mid_block.resnets.1.conv2.bias", "encoder.middle.2.residual.6.bias"),
        ("decoder.mid_block.attentions.0.proj.bias", "decoder.middle.1.proj.bias"),
        ("decoder.up_blocks.1.resnets.0.conv_shortcut.bias", "decoder.upsamples.4.shortcut.bias"),
        ("decoder.up_blocks.2.upsamplers.0.resample.1.bias", "decoder.upsamples.11.resample.1.bias"),
        ("decoder.norm_out.gamma", "decoder.head.0.gamma"),
        ("decoder.conv_out.weight", "decoder.head.2.weight"),
    ],
)  # fmt: skip
def test_vae_key(ends, key, native):
    assert native in vae_to_native({**ends, key: torch.zeros(1)})


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
