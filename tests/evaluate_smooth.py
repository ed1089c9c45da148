"""What the smoothers take out of flickering clips: `.venv/bin/python tests/evaluate_smooth.py [--quick]`.

Clean clips get the flicker of tests/clip_faults.py, are smoothed, and are compared with the clean ones
again, beside CoDeF's configuration in the same time, a temporal median and a blend along optical flow;
then parts of the smoother are taken away, several views are fitted together, and smoothing and
sampling take turns on Turnaround-Tiny. The full run writes docs/SMOOTH.md and docs/pictures/smooth.jpg
(about a quarter of an hour on two cores); --quick (one small clip, two kinds of flicker) only shows
the tables.
"""

import argparse
import datetime
import time
from dataclasses import dataclass, replace

import clip_faults
import evaluate
import in_comfyui
import smooth_loops
import smooth_page
import smooth_ways
import torch
from evaluate_refine import goals_table
from smooth_clips import CLEAN, TOGETHER, Clip, Scores, cross_view, real, scores, synthetic
from smooth_page import AS_IT_IS, CODEF, FIT, QUICK, Found
from torch import Tensor

PICTURE = smooth_page.PAGE.parent / "pictures" / "smooth.jpg"
LARGEST_PICTURE = 300_000
"""Bytes."""


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    size: tuple[int, int]
    count: int
    people: tuple[int, ...]
    """Of evaluate.CLIPS."""
    faults: tuple[str, ...]
    views: int = 3
    views_count: int = 8
    """Views that are fitted together, and their frames."""
    loop: evaluate.Amount = evaluate.Amount(1, 2, 9)
    all: bool = True
    """The real clip, the parts, several views and the loop, too."""


FULL = Plan((128, 160), 16, (3, 0), (CLEAN, *clip_faults.FAULTS))
SMALL = Plan((80, 96), 8, (3,), ("exposure", "wobble"), all=False)

Pictures = dict[str, Tensor]
"""Way -> [V, F, 3, H, W]."""


def timed(name: str, way: smooth_ways.Way, frames: Tensor) -> tuple[Tensor, float]:
    began = time.monotonic()
    result = way(frames)
    seconds = time.monotonic() - began
    evaluate.say(f"    {name} ({seconds:.1f} s)")
    return result, seconds


def smoothed(clip: Clip, fault: str) -> tuple[dict[str, Scores], Pictures]:
    """What every way makes of a flickering clip."""
    frames = clip.flickering(fault)
    pictures, rows = {AS_IT_IS: frames}, {AS_IT_IS: {}}
    ways = smooth_ways.SIMPLE | {QUICK: smooth_ways.of_deflicker, FIT: smooth_ways.of_fit}
    for name, way in ways.items():
        pictures[name], seconds = timed(name, way, frames)
        rows[name] = {"seconds": seconds}
    if fault != CLEAN:
        limit = rows[FIT]["seconds"]
        pictures[CODEF], steps = smooth_ways.of_codef(frames, limit)
        rows[CODEF] = {"seconds": limit, "steps": steps}
        evaluate.say(f"    {CODEF} ({steps} steps)")
    return {name: scores(pictures[name], clip) | more for name, more in rows.items()}, pictures


def compared(clip: Clip, faults: tuple[str, ...]) -> tuple[Found, dict[str, Pictures]]:
    """Every kind of flicker, every way; the scores, and the pictures of all together."""
    found, shown = {}, {}
    evaluate.say(clip.name)
    for fault in faults:
        evaluate.say(f"  {fault}")
        found[fault], shown[fault] = smoothed(clip, fault)
    return found, shown


# Parts of the smoother


def rows_of(clip: Clip, frames: Tensor, ways: dict[str, smooth_ways.Way]) -> dict[str, Scores]:
    rows = {AS_IT_IS: scores(frames, clip)}
    for name, way in ways.items():
        result, seconds = timed(name, way, frames)
        rows[name] = scores(result, clip) | {"seconds": seconds}
    return rows


LONGER = 6
"""Times as long as all parts together take: what CoDeF's sizes get to tell with Eq. 7 from without."""


def parts(clip: Clip, fault: str, seconds: float) -> dict[str, Scores]:
    """The flow loss and the detail layer taken away; the flow loss of CoDeF's configuration, too."""
    from turnaround.models.implicit_fit import FAST

    frames = clip.flickering(fault)
    bare = replace(FAST, flow=0.0)
    return rows_of(
        clip,
        frames,
        {
            "all parts": smooth_ways.of_fit,
            "without Eq. 7 (flow loss)": lambda x: smooth_ways.of_fit(x, settings=bare),
            "without the detail layer": smooth_ways.of_fields,
            "CoDeF's sizes with Eq. 7": lambda x: smooth_ways.of_codef(x, seconds)[0],
            "CoDeF's sizes without it": lambda x: smooth_ways.of_codef(x, seconds, flow=0.0)[0],
        },
    )


def several_views(plan: Plan) -> dict[str, Scores]:
    """Views of one performer fitted together, through exact depth and rig, and each alone."""
    clip = synthetic(plan.people[0], plan.views, plan.views_count, plan.size)
    evaluate.say(f"{clip.name}, {plan.views} views")
    frames = clip.flickering(TOGETHER)
    ways = {
        "each view alone": lambda x: torch.cat([smooth_ways.of_fit(v[None]) for v in x]),
        "together": lambda x: smooth_ways.of_fit(x, depth=clip.depth, rig=clip.rig),
    }
    rows = {
        "*the clean clip*": scores(clip.frames, clip) | {"cross": cross_view(clip.frames, clip)}
    }
    rows[AS_IT_IS] = scores(frames, clip) | {"cross": cross_view(frames, clip)}
    for name, way in ways.items():
        result, seconds = timed(name, way, frames)
        rows[name] = scores(result, clip) | {
            "cross": cross_view(result, clip), "seconds": seconds,
        }  # fmt: skip
    return rows


# The run


def slices(view: Tensor) -> Tensor:  # [F, 3, H, W] -> [3, H, W]
    """One column of pixels over time, each moment as wide as the picture allows: what is steady
    makes smooth lines."""
    count, W = len(view), view.shape[-1]
    times = (torch.arange(W) * count // W).clamp(max=count - 1)
    return view[times, :, :, W // 2].movedim(0, -1)


def sheet(clips: list[Pictures]) -> Tensor:  # [3, rows, ways W]
    """A column a way; of every clip a middle frame and a slice over time."""
    rows = []
    for shown in clips:
        views = [x[0] for x in shown.values()]
        rows.append(torch.cat([view[len(view) // 2] for view in views], 2))
        rows.append(torch.cat([slices(view) for view in views], 2))
    return torch.cat(rows, 1)


def save(picture: Tensor) -> None:
    """As good a JPEG as the limit allows."""
    from turnaround.nodes.run import to_pil

    for quality in range(92, 40, -5):
        to_pil(picture.clamp(0, 1)).save(PICTURE, quality=quality)
        if PICTURE.stat().st_size < LARGEST_PICTURE:
            return


def clips_of(plan: Plan) -> list[Clip]:
    clips = [synthetic(n, 1, plan.count, plan.size) for n in plan.people]
    return clips + ([real(plan.count, plan.size)] if plan.all else [])


def compared_all(plan: Plan, clips: list[Clip]) -> tuple[dict[str, str], Found, Tensor]:
    """The tables of goals and kinds, the means over the clips, and the picture."""
    found, shown = zip(*(compared(clip, plan.faults) for clip in clips), strict=True)
    mean = smooth_page.mean_of(found)
    kinds = [f"### {fault}\n\n{smooth_page.ways_table(ways)}" for fault, ways in mean.items()]
    each = {key: "\n\n".join(
        f"*{clip.name}*\n\n{smooth_page.one_measure_table(f, key)}"
        for clip, f in zip(clips, found, strict=True)
    ) for key in ("whole", "warping")}  # fmt: skip
    tables = {
        "goals": goals_table(smooth_page.goals(mean)), "kinds": "\n\n".join(kinds),
        "psnr": each["whole"], "warping": each["warping"],
    }  # fmt: skip
    last = plan.faults[-1]
    picture = sheet([
        {"the clean clip": clip.frames} | pictures[last]
        for clip, pictures in zip(clips, shown, strict=True)
    ])  # fmt: skip
    return tables, mean, picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small clip, two kinds of flicker")
    plan = SMALL if parser.parse_args().quick else FULL
    threads, began = torch.get_num_threads(), time.monotonic()
    in_comfyui.start()
    torch.set_num_threads(threads)  # the tests keep to two
    clips = clips_of(plan)
    smooth_ways.of_fit(clips[0].frames[:, :4])  # compiles what it needs: that is not to be timed
    tables, mean, picture = compared_all(plan, clips)
    if plan.all:
        seconds = mean[TOGETHER][FIT]["seconds"]
        rows = parts(clips[0], TOGETHER, LONGER * seconds)
        tables["parts"] = smooth_page.ways_table(rows)
        tables["several"] = smooth_page.ways_table(several_views(plan), cross=True)
        evaluate.say("Turnaround-Tiny")
        loop = smooth_loops.rows(plan.people[0], plan.loop)
        tables["loop"] = smooth_page.scores_table(loop, smooth_loops.COLUMNS)
    text = smooth_page.page(tables, facts(plan, clips, mean, began), plan.all)
    if not plan.all:
        evaluate.sys.stdout.write(text)
        return
    save(picture)
    smooth_page.PAGE.write_text(text, encoding="utf-8")
    evaluate.say(f"Written: {smooth_page.PAGE.relative_to(evaluate.ROOT)}")


def facts(plan: Plan, clips: list[Clip], mean: Found, began: float) -> dict[str, object]:
    """What the page's words are filled with."""
    steps = [ways[CODEF]["steps"] for ways in mean.values() if CODEF in ways]
    return {
        "date": datetime.date.today().isoformat(), "commit": evaluate.commit(),
        "machine": evaluate.machine(), "torch": torch.__version__,
        "minutes": (time.monotonic() - began) / 60, "count": plan.count,
        "width": plan.size[0], "height": plan.size[1],
        "clips": ", ".join(clip.name for clip in clips),
        "codef_steps": f"{min(steps):.0f} to {max(steps):.0f}",
        "columns": ", ".join(("the clean clip", *(x.strip("*") for x in mean[plan.faults[-1]]))),
        "longer": LONGER, "seconds": LONGER * mean[plan.faults[-1]][FIT]["seconds"],
        "parts_clip": f"{clips[0].name}, all kinds of flicker together",
        "views": plan.views, "views_count": plan.views_count,
        "loop_views": plan.loop.views, "loop_frames": plan.loop.frames,
        "loop_size": "x".join(map(str, smooth_loops.SIZE)), "rounds": smooth_loops.ROUNDS, "first": smooth_loops.FIRST, "last": smooth_loops.LAST,
    }  # fmt: skip


if __name__ == "__main__":
    main()
