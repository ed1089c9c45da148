"""Rigs from the files that people have; text in, `Rig` out (no paths, no reading of files).

Read: nerfstudio / instant-ngp `transforms.json`, OpenCV / anipose calibration TOML, `cameras.json`
(4DAnyone's, or any list of intrinsics and poses), Qualisys calibration XML.

Pixels: a rig's picture spans 0..width, so the middle of the first pixel is at 0.5. OpenCV's
calibration puts it at 0: the principal points of anipose and Qualisys files get +0.5. The JSON
formats already count as we do.
Lens distortion goes into the rig's lenses, for Straighten Views to straighten what was filmed; fisheye
and rational lenses are not modelled, and a note says so.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import Rig, fill_intrinsics
from .lenses import Lens

FORMATS = "give a transforms.json, a cameras.json, an anipose .toml or a Qualisys calibration"
OPENCV_PIXEL = 0.5
"""Added to principal points that count from the middle of the first pixel."""


@dataclass(frozen=True)
class _Camera:
    """One camera as its file has it."""

    K: Tensor
    """[3, 3] float64, pixels of its own picture."""
    T_camera_world: Tensor
    """[4, 4] float64."""
    size: tuple[int, int]
    """Width and height of its own picture."""
    name: str
    lens: Lens | None = Lens()
    """None = of a kind that is not modelled."""


def rig_from_text(
    name: str,  # of the file: chooses the format, appears in messages
    text: str,
) -> tuple[Rig, str]:  # and a note for the creator, or ""
    """The rig in a file's text."""
    try:
        if name.lower().endswith(".toml"):
            read, content = _anipose, tomllib.loads(text)
        elif text.lstrip().startswith("<"):
            read, content = _qualisys, ElementTree.fromstring(text.strip())
        else:
            content = json.loads(text)
            frames = isinstance(content, dict) and "frames" in content
            read = _transforms if frames else _camera_list
    # JSON's and TOML's own errors are ValueErrors, and so are numbers of thousands of digits.
    except (ValueError, ElementTree.ParseError, RecursionError) as error:
        raise ValueError(f"{name} is not a camera file that can be read: {FORMATS}.") from error
    try:
        cameras = read(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not cameras:
        raise ValueError(f"{name} holds no camera: {FORMATS}.")
    try:
        return _one_size(cameras)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _one_size(cameras: list[_Camera]) -> tuple[Rig, str]:
    """All cameras at the first one's picture size: scaled to fill it, the middle cut out."""
    width, height = cameras[0].size
    notes = []
    lenses = tuple(camera.lens for camera in cameras)
    if None in lenses:
        notes.append(
            "the file has lenses that can't be straightened here (fisheye, or more than five numbers): "
            "undistort its pictures first"
        )
        lenses = ()
    elif all(lens.straight for lens in lenses):
        lenses = ()
    else:
        notes.append(
            "the file has lens distortion, which Straighten Views takes out of the footage; pictures "
            "that come another way have to be undistorted first"
        )
    others = [c for c in cameras if abs(c.size[0] * height - c.size[1] * width) > max(c.size)]
    if others:
        notes.append(
            f"camera {others[0].name} has {others[0].size[0]}x{others[0].size[1]} pictures, the "
            f"first {width}x{height}: it keeps the middle of its picture, in the first one's shape"
        )
    rig = Rig(
        torch.stack([fill_intrinsics(c.K, c.size, (width, height)) for c in cameras]).float(),
        torch.stack([c.T_camera_world for c in cameras]).float(),
        width,
        height,
        tuple(c.name for c in cameras),
        lenses,
    )
    return rig, "; ".join(notes)


def _table(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a table of named values; {FORMATS}.")
    return value


def _given(table: dict, keys: Iterable[str], where: str) -> str:
    """The first of the keys that the table has."""
    for key in keys:
        if table.get(key) is not None:
            return key
    raise ValueError(f"{where} has no '{next(iter(keys))}'; add it, or {FORMATS}.")


def _first(table: dict, keys: Iterable[str], where: str):
    """The value of the first key that the table has."""
    return table[_given(table, keys, where)]


def _number(value, key: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} has '{key}' = {reprlib.repr(value)}, which must be a number.")
    return number


def _size(width: float, height: float, where: str) -> tuple[int, int]:
    if not (1 <= width <= 65536 and 1 <= height <= 65536):
        raise ValueError(f"{where} has a picture size of {width:g}x{height:g} pixels.")
    return round(width), round(height)


def _numbers(value, shapes: Iterable[tuple[int, ...]], key: str, where: str) -> Tensor:
    """A list of numbers of one of the given shapes, float64."""
    try:
        numbers = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        numbers = torch.zeros(())
    if tuple(numbers.shape) not in shapes or not numbers.isfinite().all():
        wanted = " or ".join("x".join(map(str, shape)) for shape in shapes)
        raise ValueError(f"{where} has a '{key}' that is not {wanted} numbers.")
    return numbers


def _pose(value, key: str, where: str) -> Tensor:
    matrix = _numbers(value, ((4, 4), (3, 4)), key, where)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = matrix[:3]
    return pose


def _inverse(pose: Tensor, key: str, where: str) -> Tensor:
    if torch.linalg.det(pose[:3, :3]).abs() < 1e-9:
        raise ValueError(
            f"{where} has a '{key}' that is flat, so it is no camera's pose: export it again."
        )
    return torch.linalg.inv(pose)


def _intrinsics(value, key: str, where: str) -> Tensor:
    """K from a 3x3 matrix or from fx, fy, cx, cy."""
    K = _numbers(value, ((3, 3), (4,)), key, where)
    if K.shape == (4,):
        return _K(*K.tolist())
    if (K[2] - torch.tensor([0, 0, 1])).abs().max() > 1e-6:
        raise ValueError(
            f"{where} has a '{key}' whose last row is not 0, 0, 1, so it is transposed or scaled: "
            "write it as rows fx 0 cx, 0 fy cy, 0 0 1."
        )
    return K


def _K(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


def _focal_of_angle(angle: float, length: float, key: str, where: str) -> float:
    if not 0.01 < angle < 3.0:
        raise ValueError(
            f"{where} has '{key}' = {angle:g}; it must lie between 0.01 and 3 radians."
        )
    return length / 2 / math.tan(angle / 2)


def _transforms(content: dict) -> list[_Camera]:
    """nerfstudio / instant-ngp: camera-to-world matrices with OpenGL axes (y up, looks down -z)."""
    shared = {k: v for k, v in content.items() if k != "frames"}
    frames = content["frames"]
    if not isinstance(frames, list):
        raise ValueError(f"'frames' is not a list of cameras; {FORMATS}.")
    cameras = []
    for number, frame in enumerate(frames):
        where = f"frame {number}"
        frame = _table(frame, where)
        merged = {**shared, **frame}

        def value(*keys, default=None, merged=merged, where=where):
            found = next((k for k in keys if merged.get(k) is not None), None)
            if found is None and default is not None:
                return default
            return _number(_first(merged, keys, where), found or keys[0], where)

        w, h = value("w"), value("h")
        size = _size(w, h, where)
        fx = value("fl_x", default=0.0) or _focal_of_angle(
            value("camera_angle_x"), w, "camera_angle_x", where
        )
        cameras.append(
            _Camera(
                _K(fx, value("fl_y", default=fx), value("cx", default=w / 2),
                   value("cy", default=h / 2)),
                _inverse(
                    _pose(_first(frame, ["transform_matrix"], where), "transform_matrix", where)
                    # OpenGL camera axes to OpenCV's
                    @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)),
                    "transform_matrix",
                    where,
                ),
                size,
                _stem(str(frame.get("file_path", number))),
                _nerf_lens(merged, value),
            )
        )  # fmt: skip
    return cameras


def _nerf_lens(table: dict, value: Callable[..., float]) -> Lens | None:
    """k1 to k4 of even powers, p1 and p2; a fisheye's k mean something else."""
    radial = [value(k, default=0.0) for k in ("k1", "k2", "k3", "k4")]
    lens = Lens(tuple(radial), (value("p1", default=0.0), value("p2", default=0.0)))
    fisheye = "FISHEYE" in str(table.get("camera_model", "")).upper() or table.get("is_fisheye")
    return None if fisheye and not lens.straight else lens


def _stem(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _opencv_lens(numbers: list[float], fisheye: bool = False) -> Lens | None:
    """From k1, k2, p1, p2, k3; OpenCV's further ones make it another kind."""
    k1, k2, p1, p2, k3, *more = [*numbers, 0, 0, 0, 0, 0]
    lens = Lens((k1, k2, k3), (p1, p2))
    other = fisheye and not lens.straight or any(abs(c) > 1e-6 for c in more)
    return None if other else lens


def rig_to_transforms_json(rig: Rig) -> str:
    """The rig as nerfstudio's transforms.json."""
    frames = []
    for label, K, T in zip(rig.labels, rig.K, rig.T_camera_world, strict=True):
        pose = torch.linalg.inv(T.double())
        pose[:3, 1:3] *= -1
        frames.append(
            {
                "file_path": f"{label}.png",
                "fl_x": float(K[0, 0]),
                "fl_y": float(K[1, 1]),
                "cx": float(K[0, 2]),
                "cy": float(K[1, 2]),
                "w": rig.width,
                "h": rig.height,
                "transform_matrix": pose.tolist(),
            }
        )
    return json.dumps({"camera_model": "OPENCV", "frames": frames}, indent=1)


def _rotvec_to_matrix(
    rotvec: Tensor,  # [3] axis times angle (Rodrigues)
) -> Tensor:  # [3, 3]
    skew = torch.zeros(3, 3, dtype=torch.float64)
    skew[2, 1], skew[0, 2], skew[1, 0] = rotvec
    skew[1, 2], skew[2, 0], skew[0, 1] = -rotvec
    return torch.linalg.matrix_exp(skew)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts cam_2 before cam_10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]


def _anipose(content: dict) -> list[_Camera]:
    """Tables with size, matrix, rotation (Rodrigues, world to camera) and translation."""
    tables = {k: v for k, v in content.items() if isinstance(v, dict) and "matrix" in v}
    cameras = []
    for key in sorted(tables, key=_natural):
        camera, where = tables[key], f"table '{key}'"
        K = _intrinsics(camera["matrix"], "matrix", where)
        K[:2, 2] += OPENCV_PIXEL
        rotvec = _numbers(_first(camera, ["rotation"], where), ((3,),), "rotation", where)
        place = _numbers(_first(camera, ["translation"], where), ((3,),), "translation", where)
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3], pose[:3, 3] = _rotvec_to_matrix(rotvec), place
        size = _numbers(_first(camera, ["size"], where), ((2,),), "size", where).tolist()
        lens = camera.get("distortions") or []
        lens = lens if isinstance(lens, list) else [lens]
        numbers = [_number(c, "distortions", where) for c in lens]
        bends = _opencv_lens(numbers, bool(camera.get("fisheye")))
        cameras.append(_Camera(K, pose, _size(*size, where), str(camera.get("name", key)), bends))
    return cameras


CAMERA_TO_WORLD = ("camera_to_world", "c2w", "T_world_camera")
WORLD_TO_CAMERA = ("extrinsics", "world_to_camera", "w2c", "T_camera_world")


def _camera_list(content) -> list[_Camera]:
    """A list (or a dict of name -> camera) with K and an OpenCV pose, one way or the other."""
    if isinstance(content, dict):
        content = content.get("cameras", content)
    if not isinstance(content, (dict, list)):
        raise ValueError(f"this is no list of cameras; {FORMATS}.")
    items = content.items() if isinstance(content, dict) else enumerate(content)
    cameras = []
    for key, camera in items:
        where = f"camera '{key}'"
        camera = _table(camera, where)
        lens = _given(camera, ("K", "intrinsics"), where)
        K = _intrinsics(camera[lens], lens, where)
        given = _given(camera, WORLD_TO_CAMERA + CAMERA_TO_WORLD, where)
        pose = _pose(camera[given], given, where)
        if given in CAMERA_TO_WORLD:
            pose = _inverse(pose, given, where)
        width = _number(_first(camera, ("width", "image_width", "w"), where), "width", where)
        height = _number(_first(camera, ("height", "image_height", "h"), where), "height", where)
        name = camera.get("name", camera.get("camera_id", key))
        cameras.append(_Camera(K, pose, _size(width, height, where), str(name)))
    return cameras


DISTORTIONS = ("radialDistortion1", "radialDistortion2", "tangentalDistortion1",
               "tangentalDistortion2", "radialDistortion3")  # fmt: skip
"""Qualisys's names of OpenCV's numbers, in OpenCV's order."""


def _qualisys(root: ElementTree.Element) -> list[_Camera]:
    """Qualisys Track Manager: millimetres, focal lengths in 1/64 pixel, axes turned about x."""
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    cameras = []
    for camera in root.iter("camera"):
        inner, transform, fov = (camera.find(k) for k in ("intrinsic", "transform", "fov_video"))
        # Marker cameras take no pictures.
        if inner is None or transform is None or camera.get("model", "").startswith("Miqus M"):
            continue
        name = camera.get("serial", str(len(cameras)))
        where = f"camera '{name}'"
        if fov is None:
            raise ValueError(f"{where} has no <fov_video>, so its picture size is unknown.")

        def number(element, key, where=where):
            return _number(element.get(key), key, where)

        left, top, right, bottom = (number(fov, k) for k in ("left", "top", "right", "bottom"))
        fx, fy, cx, cy = (
            number(inner, k) / 64
            for k in ("focalLengthU", "focalLengthV", "centerPointU", "centerPointV")
        )
        K = _K(fx, fy, cx - left + OPENCV_PIXEL, cy - top + OPENCV_PIXEL)
        R = torch.tensor(
            [[number(transform, f"r{row}{column}") for column in (1, 2, 3)] for row in (1, 2, 3)],
            dtype=torch.float64,
        )
        eye = torch.tensor([number(transform, k) for k in "xyz"], dtype=torch.float64) / 1000
        # The file's rounded digits are no exact rotation: take the nearest one.
        u, stretch, vh = torch.linalg.svd(flip @ R)
        if (stretch - 1).abs().max() > 0.01:
            raise ValueError(f"{where} has a rotation that is not one: export the file again.")
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = u @ vh
        pose[:3, 3] = -pose[:3, :3] @ eye
        cameras.append(
            _Camera(
                K,
                pose,
                _size(right - left + 1, bottom - top + 1, where),
                name,
                _opencv_lens([number(inner, k) if inner.get(k) else 0.0 for k in DISTORTIONS]),
            )
        )
    return cameras
