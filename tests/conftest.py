"""Loads the pack by path under one fixed name, as ComfyUI does.

The repository's root must not be on sys.path: its folder `nodes` would hide ComfyUI's `nodes.py`.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ALIAS = "turnaround"

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

if ALIAS not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        ALIAS, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[ALIAS] = module
    spec.loader.exec_module(module)

torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread():
    """For layers that are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
