"""What tests/evaluate_subject.py promises and shows: goals, tables, the words around them."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from evaluate_refine import Goal, goals_table, markdown, number

PAGE = Path(__file__).resolve().parent.parent / "docs" / "SUBJECT.md"
NONE, WORDS, FIELD = "no subject", "words and LoRA, no field", "**field**"
RENDERING, COMPLETION = "field + depth-aware rendering", "field + rendering + completion"
TRIP, TRUTH = "*VAE round trip*", "*the truth*"
COLUMNS = {
    "psnr": ("PSNR of the subject ↑", 2), "identity": ("identity distance ↓", 2),
    "right": ("cameras within 15°, % ↑", 0), "away": ("median error ° ↓", 1),
    "cross": ("cross-view ×100 ↓", 2), "detail": ("detail %", 0),
}  # fmt: skip
PUBLISHED = {WORDS: 0.543, RENDERING: 0.768, COMPLETION: 0.771}
"""MVCustom's camera accuracy."""
BETTER_BY, NEAR_TRUTH = 3.0, 4.5
"""dB by which a field must beat the model without one, and that it may lie below the VAE's round trip."""
EACH = 5.0
"""Percent of the cameras that one picture more or less of 8 in three subjects is about."""
ROOMS = {False: "nothing known of the surroundings", True: "before rooms that were never seen"}

Rows = dict[str, dict[str, float]]


def mean_of(found: dict, rooms: bool) -> Rows:
    """Over the subjects."""
    first = next(iter(found.values())).scores[rooms]
    return {
        row: {k: mean(f.scores[rooms][row][k] for f in found.values()) for k in COLUMNS}
        for row in first
    }


def table(rows: Rows, names: list[str]) -> str:
    cells = {
        name: [number(rows[name][key], digits) for key, (_, digits) in COLUMNS.items()]
        for name in names
        if name in rows
    }
    return markdown([title for title, _ in COLUMNS.values()], cells)


def one_measure(found: dict, rooms: bool, key: str, names: list[str]) -> str:
    """Subject by subject."""
    digits = COLUMNS[key][1]
    cells = {
        name: [number(f.scores[rooms][name][key], digits) for f in found.values()] for name in names
    }
    return markdown(list(found), cells)


def goals(found: dict) -> list[Goal]:
    checked = []
    for rooms, where in ROOMS.items():
        rows = mean_of(found, rooms)

        def of(key: str, *names: str, rows: Rows = rows) -> list[float]:
            return [rows[name][key] for name in names]

        def told(values: list[float], digits: int = 2) -> str:
            return ", ".join(number(v, digits) for v in values)

        none, words, field, trip = of("psnr", NONE, WORDS, FIELD, TRIP)
        checked.append(Goal(
            f"PSNR of the subject, {where}: {BETTER_BY:g} dB above the model without it and above "
            f"words and LoRA alone, at most {NEAR_TRUTH:g} below the VAE's round trip",
            field > max(none, words) + BETTER_BY and field > trip - NEAR_TRUTH,
            f"{told([none, words])} → {told([field])}; VAE {told([trip])}",
        ))  # fmt: skip
        a, b = of("identity", WORDS, FIELD)
        checked.append(
            Goal(f"identity, {where}: closer than words and LoRA alone", b < a, told([a, b]))
        )
        words, field, rendered, completed = of("right", WORDS, FIELD, RENDERING, COMPLETION)
        checked.append(Goal(
            f"cameras, {where}: as published, far more are right with a field and its rendering than "
            "without a field, and completion costs none (percent: words and LoRA, field, + rendering, "
            "+ completion)",
            min(rendered, field) > words + EACH and completed > rendered - EACH,
            told([words, field, rendered, completed], 0),
        ))  # fmt: skip
        order = (FIELD, RENDERING, COMPLETION)
        checked.append(Goal(
            f"the parts in the published order, {where}: field, + rendering, + completion bring the PSNR "
            "up and the difference between views down (PSNR; cross-view)",
            of("psnr", *order) == sorted(of("psnr", *order))
            and of("cross", *order) == sorted(of("cross", *order), reverse=True),
            f"{told(of('psnr', *order))}; {told(of('cross', *order))}",
        ))  # fmt: skip
    return checked


def costs(found: dict) -> str:
    head = ["learning", "s a step, busy", "minutes", "peak, MiB"]
    rows = {}
    for name, f in found.items():
        for fields, cost in f.costs.items():
            kind = "field" if fields else "words and LoRA"
            rows[f"{name}, {kind}"] = [
                f"{cost.steps} steps", f"{cost.busy / cost.steps:.2f}", f"{cost.seconds / 60:.1f}",
                number(cost.peak, 0),
            ]  # fmt: skip
    return markdown(head, rows)


def checks(found: dict) -> str:
    """Of the scores themselves."""
    head = ["identity: truth", "VAE", "another subject", "cameras, truth", "VAE", "by chance, %"]
    rows = {}
    for name, f in found.items():
        truth, trip = f.scores[True][TRUTH], f.scores[True][TRIP]
        cameras = [f"{s['right']:.0f} %, {s['away']:.1f}°" for s in (truth, trip)]
        rows[name] = [
            number(truth["identity"], 2), number(trip["identity"], 2), number(f.other, 2), *cameras,
            number(f.chance, 1),
        ]  # fmt: skip
    return markdown(head, rows)


# Memory of a large model


GIB = 2**30
WAN = "Wan 2.1 1.3B, 12 of 30 blocks, pictures of 480x832 (30x52 tokens), bfloat16"


def kept_bytes() -> float:
    """What a subject's fields keep for the gradient, bytes for each place x reference, measured."""
    import torch
    from subjects import spiral_rig
    from turnaround.models.subject import Shape, Subject, SubjectNet, pictures_of

    W, H, references = 192, 240, 5
    rig = spiral_rig(references + 1, W, H)
    pictures = pictures_of(
        torch.rand(len(rig), 3, H, W), torch.ones(len(rig), H, W),
        torch.randn(len(rig), 16, 1, H // 8, W // 8), rig,
    )  # fmt: skip
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.inference_mode(False), torch.enable_grad():
        net = SubjectNet(Shape(256, (1, 3, 5, 7), 64, 0.34))
        subject = Subject(net, pictures, ())
        features = {i: torch.randn(references, 256, *pictures.size) for i in net.shape.blocks}
        known = subject.known(range(references))
        target = tuple(part[references:] for part in subject.cameras(rig))
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            found = net.render(features, known, target, pictures.size)
    places = found.coarse.weights.numel() + found.fine.weights.numel()
    return sum(n for at, n in kept.items() if at not in own) / places / references


def memory() -> tuple[str, bool]:
    """Counted from sizes, with the figures that models/subject_memory.py has from Turnaround-Tiny;
    whether it is below 24 GiB."""
    import torch
    from turnaround.models.subject import NEAREST, Shape, SubjectNet
    from turnaround.models.subject_memory import A_PLACE, Backbone, step_bytes

    tokens, width, pictures, views = 30 * 52, 1536, 30, 8
    shape = Shape(width, tuple(range(1, 24, 2)), 64, 0.34)
    with torch.device("meta"):
        parts = {k: sum(p.numel() for p in m.parameters()) for k, m in _parts(SubjectNet, shape)}
    learned = sum(parts.values())
    wan, weights = Backbone(width, 8960, 30, 2), 1.42e9 * 2 / GIB
    features = len(shape.blocks) * tokens * width * 2 / GIB
    rows = {"the model's own weights (1.42 G numbers)": [f"{weights:.1f}"]}
    for anew, how in ((True, "blocks computed anew going back"), (False, "all kept")):
        need = step_bytes(wan, shape, learned, pictures, 2, 5, tokens, anew) / GIB
        rows[f"learning, 2 targets, 5 references: beside the weights, {how}"] = [f"{need:.1f}"]
        rows[f"learning, in all, {how}"] = [f"**{need + weights:.1f}**"]
    named = ", ".join(f"{k} {v / 1e6:.1f} M" for k, v in parts.items())
    rows[f"of that, what is learned ({named}), with gradient and Adam's two, float32"] = [
        f"{16 * learned / GIB:.1f}"
    ]
    rows[f"applying: features of {pictures} references, until they are rendered"] = [
        f"{pictures * features:.1f}"
    ]
    rows[f"applying: rendered features of {views} views, all the time, float32"] = [
        f"{2 * views * features:.1f}"
    ]
    rows[f"applying: one chunk of rays x {NEAREST} references"] = [f"{2**18 * A_PLACE / GIB:.1f}"]
    sampling = weights + 2 * views * features + 4 * learned / GIB
    peak = sampling + pictures * features + 2**18 * A_PLACE / GIB
    rows["applying, in all, beside what sampling the model needs anyway"] = [f"**{peak:.1f}**"]
    return markdown(["GiB"], rows), need + weights < 24 and peak < 24


def _parts(net_of, shape):
    net = net_of(shape)
    return (("fields", net.fields), ("heads", net.heads), ("injections", net.injections))


def _a_place() -> int:
    from turnaround.models.subject_memory import A_PLACE

    return A_PLACE


# The page


def page(found: dict, names: list[str], facts: dict) -> str:
    rows = {rooms: mean_of(found, rooms) for rooms in ROOMS}
    names = [*names, TRIP, TRUTH]
    shares = [FIELD, *(n for n in rows[False] if n.startswith("in ")), NONE]
    sections = [
        f"### {where[0].upper()}{where[1:]}\n\n{table(rows[rooms], names)}"
        for rooms, where in ROOMS.items()
    ]
    each = [n for n in names if n != TRUTH]
    published = ", ".join(f"{n} {v}" for n, v in PUBLISHED.items())
    sizes, fits = memory()
    checked = "" if len(found) < 2 else f"## Goals\n\n{goals_table(goals(found))}\n\n"
    return f"""# What a learned subject looks like

Written by `tests/evaluate_subject.py`, everything in one run; not edited by hand.
{facts["date"]}, commit {facts["commit"]}, {facts["machine"]}, torch {facts["torch"]}, {facts["minutes"]:.0f} minutes.{facts["kept"]}
Turnaround-Tiny, views of 192x240, {facts["sampling"]} steps, cfg 1, the same noise in
every row. Subjects ({", ".join(found)}) were learned from 30 pictures each, before rooms that are other
ones in every picture, in {facts["steps"]} steps, and are shown from 8 cameras between those of the pictures.
Figures are means over the subjects.

![From top to bottom: {facts["shown"]}](pictures/subject.jpg)

*From top to bottom: {facts["shown"]}. Three of eight views of every subject.*

{checked}## One part after the other

{(chr(10) * 2).join(sections)}

*words and LoRA, no field*: four learned words and a LoRA of rank 16 on attention, with the same pictures
and steps. Turnaround-Tiny has no text and no other way to be told of a camera, so this row can't know
where it looks from; MVCustom's can, by text. Its camera accuracies: {published}.
Image guidance, rendering (anchor: the middle view, 70 % of the steps, as published) and completion (30 %)
come on top of the field; depth is the field's own.

Where all cameras are right with the field alone, rendering and completion can't make more of them right.

## Subject by subject, before rooms

PSNR of the subject:

{one_measure(found, True, "psnr", each)}

Cameras within 15°, percent:

{one_measure(found, True, "right", each)}

## In how many of the steps the subject acts

{table(rows[False], shares)}

Published: all steps give the most accurate views, a quarter of them loses the subject. Turnaround-Tiny
makes nothing up by itself, so that it forgets what it is no longer told.

## What learning takes

{costs(found)}

Several are learned at a time, each with one thread, so that minutes are more than for one alone. *busy*:
processor time. *peak*: beside what was resident before.

## How the scores were checked

{checks(found)}

- **Identity distance**: sliced Wasserstein distance (times 100) between patches of 12x12 pixels of the
  subject, all views together, and those of the pictures that it was learned from. It needs no trained net:
  which colors there are, how much of each, and what stands beside what. Columns *truth* and *VAE* are what
  is left of the same subject from other cameras; *another subject* is how far one of the others is.
- **Cameras**: every picture is compared with the subject drawn from {72 * 6} directions (steps of 5° around, 10°
  up), each before the surroundings that suit it best, a plane in every color; the error is the angle
  between the best one and the camera. The lamp is turned on a lathe but for one arm, so where that is
  hidden or lost, any direction is as good.
- **cross-view**: difference between the colors that two views give to the same point (as in
  [SYNC.md](SYNC.md)); an empty picture has none. **detail**: gradient energy inside the subject, percent of the truth's.

## Memory of a large model

{WAN}, counted in GiB; on 24 GiB {"all of it fits, also with all kept" if fits else "not all of it fits"}:

{sizes}

How it was counted: what a block keeps for its gradient was measured on Turnaround-Tiny, whose blocks are
Wan's (14.7 numbers a token and channel; 1.2 when it is computed anew), and the bytes that a field keeps
of every place and reference ({kept_bytes():.0f} measured in this run, {_a_place()} taken); the rest are shapes. With a fifth added to all that is
measured. No graphics card was at hand to check it. The VAE (0.5 GiB) and the text encoder are not there while learning.
"""
