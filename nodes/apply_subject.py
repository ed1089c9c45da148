"""A learned subject in what is sampled, and what its fields see without sampling."""

import copy
import math

import comfy.model_management as mm
import comfy.model_patcher
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..models.cameras import MAX_VIEWS, Rig
from ..models.subject import TOKEN, Features, Subject, SubjectNet
from ..models.subject_views import bands, check_sees, from_nearest, look, on_grey, references_of
from ..models.views import Views
from . import run
from .patch_subject import (
    KEY,
    OFF,
    AppliedWrapper,
    Once,
    SubjectWrapper,
    blocks_of,
    end_of_share,
    with_subject,
)
from .sockets import RIG, SUBJECT, VIEWS
from .subject_lora import with_lora
from .train_subject import CATEGORY

REFERENCES = 30
"""Of the learned pictures that run through the model; each view looks at the nearest of them."""

# --- apply ----------------------------------------------------------------------------------------


class SubjectGuidance:
    """After the host's guidance: more of what the subject adds to the prompt.

    Published (CustomDiffusion360): x_u + g_text (x_c - x_i) + g_image (x_i - x_u) with x_c = text and
    subject, x_i = subject alone, x_u = neither. The host's own result is x_i + g_text (x_c - x_i), so
    (g_image - 1) (x_i - x_u) is added to it; x_i is the negative prompt, or the positive one where the
    host leaves the negative out (cfg 1), and x_u is the same without the subject.
    """

    def __init__(self, key: str, strength: float, end: float) -> None:
        self.key, self.strength, self.sigma_end = key, strength, end

    def __call__(self, args: dict) -> Tensor:
        if float(args["sigma"].flatten()[0]) < self.sigma_end:
            return args["denoised"]
        alone = args["uncond"] is None
        cond = args["cond" if alone else "uncond"]
        with_it = args["cond_denoised" if alone else "uncond_denoised"]
        options = without(args["model_options"], self.key)
        (without_it,) = comfy.samplers.calc_cond_batch(
            args["model"], [cond], args["input"], args["sigma"], options
        )
        return args["denoised"] + (self.strength - 1) * (with_it - without_it)


def without(model_options: dict, key: str) -> dict:
    """The same run without a subject; all other patches have their part in it."""
    options = model_options.get("transformer_options", {})
    off = (*options.get(OFF, ()), key)
    return {**model_options, "transformer_options": {**options, OFF: off}}


def _own(net: SubjectNet, model: ModelPatcher) -> ModelPatcher:
    """A copy that ComfyUI loads and offloads with the model; injections in the model's precision."""
    # A copy: training may go on with the original, and two models may be on two devices.
    net = copy.deepcopy(net).requires_grad_(False).eval()
    net.lora = None  # patches of the model itself
    net.injections.to(model.model.manual_cast_dtype or model.model.get_dtype())
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(net, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def _check(model: ModelPatcher, subject: Subject, rig: Rig) -> None:
    blocks_of(model)
    channels = model.model.latent_format.latent_channels
    learned = subject.pictures.latents.shape[1]
    if channels != learned:
        raise ValueError(
            f"'subject' was learned with latents of {learned} channels, but the model's have "
            f"{channels}: load the model that it was learned with."
        )
    check_sees(subject, rig)


def apply_subject(
    model: ModelPatcher,
    subject: Subject,
    rig: Rig,
    share: float = 1.0,
    guidance: float = 1.0,
    references: int = REFERENCES,
) -> ModelPatcher:
    """A clone of MODEL in whose views the subject is, as the rig's cameras see it."""
    _check(model, subject, rig)
    if share == 0:
        return model
    end = end_of_share(model, share)
    key = f"{KEY}_{len(model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY))}"
    chosen, net = references_of(subject, references), _own(subject.net, model)
    clean = model.model.process_latent_in(subject.pictures.latents[chosen])
    once = Once(Subject(net.model, subject.pictures, ()), rig, chosen)
    wrapper = AppliedWrapper(key, net.model, clean, once, (math.inf, end))
    patched = with_subject(with_lora(model, subject.net), wrapper, net)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper.sampling)
    if guidance != 1:
        patched.set_model_sampler_post_cfg_function(SubjectGuidance(key, guidance, end))
    return patched


class ApplySubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundApplySubject",
            display_name="Apply Subject",
            category=CATEGORY,
            description="Puts a learned subject into what is sampled, seen from the cameras of a rig. "
            "For any sampler, with prompts, LoRAs, View Sync, View Windows and a reference.",
            inputs=[
                io.Model.Input("model", tooltip="The video model that the subject was learned with; "
                               "other patches may come before or after."),
                SUBJECT.Input("subject", tooltip="From Train Subject or Load Subject."),
                RIG.Input("rig", tooltip="The cameras of the views that are sampled, in the same "
                          "world as those of the learned pictures: same middle, same metres."),
                io.Float.Input("share", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Of the steps, from the first, in which the subject acts. 1 is "
                               "most exact, 0.75 leaves more to the prompt; 0 = off."),
                io.Float.Input("image_guidance", default=1.0, min=0.0, max=20.0, step=0.1,
                               tooltip="How strongly the subject is followed, apart from cfg, which is "
                               "for the text. 1 = as learned, at no cost; other values take one "
                               "more pass of the model a step."),
                io.Int.Input("references", default=REFERENCES, min=2, max=MAX_VIEWS,
                             tooltip="How many of the learned pictures run through the model before the "
                             "first step, spread round the subject. Each view looks at the eight "
                             "nearest of them, so more come closer to its camera."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler."),
                io.String.Output(display_name="note", tooltip="How far the cameras stand from the "
                                 "learned pictures."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, subject: Subject, rig: Rig, share, image_guidance, references
    ) -> io.NodeOutput:
        patched = apply_subject(model, subject, rig, share, image_guidance, references)
        if patched is model:
            return io.NodeOutput(model, run.say(cls, "the model is unchanged: share is 0"))
        return io.NodeOutput(patched, run.say(cls, _describe(subject, rig, references)))


def _describe(subject: Subject, rig: Rig, references: int) -> str:
    used, known = min(references, len(subject.pictures)), len(subject.pictures)
    angles = from_nearest(subject, rig)
    far = int(angles.argmax())
    return (
        f"{used} of {known} learned pictures are looked at; camera {rig.labels[far]} is farthest from "
        f"any of them, {math.degrees(float(angles[far])):.0f}° round the subject"
    )


# --- look -----------------------------------------------------------------------------------------


class Looking(SubjectWrapper):
    """Runs the references through the loaded model and keeps what they gave; samples nothing."""

    def __call__(
        self, executor, x, timestep, context, clip_fea=None, time_dim_concat=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        options = dict(transformer_options or {})
        self.features = self._run_references(executor, x, context, clip_fea, options, kwargs)
        return x[:, : self.references.shape[1]]


class OneLook(comfy.samplers.Sampler):
    """Stands where a sampler stands, so that the host loads and conditions the model: one call of it,
    then what follows while subject and model are loaded."""

    def __init__(self, after) -> None:
        self.after = after

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
        disable_pbar=False,
    ):  # fmt: skip
        inner, options = model_wrap.inner_model, extra_args["model_options"]
        conds = [model_wrap.conds["positive"]]
        comfy.samplers.calc_cond_batch(inner, conds, noise, sigmas[:1], options)
        self.after()
        return noise


def without_wrappers(model: ModelPatcher) -> ModelPatcher:
    """A clone with its LoRAs and block patches alone: others expect the views of a sampling."""
    bare = model.clone()
    for kind, by_key in model.wrappers.items():
        for key in list(by_key):
            bare.remove_wrappers_with_key(kind, key)
    return bare


def render_subject(
    model: ModelPatcher, subject: Subject, rig: Rig, detail: int
) -> tuple[Tensor, Tensor, Tensor]:
    """rgb [V, 3, h, w] times alpha, alpha and depth [V, h, w], metres, 0 where alpha < 0.5; one value a
    ray, `detail` rays along a token."""
    _check(model, subject, rig)
    chosen, net = references_of(subject, REFERENCES), _own(subject.net, model)
    clean = model.model.process_latent_in(subject.pictures.latents[chosen])
    wrapper = Looking(KEY, net.model, clean, None)
    size = tuple(max(1, round(n * detail / TOKEN)) for n in (rig.height, rig.width))
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def after() -> None:
        parts = len(rig) * sum(1 for _ in bands(size))
        bar = run.progress(parts)
        found.append(_looked(subject, net.model, wrapper.features, chosen, rig, size, bar, parts))

    patched = with_subject(with_lora(without_wrappers(model), subject.net), wrapper, net)
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds([[torch.zeros(1, 1, subject.net.shape.text_width), {}]], [])
    guider.set_cfg(1.0)
    empty = torch.zeros_like(clean[:1])
    guider.sample(empty, empty, OneLook(after), torch.tensor([1.0, 0.0]), seed=0, disable_pbar=True)
    return found[0]


def _looked(
    subject: Subject, net: SubjectNet, features: Features, chosen: list[int], rig: Rig,
    size: tuple[int, int], bar: run.Progress, parts: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    device = next(iter(features.values())).device
    known = subject.known(chosen).to(device)
    rays = rig.resized(size[1], size[0])
    wanted = rays.K.to(device), subject.space.normalised(rig.T_camera_world).to(device)
    rgb, alpha, depth = look(net, features, known, wanted, size, lambda done: bar(done, parts))
    return rgb.cpu(), alpha.cpu(), depth.cpu() * subject.space.scale


def at_size_of(rig: Rig, values: Tensor, mode: str) -> Tensor:  # [V, C, h, w] -> [V, C, H, W]
    return F.interpolate(values.float(), (rig.height, rig.width), mode=mode)


class RenderSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundRenderSubject",
            display_name="Render Subject",
            category=CATEGORY,
            description="What a learned subject knows of its own shape and colors, from any camera and "
            "without sampling: for a look before hours of it, and as depth for Depth-Aware "
            "Rendering. Blurred: details are the model's part.",
            inputs=[
                io.Model.Input("model", tooltip="The video model that the subject was learned with."),
                SUBJECT.Input("subject", tooltip="From Train Subject or Load Subject."),
                RIG.Input("rig", tooltip="Cameras to look from, in the same world as those of the "
                          "learned pictures."),
                io.Combo.Input("detail", options=["1", "2", "4", "8"], default="4",
                               tooltip="Rays along 16 pixels. 4 is enough for Depth-Aware Rendering, 1 "
                               "for a quick look; twice as many take four times as long."),
            ],
            outputs=[
                VIEWS.Output(display_name="colors", tooltip="On grey, with the subject's outline as "
                             "mask."),
                VIEWS.Output(display_name="depth", tooltip="Along the optical axis, in the rig's "
                             "metres; 0 where nothing is. For Depth-Aware Rendering."),
                io.String.Output(display_name="note", tooltip="How much of the pictures the subject "
                                 "fills."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, subject: Subject, rig: Rig, detail) -> io.NodeOutput:
        if not subject.net.shape.blocks:
            raise ValueError(
                "'subject' was learned without fields, so there is no shape to render: train it with "
                "blocks chosen in Train Subject."
            )
        run.check_memory("Pictures", rig, 1, 32)
        rgb, alpha, depth = render_subject(model, subject, rig, int(detail))
        shown = on_grey(rgb, alpha)
        colors = at_size_of(rig, shown, "bilinear").clamp(0, 1)[:, None]
        masks = at_size_of(rig, alpha[:, None], "bilinear").clamp(0, 1)
        # Nearest: no pixel lies between two surfaces.
        metres = at_size_of(rig, depth[:, None], "nearest-exact")[:, None]
        note = _seen_note(alpha, depth)
        return io.NodeOutput(
            Views(colors, masks, rig), Views(metres, None, rig), run.say(cls, note)
        )


def _seen_note(alpha: Tensor, depth: Tensor) -> str:
    there = depth[depth > 0]
    if not len(there):
        return "nothing is to be seen yet: train the subject longer, or turn the cameras towards it"
    return (
        f"the subject fills {float((alpha >= 0.5).float().mean()):.0%} of the pictures, "
        f"{float(there.amin()):.2f} to {float(there.amax()):.2f} m away"
    )


NODES: list[type[io.ComfyNode]] = [ApplySubject, RenderSubject]
