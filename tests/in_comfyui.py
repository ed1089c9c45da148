"""For the eval and bench scripts: the pack and its tiny models inside a real ComfyUI, in process."""

import importlib.util
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def start() -> None:
    """ComfyUI's tree from the cache, on CUDA where there is some, and the pack as `turnaround`."""
    dev = _load("turnaround_dev", HERE.parent / "dev.py")
    _load("turnaround_tests", HERE / "conftest.py")
    sys.path.insert(0, str(dev.ensure_host()))
    # Arguments must be settled before anything imports comfy.model_management.
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import nodes  # noqa: F401  (ComfyUI's own, so that folder_paths and friends are set up)


def tiny_models():
    """Turnaround-Tiny as the native loaders give it: model, VAE, sync weights."""
    import comfy.sd
    import comfy.utils
    from turnaround.nodes import embedded, patch

    dit, vae, sync = (
        embedded.TINY / folder / f"turnaround_tiny_{name}.safetensors"
        for folder, name in (("diffusion_models", "dit"), ("vae", "vae"), ("model_patches", "sync"))
    )
    return (
        comfy.sd.load_diffusion_model(str(dit)),
        comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae))),
        patch.load_sync(str(sync)),
    )
