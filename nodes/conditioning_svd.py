"""What SVD is told of every view: its first frame, as CLIP sees it and as a latent."""

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..models.views import Views, as_pictures, resize_frames, snap_size
from . import run
from .conditioning import CATEGORY
from .patch_unet import VIEWS as COUNT
from .sockets import VIEWS
from .views import frames_to_image

LATENT_CHANNELS = 4
CLIP_CHANNELS = 1024
"""Of the CLIP ViT-H that comes with SVD."""


class MultiViewSVDConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundSVDConditioning",
            display_name="Multi-View SVD Conditioning",
            category=CATEGORY,
            description="Conditions Stable Video Diffusion on the first frame of every view, so "
            "that all views are sampled together. Put View Sync behind the model, or it takes all "
            "views for one long video.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The CLIP_VISION of Image Only "
                                    "Checkpoint Loader."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                VIEWS.Input("start", tooltip="How every view begins: its first frame counts."),
                io.Int.Input("frames", default=14, min=1, max=256,
                             tooltip="Frames of every view: 14 for SVD, 25 for SVD-XT."),
                io.Int.Input("motion_bucket_id", default=127, min=1, max=1023,
                             tooltip="How much moves: 40 little, 127 as usual, 200 much."),
                io.Int.Input("fps", default=6, min=1, max=1024,
                             tooltip="Frames a second that the motion should look right at."),
                io.Float.Input("augmentation_level", default=0.0, min=0.0, max=10.0, step=0.01,
                               tooltip="Noise on the first frame: more of it lets the video "
                               "leave the picture further. Try 0 to 0.1."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
                io.Latent.Output(display_name="latent", tooltip="Empty: all frames of the first "
                                 "view, then all of the second, and so on."),
                io.String.Output(display_name="note", tooltip="What was changed to fit."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip_vision, vae, start: Views, frames, motion_bucket_id, fps, augmentation_level
    ) -> io.NodeOutput:
        pictures, note = first_pictures(start)
        run.say(cls, note)
        bar = run.progress(len(pictures))
        pooled, latents = [], []
        for v, picture in enumerate(pictures):
            pooled.append(_clip_embedding(clip_vision, picture))
            latents.append(_latent(vae, picture, augmentation_level))
            bar(v + 1, len(pictures), picture[0])
        # Every view's for each of its frames, in the order of the latent's batch.
        embeddings = torch.stack(pooled).repeat_interleave(frames, dim=0)
        images = torch.cat(latents).repeat_interleave(frames, dim=0)
        told = {
            "motion_bucket_id": motion_bucket_id,
            "fps": fps,
            "augmentation_level": augmentation_level,
            COUNT: len(pictures),
        }
        positive, negative = (
            [[e, {**told, "concat_latent_image": image}]]
            for e, image in (
                (embeddings, images),
                (torch.zeros_like(embeddings), torch.zeros_like(images)),
            )
        )
        latent = {"samples": torch.zeros_like(images), COUNT: len(pictures)}
        return io.NodeOutput(positive, negative, latent, note)


def first_pictures(start: Views) -> tuple[list[Tensor], str]:
    """The first frame of every view [1, 3, H, W] at a size that SVD takes, and a note."""
    H, W = start.frames.shape[-2:]
    if start.frames.shape[2] != 3:
        raise ValueError(
            "'start' holds depth, but SVD begins with colour pictures: connect colour views."
        )
    width, height = snap_size(W, H)
    note = ""
    if (width, height) != (W, H):
        note = f"{W}x{H} became {width}x{height} (sizes must be multiples of 16)"
    first = as_pictures(Views(start.frames[:, :1]))
    pictures = [resize_frames(picture, width, height) for picture in first]
    if not all(picture.isfinite().all() for picture in pictures):
        raise ValueError(
            "'start' has pixels that are no numbers in its first frames: check the node before."
        )
    return pictures, note


def _clip_embedding(clip_vision: ClipVisionModel, picture: Tensor) -> Tensor:  # [1, 1024]
    embedding = clip_vision.encode_image(frames_to_image(picture)).image_embeds
    if embedding.shape[-1] != CLIP_CHANNELS:
        raise ValueError(
            f"'clip_vision' gives {embedding.shape[-1]} numbers a picture, but SVD reads "
            f"{CLIP_CHANNELS}: use the CLIP_VISION of Image Only Checkpoint Loader."
        )
    return embedding


def _latent(vae: VAE, picture: Tensor, augmentation_level: float) -> Tensor:  # [1, 4, h, w]
    if vae.latent_dim != 2 or vae.latent_channels != LATENT_CHANNELS:
        raise ValueError(
            f"'vae' makes latents of {vae.latent_channels} channels"
            f"{' for videos' if vae.latent_dim == 3 else ''}, but SVD takes pictures of "
            f"{LATENT_CHANNELS}: use the VAE of Image Only Checkpoint Loader."
        )
    # The same noise on all views, and at every run: what differs between views is the view.
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    noisy = picture + augmentation_level * noise.to(picture.device)
    return vae.encode(frames_to_image(noisy))


NODES: list[type[io.ComfyNode]] = [MultiViewSVDConditioning]
