"""Boots the real ComfyUI with the pack once for all tests of this folder."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_dev():
    spec = importlib.util.spec_from_file_location("turnaround_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dev():
    return load_dev()


@pytest.fixture(scope="session")
def server(dev):
    tree = os.environ.get("COMFYUI_DIR")
    if not tree or not dev.venv_python().exists():
        pytest.skip("no ComfyUI here: run the tests through `python dev.py test`")
    with dev.running_host(Path(tree)) as host:
        yield host


def workflow_files() -> list[Path]:
    return sorted((ROOT / "workflows").glob("*.json"))
