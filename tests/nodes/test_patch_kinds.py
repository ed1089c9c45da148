"""View sync on every kind of native Wan, from tiny random checkpoints with the real keys."""

import comfy.ldm.wan.model
import comfy.ops
import comfy.sample
import comfy.sd
import pytest
import torch
from torch import Tensor
from turnaround.nodes import patch

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, BLOCKS, VIEWS = 128, 2, 3
T, H, W = 2, 4, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Kind:
    """A kind of checkpoint: its layers, what a graph gives it, and what ComfyUI takes it for."""

    def __init__(self, found: str, in_dim=16, channels=16, net=None, given=None, **layers) -> None:
        self.found, self.channels = found, channels
        self.net = net or comfy.ldm.wan.model.WanModel
        self.layers = {"in_dim": in_dim, "out_dim": channels, **layers}
        self.given = given or dict


def latents(channels: int, seed: int) -> Tensor:
    return draw(VIEWS, channels, T, H, W, seed=seed)


def clip_vision(seed: int = 5):
    out = type("Output", (), {})()
    out.penultimate_hidden_states = draw(VIEWS, 257, 1280, seed=seed)
    return out


def picture() -> dict:
    mask = torch.ones(VIEWS, 1, T, H, W)
    mask[:, :, :1] = 0
    return {"concat_latent_image": latents(16, 1), "concat_mask": mask}


KINDS = {
    "2.1 T2V": Kind("WAN21"),
    "2.1 I2V": Kind(
        "WAN21", 36, model_type="i2v",
        given=lambda: {**picture(), "clip_vision_output": clip_vision()},
    ),
    "2.1 VACE": Kind(
        "WAN21_Vace", net=comfy.ldm.wan.model.VaceWanModel, model_type="vace", vace_layers=1,
        vace_in_dim=96,
        given=lambda: {"vace_frames": [latents(32, 2)], "vace_mask": [latents(64, 3)],
                       "vace_strength": [1.0]},
    ),
    "2.1 Fun-Control": Kind(
        "WAN21", 48, model_type="i2v", in_dim_ref_conv=16,
        given=lambda: {"concat_latent_image": latents(32, 4), "clip_vision_output": clip_vision(),
                       "reference_latents": [draw(VIEWS, 16, 1, H, W)]},
    ),
    "2.1 Fun-Camera": Kind(
        "WAN21_Camera", 32, net=comfy.ldm.wan.model.CameraWanModel, model_type="camera",
        in_dim_control_adapter=24,
        given=lambda: {"concat_latent_image": latents(16, 1), "clip_vision_output": clip_vision(),
                       "camera_conditions": draw(VIEWS, 24, T, 8 * H, 8 * W, seed=6)},
    ),
    "2.2 14B I2V": Kind("WAN21", 36, given=picture),
    "2.2 5B": Kind("WAN22", 48, 48),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request, randomise):
    """(the model as ComfyUI's detection makes it, its kind)."""
    chosen = KINDS[request.param]
    dit = chosen.net(
        dim=DIM, ffn_dim=256, num_heads=1, num_layers=BLOCKS, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init, **chosen.layers,
    )  # fmt: skip
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(randomise(dit, 0))
    assert type(model.model).__name__ == chosen.found
    return model, chosen


def in_order(value, order: Tensor):
    """What a graph gives, of the views in another order."""
    if isinstance(value, list):
        return [in_order(v, order) for v in value]
    if isinstance(value, Tensor) and len(value) == VIEWS:
        return value[order]
    if hasattr(value, "penultimate_hidden_states"):
        out = type(value)()
        out.penultimate_hidden_states = value.penultimate_hidden_states[order]
        return out
    return value


def sample(model, chosen: Kind, order=torch.arange(VIEWS), cfg=2.0) -> Tensor:  # noqa: B008
    noise = draw(VIEWS, chosen.channels, T, H, W, seed=7)[order]
    given = {k: in_order(v, order) for k, v in chosen.given().items()}
    positive, negative = ([[draw(1, 4, 4096, seed=s), dict(given)]] for s in (8, 9))
    return comfy.sample.sample(
        model, noise, 2, cfg, "euler", "simple", positive, negative, torch.zeros_like(noise),
        seed=0, disable_pbar=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "mode"),
    [(True, "frame"), (True, "dense"), (False, "frame"), (False, "dense"), (False, "weighted")],
)
def test_views_are_synchronised(kind, sync, trained, mode):
    model, chosen = kind
    weights = torch.tensor([1.0, 0.3, 0.6]) if mode == "weighted" else None
    settings = {"mode": mode, "weights": weights, "views": VIEWS}
    result = sample(patch.apply_view_sync(model, sync if trained else None, **settings), chosen)
    assert result.isfinite().all()
    assert (result - sample(model, chosen)).abs().amax((1, 2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("trained", [True, False])
def test_strength_zero_is_the_plain_model_to_the_bit(kind, sync, trained):
    model, chosen = kind
    synced = patch.apply_view_sync(model, sync if trained else None, strength=0)
    assert torch.equal(sample(synced, chosen), sample(model, chosen))


@pytest.mark.parametrize("trained", [True, False])
def test_permuting_views_permutes_the_result(kind, sync, trained):
    model, chosen = kind
    synced = patch.apply_view_sync(model, sync if trained else None)
    order = torch.tensor([2, 0, 1])
    expected = sample(synced, chosen)[order]
    torch.testing.assert_close(sample(synced, chosen, order), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_reference_is_one_more_view(kind, sync, trained):
    model, chosen = kind
    weights = sync if trained else None
    reference = draw(1, chosen.channels, T, H, W, seed=11)
    result = sample(patch.apply_view_sync(model, weights, reference=reference), chosen)
    plain = sample(patch.apply_view_sync(model, weights), chosen)
    assert result.shape == plain.shape and result.isfinite().all()
    assert (result - plain).abs().amax((1, 2, 3, 4)).min() > 1e-4


def test_leading_picture_of_the_5b_is_clean_in_every_view(kind, sync):
    """Its noise mask gives every latent frame a timestep of its own."""
    model, chosen = kind
    if chosen.found != "WAN22":
        return
    known = draw(VIEWS, 48, T, H, W, seed=12)
    mask = torch.ones(VIEWS, 1, T, H, W)
    mask[:, :, :1] = 0
    text = [[draw(1, 4, 4096, seed=8), {}]]
    result = comfy.sample.sample(
        patch.apply_view_sync(model, sync, reference=draw(1, 48, T, H, W)), draw(*known.shape), 2,
        2.0, "euler", "simple", text, text, known, seed=0, disable_pbar=True, noise_mask=mask,
    )  # fmt: skip
    torch.testing.assert_close(result[:, :, :1], known[:, :, :1])
    assert (result[:, :, 1:] - known[:, :, 1:]).abs().min() > 0
