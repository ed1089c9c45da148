"""Other people's sync weights inside the real ComfyUI, against the published formulas."""

import math

import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.sync_layouts import build
from turnaround.nodes import patch

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, BLOCKS = 128, 2
"""Of the tiny Wan in conftest.py."""
VIEWS = 3
SHAPE = (16, 2, 4, 6)
T, H, W = GRID = (2, 2, 3)
KINDS = {"mvs_attn": "SynCamMaster", "self_attn_mvs": "4DAnyone"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(path, attention: str, wan_weights, prefix: str = "") -> str:
    """A file as it is published: the whole DiT, sync weights among them."""
    shapes = {f"{attention}.{n}.weight": (DIM, DIM) for n in "qkvo"}
    shapes |= {f"{attention}.{n}.bias": (DIM,) for n in "qkvo"}
    shapes |= {f"{attention}.norm_{n}.weight": (DIM,) for n in "qk"}
    shapes["modulation_mvs"] = (1, 3, DIM)
    if attention == "mvs_attn":
        shapes |= {"projector.weight": (DIM, DIM), "projector.bias": (DIM,)}
        shapes |= {"cam_encoder.weight": (DIM, 12), "cam_encoder.bias": (DIM,)}
    weights = dict(wan_weights())
    for block in range(BLOCKS):
        for n, (name, shape) in enumerate(shapes.items()):
            value = draw(*shape, seed=100 * block + n) * shape[-1] ** -0.5
            weights[f"blocks.{block}.{name}"] = value + 2 if "norm_" in name else value
    save_file({prefix + k: v.contiguous() for k, v in weights.items()}, path)
    return str(path)


def cameras() -> Tensor:
    azimuths = 0.3 + 1.1 * torch.arange(VIEWS)
    rig = orbit_rig(azimuths, torch.full((VIEWS,), 0.2), 3.0, math.radians(50), 64, 64)
    return rig.T_camera_world


def as_model(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32):
    cpu = torch.device("cpu")
    sync = build(weights, cpu, dtype, comfy.ops.manual_cast)
    return comfy.model_patcher.ModelPatcher(sync, load_device=cpu, offload_device=cpu)


def sample(model, cfg: float = 1.0) -> Tensor:
    noise = draw(VIEWS, *SHAPE, seed=7)
    positive, negative = (
        [[draw(1, 4, 4096, seed=s), {"concat_latent_image": draw(VIEWS, 32, *SHAPE[1:], seed=s)}]]
        for s in (1, 2)
    )
    return comfy.sample.sample(
        model, noise, 1, cfg, "euler", "simple", positive, negative, torch.zeros_like(noise),
        seed=0, disable_pbar=True,
    )  # fmt: skip


def watch(wan, model, block: int, **kwargs) -> dict[str, Tensor]:
    """What a block gets, what its self-attention gives and what its text attention's norm reads."""
    seen: dict[str, Tensor] = {}
    module = wan.model.diffusion_model.blocks[block]

    def block_hook(_, inputs, given):
        seen.update(x=inputs[0].clone(), e=given["e"].reshape(-1, 6, DIM).clone())

    hooks = [
        module.register_forward_pre_hook(block_hook, with_kwargs=True),
        module.self_attn.register_forward_hook(lambda _, i, o: seen.update(attended=o.clone())),
        # Hooks run in the order they came: View Sync's own changes what the module reads.
        module.norm3.register_forward_hook(lambda _, i, o: seen.update(read=i[0].clone())),
    ]
    try:
        sample(model, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    seen["stream"] = seen["x"] + seen["attended"] * (module.modulation + seen["e"])[:, 2:3]
    return seen


def published(weights: dict[str, Tensor], block: int, x: Tensor, e: Tensor) -> Tensor:
    """The published operations on [n V, T h w, C], in float64; one head, as DIM has."""
    start = f"blocks.{block}."
    w = {k.removeprefix(start): v.double() for k, v in weights.items() if k.startswith(start)}
    name = next(a for a in KINDS if f"{a}.q.weight" in w)
    x, e = x.double(), e.double()

    def linear(part: str, y: Tensor) -> Tensor:
        return y @ w[f"{part}.weight"].T + w[f"{part}.bias"]

    def rms(part: str, y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{part}.weight"]

    shift, scale, gate = (w["modulation_mvs"] + e[:, :3]).split(1, dim=1)
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    y = y * (1 + scale) + shift
    if "cam_encoder.weight" in w:
        poses = cameras().double()
        relative = poses[0] @ torch.linalg.inv(poses)
        relative[:, :3, 3] *= 0.5
        y = (
            y
            + linear("cam_encoder", relative[:, :3].flatten(1)).repeat(len(y) // VIEWS, 1)[:, None]
        )
    places = torch.cartesian_prod(torch.arange(VIEWS), torch.arange(H), torch.arange(W))
    angles = torch.cat(
        [
            places[:, axis, None] / 10000 ** (torch.arange(0, size, 2).double() / size)
            for axis, size in enumerate((44, 42, 42))
        ],
        dim=1,
    )

    def turn(z: Tensor) -> Tensor:  # [..., V h w, C]
        pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)

    # [n V, T h w, C] -> [n, T, V h w, C]
    y = y.unflatten(0, (-1, VIEWS)).unflatten(2, (T, H * W)).transpose(1, 2).flatten(2, 3)
    q = turn(rms(f"{name}.norm_q", linear(f"{name}.q", y)))
    k = turn(rms(f"{name}.norm_k", linear(f"{name}.k", y)))
    seen = torch.softmax(q @ k.mT / math.sqrt(DIM), -1) @ linear(f"{name}.v", y)
    change = linear(f"{name}.o", seen)
    if "projector.weight" in w:
        change = linear("projector", change)
    change = change.unflatten(2, (VIEWS, H * W)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return x + gate * change


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_stream_before_the_text_is_the_published_formula(
    wan, wan_weights, tmp_path, attention, cfg
):
    path = write(tmp_path / "sync.safetensors", attention, wan_weights)
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    synced = patch.apply_view_sync(wan, as_model(weights), cameras=cameras())
    for block in range(BLOCKS):
        seen = watch(wan, synced, block, cfg=cfg)
        assert len(seen["x"]) == (2 if cfg > 1 else 1) * VIEWS
        expected = published(weights, block, seen["stream"], seen["e"])
        assert (expected - seen["stream"]).abs().mean() > 0.1  # the change is no detail
        torch.testing.assert_close(seen["read"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_small_weights_are_cast_as_the_hosts_own(wan, wan_weights, tmp_path, attention, dtype):
    path = write(tmp_path / "sync.safetensors", attention, wan_weights)
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    sync = as_model(weights, dtype)
    assert {p.dtype for p in sync.model.parameters()} == {dtype}
    synced = patch.apply_view_sync(wan, sync, cameras=cameras())
    seen = watch(wan, synced, 1)
    rounded = {k: v.to(dtype) for k, v in weights.items()}
    expected = published(rounded, 1, seen["stream"], seen["e"])
    torch.testing.assert_close(seen["read"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", KINDS)
def test_projector_of_zeros_samples_as_the_plain_model(wan, wan_weights, tmp_path, attention):
    path = write(tmp_path / "sync.safetensors", attention, wan_weights)
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    last = {"mvs_attn": "projector", "self_attn_mvs": "self_attn_mvs.o"}[attention]
    for key in weights:
        if f".{last}." in key:
            weights[key] = torch.zeros_like(weights[key])
    synced = patch.apply_view_sync(wan, as_model(weights), cameras=cameras())
    assert torch.equal(sample(synced), sample(wan))


@pytest.mark.parametrize("attention, name", KINDS.items())
def test_load_sync_reads_either_layout(wan, wan_weights, tmp_path, attention, name):
    path = write(tmp_path / "sync.safetensors", attention, wan_weights, "pipe.dit.")
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    sync = patch.load_sync(path)
    assert (sync.model.name, sync.model.dim, len(sync.model.blocks)) == (name, DIM, BLOCKS)
    assert sync.model.needs_cameras == (name == "SynCamMaster")
    assert sync.model.ignored == len(wan_weights())
    by_hand = patch.apply_view_sync(wan, as_model(weights), cameras=cameras())
    loaded = patch.apply_view_sync(wan, sync, cameras=cameras())
    assert torch.equal(sample(loaded), sample(by_hand))


def test_load_sync_refuses_files_that_can_run_code(tmp_path):
    path = tmp_path / "step20000.ckpt"
    torch.save({"blocks.0.mvs_attn.q.weight": torch.zeros(DIM, DIM)}, path)
    with pytest.raises(ValueError, match="'step20000.ckpt' can run code.*weights_only=True"):
        patch.load_sync(str(path))
