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
        """A name for every view: its own, or its azimuth in degrees."""
        if self.names:
            return self.names
        degrees = [round(math.degrees(a)) % 360 for a in self.azimuths.tolist()]
        return tuple(f"{d}°" for d in degrees)

    def select(self, indices: list[int]) -> Rig:
        """The rig of some of the views, in the given order."""
        names = tuple(self.names[i] for i in indices) if self.names else ()
        return replace(
            self, K=self.K[indices], T_camera_world=self.T_camera_world[indices], names=names
        )

    def resized(self, width: int, height: int) -> Rig:
        """The same cameras with pictures of another size (the whole picture is scaled)."""
        scale = self.K.new_tensor([width / self.width, height / self.height, 1.0])
        return replace(self, K=self.K * scale[:, None], width=width, height=height)

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


def look_at(
    eyes: Tensor,  # [V, 3] world
    target: Tensor,  # [3] world
) -> Tensor:  # [V, 4, 4] T_camera_world
    """Cameras at `eyes` that look at `target` with the world's up (-y) upwards."""
    if ((target - eyes).norm(dim=1) < 1e-6).any():
        raise ValueError("A camera stands on its target, so it has no direction: move it away.")
    forward = F.normalize(target - eyes, dim=1)
    down = torch.tensor([0.0, 1.0, 0.0]).expand_as(forward)
    # Straight up or down there is no horizon to hold: keep +z (or -z) on top instead.
    vertical = forward[:, 1:2].abs() > 1 - 1e-6
    down = torch.where(vertical, torch.tensor([0.0, 0.0, 1.0]) * forward[:, 1:2].sign(), down)
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
) -> float:
    """How far a camera must stand so that an upright cylinder around the origin fits the picture."""
    tan_y = math.tan(fov / 2)
    tan_x = tan_y * width / height
    # The near rim of the cylinder is what comes closest to the picture's border.
    return FRAMING_MARGIN * (half_width + max(half_height / tan_y, half_width / tan_x))


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


def load3d_to_opencv(
    cameras: list[dict],
    width: int,
    height: int,
) -> Rig:
    """A rig of LOAD3D_CAMERA dicts; older ones without quaternion and fov look at their target."""
    K, T = [], []
    for number, camera in enumerate(cameras):
        if camera.get("cameraType", "perspective") != "perspective":
            raise ValueError(
                f"Camera {number} is orthographic; a rig needs perspective cameras: switch its "
                "type in the 3D viewer."
            )
        eye = THREE_FROM_WORLD @ torch.tensor([float(camera["position"][k]) for k in "xyz"])
        if "quaternion" in camera:
            axes = THREE_FROM_WORLD @ _quat_to_axes(camera["quaternion"]) @ THREE_FROM_WORLD
            pose = torch.eye(4)
            pose[:3, :3] = axes.mT
            pose[:3, 3] = -axes.mT @ eye
        else:
            target = torch.tensor([float(camera["target"][k]) for k in "xyz"])
            pose = look_at(eye[None], THREE_FROM_WORLD @ target)[0]
        zoom = float(camera.get("zoom") or 1)
        fov = math.radians(float(camera.get("fov") or LOAD3D_FOV))
        K.append(intrinsics(2 * math.atan(math.tan(fov / 2) / zoom), width, height))
        T.append(pose)
    return Rig(torch.stack(K), torch.stack(T), width, height)


def recentred(rig: Rig) -> Rig:
    """The same cameras in the pack's world: origin where the optical axes meet, the mean camera's
    up as -y, camera 0 at azimuth 0. Distances keep their scale."""
    axes, eyes = rig.T_camera_world[:, 2, :3].double(), rig.centers.double()
    # The point of least squared distance to all axes; a little damping for parallel ones.
    project_off = torch.eye(3).double() - axes[:, :, None] * axes[:, None, :]
    normal = project_off.sum(0) + 1e-6 * torch.eye(3).double()
    origin = torch.linalg.solve(normal, (project_off @ eyes[..., None]).sum(0)[:, 0])
    down = F.normalize(rig.T_camera_world[:, 1, :3].double().mean(0), dim=0)
    ahead = origin - eyes[0]
    ahead = F.normalize(ahead - (ahead @ down) * down, dim=0)
    R = torch.stack([torch.linalg.cross(down, ahead), down, ahead])
    T = rig.T_camera_world.double().clone()
    T[:, :3, 3] = (T[:, :3, :3] @ origin) + T[:, :3, 3]
    T[:, :3, :3] = T[:, :3, :3] @ R.mT
    return replace(rig, T_camera_world=T.float())
