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

from .avatar_free import HIDDEN, Followed, NodeCloud, Nodes, between
from .avatar_light import NUMBERS, lit
from .avatar_mesh import Skin, SkinSpots, pose_spots, posed, spots_of
from .avatar_uv import Atlas, DetailNet, Shown, detailed, moved_maps
from .body import Body
from .fit_body import Places
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

    def __len__(self) -> int:
        return len(self.places.faces)

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

    def shown(self, splats: Splats, time: float) -> Splats:
        return self.at(splats, time)


@dataclass(frozen=True)
class NodeMotion:
    """Gaussians follow control nodes; clouds of them take turns."""

    clouds: tuple[NodeCloud, ...]
    """In the order of time and of the avatar's Gaussians. Of one there are all frames."""
    light: Tensor
    """[9, 3], `avatar_light`."""

    def __post_init__(self) -> None:
        for cloud in self.clouds:
            _check_numbers(cloud.followed.nodes, len(cloud.nodes.places), "control node")
        _check_light(self.light)

    def __len__(self) -> int:
        return sum(map(len, self.clouds))

    @property
    def frame_count(self) -> int:
        return sum(cloud.nodes.frame_count for cloud in self.clouds)

    @property
    def firsts(self) -> list[int]:
        """The frame with which each cloud's turn begins."""
        counts = [cloud.nodes.frame_count for cloud in self.clouds]
        return [sum(counts[:i]) for i in range(len(counts))]

    def turn(self, time: float) -> int:
        """Which cloud is shown: that of the nearest frame."""
        return max(i for i, first in enumerate(self.firsts) if i == 0 or time >= first - 0.5)

    def at(self, splats: Splats, time: float) -> Splats:
        """All of them; hidden but for the cloud whose turn it is."""
        turn, there = self.turn(time), []
        for i in range(len(self.clouds)):
            part = self._stand(splats, i, time)
            if i != turn:
                part = replace(part, opacities=torch.full_like(part.opacities, HIDDEN))
            there.append(part)
        return Splats(*map(torch.cat, zip(*(part.tensors() for part in there), strict=True)))

    def shown(self, splats: Splats, time: float) -> Splats:
        """Those of the cloud whose turn it is."""
        return self._stand(splats, self.turn(time), time)

    def _stand(self, splats: Splats, i: int, time: float) -> Splats:
        parts = zip(
            *(t.split([len(c) for c in self.clouds]) for t in splats.tensors()), strict=True
        )
        own = Splats(*list(parts)[i])
        world, normals = self.clouds[i].at(own, time - self.firsts[i])
        return lit(world, normals, self.light)


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
        if len(self.motion) != len(self.splats) or not len(self.splats):
            raise ValueError(
                f"An avatar of {len(self.splats)} Gaussians has {len(self.motion)} that move: distil "
                "it again."
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
        """The Gaussians in the world at a time in frames: all of them, hidden where it isn't their
        turn."""
        return self.motion.at(self.splats, time)

    @torch.no_grad()
    def shown(self, time: float) -> Splats:
        """Those of `at` that have their turn: what is to be drawn."""
        return self.motion.shown(self.splats, time)

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
"""How the names of a file's tensors begin. Those of a second cloud begin with nodes1. and so on."""


def _named(start: str, thing: object) -> dict[str, Tensor]:
    held = {f.name: getattr(thing, f.name) for f in fields(thing)}
    return {start + k: v for k, v in held.items() if torch.is_tensor(v)}


def _of_cloud(name: str, i: int) -> str:
    """The first cloud's names are those of files from before there were several."""
    bare = name.removesuffix(".")
    return f"{bare}{i or ''}{name[len(bare) :]}"


def _tensors(avatar: Avatar) -> dict[str, Tensor]:
    tensors, motion = _named(SPLATS, avatar.splats), avatar.motion
    if isinstance(motion, NodeMotion):
        for i, cloud in enumerate(motion.clouds):
            tensors |= _named(_of_cloud(NODES, i), cloud.nodes)
            tensors |= _named(_of_cloud(FOLLOWED, i), cloud.followed)
            tensors[_of_cloud(NORMALS, i)] = cloud.normals
        return tensors | {LIGHT: motion.light}
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
        clouds = []
        while nodes := _below(_of_cloud(NODES, len(clouds)), tensors):
            followed = Followed(**_below(_of_cloud(FOLLOWED, len(clouds)), tensors))
            normals = tensors[_of_cloud(NORMALS, len(clouds))]
            clouds.append(NodeCloud(Nodes(**nodes), followed, normals))
        return NodeMotion(tuple(clouds), tensors[LIGHT])
    detail = None
    if _below(NET, tensors):
        net = DetailNet().to(tensors[LIGHT].device)
        net.load_state_dict(_below(NET, tensors))
        detail = Detail(net, Shown(**_below(SHOWN, tensors)))
    body = Body(**_below(BODY, tensors), fps=fps)
    return SkinMotion(body, Places(**_below(PLACES, tensors)), tensors[LIGHT], detail)


def _below(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
