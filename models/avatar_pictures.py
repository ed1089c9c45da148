"""Pictures of an avatar: from any cameras at any times, and cameras that go round it.

Stage: AVATAR + RIG -> colours, outline, depth and normals. A shot is a camera of a rig and a time in
frames of the avatar, so that a moving camera is one shot a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .avatar import Avatar
from .cameras import Rig, framing_distance, orbit_rig
from .geometry import encode_normals
from .rasterize_splats import PIXEL_LOW_PASS, SplatPicture, fastest_way, render
from .splats import Splats
from .views import to_bytes

Shot = tuple[int, float]
"""Number of the camera, time in frames."""
OnStep = Callable[..., None]
"""done, total, a picture [3, H, W]."""
SOLID = 0.5
"""Opacity from which a pixel has a depth and a normal."""
MOMENTS = 7
"""That are looked at to find out how large an avatar is."""
STRAY = 0.002
"""Share of the Gaussians, on either side, that may be dust far from the performer."""
OPEN = math.radians(150)
"""Between two neighbouring cameras: with a wider gap they don't stand all round."""


@dataclass(frozen=True)
class AvatarPictures:
    """n pictures. Bytes: 49 frames of 8 views at 512² are 1.4 GB so."""

    color: Tensor
    """[n, 3, H, W] uint8, over the ground."""
    alpha: Tensor
    """[n, H, W] float32 0..1."""
    depth: Tensor | None
    """[n, H, W] float32 metres along the optical axis, 0 where nothing is."""
    normals: Tensor | None
    """[n, 3, H, W] uint8 as `geometry.encode_normals` colours them, grey where nothing is."""


def on_device(splats: Splats, device: torch.device) -> Splats:
    return Splats(*(t.to(device) for t in splats.tensors()))


def drawn_shots(
    avatar: Avatar,
    rig: Rig,
    shots: Sequence[Shot],
    ground: Tensor | None = None,  # [3] or [3, H, W]; None = black
    geometry: bool = False,
    device: torch.device | None = None,  # None = where the avatar is
    way: str | None = None,  # of rasterize_splats.WAYS; None = the quickest for so many
) -> Iterator[SplatPicture]:
    """One picture a shot. The Gaussians are posed once for neighbouring shots of one time."""
    home = avatar.splats.means
    device = device or home.device
    way = way or fastest_way(device, home.dtype, len(avatar.splats) * len(shots))
    posed: tuple[float, Splats] | None = None
    for camera, time in shots:
        if posed is None or posed[0] != time:
            posed = time, on_device(avatar.shown(time), device)
        with torch.no_grad():
            yield render(
                posed[1], rig.K[camera], rig.T_camera_world[camera].to(device), rig.width,
                rig.height, ground, geometry, way, PIXEL_LOW_PASS,
            )  # fmt: skip


def avatar_pictures(
    avatar: Avatar,
    rig: Rig,
    shots: Sequence[Shot],
    ground: Tensor | None = None,  # [3] or [3, H, W] 0..1; None = black
    geometry: bool = False,
    device: torch.device | None = None,  # that draws; None = where the avatar is
    on_step: OnStep | None = None,
    way: str | None = None,
) -> AvatarPictures:  # on the CPU, in the order of the shots
    """All shots, drawn one after another; `on_step` also gets the newest picture."""
    n, (H, W) = len(shots), (rig.height, rig.width)
    color, alpha = torch.empty(n, 3, H, W, dtype=torch.uint8), torch.empty(n, H, W)
    depth = torch.empty(n, H, W) if geometry else None
    normals = torch.empty_like(color) if geometry else None
    for i, seen in enumerate(drawn_shots(avatar, rig, shots, ground, geometry, device, way)):
        color[i], alpha[i] = to_bytes(seen.color).cpu(), seen.alpha.clamp(0, 1).cpu()
        if geometry:
            solid = seen.alpha >= SOLID
            depth[i] = torch.where(solid, seen.depth, 0.0).cpu()
            facing = F.normalize(seen.normals, dim=0).movedim(0, -1)
            shown = torch.where(solid[..., None], encode_normals(facing), 0.5)
            normals[i] = to_bytes(shown.movedim(-1, 0)).cpu()
        if on_step:
            on_step(i + 1, n, color[i].float() / 255)
    return AvatarPictures(color, alpha, depth, normals)


# ---------------------------------------------------------------- where cameras stand


@dataclass(frozen=True)
class Framing:
    """An upright cylinder around an avatar in all its motion."""

    centre: Tensor
    """[3] world."""
    half_width: float
    half_height: float
    """Metres."""

    def orbit(
        self,
        azimuths: Tensor,  # [n] radians
        elevation: float,  # radians
        fov: float,  # vertical, radians
        width: int,
        height: int,
        distance: float = 0.0,  # metres; 0 = all of it is in the picture
    ) -> Rig:
        """Cameras round it that look at its middle."""
        distance = distance or framing_distance(
            self.half_width, self.half_height, fov, width, height, elevation
        )
        elevations = torch.full_like(azimuths, elevation)
        return orbit_rig(azimuths, elevations, distance, fov, width, height, self.centre)


def framing(avatar: Avatar) -> Framing:
    """Where an avatar is, over all its motion and but for a few stray Gaussians."""
    count = avatar.frame_count
    times = {round(f) for f in torch.linspace(0, count - 1, min(count, MOMENTS)).tolist()}
    boxes = []
    for time in sorted(times):
        splats = avatar.shown(time)
        seen = splats.means.isfinite().all(1)
        if not seen.any():
            raise ValueError("The avatar holds NaN or infinity in all its places: distil it again.")
        solid = seen & (splats.opacities > 0)
        ordered = splats.means[solid if solid.any() else seen].float().cpu().sort(0).values
        off = int(STRAY * len(ordered))
        boxes.append(torch.stack([ordered[off], ordered[-1 - off]]))
    low, high = torch.stack(boxes)[:, 0].amin(0), torch.stack(boxes)[:, 1].amax(0)
    half = (high - low) / 2
    across = float(half[[0, 2]].norm())
    return Framing((low + high) / 2, max(across, 0.05), max(float(half[1]), 0.05))


class Swing:
    """A camera that goes slowly round, at the height and distance of a rig's cameras: all round where
    they stand all round, else to and fro between the outermost of them."""

    def __init__(self, rig: Rig, centre: Tensor) -> None:
        self.rig, self.centre = rig, centre
        away = rig.centers.cpu() - centre
        level = away[:, [0, 2]].norm(dim=1)
        self.distance = float(away.norm(dim=1).mean())
        self.elevation = float(torch.atan2(-away[:, 1], level).mean())
        around = torch.atan2(away[:, 0], -away[:, 2]).sort().values
        gaps = torch.cat([around.diff(), around[:1] + 2 * math.pi - around[-1:]])
        widest = int(gaps.argmax())
        self.closed = float(gaps[widest]) <= OPEN
        self.start = float(around[(widest + 1) % len(around)])
        self.span = 2 * math.pi - float(gaps[widest])

    def at(self, share: float) -> Rig:
        """The camera after a share of the way, 0..1; it begins between two cameras of the rig."""
        if self.closed:
            azimuth = self.start + 2 * math.pi * (share + 0.5 / len(self.rig))
        else:
            azimuth = self.start + self.span * (0.5 - 0.5 * math.cos(2 * math.pi * share + 1))
        fov = 2 * math.atan(self.rig.height / 2 / float(self.rig.K[:, 1, 1].mean()))
        return orbit_rig(
            torch.tensor([azimuth]), torch.tensor([self.elevation]), self.distance, fov,
            self.rig.width, self.rig.height, self.centre,
        )  # fmt: skip


# ---------------------------------------------------------------- times


def played_times(
    first: float,
    last: float,
    step: float,  # frames from one picture to the next, > 0
) -> list[float]:
    """From the first frame to the last, both in."""
    return [first + n * step for n in range(int((last - first) / step + 1e-6) + 1)]


def turning_times(
    frames: int,  # of the avatar
    count: int,  # of pictures
    step: float,  # frames from one picture to the next
    there_and_back: bool,
    first: float = 0.0,  # frame of the first picture
) -> list[float]:
    """Times of pictures that go on for longer than the motion: from the start again, or to and fro."""
    last = frames - 1
    if last < 1:
        return [0.0] * count
    passed = [first + n * step for n in range(count)]
    if there_and_back:
        return [last - abs(last - time % (2 * last)) for time in passed]
    # From the last frame to the first nothing moves: the last is held.
    return [min(time % frames, float(last)) for time in passed]
