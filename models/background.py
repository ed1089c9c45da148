"""A background that holds still: one picture (plate) behind the performer for every view.

Stage: after sampling or on real clips, before or after the refiner. What several frames show of a
background agrees on average, although each may flicker or swim: so the plate is, pixel by pixel, a
mean over all frames that see past the performer, without those that stray from the median. What no
frame shows is painted in (Telea's inpainting). Then the performer is laid over the plate.

A camera that moves is followed by homographies (exact for a camera that turns, and for flat
backgrounds); the plate lives in the first frame's pixels, on a canvas that is larger if needed.

Frames: pixels, centres at +0.5. `to_first` 3x3 maps a frame's pixels to the first frame's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import BACKGROUND
from .relief import box, opencv
from .views import SIZE_STEP, Views, resize_frames, to_bytes, view_labels

OnStep = Callable[[int, int], None]

FAINT = 0.05
"""Share of the performer in a pixel above which its colour says nothing about the background."""
VALUES = 16_000_000
"""Numbers of a view's samples that are looked at together (64 MB); rows are cut to that."""
STRAY = 3.0
"""Samples farther from the median than so many median deviations (two sigma) do not count."""
SAME = 1 / 255
"""Colours that differ less are the same anyway: the step of 8-bit pictures."""


def _median(
    samples: Tensor,  # [F, ...], NaN where not known
    count: Tensor,  # [...] how many are known
) -> Tensor:  # [...]; NaN where nothing is known
    """The median; of an even number the mean of the two in the middle."""
    ordered = samples.sort(0).values  # NaN come last
    low, high = ((count - 1).clamp(min=0) // 2)[None], (count // 2)[None]
    high = torch.where(count[None] > 0, high, 0)
    return (ordered.gather(0, low)[0] + ordered.gather(0, high)[0]) / 2


def steady_mean(
    samples: Tensor,  # [F, 3, h, w] 0..1
    known: Tensor,  # [F, h, w] bool
) -> Tensor:  # [3, h, w]; NaN where no frame knows
    """What the frames agree about: the mean of those near the median.

    The median alone would keep half as much again of the noise.
    """
    seen = torch.where(known[:, None], samples, torch.nan)
    count = known.sum(0)
    middle = _median(seen, count.expand(3, -1, -1))
    away = (seen - middle).abs().amax(1)
    spread = _median(away, count)
    near = (away <= STRAY * spread + SAME)[:, None]
    return torch.where(near, seen, 0.0).sum(0) / near.sum(0)


DARK, BRIGHT = 0.1, 0.97
"""Colours between these tell brightness: darker ones are noise, brighter ones are cut off."""
DRIFT = 0.01
"""A frame's background this much brighter or darker than the others' is worth a correction."""
SURE_DRIFT = 5.0
"""Standard errors that a drift must exceed, or it is noise."""
TELLING = 128
"""Samples along the longer side that are enough to tell brightness."""
LEAST_PIXELS = 64
"""A frame with fewer known pixels does not tell its brightness."""


def exposure(
    samples: Tensor,  # [F, 3, h, w] 0..1
    known: Tensor,  # [F, h, w] bool
) -> Tensor:  # [F, 3]
    """How much brighter every frame's background is than usual, by channel; 1 unless it's clear."""
    gains = samples.new_ones(len(samples), 3)
    drifts = False
    for _ in range(2):  # once more with a plate that the drift no longer blurs
        plate = steady_mean(samples / gains[..., None, None], known)
        usable = ((plate > DARK) & (plate < BRIGHT)).all(0)
        for f, (picture, seen) in enumerate(zip(samples, known, strict=True)):
            here = seen & usable & (picture < BRIGHT).all(0)
            if here.sum() < LEAST_PIXELS:
                continue
            ratio = picture[:, here] / plate[:, here]
            gains[f] = ratio.median(1).values
            error = 1.86 * (ratio - gains[f, :, None]).abs().median(1).values / len(ratio[0]) ** 0.5
            off = (gains[f] - 1).abs()
            drifts |= bool(((off > DRIFT) & (off > SURE_DRIFT * error)).any())
        gains = gains / gains.median(0).values
    return gains if drifts else torch.ones_like(gains)


class Canvas(NamedTuple):
    """Where the plate lies in the first frame's pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Film:
    """One view: its frames, where they show background, and how its camera moved."""

    frames: Tensor
    """[F, 3, H, W] 0..1, or bytes."""
    masks: Tensor
    """[F, H, W] 0..1 or bool, the performer."""
    trusted: Tensor
    """[F, H, W] bool, True = surely background."""
    to_first: Tensor | None = None
    """[F, 3, 3] float64; None = the camera stands still."""

    def look(
        self, canvas: Canvas, rows: slice, step: int = 1
    ) -> tuple[Tensor, Tensor]:  # [F, 3, h, w] 0..1, [F, h, w] bool
        """What all frames show in some rows of the canvas, and where that is background."""
        if self.to_first is None:
            part = (..., slice(rows.start, rows.stop, step), slice(None, None, step))
            return unit(self.frames[part]), self.trusted[part]
        places = pixel_grid(canvas, rows, step, self.frames.device)
        colours, known = [], []
        for frame, trusted, H in zip(self.frames, self.trusted, self.to_first, strict=True):
            there = warp_places(places, torch.linalg.inv(H))
            colours.append(sample(unit(frame), there))
            sure = sample(trusted[None].float(), there, "bilinear")[0] > 0.999
            known.append(sure & _within(there, (frame.shape[-1], frame.shape[-2])))
        return torch.stack(colours), torch.stack(known)


def unit(frames: Tensor) -> Tensor:
    """Colour as float 0..1, from float or bytes."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float().clamp(0, 1)


def pixel_grid(canvas: Canvas, rows: slice, step: int = 1, device=None) -> Tensor:  # [h, w, 2]
    """Pixel centres of some rows of a canvas, in the first frame's pixels."""
    x = torch.arange(0, canvas.width, step, device=device) + canvas.left + 0.5
    y = torch.arange(rows.start, rows.stop, step, device=device) + canvas.top + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def _within(places: Tensor, size: tuple[int, int]) -> Tensor:  # [..., 2] -> [...] bool
    """Whether places lie between the centres of a picture's outermost pixels."""
    return ((places >= 0.5) & (places <= places.new_tensor(size) - 0.5)).all(-1)


def warp_places(
    places: Tensor,  # [..., 2] pixels
    H: Tensor,  # [3, 3] float64
) -> Tensor:  # [..., 2]
    """Places through a homography; what is behind the camera goes far outside."""
    H = H.to(places)
    moved = places @ H[:, :2].T + H[:, 2]
    depth = moved[..., 2:]
    return torch.where(depth > 1e-6, moved[..., :2] / depth.clamp(min=1e-6), -1e6)


def sample(
    picture: Tensor,  # [C, H, W]
    places: Tensor,  # [h, w, 2] pixels
    mode: str = "bicubic",
) -> Tensor:  # [C, h, w]; the border's colour outside
    """A picture at places between its pixels."""
    size = places.new_tensor([picture.shape[-1], picture.shape[-2]])
    there = (2 * places / size - 1).clamp(-3, 3)
    return F.grid_sample(
        picture[None], there[None], mode, padding_mode="border", align_corners=False
    )[0].clamp(0, 1)


def build_plate(
    film: Film,
    canvas: Canvas,
    on_share: Callable[[float], None],  # called with the share of the work since the last call
) -> tuple[Tensor, Tensor]:  # [3, h, w] NaN where no frame shows it, gains [F, 3]
    """The plate by chunks of rows, so that memory stays bounded."""
    count = len(film.frames)
    step = max(1, max(canvas.width, canvas.height) // TELLING)
    gains = exposure(*film.look(canvas, slice(0, canvas.height), step))
    rows = max(1, VALUES // (count * 3 * canvas.width))
    parts = []
    for top in range(0, canvas.height, rows):
        some = slice(top, min(top + rows, canvas.height))
        colours, known = film.look(canvas, some)
        parts.append(steady_mean(colours / gains[..., None, None], known))
        on_share((some.stop - top) / canvas.height)
    return torch.cat(parts, 1).clamp(0, 1), gains


REACH = 3
"""Pixels around an unknown one from which Telea's method takes its colour."""


def paint_in(plate: Tensor) -> Tensor:  # [3, H, W], NaN where not known
    """The unknown part from what is around it (Telea 2004); nothing where nothing is known."""
    hole = plate.isnan().any(0)
    if not hole.any() or hole.all():
        return plate
    cv2 = opencv("Painting in what no frame shows of the background", "")
    missing = hole.byte().cpu().numpy()
    # 16 bits a channel: 8 bits show as steps in dark gradients, and OpenCV's way with floats swings
    # from one pixel to the next, as nothing cuts its extrapolations off.
    channels = (plate.nan_to_num(0).cpu().numpy() * 65535).round().astype(np.uint16)
    filled = [cv2.inpaint(c, missing, REACH, cv2.INPAINT_TELEA) / 65535 for c in channels]
    return torch.where(hole, torch.from_numpy(np.stack(filled)).to(plate), plate)


BLUR, MATTE = 0.7, (0.25, 0.85)
"""Standard deviation in pixels by which the mask is blurred, and the shares of the result where the
performer begins and where it is all performer: an edge one to two pixels wide, inside the mask's."""
EDGE = 5
"""Pixels across which an edge looks for the performer's own colour."""


def matte_of(masks: Tensor) -> Tensor:  # [F, H, W] 0..1 -> the same
    """The masks with a soft edge; 0 where they are 0."""
    masks, far = masks.float(), math.ceil(3 * BLUR)
    taps = torch.exp(-0.5 * (torch.arange(-far, far + 1, device=masks.device) / BLUR) ** 2)
    taps = (taps / taps.sum())[None, None]
    soft = F.pad(masks[:, None], (far,) * 4, mode="replicate")
    soft = F.conv2d(F.conv2d(soft, taps[..., None, :]), taps[..., :, None])[:, 0]
    low, high = MATTE
    return ((soft - low) / (high - low)).clamp(0, 1).minimum(2 * masks)


OTHER = 0.1
"""Colours of backgrounds that differ by this are not the same background."""


def compose(
    frame: Tensor,  # [3, H, W] 0..1, or bytes
    matte: Tensor,  # [H, W]
    behind: Tensor,  # [3, H, W] 0..1
    other: Tensor,  # [1, H, W] 0..1, how far that is from the frame's own background
) -> Tensor:  # like `frame`, which stays as it is where the matte is 1
    """The performer before a background.

    Edge pixels hold some of the frame's own; where another comes behind them they take their colour
    from inside the performer.
    """
    out = to_bytes(behind) if frame.dtype == torch.uint8 else behind.to(frame.dtype, copy=True)
    if not (matte > 0).any():
        return out
    part = (..., *box(matte[None] > 0))  # most of a picture is nothing but background
    frame, matte, behind, other = (t[part] for t in (frame, matte, behind, other))
    picture, inside = unit(frame), (matte >= 1).float()[None]
    near = F.avg_pool2d(torch.cat([picture * inside, inside])[None], EDGE, 1, EDGE // 2)[0]
    clean = torch.where(near[3:] > 0, near[:3] / near[3:].clamp(min=1e-6), picture)
    colours = torch.lerp(picture, clean, other)
    mixed = matte * colours + (1 - matte) * behind
    mixed = to_bytes(mixed) if frame.dtype == torch.uint8 else mixed.to(frame.dtype)
    out[part] = torch.where(matte >= 1, frame, mixed)
    return out


CORNERS = 400
"""Points of the background that are followed at most."""
ENOUGH = 20
"""Points that must agree about a homography (four make one)."""
SPREAD = 0.08
"""Standard deviation of their places, as a share of the picture's sides: points in one corner say
little about the others. All over the picture it's 0.29."""
AGREE = 1.5
"""Pixels by which a point may miss its place."""
RETURN = 0.7
"""Pixels by which a point may miss its start when it is followed there and back."""
FEW = 0.5
"""Share of points that must agree; and at which new ones are looked for, in a later frame."""
LOOKALIKES = 0.2
"""The same where points were matched by looks alone, of which many are mistakes."""
ROUNDS = 10
"""Of Gauss and Newton's method; three or four are usual."""
TUKEY = 4.7
"""Standard deviations from which a pixel no longer counts."""
DAMPING = 1e-6
"""Share of the trace that is added to the diagonal: what no edge tells about stays as it was."""
LONGEST = 640
"""Pixels: larger frames are followed at this size, to a fraction of a pixel as well."""
SIMPLER = 1.1
"""Times a homography's error that a simpler motion may have."""
STILL = 0.5
"""Pixels: a camera that moves less stands still, and its frames need no resampling."""
NOISE, FINE = 1.0, 8.0
"""Standard deviations in pixels: smaller shapes are noise, and larger ones are where lights that
flicker lie; what is between is followed."""


UNFOLLOWED = (
    "could not be followed (frame {} has too little in common with the one before) and is taken to "
    "stand still"
)


class _Look:
    """One frame as the tracker sees it."""

    def __init__(self, frame: Tensor, trusted: Tensor, scale: float) -> None:
        self.cv2 = opencv("Following the camera", "")
        grey = unit(frame).mean(0).cpu().numpy()
        known = trusted.byte().cpu().numpy() * 255
        if scale < 1:
            how = dict(dsize=None, fx=scale, fy=scale, interpolation=self.cv2.INTER_AREA)
            grey, known = self.cv2.resize(grey, **how), self.cv2.resize(known, **how)
        self.grey = grey
        """[h, w] 0..1"""
        self.trusted = (known == 255).astype(np.uint8)
        """[h, w] 0 or 1"""
        self.size = grey.shape[::-1]
        self.fine = np.clip(40 * self.shapes(grey, self.trusted) + 128, 0, 255).astype(np.uint8)
        """[h, w] the same, of fine shapes alone, as points are found in it."""

    def shapes(self, grey: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Fine shapes of unit strength, whatever the light; 0 where not known.

        From known pixels alone, or the performer would shine through around its outline.
        """
        share = known.astype(np.float32)

        def blurred(sigma: float) -> np.ndarray:
            total = self.cv2.GaussianBlur(grey * share, (0, 0), sigma)
            return total / np.maximum(self.cv2.GaussianBlur(share, (0, 0), sigma), 1e-3)

        fine = (blurred(NOISE) - blurred(FINE)) * share
        strength = fine[known > 0].std() if known.any() else 0.0
        return fine / max(strength, 1e-3)

    def warped(self, picture: np.ndarray, H: np.ndarray, smooth: bool = True) -> np.ndarray:
        """At every pixel what `picture` shows where H puts that pixel."""
        how = self.cv2.INTER_CUBIC if smooth else self.cv2.INTER_NEAREST
        return self.cv2.warpPerspective(
            picture, _whole(H), self.size, flags=how | self.cv2.WARP_INVERSE_MAP
        )


class _Tracker:
    """Follows points of a background through a clip (Lucas and Kanade's method; ORB for jumps)."""

    def __init__(self, film: Film) -> None:
        self.cv2 = opencv("Following the camera", "")
        self.film = film
        self.scale = min(1.0, LONGEST / max(film.frames.shape[-2:]))

    def look(self, f: int) -> _Look:
        return _Look(self.film.frames[f], self.film.trusted[f], self.scale)

    def start(self, f: int) -> None:
        """Take new points from this frame, the key frame from now on."""
        self.number, self.key = f, self.look(f)
        apart = max(4, min(self.key.size) // 48)
        room = self.cv2.erode(self.key.trusted, np.ones((9, 9), np.uint8))
        found = self.cv2.goodFeaturesToTrack(self.key.fine, CORNERS, 0.02, apart, mask=room)
        self.points = np.zeros((0, 1, 2), np.float32) if found is None else found

    def homography(self, f: int, guess: np.ndarray) -> tuple[np.ndarray, float] | None:
        """From frame f to the key frame, in the frames' own pixels, and the share that agrees."""
        look, zoom = self.look(f), np.diag([self.scale, self.scale, 1])
        found = self._fit(*self._follow(look, zoom @ guess @ np.linalg.inv(zoom)))
        if found is None:
            found = self._fit(*self._compare(look), LOOKALIKES)
            found = found and self._fit(*self._follow(look, found[0]))
        if found is None:
            return None
        H = self._polish(look, found[0])
        return np.linalg.inv(zoom) @ H @ zoom, found[1]

    def _fit(
        self, here: np.ndarray, there: np.ndarray, least: float = FEW
    ) -> tuple[np.ndarray, float] | None:
        """The motion of points [N, 2] from frame to key frame, and the share of the key points that
        agree; nothing where less than `least` of those given do."""
        if len(here) < ENOUGH:
            return None
        H, agree = self.cv2.findHomography(
            there, here, self.cv2.RANSAC, AGREE, maxIters=2000, confidence=0.999
        )
        if H is None or agree.mean() < least:
            return None
        # What is off by far more than most is a point that slid along an edge.
        miss = _misses(here, there, H)
        good = miss < min(AGREE, STRAY * np.median(miss[agree[:, 0] > 0]) + 0.05)
        here, there = here[good], there[good]
        if len(here) < ENOUGH or (here.std(0) / self.key.size).min() < SPREAD:
            return None
        return self._simplest(here, there), len(here) / max(1, len(self.points))

    def _simplest(self, here: np.ndarray, there: np.ndarray) -> np.ndarray:
        """No motion, or a shift with turn and zoom, where a homography fits no better: what it
        makes of noise grows towards the corners."""
        H, _ = self.cv2.findHomography(there, here)
        similar, _ = self.cv2.estimateAffinePartial2D(there, here, ransacReprojThreshold=AGREE)
        simpler = [np.eye(3)]
        if similar is not None:
            simpler.append(np.vstack([similar, [0, 0, 1]]))
        limit = SIMPLER * np.median(_misses(here, there, H))
        return next((m for m in simpler if np.median(_misses(here, there, m)) <= limit), H)

    def _polish(self, look: _Look, H: np.ndarray) -> np.ndarray:
        """The same by all pixels of the background (Gauss and Newton's method, Tukey's weights).

        Points are few, and far from some corners; edges all over the picture tell more.
        """
        both = look.warped(self.key.trusted, H, smooth=False) & look.trusted
        # Filtered with one mask: so both are wrong alike where it ends.
        target = look.shapes(look.grey, both)
        inside = self.cv2.erode(both, np.ones((5, 5), np.uint8)) > 0
        if inside.sum() < LEAST_PIXELS:
            return H
        W, h = look.size
        y, x = (2 * np.indices(inside.shape, np.float32)[:, inside] + 1) / [[h], [W]] - 1
        # From -1..1 to pixels, so that all eight numbers of a homography weigh alike.
        N = np.array([[W / 2, 0, W / 2], [0, h / 2, h / 2], [0, 0, 1]])
        for _ in range(ROUNDS):
            shown = look.shapes(look.warped(self.key.grey, H), both)
            # Slopes of both: by those of one alone, its noise would look like a zoom.
            b, a = (d[inside] * n / 2 for d, n in zip(np.gradient((shown + target) / 2), (h, W),
                                                      strict=True))  # fmt: skip
            along = a * x + b * y
            J = np.stack([a * x, a * y, a, b * x, b * y, b, -along * x, -along * y])
            miss = (target - shown)[inside]
            limit = TUKEY * 1.48 * np.median(np.abs(miss)) + 1e-3
            weighted = J * np.clip(1 - (miss / limit) ** 2, 0, None) ** 2
            A = weighted @ J.T
            step = np.linalg.solve(A + DAMPING * np.trace(A) * np.eye(8), weighted @ miss)
            H = H @ N @ (np.eye(3) + np.append(step, 0).reshape(3, 3)) @ np.linalg.inv(N)
            if np.abs(step).max() * max(look.size) < 0.02:
                break
        return H / H[2, 2]

    def _follow(self, look: _Look, guess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Key points [N, 2] that are found in a frame and back, and where; guessed, key from it."""
        if not len(self.points):
            return self.points[:, 0], self.points[:, 0]
        # Turned as the guess says, so that little motion is left.
        turned = self.key.warped(look.fine, np.linalg.inv(guess))
        how = dict(winSize=(15, 15), maxLevel=3)
        flow = self.cv2.calcOpticalFlowPyrLK
        there, ok, _ = flow(self.key.fine, turned, self.points, None, **how)
        back, ok_back, _ = flow(turned, self.key.fine, there, None, **how)
        miss = np.linalg.norm(back - self.points, axis=-1)[:, 0]
        there = self.cv2.perspectiveTransform(there + 0.5, np.linalg.inv(guess))[:, 0]
        good = (ok[:, 0] > 0) & (ok_back[:, 0] > 0) & (miss < RETURN)
        x, y = np.nan_to_num(np.floor(there), nan=-1).clip(-1, max(look.size)).astype(int).T
        good &= (x >= 0) & (x < look.size[0]) & (y >= 0) & (y < look.size[1])
        good[good] = look.trusted[y[good], x[good]] > 0
        return self.points[good, 0] + 0.5, there[good]

    def _compare(self, look: _Look) -> tuple[np.ndarray, np.ndarray]:
        """The same by what corners look like, for jumps."""
        orb = self.cv2.ORB_create(1000, fastThreshold=10)
        here, a = orb.detectAndCompute(self.key.fine, self.key.trusted)
        there, b = orb.detectAndCompute(look.fine, look.trusted)
        if a is None or b is None:
            return np.zeros((0, 2)), np.zeros((0, 2))
        pairs = self.cv2.BFMatcher(self.cv2.NORM_HAMMING, crossCheck=True).match(a, b)
        ends = [(here[p.queryIdx].pt, there[p.trainIdx].pt) for p in pairs]
        here, there = np.array(ends, np.float32).reshape(-1, 2, 2).swapaxes(0, 1) + 0.5
        return here, there


def _whole(H: np.ndarray) -> np.ndarray:
    """A homography of pixels with centres at +0.5 as OpenCV counts, from 0."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return np.linalg.inv(half) @ H @ half


def _misses(here: np.ndarray, there: np.ndarray, H: np.ndarray) -> np.ndarray:  # [N] pixels
    """How far from `here` the motion puts `there`."""
    moved = np.concatenate([there, np.ones_like(there[:, :1])], 1) @ H.T
    return np.linalg.norm(moved[:, :2] / moved[:, 2:] - here, axis=1)


def camera_motion(
    film: Film, on_frames: Callable[[int], None]
) -> tuple[Tensor | None, str]:  # [F, 3, 3] or None when it stands still or can't be followed
    """Every frame's homography to the first, by the background alone; and what was found."""
    tracker = _Tracker(film)
    tracker.start(0)
    found, to_key, key_to_first = [np.eye(3)], np.eye(3), np.eye(3)
    on_frames(1)
    for f in range(1, len(film.frames)):
        match = tracker.homography(f, to_key)
        if match is None and tracker.number != f - 1:
            tracker.start(f - 1)
            key_to_first = found[-1]
            match = tracker.homography(f, np.eye(3))
        on_frames(1 if match is not None else len(film.frames) - f)
        if match is None:
            return None, UNFOLLOWED.format(f)
        to_key, left = match
        found.append(key_to_first @ to_key)
        if left < FEW:
            tracker.start(f)
            key_to_first, to_key = found[-1], np.eye(3)
    to_first = torch.from_numpy(np.stack(found)).to(film.frames.device)
    size = film.frames.shape[-1], film.frames.shape[-2]
    moved = (_outlines(to_first, size) - _corners(size).to(to_first)).norm(dim=-1).amax()
    if moved < STILL:
        return None, ""
    return to_first / to_first[:, 2:, 2:], f"moves by up to {float(moved):.0f} pixels"


def _corners(size: tuple[int, int]) -> Tensor:  # [4, 2] float64
    W, H = size
    return torch.tensor([[0, 0], [W, 0], [W, H], [0, H]], dtype=torch.float64)


def _outlines(to_first: Tensor, size: tuple[int, int]) -> Tensor:  # [F, 4, 2]
    """Every frame's corners in the first frame's pixels."""
    corners = _corners(size).to(to_first)
    return torch.stack([warp_places(corners, H) for H in to_first])


MOST = 2
"""Times the frame's width and height that a plate has at most."""


def canvas_of(to_first: Tensor | None, size: tuple[int, int]) -> Canvas:
    """Room for what all frames show, in multiples of what inpainting models take."""
    if to_first is None:
        return Canvas(0, 0, *size)
    outlines = _outlines(to_first, size).flatten(0, 1)
    spans = []
    for low, high, length in zip(outlines.amin(0), outlines.amax(0), size, strict=True):
        before, after = max(0.0, -float(low)), max(0.0, float(high) - length)
        # Too much on both sides is cut in proportion.
        keep = min(1.0, (MOST - 1) * length / max(before + after, 1e-9))
        first = -math.ceil(before * keep - 1e-6)
        whole = math.ceil(length + after * keep - 1e-6) - first
        if whole > length:
            whole = min(MOST * length, math.ceil(whole / SIZE_STEP) * SIZE_STEP)
        spans.append((first, whole))
    (left, width), (top, height) = spans
    return Canvas(left, top, width, height)


@dataclass(frozen=True)
class StableBackground:
    """Views over steady backgrounds."""

    frames: Tensor
    """[V, F, 3, H, W] like the given ones."""
    plates: Tensor
    """[V, 3, h, w] 0..1; larger than the frames when a camera moves."""
    holes: Tensor
    """[V, h, w] bool, what no frame shows."""
    motions: tuple[Tensor | None, ...]
    """V times `to_first`, [F, 3, 3]; None = still."""
    notes: tuple[str, ...]


class _Steps:
    """Counts frames: every view's are followed, averaged and composed."""

    def __init__(self, on_step: OnStep | None, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0.0

    def __call__(self, frames: float) -> None:
        self.done += frames
        if self.on_step:
            self.on_step(min(round(self.done), self.total), self.total)


class _Scene(NamedTuple):
    """What was found out about one view."""

    film: Film
    motion: str
    """How the camera moves, in words; empty when it doesn't."""
    canvas: Canvas
    plate: Tensor
    """[3, h, w], NaN where not seen."""
    hole: Tensor
    """[h, w] bool, looked at but never seen."""
    drift: float
    """Largest share by which a frame's background is brighter or darker."""


def stable_background(
    views: Views,  # colour, with masks
    grow: int = 4,  # pixels around the performer that do not count as background
    follow: bool = False,  # the camera's motion; else it stands still
    plate: Tensor | None = None,  # [V or 1, 3, h, w] 0..1, any size, to use instead
    on_step: OnStep | None = None,
) -> StableBackground:
    """The performer of every view over one steady background."""
    V, count = views.frames.shape[:2]
    step = _Steps(on_step, V * count * (3 if follow else 2))
    scenes = []
    for v in range(V):
        film = Film(views.frames[v], views.masks[v], trusted_background(views.masks[v], grow))
        scenes.append(_scene(film, follow, step))
    if plate is None and all(s.plate.isnan().all() for s in scenes):
        raise ValueError(
            "The mask covers the whole picture in every frame, so there is no background to keep: "
            "the performer alone must be white; invert the mask, lower 'grow', or connect 'plate'."
        )
    size = max(s.canvas.width for s in scenes), max(s.canvas.height for s in scenes)
    own = [paint_in(s.plate) for s in scenes]
    plates = own if plate is None else _fitted(plate.to(own[0]).expand(V, -1, -1, -1), scenes, size)
    frames, beyond = torch.empty_like(views.frames), []
    for v, scene in enumerate(scenes):
        other = (plates[v] - own[v]).abs().amax(0, True).nan_to_num(0) / OTHER
        layers = torch.cat([plates[v], other.clamp(max=1)])
        beyond.append(_compose_view(frames[v], scene, layers, step))
    return StableBackground(
        frames,
        torch.stack([_enlarged(p.nan_to_num(BACKGROUND), *size) for p in plates]),
        torch.stack([_enlarged(s.hole, *size) for s in scenes]),
        tuple(s.film.to_first for s in scenes),
        _notes(views, scenes, beyond, plate is None),
    )


def trusted_background(
    masks: Tensor,  # [F, H, W]
    grow: int,
) -> Tensor:  # [F, H, W] bool
    """What is at least so many pixels away from the performer."""
    wide = 2 * grow + 1

    def around(mask: Tensor) -> Tensor:
        near = F.max_pool2d((mask > FAINT).float()[None], (1, wide), 1, (0, grow))
        return F.max_pool2d(near, (wide, 1), 1, (grow, 0))[0] < 0.5

    return torch.stack([around(mask) for mask in masks])


def _scene(film: Film, follow: bool, step: _Steps) -> _Scene:
    motion, count = "", len(film.frames)
    if follow:
        to_first, motion = camera_motion(film, step)
        film = replace(film, to_first=to_first)
    canvas = canvas_of(film.to_first, (film.frames.shape[-1], film.frames.shape[-2]))
    plate, gains = build_plate(film, canvas, lambda share: step(share * count))
    hole = plate.isnan().any(0)
    if film.to_first is not None:
        hole &= _looked_at(film, canvas)
    return _Scene(film, motion, canvas, plate, hole, float((gains - 1).abs().amax()))


def _looked_at(film: Film, canvas: Canvas) -> Tensor:  # [h, w] bool
    """What of the canvas any frame could show."""
    size = film.frames.shape[-1], film.frames.shape[-2]
    places = pixel_grid(canvas, slice(0, canvas.height), 1, film.frames.device)
    looked = torch.zeros(places.shape[:2], dtype=torch.bool, device=places.device)
    for H in film.to_first:
        there = warp_places(places, torch.linalg.inv(H))
        looked |= _within(there, size)
    return looked


def _compose_view(
    out: Tensor,  # [F, 3, H, W], written to
    scene: _Scene,
    layers: Tensor,  # [4, h, w]: the plate, and how far it is from the frames' own background
    step: _Steps,
) -> bool:  # whether a frame looks past the plate and keeps its own background there
    film, canvas, beyond = scene.film, scene.canvas, False
    H, W = film.frames.shape[-2:]
    room = layers.new_tensor([canvas.width, canvas.height])
    corner = layers.new_tensor([canvas.left, canvas.top])
    places = pixel_grid(Canvas(0, 0, W, H), slice(0, H), 1, layers.device)
    for f, frame in enumerate(film.frames):
        matte, shown = matte_of(film.masks[f][None])[0], layers
        if film.to_first is not None:
            there = warp_places(places, film.to_first[f]) - corner
            shown = sample(layers, there)
            past = ((there < 0) | (there > room)).any(-1)
            beyond |= bool(past.any())
            matte = torch.where(past, 1.0, matte)
        out[f] = compose(frame, matte, shown[:3], shown[3:]) if shown.isfinite().all() else frame
        step(1)
    return beyond


def _fitted(
    plates: Tensor,  # [V, 3, h, w]
    scenes: list[_Scene],
    size: tuple[int, int],  # width and height of the output's plates
) -> list[Tensor]:
    """Given plates on the views' canvases: what came from here as it is, all else fills them."""
    canvases = [s.canvas for s in scenes]
    if plates.shape[-2:] == size[::-1]:
        return [p[:, : c.height, : c.width] for p, c in zip(plates, canvases, strict=True)]
    return [
        resize_frames(p[None], c.width, c.height)[0] for p, c in zip(plates, canvases, strict=True)
    ]


def _enlarged(picture: Tensor, width: int, height: int) -> Tensor:
    """Room to the right and below, so that all plates have one size."""
    missing = (0, width - picture.shape[-1], 0, height - picture.shape[-2])
    return F.pad(picture, missing)


MUCH_DRIFT = 0.02
"""Share of brightness that is worth a word."""


def _notes(
    views: Views, scenes: list[_Scene], beyond: list[bool], painted: bool
) -> tuple[str, ...]:
    """What a creator may want to know, each once with the views it is about."""
    notes = [_hole_note(view_labels(views), scenes, painted)]

    def say(chosen: list[bool], text: str) -> None:
        labels = [label for label, ok in zip(view_labels(views), chosen, strict=True) if ok]
        if labels:
            notes.append(f"view{'s' * (len(labels) > 1)} {', '.join(labels)}: {text}")

    say(
        [bool(s.plate.isnan().all()) for s in scenes],
        "no frame shows any background, "
        + ("so it stays as it came" if painted else "so all of it is from 'plate'"),
    )
    for text in dict.fromkeys(s.motion for s in scenes if s.motion):
        say([s.motion == text for s in scenes], f"the camera {text}")
    drifts = [s.drift > MUCH_DRIFT for s in scenes]
    most = max(s.drift for s in scenes)
    say(drifts, f"the background's brightness drifted by up to {most:.0%}; now it is steady")
    say(
        beyond,
        "the camera moves so far that frames look past a plate of twice their size, and keep their "
        "own background there",
    )
    gone = [bool((mask.flatten(1).amax(1) < 0.5).any()) for mask in views.masks]
    say(gone, "some masks are black, and those frames show background alone")
    return tuple(filter(None, notes))


def _hole_note(labels: Sequence[str], scenes: list[_Scene], painted: bool) -> str:
    """How much no frame shows, of views with any background."""
    shares = [
        f"{label} {float(s.hole.float().mean()):.0%}"
        for label, s in zip(labels, scenes, strict=True)
        if s.hole.any() and not s.plate.isnan().all()
    ]
    how = "painted in" if painted else "taken from 'plate'"
    return f"behind the performer, never seen and {how}: {', '.join(shares)}" if shares else ""
