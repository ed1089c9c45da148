"""The tiny VAE: shapes, its computed start, and the single convolution that its encoder is."""

import numpy as np
import pytest
import torch
from turnaround.models.tiny.autoencoder import (
    TinyVAE,
    encode_linearly,
    encoder_as_convolution,
)
from turnaround.models.tiny.autoencoder_start import LATENT_STD, start_decoder, start_encoder
from turnaround.models.tiny.layout import WAN21_RGB_BIAS, WAN21_RGB_FACTORS
from turnaround.models.tiny.pictures import procedural_picture

SIZE = 32


def clips(count: int, frames: int, seed: int) -> torch.Tensor:  # [count, 3, frames, SIZE, SIZE]
    """Windows that move over pictures."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        picture = procedural_picture(rng, SIZE + frames)
        out.append([picture[i : i + SIZE, i : i + SIZE] for i in range(frames)])
    return torch.from_numpy(np.array(out)).permute(0, 4, 1, 2, 3).float()


@pytest.fixture(scope="module")
def started() -> TinyVAE:
    torch.manual_seed(0)
    vae = TinyVAE()
    start_encoder(vae, clips(60, 8, seed=0))
    start_decoder(vae, clips(16, 9, seed=1))
    return vae


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (9, 3), (13, 4)])
def test_clips_of_4n_plus_1_frames_come_back_as_long(frames, latent_frames):
    vae = TinyVAE()
    with torch.no_grad():
        latents = vae.encode(torch.rand(2, 3, frames, 16, 24))
        assert latents.shape == (2, 16, latent_frames, 2, 3)
        assert vae.decode(latents).shape == (2, 3, frames, 16, 24)


def test_later_frames_never_change_earlier_ones():
    """The decoder looks back only."""
    torch.manual_seed(0)
    vae, latents = TinyVAE(), torch.randn(1, 16, 3, 2, 2)
    with torch.no_grad():
        whole, part = vae.decode(latents), vae.decode(latents[:, :, :2])
    torch.testing.assert_close(whole[:, :, :5], part, atol=1e-5, rtol=1e-5)


def test_started_encoder_is_one_convolution(started):
    clip = clips(3, 9, seed=2)
    with torch.no_grad():
        latents = started.encode(clip)
    assert latents.std() > 0.1
    short = encode_linearly(clip, *encoder_as_convolution(started))
    # Its float32 sums of shifted channels lose digits; it is linear to a hundredth of a deviation.
    torch.testing.assert_close(short, latents, atol=4e-3, rtol=0)


def test_started_latents_are_uncorrelated_and_of_one_size(started):
    """What principal components are, on the clips that they were computed from."""
    with torch.no_grad():
        rows = started.encode(clips(60, 8, seed=0)).movedim(1, -1).flatten(0, -2)
    covariance = torch.cov(rows.T) / LATENT_STD**2
    torch.testing.assert_close(covariance, torch.eye(16), atol=0.05, rtol=0)


def test_comfyuis_preview_of_started_latents_shows_the_picture(started):
    clip = clips(20, 8, seed=3)
    with torch.no_grad():
        latents = started.encode(clip)
    shown = torch.einsum("bcthw,cr->brthw", latents, WAN21_RGB_FACTORS)
    shown = shown + WAN21_RGB_BIAS.view(1, 3, 1, 1, 1)
    small = torch.nn.functional.avg_pool3d(clip, (4, 8, 8))
    together = torch.stack([shown.flatten(), small.flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.9  # 0.96 on performers


def test_started_pair_is_nearer_than_the_colours_of_blocks(started):
    """Before any training it beats what a mosaic of 8x8 blocks, one a latent frame, can show; on
    the clips it was fitted to, since there are few of them."""
    clip = clips(16, 9, seed=1)
    with torch.no_grad():
        error = (started.decode(started.encode(clip)) - clip).square().mean()
    inner = clip[:, :, 1:]
    mosaic = torch.nn.functional.avg_pool3d(inner, (4, 8, 8))
    mosaic = torch.nn.functional.interpolate(mosaic, inner.shape[2:])
    assert error < (mosaic - inner).square().mean()
