"""What view sync does to the pictures: `.venv/bin/python tests/evaluate_sync.py [--quick]`.

The people, motions and scores are those of tests/evaluate.py (no training saw them); everything of a
clip starts from the same noise. Three tables: who looks at whom; how many views are sampled together
(as MVAnimate's Table VI); what the reference does. With `--dit FILE`, a model that makes every view by
itself from normal maps alone, a fourth: the training-free form on it. The full run writes docs/SYNC.md
and docs/pictures/sync.jpg; --quick (one clip, four views, five frames) only shows the tables.
"""

import argparse
import datetime
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import evaluate
import in_comfyui
import torch
import torch.nn.functional as F
from torch import Tensor

CHOSEN = (0, 3)
"""Of evaluate.CLIPS: both people, one motion each."""
AMOUNT, QUICK = evaluate.Amount(2, 8, 5), evaluate.Amount(1, 4, 5)
ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "SYNC.md", ROOT / "docs" / "pictures" / "sync.jpg"
SMALL, SMALL_SOURCE = (128, 160), (256, 320)
"""Width and height of the views that the model of --dit was trained with, and of its clip."""
INNER = 2
"""Pixels from the performer's outline that count as detail: inside, not the outline itself."""
COLUMNS = {
    "person": ("PSNR ↑", 2), "behind": ("beyond 90° ↑", 2), "ssim": ("SSIM ↑", 3),
    "detail": ("detail %", 1), "flicker": ("flicker ×100 ↓", 2), "cross": ("cross-view ×100 ↓", 2),
    "change": ("change of it %", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A way of sampling all views."""

    name: str
    trained: bool = True
    strength: float = 1.0
    settings: dict = field(default_factory=dict)
    """Of apply_view_sync."""
    reference: bool = True
    together: int = 0
    """Views that are sampled together; 0 = all."""


OFF = Row("no sync", strength=0.0)
MODES = (
    OFF,
    Row("frame"),
    Row("dense", settings={"mode": "dense"}),
    Row("weighted, by angle", settings={"mode": "weighted"}),
    Row("training-free, frame", trained=False, reference=False),
    Row("training-free, dense", trained=False, settings={"mode": "dense"}, reference=False),
    Row("training-free, frame, strength 3", trained=False, strength=3.0, reference=False),
    Row("training-free, frame, reference as view", trained=False),
)
TOGETHER = tuple(Row(f"{n} view(s) together", together=n) for n in (1, 2, 4, 8))
REFERENCES = (
    Row("as view and as text"),
    Row("as view", settings={"reference_is_text": False}),
    Row("as text", settings={"reference_is_seen": False}),
    Row("none", reference=False),
)
SINGLE = (
    OFF,
    Row("training-free, frame", trained=False),
    Row("training-free, dense", trained=False, settings={"mode": "dense"}),
    Row("training-free, frame, strength 3", trained=False, strength=3.0),
)


def groups(views: int, together: int) -> list[list[int]]:
    """All views in groups of so many, spread evenly: two of them stand opposite each other."""
    apart = max(1, views // (together or views))
    return [list(range(first, views, apart)) for first in range(apart)]


def detail(
    result: Tensor,  # [V, F, 3, H, W]
    truth: Tensor,
    masks: Tensor,  # [V, F, H, W]
) -> float:
    """Gradient energy inside the performer, in percent of the truth's: blur lowers it."""
    # Shrunk, so that the outline, which is where the masks say, does not count.
    outside = F.max_pool2d((masks < 0.5).float(), 2 * INNER + 1, 1, INNER)
    inside = (outside == 0)[:, :, None, 1:, 1:]

    def energy(frames: Tensor) -> float:
        down = (frames[..., 1:, 1:] - frames[..., :-1, 1:]).square()
        across = (frames[..., 1:, 1:] - frames[..., 1:, :-1]).square()
        return float(((down + across) * inside).double().sum())

    return 100 * energy(result) / energy(truth)


@dataclass(frozen=True)
class Told:
    """A clip, encoded once for all rows."""

    task: evaluate.Task
    conditions: Tensor  # [V, 32, T, h, w]
    reference: Tensor  # [1, 16, T, h, w]


def told(task: evaluate.Task, vae, colours: bool) -> Told:
    """What Multi-View Conditioning makes of a clip; without colours, of normal maps alone."""
    from turnaround.models.geometry import BACKGROUND
    from turnaround.nodes import conditioning

    partial = task.partial
    if not colours:
        plain = torch.full(partial.frames.shape, BACKGROUND)
        partial = replace(partial, frames=plain)
    positive, *_, reference = conditioning.MultiViewConditioning.execute(
        vae, partial, task.normals, reference=task.source
    ).args
    return Told(task, positive[0][1]["concat_latent_image"], reference["samples"])


def sampled(given: Told, row: Row, model, sync) -> Tensor:  # [V, 16, T, h, w]
    """The latents of one row, group by group; the noise of a view is the same in every row."""
    import comfy.sample
    from turnaround.models.view_weights import largest_is_one, share_by_angle, weight_of_share
    from turnaround.nodes import patch

    result = torch.zeros_like(given.conditions[:, :16])
    for group in groups(len(result), row.together):
        settings = dict(row.settings)
        if settings.get("mode") == "weighted":
            share = share_by_angle(given.task.rig.select(group))
            settings["weights"] = largest_is_one(weight_of_share(share, 0.9))
        if row.reference:
            settings["reference"] = given.reference
        patched = model
        if row.strength > 0 or row.reference:
            patched = patch.apply_view_sync(
                model, sync if row.trained else None, strength=row.strength, **settings
            )
        empty = torch.zeros_like(result[group])
        noise = comfy.sample.prepare_noise(empty, evaluate.SEED, group)
        conditions = {"concat_latent_image": given.conditions[group]}
        text = [[torch.zeros(1, 1, 4096), conditions]]
        result[group] = comfy.sample.sample(
            patched, noise, evaluate.STEPS, 1.0, "euler", "simple", text, text, empty,
            seed=evaluate.SEED, disable_pbar=True,
        )  # fmt: skip
    return result


def measured(given: Told, row: Row, models) -> tuple[dict[str, float], Tensor]:
    from turnaround.nodes import views

    model, vae, sync = models
    latents = sampled(given, row, model, sync)
    frames = views.decode_views(vae, latents.split(1)).float()
    found = evaluate.scores(frames, given.task)
    truth = given.task.truth
    return found | {"detail": detail(frames, truth.frames, truth.masks)}, frames


def table(rows: tuple[Row, ...], found: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: means over the clips; the change of the cross-view error clip by clip."""
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    first = rows[0].name
    for row in rows:
        changes = [100 * (c[row.name]["cross"] / c[first]["cross"] - 1) for c in found]
        cells = []
        for key, (_, digits) in COLUMNS.items():
            if key == "change":
                spread = f" ± {statistics.stdev(changes):.1f}" if len(changes) > 1 else ""
                known = f"{statistics.mean(changes):+.{digits}f}{spread}"
                cells.append("" if row is rows[0] else known)
            else:
                mean = statistics.mean(c[row.name][key] for c in found)
                cells.append(f"{mean:.{digits}f}")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_clip(n: int, amount: evaluate.Amount, rows, models, colours=True):
    """Scores of all rows for one clip, and a middle frame of every view for some of them."""
    performer, motion = evaluate.CLIPS[n]
    evaluate.say(f"{performer} {motion}")
    task = evaluate.synthetic_task(performer, motion, evaluate.FIRST_CLOTHES + n, amount)
    given, scores, shown = told(task, models[1], colours), {}, {}
    for row in rows:
        began = time.monotonic()
        scores[row.name], frames = measured(given, row, models)
        shown[row.name] = frames[:, frames.shape[1] // 2]
        figures = ", ".join(f"{k} {scores[row.name][k]:.2f}" for k in ("person", "cross", "detail"))
        evaluate.say(f"  {row.name}: {figures} ({time.monotonic() - began:.0f} s)")
    shown["the truth"] = task.truth.frames[:, task.truth.frames.shape[1] // 2]
    return scores, shown


def single_view_scores(path: Path, amount: evaluate.Amount, models):
    """The training-free form on a model that never saw two views of a scene."""
    import comfy.sd

    evaluate.SIZE, evaluate.SOURCE_SIZE = SMALL, SMALL_SOURCE
    single = (comfy.sd.load_diffusion_model(str(path)), *models[1:])
    rows = tuple(replace(row, reference=False) for row in SINGLE)
    chosen = CHOSEN[: amount.clips]
    clips = [of_clip(n, amount, rows, single, colours=False) for n in chosen]
    return rows, [scores for scores, _ in clips], clips[0][1]


def sheet(shown: dict[str, Tensor], names: list[str]) -> Tensor:  # [3, rows H, views W]
    return torch.cat([torch.cat(list(shown[name].cpu()), dim=2) for name in names], dim=1)


SINGLE_WORDS = """
## A model that never saw several views

The training-free form asks nothing of a model but that its self-attention carries looks from one
place to another. To see that at work, a Turnaround-Tiny was trained further on single views with their
**colours taken away**: it makes up clothes from noise, in every view other ones. It is not part of
the pack (views of 128x160, 1,943 steps, forty minutes on one thread, from the weights of the first
stage). No reference; the same noise in every row.

{table}

![The colours that every view makes up](pictures/sync.jpg)

*From top to bottom: {names}. One column a view.*
"""


def page(tables: dict[str, str], single: str, amount: evaluate.Amount, minutes: float) -> str:
    people = ", ".join(" ".join(evaluate.CLIPS[n]) for n in CHOSEN[: amount.clips])
    return f"""# What view sync does

Written by `tests/evaluate_sync.py`, everything in one run; not edited by hand.
{datetime.date.today().isoformat()}, commit {evaluate.commit()}, {evaluate.machine()}, torch
{torch.__version__}, {minutes:.0f} minutes. People, motions and clothes that no training saw ({people}),
{amount.views} views x {amount.frames} frames, {evaluate.STEPS} steps, means over the clips.

*cross-view* is the difference between the colours that two views give to the same surface point;
*change of it* is against the first row, clip by clip, ± its standard deviation. Blur lowers it too:
so *detail* says how much gradient energy is left inside the performer, in percent of the truth's.
The other columns are those of [SCOREBOARD.md](SCOREBOARD.md). Training-free rows go without reference
but for the last one.

## Who looks at whom (Turnaround-Tiny, 192x240)

{tables["modes"]}

## Views sampled together (trained, frame)

All eight views are made in every row, in groups of so many, spread evenly around the performer (two
views stand opposite each other, as in MVAnimate, whose Table VI has FVD 159.7 with 1 and 132.9 with 8
views).

{tables["together"]}

## What the reference does

{tables["references"]}
{single}
## What it means

Turnaround-Tiny is told so much about every view (colours, normals, a guessed far side) that little is
left to agree on, and its self-attention is nearly idle. So neither the modes nor the number of views
nor the reference move its pictures much, and differences below the spread are noise. Without sync
weights, a clean reference among the views does harm: it stands elsewhere in the picture than they do,
and this model's attention goes by place. A large model that makes up detail is another case; it could
not be tried here.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dit", type=Path, help="a model of single views, for the last table")
    parser.add_argument("--quick", action="store_true", help="one clip, 4 views, 5 frames")
    args = parser.parse_args()
    amount = QUICK if args.quick else AMOUNT
    threads, began = torch.get_num_threads(), time.monotonic()
    in_comfyui.start()
    torch.set_num_threads(threads)  # the tests keep to two
    sets = {"modes": MODES, "together": TOGETHER, "references": REFERENCES}
    # The row of all settings as they are has several names, and is made once.
    same = {row.name: "frame" for row in (TOGETHER[-1], REFERENCES[0])}
    rows = [row for kind in sets.values() for row in kind if row.name not in same]
    single = ""
    with torch.inference_mode():
        models = in_comfyui.tiny_models()
        found = []
        for n in CHOSEN[: amount.clips]:
            scores, _ = of_clip(n, amount, rows, models)
            found.append(scores | {name: scores[of] for name, of in same.items()})
        if args.dit:
            rows, scores, shown = single_view_scores(args.dit, amount, models)
            names = [row.name for row in rows]
            single = SINGLE_WORDS.format(table=table(rows, scores), names=", ".join(names))
            picture = sheet(shown, names)
    tables = {name: table(kind, found) for name, kind in sets.items()}
    text = page(tables, single, amount, (time.monotonic() - began) / 60)
    if args.quick:
        evaluate.sys.stdout.write(text)
        return
    PAGE.write_text(text, encoding="utf-8")
    if args.dit:
        from turnaround.nodes.run import to_pil

        to_pil(picture).save(PICTURE, quality=88)
    evaluate.say(f"Written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
