"""What tests/evaluate_avatar.py promises and shows: goals, tables, the words around them."""

from __future__ import annotations

from pathlib import Path

import avatar_rows
from avatar_rows import BY_NAME, MAIN, WAYS, Found
from avatar_scenes import FRAMES
from evaluate_refine import Goal, goals_table, markdown, number

PAGE = Path(__file__).resolve().parent.parent / "docs" / "AVATAR.md"
GROUPS = {
    "learned": "learned pictures", "camera": "held-out cameras",
    "moment": "held-out moments", "between": "between frames", "motion": "another dance", "strong": "kick, cartwheel, backflip",
}  # fmt: skip
LEAST, WITHIN = 30.0, 3.0
"""dB over the person on held-out cameras, and how much lower another motion may be."""
LONGEST = 180.0
"""Seconds of a draft."""
SAME = 0.1
"""dB that say nothing."""

Rows = dict[str, Found]


def cells(found: Found) -> list[str]:
    told = []
    for group in GROUPS:
        one = found.scores.get(group)
        told.append("–" if one is None else f"{one['psnr']:.2f} / {one['ssim']:.3f}")
    camera = found.scores["camera"]
    return [*told, number(camera["haarpsi"], 3)]


def table(rows: Rows, names: list[str]) -> str:
    head = [*GROUPS.values(), "HaarPSI, held-out cameras"]
    return markdown(head, {n: cells(rows[n]) for n in names if n in rows})


def costs(rows: Rows) -> str:
    head = ["steps", "Gaussians", "seconds", "of one core, busy", "peak, MiB"]
    return markdown(head, {
        n: [str(f.steps), str(f.gaussians), number(f.seconds, 0), number(f.busy, 0), number(f.peak, 0)]
        for n, f in rows.items()
    })  # fmt: skip


def files_table(rows: Rows) -> str:
    return markdown(["MB", "read in, ms"], {
        kind: [number(size / 1e6, 2), number(1000 * seconds, 1)]
        for kind, (size, seconds) in rows[MAIN.name].files.items()
    })  # fmt: skip


def dB(rows: Rows, name: str, group: str) -> float:
    return rows[name].scores[group]["psnr"]


def against(rows: Rows, text: str, better: str, worse: str, group: str) -> list[Goal]:
    """A part pays: the row with it is above the row without it."""
    if better not in rows or worse not in rows:
        return []
    a, b = dB(rows, worse, group), dB(rows, better, group)
    return [Goal(f"{text} ({GROUPS[group]})", b > a + SAME, f"{a:.2f} → {b:.2f} dB")]


def goals(rows: Rows) -> list[Goal]:
    main, camera = MAIN.name, dB(rows, MAIN.name, "camera")
    checked = [
        Goal(
            f"8 true views of 256², held-out cameras: at least {LEAST:g} dB over the person",
            camera >= LEAST, f"{camera:.2f} dB",
        )
    ]  # fmt: skip
    for group in ("motion", "strong"):
        other = dB(rows, main, group)
        checked.append(Goal(
            f"{GROUPS[group]}, held-out cameras: within {WITHIN:g} dB of that",
            other >= camera - WITHIN, f"{other - camera:+.2f} dB",
        ))  # fmt: skip
    seconds = rows[main].seconds
    checked.append(Goal(
        f"a draft of 8 views x 13 frames of 256² in less than {LONGEST:g} s", seconds < LONGEST,
        f"{seconds:.0f} s with one thread, another row being learned beside it",
    ))  # fmt: skip
    checked += against(rows, "light that is learned pays", main, "without light", "motion")
    checked += against(rows, "the detail net pays", "with the detail net", main, "motion")
    checked += against(
        rows, "the detail net pays in the longer preset", "preset standard",
        "preset standard without the detail net", "motion",
    )  # fmt: skip
    for preset in ("", "preset standard, "):
        bulging = f"{preset}clothes that bulge"
        without = f"{bulging}, without the detail net" if preset else bulging
        with_net = bulging if preset else f"{bulging}, with the detail net"
        for group in ("camera", "motion"):
            checked += against(
                rows, f"{preset}the detail net pays where clothes bulge", with_net, without, group
            )
    for motion in ("walk", "quick dance"):
        checked += against(
            rows, f"{motion}: one avatar in motion is better than a cloud a frame in as many steps",
            f"{motion}, free", f"{motion}, every frame a cloud of its own", "camera",
        )  # fmt: skip
    checked += against(rows, "a body pays on a walk", "walk, body", "walk, free", "camera")
    checked += against(
        rows,
        "weights of generated views pay",
        "generated views, weighted",
        "generated views",
        "camera",
    )
    return checked


def page(rows: Rows, facts: dict) -> str:
    left_out = [way.name for way in WAYS if way.name not in rows]
    missing = f"\nNot run: {', '.join(left_out)}.\n" if left_out else ""
    return f"""# What a distilled avatar looks like

Written by `tests/evaluate_avatar.py`, everything in one run; not edited by hand.
{facts["date"]}, commit {facts["commit"]}, {facts["machine"]}, torch {facts["torch"]}, {facts["minutes"]:.0f} minutes.
Preset *draft* where a row doesn't name another, no graphics card.

![{facts["shown"]}](pictures/avatar.jpg)

*{facts["shown"]}.*

## Goals

{goals_table(goals(rows))}

## Rows

PSNR in dB / SSIM over the performer's pixels.

{table(rows, [way.name for way in WAYS])}
{missing}
- **What is learned from**: 13 frames, 8 a second, of a dance, from 8 cameras in a ring, 256x256, where the
  performer is about 100 to 160 pixels tall. *Generated views*: 8 views of 192x240 that Turnaround-Tiny
  makes of one camera's clip, with the outline of the given body as mask; compared with the truth, not
  with themselves, so that what the model gets wrong counts. *Weighted*: as View Weights by angle has it.
  *Real man*: the four calibrated cameras of the Pose2Sim clip, 192x256, estimated masks; one camera is held out.
- **Held out**: four cameras between and above those of the ring (*held-out cameras*); all other columns
  are of held-out cameras too, but *learned pictures*. *Held-out moments*: half-way between two frames, in the
  true body of that moment. *Between frames*: the same, but in the avatar's own motion, a curve through
  frames an eighth of a second apart, which a quick dance leaves by centimetres. *Another dance* and *kick, cartwheel, backflip*: the avatar is given a motion that it was never
  learned in, and compared with the true performer in that motion. An avatar without a body can't take it.
- **Over the performer**: every squared error is weighted with the truth's coverage of the pixel (0..1), averaged
  over all pictures of the column, and one PSNR is taken of that mean; the background, where nothing can go
  wrong, does not count. Pictures are drawn over grey, as the truth is. SSIM and HaarPSI are weighted alike.
- **Truth**: drawn with 4x4 samples a pixel. With the 2x2 of Sample Performer it differs by 31 to 34 dB from
  what a pixel shows, which no avatar can follow; a row learns from such pictures.
- *without light*: the nine numbers of `avatar_light` stay as they begin. *with the detail net*: the
  UV net of `avatar_uv` learns from a fifth of the steps on. *clothes that bulge*:
  the truth swells up to 8 cm where a pose presses the skin together, which the given body does not know.
- *walk*: another performer at 16 frames a second. *free*: without a body. *every frame a cloud of its own*:
  what separate Gaussian fits of the frames give, the same steps shared out among them, with as many
  Gaussians in each as the avatar has in all. The dance turns the performer by up to half a turn between
  two frames, where nothing can be followed: clouds take turns, and Distill Avatar's note says so.

## What learning takes

{costs(rows)}

Two rows are learned at a time, each with one thread. *peak*: beside what was held before learning.

## What its files take

The avatar of the first row, {rows[MAIN.name].gaussians} Gaussians without harmonics, {FRAMES} frames.
A file a frame is that of one frame as often.

{files_table(rows)}
"""


SHOWN = (
    ("camera", MAIN), ("motion", MAIN), ("strong", MAIN), ("camera", BY_NAME["walk, free"]),
    ("camera", BY_NAME["generated views, weighted"]), ("camera", BY_NAME["real man, 3 of 4 cameras"]),
)  # fmt: skip
"""Groups and rows of the picture: above the avatar, below the truth."""
EACH, IN_A_ROW = 3, 3
"""Pictures of each, and how many of these triples stand in a row."""
PICTURE = PAGE.parent / "pictures" / "avatar.jpg"
LARGEST_PICTURE = 300_000
"""Bytes."""
ROOM = (180, 150)
"""Height and width of what is shown of a picture, around the performer."""


def shown(names: set[str]) -> list[tuple[str, avatar_rows.Way]]:
    return [(group, way) for group, way in SHOWN if way.name in names]


def caption(names: set[str]) -> str:
    parts = [f"{way.name.replace('*', '')}, {GROUPS[group]}" for group, way in shown(names)]
    return (
        f"Row by row from left to right, {EACH} each: {'; '.join(parts)}. Above the avatar, below "
        "the truth"
    )


def sheet(pictures: dict, folder: Path):  # -> [3, 2 h, n w] uint8
    """Avatars above their truths."""
    import avatar_scenes
    import torch

    columns, n = [], EACH * IN_A_ROW
    for group, way in shown(set(pictures)):
        scene = avatar_scenes.load(folder / f"{way.scene}.safetensors")
        at = (scene.shots[:, 0] == avatar_scenes.GROUPS.index(group)).nonzero()[:, 0]
        for i in at[torch.linspace(0, len(at) - 1, EACH).round().long()].tolist():
            there = _around(scene.insides[i])
            columns.append(torch.cat([pictures[way.name][i][there], scene.truths[i][there]], 1))
    columns += [torch.zeros_like(columns[0])] * (-len(columns) % n)
    return torch.cat([torch.cat(columns[i : i + n], 2) for i in range(0, len(columns), n)], 1)


def _around(inside) -> tuple[slice, slice, slice]:
    """A piece of the picture with the performer in its middle."""
    sides = []
    for axis, size in enumerate(ROOM):
        there = (inside > 0.5).any(1 - axis).nonzero()[:, 0]
        middle, length = int(there.float().mean()) if len(there) else 0, inside.shape[axis]
        first = min(max(middle - size // 2, 0), max(length - size, 0))
        sides.append(slice(first, first + min(size, length)))
    return slice(None), *sides


def save(picture) -> None:
    """As good a JPEG as the limit allows."""
    from turnaround.nodes.run import to_pil

    for quality in range(92, 40, -5):
        to_pil(picture.float() / 255).save(PICTURE, quality=quality)
        if PICTURE.stat().st_size < LARGEST_PICTURE:
            return
