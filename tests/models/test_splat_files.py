"""Gaussians in files: PLY and .splat byte for byte, there and back, by other readers, and broken."""

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from turnaround.models import splat_files
from turnaround.models.splat_files import (
    AXES,
    WORLD,
    read_ply,
    read_splat,
    write_ply,
    write_splat,
)
from turnaround.models.splats import Splats, rotation_matrices

COUNTS = (0, 9, 24, 45)  # of f_rest_*, by degree


def splats(N=30, degree=3, seed=0):
    """Gaussians of a body's size, with rotations that are not of length 1."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=draw)

    return Splats(
        means=some(N, 3),
        rotations=3 * some(N, 4),
        log_scales=some(N, 3) - 4,
        opacities=2 * some(N),
        sh=some(N, (degree + 1) ** 2, 3),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def names(degree):
    """Properties in the order of the files of 3DGS."""
    rest = [f"f_rest_{i}" for i in range(COUNTS[degree])]
    return (
        ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *rest, "opacity"]
        + ["scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    )  # fmt: skip


def ply(rows, columns, count=None, kind="float", start="ply\nformat binary_little_endian 1.0\n"):
    """A PLY by hand."""
    head = start + f"element vertex {len(rows) if count is None else count}\n"
    head += "".join(f"property {kind} {c}\n" for c in columns) + "end_header\n"
    letter = {"float": "f", "double": "d"}[kind]
    return head.encode() + b"".join(struct.pack(f"<{len(r)}{letter}", *r) for r in rows)


def by_hand(one, g, degree):
    """The numbers of Gaussian g as the file of 3DGS has them."""
    rest = [float(one.sh[g, k, c]) for c in range(3) for k in range(1, (degree + 1) ** 2)]
    return [
        *one.means[g].tolist(), 0, 0, 0, *one.sh[g, 0].tolist(), *rest, float(one.opacities[g]),
        *one.log_scales[g].tolist(), *one.rotations[g].tolist(),
    ]  # fmt: skip


# ---- PLY ----


@pytest.mark.parametrize("degree", range(4))
def test_ply_is_that_of_3dgs_byte_for_byte(tmp_path, degree):
    two = splats(2, degree)
    write_ply(tmp_path / "a.ply", two)
    start = (
        "ply\nformat binary_little_endian 1.0\n"
        "comment Turnaround: metres, y down (Turnaround, COLMAP)\n"
    )
    expected = ply([by_hand(two, g, degree) for g in range(2)], names(degree), start=start)
    assert (tmp_path / "a.ply").read_bytes() == expected


@pytest.mark.parametrize("N", (0, 1, 30))
@pytest.mark.parametrize("degree", range(4))
def test_ply_gives_back_every_bit(tmp_path, N, degree):
    before = splats(N, degree)
    write_ply(tmp_path / "a.ply", before)
    assert same(read_ply(tmp_path / "a.ply"), before)


def test_large_files_pass_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(splat_files, "CHUNK_BYTES", 1000)  # four Gaussians
    before = splats(30)
    write_ply(tmp_path / "pieces.ply", before)
    assert same(read_ply(tmp_path / "pieces.ply"), before)
    monkeypatch.undo()
    write_ply(tmp_path / "whole.ply", before)
    assert (tmp_path / "pieces.ply").read_bytes() == (tmp_path / "whole.ply").read_bytes()


def test_other_programs_read_the_ply(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    before = splats(30)
    write_ply(tmp_path / "a.ply", before)
    vertex = trimesh.load(tmp_path / "a.ply").metadata["_ply_raw"]["vertex"]["data"]
    assert list(vertex.dtype.names) == names(3)
    expected = np.array([by_hand(before, g, 3) for g in range(30)], np.float32)
    assert np.array_equal(np.stack([vertex[n] for n in names(3)], 1), expected)


def test_plys_of_other_programs_are_read(tmp_path):
    """Any order, doubles, no normals, comments, lines of Windows, elements after the vertices."""
    before, order = splats(3, 1), np.random.default_rng(0).permutation(len(names(1)))
    rows = np.array([by_hand(before, g, 1) for g in range(3)])[:, order]
    columns = [names(1)[i] for i in order]
    keep = [i for i, c in enumerate(columns) if c not in ("nx", "ny", "nz")]
    content = ply(rows[:, keep].tolist(), [columns[i] for i in keep], kind="double")
    head, _, body = content.partition(b"end_header\n")
    head += b"element camera 1\nproperty list uchar int view\nend_header\n"
    head = head.replace(b"1.0\n", b"1.0\ncomment of another program\n").replace(b"\n", b"\r\n")
    (tmp_path / "a.ply").write_bytes(head + body + b"\1\0\0\0\0")
    assert same(read_ply(tmp_path / "a.ply"), before)


@pytest.mark.parametrize(
    ("axes", "up"), list(zip(AXES, ([0, 1, 0], [0, 0, 1], [0, -1, 0]), strict=True))
)
@pytest.mark.parametrize("write, read", [(write_ply, read_ply), (write_splat, read_splat)])
def test_a_head_is_up_in_a_files_axes_and_comes_back(tmp_path, axes, up, write, read):
    head = replace(splats(1), means=torch.tensor([[0.0, -1.0, 0.0]]))  # the world's up
    write(tmp_path / "a", head, axes)
    assert torch.equal(read(tmp_path / "a").means, torch.tensor([up], dtype=torch.float32))
    back = read(tmp_path / "a", axes)
    assert torch.equal(back.means, head.means)
    if read is read_ply:
        assert torch.allclose(back.sh, head.sh, atol=1e-6)
        assert torch.allclose(back.covariances(), head.covariances(), rtol=1e-5)


def test_a_turned_ply_shows_the_same_from_a_turned_camera(tmp_path):
    before, eye = splats(30), torch.tensor([0.5, -1.0, 4.0])
    write_ply(tmp_path / "a.ply", before, AXES[1])
    raw = read_ply(tmp_path / "a.ply", WORLD)
    turn = torch.tensor(splat_files.AXES_ROTATIONS[AXES[1]])
    assert torch.allclose(raw.colors(turn @ eye), before.colors(eye), atol=1e-5)


# ---- broken PLYs ----


def whole(tmp_path):
    write_ply(tmp_path / "a.ply", splats(3, 1))
    return (tmp_path / "a.ply").read_bytes()


def refused(tmp_path, content, sentence, read=read_ply):
    (tmp_path / "b.ply").write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as problem:
        read(tmp_path / "b.ply")
    assert "b.ply" in str(problem.value) and "\n" not in str(problem.value)


def test_a_ply_cut_at_any_line_of_its_header_is_refused(tmp_path):
    content = whole(tmp_path)
    head = content.partition(b"end_header\n")[0]
    cuts = [0, *(i + 1 for i, byte in enumerate(head) if byte == 10), len(head) + 5]
    assert len(cuts) > 30
    for cut in cuts:
        refused(tmp_path, content[:cut], "is no PLY|header is cut")


@pytest.mark.parametrize("lost", (1, 4, 3 * 26 * 4))
def test_a_ply_cut_in_its_numbers_is_refused(tmp_path, lost):
    refused(tmp_path, whole(tmp_path)[:-lost], "promises 3 Gaussians and holds [02]: it is cut")


def test_a_ply_without_any_one_property_is_refused(tmp_path):
    for name in names(1):
        if name[0] != "n":
            content = whole(tmp_path).replace(f" {name}\n".encode(), b" other\n")
            refused(tmp_path, content, f"without {name}:|8 properties f_rest")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"ply\n", b"PLY\n", "is no PLY"),
        (b"binary_little_endian", b"binary_big_endian", "binary_big_endian 1.0'; export it as"),
        (b"binary_little_endian", b"ascii", "format 'ascii 1.0'"),
        (b"format binary_little_endian 1.0\n", b"", "of format ''"),
        (b"element vertex 3", b"element vertex 9999999999999", "promises 9,999,999,999,999"),
        (b"element vertex 3", b"element vertex 4", "promises 4 Gaussians and holds 3"),
        (b"element vertex 3", b"element vertex -3", "begins with 'vertex -3'"),
        (b"element vertex 3", b"element vertex", "begins with 'vertex'"),
        (b"element vertex 3", "element vertex ３".encode(), "not with its vertices"),
        (b"element vertex 3", b"element chunk 1\nelement vertex 3", "begins with 'chunk 1'"),
        (b"element vertex 3\n", b"", "begins with ''"),
        (b"float x\n", b"float128 x\n", "unknown types"),
        (b"float x\n", b"list uchar float x\n", "have lists"),
        (b"float x\n", b"float y\n", "double names"),
        (b"end_header\n", b"comment " + b"x" * 70_000 + b"\nend_header\n", "longer than 65536"),
    ],
)  # fmt: skip
def test_a_wrong_header_is_refused(tmp_path, old, new, sentence):
    refused(tmp_path, whole(tmp_path).replace(old, new), sentence)


def test_other_content_is_no_ply(tmp_path):
    refused(tmp_path, np.random.default_rng(0).bytes(5000), "is no PLY")
    refused(tmp_path, b"ply\nend_header\n", "of format ''")


@pytest.mark.parametrize("wrong", (math.nan, math.inf, -math.inf))
def test_nan_and_infinity_are_refused_and_no_file_is_left(tmp_path, wrong):
    for name in ("means", "rotations", "log_scales", "opacities", "sh"):
        values = getattr(splats(5), name).clone()
        values[2] = wrong
        bad = replace(splats(5), **{name: values})
        for write in (write_ply, write_splat):
            with pytest.raises(ValueError, match="a.any: 1 of 5 Gaussians hold NaN or infinity"):
                write(tmp_path / "a.any", bad)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_file_is_refused(tmp_path):
    rows = [by_hand(splats(2, 0), g, 0) for g in range(2)]
    rows[1][4] = math.nan  # a normal, which nobody reads
    (tmp_path / "a.ply").write_bytes(ply(rows, names(0)))
    assert len(read_ply(tmp_path / "a.ply")) == 2
    rows[1][9] = math.nan
    refused(tmp_path, ply(rows, names(0)), "1 of 2 Gaussians hold NaN")
    rows[1][9] = 1e300  # no infinity, but none that fits
    refused(tmp_path, ply(rows, names(0), kind="double"), "1 of 2 Gaussians hold NaN")


@pytest.mark.parametrize("write", (write_ply, write_splat))
def test_files_appear_only_when_whole(tmp_path, monkeypatch, write):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(splat_files.Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "a.any", splats())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_header_is_read_or_refused_but_never_a_crash(tmp_path):
    """Any byte of the header by another: a sentence, or Gaussians."""
    content, draw = whole(tmp_path), np.random.default_rng(0)
    length, read, told = content.index(b"end_header") + 11, 0, 0
    for _ in range(300):
        wrong = bytearray(content)
        wrong[draw.integers(length)] = draw.choice([*b" \n\r\0-19axyz\xff"])
        (tmp_path / "b.ply").write_bytes(wrong)
        try:
            read += len(read_ply(tmp_path / "b.ply")) <= 3
        except ValueError as problem:
            assert str(problem).startswith("b.ply")
            told += 1
    assert read + told == 300 and min(read, told) > 20


def test_more_gaussians_than_fit_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(splat_files, "MAX_SPLATS", 4)
    for write in (write_ply, write_splat):
        with pytest.raises(ValueError, match="a.any: 5 Gaussians, 4 fit: keep fewer"):
            write(tmp_path / "a.any", splats(5))
    write_ply(tmp_path / "a.ply", splats(4))
    assert len(read_ply(tmp_path / "a.ply")) == 4
    monkeypatch.setattr(splat_files, "MAX_SPLATS", 3)
    with pytest.raises(ValueError, match="a.ply promises 4 Gaussians; 3 fit at most"):
        read_ply(tmp_path / "a.ply")


# ---- .splat ----


def test_splat_is_32_bytes_a_gaussian_byte_for_byte(tmp_path):
    one = Splats(
        means=torch.tensor([[1.0, -2.0, 0.5]]),
        rotations=torch.tensor([[0.0, 3.0, 0.0, -4.0]]),
        log_scales=torch.tensor([[0.0, math.log(0.5), math.log(0.25)]]),
        opacities=torch.tensor([0.0]),
        sh=torch.tensor([[[9.0, -9.0, 0.0]]]),
    )
    write_splat(tmp_path / "a.splat", one)
    # Colours are cut off at 0 and 1; half is 127.5, rounded to even. q = (0, 0.6, 0, -0.8).
    expected = struct.pack("<6f8B", 1, -2, 0.5, 1, 0.5, 0.25, 255, 0, 128, 128, 128, 205, 128, 26)
    assert (tmp_path / "a.splat").read_bytes() == expected


def test_splat_rounds_no_more_than_its_bytes(tmp_path):
    before = splats(500)
    write_splat(tmp_path / "a.splat", before)
    after = read_splat(tmp_path / "a.splat")
    order = torch.argsort(before.log_scales.sum(1) + F.logsigmoid(before.opacities)).flip(0)
    before = before.select(order)
    assert torch.equal(after.means, before.means)
    assert torch.allclose(after.log_scales, before.log_scales, atol=1e-5)
    color = (0.5 + splat_files.C0 * before.sh[:, 0]).clamp(0, 1)
    assert (0.5 + splat_files.C0 * after.sh[:, 0] - color).abs().max() <= 0.5 / 255 + 1e-6
    assert (after.opacities.sigmoid() - before.opacities.sigmoid()).abs().max() <= 0.5 / 255 + 1e-6
    # Each of four numbers is off by at most 1/256, so q by 1/128 across it, and the turn by twice that.
    R = rotation_matrices(after.rotations).mT @ rotation_matrices(before.rotations)
    angle = ((R.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).arccos()
    assert 0.001 < angle.max() < 2 / 128


def test_splat_keeps_an_unturned_gaussian_unturned(tmp_path):
    unturned = replace(splats(1), rotations=torch.tensor([[2.0, 0, 0, 0]]))
    write_splat(tmp_path / "a.splat", unturned)
    assert torch.equal(read_splat(tmp_path / "a.splat").rotations[0], torch.eye(4)[0])


def test_splat_begins_with_what_is_seen_most(tmp_path):
    three = replace(splats(3), log_scales=torch.tensor([[-5.0] * 3, [-3.0] * 3, [-3.0] * 3]),
                    opacities=torch.tensor([9.0, -2.0, 2.0]))  # fmt: skip
    write_splat(tmp_path / "a.splat", three)
    assert torch.equal(read_splat(tmp_path / "a.splat").means, three.means[[2, 1, 0]])


def test_splat_written_again_is_the_same(tmp_path):
    write_splat(tmp_path / "a.splat", splats(500))
    write_splat(tmp_path / "b.splat", read_splat(tmp_path / "a.splat"))
    first, again = (np.fromfile(tmp_path / n, np.uint8) for n in ("a.splat", "b.splat"))
    # Opacity at its ends, colour and positions stay; sizes pass through a logarithm.
    first, again = first.reshape(-1, 32), again.reshape(-1, 32)
    order = [np.lexsort(rows[:, :12].T) for rows in (first, again)]
    first, again = first[order[0]], again[order[1]]
    assert np.array_equal(first[:, :12], again[:, :12])
    assert np.array_equal(first[:, 24:28], again[:, 24:28])
    assert {0, 255} <= set(first[:, 24:27].flatten().tolist())


def test_gaussians_that_are_nothing_are_read(tmp_path):
    """Other writers save sizes and opacities of 0, and rotations of no length."""
    (tmp_path / "a.splat").write_bytes(struct.pack("<6f8B", *[0] * 6, *[0] * 4, *[128] * 4))
    nothing = read_splat(tmp_path / "a.splat")
    assert all(t.isfinite().all() for t in nothing.tensors())
    assert nothing.opacities.sigmoid() < 0.002 and nothing.log_scales.exp().max() < 1e-30
    write_splat(tmp_path / "none.splat", splats(0))
    assert len(read_splat(tmp_path / "none.splat")) == 0


def test_a_broken_splat_is_refused(tmp_path):
    write_splat(tmp_path / "a.splat", splats(3))
    content = (tmp_path / "a.splat").read_bytes()
    refused(tmp_path, content[:-1], "is no .splat, or cut: 95 bytes", read_splat)
    refused(tmp_path, whole(tmp_path), "is no .splat", read_splat)
    bad = content[:12] + struct.pack("<f", -1.0) + content[16:]
    refused(tmp_path, bad, "sizes of its Gaussians are below 0", read_splat)
    bad = content[:32] + struct.pack("<f", math.nan) + content[36:]
    refused(tmp_path, bad, "1 of 3 Gaussians hold NaN", read_splat)


def test_a_splat_of_too_many_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "b.ply").open("wb") as file:
        file.truncate(32 * (splat_files.MAX_SPLATS + 1))  # a hole, not 160 MB on the disk
    with pytest.raises(ValueError, match="not up to 5,000,000 Gaussians"):
        read_splat(tmp_path / "b.ply")


def test_a_gaussian_as_wide_as_the_sky_is_refused(tmp_path):
    wide = replace(splats(3), log_scales=torch.full((3, 3), 90.0))
    with pytest.raises(ValueError, match="wider than half a million kilometres"):
        write_splat(tmp_path / "a.splat", wide)
    assert list(tmp_path.iterdir()) == []


def test_half_and_double_precision_are_saved(tmp_path):
    for dtype in (torch.float16, torch.float64):
        other = Splats(*(t.to(dtype) for t in splats(4).tensors()))
        write_ply(tmp_path / "a.ply", other)
        write_splat(tmp_path / "a.splat", other)
        assert torch.equal(read_ply(tmp_path / "a.ply").means, other.means.float())
