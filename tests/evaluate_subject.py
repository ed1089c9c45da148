"""What a learned subject looks like from cameras that it was not learned from: `.venv/bin/python
tests/evaluate_subject.py [--quick] [--keep FOLDER]`.

A person who stands still, a truck and a lamp (tests/subjects.py: every camera is exact) are learned on
Turnaround-Tiny from 30 pictures each, before rooms that are other ones in every picture; then sampled
from 8 cameras between them, with nothing known of the surroundings, and before rooms that were never
seen. Rows: the model as it is; words and a LoRA learned alone; fields; and one part of MVCustom after
the other on top. The full run writes docs/SUBJECT.md and docs/pictures/subject.jpg; --quick (the truck, a
few steps of learning) only shows the tables. With --keep what is learned is kept in a folder, and used
again as long as the code that learns is the same.
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

LEARNING, QUICK_LEARNING = 400, 30
"""Steps."""
NAMES = ("person", "truck", "lamp")


def evaluate_one(name: str, steps: int, quick: bool, folder: Path) -> None:
    """In a process of its own, of one thread: two threads would mostly wait for each other."""
    in_comfyui.start()
    import subject_rows

    torch.set_num_threads(1)
    ways = subject_rows.QUICK if quick else (*subject_rows.ABLATION, *subject_rows.SHARES)
    with torch.inference_mode():
        found = subject_rows.of_subject(name, ways, in_comfyui.tiny_models(), steps, folder)
    subject_rows.save_found(folder, name, found)


def evaluate_side_by_side(names: tuple[str, ...], steps: int, quick: bool, folder: Path) -> None:
    command = [sys.executable, __file__, "--steps", str(steps), "--keep", str(folder)]
    command += ["--quick"] if quick else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, "--only", name], env=environment) for name in names]
    if any([process.wait() for process in running]):
        raise SystemExit("Not all subjects could be evaluated: see above.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the truck alone, learned briefly")
    parser.add_argument("--keep", type=Path, help="folder of what is learned, to be used again")
    parser.add_argument("--steps", type=int, default=LEARNING, help="of learning, each")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    steps = QUICK_LEARNING if chosen.quick else chosen.steps
    if chosen.only:
        return evaluate_one(chosen.only, steps, chosen.quick, chosen.keep)
    with tempfile.TemporaryDirectory() as passing:
        evaluate_all(steps, chosen.quick, chosen.keep or Path(passing))


def evaluate_all(steps: int, quick: bool, folder: Path) -> None:
    began, earlier = time.monotonic(), set(folder.glob("*"))
    names = NAMES[1:2] if quick else NAMES
    evaluate_side_by_side(names, steps, quick, folder)
    in_comfyui.start()
    import subject_page
    import subject_rows

    found = {name: subject_rows.load_found(folder, name) for name in names}
    kept = any(cost.file in earlier for f in found.values() for cost in f.costs.values())
    facts = {
        "date": datetime.date.today().isoformat(), "commit": evaluate.commit(),
        "machine": evaluate.machine(), "torch": torch.__version__,
        "minutes": (time.monotonic() - began) / 60, "steps": steps, "sampling": subject_rows.STEPS,
        "shown": "; ".join(n.replace("*", "") for n in subject_rows.SHOWN),
        "kept": " What was learned came from an earlier run of the same code." if kept else "",
    }  # fmt: skip
    ways = subject_rows.QUICK if quick else subject_rows.ABLATION
    text = subject_page.page(found, [way.name for way in ways], facts)
    if quick:
        evaluate.sys.stdout.write(text)
        return
    subject_rows.save(subject_rows.sheet(found))
    subject_page.PAGE.write_text(text, encoding="utf-8")
    evaluate.say(f"Written: {subject_page.PAGE.relative_to(evaluate.ROOT)}")


if __name__ == "__main__":
    main()
