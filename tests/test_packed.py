"""What the registry gets: all that a creator needs, nothing else, and nothing its scanners refuse."""

import ast
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import packing  # noqa: E402  (a module beside the tests)

ROOT = packing.ROOT
pytestmark = pytest.mark.skipif(not packing.COMFY.exists(), reason=packing.NONE_HERE)

CALLS = {"eval", "exec", "compile", "__import__", "print", "input", "breakpoint"}
MODULES = {
    "pickle", "dill", "joblib", "marshal", "shelve", "subprocess", "pip", "ctypes", "base64",
    "codecs", "socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib",
    "importlib", "runpy", "pty", "multiprocessing", "webbrowser", "winreg",
}  # fmt: skip
"""What runs other code, hides it, or talks to the network."""
ATTRIBUTES = {
    ("os", "system"), ("os", "popen"), ("os", "environ"), ("os", "getenv"), ("os", "putenv"),
    ("torch", "load"), ("torch", "hub"), ("np", "load"), ("numpy", "load"), ("sys", "modules"),
    ("yaml", "load"), ("shutil", "rmtree"),
}  # fmt: skip
ALLOWED = {
    # To speak through ComfyUI's server where one runs, without starting one by importing it.
    ("nodes/run.py", "sys.modules"),
    ("nodes/node_previews.py", "sys.modules"),
    # The one place that fetches, when a creator says so.
    ("models/fetch_checkpoint.py", "huggingface_hub"),
}
SCRIPT = re.compile(r"\beval\s*\(|\bnew\s+Function\b|document\.write|\bimport\s*\(|<script", re.I)
FOREIGN = re.compile(r"""["'`](?:https?:)?//(?!www\.w3\.org/)[^"'`]+""")
BLOB = re.compile(r"[A-Za-z0-9+/=]{400,}")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    file, said = packing.pack(tmp_path_factory.mktemp("packed"))
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/")]
        text = (".py", ".js", ".md", ".json", ".toml", ".txt")
        read = {n: archive.read(n).decode() for n in names if n.endswith(text)}
    return file, names, read, said


def test_validate_is_clean(packed):
    said = packed[3]
    assert "All validation checks passed" in said and "warning" not in said.lower()


def test_it_holds_what_a_creator_needs(packed):
    _, names, _, _ = packed
    needed = {
        "__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "CHANGELOG.md",
        "models/assets/performers.safetensors", "models/tiny/MODEL_CARD.md",
    }  # fmt: skip
    for pattern in (
        "nodes/*.py", "models/*.py", "js/*.js", "js/docs/*.md", "workflows/*.*", "locales/*/*.json",
        "subgraphs/*.json", "models/tiny/*/*.safetensors",
    ):  # fmt: skip
        needed |= {str(p.relative_to(ROOT).as_posix()) for p in ROOT.glob(pattern)}
    ours = set(packing.tracked(ROOT))
    assert sorted((needed & ours) - set(names)) == []
    assert len(needed & ours) > 150


def test_it_holds_nothing_else(packed):
    file, names, _, _ = packed
    beside = ("tests/", "docs/", ".", "dev.py", "CONTRIBUTING.md", "models/tiny/train")
    assert [n for n in names if n.startswith(beside)] == []
    kinds = {Path(n).suffix for n in names}
    assert kinds <= {".py", ".js", ".css", ".md", ".json", ".toml", ".txt", ".jpg", ".png",
                     ".safetensors", ""}  # fmt: skip
    assert [n for n in names if not Path(n).suffix] == ["LICENSE"]
    assert file.stat().st_size < 60e6


def used(tree: ast.AST) -> set[str]:
    """Modules that are imported, names that are called, attributes that are touched."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(f"{node.func.id}()")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found


def findings(name: str, code: str) -> list[str]:
    forbidden = (
        MODULES
        | {f"{call}()" for call in CALLS}
        | {".".join(pair) for pair in ATTRIBUTES}
        | {"huggingface_hub"}
    )
    return sorted(x for x in used(ast.parse(code)) & forbidden if (name, x) not in ALLOWED)


def test_python_holds_nothing_that_scanners_refuse(packed):
    read = packed[2]
    scripts = {n: code for n, code in read.items() if n.endswith(".py")}
    assert len(scripts) > 100
    assert {n: found for n, code in scripts.items() if (found := findings(n, code))} == {}
    # No hidden code: no long runs of letters without a space, no escapes in place of words.
    assert [n for n, code in scripts.items() if BLOB.search(code) or r"\x6" in code] == []


@pytest.mark.parametrize(
    "code",
    ["eval('1')", "import subprocess", "from os import environ", "import os; os.environ['A']",
     "import pickle", "torch.load('a')", "__import__('os')", "from base64 import b64decode",
     "import huggingface_hub", "import urllib.request"],
)  # fmt: skip
def test_the_scan_finds(code):
    assert findings("nodes/views.py", code)


def test_scripts_of_the_page_run_nothing_foreign(packed):
    read = packed[2]
    scripts = {n: code for n, code in read.items() if n.endswith(".js")}
    assert scripts
    for name, code in scripts.items():
        assert not SCRIPT.search(code), name
        assert not FOREIGN.search(code), name
        assert not BLOB.search(code), name


def test_no_node_takes_a_free_path(packed):
    """Text inputs are prefixes below ComfyUI's output folder (checked by the nodes), or no paths."""
    read = packed[2]
    said = re.compile(r'io\.String\.Input\(\s*"(\w+)"')
    asked = [i for n, code in read.items() if n.startswith("nodes/") for i in said.findall(code)]
    assert asked
    paths = {i for i in asked if re.search(r"path|dir|folder|file|url|address|location", i)}
    assert paths == {"filename_prefix"}
    safe = {n for n, code in read.items() if "get_save_image_path" in code}
    for name, code in read.items():
        if '"filename_prefix"' in code and name.startswith("nodes/"):
            near = {f"nodes/{module}.py" for module in re.findall(r"from \.(\w+) import", code)}
            assert ({name} | near) & safe, name


def test_requirements_leave_the_host_alone():
    """Loose ranges of small things; nothing that the host chooses for itself, no second list."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [x for x in lines if x and not x.startswith("#")] == project["dependencies"]
    extras = [x for many in project["optional-dependencies"].values() for x in many]
    for requirement in [*project["dependencies"], *extras]:
        name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        assert name not in {"torch", "torchvision", "numpy", "transformers", "pillow", "xformers"}
        assert not re.search(r"==|<|~=|@|;", bound), requirement


def test_what_the_host_may_lack_is_imported_where_it_is_needed(packed):
    """A missing optional package must not take the pack down, nor cost time at ComfyUI's start."""
    optional = {"cv2", "trimesh", "numba", "diffusers", "controlnet_aux", "anny", "gsplat", "triton",
                "huggingface_hub", "tinycudann"}  # fmt: skip
    # Modules that are made for one of them, and say so in their name.
    made_for = re.compile(r"_(numba|triton)$")
    for name, code in packed[2].items():
        if not name.endswith(".py") or made_for.search(Path(name).stem):
            continue
        for node in ast.parse(code).body:  # the module's own level alone
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not used(ast.Module([node], [])) & optional, name
                inside = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not [module for module in inside if made_for.search(module)], name
