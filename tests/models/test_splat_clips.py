"""Clips of Gaussians in one PLY: frames there and back, the rest for every other reader."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from turnaround.models import splat_clips, splat_files
from turnaround.models.splat_clips import read_clip_ply, write_clip_ply
from turnaround.models.splat_files import AXES, read_ply, write_ply
from turnaround.models.splats import Splats


def splats(N=30, degree=1, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=draw)

    return Splats(some(N, 3), some(N, 4), some(N, 3) - 4, some(N), some(N, (degree + 1) ** 2, 3))


def moving(rest, frames=4):
    """Gaussians that go and turn, and grow in the last frame."""
    other = splats(len(rest), rest.degree, seed=1)
    return [
        replace(rest, means=rest.means + f * other.means / 9,
                rotations=rest.rotations + f * other.rotations / 9,
                log_scales=rest.log_scales + (f == frames - 1))
        for f in range(frames)
    ]  # fmt: skip


def near(a, b):
    """Equal to the rounding of a difference and a sum, for numbers up to 8."""
    return all(torch.allclose(x, y, rtol=0, atol=2e-6) for x, y in zip(a, b, strict=True))


def written(tmp_path, rest, frames, axes=AXES[2]):
    write_clip_ply(tmp_path / "a.ply", rest, frames, 12.5, axes)
    return read_clip_ply(tmp_path / "a.ply", axes)


@pytest.mark.parametrize("degree", range(4))
def test_a_clip_gives_back_its_frames(tmp_path, degree):
    rest = splats(degree=degree)
    frames = moving(rest)
    clip = written(tmp_path, rest, frames)
    assert len(clip) == 4 and clip.fps == 12.5
    assert near(clip.rest.tensors(), rest.tensors())
    for f, frame in enumerate(frames):
        assert near(clip.frame(f).tensors(), frame.tensors())
    # Nothing is stored of what no frame changes.
    assert clip.deltas.shape == (4, 30, 10)
    assert torch.equal(clip.frame(2).sh, rest.sh) and torch.equal(
        clip.frame(2).opacities, rest.opacities
    )


def test_other_readers_see_the_rest_and_only_vertices(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    rest = splats()
    written(tmp_path, rest, moving(rest))
    write_ply(tmp_path / "rest.ply", rest)
    clip, plain = (trimesh.load(tmp_path / f"{n}.ply").metadata["_ply_raw"] for n in ("a", "rest"))
    assert list(clip) == ["vertex"]
    clip, plain = clip["vertex"]["data"], plain["vertex"]["data"]
    assert clip.dtype.names[: len(plain.dtype.names)] == plain.dtype.names
    assert all(np.array_equal(clip[n], plain[n]) for n in plain.dtype.names)
    # And by the file's own words, without this project's reader: rest + delta = frame.
    x = clip["x"] + clip["d2_x"]
    assert np.allclose(x, moving(rest)[2].means[:, 0].numpy(), atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(
        read_ply(tmp_path / "a.ply").tensors(), rest.tensors(), strict=True))  # fmt: skip


def test_names_of_deltas_mislead_no_viewer(tmp_path):
    """Viewers find colours by f_rest_ anywhere in a line, and others by how a name begins."""
    rest = splats(5, 1)
    clip = written(tmp_path, rest, [splats(5, 1, seed=2)])
    assert clip.deltas.shape == (1, 5, 23)  # all that a Gaussian has
    head = (tmp_path / "a.ply").read_bytes().partition(b"end_header")[0].decode()
    deltas = [line.split()[2] for line in head.splitlines() if line.startswith("property float d")]
    assert len(deltas) == 23 and head.count("f_rest_") == 9
    assert not [
        n for n in deltas if n.startswith(("x", "y", "z", "n", "f_", "scale", "rot", "opac"))
    ]
    # One element, floats alone: what every reader knows.
    assert head.count("element ") == 1 and head.count("property ") == head.count("property float ")


@pytest.mark.parametrize("axes", AXES)
def test_clips_of_any_axes_come_back_to_the_world(tmp_path, axes):
    rest = splats(degree=2)
    frames = moving(rest)
    clip = written(tmp_path, rest, frames, axes)
    assert torch.allclose(clip.frame(3).means, frames[3].means, atol=2e-6)
    assert torch.allclose(clip.frame(3).covariances(), frames[3].covariances(), atol=1e-5)
    eye = torch.tensor([0.5, -1.0, 4.0])
    assert torch.allclose(clip.frame(3).colors(eye), frames[3].colors(eye), atol=1e-5)
    up = read_ply(tmp_path / "a.ply").means @ torch.tensor(splat_files.AXES_ROTATIONS[axes])
    assert torch.allclose(up, rest.means, atol=1e-6)


def test_a_rotation_told_the_other_way_round_is_no_detour(tmp_path):
    rest = splats()
    clip = written(tmp_path, rest, [replace(rest, rotations=-rest.rotations)])
    assert clip.deltas.numel() == 0 and torch.equal(clip.frame(0).rotations, rest.rotations)


def test_clips_that_stand_still_and_clips_of_nothing(tmp_path):
    rest = splats()
    still = written(tmp_path, rest, [rest, rest])
    assert len(still) == 2 and near(still.frame(1).tensors(), rest.tensors())
    nothing = written(tmp_path, splats(0), [splats(0)] * 3)
    assert len(nothing) == 3 and len(nothing.frame(2)) == 0


def test_large_clips_pass_in_pieces(tmp_path, monkeypatch):
    rest = splats()
    written(tmp_path, rest, moving(rest))
    before = (tmp_path / "a.ply").read_bytes()
    monkeypatch.setattr(splat_files, "CHUNK_BYTES", 1500)
    clip = written(tmp_path, rest, moving(rest))
    assert (tmp_path / "a.ply").read_bytes() == before
    assert near(clip.frame(3).tensors(), moving(rest)[3].tensors())


# ---- what is refused ----


def refused(tmp_path, sentence, rest, frames, fps=24.0):
    with pytest.raises(ValueError, match=sentence):
        write_clip_ply(tmp_path / "b.ply", rest, frames, fps)
    assert not list(tmp_path.glob("b.*"))


def test_what_is_no_clip_is_not_written(tmp_path, monkeypatch):
    rest = splats()
    refused(tmp_path, "at least one frame", rest, [])
    refused(tmp_path, "frame 1 has 29 Gaussians of 23", rest, [rest, splats(29)])
    refused(tmp_path, "frame 0 has 30 Gaussians of 14 numbers", rest, [splats(degree=0)])
    nan = replace(rest, opacities=rest.opacities + math.nan)
    refused(tmp_path, "b.ply, frame 1: 30 of 30 Gaussians hold NaN", rest, [rest, nan])
    refused(tmp_path, "b.ply: 30 of 30 Gaussians hold NaN", nan, [rest])
    for fps in (0.0, -1.0, math.inf, math.nan):
        refused(tmp_path, "can't be played", rest, [rest], fps)
    monkeypatch.setattr(splat_clips, "MAX_CLIP_VALUES", 30 * 7 * 3)
    refused(tmp_path, "first 4 frames of 30 Gaussians are more than fit", rest, moving(rest, 9)[1:])


def test_a_clip_too_long_for_viewers_headers_is_told_how_long_it_may_be(tmp_path):
    rest = splats(2)
    refused(
        tmp_path,
        "needs? a header of .* save at most about 2[0-9][0-9] frames",
        rest,
        moving(rest, 500),
    )
    write_clip_ply(tmp_path / "a.ply", rest, moving(rest, 240), 24)
    assert len(read_clip_ply(tmp_path / "a.ply")) == 240
    # All properties, the normals included, end where viewers still look.
    assert (tmp_path / "a.ply").read_bytes().index(b"end_header\n") + 11 <= splat_files.MAX_HEADER


def test_the_header_is_counted_to_the_byte(tmp_path, monkeypatch):
    rest = splats(2)
    write_clip_ply(tmp_path / "a.ply", rest, moving(rest), 24)
    length = (tmp_path / "a.ply").read_bytes().index(b"end_header\n") + 11
    monkeypatch.setattr(splat_clips, "MAX_HEADER", length)
    write_clip_ply(tmp_path / "a.ply", rest, moving(rest), 24)
    monkeypatch.setattr(splat_clips, "MAX_HEADER", length - 1)
    refused(tmp_path, "save at most", rest, moving(rest))


def test_a_plain_or_broken_ply_is_no_clip(tmp_path):
    rest = splats()
    write_clip_ply(tmp_path / "a.ply", rest, moving(rest), 24)
    content = (tmp_path / "a.ply").read_bytes()
    for old, new, sentence in (
        (b"comment Turnaround clip", b"comment other clip", "holds no frames"),
        (b"4 frames at 24.0", b"0 frames at 24.0", "holds no frames"),
        (b"4 frames at 24.0", b"4 frames at 2.4.0", "holds no frames"),
        (b"4 frames at 24.0", b"4 frames at 1e999", "holds no frames"),
        (b"4 frames at 24.0", b"5 frames at 24.0", "lacks numbers of some of its 5 frames"),
        (b"4 frames at 24.0", b"999999 frames at 24.0", "lacks numbers of some of its 999999"),
        (b" d3_y\n", b" e3_y\n", "lacks numbers"),
        (b"element vertex 30\n", b"element vertex 31\n", "promises 31 Gaussians and holds 30"),
    ):
        assert old in content
        (tmp_path / "b.ply").write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match=sentence):
            read_clip_ply(tmp_path / "b.ply")
    write_ply(tmp_path / "b.ply", rest)
    with pytest.raises(ValueError, match="b.ply holds no frames"):
        read_clip_ply(tmp_path / "b.ply")
    last = bytearray(content)
    last[-4:] = b"\0\0\xc0\x7f"  # the last delta of the last Gaussian
    (tmp_path / "b.ply").write_bytes(bytes(last))
    with pytest.raises(ValueError, match="1 of 30 Gaussians hold NaN"):
        read_clip_ply(tmp_path / "b.ply")


def test_cancelling_leaves_no_file(tmp_path):
    seen = []

    def cancel(f):
        seen.append(f)
        if f == 1:
            raise InterruptedError

    rest = splats()
    with pytest.raises(InterruptedError):
        write_clip_ply(tmp_path / "a.ply", rest, moving(rest), 24, on_frame=cancel)
    assert seen == [0, 1] and list(tmp_path.iterdir()) == []
