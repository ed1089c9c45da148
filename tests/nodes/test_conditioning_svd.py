"""What SVD is told of every view, with a tiny CLIP and a tiny autoencoder of ComfyUI's own classes."""

import json

import comfy.clip_vision
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_video_model import SVD_img2vid_Conditioning
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views
from turnaround.nodes import embedded, patch, patch_unet
from turnaround.nodes import views as views_nodes
from turnaround.nodes.conditioning_svd import MultiViewSVDConditioning

import nodes as host_nodes

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, FRAMES, WIDTH, HEIGHT = 3, 4, 48, 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def make_clip(folder, channels: int) -> comfy.clip_vision.ClipVisionModel:
    config = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_channels": 3, "patch_size": 16, "image_size": 32,
        "hidden_act": "gelu", "projection_dim": channels, "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
    }  # fmt: skip
    file = folder / f"clip_{channels}.json"
    file.write_text(json.dumps(config))
    clip = comfy.clip_vision.ClipVisionModel(file)
    for n, value in enumerate(clip.model.parameters()):
        value.copy_(draw(*value.shape, seed=n) - 0.5)
    return clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    with torch.inference_mode():
        return make_clip(tmp_path_factory.mktemp("clip"), 1024)


def make_vae(channels: int) -> comfy.sd.VAE:
    weights = TAESD(latent_channels=channels).state_dict()
    for n, value in enumerate(weights.values()):
        fan_in = value[0].numel() if value.ndim > 1 else 4
        value.copy_((2 * draw(*value.shape, seed=n) - 1) * (3 / fan_in) ** 0.5)
    return comfy.sd.VAE(sd=weights)


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return make_vae(4)


START = Views(draw(VIEWS, 2, 3, HEIGHT, WIDTH, seed=5))


def condition(clip, vae, start=START, frames=FRAMES, noise=0.0):
    return MultiViewSVDConditioning.execute(clip, vae, start, frames, 100, 8, noise).args


def test_every_view_is_conditioned_as_comfyui_does_one(clip, vae):
    positive, negative, latent, note = condition(clip, vae)
    assert note == ""
    assert latent["samples"].shape == (VIEWS * FRAMES, 4, HEIGHT // 8, WIDTH // 8)
    assert not latent["samples"].any() and latent[patch_unet.VIEWS] == VIEWS
    for v in range(VIEWS):
        image = START.frames[v, :1].movedim(1, -1)
        alone = SVD_img2vid_Conditioning().encode(
            clip, image, vae, WIDTH, HEIGHT, FRAMES, 100, 8, 0.0
        )
        frames = slice(v * FRAMES, (v + 1) * FRAMES)
        for ours, theirs in zip((positive, negative), alone[:2], strict=True):
            (text, told), (text1, told1) = ours[0], theirs[0]
            picture, picture1 = told["concat_latent_image"], told1["concat_latent_image"]
            for mine, core in ((text, text1), (picture, picture1)):
                assert mine[frames].shape == (FRAMES, *core.shape[1:])
                expected = core.expand(FRAMES, *core.shape[1:])
                torch.testing.assert_close(mine[frames], expected, atol=1e-3, rtol=1e-5)
            same = ("motion_bucket_id", "fps", "augmentation_level")
            assert [told[key] for key in same] == [told1[key] for key in same] == [100, 8, 0.0]
            assert told[patch_unet.VIEWS] == VIEWS
    images = positive[0][1]["concat_latent_image"]
    assert (images[0] - images[FRAMES]).abs().max() > 0.1  # the views differ
    assert (positive[0][0][0] - positive[0][0][FRAMES]).abs().max() > 0.01


def tiny_svd() -> comfy.model_patcher.ModelPatcher:
    """SVD of 64 channels and one resolution."""
    config = comfy.supported_models.SVD_img2vid(
        {
            "image_size": 32, "in_channels": 8, "out_channels": 4, "model_channels": 64,
            "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
            "transformer_depth_output": [1, 1], "transformer_depth_middle": 1,
            "context_dim": 1024, "num_classes": "sequential", "adm_in_channels": 768,
            "use_linear_in_transformer": True, "use_spatial_transformer": True, "legacy": False,
            "extra_ff_mix_layer": True, "use_spatial_context": True,
            "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1],
            "use_temporal_resblock": True, "use_temporal_attention": True,
            "dtype": torch.float32,
        }
    )  # fmt: skip
    config.sampling_settings["sigma_max"] = 20.0
    model = config.get_model({})
    for n, value in enumerate(model.diffusion_model.parameters()):
        fan_in = value[0].numel() if value.ndim > 1 else 8
        value.copy_((2 * draw(*value.shape, seed=n) - 1) * (3 / fan_in) ** 0.5)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def test_comfyuis_own_sampler_makes_every_view_as_if_alone(clip, vae):
    """View Sync at strength 0 needs no rig: the conditioning says how many views there are."""
    model = tiny_svd()

    def ksampler(model, start: Views) -> dict:
        positive, negative, latent, _ = condition(clip, vae, start)
        # The same noise in every view, so that one view alone has it too.
        places = list(range(FRAMES)) * len(start)
        return host_nodes.common_ksampler(
            model,
            3,
            2,
            2.5,
            "euler",
            "karras",
            positive,
            negative,
            latent | {"batch_index": places},
        )[0]

    result = ksampler(patch_unet.apply(model, strength=0), START)
    assert result[patch_unet.VIEWS] == VIEWS  # still there for the decoder
    for v in range(VIEWS):
        alone = ksampler(model, Views(START.frames[v : v + 1]))["samples"]
        frames = slice(v * FRAMES, (v + 1) * FRAMES)
        torch.testing.assert_close(result["samples"][frames], alone, atol=1e-3, rtol=1e-4)
    assert (result["samples"][0] - result["samples"][FRAMES]).abs().max() > 0.1


def test_augmentation_is_the_same_noise_at_every_run_and_for_every_view(clip, vae):
    grey = Views(torch.full((2, 1, 3, HEIGHT, WIDTH), 0.5))
    plain, noisy, again = (
        condition(clip, vae, grey, 1, noise)[0][0][1]["concat_latent_image"]
        for noise in (0.0, 0.3, 0.3)
    )
    assert (noisy - plain).abs().max() > 0.1
    assert torch.equal(noisy, again) and torch.equal(noisy[0], noisy[1])


def test_odd_sizes_are_made_to_fit_and_said(clip, vae):
    start = Views(draw(1, 1, 3, 37, 50))
    *_, latent, note = condition(clip, vae, start, 1)
    assert latent["samples"].shape == (1, 4, 4, 6)
    assert note == "50x37 became 48x32 (sizes must be multiples of 16)"


def test_bytes_are_the_same_pictures(clip, vae):
    pictures = (START.frames * 255).round().to(torch.uint8)
    ours, floats = (
        condition(clip, vae, Views(frames), 1)[0][0][1]["concat_latent_image"]
        for frames in (pictures, pictures / 255)
    )
    torch.testing.assert_close(ours, floats)


def test_depth_is_refused(clip, vae):
    with pytest.raises(ValueError, match="'start' holds depth"):
        condition(clip, vae, Views(torch.ones(1, 1, 1, 16, 16)))


def test_pixels_that_are_no_numbers_are_refused(clip, vae):
    frames = START.frames.clone()
    frames[1, 0, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="'start' has pixels that are no numbers"):
        condition(clip, vae, Views(frames))


def test_clip_of_another_model_is_refused(vae, tmp_path):
    with pytest.raises(ValueError, match="gives 768 numbers a picture, but SVD reads 1024"):
        condition(make_clip(tmp_path, 768), vae)


def test_vae_of_another_model_is_refused(clip):
    with pytest.raises(ValueError, match="latents of 16 channels, but SVD takes pictures of 4"):
        condition(clip, make_vae(16))


def test_frames_of_all_views_are_decoded_view_by_view(clip, vae):
    latent = condition(clip, vae)[2]
    latent = latent | {"samples": draw(*latent["samples"].shape, seed=6)}
    decoded = views_nodes.DecodeViews.execute(latent, vae, 8.0).args[0]
    assert decoded.frames.shape == (VIEWS, FRAMES, 3, HEIGHT, WIDTH)
    images = vae.decode(latent["samples"]).clamp(0, 1)
    torch.testing.assert_close(decoded.frames.movedim(2, -1).flatten(0, 1), images)
    rig = orbit_rig(torch.arange(VIEWS) * 2.0, torch.zeros(VIEWS), 3.0, 0.6, WIDTH, HEIGHT)
    # Other nodes may drop the count; then the rig says it.
    bare = {"samples": latent["samples"]}
    by_rig = views_nodes.DecodeViews.execute(bare, vae, 8.0, rig).args[0]
    assert torch.equal(by_rig.frames, decoded.frames)


@pytest.mark.parametrize("count", [None, 5])
def test_frames_that_do_not_divide_into_views_are_refused(vae, count):
    latent = {"samples": draw(VIEWS * FRAMES, 4, 4, 6)} | (
        {patch_unet.VIEWS: count} if count else {}
    )
    with pytest.raises(ValueError, match="for Stable Video Diffusion the rig of its views"):
        views_nodes.DecodeViews.execute(latent, vae, 8.0)


def test_vae_of_another_video_model_does_not_decode_it():
    with torch.inference_mode():
        wan = in_wan_layout()
    latent = {"samples": draw(VIEWS * FRAMES, 4, 4, 6), patch_unet.VIEWS: VIEWS}
    with pytest.raises(ValueError, match="'vae' is of another video model"):
        views_nodes.DecodeViews.execute(latent, wan, 8.0)


def in_wan_layout() -> comfy.sd.VAE:
    path = embedded.TINY / "vae" / "turnaround_tiny_vae.safetensors"
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def test_view_sync_takes_the_unet_but_no_weights_and_no_reference(make_sync):
    model = tiny_svd()
    synced = patch.apply_view_sync(model, views=VIEWS, strength=0.5)
    assert patch.has_view_sync(synced) and not patch.has_view_sync(model)
    for settings in ({"sync": make_sync()}, {"reference": draw(1, 4, 4, 4, 6)}):
        with pytest.raises(ValueError, match="takes neither 'sync' nor 'reference'"):
            patch.apply_view_sync(model, **settings)
