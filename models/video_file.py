"""Videos as files, through PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from torch import Tensor


def write_mp4(
    path: Path,
    frames: Tensor,  # [F, 3, H, W] 0..1
    fps: float,
    crf: int = 20,
) -> None:
    """Write H.264; odd sizes lose their last row or column. The file appears only when whole."""
    import av

    pixels = (frames.clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
    H, W = pixels.shape[1] // 2 * 2, pixels.shape[2] // 2 * 2
    temporary = path.with_suffix(".part")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
            stream.options = {"crf": str(crf)}
            for picture in pixels[:, :H, :W]:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
