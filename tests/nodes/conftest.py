"""Node tests run inside the real ComfyUI (its tree: COMFYUI_DIR), on the CPU."""

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


@pytest.fixture(autouse=True)
def _inference_mode():
    """As in ComfyUI, every node runs in inference mode."""
    import torch

    with torch.inference_mode():
        yield
