"""Depth-aware feature rendering: one view's features, laid on its depth, as the other views see them.

Stage: anchor's features + depth + rig -> features of all views, inside a sampling step (MVCustom,
depth-aware feature rendering). The anchor's depth becomes a mesh, cut where depth jumps; rendered
into another view it says which of the anchor's tokens show in each of that view's tokens. There
the anchor's features replace the view's own, F = M F_rendered + (1 - M) F. Geometry is the same at
every step and in every block, so it is rendered once, into one sparse matrix.

Polarity: M is 1 where the anchor's surface is seen. The pictures published with the paper show its
complement. Where there is no depth (a background) there is no mesh, and M is 0.

What may be carried is free of the sampler's noise: the features of a feature field, or predicted clean
latents. The tokens of a model's own stream hold its noisy input as well; carried, they put the
anchor's noise into other views.

Camera frame: OpenCV, any unit of length; pixel centres at +0.5. Departures from the paper:

- Every pixel of the depth is a square of its own, as large as the pixel, and joined squares share
  corners. Triangles between pixel centres would lose half a pixel along every outline; the depth of
  a feature field is nearly as coarse as the tokens, where that is half a token.
- Only the outer side carries features; where the inner one is nearest, M is 0. On four synthetic
  people with exact depth, 25 % of what a camera at 90 degrees took for seen was not, and 71 % at 120
  degrees; so it is 5 and 8 %. Walls that stop lines of sight behind cut edges were tried, too: at 60
  degrees they took 7 to 14 % of what is truly seen, and a quarter to a third of the 4 % that are not,
  so there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .cameras import Rig
from .points import GRAZING_COSINE, edge_jump
from .rasterize_mesh import rasterize_mesh

DETAIL = 8
"""Depth pixels along a token that are enough; finer depth is thinned out."""
SAMPLES = 8
"""Along a token of the view that is rendered into."""
STEEPEST_OF_COARSE = 1.73
"""Rise per footprint of a pixel up to which neighbours are joined however coarse the depth is: 60
degrees. In coarse depth, what is one surface differs by more from pixel to pixel."""
COVERED = 0.5
"""Share of a token's samples that must show the anchor's surface for M to be 1."""


@dataclass(frozen=True)
class FeatureMesh:
    """What an anchor saw at one moment, as a surface."""

    corners: Tensor
    """[N, 3] anchor's camera frame."""
    places: Tensor
    """[N, 2] x, y of the corner in the anchor's picture, 0..1."""
    faces: Tensor
    """[M, 3] int64, clockwise in the anchor's picture."""
    carries: Tensor
    """[M] bool: False = seen too flat, hides what is behind but has no features."""


def _neighbour(values: Tensor, dy: int, dx: int) -> Tensor:  # [H, W]; 0 beyond the border
    H, W = values.shape
    return F.pad(values, (1, 1, 1, 1))[1 + dy : 1 + dy + H, 1 + dx : 1 + dx + W]


def _joined(depth: Tensor, dy: int, dx: int, jump: float) -> Tensor:  # [H, W] bool
    """Whether a pixel and its neighbour are one surface; depth 0 = nothing."""
    other = _neighbour(depth, dy, dx)
    near = torch.minimum(depth, other)
    return (near > 0) & ((depth - other).abs() < jump * near)


def _slope(inverse: Tensor, depth: Tensor, jump: float, dy: int, dx: int) -> Tensor:  # [H, W]
    """How inverse depth changes a pixel, from the sides on which the surface goes on."""
    before, after = _joined(depth, -dy, -dx, jump), _joined(depth, dy, dx, jump)
    rise = torch.where(after, _neighbour(inverse, dy, dx) - inverse, 0.0)
    rise = rise + torch.where(before, inverse - _neighbour(inverse, -dy, -dx), 0.0)
    return rise / (before.float() + after.float()).clamp(min=1)


CORNERS = ((0, 0), (0, 1), (1, 1), (1, 0))
"""y, x of a pixel's corners, clockwise in the picture."""


def corner_depths(
    depth: Tensor,  # [H, W], 0 = nothing
    jump: float,  # share of the depth by which neighbours of one surface differ at most
) -> Tensor:  # [4, H, W]; 0 where there is no depth
    """Depth at every pixel's own four corners: the mean of what joined pixels say.

    In inverse depth, which is linear over the picture of a plane, so that planes are exact.
    """
    inverse = torch.where(depth > 0, 1 / depth.clamp(min=1e-12), 0.0)
    across, down = (_slope(inverse, depth, jump, *step) for step in ((0, 1), (1, 0)))
    found = []
    for y, x in CORNERS:
        total, count = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for dy, dx in ((0, 0), (0, 2 * x - 1), (2 * y - 1, 0), (2 * y - 1, 2 * x - 1)):
            said = inverse + (x - 0.5 - dx) * across + (y - 0.5 - dy) * down
            joined = _joined(depth, dy, dx, jump)
            total = total + torch.where(joined, _neighbour(said, dy, dx), 0.0)
            count = count + joined
        # No corner is off by more than a neighbour may be: slopes of noise can be anything.
        mean = (total / count.clamp(min=1)).clamp(inverse * (1 - jump), inverse * (1 + jump))
        found.append(torch.where(depth > 0, 1 / mean.clamp(min=1e-12), 0.0))
    return torch.stack(found)


def feature_mesh(
    depth: Tensor,  # [H, W] along the optical axis; 0 = nothing there
    K: Tensor,  # [3, 3] pixels of the depth
) -> FeatureMesh:
    """The seen surface, cut where depth jumps."""
    focal, (H, W) = float(K[0, 0]), depth.shape
    jump = max(edge_jump(focal), STEEPEST_OF_COARSE / focal)
    y, x = depth.nonzero(as_tuple=True)
    pixels = torch.stack([x, y], 1)[:, None] + torch.tensor(CORNERS, device=x.device).flip(1)
    rays = torch.linalg.solve(K, F.pad(pixels.to(K), (0, 1), value=1.0).mT).mT
    corners = rays * corner_depths(depth, jump)[:, y, x].T[..., None]  # [n, 4, 3]
    a, b, c, d = (4 * torch.arange(len(y), device=y.device) + k for k in range(4))
    return FeatureMesh(
        corners.flatten(0, 1),
        (pixels / pixels.new_tensor([W, H])).flatten(0, 1),
        torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)]),
        (_cosine(corners) > GRAZING_COSINE).repeat(2),
    )


def _cosine(corners: Tensor) -> Tensor:  # [n, 4, 3] -> [n]
    """Between a square's normal and the line of sight to its middle."""
    a, b, c, d = corners.unbind(1)
    normals = torch.linalg.cross(c - a, d - b)
    return F.cosine_similarity(normals, corners.mean(1), dim=1)


@dataclass(frozen=True)
class Carried:
    """Which of the anchor's tokens show in every token of every view."""

    shares: Tensor
    """[n, T h w] sparse float32, a row for every seen token, in the order of `seen`: of its samples
    that show the anchor's surface, how many show each of the anchor's tokens; sums to 1."""
    seen: Tensor
    """[V, T, h, w] bool, M: True = the anchor's surface is seen here."""
    anchor: int
    """The view whose features are carried."""

    def to(self, device: torch.device) -> Carried:
        return Carried(self.shares.to(device), self.seen.to(device), self.anchor)

    def rendered(
        self,
        features: Tensor,  # [n, T h w, C] the anchor's
    ) -> Tensor:  # [n, V, T h w, C] of all views, the anchor too; 0 where M is 0
        """F_rendered."""
        made = features.new_zeros(len(features), self.seen.numel(), features.shape[-1])
        made[:, self.seen.flatten()] = self._of_seen(features)
        return made.unflatten(1, (len(self.seen), -1))

    def _of_seen(self, features: Tensor) -> Tensor:  # [n, T h w, C] -> [n, seen tokens, C]
        """Summed in float32 whatever the features are: half precision has no sparse product."""
        columns = rearrange(features.float(), "n l c -> l (n c)")
        made = torch.sparse.mm(self.shares, columns).to(features.dtype)
        return rearrange(made, "l (n c) -> n l c", n=len(features))

    def replaced(
        self,
        features: Tensor,  # [n, V, T h w, C] of all views
    ) -> Tensor:
        """F = M F_rendered + (1 - M) F; the anchor itself stays as it is, to the bit."""
        V, L = self.seen.flatten(1).shape
        if features.dim() != 4 or features.shape[1:3] != (V, L):
            raise ValueError(
                f"Depth-aware rendering was made for {V} views of {L} tokens, but the model works "
                f"on features of {list(features.shape[1:3])}: make it anew with the rig and the "
                "size of this latent."
            )
        own = features[:, self.anchor]
        out = features.clone(memory_format=torch.contiguous_format)
        out.flatten(1, 2)[:, self.seen.flatten()] = self._of_seen(own)
        out[:, self.anchor] = own
        return out

    def newly_visible(self) -> Tensor:  # [V, T, h, w] bool
        """The complement of M in all views but the anchor: what the anchor can't tell about."""
        unseen = ~self.seen
        unseen[self.anchor] = False
        return unseen


def middle_view(rig: Rig) -> int:
    """The view nearest to all others by angle, of equals the first: the published anchor is the
    middle one of an arc."""
    towards = F.normalize(rig.centers.double(), dim=1)
    away = torch.arccos((towards @ towards.T).clamp(-1, 1)).sum(1)
    return int((away <= away.min() + 1e-4).nonzero()[0])


def carried(
    depth: Tensor,  # [T, H, W] the anchor's along its optical axis, a map a latent frame
    rig: Rig,  # V cameras, of pictures that the tokens divide without rest
    anchor: int,
    grid: tuple[int, int],  # h, w: tokens of a view
) -> Carried:
    """Render the anchor's surface into all views, at every moment.

    Depth that is not finite or <= 0 is no surface. It may have any size of the pictures' shape.
    """
    _check(depth, rig, anchor)
    h, w = grid
    depth = _thinned(torch.where(depth.isfinite() & (depth > 0), depth, 0.0).float(), grid)
    V, T, (H, W) = len(rig), len(depth), depth.shape[1:]
    own, fine = rig.select([anchor]).resized(W, H), rig.resized(w * SAMPLES, h * SAMPLES)
    to_views = fine.T_camera_world @ torch.linalg.inv(own.T_camera_world)
    views, sources = [], []
    for t in depth.flatten(1).any(1).nonzero()[:, 0].tolist():
        mesh = feature_mesh(depth[t], own.K[0].to(depth))
        for v in range(V):
            here, there = _shown(mesh, to_views[v].to(depth), fine.K[v].to(depth), grid)
            views.append((v * T + t) * h * w + here)
            sources.append(t * h * w + there)
    return _gathered(torch.cat(views), torch.cat(sources), (V, T, h, w), anchor)


def _check(depth: Tensor, rig: Rig, anchor: int) -> None:
    """One sentence when depth, rig and anchor don't belong together."""
    if not 0 <= anchor < len(rig):
        raise ValueError(
            f"'anchor' is view {anchor}, but the rig has {len(rig)} views: give 0 to {len(rig) - 1}."
        )
    if not (depth.isfinite() & (depth > 0)).any():
        raise ValueError(
            "'depth' holds nothing above 0, so there is no surface that features could be laid on: "
            "give the distance along the optical axis, 0 where nothing is (of a subject's depth: let "
            "Train Subject take more steps)."
        )
    H, W = depth.shape[-2:]
    # As far from the pictures' shape as rounding the smaller one's sides may bring it.
    if abs(W / H / (rig.width / rig.height) - 1) > 1.5 / min(H, W):
        raise ValueError(
            f"'depth' is {W}x{H} but the rig's pictures are {rig.width}x{rig.height}, another shape: "
            "give depth of the anchor's whole picture."
        )


def _thinned(depth: Tensor, grid: tuple[int, int]) -> Tensor:  # [T, H, W]
    """Every so many pixels; means would put pixels between a near and a far surface."""
    H, W = (min(size, DETAIL * cells) for size, cells in zip(depth.shape[1:], grid, strict=True))
    return F.interpolate(depth[:, None], (H, W), mode="nearest-exact")[:, 0]


def _shown(
    mesh: FeatureMesh,
    T_view_anchor: Tensor,  # [4, 4]
    K: Tensor,  # [3, 3] samples
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # [n] token of the view, [n] token of the anchor
    """Of every sample that shows the anchor's surface: where it is, and what it shows."""
    h, w = grid
    corners = mesh.corners @ T_view_anchor[:3, :3].mT + T_view_anchor[:3, 3]
    found = rasterize_mesh(corners, mesh.faces, K, w * SAMPLES, h * SAMPLES)
    a, b, c = corners[mesh.faces].unbind(1)
    # The outer side is where the corners run clockwise, as they do for the anchor.
    outer = (torch.linalg.cross(b - a, c - a) * a).sum(1) > 0
    hit = found.faces >= 0
    told = (outer & mesh.carries)[found.faces[hit]]
    y, x = (part[told] for part in hit.nonzero(as_tuple=True))
    places = found.interpolate_hits(mesh.places, mesh.faces)[told]
    column, row = (places * places.new_tensor([w, h])).long().unbind(1)
    there = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)
    return torch.div(y, SAMPLES, rounding_mode="floor") * w + x // SAMPLES, there


def _gathered(
    views: Tensor,  # [n] token of all views, a sample each
    sources: Tensor,  # [n] token of the anchor that the sample shows
    shape: tuple[int, int, int, int],  # V, T, h, w
    anchor: int,
) -> Carried:
    """Samples to shares, of tokens of which enough samples show something."""
    V, T, h, w = shape
    count = torch.bincount(views, minlength=V * T * h * w)
    seen = count >= COVERED * SAMPLES**2
    kept = seen[views]
    views, sources = views[kept], sources[kept]
    row = seen.cumsum(0) - 1
    shares = torch.sparse_coo_tensor(
        torch.stack([row[views], sources]), 1 / count[views].float(),
        (int(seen.sum()), T * h * w), check_invariants=True,
    ).coalesce()  # fmt: skip
    return Carried(shares, seen.view(shape), anchor)
