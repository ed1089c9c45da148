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
import time
from pathlib import Path

import evaluate
import in_comfyui
import torch

LEARNING, QUICK_LEARNING = 400, 30
"""Steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the truck alone, learned briefly")
    parser.add_argument("--keep", type=Path, help="folder of what is learned, to be used again")
    parser.add_argument("--steps", type=int, default=LEARNING, help="of learning, each")
    chosen = parser.parse_args()
    threads, began = torch.get_num_threads(), time.monotonic()
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
        found = {
            name: subject_rows.of_subject(name, ways, models, steps, chosen.keep) for name in names
        }
    kept = any(cost.kept for f in found.values() for cost in f.costs.values())
    facts = {
        "date": datetime.date.today().isoformat(), "commit": evaluate.commit(),
        "machine": evaluate.machine(), "torch": torch.__version__, "threads": threads,
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
