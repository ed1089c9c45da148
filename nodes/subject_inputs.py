"""What a subject is learned from: pictures, masks and cameras of Train Subject's sockets, and what the model
is told beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ..models.cameras import Rig
from ..models.silhouettes import masks_of_views
from ..models.subject import Pictures, Subject, pictures_of
from ..models.subject_pictures import evenly, learning_size, turntable, usable
from ..models.views import Views, as_pictures, resize_frames
from . import run
from .check_conditions import PLAIN_MODELS, check_conditions
from .conditioning import grey, nothing_known, with_pictures
from .patch import MASK_CHANNELS, input_channels
from .views import encode_views, image_to_frames

MOST = 30
"""Pictures that a subject is learned from; as many as were published for one."""
LATENT_CHANNELS = 16
"""Of the Wan 2.1 VAE and its like, whose tokens are 16 pixels a side."""
SHAPES_DIFFER = 0.02
"""Share by which the sides' ratios of pictures and their rig may differ: rounded sizes."""
SAME_COLOR = 0.02
"""Largest difference of a token's mean color by which two pictures may be the same."""


@dataclass(frozen=True)
class Given:
    """R pictures of one size, from one moment."""

    frames: Tensor
    """[R, 3, H, W] 0..1."""
    masks: Tensor | None
    """[R, H, W] 0..1."""
    rig: Rig | None
    socket: str
    """Where they came from."""

    def select(self, chosen: list[int]) -> Given:
        return replace(
            self,
            frames=self.frames[chosen],
            masks=self.masks[chosen] if self.masks is not None else None,
            rig=self.rig.select(chosen) if self.rig is not None else None,
        )


# --- pictures, masks, cameras ---------------------------------------------------------------------


def given_pictures(
    views: Views | None, images: Tensor | None, masks: Tensor | None, rig: Rig | None, frame: int
) -> Given:
    """What is connected, checked to belong together."""
    if (views is None) == (images is None):
        came = "none of them is" if views is None else "both are"
        raise ValueError(
            f"Connect either 'views' or 'images', {came} connected: VIEWS for pictures with cameras "
            "and masks, IMAGE for a clip in which the subject turns, or photos."
        )
    if views is not None:
        given = _of_views(views, frame)
    else:
        given = Given(image_to_frames(images), None, None, "images")
    if masks is not None:
        given = replace(given, masks=_fitting_masks(masks, given))
    return replace(given, rig=_fitting_rig(rig, given)) if rig is not None else given


def _of_views(views: Views, frame: int) -> Given:
    """One moment of several views, or all frames of one view: a clip."""
    if views.frames.shape[2] != 3:
        raise ValueError("'views' hold depth, not colours: connect colour views of the subject.")
    V, count = views.frames.shape[:2]
    if V == 1 and count > 1:
        masks = views.masks[0].float() if views.masks is not None else None
        return Given(as_pictures(views, 0), masks, None, "views")
    if not 0 <= frame < count:
        raise ValueError(
            f"'frame' is {frame}, but 'views' have {count} frame{'s' if count > 1 else ''}: use 0"
            f"{f' to {count - 1}' if count > 1 else ''}."
        )
    moment = replace(views, frames=views.frames[:, frame : frame + 1], masks=None)
    masks = views.masks[:, frame].float() if views.masks is not None else None
    return Given(as_pictures(moment)[:, 0], masks, views.rig, "views")


def _fitting_masks(masks: Tensor, given: Given) -> Tensor:
    masks = masks[None] if masks.ndim == 2 else masks
    R, (H, W) = len(given.frames), given.frames.shape[-2:]
    if len(masks) != R:
        raise ValueError(
            f"'masks' has {len(masks)} masks but '{given.socket}' {R} pictures: connect one mask for "
            "each picture."
        )
    if masks.shape[1:] != (H, W):
        raise ValueError(
            f"'masks' are {masks.shape[2]}x{masks.shape[1]} but the pictures of '{given.socket}' "
            f"{W}x{H}: make the masks from the same pictures."
        )
    return masks.cpu().float()


def _fitting_rig(rig: Rig, given: Given) -> Rig:
    R, (H, W) = len(given.frames), given.frames.shape[-2:]
    if len(rig) != R:
        raise ValueError(
            f"'rig' has {len(rig)} cameras but '{given.socket}' {R} pictures: connect the rig that "
            "belongs to them, one camera for each picture in their order (Turntable Rig for a clip "
            "in which the subject turns)."
        )
    if abs(rig.width / rig.height / (W / H) - 1) > SHAPES_DIFFER:
        raise ValueError(
            f"'rig' is for pictures of {rig.width}x{rig.height} but those of '{given.socket}' are "
            f"{W}x{H}, another shape: connect the rig of these pictures."
        )
    return rig.resized(W, H)


def masked(given: Given) -> tuple[Given, str]:
    """With masks, if need be of a plain background, and a note on that."""
    if given.masks is not None:
        if not given.masks.isfinite().all():
            raise ValueError(f"The masks of '{given.socket}' hold NaN or infinity: check them.")
        return given, ""
    masks = masks_of_views(Views(given.frames[:, None]), run.progress(len(given.frames)))
    if masks is None:
        raise ValueError(
            f"'{given.socket}' has no masks, and the background is not plain enough to find the "
            "subject, so its surroundings would be learned too: connect 'masks' with the subject in "
            "white, for people from Human Geometry, for things from any segmentation node."
        )
    return replace(given, masks=masks[:, 0].float()), "masks were guessed from a plain background"


def ready_pictures(given: Given, longest: int) -> tuple[Given, str]:
    """Those that can be learned from, at the size that is learned, and a note on what was done."""
    if not given.frames.isfinite().all():
        raise ValueError(f"'{given.socket}' hold NaN or infinity: check the node before.")
    count, (H, W) = len(given.frames), given.frames.shape[-2:]
    if count < 2:
        raise ValueError(
            f"'{given.socket}' has one picture, and one shows nothing of depth: connect two or more "
            "from different sides; eight or more all round are better."
        )
    notes, guessed = [], given.rig is None
    if guessed and count > MOST:
        chosen = evenly(count, MOST)
        given = replace(given.select(chosen), rig=turntable(count, W, H, chosen=chosen))
    elif guessed:
        given = replace(given, rig=turntable(count, W, H))
    if guessed:
        notes.append(
            "no cameras are connected, so one even turn at the subject's own height was assumed "
            "(connect Turntable Rig for another)"
        )
    given, note = masked(given)
    notes.append(note)
    width, height = learning_size(W, H, longest)
    masks = resize_frames(given.masks[:, None], width, height)[:, 0].clamp(0, 1)
    given = replace(given, masks=masks, rig=given.rig.filled(width, height))
    found = usable(given.masks, given.rig, given.socket)
    notes.append(found.note)
    kept = [found.chosen[n] for n in evenly(len(found.chosen), MOST)]
    if len(kept) < len(found.chosen) or (guessed and count > MOST):
        notes.append(f"{len(kept)} of {count} are used, evenly chosen")
    given = given.select(kept)
    frames = resize_frames(given.frames.float(), width, height).clamp(0, 1)
    return replace(given, frames=frames), "; ".join(n for n in notes if n)


def encoded(given: Given, vae: VAE) -> Pictures:
    """Each picture as a clip of its own."""
    if getattr(vae, "latent_channels", LATENT_CHANNELS) != LATENT_CHANNELS:
        raise ValueError(
            f"'vae' makes latents of {vae.latent_channels} channels, but subjects are learned with "
            f"{LATENT_CHANNELS}: load the VAE of Turnaround-Tiny, or wan_2.1_vae with a model for it."
        )
    bar, count = run.progress(len(given.frames)), len(given.frames)
    latents = encode_views(vae, given.frames.split(1), count, bar)
    with torch.inference_mode(False):
        clean, frames, masks = (t.clone().cpu() for t in (latents, given.frames, given.masks))
        rig = replace(
            given.rig, K=given.rig.K.clone(), T_camera_world=given.rig.T_camera_world.clone()
        )
        return pictures_of(frames, masks, clean.float(), rig)


def check_same_pictures(subject: Subject, given: Given) -> None:
    """One sentence when a subject to go on with was learned from others."""
    seen, R = subject.pictures, len(given.frames)
    here = (R, given.rig.width, given.rig.height)
    learned = (len(seen), seen.rig.width, seen.rig.height)
    same = here == learned
    if same:
        with torch.inference_mode(False):
            now = pictures_of(given.frames.clone(), given.masks.clone(), seen.latents, given.rig)
        far = (now.rig.T_camera_world - seen.rig.T_camera_world).abs().amax()
        same = float((now.colors - seen.colors).abs().amax()) < SAME_COLOR and float(far) < 1e-3
    if not same:
        raise ValueError(
            f"'subject' was learned from other pictures ({learned[0]} of {learned[1]}x{learned[2]}) "
            f"than those of '{given.socket}' ({here[0]} of {here[1]}x{here[2]}): to go on, connect the "
            f"same or none at all; to learn these, leave 'subject' free."
        )


# --- what the model is told -----------------------------------------------------------------------


def told(
    model: ModelPatcher, vae: VAE, positive: list | None, pictures: Pictures
) -> tuple[list, str]:
    """The conditions of every picture: `positive`, and of pictures that the model reads beside the
    latent that nothing is known; with a note."""
    if type(model.model) not in PLAIN_MODELS:
        raise ValueError(
            "'model' is of a kind that also needs sound, a pose or a face, so a subject can't be "
            "learned with it: load Turnaround-Tiny or a Wan 2.1 / 2.2 text, image or control model."
        )
    own = model.model.latent_format.latent_channels
    if own != pictures.latents.shape[1]:
        raise ValueError(
            f"'vae' makes latents of {pictures.latents.shape[1]} channels, but 'model' works on {own}: "
            "load a model of Wan 2.1's latents, such as Turnaround-Tiny or any Wan but 2.2's 5B."
        )
    dit = model.get_model_object("diffusion_model")
    note = ""
    if positive is None:
        text_only = input_channels(model) == own
        note = "no text is connected, so it was learned without one" if text_only else ""
        positive = [[torch.zeros(1, 1, dit.text_dim), {}]]
    positive = _with_nothing_known(model, vae, positive, pictures)
    check_conditions(model, positive, [], pictures.latents)
    return _outside_inference(positive), note


def _with_nothing_known(model: ModelPatcher, vae: VAE, positive: list, pictures: Pictures) -> list:
    dit = model.get_model_object("diffusion_model")
    own = pictures.latents.shape[1]
    extra = input_channels(model) - own
    size = (1, pictures.rig.width, pictures.rig.height)
    has = {key for _, values in positive for key in values}
    if hasattr(dit, "vace_blocks") and "vace_frames" not in has:
        blank = grey(vae, *size).repeat(1, 2, 1, 1, 1)
        mask = torch.ones(1, 64, 1, *blank.shape[-2:])
        values = {"vace_frames": [blank], "vace_mask": [mask], "vace_strength": [1.0]}
        return node_helpers.conditioning_set_values(positive, values)
    if extra == 0 or "concat_latent_image" in has:
        return positive
    if extra == own + MASK_CHANNELS:  # image to video
        blank = grey(vae, *size)
        mask = torch.ones(1, 1, *blank.shape[2:])
        values = {"concat_latent_image": blank, "concat_mask": mask}
        return node_helpers.conditioning_set_values(positive, values)
    of_turnaround = dit.img_emb is None and dit.ref_conv is None
    if extra == 2 * own and of_turnaround:
        return with_pictures(positive, nothing_known(vae, *size))
    # Control models were shown zeros, as the model takes them, in the place of what they lacked.
    zeros = torch.zeros(1, extra // own * own, *pictures.latents.shape[2:])
    zeros = torch.cat([model.model.process_latent_out(z) for z in zeros.split(own, 1)], 1)
    return with_pictures(positive, zeros)


def _outside_inference(positive: list) -> list:
    """Copies: what nodes made can't be part of anything that has a gradient."""

    def copied(value):
        if isinstance(value, list):
            return [copied(v) for v in value]
        return value.clone() if isinstance(value, Tensor) else value

    with torch.inference_mode(False):
        return [[copied(t), {k: copied(v) for k, v in values.items()}] for t, values in positive]
