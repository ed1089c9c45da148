"""A VAE decoder tuned to one clip: training it, and its difference as a small file."""

import copy
from collections.abc import Iterator
from pathlib import Path

import comfy.lora
import comfy.model_management as mm
import folder_paths
import torch
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..models.decoder_tuning import (
    Clips,
    Decode,
    Tuning,
    Weights,
    load_delta,
    pack_delta,
    save_delta,
    tune_decoder,
)
from ..models.metrics import psnr
from ..models.views import Views
from . import run
from .latent_guidance import CATEGORY, fitting_clips, given_views, is_video
from .refine_latents import GRADIENT_COPIES, LOSS, Decoder, all_frames_at_once
from .sockets import VIEWS
from .views import check_prefix, frames_to_image

SUFFIX = ".delta.safetensors"

# --- ComfyUI's VAE, its weights, and a tuned one beside it ----------------------------------------


def vae_weights(vae: VAE, tuned: bool) -> Weights:
    """All weights of the VAE as copies in float32, as its file has them or with what was added."""
    weights = {}
    for name, (original, *patches) in vae.patcher.get_key_patches().items():
        if not original[0].is_floating_point():
            continue
        weight = original[0].detach().to("cpu", torch.float32, copy=True)
        if tuned and patches:
            weight = comfy.lora.calculate_weight(patches, weight, name)
        weights[name] = weight
    return weights


def with_delta(vae: VAE, delta: Weights, strength: float = 1.0) -> VAE:
    """A VAE with tuned weights; the one given stays as it is, and both share memory as a model and
    its LoRA do."""
    tuned = copy.copy(vae)
    tuned.patcher = vae.patcher.clone()
    tuned.patcher.add_patches({name: ("diff", (d,)) for name, d in delta.items()}, strength)
    return tuned


def delta_of(vae: VAE) -> Weights:
    """What was added to the weights of this VAE."""
    added = {}
    for name, (original, *patches) in vae.patcher.get_key_patches().items():
        if patches:
            nothing = torch.zeros(original[0].shape)
            added[name] = comfy.lora.calculate_weight(patches, nothing, name)
    return added


def decoder_of(vae: VAE) -> Decode:
    """Decoding of one window by weights that are given, so that gradients reach them."""
    module = Decoder(vae.first_stage_model)
    constants = {n: t.detach().clone().to(vae.device) for n, t in module.named_buffers()}
    video = is_video(vae)

    def decode(weights: Weights, latents: Tensor) -> Tensor:  # [C, t, h, w] -> [f, 3, H, W]
        given = constants | {f"vae.{name}": weight for name, weight in weights.items()}
        z = latents[None] if video else latents.movedim(1, 0)
        with all_frames_at_once(vae.first_stage_model):
            images = vae.process_output(torch.func.functional_call(module, given, (z,)))
        return images[0].movedim(1, 0) if video else images

    return decode


def check_decoder(vae: VAE) -> None:
    if vae.latent_dim not in (2, 3) or vae.output_channels != 3:
        raise ValueError("'vae' is not for pictures: connect the VAE of an image or video model.")
    if not hasattr(vae.first_stage_model, "decode"):
        raise ValueError(
            "'vae' has no decoder that could be tuned: connect a whole VAE, such as wan_2.1_vae or "
            "turnaround_tiny_vae."
        )


def check_room(vae: VAE, clips: Clips, tuning: Tuning) -> None:
    """One sentence instead of running out of memory."""
    C, T, h, w = clips.latents.shape[1:]
    t, a, b = min(T, tuning.moments), min(h, tuning.window), min(w, tuning.window)
    shape = (1, C, t, a, b) if is_video(vae) else (t, C, a, b)
    # Of the weights: themselves, tuned ones, gradients, and Adam's two.
    need = 5 * 4 * sum(p.numel() for p in vae.first_stage_model.parameters())
    need += GRADIENT_COPIES * t * vae.memory_used_decode(shape, torch.float32)
    mm.load_models_gpu([vae.patcher], memory_required=need)
    free = mm.get_free_memory(vae.device)
    if need > free:
        raise ValueError(
            f"Tuning needs about {need / 1e9:.1f} GB with this crop, but {free / 1e9:.1f} GB are "
            "free: make 'crop' smaller."
        )


class TuneVAEDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundTuneVAEDecoder",
            display_name="Tune VAE Decoder",
            category=CATEGORY,
            description="Trains the decoder of a VAE on your clip, so that encoding and decoding "
            "loses less of it. The encoder stays, so every model of this VAE goes on working. The "
            "VAE that you connect is not changed.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of your model."),
                io.Int.Input("steps", default=2000, min=1, max=20_000,
                             tooltip="2000 as published; a few hundred already help. Seconds to "
                             "minutes on a GPU, hours on a CPU."),
                io.Float.Input("learning_rate", default=5e-5, min=1e-6, max=1e-2, step=1e-6,
                               round=1e-7, tooltip="5e-5 as published. For few steps try 2e-4; more "
                               "makes the decoder forget what is not in the clip."),
                io.Int.Input("crop", default=128, min=64, max=2048, step=16,
                             tooltip="Pixels a side of what is decoded in a step. Smaller needs "
                             "less memory and time."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Of the crops; same seed, same VAE."),
                VIEWS.Input("views", optional=True,
                            tooltip="Clean pictures of your subject: the source clip, or finished "
                            "views that you like. Flicker in them would be learnt too."),
                io.Image.Input("images", optional=True, tooltip="Or a single clip."),
            ],
            outputs=[
                io.Vae.Output(display_name="vae", tooltip="With the tuned decoder, for any node."),
                LOSS.Output(display_name="loss", tooltip="For Plot Loss Graph."),
                io.String.Output(display_name="note", tooltip="What encoding and decoding lost "
                                 "before and after."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, vae, steps, learning_rate, crop, seed,
        views: Views | None = None, images: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        views = given_views(views, images)
        check_decoder(vae)
        pictures, note = fitting_clips(views, vae)
        clips = clips_to_learn(vae, pictures, len(views))
        cells = max(4, crop // vae.spacial_compression_decode())
        tuning = Tuning(steps=steps, rate=learning_rate, window=cells)
        check_room(vae, clips, tuning)
        bar = run.progress(steps)
        with torch.inference_mode(False), torch.enable_grad():
            weights = {n: w.to(vae.device) for n, w in vae_weights(vae, tuned=True).items()}
            delta, losses = tune_decoder(decoder_of(vae), weights, clips, tuning, seed, bar)
        tuned = with_delta(vae, delta)
        before, after = (round_trip(v, clips) for v in (vae, tuned))
        found = f"encoded and decoded, the clip keeps {after:.1f} dB; untuned, {before:.1f} dB"
        note = run.say(cls, "; ".join(filter(None, (note, found))))
        return io.NodeOutput(tuned, {"loss": losses}, note)


def clips_to_learn(vae: VAE, pictures: Iterator[Tensor], count: int) -> Clips:
    """Every view with its latents by the untouched encoder, as tensors that can be learnt from."""
    bar, latents, frames = run.progress(count), [], []
    for v, clip in enumerate(pictures):
        z = vae.encode(frames_to_image(clip))
        latents.append(z[0] if is_video(vae) else z.movedim(0, 1))
        frames.append(clip)
        bar(v + 1, count)
    with torch.inference_mode(False):
        clips = Clips(torch.stack(latents).clone(), torch.stack(frames).clone())
    made = decoded(vae, clips.latents[0])
    if made.shape != clips.frames[0].shape:
        raise ValueError(
            f"The VAE makes {_size(made)} of a clip of {_size(clips.frames[0])}: use a size and "
            "length that it keeps."
        )
    return clips


def _size(clip: Tensor) -> str:
    return f"{len(clip)} frames of {clip.shape[3]}x{clip.shape[2]}"


def decoded(vae: VAE, latents: Tensor) -> Tensor:  # [C, T, h, w] -> [F, 3, H, W]
    images = vae.decode(latents[None] if is_video(vae) else latents.movedim(1, 0))
    return images.reshape(-1, *images.shape[-3:]).movedim(-1, 1).to(latents)


def round_trip(vae: VAE, clips: Clips) -> float:
    """PSNR of the decoded clips, dB."""
    made = torch.stack([decoded(vae, z) for z in clips.latents])
    return psnr(made, clips.frames)


class SaveVAEDecoderDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundSaveVAEDecoderDelta",
            display_name="Save VAE Decoder Delta",
            category="Turnaround/9 save",
            description="Saves what tuning changed in a VAE's decoder as a small file, to be put on "
            "the same VAE again with Load VAE Decoder Delta.",
            inputs=[
                io.Vae.Input("vae", tooltip="From Tune VAE Decoder."),
                io.String.Input("filename_prefix", default="vae/decoder",
                                tooltip="Folder and name below ComfyUI's output folder; in 'vae' "
                                "Load VAE Decoder Delta finds it."),
                io.Int.Input("rank", default=32, min=0, max=512,
                             tooltip="How much of the change is kept: small numbers make small "
                             "files. 0 keeps all of it, in half precision."),
            ],
            outputs=[
                io.String.Output(display_name="note", tooltip="Where the file is, how large, and how "
                                 "much of the change it holds."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, vae, filename_prefix: str, rank: int) -> io.NodeOutput:
        check_prefix(filename_prefix)
        delta = delta_of(vae)
        if not delta:
            raise ValueError(
                "'vae' is not tuned, so there is nothing to save: connect the VAE of Tune VAE Decoder."
            )
        packed = pack_delta(delta, vae_weights(vae, tuned=False), rank)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_{SUFFIX}"
        save_delta(Path(folder) / file, packed)
        note = (
            f"output/{subfolder}/{file}: {packed.bytes / 1e6:.1f} MB of {len(delta)} weights, "
            f"{packed.kept:.0%} of the change"
        )
        return io.NodeOutput(run.say(cls, note))


def delta_files() -> list[str]:
    return [n for n in folder_paths.get_filename_list("vae") if n.endswith(SUFFIX)]


class LoadVAEDecoderDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLoadVAEDecoderDelta",
            display_name="Load VAE Decoder Delta",
            category=CATEGORY,
            description="Puts a saved decoder tuning on the VAE that it was made with. The VAE that "
            "you connect is not changed.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE that was tuned."),
                io.Combo.Input("name", options=delta_files(),
                               tooltip=f"Files ending in {SUFFIX} in models/vae and output/vae."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05,
                               tooltip="0 = untuned, 1 = as tuned."),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="With the tuned decoder.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, vae, name: str, strength: float) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("vae", name))
        return io.NodeOutput(with_delta(vae, load_delta(path, vae_weights(vae, False)), strength))


NODES: list[type[io.ComfyNode]] = [TuneVAEDecoder, SaveVAEDecoderDelta, LoadVAEDecoderDelta]
