"""Camera files: every format against hand calculations; a malformed file is one sentence."""

import json
import math

import pytest
import torch
from turnaround.models.cameras import orbit_rig, project
from turnaround.models.rig_files import rig_from_text, rig_to_transforms_json

EYE = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def pose(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> list[list[float]]:
    matrix = [row[:] for row in EYE]
    for row, value in zip(matrix, (x, y, z), strict=False):
        row[3] = value
    return matrix


def transforms(shared: dict | None = None, **frame) -> str:
    """One camera at (0, 0, 4) of a y-up world that looks down -z."""
    frame = {"file_path": "images/front.png", "transform_matrix": pose(z=4)} | frame
    return json.dumps({"w": 64, "h": 48, "fl_x": 80.0} | (shared or {}) | {"frames": [frame]})


def camera_list(**change) -> str:
    camera = {"K": [[80.0, 0, 32], [0, 80, 24], [0, 0, 1]], "extrinsics": pose(z=4),
              "width": 64, "height": 48}  # fmt: skip
    return json.dumps([{k: v for k, v in (camera | change).items() if v is not None}])


def table(name: str, **change: str) -> str:
    """One camera of an anipose file; values are TOML."""
    values = {
        "name": f'"{name}"', "size": "[64, 48]", "rotation": "[0.0, 0.0, 0.0]",
        "matrix": "[[80.0, 0.0, 31.5], [0.0, 80.0, 23.5], [0.0, 0.0, 1.0]]",
        "translation": "[0.0, 0.0, 4.0]", "distortions": "[0.0, 0.0, 0.0, 0.0, 0.0]",
    } | change  # fmt: skip
    return f"[{name}]\n" + "\n".join(f"{k} = {v}" for k, v in values.items()) + "\n"


def qualisys(r: list | None = None, fov: bool = True, model: str = "Miqus Video", **lens) -> str:
    """One camera 2 m above the origin of a z-up world; an identity rotation looks down."""
    turn = {f"r{i}{j}": (r or EYE)[i - 1][j - 1] for i in (1, 2, 3) for j in (1, 2, 3)}
    lens = dict(focalLengthU=80 * 64, focalLengthV=80 * 64, centerPointU=41.5 * 64,
                centerPointV=23.5 * 64) | lens  # fmt: skip

    def tag(name: str, values: dict) -> str:
        return f"<{name} " + " ".join(f'{k}="{v}"' for k, v in values.items()) + "/>"

    inside = tag("transform", turn | dict(x=0, y=0, z=2000)) + tag("intrinsic", lens)
    if fov:
        inside += tag("fov_video", dict(left=10, top=0, right=73, bottom=47))
    return (
        '<?xml version="1.0" encoding="UTF-8"?><calibration><cameras>'
        f'<camera serial="777" model="{model}">{inside}</camera></cameras></calibration>'
    )


FILES = {
    "transforms.json": transforms(), "angle.json": transforms(
        {"fl_x": None, "camera_angle_x": 2 * math.atan(32 / 80)}),
    "list.json": camera_list(), "calibration.toml": table("cam"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_format_gives_the_same_camera(name):
    """4 m before the origin, focal length 80, the optical axis in the middle of 64x48."""
    rig, note = rig_from_text(name, FILES[name])
    assert (rig.width, rig.height, note) == (64, 48, "")
    right = torch.tensor([[0.4, 0.0, 0.0]])  # x is right in both OpenCV's and OpenGL's axes
    pixels, depth = project(right, rig)
    torch.testing.assert_close(pixels[0, 0], torch.tensor([32.0 + 8, 24.0]))
    assert float(depth) == pytest.approx(4)


def test_transforms_have_opengl_axes():
    rig, _ = rig_from_text("t.json", transforms())
    assert rig.names == ("front",)
    # Its world has y up: a point above falls in the picture's upper half; nearer = greater z.
    pixels, depth = project(torch.tensor([[0.0, 0.4, 0.0], [0.0, 0.0, 1.0]]), rig)
    torch.testing.assert_close(pixels[0], torch.tensor([[32.0, 16.0], [32.0, 24.0]]))
    torch.testing.assert_close(depth[0], torch.tensor([4.0, 3.0]))


def test_a_frames_own_lens_beats_the_shared_one():
    own = transforms({"cx": 1.0}, fl_x=100, fl_y=90, cx=30, cy=20, w=128, h=64)
    rig, _ = rig_from_text("t.json", own)
    assert rig.K[0].tolist() == [[100, 0, 30], [0, 90, 20], [0, 0, 1]]
    assert (rig.width, rig.height) == (128, 64)


def test_transforms_round_trip():
    around, above = torch.tensor([0.0, 1.2, -2.5]), torch.tensor([0.1, -0.4, 0.9])
    rig = orbit_rig(around, above, 3.0, 0.6, 96, 64, torch.tensor([1.0, -2.0, 0.5]))
    back, note = rig_from_text("t.json", rig_to_transforms_json(rig))
    # Written and inverted in float64, so only the last rounding to float32 is left.
    torch.testing.assert_close(back.T_camera_world, rig.T_camera_world, atol=1e-6, rtol=0)
    assert torch.equal(back.K, rig.K) and back.names == rig.labels and note == ""
    assert (back.width, back.height) == (96, 64)


def test_anipose_cameras_come_in_natural_order_with_the_half_pixel():
    names = ("cam_10", "cam_2", "cam_1")
    text = "".join(map(table, names)) + "[metadata]\nerror = 0.5\nadjusted = false\n"
    rig, note = rig_from_text("calibration.toml", text)
    assert rig.names == ("cam_1", "cam_2", "cam_10") and note == ""
    # OpenCV counts from the middle of the first pixel.
    assert rig.K[0, :2, 2].tolist() == [32, 24]


def test_anipose_rotation_is_rodrigues_from_world_to_camera():
    quarter = table("cam", rotation=f"[0.0, {math.pi / 2}, 0.0]", translation="[0.1, 0.2, 4.0]")
    T = rig_from_text("c.toml", quarter)[0].T_camera_world[0]
    # A right-handed quarter turn about y takes z to x, and x to -z.
    wanted = torch.tensor([[0.0, 0, 1, 0.1], [0, 1, 0, 0.2], [-1, 0, 0, 4], [0, 0, 0, 1]])
    torch.testing.assert_close(T, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", table("cam", distortions="[-0.1, 0.0, 0.0, 0.0, 0.0]")),
        ("t.json", transforms(k1=0.05)),
        ("t.json", transforms({"p2": -0.01})),
        ("c.xml", qualisys(radialDistortion1=-12.5)),
    ],
    ids=["anipose", "frame", "shared", "qualisys"],
)
def test_lens_distortion_is_said(name, text):
    _, note = rig_from_text(name, text)
    assert "lens distortion" in note


def test_camera_to_world_files_of_4danyone():
    camera = {
        "K": [[80.0, 0, 32], [0, 80, 24], [0, 0, 1]], "camera_to_world": pose(x=1, y=-2, z=-4),
        "image_width": 64, "image_height": 48,
    }  # fmt: skip
    for content in ([camera], {"cameras": [camera]}, {"front": camera}):
        rig, _ = rig_from_text("cameras.json", json.dumps(content))
        assert rig.centers.tolist() == [[1, -2, -4]]
        assert rig.T_camera_world[0, :3, :3].equal(torch.eye(3))  # OpenCV axes already
        assert rig.names == ("front" if isinstance(content, dict) and "front" in content else "0",)
        assert rig.K[0, :2, 2].tolist() == [32, 24] and (rig.width, rig.height) == (64, 48)


@pytest.mark.parametrize(
    "change",
    [
        {"K": [80, 80, 32, 24]},
        {"K": None, "intrinsics": [[80, 0, 32], [0, 80, 24], [0, 0, 1]]},
        {"extrinsics": pose(z=4)[:3]},
        {"extrinsics": None, "w2c": pose(z=4)},
        {"extrinsics": None, "c2w": pose(z=-4)},
        {"width": None, "w": 64, "height": None, "h": "48"},
    ],
)
def test_other_spellings_of_a_camera_list(change):
    given, wanted = (rig_from_text("c.json", camera_list(**c))[0] for c in (change, {}))
    assert given.K.equal(wanted.K) and given.T_camera_world.equal(wanted.T_camera_world)


def test_qualisys_is_in_millimetres_64ths_of_a_pixel_and_turned_about_x():
    rig, note = rig_from_text("cameras.qca.txt", qualisys())
    assert rig.names == ("777",) and note == "" and (rig.width, rig.height) == (64, 48)
    torch.testing.assert_close(rig.centers, torch.tensor([[0.0, 0.0, 2.0]]))
    # It looks down on the floor: x right, y up. The picture is cut 10 pixels from the left.
    pixels, depth = project(torch.tensor([[0.0, 0, 0], [0.5, 0.25, 0]]), rig)
    torch.testing.assert_close(pixels[0], torch.tensor([[32.0, 24.0], [52.0, 14.0]]))
    assert depth.tolist() == [[2.0, 2.0]]


def test_qualisys_marker_cameras_take_no_pictures():
    with pytest.raises(ValueError, match="holds no camera"):
        rig_from_text("c.xml", qualisys(model="Miqus M3"))


def test_qualisys_rounded_digits_become_the_nearest_rotation():
    R = rig_from_text("c.xml", qualisys([[1.0, 0.002, 0], [0, 1, 0], [0, 0, 0.999]]))[0]
    R = R.T_camera_world[0, :3, :3]
    torch.testing.assert_close(R @ R.T, torch.eye(3))


def test_a_camera_of_another_shape_keeps_the_middle_of_its_picture():
    first = json.loads(camera_list())[0]
    tall = first | {"width": 48, "height": 64, "K": [80, 80, 24, 32], "name": "tall"}
    small = first | {"width": 32, "height": 24, "K": [40, 40, 16, 12]}
    rig, note = rig_from_text("c.json", json.dumps([first, tall, small]))
    assert "camera tall has 48x64 pictures, the first 64x48" in note and "camera 2" not in note
    assert rig.K[2].equal(rig.K[0])  # half the size, the same look
    # 48 wide becomes 64: a scale of 4/3, the optical axis still in the middle to half a pixel.
    torch.testing.assert_close(rig.K[1, 0, 0], torch.tensor(80 * 64 / 48))
    torch.testing.assert_close(rig.K[1, :2, 2], torch.tensor([32.0, 24.0]), atol=0.5, rtol=0)


NAN, HUGE = math.nan, 10**400
FLAT = [[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
UNREADABLE, NONE = "is not a camera file that can be read", "holds no camera"
MALFORMED = [
    ("c.json", "", UNREADABLE),
    ("c.json", "hello", UNREADABLE),
    ("c.json", '{"frames": [', UNREADABLE),
    ("c.json", "[" * 100_000, UNREADABLE),
    ("c.json", '{"w": ' + "9" * 5000 + "}", UNREADABLE),
    ("c.json", "null", "no list of cameras"),
    ("c.json", "3", "no list of cameras"),
    ("c.json", "{}", NONE),
    ("c.json", "[]", NONE),
    ("c.json", "[[]]", "camera '0' is not a table"),
    ("c.json", '{"frames": []}', NONE),
    ("c.json", '{"frames": 5}', "'frames' is not a list"),
    ("c.json", '{"frames": [5]}', "frame 0 is not a table"),
    ("c.json", '{"frames": [{}]}', "frame 0 has no 'w'"),
    ("c.json", transforms(transform_matrix=None), "frame 0 has no 'transform_matrix'"),
    ("c.json", transforms({"fl_x": None}), "frame 0 has no 'camera_angle_x'"),
    ("c.json", transforms({"fl_x": None}, camera_angle_x=4), "between 0.01 and 3 radians"),
    ("c.json", transforms(fl_x=-5), "focal length of nearly zero"),
    ("c.json", transforms(w=NAN), "'w' = nan, which must be a number"),
    ("c.json", transforms(w="wide"), "'w' = 'wide', which must be a number"),
    ("c.json", transforms(w=HUGE), "must be a number"),
    ("c.json", transforms(w=1e9), "picture size of 1e+09x48"),
    ("c.json", transforms(h=0), "picture size of 64x0"),
    ("c.json", transforms(transform_matrix=FLAT), "'transform_matrix' that is flat"),
    ("c.json", transforms(transform_matrix=[[NAN] * 4] * 4), "not 4x4 or 3x4 numbers"),
    ("c.json", transforms(transform_matrix=[[2.0, 0, 0, 0], *EYE[1:]]), "scaled, sheared"),
    ("c.json", transforms(transform_matrix=[[-1.0, 0, 0, 0], *EYE[1:]]), "mirrored"),
    ("c.json", camera_list(K=None), "camera '0' has no 'K'"),
    ("c.json", camera_list(extrinsics=None), "camera '0' has no 'extrinsics'"),
    ("c.json", camera_list(width=None), "camera '0' has no 'width'"),
    ("c.json", camera_list(height=HUGE), "must be a number"),
    ("c.json", camera_list(width=[[[[[[[[]]]]]]]]), "must be a number"),
    ("c.json", camera_list(K=[80, 80, 32]), "'K' that is not 3x3 or 4 numbers"),
    ("c.json", camera_list(K=[[80, 0], [0, 80, 1], []]), "'K' that is not 3x3 or 4 numbers"),
    ("c.json", camera_list(K={"fx": 80}), "'K' that is not 3x3 or 4 numbers"),
    ("c.json", camera_list(K=[[80, 0, 0], [0, 80, 0], [32, 24, 1]]), "transposed or scaled"),
    ("c.json", camera_list(K=[[HUGE, 0, 0], [0, 1, 0], [0, 0, 1]]), "not 3x3 or 4 numbers"),
    ("c.json", camera_list(extrinsics=FLAT), "rotation that is not one"),
    ("c.json", camera_list(extrinsics=None, c2w=FLAT), "'c2w' that is flat"),
    ("c.json", camera_list(extrinsics=pose(x=1e300)), "NaN or infinity"),
    ("c.json", json.dumps(json.loads(camera_list()) * 257), "1 to 256 cameras, got 257"),
    ("c.toml", "", NONE),
    ("c.toml", "{}", UNREADABLE),
    ("c.toml", "a = " + "[" * 100_000, UNREADABLE),
    ("c.toml", "[cam]\nmatrix = 1979-05-27", "'matrix' that is not 3x3"),
    ("c.toml", table("cam").replace("rotation", "turn"), "table 'cam' has no 'rotation'"),
    ("c.toml", table("cam", rotation="[nan, 0, 0]"), "'rotation' that is not 3 numbers"),
    ("c.toml", table("cam", size="[64]"), "'size' that is not 2 numbers"),
    ("c.toml", table("cam", size="[64, 1000000]"), "picture size of 64x1e+06"),
    ("c.toml", table("cam", distortions='["a"]'), "'distortions' = 'a'"),
    ("c.xml", "<calibration>", UNREADABLE),
    ("c.xml", "<a>" * 10_000 + "</a>" * 10_000, NONE),
    ("c.xml", qualisys(fov=False), "no <fov_video>"),
    ("c.xml", qualisys(focalLengthU="wide"), "'focalLengthU' = 'wide'"),
    ("c.xml", qualisys([[0.0] * 3] * 3), "rotation that is not one"),
]


@pytest.mark.parametrize(
    ("name", "text", "message"), MALFORMED, ids=[f"{n}: {m[:30]}" for n, _, m in MALFORMED]
)
def test_a_malformed_file_is_one_sentence(name, text, message):
    with pytest.raises(ValueError) as error:
        rig_from_text(name, text)
    said = str(error.value)
    assert said.startswith(name) and message in said
    assert said.endswith(".") and "\n" not in said and len(said) < 300
