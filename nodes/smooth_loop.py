"""Smooth Loop: smoothing and sampling in turn."""

import math
from dataclasses import dataclass, field, replace

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..models.flow import Flow
from ..models.implicit_fit import A_FRAME, FAST, PAPER, ImplicitFit, Settings
from ..models.smooth_loop import falling_strengths, smooth_loop
from ..models.views import Views, resize_frames, view_labels
from . import run, windows
from .check_conditions import check_conditions
from .latent_guidance import (
    CATEGORY,
    FPS,
    LatentGuidance,
    beginning,
    check_vae,
    encoded,
    fitting_clips,
    given_views,
    is_video,
    noise_share,
)
from .sampler import GridProgress
from .sockets import FLOW, VIEWS
from .views import clips_of, decode_views, frames_to_image

PRESETS = {"fast": FAST, "paper": PAPER}
FIT, ENCODE, SAMPLE, DECODE = 100, 10, 100, 10
"""How far the bar moves for the parts of a round."""
FIT_COPIES = 12
"""Of the frames, that a fit holds on its device: flow both ways, masks, corrected frames and more."""


class Rounds:
    """One bar for all rounds."""

    def __init__(self, rounds: int) -> None:
        self.total = rounds * (FIT + ENCODE + SAMPLE + DECODE)
        self.bar, self.done = run.progress(self.total), 0

    def part(self, share: int) -> run.Progress:
        """The callback of the next part, which moves the bar by so much."""
        start = self.done
        self.done += share

        def on_step(done: int, total: int, preview: Tensor | None = None) -> None:
            self.bar(start + share * done // max(1, total), self.total, preview)

        return on_step


@dataclass
class Refiner:
    """V_s -> V_p: encoded, noised, sampled and decoded, as Latent Guidance, KSampler and Decode Views
    do."""

    model: ModelPatcher
    vae: VAE
    positive: list
    negative: list
    steps: int
    """Of a whole sampling; a round does its share of them."""
    cfg: float
    sampler_name: str
    scheduler: str
    seed: int
    labels: tuple[str, ...]
    told: dict
    """What the first latent carries beside its samples, such as a noise mask."""
    rounds: Rounds
    latent: dict = field(default_factory=dict)
    """Of the last round."""

    def steps_at(self, strength: float) -> int:
        return math.ceil(round(self.steps * strength, 6))  # 10 steps at 0.3 are 3, not 4

    def __call__(self, smoothed: Tensor, strength: float, r: int) -> Tensor:
        with torch.inference_mode():
            bar, clips = self.rounds.part(ENCODE), iter(smoothed.cpu())
            self.latent = {**self.told, **encoded(self.vae, clips, len(smoothed), bar)}
            self.latent["samples"] = self._sampled(self.latent, strength, r)
            clips = clips_of(self.latent, self.vae, None)
            frames = decode_views(self.vae, clips, self.rounds.part(DECODE))
        # Outside of inference mode, so that it can be learnt from.
        return frames.to(smoothed.device).clone()

    def _sampled(self, latent: dict, strength: float, r: int) -> Tensor:
        """Another seed each round: the same noise twice would leave its mark."""
        steps, seed = self.steps_at(strength), (self.seed + r) % 2**64
        noise = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
        model = self.model
        bar = self.rounds.part(SAMPLE)

        def callback(step: int, _x0: Tensor, _x: Tensor, total: int) -> None:
            bar(step + 1, total)

        if latent["samples"].ndim == 5:
            progress = GridProgress(model, steps, list(self.labels))
            progress.bar = bar
            model, callback = windows.reporting(model, progress.after_tile), progress.after_step
        return comfy.sample.sample(
            model, noise, steps, self.cfg, self.sampler_name, self.scheduler, self.positive,
            self.negative, latent["samples"], denoise=strength,
            noise_mask=latent.get("noise_mask"), callback=callback, seed=seed,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )  # fmt: skip


def fitted(views: Views, vae: VAE) -> tuple[Views, str]:
    """The views, with masks, at the size and length that the VAE keeps, and a note."""
    clips, note = fitting_clips(views, vae)
    frames = torch.stack(list(clips))
    count, _, H, W = frames.shape[1:]
    masks, rig = views.masks, views.rig
    if masks is not None:
        masks = masks[:, :count].float().flatten(0, 1)[:, None]
        masks = resize_frames(masks, W, H)[:, 0].clamp(0, 1).unflatten(0, frames.shape[:2])
    if rig is not None:
        rig = rig.filled(W, H)
    return Views(frames, masks, rig, views.fps), note


def first_pass(
    vae: VAE, views: Views | None, images: Tensor | None, latent: dict | None
) -> tuple[Views, str]:
    """The clips to begin with, of any of three sockets, and a note."""
    if latent is None:
        return fitted(given_views(views, images), vae)
    if views is not None or images is not None:
        raise ValueError(
            "'latent' and frames are connected, and both say where to begin: connect one of 'views', "
            "'images' and 'latent'."
        )
    clips = clips_of(latent, vae, None)
    return Views(decode_views(vae, clips, run.progress(len(clips))), None, None, FPS), ""


def latents_of(vae: VAE, views: Views) -> Tensor:  # [V, C, T, h, w]
    """Of the shape that encoding will give, without the work."""
    count, _, H, W = views.frames.shape[1:]
    side = vae.spacial_compression_encode()
    T = vae.downscale_ratio[0](count)
    return torch.zeros(1).expand(len(views), vae.latent_channels, T, H // side, W // side)


def check_told(model: ModelPatcher, vae: VAE, views: Views, positive: list, negative: list) -> None:
    """Wan-type models are told of every view: that must fit before the fit begins, not after."""
    dit = model.get_model_object("diffusion_model")
    if is_video(vae) and hasattr(dit, "blocks") and hasattr(dit, "patch_embedding"):
        check_conditions(model, positive, negative, latents_of(vae, views))


def check_depth(depth: Views | None, views: Views) -> None:
    if depth is None:
        return
    if depth.frames.shape[2] != 1 or depth.rig is None:
        raise ValueError(
            "'depth' needs depth in metres with its rig: connect the fourth output of Render "
            "Conditions."
        )
    wanted, came = (v.frames.shape for v in (views, depth))
    if wanted[:2] + wanted[3:] != came[:2] + came[3:]:
        raise ValueError(
            f"'depth' has {came[0]} views x {came[1]} frames of {came[4]}x{came[3]}, but {wanted[0]} "
            f"x {wanted[1]} of {wanted[4]}x{wanted[3]} are smoothed: connect the depth that the "
            "conditions were rendered with."
        )


class SmoothLoop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundSmoothLoop",
            display_name="Smooth Loop",
            category=CATEGORY,
            description="Smooths sampled frames and lets the model refine what was smoothed, in "
            "turn, with less and less noise: the implicit video takes the flicker out, the model "
            "brings the detail back. With any model and conditioning of ComfyUI.",
            inputs=[
                io.Model.Input("model", tooltip="The model that made the frames, also from View Sync."),
                io.Conditioning.Input("positive", tooltip="What the first sampling was told."),
                io.Conditioning.Input("negative", tooltip="Likewise; used when cfg is not 1."),
                io.Vae.Input("vae", tooltip="The VAE of the model; one of Tune VAE Decoder loses less."),
                io.Int.Input("rounds", default=5, min=1, max=20,
                             tooltip="How often it is smoothed and refined; 5 as published."),
                io.Float.Input("first_strength", default=0.25, min=0.01, max=1.0, step=0.01,
                               tooltip="Noise of the first refinement: the 'denoise' of a KSampler. "
                               "0.25 suits Wan; Stable Diffusion, whose steps are not shifted, 0.6."),
                io.Float.Input("last_strength", default=0.07, min=0.01, max=1.0, step=0.01,
                               tooltip="Noise of the last one; the rounds between fall evenly. 0.07 "
                               "suits Wan, 0.2 Stable Diffusion."),
                io.Int.Input("steps", default=12, min=1, max=200,
                             tooltip="Of a whole sampling, as in your first one: a refinement at "
                             "strength 0.4 does 40 % of them."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=30.0, step=0.1,
                               tooltip="As in the first sampling."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS,
                               default="euler", tooltip="As in the first sampling."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS,
                               default="simple", tooltip="As in the first sampling."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Of noise and fit; every round takes the next one."),
                io.Combo.Input("preset", options=list(PRESETS), default="fast",
                               tooltip="Of the fit. paper: the published sizes and steps, slow."),
                io.Int.Input("fit_steps", default=0, min=0, max=100_000,
                             tooltip="Steps of the fit in a round; 0 leaves it to the preset (paper: "
                             "10,000 in all rounds together)."),
                VIEWS.Input("views", optional=True, tooltip="The frames of the first sampling, from "
                            "Decode Views."),
                io.Image.Input("images", optional=True, tooltip="Or a single clip."),
                io.Latent.Input("latent", optional=True, tooltip="Or the sampler's latent itself."),
                FLOW.Input("flow", optional=True, tooltip="How things move, from Body Flow or "
                           "Optical Flow; without it, it is found in the frames."),
                VIEWS.Input("depth", optional=True, tooltip="The fourth output of Render Conditions: "
                            "views then share the colours of one performer."),
            ],
            outputs=[
                VIEWS.Output(display_name="views", tooltip="The result: what the last round refined."),
                io.Image.Output(display_name="images", tooltip="The same as IMAGE, view after view."),
                VIEWS.Output(display_name="smoothed", tooltip="What the last refinement began with: "
                             "steadier, with less detail."),
                io.Latent.Output(display_name="latent", tooltip="Of the result, for another decoder."),
                io.String.Output(display_name="note", tooltip="What was done."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, vae, rounds, first_strength, last_strength, steps, cfg,
        sampler_name, scheduler, seed, preset, fit_steps, views: Views | None = None,
        images: Tensor | None = None, latent: dict | None = None, flow: Flow | None = None,
        depth: Views | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        check_vae(model, vae)
        begin, note = first_pass(vae, views, images, latent)
        if begin.frames.shape[1] < 2:
            raise ValueError(
                "A single frame has nothing to smooth: connect a clip of 5 frames or more."
            )
        check_told(model, vae, begin, positive, negative if cfg != 1 else [])
        check_depth(depth, begin)
        strengths = falling_strengths(first_strength, last_strength, rounds)
        told = {k: v for k, v in (latent or {}).items() if k != "samples"}
        bar = Rounds(rounds)
        refiner = Refiner(
            model, vae, positive, negative, steps, cfg, sampler_name, scheduler, seed,
            view_labels(begin), told, bar,
        )  # fmt: skip
        with torch.inference_mode(False), torch.enable_grad():
            fit, each = started_fit(begin, PRESETS[preset], fit_steps, rounds, flow, depth, seed)
            made = smooth_loop(fit, refiner, strengths, each, lambda: bar.part(FIT))
        begins = (
            beginning(model, refiner.steps_at(s), s, sampler_name, scheduler) for s in strengths
        )
        shares = (noise_share(model, b.sigmas[0]) for b in begins)
        shown = ", ".join(f"{s:.2f} ({n:.0%})" for s, n in zip(strengths, shares, strict=True))
        done = f"{rounds} x {each} steps of the fit, refined with noise {shown}"
        result, smoothed = (replace(begin, frames=f.cpu()) for f in (made.refined, made.smoothed))
        return io.NodeOutput(
            result, frames_to_image(result.frames.flatten(0, 1)), smoothed, refiner.latent,
            run.say(cls, "; ".join(filter(None, (note, done)))),
        )  # fmt: skip


def started_fit(
    begin: Views, preset: Settings, fit_steps: int, rounds: int, flow: Flow | None,
    depth: Views | None, seed: int,
) -> tuple[ImplicitFit, int]:  # fmt: skip
    """The fit, and its steps a round. Its learning rate falls over all rounds together."""
    V, count = begin.frames.shape[:2]
    each = fit_steps or math.ceil((preset.steps or A_FRAME * V * count) / rounds)
    device = run.drawing_device(FIT_COPIES * begin.frames.numel() * 4)

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device).clone()

    if flow is not None:
        flow = Flow(
            there(flow.there), there(flow.back), there(flow.sure_there), there(flow.sure_back)
        )
    fit = ImplicitFit(
        there(begin.frames), replace(preset, steps=rounds * each), flow, there(begin.masks),
        there(depth.frames[:, :, 0]) if depth is not None else None,
        depth.rig if depth is not None else None, seed=seed % 2**63,
        tick=mm.throw_exception_if_processing_interrupted,
    )  # fmt: skip
    return fit, each


NODES: list[type[io.ComfyNode]] = [LatentGuidance, SmoothLoop]
