"""Pose-dependent detail of an avatar: a small U-Net on maps of the skin.

Stage: skin of a moment -> maps of how it has moved -> offsets of every Gaussian's place, turn, scale
and colour, in the template's axes (CAP4D's recipe as MVP4D uses it).

Maps: a Body has no texture coordinates, so the skin is charted by looking at the template from the
front and from the back along z, without perspective. The two charts lie on each other as channels of
one map, so that convolutions see both sides; where the skin turns from one to the other both are
read, so that no seam is seen. A map's input is, per spot: how far the skin is from the placed
template, in the axes of the skin there; and its normal in the world, which tells the light.

Our reading of what keeps offsets small on poses that were never seen: they are bounded, and inputs
are held within what training showed at each spot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .avatar_mesh import SkinPose, SkinSpots
from .body import place_template, vertex_areas
from .fit_body import triangle_normals
from .performer import vertex_normals
from .quats import multiplied, rotvecs_to_quats, turned
from .rasterize_mesh import rasterize_mesh
from .splats import C0, Splats

MARGIN = 2
"""Texels that stay free at the map's edges."""
TURNS_OVER = 0.3
"""Where the template's normals have a z between this and its negative, both charts count."""
AWAY = 10.0
"""Heights between the template and the eye that charts it: depths stay exact in float32."""
WIDTHS = (16, 32, 64, 64)
"""Channels of the U-Net at strides 1, 2, 4, 8."""
GROUPS = 4
"""In which channels are brought to one scale: without, maps of small numbers fade on their way through
the net, and it learns next to nothing."""
MOVE, TURN, GROW, TINT = 0.02, 0.5, 0.5, 0.25
"""The largest offsets: of places in heights of the template, radians, logarithms, colour 0..1."""


class Atlas:
    """The skin of a template as two charts of [height, width] texels: 0 = front (-z), 1 = back."""

    def __init__(self, rest: Tensor, faces: Tensor, size: int = 128) -> None:  # [N, 3], [M, 3]
        if size < 8 or size % 8:
            raise ValueError(f"The maps of an avatar need a size that 8 divides, got {size}.")
        self.faces = faces
        low, high = rest.amin(0), rest.amax(0)
        self.middle = (low + high)[:2] / 2
        self.texel = float((high - low)[:2].amax()) / (size - 2 * MARGIN)
        """Metres."""
        sides = ((high - low)[:2] / self.texel + 2 * MARGIN) / 8
        self.width, self.height = (8 * int(side) for side in sides.ceil())
        self.normals = vertex_normals(rest[None], faces)[0]
        drawn = [self._chart(rest, faces, back) for back in (False, True)]
        self.corners, self.weights, self.covered = (
            torch.stack(t) for t in zip(*drawn, strict=True)
        )

    def _texels(self, points: Tensor) -> Tensor:  # [n, 3] -> [n, 2] texels, centres at +0.5
        size = points.new_tensor([self.width, self.height])
        return (points[:, :2] - self.middle) / self.texel + size / 2

    def _chart(self, rest: Tensor, faces: Tensor, back: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Corners and weights [h, w, 3] of the skin at every texel; at uncovered ones, of the nearest
        that is covered; and which are covered [h, w]."""
        from scipy.ndimage import distance_transform_edt

        facing = (triangle_normals(rest[faces])[:, 2] > 0) == back
        faces = faces[facing]
        # What is looked at from so far away, enlarged with its distance, has no perspective.
        deep = -rest[:, 2:] if back else rest[:, 2:]
        z = deep + AWAY * float(rest[:, 1].amax() - rest[:, 1].amin())
        eye = torch.cat([self._texels(rest) * z, z], 1)
        seen = rasterize_mesh(eye, faces, torch.eye(3).to(eye), self.width, self.height)
        covered = seen.faces >= 0
        if not covered.any():  # a flat template: nothing of it shows to this side
            zeros = rest.new_zeros(self.height, self.width, 3)
            return zeros.long(), zeros, covered
        nearest = distance_transform_edt(
            ~covered.cpu().numpy(), return_distances=False, return_indices=True
        )
        row, column = torch.from_numpy(nearest).long().to(rest.device)
        return faces[seen.faces[row, column]], seen.barycentrics[row, column], covered

    def drawn(self, values: Tensor) -> Tensor:  # [N, C] of the vertices -> [2, C, h, w]
        """Maps of what the vertices hold."""
        return (values[self.corners] * self.weights[..., None]).sum(3).movedim(-1, 1)

    def places(self, spots: SkinSpots) -> AtlasPlaces:
        """Where Gaussians lie on the maps."""
        size = spots.anchors.new_tensor([self.width, self.height])
        at = 2 * self._texels(spots.anchors) / size - 1
        towards = F.normalize(spots.of(self.normals), dim=1)[:, 2]
        over = (0.5 + towards / (2 * TURNS_OVER)).clamp(0, 1)
        return AtlasPlaces(at, over * over * (3 - 2 * over))


@dataclass(frozen=True)
class AtlasPlaces:
    """Where n Gaussians lie on the maps."""

    at: Tensor
    """[n, 2] x right, y down, -1..1 from edge to edge."""
    back: Tensor
    """[n] 0..1, the share of the chart of the back."""

    def read(self, maps: Tensor) -> Tensor:  # [2, C, h, w] -> [n, C]
        """Between texels linearly."""
        grid = self.at.expand(2, 1, -1, 2)
        front, back = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0]
        return torch.lerp(front, back, self.back).T

    def select(self, chosen: Tensor) -> AtlasPlaces:
        """Those of some Gaussians: by number or by mask."""
        return AtlasPlaces(self.at[chosen], self.back[chosen])


INPUTS = 6
"""Displacement in skin axes (heights) and normal in the world, per chart."""


def moved_maps(
    atlas: Atlas,
    rest: Tensor,  # [N, 3]
    pose: SkinPose,
) -> Tensor:  # [2, INPUTS, h, w]
    """How the skin has moved against the template, placed as near as it can be."""
    placed = place_template(rest, pose.vertices[None], vertex_areas(rest, atlas.faces))
    shift = pose.vertices - (rest @ placed.rotations[0].T + placed.offsets[0])
    back = pose.quats * pose.quats.new_tensor([1.0, -1, -1, -1])
    height = rest[:, 1].amax() - rest[:, 1].amin()
    return atlas.drawn(torch.cat([turned(back, shift) / height, pose.normals], 1))


OUTPUTS = {"move": 3, "turn": 3, "grow": 3, "tint": 3}
LIMITS = {"move": MOVE, "turn": TURN, "grow": GROW, "tint": TINT}


class DetailNet(nn.Module):
    """Maps of the skin -> maps of offsets, each within its limit. Without training it changes
    nothing."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ways = [2 * INPUTS, *WIDTHS]
            self.down = nn.ModuleList(
                nn.Conv2d(a, b, 3, 1 if i == 0 else 2, 1)
                for i, (a, b) in enumerate(zip(ways[:-1], ways[1:], strict=True))
            )
            self.up = nn.ModuleList(
                nn.Conv2d(b + a, a, 3, padding=1)
                for a, b in zip(WIDTHS[-2::-1], WIDTHS[:0:-1], strict=True)
            )
            for conv in (*self.down, *self.up):
                nn.init.kaiming_normal_(conv.weight)
                nn.init.zeros_(conv.bias)
            self.last = nn.Conv2d(WIDTHS[0], 2 * sum(OUTPUTS.values()), 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        limits = torch.cat([torch.full((n,), LIMITS[name]) for name, n in OUTPUTS.items()])
        self.register_buffer("limits", limits[:, None, None], persistent=False)

    def forward(self, maps: Tensor) -> Tensor:  # [2, INPUTS, h, w] -> [2, sum of OUTPUTS, h, w]
        x, passed = maps.flatten(0, 1)[None], []
        for conv in self.down:
            x = F.silu(F.group_norm(conv(x), GROUPS))
            passed.append(x)
        for conv, beside in zip(self.up, passed[-2::-1], strict=True):
            x = F.interpolate(x, beside.shape[-2:], mode="bilinear", align_corners=False)
            x = F.silu(F.group_norm(conv(torch.cat([x, beside], 1)), GROUPS))
        return self.limits * self.last(x)[0].unflatten(0, (2, -1)).tanh()


@dataclass(frozen=True)
class Shown:
    """What training showed of the maps."""

    low: Tensor
    """[2, INPUTS, h, w]"""
    high: Tensor
    """[2, INPUTS, h, w]"""

    def hold(self, maps: Tensor) -> Tensor:
        """Maps of any pose, held within it."""
        return torch.minimum(torch.maximum(maps, self.low), self.high)


def shown_by(maps: list[Tensor]) -> Shown:
    """The range of the maps of all frames."""
    stacked = torch.stack(maps)
    return Shown(stacked.amin(0), stacked.amax(0))


def detailed(
    splats: Splats,  # [n] on the template
    offsets: Tensor,  # [n, sum of OUTPUTS]
    height: float,  # metres, the template's
) -> Splats:
    """Gaussians with their offsets, still on the template."""
    move, turn, grow, tint = offsets.split(list(OUTPUTS.values()), 1)
    sh = torch.cat([splats.sh[:, :1] + tint[:, None] / C0, splats.sh[:, 1:]], 1)
    return Splats(
        splats.means + height * move,
        multiplied(rotvecs_to_quats(turn), splats.rotations),
        splats.log_scales + grow,
        splats.opacities,
        sh,
    )


LAPLACIAN, RELATIVE, TURNING = 1.0, 0.4, 0.005
"""Published weights of the three losses that keep offsets calm."""


def calm_loss(
    offsets: Tensor,  # [2, sum of OUTPUTS, h, w]
    atlas: Atlas,
) -> Tensor:
    """Mean squares, of offsets in their limits: their Laplacian over the skin, 1.0; their difference
    between neighbouring texels, 0.4 (our reading of relative deformation); turns, 0.005."""
    limits = torch.cat([offsets.new_full((n,), LIMITS[name]) for name, n in OUTPUTS.items()])
    shares = offsets / limits[:, None, None]
    there = atlas.covered[:, None]

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return (values.square() * where).sum() / (where.sum() * values.shape[1]).clamp(min=1)

    across, down = shares.diff(dim=3), shares.diff(dim=2)
    there_x, there_y = there[..., 1:] & there[..., :-1], there[..., 1:, :] & there[..., :-1, :]
    relative = mean(across, there_x) + mean(down, there_y)
    bend_x, bend_y = across.diff(dim=3)[:, :, 1:-1], down.diff(dim=2)[..., 1:-1]
    inner = there_x[:, :, 1:-1, 1:] & there_x[:, :, 1:-1, :-1]
    inner = inner & there_y[..., 1:, 1:-1] & there_y[..., :-1, 1:-1]
    laplacian = mean(bend_x + bend_y, inner)
    start = OUTPUTS["move"]
    turning = mean(shares[:, start : start + OUTPUTS["turn"]], there)
    return LAPLACIAN * laplacian + RELATIVE * relative + TURNING * turning
