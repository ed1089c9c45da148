"""What a distilled avatar looks like from cameras, at moments and in motions that it was not learned
from: `.venv/bin/python tests/evaluate_avatar.py [--quick] [--steps N]`.

Synthetic performers (every picture is exact), views that Turnaround-Tiny generates, and a real man from
four calibrated cameras. Rows are learned two at a time, in processes of one thread. The full run writes
docs/AVATAR.md and docs/pictures/avatar.jpg; --quick (two rows, a few steps) only shows the tables.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import evaluate
import in_comfyui
import torch

AT_ONCE = 2
"""Rows learned side by side."""
SCENES = ("kira", "leo", "coarse", "bulging", "walk", "generated", "real")


def write_scene(name: str, folder: Path) -> None:
    import avatar_scenes

    if name == "real":
        from turnaround_dev import ensure_real_clip

        scene = avatar_scenes.real(ensure_real_clip())
    elif name == "generated":
        amount = evaluate.Amount(clips=1)
        scene = avatar_scenes.generated("kira", amount, in_comfyui.tiny_models())
    elif name == "coarse":
        scene = avatar_scenes.synthetic("kira", samples=1)
    elif name == "walk":
        scene = avatar_scenes.synthetic("leo", motion="walk", fps=16.0)
    elif name == "bulging":
        scene = avatar_scenes.synthetic("kira", bulges=True)
    else:
        scene = avatar_scenes.synthetic(name)
    scene.save(folder / f"{name}.safetensors")


def evaluate_one(name: str, steps: int | None, folder: Path) -> None:
    """A scene or a row, in a process of its own."""
    in_comfyui.start()
    torch.set_num_threads(1)
    if name in SCENES:
        with torch.inference_mode():
            return write_scene(name, folder)
    import avatar_rows
    import avatar_scenes

    way = next(way for way in avatar_rows.WAYS if way.name == name)
    scene = avatar_scenes.load(folder / f"{way.scene}.safetensors")
    found, pictures = avatar_rows.of_way(way, scene, steps)
    avatar_rows.save_found(folder, way, found, pictures)
    told = {group: round(s["psnr"], 2) for group, s in found.scores.items()}
    evaluate.say(f"{name}: {told}, {found.seconds:.0f} s")


def side_by_side(names: list[str], steps: int | None, folder: Path) -> list[str]:
    """Each in a process of its own, so many at a time; gives those that failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--folder", str(folder)]
    command += [] if steps is None else ["--steps", str(steps)]
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            running[name] = subprocess.Popen([*command, "--only", name], env=environment)
        time.sleep(0.2)
        for name in [n for n, process in running.items() if process.poll() is not None]:
            failed += [name] if running.pop(name).returncode else []
    return failed


def evaluate_all(quick: bool, steps: int | None, folder: Path) -> None:
    began = time.monotonic()
    in_comfyui.start()
    import avatar_page
    import avatar_rows

    ways = list(avatar_rows.QUICK if quick else avatar_rows.WAYS)
    scenes = [name for name in SCENES if any(way.scene == name for way in ways)]
    failed = side_by_side(scenes, steps, folder)
    ways = [way for way in ways if way.scene not in failed]
    steps = steps or (avatar_rows.QUICK_STEPS if quick else None)
    failed += side_by_side([way.name for way in ways], steps, folder)
    loaded = {
        way.name: avatar_rows.load_found(folder, way) for way in ways if way.name not in failed
    }
    facts = {
        "date": datetime.date.today().isoformat(), "commit": evaluate.commit(),
        "machine": evaluate.machine(), "torch": torch.__version__,
        "minutes": (time.monotonic() - began) / 60, "shown": avatar_page.caption(set(loaded)),
    }  # fmt: skip
    text = avatar_page.page({name: found for name, (found, _) in loaded.items()}, facts)
    picture = avatar_page.sheet({name: pictures for name, (_, pictures) in loaded.items()}, folder)
    if quick:
        evaluate.sys.stdout.write(text)
    else:
        avatar_page.save(picture)
        avatar_page.PAGE.write_text(text, encoding="utf-8")
        evaluate.say(f"Written: {avatar_page.PAGE.relative_to(evaluate.ROOT)}")
    if failed:
        raise SystemExit(f"Could not be evaluated, see above: {', '.join(failed)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rows, learned briefly")
    parser.add_argument("--steps", type=int, help="of learning, each; default: the preset's")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        return evaluate_one(chosen.only, chosen.steps, chosen.folder)
    with tempfile.TemporaryDirectory() as passing:
        evaluate_all(chosen.quick, chosen.steps, chosen.folder or Path(passing))


if __name__ == "__main__":
    main()
