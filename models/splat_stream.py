"""An avatar as the page plays it: a compact file of all its frames.

Stage: AVATAR -> file in ComfyUI's temp folder -> js/splat_stream.js. Frame: world of the pack.

The file, little-endian: "TURNSPL2", uint32 length of a JSON header, the header, then chunks, each a
uint32 length and so many bytes of zlib. The first chunk is what no frame changes, every other one a
frame; a page can show a frame as soon as its chunk has come. All is planar, byte after byte of the N
Gaussians: [planes, N] uint8.

- Still: opacity, 0..1 as 0..255; then (degree + 1)² - 1 harmonics, red green blue each, int8 times
  `sheen` / 127.
- A frame, as differences from the frame before, modulo the range of each number (the first from 0):
  x, y, z uint16 within the box `low`, `size`, low byte first; quaternion w x y z int8 / 127, its sign
  that of the frame before; three logarithms of scales uint8 within `girth`, 1..255, or all three 0
  where the Gaussian is hidden in this frame, since it isn't its turn; red green blue uint8
  within `paint`: 0.5 + the harmonic of degree 0, light included; with harmonics three more, `gain`
  times 0..255: what the light makes of the harmonics.

16 bytes a Gaussian and frame, 19 with harmonics, before zlib takes about a third off.

What can be half a step wrong: places by `size` / 131070, logarithms of scales and colours by their
range / 510, opacities by 1/510, turns by less than a degree.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .avatar import Avatar
from .rasterize_splats import LEAST_ALPHA, PIXEL_LOW_PASS
from .splats import C0, Splats
from .whole_file import whole_file

MAGIC = b"TURNSPL2"
MOST = 8_400_000
"""Gaussians times frames in one file, some 100,000 in 81 frames: 190 MB in the page."""
LEVEL = 1
"""Of zlib: 9 takes ten times as long for 2 % less."""
FAR = 50.0
"""Gaussians farther from the middle than this times the distance of the farthest tenth are dust; they
would leave no bits for the others."""
GIRTHS = (-11.5, 4.6)
"""Logarithms of metres, 0.01 mm to 100 m, beyond which scales are held."""
PAINTS = (-1.0, 3.0)
BRIGHTEST = 8.0
"""Colours and gains beyond which they are held."""

OnStep = Callable[[int, int], None]
"""done, total."""


@dataclass(frozen=True)
class SplatStream:
    """What was written for the page."""

    gaussians: int
    """In every frame."""
    frames: int
    """Kept, of the avatar's."""
    size: int
    """Bytes."""
    note: str
    """What was left out, or empty."""


@dataclass(frozen=True)
class _Clip:
    """Numbers of all kept frames, on the CPU."""

    opacities: Tensor
    """[N] 0..1, where they aren't hidden."""
    hidden: Tensor
    """[F, N] whose turn it isn't."""
    rest: Tensor
    """[N, K, 3] harmonics above degree 0, as the avatar stands."""
    places: Tensor
    """[F, N, 3]."""
    quats: Tensor
    """[F, N, 4] of length 1."""
    girths: Tensor
    """[F, N, 3] logarithms."""
    paints: Tensor
    """[F, N, 3]."""
    gains: Tensor
    """[F, N, 3], of the harmonics."""
    times: list[int]
    """[F] frames of the avatar."""


def stream_key(avatar: Avatar) -> str:
    """The same for the same avatar only: a file that is there need not be written again."""
    digest = hashlib.blake2b(MAGIC, digest_size=8)
    digest.update(struct.pack("<dq", avatar.fps, avatar.frame_count))
    for tensor in avatar._comfy_cache_tensors():
        digest.update(str(tensor.shape).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def kept_times(
    frames: int,
    gaussians: int,
    most: int = MOST,  # Gaussians times frames
) -> list[int]:
    """Frames for which there is room: evenly spread, the first and the last with them."""
    count = min(frames, max(1, most // max(gaussians, 1)))
    if count == 1:
        return [0]
    return [round(i * (frames - 1) / (count - 1)) for i in range(count)]


def write_splat_stream(
    path: Path,
    avatar: Avatar,
    on_step: OnStep | None = None,
    most: int = MOST,
) -> SplatStream:
    """Write the file of an avatar; it appears only when whole."""
    clip, note = _clip(avatar, most, on_step)
    ranges = _ranges(clip)
    header = _header(avatar, clip, ranges)
    with whole_file(path) as partial, partial.open("wb") as out:
        out.write(MAGIC + struct.pack("<I", len(header)) + header)
        for planes in _chunks(clip, ranges):
            packed = zlib.compress(planes.tobytes(), LEVEL)
            out.write(struct.pack("<I", len(packed)) + packed)
    return SplatStream(len(clip.opacities), len(clip.times), path.stat().st_size, note)


def _clip(avatar: Avatar, most: int, on_step: OnStep | None) -> tuple[_Clip, str]:
    times = kept_times(avatar.frame_count, len(avatar.splats), most)
    rest = avatar.splats.sh[:, 1:].float().cpu()
    rows, faint = [], []
    for i, time in enumerate(times):
        there = avatar.at(time)
        rows.append(_row(there, rest))
        faint.append(there.opacities.float().sigmoid().cpu() < LEAST_ALPHA)
        if on_step:
            on_step(i + 1, len(times))
    places, quats, girths, paints, gains = (torch.stack(part) for part in zip(*rows, strict=True))
    opacities, hidden = avatar.splats.opacities.float().sigmoid().cpu(), torch.stack(faint)
    seen = torch.where(hidden.all(0), 0.0, opacities)
    shown = _shown(seen, torch.cat([places, quats, girths, paints, gains], 2), places)
    if not shown.any():
        raise ValueError(
            "'avatar' has no Gaussian that can be seen: look at its views' masks, and distil it again."
        )
    parts = (part[:, shown] for part in (places, quats, girths, paints, gains))
    dust = int((~shown & (seen >= LEAST_ALPHA)).sum())
    notes = []
    if len(times) < avatar.frame_count:
        notes.append(
            f"the view keeps {len(times)} of {avatar.frame_count} frames of {len(rest):,} Gaussians "
            "and shows the others as what lies between"
        )
    if dust:
        notes.append(f"{dust:,} Gaussians far away or without a place were left out of the view")
    return _Clip(opacities[shown], hidden[:, shown], rest[shown], *parts, times), "; ".join(notes)


def _row(splats: Splats, rest: Tensor) -> tuple[Tensor, ...]:
    splats = Splats(*(t.detach().float().cpu() for t in splats.tensors()))
    # Light multiplies all harmonics of a Gaussian: by how much, their projection tells.
    power = rest.square().sum(1)
    gains = (splats.sh[:, 1:] * rest).sum(1) / power.clamp(min=1e-12)
    gains = torch.where(power > 1e-12, gains, 1.0) if rest.shape[1] else power
    return (
        splats.means,
        F.normalize(splats.rotations, dim=1),
        splats.log_scales,
        0.5 + C0 * splats.sh[:, 0],
        gains,
    )


def _shown(
    opacities: Tensor,  # [N] 0..1
    numbers: Tensor,  # [F, N, any]
    places: Tensor,  # [F, N, 3]
) -> Tensor:  # [N] bool
    """Gaussians that can be seen and lie where the others are."""
    shown = (opacities >= LEAST_ALPHA) & numbers.isfinite().all(2).all(0)
    if shown.any():
        middle = places[:, shown].median(1, keepdim=True).values
        away = (places - middle).norm(dim=2).amax(0)
        near = away[shown].sort().values[int(0.9 * (int(shown.sum()) - 1))]
        shown = shown & (away <= FAR * max(float(near), 1e-3))
    return shown


# ---------------------------------------------------------------- numbers to bytes

Range = tuple[float, float]
"""Low and high."""


@dataclass(frozen=True)
class _Ranges:
    low: Tensor
    """[3] the box, metres."""
    size: Tensor
    """[3] above 0."""
    girth: Range
    paint: Range
    gain: float
    sheen: float


def _ranges(clip: _Clip) -> _Ranges:
    low, high = clip.places.amin((0, 1)), clip.places.amax((0, 1))
    return _Ranges(
        low,
        (high - low).clamp(min=1e-6),
        _above_hidden(_held(clip.girths, GIRTHS)),
        _held(clip.paints, PAINTS),
        min(max(float(clip.gains.max()), 1e-6), BRIGHTEST),
        max(float(clip.rest.abs().max()), 1e-6) if clip.rest.numel() else 1.0,
    )


def _held(values: Tensor, limits: Range) -> Range:
    low = min(max(float(values.min()), limits[0]), limits[1])
    high = max(min(float(values.max()), limits[1]), low)
    return low, max(high, low + 1e-6)


def _above_hidden(span: Range) -> Range:
    """One step lower than the least: 0 says that a Gaussian is hidden."""
    low, high = span
    return low - (high - low) / 254, high


def _header(avatar: Avatar, clip: _Clip, ranges: _Ranges) -> bytes:
    text = json.dumps(
        {
            "count": len(clip.opacities),
            "times": clip.times,
            "frames": avatar.frame_count,
            "fps": avatar.fps,
            "degree": avatar.splats.degree,
            "low": ranges.low.tolist(),
            "size": ranges.size.tolist(),
            "girth": ranges.girth,
            "paint": ranges.paint,
            "gain": ranges.gain,
            "sheen": ranges.sheen,
            "low_pass": PIXEL_LOW_PASS,
        }
    ).encode("ascii")
    return text + b" " * (-len(text) % 4)


def _chunks(clip: _Clip, ranges: _Ranges) -> Iterator[np.ndarray]:  # [planes, N] uint8
    yield _still(clip, ranges)
    before = np.zeros(0)
    for f in range(len(clip.times)):
        words, small = _steps(clip, ranges, f)
        quats = small[:4]
        if f:
            # q and -q are the same turn; the nearer one is a small difference.
            flip = (quats.astype(np.int32) * before[0][:4]).sum(0) < 0
            quats[:, flip] *= -1
            words_before, small_before = before[1], before[0]
        else:
            words_before, small_before = np.zeros_like(words), np.zeros_like(small)
        changed = (words - words_before).astype("<u2").view(np.uint8).reshape(3, -1, 2)
        planes = changed.transpose(0, 2, 1).reshape(6, -1)
        yield np.concatenate([planes, (small - small_before).astype(np.uint8)])
        before = small, words


def _still(clip: _Clip, ranges: _Ranges) -> np.ndarray:
    opacities = (clip.opacities * 255).round().clamp(0, 255).to(torch.uint8)
    sheen = (clip.rest / ranges.sheen * 127).round().to(torch.int8).flatten(1).T
    return np.concatenate([opacities.numpy()[None], sheen.contiguous().numpy().view(np.uint8)])


def _steps(
    clip: _Clip, ranges: _Ranges, f: int
) -> tuple[np.ndarray, np.ndarray]:  # [3, N] places, [10 or 13, N] int32 all else
    words = _stepped(clip.places[f], ranges.low, ranges.size, 65535)
    parts = [
        (clip.quats[f] * 127).round(),
        _girths(clip, ranges, f),
        _stepped(clip.paints[f], ranges.paint[0], ranges.paint[1] - ranges.paint[0], 255),
    ]
    if clip.rest.shape[1]:
        parts.append(_stepped(clip.gains[f], 0.0, ranges.gain, 255))
    small = torch.cat(parts, 1)
    return tuple(t.to(torch.int32).T.contiguous().numpy() for t in (words, small))


def _girths(clip: _Clip, ranges: _Ranges, f: int) -> Tensor:
    low, high = ranges.girth
    steps = _stepped(clip.girths[f], low, high - low, 255).clamp(min=1)
    return torch.where(clip.hidden[f][:, None], 0.0, steps)


def _stepped(values: Tensor, low: Tensor | float, size: Tensor | float, steps: int) -> Tensor:
    return ((values - low) / size * steps).round().clamp(0, steps)


# ---------------------------------------------------------------- bytes to numbers


def read_splat_stream(
    content: bytes,
) -> tuple[dict, list[Splats]]:  # header; Gaussians of every kept frame
    """What js/splat_stream.js reads; of harmonics the avatar's times the frame's light."""
    if content[:8] != MAGIC:
        raise ValueError("This is no avatar of Preview Avatar: run the node again.")
    (length,) = struct.unpack_from("<I", content, 8)
    header, at = json.loads(content[12 : 12 + length]), 12 + length
    chunks = []
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        planes = np.frombuffer(zlib.decompress(content[at + 4 : at + 4 + length]), np.uint8)
        chunks.append(planes.reshape(-1, header["count"]))
        at += 4 + length
    if len(chunks) != 1 + len(header["times"]):
        raise ValueError("The avatar's file is cut off: run the node again.")
    still, *changes = chunks
    small = np.cumsum(np.stack(changes)[:, 6:], 0, dtype=np.uint8)
    words = np.stack(changes)[:, :6].reshape(len(changes), 3, 2, -1).astype(np.uint16)
    words = np.cumsum(words[:, :, 0] + 256 * words[:, :, 1], 0, dtype=np.uint16)
    return header, [_splats(header, still, *two) for two in zip(words, small, strict=True)]


def _splats(header: dict, still: np.ndarray, words: np.ndarray, small: np.ndarray) -> Splats:
    def within(planes: np.ndarray, low: list | float, size: list | float, steps: int) -> Tensor:
        values = torch.from_numpy(planes.astype(np.float32)).T
        return torch.as_tensor(low) + values / steps * torch.as_tensor(size)

    girth, paint = header["girth"], header["paint"]
    sh = (within(small[7:10], paint[0], paint[1] - paint[0], 255) - 0.5)[:, None] / C0
    if header["degree"]:
        rest = within(still[1:].view(np.int8), 0.0, header["sheen"], 127)
        gains = within(small[10:13], 0.0, header["gain"], 255)
        sh = torch.cat([sh, rest.reshape(len(rest), -1, 3) * gains[:, None]], 1)
    opacities = torch.from_numpy(still[0].astype(np.float32) / 255)
    opacities[torch.from_numpy((small[4:7] == 0).all(0))] = 0
    return Splats(
        within(words, header["low"], header["size"], 65535),
        torch.from_numpy(small[:4].view(np.int8).astype(np.float32)).T / 127,
        within(small[4:7], girth[0], girth[1] - girth[0], 255),
        torch.logit(opacities, eps=1e-6),
        sh,
    )
