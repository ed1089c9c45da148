"""Sync weights that others trained for Wan: SynCamMaster's and 4DAnyone's.

Both put one layer into a DiT block, between self-attention and text cross-attention:
x + gate * projector(attention over the views of one latent frame), on tokens that are normalised,
modulated with rows of their own plus the first three of the block's time modulation, and (where
trained with cameras) have a linear map of the camera's twelve numbers added. Queries and keys turn by
a rotary embedding whose first axis counts the views; the other two are a token's row and column.

SynCamMaster (Wan2.1-T2V-1.3B; published as a .ckpt of the whole DiT, whose own weights stayed frozen):
blocks.<n>.mvs_attn.{q,k,v,o,norm_q,norm_k}, modulation_mvs, projector, cam_encoder. It was trained on
pairs of fixed cameras less than 30 degrees apart in azimuth and 15 in elevation.
4DAnyone (Wan2.2-TI2V-5B; published as the whole DiT with a pose encoder and a packing of reference
views, which are no part of sync): blocks.<n>.self_attn_mvs.{q,...}, modulation_mvs; a projector and a
cam_encoder only in variants that were never published. Its clean source views are numbered behind the
views that are made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .view_sync import HEAD_DIM, Layout, across_views, per_token, plain_attention

EPS = 1e-6
"""Of all norms, as in Wan."""
ROPE_BASE = 10000.0
ROPE_AXES = (HEAD_DIM - 2 * (HEAD_DIM // 3), HEAD_DIM // 3, HEAD_DIM // 3)
"""Channels of a head that turn with the view, the row and the column."""
METRES_PER_UNIT = 2.0
"""Of the twelve numbers: the training set's unit, Unreal Engine's centimetre, divided by 200."""


@dataclass(frozen=True)
class _Format:
    name: str
    attention: str
    """What the attention is called in a file."""
    whole: bool
    """Whether a projector and a camera encoder belong to every synced block."""


FORMATS = (_Format("SynCamMaster", "mvs_attn", True), _Format("4DAnyone", "self_attn_mvs", False))
_SYNC_KEY = re.compile(
    r"^(?P<prefix>(?:.*\.)?)blocks\.(?P<block>\d+)\."
    r"(?P<name>(?:mvs_attn|self_attn_mvs|projector|cam_encoder)\..+|modulation_mvs)$"
)
_SOURCE_KEY = re.compile(r"blocks\.\d+\.(?:self_attn|cross_attn|modulation)_src\b")


def camera_numbers(
    T_camera_world: Tensor,  # [V, 4, 4] OpenCV, metres
    first: int,  # the view that the others are seen from
) -> Tensor:  # [V, 12]
    """The camera of each view as SynCamMaster's training had it.

    The pose of its camera in the frame of the first one (x right, y down, z forward), T_first_camera:
    three rows of four, row by row, rotation and position, in units of two metres. The first camera
    itself is the identity. 4DAnyone's own reading isn't public; it is taken to be the same.
    """
    R, t = T_camera_world[:, :3, :3].float(), T_camera_world[:, :3, 3:].float()
    rotation = R[first] @ R.mT
    position = (t[first] - rotation @ t) / METRES_PER_UNIT
    return torch.cat([rotation, position], dim=2).flatten(1)


def _turns(positions: Tensor, channels: int, device: torch.device) -> Tensor:
    """[P] positions on one axis -> [P, channels / 2] unit complex numbers."""
    # Angles in float64 on the CPU: not every device has it.
    rates = ROPE_BASE ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.outer(positions.cpu().double(), rates)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)


def view_rope(
    numbers: Tensor,  # [V] the place of each view among the views
    height: int,  # of a latent frame, in tokens
    width: int,
    device: torch.device,
) -> Tensor:  # [V, h w, d / 2] complex
    """How the channels of a head turn, pair by pair: the view's number, then row and column."""
    view, row, column = (
        _turns(positions, channels, device)
        for positions, channels in zip(
            (numbers, torch.arange(height), torch.arange(width)), ROPE_AXES, strict=True
        )
    )
    full = (len(numbers), height, width, -1)
    parts = (view[:, None, None], row[None, :, None], column[None, None])
    return torch.cat([part.expand(full) for part in parts], dim=-1).flatten(1, 2)


def turned(
    x: Tensor,  # [n V, T h w, C]
    rope: Tensor,  # [V, h w, d / 2] complex
) -> Tensor:
    """Every pair of neighbouring channels of every head, turned."""
    views, frame, half = rope.shape
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, half, 2)))
    pairs = pairs.unflatten(1, (-1, frame)).unflatten(0, (-1, views))
    out = torch.view_as_real(pairs * rope[:, None, :, None])
    return out.flatten(0, 1).flatten(1, 2).flatten(2).to(x.dtype)


class _Attention(nn.Module):
    """The projections of multi-head attention; queries and keys normalised over all heads."""

    def __init__(self, dim: int, device, dtype, operations) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.q = operations.Linear(dim, dim, **where)
        self.k = operations.Linear(dim, dim, **where)
        self.v = operations.Linear(dim, dim, **where)
        self.o = operations.Linear(dim, dim, **where)
        self.norm_q = operations.RMSNorm(dim, eps=EPS, **where)
        self.norm_k = operations.RMSNorm(dim, eps=EPS, **where)

    def forward(self, y: Tensor, rope: Tensor, layout: Layout) -> Tensor:  # [n V, L, C] both
        q, k = turned(self.norm_q(self.q(y)), rope), turned(self.norm_k(self.k(y)), rope)
        heads = y.shape[-1] // HEAD_DIM
        return self.o(across_views(plain_attention, q, k, self.v(y), heads, layout))


class OtherSyncLayer(nn.Module):
    """One trained layer of either format, its parts named as in the file."""

    place = "before_text"

    def __init__(
        self,
        dim: int,
        attention: str,  # the name of the attention
        projector: bool,
        camera: bool,
        device=None,
        dtype=None,
        operations=nn,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.attention = attention
        self.norm = operations.LayerNorm(dim, eps=EPS, elementwise_affine=False, **where)
        self.add_module(attention, _Attention(dim, device, dtype, operations))
        self.modulation_mvs = nn.Parameter(torch.zeros(1, 3, dim, **where))
        self.projector = operations.Linear(dim, dim, **where) if projector else None
        self.cam_encoder = operations.Linear(12, dim, **where) if camera else None

    def forward(
        self,
        x: Tensor,  # [n V, L, C]
        vec: Tensor,  # [n V, 6, C] or [n V, t, 6, C], the block's time modulation
        pe: Tensor,  # the block's own rotary table, in which views don't count: not used
        layout: Layout,
    ) -> Tensor:  # [n V, L, C]
        if vec.ndim == 3:
            vec = vec[:, None]
        rows = self.modulation_mvs.to(x)[:, None] + vec[:, :, :3].to(x)
        shift, scale, gate = (per_token(r, x.shape[1]) for r in rows.unbind(2))
        y = torch.addcmul(shift, self.norm(x), 1 + scale)
        # By default views are numbered as in training: from 0 within what is sampled together.
        numbers = torch.arange(layout.views) if layout.numbers is None else layout.numbers
        if self.cam_encoder is not None:
            y = y + self._cameras(layout, numbers, y).repeat(len(y) // layout.views, 1)[:, None]
        rope = view_rope(numbers, *layout.grid[1:], x.device)
        y = self.get_submodule(self.attention)(y, rope, layout)
        if self.projector is not None:
            y = self.projector(y)
        return torch.addcmul(x, gate, y)

    def _cameras(self, layout: Layout, numbers: Tensor, like: Tensor) -> Tensor:  # [V, C]
        if layout.cameras is None:
            raise ValueError(
                "These sync weights were trained with cameras: connect the rig that made the "
                "conditions to View Sync."
            )
        return self.cam_encoder(camera_numbers(layout.cameras, int(numbers.argmin())).to(like))


class OtherSync(nn.Module):
    """The sync layers of a file of another format; keys `blocks.<block index>.<part>`."""

    def __init__(
        self, name: str, dim: int, blocks: dict[int, OtherSyncLayer], ignored: int
    ) -> None:
        super().__init__()
        self.name, self.dim = name, dim
        self.blocks = nn.ModuleDict({str(n): layer for n, layer in blocks.items()})
        self.references = nn.ModuleDict()
        self.needs_cameras = any(layer.cam_encoder is not None for layer in blocks.values())
        self.ignored = ignored
        """How many weights of the file are no part of sync: the base model's own."""


def check_name(name: str) -> None:
    """Refuses files that can run code when opened, and says how to convert them."""
    stem, end = os.path.splitext(os.path.basename(name))
    if end.lower() in (".ckpt", ".pth", ".pt", ".bin", ".pkl"):
        raise ValueError(
            f"'{stem}{end}' can run code when it is opened: use a copy in .safetensors format, or "
            "make one on your own machine with Python, safetensors.torch.save_file(torch.load("
            f"'{stem}{end}', map_location='cpu', weights_only=True), '{stem}.safetensors')."
        )


@dataclass(frozen=True)
class _File:
    format: _Format
    prefix: str
    """What stands in front of 'blocks.'."""
    blocks: dict[int, dict[str, Tensor]]
    """Of every synced block, its weights by name."""

    def key(self, block: int, name: str) -> str:
        return f"{self.prefix}blocks.{block}.{name}"


def _format(state_dict: dict[str, Tensor]) -> _Format | None:
    matches = [m for m in map(_SYNC_KEY.match, state_dict) if m]
    for known in FORMATS:
        if any(m["name"].startswith(f"{known.attention}.") for m in matches):
            return known
    return None


def of_others(state_dict: dict[str, Tensor]) -> bool:
    """Whether a file holds sync weights in one of the formats of this module."""
    return _format(state_dict) is not None


def _read(state_dict: dict[str, Tensor]) -> _File:
    known = _format(state_dict)
    if known is None:
        wanted = " or ".join(f"'blocks.<n>.{f.attention}.q.weight' ({f.name})" for f in FORMATS)
        raise ValueError(
            f"This file holds no view-sync weights of a known format (no {wanted}): choose another."
        )
    source = next((key for key in state_dict if _SOURCE_KEY.search(key)), None)
    if source is not None:
        raise ValueError(
            f"This {known.name} file was trained with a stream of source tokens ('{source}') that "
            "other models don't have: use the published file, which goes without."
        )
    blocks: dict[int, dict[str, Tensor]] = {}
    prefixes = set()
    for match in filter(None, map(_SYNC_KEY.match, state_dict)):
        blocks.setdefault(int(match["block"]), {})[match["name"]] = state_dict[match[0]]
        prefixes.add(match["prefix"])
    if len(prefixes) > 1:
        raise ValueError(
            f"This {known.name} file holds its sync weights more than once (under "
            f"{' and '.join(repr(p) for p in sorted(prefixes))}): keep one of them in the file."
        )
    # Variants of 4DAnyone give a projector to every block, those without sync included.
    marks = (f"{known.attention}.", "modulation_mvs")
    synced = {n: blocks[n] for n in sorted(blocks) if any(k.startswith(marks) for k in blocks[n])}
    return _File(known, prefixes.pop(), synced)


def _width(file: _File) -> int:
    """The model's width: every weight of the attention has as many rows."""
    rows = {
        file.key(n, name): weight.shape[0]
        for n, weights in file.blocks.items()
        for name, weight in weights.items()
        if name.startswith(f"{file.format.attention}.") and weight.ndim
    }
    key, width = next(iter(rows.items()), ("the attention", 0))
    if width == 0 or width % HEAD_DIM:
        raise ValueError(
            f"'{key}' of this {file.format.name} file has {width} rows, but the width of a Wan model "
            f"is a multiple of {HEAD_DIM}: use the file as it was published."
        )
    return width


def build(state_dict: dict[str, Tensor], device=None, dtype=None, operations=nn) -> OtherSync:
    """The sync layers of a file with their weights, or one sentence about what is wrong with it."""
    file = _read(state_dict)
    dim, layers = _width(file), {}
    for n, weights in file.blocks.items():
        has = (
            file.format.whole or any(name.startswith(part) for name in weights)
            for part in ("projector.", "cam_encoder.")
        )
        layers[n] = OtherSyncLayer(dim, file.format.attention, *has, device, dtype, operations)
        _check(file, n, layers[n].state_dict())
        layers[n].load_state_dict(weights)
    ignored = len(state_dict) - sum(map(len, file.blocks.values()))
    return OtherSync(file.format.name, dim, layers, ignored)


def _check(file: _File, block: int, wanted: dict[str, Tensor]) -> None:
    """Every weight of a block is there, none besides, each of its shape."""
    weights, name = file.blocks[block], file.format.name
    for part in [*wanted, *weights]:
        key = file.key(block, part)
        if part not in weights:
            raise ValueError(f"This {name} file has no '{key}': it is incomplete, get it anew.")
        if part not in wanted:
            raise ValueError(
                f"This {name} file has a weight too many, '{key}': use it as it was published."
            )
        if weights[part].shape != wanted[part].shape:
            raise ValueError(
                f"'{key}' of this {name} file has shape {list(weights[part].shape)} where "
                f"{list(wanted[part].shape)} is needed: use the file as it was published."
            )
