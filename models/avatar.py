"""Avatar: what Distill Avatar gives; a 4D performer to look at from anywhere, to move and to save.

Stage: VIEWS + RIG [+ BODY] -> AVATAR -> Gaussians of any time (`at`). Frame: world of the pack (x
right, y down, z forward, metres). Time is counted in frames and may lie between two.

On a body (`SkinMotion`) the Gaussians stand on its template and follow any motion and shape of the
same mesh; without one (`NodeMotion`) they follow control nodes through the motion they were learned
from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .avatar_free import Followed, Nodes, between, moved
from .avatar_light import NUMBERS, lit
from .avatar_mesh import Skin, SkinSpots, pose_spots, posed, spots_of
from .avatar_uv import Atlas, DetailNet, Shown, detailed, moved_maps
from .body import Body
from .fit_body import Places
from .quats import turned
from .splats import Splats
from .whole_file import whole_file


@dataclass(frozen=True)
class Detail:
    """What changes with the pose: a trained net, and what it was trained on."""

    net: DetailNet
    shown: Shown


@dataclass(frozen=True)
class SkinMotion:
    """Gaussians hang on a body."""

    body: Body
    """The motion that the avatar plays; its template is where the Gaussians stand."""
    places: Places
    """[n] of the body's triangles."""
    light: Tensor
    """[9, 3], `avatar_light`."""
    detail: Detail | None = None

    def __post_init__(self) -> None:
        _check_numbers(self.places.faces, len(self.body.faces), "triangle")
        _check_light(self.light)

    @property
    def frame_count(self) -> int:
        return self.body.frame_count

    @cached_property
    def spots(self) -> SkinSpots:
        return spots_of(self.places, self.body.rest, self.body.faces)

    @cached_property
    def skin(self) -> Skin:
        return Skin(self.body.rest, self.body.faces)

    @cached_property
    def atlas(self) -> Atlas:
        assert self.detail is not None
        size = max(self.detail.shown.low.shape[-2:])
        return Atlas(self.body.rest, self.body.faces, size)

    def at(self, splats: Splats, time: float) -> Splats:
        vertices = between(self.body.vertices, time)
        pose = self.skin.pose(vertices)
        if self.detail is not None:
            maps = moved_maps(self.atlas, self.body.rest, pose)
            offsets = self.detail.net(self.detail.shown.hold(maps))
            rest = self.body.rest[:, 1]
            read = self.atlas.places(self.spots).read(offsets)
            splats = detailed(splats, read, float(rest.amax() - rest.amin()))
        stand = pose_spots(self.spots, pose)
        return lit(posed(splats, self.spots, stand), stand.normals, self.light)


@dataclass(frozen=True)
class NodeMotion:
    """Gaussians follow control nodes."""

    nodes: Nodes
    followed: Followed
    normals: Tensor
    """[n, 3] canonical, outwards, of length 1."""
    light: Tensor
    """[9, 3], `avatar_light`."""

    def __post_init__(self) -> None:
        _check_numbers(self.followed.nodes, len(self.nodes.places), "control node")
        if self.normals.shape != (len(self.followed), 3):
            raise ValueError(
                f"{len(self.followed)} Gaussians have normals of shape {list(self.normals.shape)}."
            )
        _check_light(self.light)

    @property
    def frame_count(self) -> int:
        return self.nodes.frame_count

    def at(self, splats: Splats, time: float) -> Splats:
        world, turns = moved(splats, self.followed, self.nodes, time)
        return lit(world, turned(turns, self.normals), self.light)


def _check_light(light: Tensor) -> None:
    if light.shape != (NUMBERS, 3):
        raise ValueError(f"A light has shape [{NUMBERS}, 3], not {list(light.shape)}.")


def _check_numbers(numbers: Tensor, count: int, what: str) -> None:
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
        raise ValueError(
            f"A Gaussian follows {what} {int(numbers.max())}, but there are {count}: distil the "
            "avatar again."
        )


@dataclass(frozen=True)
class Avatar:
    """N Gaussians and how they move."""

    splats: Splats
    """[N] canonical: on the body's template, or as the control nodes have them at rest."""
    motion: SkinMotion | NodeMotion
    fps: float
    """Frames a second."""

    def __post_init__(self) -> None:
        hung = self.motion.places.faces if isinstance(self.motion, SkinMotion) else (
            self.motion.followed.nodes
        )  # fmt: skip
        if len(hung) != len(self.splats) or not len(self.splats):
            raise ValueError(
                f"An avatar of {len(self.splats)} Gaussians has {len(hung)} that move: distil it "
                "again."
            )
        if not self.fps > 0:
            raise ValueError(f"Frames a second must be above 0, got {self.fps}.")

    @property
    def frame_count(self) -> int:
        return self.motion.frame_count

    @property
    def on_body(self) -> bool:
        """Whether it can take another motion or shape."""
        return isinstance(self.motion, SkinMotion)

    @torch.no_grad()
    def at(self, time: float) -> Splats:
        """The Gaussians in the world at a time in frames."""
        return self.motion.at(self.splats, time)

    def moved(self, body: Body) -> Avatar:
        """The same person in the motion and the shape of another body of the same mesh. Its template
        is not looked at: the Gaussians stand on the avatar's own."""
        if not isinstance(self.motion, SkinMotion):
            raise ValueError(
                "This avatar was distilled without a body, so it can't take another motion: connect "
                "'body' at Distill Avatar."
            )
        mine = self.motion.body
        if body.vertices.shape[1] != len(mine.rest) or not torch.equal(
            body.faces.to(mine.faces), mine.faces
        ):
            raise ValueError(
                f"'body' has {body.vertices.shape[1]} vertices and {len(body.faces)} triangles, the "
                f"avatar's has {len(mine.rest)} and {len(mine.faces)}, or they are numbered "
                "otherwise: use the motion of the body that the avatar was distilled with."
            )
        goes = replace(mine, vertices=body.vertices.to(mine.vertices), neutral=None, fps=body.fps)
        return Avatar(self.splats, replace(self.motion, body=goes), body.fps)

    def to(self, device: torch.device) -> Avatar:
        """The same on another device."""
        tensors = {name: tensor.detach().to(device) for name, tensor in _tensors(self).items()}
        return Avatar(Splats(**_below(SPLATS, tensors)), _motion(tensors, self.fps), self.fps)

    def _comfy_cache_tensors(self) -> list[Tensor]:
        return list(_tensors(self).values())

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


# ---------------------------------------------------------------- its file

KIND = "turnaround_avatar"
SPLATS, BODY, PLACES, NODES, FOLLOWED = "splats.", "body.", "places.", "nodes.", "followed."
NET, SHOWN, LIGHT, NORMALS = "net.", "shown.", "light", "normals"
"""How the names of a file's tensors begin."""


def _named(start: str, thing: object) -> dict[str, Tensor]:
    held = {f.name: getattr(thing, f.name) for f in fields(thing)}
    return {start + k: v for k, v in held.items() if torch.is_tensor(v)}


def _tensors(avatar: Avatar) -> dict[str, Tensor]:
    tensors, motion = _named(SPLATS, avatar.splats), avatar.motion
    if isinstance(motion, NodeMotion):
        return (
            tensors
            | _named(NODES, motion.nodes)
            | _named(FOLLOWED, motion.followed)
            | {NORMALS: motion.normals, LIGHT: motion.light}
        )
    tensors |= _named(BODY, motion.body) | _named(PLACES, motion.places) | {LIGHT: motion.light}
    if motion.detail is not None:
        tensors |= {NET + k: v for k, v in motion.detail.net.state_dict().items()}
        tensors |= _named(SHOWN, motion.detail.shown)
    return tensors


def save_avatar(path: Path, avatar: Avatar) -> None:
    """Write it whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in _tensors(avatar).items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"kind": KIND, "fps": json.dumps(avatar.fps)})


def load_avatar(path: Path) -> Avatar:
    """ValueError when the file holds none."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)
    except SafetensorError as error:
        raise _unreadable(path, error) from error
    if metadata.get("kind") != KIND:
        raise ValueError(f"'{path.name}' is no avatar: choose a file that Save Avatar has written.")
    try:
        fps = float(json.loads(metadata["fps"]))
        return Avatar(Splats(**_below(SPLATS, tensors)), _motion(tensors, fps), fps)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"'{path.name}' can't be read as an avatar ({error}): save it again with Save Avatar, or copy "
        "it anew."
    )


def _motion(tensors: Mapping[str, Tensor], fps: float) -> SkinMotion | NodeMotion:
    if not _below(BODY, tensors):
        followed = Followed(**_below(FOLLOWED, tensors))
        nodes = Nodes(**_below(NODES, tensors))
        return NodeMotion(nodes, followed, tensors[NORMALS], tensors[LIGHT])
    detail = None
    if _below(NET, tensors):
        net = DetailNet().to(tensors[LIGHT].device)
        net.load_state_dict(_below(NET, tensors))
        detail = Detail(net, Shown(**_below(SHOWN, tensors)))
    body = Body(**_below(BODY, tensors), fps=fps)
    return SkinMotion(body, Places(**_below(PLACES, tensors)), tensors[LIGHT], detail)


def _below(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
