"""What the page's player gets: the same pictures as the views hold, small, in bounded memory."""

import io
import json
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from turnaround.models import views_stream
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views, as_pictures
from turnaround.models.views_stream import Size, described, keep_below, write_streams

SHEET, ALONE = Size(32, 1e9, 90), Size(64, 1e9, 95)


def coded(V: int, frames: int, H: int = 36, W: int = 64) -> torch.Tensor:
    """Every view and frame is of one grey of its own."""
    values = torch.linspace(0.1, 0.9, V * frames).reshape(V, frames, 1, 1, 1)
    return values.expand(V, frames, 3, H, W).clone()


def read(path) -> tuple[dict, list[np.ndarray], int]:
    """By the format's description: header, pictures [H, W, 3], where the first begins."""
    data = path.read_bytes()
    assert data[:8] == b"TURNVWS1"
    (size,) = struct.unpack_from("<I", data, 8)
    header = json.loads(data[12 : 12 + size])
    count = header["frames"] * (1 if header["columns"] else len(header["views"]))
    table = struct.unpack_from(f"<{2 * count}I", data, 12 + size)
    start = 12 + size + 8 * count
    pictures = [
        np.asarray(Image.open(io.BytesIO(data[start + a : start + b])))
        for a, b in zip(table[::2], table[1::2], strict=True)
    ]
    return header, pictures, start


def test_every_picture_holds_all_views_of_one_frame(tmp_path):
    frames = coded(5, 3)
    (told,) = write_streams(Views(frames, fps=12.5), tmp_path / "a", sheet_size=SHEET)
    header, pictures, start = read(tmp_path / "a")
    assert (header["frames"], header["fps"], header["cell"]) == (3, 12.5, [32, 18])
    assert told.start == start and told.bytes == (tmp_path / "a").stat().st_size
    columns = header["columns"]
    for f, picture in enumerate(pictures):
        for v in range(5):
            y, x = 18 * (v // columns), 32 * (v % columns)
            cell = picture[y : y + 18, x : x + 32].astype(float)
            assert abs(cell - 255 * float(frames[v, f, 0, 0, 0])).max() < 3


def test_single_pictures_lie_view_by_view(tmp_path):
    frames = coded(3, 4)
    write_streams(Views(frames), tmp_path / "a", tmp_path / "b", SHEET, ALONE)
    header, pictures, _ = read(tmp_path / "b")
    assert header["columns"] == 0 and len(pictures) == 12
    for v in range(3):
        for f in range(4):
            picture = pictures[4 * v + f]
            assert picture.shape == (36, 64, 3)
            assert abs(picture.astype(float) - 255 * float(frames[v, f, 0, 0, 0])).max() < 3


@pytest.mark.parametrize("chunk", [1, 20_000, 10**9])
def test_any_chunk_gives_the_same_bytes(tmp_path, monkeypatch, chunk):
    generator = torch.Generator().manual_seed(0)
    views = Views(torch.rand(3, 5, 3, 40, 48, generator=generator))
    write_streams(views, tmp_path / "a", tmp_path / "b", SHEET, ALONE)
    monkeypatch.setattr(views_stream, "CHUNK", chunk)
    write_streams(views, tmp_path / "c", tmp_path / "d", SHEET, ALONE)
    assert all(map(np.array_equal, read(tmp_path / "a")[1], read(tmp_path / "c")[1]))
    assert all(map(np.array_equal, read(tmp_path / "b")[1], read(tmp_path / "d")[1]))


def test_no_more_than_a_chunk_of_pictures_is_copied(tmp_path, monkeypatch):
    largest = 0
    interpolate = views_stream.F.interpolate

    def spy(pictures, **given):
        nonlocal largest
        largest = max(largest, pictures.numel() * 4)
        return interpolate(pictures, **given)

    monkeypatch.setattr(views_stream.F, "interpolate", spy)
    monkeypatch.setattr(views_stream, "CHUNK", 3 * 36 * 64 * 4 * 2)
    write_streams(Views(coded(4, 9)), tmp_path / "a", sheet_size=SHEET)
    assert 0 < largest <= views_stream.CHUNK


@pytest.mark.parametrize("shape", [(8, 81, 480, 832), (64, 241, 480, 832), (1, 9, 3000, 16)])
@pytest.mark.parametrize("size", [views_stream.NODE, views_stream.GRID, views_stream.ALONE])
def test_sizes_are_bounded(shape, size):
    V, frames, H, W = shape
    views = Views(torch.zeros(1).expand(V, frames, 3, H, W))
    w, h = size.cell(views)
    assert 1 <= max(w, h) <= size.longest and w <= W and h <= H
    assert V * frames * w * h <= 1.1 * size.pixels
    if min(w, h) > 20:
        assert math.isclose(w / h, W / H, rel_tol=0.03)


def test_usual_clips_keep_the_size_that_is_told():
    views = Views(torch.zeros(1).expand(8, 81, 3, 480, 832))
    assert views_stream.NODE.cell(views) == (192, 111)
    assert views_stream.GRID.cell(views) == (256, 148)
    assert views_stream.ALONE.cell(views) == (832, 480)


def test_depth_bytes_and_nan_become_pictures(tmp_path):
    depth = torch.zeros(1, 2, 1, 36, 64)
    depth[..., 10:20, 10:40] = torch.tensor([2.0, 3.0])[None, :, None, None, None]
    for name, views in {
        "depth": Views(depth),
        "bytes": Views((coded(1, 2) * 255).to(torch.uint8)),
    }.items():
        write_streams(views, tmp_path / name, tmp_path / "alone", SHEET, ALONE)
        wanted = as_pictures(views, 0).movedim(1, -1).numpy() * 255
        difference = np.abs(np.stack(read(tmp_path / "alone")[1]) - wanted)
        assert np.quantile(difference, 0.95) < 4, name
    broken = coded(1, 1)
    broken[..., :18, :] = math.nan
    write_streams(Views(broken), tmp_path / "nan", sheet_size=SHEET)
    (picture,) = read(tmp_path / "nan")[1]
    assert picture[:7].max() < 6 and picture[11:].min() > 15


def test_cameras_are_told(tmp_path):
    rig = orbit_rig(
        torch.tensor([0.0, 1.5708, -0.7854]), torch.full((3,), 0.1745), 3.0, 0.6, 64, 36
    )
    told = described(Views(coded(3, 1), rig=rig))
    assert [v["azimuth"] for v in told] == [0, 90, 315]
    assert [v["elevation"] for v in told] == [10, 10, 10]
    assert described(Views(coded(2, 1)))[1] == {"label": "1", "azimuth": None, "elevation": None}


def test_interrupted_writing_leaves_no_file(tmp_path):
    def stop(done, total):
        assert (done, total) == (1, 6)
        raise InterruptedError

    views = Views(coded(2, 3, 720, 1280))
    with pytest.raises(InterruptedError):
        write_streams(views, tmp_path / "a.x", tmp_path / "b.x", on_step=stop)
    assert list(tmp_path.iterdir()) == []


def test_other_pictures_have_another_checksum(tmp_path):
    first, second = (
        write_streams(Views(coded(2, 2) * k), tmp_path / "a", sheet_size=SHEET)[0] for k in (1, 0.5)
    )
    assert first.checksum != second.checksum


def test_the_oldest_files_go_when_there_are_too_many_bytes(tmp_path):
    import os

    for n in range(4):
        path = tmp_path / f"{n}.turnviews"
        path.write_bytes(bytes(100))
        os.utime(path, (n, n))
    (tmp_path / "other.png").write_bytes(bytes(1000))
    keep_below(tmp_path, 250, ".turnviews")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2.turnviews", "3.turnviews", "other.png"]
