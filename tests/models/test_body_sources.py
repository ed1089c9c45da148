"""Body sources: axes, scale, topology, missing frames, files; each against tiny real payloads."""

import importlib.util
import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from turnaround.models import performer
from turnaround.models.body import facing_outwards
from turnaround.models.body_sources import (
    anny_body,
    body_from_mesh,
    body_from_sam3d,
    mesh_sequences,
    moved,
    read_body,
    sample_body,
)
from turnaround.models.cameras import project

# A figure of 1.7 m with y up and its front (vertex 3) towards +z, seen from outside.
FIGURE = torch.tensor([[-0.3, 0.0, 0], [0.3, 0, 0], [0, 1.7, 0], [0, 0.5, 0.2]])
FACES = torch.tensor([[0, 1, 3], [1, 2, 3], [2, 0, 3], [0, 2, 1]])


def mesh(frames: int = 3, step: float = 0.1, **more) -> SimpleNamespace:
    """A MESH of ComfyUI that walks to its left (+x)."""
    vertices = FIGURE + torch.arange(frames)[:, None, None] * torch.tensor([step, 0, 0])
    return SimpleNamespace(vertices=vertices, faces=FACES.expand(frames, 4, 3), **more)


def test_sample_body_is_the_sample_performer():
    times = 0.2 + torch.arange(2) / 16
    body = sample_body("leo", "walk", times, 7, 16.0)
    look = performer.draw_appearance(7)
    posed = performer.pose_performer("leo", "walk", times, look)
    assert torch.equal(body.vertices, posed.vertices)
    assert body.colors.min() >= 0 and body.colors.max() <= 1
    assert torch.equal(facing_outwards(body.faces, body.vertices[0]), body.faces)


def test_mesh_with_y_up_and_front_to_z_faces_the_source_camera():
    made = body_from_mesh(mesh(), 0, 16)
    rest = made.body.rest
    torch.testing.assert_close(rest, FIGURE * torch.tensor([1.0, -1, -1]))
    assert rest[2, 1] < rest[0, 1]  # the head is above (y down)
    assert rest[3, 2] < 0  # the front looks at the camera at -z
    # Its left stays its left: no mirror. And the centre of the walk is the origin.
    x = made.body.vertices[..., 0]
    torch.testing.assert_close(x.mean(1), torch.tensor([-0.1, 0, 0.1]), atol=1e-6, rtol=0)
    assert "frame 0 serves as the template" in made.note
    assert torch.equal(made.body.faces, FACES)


def test_mesh_in_other_units_is_scaled_to_the_performer():
    large = mesh()
    large.vertices = large.vertices * 100
    made = body_from_mesh(large, 1.7, 16)
    torch.testing.assert_close(made.body.vertices, body_from_mesh(mesh(), 0, 16).body.vertices)
    assert "scaled from 170 to 1.7 m" in made.note
    assert "170 m tall: if that is another unit" in body_from_mesh(large, 0, 16).note


def test_mesh_in_millimetres_is_refused_with_the_unit():
    tall = mesh()
    tall.vertices = tall.vertices * 1000
    with pytest.raises(ValueError, match="its unit"):
        body_from_mesh(tall, 0, 16)


def test_padding_of_newer_meshes_is_taken_off():
    plain = mesh()
    plain.vertices = plain.vertices + 3  # so that zeros lie outside of the body
    padded = mesh(vertex_counts=torch.tensor([4, 4, 4]), face_counts=torch.tensor([4, 4, 4]))
    padded.vertices = torch.nn.functional.pad(plain.vertices, (0, 0, 0, 5))
    padded.faces = torch.nn.functional.pad(padded.faces, (0, 0, 0, 2))
    a, b = (body_from_mesh(m, 1.8, 16).body for m in (plain, padded))
    assert torch.equal(a.vertices, b.vertices) and torch.equal(a.faces, b.faces)


def test_vertices_that_no_triangle_uses_do_not_count():
    stray = mesh()
    stray.vertices = torch.cat([torch.full((3, 1, 3), 50.0), stray.vertices], 1)
    stray.faces = stray.faces + 1
    assert torch.equal(
        body_from_mesh(stray, 1.8, 16).body.vertices, body_from_mesh(mesh(), 1.8, 16).body.vertices
    )


def test_inside_out_mesh_is_turned_over():
    turned = mesh()
    turned.faces = turned.faces.flip(-1)
    assert torch.equal(body_from_mesh(turned, 0, 16).body.faces, FACES)


def test_mesh_of_changing_topology_is_refused():
    changing = mesh()
    changing.faces = torch.stack([FACES, FACES, FACES.roll(1, 0)])
    with pytest.raises(ValueError, match="Item 2 of 'mesh' has another topology"):
        body_from_mesh(changing, 0, 16)
    counts = torch.tensor([4, 3, 4])
    with pytest.raises(ValueError, match="Item 1 of 'mesh' has another topology"):
        body_from_mesh(mesh(vertex_counts=torch.full((3,), 4), face_counts=counts), 0, 16)


def test_template_and_neutral_come_along():
    rest = mesh(1)
    rest.vertices = rest.vertices * torch.tensor([2.0, 1, 1])
    made = body_from_mesh(mesh(), 0, 16, template=rest, neutral=mesh(step=0.05))
    torch.testing.assert_close(made.body.rest[0, 0], torch.tensor(-0.6))
    apart = made.body.vertices - made.body.neutral
    torch.testing.assert_close(apart[:, 0, 0], torch.tensor([0, 0.05, 0.1]), atol=1e-6, rtol=0)
    assert "template" not in made.note
    with pytest.raises(ValueError, match="'neutral' has 2 frames but 'mesh' has 3"):
        body_from_mesh(mesh(), 0, 16, neutral=mesh(2))
    other = mesh(1)
    other.faces = other.faces[:, :3]
    with pytest.raises(ValueError, match="Item 0 of 'template' has another topology"):
        body_from_mesh(mesh(), 0, 16, template=other)


@pytest.mark.parametrize(
    "broken, sentence",
    [
        (SimpleNamespace(), "'mesh' carries no mesh batch"),
        (SimpleNamespace(vertices=FIGURE, faces=FACES), "'mesh' carries no mesh batch"),
        (SimpleNamespace(vertices=FIGURE[None][:0], faces=FACES[None][:0]), "made no mesh"),
        (SimpleNamespace(vertices=FIGURE[None], faces=FACES[None][:, :0]), "holds no triangles"),
        (SimpleNamespace(vertices=FIGURE[None] * math.nan, faces=FACES[None]), "NaN"),
        (SimpleNamespace(vertices=FIGURE[None], faces=FACES[None] + 9), "names vertex 12"),
    ],
)
def test_broken_meshes_are_one_sentence(broken, sentence):
    with pytest.raises(ValueError, match=sentence):
        body_from_mesh(broken, 0, 16)


def test_mesh_without_height_cannot_be_scaled():
    flat = mesh()
    flat.vertices = flat.vertices * torch.tensor([1.0, 0, 1])
    with pytest.raises(ValueError, match="has no height"):
        body_from_mesh(flat, 1.7, 16)


# SAM 3D Body: numpy, camera axes of OpenCV, a camera 4 m before the person.
IN_CAMERA = (FIGURE * torch.tensor([1.0, -1, -1]) + torch.tensor([0, 0.9, 0])).numpy()


def person(f: int, offset: float = 0.0) -> dict:
    return {
        "pred_vertices": IN_CAMERA,
        "pred_cam_t": np.array([0.1 * f + offset, 0.2, 4.0], np.float32),
        "focal_length": np.array([500.0], np.float32),
    }


def poses(people: list[list[dict]], **more) -> dict:
    canonical = {"positions": FIGURE.numpy()}
    return {
        "frames": people, "faces": FACES.numpy().astype(np.int32), "image_size": (480, 640),
        "canonical_colors": canonical, **more,
    }  # fmt: skip


def test_sam3d_body_lies_on_its_own_pictures():
    """Where the camera draws the world's vertices is where SAM 3D Body draws its own."""
    stray = {"pred_vertices": np.concatenate([IN_CAMERA, [[9, 9, 9]]])}  # of no triangle
    made = body_from_sam3d(poses([[person(f) | stray] for f in range(3)]), 0, 30)
    camera = made.camera
    assert (camera.width, camera.height, made.body.fps) == (640, 480, 30)
    for f in range(3):
        x, y, z = (IN_CAMERA + person(f)["pred_cam_t"]).T
        pixels, depth = project(made.body.vertices[f], camera)
        np.testing.assert_allclose(pixels[0, :, 0], 320 + 500 * x / z, atol=1e-3)
        np.testing.assert_allclose(pixels[0, :, 1], 240 + 500 * y / z, atol=1e-3)
        np.testing.assert_allclose(depth[0], z, atol=1e-5)
    boxes = (made.body.vertices.amin(1) + made.body.vertices.amax(1)) / 2
    torch.testing.assert_close(boxes.mean(0), torch.zeros(3), atol=1e-5, rtol=0)


def test_sam3d_template_is_its_own_upright_one():
    made = body_from_sam3d(poses([[person(0)]]), 0, 16)
    torch.testing.assert_close(made.body.rest, FIGURE * torch.tensor([1.0, -1, -1]))
    assert made.note == ""
    bare = body_from_sam3d(poses([[person(0)]], canonical_colors=None), 0, 16)
    assert "frame 0 serves as one" in bare.note


def test_sam3d_frames_without_the_person_are_filled_and_told():
    two = [[person(0), person(0, 1)], [], [person(2)], [person(3), person(3, 1)]]
    made = body_from_sam3d(poses(two), 1, 16)
    assert "person 1 is missing in 2 of 4 frames (1, 2)" in made.note
    v = made.body.vertices
    assert torch.equal(v[1], v[0]) and torch.equal(v[2], v[3])
    torch.testing.assert_close(v[3, 0, 0] - v[0, 0, 0], torch.tensor(0.3))
    long = body_from_sam3d(poses([[person(0)]] + [[]] * 20), 0, 16)
    assert "20 of 21 frames (1, 2, 3, 4, 5, 6, 7, 8, ...)" in long.note


@pytest.mark.parametrize(
    "data, number, sentence",
    [
        ({}, 0, "holds no frames"),
        (poses([]), 0, "holds no frames"),
        (poses([[], []]), 0, "found nobody"),
        (poses([[person(0)]]), 1, "'person' is 1, but at most 1"),
        (poses([[{"pred_cam_t": np.zeros(3)}]]), 0, "no pred_vertices"),
        (poses([[person(0)], [person(0) | {"pred_vertices": IN_CAMERA[:3]}]]), 0, "different mesh"),
        (poses([[person(0) | {"pred_vertices": IN_CAMERA * np.nan}]]), 0, "NaN"),
        (poses([[person(0)]], image_size=None), 0, "size of its pictures"),
    ],
)
def test_broken_pose_data_is_one_sentence(data, number, sentence):
    with pytest.raises(ValueError, match=sentence):
        body_from_sam3d(data, number, 16)


def test_pose_data_without_a_lens_says_which_is_assumed():
    bare = person(0)
    del bare["focal_length"]
    made = body_from_sam3d(poses([[bare]]), 0, 16)
    assert made.camera.K[0, 0, 0] == 5000 and "5000 pixels" in made.note


def test_numbered_files_are_one_sequence_in_the_order_of_numbers():
    names = [
        "walk/b_10.obj", "walk/b_9.obj", "a_0002.glb", "a_0001.glb", "a_0001.obj", "alone.ply",
        "notes.txt", "b_1.OBJ",
    ]  # fmt: skip
    assert mesh_sequences(names) == {
        "a_0001.glb": ["a_0001.glb", "a_0002.glb"],
        "a_0001.obj": ["a_0001.obj"],
        "alone.ply": ["alone.ply"],
        "b_1.OBJ": ["b_1.OBJ"],
        "walk/b_9.obj": ["walk/b_9.obj", "walk/b_10.obj"],
    }


def write_obj(path, vertices: Tensor, faces: Tensor = FACES) -> None:
    lines = ["mtllib missing.mtl", "o body"]
    lines += ["v {} {} {}".format(*v) for v in vertices.tolist()]
    lines += ["f {} {} {}".format(*(np.array(f) + 1)) for f in faces.tolist()]
    path.write_text("\n".join(lines) + "\n")


def test_obj_sequence_is_the_mesh_batch_it_was_written_from(tmp_path):
    paths = [tmp_path / f"walk_{f:04}.obj" for f in range(3)]
    for path, vertices in zip(paths, mesh().vertices, strict=True):
        write_obj(path, vertices)
    steps = []
    made = read_body(paths, "y up", 0, 25, lambda done, total: steps.append((done, total)))
    expected = body_from_mesh(mesh(), 0, 25).body
    torch.testing.assert_close(made.body.vertices, expected.vertices)
    assert torch.equal(made.body.faces, expected.faces)
    assert made.body.fps == 25 and steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "axes, theirs",
    [
        ("z up", FIGURE[:, [0, 2, 1]] * torch.tensor([1.0, -1, 1])),  # front to -y
        ("y down", FIGURE * torch.tensor([1.0, -1, -1])),
    ],
)
def test_files_of_other_axes_give_the_same_body(tmp_path, axes, theirs):
    write_obj(tmp_path / "a.obj", theirs)
    body = read_body([tmp_path / "a.obj"], axes, 0, 16).body
    torch.testing.assert_close(body.rest, FIGURE * torch.tensor([1.0, -1, -1]))


def glb(path, count: int, moving: bool = False) -> None:
    """A GLB of `count` meshes of one topology, with colours in the first."""
    import trimesh

    scene = trimesh.Scene()
    for f in range(count):
        part = trimesh.Trimesh(FIGURE.numpy() + [0.1 * f, 0, 0], FACES.numpy(), process=False)
        part.visual.vertex_colors = np.array([[255, 0, 51, 255]] * 4, np.uint8)
        scene.add_geometry(part, node_name=f"frame{f}", geom_name=f"frame{f}")
    raw = bytearray(scene.export(file_type="glb"))
    if moving:
        size = struct.unpack("<I", raw[12:16])[0]
        tree = json.loads(raw[20 : 20 + size])
        text = json.dumps(tree | {"animations": [{"channels": [], "samplers": []}]}).encode()
        text += b" " * (-len(text) % 4)
        rest = raw[20 + size :]
        raw = raw[:8] + struct.pack("<III", 20 + len(text) + len(rest), len(text), 0x4E4F534A)
        raw += text + rest
    path.write_bytes(raw)


def test_glb_of_several_like_meshes_is_taken_as_frames_in_order(tmp_path):
    glb(tmp_path / "walk.glb", 12)
    made = read_body([tmp_path / "walk.glb"], "y up", 0, 16)
    assert made.body.frame_count == 12 and "12 meshes of one topology" in made.note
    steps = made.body.vertices[:, 0, 0].diff()  # frame10 stands behind frame9
    torch.testing.assert_close(steps, torch.full((11,), 0.1), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.body.colors[0], torch.tensor([1, 0, 0.2]), atol=1e-3, rtol=0)


def test_animation_in_a_glb_is_not_silently_lost(tmp_path):
    glb(tmp_path / "rig.glb", 1, moving=True)
    assert "not played" in read_body([tmp_path / "rig.glb"], "y up", 0, 16).note
    glb(tmp_path / "still.glb", 1)
    assert "not played" not in read_body([tmp_path / "still.glb"], "y up", 0, 16).note


def test_file_of_another_topology_is_named(tmp_path):
    write_obj(tmp_path / "a_1.obj", FIGURE)
    write_obj(tmp_path / "a_2.obj", FIGURE, FACES[:3])
    with pytest.raises(ValueError, match="a_2.obj has another topology"):
        read_body([tmp_path / "a_1.obj", tmp_path / "a_2.obj"], "y up", 0, 16)


@pytest.mark.parametrize("name", ["bad.glb", "bad.obj", "bad.ply"])
@pytest.mark.parametrize("content", [b"", b"not a mesh at all"])
def test_damaged_files_are_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} (can't be read|holds no triangles)"):
        read_body([tmp_path / name], "y up", 0, 16)


def test_cut_off_glb_is_one_sentence(tmp_path):
    glb(tmp_path / "cut.glb", 1)
    raw = (tmp_path / "cut.glb").read_bytes()
    (tmp_path / "cut.glb").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="cut.glb (can't be read|holds no triangles)"):
        read_body([tmp_path / "cut.glb"], "y up", 0, 16)


def test_other_bodies_move_as_the_performers_do():
    """Without clothes on the way, skinning a performer's own rest body is posing that performer."""
    bank = performer.load_performers()
    times, look = torch.tensor([1.0, 1.3]), performer.draw_appearance(1)
    posed = performer.pose_performer("ada", "punch", times, look)
    i = bank.characters.index("ada")
    rest, joints = bank.tensors["rest_vertices"][i].float(), bank.tensors["rest_joints"][i]
    vertices = moved(rest, joints, bank.tensors["weights"].float(), "punch", times)
    surface = performer.surface_coordinates(bank)
    covered = torch.stack([*performer.garment_distances(surface, look).values()]).amax(0) > 0
    bare = ~covered
    assert bare.sum() > 1000
    apart = (posed.vertices - vertices)[:, bare]
    # All that is left is where the origin lies.
    torch.testing.assert_close(apart, apart[:1, :1].expand_as(apart), atol=1e-5, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("anny") is not None, reason="anny is installed")
def test_missing_anny_is_one_sentence_that_says_how_to_get_it():
    with pytest.raises(ValueError, match="pip install anny"):
        anny_body([0.5] * 6, "walk", torch.zeros(1), 16)


def test_anny_body_has_the_build_it_was_asked_for():
    pytest.importorskip("anny")
    small, tall = (
        anny_body([0.5, 0.65, 0.5, 0.5, height, 0.5], "walk", torch.zeros(1), 16)
        for height in (0.3, 0.7)
    )
    heights = [
        float(b.vertices[0, :, 1].amax() - b.vertices[0, :, 1].amin()) for b in (small, tall)
    ]
    assert 1.2 < heights[0] < heights[1] - 0.2 < 2.2
    assert torch.equal(small.rest, tall.rest)  # one template: pose colours agree
    assert small.rest[small.rest[:, 1].argmin(), 1] < -0.6  # head above, y down
    assert torch.equal(facing_outwards(small.faces, small.vertices[0]), small.faces)
