"""What tests/evaluate_smooth.py promises and shows: goals, tables, the words around them."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from evaluate_refine import Goal, markdown, number
from smooth_clips import CLEAN, Scores

PAGE = Path(__file__).resolve().parent.parent / "docs" / "SMOOTH.md"
AS_IT_IS = "*flickering, as it is*"
FIT, QUICK = "**Implicit Video Fit**", "**Deflicker**"
OURS = (FIT, QUICK)
CODEF = "CoDeF, equal time"
LEFT, SHARP, UNCHANGED = 40.0, 5.0, 40.0
"""Percent of the flickering input's warping error that may be left; percent by which the detail may
differ from the clean clip's; dB by which a clean clip must come through."""
LEGIBLE = 50.0
"""Percent of the detail below which a way's warping error is not compared: the blank picture has none."""
BETTER = {"whole": 1, "person": 1, "warping": -1}
"""Measure -> 1 if more is better."""
COLUMNS = {
    "whole": ("PSNR whole ↑", 2), "person": ("PSNR person ↑", 2),
    "warping": ("warping ×100 ↓", 2), "share": ("of input's %", 0), "added": ("added ×100 ↓", 2),
    "added_share": ("of input's %", 0), "off": ("off %", 1), "detail": ("detail %", 1),
    "detail_whole": ("detail whole %", 1), "seconds": ("s", 0),
}  # fmt: skip

CROSS = {"cross": ("cross-view ×100 ↓", 2)}

Found = dict[str, dict[str, Scores]]
"""Fault -> way -> scores; the way AS_IT_IS is the input."""


def mean_of(clips: list[Found]) -> Found:
    """Means over clips; what a clip does not have (NaN) is left out."""

    def mean(values: Iterable[float]) -> float:
        known = [v for v in values if not math.isnan(v)]
        return sum(known) / len(known) if known else math.nan

    return {
        fault: {
            way: {key: mean(c[fault][way][key] for c in clips) for key in scores}
            for way, scores in ways.items()
        }
        for fault, ways in clips[0].items()
    }


def percent(value: float, of: float) -> float:
    return 100 * value / of if of > 0 else math.nan


def with_shares(ways: dict[str, Scores]) -> dict[str, Scores]:
    """What is left of the flickering input's warping error, in percent."""
    before = ways[AS_IT_IS]
    return {
        name: scores
        | {
            "share": percent(scores["warping"], before["warping"]),
            "added_share": percent(scores["added"], before["added"]),
        }
        for name, scores in ways.items()
    }


def scores_table(rows: dict[str, Scores], columns: dict[str, tuple[str, int]] = COLUMNS) -> str:
    cells = {
        name: [number(scores.get(key, math.nan), digits) for key, (_, digits) in columns.items()]
        for name, scores in rows.items()
    }
    return markdown([title for title, _ in columns.values()], cells)


def ways_table(ways: dict[str, Scores], cross: bool = False) -> str:
    """One kind of flicker, way by way; with the difference between views in front if it is known."""
    columns = (CROSS if cross else {}) | COLUMNS
    return scores_table(with_shares(ways), columns)


def one_measure_table(found: Found, key: str) -> str:
    """One measure: a row a way, a column a fault."""
    digits = COLUMNS[key][1]
    faults = list(found)
    rows = {
        way: [number(found[f][way][key], digits) if way in found[f] else "–" for f in faults]
        for way in found[faults[-1]]
    }
    return markdown(faults, rows)


def beaten_by(found: Found, ours: str) -> list[str]:
    """Where an alternative is at least as good as ours, with both figures."""
    lost = []
    for fault, ways in found.items():
        for name, theirs in ways.items():
            if fault == CLEAN or name in (*OURS, AS_IT_IS):
                continue
            for key, sign in BETTER.items():
                if key == "warping" and theirs["detail_whole"] < LEGIBLE:
                    continue
                mine = ways[ours][key]
                if not sign * mine > sign * theirs[key]:  # NaN loses
                    title = COLUMNS[key][0].split(" ×")[0].rstrip(" ↑↓")
                    lost.append(f"{fault}: {title} {mine:.2f}, {name} {theirs[key]:.2f}")
    return lost


def goals(found: Found) -> list[Goal]:
    """Of both of our ways, on the means over the clips."""
    return [
        goal for ours in OURS if ours in next(iter(found.values())) for goal in _of(found, ours)
    ]


def _of(found: Found, ours: str) -> list[Goal]:
    spoiled = {f: with_shares(w)[ours] for f, w in found.items() if f != CLEAN}

    def each(rows: dict[str, Scores], key: str, fits: Callable[[float], bool], text: str) -> Goal:
        listed = ", ".join(f"{fault} {s[key]:.1f}" for fault, s in rows.items())
        # NaN fits nowhere.
        return Goal(text, bool(rows) and all(fits(s[key]) for s in rows.values()), listed)

    lost = beaten_by(found, ours)
    checked = [
        Goal(
            f"{ours}: better than every other way, on PSNR (whole, person) and warping error, "
            "whatever the fault",
            not lost, "; ".join(lost) or "everywhere",
        ),
        each(
            spoiled, "share", lambda x: x <= LEFT,
            f"{ours}: warping error at most {LEFT:g} % of the flickering input's (percent)",
        ),
        each(
            spoiled, "added_share", lambda x: x <= LEFT,
            f"{ours}: of the flicker that was put in, at most {LEFT:g} % is left (percent)",
        ),
        each(
            spoiled, "detail", lambda x: abs(x - 100) <= SHARP,
            f"{ours}: detail within {SHARP:g} % of the clean clip's (percent of it)",
        ),
    ]  # fmt: skip
    if CLEAN in found:
        clean = {"whole": found[CLEAN][ours]}
        text = f"{ours}: a clean clip comes through, PSNR at least {UNCHANGED:g} dB"
        checked.append(each(clean, "whole", lambda x: x >= UNCHANGED, text))
    return checked


def page(tables: dict[str, str], facts: dict[str, object], whole: bool) -> str:
    """`facts`: what the words are filled with; `whole`: the parts, the views and the loop, too."""
    words = tables | facts | {"legible": LEGIBLE}
    return HEAD.format(**words) + (REST.format(**words) if whole else "")


HEAD = """# What the smoothers take out of a flickering clip

Written by `tests/evaluate_smooth.py`, everything in one run; not edited by hand.
{date}, commit {commit}, {machine}, torch {torch}, {minutes:.0f} minutes. Clips of {count} frames of
{width}x{height}: {clips}. Figures are means over the clips unless a heading says otherwise.

## Goals

{goals}

## Kind by kind

{kinds}

- *exposure*: every frame has a brightness of its own. *colour*: every frame has casts of its own that
  change slowly over the picture. *texture*: every frame has grain and blotches of a few pixels of its
  own. *wobble*: every frame is bent by about a pixel, in a way of its own. *together*: all of it.
- *PSNR*: dB to the clean clip; in the whole picture, and inside the performer.
- *warping*: root mean square difference between a frame and the next one brought back along the
  clean clip's own motion, where both show the same ([SCOREBOARD.md](SCOREBOARD.md)). The motion is
  exact for synthetic people and followed in the clean pictures of the real clip. Clean clips have some
  of it too: shading, and what resampling costs. *of input's*: percent of the flickering clip's. Blur
  lowers it.
- *added*: the same of the difference from the clean clip, so that the clean clip has 0 and only what
  changes from frame to frame beside it counts. *of input's*: percent of what was put in.
- *off*: percent of the performer whose colour, as a mean over 5 x 5 pixels, is more than 0.1 from the
  clean clip's: what is seen at once, such as limbs that are gone, and ghosts.
- *detail*: gradient energy in percent of the clean clip's, inside the performer and in the whole
  picture. Blur lowers it, noise raises it. A way that leaves less than {legible:.0f} % of the whole picture's is
  not compared by its warping error, of which a blank picture has none.
- *CoDeF, equal time*: CoDeF's published sizes and losses on the same hash grid, without any warm start,
  with as much time for its steps as Implicit Video Fit took in all, its schedule shrunk to the steps
  that fit in: {codef_steps} of 10,000.
"""

REST = """
![Ways beside each other](pictures/smooth.jpg)

*Everything together, from left to right: {columns}. Of each clip a frame, and below it one column of
pixels over time: what is steady makes smooth lines.*

## Clip by clip

PSNR of the whole picture.

{psnr}

Warping error.

{warping}

## Part by part

{parts_clip}. CoDeF's sizes, starting from noise, have {longer} times the time here ({seconds:.0f} s): in the same time
there is no picture yet that could tell.

{parts}

## Several views at once

{views} views of one performer, {views_count} frames, all kinds of flicker together. *cross-view*: 100 x
the difference between the colours that two views give to the same surface. Told exact depth and rig.

{several}

## Smoothing and sampling in turn

Turnaround-Tiny with its sync, {loop_views} views x {loop_frames} frames of {loop_size}, plain background. Its views
are soft but hardly flicker, so flicker of all kinds is put in: into the views of the first pass (a model
that flickers by itself, told steady colours), or into the colours that the model is told, in the first
pass and ever after (it repeats them, and no smoothing can change what it is told). *loop*: **Smooth
Loop**, smoothed and sampled anew {rounds} times, with noise from {first} down to {last}. *sampled anew, not
smoothed*: the same noise and steps without smoothing in between, so that the difference to *loop* is what
smoothing adds: this model is told every pixel's colour and returns to it from wherever it starts. Columns
are those of [SCOREBOARD.md](SCOREBOARD.md).

{loop}
"""
