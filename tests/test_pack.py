"""Promises of the whole pack that need no ComfyUI: layers, forbidden calls, sizes, versions."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACK_FILES = sorted([*(ROOT / "models").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")])
HOST_MODULES = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview",
    "node_helpers", "nodes", "server", "execution",
}  # fmt: skip
FORBIDDEN_CALLS = {"print", "eval", "exec", "__import__"}
FORBIDDEN_MODULES = {"pickle", "subprocess", "shelve", "marshal", "socket", "urllib", "requests"}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", PACK_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_the_promises(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "every module says which stage it is"
    modules = imported(tree)
    assert not modules & FORBIDDEN_MODULES
    if path.is_relative_to(ROOT / "models"):
        assert not modules & HOST_MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS
        if isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda"
            owner = getattr(node.func.value, "id", "")
            assert (owner, node.func.attr) not in {("torch", "load"), ("os", "system")}


def test_pack_imports_without_comfyui():
    """`models/` and the package itself load in a bare torch environment."""
    import turnaround
    from turnaround.models import cameras, geometry, performer, view_sync, views  # noqa: F401

    assert turnaround.WEB_DIRECTORY == "./js"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    top = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert top[1] == project["version"]


def test_every_node_has_a_help_page():
    ids = [
        i
        for f in (ROOT / "nodes").glob("*.py")
        for i in re.findall(r'node_id="(Turnaround\w+)"', f.read_text())
    ]
    assert ids
    assert [i for i in ids if not (ROOT / "js" / "docs" / f"{i}.md").is_file()] == []


def test_weights_and_pictures_stay_small():
    weights = [*(ROOT / "models").rglob("*.safetensors")]
    assert sum(f.stat().st_size for f in weights) < 60e6
    for kind in ("*.jpg", "*.png"):
        for folder in ("workflows", "docs", "js", "models"):
            for picture in (ROOT / folder).rglob(kind):
                assert picture.stat().st_size < 300_000, picture
