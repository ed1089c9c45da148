"""The quality of the geometry, against exact truth, with every stage switched off in turn.

    .venv/bin/python tests/evaluate_geometry.py [--quick]

People and motions that no training saw, one source camera, five target cameras around the TRUE
middle of the performer: what is placed wrong is drawn wrong. Depth comes exact, with the errors of
depth networks, and from the embedded human net. The full run writes docs/GEOMETRY.md and
docs/pictures/geometry_stages.jpg; --quick (one clip, two frames) only shows the page. No ComfyUI.
"""

import argparse
import datetime
import math
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evaluate import CLIPS, FIRST_CLOTHES, ROOT, START, commit, machine, say
from torch import Tensor

THREADS = torch.get_num_threads()
if "turnaround" not in sys.modules:
    import conftest  # noqa: F401  (loads the pack under that name)

PAGE = ROOT / "docs" / "GEOMETRY.md"
PICTURE = ROOT / "docs" / "pictures" / "geometry_stages.jpg"
WIDTH, HEIGHT, FPS, FOV = 256, 320, 16.0, 35.0
FRAMES = 7
AZIMUTHS = (0, 45, 90, 135, 180)
PERSON_HEIGHT = 1.7
"""What the crude placement believes: the default of Performer Geometry."""
FLOATING = 0.03
"""Metres from the true surface beyond which a point floats."""
LEAST_SHARE = 0.02
"""A view where less than this share of the body was seen by the source has no angle or coverage."""


# --- what a graph is given ------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """How a relative depth map differs from the truth."""

    blur: float = 1.0
    """Standard deviation in pixels: an edge becomes a ramp of 2.6 pixels (10 to 90 %)."""
    wobble: float = 0.005
    """Share of the depth, 3 cm at 6 m: slow in space (a third of the picture) and time (4 frames)."""
    noise: float = 0.002
    """Of the map's range: half a grey level of 8 bits."""
    scale_drift: float = 0.03
    """Standard deviation of the step from one frame's scale to the next: a random walk."""
    shift_drift: float = 0.015
    """The same of the shift, of the map's range."""
    levels: int = 256


def smooth_field(
    size: tuple[int, int, int],  # F, H, W
    cells: tuple[int, int, int],
    generator: torch.Generator,
) -> Tensor:  # [F, H, W], mean 0 and spread about 1
    """Noise without detail."""
    coarse = torch.randn(1, 1, *cells, generator=generator)
    field = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)[0, 0]
    return (field - field.mean()) / field.std()


def blurred(pictures: Tensor, sigma: float) -> Tensor:  # [N, H, W]
    """Gaussian mean; the border is repeated outwards."""
    reach = math.ceil(3 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=pictures.dtype)
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(pictures[:, None], (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(across, kernel.view(1, 1, -1, 1))[:, 0]


def relative_map(
    scene: Tensor,  # [F, H, W] metres everywhere, background included
    generator: torch.Generator,
    errors: Errors = Errors(),  # noqa: B008  (frozen)
) -> Tensor:  # [F, H, W] 0..1, near is white, as pictures have it
    """What a depth network makes of a scene: inverse depth, scaled to the picture's range."""
    frames = len(scene)
    field = smooth_field(tuple(scene.shape), (2 + frames // 4, 4, 4), generator)
    inverse = 1 / (scene * (1 + errors.wobble * field))
    if errors.blur:
        inverse = blurred(inverse, errors.blur)
    low, high = inverse.min(), inverse.max()
    values = (inverse - low) / (high - low)
    values = values + errors.noise * torch.randn(values.shape, generator=generator)
    steps = torch.randn(2, frames, generator=generator)
    scale, shift = (
        drift * walk for drift, walk in zip(
            (errors.scale_drift, errors.shift_drift), steps.cumsum(1), strict=True
        )
    )  # fmt: skip
    # A fifth of the range is left free, so that the drift does not clip.
    values = 0.5 + 0.8 * ((1 + scale)[:, None, None] * (values - 0.5) + shift[:, None, None])
    return (values.clamp(0, 1) * (errors.levels - 1)).round() / (errors.levels - 1)


def coarse_depth(
    depth: Tensor,  # [F, H, W] metres; 0 = background
    generator: torch.Generator,
    cell: int = 8,
    noise: float = 0.05,  # share of the depth, every cell by itself
    tremble: float = 0.02,  # share of the depth, every frame as a whole
) -> Tensor:  # [F, H, W] metres; 0 = unknown
    """A metric depth that knows the place and little of the shape."""
    body = (depth > 0).float()
    share = F.avg_pool2d(body[:, None], cell)
    small = F.avg_pool2d(depth[:, None], cell) / share.clamp(min=1e-6)
    small = small * (1 + noise * torch.randn(small.shape, generator=generator))
    small = small * (1 + tremble * torch.randn(len(depth), 1, 1, 1, generator=generator))
    small = torch.where(share > 0.25, small, 0.0)
    return F.interpolate(small, size=depth.shape[-2:], mode="nearest")[:, 0]


def rough_normals(
    normals: Tensor,  # [F, 3, H, W] unit; 0 = background
    generator: torch.Generator,
    degrees: float = 10.0,  # root mean square of the angle
) -> Tensor:  # [F, 3, H, W]
    """Normals turned by smooth noise of a few pixels."""
    noise = torch.randn(normals.shape, generator=generator)
    noise = blurred(noise.flatten(0, 1), 2.0).view_as(normals)
    noise = noise - (noise * normals).sum(1, keepdim=True) * normals
    known = normals.norm(dim=1) > 0.5
    length = noise.square().sum(1)[known].mean().sqrt()
    turned = normals + noise * math.radians(degrees) / length
    return F.normalize(turned, dim=1) * known[:, None]


@dataclass(frozen=True)
class Clip:
    """One person in one motion, and everything that is true."""

    name: str
    frames: Tensor
    """[F, 3, H, W] what the source camera shows, with a background."""
    masks: Tensor
    """[F, H, W] 0..1."""
    depth: Tensor
    """[F, H, W] metres in the source camera; 0 = background."""
    normals: Tensor
    """[F, 3, H, W] in the source camera's axes."""
    scene: Tensor
    """[F, H, W] metres, with floor and wall."""
    rig: object  # Rig of the targets; the first is the source camera
    view_depth: Tensor
    """[V, F, H, W] metres; 0 = background."""
    view_normals: Tensor
    """[V, F, 3, H, W] in each target's axes."""
    seen: Tensor
    """[V, F, H, W] bool: body that the source camera saw too."""
    surfaces: list
    """A search tree of the true surface for every frame."""


@dataclass(frozen=True)
class Given:
    """One source of depth, and what comes with it."""

    name: str
    depth: Tensor
    """[F, H, W] metres; or 0..1, near is white, when there is a `metric` to align it to."""
    masks: Tensor
    normals: Tensor
    metric: Tensor | None = None
    """[F, H, W] coarse metres; 0 = unknown."""


def with_room(depth: Tensor, distance: float, K: Tensor, feet: float) -> Tensor:
    """The body before a wall and on a floor: depth [F, H, W] without holes.

    `feet`: metres below the camera's axis. The camera is level.
    """
    rows = torch.arange(depth.shape[1]) + 0.5
    down = ((rows - K[1, 2]) / K[1, 1]).clamp(min=1e-6)
    room = (feet / down).clamp(max=distance + 2.5)[:, None].expand(depth.shape[1:])
    return torch.where(depth > 0, depth, room)


def make_clip(person: str, motion: str, clothes: int, frames: int) -> Clip:
    """Pose, film and measure a held-out person."""
    from scipy.spatial import cKDTree
    from turnaround.models import performer, performer_light, performer_truth
    from turnaround.models.cameras import framing_distance, orbit_rig

    look = performer.draw_appearance(clothes)
    posed = performer.pose_performer(person, motion, START + torch.arange(frames) / FPS, look)
    half = posed.vertices.abs().amax((0, 1))
    fov = math.radians(FOV)
    distance = framing_distance(float(half[[0, 2]].norm()), float(half[1]), fov, WIDTH, HEIGHT)
    around = torch.deg2rad(torch.tensor(AZIMUTHS, dtype=torch.float32))
    rig = orbit_rig(around, torch.zeros(len(around)), distance, fov, WIDTH, HEIGHT)
    background = performer_light.draw_background(
        np.random.default_rng(clothes), HEIGHT, WIDTH, "indoor"
    )
    filmed = performer.render_performer(posed, look, rig.select([0]), background)
    truth = performer_truth.surface_truth(posed, rig)
    V = len(rig)
    v, f = torch.arange(V).repeat_interleave(frames), torch.arange(frames).repeat(V)
    source = torch.zeros_like(v)
    _, seen = performer_truth.surface_flow(truth, posed, rig, (v, f), (source, f))
    depth = truth.depth[0]
    return Clip(
        f"{person} {motion}", filmed.frames[0], filmed.masks[0], depth, truth.normals_camera[0],
        with_room(depth, distance, rig.K[0], float(posed.vertices[..., 1].max())), rig,
        truth.depth, truth.normals_camera, seen.unflatten(0, (V, frames)),
        [cKDTree(surface_samples(body)) for body in posed.vertices],
    )  # fmt: skip


def surface_samples(vertices: Tensor) -> Tensor:  # [N, 3] -> [M, 3]
    """Corners, middles of edges and middles of triangles: no point of the body's surface is more
    than 1.6 cm from one (its longest edge is 6.3 cm, the median 0.8)."""
    from turnaround.models.performer import load_performers

    corners = vertices[load_performers().faces]
    edges = (corners + corners.roll(1, 1)) / 2
    return torch.cat([vertices, edges.flatten(0, 1), corners.mean(1)])


def load_human_net():
    """The embedded human net, without ComfyUI."""
    from safetensors.torch import load_file
    from turnaround.models.human_net import HumanNet, human_layout

    file = ROOT / "models" / "tiny" / "human" / "turnaround_tiny_human.safetensors"
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    net = HumanNet(*human_layout(weights))
    net.load_state_dict(weights)
    return net.eval()


EXACT, FAULTY, MIXED, HUMAN = (
    "exact depth", "depth with errors", "depth with errors, the rest from the human net",
    "the human net's depth",
)  # fmt: skip


def sources(clip: Clip, net, seed: int) -> list[Given]:
    """The depth sources of a clip."""
    from turnaround.models.human_frames import estimate_humans

    g = torch.Generator().manual_seed(seed)
    faulty = relative_map(clip.scene, g)
    coarse, rough = coarse_depth(clip.depth, g), rough_normals(clip.normals, g)
    found = estimate_humans(net, clip.frames, float(clip.rig.K[0, 1, 1]))
    return [
        Given(EXACT, clip.depth, clip.masks, rough),
        Given(FAULTY, faulty, clip.masks, rough, coarse),
        Given(MIXED, faulty, found.masks, found.normals, found.depth),
        Given(HUMAN, found.depth, found.masks, found.normals),
    ]


# --- stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stages:
    """What is done to the depth; the defaults of the nodes."""

    align: bool = True
    steadiness: float = 1.0
    smears: bool = True
    """Cut before refinement, which fills them again."""
    refine: bool = True
    floaters: bool = True
    edges: bool = True
    erosion: int = 1


ALL, NO_FILTER = Stages(), "none of the three filters"
ROWS = {
    "all stages": ALL,
    "without alignment": replace(ALL, align=False),
    "alignment frame by frame": replace(ALL, steadiness=0.0),
    "without cutting smears": replace(ALL, smears=False),
    "without refinement": replace(ALL, refine=False, smears=False),
    "without floater removal": replace(ALL, floaters=False),
    "without edge filters": replace(ALL, edges=False),
    "without erosion": replace(ALL, erosion=0),
    "floater removal as the only filter": replace(ALL, edges=False, erosion=0),
    "edge filters as the only filter": replace(ALL, floaters=False, erosion=0),
    "erosion as the only filter": replace(ALL, floaters=False, edges=False),
    NO_FILTER: replace(ALL, floaters=False, edges=False, erosion=0),
    "no stage at all": Stages(False, 0.0, False, False, False, False, 0),
}
NEEDS_RELATIVE = ("without alignment", "alignment frame by frame")


def rows_of(given: Given) -> dict[str, Stages]:
    """Depth in metres is not aligned."""
    return {
        name: stages for name, stages in ROWS.items()
        if given.metric is not None or name not in NEEDS_RELATIVE
    }  # fmt: skip


def finished_depth(given: Given, K: Tensor, stages: Stages) -> Tensor:  # [F, H, W] metres
    """Alignment and refinement."""
    from turnaround.models.align_depth import align_depth
    from turnaround.models.clean_points import smeared
    from turnaround.models.depth import depth_to_metres
    from turnaround.models.refine_depth import refine_depth

    depth = given.depth
    if given.metric is not None and stages.align:
        depth = align_depth(depth, given.metric, given.masks, True, stages.steadiness).metres
    elif given.metric is not None:
        focal = float(K[1, 1])
        depth, _ = depth_to_metres(depth, given.masks, "near is white", focal, PERSON_HEIGHT)
    if stages.smears:
        depth = torch.where(smeared(depth, given.masks, K), 0.0, depth)
    if stages.refine:
        depth = refine_depth(depth, given.normals, given.masks, K)
    return depth


@contextmanager
def edge_filters(on: bool):
    """Points seen at a grazing angle kept, and normals taken across depth jumps, when off."""
    from turnaround.models import points

    limits = {"GRAZING_COSINE": 0.0, "EDGE_JUMP": math.inf, "STEEPEST": math.inf}
    kept = {name: getattr(points, name) for name in limits}
    if not on:
        vars(points).update(limits)
    try:
        yield
    finally:
        vars(points).update(kept)


def make_cloud(clip: Clip, given: Given, depth: Tensor, stages: Stages):
    """The filters, and the seen points."""
    from turnaround.models.clean_points import floaters
    from turnaround.models.points import points_from_surface, surface_from_depth

    K = clip.rig.K[0]
    outliers = floaters(depth, given.masks, K) if stages.floaters else None
    with edge_filters(stages.edges):
        surface = surface_from_depth(depth, given.masks, K, stages.erosion, outliers)
        return points_from_surface(clip.frames, surface, K, FPS, far_side=False)


# --- measures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """What a column is called, and when one of its numbers is better than another."""

    name: str
    unit: str
    best: float
    notable: float
    """Differences below this are not spoken of."""
    digits: int = 1

    @property
    def title(self) -> str:
        mark = {0.0: " ↓", math.inf: " ↑"}.get(self.best, f" (best {self.best:.0f})")
        return f"{self.name} {self.unit}{mark}"

    def better(self, a: float, b: float) -> bool:
        return a > b if math.isinf(self.best) else abs(a - self.best) < abs(b - self.best)


VIEW_COLUMNS = {
    "angle": Column("normals", "°", 0, 0.3),
    "angle_median": Column("normals, median", "°", 0, 0.3),
    "coverage": Column("coverage", "%", math.inf, 0.5),
    "wrong": Column("wrongly visible", "%", 0, 0.3),
    "outside": Column("outside", "%", 0, 0.3),
}
CLIP_COLUMNS = {
    "floaters": Column("floaters", "%", 0, 0.3),
    "depth": Column("depth", "cm", 0, 0.2),
    "shape": Column("shape", "cm", 0, 0.05, 2),
    "relief": Column("relief", "%", 100, 2, 0),
    "tremble": Column("tremble", "cm", 0, 0.1),
}
COLUMNS = VIEW_COLUMNS | CLIP_COLUMNS
MOVED = "moved "
"""Before a column's key: the same, after the clip was brought to its true distance."""
Scores = dict[str, list[float]]
"""Of every column, one number a view, or one alone."""


def grown(regions: Tensor) -> Tensor:  # [V, F, H, W] bool
    """By one pixel: a splat's rounding is no mistake."""
    return F.max_pool2d(regions.float(), 3, 1, 1) > 0


def angles(a: Tensor, b: Tensor) -> Tensor:  # [..., 3] -> [...] degrees
    cross = torch.linalg.cross(a.double(), b.double(), dim=-1).norm(dim=-1)
    return torch.rad2deg(torch.atan2(cross, (a.double() * b.double()).sum(-1)))


def view_scores(
    visibility: Tensor,  # [V, F, H, W] 1 = seen, 0.5 = unseen side, 0 = nothing
    normals: Tensor,  # [V, F, 3, H, W] camera axes
    body: Tensor,  # [V, F, H, W] bool, the truth
    seen: Tensor,  # [V, F, H, W] bool, the truth
    true_normals: Tensor,  # [V, F, 3, H, W] camera axes
) -> Scores:
    """What is drawn against the truth, view by view; percent and degrees."""
    ours, drawn = visibility > 0.75, visibility > 0.25
    wrong, outside = ours & ~grown(seen), drawn & ~grown(body)
    found: Scores = {name: [] for name in VIEW_COLUMNS}
    for v in range(len(body)):
        size = max(1, int(body[v].sum()))
        both = ours[v] & seen[v]
        enough = int(seen[v].sum()) > LEAST_SHARE * size
        off = angles(normals[v].movedim(1, -1)[both], true_normals[v].movedim(1, -1)[both])
        judged = enough and len(off) > 0
        found["angle"].append(float(off.mean()) if judged else math.nan)
        found["angle_median"].append(float(off.median()) if judged else math.nan)
        share = 100 * int(both.sum()) / max(1, int(seen[v].sum()))
        found["coverage"].append(share if enough else math.nan)
        found["wrong"].append(100 * int(wrong[v].sum()) / size)
        found["outside"].append(100 * int(outside[v].sum()) / size)
    return found


def point_depths(cloud, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Of every point [N]: its depth in the source camera, and the true one of its pixel (0 = none).

    depth [F, H, W]: metres in the source camera; 0 = background.
    """
    from turnaround.models.cameras import project

    H, W = depth.shape[1:]
    pixels, z = project(cloud.positions, cloud.source)
    x, y = (pixels[0, :, i].long().clamp(0, n - 1) for i, n in ((0, W), (1, H)))
    frame = torch.repeat_interleave(torch.arange(len(depth)), cloud.frame_offsets.diff())
    return z[0], depth[frame, y, x]


def at_true_distance(cloud, depth: Tensor):
    """The clip moved along its rays by ONE number, so that its median depth is true."""
    z, truth = point_depths(cloud, depth)
    nearer = float((truth / z)[truth > 0].median())
    T = cloud.source.T_camera_world[0]
    camera = (cloud.positions @ T[:3, :3].T + T[:3, 3]) * nearer
    world = (camera - T[:3, 3]) @ T[:3, :3]
    return replace(cloud, positions=world, radii=cloud.radii * nearer)


def resistant_slope(x: Tensor, y: Tensor) -> float:
    """Slope of y over x from the medians of the lower and the upper third: outliers don't turn it."""
    order = x.argsort()
    third = max(1, len(x) // 3)
    low, high = order[:third], order[-third:]
    run = x[high].median() - x[low].median()
    return float((y[high].median() - y[low].median()) / run) if run > 1e-9 else math.nan


def depth_scores(
    cloud,  # OrientedPoints
    depth: Tensor,  # [F, H, W] true metres in the source camera; 0 = background
    to_world: Tensor,  # [4, 4] source camera -> the world of the surfaces
    surfaces: list,  # search trees of the true surface
) -> Scores:
    """Of the points: distance, shape, steadiness and floaters; centimetres and percent."""
    z, truth = point_depths(cloud, depth)
    T = to_world @ cloud.source.T_camera_world[0]
    eye = to_world[:3, 3]
    shape, relief, middles, floating = [], [], [], 0
    for f in range(cloud.frame_count):
        own = cloud.frame(f)
        known = truth[own] > 0
        if not known.any():
            continue
        # What is too far as a whole is no floater: the frame is brought to its true distance.
        nearer = (truth[own] / z[own])[known].median()
        shape.append((z[own] * nearer - truth[own])[known])
        relief.append(resistant_slope(truth[own][known], z[own][known]))
        middles.append((z[own] - truth[own])[known].median())
        points = cloud.positions[own] @ T[:3, :3].T + T[:3, 3]
        apart, _ = surfaces[f].query((eye + (points - eye) * nearer).cpu().numpy())
        floating += int((apart > FLOATING).sum())
    steady = torch.stack(middles)
    return {
        "floaters": [100 * floating / len(cloud.positions)],
        "depth": [100 * float((z - truth)[truth > 0].abs().median())],
        "shape": [100 * float(torch.cat(shape).abs().median())],
        "relief": [100 * mean(relief)],
        "tremble": [100 * float(steady.std()) if len(steady) > 1 else math.nan],
    }


@dataclass(frozen=True)
class Drawn:
    """What the targets are told."""

    visibility: Tensor
    """[V, F, H, W] 1 = seen, about 0.5 = unseen side, 0 = nothing."""
    normals: Tensor
    """[V, F, 3, H, W] 0..1 colours."""


def conditions_of(clip: Clip, cloud) -> Drawn:
    """The cloud drawn by the targets, which stand around the true middle of the performer."""
    from turnaround.models.geometry import render_conditions

    to_source = clip.rig.T_camera_world[0].inverse() @ cloud.source.T_camera_world[0]
    rig = replace(clip.rig, T_camera_world=clip.rig.T_camera_world @ to_source)
    drawn = render_conditions(cloud, rig)
    return Drawn(drawn.visibility.float() / 255, drawn.normals.float() / 255)


def decoded(colors: Tensor) -> Tensor:  # [..., 3, H, W] 0..1 -> camera axes
    """Normal colours (right, up, towards the camera) as x right, y down, z away."""
    return (2 * colors - 1) * torch.tensor([1.0, -1.0, -1.0])[:, None, None]


def scores_of_views(clip: Clip, drawn: Drawn) -> Scores:
    return view_scores(
        drawn.visibility, decoded(drawn.normals), clip.view_depth > 0, clip.seen, clip.view_normals
    )


# --- the run --------------------------------------------------------------------------------------

Found = dict[str, dict[str, list[Scores]]]
"""Source -> row -> one `Scores` a clip."""
SHOWN = (
    (EXACT, "all stages", MOVED), (FAULTY, "all stages", MOVED), (FAULTY, "without alignment", ""),
    *((FAULTY, name, MOVED) for name in (
        "without refinement", "without floater removal", "without edge filters", "without erosion",
        NO_FILTER,
    )),
    (HUMAN, "all stages", MOVED), (HUMAN, "all stages", ""),
)  # fmt: skip
"""Rows of the picture: source, setting, and where the cloud stands."""


def evaluate(clip: Clip, given: Given, found: Found, shown: dict | None) -> None:
    """All rows of one clip and source."""
    depths: dict[Stages, Tensor] = {}
    to_world = clip.rig.T_camera_world[0].inverse()
    for name, stages in rows_of(given).items():
        key = replace(stages, floaters=True, edges=True, erosion=0)
        if key not in depths:
            depths[key] = finished_depth(given, clip.rig.K[0], stages)
        cloud = make_cloud(clip, given, depths[key], stages)
        scores = depth_scores(cloud, clip.depth, to_world, clip.surfaces)
        for kind, placed in (("", cloud), (MOVED, at_true_distance(cloud, clip.depth))):
            drawn = conditions_of(clip, placed)
            scores |= {kind + c: values for c, values in scores_of_views(clip, drawn).items()}
            if shown is not None:
                shown[given.name, name, kind] = marked(drawn, clip, len(clip.depth) // 2)
        found.setdefault(given.name, {}).setdefault(name, []).append(scores)


def mean(values: list[float]) -> float:
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def total(clips: list[Scores], column: str) -> float:
    """Over views, then over clips."""
    return mean([mean(scores[column]) for scores in clips])


def number(value: float, digits: int = 1) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def overall_table(rows: dict[str, list[Scores]], columns: dict[str, Column], kind: str = "") -> str:
    """One row a setting, means over views and clips."""
    lines = [
        "| | " + " | ".join(c.title for c in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, clips in rows.items():
        cells = [number(total(clips, kind + c), column.digits) for c, column in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def view_table(rows: dict[str, list[Scores]], kind: str) -> str:
    """By target azimuth, five numbers a cell."""
    columns = [c for c in VIEW_COLUMNS if c != "angle_median"]
    lines = [
        "| " + " / ".join(f"{a}°" for a in AZIMUTHS) + " | "
        + " | ".join(VIEW_COLUMNS[c].title for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]  # fmt: skip
    for name, clips in rows.items():
        cells = [
            " / ".join(number(mean([s[kind + c][v] for s in clips])) for v in range(len(AZIMUTHS)))
            for c in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def source_part(source: str, rows: dict[str, list[Scores]]) -> str:
    """A source's heading, words and tables."""
    return f"""## {source[0].upper()}{source[1:]}

{SOURCE_TEXT[source]}

{overall_table(rows, COLUMNS)}

The views again, after the clip was moved along its rays by one number to its true distance:

{overall_table(rows, VIEW_COLUMNS, MOVED)}

<details><summary>By target azimuth</summary>

As placed:

{view_table(rows, "")}

At the true distance:

{view_table(rows, MOVED)}

</details>
"""


def effects(without: list[Scores], with_it: list[Scores], kind: str) -> tuple[list[str], list[str]]:
    """What a stage buys and what it costs, from without it to with it; views at the place `kind`."""
    gains, losses = [], []
    for key, column in COLUMNS.items():
        place = kind if key in VIEW_COLUMNS else ""
        before, after = total(without, place + key), total(with_it, place + key)
        if not abs(after - before) >= column.notable:
            continue
        numbers = f"{number(before, column.digits)} → {number(after, column.digits)}"
        better = column.better(after, before)
        (gains if better else losses).append(f"{column.name} {numbers} {column.unit}")
    return gains, losses


STAGES_OFF = {
    "Alignment": ("without alignment", "all stages"),
    "Its temporal term": ("alignment frame by frame", "all stages"),
    "Refinement": ("without refinement", "all stages"),
    "Cutting smears before refinement": ("without cutting smears", "all stages"),
    "Floater removal, after the other filters": ("without floater removal", "all stages"),
    "Floater removal alone": (NO_FILTER, "floater removal as the only filter"),
    "Edge filters, after the other filters": ("without edge filters", "all stages"),
    "Edge filters alone": (NO_FILTER, "edge filters as the only filter"),
    "Erosion, after the other filters": ("without erosion", "all stages"),
    "Erosion alone": (NO_FILTER, "erosion as the only filter"),
}
"""What is spoken of: a stage, the row without it and the row with it."""


def reading(found: Found) -> str:
    """Every stage's gains and losses in words, from the numbers of this very run."""
    lines = []
    for stage, (off, on) in STAGES_OFF.items():
        lines.append(f"**{stage}**\n")
        for source, rows in found.items():
            if off not in rows:
                continue
            # Alignment is about the place; what the others do must not drown in a wrong one.
            kind = "" if off == "without alignment" else MOVED
            gains, losses = effects(rows[off], rows[on], kind)
            lines.append(
                f"- {source}: buys {', '.join(gains) or 'nothing notable'}; "
                f"costs {', '.join(losses) or 'nothing notable'}."
            )
        lines.append("")
    return "\n".join(lines)


def rim_share(masks: Tensor) -> float:  # [F, H, W] 0..1 -> percent
    """How much of the body one pixel of erosion takes."""
    from turnaround.models.points import erode

    body = masks > 0.5
    return 100 - 100 * int(erode(body, 1).sum()) / int(body.sum())


def plain_words(found: Found, sizes: list[tuple[float, float]]) -> str:
    """What to make of it, with this run's numbers; `sizes`: a clip's body pixels and its rim, %."""

    def of(source: str, row: str, key: str) -> str:
        column = COLUMNS[key.removeprefix(MOVED)]
        return f"{number(total(found[source][row], key), column.digits)} {column.unit}"

    def change(source: str, off: str, on: str, key: str) -> str:
        return f"{of(source, off, key).split()[0]} → {of(source, on, key)}"

    whole, bare, raw = "all stages", "no stage at all", "without refinement"
    pixels, rim = (mean([size[i] for size in sizes]) for i in (0, 1))
    return f"""- The ceiling of this picture size: exact depth and no stage at all draws {of(EXACT, bare, "coverage")} of what both cameras
  see, {of(EXACT, bare, "angle")} from the true normals. The rest lies between pixels and on surface seen at a grazing
  angle.
- Erosion, exact depth: coverage {change(EXACT, "without erosion", whole, "coverage")}. The body has {pixels:.0f} pixels in the source
  picture, and one pixel all round is {rim:.0f} % of them; it is cheaper in larger pictures. With blurred edges
  it takes smears away: wrongly visible {change(FAULTY, "without erosion", whole, MOVED + "wrong")}.
- Where edges are ramps and nothing else is done about them, floater removal alone brings the wrongly
  visible {change(FAULTY, NO_FILTER, "floater removal as the only filter", MOVED + "wrong")}, the edge filters alone {change(FAULTY, NO_FILTER, "edge filters as the only filter", MOVED + "wrong")}, erosion alone {change(FAULTY, NO_FILTER, "erosion as the only filter", MOVED + "wrong")}, all three together
  {of(FAULTY, whole, MOVED + "wrong")}: to a large part they take away the same pixels.
- Points far from the surface are not only strays: a body that is too flat or too deep has them
  everywhere, and no filter sees that. With errors, relief after alignment is {of(FAULTY, whole, "relief")} of the truth
  ({of(FAULTY, raw, "relief")} before refinement); with the human net's depth to align with, {of(MIXED, whole, "relief")}.
- Refinement by normals with 10° of noise: normals {change(FAULTY, raw, whole, MOVED + "angle")} where the depth is noisy, but
  {change(EXACT, raw, whole, MOVED + "angle")} where it was exact: don't refine depth that is better than the normals.
- The human net alone is {of(HUMAN, whole, "depth")} off in distance, sways by {of(HUMAN, whole, "tremble")}, and gives {of(HUMAN, whole, "relief")} of the relief:
  hardly to be seen from the front, and plain from the side.
- At 135° the source camera saw only a rim of what shows, at 180° nothing worth counting: there the
  sampler has to invent, and the geometry can only avoid claiming what it doesn't know."""


def page(
    found: Found, names: list[str], sizes: list[tuple[float, float]], frames: int, minutes: float
) -> str:
    """docs/GEOMETRY.md"""
    parts = [source_part(source, rows) for source, rows in found.items()]
    e = Errors()
    return f"""# Quality of the geometry

Written by `.venv/bin/python tests/evaluate_geometry.py`, everything in one run; not edited by hand.
{datetime.date.today().isoformat()}, commit {commit()}, {machine()}, torch {torch.__version__},
{minutes:.1f} minutes.

Synthetic people and motions that no training saw ({", ".join(names)}), {frames} frames each at
{FPS:.0f} a second, source picture {WIDTH}x{HEIGHT}, vertical field of view {FOV:.0f}°, an indoor
background. The targets stand around the **true** middle of the performer at
{", ".join(f"{a}°" for a in AZIMUTHS)} from the source camera, at its distance, and the cloud stands
where the source camera's world puts it: what is placed too near or too far is drawn at the wrong
place from the side, and every column of the views pays for it. In a graph the rig stands around the
cloud's own middle, so that a wrong distance costs size alone: the second table of each source, with
the clip brought to its true distance, comes nearer to that. Only seen points are drawn (far side
open), so nothing guessed counts as seen. Each row takes one stage away from "all stages".

![Normals of one person from five sides](pictures/geometry_stages.jpg)

One frame of {names[0]}: normal maps, black where the unseen side is drawn; moved to the true distance,
but for the rows "as placed". **Red**: drawn beside the true body. **Yellow**: drawn as
seen, but the source camera never saw what is there. An empty cell: drawn beside what the
cell shows.

{chr(10).join(parts)}
## What each stage buys, and where it does harm

Differences below a small threshold ({", ".join(f"{c.name} {c.notable:g} {c.unit}" for c in COLUMNS.values())})
are left out. Means over views and clips, a → b is from without the stage to with it; views at the true
distance, but for alignment itself, which is judged as placed.

{reading(found)}
## In plain words

{plain_words(found, sizes)}

## Columns

- *normals*: angle between the drawn normal and the true one, where the drawn map and the truth both
  say "seen". Mean and median over the pixels.
- *coverage*: of the pixels of the target that show body which the source camera saw too (its surface
  is the nearest in both cameras, within 1 cm by the triangle's own plane), the share drawn as seen.
- *wrongly visible*: pixels drawn as seen where the truth is the unseen side or nothing, in percent
  of the true body's pixels. One pixel beside truly seen body is forgiven: splats are round.
- *outside*: drawn pixels, seen or not, that lie beside the true silhouette, in percent of the true
  body's pixels; again one pixel is forgiven.
- *floaters*: points farther than {100 * FLOATING:.0f} cm from the true surface of their frame, in percent of all
  points. Nearest distance to corners, middles of edges and middles of triangles of the true mesh
  (no surface is more than 1.6 cm from one). Before that each frame is moved along its
  rays by ONE number, so that its median distance is true: a performer who stands wrong as a whole is
  the next column's matter.
- *depth*: median distance of the points' depth from the truth. *shape*: the same after each frame was
  brought to its true median distance. *relief*: how deep the body is, front to back, compared with
  the truth: below 100 it is flattened (slope of depth over true depth, from the medians of the
  nearest and the farthest third of a frame's points). *tremble*: standard deviation over the clip of a frame's median
  depth error: how far the performer sways to and fro.
- Means over the azimuths leave out angle and coverage of views where the source saw less than
  {100 * LEAST_SHARE:.0f} % of the body (–).

## The errors

*Depth with errors* is a picture as depth networks give it: inverse depth of the whole scene (floor,
and a wall 2.5 m behind the performer), near is white. Wobble: {100 * e.wobble:.1f} % of the depth, smooth over
a third of the picture and four frames. Blur: Gaussian, {e.blur} pixels, across silhouette and
self-occlusions. Noise: {100 * e.noise:.1f} % of the range. Drift: random walk from frame to frame, scale
{100 * e.scale_drift:.0f} % and shift {100 * e.shift_drift:.1f} % of the range a step. Banding: {e.levels} levels over the scene's range.
The metric depth to align with: the truth in cells of 8x8 pixels, 5 % noise a cell and 2 % a frame.
Normals: exact ones turned by 10° (root mean square) of noise, smooth over two pixels. The mask is
exact. Without alignment the picture is placed as Performer Geometry places "near is white": by a
height of {PERSON_HEIGHT} m and a plausible thickness.
"""


SOURCE_TEXT = {
    EXACT: "The best that this camera and picture size allow; normals have 10° of noise.",
    FAULTY: "A network's picture, aligned with a coarse metric depth; exact mask, normals with 10° "
    "of noise.",
    MIXED: "The same picture; mask, normals and the metric depth to align with are the embedded "
    "human net's: everything here could be had from a clip alone.",
    HUMAN: "Mask, metric depth and normals as Human Geometry gives them, from the pictures alone. "
    "The net was trained on synthetic people of the same making (other bodies, motions, clothes): "
    "real clips are harder.",
}


# --- the picture ----------------------------------------------------------------------------------

LARGEST = 245_000
"""Bytes of the picture."""
RED, YELLOW = (0.95, 0.1, 0.1), (0.95, 0.85, 0.1)


def painted(normals: Tensor, wrong: Tensor, outside: Tensor) -> Tensor:  # [V, 3, H, W]
    """Normal colours with the mistakes marked."""
    picture = normals.clone()
    for where, color in ((wrong, YELLOW), (outside, RED)):
        picture = torch.where(where[:, None], torch.tensor(color)[:, None, None], picture)
    return picture


def marked(drawn: Drawn, clip: Clip, f: int) -> Tensor:  # [V, 3, H, W]
    """One frame from all targets."""
    visibility, body, seen = (
        t[:, f : f + 1] for t in (drawn.visibility, clip.view_depth > 0, clip.seen)
    )
    wrong = (visibility > 0.75) & ~grown(seen)
    outside = (visibility > 0.25) & ~grown(body)
    return painted(drawn.normals[:, f], wrong[:, 0], outside[:, 0])


def true_picture(clip: Clip, f: int) -> Tensor:  # [V, 3, H, W]
    """What a perfect row would show."""
    from turnaround.models.geometry import BACKGROUND, encode_normals

    colors = encode_normals(clip.view_normals[:, f].movedim(1, -1)).movedim(-1, 1)
    colors = torch.where(clip.seen[:, f, None], colors, 0.0)
    return torch.where(clip.view_depth[:, f, None] > 0, colors, BACKGROUND)


def sheet(clip: Clip, shown: dict):
    """Rows = sources and stages, columns = targets, as a Pillow image."""
    from PIL import Image, ImageDraw, ImageFont

    f = len(clip.depth) // 2
    rows = [("the truth", true_picture(clip, f))]
    for key in SHOWN:
        source, name, kind = key
        rows.append((f"{source}: {name}" + ("" if kind else " (as placed)"), shown[key]))
    boxes = [bounds(view > 0) for view in clip.view_depth[:, f]]
    top, bottom = min(b[1] for b in boxes), max(b[3] for b in boxes)
    h, side, head = zoomed(bottom - top), 150, 24
    lefts = [side]
    for left, _, right, _ in boxes:
        lefts.append(lefts[-1] + zoomed(right - left))
    picture = Image.new("RGB", (lefts[-1], head + len(rows) * h), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for azimuth, x, end in zip(AZIMUTHS, lefts, lefts[1:], strict=False):
        pen.text(((x + end) // 2, 4), f"{azimuth}°", fill="black", font=font, anchor="ma")
    for r, (name, views) in enumerate(rows):
        words = "\n".join(textwrap.wrap(name, 18))
        pen.text((6, head + r * h + h // 2), words, fill="black", font=font, anchor="lm")
        for view, box, x in zip(views, boxes, lefts, strict=False):
            part = (view[:, top:bottom, box[0] : box[2]].clamp(0, 1) * 255).round().byte()
            tile = Image.fromarray(part.permute(1, 2, 0).numpy())
            picture.paste(tile.resize((zoomed(tile.width), h)), (x, head + r * h))
    return picture


def bounds(where: Tensor) -> tuple[int, int, int, int]:  # [H, W] bool
    """Left, top, right, bottom, with room around for what floats."""
    H, W = where.shape
    ys, xs = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
    return (
        max(0, int(xs[0]) - 16), max(0, int(ys[0]) - 6),
        min(W, int(xs[-1]) + 17), min(H, int(ys[-1]) + 7),
    )  # fmt: skip


def zoomed(pixels: int) -> int:
    return round(1.3 * pixels)


def save_small(picture, path: Path) -> None:
    """As a JPEG of the best quality that stays below LARGEST."""
    for quality in range(85, 40, -5):
        picture.save(path, quality=quality, optimize=True)
        if path.stat().st_size < LARGEST:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one clip, two frames, only shown")
    parser.add_argument("--picture", type=Path, help="where else to write the picture")
    args = parser.parse_args()
    count, frames = (1, 2) if args.quick else (len(CLIPS), FRAMES)
    began = time.monotonic()
    found: Found = {}
    picture, names, sizes = None, [], []
    torch.set_num_threads(THREADS)  # the tests keep to two
    with torch.inference_mode():
        net = load_human_net()
        for n, (person, motion) in enumerate(CLIPS[:count]):
            say(f"{person} {motion}: film and truth")
            clip = make_clip(person, motion, FIRST_CLOTHES + n, frames)
            names.append(clip.name)
            sizes.append(
                (float((clip.masks > 0.5).sum((1, 2)).float().mean()), rim_share(clip.masks))
            )
            shown = {} if n == 0 else None
            for given in sources(clip, net, seed=n):
                say(f"  {given.name}")
                evaluate(clip, given, found, shown)
            picture = picture or sheet(clip, shown)
    text = page(found, names, sizes, frames, (time.monotonic() - began) / 60)
    if args.quick:
        sys.stdout.write(text)
    else:
        PAGE.write_text(text, encoding="utf-8")
        save_small(picture, PICTURE)
        say(f"Written: {PAGE.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}")
    if args.picture:
        picture.save(args.picture)


if __name__ == "__main__":
    main()
