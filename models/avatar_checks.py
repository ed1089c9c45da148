"""What is wrong with the views, or the body, that an avatar is to be distilled from.

Stage: VIEWS + RIG [+ BODY] -> an error of one sentence, or notes: sentence parts for whoever tells the
creator, empty where there is nothing to say.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .body import Body
from .distilling import Distilling
from .rasterize_mesh import rasterize_mesh
from .views import Views, view_labels

FEW = 3
"""Cameras from which on outlines bound a shape on all sides."""
FITS, DOUBTFUL = 0.4, 0.6
"""Median overlap (IoU) of the body's outlines with the masks below which a body is another's, and least
one that needs no note. Measured on a walk and a dance from eight cameras, median and least: the
true body 0.97, 0.96; a tenth too large 0.70, 0.50; 0.1 m aside 0.48, 0.30; two frames late 0.46, 0;
cameras in another order 0.37; turned, or another motion 0.21 to 0.24."""
LOOKS = 4
"""Frames in which a body is compared."""
COMPARED = 160
"""Pixels across the pictures in which it is."""
LAST = 0.25
"""Share of the steps, the last ones, whose losses tell how views agree."""
AWAY = 1.6
"""Times the median view's loss beyond which a view disagrees with the others."""


def few_views_note(views: Views) -> str:
    """What two cameras can't tell."""
    if len(views) >= FEW:
        return ""
    return (
        f"{len(views)} views bound a shape on few sides, so the avatar is only right near them: "
        "connect 4 or more for one to walk around"
    )


def empty_note(masks: Tensor, labels: tuple[str, ...]) -> str:  # [V, F, H, W]
    """Pictures that show nobody, which are left out, and moments of which nothing is known."""
    there = (masks > 0.5).flatten(2).any(2)
    parts = []
    missing = (~there).sum(1).tolist()
    named = [f"{n} of view {label}" for n, label in zip(missing, labels, strict=True) if n]
    if named:
        parts.append(f"{sum(missing)} pictures show nobody and were left out ({', '.join(named)})")
    gone = (~there.any(0)).nonzero()[:, 0].tolist()
    if gone:
        parts.append(
            f"no view shows anybody in frames {_first_ones(gone)}: their motion is their neighbours'"
        )
    return "; ".join(parts)


def _first_ones(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")


def overlaps(
    views: Views,
    body: Body,
) -> dict[tuple[int, int], float]:
    """How far the body's outline and the mask are one (IoU), by view and frame; not of pictures that
    show nobody. Some frames of the clip, all views, in small pictures."""
    frames = body.frame_count
    chosen = torch.linspace(0, frames - 1, min(LOOKS, frames)).round().long().unique().tolist()
    rig = views.rig
    scale = min(1.0, COMPARED / max(rig.width, rig.height))
    w, h = (max(8, round(n * scale)) for n in (rig.width, rig.height))
    small = rig.resized(w, h)
    found = {}
    for v in range(len(views)):
        K, T = small.K[v], small.T_camera_world[v]
        for f in chosen:
            mask = views.masks[v, f].float()[None, None]
            mask = torch.nn.functional.interpolate(mask, (h, w), mode="area")[0, 0] > 0.5
            if not mask.any():
                continue
            camera = body.vertices[f] @ T[:3, :3].T + T[:3, 3]
            drawn = rasterize_mesh(camera, body.faces, K, w, h).faces.reshape(h, w) >= 0
            found[v, f] = float((drawn & mask).sum() / (drawn | mask).sum())
    return found


def misfit_note(
    views: Views,
    body: Body,
) -> str:
    """A note when the body covers the masks only so so. ValueError when it must be another's, or
    stands or moves otherwise."""
    found = overlaps(views, body)
    if not found:
        return ""
    (view, frame), worst = min(found.items(), key=lambda item: item[1])
    values = sorted(found.values())
    middle = values[len(values) // 2]
    label = view_labels(views)[view]
    if middle < FITS:
        raise ValueError(
            f"'body' doesn't fit the views: its outline and the masks overlap by {100 * middle:.0f} % "
            f"(least in view {label}, frame {frame}: {100 * worst:.0f} %), where {100 * FITS:.0f} % are the least; "
            "use the body that the views were made with, the same frames and the same rig, or "
            "leave 'body' unconnected."
        )
    if worst < DOUBTFUL:
        return (
            f"the body's outline and the masks overlap by {100 * middle:.0f} %, least in view {label}, "
            f"frame {frame}: {100 * worst:.0f} %; there the avatar gets blurred"
        )
    return ""


def turns_note(turns: list[int]) -> str:  # [F] of FreeTraining
    """Where a performer without a body could not be followed."""
    begin = [f for f in range(1, len(turns)) if turns[f] != turns[f - 1]]
    if not begin:
        return ""
    return (
        f"the motion was too quick to follow through the whole clip: {len(begin) + 1} clouds take "
        f"turns (new ones begin at frames {_first_ones(begin)}) and the motion jumps between them; "
        "use more frames a second or connect 'body' for one that moves throughout"
    )


def disagreeing_note(training: Distilling) -> str:
    """The view that what was learned resembles least, when it stands out: it was shaken, blurred or
    painted otherwise, or its camera is wrong."""
    seen = defaultdict(list)
    first = int((1 - LAST) * training.step)
    for step in range(first, training.step):
        view = training.draw(step)[0]
        if training.weights[view] > 0:
            seen[view].append(training.losses[step] / float(training.weights[view]))
    if len(seen) < FEW:
        return ""
    means = {view: sum(values) / len(values) for view, values in seen.items()}
    middle = sorted(means.values())[len(means) // 2]
    worst = max(means, key=means.__getitem__)
    if means[worst] < AWAY * middle:
        return ""
    label = view_labels(training.views)[worst]
    return (
        f"view {label} disagrees with the others (its loss is {means[worst] / middle:.1f} times the "
        "usual): give it less weight with View Weights, or check its camera"
    )
