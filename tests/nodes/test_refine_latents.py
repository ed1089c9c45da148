"""MV-Opt in Sampling and Refine Latent in the real ComfyUI: against runs by hand, and beside others."""

import copy
import math

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan import model as wan_models
from comfy.ldm.wan import vae as wan_vaes
from torch import Tensor
from turnaround.models.cameras import Rig, orbit_angles, orbit_rig
from turnaround.models.refine_latents import agreed
from turnaround.models.view_weights import ViewWeights
from turnaround.models.views import Views
from turnaround.nodes import embedded, patch, refine_latents, views, windows

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, FRAMES = 4, 5
T, h, w = 2, 4, 4
H, W = 8 * h, 8 * w


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ring(count: int = VIEWS) -> Rig:
    return orbit_rig(*orbit_angles(count, 0.0, math.pi / 2, 0.0), 3.0, 0.6, W, H)


def wall(rig: Rig, frames: int = FRAMES) -> Views:
    """Depth of a ball of 0.8 m, as seen by each camera."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    rays = torch.einsum(
        "hwc,vdc->vhwd", torch.stack([x, y, torch.ones_like(x)], -1), torch.linalg.inv(rig.K)
    )
    a, b = rays.square().sum(-1), 3.0 * rays[..., 2]  # every camera looks at the middle
    root = b.square() - a * (9.0 - 0.64)
    depth = torch.where(root > 0, (b - root.clamp(min=0).sqrt()) / a, 0.0)
    return Views(depth[:, None, None].expand(-1, frames, -1, -1, -1), None, rig)


def node(model, rig=None, depth=None, strength=1.0, start=0.0, end=1.0, weights=None):
    """(model, note)"""
    rig = rig or ring()
    depth = wall(rig) if depth is None else depth
    return refine_latents.MVOptSampling.execute(
        model, rig, depth, strength, start, end, weights
    ).args


def hook_of(model) -> refine_latents.AgreeingViews:
    return model.model_options["sampler_post_cfg_function"][-1]


def sample(model, cfg=1.0, steps=1, sampler="euler", frames=T) -> Tensor:
    """As the model has them inside, not as they leave the sampler."""
    noise = draw(VIEWS, 16, frames, h, w, seed=7)
    text = [
        [[draw(VIEWS, 4, 4096, seed=s), {"concat_latent_image": draw(VIEWS, 32, frames, h, w, seed=s)}]]
        for s in (20, 30)
    ]  # fmt: skip
    out = comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", *text, torch.zeros_like(noise), seed=0,
        disable_pbar=True,
    )  # fmt: skip
    return model.model.process_latent_in(out)


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


# --- in sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("form", ["plain", "sync", "windows before", "windows after"])
def test_what_the_last_step_predicts_is_made_to_agree(wan, sync, form, cfg):
    """A run of one euler step ends at the prediction, after guidance, of all views and frames."""

    def windowed(model):
        return windows.ViewWindows.execute(model, 2, 1, 0, 0, 0, ring()).args[0]

    base = patch.apply_view_sync(wan, sync) if form == "sync" else wan
    base = windowed(wan) if form == "windows before" else base
    model, _ = node(base)
    given = hook_of(model)
    model = windowed(model) if form == "windows after" else model
    plain = sample(windowed(base) if form == "windows after" else base, cfg)
    expected = agreed(plain, given.correspondences((T, h, w)), 1.0)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(sample(model, cfg), expected, atol=1e-4, rtol=1e-4)


def test_weights_say_who_gives_way(wan):
    weights = ViewWeights(torch.tensor([1.0, 0.5, 0.2, 0.1]), ("a", "b", "c", "d"))
    model, _ = node(wan, weights=weights)
    found = hook_of(model).correspondences((T, h, w))
    expected = agreed(sample(wan), found, 1.0, weights.values)
    torch.testing.assert_close(sample(model), expected, atol=1e-4, rtol=1e-4)


def test_model_that_was_given_stays_as_it_was(wan):
    before = sample(wan, steps=2)
    model, note = node(wan)
    assert "% of the performer" in note
    sample(model, steps=2)
    assert "sampler_post_cfg_function" not in wan.model_options
    assert torch.equal(sample(wan, steps=2), before)


def test_other_packs_functions_before_and_after_are_kept(wan):
    seen = []

    def other(args):
        seen.append(args["denoised"].clone())
        return args["denoised"] + 1

    def last(args):
        seen.append(args["denoised"].clone())
        return args["denoised"]

    first = wan.clone()
    first.set_model_sampler_post_cfg_function(other)
    model = node(first)[0].clone()
    model.set_model_sampler_post_cfg_function(last)
    sample(model)
    found = model.model_options["sampler_post_cfg_function"][1].correspondences((T, h, w))
    torch.testing.assert_close(seen[1], agreed(seen[0] + 1, found, 1.0))


def test_outside_of_its_range_nothing_happens_to_the_bit(wan):
    plain = sample(wan, steps=3)
    assert torch.equal(sample(node(wan, start=1.0)[0], steps=3), plain)
    # Noise falls from 1: at 0 percent only the first step is at it.
    only_first = node(wan, end=0.0)[0]
    late = node(wan, start=0.01)[0]
    results = [sample(m, steps=3) for m in (only_first, late, node(wan)[0])]
    assert len({float(r.sum()) for r in [plain, *results]}) == 4


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "uni_pc", "euler_cfg_pp"])
def test_every_kind_of_sampler_gives_the_same_twice_and_nothing_broken(wan, sampler):
    model, _ = node(wan)
    results = [sample(model, steps=3, sampler=sampler) for _ in range(2)]
    assert torch.equal(*results) and results[0].isfinite().all()
    assert not torch.equal(results[0], sample(wan, steps=3, sampler=sampler))


def test_strength_zero_one_view_and_no_overlap_leave_the_model_and_say_so(wan):
    model, note = node(wan, strength=0.0)
    assert model is wan and "strength is 0" in note
    model, note = node(wan, ring(1))
    assert model is wan and "one view" in note
    empty = Views(torch.zeros(VIEWS, FRAMES, 1, H, W), None, ring())
    model, note = node(wan, depth=empty)
    assert model is wan and "no two views" in note


def test_clones_share_the_depth(wan):
    model, _ = node(wan)
    assert hook_of(model.clone()) is hook_of(model)
    assert copy.deepcopy(hook_of(model)).depth is hook_of(model).depth


def test_latents_frame_by_frame_are_those_of_a_video(wan):
    """As UNets have them: the batch is all frames of the first view, then of the second."""
    hook = hook_of(node(wan, depth=wall(ring(), T))[0])
    hook.frames_are_batch = True
    hook.found = {}
    latents = draw(VIEWS, 4, T, h, w)
    flat = latents.transpose(1, 2).flatten(0, 1)
    result = hook({"denoised": flat, "sigma": torch.ones(len(flat))})
    found = hook.correspondences((T, h, w))
    expected = agreed(latents, found, 1.0).transpose(1, 2).flatten(0, 1)
    assert torch.equal(result, expected) and not torch.equal(result, flat)
    text = refusal(lambda: hook({"denoised": flat[1:], "sigma": torch.ones(1)}))
    assert "4 cameras" in text and "'rig'" in text


def test_latent_frame_of_a_reference_before_the_clip_is_left_alone(randomise):
    """VACE's."""
    dit = wan_models.VaceWanModel(
        in_dim=16, dim=128, ffn_dim=256, num_heads=1, num_layers=2, model_type="vace",
        vace_layers=1, vace_in_dim=96, operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
    )  # fmt: skip
    model = comfy.sd.load_diffusion_model_state_dict(randomise(dit, 0))
    hook = hook_of(node(model)[0])
    latents = draw(VIEWS, 16, T + 1, h, w)
    result = hook({"denoised": latents, "sigma": torch.ones(1)})
    found = hook.correspondences((T, h, w))
    assert torch.equal(result[:, :, 0], latents[:, :, 0])
    assert torch.equal(result[:, :, 1:], agreed(latents[:, :, 1:], found, 1.0))


def test_what_does_not_belong_together_is_said_before_sampling(wan):
    rig = ring()
    colours = Views(torch.rand(VIEWS, FRAMES, 3, H, W), None, rig)
    assert "fourth output" in refusal(lambda: node(wan, depth=colours))
    assert "3 cameras" in refusal(lambda: node(wan, ring(3), wall(rig)))
    assert "64x64" in refusal(lambda: node(wan, rig.resized(64, 64), wall(rig)))
    assert "start_percent" in refusal(lambda: node(wan, start=0.5, end=0.4))
    weights = ViewWeights(torch.ones(2), ("a", "b"))
    assert "2 views" in refusal(lambda: node(wan, weights=weights))


def test_latent_of_other_conditions_is_said_at_the_first_step(wan):
    text = refusal(lambda: sample(node(wan, ring(3))[0]))
    assert "'rig'" in text and "3 cameras" in text and "4 views" in text
    text = refusal(lambda: sample(node(wan)[0], frames=T + 1))
    assert "'depth'" in text and "9 pictures" in text
    wide = ring().resized(2 * W, H)
    depth = Views(wall(ring()).frames.repeat_interleave(2, -1), None, wide)
    assert "4x4" in refusal(lambda: sample(node(wan, wide, depth)[0]))


def test_cancelling_is_obeyed(wan):
    model, _ = node(wan)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        hook_of(model)({"denoised": draw(VIEWS, 16, T, h, w), "sigma": torch.ones(1)})


# --- after refining -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        weights = embedded.TINY / "vae" / "turnaround_tiny_vae.safetensors"
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(weights)))


@pytest.fixture(scope="module")
def finished(vae):
    """(latent, decoded): two views of a performer."""
    with torch.inference_mode():
        video, *_ = views.SamplePerformer.execute("kira", "dance_b", 5, 64, 80, 1.2, 1_000_003).args
        small = torch.nn.functional.avg_pool2d(video.frames[0, :5], 2)
        samples = views.encode_views(vae, [small, small.flip(-1)], 2) + 0.1 * draw(2, 16, 2, 5, 4)
        return {"samples": samples, "batch_index": [0, 1]}, views.decode_views(
            vae, samples.split(1)
        )


def refined(vae, latent, frames, steps=0, fidelity=0.0):
    """(latent, loss, note)"""
    given = frames if isinstance(frames, Views) else Views(frames)
    return refine_latents.MVOptRefineLatent.execute(latent, vae, given, steps, fidelity).args


def error(vae, samples: Tensor, frames: Tensor) -> float:
    return float((views.decode_views(vae, samples.split(1)) - frames).square().mean())


def repaired(frames: Tensor) -> Tensor:
    """As a refiner takes a colour cast out of the second view."""
    return torch.stack([frames[0], (frames[1] * torch.tensor([0.8, 0.9, 1.0])[:, None, None])])


def test_views_that_nobody_refined_come_back_as_the_very_same_latent(vae, finished):
    latent, frames = finished
    result, loss, _ = refined(vae, latent, frames)
    assert torch.equal(result["samples"], latent["samples"]) and result["batch_index"] == [0, 1]
    assert loss["loss"][0] < 1e-9


def test_refined_views_come_back_with_less_loss_than_encoded_anew(vae, finished):
    latent, frames = finished
    target = repaired(frames)
    result, loss, note = refined(vae, latent, target)
    anew = error(vae, views.encode_views(vae, list(target), 2), target)
    ours = error(vae, result["samples"], target)
    # Measured 0.78; at the size of videos less.
    assert ours < 0.85 * anew and ours < error(vae, latent["samples"], target)
    assert loss["loss"][-1] == pytest.approx(ours, rel=1e-3)
    assert f"{-10 * math.log10(ours):.1f} dB" in note
    # What the refiner left alone stays as it was.
    assert torch.equal(result["samples"][0], latent["samples"][0])


def test_latents_frame_by_frame_come_back_in_their_order():
    """Stable Video Diffusion's: with a VAE of pictures, narrow and random."""
    keys = {"double_z": True, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3,
            "ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "attn_resolutions": [],
            "dropout": 0.0}  # fmt: skip
    net = AutoencoderKL(ddconfig=keys, embed_dim=4)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
        for name, value in net.state_dict().items()
    }
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": keys, "embed_dim": 4}})
    latent = {"samples": draw(6, 4, 4, 4), "turnaround_views": 2}
    frames = views.decode_views(vae, views.clips_of(latent, vae, None))
    target = frames.clone()
    target[1] *= 0.9
    result, loss, _ = refined(vae, latent, target, steps=1)
    assert torch.equal(result["samples"][:3], latent["samples"][:3])
    assert not torch.equal(result["samples"][3:], latent["samples"][3:])
    assert loss["loss"][-1] < loss["loss"][0]


def test_steps_lower_the_loss_and_it_never_rises(vae, finished):
    latent, target = {"samples": finished[0]["samples"][1:]}, repaired(finished[1])[1:]
    result, loss, _ = refined(vae, latent, target, steps=3)
    values = loss["loss"]
    assert values == sorted(values, reverse=True) and len(values) == 5
    assert values[-1] < 0.95 * values[1]
    assert error(vae, result["samples"], target) == pytest.approx(values[-1], rel=1e-3)


@pytest.fixture(scope="module")
def wan_vae():
    """Wan's own kind of VAE, narrow and random."""
    with torch.inference_mode():
        net = wan_vaes.WanVAE(8, 16, temperal_downsample=[False, True, True])
        weights = {}
        for n, (name, value) in enumerate(net.state_dict().items()):
            size = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            weights[name] = size * draw(*value.shape, seed=n) + ("gamma" in name)
        return comfy.sd.VAE(sd=weights)


@pytest.mark.parametrize("kind", ["vae", "wan_vae"])
def test_gradient_through_the_decoder_is_the_slope_of_the_loss(kind, request):
    """Through ComfyUI's causal VAEs, in inference mode; central difference of float32 pictures."""
    vae, z = request.getfixturevalue(kind), draw(1, 16, 2, 4, 4)
    decode = refine_latents.with_gradients(vae, z)
    plain = vae.decode(z).reshape(5, 32, 32, 3).movedim(-1, 1)
    torch.testing.assert_close(decode(z), plain, atol=1e-4, rtol=1e-4)
    target = 0.9 * plain
    with torch.inference_mode(False), torch.enable_grad():
        variable = z.clone().requires_grad_()
        loss = (decode(variable) - target.clone()).square().mean()
        gradient = torch.autograd.grad(loss, variable)[0]
    along = gradient / gradient.norm()
    ends = [float((decode(z + e * along) - target).square().double().mean()) for e in (0.03, -0.03)]
    # Without the memory of the frame before it would be a third off.
    assert (ends[0] - ends[1]) / 0.06 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_vae_is_left_as_it_was_even_when_cancelled(vae, finished):
    latent, target = {"samples": finished[0]["samples"][1:]}, repaired(finished[1])[1:]
    model = vae.first_stage_model
    before = {n: (p, p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        refined(vae, latent, target, steps=2)
    refined(vae, latent, target, steps=1)
    for name, parameter in model.named_parameters():
        same, value, needs = before[name]
        assert parameter is same and torch.equal(parameter, value)
        assert parameter.requires_grad == needs and parameter.grad is None
    assert torch.is_inference_mode_enabled() and not model.parallel


def test_views_that_are_not_of_the_latent_are_refused_in_one_sentence(vae, finished):
    latent, frames = finished
    cases = {
        "5 frames of 32x40": frames[:, :4],
        "24x40": frames[..., :-8],
        "'latent' brings 2": frames[:1],
        "NaN": torch.where(torch.arange(32) == 3, math.nan, frames),
        "depth": Views(frames[:, :, :1]),
    }
    for told, given in cases.items():
        text = refusal(lambda given=given: refined(vae, latent, given))
        assert told in text and "'views'" in text


def test_steps_that_would_not_fit_are_refused_before_they_begin(vae, finished, monkeypatch):
    latent, frames = finished
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 1e6)
    assert "set steps to 0" in refusal(lambda: refined(vae, latent, frames, steps=1))
