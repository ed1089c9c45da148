"""Rigs from the files that people have; text in, `Rig` out (no paths, no reading of files).

Read: nerfstudio / instant-ngp `transforms.json`, OpenCV / anipose calibration TOML, 4DAnyone-like
`cameras.json` (a list of intrinsics and world-to-camera extrinsics), Qualisys calibration XML.
Lens distortion is not modelled: pictures should be undistorted first, and a warning says so.
"""

from __future__ import annotations

import json
import logging
import math
import tomllib
import xml.etree.ElementTree as ElementTree

import torch
from torch import Tensor

from .cameras import Rig

log = logging.getLogger(__name__)


def rig_from_text(name: str, text: str) -> Rig:
    """The rig in a file's text; `name` is only used to choose the format and in messages."""
    try:
        if name.endswith(".toml"):
            return _anipose(tomllib.loads(text))
        if text.lstrip().startswith("<"):
            return _qualisys(text)
        data = json.loads(text)
        if isinstance(data, dict) and "frames" in data:
            return _transforms(data)
        return _camera_list(data)
    except (KeyError, IndexError, TypeError, tomllib.TOMLDecodeError, json.JSONDecodeError,
            ElementTree.ParseError) as error:  # fmt: skip
        raise ValueError(
            f"{name} is not a camera file this pack reads ({type(error).__name__}: {error}): give "
            "a transforms.json, an anipose calibration .toml or a cameras.json."
        ) from error


def _K(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


def _warn_distortion(values) -> None:
    if any(abs(float(v)) > 1e-6 for v in values):
        log.warning("The camera file has lens distortion: undistort its pictures first.")


def _rig(K: list[Tensor], T: list[Tensor], sizes: list[tuple[int, int]], names: list[str]) -> Rig:
    """Bring all cameras to the first one's picture size."""
    width, height = sizes[0]
    for k, (w, h) in zip(K, sizes, strict=True):
        k[0] *= width / w
        k[1] *= height / h
    return Rig(
        torch.stack(K).float(), torch.stack(T).float(), int(width), int(height), tuple(names)
    )


def _transforms(data: dict) -> Rig:
    """nerfstudio / instant-ngp: camera-to-world matrices with OpenGL axes (y up, looks down -z)."""
    K, T, sizes, names = [], [], [], []
    for number, frame in enumerate(data["frames"]):
        merged = {**data, **frame}
        w, h = merged.get("w", 0), merged.get("h", 0)
        if not w or not h:
            raise KeyError("w and h")
        fx = merged.get("fl_x") or w / 2 / math.tan(merged["camera_angle_x"] / 2)
        fy = merged.get("fl_y") or fx
        K.append(_K(fx, fy, merged.get("cx", w / 2), merged.get("cy", h / 2)))
        _warn_distortion(merged.get(k, 0) for k in ("k1", "k2", "p1", "p2"))
        pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        pose[:3, 1:3] *= -1  # OpenGL camera axes to OpenCV's
        T.append(torch.linalg.inv(pose))
        sizes.append((int(w), int(h)))
        stem = str(frame.get("file_path", number)).replace("\\", "/").rsplit("/", 1)[-1]
        names.append(stem.rsplit(".", 1)[0])
    return _rig(K, T, sizes, names)


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


def _rotation(vector: list[float]) -> Tensor:
    """Rotation matrix of a Rodrigues vector."""
    v = torch.tensor(vector, dtype=torch.float64)
    skew = torch.zeros(3, 3, dtype=torch.float64)
    skew[2, 1], skew[0, 2], skew[1, 0] = v
    skew[1, 2], skew[2, 0], skew[0, 1] = -v
    return torch.linalg.matrix_exp(skew)


def _anipose(data: dict) -> Rig:
    """Tables with size, matrix, rotation (Rodrigues, world to camera) and translation."""
    cameras = [v for k, v in sorted(data.items()) if isinstance(v, dict) and "matrix" in v]
    if not cameras:
        raise KeyError("a table with 'matrix'")
    K, T, sizes, names = [], [], [], []
    for number, camera in enumerate(cameras):
        K.append(torch.tensor(camera["matrix"], dtype=torch.float64))
        _warn_distortion(camera.get("distortions", []))
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = _rotation(camera["rotation"])
        pose[:3, 3] = torch.tensor(camera["translation"], dtype=torch.float64)
        T.append(pose)
        sizes.append((int(camera["size"][0]), int(camera["size"][1])))
        names.append(str(camera.get("name", number)))
    return _rig(K, T, sizes, names)


def _camera_list(data) -> Rig:
    """A list (or a dict of name -> camera) with K and a world-to-camera matrix."""
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    if isinstance(data, dict) and "cameras" in data:
        items = list(enumerate(data["cameras"]))
    K, T, sizes, names = [], [], [], []
    for name, camera in items:
        k = torch.tensor(camera.get("K", camera.get("intrinsics")), dtype=torch.float64)
        if k.shape == (4,):
            k = _K(*k.tolist())
        pose = torch.eye(4, dtype=torch.float64)
        given = camera.get("extrinsics", camera.get("w2c", camera.get("T_camera_world")))
        matrix = torch.tensor(given, dtype=torch.float64)
        pose[: matrix.shape[0]] = matrix
        K.append(k)
        T.append(pose)
        sizes.append((int(camera["width"]), int(camera["height"])))
        names.append(str(camera.get("name", name)))
    return _rig(K, T, sizes, names)


def _qualisys(text: str) -> Rig:
    """Qualisys Track Manager: millimetres, focal lengths in 1/64 pixel, axes turned about x."""
    K, T, sizes, names = [], [], [], []
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    for camera in ElementTree.fromstring(text.strip()).iter("camera"):
        inner, transform = camera.find("intrinsic"), camera.find("transform")
        if inner is None or transform is None or camera.get("model", "").startswith("Miqus M"):
            continue

        def number(element, key):
            return float(element.get(key))

        K.append(_K(*(number(inner, k) / 64 for k in
                      ("focalLengthU", "focalLengthV", "centerPointU", "centerPointV"))))  # fmt: skip
        R = torch.tensor([[number(transform, f"r{i}{j}") for j in (1, 2, 3)] for i in (1, 2, 3)],
                         dtype=torch.float64)  # fmt: skip
        eye = torch.tensor([number(transform, k) for k in "xyz"], dtype=torch.float64) / 1000
        pose = torch.eye(4, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(flip @ R)
        pose[:3, :3] = u @ vh
        pose[:3, 3] = -pose[:3, :3] @ eye
        T.append(pose)
        fov = camera.find("fov_video")
        sizes.append((int(number(fov, "right")) + 1, int(number(fov, "bottom")) + 1))
        names.append(camera.get("serial", str(len(names))))
    if not K:
        raise KeyError("a <camera> with <intrinsic> and <transform>")
    return _rig(K, T, sizes, names)
