"""Views in and out: sample performer, pictures, latents, preview, files. Clips: clips.py."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.sd import VAE
from comfy_api.latest import InputImpl, Types, io, ui
from einops import rearrange
from torch import Tensor

from ..models import performer
from ..models.cameras import Rig, framing_distance, orbit_rig
from ..models.video_file import even_sized, write_mp4
from ..models.views import (
    Views,
    as_pictures,
    contact_sheet,
    grid_video,
    resize_frames,
    snap_frames,
    snap_size,
    view_labels,
)
from ..models.views_stream import GRID
from . import run
from .node_previews import OUTPUT, stored
from .patch_unet import VIEWS as VIEW_COUNT
from .sockets import RIG, VIEWS

CATEGORY = "Turnaround/1 views"
SAMPLE_FOV = 35.0
SAMPLE_FPS = 16.0


def image_to_frames(image: Tensor) -> Tensor:  # [F, H, W, C] -> [F, 3, H, W]
    """ComfyUI's IMAGE as video frames in ordinary memory: grey becomes colour, alpha is left out."""
    if image.shape[-1] < 3:
        image = image[..., :1].expand(*image.shape[:-1], 3)
    return image[..., :3].movedim(-1, 1).cpu()


def frames_to_image(frames: Tensor) -> Tensor:  # [F, 3, H, W] -> [F, H, W, 3]
    """Video frames as ComfyUI's IMAGE."""
    return frames.movedim(1, -1).contiguous()


def snapped(frames: int, width: int, height: int) -> tuple[int, int, int, str]:
    """Frames to 4n + 1, sizes to multiples of 16, and a sentence when something changed."""
    new_frames, (new_width, new_height) = snap_frames(frames), snap_size(width, height)
    changes = []
    if new_frames != frames:
        changes.append(f"{frames} frames became {new_frames} (video models need 4n+1)")
    if (new_width, new_height) != (width, height):
        changes.append(
            f"{width}x{height} became {new_width}x{new_height} (sizes must be multiples of 16)"
        )
    return new_frames, new_width, new_height, "; ".join(changes)


class SamplePerformer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        bank = performer.load_performers()
        return io.Schema(
            node_id="TurnaroundSamplePerformer",
            display_name="Sample Performer",
            category=CATEGORY,
            description="A synthetic performer that comes with the pack: a video with its exact "
            "mask and depth, and, for any rig, the true pictures to judge results by. Performers "
            "and motions marked 'unseen' were never part of any training.",
            inputs=[
                io.Combo.Input(
                    "performer",
                    options=unseen_first(bank.characters, 0),
                    tooltip="Whose body. 'unseen' ones are new to the embedded models.",
                ),
                io.Combo.Input(
                    "motion",
                    options=unseen_first(bank.motions, 1),
                    tooltip="What the performer does (motion capture).",
                ),
                io.Int.Input("frames", default=13, min=1, max=241, step=4,
                             tooltip="Length of the clip; 4n+1 fits video models."),
                io.Int.Input("width", default=384, min=64, max=2048, step=16,
                             tooltip="Width of the source video in pixels."),
                io.Int.Input("height", default=480, min=64, max=2048, step=16,
                             tooltip="Height of the source video in pixels."),
                io.Float.Input("start", default=0.2, min=0.0, max=10.0, step=0.1,
                               tooltip="Where in the motion the clip begins, in seconds."),
                io.Int.Input("clothes_seed", default=1_000_003, min=0, max=2**31 - 1,
                             tooltip="Which clothes, hair and colours."),
                RIG.Input("rig", optional=True,
                          tooltip="When connected, 'truth' shows the performer from every camera "
                          "of this rig: what a perfect result would be."),
            ],
            outputs=[
                VIEWS.Output(display_name="video", tooltip="The source video, one view, with its exact mask."),
                VIEWS.Output(display_name="depth", tooltip="Exact depth in metres, for Performer Geometry."),
                VIEWS.Output(display_name="truth", tooltip="True pictures from the rig's cameras; without a "
                             "rig, the source video."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, performer: str, motion: str, frames, width, height, start, clothes_seed, rig=None
    ) -> io.NodeOutput:
        frames, width, height, note = snapped(frames, width, height)
        run.say(cls, note)
        posed, look = _posed(performer.split()[0], motion.split()[0], frames, start, clothes_seed)
        source = _source_camera(posed, width, height)
        clip = _render(posed, look, source)
        video = Views(clip.frames, clip.masks, source, SAMPLE_FPS)
        depth = Views(clip.depth[:, :, None], clip.masks, source, SAMPLE_FPS)
        if rig is None:
            return io.NodeOutput(video, depth, video)
        truth = _render(posed, look, rig)
        return io.NodeOutput(video, depth, Views(truth.frames, truth.masks, rig, SAMPLE_FPS))


def unseen_first(names: tuple[str, ...], part: int) -> list[str]:
    """The test split first, marked; then the rest."""
    unseen = performer.SPLITS["test"][part]
    return [f"{n} (unseen)" for n in unseen] + [n for n in names if n not in unseen]


def _posed(character: str, motion: str, frames: int, start: float, seed: int):
    look = performer.draw_appearance(seed)
    times = start + torch.arange(frames) / SAMPLE_FPS
    return performer.pose_performer(character, motion, times, look), look


def _source_camera(posed, width: int, height: int) -> Rig:
    """A camera in front that holds the whole clip."""
    half = posed.vertices.abs().amax((0, 1))
    fov = np.deg2rad(SAMPLE_FOV)
    distance = framing_distance(float(half[[0, 2]].norm()), float(half[1]), fov, width, height)
    return orbit_rig(torch.zeros(1), torch.zeros(1), distance, fov, width, height)


def _render(posed, look, rig: Rig) -> performer.RenderedClip:
    bar = run.progress(len(rig) * len(posed.vertices))
    return performer.render_performer(posed, look, rig, on_step=bar)


def pick_view(views: Views, view: int) -> int:
    """A view number from a widget, checked."""
    if not -1 <= view < len(views):
        raise ValueError(
            f"'view' is {view}, but there are {len(views)} views: use 0 to {len(views) - 1}, "
            "or -1 for all."
        )
    return view


class ViewsToImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewsToImages",
            display_name="Views to Images",
            category=CATEGORY,
            description="Gives one view, or all of them one after another, as an IMAGE batch for "
            "any other node.",
            inputs=[
                VIEWS.Input("views", tooltip="Views of any kind; depth becomes near = bright."),
                io.Int.Input("view", default=-1, min=-1, max=63,
                             tooltip="Which view, from 0; -1 = all, view after view."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="F pictures, or V x F."),
                io.Mask.Output(display_name="masks", tooltip="Their masks; all white when there are none."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, views: Views, view: int) -> io.NodeOutput:
        view = pick_view(views, view)
        chosen = slice(None) if view == -1 else slice(view, view + 1)
        frames = rearrange(as_pictures(views, chosen), "v f c h w -> (v f) c h w")
        masks = views.masks[chosen] if views.masks is not None else torch.ones_like(frames[:, 0])
        masks = masks.float().reshape(-1, *masks.shape[-2:])
        return io.NodeOutput(frames_to_image(frames), masks)


class ViewsToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundViewsToVideo",
            display_name="Views to Video",
            category=CATEGORY,
            description="Gives one view, or all of them side by side in a labelled grid, as VIDEO.",
            inputs=[
                VIEWS.Input("views", tooltip="Views of any kind."),
                io.Int.Input("view", default=-1, min=-1, max=63,
                             tooltip="Which view, from 0; -1 = a grid of all."),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="The view or the grid.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, views: Views, view: int) -> io.NodeOutput:
        view = pick_view(views, view)
        frames = grid_video(views) if view == -1 else as_pictures(views, view)
        frames = even_sized(frames)  # core's Save Video refuses odd sizes
        rate = Fraction(views.fps).limit_denominator(1001)
        return io.NodeOutput(
            InputImpl.VideoFromComponents(
                Types.VideoComponents(images=frames_to_image(frames), frame_rate=rate)
            )
        )


def _check_video_vae(vae) -> None:
    # `not_video` marks 3D VAEs that ComfyUI feeds frame by frame.
    if vae.latent_dim != 3 or vae.not_video:
        raise ValueError(
            "'vae' is one for still pictures; views need a video VAE such as Wan's "
            "(turnaround_tiny_vae or wan_2.1_vae)."
        )


def encode_views(
    vae: VAE,
    clips: Iterable[Tensor],  # of [F, 3, H, W]
    count: int,
    on_step: run.Progress | None = None,
) -> Tensor:  # [count, 16, T, h, w]
    """Every view through the VAE as a video of its own (a plain VAE Encode would join them)."""
    _check_video_vae(vae)
    latents = []
    for v, clip in enumerate(clips):
        latents.append(vae.encode(frames_to_image(clip)))
        if on_step:
            on_step(v + 1, count)
    return torch.cat(latents)


def clips_of(latent: dict, vae: VAE, rig: Rig | None) -> Sequence[Tensor]:
    """Of every view what the VAE decodes at once, [1, C, T, h, w] or, of a UNet's, [T, C, h, w]."""
    samples = latent["samples"]
    if samples.ndim == 5:
        _check_video_vae(vae)
        return samples.split(1)
    views = latent.get(VIEW_COUNT, len(rig) if rig is not None else 0)
    if samples.ndim != 4 or not views or len(samples) % views:
        raise ValueError(
            f"'latent' holds pictures (shape {list(samples.shape)}), not videos: connect the "
            "latent of a video sampler, and for Stable Video Diffusion the rig of its views."
        )
    if vae.latent_dim != 2:
        raise ValueError(
            f"'latent' has shape {list(samples.shape)}, frame by frame as Stable Video Diffusion's, "
            "but 'vae' is of another video model: load the VAE of the model that made the latent."
        )
    return samples.split(len(samples) // views)


def decode_views(
    vae: VAE, clips: Sequence[Tensor], on_step: run.Progress | None = None
) -> Tensor:  # [V, F, 3, H, W]
    """Every view through the VAE; a plain VAE Decode would flatten views into frames."""
    views = []
    for v, clip in enumerate(clips):
        images = vae.decode(clip)  # [1, F, H, W, 3] or [F, H, W, 3]
        pictures = images.reshape(-1, *images.shape[-3:]).movedim(-1, 1)
        views.append(pictures.clamp(0, 1))  # not every VAE of the host keeps to 0..1
        if on_step:
            on_step(v + 1, len(clips), views[-1][len(views[-1]) // 2])
    return torch.stack(views)


def fit_to_vae(views: Views) -> tuple[Iterator[Tensor], str]:
    """Clips [F, 3, H, W] at a size and length that the VAE takes, one view a time, and a note."""
    frames, _, H, W = views.frames.shape[1:]
    count, width, height, note = snapped(frames, W, H)
    clips = (as_pictures(views, v)[:count] for v in range(len(views)))
    return (resize_frames(clip, width, height) for clip in clips), note


class EncodeViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundEncodeViews",
            display_name="Encode Views",
            category=CATEGORY,
            description="Encodes every view as a video of its own and keeps the view count: the "
            "latent's batch is the views.",
            inputs=[
                VIEWS.Input("views", tooltip="Colour views."),
                io.Vae.Input("vae", tooltip="A video VAE (Wan 2.1 or Turnaround-Tiny)."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="One batch item a view."),
                io.String.Output(display_name="note", tooltip="What was changed to fit."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, views: Views, vae) -> io.NodeOutput:
        clips, note = fit_to_vae(views)
        run.say(cls, note)
        samples = encode_views(vae, clips, len(views), run.progress(len(views)))
        return io.NodeOutput({"samples": samples}, note)


def check_rig(rig: Rig | None, samples: Sequence[Tensor]) -> None:  # [V, ...]
    """One sentence when rig and latent don't belong together."""
    if rig is not None and len(rig) != len(samples):
        raise ValueError(
            f"The rig has {len(rig)} cameras but the latent {len(samples)} views: connect the "
            "rig that the conditions were rendered with."
        )


class DecodeViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundDecodeViews",
            display_name="Decode Views",
            category=CATEGORY,
            description="Decodes every view as a video of its own. Use it instead of VAE Decode, "
            "which would run the views together into one long clip.",
            inputs=[
                io.Latent.Input("latent", tooltip="One batch item a view, from a sampler."),
                io.Vae.Input("vae", tooltip="The VAE of the model that made the latent."),
                io.Float.Input("fps", default=16.0, min=1.0, max=240.0, step=0.5,
                               tooltip="Frames a second of the result."),
                RIG.Input("rig", optional=True, tooltip="The cameras of the views."),
            ],
            outputs=[VIEWS.Output(display_name="views", tooltip="The decoded views.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, vae, fps, rig=None) -> io.NodeOutput:
        clips = clips_of(latent, vae, rig)
        check_rig(rig, clips)
        frames = decode_views(vae, clips, run.progress(len(clips)))
        if rig is not None:
            rig = rig.resized(frames.shape[-1], frames.shape[-2])
        return io.NodeOutput(Views(frames, None, rig, fps))


class PreviewViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundPreviewViews",
            display_name="Preview Views",
            category=CATEGORY,
            description="Plays all views together on one timeline: step, zoom, one view alone, "
            "before and after with a wipe; and gives a contact sheet: one row a view, time from "
            "left to right.",
            inputs=[
                VIEWS.Input("views", tooltip="Views of any kind."),
                io.Int.Input("moments", default=5, min=1, max=20,
                             tooltip="Columns of the contact sheet."),
                VIEWS.Input("compare", optional=True,
                            tooltip="The same views before (or after) a change, to wipe between the two."),
            ],
            outputs=[io.Image.Output(display_name="contact_sheet", tooltip="One row a view.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, views: Views, moments: int, compare: Views | None = None) -> io.NodeOutput:
        if compare is not None and len(compare) != len(views):
            raise ValueError(
                f"'compare' has {len(compare)} views but 'views' {len(views)}: connect the same "
                "views before and after a change."
            )
        run.say(cls, _differing_lengths(views, compare))
        shown = [stored(views, "views", 0, GRID, alone=True)]
        if compare is not None:
            shown.append(stored(compare, "compare", 1, GRID, alone=True))
        sheet = contact_sheet(views, moments)
        return io.NodeOutput(frames_to_image(sheet[None]), ui={OUTPUT: shown})


def _differing_lengths(views: Views, compare: Views | None) -> str:
    frames = views.frames.shape[1]
    if compare is None or compare.frames.shape[1] == frames:
        return ""
    return (
        f"'compare' has {compare.frames.shape[1]} frames and 'views' {frames}: the player keeps to "
        "'views' and holds the last frame of what is shorter"
    )


LABEL_LENGTH = 40
"""Characters of a camera's name that go into a file name; file systems stop at 255 bytes."""


def check_prefix(prefix: str) -> None:
    path = Path(prefix)
    if not prefix.strip(" ./\\") or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"'filename_prefix' is '{prefix}', but files go only below ComfyUI's output folder: "
            "use a name such as 'turnaround/performer'."
        )


class SaveViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundSaveViews",
            display_name="Save Views",
            category="Turnaround/9 save",
            description="Saves one mp4 a view and one of all views in a labelled grid into "
            "ComfyUI's output folder.",
            inputs=[
                VIEWS.Input("views", tooltip="The views to keep."),
                io.String.Input("filename_prefix", default="turnaround/performer",
                                tooltip="Folder and name below ComfyUI's output folder."),
                io.Int.Input("quality", default=18, min=0, max=51,
                             tooltip="H.264 CRF: 0 = best and large, 18 = looks the same, "
                             "30 = small."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, views: Views, filename_prefix: str, quality: int) -> io.NodeOutput:
        check_prefix(filename_prefix)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        bar = run.progress(len(views) + 1)
        stem = f"{name}_{counter:05}_"
        for v, label in enumerate(view_labels(views)):
            frames = as_pictures(views, v)
            safe = "".join(c for c in label if c.isalnum() or c in "-_+")[:LABEL_LENGTH]
            write_mp4(Path(folder) / f"{stem}view{v:02}_{safe}.mp4", frames, views.fps, quality)
            bar(v + 1, len(views) + 1)
        file = f"{stem}grid.mp4"
        write_mp4(Path(folder) / file, grid_video(views), views.fps, quality)
        bar(len(views) + 1, len(views) + 1)
        return io.NodeOutput(
            ui=ui.PreviewVideo([ui.SavedResult(file, subfolder, io.FolderType.output)])
        )


NODES: list[type[io.ComfyNode]] = [
    SamplePerformer,
    ViewsToImages,
    ViewsToVideo,
    EncodeViews,
    DecodeViews,
    PreviewViews,
    SaveViews,
]
