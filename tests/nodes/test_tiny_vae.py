"""The tiny VAE through ComfyUI's own loader computes what training computed."""

import comfy.sd
import pytest
import torch
from turnaround.models.tiny.autoencoder import TinyVAE
from turnaround.models.tiny.layout import WAN21_LATENT_MEAN, WAN21_LATENT_STD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_native_vae_is_the_trained_one(randomise, frames):
    own = TinyVAE()
    weights = randomise(own, 0)
    weights = {k: (v * 0.5).bfloat16() for k, v in weights.items()}
    own.load_state_dict({k: v.float() for k, v in weights.items()})
    native = comfy.sd.VAE(sd=weights)
    video = torch.rand(frames, 16, 24, 3, generator=torch.Generator().manual_seed(1))
    latents = native.encode(video)
    expected = own.encode(video.movedim(-1, 0)[None])
    mean, std = (t.view(1, -1, 1, 1, 1) for t in (WAN21_LATENT_MEAN, WAN21_LATENT_STD))
    torch.testing.assert_close(latents, expected * std + mean, atol=1e-4, rtol=1e-4)
    decoded = native.decode(latents).reshape(frames, 16, 24, 3)
    expected = own.decode(expected)[0].movedim(0, -1)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)
