"""Body sources: where a mesh sequence comes from (stage: anything that knows a body -> BODY).

Synthetic performers, ComfyUI's MESH and MHR_POSE_DATA payloads, numbered mesh files, and Anny, a
parametric body. Every source converts its axes to the pack's once, here, and says what it guessed.

Frames of others, each reached by a half or quarter turn that mirrors nothing:
- ComfyUI's MESH, glTF, most OBJ: right-handed, y up, front towards +z.
- Blender, CAD: z up, front towards -y.
- SAM 3D Body: `pred_vertices + pred_cam_t` lie in OpenCV camera axes (x right, y down, z forward,
  metres) of a camera with `focal_length` pixels and the lens in the middle of `image_size`; its
  template (`canonical_colors["positions"]`) has y up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import performer
from .body import MAX_VERTEX_MOMENTS, Body, facing_outwards, performer_centre
from .cameras import Rig
from .skeleton import Skeleton, chained

AXES = {
    "y up": torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]]),
    "z up": torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "y down": torch.eye(3),
}
"""From the axes of a file to the pack's: `ours = matrix @ theirs`."""
USUAL_HEIGHT = (0.3, 3.0)
"""Metres: bodies outside of this were probably measured in another unit."""
MESH_FILES = (".obj", ".glb", ".ply")
SAM3D_FOCAL = 5000.0
"""Pixels: what SAM 3D Body assumes where it was told no lens."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Sourced:
    """A body, and what there is to say about it."""

    body: Body
    note: str
    camera: Rig | None = None
    """The camera that saw it, where the source knows one."""


def sample_body(
    character: str,
    motion: str,
    times: Tensor,  # [F] seconds
    clothes_seed: int,
    fps: float,
) -> Body:
    """A synthetic performer; the template is the mean body, the same for all of them."""
    look = performer.draw_appearance(clothes_seed)
    posed = performer.pose_performer(character, motion, times, look)
    bank = performer.load_performers()
    colors = performer.surface_colors(performer.surface_coordinates(bank), look)
    return Body(posed.vertices, bank.faces, bank.canonical, colors, fps=fps)


def _used(
    faces: Tensor,  # [M, 3]
    count: int,
) -> Tensor:  # numbers of vertices
    """The vertices that triangles use: others (padding, leftovers) have no part in the body."""
    if faces.ndim != 2 or faces.shape[-1] != 3 or not len(faces):
        raise ValueError("The body's source holds no triangles: connect or export a mesh.")
    used = faces.unique()
    if used[0] < 0 or used[-1] >= count:
        raise ValueError(
            f"A triangle of the body names vertex {int(used[-1])}, but there are {count}: its "
            "source is damaged, make or export it again."
        )
    return used


def _assembled(
    vertices: Tensor,  # [F, N, 3] world
    faces: Tensor,  # [M, 3]
    rest: Tensor,  # [N, 3]
    fps: float,
    colors: Tensor | None = None,  # [N, 3]
    neutral: Tensor | None = None,  # [F, N, 3]
) -> Body:
    """A body with its triangles outwards and without vertices that no triangle uses."""
    used = _used(faces, len(rest))
    if len(used) < len(rest):
        number = torch.zeros(len(rest), dtype=torch.int64)
        number[used] = torch.arange(len(used))
        vertices, rest, faces = vertices[:, used], rest[used], number[faces]
        colors = None if colors is None else colors[used]
        neutral = None if neutral is None else neutral[:, used]
    faces = facing_outwards(faces, rest)
    return Body(vertices, faces, rest, colors, neutral, fps)


def _scale(rest: Tensor, faces: Tensor, height: float) -> tuple[float, str]:
    """The factor that makes the template as tall as wanted (0 = it is in metres), and a note."""
    levels = rest[_used(faces, len(rest)), 1]
    tall = float(levels.max() - levels.min())
    if height:
        if not tall > 0:
            raise ValueError(
                "The body has no height, so it can't be scaled to the performer's: check the mesh."
            )
        return height / tall, f"scaled from {tall:.3g} to {height:g} m"
    if not USUAL_HEIGHT[0] <= tall <= USUAL_HEIGHT[1]:
        return 1.0, f"the body is {tall:.3g} m tall: if that is another unit, set performer_height"
    return 1.0, ""


def _check_topology(
    what: str,
    first: tuple,  # vertices, faces, ...
    other: tuple,
) -> None:
    if len(first[0]) != len(other[0]) or not torch.equal(first[1], other[1]):
        raise ValueError(
            f"{what} has another topology (other vertices or triangles) than the first frame: all "
            "frames must be the same mesh in motion, so export them from one animated body."
        )


def mesh_items(
    mesh: object,
    name: str,
) -> list[tuple[Tensor, Tensor]]:  # vertices [N, 3], faces [M, 3] of every item
    """The items of a ComfyUI MESH, without the padding that newer versions put behind them."""
    vertices, faces = getattr(mesh, "vertices", None), getattr(mesh, "faces", None)
    if not (torch.is_tensor(vertices) and torch.is_tensor(faces)) or vertices.ndim != 3:
        raise ValueError(f"'{name}' carries no mesh batch: connect the MESH of a 3D node.")
    if not len(vertices) or len(vertices) != len(faces):
        raise ValueError(
            f"'{name}' holds {len(vertices)} sets of vertices and {len(faces)} of faces: its "
            "source made no mesh."
        )
    items = []
    for i in range(len(vertices)):
        ends = [
            None if counts is None else int(counts[i])
            for counts in (getattr(mesh, "vertex_counts", None), getattr(mesh, "face_counts", None))
        ]
        items.append((vertices[i, : ends[0]].float().cpu(), faces[i, : ends[1]].long().cpu()))
    return items


def body_from_mesh(
    mesh: object,
    height: float,
    fps: float,
    template: object | None = None,
    neutral: object | None = None,
) -> Sourced:
    """A MESH batch whose items are frames; `height` metres of the template, 0 = it has metres."""
    items = mesh_items(mesh, "mesh")
    template_items = mesh_items(template, "template")[:1] if template is not None else items[:1]
    neutral_items = mesh_items(neutral, "neutral") if neutral is not None else []
    for name, others in (("mesh", items), ("template", template_items), ("neutral", neutral_items)):
        for number, item in enumerate(others):
            _check_topology(f"Item {number} of '{name}'", items[0], item)
    turn = AXES["y up"].T
    rest = template_items[0][0] @ turn
    scale, note = _scale(rest, items[0][1], height)
    posed = torch.stack([vertices for vertices, _ in items]) @ turn * scale
    notes = [note] if note else []
    if template is None:
        notes.append("frame 0 serves as the template")
    unmoved = None
    if neutral is not None:
        if len(neutral_items) != len(items):
            raise ValueError(
                f"'neutral' has {len(neutral_items)} frames but 'mesh' has {len(items)}: it must "
                "be the same motion without the deformation."
            )
        unmoved = torch.stack([vertices for vertices, _ in neutral_items]) @ turn * scale
    colors = getattr(mesh, "vertex_colors", None)
    if torch.is_tensor(colors):
        colors = colors[0, : len(rest), :3].float().cpu()
    body = _assembled(posed, items[0][1], rest * scale, fps, colors, unmoved)
    return Sourced(body.centred(), "; ".join(notes))


def _tensor(values: object) -> Tensor:
    return values.cpu() if torch.is_tensor(values) else torch.as_tensor(np.asarray(values))


def body_from_sam3d(
    poses: dict,  # MHR_POSE_DATA
    person: int,
    fps: float,
) -> Sourced:
    """One person of SAM 3D Body's result, and the camera that saw them."""
    if not isinstance(poses, dict) or not poses.get("frames") or poses.get("faces") is None:
        raise ValueError(
            "'pose_data' holds no frames: connect the MHR_POSE_DATA of a SAM 3D Body node."
        )
    frames = poses["frames"]
    most = max(len(people) for people in frames)
    if person >= most:
        raise ValueError(
            f"'person' is {person}, but at most {most} people were found in a frame: use 0 to "
            f"{most - 1}."
            if most
            else "SAM 3D Body found nobody in any frame: check its boxes or tracks."
        )
    there = torch.tensor([f for f, people in enumerate(frames) if len(people) > person])
    nearest = there[(torch.arange(len(frames))[:, None] - there).abs().argmin(1)].tolist()
    chosen = [frames[f][person] for f in nearest]
    if any(one.get(key) is None for one in chosen for key in ("pred_vertices", "pred_cam_t")):
        raise ValueError(
            "'pose_data' has no pred_vertices or pred_cam_t: connect the pose data of SAM 3D Body "
            "itself, not a skeleton."
        )
    vertices = [_tensor(one["pred_vertices"]).float().reshape(-1, 3) for one in chosen]
    if len({len(v) for v in vertices}) > 1:
        raise ValueError("'pose_data' mixes bodies of different meshes: run SAM 3D Body again.")
    shift = torch.stack([_tensor(one["pred_cam_t"]).float().reshape(3) for one in chosen])
    posed = torch.stack(vertices) + shift[:, None]
    notes = []
    gaps = [f for f in range(len(frames)) if nearest[f] != f]
    if gaps:
        some = ", ".join(map(str, gaps[:8])) + (", ..." if len(gaps) > 8 else "")
        notes.append(
            f"person {person} is missing in {len(gaps)} of {len(frames)} frames ({some}): the "
            "nearest frame stands in"
        )
    rest = (poses.get("canonical_colors") or {}).get("positions")
    if rest is not None and np.asarray(rest).shape == tuple(posed.shape[1:]):
        rest = _tensor(rest).float() @ AXES["y up"].T
    else:
        rest = posed[0] - posed[0].mean(0)
        notes.append("no template came along: frame 0 serves as one")
    body = _assembled(posed, _tensor(poses["faces"]).long(), rest, fps)
    camera = _sam3d_camera(poses, chosen, performer_centre(body.vertices), notes)
    return Sourced(body.centred(), "; ".join(notes), camera)


def _sam3d_camera(poses: dict, people: list[dict], centre: Tensor, notes: list[str]) -> Rig:
    """The source camera: level, with the performer's centre as the world's origin."""
    size = poses.get("image_size")
    if size is None or len(size) != 2:
        raise ValueError("'pose_data' doesn't say the size of its pictures: run SAM 3D Body again.")
    height, width = (int(n) for n in size)
    focals = [one.get("focal_length") for one in people]
    if any(focal is None for focal in focals):
        focals = [SAM3D_FOCAL]
        notes.append(f"no lens came along: {SAM3D_FOCAL:.0f} pixels of focal length are assumed")
    focal = float(torch.stack([_tensor(f).float().flatten()[0] for f in focals]).median())
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    pose = torch.eye(4)
    pose[:3, 3] = centre
    return Rig(K[None], pose[None], width, height)


def mesh_sequences(
    names: Sequence[str],
) -> dict[str, list[str]]:
    """Files by sequence: the first of every numbered run, in order, and what belongs to it."""
    runs: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        stem, dot, kind = name.rpartition(".")
        if dot + kind.lower() not in MESH_FILES:
            continue
        digits = re.search(r"\d+$", stem)
        number = int(digits[0]) if digits else 0
        key = (stem[: digits.start()] if digits else stem + "/", kind.lower())
        runs.setdefault(key, []).append((number, name))
    ordered = (sorted(run) for run in runs.values())
    return {run[0][1]: [name for _, name in run] for run in sorted(ordered, key=lambda r: r[0][1])}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts frame2 before frame10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


Part = tuple[Tensor, Tensor, Tensor | None]
"""Vertices [N, 3], faces [M, 3], colours [N, 3] or None."""


def _read_parts(path: Path) -> list[Part]:
    """Every mesh of a file, in the file's axes, in the order of their names."""
    import trimesh

    try:
        # process=False: merging equal vertices would number every frame's vertices differently.
        scene = trimesh.load_scene(path, process=False, maintain_order=True, skip_materials=True)
    except Exception as error:  # every damaged file fails in its own way
        raise ValueError(
            f"{path.name} can't be read as a mesh ({type(error).__name__}): export it again."
        ) from None
    parts = []
    for node in sorted(scene.graph.nodes_geometry, key=_natural):
        matrix, name = scene.graph[node]
        mesh = scene.geometry[name]
        if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
            continue
        vertices = trimesh.transform_points(mesh.vertices, matrix)
        colors = None
        if mesh.visual.kind == "vertex":
            colors = torch.from_numpy(np.array(mesh.visual.vertex_colors[:, :3])) / 255
        parts.append((torch.tensor(vertices).float(), torch.tensor(mesh.faces).long(), colors))
    if not parts:
        raise ValueError(f"{path.name} holds no triangles: export the body as a mesh.")
    return parts


def _joined(parts: list[Part]) -> Part:
    """Several meshes as one."""
    sizes = [len(vertices) for vertices, _, _ in parts]
    starts = np.cumsum([0, *sizes[:-1]])
    faces = torch.cat([part[1] + int(start) for part, start in zip(parts, starts, strict=True)])
    colors = [part[2] for part in parts]
    known = all(c is not None for c in colors)
    return torch.cat([part[0] for part in parts]), faces, torch.cat(colors) if known else None


def _says_it_moves(path: Path) -> bool:
    """Whether a GLB carries an animation, which no mesh reader plays."""
    if path.suffix.lower() != ".glb":
        return False
    with path.open("rb") as file:
        header = file.read(20)
        return b'"animations"' in file.read(int.from_bytes(header[12:16], "little"))


def read_body(
    paths: Sequence[Path],
    axes: str,
    height: float,
    fps: float,
    on_step: OnStep | None = None,
) -> Sourced:
    """A numbered sequence of mesh files, or one file; frame 0 serves as the template."""
    notes, frames = [], []
    for f, path in enumerate(paths):
        parts = _read_parts(path)
        alike = len(parts) > 1 and all(
            torch.equal(parts[0][1], p[1]) and len(parts[0][0]) == len(p[0]) for p in parts[1:]
        )
        if len(paths) == 1 and alike:
            frames = parts
            notes.append(f"{path.name} holds {len(parts)} meshes of one topology: taken as frames")
        else:
            frames.append(_joined(parts))
        if len(frames[0][0]) * len(paths) > MAX_VERTEX_MOMENTS:
            raise ValueError(
                f"{len(paths)} files of {len(frames[0][0])} vertices are more than fit: use fewer "
                "frames or a coarser mesh (20,000 vertices are plenty)."
            )
        _check_topology(path.name, frames[0], frames[-1])
        if on_step:
            on_step(f + 1, len(paths))
    if len(paths) == 1 and _says_it_moves(paths[0]):
        notes.append(
            "the animation in the GLB is not played: export one mesh file a frame to have it"
        )
    vertices = torch.stack([part[0] for part in frames]) @ AXES[axes].T
    scale, note = _scale(vertices[0], frames[0][1], height)
    notes += [note] if note else []
    notes.append("frame 0 serves as the template")
    vertices = vertices * scale
    body = _assembled(vertices, frames[0][1], vertices[0], fps, frames[0][2])
    return Sourced(body.centred(), "; ".join(notes))


ANKLE_HEIGHT = 0.08
"""Metres from the ground to the ankle, as the performers have it."""
PHENOTYPE = ("gender", "age", "muscle", "weight", "height", "proportions")
"""Anny's sliders, 0..1 each; gender 0 = male, 1 = female."""


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def _anny_model() -> torch.nn.Module:
    """Anny's default body; minutes the first time on a machine, then seconds."""
    try:
        import anny
    except ImportError:
        raise ValueError(
            "Anny Body needs the package anny, which is not installed: run 'pip install anny' with "
            "ComfyUI's Python, or use Sample Body."
        ) from None
    return anny.Anny(skinning_method="lbs")


@torch.inference_mode(False)
@torch.no_grad()
def anny_body(
    phenotype: Sequence[float],  # in the order of PHENOTYPE
    motion: str,
    times: Tensor,  # [F] seconds
    fps: float,
) -> Body:
    """A body of Anny's, moved by a motion that comes with the pack.

    The template is Anny's mean body (all sliders at 0.5), so that the pose maps of all bodies agree.
    """
    from .performer_bake import FRAME_OF_ANNY, JOINT_BONES, joint_of_bone

    model = _anny_model()
    turn = FRAME_OF_ANNY.T

    def shape(values: Sequence[float]) -> tuple[Tensor, Tensor]:  # vertices, bone heads
        known = {name: float(v) for name, v in zip(PHENOTYPE, values, strict=True)}
        out = model(phenotype_kwargs=known)
        return out["rest_vertices"][0].float() @ turn, out["rest_bone_heads"][0].float() @ turn

    rest, heads = shape(phenotype)
    mean, _ = shape([0.5] * len(PHENOTYPE))
    joints = heads[[model.bone_labels.index(bone) for bone in JOINT_BONES]]
    hips = [performer.JOINTS.index(name) for name in ("hip.L", "hip.R")]
    joints[0] = joints[hips].mean(0)
    owner = torch.tensor([joint_of_bone(bone) for bone in model.bone_labels])
    weights = torch.zeros(len(rest), len(performer.JOINTS))
    weights.scatter_add_(1, owner[model.vertex_bone_indices], model.vertex_bone_weights.float())
    vertices = moved(rest, joints, weights, motion, times)
    return _assembled(vertices, model.get_triangular_faces(), mean, fps).centred()


def moved(
    rest: Tensor,  # [N, 3] T- or A-pose, the pack's axes
    joints: Tensor,  # [J, 3] where performer.JOINTS are in it
    weights: Tensor,  # [N, J] skinning
    motion: str,
    times: Tensor,  # [F] seconds
) -> Tensor:  # [F, N, 3] world
    """Any body with the performers' joints, moved by one of their motions (linear blend skinning)."""
    bank = performer.load_performers()
    rotations, pelvis = performer.sample_motion(bank, motion, times)
    rotations = rotations @ performer.rest_alignment(joints)
    ankle = joints[performer.JOINTS.index("ankle.L"), 1]
    hip_height = ankle - joints[0, 1] + ANKLE_HEIGHT
    bones = joints - joints[list(performer.PARENTS)]
    places = chained(rotations, pelvis * (hip_height / performer.MOTION_HIP_HEIGHT), bones)
    return Skeleton(rest, joints, weights / weights.sum(1, keepdim=True)).skinned(rotations, places)
