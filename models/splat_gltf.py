"""Gaussians as binary glTF (.glb), by the extension KHR_gaussian_splatting.

The extension is ratified (Khronos 2026): Gaussians are points with attributes for rotation (x y z
w, unit), scale (linear), opacity (0..1) and the coefficients of the harmonics of 3DGS; its kernel
"ellipse" and colours that are meant for a display as they are. Programs that don't know it show the
points in their mean colours (COLOR_0, which glTF wants linear).

Frame: that of glTF (x right, y up, z backward, metres), whatever the viewer.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cloud_file import AXES
from .splat_files import check_rows, in_axes, linear_scales, mean_colors, to_rows
from .splats import Splats
from .views import to_bytes
from .whole_file import whole_file

EXTENSION = "KHR_gaussian_splatting"
FLOAT, UBYTE = 5126, 5121  # componentType
SHAPES = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}


def write_gltf(path: Path, splats: Splats) -> None:
    """Write the Gaussians as .glb; whole or not at all. glTF knows no empty list of points."""
    check_rows(to_rows(splats), path.name)
    if not len(splats):
        raise ValueError(f"{path.name}: there are no Gaussians to save: glTF needs at least one.")
    attributes = _attributes(in_axes(splats, AXES[0]), path.name)
    views, accessors, start = [], [], 0
    for values in attributes.values():
        views.append(
            {"buffer": 0, "byteOffset": start, "byteLength": values.nbytes, "target": 34962}
        )
        accessors.append(_accessor(len(views) - 1, values))
        start += values.nbytes
    places = attributes["POSITION"]
    accessors[0] |= {"min": places.min(0).tolist(), "max": places.max(0).tolist()}
    head = _json(list(attributes), views, accessors, start)
    with whole_file(path) as partial, partial.open("wb") as out:
        # Chunks of JSON (0x4E4F534A) and of numbers (0x004E4942), all multiples of four bytes long.
        out.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(head) + 8 + start))
        out.write(struct.pack("<I4s", len(head), b"JSON") + head)
        out.write(struct.pack("<I4s", start, b"BIN\0"))
        for values in attributes.values():
            out.write(values.tobytes())


def _attributes(splats: Splats, name: str) -> dict[str, np.ndarray]:  # each [N, 1, 3 or 4]
    opacities = splats.opacities.float().sigmoid()[:, None]
    quats = F.normalize(splats.rotations.float(), dim=1)
    # What has no rotation is drawn unturned.
    quats[(quats == 0).all(1), 0] = 1
    found = {
        "POSITION": splats.means,
        "COLOR_0": torch.cat([_linear(mean_colors(splats).float()), opacities], 1),
        f"{EXTENSION}:ROTATION": quats[:, [1, 2, 3, 0]],
        f"{EXTENSION}:SCALE": linear_scales(splats, name),
        f"{EXTENSION}:OPACITY": opacities,
    }
    for degree in range(splats.degree + 1):
        for i in range(2 * degree + 1):
            found[f"{EXTENSION}:SH_DEGREE_{degree}_COEF_{i}"] = splats.sh[:, degree**2 + i]
    numbers = {k: v.detach().cpu().numpy().astype("<f4") for k, v in found.items()}
    numbers["COLOR_0"] = to_bytes(found["COLOR_0"].detach()).cpu().numpy()
    return numbers


def _linear(colors: Tensor) -> Tensor:
    """sRGB as linear light, IEC 61966-2-1."""
    return torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def _accessor(view: int, values: np.ndarray) -> dict:
    whole = values.dtype.kind == "u"
    accessor = {
        "bufferView": view,
        "componentType": UBYTE if whole else FLOAT,
        "count": len(values),
        "type": SHAPES[values.shape[1]],
    }
    return accessor | ({"normalized": True} if whole else {})


def _json(names: list[str], views: list[dict], accessors: list[dict], length: int) -> bytes:
    primitive = {
        "mode": 0,  # points
        "attributes": {name: i for i, name in enumerate(names)},
        "extensions": {
            EXTENSION: {
                "kernel": "ellipse",
                "colorSpace": "srgb_rec709_display",
                "projection": "perspective",
                "sortingMethod": "cameraDistance",
            }
        },
    }
    text = json.dumps(
        {
            "asset": {"version": "2.0", "generator": "Turnaround"},
            "extensionsUsed": [EXTENSION],
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [primitive]}],
            "accessors": accessors,
            "bufferViews": views,
            "buffers": [{"byteLength": length}],
        }
    ).encode("ascii")
    return text + b" " * (-len(text) % 4)
