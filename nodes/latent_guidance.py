"""Smoothed frames as the start of a sampling: clean clips to latents, noised as ComfyUI does."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..models.views import Views, as_pictures, resize_frames, snap_size
from . import run
from .patch_unet import VIEWS as VIEW_COUNT
from .sockets import VIEWS
from .views import encode_views, fit_to_vae, frames_to_image, image_to_frames

CATEGORY = "Turnaround/6 smooth"
FPS = 16.0
"""Frames a second of clips that don't say."""

# --- frames to latents ----------------------------------------------------------------------------


def given_views(views: Views | None, images: Tensor | None) -> Views:
    """The colour clips on one of two sockets."""
    if (views is None) == (images is None):
        came = "none of them is" if views is None else "both are"
        raise ValueError(
            f"Connect either 'views' or 'images', {came} connected: VIEWS for several views of one "
            "performer, IMAGE for a single clip."
        )
    if views is None:
        views = Views(image_to_frames(images)[None], None, None, FPS)
    name = "views" if images is None else "images"
    if views.frames.shape[2] != 3:
        raise ValueError("'views' hold depth, not colours: connect the smoothed colour views.")
    if views.frames.is_floating_point() and not views.frames.isfinite().all():
        raise ValueError(f"'{name}' hold NaN or infinity: check the node before.")
    return views


def is_video(vae: VAE) -> bool:
    """Whether a clip is one latent; else, and of 3D VAEs that ComfyUI feeds pictures, every frame is."""
    return vae.latent_dim == 3 and not vae.not_video


def check_vae(model: ModelPatcher, vae: VAE) -> None:
    """One sentence when the latents of one are no food for the other."""
    wanted = model.get_model_object("latent_format")
    kinds = {True: "videos", False: "pictures"}
    made = (vae.latent_channels, is_video(vae))
    if made != (wanted.latent_channels, wanted.latent_dimensions == 3):
        raise ValueError(
            f"'vae' makes latents of {made[0]} channels for {kinds[made[1]]}, but 'model' works on "
            f"{wanted.latent_channels} for {kinds[wanted.latent_dimensions == 3]}: load the VAE that "
            "belongs to the model."
        )


def fitting_clips(views: Views, vae: VAE) -> tuple[Iterator[Tensor], str]:
    """Every view [F, 3, H, W] at a size and length that the VAE takes, and a note."""
    if is_video(vae):
        return fit_to_vae(views)
    H, W = views.frames.shape[-2:]
    width, height = snap_size(W, H)
    note = ""
    if (width, height) != (W, H):
        note = f"{W}x{H} became {width}x{height} (sizes must be multiples of 16)"
    return (resize_frames(as_pictures(views, v), width, height) for v in range(len(views))), note


def encoded(vae: VAE, clips: Iterator[Tensor], count: int, on_step: run.Progress) -> dict:
    """A clean LATENT of so many views: a batch item a view, or of picture models a frame."""
    if is_video(vae):
        return {"samples": encode_views(vae, clips, count, on_step)}
    latents = []
    for v, clip in enumerate(clips):
        latents.append(vae.encode(frames_to_image(clip)))
        on_step(v + 1, count)
    return {"samples": torch.cat(latents), VIEW_COUNT: count}


# --- Latent Guidance ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beginning:
    """Where in its steps a sampler starts."""

    sigmas: Tensor
    """[steps left + 1], falling; empty when nothing is to be done."""
    steps: int
    """Of the whole schedule, which the sampler enters in the middle."""
    start: int
    """Steps of it that are left out."""


def beginning(
    model: ModelPatcher, steps: int, strength: float, sampler_name: str, scheduler: str
) -> Beginning:
    """What ComfyUI's KSampler does with `denoise`: a longer schedule, of which it takes the end."""
    plan = comfy.samplers.KSampler(
        model, steps, torch.device("cpu"), sampler_name, scheduler, strength
    )
    if not len(plan.sigmas):
        return Beginning(plan.sigmas, steps, steps)
    whole_steps = steps if strength > 0.9999 else int(steps / strength)
    whole = plan.calculate_sigmas(whole_steps)
    return Beginning(plan.sigmas, whole_steps, len(whole) - len(plan.sigmas))


def noised(
    model: ModelPatcher,
    latents: Tensor,
    sigma: Tensor,  # []
    seed: int,
    batch_index: list[int] | None = None,
) -> Tensor:
    """Clean latents as ComfyUI's samplers make them at `sigma`, in the form that one hands the next.

    Samplers that add no noise scale what comes in all the same, by 1 - sigma for models of flow
    matching: so that has to be undone here, as they themselves do when they stop half-way.
    """
    sampling = model.get_model_object("model_sampling")
    highest = float(sampling.sigma_max)
    all_noise = math.isclose(highest, float(sigma), rel_tol=1e-5) or float(sigma) > highest
    noise = comfy.sample.prepare_noise(latents, seed, batch_index)
    if latents.count_nonzero():
        latents = model.get_model_object("process_latent_in")(latents)
    x = sampling.noise_scaling(sigma, noise, latents, all_noise)
    x = sampling.inverse_noise_scaling(sigma, x)
    return model.get_model_object("process_latent_out")(x.float())


def noise_share(model: ModelPatcher, sigma: Tensor) -> float:
    """Of what a sampler begins with, the part that is noise, 0..1: what a strength means in the end.

    Models differ: at strength 0.2 it is 67 % of Wan's latent, whose steps are shifted towards noise.
    """
    sampling, one, none = model.get_model_object("model_sampling"), torch.ones(1), torch.zeros(1)
    noise = float(sampling.noise_scaling(sigma, one, none))
    return noise / (noise + float(sampling.noise_scaling(sigma, none, one)))


class LatentGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLatentGuidance",
            display_name="Latent Guidance",
            category=CATEGORY,
            description="Smoothed frames as the start of a second sampling: encoded while clean, "
            "then noised in latent space just as ComfyUI's samplers do, for models of every kind. "
            "The sampler after it brings detail back and keeps the smooth motion.",
            inputs=[
                io.Model.Input("model", tooltip="The model of the sampler that follows."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to it."),
                io.Float.Input("strength", default=0.2, min=0.0, max=1.0, step=0.01,
                               tooltip="How much noise: the 'denoise' of a KSampler. 0 keeps the "
                               "frames, 1 forgets them. Begin with 0.2 in Wan, 0.4 in Stable "
                               "Diffusion; the note says how much noise it is."),
                io.Int.Input("steps", default=12, min=1, max=200,
                             tooltip="Steps that the sampler shall do from there."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS,
                               default="euler", tooltip="The sampler that follows: some lay out "
                               "their steps in their own way."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS,
                               default="simple", tooltip="The scheduler of that sampler."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Of the noise: same seed, same noise as KSampler's."),
                VIEWS.Input("views", optional=True, tooltip="Smoothed views, one latent each."),
                io.Image.Input("images", optional=True, tooltip="Or a single smoothed clip."),
                io.Latent.Input("latent", optional=True,
                                tooltip="The latent of the conditioning: its views, length and size "
                                "are checked, so that they fit what the model is told."),
            ],
            outputs=[
                io.Latent.Output(display_name="noised", tooltip="For a sampler that adds no noise: "
                                 "KSampler (Advanced) or SamplerCustom with add_noise off."),
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom."),
                io.Int.Output(display_name="steps", tooltip="'steps' of KSampler (Advanced)."),
                io.Int.Output(display_name="start_at_step",
                              tooltip="'start_at_step' of KSampler (Advanced)."),
                io.Latent.Output(display_name="clean", tooltip="Without noise, for samplers that add "
                                 "it themselves: KSampler or Multi-View Sampler, with 'denoise' set "
                                 "to strength and the same steps and seed, which comes to the same."),
                io.String.Output(display_name="note", tooltip="How noisy it is, and how to go on."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, vae, strength, steps, sampler_name, scheduler, seed,
        views: Views | None = None, images: Tensor | None = None, latent: dict | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        views = given_views(views, images)
        check_vae(model, vae)
        begin = beginning(model, steps, strength, sampler_name, scheduler)
        check_something_left(model, begin, strength, steps)
        clips, note = fitting_clips(views, vae)
        clean = encoded(vae, clips, len(views), run.progress(len(views)))
        check_same_latent(clean["samples"], latent)
        if latent is not None and "batch_index" in latent:
            clean["batch_index"] = latent["batch_index"]
        samples = clean["samples"]
        if len(begin.sigmas):
            samples = noised(model, samples, begin.sigmas[0], seed, clean.get("batch_index"))
        note = "; ".join(filter(None, (note, _how_to_go_on(model, begin))))
        return io.NodeOutput(
            {**clean, "samples": samples}, begin.sigmas, begin.steps, begin.start, clean,
            run.say(cls, note),
        )  # fmt: skip


def check_same_latent(samples: Tensor, latent: dict | None) -> None:
    if latent is None or latent["samples"].shape == samples.shape:
        return
    raise ValueError(
        f"The frames become a latent of shape {list(samples.shape)} but 'latent' has "
        f"{list(latent['samples'].shape)}: smooth the views that were sampled from it, with as many "
        "views and frames and of the same size."
    )


def check_something_left(
    model: ModelPatcher, begin: Beginning, strength: float, steps: int
) -> None:
    """At sigma 1 a flow model's start is noise alone, and nothing can be made of 1 / (1 - sigma)."""
    if not len(begin.sigmas):
        return
    sampling = model.get_model_object("model_sampling")
    if sampling.inverse_noise_scaling(begin.sigmas[0], torch.ones(1)).isfinite().all():
        return
    most = math.floor(100 * steps / (steps + 1)) / 100  # ComfyUI lays out int(steps / strength)
    raise ValueError(
        f"With strength {strength:g} and {steps} steps this model starts from noise alone, so the "
        f"frames would not count: set strength to {most:g} or less, or sample without Latent "
        "Guidance."
    )


def _how_to_go_on(model: ModelPatcher, begin: Beginning) -> str:
    if not len(begin.sigmas):
        return "strength 0: the frames are encoded and nothing else; a sampler has nothing to do"
    return (
        f"{noise_share(model, begin.sigmas[0]):.0%} noise, {begin.steps - begin.start} steps to go: "
        f"KSampler (Advanced) with add_noise disable, steps {begin.steps}, start_at_step "
        f"{begin.start}; or SamplerCustom with add_noise off and these sigmas"
    )
