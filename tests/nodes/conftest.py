"""Node tests run inside the real ComfyUI (its tree: COMFYUI_DIR), on the CPU."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

tree = Path(os.environ.get("COMFYUI_DIR", ""))

if not (tree / "comfy").is_dir():
    # `python dev.py test` sets it; without ComfyUI this folder is left out as one line.
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(tree))
    # Arguments must be settled before anything imports comfy.model_management.
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes  # noqa: F401  (ComfyUI's own, so that folder_paths and friends are set up)

    # Notes go out through ComfyUI's server, which wants its own package `utils`, as main.py imports it;
    # ComfyUI's nodes.py has put comfy/, with its utils.py, before it on the path.
    if not hasattr(sys.modules.get("utils"), "__path__"):
        sys.modules.pop("utils", None)
        sys.path.insert(0, str(tree))
        import utils.install_util  # noqa: F401

        sys.path.pop(0)

    # By its path, so that nothing else beside it can be taken for a module.
    spec = importlib.util.spec_from_file_location(
        "small_checkpoints", Path(__file__).resolve().parents[1] / "small_checkpoints.py"
    )
    sys.modules["small_checkpoints"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["small_checkpoints"])


@pytest.fixture(autouse=True)
def _inference_mode():
    """As in ComfyUI, every node runs in inference mode."""
    import torch

    with torch.inference_mode():
        yield


TINY_DIM, TINY_BLOCKS = 128, 2


@pytest.fixture(scope="session")
def randomise():
    """Weights that keep signals near unit size, so that an error can't hide."""
    import torch

    def of(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
        weights = {}
        for n, (name, value) in enumerate(module.state_dict().items()):
            fan_in = value[0].numel() if value.ndim > 1 else TINY_DIM
            generator = torch.Generator().manual_seed(seed + n)
            weights[name] = torch.randn(value.shape, generator=generator) * fan_in**-0.5
            if "norm" in name and name.endswith("weight"):
                weights[name] += 1
        return weights

    return of


@pytest.fixture(scope="session")
def wan_weights(randomise):
    """Random weights of a tiny Wan of 2 blocks."""
    import comfy.ldm.wan.model
    import comfy.ops
    import torch

    def of(in_dim: int = 48) -> dict[str, torch.Tensor]:
        dit = comfy.ldm.wan.model.WanModel(
            in_dim=in_dim, dim=TINY_DIM, ffn_dim=256, num_heads=1, num_layers=TINY_BLOCKS,
            operations=comfy.ops.disable_weight_init, dtype=torch.float32,
        )  # fmt: skip
        return randomise(dit, 0)

    return of


@pytest.fixture(scope="session")
def wan(wan_weights):
    """A tiny random Wan MODEL of 48 input channels, through ComfyUI's own detection."""
    import comfy.sd
    import torch

    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(wan_weights())


@pytest.fixture(scope="session")
def make_sync(randomise):
    """Random trained sync weights for the tiny Wan, as they travel on the socket."""
    import comfy.model_patcher
    import comfy.ops
    import torch
    from turnaround.models.view_sync import ViewSync

    def of(blocks=range(TINY_BLOCKS), dim: int = TINY_DIM, seed: int = 1000):
        layers = ViewSync(dim, blocks, operations=comfy.ops.manual_cast)
        layers.load_state_dict(randomise(layers, seed))
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(layers, load_device=cpu, offload_device=cpu)

    return of


@pytest.fixture
def sync(make_sync):
    return make_sync()


@pytest.fixture
def referring(randomise):
    """Sync weights for the tiny Wan whose blocks also read a reference as text."""
    import comfy.model_patcher
    import comfy.ops
    import torch
    from turnaround.models.view_sync import ViewSync

    blocks = range(TINY_BLOCKS)
    layers = ViewSync(TINY_DIM, blocks, blocks, operations=comfy.ops.manual_cast)
    layers.load_state_dict(randomise(layers, 1000))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(layers, load_device=cpu, offload_device=cpu)
