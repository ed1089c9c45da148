"""View sync beside what else creators do to a model: LoRAs, fp8, unloading, several at once."""

import comfy.model_management as mm
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from torch import Tensor
from turnaround.nodes import patch

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, VIEWS = 128, 3
SHAPE = (16, 2, 4, 6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model, cfg=1.0, sampler="euler", steps=2, seed=20) -> Tensor:
    noise = draw(VIEWS, *SHAPE, seed=7)
    extra = {"concat_latent_image": draw(VIEWS, 32, *SHAPE[1:], seed=seed)}
    text = [[draw(1, 4, 4096, seed=21), extra]]
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", text, text, torch.zeros_like(noise), seed=0,
        disable_pbar=True,
    )  # fmt: skip


def with_lora(model, strength: float = 1.0):
    """A LoRA of rank 4 on every self-attention, through ComfyUI's own loader."""
    lora = {}
    for block in range(2):
        for n, name in enumerate(("q", "k", "v", "o")):
            key = f"diffusion_model.blocks.{block}.self_attn.{name}"
            lora[f"{key}.lora_down.weight"] = draw(4, DIM, seed=10 * block + n) * DIM**-0.5
            lora[f"{key}.lora_up.weight"] = draw(DIM, 4, seed=100 + 10 * block + n) * 0.5
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


@pytest.fixture
def fresh(wan_weights):
    """A model of its own: LoRAs and unloading are not for the shared one."""
    return comfy.sd.load_diffusion_model_state_dict(wan_weights())


def synced(model, sync, **settings):
    return patch.apply_view_sync(model, sync, reference=draw(1, *SHAPE, seed=9), **settings)


@pytest.mark.parametrize("trained", [True, False])
def test_lora_counts_before_and_after_view_sync(fresh, sync, trained):
    weights = sync if trained else None
    before = sample(synced(with_lora(fresh), weights))
    after = sample(with_lora(synced(fresh, weights)))
    assert torch.equal(before, after)
    assert (before - sample(synced(fresh, weights))).abs().max() > 1e-2
    torch.testing.assert_close(sample(synced(with_lora(fresh, 0.0), weights)),
                               sample(synced(fresh, weights)))  # fmt: skip


@pytest.mark.parametrize("trained", [True, False])
def test_model_in_fp8_is_synchronised_in_the_precision_it_computes_in(wan_weights, sync, trained):
    """Weights rounded to fp8 beforehand, computed as they are, give the same."""
    # Rounded large matrices only, as ComfyUI's loader leaves no choice but the same for all.
    rounded = {k: v.to(torch.float8_e4m3fn) for k, v in wan_weights().items()}
    small = comfy.sd.load_diffusion_model_state_dict(
        dict(rounded), model_options={"dtype": torch.float8_e4m3fn}
    )
    assert small.model.diffusion_model.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    plain = comfy.sd.load_diffusion_model_state_dict({k: v.float() for k, v in rounded.items()})
    weights = sync if trained else None
    result, expected = sample(synced(small, weights)), sample(synced(plain, weights))
    assert (expected - sample(plain)).abs().max() > 1e-2
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("trained", [True, False])
def test_unloading_between_two_runs_changes_nothing(fresh, sync, trained):
    model = synced(fresh, sync if trained else None)
    first = sample(model)
    mm.unload_all_models()
    assert torch.equal(sample(model), first)


def test_weights_that_stay_offloaded_are_brought_block_by_block(fresh, sync):
    """What --lowvram does to a model: its layers cast their weights when they are called."""
    model = synced(with_lora(fresh), sync)
    expected = sample(model)
    mm.unload_all_models()
    model.load(torch.device("cpu"), lowvram_model_memory=1)
    assert any(getattr(m, "comfy_cast_weights", False) for m in model.model.modules())
    result = sample(model)
    mm.unload_all_models()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_several_models_of_one_graph_keep_to_themselves(wan_weights, make_sync):
    one, two = (comfy.sd.load_diffusion_model_state_dict(wan_weights()) for _ in range(2))
    models = [
        synced(one, make_sync(seed=1)), synced(one, None, strength=0.5), one,
        patch.apply_view_sync(two, make_sync(seed=2), mode="dense"),
    ]  # fmt: skip
    alone = [sample(m) for m in models]
    for i in range(4):
        for j in range(i):
            assert (alone[i] - alone[j]).abs().max() > 1e-3
    for i in (3, 1, 2, 0, 3):
        assert torch.equal(sample(models[i]), alone[i])


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "lcm"])
def test_samplers_of_every_kind_run_the_same_twice(fresh, sync, sampler):
    model = synced(fresh, sync)
    first = sample(model, cfg=2.0, sampler=sampler, steps=3)
    assert first.isfinite().all() and torch.equal(
        sample(model, cfg=2.0, sampler=sampler, steps=3), first
    )


def test_high_and_low_noise_pair_is_two_models_each_with_its_own_sync(wan_weights, make_sync):
    """Wan 2.2 14B: one model for the first steps, another for the rest."""
    high, low = (comfy.sd.load_diffusion_model_state_dict(wan_weights()) for _ in range(2))
    high, low = synced(high, make_sync(seed=1)), synced(low, make_sync(seed=2))
    noise = draw(VIEWS, *SHAPE, seed=7)
    text = [[draw(1, 4, 4096, seed=21), {"concat_latent_image": draw(VIEWS, 32, *SHAPE[1:])}]]

    def part(model, noise, latent, **steps):
        return comfy.sample.sample(
            model, noise, 4, 1.0, "euler", "simple", text, text, latent, seed=0, disable_pbar=True,
            **steps,
        )  # fmt: skip

    def pair(first, second):
        half = part(first, noise, torch.zeros_like(noise), last_step=2)
        return part(second, torch.zeros_like(noise), half, start_step=2, disable_noise=True)

    # The same model twice is one run in two halves.
    whole = part(high, noise, torch.zeros_like(noise))
    torch.testing.assert_close(pair(high, high), whole, atol=1e-5, rtol=1e-5)
    assert (pair(high, low) - whole).abs().max() > 1e-3
