"""Latent Guidance and Smooth Loop in the real ComfyUI: against its own samplers, and bad input."""

import re

import comfy.model_management
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
from turnaround.models.cameras import orbit_angles, orbit_rig
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


def test_share_of_noise_is_the_models(models):
    """Flow: (1 - s) clean + s noise. Else: clean + s noise."""
    sigma = torch.tensor(0.6)
    assert latent_guidance.noise_share(models["flow"], sigma) == pytest.approx(0.6)
    assert latent_guidance.noise_share(models["eps"], sigma) == pytest.approx(0.6 / 1.6)


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
    empty = {"samples": torch.zeros(3, 16, 2, H // 8, W // 8)}
    with pytest.raises(ValueError, match=r"\[2, 16, 2, 4, 6\] but 'latent' has \[3, 16"):
        guide(models["flow"], vaes["flow"], views=smooth_views(), latent=empty)


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


# --- Smooth Loop ----------------------------------------------------------------------------------


def loop(model, vae, kind="flow", **more):
    settings = dict(
        rounds=2, first_strength=0.6, last_strength=0.3, steps=4, cfg=1.0, sampler_name="euler",
        scheduler="simple", seed=3, preset="fast", fit_steps=4,
    )  # fmt: skip
    frames = {} if {"views", "images", "latent"} & set(more) else {"views": smooth_views()}
    return smooth_loop.SmoothLoop.execute(
        model, conditioning(kind), conditioning(kind), vae, **{**settings, **frames, **more}
    ).args


@pytest.fixture
def fit_that_copies(monkeypatch):
    """A smoother that changes nothing, in the real one's place: what is left is the refinement."""
    made = []

    class Copy:
        def __init__(self, frames, settings, *rest, **named):
            self.frames, self.settings, self.named = frames, settings, named
            self.targets, self.count = [frames], 0
            made.append(self)

        def steps(self, count, on_step=None):
            self.count += count
            on_step(count, count)

        def render(self):
            return self.targets[-1]

        def retarget(self, frames):
            assert not frames.is_inference(), "it can be learnt from"
            self.targets.append(frames)

    monkeypatch.setattr(smooth_loop, "ImplicitFit", Copy)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_is_encode_ksampler_decode(models, vaes, fit_that_copies, kind):
    """Bit by bit what a creator would build of ComfyUI's own nodes."""
    model, vae, words = models[kind], vaes[kind], conditioning(kind)
    views, images, smoothed, latent, _ = loop(
        model, vae, kind, rounds=1, last_strength=0.5, views=smooth_views()
    )
    clean = guide(model, vae, 0.5)[4]
    expected = core.KSampler().sample(
        model, 3, 2, 1.0, "euler", "simple", words, words, clean, 0.5
    )[0]["samples"]
    assert torch.equal(latent["samples"], expected)
    assert views.frames.shape == smooth_views().frames.shape
    assert torch.equal(images, views.frames.flatten(0, 1).movedim(1, -1))
    assert torch.equal(smoothed.frames, smooth_views().frames)


def test_rounds_fit_what_was_refined(models, vaes, fit_that_copies):
    """The second round smooths the first one's result, with the next seed and less noise."""
    model, vae = models["flow"], vaes["flow"]
    first = loop(model, vae, rounds=1, last_strength=0.6)
    both = loop(model, vae)
    (one, two) = fit_that_copies
    assert torch.equal(two.targets[1], first[0].frames)
    assert torch.equal(both[2].frames, first[0].frames)
    second = loop(model, vae, rounds=1, last_strength=0.3, seed=4, views=first[0])[0]
    assert torch.equal(both[0].frames, second.frames)
    assert (one.count, two.count, two.settings.steps) == (4, 8, 8)
    assert re.search(
        r"2 x 4 steps of the fit, refined with noise 0.60 \(\d\d%\), 0.30 \(\d\d%\)", both[-1]
    )


def test_paper_preset_has_the_papers_steps(models, vaes, fit_that_copies):
    loop(models["flow"], vaes["flow"], rounds=2, preset="paper", fit_steps=0)
    (fit,) = fit_that_copies
    assert (fit.count, fit.settings.steps) == (10_000, 10_000)


def test_masks_and_depth_reach_the_fit(models, vaes, fit_that_copies):
    views = smooth_views()
    rig = orbit_rig(*orbit_angles(VIEWS, 0.0, 1.0, 0.0), 3.0, 0.6, W, H)
    views = Views(views.frames, torch.rand(VIEWS, FRAMES, H, W).round(), rig)
    depth = Views(torch.ones(VIEWS, FRAMES, 1, H, W), None, rig)
    result = loop(models["flow"], vaes["flow"], rounds=1, views=views, depth=depth)[0]
    assert result.rig is not None and torch.equal(result.masks, views.masks)
    with pytest.raises(ValueError, match="'depth' has 2 views x 4 frames"):
        shorter = Views(depth.frames[:, :4], None, rig)
        loop(models["flow"], vaes["flow"], views=views, depth=shorter)
    with pytest.raises(ValueError, match="'depth' needs depth in metres with its rig"):
        loop(models["flow"], vaes["flow"], views=views, depth=views)


def test_loop_begins_at_a_latent_too(models, vaes, fit_that_copies):
    vae = vaes["flow"]
    clean = guide(models["flow"], vae)[4]
    mask = torch.zeros(VIEWS, 1, 2, H // 8, W // 8)  # nothing may change
    result = loop(models["flow"], vae, rounds=1, latent={**clean, "noise_mask": mask})
    (fit,) = fit_that_copies
    decoded = torch.cat([vae.decode(z[None]) for z in clean["samples"]]).movedim(-1, 2)
    assert torch.equal(fit.targets[0], decoded)
    assert result[3]["noise_mask"] is mask


def test_loop_runs_with_the_real_fit(models, vaes):
    """Same seed, same result; the model has no patches of ours afterwards."""
    model, vae = models["flow"], vaes["flow"]
    before = sorted(model.model_options), dict(model.patches)
    first, again = (loop(model, vae, rounds=1, fit_steps=2)[0].frames for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all() and float(first.min()) >= 0 and float(first.max()) <= 1
    assert (sorted(model.model_options), dict(model.patches)) == before
    assert torch.is_inference_mode_enabled()


def test_conditions_of_other_views_are_refused_before_the_fit(models, vaes, fit_that_copies):
    with pytest.raises(ValueError, match="view"):
        loop(models["flow"], vaes["flow"], views=smooth_views(3))
    assert not fit_that_copies


def test_loop_needs_one_clip(models, vaes):
    flow, vae = models["flow"], vaes["flow"]
    with pytest.raises(ValueError, match="either 'views' or 'images', none"):
        loop(flow, vae, views=None)
    with pytest.raises(ValueError, match="connect one of 'views', 'images' and 'latent'"):
        loop(flow, vae, views=smooth_views(), latent={"samples": torch.zeros(2, 16, 2, 4, 6)})
    with pytest.raises(ValueError, match="single frame"):
        loop(flow, vae, views=smooth_views(frames=3))


def test_cancel_leaves_at_once(models, vaes, fit_that_copies, monkeypatch):
    """In the middle of the first sampling."""
    calls = []

    def stop():
        calls.append(1)
        if len(calls) > 4:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        loop(models["flow"], vaes["flow"])
    assert len(calls) == 5
    assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
