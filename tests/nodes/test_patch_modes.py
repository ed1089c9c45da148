"""Who looks at whom inside the real ComfyUI: modes, weights, guests, parts of a latent, places."""

import comfy.sample
import comfy.sd
import pytest
import torch
from torch import Tensor, nn
from turnaround.models.view_sync import MODES, Layout, extended_attention, plain_attention
from turnaround.nodes import patch

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, HEADS, BLOCKS = 128, 1, 2
VIEWS = 3
SHAPE = (16, 2, 4, 6)
GRID = (2, 2, 3)
WEIGHTS = torch.tensor([1.0, 0.2, 0.6])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model, views=VIEWS, cfg=1.0, steps=2, channels=32) -> Tensor:
    noise = draw(views, *SHAPE, seed=7)
    extra = {"concat_latent_image": draw(views, channels, *SHAPE[1:], seed=20)} if channels else {}
    text = [[draw(1, 4, 4096, seed=21), extra]]
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", text, text, torch.zeros_like(noise), seed=0,
        disable_pbar=True,
    )  # fmt: skip


def layout(mode: str, views: int = VIEWS) -> Layout:
    return Layout(views, GRID, mode, WEIGHTS[:views] if mode == "weighted" else None)


def settings(mode: str) -> dict:
    return {"mode": mode, "weights": WEIGHTS if mode == "weighted" else None}


class Calls:
    """What goes into modules while sampling, and what comes out."""

    def __init__(self, *modules: nn.Module) -> None:
        self.seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in modules]
        self.modules = modules

    def __enter__(self) -> "Calls":
        self.hooks = [
            m.register_forward_hook(
                lambda _, i, o, seen=seen: seen.append((i[0].clone(), o.clone()))
            )
            for m, seen in zip(self.modules, self.seen, strict=True)
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_trained_form_has_the_mode_that_was_chosen(wan, sync, mode):
    dit = wan.model.diffusion_model
    layer = sync.model.blocks[str(BLOCKS - 1)]
    given = {}
    hook = layer.register_forward_hook(lambda _, i, o: given.update(inputs=i, out=o))
    with Calls(dit.head) as calls:
        sample(patch.apply_view_sync(wan, sync, **settings(mode)), steps=1)
    hook.remove()
    x, vec, pe, _ = given["inputs"]
    expected = layer(x, vec, pe, layout(mode))
    torch.testing.assert_close(calls.seen[0][0][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_training_free_form_has_the_mode_that_was_chosen(wan, mode):
    """The formulas are compared with float64 loops in tests/models/test_view_sync.py."""
    seen = []

    def others_override(func, q, k, v, heads, **kwargs):
        seen.append((q, k, v))
        return func(q, k, v, heads, **kwargs)

    other = wan.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = others_override
    synced = patch.apply_view_sync(other, strength=0.7, **settings(mode))
    with Calls(wan.model.diffusion_model.blocks[0].self_attn.o) as calls:
        sample(synced, steps=1)
    expected = extended_attention(plain_attention, *seen[0], HEADS, layout(mode), 0.7)
    torch.testing.assert_close(calls.seen[0][0][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_modes_differ(wan, sync, trained):
    weights = sync if trained else None
    results = [sample(patch.apply_view_sync(wan, weights, **settings(mode))) for mode in MODES]
    for i in range(3):
        assert (results[i] - results[i - 1]).abs().max() > 1e-3


def test_weighted_without_weights_is_refused(wan):
    with pytest.raises(ValueError, match="'weighted' needs 'weights'"):
        patch.apply_view_sync(wan, mode="weighted")


def test_weights_of_another_rig_are_refused(wan):
    with pytest.raises(ValueError, match="for 3 views but the rig has 4"):
        patch.apply_view_sync(wan, views=4, mode="weighted", weights=WEIGHTS)
    synced = patch.apply_view_sync(wan, mode="weighted", weights=WEIGHTS)
    with pytest.raises(ValueError, match="each of the 2 views, got 3"):
        sample(synced, views=2)


# --- guests ---------------------------------------------------------------------------------------


def test_several_references_are_several_more_views(wan, sync):
    two = draw(2, *SHAPE, seed=9)
    synced = patch.apply_view_sync(wan, sync, reference=two)
    with Calls(wan.model.diffusion_model.head) as calls:
        result = sample(synced, cfg=3.0)
    assert len(calls.seen[0][0][0]) == 2 * (2 + VIEWS)
    assert result.shape == (VIEWS, *SHAPE)
    swapped = sample(patch.apply_view_sync(wan, sync, reference=two.flip(0)), cfg=3.0)
    torch.testing.assert_close(swapped, result, atol=1e-4, rtol=1e-4)
    one = sample(patch.apply_view_sync(wan, sync, reference=two[:1]), cfg=3.0)
    assert (one - result).abs().max() > 1e-3


def test_picture_is_a_reference_that_stands_still(wan, sync):
    picture = draw(1, 16, 1, 4, 6, seed=9)
    still = sample(patch.apply_view_sync(wan, sync, reference=picture))
    clip = picture.expand(-1, -1, SHAPE[1], -1, -1)
    assert torch.equal(still, sample(patch.apply_view_sync(wan, sync, reference=clip)))


@pytest.mark.parametrize("trained", [True, False])
def test_reference_that_is_not_seen_changes_no_view(wan, sync, trained):
    """Without reference norms in the sync weights nothing reads it as text either."""
    weights = sync if trained else None
    plain = sample(patch.apply_view_sync(wan, weights, strength=0.6), cfg=3.0)
    apart = patch.apply_view_sync(
        wan, weights, strength=0.6, reference=draw(1, *SHAPE, seed=9), reference_is_seen=False
    )
    torch.testing.assert_close(sample(apart, cfg=3.0), plain, atol=1e-5, rtol=1e-5)


def test_reference_as_text_alone_and_as_view_alone_and_as_both_differ(wan, referring):
    reference = draw(1, *SHAPE, seed=9)
    results = [
        sample(patch.apply_view_sync(wan, referring, reference=reference, **use))
        for use in ({}, {"reference_is_seen": False}, {"reference_is_text": False})
    ]
    results.append(sample(patch.apply_view_sync(wan, referring)))
    for i in range(4):
        for j in range(i):
            assert (results[i] - results[j]).abs().max() > 1e-3


def test_reference_that_is_neither_seen_nor_text_is_refused(wan, sync):
    with pytest.raises(ValueError, match="neither seen nor read"):
        patch.apply_view_sync(
            wan, sync, reference=draw(1, *SHAPE), reference_is_seen=False, reference_is_text=False
        )


@pytest.mark.parametrize("shape", [(1, 4, 2, 4, 6), (1, 16, 4, 6)])
def test_reference_of_another_vae_is_refused(wan, shape):
    with pytest.raises(ValueError, match="latents have 16 channels"):
        patch.apply_view_sync(wan, reference=draw(*shape))


def test_weighted_reference_counts_as_much_as_the_best_view(wan, sync):
    halved = patch.apply_view_sync(
        wan, sync, reference=draw(1, *SHAPE, seed=9), mode="weighted", weights=WEIGHTS / 2
    )
    given = []
    layer = sync.model.blocks["0"]
    hook = layer.register_forward_pre_hook(lambda _, i: given.append(i[3].weights))
    sample(halved, steps=1)
    hook.remove()
    assert given[0].tolist() == pytest.approx([0.5, 0.5, 0.1, 0.3])


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(16, "latent"), (36, "latent, known, picture"), (48, "latent, picture, nothing")],
)
def test_reference_comes_with_the_conditions_of_what_is_known(channels, expected):
    reference = draw(1, *SHAPE, seed=1)
    x = draw(2 * VIEWS, channels, *SHAPE[1:])
    items = patch.add_reference(x, reference, VIEWS).unflatten(0, (2, 1 + VIEWS))
    parts = {
        "latent": reference, "picture": reference, "known": torch.ones(1, 4, *SHAPE[1:]),
        "nothing": torch.zeros(1, 16, *SHAPE[1:]),
    }  # fmt: skip
    wanted = torch.cat([parts[name] for name in expected.split(", ")], 1)
    assert torch.equal(items[:, 0], wanted.expand(2, -1, -1, -1, -1))
    assert torch.equal(items[:, 1:].flatten(0, 1), x)


# --- parts of a latent ----------------------------------------------------------------------------


def test_tile_has_the_weights_and_reference_frames_of_its_part(wan, sync):
    reference = draw(1, 16, 5, 4, 6, seed=9)
    synced = patch.apply_view_sync(
        wan, sync, views=VIEWS, reference=reference, mode="weighted", weights=WEIGHTS
    )
    options = synced.model_options["transformer_options"]
    options[patch.TILE] = {"views": [2, 0], "frames": [1, 2], "of_views": VIEWS, "of_frames": 5}
    given = []
    hook = sync.model.blocks["0"].register_forward_pre_hook(lambda _, i: given.append(i[3].weights))
    part = sample(synced, views=2, steps=1)
    hook.remove()
    assert given[0].tolist() == pytest.approx([1.0, 0.6, 1.0])
    alone = patch.apply_view_sync(
        wan, sync, reference=reference[:, :, 1:3], mode="weighted", weights=WEIGHTS[[2, 0]]
    )
    torch.testing.assert_close(part, sample(alone, views=2, steps=1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_views_at_once_change_nothing_but_the_memory(wan, referring, at_once, cfg):
    reference = draw(1, *SHAPE, seed=9)
    synced = patch.apply_view_sync(wan, referring, views=VIEWS, reference=reference)
    whole = sample(synced, cfg=cfg)
    synced.model_options["transformer_options"][patch.VIEWS_AT_ONCE] = at_once
    with Calls(wan.model.diffusion_model.blocks[0].ffn) as calls:
        parts = sample(synced, cfg=cfg)
    chunks = 2 if cfg > 1 else 1
    assert max(len(x) for x, _ in calls.seen[0]) == chunks * min(at_once, 1 + VIEWS)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_blocks_work_in_parts_at_steps_without_sync_too(wan, sync):
    synced = patch.apply_view_sync(wan, sync, start_percent=0.9)
    synced.model_options["transformer_options"][patch.VIEWS_AT_ONCE] = 1
    with Calls(wan.model.diffusion_model.blocks[0].ffn) as calls:
        parts = sample(synced, cfg=3.0)
    assert {len(x) for x, _ in calls.seen[0]} == {2}
    torch.testing.assert_close(parts, sample(wan, cfg=3.0), atol=1e-5, rtol=1e-5)


# --- places ---------------------------------------------------------------------------------------


class BeforeText(nn.Module):
    """A layer that acts between self-attention and text: each view gets the others' mean."""

    place = "before_text"

    def forward(self, x, vec, pe, layout):
        y = x.unflatten(0, (-1, layout.views))
        return (y + 0.5 * y.mean(1, keepdim=True)).flatten(0, 1)


def before_text_weights():
    import comfy.model_patcher

    module = nn.Module()
    module.dim, module.references = DIM, nn.ModuleDict()
    module.blocks = nn.ModuleDict({str(i): BeforeText() for i in range(BLOCKS)})
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(module, load_device=cpu, offload_device=cpu)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_layer_before_the_text_is_the_plain_order_of_operations(wan, strength):
    synced = patch.apply_view_sync(wan, before_text_weights(), strength=strength)
    block = wan.model.diffusion_model.blocks[0]
    given = {}
    hook = block.register_forward_hook(
        lambda _, i, k, o: given.update(x=i[0], out=o, **k), with_kwargs=True
    )
    with Calls(block.self_attn, block.norm3, block.cross_attn, block.ffn) as calls:
        sample(synced, steps=1)
    hook.remove()
    attended, _, text, _ = (seen[0][1] for seen in calls.seen)
    rows = (block.modulation + given["e"].view(VIEWS, 6, DIM)).chunk(6, 1)
    x = given["x"] + attended * rows[2]
    y = x + strength * 0.5 * x.mean(0, keepdim=True)
    torch.testing.assert_close(calls.seen[1][0][0], y, atol=1e-5, rtol=1e-5)
    y = y + text
    expected = y + block.ffn(block.norm2(y) * (1 + rows[4]) + rows[3]) * rows[5]
    torch.testing.assert_close(given["out"], expected, atol=1e-4, rtol=1e-4)
    assert not block.norm3._forward_pre_hooks and not block.cross_attn._forward_hooks


def test_layer_before_the_text_runs_beside_another_packs_patch(wan):
    other, calls = wan.clone(), []

    def note(args: dict, extra: dict) -> dict:
        calls.append(len(args["img"]))
        return extra["original_block"](args)

    other.set_model_patch_replace(note, "dit", "double_block", 0)
    synced = patch.apply_view_sync(other, before_text_weights())
    expected = sample(patch.apply_view_sync(wan, before_text_weights()))
    assert torch.equal(sample(synced), expected)
    assert calls == [VIEWS, VIEWS]
