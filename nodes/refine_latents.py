"""MV-Opt between sampler and decoder: while sampling on the predicted latents, and after refining."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Self

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor, nn

from ..models.cameras import Rig
from ..models.metrics import decibels
from ..models.refine_latents import (
    STRIDE,
    BroughtBack,
    Correspondences,
    agreed,
    brought_back,
    correspond,
    grid_of,
)
from ..models.view_weights import ViewWeights
from ..models.views import LATENT_STRIDE, Views, as_pictures, latent_frames, snap_frames, snap_size
from . import patch_unet, run
from .conditioning import CATEGORY
from .sockets import RIG, VIEWS, WEIGHTS
from .views import clips_of, frames_to_image

# --- inside sampling ------------------------------------------------------------------------------


class AgreeingViews:
    """After guidance, at the chosen steps: all views of the predicted clean latents made to agree."""

    def __init__(
        self,
        depth: Views,
        rig: Rig,
        strength: float,
        weights: Tensor | None,  # [V]
        sigmas: tuple[float, float],  # of start and end
        model: ModelPatcher,
    ) -> None:
        self.depth, self.rig, self.strength, self.weights = depth, rig, strength, weights
        self.sigma_start, self.sigma_end = sigmas
        dit = model.get_model_object("diffusion_model")
        self.frames_are_batch = patch_unet.is_unet_video(model)
        # VACE puts the latent frame of a reference picture in front of the clip.
        self.may_lead = hasattr(dit, "vace_blocks")
        self.found: dict[tuple[int, int, int], Correspondences] = {}

    def __deepcopy__(self, memo: dict) -> Self:
        # ComfyUI deep-copies what hangs on a model whenever it is cloned; depth must stay shared.
        return self

    def __call__(self, args: dict) -> Tensor:
        x0, sigma = args["denoised"], float(args["sigma"].flatten()[0])
        if not self.sigma_end <= sigma <= self.sigma_start:
            return x0
        mm.throw_exception_if_processing_interrupted()
        if not self.frames_are_batch:
            self._check_views(len(x0) if x0.ndim == 5 else 0, x0)
            return self._agreed(x0)
        frames, rest = divmod(len(x0), len(self.rig))
        self._check_views(0 if rest else len(self.rig), x0)
        clips = x0.unflatten(0, (-1, frames)).transpose(1, 2)
        return self._agreed(clips).transpose(1, 2).flatten(0, 1)

    def _agreed(self, latents: Tensor) -> Tensor:  # [V, C, T, h, w]
        lead = self._lead(latents.shape[2])
        T, h, w = latents.shape[2:]
        found = self.correspondences((T - lead, h, w)).to(latents.device)
        self.found = {(T - lead, h, w): found}
        clip = agreed(latents[:, :, lead:], found, self.strength, self.weights)
        return torch.cat([latents[:, :, :lead], clip], 2) if lead else clip

    def _lead(self, frames: int) -> int:
        """Latent frames before the clip."""
        expected = latent_frames(snap_frames(self.depth.frames.shape[1]))
        return 1 if self.may_lead and frames == expected + 1 else 0

    def correspondences(
        self, grid: tuple[int, int, int], on_step: run.Progress | None = None
    ) -> Correspondences:  # grid: T, h, w
        if grid not in self.found:
            per_frame = 1 if self.frames_are_batch else LATENT_STRIDE
            fitting = grid_of(grid, self.depth.frames, per_frame)
            self.found = {grid: correspond(self.depth.frames[:, :, 0], self.rig, fitting, on_step)}
        return self.found[grid]

    def expected_grid(self) -> tuple[int, int, int]:
        """What the sampler will most likely bring."""
        count, _, H, W = self.depth.frames.shape[1:]
        width, height = snap_size(W, H)
        T = count if self.frames_are_batch else latent_frames(snap_frames(count))
        return T, height // STRIDE, width // STRIDE

    def _check_views(self, views: int, x0: Tensor) -> None:
        if views != len(self.rig):
            brought = f"{len(x0)} views" if x0.ndim == 5 else f"shape {list(x0.shape)}"
            raise ValueError(
                f"The 'rig' of MV-Opt in Sampling has {len(self.rig)} cameras, but the latent brings "
                f"{brought}: connect the rig and the depth that the conditions were rendered with."
            )


class MVOptSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundMVOptSampling",
            display_name="MV-Opt in Sampling",
            category=CATEGORY,
            description="Makes the views agree while they are sampled: at every step, what the model "
            "predicts for a surface is pulled towards what the other views show of it. For any model "
            "and any sampler, without training; helps where a model makes up what nobody told it.",
            inputs=[
                io.Model.Input("model", tooltip="The video model, with or without View Sync."),
                RIG.Input("rig", tooltip="The cameras that the conditions were rendered with."),
                VIEWS.Input("depth", tooltip="The fourth output of Render Conditions: it says which "
                            "places of two views are the same surface."),
                io.Float.Input("strength", default=1.0, min=0.0, max=4.0, step=0.05,
                               tooltip="0 = off; 1 = a view counts for itself as much as every other "
                               "view that shows the surface; more follows the others more."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Where in the sampling it begins. Early steps hardly matter."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Where in the sampling it ends. The later steps do the work."),
                WEIGHTS.Input("weights", optional=True,
                              tooltip="From View Weights: views that count more pull more and give "
                              "way less."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler."),
                io.String.Output(display_name="note", tooltip="How much of the surface two views "
                                 "share, or why nothing was done."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, rig: Rig, depth: Views, strength, start_percent, end_percent,
        weights: ViewWeights | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        _check_depth(depth, rig)
        _check_weights(weights, rig)
        if start_percent > end_percent:
            raise ValueError(
                f"start_percent is {start_percent:g} but end_percent {end_percent:g}, so MV-Opt would "
                "never be on: make start_percent the smaller one."
            )
        if len(rig) == 1 or strength == 0:
            why = "strength is 0" if strength == 0 else "one view has no other to agree with"
            return io.NodeOutput(model, run.say(cls, f"the model is unchanged: {why}"))
        sampling = model.get_model_object("model_sampling")
        sigmas = tuple(float(sampling.percent_to_sigma(p)) for p in (start_percent, end_percent))
        values = weights.values if weights is not None else None
        views = AgreeingViews(depth, rig, strength, values, sigmas, model)
        grid = views.expected_grid()
        found = views.correspondences(grid, run.progress(grid[0]))
        if not found.pairs:
            why = "no two views show the same surface; bring the cameras closer together"
            return io.NodeOutput(model, run.say(cls, f"the model is unchanged: {why}"))
        note = f"{found.shared:.0%} of the performer is seen by two views or more"
        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(views)
        return io.NodeOutput(patched, run.say(cls, note))


def _check_depth(depth: Views, rig: Rig) -> None:
    if depth.frames.shape[2] != 1:
        raise ValueError(
            "'depth' holds colours, but depth in metres is needed: connect the fourth output of "
            "Render Conditions."
        )
    H, W = depth.frames.shape[-2:]
    if (len(depth), W, H) != (len(rig), rig.width, rig.height):
        raise ValueError(
            f"'depth' has {len(depth)} views of {W}x{H}, but 'rig' {len(rig)} cameras of "
            f"{rig.width}x{rig.height}: connect the rig that Render Conditions drew it with."
        )


def _check_weights(weights: ViewWeights | None, rig: Rig) -> None:
    if weights is not None and len(weights) != len(rig):
        raise ValueError(
            f"'weights' are for {len(weights)} views but the rig has {len(rig)} cameras: make them "
            "with the same rig."
        )


# --- after refining -------------------------------------------------------------------------------

LOSS = io.Custom("LOSS_MAP")
"""ComfyUI's own socket, for its Plot Loss Graph."""


class MVOptRefineLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundMVOptRefineLatent",
            display_name="MV-Opt Refine Latent",
            category=CATEGORY,
            description="Puts refined views back into the latent they came from, so that another "
            "sampler can go on from there, with less loss than encoding them anew: what the VAE "
            "loses on the way to pictures and back is taken out.",
            inputs=[
                io.Latent.Input("latent", tooltip="The sampler's, that was decoded and refined."),
                io.Vae.Input("vae", tooltip="The VAE that decoded it."),
                VIEWS.Input("views", tooltip="What the refiner made of the decoded views, of the "
                            "same size and length."),
                io.Int.Input("steps", default=0, min=0, max=100,
                             tooltip="Steps of descent through the decoder after that. Each takes as "
                             "long as several decodings and a lot of memory."),
                io.Float.Input("fidelity", default=0.0001, min=0.0, max=1.0, step=0.0001,
                               round=0.0000001,
                               tooltip="For steps: how much the latent holds on to the sampler's "
                               "own. 0 follows the pictures alone."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For Decode Views, or for another "
                                 "sampler with denoise below 1."),
                LOSS.Output(display_name="loss", tooltip="The loss before, at the start, and after "
                            "every step; it never rises. For Plot Loss Graph."),
                io.String.Output(display_name="note", tooltip="How close the decoded latent comes to "
                                 "the refined views."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, vae, views: Views, steps, fidelity) -> io.NodeOutput:
        clips = clips_of(latent, vae, views.rig)
        check_views(views, clips)
        made = refined_latents(vae, clips, views, steps, fidelity)
        losses = _mean_history([m.history for m in made])
        first, last = (decibels(losses[n] ** 0.5) for n in (0, -1))
        note = f"decoded, {last:.1f} dB from the refined views; before, {first:.1f} dB"
        run.say(cls, note)
        samples = torch.cat([m.latents for m in made]).to(latent["samples"])
        return io.NodeOutput({**latent, "samples": samples}, {"loss": losses}, note)


def check_views(views: Views, clips: Sequence[Tensor]) -> None:
    if len(views) != len(clips):
        raise ValueError(
            f"'views' are {len(views)} but 'latent' brings {len(clips)}: connect the views that were "
            "decoded from this latent and refined."
        )
    if views.frames.shape[2] != 3:
        raise ValueError("'views' hold depth, not colours: connect the refined colour views.")
    if views.frames.is_floating_point() and not views.frames.isfinite().all():
        raise ValueError(
            "'views' hold NaN or infinity: look at them with Preview Views and refine them again."
        )


def refined_latents(
    vae: VAE, clips: Sequence[Tensor], views: Views, steps: int, fidelity: float
) -> list[BroughtBack]:  # one a view
    """View by view, so that memory is that of one."""
    decode = with_gradients(vae, clips[0]) if steps else partial(_pictures, vae)
    count, total = 1 + steps, len(clips) * (1 + steps)
    bar, made = run.progress(total), []
    for v, clip in enumerate(clips):

        def after(done: int, v: int = v) -> None:
            bar(v * count + done, total)

        z, target = clip.to(vae.device).float(), as_pictures(views, v).to(vae.device)
        made.append(brought_back(z, target, partial(_latents, vae), decode, steps, fidelity, after))
        bar((v + 1) * count, total, target[len(target) // 2])
    return made


def _pictures(vae: VAE, z: Tensor) -> Tensor:  # one view -> [F, 3, H, W] 0..1
    images = vae.decode(z)
    return images.reshape(-1, *images.shape[-3:]).movedim(-1, 1).to(z)


def _latents(vae: VAE, pictures: Tensor) -> Tensor:  # the inverse
    return vae.encode(frames_to_image(pictures)).to(pictures)


class Decoder(nn.Module):
    """`functional_call` wants a module whose `forward` decodes."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


@contextmanager
def all_frames_at_once(vae: nn.Module) -> Iterator[None]:
    """Tiny VAEs of TAEHV's kind, Turnaround-Tiny's too, otherwise hand on what they remember of the
    frame before without its gradient, and write a bar to the log each time."""
    wanted = {"parallel": True, "show_progress_bar": False}
    before = {name: getattr(vae, name) for name in wanted if hasattr(vae, name)}
    for name in before:
        setattr(vae, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


GRADIENT_COPIES = 3
"""Of what ComfyUI asks for to decode a latent frame, for each of them: descent keeps all that the
decoder computes. Measured: 2.5 for Wan's VAE, 1.6 for Turnaround-Tiny's."""


def with_gradients(vae: VAE, clip: Tensor) -> Callable[[Tensor], Tensor]:
    """Decoding that gradients pass, with copies of the weights: ComfyUI's own belong to inference
    mode and know no gradient. Float32, since losses differ in digits that half precision lacks."""
    frames = clip.shape[2] if clip.ndim == 5 else clip.shape[0]
    need = GRADIENT_COPIES * frames * vae.memory_used_decode(clip.shape, torch.float32)
    need += sum(4 * p.numel() for p in vae.first_stage_model.parameters())
    mm.load_models_gpu([vae.patcher], memory_required=need)
    free = mm.get_free_memory(vae.device)
    if need > free:
        raise ValueError(
            f"Steps through the decoder need about {need / 1e9:.1f} GB for one view of this size and "
            f"length, but {free / 1e9:.1f} GB are free: set steps to 0."
        )
    module = Decoder(vae.first_stage_model)
    with torch.inference_mode(False):
        tensors = chain(module.named_parameters(), module.named_buffers())
        weights = {n: t.detach().clone().to(vae.device, torch.float32) for n, t in tensors}

    def decode(z: Tensor) -> Tensor:
        with all_frames_at_once(vae.first_stage_model):
            images = vae.process_output(torch.func.functional_call(module, weights, (z,)))
        # [1, 3, F, H, W] of videos, [F, 3, H, W] of frames.
        return images[0].movedim(1, 0) if images.ndim == 5 else images

    return decode


def _mean_history(histories: list[tuple[float, ...]]) -> list[float]:
    """Of all views; one that stopped early stays where it stopped."""
    length = max(map(len, histories))
    full = [[*h, *(length - len(h)) * [h[-1]]] for h in histories]
    return [sum(values) / len(values) for values in zip(*full, strict=True)]


NODES: list[type[io.ComfyNode]] = [MVOptSampling, MVOptRefineLatent]
