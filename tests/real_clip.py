"""A real performer from four synchronised, calibrated cameras, for the scoreboard.

The demo clip of Pose2Sim (BSD-3): one man on a wide treadmill, indoors, 100 frames at 60 a second.
Nothing of it is committed; `dev.ensure_real_clip` fetches it into the cache. Made here: undistorted
pictures cut out around the performer with K adjusted, masks, and the four cameras in the pack's
world as seen from camera 1.

The files of cameras 1 and 2 are not the pictures that were calibrated: they were scaled from 1088
to 1080 pixels across and padded with seven black rows above and below. A fit of each file's first
frame to the calibration still of its camera shows it (scale 0.9926, offset 7.1 rows; 1.0000 and 0.0
for cameras 3 and 4), and it is undone first.

Masks: difference from the calibration stills (there the performer's place is empty), kept where at
least three cameras agree about a place in space, outline by GrabCut. They are estimates.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import av
import cv2
import numpy as np
import torch
from torch import Tensor

START, STEP, CAMERAS = 10, 4, 4
HALF = 2
"""Pictures are worked on at half of their calibrated size, 544 x 960."""
BAR_CAMERAS = {1: 1080 / 1088, 2: 1080 / 1088}
"""Camera -> how much its file was shrunk before black rows were added."""
DIFFERENT = 26
"""Grey levels (of 255, largest channel) that a pixel must differ from the still."""
STILL = 5
"""Median change (grey levels) over the whole clip below which a pixel shows furniture."""
VOXEL, REACH = 0.025, 1.2
"""Metres: edge of a cell, and how far the searched box reaches from the performer's centre."""
MARGIN = 1.12
"""Free space around the performer, as Orbit Rig leaves it."""


@dataclass(frozen=True)
class RealClip:
    """Four cameras, F frames, all on the performer."""

    frames: Tensor
    """[4, F, 3, H, W] 0..1, undistorted and cut out."""
    masks: Tensor
    """[4, F, H, W] 0 or 1, estimated."""
    K: Tensor
    """[4, 3, 3] pixels of the cut-out pictures."""
    T_camera_first: Tensor
    """[4, 4, 4] from the first camera's axes to each camera's."""
    centre: Tensor
    """[3] the performer's centre, in the first camera's axes, metres."""
    fps: float
    rig_error: float
    """Median distance (pixels of the calibrated 1088 x 1920) between the middle of the man's cap and
    the projection of the point that fits all four middles best."""


@dataclass(frozen=True)
class _Camera:
    """Undistorted pictures at half of the calibrated size."""

    frames: list[np.ndarray]
    """The chosen ones."""
    others: np.ndarray
    """[N, H, W, 3] every fourth of the whole clip."""
    still: np.ndarray
    """The calibration still."""


def _read(folder: Path, camera: int, K: np.ndarray, lens: np.ndarray, count: int) -> _Camera:
    """One camera's pictures; K (OpenCV's pixels) of the half size."""

    def flat(picture: np.ndarray, shrunk: float = 1.0) -> np.ndarray:
        picture = cv2.resize(
            picture, (picture.shape[1] // HALF, picture.shape[0] // HALF),
            interpolation=cv2.INTER_AREA,
        )  # fmt: skip
        if shrunk != 1:
            s, h = shrunk, picture.shape[0]
            # Pixel p of the calibrated picture lies at s p + offset of the file; rows are centred.
            A = np.array([[s, 0, (s - 1) / 2], [0, s, h * (1 - s) / 2 + (s - 1) / 2]])
            how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            picture = cv2.warpAffine(picture, A, (still.shape[1] // HALF, h), flags=how)
        return cv2.undistort(picture, K, lens)

    still = cv2.imread(str(folder / f"cam0{camera}_ext.png"))[..., ::-1]
    wanted = range(START, START + STEP * count, STEP)
    chosen, others = [], []
    with av.open(str(folder / f"cam0{camera}.mp4")) as file:
        for n, frame in enumerate(file.decode(video=0)):
            if n in wanted or n % STEP == 0:
                picture = flat(frame.to_ndarray(format="rgb24"), BAR_CAMERAS.get(camera, 1.0))
                if n in wanted:
                    chosen.append(picture)
                if n % STEP == 0:
                    others.append(picture)
    return _Camera(chosen, np.stack(others), flat(np.ascontiguousarray(still)))


def _lens(calibration: str, camera: int) -> np.ndarray:
    """OpenCV's k1, k2, p1, p2, k3 of one camera."""
    inner = ElementTree.fromstring(calibration).findall(".//camera/intrinsic")[camera - 1]
    keys = ("radialDistortion1", "radialDistortion2", "tangentalDistortion1",
            "tangentalDistortion2", "radialDistortion3")  # fmt: skip
    return np.array([float(inner.get(k)) for k in keys])


def _project(points: Tensor, K: Tensor, T: Tensor) -> Tensor:
    """[N, 3] -> pixels [N, 2]."""
    camera = (points @ T[:3, :3].T + T[:3, 3]) @ K.T
    return camera[:, :2] / camera[:, 2:]


def _nearest_to_rays(pixels: Tensor, K: Tensor, T: Tensor) -> Tensor:
    """[3] the point of least squared distance to the rays through one pixel [V, 2] of each camera."""
    R = T[:, :3, :3]
    eyes = -(R.mT @ T[:, :3, 3:])[..., 0]
    rays = torch.cat([pixels, torch.ones(len(pixels), 1)], 1)[..., None]
    along = torch.nn.functional.normalize((R.mT @ torch.linalg.inv(K) @ rays)[..., 0], dim=1)
    off = torch.eye(3) - along[:, :, None] * along[:, None]
    return torch.linalg.solve(off.sum(0), (off @ eyes[..., None]).sum(0)[:, 0])


def _difference(pictures: _Camera) -> np.ndarray:
    """[F, H, W] bool: unlike the still, and unlike what rests there over the whole clip."""
    usual = np.median(pictures.others, 0).astype(np.uint8)
    change = np.median(np.stack([cv2.absdiff(o, usual) for o in pictures.others]), 0).max(-1)
    resting = cv2.GaussianBlur(change, (5, 5), 0) < STILL

    def away(frame: np.ndarray, still: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(cv2.absdiff(frame, still).max(-1), (5, 5), 0) > DIFFERENT

    found = []
    for frame in pictures.frames:
        new = away(frame, pictures.still) & ~(resting & ~away(frame, usual))
        new = cv2.morphologyEx(new.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        found.append(cv2.morphologyEx(new, cv2.MORPH_CLOSE, np.ones((11, 11), np.uint8)) > 0)
    return np.stack(found)


def _agreed(different: list[np.ndarray], centre: Tensor, K: Tensor, T: Tensor) -> list[np.ndarray]:
    """Silhouettes of the cells that at least three cameras find occupied."""
    steps = torch.arange(-REACH, REACH, VOXEL)
    cells = centre + torch.cartesian_prod(steps, steps, steps)
    h, w = different[0].shape[1:]
    places, inside = [], []
    for k, t in zip(K, T, strict=True):
        p = _project(cells, k, t).floor().long()
        ok = (p >= 0).all(1) & (p[:, 0] < w) & (p[:, 1] < h)
        places.append((p[:, 1].clamp(0, h - 1) * w + p[:, 0].clamp(0, w - 1)).numpy())
        inside.append(ok.numpy())
    silhouettes = [np.zeros_like(d, dtype=np.uint8) for d in different]
    for f in range(len(different[0])):
        votes = sum(
            (d[f].reshape(-1)[p] & ok).astype(np.int8)
            for d, p, ok in zip(different, places, inside, strict=True)
        )
        solid = votes >= CAMERAS - 1
        for silhouette, p, ok in zip(silhouettes, places, inside, strict=True):
            silhouette[f].reshape(-1)[p[solid & ok]] = 1
    # A cell covers about four pixels here, so the gaps between cells are closed.
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    return [np.stack([cv2.dilate(m, kernel) for m in s]) for s in silhouettes]


def _outline(frame: np.ndarray, different: np.ndarray, agreed: np.ndarray) -> np.ndarray:
    """GrabCut between what is surely and surely not the performer."""
    wide = cv2.dilate(agreed, np.ones((13, 13), np.uint8))
    labels = np.full(agreed.shape, cv2.GC_BGD, np.uint8)
    labels[wide > 0] = cv2.GC_PR_BGD
    both = (different & (agreed > 0)).astype(np.uint8)
    labels[both > 0] = cv2.GC_PR_FGD
    labels[cv2.erode(both, np.ones((9, 9), np.uint8)) > 0] = cv2.GC_FGD
    cv2.setRNGSeed(0)
    cv2.grabCut(frame, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 2, cv2.GC_INIT_WITH_MASK)
    mask = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask)
    return parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax() if count > 1 else mask > 0


def _box(masks: np.ndarray) -> tuple[float, float, float, float]:
    y, x = np.nonzero(masks.any(0))
    return x.min(), x.max() + 1, y.min(), y.max() + 1


def _middles(masks: list[np.ndarray], f: int) -> Tensor:
    boxes = [_box(m[f : f + 1]) for m in masks]
    return torch.tensor([[(a + b) / 2, (c + d) / 2] for a, b, c, d in boxes]).float()


def _cap(frame: np.ndarray, mask: np.ndarray) -> Tensor:
    """[2] the middle of the man's blue-green swimming cap, the one thing that all cameras can name."""
    hue, saturation, _ = cv2.split(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV))
    cap = ((hue > 85) & (hue < 110) & (saturation > 80) & mask).astype(np.uint8)
    _, _, stats, middles = cv2.connectedComponentsWithStats(cap)
    return torch.from_numpy(middles[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]).float() + 0.5


def _rig_error(places: Tensor, K: Tensor, T: Tensor) -> float:
    """Median pixel distance of one thing's places [F, V, 2] from the projections of the point that
    fits them best, at the calibrated size."""
    errors = []
    for seen in places:
        point = _nearest_to_rays(seen, K, T)
        back = torch.cat([_project(point[None], k, t) for k, t in zip(K, T, strict=True)])
        errors.append((back - seen).norm(dim=1))
    return float(torch.cat(errors).median()) * HALF


def load(folder: Path, rig_from_text, count: int, width: int, height: int) -> RealClip:
    """The clip at the size of the views, cut out around the performer."""
    cv2.setNumThreads(1)
    calibration = (folder / "Calib.qca.txt").read_text()
    rig, _ = rig_from_text("Calib.qca.txt", calibration)
    T = rig.T_camera_world
    K = rig.resized(rig.width // HALF, rig.height // HALF).K
    pictures = []
    for camera in range(1, CAMERAS + 1):
        lens_K = K[camera - 1].double().numpy().copy()
        # OpenCV counts from the middle of the first pixel.
        lens_K[:2, 2] -= 0.5
        pictures.append(_read(folder, camera, lens_K, _lens(calibration, camera), count))
    different = [_difference(p) for p in pictures]
    heavy = []
    for p in pictures:  # only the performer moves
        moving = np.stack(p.frames).astype(np.float32).std(0).max(-1)
        y, x = np.nonzero(moving > np.percentile(moving, 98))
        heavy.append([np.median(x), np.median(y)])
    start = _nearest_to_rays(torch.tensor(heavy).float(), K, T)
    agreed = _agreed(different, start, K, T)
    masks = [
        np.stack([_outline(f, d, a) for f, d, a in zip(p.frames, ds, s, strict=True)])
        for p, ds, s in zip(pictures, different, agreed, strict=True)
    ]
    middles = torch.stack([_middles(masks, f) for f in range(count)])
    centre = torch.stack([_nearest_to_rays(m, K, T) for m in middles]).mean(0)
    caps = torch.stack(
        [
            torch.stack([_cap(p.frames[f], m[f]) for p, m in zip(pictures, masks, strict=True)])
            for f in range(count)
        ]
    )
    frames, cut, cropped = [], [], []
    for v, (p, m) in enumerate(zip(pictures, masks, strict=True)):
        x0, x1, y0, y1 = _box(m)
        tall = MARGIN * max(y1 - y0, (x1 - x0) * height / width)
        scale = height / tall
        left, top = (x0 + x1) / 2 - tall * width / height / 2, (y0 + y1) / 2 - tall / 2
        # Pixel centres at +0.5 on both sides.
        A = np.array([[1 / scale, 0, left + 0.5 / scale - 0.5],
                      [0, 1 / scale, top + 0.5 / scale - 0.5]])  # fmt: skip
        frames.append(np.stack([_cut(f, A, scale, width, height) for f in p.frames]))
        cropped.append(
            np.stack([_cut(f.astype(np.float32), A, scale, width, height) > 0.5 for f in m])
        )
        k = K[v].clone()
        k[0, 2] -= left
        k[1, 2] -= top
        k[:2] *= scale
        cut.append(k)
    to_first = torch.linalg.inv(T[0])
    return RealClip(
        torch.from_numpy(np.stack(frames)).movedim(-1, 2).float() / 255,
        torch.from_numpy(np.stack(cropped)).float(),
        torch.stack(cut),
        T @ to_first,
        T[0, :3, :3] @ centre + T[0, :3, 3],
        60 / STEP,
        _rig_error(caps, K, T),
    )


def _cut(picture: np.ndarray, A: np.ndarray, scale: float, width: int, height: int) -> np.ndarray:
    """A window of the picture at another size, without aliasing."""
    sigma = 0.5 / scale
    smooth = cv2.GaussianBlur(picture, (0, 0), sigma) if scale < 1 else picture
    return cv2.warpAffine(
        smooth, A, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
