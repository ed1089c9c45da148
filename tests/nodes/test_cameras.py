"""The camera nodes: widgets in degrees, sizes that are snapped, files of the input folder only."""

import logging
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from turnaround.models.body import Body
from turnaround.models.cameras import Rig, intrinsics, orbit_rig, project
from turnaround.models.lenses import Lens
from turnaround.models.points import OrientedPoints
from turnaround.models.rig_files import rig_to_transforms_json
from turnaround.models.views import Views
from turnaround.nodes import cameras as nodes

ORBIT = dict(views=8, start_azimuth=0.0, span=360.0, elevation=0.0, layers=1, layer_step=20.0,
             fov=35.0, distance=3.0, width=128, height=160)  # fmt: skip


@pytest.fixture(autouse=True)
def _said(monkeypatch, caplog, tmp_path):
    """Nodes have an id, as in a run; ComfyUI's folders are empty ones."""
    caplog.set_level(logging.INFO, logger="turnaround")
    for node in nodes.NODES:
        hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None)
        monkeypatch.setattr(node, "hidden", hidden)
    for folder in ("input", "temp"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(folder_paths, f"{folder}_directory", str(tmp_path / folder))


def only(output):
    (value,) = output.result
    return value


def orbit(**widgets) -> Rig:
    return only(nodes.OrbitRig.execute(**(ORBIT | widgets)))


def degrees(angles: torch.Tensor) -> list[int]:
    return [round(math.degrees(a)) % 360 for a in angles.tolist()]


def test_orbit_has_its_widgets_in_degrees():
    rig = orbit(views=3, start_azimuth=-90.0, span=180.0, elevation=30.0)
    assert degrees(rig.azimuths) == [270, 0, 90] and degrees(rig.elevations) == [30] * 3
    torch.testing.assert_close(rig.centers.norm(dim=1), torch.full((3,), 3.0))
    torch.testing.assert_close(rig.K[0], intrinsics(math.radians(35), 128, 160))


def test_orbit_layers_share_the_views():
    rig = orbit(views=5, layers=2, layer_step=40.0, elevation=-20.0)
    assert degrees(rig.elevations) == [340] * 3 + [20] * 2


def cloud(half_width: float, half_height: float, depth: float = 3.0) -> OrientedPoints:
    """The rims and the poles of an upright cylinder."""
    turn = torch.arange(16) * (2 * math.pi / 16)
    x, z = half_width * turn.sin(), half_width * turn.cos()
    rims = [torch.stack([x, torch.full_like(x, y), z], 1) for y in (-half_height, half_height)]
    points = torch.cat(rims)
    N = len(points)
    source = orbit_rig(torch.zeros(1), torch.zeros(1), depth, 0.6, 64, 64)
    normals = torch.tensor([0.0, 0.0, -1.0]).repeat(N, 1)
    ones = torch.ones(N)
    return OrientedPoints(
        points, normals, torch.rand(N, 3), ones * 0.01, ones, torch.tensor([0, N]), source
    )


@pytest.mark.parametrize(
    ("body", "widgets"),
    [
        ((0.5, 0.9), {}),
        ((0.5, 0.9), {"elevation": 60.0}),
        ((0.5, 0.9), {"layers": 4}),
        ((0.5, 0.9), {"fov": 90.0}),
        # A flat body in a wide picture: the steepest ring needs most space.
        ((1.2, 0.2), {"layers": 4, "width": 320, "height": 96}),
    ],
)
def test_orbit_frames_the_cloud_from_every_ring(body, widgets):
    body = cloud(*body)
    rig = orbit(distance=0.0, cloud=body, **widgets)
    pixels, depth = project(body.positions, rig)
    size = torch.tensor([rig.width, rig.height])
    assert (depth > 0).all() and (pixels >= 0).all() and (pixels <= size).all()
    # It fills a fair share of the picture in the ring that decides.
    assert ((pixels - size / 2).abs() / (size / 2)).max() > 0.75
    torch.testing.assert_close(rig.centers.norm(dim=1), rig.centers[:1].norm().expand(8))


def test_orbit_frames_a_body_too():
    vertices = torch.tensor([[[-0.4, -0.9, 0.1], [0.4, 0.9, 0.1], [0.0, 0.9, -0.2]]])
    shape = Body(vertices, torch.tensor([[0, 1, 2]]), vertices[0])
    rig = orbit(distance=0.0, body=shape)
    for K, T in zip(rig.K, rig.T_camera_world, strict=True):
        camera = vertices[0] @ T[:3, :3].T + T[:3, 3]
        x, y = ((camera @ K.T)[:, :2] / camera[:, 2:]).unbind(1)
        assert x.min() > 0 and x.max() < rig.width and y.min() > 0 and y.max() < rig.height
    assert float(rig.centers.norm(dim=1).max()) < 5  # and not from far away


def test_orbit_without_a_cloud_stands_at_the_usual_distance():
    assert float(orbit(distance=0.0).centers[0].norm()) == pytest.approx(nodes.LONE_DISTANCE)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: orbit(width=130, height=151), "130x151 became 128x144 (multiples of 16)"),
        (lambda: orbit(width=1, height=160), "1x160 became 16x160"),
        (lambda: only(nodes.ResizeRig.execute(orbit(), 250, 320)), "250x320 became 256x320"),
        (lambda: only(nodes.RigFromCameras.execute(camera_list(orbit()), [100], [100])),
         "100x100 became 96x96"),
    ],
)  # fmt: skip
def test_odd_sizes_are_snapped_and_said(make, said, caplog):
    rig = make()
    assert said in caplog.text and rig.width % 16 == rig.height % 16 == 0
    assert f" {rig.width}x{rig.height}" in caplog.text


def test_even_sizes_say_nothing(caplog):
    resized = only(nodes.ResizeRig.execute(orbit(), 64, 80))
    assert (resized.width, resized.height) == (64, 80) and caplog.text == ""
    torch.testing.assert_close(resized.K[:, :2], orbit().K[:, :2] / 2)


def camera_list(rig: Rig) -> list[dict]:
    return only(nodes.RigToCameras.execute(rig))


def test_rig_survives_the_way_through_3d_cameras(caplog):
    rig = orbit(elevation=20.0)
    back = only(nodes.RigFromCameras.execute(camera_list(rig), [128], [160]))
    # float32 poses of a few metres
    torch.testing.assert_close(back.T_camera_world, rig.T_camera_world, atol=2e-5, rtol=0)
    torch.testing.assert_close(back.K, rig.K)
    assert caplog.text == ""


def test_lens_centres_that_3d_cameras_cannot_hold_are_said(caplog):
    rig = orbit()
    K = rig.K.clone()
    K[0, 0, 2] += 5
    assert len(camera_list(Rig(K, rig.T_camera_world, 128, 160))) == 8
    assert "lens centres and pixel shapes were left out" in caplog.text


@pytest.mark.parametrize("cameras", [[], [None], [{}]])
def test_no_3d_camera_is_refused(cameras):
    with pytest.raises(ValueError, match="'cameras' is empty"):
        nodes.RigFromCameras.execute(cameras, [128], [160])


def put(name: str, content: str | bytes) -> str:
    path = os.path.join(folder_paths.get_input_directory(), name)
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return name


def ring_file(width: int = 64, height: int = 80) -> str:
    """A ring that stands elsewhere, with its first camera at azimuth 90."""
    azimuths = torch.arange(4) * (math.pi / 2) + math.pi / 2
    target = torch.tensor([5.0, 1.0, -2.0])
    return rig_to_transforms_json(
        orbit_rig(azimuths, torch.zeros(4), 2.0, 0.6, width, height, target)
    )


@pytest.mark.parametrize(("recentre", "first"), [(True, (0, 0, -2)), (False, (7, 1, -2))])
def test_rig_from_file_is_recentred_or_left(recentre, first, caplog):
    rig = only(nodes.RigFromFile.execute(put("ring.json", ring_file()), recentre))
    torch.testing.assert_close(rig.centers[0], torch.tensor(first).float(), atol=1e-4, rtol=0)
    assert len(rig) == 4 and caplog.text == ""


def test_rig_from_file_of_an_odd_size_is_snapped_around_the_middle_and_said(caplog):
    rig = only(nodes.RigFromFile.execute(put("ring.json", ring_file(75, 80)), True))
    assert (rig.width, rig.height) == (80, 80)
    assert "75x80 became 80x80 (multiples of 16)" in caplog.text
    pixels, _ = project(torch.zeros(1, 3), rig)
    torch.testing.assert_close(pixels[0, 0], torch.tensor([40.0, 40.0]), atol=0.5, rtol=0)
    # Square pixels stay square, but for the rounding of one pixel in 80.
    assert float(rig.K[0, 0, 0] / rig.K[0, 1, 1]) == pytest.approx(1, abs=1 / 80)


def test_a_byte_order_mark_does_no_harm():
    text = b"\xef\xbb\xbf" + ring_file().encode()
    assert len(only(nodes.RigFromFile.execute(put("bom.json", text), True))) == 4


OUTSIDE = [
    "../x.json",
    "..\\x.json",
    "sub/x.json",
    "/etc/passwd",
    "",
    ".",
    "notes.md",
    "missing.json",
]


@pytest.fixture
def outside(tmp_path):
    """Readable camera files that lie beside the input folder, below it, and with a wrong ending."""
    (tmp_path / "x.json").write_text(ring_file())
    (tmp_path / "input" / "sub").mkdir()
    (tmp_path / "input" / "sub" / "x.json").write_text(ring_file())
    put("notes.md", ring_file())
    put("ring.json", ring_file())
    (tmp_path / "input" / "folder.json").mkdir()


@pytest.mark.parametrize("file", [*OUTSIDE, "folder.json", "./ring.json", "input/../ring.json"])
def test_only_camera_files_of_the_input_folder_are_opened(outside, file):
    assert nodes._rig_files() == ["ring.json"]
    with pytest.raises(ValueError, match="input folder has no camera file of that name"):
        nodes.RigFromFile.execute(file, True)
    assert "missing" in nodes.RigFromFile.fingerprint_inputs(file)
    absolute = os.path.join(folder_paths.get_input_directory(), "ring.json")
    with pytest.raises(ValueError, match="no camera file"):
        nodes.RigFromFile.execute(absolute, True)


def test_fingerprint_follows_the_file_and_is_safe_without_one(monkeypatch):
    fingerprint = nodes.RigFromFile.fingerprint_inputs
    assert "missing" in fingerprint() and "missing" in fingerprint(None, False)
    file = put("ring.json", ring_file())
    before = fingerprint(file, True)
    assert before == fingerprint(file, True) != fingerprint(file, False)
    os.utime(os.path.join(folder_paths.get_input_directory(), file), ns=(1, 1))
    assert fingerprint(file, True) != before
    monkeypatch.setattr(folder_paths, "input_directory", "no such folder")
    assert "missing" in fingerprint(file, True)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"\x89PNG\r\n\x1a\n"])
def test_a_file_of_bytes_is_refused(content):
    with pytest.raises(ValueError, match="picture.json is not a text file"):
        nodes.RigFromFile.execute(put("picture.json", content), True)


def test_a_malformed_file_is_refused_by_its_name():
    with pytest.raises(ValueError, match="bad.json is not a camera file"):
        nodes.RigFromFile.execute(put("bad.json", "{"), True)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("0", [0]), ("0,2,4-6", [0, 2, 4, 5, 6]), (" 1 , 3 - 4 ", [1, 3, 4]), ("6-4", [6, 5, 4]),
        ("3-3", [3]), ("::2", [0, 2, 4, 6]), (":3", [0, 1, 2]), ("5:", [5, 6, 7]), ("-2:", [6, 7]),
        ("::-3", [7, 4, 1]), ("1,1", [1, 1]), ("7,", [7]), (":", list(range(8))),
    ],
)  # fmt: skip
def test_views_are_picked_as_written(text, chosen):
    assert nodes.parse_indices(text, 8) == chosen
    assert only(nodes.PickViews.execute(orbit(), text)).centers.equal(orbit().centers[chosen])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"names view \(none\)"), (",", r"names view \(none\)"), ("5:2", r"names view \(none\)"),
        ("8", "names view 8, but the rig has views 0 to 7"), ("-1", "names view -1"),
        ("0-99999999999", "names view 99999999999"), ("9-0", "names view 9"),
        ("a", "no list of views"), ("1.5", "no list of views"), ("1-2-3", "no list of views"),
        ("1-", "no list of views"), ("::0", "no list of views"), ("0:1:2:3", "no list of views"),
        ("9" * 5000, "no list of views"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_views_that_are_not_there_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        nodes.parse_indices(text, 8)


def test_merged_rigs_keep_their_order_and_labels():
    rig = only(nodes.MergeRigs.execute(orbit(views=2), orbit(views=1, start_azimuth=45.0)))
    assert rig.labels == ("0°", "180°", "45°")
    with pytest.raises(ValueError, match="different picture sizes"):
        nodes.MergeRigs.execute(orbit(), orbit(width=256))


def preview(rig: Rig) -> torch.Tensor:
    output = nodes.PreviewRig.execute(rig)
    saved = output.ui.as_dict()["images"][0]
    assert os.path.isfile(os.path.join(folder_paths.get_temp_directory(), saved["filename"]))
    return only(output)


def test_preview_differs_between_rigs():
    ring, arc = preview(orbit()), preview(orbit(span=90.0))
    assert ring.shape == arc.shape and ring.shape[0] == 1 and ring.shape[-1] == 3
    assert ring.min() >= 0 and ring.max() <= 1
    # More than the text: some thousand of the pixels of eight dots.
    assert int(((ring - arc).abs() > 0.1).any(-1).sum()) > 1000


@pytest.mark.parametrize("views", [1, 64])
def test_preview_takes_any_number_of_views(views):
    assert preview(orbit(views=views)).std() > 0.05


def test_every_node_has_a_valid_schema():
    for node in nodes.NODES:
        schema = node.GET_SCHEMA()
        assert schema.node_id.startswith("Turnaround") and schema.description
        assert all(i.tooltip for i in schema.inputs)


def test_turntable_has_a_camera_a_frame():
    images = torch.zeros(12, 40, 30, 3)
    widgets = dict(turns=1.0, elevation=20.0, fov=40.0)
    rig = only(nodes.TurntableRig.execute(**widgets, images=images))
    assert (len(rig), rig.width, rig.height) == (12, 30, 40)
    assert torch.allclose(rig.elevations, torch.tensor(math.radians(20.0)), atol=1e-4)
    clip = Views(images.movedim(-1, 1)[None])
    same = only(nodes.TurntableRig.execute(**widgets, views=clip))
    assert torch.equal(same.T_camera_world, rig.T_camera_world)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "Connect either 'images' or 'views'"),
        ({"images": torch.zeros(3, 8, 8, 3), "turns": 0.0}, "'turns' is 0, so nothing turns"),
        ({"images": torch.zeros(1, 8, 8, 3)}, "'images' has 1 picture"),
        ({"views": Views(torch.zeros(2, 3, 3, 8, 8))}, "'views' has 2 views, but a clip"),
    ],
)
def test_what_is_no_turntable_clip_is_one_sentence(changes, problem):
    with pytest.raises(ValueError, match=problem):
        nodes.TurntableRig.execute(**{"turns": 1.0, "elevation": 0.0, "fov": 40.0, **changes})


LENS = Lens((-0.2, 0.05))


def footage(rig: Rig, width: int, height: int) -> Views:
    frames = torch.rand(len(rig), 2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return Views(frames)


def test_footage_is_straightened_at_its_own_size():
    rig = replace(orbit(views=3), lenses=(LENS, LENS, Lens()))
    views = only(nodes.StraightenViews.execute(footage(rig, 64, 80), rig))
    assert views.rig.lenses == () and (views.rig.width, views.rig.height) == (64, 80)
    before = footage(rig, 64, 80).frames
    changed = [not torch.equal(a, b) for a, b in zip(views.frames, before, strict=True)]
    assert changed == [True, True, False]


def test_straightening_says_what_is_missing(caplog):
    rig = replace(orbit(views=3), lenses=(LENS,) * 3)
    with pytest.raises(ValueError, match="no cameras: connect the 'rig'"):
        nodes.StraightenViews.execute(footage(rig, 64, 80))
    with pytest.raises(ValueError, match="3 views but 'rig' 4 cameras"):
        nodes.StraightenViews.execute(footage(rig, 64, 80), orbit(views=4))
    with pytest.raises(ValueError, match="80x64, but 'rig' was calibrated for 128x160"):
        nodes.StraightenViews.execute(footage(rig, 80, 64), rig)
    views = footage(rig, 64, 80)
    plain = only(nodes.StraightenViews.execute(views, orbit(views=3)))
    assert torch.equal(plain.frames, views.frames) and "bend nothing" in caplog.text
