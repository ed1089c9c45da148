"""Published kinds of Wan, tiny and random, from the conditioning nodes through ComfyUI's KSampler."""

import comfy.clip_vision
import comfy.sd
import pytest
import small_checkpoints as small
import torch
from torch import Tensor
from turnaround.models.views import Views
from turnaround.nodes import conditioning, conditioning_wan, sampler

import nodes as core

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS = 2

KINDS = {
    "t2v": dict(kind="t2v"),
    "vace": dict(kind="vace", vace_layers=2, vace_in_dim=96),
    "i2v 2.1": dict(kind="i2v", in_dim=36),
    "i2v 2.2": dict(kind="t2v", in_dim=36),
    "fun-control 2.1": dict(kind="i2v", in_dim=48, in_dim_ref_conv=16),
    "fun-control 2.2": dict(kind="t2v", in_dim=52, in_dim_ref_conv=16),
    "5b": dict(kind="t2v", in_dim=48, out_dim=48),
}


@pytest.fixture(scope="module")
def models():
    with torch.inference_mode():
        return {
            name: comfy.sd.load_diffusion_model_state_dict(small.transformer(**config))
            for name, config in KINDS.items()
        }


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=small.vae())


@pytest.fixture(scope="module")
def large_vae():
    return small.loaded_large_vae()


def clip_states(views: list[int]) -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output.penultimate_hidden_states = draw(VIEWS, 5, 1280, seed=8)[views]
    return output


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int, views: list[int], size: tuple[int, int] = (16, 32), masks=None) -> Views:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(VIEWS, 5, 3, *size, generator=generator)
    return Views(frames[views], masks[views] if masks is not None else None)


def tell(name: str, vae, views: list[int]):
    """Positive, negative, latent of some of the views; each view has its own text."""
    texts = [[draw(VIEWS, 4, 4096, seed=1)[views], {}]], [[draw(1, 4, 4096, seed=2), {}]]
    if name == "t2v":
        return *texts, {"samples": torch.zeros(len(views), 16, 2, 2, 4)}
    if name == "vace":
        seen = torch.rand(VIEWS, 5, 16, 32, generator=torch.Generator().manual_seed(6)) > 0.5
        return conditioning_wan.VaceConditioning.execute(
            *texts, vae, pictures(3, views), 1.0, pictures(4, views, masks=seen),
            reference=pictures(5, [0]),
        ).args[:3]  # fmt: skip
    if name.startswith("fun"):
        shown = clip_states(views) if name.endswith("2.1") else None
        return conditioning_wan.FunControlConditioning.execute(
            *texts, vae, pictures(3, views), pictures(4, views), pictures(5, [0]), shown
        ).args[:3]
    size = (32, 64) if name == "5b" else (16, 32)
    positive, negative, latent, _ = conditioning_wan.I2VConditioning.execute(
        *texts, vae, pictures(3, views, size), 5, 1
    ).args
    if name == "i2v 2.1":
        shown = {"clip_vision_output": clip_states(views)}
        positive = [[text, {**values, **shown}] for text, values in positive]
    return positive, negative, latent


def sample(model, told, views: list[int], steps: int = 2, **settings) -> Tensor:
    """ComfyUI's KSampler; the noise of a view stays with the view."""
    positive, negative, latent = told
    latent = {**latent, "batch_index": views}
    return core.common_ksampler(
        model, 3, steps, 2.0, "euler", "simple", positive, negative, latent, **settings
    )[0]["samples"]


@pytest.mark.parametrize("name", KINDS)
def test_views_sampled_together_are_each_view_by_itself(models, vae, large_vae, name):
    """So that every row of every condition reaches its own view."""
    of = large_vae if name == "5b" else vae
    together = sample(models[name], tell(name, of, [0, 1]), [0, 1])
    for v in range(VIEWS):
        alone = sample(models[name], tell(name, of, [v]), [v])
        torch.testing.assert_close(together[v : v + 1], alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_view_sync_brings_the_views_into_touch(models, vae, large_vae, name):
    of = large_vae if name == "5b" else vae
    told = tell(name, of, [0, 1])
    synced = sampler.ViewSyncNode.execute(models[name], 1.0, 0.0, 1.0).args[0]
    result = sample(synced, told, [0, 1])
    assert result.isfinite().all()
    assert (result - sample(models[name], told, [0, 1])).abs().max() > 1e-3
    # Views in touch are no longer what each is by itself.
    alone = sample(synced, tell(name, of, [1]), [1])
    assert (result[1:] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_multi_view_sampler_takes_them_and_does_the_same(models, vae, large_vae, name):
    told = tell(name, large_vae if name == "5b" else vae, [0, 1])
    synced = sampler.ViewSyncNode.execute(models[name], 1.0, 0.0, 1.0).args[0]
    positive, negative, latent = told
    out = sampler.MultiViewSampler.execute(
        models[name], positive=positive, negative=negative, seed=3, steps=2, cfg=2.0,
        latent={**latent, "batch_index": [0, 1]}, sampler_name="euler", scheduler="simple",
        denoise=1.0, sync_strength=1.0,
    )  # fmt: skip
    assert torch.equal(out.args[0]["samples"], sample(synced, told, [0, 1]))


def test_wan_22_5b_keeps_the_first_frame_of_every_view(models, large_vae):
    told = tell("5b", large_vae, [0, 1])
    result = sample(models["5b"], told, [0, 1], steps=8)
    start = told[2]["samples"]
    torch.testing.assert_close(result[:, :, 0], start[:, :, 0], atol=1e-4, rtol=1e-4)
    assert (result - start)[:, :, 1:].abs().max() > 0.1


def test_a_pair_of_models_goes_on_where_the_first_stopped(models, vae):
    """Wan 2.2 14B: one model for the noisy half, one for the rest, with the same conditions."""
    told = tell("i2v 2.2", vae, [0, 1])
    high, low = (
        sampler.ViewSyncNode.execute(models["i2v 2.2"], 1.0, 0.0, 1.0).args[0] for _ in range(2)
    )
    half = sample(high, told, [0, 1], 4, last_step=2, force_full_denoise=False)
    rest = (*told[:2], {**told[2], "samples": half})
    result = sample(low, rest, [0, 1], 4, start_step=2, disable_noise=True)
    torch.testing.assert_close(result, sample(high, told, [0, 1], 4), atol=1e-4, rtol=1e-4)


def test_conditions_of_turnaround_go_straight_into_the_sampler(vae, models):
    told = conditioning.MultiViewConditioning.execute(vae, pictures(0, [0]), pictures(1, [0])).args
    model = comfy.sd.load_diffusion_model_state_dict(small.transformer(in_dim=48))
    result = sample(model, told[:3], [0])
    assert result.shape == told[2]["samples"].shape and result.isfinite().all()


def refusal_of_sampler(model, positive, negative, cfg: float) -> str:
    latent = {"samples": torch.zeros(VIEWS, 16, 2, 2, 4)}
    with pytest.raises(ValueError) as caught:
        sampler.MultiViewSampler.execute(
            model, positive, negative, latent, 0, 1, cfg, "euler", "simple", 1.0, 0.0
        )
    return str(caught.value)


def test_sampler_checks_what_it_uses(models):
    """At cfg 1 ComfyUI leaves the negative out, so that one of another rig does no harm."""
    two, four = ([[draw(n, 4, 4096), {}]] for n in (VIEWS, 4))
    model = models["t2v"]
    assert "'positive' brings 4 texts" in refusal_of_sampler(model, four, two, 1.0)
    assert "'negative' brings 4 texts" in refusal_of_sampler(model, two, four, 2.0)
    latent = {"samples": torch.zeros(VIEWS, 16, 2, 2, 4)}
    out = sampler.MultiViewSampler.execute(
        model, two, four, latent, 0, 1, 1.0, "euler", "simple", 1.0, 0.0
    )
    assert out.args[0]["samples"].isfinite().all()
