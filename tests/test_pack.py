"""Promises of the whole pack that need no ComfyUI: layers, forbidden calls, sizes, versions."""

import ast
import json
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


HELP = ROOT / "js" / "docs"
HELP_HEADINGS = ("Inputs", "Outputs", "Recipe", "Common mistakes")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def help_problems(text: str, node_id: str, inputs: list[str], outputs: list[str]) -> list[str]:
    """What a help page lacks: its picture, a heading, the name of an input or output."""
    first, *parts = re.split(r"^## (.+)\n", text, flags=re.M)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    lacks = [f"no '## {h}'" for h in HELP_HEADINGS if not sections.get(h, "").strip()]
    if [file for _, file in PICTURE.findall(first)] != [f"{node_id}.jpg"]:
        lacks.append(f"not one picture, {node_id}.jpg, above the first heading")
    for caption, file in PICTURE.findall(text):
        if not (HELP / file).is_file() or (HELP / file).stat().st_size > 60_000:
            lacks.append(f"{file} is not there, or larger than 60 kB")
        if len(caption.split()) < 4:
            lacks.append(f"'{caption}' does not say what {file} shows")
    for heading, names in (("Inputs", inputs), ("Outputs", outputs)):
        said = sections.get(heading, "")
        lacks += [f"{heading}: no **{name}**" for name in names if f"**{name}**" not in said]
    return lacks


def test_help_pages_have_a_picture_all_headings_and_all_names():
    nodes = json.loads((ROOT / "tests" / "golden" / "nodes.json").read_text())
    lacks = {
        node_id: help_problems(
            (HELP / f"{node_id}.md").read_text(),
            node_id,
            list(node["inputs"]),
            [name for name, _ in node["outputs"]],
        )
        for node_id, node in nodes.items()
    }
    assert {node_id: found for node_id, found in lacks.items() if found} == {}


def test_help_pictures_are_used_and_light():
    shown = {file for page in HELP.glob("*.md") for _, file in PICTURE.findall(page.read_text())}
    pictures = [p for p in HELP.iterdir() if p.suffix != ".md"]
    assert [p.name for p in pictures if p.name not in shown] == []
    assert sum(p.stat().st_size for p in pictures) < 3.5e6


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("![", "[", "not one picture"),
        ("## Recipe", "## Use", "no '## Recipe'"),
        ("**fov**", "fov", "Inputs: no **fov**"),
        ("- **rig**: the cameras", "- the cameras", "Outputs: no **rig**"),
    ],
)
def test_help_page_that_lacks_something_is_found(old, new, problem):
    page = (HELP / "TurnaroundRigEditor.md").read_text()
    check = ("TurnaroundRigEditor", ["cameras", "fov"], ["rig"])
    assert help_problems(page, *check) == []
    assert problem in "; ".join(help_problems(page.replace(old, new), *check))


def test_weights_and_pictures_stay_small():
    weights = [*(ROOT / "models").rglob("*.safetensors")]
    assert sum(f.stat().st_size for f in weights) < 60e6
    for kind in ("*.jpg", "*.png"):
        for folder in ("workflows", "docs", "js", "models"):
            for picture in (ROOT / folder).rglob(kind):
                assert picture.stat().st_size < 300_000, picture
