"""View sync inside the real ComfyUI, on a tiny random SVD: against formulas, and beside others."""

import math

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_video_model import VideoLinearCFGGuidance
from torch import Tensor
from turnaround.nodes import patch_unet

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, FRAMES = 3, 4
SIZE = 4
"""Latent pixels; at half of it a picture has as many tokens as a view has frames."""
WEIGHTS = torch.tensor([0.5, 1.0, 1.7])
MODES = ("frame", "dense", "weighted")
SVD = {
    "image_size": 32, "in_channels": 8, "out_channels": 4, "model_channels": 64,
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 64,
    "num_classes": "sequential", "adm_in_channels": 768, "use_linear_in_transformer": True,
    "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False,
    "extra_ff_mix_layer": True, "use_spatial_context": True,
    "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
    "use_temporal_resblock": True, "use_temporal_attention": True,
    "disable_temporal_crossattention": False, "dtype": torch.float32,
}  # fmt: skip
"""What ComfyUI detects of SVD's keys, but 64 channels wide and of two resolutions."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def svd():
    """Weights that keep signals near unit size, so that an error can't hide."""
    with torch.inference_mode():
        config = comfy.supported_models.SVD_img2vid(SVD)
        # Of 700 float32 would keep four digits, of the noise, and none of what the model adds.
        config.sampling_settings["sigma_max"] = 20.0
        model = config.get_model({})
        for n, module in enumerate(model.diffusion_model.modules()):
            for part, value in module.named_parameters(recurse=False):
                norm = isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
                size = 0.1 if value.ndim < 2 else value[0].numel() ** -0.5
                value.copy_(size * draw(*value.shape, seed=n) + (norm and part == "weight"))
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def rows_of(views: list[int]) -> Tensor:
    """Places of these views' frames in the batch."""
    return (torch.tensor(views)[:, None] * FRAMES + torch.arange(FRAMES)).flatten()


ALL = list(range(VIEWS))


def conditioning(seed: int, views: list[int] = ALL, told: dict | None = None) -> list:
    rows = rows_of(views)
    images = draw(VIEWS * FRAMES, 4, SIZE, SIZE, seed=seed)[rows]
    text = draw(VIEWS, 1, 64, seed=seed + 1).repeat_interleave(FRAMES, dim=0)[rows]
    return [[text, {"concat_latent_image": images, **(told or {})}]]


def sample(model, views=ALL, cfg=1.0, steps=2, told=None, callback=None) -> Tensor:
    """Two euler steps of ComfyUI's own sampling."""
    noise = draw(VIEWS * FRAMES, 4, SIZE, SIZE, seed=7)[rows_of(views)]
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "karras",
        conditioning(20, views, told), conditioning(30, views, told),
        torch.zeros_like(noise), seed=0, disable_pbar=True, callback=callback,
    )  # fmt: skip


def with_frames(model, frames: int = FRAMES):
    """The plain model, told how many frames a video has; nothing of ours."""

    def wrapper(executor, *args, **kwargs):
        return executor(*args, **{**kwargs, "num_video_frames": frames})

    told = model.clone()
    told.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return told


def attentions(modules: list, model, **kwargs) -> list[list[list[Tensor]]]:
    """q, k, v and result, as doubles, of every attention at every run of the UNet."""
    seen: list[list[list[Tensor]]] = [[] for _ in modules]
    hooks = []
    for module, runs in zip(modules, seen, strict=True):

        def begin(_, inputs, out, runs=runs):
            runs.append([out.double()])

        def add(_, inputs, out, runs=runs):
            runs[-1].append(out.double())

        def end(_, inputs, runs=runs):
            runs[-1].append(inputs[0].double())

        hooks += [module.to_q.register_forward_hook(begin), module.to_k.register_forward_hook(add),
                  module.to_v.register_forward_hook(add),
                  module.to_out.register_forward_pre_hook(end)]  # fmt: skip
    try:
        sample(model, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def first_spatial(model, **kwargs) -> list[list[Tensor]]:
    """Of the first spatial block, where pictures are largest."""
    return attentions([blocks(model)[0].transformer_blocks[0].attn1], model, **kwargs)[0]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [..., L, C], heads of 64
    q, k, v = (t.unflatten(-1, (-1, 64)).transpose(-2, -3) for t in (q, k, v))
    scores = torch.softmax(q @ k.mT / math.sqrt(64), -1)
    return (scores @ v).transpose(-2, -3).flatten(-2)


def blocks(model) -> list:
    """Every spatio-temporal transformer of the UNet, in the order of running."""
    transformer = patch_unet.host.SpatialVideoTransformer
    unet = model.model.diffusion_model
    layers = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    return [layer for part in layers for layer in part if isinstance(layer, transformer)]


def synced(model, mode="frame", strength=1.0, views=VIEWS, **kwargs):
    weights = WEIGHTS if mode == "weighted" else None
    return patch_unet.apply(model, views, mode, strength, **{"weights": weights, **kwargs})


# --- equalities -----------------------------------------------------------------------------------


def test_svd_is_a_unet_for_video_and_others_are_not(svd, wan):
    still = {**SVD, "use_temporal_resblock": False, "use_temporal_attention": False}
    still["transformer_depth_middle"] = -2  # some have no middle at all
    model = comfy.supported_models.SD15(still).get_model({})
    cpu = torch.device("cpu")
    unet = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    assert patch_unet.is_unet_video(svd)
    assert not patch_unet.is_unet_video(unet)
    assert not patch_unet.is_unet_video(wan)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_batch_of_views_without_sync_is_single_runs(svd, cfg):
    together = sample(synced(svd, strength=0), cfg=cfg)
    for v in ALL:
        alone = sample(svd, views=[v], cfg=cfg)
        torch.testing.assert_close(together[rows_of([v])], alone, atol=1e-4, rtol=1e-5)
    # As it is, the model takes all views for one video.
    assert (sample(svd, cfg=cfg) - together).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_is_the_model_with_t_frames_to_the_bit(svd, mode):
    assert torch.equal(sample(synced(svd, mode, 0)), sample(with_frames(svd)))


def test_single_view_is_the_plain_model_to_the_bit(svd):
    assert torch.equal(sample(synced(svd, views=1), views=[0]), sample(svd, views=[0]))


@pytest.mark.parametrize(
    ("mode", "strength"), [("frame", 1), ("frame", 0.4), ("dense", 1), ("weighted", 2)]
)
def test_every_spatial_attention_is_the_plain_formula(svd, mode, strength):
    """In all blocks; the temporal attention of the same block stays within its view."""
    spatial = [block.transformer_blocks[0].attn1 for block in blocks(svd)]
    temporal = [block.time_stack[0].attn1 for block in blocks(svd)]
    seen = attentions(spatial + temporal, synced(svd, mode, strength), cfg=3.0, steps=1)
    pictures = torch.arange(VIEWS * FRAMES)
    for ((q, k, v, result),) in seen[: len(spatial)]:
        assert len(q) == 2 * VIEWS * FRAMES  # the positive and the negative run in one batch
        for row in range(len(q)):
            chunk, picture = divmod(row, VIEWS * FRAMES)
            looked_at = pictures if mode == "dense" else pictures[picture % FRAMES :: FRAMES]
            keys, values = (t[looked_at + chunk * VIEWS * FRAMES] for t in (k, v))
            if mode == "weighted":
                keys = keys * WEIGHTS.double()[:, None, None]
            across = softmax_attention(q[row], keys.flatten(0, 1), values.flatten(0, 1))
            own = softmax_attention(q[row], k[row], v[row])
            expected = (own + strength * across) / (1 + strength)
            torch.testing.assert_close(result[row], expected, atol=1e-5, rtol=1e-5)
    for ((q, k, v, result),) in seen[len(spatial) :]:
        assert q.shape[1] == FRAMES
        torch.testing.assert_close(result, softmax_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_permuting_views_permutes_the_result(svd, mode):
    order = [2, 0, 1]
    result = sample(synced(svd, mode))
    assert (result - sample(synced(svd, mode, 0))).abs().max() > 0.05
    weights = WEIGHTS[order] if mode == "weighted" else None
    permuted = sample(synced(svd, mode, weights=weights), views=order)
    torch.testing.assert_close(permuted, result[rows_of(order)], atol=1e-4, rtol=1e-5)


def test_modes_differ(svd):
    frame, dense, weighted = (sample(synced(svd, mode)) for mode in MODES)
    assert (frame - dense).abs().max() > 0.01 and (frame - weighted).abs().max() > 0.01
    even = sample(synced(svd, "weighted", weights=torch.ones(VIEWS)))
    torch.testing.assert_close(even, frame, atol=1e-5, rtol=1e-5)


def test_positive_and_negative_in_one_batch_equal_two_runs(svd):
    model = synced(svd, "weighted")
    together = sample(model, cfg=3.0)

    def one_by_one(args: dict) -> list[Tensor]:
        rest = (args["input"], args["sigma"], args["model_options"])
        return [comfy.samplers.calc_cond_batch(args["model"], [c], *rest)[0] for c in args["conds"]]

    model.model_options["sampler_calc_cond_batch_function"] = one_by_one
    torch.testing.assert_close(sample(model, cfg=3.0), together, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_guidance_that_ramps_over_frames_restarts_at_every_view(svd, first):
    """ComfyUI's Video Linear CFG, before and behind View Sync."""
    (ramp,) = VideoLinearCFGGuidance().patch(svd, 1.0)
    model = synced(svd, strength=0)
    model = synced(ramp, strength=0) if first else VideoLinearCFGGuidance().patch(model, 1.0)[0]
    together = sample(model, cfg=3.0)
    for v in ALL:
        alone = sample(ramp, views=[v], cfg=3.0)
        torch.testing.assert_close(together[rows_of([v])], alone, atol=1e-4, rtol=1e-5)


def test_tile_of_views_takes_its_own_weights(svd):
    """View Windows runs some of the views; they count by their place in the whole."""
    chosen = [0, 2]
    rows = rows_of(chosen)
    tile = {"views": chosen, "frames": list(range(FRAMES)), "of_views": VIEWS, "of_frames": FRAMES}

    def window(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        kwargs["y"] = kwargs["y"][rows]
        options = {**transformer_options, "turnaround_tile": tile}
        out = torch.zeros_like(x)
        parts = (x[rows], t[rows], c_concat[rows], c_crossattn[rows])
        out[rows] = executor(*parts, control, options, **kwargs)
        return out

    windowed = synced(svd, "weighted")
    windowed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", window)
    alone = synced(svd, "weighted", views=2, weights=WEIGHTS[chosen])
    result, expected = sample(windowed)[rows], sample(alone, views=chosen)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-5)


# --- how many views -------------------------------------------------------------------------------


def test_count_of_views_comes_from_the_conditioning(svd):
    told = {patch_unet.VIEWS: VIEWS}
    assert torch.equal(sample(synced(svd, views=0), told=told), sample(synced(svd)))


def test_conditioning_of_other_views_is_refused(svd):
    """Three views of four frames are as many pictures as four of three."""
    with pytest.raises(ValueError, match="set for 4 views, but the conditioning was made for 3"):
        sample(synced(svd, views=4), told={patch_unet.VIEWS: VIEWS})


def test_unknown_count_of_views_is_refused(svd):
    with pytest.raises(ValueError, match="12 frames, but nothing says of how many views"):
        sample(synced(svd, views=0))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_batch_that_views_cannot_share_is_refused(svd, cfg):
    with pytest.raises(ValueError, match="12 frames, which 5 views can't share evenly"):
        sample(synced(svd, views=5), cfg=cfg)


@pytest.mark.parametrize("weights", [None, torch.ones(2)])
def test_weights_that_are_not_one_a_view_are_refused(svd, weights):
    with pytest.raises(ValueError, match="one weight for each of the 3 views"):
        synced(svd, "weighted", weights=weights)


def test_second_view_sync_of_other_views_is_refused(svd):
    with pytest.raises(
        ValueError, match="set for 3 views by another View Sync, and this one has 4"
    ):
        synced(synced(svd), views=4)


# --- beside other patches -------------------------------------------------------------------------


def others_patch(calls: list):
    def patch(q, k, v, extra):
        calls.append(extra["block"])
        return q, k, v * 1.5

    return lambda model: model.set_model_attn1_patch(patch)


def others_output(calls: list):
    def patch(out, extra):
        calls.append(extra["block"])
        return out * 1.5

    return lambda model: model.set_model_attn1_output_patch(patch)


def others_replace(calls: list):
    """Of one whole block, as self-attention guidance does."""

    def attention(q, k, v, extra):
        calls.append(extra["block"])
        return 1.5 * v

    return lambda model: model.set_model_attn1_replace(attention, "middle", 0)


def others_override(calls: list):
    """Of self-attention alone: what a picture is told through CLIP stays as it is."""

    def override(func, q, k, *args, **kwargs):
        calls.append(kwargs["transformer_options"]["block"])
        return (1.5 if q.shape == k.shape else 1) * func(q, k, *args, **kwargs)

    def put(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = override

    return put


@pytest.mark.parametrize("kind", [others_patch, others_output, others_replace, others_override])
def test_attention_patches_of_others_run_in_both_orders(svd, kind):
    calls: list = []
    put = kind(calls)
    other = svd.clone()
    put(other)
    before = synced(other)
    behind = synced(svd)
    put(behind)
    results = []
    for model in (before, behind):
        calls.clear()
        results.append(sample(model, steps=1))
        assert ("middle", 0) in calls
    assert torch.equal(*results)
    plain = sample(synced(svd), steps=1)
    assert (results[0] - plain).abs().max() > 1e-3
    assert (results[0] - sample(with_frames(other), steps=1)).abs().max() > 1e-3


def test_attention_in_tiles_stays_within_its_tile(svd):
    """As HyperTile: two halves of every picture, each seeing its own half of the other views."""

    def split(t: Tensor) -> Tensor:
        return t.unflatten(1, (2, -1)).flatten(0, 1)

    def halves(q, k, v, extra):
        return split(q), split(k), split(v)

    def joined(out, extra):
        return out.unflatten(0, (-1, 2)).flatten(1, 2)

    tiled = svd.clone()
    tiled.set_model_attn1_patch(halves)
    tiled.set_model_attn1_output_patch(joined)
    q, k, v, result = first_spatial(synced(tiled), steps=1)[0]
    assert len(q) == 2 * VIEWS * FRAMES
    for row in range(len(q)):
        looked_at = torch.arange(row % (2 * FRAMES), len(q), 2 * FRAMES)
        across = softmax_attention(q[row], k[looked_at].flatten(0, 1), v[looked_at].flatten(0, 1))
        expected = (softmax_attention(q[row], k[row], v[row]) + across) / 2
        torch.testing.assert_close(result[row], expected, atol=2e-5, rtol=1e-4)


def test_patch_that_merges_tokens_is_refused(svd):
    merged = synced(svd)
    merged.set_model_attn1_patch(lambda q, k, v, extra: (q[:, ::2], k, v))
    with pytest.raises(ValueError, match="8 look at 16.*Token Merging"):
        sample(merged)


def test_applying_twice_adds_the_views_twice(svd):
    own, once, twice = (
        first_spatial(model, steps=1)[0][3]
        for model in (
            with_frames(svd),
            synced(svd, strength=1.0),
            synced(synced(svd, strength=0.5), strength=2.0),
        )
    )
    across = 2 * once - own
    expected = ((own + 0.5 * across) / 1.5 + 2.0 * across) / 3.0
    torch.testing.assert_close(twice, expected, atol=1e-5, rtol=1e-5)


def test_applying_twice_can_split_the_range_and_keeps_guidance_right(svd):
    (ramp,) = VideoLinearCFGGuidance().patch(svd, 1.0)
    halves = synced(synced(ramp, end_percent=0.5), start_percent=0.5001)
    assert torch.equal(sample(halves, steps=4, cfg=2.0), sample(synced(ramp), steps=4, cfg=2.0))


def test_original_model_is_untouched(svd):
    before = sample(svd)
    sample(synced(svd))
    assert not svd.wrappers.get(WrappersMP.DIFFUSION_MODEL)
    assert "patches_replace" not in svd.model_options["transformer_options"]
    assert torch.equal(sample(svd), before)


# --- when it is on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "on"),
    [(0, 1, [1, 1, 1, 1]), (0, 0.5, [1, 1, 0, 0]), (0.5, 1, [0, 0, 1, 1]), (1, 1, [0, 0, 0, 0])],
)
def test_start_and_end_percent(svd, start, end, on):
    """Percent is of the logarithm of sigma, from 20 to 0.002: 50 % is 0.2.

    Four steps of the karras schedule begin at 20, 2.8, 0.19 and 0.002.
    """
    runs = first_spatial(synced(svd, start_percent=start, end_percent=end), steps=4)
    changed = [
        bool((result - softmax_attention(q, k, v)).abs().max() > 1e-3) for q, k, v, result in runs
    ]
    assert changed == [bool(o) for o in on]


def test_cancel_stops_within_a_run_of_the_unet(svd):
    """The cancel button is heard at the next layer, and progress was told of the steps done."""
    done, runs = [], []

    def cancel(q, k, v, extra):
        runs.append(extra["block"])
        if done:
            comfy.model_management.interrupt_current_processing()
        return q, k, v

    model = synced(svd)
    model.set_model_attn1_patch(cancel)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(model, steps=3, callback=lambda step, *_: done.append(step))
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert done == [0]
    assert len(runs) == 2 * len(blocks(svd)) + 1
