"""Gaussians as glTF: the numbers that KHR_gaussian_splatting wants, in a file that glTF readers open."""

import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from turnaround.models.splat_gltf import write_gltf
from turnaround.models.splats import Splats, rotation_matrices

PREFIX = "KHR_gaussian_splatting:"
UPRIGHT = torch.tensor([1.0, -1.0, -1.0])


def splats(N=30, degree=3):
    draw = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=draw)

    return Splats(some(N, 3), some(N, 4), some(N, 3) - 4, some(N), some(N, (degree + 1) ** 2, 3))


def read(path):
    """JSON and attributes, as glTF's specification reads them."""
    content = path.read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", content)
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    about = json.loads(content[20 : 20 + size])
    left, kind = struct.unpack_from("<I4s", content, 20 + size)
    body = content[28 + size :]
    assert kind == b"BIN\0" and left == len(body) == about["buffers"][0]["byteLength"]
    assert size % 4 == left % 4 == 0
    (primitive,) = about["meshes"][0]["primitives"]
    found = {}
    for name, i in primitive["attributes"].items():
        accessor = about["accessors"][i]
        view = about["bufferViews"][accessor["bufferView"]]
        dtype = {5126: "<f4", 5121: "u1"}[accessor["componentType"]]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        values = np.frombuffer(body, dtype, accessor["count"] * width, view["byteOffset"])
        assert view["byteLength"] == values.nbytes and view["byteOffset"] % 4 == 0
        values = values / 255 if accessor.get("normalized") else values
        found[name] = torch.from_numpy(values.reshape(-1, width).astype(np.float32))
    return about, primitive, found


def test_attributes_are_those_of_the_extension(tmp_path):
    before = splats()
    write_gltf(tmp_path / "a.glb", before)
    about, primitive, found = read(tmp_path / "a.glb")
    assert about["extensionsUsed"] == ["KHR_gaussian_splatting"] and primitive["mode"] == 0
    assert primitive["extensions"]["KHR_gaussian_splatting"] == {
        "kernel": "ellipse",
        "colorSpace": "srgb_rec709_display",
        "projection": "perspective",
        "sortingMethod": "cameraDistance",
    }
    coefficients = [f"{PREFIX}SH_DEGREE_{d}_COEF_{i}" for d in range(4) for i in range(2 * d + 1)]
    others = [PREFIX + n for n in ("ROTATION", "SCALE", "OPACITY")]
    assert set(found) == {"POSITION", "COLOR_0", *others, *coefficients}
    # Upright, activated, x y z w of length 1: the numbers of a renderer.
    assert torch.equal(found["POSITION"], before.means * UPRIGHT)
    assert torch.allclose(found[PREFIX + "SCALE"], before.log_scales.exp())
    assert torch.allclose(found[PREFIX + "OPACITY"][:, 0], before.opacities.sigmoid())
    quats = found[PREFIX + "ROTATION"]
    assert torch.allclose(quats.norm(dim=1), torch.ones(30), atol=1e-6)
    turn = torch.diag(UPRIGHT)
    expected = turn @ rotation_matrices(before.rotations)
    assert torch.allclose(rotation_matrices(quats[:, [3, 0, 1, 2]]), expected, atol=1e-5)


def test_colours_are_those_that_the_pack_sees(tmp_path):
    """The file's coefficients, by the pack's harmonics, from where the camera stands in the file."""
    before, eye = splats(), torch.tensor([0.5, -1.0, 4.0])
    write_gltf(tmp_path / "a.glb", before)
    _, _, found = read(tmp_path / "a.glb")
    sh = torch.stack([found[n] for n in found if "SH_DEGREE" in n], 1)
    upright = replace(before, means=found["POSITION"], sh=sh)
    assert torch.allclose(upright.colors(eye * UPRIGHT), before.colors(eye), atol=1e-5)
    assert not torch.allclose(upright.colors(eye * UPRIGHT), before.colors(-eye), atol=0.1)


@pytest.mark.parametrize("degree", range(4))
def test_lower_degrees_have_fewer_coefficients(tmp_path, degree):
    write_gltf(tmp_path / "a.glb", splats(3, degree))
    _, _, found = read(tmp_path / "a.glb")
    assert sum("SH_DEGREE" in n for n in found) == (degree + 1) ** 2


def test_points_for_others_are_linear_light(tmp_path):
    """sRGB 0.5 is 0.2140 of the light; what is outside 0..1 is cut off."""
    grey = (torch.tensor([0.5, -3.0, 3.0]) - 0.5) / 0.28209479177387814
    one = replace(splats(1), sh=grey.reshape(1, 1, 3), opacities=torch.tensor([math.log(3)]))
    write_gltf(tmp_path / "a.glb", one)
    _, _, found = read(tmp_path / "a.glb")
    expected = torch.tensor([[0.21404, 0.0, 1.0, 0.75]])
    assert (found["COLOR_0"] - expected).abs().max() <= 0.5 / 255 + 1e-5


def test_other_programs_open_it_as_points(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    before = splats()
    write_gltf(tmp_path / "a.glb", before)
    (points,) = trimesh.load(tmp_path / "a.glb").geometry.values()
    assert np.array_equal(points.vertices.astype(np.float32), (before.means * UPRIGHT).numpy())
    assert np.array_equal(points.colors[:, 3], (before.opacities.sigmoid() * 255).round().numpy())


def test_bounds_are_said(tmp_path):
    write_gltf(tmp_path / "a.glb", splats())
    about, primitive, found = read(tmp_path / "a.glb")
    accessor = about["accessors"][primitive["attributes"]["POSITION"]]
    assert accessor["min"] == found["POSITION"].amin(0).tolist()
    assert accessor["max"] == found["POSITION"].amax(0).tolist()


def test_a_gaussian_without_rotation_is_unturned(tmp_path):
    write_gltf(tmp_path / "a.glb", replace(splats(2), rotations=torch.zeros(2, 4)))
    _, _, found = read(tmp_path / "a.glb")
    assert found[PREFIX + "ROTATION"].tolist() == [[0, 0, 0, 1]] * 2


def test_what_gltf_cannot_hold_is_refused(tmp_path):
    bad = replace(splats(3), opacities=torch.tensor([0.0, math.nan, 0.0]))
    for wrong, sentence in (
        (splats(0), "no Gaussians to save"),
        (bad, "1 of 3 Gaussians hold NaN"),
        (replace(splats(3), log_scales=torch.full((3, 3), 50.0)), "half a million kilometres"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_gltf(tmp_path / "a.glb", wrong)
    assert list(tmp_path.iterdir()) == []
