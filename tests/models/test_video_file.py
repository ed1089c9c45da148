"""Videos as files: what is written is what a player reads."""

from fractions import Fraction

import av
import pytest
import torch
from turnaround.models.video_file import even_sized, write_mp4

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
