"""The pack as the registry gets it: `comfy node pack` on the tracked files, as they are now."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMFY = Path(sys.executable).with_name("comfy" + (".exe" if os.name == "nt" else ""))
NONE_HERE = f"comfy-cli is not installed beside {sys.executable}"


def comfy(*arguments: str, home: Path, cwd: Path) -> str:
    """Run comfy-cli with settings of its own, so that a developer's stay as they are."""
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    done = subprocess.run(
        [str(COMFY), "--skip-prompt", *arguments], cwd=cwd, env=environment, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def repository(source: Path, target: Path, files: list[str]) -> Path:
    """A fresh git repository of some files of another folder."""
    for name in files:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
    who = ("-c", "user.name=pack", "-c", "user.email=pack@example.invalid")
    for step in (["init", "-q"], ["add", "-A", "-f"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *step], cwd=target, check=True)
    return target


def tracked(folder: Path) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return [name for name in listed.stdout.split("\0") if name]


def pack(folder: Path) -> tuple[Path, str]:
    """node.zip, and what `comfy node validate` says of what is in it, in an empty folder."""
    copy = repository(ROOT, folder / "pack", tracked(ROOT))
    said = comfy("node", "validate", home=folder / "home", cwd=copy)
    comfy("node", "pack", home=folder / "home", cwd=copy)
    return copy / "node.zip", said
