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
SIDE_BY_SIDE = (
    ("person:field", "lamp:field"),
    ("truck:field", "person:words", "truck:words", "lamp:words"),
)
"""What two processes of one thread learn, in about the same time: two threads in one would mostly wait
for each other."""


def learn(steps: int, folder: Path, jobs: list[str]) -> None:
    """In a process of its own."""
    in_comfyui.start()
    import subject_learning

    torch.set_num_threads(1)
    with torch.inference_mode():
        models = in_comfyui.tiny_models()
        for name, kind in (job.split(":") for job in jobs):
            case = subject_learning.case(name, models[1])
            subject_learning.learned(models, case, steps, kind == "field", folder)


def learn_side_by_side(steps: int, folder: Path) -> None:
    command = [sys.executable, __file__, "--steps", str(steps), "--keep", str(folder), "--learn"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, *jobs], env=environment) for jobs in SIDE_BY_SIDE]
    if any([process.wait() for process in running]):
        raise SystemExit("Learning failed: see above.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the truck alone, learned briefly")
    parser.add_argument("--keep", type=Path, help="folder of what is learned, to be used again")
    parser.add_argument("--steps", type=int, default=LEARNING, help="of learning, each")
    parser.add_argument("--learn", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.learn:
        return learn(chosen.steps, chosen.keep, chosen.learn)
    with tempfile.TemporaryDirectory() as passing:
        evaluate_all(chosen, chosen.keep or Path(passing))


def evaluate_all(chosen: argparse.Namespace, folder: Path) -> None:
    threads, began = torch.get_num_threads(), time.monotonic()
    earlier = set(folder.glob("*"))
    if not chosen.quick:
        learn_side_by_side(chosen.steps, folder)
    in_comfyui.start()
    import subject_page
    import subject_rows

    torch.set_num_threads(threads)  # the tests keep to two
    names, steps = subject_rows.NAMES, chosen.steps
    ways = (*subject_rows.ABLATION, *subject_rows.SHARES)
    if chosen.quick:
        names, steps, ways = ("truck",), QUICK_LEARNING, subject_rows.QUICK
    with torch.inference_mode():
        models = in_comfyui.tiny_models()
        found = {name: subject_rows.of_subject(name, ways, models, steps, folder) for name in names}
    kept = any(cost.file in earlier for f in found.values() for cost in f.costs.values())
    facts = {
        "date": datetime.date.today().isoformat(), "commit": evaluate.commit(),
        "machine": evaluate.machine(), "torch": torch.__version__,
        "minutes": (time.monotonic() - began) / 60, "steps": steps, "sampling": subject_rows.STEPS,
        "shown": "; ".join(n.replace("*", "") for n in subject_rows.SHOWN),
        "kept": " What was learned came from an earlier run of the same code." if kept else "",
    }  # fmt: skip
    text = subject_page.page(found, [w.name for w in subject_rows.ABLATION if w in ways], facts)
    if chosen.quick:
        evaluate.sys.stdout.write(text)
        return
    subject_rows.save(subject_rows.sheet(found))
    subject_page.PAGE.write_text(text, encoding="utf-8")
    evaluate.say(f"Written: {subject_page.PAGE.relative_to(evaluate.ROOT)}")


if __name__ == "__main__":
    main()
