"""The feature field: features of posed references, rendered from any camera, for a block of a DiT.

Stage: Train Subject and Apply Subject hang one field and one injection on each chosen block
(MVCustom's pose-conditioned blocks; CustomDiffusion360, FeatureNeRF). Every sample of a target's ray
is projected into the references; a small network reads what each of them shows there, together with
where that is and from where the target looks at it; the views are averaged by weights that the network
gives, and density, colour and features are rendered along the ray.

Frames and units: the subject's space and depths of feature_rays.py; K in tokens (the pictures' K scaled
to the token grid), token centres at +0.5.

Departs from the published code: linear layers come before reading from a map, and after rendering,
where the numbers are the same and the work is a fraction; a reference that does not show a place has
no say, and where none does there is nothing; and the averaged view also hears how much the references
differ there, and where the place is, since one subject is learned and not all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
AT_ONCE, AT_ONCE_ELSEWHERE = 1 << 13, 1 << 18
"""Places x references that are looked at together on a CPU, for its cache, and elsewhere, for its
memory: one layer of 128 float32 numbers for each of 2^18 is 128 MiB."""
KEPT = 1 << 18
"""So many, or fewer, are kept for the gradient; of more, all is computed anew going backwards."""
LARGEST_LOG_DENSITY = 12.0
"""exp(12) a unit is opaque within a thousandth of a token; more would only overflow."""
NEAREST_DEPTH = 1e-4
"""A place closer to a reference's plane than this, in units of the space, is not in its picture."""


@dataclass(frozen=True)
class References:
    """What one block sees of R posed reference pictures."""

    features: Tensor
    """[R, C, h, w]"""
    K: Tensor
    """[R, 3, 3] in tokens."""
    T_camera_world: Tensor
    """[R, 4, 4] of the subject's space."""

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
    """[N, h w, S] of the bins: with `edges`, what the next block's field draws its samples from."""


def encoded(
    values: Tensor,  # [..., D]
    octaves: int,
) -> Tensor:  # [..., D (1 + 2 octaves)]
    """The values, their sines and their cosines at 1, 2, 4, ... radians a unit (NeRF, Eq. 4, without
    its factor pi: 32 radians a unit is a period of some 5 tokens)."""
    phases = torch.cat([values * 2.0**k for k in range(octaves)], -1)
    return torch.cat([values, phases.sin(), phases.cos()], -1)


class FeatureField(nn.Module):
    """A field of one block: C = `width` features, `hidden` <= C inside.

    `reach`: radius of the ball around the origin outside which there is nothing, in units of the
    subject's space. It begins as grey fog of density 1 a unit in which all references count alike;
    all else is drawn from `generator`, at unit variance, so that pictures are heard beside places.
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
    ) -> None:
        super().__init__()
        if not 1 <= hidden <= width:
            raise ValueError(f"A field of width {width} can't be {hidden} wide inside.")
        self.width, self.hidden, self.reach, self.samples = width, hidden, reach, samples

        def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
            layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias)
            bound = math.sqrt(3 / inputs)
            nn.init.uniform_(layer.weight, -bound, bound, generator)
            if bias:
                nn.init.zeros_(layer.bias)
            return layer

        # What one reference shows.
        self.feature = linear(width, hidden)
        self.place = linear(3 * (1 + 2 * self.PLACE), hidden, bias=False)
        self.ray = linear(6 * (1 + 2 * self.RAY), hidden, bias=False)
        self.view = linear(hidden, hidden)
        self.say = linear(hidden, 1)
        # What all of them show.
        self.mean = linear(hidden, hidden)
        self.spread = linear(hidden, hidden, bias=False)
        self.where = linear(3 * (1 + 2 * self.WHERE), hidden, bias=False)
        self.trunk = linear(hidden, hidden)
        self.head = linear(hidden, 4)
        self.out = linear(hidden, width)
        self.background = nn.Parameter(torch.zeros(width))
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
        context: Callable[[Tensor], Tensor] | None = None,
    ) -> Rendering:
        """What the target cameras see.

        earlier: the same targets, rendered by an earlier block's field; samples follow its weights.
        generator: samples anywhere in their bins, for training; without it in their middles.
        chunk: rays at a time; the result is the same.
        context: the block's own text cross-attention with its residual, [rays, S, C] -> the same,
            for the features of every sample; C / hidden times the work.
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
        depths = places_in(edges, generator)
        given = (rays.origins.expand_as(rays.directions), rays.directions, edges, depths)
        flat = [x.flatten(0, 1) for x in given]
        maps = references.features.movedim(1, -1).to(self.background.dtype)
        # As the block itself reads them: normed, without a scale of their own.
        maps = self.feature(F.layer_norm(maps, (self.width,)))
        parts = self._in_chunks((maps, references, context), flat, chunk)
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

    def _in_chunks(
        self,
        shared: tuple,  # maps, references, context
        rays: list[Tensor],  # [N L, ...] origins, directions, edges, depths
        chunk: int | None,
    ) -> list[tuple[Tensor, ...]]:
        """`_marched`, some rays at a time."""
        maps, references, _ = shared
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
        context: Callable[[Tensor], Tensor] | None,
        origins: Tensor,  # [P, 3] of P rays
        directions: Tensor,  # [P, 3]
        edges: Tensor,  # [P, S + 1]
        depths: Tensor,  # [P, S]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # features [P, C], rgb [P, 3], depth [P], weights
        """Rays through the field."""
        places = origins[:, None] + depths[..., None] * directions[:, None]
        views, seen = self._views(maps, references, origins, directions, places)
        features, head = self._joined(views, seen, places)
        density = head[..., 0].clamp(max=LARGEST_LOG_DENSITY).exp() * seen.any(-1)
        lengths = edges.diff(dim=-1) * directions.norm(dim=-1, keepdim=True)
        weights = ray_weights(density, lengths)
        alpha = weights.sum(-1, keepdim=True)
        shares, opacity = (x[..., None].to(features) for x in (weights, alpha[..., 0]))
        if context is None:
            met = F.linear((shares * features).sum(1), self.out.weight) + opacity * self.out.bias
        else:
            met = (shares * context(self.out(features))).sum(1)
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
    ) -> tuple[Tensor, Tensor]:  # [P, S, R, m], [P, S, R] whether the reference shows the place
        """What each reference says about each place."""
        T = references.T_camera_world.to(places)
        R, shift = T[:, :3, :3], T[:, :3, 3]
        there = torch.einsum("psj,rij->psri", places, R) + shift
        eyes = torch.einsum("pj,rij->pri", origins, R) + shift
        towards = torch.einsum("pj,rij->pri", F.normalize(directions, dim=-1), R)
        pluecker = torch.cat([towards, torch.linalg.cross(eyes, towards)], -1)
        found, seen = read_maps(maps, references.K.to(places), there)
        given = found + self.place(encoded(there, self.PLACE).to(maps))
        given = given + self.ray(encoded(pluecker, self.RAY).to(maps))[:, None]
        return found + self.view(F.silu(given)), seen

    def _joined(
        self,
        views: Tensor,  # [P, S, R, m]
        seen: Tensor,  # [P, S, R]
        places: Tensor,  # [P, S, 3]
    ) -> tuple[Tensor, Tensor]:  # features [P, S, m], logits of density and colour [P, S, 4]
        """Places, of what the references that show them say."""
        says = self.say(F.silu(views))[..., 0].to(places)
        shares = torch.softmax(says.masked_fill(~seen, -1e9), -1) * seen
        shares = shares[..., None].to(views)
        mean = (shares * views).sum(-2)
        spread = (shares * (views - mean[..., None, :]).square()).sum(-2)
        where = self.where(encoded(places, self.WHERE).to(views))
        joined = self.trunk(F.silu(self.mean(mean) + self.spread(spread) + where))
        features = mean + joined
        return features, self.head(features).to(places)


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
