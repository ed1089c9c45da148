"""The trainers' commands: `python models/tiny scenes | vae | dit | people | human --help`.

Loads the pack by path, under one name, without ComfyUI; needs torch, numpy, einops, safetensors,
opencv-python and, for the DiT, diffusers.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = {
    "scenes": "render_scenes",
    "vae": "train_vae",
    "dit": "train_dit",
    "people": "human_pool",
    "human": "train_human",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in MODULES:
        sys.exit(f"Usage: python models/tiny {{{','.join(MODULES)}}} [options]")
    # Neither this folder nor the repository's root: their file names would hide other modules.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() not in (Path(__file__).parent, ROOT)]
    spec = importlib.util.spec_from_file_location(
        "turnaround", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["turnaround"] = package
    spec.loader.exec_module(package)
    name = MODULES[sys.argv.pop(1)]
    runpy.run_module(f"turnaround.models.tiny.{name}", run_name="__main__", alter_sys=False)


main()
