"""Whether what the model is told belongs together: one sentence each where it does not."""

from collections.abc import Iterator

from comfy import model_base
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..models.cameras import Rig
from ..models.views import Views
from . import patch
from .views import check_rig

PLAIN_MODELS = (
    model_base.WAN21, model_base.WAN21_Vace, model_base.WAN21_Camera, model_base.WAN22,
)  # fmt: skip
"""Read the conditions below and no others; speech and character models have more of their own."""


def check_conditions(
    model: ModelPatcher,
    positive: list,
    negative: list,  # empty where it is not used
    samples: Tensor,  # [V, C, T, h, w]
    rig: Rig | None = None,
) -> None:
    """One sentence when model, conditions, latent and rig don't belong together.

    ComfyUI itself repeats, cuts off and leaves out without a word what has another number of views
    or what the model can't take.
    """
    channels = patch.input_channels(model)
    check_rig(rig, samples)
    wanted = model.model.latent_format.latent_channels
    if samples.shape[1] != wanted:
        raise ValueError(
            f"The latent has {samples.shape[1]} channels but the model works on {wanted}: make it "
            "with the VAE that belongs to the model."
        )
    check_texts(len(samples), positive=positive, negative=negative)
    if channels != wanted and type(model.model) in PLAIN_MODELS:
        _check_told_of_views(positive, channels)
    for socket, conditions in (("positive", positive), ("negative", negative)):
        for text, values in conditions:
            _check_text_encoder(model, socket, text)
            _check_model_takes(model, socket, values)
            _check_channels(values, channels, wanted)
            for name, told, size in _told(values):
                _check_size(name, socket, (len(told), *size), samples)


def _check_text_encoder(model: ModelPatcher, socket: str, text: Tensor) -> None:
    reads = getattr(model.get_model_object("diffusion_model"), "text_dim", text.shape[-1])
    if text.shape[-1] != reads:
        raise ValueError(
            f"'{socket}' has {text.shape[-1]} numbers a token but the model reads {reads}: load the "
            "text encoder that belongs to the model, umt5_xxl with type wan."
        )


def _told(values: dict) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Everything that has a row a view: its name, itself, and what of T, h, w it must share."""
    if (image := values.get("concat_latent_image")) is not None:
        yield "view conditions", image, tuple(image.shape[2:])
    if (mask := values.get("concat_mask")) is not None:
        yield "masks of the view conditions", mask, ()
    for frames, mask in zip(
        *(values.get(k, ()) for k in ("vace_frames", "vace_mask")), strict=True
    ):
        yield "VACE conditions", frames, tuple(frames.shape[2:])
        yield "VACE masks", mask, tuple(mask.shape[2:])
    if (seen := values.get("clip_vision_output")) is not None:
        yield "CLIP Vision pictures", seen.penultimate_hidden_states, ()
    for reference in values.get("reference_latents", ())[-1:]:  # the model reads the last alone
        yield "reference pictures", reference, tuple(reference.shape[-2:])
    if (cameras := values.get("camera_conditions")) is not None:
        *_, T, H, W = cameras.shape
        yield "camera conditions", cameras, (T, H // 8, W // 8)


def _measured(views: int, *size: int) -> str:
    """Views and, if they are known, latent frames and size, in words."""
    words = f"{views} views" if views != 1 else "1 view"
    if len(size) == 3:
        words += f" x {size[0]} latent frames"
    return words + (f" of {size[-1]}x{size[-2]}" if size else "")


def _check_size(name: str, socket: str, brought: tuple[int, ...], samples: Tensor) -> None:
    """`brought`: views, then none, h w, or T h w."""
    views, *size = brought
    shared = samples.shape[samples.ndim - len(size) :]
    if views not in (1, len(samples)) or tuple(size) != tuple(shared):
        raise ValueError(
            f"The {name} of '{socket}' are for {_measured(views, *size)} but the latent has "
            f"{_measured(len(samples), *shared)}: use the latent and the conditions of one "
            "conditioning node."
        )


def _check_model_takes(model: ModelPatcher, socket: str, values: dict) -> None:
    """What this kind of model would leave out without a word."""
    dit = model.get_model_object("diffusion_model")
    if "vace_frames" in values and not hasattr(dit, "vace_patch_embedding"):
        raise ValueError(
            f"'{socket}' brings VACE conditions but the model is no VACE model: load one such as "
            "wan2.1_vace_1.3B."
        )
    if type(model.model) not in PLAIN_MODELS:
        return
    if "reference_latents" in values and getattr(dit, "ref_conv", None) is None:
        raise ValueError(
            f"'{socket}' brings a reference picture but the model has no place for one: load "
            "Fun-Control 1.1 or later, or leave 'reference' free."
        )
    if "camera_conditions" in values and not hasattr(dit, "control_adapter"):
        raise ValueError(
            f"'{socket}' brings camera conditions but the model is no Fun-Camera model: load one "
            "such as wan2.1_fun_camera_v1.1_1.3B."
        )


CONDITIONS_FOR = {
    36: "connect Multi-View I2V Conditioning",
    48: "connect Multi-View Conditioning, or Multi-View Fun-Control Conditioning for a Fun-Control "
    "model",
    52: "connect Multi-View Fun-Control Conditioning",
}
"""Input channels of a model -> what it is to be told of the views."""


def _check_told_of_views(positive: list, channels: int) -> None:
    if all("concat_latent_image" not in values for _, values in positive):
        fix = CONDITIONS_FOR.get(channels, "connect the conditioning node made for it")
        raise ValueError(
            f"The model takes {channels} channels but 'positive' carries no view conditions: {fix}."
        )


def _check_channels(values: dict, channels: int, own: int) -> None:
    """`channels` that the model takes, `own` of the latent among them."""
    if "concat_latent_image" not in values:
        return
    brought = own + values["concat_latent_image"].shape[1]
    if channels not in (brought, brought + patch.MASK_CHANNELS):
        raise ValueError(
            f"The model takes {channels} input channels but latent and conditions bring {brought}: "
            "load the kind of model that the conditioning node is for."
        )


def check_same_views(**given: Views | None) -> None:
    """One sentence when VIEWS that belong together differ in views, frames or size."""
    shapes = {name: views.frames.shape for name, views in given.items() if views is not None}
    (first, a), *others = shapes.items()
    for name, b in others:
        if (*a[:2], *a[3:]) != (*b[:2], *b[3:]):
            raise ValueError(
                f"'{first}' has {a[0]} views x {a[1]} frames of {a[4]}x{a[3]} but '{name}' "
                f"{b[0]} x {b[1]} of {b[4]}x{b[3]}: draw both for the same rig and clip."
            )


def check_texts(views: int, **conditions: list) -> None:
    """One sentence when there are texts for another number of views."""
    for socket, given in conditions.items():
        for text, _ in given:
            if len(text) not in (1, views):
                raise ValueError(
                    f"'{socket}' brings {len(text)} texts but there are {views} views: give one "
                    "text for all, or connect the same rig to View Prompts."
                )
