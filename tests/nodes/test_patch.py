"""View sync inside the real ComfyUI, on a tiny random Wan: against formulas, and beside others."""

import math

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from torch import Tensor
from turnaround.models.tiny.layout import dit_to_native
from turnaround.models.view_sync import Layout, rotate
from turnaround.nodes import patch

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, HEADS, BLOCKS = 128, 1, 2
"""Of the tiny Wan in conftest.py."""
VIEWS = 3
SHAPE = (16, 2, 4, 6)
GRID = (2, 2, 3)
TOKENS = math.prod(GRID)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(seed: int, views: slice = slice(None)) -> list:
    latents = draw(VIEWS, 32, *SHAPE[1:], seed=seed)[views]
    return [[draw(1, 4, 4096, seed=seed + 1), {"concat_latent_image": latents}]]


def sample(model, views=slice(None), cfg=1.0, steps=2, positive=None, negative=None) -> Tensor:
    """Two euler steps of ComfyUI's own sampling."""
    noise = draw(VIEWS, *SHAPE, seed=7)[views]
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple",
        positive or conditioning(20, views), negative or conditioning(30, views),
        torch.zeros_like(noise), seed=0, disable_pbar=True,
    )  # fmt: skip


class Probe:
    """Another pack's block patch: notes what passes, and may add something of its own."""

    def __init__(self, add: float = 0.0) -> None:
        self.add, self.calls = add, []

    def __call__(self, args: dict, extra: dict) -> dict:
        out = extra["original_block"](args)
        if self.add:
            out["img"] = out["img"] + self.add * draw(DIM, seed=50)
        self.calls.append({**args, "out": out["img"].clone()})
        return out

    def __deepcopy__(self, memo) -> "Probe":
        return self


def with_probe(model, block: int = BLOCKS - 1, add: float = 0.0):
    probe, probed = Probe(add), model.clone()
    probed.set_model_patch_replace(probe, "dit", "double_block", block)
    return probed, probe


def input_of(module: torch.nn.Module, model, **kwargs) -> list[Tensor]:
    """What reaches a module while sampling."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        sample(model, **kwargs)
    finally:
        hook.remove()
    return seen


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [L, C], one head
    return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v


# --- equalities -----------------------------------------------------------------------------------


def test_batch_of_views_without_sync_is_single_runs(wan):
    together = sample(wan)
    for v in range(VIEWS):
        alone = sample(wan, views=slice(v, v + 1))
        torch.testing.assert_close(together[v : v + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_strength_zero_is_the_plain_model_to_the_bit(wan, sync, trained):
    synced = patch.apply_view_sync(wan, sync if trained else None, strength=0)
    assert torch.equal(sample(synced), sample(wan))


def test_zero_projectors_are_the_plain_model_to_the_bit(wan, sync):
    for layer in sync.model.blocks.values():
        layer.projector.weight.zero_()
        layer.projector.bias.zero_()
    assert torch.equal(sample(patch.apply_view_sync(wan, sync)), sample(wan))


@pytest.mark.parametrize("trained", [True, False])
def test_single_view_is_the_plain_model_to_the_bit(wan, sync, trained):
    synced = patch.apply_view_sync(wan, sync if trained else None)
    one = slice(0, 1)
    assert torch.equal(sample(synced, views=one), sample(wan, views=one))


@pytest.mark.parametrize("strength", [1.0, 0.4, 1.5])
def test_trained_form_is_the_plain_formula(wan, sync, strength):
    probed, probe = with_probe(wan)
    synced = patch.apply_view_sync(probed, sync, views=VIEWS, strength=strength)
    dit = wan.model.diffusion_model
    after = input_of(dit.head, synced, cfg=3.0)[0].double()
    call = probe.calls[0]
    x, vec, pe = call["out"].double(), call["vec"].double(), call["pe"]
    layer = sync.model.blocks[str(BLOCKS - 1)]
    weights = {k: v.double() for k, v in layer.state_dict().items()}

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normed(name: str, y: Tensor) -> Tensor:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]
        return rotate(y[:, :, None].float(), pe)[:, :, 0].double()

    assert len(x) == 2 * VIEWS  # the positive and the negative run in one batch
    shift, scale, gate = (weights["modulation"] + vec.view(len(x), 6, DIM)[:, :3]).split(1, 1)
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    y = y * (1 + scale) + shift
    q, k, v = normed("norm_q", linear("q", y)), normed("norm_k", linear("k", y)), linear("v", y)
    attended = torch.empty_like(y)
    frame = GRID[1] * GRID[2]
    for chunk in range(2):
        views = slice(chunk * VIEWS, (chunk + 1) * VIEWS)
        for t in range(GRID[0]):
            moment = slice(t * frame, (t + 1) * frame)
            parts = [z[views, moment].reshape(-1, DIM) for z in (q, k, v)]
            attended[views, moment] = softmax_attention(*parts).view(VIEWS, frame, DIM)
    change = gate * linear("projector", attended)
    assert change.abs().max() > 0.1
    torch.testing.assert_close(after, x + strength * change, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_training_free_form_is_the_plain_formula(wan, strength):
    seen: list[tuple[Tensor, ...]] = []

    def others_override(func, q, k, v, heads, **kwargs):
        seen.append((q, k, v))
        return func(q, k, v, heads, **kwargs)

    other = wan.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = others_override
    synced = patch.apply_view_sync(other, views=VIEWS, strength=strength)
    block = wan.model.diffusion_model.blocks[0]
    after = input_of(block.self_attn.o, synced, cfg=3.0)[0].double()
    q, k, v = (t.double() for t in seen[0])
    frame = GRID[1] * GRID[2]
    assert q.shape == (2 * VIEWS, TOKENS, DIM)
    for b in range(2 * VIEWS):
        own = softmax_attention(q[b], k[b], v[b])
        views = slice(b // VIEWS * VIEWS, (b // VIEWS + 1) * VIEWS)
        for t in range(GRID[0]):
            moment = slice(t * frame, (t + 1) * frame)
            keys, values = (z[views, moment].reshape(-1, DIM) for z in (k, v))
            across = softmax_attention(q[b, moment], keys, values)
            expected = (own[moment] + strength * across) / (1 + strength)
            torch.testing.assert_close(after[b, moment], expected, atol=1e-5, rtol=1e-5)
    # The text cross-attention comes third: own, across, then the text as it is.
    assert seen[2][1].shape[1] == 4


@pytest.mark.parametrize("trained", [True, False])
def test_permuting_views_permutes_the_result(wan, sync, trained):
    synced = patch.apply_view_sync(wan, sync if trained else None)
    order = torch.tensor([2, 0, 1])
    result = sample(synced)
    assert (result - sample(wan)).abs().max() > 1e-2
    torch.testing.assert_close(sample(synced, views=order), result[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_positive_and_negative_in_one_batch_equal_two_runs(wan, sync, trained):
    probed, probe = with_probe(wan)
    synced = patch.apply_view_sync(probed, sync if trained else None, views=VIEWS)
    together = sample(synced, cfg=3.0)
    assert {len(c["out"]) for c in probe.calls} == {2 * VIEWS}
    probe.calls.clear()

    def one_by_one(args: dict) -> list[Tensor]:
        rest = (args["input"], args["sigma"], args["model_options"])
        return [comfy.samplers.calc_cond_batch(args["model"], [c], *rest)[0] for c in args["conds"]]

    synced.model_options["sampler_calc_cond_batch_function"] = one_by_one
    separate = sample(synced, cfg=3.0)
    assert {len(c["out"]) for c in probe.calls} == {VIEWS}
    torch.testing.assert_close(together, separate, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_latents_of_odd_size_are_synchronised(wan, sync, trained):
    """5 x 3 latent pixels are padded to 3 x 2 tokens."""
    shape = (VIEWS, 16, 2, 5, 3)
    positive = [[draw(1, 4, 4096), {"concat_latent_image": draw(VIEWS, 32, *shape[2:])}]]
    synced = patch.apply_view_sync(wan, sync if trained else None)
    out = comfy.sample.sample(
        synced, draw(*shape), 1, 1.0, "euler", "simple", positive, positive,
        torch.zeros(shape), seed=0, disable_pbar=True,
    )  # fmt: skip
    assert out.shape == shape and out.isfinite().all()


# --- beside other patches -------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_block_patch_of_another_pack_is_still_called(wan, sync, trained):
    other, probe = with_probe(wan, add=0.5)
    synced = patch.apply_view_sync(other, sync if trained else None)
    result = sample(synced)
    assert len(probe.calls) == 2  # one a step
    without = sample(patch.apply_view_sync(wan, sync if trained else None))
    assert not torch.allclose(result, without, atol=1e-2)


def test_block_patch_that_skips_the_block_leaves_no_attention_marked(wan):
    """Skip-layer guidance leaves a block out; the text attention after it must stay as it is."""
    other = wan.clone()
    skip = other.set_model_patch_replace
    for index in range(BLOCKS):
        skip(lambda args, extra: {"img": args["img"]}, "dit", "double_block", index)
    assert torch.equal(sample(patch.apply_view_sync(other)), sample(other))


def test_attention_override_of_another_pack_is_still_called(wan):
    calls = []

    def others_override(func, q, k, v, heads, **kwargs):
        calls.append(q.shape)
        return 2 * func(q, k, v, heads, **kwargs)

    other = wan.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = others_override
    result = sample(patch.apply_view_sync(other), steps=1)
    # A block: its own self-attention, the one over views, the text.
    frame = GRID[1] * GRID[2]
    block = [(VIEWS, TOKENS, DIM), (GRID[0], VIEWS * frame, DIM), (VIEWS, TOKENS, DIM)]
    assert [tuple(c) for c in calls] == BLOCKS * block
    assert not torch.allclose(result, sample(patch.apply_view_sync(wan), steps=1), atol=1e-2)
    assert "optimized_attention_override" not in wan.model_options["transformer_options"]


class WeightedPatch(Probe):
    """A block patch that brings a model of its own and wants to be moved."""

    def __init__(self, weights) -> None:
        super().__init__()
        self.weights, self.device = weights, None

    def models(self) -> list:
        return [self.weights]

    def to(self, device) -> "WeightedPatch":
        moved = WeightedPatch(self.weights)
        moved.device = device
        return moved


def test_models_of_an_earlier_patch_are_loaded_and_moved_too(wan, sync, make_sync):
    weights = make_sync(seed=5)
    other = wan.clone()
    other.set_model_patch_replace(WeightedPatch(weights), "dit", "double_block", 0)
    synced = patch.apply_view_sync(other, sync)
    assert set(synced.model_patches_models()) == {weights, sync}
    synced.model_patches_to("cpu")
    blocks = synced.model_options["transformer_options"]["patches_replace"]["dit"]
    assert blocks["double_block", 0].previous.device == "cpu"


def test_applying_twice_uses_both_weights_in_turn(wan, make_sync):
    """Layers of two files on different blocks equal one file with both."""
    both = make_sync()
    parts = [make_sync(blocks=[i]) for i in range(BLOCKS)]
    for i, part in enumerate(parts):
        part.model.blocks[str(i)].load_state_dict(both.model.blocks[str(i)].state_dict())
    twice = patch.apply_view_sync(patch.apply_view_sync(wan, parts[0]), parts[1])
    assert set(twice.model_patches_models()) == set(parts)
    assert torch.equal(sample(twice), sample(patch.apply_view_sync(wan, both)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_applying_twice_keeps_each_its_own_strength(wan, sync, order):
    """The second one is off, so it must neither switch the first off nor lend it its strength."""
    settings = [(sync, 0.7), (None, 0.0)]
    model = wan
    for i in order:
        weights, strength = settings[i]
        model = patch.apply_view_sync(model, weights, strength=strength)
    assert torch.equal(sample(model), sample(patch.apply_view_sync(wan, sync, strength=0.7)))


def test_applying_twice_can_split_the_range(wan, sync):
    halves = patch.apply_view_sync(wan, sync, end_percent=0.5)
    halves = patch.apply_view_sync(halves, sync, start_percent=0.5001)
    whole = patch.apply_view_sync(wan, sync)
    assert torch.equal(sample(halves, steps=4), sample(whole, steps=4))


def test_training_free_twice_adds_the_views_twice(wan):
    seen = []

    def others_override(func, q, k, v, heads, **kwargs):
        seen.append(func(q, k, v, heads, **kwargs))
        return seen[-1]

    other = wan.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = others_override
    twice = patch.apply_view_sync(patch.apply_view_sync(other, strength=0.5), strength=2.0)
    after = input_of(wan.model.diffusion_model.blocks[0].self_attn.o, twice, steps=1)[0]
    own, across = seen[0], seen[1].unflatten(1, (VIEWS, -1)).transpose(0, 1).flatten(1, 2)
    expected = ((own + 0.5 * across) / 1.5 + 2.0 * across) / 3.0
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_original_model_is_untouched(wan, sync):
    before = sample(wan)
    for weights in (sync, None):
        sample(patch.apply_view_sync(wan, weights))
    assert "patches_replace" not in wan.model_options["transformer_options"]
    assert not wan.get_all_wrappers(WrappersMP.DIFFUSION_MODEL)
    assert torch.equal(sample(wan), before)


def test_clones_share_the_sync_weights(wan, sync):
    """ComfyUI deep-copies patches when a later node clones the model."""
    synced = patch.apply_view_sync(wan, sync)
    cloned = synced.clone()
    assert all(m is sync for m in cloned.model_patches_models())
    assert torch.equal(sample(cloned), sample(synced))


# --- when it is on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "on"),
    [
        (0, 1, [1, 1, 1, 1]),
        (0, 0.3, [1, 1, 0, 0]),
        (0.3, 1, [0, 0, 1, 1]),
        (0.3, 0.6, [0, 0, 1, 0]),
    ],
)
def test_start_and_end_percent(wan, sync, start, end, on):
    """Four steps of the simple schedule begin at 0, 25, 50 and 75 %."""
    probed, probe = with_probe(wan)
    synced = patch.apply_view_sync(probed, sync, start_percent=start, end_percent=end)
    after = input_of(wan.model.diffusion_model.head, synced, steps=4)
    changed = [not torch.equal(a, c["out"]) for a, c in zip(after, probe.calls, strict=True)]
    assert changed == [bool(o) for o in on]


def test_range_that_ends_before_it_starts_is_refused(wan):
    with pytest.raises(ValueError, match="start_percent is 0.8 but end_percent 0.2"):
        patch.apply_view_sync(wan, start_percent=0.8, end_percent=0.2)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_latent_with_other_views_than_the_rig_is_refused(wan, cfg):
    with pytest.raises(ValueError, match="set for 4 views, but the latent brings 3"):
        sample(patch.apply_view_sync(wan, views=4), cfg=cfg)


def test_model_that_is_no_wan_is_refused():
    class Still(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)

    cpu = torch.device("cpu")
    still = comfy.model_patcher.ModelPatcher(Still(), load_device=cpu, offload_device=cpu)
    with pytest.raises(ValueError, match="'model' is not a Wan-type video model"):
        patch.apply_view_sync(still)


@pytest.mark.parametrize(("blocks", "dim"), [(range(BLOCKS), 256), ([0, BLOCKS], DIM)])
def test_sync_weights_of_another_model_are_refused(wan, make_sync, blocks, dim):
    with pytest.raises(ValueError, match="choose the sync file that belongs to the model"):
        patch.apply_view_sync(wan, make_sync(blocks, dim))


def test_reference_picture_of_the_model_itself_is_one_more_moment(wan_weights, sync):
    """Wan Fun checkpoints with `ref_conv` put a picture before the video's tokens."""
    weights = wan_weights(in_dim=16)
    weights["ref_conv.weight"], weights["ref_conv.bias"] = draw(DIM, 16, 2, 2), draw(DIM)
    fun = comfy.sd.load_diffusion_model_state_dict(weights)
    picture = [[draw(1, 4, 4096), {"reference_latents": [draw(VIEWS, 16, 1, 4, 6)]}]]
    probed, probe = with_probe(fun)
    synced = patch.apply_view_sync(probed, sync)
    after = input_of(fun.model.diffusion_model.head, synced, positive=picture)[0]
    call = probe.calls[0]
    T, h, w = GRID
    assert call["out"].shape[1] == (T + 1) * h * w
    layer = sync.model.blocks[str(BLOCKS - 1)]
    expected = layer(call["out"], call["vec"], call["pe"], Layout(VIEWS, (T + 1, h, w)))
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert sample(patch.apply_view_sync(fun), positive=picture).isfinite().all()


@pytest.mark.parametrize("tokens", [TOKENS + 1, TOKENS - 1, TOKENS - 6])
def test_tokens_that_are_no_pictures_are_refused(tokens):
    run = patch.Run(1, VIEWS, GRID, 1.0, "frame", None, None, False, None)
    with pytest.raises(
        ValueError, match=f"on {tokens} tokens a view where the latent has {TOKENS}"
    ):
        run.layout(draw(VIEWS, tokens, DIM))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sync_file_loads_and_runs_in_the_models_precision(wan, sync, tmp_path, dtype):
    path = tmp_path / "sync.safetensors"
    half = {k: v.to(dtype) for k, v in sync.model.state_dict().items()}
    save_file({k: v.clone() for k, v in half.items()}, path)
    loaded = patch.load_sync(str(path))
    assert next(loaded.model.parameters()).dtype == dtype
    sync.model.load_state_dict(half)
    result = sample(patch.apply_view_sync(wan, loaded))
    torch.testing.assert_close(
        result, sample(patch.apply_view_sync(wan, sync)), atol=1e-5, rtol=1e-5
    )


def test_dit_trained_with_diffusers_runs_natively_the_same(randomise):
    diffusers = pytest.importorskip("diffusers")
    trained = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=128, in_channels=48, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=256, num_layers=BLOCKS, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6,
    ).eval()  # fmt: skip
    trained.load_state_dict(randomise(trained, 0))
    native = comfy.sd.load_diffusion_model_state_dict(dit_to_native(trained.state_dict()))
    x, text = draw(2, 48, *SHAPE[1:]), draw(2, 5, 4096, seed=1)
    timestep = torch.tensor([700.0, 300.0])
    expected = trained(x, timestep, text, return_dict=False)[0]
    out = native.model.diffusion_model(x, timestep, text)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
