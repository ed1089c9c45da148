"""What an avatar is distilled from: colour views with cameras and masks, from Distill Avatar's sockets."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.body import Body
from ..models.cameras import Rig
from ..models.silhouettes import masks_of_views
from ..models.view_weights import ViewWeights
from ..models.views import Views, to_bytes
from . import run
from .implicit import masks_given, working_size
from .subject_inputs import SHAPES_DIFFER


def ready_views(
    views: Views, mask: Tensor | Views | None, rig: Rig | None, longest: int, notes: list[str]
) -> Views:
    """Views with masks and cameras, bytes, at most so large; one sentence for what does not belong
    together."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' hold depth, not colours: connect the performer's pictures.")
    rig = rig if rig is not None else views.rig
    if rig is None:
        raise ValueError(
            "'views' know no cameras: connect the 'rig' that belongs to them, one camera a view, from "
            "Orbit Rig for generated views, from Rig from File for footage."
        )
    masks = masks_given(views, mask, notes, "'views'")
    if masks is None:
        masks = masks_of_views(views, run.progress(len(views)))
        if masks is None:
            raise ValueError(
                "'views' have no masks, and the background is not plain enough to find the performer, "
                "so the surroundings would become part of the avatar: connect 'mask' with the "
                "performer in white, from Human Geometry or any segmentation node."
            )
        notes.append("masks were guessed from a plain background")
    return _smaller(replace(views, rig=_fitting_rig(rig, views), masks=masks), longest, notes)


def _fitting_rig(rig: Rig, views: Views) -> Rig:
    H, W = views.frames.shape[-2:]
    if len(rig) != len(views):
        raise ValueError(
            f"'rig' has {len(rig)} cameras but 'views' {len(views)} views: connect the rig that "
            "belongs to them, one camera a view in their order."
        )
    if abs(rig.width / rig.height / (W / H) - 1) > SHAPES_DIFFER:
        raise ValueError(
            f"'rig' is for pictures of {rig.width}x{rig.height} but 'views' are {W}x{H}, another "
            "shape: connect the rig of these views."
        )
    return rig.resized(W, H)


def _smaller(views: Views, longest: int, notes: list[str]) -> Views:
    """Bytes at the size that is learned; copies, as nodes' tensors can't be part of a gradient."""
    (V, count), (H, W) = views.frames.shape[:2], views.frames.shape[-2:]
    size = working_size(W, H, longest)
    frames = torch.empty(V, count, 3, size[1], size[0], dtype=torch.uint8)
    masks = torch.empty(V, count, size[1], size[0])
    for v in range(V):
        pictures, outlines = _unit(views.frames[v]), views.masks[v, :, None].float()
        if not (pictures.isfinite().all() and outlines.isfinite().all()):
            raise ValueError("'views' or their masks hold NaN or infinity: make them again.")
        frames[v] = to_bytes(_at_size(pictures, size))
        masks[v] = _at_size(outlines, size)[:, 0].clamp(0, 1)
    if size != (W, H):
        notes.append(f"learned at {size[0]}x{size[1]} instead of {W}x{H}")
    rig = views.rig.resized(*size)
    rig = replace(rig, K=rig.K.clone(), T_camera_world=rig.T_camera_world.clone())
    return Views(frames, masks, rig, views.fps)


def _unit(frames: Tensor) -> Tensor:
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()


def _at_size(pictures: Tensor, size: tuple[int, int]) -> Tensor:  # [F, C, H, W], (width, height)
    if pictures.shape[-2:] == size[::-1]:
        return pictures
    return F.interpolate(pictures, size[::-1], mode="area")


def own_body(body: Body | None) -> Body | None:
    """A copy outside inference mode."""
    if body is None:
        return None
    parts = {k: v.clone() for k, v in vars(body).items() if torch.is_tensor(v)}
    return replace(body, **parts)


def values_of(weights: ViewWeights | None, views: Views) -> Tensor | None:  # [V]
    """What every view counts, checked to be of these views."""
    if weights is None:
        return None
    if len(weights.values) != len(views):
        raise ValueError(
            f"'weights' are of {len(weights.values)} views, but 'views' are {len(views)}: connect View "
            "Weights with the rig of these views."
        )
    return weights.values.float().clone()
