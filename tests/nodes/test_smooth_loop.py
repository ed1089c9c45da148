"""Latent Guidance and Smooth Loop in the real ComfyUI: against its own samplers, and bad input."""

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_custom_sampler import BasicScheduler, SamplerCustom
from torch import Tensor
from turnaround.models.views import Views
from turnaround.nodes import embedded, latent_guidance, smooth_loop

import nodes as core

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, FRAMES, H, W = 2, 5, 32, 48
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 64,
    "use_spatial_transformer": True, "legacy": False, "num_heads": 2, "use_checkpoint": False,
    "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
    "dtype": torch.float32,
}  # fmt: skip
"""What ComfyUI detects of Stable Diffusion 1.5's keys, but 32 channels wide and of two resolutions."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth_views(
    views: int = VIEWS, frames: int = FRAMES, height: int = H, width: int = W
) -> Views:
    """A grating that wanders."""
    v, f = torch.arange(views)[:, None, None, None], torch.arange(frames)[:, None, None]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    wave = 0.5 + 0.4 * torch.sin(0.3 * x + 0.2 * y + 0.1 * f + v)  # [V, F, H, W]
    return Views(torch.stack([wave, 1 - wave, wave * wave], 2))


@pytest.fixture(scope="module")
def vae():
    path = embedded.TINY / "vae" / "turnaround_tiny_vae.safetensors"
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture(scope="module")
def picture_vae(randomise):
    with torch.inference_mode():
        return comfy.sd.VAE(sd=randomise(TAESD(latent_channels=4), 0))


def of_stable_diffusion(kind):
    config = kind(UNET)
    model = config.get_model({})
    with torch.inference_mode():
        for n, value in enumerate(model.diffusion_model.parameters()):
            size = 0.1 if value.ndim < 2 else value[0].numel() ** -0.5
            value.copy_(size * draw(*value.shape, seed=n))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class SD20V(comfy.supported_models.SD15):
    """Stable Diffusion predicting velocity, as 2.x does."""

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


@pytest.fixture(scope="module")
def models(wan):
    return {
        "flow": wan,
        "eps": of_stable_diffusion(comfy.supported_models.SD15),
        "v": of_stable_diffusion(SD20V),
    }


@pytest.fixture(scope="module")
def vaes(vae, picture_vae):
    return {"flow": vae, "eps": picture_vae, "v": picture_vae}


KINDS = ("flow", "eps", "v")


def conditioning(kind: str) -> list:
    if kind != "flow":
        return [[draw(1, 4, 64, seed=1), {}]]
    image = draw(VIEWS, 32, 2, H // 8, W // 8, seed=2)
    return [[draw(1, 4, 4096, seed=1), {"concat_latent_image": image}]]


def guide(model, vae, strength=0.5, steps=4, sampler="euler", scheduler="simple", seed=3, **more):
    more = more or {"views": smooth_views()}
    return latent_guidance.LatentGuidance.execute(
        model, vae, strength, steps, sampler, scheduler, seed, **more
    ).args


# --- Latent Guidance: the host's own noise --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_noise_is_the_hosts_to_the_bit(models, vaes, kind, strength):
    """ComfyUI's sampler, stopped before its first step, returns exactly what we give."""
    model, words = models[kind], conditioning(kind)
    noised, sigmas, *_, clean, _ = guide(model, vaes[kind], strength)
    noise = comfy.sample.prepare_noise(clean["samples"], 3)
    host = comfy.sample.sample_custom(
        model, noise, 1.0, comfy.samplers.ksampler("euler"), sigmas[:1], words, words,
        clean["samples"], seed=3,
    )  # fmt: skip
    assert torch.equal(noised["samples"], host)


@pytest.mark.parametrize("kind", ("eps", "v"))
def test_full_strength_is_the_hosts_start_too(models, vaes, kind):
    """At the highest sigma an eps model's noise gets a little more; the host knows, and so do we."""
    model, words = models[kind], conditioning(kind)
    noised, sigmas, _, start, clean, _ = guide(model, vaes[kind], 1.0)
    noise = comfy.sample.prepare_noise(clean["samples"], 3)
    host = comfy.sample.sample_custom(
        model, noise, 1.0, comfy.samplers.ksampler("euler"), sigmas[:1], words, words,
        clean["samples"], seed=3,
    )  # fmt: skip
    assert torch.equal(noised["samples"], host)
    assert start == 0
    sampling = model.get_model_object("model_sampling")
    level = float(noised["samples"].std() * 0.18215)
    assert level == pytest.approx(float((1 + sampling.sigma_max**2) ** 0.5), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("euler", "simple"), ("euler", "karras"), ("dpm_2", "normal")]
)
def test_all_ways_on_lead_to_ksamplers_result(models, vaes, kind, sampler, scheduler):
    """Noised into KSampler (Advanced), clean into KSampler: the same pictures."""
    model, words = models[kind], conditioning(kind)
    noised, sigmas, steps, start, clean, _ = guide(
        model, vaes[kind], 0.5, 3, sampler=sampler, scheduler=scheduler
    )
    expected = core.KSampler().sample(
        model, 3, 3, 1.0, sampler, scheduler, words, words, clean, 0.5
    )[0]["samples"]
    advanced = core.KSamplerAdvanced().sample(
        model, "disable", 3, steps, 1.0, sampler, scheduler, words, words, noised, start, 10000,
        "disable",
    )[0]["samples"]  # fmt: skip
    scale = float(expected.std())
    # Out of the model's own scale and in again: rounding, of sigmas that divide by 1 - sigma.
    assert float((advanced - expected).abs().max()) < 2e-4 * scale
    custom = SamplerCustom.execute(
        model, False, 3, 1.0, words, words, comfy.samplers.ksampler(sampler), sigmas, noised
    ).args[0]["samples"]
    assert float((custom - expected).abs().max()) < 2e-4 * scale


def test_sigmas_are_basic_schedulers(models, vaes):
    _, sigmas, steps, start, *_ = guide(models["flow"], vaes["flow"], 0.3, 6)
    expected = BasicScheduler.execute(models["flow"], "simple", 6, 0.3).args[0]
    assert torch.equal(sigmas, expected)
    assert (steps, start) == (20, 14)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_clean_latent(models, vaes, kind):
    noised, sigmas, steps, start, clean, note = guide(models[kind], vaes[kind], 0.0)
    assert torch.equal(noised["samples"], clean["samples"])
    assert (len(sigmas), steps, start) == (0, 4, 4)
    assert "strength 0" in note
    same = core.KSamplerAdvanced().sample(
        models[kind], "disable", 3, steps, 1.0, "euler", "simple", conditioning(kind),
        conditioning(kind), noised, start, 10000, "disable",
    )[0]["samples"]  # fmt: skip
    assert torch.equal(same, clean["samples"])


def test_frames_are_encoded_without_noise(models, vaes):
    """In latent space, not on pixels: the clean latent is Encode Views'."""
    *_, clean, _ = guide(models["flow"], vaes["flow"])
    views = smooth_views()
    expected = [vaes["flow"].encode(clip.movedim(1, -1)) for clip in views.frames]
    assert torch.equal(clean["samples"], torch.cat(expected))
    assert clean["samples"].shape == (VIEWS, 16, 2, H // 8, W // 8)


def test_same_seed_same_latent(models, vaes):
    first, again, other = (
        guide(models["flow"], vaes["flow"], seed=seed)[0]["samples"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_picture_models_get_frames_as_batch(models, vaes):
    noised = guide(models["eps"], vaes["eps"])[0]
    assert noised["samples"].shape == (VIEWS * FRAMES, 4, H // 8, W // 8)
    assert noised["turnaround_views"] == VIEWS


def test_images_are_one_view(models, vaes):
    images = smooth_views(1).frames[0].movedim(1, -1)
    noised = guide(models["flow"], vaes["flow"], images=images)[0]["samples"]
    expected = guide(models["flow"], vaes["flow"], views=smooth_views(1))[0]["samples"]
    assert torch.equal(noised, expected)


def test_lengths_and_sizes_are_fitted_and_said(models, vaes):
    views = smooth_views(frames=7, height=36)
    *_, clean, note = guide(models["flow"], vaes["flow"], views=views)
    assert clean["samples"].shape == (VIEWS, 16, 2, 4, 6)
    assert "7 frames became 5" in note
    assert "48x36 became 48x32" in note


def test_flow_model_at_full_strength_is_refused(models, vaes):
    with pytest.raises(ValueError, match=r"starts from noise alone.*strength to 0\.8 or less"):
        guide(models["flow"], vaes["flow"], 1.0)
    guide(models["flow"], vaes["flow"], 0.8)


def test_latents_of_another_count_are_refused(models, vaes):
    other = {"samples": torch.zeros(3, 16, 2, H // 8, W // 8)}
    with pytest.raises(ValueError, match=r"\[2, 16, 2, 4, 6\] but 'latent' has \[3, 16"):
        guide(models["flow"], vaes["flow"], views=smooth_views(), latent=other)


def test_vae_of_another_model_is_refused(models, vaes):
    with pytest.raises(
        ValueError, match="4 channels for pictures, but 'model' works on 16 for videos"
    ):
        guide(models["flow"], vaes["eps"])


def test_frames_must_come_once_and_be_colours(models, vaes):
    flow, vae = models["flow"], vaes["flow"]
    views = smooth_views()
    with pytest.raises(ValueError, match="either 'views' or 'images', none"):
        guide(flow, vae, views=None)
    with pytest.raises(ValueError, match="either 'views' or 'images', both"):
        guide(flow, vae, views=views, images=views.frames[0].movedim(1, -1))
    with pytest.raises(ValueError, match="hold depth"):
        guide(flow, vae, views=Views(torch.ones(1, 5, 1, H, W)))
    with pytest.raises(ValueError, match="NaN"):
        guide(flow, vae, views=Views(torch.full((1, 5, 3, H, W), torch.nan)))
