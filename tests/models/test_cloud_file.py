"""Clouds in files: PLY there and back, the view's file to its stated precision, whole or not at all."""

import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from turnaround.models import cloud_file
from turnaround.models.cameras import orbit_rig
from turnaround.models.cloud_file import (
    AXES,
    encode_octahedral,
    even_subset,
    finite,
    ply_bytes,
    read_ply,
    turntable,
    write_cloud_view,
    write_ply,
)
from turnaround.models.points import OrientedPoints

COUNTS = (40, 0, 25)


def cloud(counts=COUNTS, seed=0, fps=12.5):
    """Random points of a body's size; every third one is a guess."""
    N, draw = sum(counts), torch.Generator().manual_seed(seed)
    confidences = torch.rand(N, generator=draw)
    confidences[::3] = 0
    return OrientedPoints(
        positions=torch.randn(N, 3, generator=draw) * torch.tensor([0.3, 0.9, 0.2]),
        normals=F.normalize(torch.randn(N, 3, generator=draw), dim=1),
        colors=torch.rand(N, 3, generator=draw),
        radii=0.002 + 0.004 * torch.rand(N, generator=draw),
        confidences=confidences,
        frame_offsets=torch.tensor([0, *np.cumsum(counts).tolist()]),
        source=orbit_rig(torch.zeros(1), torch.zeros(1), 3.0, 0.6, 48, 64),
        fps=fps,
    )


def read_view(content):
    """Header and frames of the view's file, as js/cloud_view.js reads it."""
    assert content[:8] == b"TURNCLD1"
    (size,) = struct.unpack_from("<I", content, 8)
    header = json.loads(content[12 : 12 + size])
    frames, at = [], 12 + size
    for n in header["counts"]:
        places = np.frombuffer(content, "<u2", 3 * n, at).reshape(n, 3) / 65535
        paint = np.frombuffer(content, "u1", 4 * n, at + 6 * n).reshape(n, 4) / 255
        octants = np.frombuffer(content, "u1", 2 * n, at + 10 * n).reshape(n, 2) / 255
        radii = np.frombuffer(content, "u1", n, at + 12 * n) / 255 * header["radius"]
        positions = np.array(header["low"]) + places * np.array(header["size"])
        frames.append((positions, paint, octants, radii))
        at += math.ceil(13 * n / 4) * 4
    assert at == len(content)
    return header, frames


def unfold(octants):
    """Octahedral squares back to unit vectors, as the view's shader does."""
    q = octants * 2 - 1
    n = np.stack([q[:, 0], q[:, 1], 1 - abs(q).sum(1)], 1)
    sign = np.where(n[:, :2] < 0, -1, 1)
    n[:, :2] = np.where(n[:, 2:] < 0, (1 - abs(n[:, 1::-1])) * sign, n[:, :2])
    return n / np.linalg.norm(n, axis=1, keepdims=True)


def drawn(strip):
    """Where a turntable is not its grey ground."""
    return (strip - 0.5).abs().amax(0) > 0.01


def written(tmp_path, points, max_points=1000):
    view = write_cloud_view(tmp_path / "a.turncloud", points, max_points)
    content = (tmp_path / "a.turncloud").read_bytes()
    return view, *read_view(content)


# ---- PLY ----


@pytest.mark.parametrize("axes", AXES)
def test_ply_gives_back_the_points_of_a_frame(axes):
    points = cloud()
    part, turn = points.frame(2), np.array(cloud_file.AXES_ROTATIONS[axes])
    back = read_ply(ply_bytes(points, 2, axes))
    place = np.stack([back[n] for n in ("x", "y", "z")], 1) @ turn
    normal = np.stack([back[n] for n in ("nx", "ny", "nz")], 1) @ turn
    color = np.stack([back[n] for n in ("red", "green", "blue")], 1) / 255
    # Turning by 90 degrees swaps float32 numbers and changes none.
    assert np.array_equal(place, points.positions[part].numpy())
    assert np.array_equal(normal, points.normals[part].numpy())
    assert abs(color - points.colors[part].numpy()).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(back["confidence"], points.confidences[part].numpy())
    assert np.array_equal(back["radius"], points.radii[part].numpy())


@pytest.mark.parametrize(
    ("axes", "up"), list(zip(AXES, ([0, 1, 0], [0, 0, 1], [0, -1, 0]), strict=True))
)
def test_a_head_is_up_and_nothing_is_mirrored(axes, up):
    turn = torch.tensor(cloud_file.AXES_ROTATIONS[axes])
    assert (turn @ torch.tensor([0.0, -1.0, 0.0])).tolist() == up  # the world's up
    assert torch.linalg.det(turn) == 1


def test_other_programs_read_the_ply():
    trimesh = pytest.importorskip("trimesh")
    import io

    points = cloud()
    part = points.frame(0)
    mesh = trimesh.load(io.BytesIO(ply_bytes(points, 0, AXES[2])), file_type="ply")
    assert np.allclose(mesh.vertices, points.positions[part].numpy())
    assert abs(mesh.colors[:, :3] / 255 - points.colors[part].numpy()).max() < 0.003


def test_an_empty_frame_is_a_ply_without_points():
    assert len(read_ply(ply_bytes(cloud(), 1, AXES[0]))) == 0


def test_a_cut_or_foreign_ply_is_refused():
    content = ply_bytes(cloud(), 0, AXES[0])
    with pytest.raises(ValueError, match="it is cut"):
        read_ply(content[:-1])
    with pytest.raises(ValueError, match="not written by Save Cloud"):
        read_ply(content.replace(b"float confidence", b"float brightness"))


def test_files_appear_only_when_whole(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(cloud_file.Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_ply(tmp_path / "a.ply", cloud(), 0, AXES[0])
    assert list(tmp_path.iterdir()) == []


def test_cancelling_leaves_no_file(tmp_path):
    def cancel(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write_cloud_view(tmp_path / "a.turncloud", cloud(), 1000, cancel)
    assert list(tmp_path.iterdir()) == []


# ---- the view's file ----


def test_view_file_holds_every_number_to_its_precision(tmp_path):
    points = cloud()
    view, header, frames = written(tmp_path, points)
    assert header["counts"] == list(COUNTS) and view.points == sum(COUNTS) and view.note == ""
    assert header["fps"] == view.fps == 12.5
    step = np.array(header["size"]) / 65535
    for f, (positions, paint, octants, radii) in enumerate(frames):
        part = points.frame(f)
        assert (abs(positions - points.positions[part].numpy()) <= 0.51 * step + 1e-6).all()
        assert abs(paint[:, :3] - points.colors[part].numpy()).max(initial=0) <= 0.51 / 255
        assert abs(paint[:, 3] - points.confidences[part].numpy()).max(initial=0) <= 1 / 255
        # 255 steps along an octahedron's edges of 90 degrees: half a step is under one degree.
        cosine = (unfold(octants) * points.normals[part].numpy()).sum(1)
        assert np.degrees(np.arccos(cosine.clip(-1, 1))).max(initial=0) < 1
        assert (
            abs(radii - points.radii[part].numpy()).max(initial=0) <= 0.51 * header["radius"] / 255
        )


def test_guessed_points_stay_apart_from_barely_seen_ones(tmp_path):
    points = cloud((3,))
    points = replace(points, confidences=torch.tensor([0.0, 1e-4, 1.0]))
    _, _, [(_, paint, _, _)] = written(tmp_path, points)
    assert paint[0, 3] == 0 and paint[1, 3] > 0


def test_source_camera_and_the_performers_box_stand_in_the_header(tmp_path):
    points = cloud((5000,))
    stray = points.positions.clone()
    stray[0] = torch.tensor([0.0, 40.0, 0.0])
    _, header, _ = written(tmp_path, replace(points, positions=stray), 6000)
    assert np.allclose(header["source"]["center"], [0, 0, -3], atol=1e-6)
    assert header["source"]["rotation"] == torch.eye(3).tolist()
    # One stray point widens the box of the numbers, but not what the view frames.
    assert header["low"][1] + header["size"][1] == pytest.approx(40)
    assert header["inner_high"][1] < 3


def test_too_many_points_become_an_even_subset_of_the_same_surface(tmp_path):
    points = cloud((4000, 500))
    view, header, frames = written(tmp_path, points, 1000)
    assert header["counts"] == [1000, 500]
    assert "4,000 points" in view.note and "even 1,000" in view.note
    # A quarter of the points, each twice as wide: the area is kept.
    assert frames[0][3].mean() == pytest.approx(2 * float(points.radii[:4000].mean()), rel=0.05)
    assert frames[1][3].mean() == pytest.approx(float(points.radii[4000:].mean()), rel=0.05)


def test_subset_takes_one_point_of_every_stretch_and_is_repeatable():
    chosen = even_subset(1003, 100)
    assert torch.equal(chosen, even_subset(1003, 100))
    assert (chosen.diff() > 0).all() and chosen.max() < 1003
    assert torch.equal(even_subset(1000, 100) // 10, torch.arange(100))
    # Within a stretch by chance: every tenth point would draw stripes over an even surface.
    assert len(set((even_subset(1000, 100) % 10).tolist())) == 10
    assert torch.equal(even_subset(5, 100), torch.arange(5))


def test_long_clips_get_fewer_points_a_frame_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cloud_file, "TOTAL_POINTS", 60)
    view, header, _ = written(tmp_path, cloud(), 1000)
    assert header["counts"] == [20, 0, 20] and "so that 3 frames stay quick" in view.note


def test_checksum_tells_two_clouds_of_one_name_apart(tmp_path):
    first, _, _ = written(tmp_path, cloud(seed=1))
    second, _, _ = written(tmp_path, cloud(seed=2))
    again, _, _ = written(tmp_path, cloud(seed=1))
    assert first.checksum == again.checksum != second.checksum


@pytest.mark.parametrize("axis", range(3))
def test_octahedral_normals_know_both_ends_of_every_axis(axis):
    ends = torch.zeros(2, 3)
    ends[:, axis] = torch.tensor([1.0, -1.0])
    assert np.allclose(unfold(encode_octahedral(ends).numpy()), ends.numpy(), atol=1e-6)


def test_a_flat_cloud_and_a_single_point_are_no_division_by_zero(tmp_path):
    one = cloud((1,))
    _, _, [(positions, *_)] = written(tmp_path, one)
    assert np.allclose(positions, one.positions.numpy(), atol=1e-5)
    assert drawn(turntable(replace(one, positions=torch.zeros(1, 3)))).any()


def test_a_cloud_of_kilometres_is_refused(tmp_path):
    far = cloud()
    far = replace(far, positions=far.positions * 1e6)
    with pytest.raises(ValueError, match="not in metres"):
        write_cloud_view(tmp_path / "a.turncloud", far, 1000)
    assert list(tmp_path.iterdir()) == []


# ---- points that are none ----


def test_nan_and_infinity_are_left_out_and_counted():
    points = cloud()
    positions, radii = points.positions.clone(), points.radii.clone()
    positions[3, 1], positions[50, 0], radii[51] = math.nan, math.inf, math.nan
    kept, lost = finite(replace(points, positions=positions, radii=radii))
    assert lost == 3 and kept.frame_offsets.tolist() == [0, 39, 39, 62]
    assert torch.equal(kept.colors[kept.frame(0)], points.colors[:40][torch.arange(40) != 3])
    assert finite(points) == (points, 0)


def test_a_cloud_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no points"):
        finite(cloud((0, 0)))


# ---- turntable ----


def test_turntable_shows_the_middle_frame_from_eight_sides():
    """A red ball to the right of a blue one, as the source camera sees them."""
    points = cloud((1, 400, 1))
    ball = F.normalize(points.positions, dim=1) * 0.1
    side = torch.where(torch.arange(402) % 2 == 0, 0.4, -0.4)
    colors = torch.where(side[:, None] > 0, torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0]))
    ball[:, 0] += side
    strip = turntable(replace(points, positions=ball, colors=colors, radii=points.radii + 0.01))
    H, W = strip.shape[1], strip.shape[2] // 8
    assert strip.shape == (3, 320, 8 * 208)
    red, blue = strip[0] - strip[1] > 0.4, strip[2] - strip[1] > 0.4

    def middle(hits):
        return hits.nonzero()[:, 1].float().mean() - W / 2

    front, back = slice(0, W), slice(4 * W, 5 * W)
    assert middle(red[:, front]) > 20 > -20 > middle(blue[:, front])
    assert middle(red[:, back]) < -20 < 20 < middle(blue[:, back])
    assert not drawn(strip)[0, 0] and H == 320


def test_turntable_passes_over_empty_frames():
    assert drawn(turntable(cloud((30, 0, 0)))).any()
