"""Videos as files, through PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .views import to_bytes
from .whole_file import whole_file

if TYPE_CHECKING:
    from av.container import InputContainer


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


class NoPictures(Exception):
    """A file that has sound and no pictures."""


@dataclass(frozen=True)
class Footage:
    """A video file, or the part of it between two times."""

    source: str | io.BytesIO
    start: float = 0.0
    """Seconds; what comes before does not count."""
    duration: float = 0.0
    """Seconds from there; 0 = to the end."""

    def _opened(self) -> InputContainer:
        import av

        source = self.source
        # A reader of its own for every use: one file may stand for two cameras.
        container = av.open(
            io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else source
        )
        if not container.streams.video:
            container.close()
            raise NoPictures
        return container

    def facts(self) -> tuple[float, int | None]:
        """Frames a second, and how many frames there are at most as far as the file says.

        Raises av.FFmpegError where no decoder reads the file, NoPictures where it is all sound.
        """
        with self._opened() as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 1)
            count = stream.frames or None
            if self.duration and count:
                count = min(count, int(self.duration * rate) + 2)  # ends may fall between frames
            return rate, count

    def frames(
        self,
        first: int,
        step: int,
        on_frame: Callable[[], None],  # called for every frame that is decoded, chosen or not
    ) -> Iterator[Tensor]:  # of [3, H, W] bytes
        """Every `step`th frame from the `first` on, upright as the file says it is to be shown.

        Frames are counted as they come out of the decoder, as ComfyUI's own loader counts them, not
        by their times: those of phones are uneven. Raises as `facts` does.
        """
        with self._opened() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            begin = int(self.start / stream.time_base)
            end = int((self.start + self.duration) / stream.time_base)
            if begin:
                container.seek(begin, stream=stream)
            n = 0
            for frame in container.decode(stream):
                on_frame()
                if frame.pts is not None and frame.pts < begin:
                    continue
                if self.duration and frame.pts is not None and frame.pts >= end:
                    return
                if n >= first and (n - first) % step == 0:
                    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)
                    yield picture.rot90(round(frame.rotation / 90), (1, 2))
                n += 1


@dataclass(frozen=True)
class Pictures:
    """The same of frames that are in memory already."""

    images: Tensor
    """[F, 3, H, W] 0..1."""
    rate: float
    """Frames a second."""

    def facts(self) -> tuple[float, int]:
        return self.rate, len(self.images)

    def frames(self, first: int, step: int, on_frame: Callable[[], None]) -> Iterator[Tensor]:
        for image in self.images[first::step]:
            on_frame()
            yield to_bytes(image)
