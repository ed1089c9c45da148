"""Cameras: the rig (a set of cameras), orbits, projection, ComfyUI's camera frame.

Frame: OpenCV. x right, y down, z forward; world up is -y. Metres, radians, pixels.
The source camera of a clip sits at azimuth 0 and looks along +z at the world's origin, which is
the performer's centre. Positive azimuth moves a camera towards +x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .lenses import Lens

MAX_VIEWS = 256


@dataclass(frozen=True)
class Rig:
    """V cameras that make pictures of one size."""

    K: Tensor
    """[V, 3, 3] float32, pixels; pixel centres at +0.5 (the image spans 0..width)."""
    T_camera_world: Tensor
    """[V, 4, 4] float32, world points to camera points (OpenCV axes), metres."""
    width: int
    height: int
    names: tuple[str, ...] = ()
    """One label per view; () = numbered."""
    lenses: tuple[Lens, ...] = ()
    """How each camera's own footage is bent, until Straighten Views has straightened it; () = not at
    all. Everything else takes the cameras as they are without."""

    def __post_init__(self) -> None:
        V = len(self.K)
        if not 1 <= V <= MAX_VIEWS:
            raise ValueError(f"A rig needs 1 to {MAX_VIEWS} cameras, got {V}.")
        if self.K.shape != (V, 3, 3) or self.T_camera_world.shape != (V, 4, 4):
            raise ValueError(
                f"A rig of {V} cameras needs K of shape [{V}, 3, 3] and T_camera_world of shape "
                f"[{V}, 4, 4], got {list(self.K.shape)} and {list(self.T_camera_world.shape)}."
            )
        if not (self.K.isfinite().all() and self.T_camera_world.isfinite().all()):
            raise ValueError("A camera of the rig holds NaN or infinity: check its file or source.")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"The rig's picture size is {self.width}x{self.height}.")
        if (self.K[:, [0, 1], [0, 1]] < 1e-3 * max(self.width, self.height)).any():
            raise ValueError(
                "A camera of the rig has a focal length of nearly zero: give it in pixels, about "
                "the picture's height for an ordinary lens."
            )
        R = self.T_camera_world[:, :3, :3].double()
        if (R @ R.mT - torch.eye(3, dtype=R.dtype, device=R.device)).abs().max() > 1e-3 or (
            torch.linalg.det(R) < 0
        ).any():
            raise ValueError(
                "A camera of the rig has a rotation that is not one (scaled, sheared or mirrored): "
                "remove scale from its matrix."
            )
        if self.names and len(self.names) != V:
            raise ValueError(f"The rig has {V} cameras but {len(self.names)} names.")
        if self.lenses and len(self.lenses) != V:
            raise ValueError(f"The rig has {V} cameras but {len(self.lenses)} lenses.")

    def __len__(self) -> int:
        return self.K.shape[0]

    @property
    def centers(self) -> Tensor:
        """[V, 3] where the cameras stand, world, metres."""
        R, t = self.T_camera_world[:, :3, :3], self.T_camera_world[:, :3, 3:]
        return -(R.mT @ t)[..., 0]

    @property
    def azimuths(self) -> Tensor:
        """[V] radians in (-pi, pi], 0 = where the source camera stands."""
        c = self.centers
        return torch.atan2(c[:, 0], -c[:, 2])

    @property
    def elevations(self) -> Tensor:
        """[V] radians, above the horizon is positive."""
        c = self.centers
        return torch.atan2(-c[:, 1], c[:, [0, 2]].norm(dim=1))

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every view: its own, or its azimuth (and elevation, if they differ)."""
        if self.names:
            return self.names
        around = [round(math.degrees(a)) % 360 for a in self.azimuths.tolist()]
        above = [round(math.degrees(e)) for e in self.elevations.tolist()]
        if len(set(above)) == 1:
            return tuple(f"{a}°" for a in around)
        return tuple(f"{a}° {e:+d}°" for a, e in zip(around, above, strict=True))

    def select(self, indices: list[int]) -> Rig:
        """The rig of some of the views, in the given order."""
        names = tuple(self.names[i] for i in indices) if self.names else ()
        lenses = tuple(self.lenses[i] for i in indices) if self.lenses else ()
        K, T = self.K[indices], self.T_camera_world[indices]
        return replace(self, K=K, T_camera_world=T, names=names, lenses=lenses)

    def resized(self, width: int, height: int) -> Rig:
        """The same cameras with pictures of another size (the whole picture is scaled)."""
        scale = self.K.new_tensor([width / self.width, height / self.height, 1.0])
        return replace(self, K=self.K * scale[:, None], width=width, height=height)

    def filled(self, width: int, height: int) -> Rig:
        """The same cameras with pictures scaled to fill another size, their middle cut out."""
        old, new = (self.width, self.height), (width, height)
        K = torch.stack([fill_intrinsics(K, old, new) for K in self.K])
        return replace(self, K=K, width=width, height=height)

    def _comfy_cache_tensors(self) -> list[Tensor]:
        return [self.K, self.T_camera_world]

    def get_ram_usage(self) -> int:
        """Bytes held, for ComfyUI's cache accounting."""
        return sum(t.numel() * t.element_size() for t in self._comfy_cache_tensors())


def intrinsics(
    fov: float,  # vertical, radians
    width: int,
    height: int,
) -> Tensor:  # [3, 3]
    """K of a camera with square pixels and a centred principal point."""
    if not 0.01 < fov < 3.0:
        raise ValueError(
            f"The vertical field of view is {math.degrees(fov):.1f} degrees; it must lie between "
            "1 and 170 (35 is an ordinary lens)."
        )
    focal = height / 2 / math.tan(fov / 2)
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def fill_intrinsics(
    K: Tensor,  # [3, 3]
    size: tuple[int, int],  # width, height
    new_size: tuple[int, int],
) -> Tensor:  # [3, 3]
    """K of a picture that is scaled to fill a new size and whose middle is cut out.

    The rounding is that of `views.resize_frames`, so a clip and its camera stay together.
    """
    (w, h), (width, height) = size, new_size
    scale = max(width / w, height / h)
    scaled_w, scaled_h = max(width, round(w * scale)), max(height, round(h * scale))
    K = K * K.new_tensor([scaled_w / w, scaled_h / h, 1.0])[:, None]
    K[0, 2] -= (scaled_w - width) // 2
    K[1, 2] -= (scaled_h - height) // 2
    return K


def look_at(
    eyes: Tensor,  # [V, 3] world
    target: Tensor,  # [3] world
) -> Tensor:  # [V, 4, 4] T_camera_world
    """Cameras at `eyes` that look at `target` with the world's up (-y) upwards."""
    if ((target - eyes).norm(dim=1) < 1e-6).any():
        raise ValueError("A camera stands on its target, so it has no direction: move it away.")
    forward = F.normalize(target - eyes, dim=1)
    down = torch.tensor([0.0, 1.0, 0.0]).expand_as(forward)
    # Straight up or down there is no horizon to hold: keep +x on the right, as azimuth 0 has it.
    vertical = forward[:, [0, 2]].norm(dim=1, keepdim=True) < 1e-6
    down = torch.where(vertical, torch.tensor([0.0, 0.0, -1.0]) * forward[:, 1:2].sign(), down)
    right = F.normalize(torch.linalg.cross(down, forward), dim=1)
    R = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    T = torch.eye(4).repeat(len(eyes), 1, 1)
    T[:, :3, :3] = R
    T[:, :3, 3:] = -R @ eyes[..., None]
    return T


def orbit_rig(
    azimuths: Tensor,  # [V] radians
    elevations: Tensor,  # [V] radians
    distance: float,
    fov: float,  # vertical, radians
    width: int,
    height: int,
    target: Tensor | None = None,  # [3] world; None = origin
) -> Rig:
    """Cameras on a sphere around the target, all looking at it."""
    if not distance > 0:
        raise ValueError(f"The orbit's distance must be above 0 metres, got {distance}.")
    target = torch.zeros(3) if target is None else target
    level = torch.cos(elevations)
    direction = torch.stack(
        [torch.sin(azimuths) * level, -torch.sin(elevations), -torch.cos(azimuths) * level], dim=1
    )
    eyes = target + distance * direction
    K = intrinsics(fov, width, height).expand(len(azimuths), 3, 3).clone()
    return Rig(K, look_at(eyes.float(), target), width, height)


def orbit_angles(
    views: int,
    start: float,  # radians
    span: float,  # radians; 2 pi = a closed ring
    elevation: float,  # radians, of the lowest layer
    layers: int = 1,
    layer_step: float = 0.0,  # radians
) -> tuple[Tensor, Tensor]:  # azimuths [V], elevations [V]
    """Evenly spaced angles; views are dealt to the layers from the lowest up."""
    if layers > views:
        raise ValueError(f"{layers} layers need at least {layers} views, got {views}.")
    outermost = max(elevation, elevation + (layers - 1) * layer_step, key=abs)
    if abs(outermost) > math.pi / 2:
        raise ValueError(
            f"A ring would stand at an elevation of {math.degrees(outermost):.0f} degrees, beyond "
            "the pole: lower 'elevation', 'layers' or 'layer_step' so that it stays below 90."
        )
    azimuths, elevations = [], []
    closed = abs(span) >= 2 * math.pi - 1e-6
    for layer in range(layers):
        count = views // layers + (layer < views % layers)
        steps = count if closed else max(1, count - 1)
        azimuths += [start + span * i / steps for i in range(count)]
        elevations += [elevation + layer * layer_step] * count
    return torch.tensor(azimuths), torch.tensor(elevations)


FRAMING_MARGIN = 1.12
"""Free space around a framed performer: 12 percent."""


def framing_distance(
    half_width: float,  # metres, from the up axis
    half_height: float,  # metres
    fov: float,  # vertical, radians
    width: int,
    height: int,
    elevation: float = 0.0,  # radians
) -> float:
    """How far a camera must stand so that an upright cylinder around the origin fits the picture."""
    tan_y = math.tan(fov / 2)
    tan_x = tan_y * width / height
    level, steep = math.cos(elevation), abs(math.sin(elevation))
    # A point that lies `ahead` of the middle, towards the camera, and `off` the axis needs the
    # distance ahead + off / tan. For the height the worst of both rims is straight before or behind
    # the axis; for the width it lies on the nearer rim, somewhere between the front and the side.
    rims = [
        (end, side) for end in (-half_height, half_height) for side in (-half_width, half_width)
    ]
    tall = max(e * steep + s * level + abs(e * level - s * steep) / tan_y for e, s in rims)
    wide = half_height * steep + half_width * math.hypot(level, 1 / tan_x)
    return FRAMING_MARGIN * max(tall, wide)


def project(
    points: Tensor,  # [N, 3] world
    rig: Rig,
) -> tuple[Tensor, Tensor]:  # pixels [V, N, 2], depth [V, N] (metres along the optical axis)
    """Where world points fall on every picture; meaningless where depth <= 0."""
    T = rig.T_camera_world
    camera = points @ T[:, :3, :3].mT + T[:, None, :3, 3]
    depth = camera[..., 2]
    pixels = camera @ rig.K.mT
    return pixels[..., :2] / depth[..., None], depth


def merge_rigs(rigs: list[Rig]) -> Rig:
    """One rig of all cameras; the picture sizes must agree."""
    sizes = {(r.width, r.height) for r in rigs}
    if len(sizes) > 1:
        listed = ", ".join(f"{w}x{h}" for w, h in sorted(sizes))
        raise ValueError(f"The rigs have different picture sizes ({listed}): resize them first.")
    return Rig(
        torch.cat([r.K for r in rigs]),
        torch.cat([r.T_camera_world for r in rigs]),
        rigs[0].width,
        rigs[0].height,
        tuple(label for r in rigs for label in r.labels),
        tuple(lens for r in rigs for lens in r.lenses or [Lens()] * len(r))
        if any(r.lenses for r in rigs)
        else (),
    )


THREE_FROM_WORLD = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
"""Our world (y down, z forward) to ComfyUI's 3D world (right-handed, y up); its own inverse."""
LOAD3D_FOV = 35.0
"""Vertical degrees assumed for a LOAD3D_CAMERA that names none (older ComfyUI)."""


def _quat_to_axes(quat: dict[str, float]) -> Tensor:  # columns: camera x, y, z in the 3D world
    x, y, z, w = (float(quat[k]) for k in "xyzw")
    n = 2.0 / (x * x + y * y + z * z + w * w)
    return torch.tensor(
        [
            [1 - n * (y * y + z * z), n * (x * y - w * z), n * (x * z + w * y)],
            [n * (x * y + w * z), 1 - n * (x * x + z * z), n * (y * z - w * x)],
            [n * (x * z - w * y), n * (y * z + w * x), 1 - n * (x * x + y * y)],
        ]
    )


def _axes_to_quat(axes: Tensor) -> dict[str, float]:
    """The unit quaternion (x, y, z, w >= 0) of a rotation matrix."""
    m = axes.double()
    # Of the four ways to divide, the one with the largest denominator is the stable one.
    squares = torch.stack(
        [
            1 + m[0, 0] - m[1, 1] - m[2, 2],
            1 - m[0, 0] + m[1, 1] - m[2, 2],
            1 - m[0, 0] - m[1, 1] + m[2, 2],
            1 + m[0, 0] + m[1, 1] + m[2, 2],
        ]
    )
    products = torch.tensor(
        [
            [squares[0], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[2, 1] - m[1, 2]],
            [m[0, 1] + m[1, 0], squares[1], m[1, 2] + m[2, 1], m[0, 2] - m[2, 0]],
            [m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], squares[2], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], squares[3]],
        ]
    )
    quat = F.normalize(products[int(squares.argmax())], dim=0)
    quat = quat if quat[3] >= 0 else -quat
    return dict(zip("xyzw", quat.tolist(), strict=True))


def _xyz(vector: Tensor) -> dict[str, float]:
    return dict(zip("xyz", vector.tolist(), strict=True))


def has_plain_lenses(rig: Rig) -> bool:
    """Whether every camera has square pixels and its optical axis in the picture's middle."""
    middle = rig.K.new_tensor([rig.width / 2, rig.height / 2])
    off_centre = (rig.K[:, :2, 2] - middle).abs().amax()
    stretch = (rig.K[:, 0, 0] / rig.K[:, 1, 1] - 1).abs().amax()
    # Half a pixel and half a percent: below what anybody sees in a view.
    return bool(off_centre <= 0.5 and stretch <= 0.005)


def opencv_to_load3d(rig: Rig) -> list[dict]:
    """ComfyUI's LOAD3D_CAMERA dicts (y up, looking down -z, vertical fov in degrees), one a view."""
    cameras = []
    for K, T, eye in zip(rig.K, rig.T_camera_world, rig.centers, strict=True):
        axes = THREE_FROM_WORLD @ T[:3, :3].mT @ THREE_FROM_WORLD
        forward = T[2, :3]
        # The orbit centre of ComfyUI's viewer: the point on the axis nearest to the origin.
        reach = max(0.1, float(-eye @ forward))
        cameras.append(
            {
                "position": _xyz(THREE_FROM_WORLD @ eye),
                "target": _xyz(THREE_FROM_WORLD @ (eye + reach * forward)),
                "quaternion": _axes_to_quat(axes),
                "zoom": 1,
                "cameraType": "perspective",
                "fov": math.degrees(2 * math.atan(rig.height / 2 / float(K[1, 1]))),
                "aspect": rig.width / rig.height,
            }
        )
    return cameras


def _load3d_numbers(camera: dict, part: str, keys: str, number: int) -> dict[str, float]:
    """The named numbers of one part of a LOAD3D_CAMERA."""
    try:
        values = {key: float(camera[part][key]) for key in keys}
    except (KeyError, TypeError, ValueError, OverflowError):
        values = {}
    if not values or not all(map(math.isfinite, values.values())):
        raise ValueError(
            f"Camera {number} of 'cameras' has no usable {part}: move the camera of its 3D viewer "
            "once and run it again."
        )
    return values


def _load3d_factor(camera: dict, key: str, default: float, number: int) -> float:
    """A positive number of a LOAD3D_CAMERA; missing, None and 0 mean the default."""
    given = camera.get(key) or default
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(
            f"Camera {number} of 'cameras' has the {key} {given!r}; it must be a number above 0."
        )
    return value


def load3d_to_opencv(
    cameras: list[dict],
    width: int,
    height: int,
) -> Rig:
    """A rig of LOAD3D_CAMERA dicts; older ones without quaternion and fov look at their target."""
    if not cameras:
        raise ValueError("'cameras' is empty; a rig needs at least one camera: connect one.")
    K, T = [], []
    for number, camera in enumerate(cameras):
        if not isinstance(camera, dict):
            raise ValueError(
                f"Camera {number} of 'cameras' is a {type(camera).__name__}, not a 3D camera: "
                "connect the camera output of a Load 3D node."
            )
        if camera.get("cameraType", "perspective") != "perspective":
            raise ValueError(
                f"Camera {number} is orthographic; a rig needs perspective cameras: switch its "
                "type in the 3D viewer."
            )
        position = _load3d_numbers(camera, "position", "xyz", number)
        eye = THREE_FROM_WORLD @ torch.tensor(list(position.values()))
        if camera.get("quaternion") is not None:
            quat = _load3d_numbers(camera, "quaternion", "xyzw", number)
            if math.hypot(*quat.values()) < 1e-6:
                raise ValueError(
                    f"Camera {number} of 'cameras' has a quaternion of zeros, which is no "
                    "direction: move the camera of its 3D viewer once and run it again."
                )
            axes = THREE_FROM_WORLD @ _quat_to_axes(quat) @ THREE_FROM_WORLD
            pose = torch.eye(4)
            pose[:3, :3] = axes.mT
            pose[:3, 3] = -axes.mT @ eye
        else:
            target = _load3d_numbers(camera, "target", "xyz", number)
            pose = look_at(eye[None], THREE_FROM_WORLD @ torch.tensor(list(target.values())))[0]
        zoom = _load3d_factor(camera, "zoom", 1.0, number)
        fov = math.radians(_load3d_factor(camera, "fov", LOAD3D_FOV, number))
        K.append(intrinsics(2 * math.atan(math.tan(fov / 2) / zoom), width, height))
        T.append(pose)
    return Rig(torch.stack(K), torch.stack(T), width, height)


LONE_DISTANCE = 3.2
"""Metres before cameras whose axes don't meet (one camera, parallel ones) where the origin goes."""


def recentred(rig: Rig) -> Rig:
    """The same cameras in the pack's world: origin where the optical axes meet, the mean camera's
    up as -y, camera 0 at azimuth 0. Distances keep their scale."""
    T = rig.T_camera_world.double().clone()
    axes, eyes = T[:, 2, :3], rig.centers.double()
    origin = meeting_point(eyes, axes)
    down = T[:, 1, :3].mean(0)
    if down.norm() < 0.1:  # cameras rolled against each other have no common up
        down = T[0, 1, :3]
    down = F.normalize(down, dim=0)
    ahead = origin - eyes[0]
    level = ahead - (ahead @ down) * down
    if level.norm() < 1e-3 * ahead.norm():
        # Camera 0 looks straight down or up: what look_at does there, read backwards.
        level = -torch.sign(axes[0] @ down) * T[0, 1, :3]
        level = level - (level @ down) * down
    level = F.normalize(level, dim=0)
    R = torch.stack([torch.linalg.cross(down, level), down, level])
    T[:, :3, 3] = (T[:, :3, :3] @ origin) + T[:, :3, 3]
    T[:, :3, :3] = T[:, :3, :3] @ R.mT
    return replace(rig, T_camera_world=T.float())


def meeting_point(
    eyes: Tensor,  # [V, 3] float64
    axes: Tensor,  # [V, 3] float64, unit
) -> Tensor:  # [3]
    """The point of least squared distance to all optical axes, in front of the cameras."""
    project_off = torch.eye(3, dtype=axes.dtype) - axes[:, :, None] * axes[:, None, :]
    normal = project_off.sum(0)
    # Measured from the mean eye; a little damping for axes that are nearly parallel.
    middle = eyes.mean(0)
    offset = (project_off @ (eyes - middle)[..., None]).sum(0)[:, 0]
    point = middle + torch.linalg.solve(normal + 1e-9 * torch.eye(3, dtype=axes.dtype), offset)
    # The smallest eigenvalue is the mean squared sine between the axes: 1e-4 is about half a degree.
    if torch.linalg.eigvalsh(normal)[0] < 1e-4 * len(axes):
        opposite = axes @ axes[0] < 0
        if not opposite.any():
            along = F.normalize(axes.mean(0), dim=0)
            # The file's own origin is the better guess of where the performer is, if they see it.
            reach = float(-middle @ along)
            return middle + (reach if reach > 0.1 else LONE_DISTANCE) * along
        # Cameras that face each other along one line: midway between the two sides.
        point = (eyes[opposite].mean(0) + eyes[~opposite].mean(0)) / 2
    if ((point - eyes) * axes).sum(1).median() <= 0:
        raise ValueError(
            "The cameras of the rig look away from each other, so they have no common middle: "
            "turn 'recentre' off."
        )
    return point
