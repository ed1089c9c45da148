"""Where an implicit video begins: what can be told from a clip and its flow without any training.

Stage: frames + flow -> casts, jitter, motions, canonical pictures -> implicit_fit.py. Per frame: by
which gain and offset it differs from its neighbours (casts), by how much it is bent beside the path
that its points take over several frames (jitter). Per key frame: where the pixels of the frames around
it lie in it, and what these frames show there on average.

Frames: pixels, centres at +0.5; one view, one shot. Flow as in flow.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import sample

NEIGHBOURS = 3
"""Frames before and after that a frame is compared with."""
SMALL = 240
"""Pixels of the longer side at which casts and jitter are found: both are smooth."""
ROUNDS = 3
"""How often neighbours are corrected and compared again."""
RIDGE = 0.02
"""Share of the samples' weight with which a cast is held to none, where colours don't tell."""
TELLING = 5000
"""Pixels that are enough to tell a cast."""
TYPICAL = 0.03
"""Difference of colours above which a pixel does not tell the cast: something else is seen there."""


def pixel_centres(like: Tensor) -> Tensor:  # [..., H, W] -> [2, H, W] x, y
    H, W = like.shape[-2:]
    x, y = torch.arange(W, device=like.device) + 0.5, torch.arange(H, device=like.device) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def warped(pictures: Tensor, flow: Tensor) -> Tensor:  # [C, H, W], [2, h, w] -> [C, h, w]
    """What a picture shows where the flow points to."""
    x, y = (pixel_centres(flow) + flow)[:, None]
    return sample(pictures[None], x, y)[0]


def warped_sharp(pictures: Tensor, flow: Tensor) -> Tensor:
    """The same by cubic interpolation, which keeps what is fine."""
    H, W = pictures.shape[-2:]
    x, y = pixel_centres(flow) + flow
    grid = torch.stack([2 * x / W - 1, 2 * y / H - 1], -1)[None].to(pictures)
    return F.grid_sample(pictures[None], grid, "bicubic", "border", align_corners=False)[0]


def scaled_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:  # [N, 2, H, W] -> [N, 2, h, w]
    """Flow of pictures of another (height, width)."""
    H, W = flow.shape[-2:]
    if size == (H, W):
        return flow
    small = F.interpolate(flow, size, mode="area" if size[0] < H else "bilinear")
    return small * flow.new_tensor([size[1] / W, size[0] / H])[:, None, None]


def tracks(there: Tensor, back: Tensor, n: int, reach: int) -> dict[int, Tensor]:
    """Where the points of frame n lie in the frames around it, as flow [2, h, w] by frame number."""
    found = {n: torch.zeros_like(there[0])} if len(there) else {}
    for m in range(n, min(n + reach, len(there))):
        found[m + 1] = found[m] + warped(there[m], found[m])
    for m in range(n, max(n - reach, 0), -1):
        found[m - 1] = found[m] + warped(back[m - 1], found[m])
    return found


# --- casts ----------------------------------------------------------------------------------------


def hats(size: tuple[int, int], cells: int, like: Tensor) -> Tensor:  # [h * w, cells²]
    """Weights of a coarse grid's nodes, the outermost on the border, at a picture's pixels."""
    axes = []
    for n in size:
        place = ((torch.arange(n, device=like.device) + 0.5) / n * (cells - 1))[:, None]
        nodes = torch.arange(cells, device=like.device)
        axes.append((1 - (place - nodes).abs()).clamp(min=0).to(like))
    return torch.einsum("hi,wj->hwij", *axes).reshape(size[0] * size[1], cells**2)


def cast_between(
    shown: Tensor,  # [3, N] colours of a frame
    meant: Tensor,  # [3, N] of what it should show
    sure: Tensor,  # [N]
    weights: Tensor,  # [N, K] as `hats` gives them
) -> tuple[Tensor, Tensor]:  # gain, offset [3, K]: shown = gain * meant + offset
    """Gain and offset by robust least squares, held together and to 1 and 0 where colours are plain."""
    K = weights.shape[1]
    step = max(1, shown.shape[1] // TELLING)
    shown, meant, sure, weights = (t[..., ::step] for t in (shown, meant, sure, weights.T))
    weights = weights.T.contiguous()
    gains, offsets = [], []
    ridge = RIDGE * sure.sum().clamp(min=1.0)
    # Nodes are held to their mean ten times as much as that is held to none.
    apart = torch.eye(K).to(weights) - 1 / K
    hold = ridge / K * (apart + 0.1 / K)
    holds = torch.block_diag(0.3 * hold, hold)  # a gain acts on colours of about one half
    for seen, goal in zip(shown, meant, strict=True):
        A = torch.cat([weights * goal[:, None], weights], 1)
        left = seen - goal
        solution = A.new_zeros(2 * K)
        for _ in range(4):
            away = left - A @ solution
            size = (1.5 * away.abs().median()).clamp(TYPICAL / 3, TYPICAL)
            w = sure / (1 + (away / size).square())
            solution = torch.linalg.solve(A.T @ (w[:, None] * A) + holds, A.T @ (w * left))
        gains.append(1 + solution[:K])
        offsets.append(solution[K:])
    return torch.stack(gains).clamp(0.2, 5.0), torch.stack(offsets)


def find_casts(
    frames: Tensor,  # [F, 3, h, w]
    there: Tensor,  # [F - 1, 2, h, w]
    back: Tensor,
    cells: int,
    tick,
) -> tuple[Tensor, Tensor]:  # gain, offset [F, 3, cells, cells]
    """By what every frame differs from what its neighbours show at the same points.

    A frame is compared with the mean of its neighbours, corrected by what is known of them so far;
    repeated, this reaches farther than the neighbours do."""
    count, (h, w) = len(frames), frames.shape[-2:]
    weights = hats((h, w), cells, frames)
    gain = frames.new_ones(count, 3, cells**2)
    offset = torch.zeros_like(gain)
    paths = [tracks(there, back, n, NEIGHBOURS) for n in range(count)]
    for _ in range(ROUNDS):
        true = torch.stack([
            correct(f, g, o, weights) for f, g, o in zip(frames, gain, offset, strict=True)
        ])  # fmt: skip
        found = []
        for n in range(count):
            tick()
            seen = torch.stack([warped(true[m], path) for m, path in paths[n].items()])
            meant = seen.median(0).values if len(seen) < 3 else trimmed_mean(seen)
            spread = (seen - meant).abs().mean((0, 1))
            sure = 1 / (1 + (spread / TYPICAL).square())
            pair = cast_between(frames[n].flatten(1), meant.flatten(1), sure.flatten(), weights)
            found.append(pair)
        gain, offset = (torch.stack(part) for part in zip(*found, strict=True))
    return tuple(t.view(count, 3, cells, cells) for t in (gain, offset))


def trimmed_mean(seen: Tensor) -> Tensor:  # [M, ...] -> [...]
    """The mean without those far from the median."""
    middle = seen.median(0, keepdim=True).values
    spread = (seen - middle).abs().median(0, keepdim=True).values
    near = ((seen - middle).abs() <= 3 * spread + 1e-4).to(seen)
    return (seen * near).sum(0) / near.sum(0)


def correct(picture: Tensor, gain: Tensor, offset: Tensor, weights: Tensor) -> Tensor:
    """A picture [3, h, w] without its cast ([3, K] on the nodes of `hats`)."""
    g, o = gain @ weights.T, offset @ weights.T
    return ((picture.flatten(1) - o) / g).view_as(picture)


# --- jitter ---------------------------------------------------------------------------------------


def path_weights(offsets: Tensor, degree: int) -> Tensor:  # [M] frames from now -> [M]
    """Weights of a point's places around now whose sum is the place now on the smooth path: local
    least squares by a polynomial (Savitzky and Golay 1964) under a bell."""
    bell = torch.exp(-0.5 * (offsets / (NEIGHBOURS / 1.5)) ** 2)
    A = torch.stack([offsets**d for d in range(degree + 1)], 1)
    inverse = torch.linalg.pinv(A.T @ (bell[:, None] * A))
    return (inverse @ (A.T * bell))[0]


def smoothed(field: Tensor, weight: Tensor, sigma: float) -> Tensor:  # [C, h, w], [h, w]
    """Mean under a Gaussian, of what counts."""
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1, device=field.device, dtype=field.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2).view(1, 1, 1, -1)

    def blur(t: Tensor) -> Tensor:
        t = F.pad(t[:, None], (reach,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(t, kernel), kernel.mT)[:, 0]

    return blur(field * weight) / blur(weight[None]).clamp(min=1e-6)


STRAY = 0.5
"""Pixels (of the small pictures) that a point may stray from what surrounds it."""
USUAL_BEND = 0.7
"""Pixels of the small pictures: what jitter is expected to be, against which noise is weighed."""


def find_jitter(
    pictures: Tensor,  # [F, 3, h, w] without casts
    there: Tensor,  # [F - 1, 2, h, w]
    back: Tensor,
    sure: Tensor,  # [F, h, w]
    tick,
) -> Tensor:  # [F, 2, h, w] pixels
    """How far every point stands beside its smooth path; of that what is smooth over the picture, and
    jumps from frame to frame as no motion does."""
    count = len(sure)
    tensors = [structure(p) for p in pictures]
    noise = _noise(pictures, there)
    jitter = torch.zeros_like(sure)[:, None].repeat(1, 2, 1, 1)
    for _ in range(ROUNDS):
        flows = unjittered(there, back, jitter)
        more = []
        for n in range(count):
            tick()
            path = tracks(*flows, n, NEIGHBOURS)
            offsets = torch.tensor([float(m - n) for m in path])
            degree = 2 if len(path) > 4 else 1 if len(path) > 2 else 0
            weights = path_weights(offsets, degree)
            away = sum(float(c) * d for c, d in zip(weights, path.values(), strict=True))
            more.append(_agreed(away, tensors[n], sure[n], noise))
        jitter = jitter + torch.stack(more)
    # What is left beside the local path of jitter of two frames changes sign: about -0.2.
    return jitter * (0.5 - 2.5 * lasting(jitter)).clamp(0, 1)


def structure(picture: Tensor) -> Tensor:  # [3, h, w] -> [3, h, w]
    """Products of slopes xx, xy, yy: where and across which edges motion can be told."""
    dy, dx = torch.gradient(picture, dim=(1, 2))
    return torch.stack([(dx * dx).sum(0), (dx * dy).sum(0), (dy * dy).sum(0)])


def _noise(pictures: Tensor, there: Tensor) -> float:
    """Variance of the difference of neighbouring frames along the motion, at flat places."""
    away = [
        (a - warped(b, step)).square().sum(0).median()
        for a, b, step in zip(pictures[:-1], pictures[1:], there, strict=True)
    ]
    return float(torch.stack(away).median()) + LEAST_NOISE


LEAST_NOISE = 3e-5
"""Of pictures without any: a step of 8 bits in each channel."""


def _agreed(away: Tensor, structure: Tensor, sure: Tensor, noise: float) -> Tensor:  # [2, h, w]
    """What neighbouring points agree about, each as far as its edges tell (Lucas and Kanade's sum);
    where they tell no more than noise would, nothing."""
    side = max(sure.shape)
    weight = sure
    for sigma in (side / 16, side / 32, side / 40):
        xx, xy, yy = structure
        u, v = away
        sums = torch.stack([xx, xy, yy, xx * u + xy * v, xy * u + yy * v])
        xx, xy, yy, a, b = smoothed(sums * weight, torch.ones_like(weight), sigma)
        ridge = noise / (USUAL_BEND**2 * 4 * torch.pi * sigma**2) * NOISE_ALIKE
        xx, yy = xx + ridge, yy + ridge
        size = xx * yy - xy * xy
        mean = torch.stack([yy * a - xy * b, xx * b - xy * a]) / size
        stray = (away - mean).square().sum(0).sqrt()
        weight = sure / (1 + (stray / STRAY).square())
    return mean


NOISE_ALIKE = 8.0
"""Pixels of noise that stand for one: flow blurs it, and blotches are wider than a pixel."""


def lasting(jitter: Tensor) -> Tensor:  # [F, 2, h, w] -> [h, w] -1..1
    """How much displacements are like those of the frame before: near 0 for jitter, which a frame has
    by itself, and near 1 for what a motion leaves beside its path."""
    if len(jitter) < 4:
        return torch.zeros_like(jitter[0, 0])
    side = max(jitter.shape[-2:]) / 10
    same = (jitter[1:] * jitter[:-1]).sum(1).mean(0)
    both = 0.5 * (jitter[1:].square() + jitter[:-1].square()).sum(1).mean(0)
    same, both = smoothed(torch.stack([same, both]), torch.ones_like(same), side)
    return same / (both + TINY**2)


TINY = 0.1
"""Pixels of displacement that may last."""


def unjittered(there: Tensor, back: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """Flow between frames whose jitter is taken out: F'(p) = F(q) + jitter_m(q + F(q)) - jitter_n(q)
    with q + jitter_n(q) = p."""
    forth, fro = [], []
    for n in range(len(there)):
        forth.append(_unjittered(there[n], jitter[n], jitter[n + 1]))
        fro.append(_unjittered(back[n], jitter[n + 1], jitter[n]))
    return torch.stack(forth), torch.stack(fro)


def _unjittered(flow: Tensor, here: Tensor, there: Tensor) -> Tensor:
    away = inverse(here)
    step = warped(flow, away)
    return away + step + warped(there, away + step)


def inverse(shift: Tensor, rounds: int = 4) -> Tensor:  # [2, h, w] pixels
    """The shift that undoes a smooth one: back(p) = -shift(p + back(p))."""
    back = -shift
    for _ in range(rounds):
        back = -warped(shift, back)
    return back


# --- pieces ---------------------------------------------------------------------------------------


def fill(field: Tensor, weight: Tensor) -> Tensor:  # [C, h, w], [h, w]
    """Where nothing is known, what is known around it: means of ever coarser pixels, taken where
    the finer ones are empty."""
    w = weight[None]
    if min(field.shape[-2:]) < 2:
        mean = (field * w).sum((1, 2), keepdim=True) / w.sum().clamp(min=1e-6)
        return torch.lerp(mean.expand_as(field), field, w.clamp(0, 1))
    known = F.avg_pool2d(w[None], 2, ceil_mode=True)[0]
    total = F.avg_pool2d((field * w)[None], 2, ceil_mode=True)[0]
    coarse = fill(total / known.clamp(min=1e-6), (known[0] * 4).clamp(0, 1))
    around = F.interpolate(coarse[None], field.shape[-2:], mode="bilinear")[0]
    return torch.lerp(around, field, w.clamp(0, 1))


def motions_to(
    key: int, start: int, stop: int, there: Tensor, back: Tensor
) -> Tensor:  # [n, 2, h, w] pixels
    """D(p) - p of the frames start..stop: where their pixels lie in the key frame."""
    found = {key: torch.zeros_like(there[0])}
    for n in range(key + 1, stop + 1):
        found[n] = back[n - 1] + warped(found[n - 1], back[n - 1])
    for n in range(key - 1, start - 1, -1):
        found[n] = there[n] + warped(found[n + 1], there[n])
    return torch.stack([found[n] for n in range(start, stop + 1)])


def canonical_average(
    pictures: Tensor,  # [n, 4, H, W] colour and the layer's share, without casts and jitter
    motions: Tensor,  # [n, 2, h, w] pixels of these
    sure: Tensor,  # [n, H, W] how much each is believed
    nearness: Tensor,  # [n] weight by distance from the key
    margin: tuple[int, int],  # pixels across and down around the frame
    tick,
) -> Tensor:  # [4, H + 2 my, W + 2 mx]
    """What the frames of a piece show at the places of its canonical picture: their mean, without
    what strays from what the frames nearest to the key show."""
    H, W = pictures.shape[-2:]
    mx, my = margin
    grid = pixel_centres(pictures.new_empty(H + 2 * my, W + 2 * mx))
    grid = grid - grid.new_tensor([mx, my])[:, None, None]
    seen, weights, anywhere = [], [], []
    for picture, motion, trust, near in zip(pictures, motions, sure, nearness, strict=True):
        tick()
        x, y = located(grid, motion, (W, H))
        pair = torch.stack([2 * x / W - 1, 2 * y / H - 1], -1)[None]
        seen.append(F.grid_sample(picture[None], pair, "bicubic", "border", align_corners=False)[0])
        believed = F.grid_sample(trust[None, None], pair, "bilinear", "zeros", align_corners=False)
        inside = (x > 0) & (x < W) & (y > 0) & (y < H)
        anywhere.append(near * inside)
        weights.append(anywhere[-1] * believed[0, 0])
    both, weight, within = torch.stack(seen), torch.stack(weights), torch.stack(anywhere)
    colours, outline = both[:, :3], both[:, 3:]
    middle = weighted_median(colours, weight)
    away = (colours - middle).abs().amax(1)
    usual = (weight * away).sum(0) / weight.sum(0).clamp(min=1e-6)
    kept = weight / (1 + (away / (2 * usual + TYPICAL)).square()) ** 2
    total = kept.sum(0)
    mean = (colours * kept[:, None]).sum(0) / total.clamp(min=1e-6)
    covers = (outline * within[:, None]).sum(0) / within.sum(0).clamp(min=1e-6)
    known = within.sum(0)
    return torch.cat(
        [
            fill(mean, (total / 0.05).clamp(0, 1)),
            fill(covers, (known / 0.05).clamp(0, 1)),
        ]
    )


def located(
    goal: Tensor,  # [2, a, b] pixels in the key frame
    motion: Tensor,  # [2, h, w] D(p) - p, in pixels of the frame
    size: tuple[int, int],  # (W, H) of the frame
    start: Tensor | None = None,
    rounds: int = 6,
) -> Tensor:  # [2, a, b]
    """Where a frame shows canonical places: x with x + motion(x) = goal."""
    scale = motion.new_tensor([2 / size[0], 2 / size[1]])
    place = goal if start is None else start
    for _ in range(rounds):
        pair = (place.movedim(0, -1) * scale - 1)[None]
        place = (
            goal - F.grid_sample(motion[None], pair, "bilinear", "border", align_corners=False)[0]
        )
    return place


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:  # [M, C, ...], [M, ...] -> [C, ...]
    """The value at which half of the weight is reached, by channel."""
    ordered, order = values.sort(0)
    w = weights[:, None].expand_as(values).gather(0, order)
    half = w.sum(0) / 2
    at = (w.cumsum(0) < half).sum(0).clamp(max=len(values) - 1)
    return ordered.gather(0, at[None])[0]
