"""Videos as files: what is written is what a player reads."""

import io
import struct
from fractions import Fraction

import av
import pytest
import torch
from turnaround.models.video_file import Footage, NoPictures, Pictures, even_sized, write_mp4

TOO_WIDE = torch.zeros(1, 3, 2, 16400)  # libx264 ends at 16384


def read(path) -> tuple[torch.Tensor, Fraction]:
    """All frames [F, H, W, 3] 0..1 and the rate of an mp4."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        return torch.stack(frames).float() / 255, stream.average_rate


@pytest.mark.parametrize(
    ("frames", "height", "width", "fps", "rate"),
    [
        (1, 16, 16, 16.0, Fraction(16)),
        (5, 32, 48, 23.976, Fraction(24000, 1001)),
        (7, 33, 47, 7.5, Fraction(15, 2)),  # odd sizes lose a row and a column
        (3, 2, 2, 240.0, Fraction(240)),
    ],
)
def test_an_mp4_reads_back_with_its_count_size_and_rate(tmp_path, frames, height, width, fps, rate):
    grey = torch.linspace(0.2, 0.8, frames)[:, None, None, None].expand(-1, 3, height, width)
    write_mp4(tmp_path / "clip.mp4", grey, fps, crf=10)
    back, back_rate = read(tmp_path / "clip.mp4")
    assert back.shape == (frames, height // 2 * 2, width // 2 * 2, 3)
    # A container may round the rate to its clock.
    assert abs(float(back_rate) - float(rate)) < 0.01 * float(rate)
    # Flat grey survives H.264 but for the rounding of limited-range luma (219 steps).
    assert (back - grey[:, :, : back.shape[1], : back.shape[2]].movedim(1, -1)).abs().max() < 0.02
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(av.FFmpegError):
        write_mp4(tmp_path / "clip.mp4", TOO_WIDE, 8)
    assert not list(tmp_path.iterdir())


def test_a_failed_rewrite_keeps_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, torch.zeros(2, 3, 16, 16), 8)
    before = path.read_bytes()
    with pytest.raises(av.FFmpegError):
        write_mp4(path, TOO_WIDE, 8)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_colours_out_of_range_are_clipped(tmp_path):
    frames = torch.tensor([-1.0, 2.0])[:, None, None, None].expand(-1, 3, 16, 16)
    write_mp4(tmp_path / "clip.mp4", frames, 8, crf=10)
    back, _ = read(tmp_path / "clip.mp4")
    assert back[0].max() < 0.02 and back[1].min() > 0.98


def test_pictures_of_one_pixel_are_refused(tmp_path):
    with pytest.raises(ValueError, match="are 1x16, but a video needs at least 2x2"):
        write_mp4(tmp_path / "clip.mp4", torch.zeros(1, 3, 16, 1), 8)
    assert even_sized(torch.zeros(1, 1, 2, 3)).shape == (1, 1, 2, 2)


def counted(tmp_path, frames: int = 12, height: int = 32, width: int = 32, fps: float = 10):
    """A file whose picture k has the grey (k + 1) / 14, white in its upper left corner."""
    grey = (torch.arange(frames) + 1)[:, None, None, None] / 14
    pictures = grey.expand(-1, 3, height, width).clone()
    pictures[..., : height // 4, : width // 4] = 1.0
    write_mp4(tmp_path / "counted.mp4", pictures, fps, crf=4)
    return tmp_path / "counted.mp4"


def numbers(pictures) -> list[int]:
    return [round(float(p[0, -4:, -4:].float().mean()) / 255 * 14) - 1 for p in pictures]


def nothing() -> None:
    pass


@pytest.mark.parametrize(("first", "step"), [(0, 1), (3, 1), (1, 4), (11, 2), (12, 1), (90, 3)])
def test_exactly_the_chosen_frames_are_read(tmp_path, first, step):
    read_frames = Footage(str(counted(tmp_path))).frames(first, step, nothing)
    assert numbers(read_frames) == list(range(first, 12, step))


def test_a_file_tells_its_rate_and_length_and_may_be_held_in_memory(tmp_path):
    path = counted(tmp_path)
    held = io.BytesIO(path.read_bytes())
    assert Footage(str(path)).facts() == Footage(held).facts() == (10.0, 12)
    # Two cameras may be given one file: their readers do not disturb one another.
    two = [Footage(held).frames(0, 1, nothing), Footage(held).frames(5, 1, nothing)]
    assert [numbers(pair) for pair in zip(*two, strict=False)] == [[k, k + 5] for k in range(7)]


@pytest.mark.parametrize(
    ("start", "duration", "expected"),
    [(0.4, 0.0, range(4, 12)), (0.0, 0.3, range(3)), (0.55, 0.5, range(6, 11)), (5.0, 1.0, [])],
)
def test_a_trimmed_file_begins_and_ends_where_it_was_trimmed(tmp_path, start, duration, expected):
    footage = Footage(str(counted(tmp_path)), start, duration)
    found = numbers(footage.frames(0, 1, nothing))
    assert found == list(expected)
    assert numbers(footage.frames(1, 2, nothing)) == list(expected)[1::2]
    assert footage.facts()[1] >= len(found)


def turned(path, matrix: tuple[int, ...]) -> None:
    """Writes how a player is to turn the picture (16.16 a b, c d) into an mp4's track header."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    content[at : at + 36] = struct.pack(
        ">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("matrix", "corner", "shape"),
    [
        ((1, 0, 0, 1), "upper left", (32, 48)),
        ((0, 1, -1, 0), "upper right", (48, 32)),  # a phone held upright: a quarter turn clockwise
        ((0, -1, 1, 0), "lower left", (48, 32)),
        ((-1, 0, 0, -1), "lower right", (32, 48)),
    ],
)
def test_videos_of_turned_phones_come_upright(tmp_path, matrix, corner, shape):
    path = counted(tmp_path, 2, 32, 48)
    turned(path, matrix)
    picture = next(Footage(str(path)).frames(0, 1, nothing))
    assert picture.shape == (3, *shape)
    rows, columns = (
        slice(0, 6) if side in ("upper", "left") else slice(-6, None) for side in corner.split()
    )
    assert picture[:, rows, columns].float().mean() > 240


def test_every_decoded_frame_is_told_so_that_one_can_stop(tmp_path):
    seen = []
    assert not list(Footage(str(counted(tmp_path))).frames(90, 1, lambda: seen.append(1)))
    assert len(seen) == 12


def test_pictures_in_memory_are_read_like_a_file():
    images = torch.arange(12.0)[:, None, None, None].expand(-1, 3, 2, 2) / 255
    pictures = Pictures(images, 25.0)
    assert pictures.facts() == (25.0, 12)
    assert [int(p[0, 0, 0]) for p in pictures.frames(1, 4, nothing)] == [1, 5, 9]
    assert next(pictures.frames(0, 1, nothing)).dtype == torch.uint8


def test_what_is_no_video_is_an_error_of_the_decoder(tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"not a video" * 99)
    with pytest.raises(av.FFmpegError):
        Footage(str(tmp_path / "no.mp4")).facts()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(torch.zeros(1, 4096).numpy(), "fltp", "mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(NoPictures):
        Footage(str(tmp_path / "sound.mp4")).facts()
