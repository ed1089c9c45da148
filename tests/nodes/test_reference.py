"""The performer's own video as one more view: what the DiT was trained with, inside ComfyUI."""

import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from torch import Tensor
from turnaround.models.view_sync import ViewSync
from turnaround.nodes import patch

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, DIM, BLOCKS = 3, 128, 2
SHAPE = (16, 2, 4, 6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model, order=slice(None), cfg=1.0, steps=2) -> Tensor:
    noise = draw(VIEWS, *SHAPE, seed=7)[order]
    positive, negative = (
        [[draw(1, 4, 4096, seed=s), {"concat_latent_image": draw(VIEWS, 32, *SHAPE[1:], seed=s)[order]}]]
        for s in (1, 2)
    )  # fmt: skip
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, negative,
        torch.zeros_like(noise), seed=0, disable_pbar=True,
    )  # fmt: skip


@pytest.fixture
def sync(randomise):
    layers = ViewSync(DIM, range(BLOCKS), range(BLOCKS), operations=comfy.ops.manual_cast)
    layers.load_state_dict(randomise(layers, 1000))
    return as_model(layers)


def as_model(layers: ViewSync):
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(layers, load_device=cpu, offload_device=cpu)


REFERENCE = draw(1, *SHAPE, seed=9)


def test_reference_is_seen_by_every_view(wan, sync):
    plain = sample(patch.apply_view_sync(wan, sync))
    referred = sample(patch.apply_view_sync(wan, sync, reference=REFERENCE))
    assert referred.shape == plain.shape
    assert (referred - plain).abs().amax((1, 2, 3, 4)).min() > 1e-2


def test_strength_zero_with_reference_leaves_each_view_on_its_own(wan, sync):
    model = patch.apply_view_sync(wan, sync, strength=0, reference=REFERENCE)
    together = sample(model)
    assert (together - sample(wan)).abs().max() > 1e-2  # the reference is seen
    for v in range(VIEWS):
        alone = sample(model, slice(v, v + 1))
        torch.testing.assert_close(together[v : v + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_permuting_views_permutes_the_result(wan, sync, trained):
    model = patch.apply_view_sync(wan, sync if trained else None, reference=REFERENCE)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(sample(model, order), sample(model)[order], atol=1e-4, rtol=1e-4)


def test_positive_and_negative_in_one_batch_equal_two_runs(wan, sync):
    model = patch.apply_view_sync(wan, sync, views=VIEWS, reference=REFERENCE)
    together = sample(model, cfg=3.0)

    def one_by_one(args: dict) -> list[Tensor]:
        rest = (args["input"], args["sigma"], args["model_options"])
        return [comfy.samplers.calc_cond_batch(args["model"], [c], *rest)[0] for c in args["conds"]]

    model.model_options["sampler_calc_cond_batch_function"] = one_by_one
    torch.testing.assert_close(together, sample(model, cfg=3.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_second_view_sync_works_beside_a_reference(wan, sync, first):
    """Whichever of the two brings the reference, both count the views right."""
    references = (REFERENCE, None) if first else (None, REFERENCE)
    model = wan
    for reference in references:
        model = patch.apply_view_sync(model, sync, views=VIEWS, strength=0.5, reference=reference)
    assert sample(model).isfinite().all()


def test_reference_of_another_size_is_refused(wan, sync):
    model = patch.apply_view_sync(wan, sync, reference=draw(1, 16, 3, 4, 6))
    with pytest.raises(ValueError, match="reference has 3 latent frames of 6x4 but the views 2"):
        sample(model)


def test_second_reference_on_a_second_node_is_refused(wan, sync):
    once = patch.apply_view_sync(wan, sync, reference=REFERENCE)
    with pytest.raises(ValueError, match="has a reference already"):
        patch.apply_view_sync(once, sync, reference=REFERENCE)


@pytest.mark.parametrize("synced", [True, False])
def test_comfyui_computes_what_training_computed(randomise, synced):
    """The same weights through diffusers with our hooks, and through the native model, patched."""
    pytest.importorskip("diffusers")
    from turnaround.models.tiny import multi_view_dit
    from turnaround.models.tiny.layout import dit_to_native

    trained = multi_view_dit.MultiViewDiT().eval()
    trained.load_state_dict(randomise(trained, 0))
    native = comfy.sd.load_diffusion_model_state_dict(dit_to_native(trained.dit.state_dict()))
    layers = multi_view_dit.build_sync()
    layers.load_state_dict(trained.sync.state_dict())
    noise, conditions = draw(VIEWS, *SHAPE, seed=1), draw(VIEWS, 32, *SHAPE[1:], seed=2)
    process = native.model.process_latent_in
    reference = process(REFERENCE)
    items = torch.cat([noise, conditions], 1)
    first = torch.cat([reference, reference, torch.zeros_like(reference)], 1)
    sigma = torch.tensor([0.0] + VIEWS * [1.0])
    flow = trained(torch.cat([first, items]), sigma, VIEWS + 1, True, synced)[1:]
    model = patch.apply_view_sync(
        native, as_model(layers), views=VIEWS, strength=float(synced), reference=REFERENCE
    )
    condition = native.model.latent_format.process_out
    raw = torch.cat([condition(part) for part in conditions.split(16, 1)], 1)
    text = [[torch.zeros(1, 1, 4096), {"concat_latent_image": raw}]]
    # One euler step from pure noise ends at noise - flow.
    result = comfy.sample.sample(
        model, noise, 1, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), seed=0,
        disable_pbar=True,
    )  # fmt: skip
    torch.testing.assert_close(process(result), noise - flow, atol=1e-3, rtol=1e-3)
