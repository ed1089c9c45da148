"""Videos as files, through PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from torch import Tensor

from .whole_file import whole_file


def even_sized(
    frames: Tensor,  # [F, C, H, W]
) -> Tensor:
    """The frames without an odd last row or column: H.264's usual colour format halves both."""
    H, W = frames.shape[-2:]
    if min(H, W) < 2:
        raise ValueError(
            f"The pictures are {W}x{H}, but a video needs at least 2x2 pixels: make them larger."
        )
    return frames[..., : H // 2 * 2, : W // 2 * 2]


def write_mp4(
    path: Path,
    frames: Tensor,  # [F, 3, H, W] 0..1
    fps: float,
    crf: int = 20,
) -> None:
    """Write H.264; odd sizes lose their last row or column. The file appears only when whole."""
    import av

    pixels = (even_sized(frames).clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)}
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
