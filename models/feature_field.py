"""The feature field: features of posed references, rendered from any camera, for a block of a DiT.

Stage: Train Subject and Apply Subject render the references' features of the chosen blocks for every
target and add them behind these blocks (MVCustom's pose-conditioned blocks; CustomDiffusion360,
FeatureNeRF). Every sample of a target's ray is projected into the references; a small network reads
what each of them shows there, together with where that is and from where the target looks at it; the
views are averaged by weights that the network gives, and density, colour and features are rendered
along the ray.

Frames and units: the subject's space and depths of feature_rays.py; K in tokens (the pictures' K scaled
to the token grid), token centres at +0.5.

Departs from the published code: linear layers come before reading from a map, and after rendering,
where the numbers are the same and the work is a fraction; the model's text is read by the target's
tokens alone and not by every sample as well, which would be C / hidden times the work; a reference that
does not show a place has no say, and where none does there is nothing; those that look from where the
target does begin with more say. Since one subject is learned and not all, the averaged view also hears
how much the references differ there, whether the place is inside of their outlines (visual hull), where
it is, and what is kept of it in a small volume. Of a truck, after 120 steps, from unseen cameras,
colors in cells of 8 pixels: 20.7 dB with references spread all round, 23.0 with the nearest, 25.0 to
25.4 with outlines and say by angle as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .feature_rays import (
    camera_rays,
    even_edges,
    importance_edges,
    median_depth,
    places_in,
    ray_weights,
    span,
)

SAMPLES = 24
"""A ray, as published."""
AT_ONCE, AT_ONCE_ELSEWHERE = 1 << 15, 1 << 18
"""Places x references that are looked at together on a CPU, for its cache, and elsewhere, for its
memory: one layer of 128 float32 numbers for each of 2^18 is 128 MiB."""
KEPT = 1 << 18
"""So many, or fewer, are kept for the gradient; of more, all is computed anew going backwards."""
LARGEST_LOG_DENSITY = 12.0
"""exp(12) a unit is opaque within a thousandth of a token; more would only overflow."""
NEAREST_DEPTH = 1e-4
"""A place closer to a reference's plane than this, in units of the space, is not in its picture."""
TOWARDS = 3.0
"""Say that a reference begins with, times the cosine between its ray and the target's: one from the
same side sees what the target sees."""
VOXELS, KEPT_FEATURES = 32, 16
"""A side of the volume around the ball, and numbers in each of its corners."""
VOLUME = 0.1
"""Their standard deviation at the beginning."""


@dataclass(frozen=True)
class References:
    """What one block sees of R posed reference pictures."""

    features: Tensor
    """[R, C, h, w]"""
    K: Tensor
    """[R, 3, 3] in tokens."""
    T_camera_world: Tensor
    """[R, 4, 4] of the subject's space."""
    details: Tensor | None = None
    """[R, D, a h, a w] of the same pictures, finer, such as their latents."""
    masks: Tensor | None = None
    """[R, b h, b w] 0..1, the subject's share; None = all of the picture may be the subject."""

    def __post_init__(self) -> None:
        R = len(self.features)
        if self.features.ndim != 4 or not R:
            raise ValueError(
                f"The references' features must be [R, C, h, w], not {list(self.features.shape)}."
            )
        if self.K.shape != (R, 3, 3) or self.T_camera_world.shape != (R, 4, 4):
            raise ValueError(
                f"'references' has {R} feature maps, but cameras of shapes {list(self.K.shape)} and "
                f"{list(self.T_camera_world.shape)}: give one camera for each picture."
            )

    def select(self, chosen: Tensor) -> References:
        """Some of them."""
        return References(*(part if part is None else part[chosen] for part in vars(self).values()))


@dataclass(frozen=True)
class Rendering:
    """What N cameras see of a field; features in the parameters' dtype, the rest in geometry's."""

    features: Tensor
    """[N, C, h, w]; where the ray goes on into the background, that has a feature of its own."""
    rgb: Tensor
    """[N, 3, h, w] 0..1, times alpha: add (1 - alpha) of any background."""
    alpha: Tensor
    """[N, h, w] 0..1"""
    depth: Tensor
    """[N, h, w] expected depth along the optical axis; means something where alpha does, 0 where
    alpha is 0."""
    median_depth: Tensor
    """[N, h, w] before it lies half of what the ray meets: no mean of two surfaces; no gradient."""
    edges: Tensor
    """[N, h w, S + 1] depths of the bins."""
    weights: Tensor
    """[N, h w, S] of the bins: with `edges`, what another field draws its samples from."""

    def select(self, n: int) -> Rendering:
        """What one of the cameras sees."""
        return Rendering(*(part[n : n + 1] for part in vars(self).values()))


def encoded(
    values: Tensor,  # [..., D]
    octaves: int,
) -> Tensor:  # [..., D (1 + 2 octaves)]
    """The values, their sines and their cosines at 1, 2, 4, ... radians a unit (NeRF, Eq. 4, without
    its factor pi: 32 radians a unit is a period of some 5 tokens)."""
    phases = torch.cat([values * 2.0**k for k in range(octaves)], -1)
    return torch.cat([values, phases.sin(), phases.cos()], -1)


class FeatureField(nn.Module):
    """A field of C = `width` features a token, `hidden` <= C inside, that gives `outputs` (C).

    `groups`: maps of several blocks side by side, normed each by itself; `details`: of finer maps.
    `reach`: radius of the ball around the origin outside which there is nothing, in units of the
    subject's space. It begins as grey fog of density 1 a unit; all else is drawn from `generator`, at
    unit variance, so that pictures are heard beside places.
    """

    PLACE, RAY, WHERE = 6, 2, 6
    """Octaves of a place in a reference's frame, of a target's ray there, of a place in the space."""

    def __init__(
        self,
        width: int,
        hidden: int,
        reach: float,
        samples: int = SAMPLES,
        generator: torch.Generator | None = None,
        *,
        outputs: int | None = None,
        groups: int = 1,
        details: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= hidden <= width:
            raise ValueError(f"A field of width {width} can't be {hidden} wide inside.")
        self.width, self.hidden, self.reach, self.samples = width, hidden, reach, samples
        self.groups = groups
        outputs = outputs or width

        def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
            layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias)
            bound = math.sqrt(3 / inputs)
            nn.init.uniform_(layer.weight, -bound, bound, generator)
            if bias:
                nn.init.zeros_(layer.bias)
            return layer

        # What one reference shows.
        self.feature = linear(width, hidden)
        self.detail = linear(details, hidden, bias=False) if details else None
        self.place = linear(3 * (1 + 2 * self.PLACE), hidden, bias=False)
        self.ray = linear(6 * (1 + 2 * self.RAY), hidden, bias=False)
        self.view = linear(hidden, hidden)
        self.say = linear(hidden, 1)
        self.towards = nn.Parameter(torch.tensor(TOWARDS))
        # What all of them show.
        self.mean = linear(hidden, hidden)
        self.spread = linear(hidden, hidden, bias=False)
        self.where = linear(3 * (1 + 2 * self.WHERE), hidden, bias=False)
        self.hull = linear(3, hidden, bias=False)
        corners = torch.empty(VOXELS, VOXELS, VOXELS, KEPT_FEATURES)
        self.volume = nn.Parameter(nn.init.normal_(corners, 0.0, VOLUME, generator))
        self.kept = linear(KEPT_FEATURES, hidden, bias=False)
        self.trunk = linear(hidden, hidden)
        self.head = linear(hidden, 4)
        self.out = linear(hidden, outputs)
        self.background = nn.Parameter(torch.zeros(outputs))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.say.weight)

    def render(
        self,
        references: References,
        K: Tensor,  # [N, 3, 3] in tokens of the targets
        T_camera_world: Tensor,  # [N, 4, 4] of the subject's space
        size: tuple[int, int],  # rows, columns of tokens
        *,
        earlier: Rendering | None = None,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
    ) -> Rendering:
        """What the target cameras see.

        earlier: the same targets, rendered by another field, maybe with fewer rays (one for 2x2, 3x3
            and so on of these); samples follow its weights.
        generator: samples anywhere in their bins, for training; without it in their middles.
        chunk: rays at a time; the result is the same.
        """
        if references.features.shape[1] != self.width:
            raise ValueError(
                f"The references have {references.features.shape[1]} features a token, but this "
                f"field was made for {self.width}: it belongs to another model."
            )
        rays = camera_rays(K, T_camera_world, size)
        if earlier is None:
            edges = even_edges(span(rays, self.reach), self.samples)
        else:
            edges = importance_edges(earlier.edges, earlier.weights, self.samples)
            edges = _for_finer_rays(edges, tuple(earlier.alpha.shape[1:]), size)
        depths = places_in(edges, generator)
        given = (rays.origins.expand_as(rays.directions), rays.directions, edges, depths)
        flat = [x.flatten(0, 1) for x in given]
        parts = self._in_chunks((self._maps(references), references), flat, chunk)
        features, rgb, depth, weights = (torch.cat(x) for x in zip(*parts, strict=True))
        N, (h, w) = len(K), size
        return Rendering(
            features.view(N, h, w, -1).movedim(-1, 1),
            rgb.view(N, h, w, 3).movedim(-1, 1),
            weights.sum(-1).view(N, h, w),
            depth.view(N, h, w),
            median_depth(flat[2], weights.detach()).view(N, h, w),
            edges,
            weights.view(N, h * w, -1),
        )

    def _maps(self, references: References) -> Tensor:  # [R, h, w, m], or at the details' size
        """The references' maps as the samples read them."""
        maps = references.features.movedim(1, -1).to(self.background.dtype)
        # As the block itself reads them: normed, without a scale of their own.
        maps = maps.unflatten(-1, (self.groups, -1))
        maps = self.feature(F.layer_norm(maps, maps.shape[-1:]).flatten(-2))
        if self.detail is None:
            return maps
        details = references.details.movedim(1, -1).to(maps)
        size = details.shape[1:3]
        # As the CPU does it on every device: the gradient of another way is not in order on CUDA.
        for axis, length in ((1, size[0]), (2, size[1])):
            maps = _stretched(maps, axis, length)
        return maps + self.detail(details)

    def _in_chunks(
        self,
        shared: tuple[Tensor, References],  # maps
        rays: list[Tensor],  # [N L, ...] origins, directions, edges, depths
        chunk: int | None,
    ) -> list[tuple[Tensor, ...]]:
        """`_marched`, some rays at a time."""
        maps, references = shared
        rows = len(references.features) * self.samples  # a ray
        at_once = AT_ONCE if maps.device.type == "cpu" else AT_ONCE_ELSEWHERE
        parts = zip(*(x.split(chunk or max(1, at_once // rows)) for x in rays), strict=True)
        if not torch.is_grad_enabled() or rows * len(rays[0]) <= KEPT:
            return [self._marched(*shared, *part) for part in parts]
        how = {"use_reentrant": False, "preserve_rng_state": False}
        return [checkpoint(self._marched, *shared, *part, **how) for part in parts]

    def _marched(
        self,
        maps: Tensor,  # [R, h, w, m]
        references: References,
        origins: Tensor,  # [P, 3] of P rays
        directions: Tensor,  # [P, 3]
        edges: Tensor,  # [P, S + 1]
        depths: Tensor,  # [P, S]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # features [P, C], rgb [P, 3], depth [P], weights
        """Rays through the field."""
        places = origins[:, None] + depths[..., None] * directions[:, None]
        views, says, seen, outlines = self._views(maps, references, origins, directions, places)
        features, head = self._joined(views, says, seen, places, outlines)
        density = head[..., 0].clamp(max=LARGEST_LOG_DENSITY).exp() * seen.any(-1)
        lengths = edges.diff(dim=-1) * directions.norm(dim=-1, keepdim=True)
        weights = ray_weights(density, lengths)
        alpha = weights.sum(-1, keepdim=True)
        shares, opacity = (x[..., None].to(features) for x in (weights, alpha[..., 0]))
        met = F.linear((shares * features).sum(1), self.out.weight) + opacity * self.out.bias
        rgb = (weights[..., None] * head[..., 1:].sigmoid()).sum(1)
        depth = (weights * depths).sum(-1) / alpha[:, 0].clamp(min=1e-6)
        return met + (1 - opacity) * self.background, rgb, depth, weights

    def _views(
        self,
        maps: Tensor,  # [R, h, w, m]
        references: References,
        origins: Tensor,  # [P, 3]
        directions: Tensor,  # [P, 3]
        places: Tensor,  # [P, S, 3]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What each reference says about each place [P, S, R, m]; how much say it has [P, S, R]; whether
        it shows the place [P, S, R]; what the outlines say about the place [P, S, 3]."""
        T = references.T_camera_world.to(places)
        R, shift = T[:, :3, :3], T[:, :3, 3]
        there = torch.einsum("psj,rij->psri", places, R) + shift
        eyes = torch.einsum("pj,rij->pri", origins, R) + shift
        towards = torch.einsum("pj,rij->pri", F.normalize(directions, dim=-1), R)
        pluecker = torch.cat([towards, torch.linalg.cross(eyes, towards)], -1)
        K, size = references.K.to(places), references.features.shape[-2:]
        found, seen = read_maps(maps, _finer_lens(K, size, maps.shape[1:3]), there)
        given = found + self.place(encoded(there, self.PLACE).to(maps))
        given = given + self.ray(encoded(pluecker, self.RAY).to(maps))[:, None]
        views = found + self.view(F.silu(given))
        angles = (F.normalize(there, dim=-1) * towards[:, None]).sum(-1)
        says = self.say(F.silu(views))[..., 0].to(places) + self.towards.to(places) * angles
        if references.masks is None:
            outlines = torch.ones_like(places)
        else:
            masks = references.masks[..., None].to(places)
            shares = read_maps(masks, _finer_lens(K, size, masks.shape[1:3]), there)[0][..., 0]
            outlines = outline_votes(torch.where(seen, shares, 1.0))
        return views, says, seen, outlines

    def _joined(
        self,
        views: Tensor,  # [P, S, R, m]
        says: Tensor,  # [P, S, R]
        seen: Tensor,  # [P, S, R]
        places: Tensor,  # [P, S, 3]
        outlines: Tensor,  # [P, S, 3]
    ) -> tuple[Tensor, Tensor]:  # features [P, S, m], logits of density and colour [P, S, 4]
        """Places, of what the references that show them say."""
        shares = torch.softmax(says.masked_fill(~seen, -1e9), -1) * seen
        shares = shares[..., None].to(views)
        mean = (shares * views).sum(-2)
        spread = (shares * (views - mean[..., None, :]).square()).sum(-2)
        where = self.where(encoded(places, self.WHERE).to(views))
        kept = self.kept(read_volume(self.volume, places / self.reach).to(views))
        # Centred, at unit size for an outline that is sometimes met.
        hull = self.hull((4 * outlines - 2).to(views))
        joined = self.mean(mean) + self.spread(spread) + where + kept + hull
        joined = self.trunk(F.silu(joined))
        features = mean + joined
        return features, self.head(features).to(places)


def outline_votes(
    shares: Tensor,  # [..., R] of the subject where each reference shows a place, 1 where it does not
) -> Tensor:  # [..., 3]
    """The least, the second least and the mean: a place that one outline leaves out is empty, unless
    that mask has a fault."""
    least = shares.topk(min(2, shares.shape[-1]), largest=False).values
    return torch.stack([least[..., 0], least[..., -1], shares.mean(-1)], -1)


def _finer_lens(K: Tensor, size: tuple[int, int], finer: tuple[int, int]) -> Tensor:
    """K [R, 3, 3] for maps of another size of the same pictures."""
    return K * K.new_tensor([finer[1] / size[1], finer[0] / size[0], 1.0])[:, None]


def _stretched(maps: Tensor, axis: int, length: int) -> Tensor:
    """Bilinear along one axis, centres at +0.5, the border repeated outwards."""
    count = maps.shape[axis]
    at = (torch.arange(length, device=maps.device) + 0.5) * (count / length) - 0.5
    at = at.clamp(0, count - 1)
    matrix = (1 - (at[:, None] - torch.arange(count, device=maps.device)).abs()).clamp(min=0)
    return torch.tensordot(maps, matrix.to(maps), ([axis], [1])).movedim(-1, axis)


def _for_finer_rays(edges: Tensor, size: tuple[int, int], finer: tuple[int, int]) -> Tensor:
    """[N, h w, S + 1] -> [N, a h a w, S + 1]: all rays in a token have its bins."""
    if size == finer:
        return edges
    edges = edges.unflatten(1, size)
    for axis in (1, 2):
        edges = edges.repeat_interleave(finer[axis - 1] // size[axis - 1], axis)
    return edges.flatten(1, 2)


def read_volume(
    volume: Tensor,  # [n, n, n, m] corners from -1 to 1, x first
    places: Tensor,  # [..., 3]
) -> Tensor:  # [..., m]
    """A volume between its corners, trilinear; the border is repeated outwards."""
    n, m = volume.shape[0], volume.shape[-1]
    at = ((places + 1) * ((n - 1) / 2)).clamp(0, n - 1)
    low = at.floor().clamp(max=n - 2)
    high_share, low = at - low, low.long()
    corners, shares = [], []
    for corner in range(8):
        upper = [corner >> axis & 1 for axis in range(3)]
        x, y, z = (low[..., axis] + upper[axis] for axis in range(3))
        corners.append((x * n + y) * n + z)
        each = [high_share[..., a] if upper[a] else 1 - high_share[..., a] for a in range(3)]
        shares.append(each[0] * each[1] * each[2])
    read = F.embedding_bag(
        torch.stack(corners, -1).view(-1, 8),
        volume.reshape(-1, m),
        per_sample_weights=torch.stack(shares, -1).view(-1, 8).to(volume),
        mode="sum",
    )
    return read.view(*places.shape[:-1], m)


def read_maps(
    maps: Tensor,  # [R, h, w, m]
    K: Tensor,  # [R, 3, 3]
    places: Tensor,  # [..., R, 3] in each reference's frame
) -> tuple[Tensor, Tensor]:  # [..., R, m], [..., R]
    """Maps between their pixels, bilinear, and whether the place is in the picture; else zeros."""
    R, h, w, m = maps.shape
    seen = places[..., 2] > NEAREST_DEPTH
    pixels = torch.einsum("...rj,rij->...ri", places, K)
    u, v = (pixels[..., :2] / torch.where(seen, places[..., 2], 1)[..., None]).unbind(-1)
    seen = seen & (u >= 0) & (u <= w) & (v >= 0) & (v <= h)
    u, v = (u - 0.5).clamp(0, w - 1), (v - 0.5).clamp(0, h - 1)
    left, top = u.floor().clamp(max=max(w - 2, 0)), v.floor().clamp(max=max(h - 2, 0))
    right, below = u - left, v - top
    shares = [(1 - right) * (1 - below), right * (1 - below), (1 - right) * below, right * below]
    shares = torch.stack(shares, -1) * seen[..., None]
    corner = (torch.arange(R, device=maps.device) * h + top.long()) * w + left.long()
    across, down = min(w - 1, 1), min(h - 1, 1) * w
    corners = torch.stack([corner, corner + across, corner + down, corner + across + down], -1)
    # A bag is the weighted sum of four rows: in order also on CUDA, unlike grid_sample's gradient.
    read = F.embedding_bag(
        corners.view(-1, 4),
        maps.reshape(-1, m),
        per_sample_weights=shares.view(-1, 4).to(maps),
        mode="sum",
    )
    return read.view(*seen.shape, m), seen


class Injection(nn.Module):
    """x <- Linear(2C -> C)([x, rendered]), begun at the identity on x.

    Written as x + change([x, rendered]) with a change of zero, which leaves x to the bit in every
    precision.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Linear(2 * width, width)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(
        self,
        x: Tensor,  # [..., C]
        rendered: Tensor,  # [..., C]
    ) -> Tensor:  # [..., C]
        return x + self.change(torch.cat([x, rendered.to(x)], -1))
