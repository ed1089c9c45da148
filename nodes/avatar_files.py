"""Avatars as files: saved in the pack's own and in other programs' formats, loaded, and for core's nodes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths
import torch
import torch.nn.functional as F
from comfy_api.latest import Types, io

from ..models.avatar import Avatar, load_avatar, save_avatar
from ..models.cloud_file import AXES, Axes
from ..models.splat_clips import write_clip_ply
from ..models.splat_files import WORLD, write_ply, write_splat
from ..models.splat_gltf import write_gltf
from ..models.splats import Splats
from . import run
from .distill_avatar import CATEGORY
from .embedded import AVATARS, safetensors_in
from .render_avatar import check_frame
from .sockets import AVATAR
from .views import check_prefix

SUFFIX = ".safetensors"
OWN = "avatar (.safetensors)"
ONE_PLY, EACH_PLY = "3DGS of one frame (.ply)", "3DGS of every frame (.ply each)"
CLIP_PLY = "all frames in one (.ply)"
ONE_SPLAT, EACH_SPLAT = "splat of one frame (.splat)", "splat of every frame (.splat each)"
ONE_GLB = "glTF of one frame (.glb)"
FORMATS = [OWN, ONE_PLY, EACH_PLY, CLIP_PLY, ONE_SPLAT, EACH_SPLAT, ONE_GLB]
NONE_FOUND = "(no avatar found)"
SPLAT = getattr(io, "Splat", None)
"""Core's socket of Gaussians; older ComfyUI has none."""

# --- save -----------------------------------------------------------------------------------------


class SaveAvatar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundSaveAvatar",
            display_name="Save Avatar",
            category=CATEGORY,
            description="Saves an avatar: whole, to be loaded again, or as Gaussians of one frame or "
            "all, for splat viewers, Blender, Unity, Unreal and the web.",
            inputs=[
                AVATAR.Input("avatar", tooltip="From Distill Avatar or Animate Avatar."),
                io.String.Input("filename_prefix", default="avatars/avatar",
                                tooltip="Folder and name below ComfyUI's output folder; in 'avatars' "
                                "Load Avatar finds it."),
                io.Combo.Input("format", options=FORMATS, tooltip="avatar: everything, for Load Avatar. "
                               "The others are for other programs; light and motion are baked in."),
                io.Int.Input("frame", default=0, min=0, max=100_000,
                             tooltip="For formats of one frame: which."),
                io.Combo.Input("axes", options=[WORLD, *(a for a in AXES if a != WORLD)],
                               tooltip="Which way is up in a .ply or .splat. Most splat viewers expect y "
                               "down; choose another if the performer stands on the head. glTF is "
                               "always y up."),
            ],
            outputs=[
                io.String.Output(display_name="note", tooltip="Where the files are, and how large."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, avatar: Avatar, filename_prefix: str, format: str, frame: int, axes: Axes
    ) -> io.NodeOutput:
        check_prefix(filename_prefix)
        if format in (ONE_PLY, ONE_SPLAT, ONE_GLB):
            check_frame(avatar, "frame", frame)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        with torch.inference_mode(False):
            files = write_avatar(
                avatar, Path(folder) / f"{name}_{counter:05}_", format, frame, axes
            )
        size = sum(file.stat().st_size for file in files) / 1e6
        many = f"{len(files)} files, the first " if len(files) > 1 else ""
        return io.NodeOutput(
            run.say(cls, f"{many}output/{subfolder}/{files[0].name}: {size:.1f} MB")
        )


def write_avatar(avatar: Avatar, stem: Path, format: str, frame: int, axes: Axes) -> list[Path]:
    """The files of a format, all or none; `stem` is how their names begin."""
    count = avatar.frame_count
    if format == OWN:
        save_avatar(stem.with_name(stem.name + SUFFIX), avatar)
        return [stem.with_name(stem.name + SUFFIX)]
    if format == CLIP_PLY:
        file, bar = stem.with_name(stem.name + "clip.ply"), run.progress(count)
        # Other programs show what is at rest: the first frame.
        write_clip_ply(
            file, avatar.at(0), moments(avatar), avatar.fps, axes, lambda f: bar(f + 1, count)
        )
        return [file]
    one = {
        ONE_PLY: (".ply", _ply(axes)), EACH_PLY: (".ply", _ply(axes)),
        ONE_SPLAT: (".splat", _splat(axes)), EACH_SPLAT: (".splat", _splat(axes)),
        ONE_GLB: (".glb", write_gltf),
    }  # fmt: skip
    suffix, write = one[format]
    frames = range(count) if format in (EACH_PLY, EACH_SPLAT) else [frame]
    files = [stem.with_name(f"{stem.name}frame{f:04}{suffix}") for f in frames]
    _each(avatar, dict(zip(files, frames, strict=True)), write)
    return files


def _each(avatar: Avatar, files: dict[Path, int], write: Callable[[Path, Splats], None]) -> None:
    """A file a frame; none is left when it is cancelled or fails."""
    bar = run.progress(len(files))
    try:
        for done, (file, frame) in enumerate(files.items()):
            write(file, avatar.shown(frame))
            bar(done + 1, len(files))
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


def _ply(axes: Axes) -> Callable[[Path, Splats], None]:
    return lambda file, splats: write_ply(file, splats, axes)


def _splat(axes: Axes) -> Callable[[Path, Splats], None]:
    return lambda file, splats: write_splat(file, splats, axes)


def moments(avatar: Avatar) -> Iterator[Splats]:
    """The Gaussians of every frame."""
    return (avatar.at(f) for f in range(avatar.frame_count))


# --- load -----------------------------------------------------------------------------------------


def avatar_files() -> list[str]:
    """Files of the creator's folder and of output/avatars."""
    return safetensors_in(AVATARS)


class LoadAvatar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLoadAvatar",
            display_name="Load Avatar",
            category=CATEGORY,
            description="Loads an avatar that Save Avatar or a cancelled Distill Avatar has written.",
            inputs=[
                io.Combo.Input("name", options=avatar_files() or [NONE_FOUND],
                               tooltip="Files in models/turnaround_avatars and output/avatars. Files with "
                               "'checkpoint' in their name are of a distilling that was cancelled."),
            ],
            outputs=[
                AVATAR.Output(display_name="avatar", tooltip="For Render Avatar, Preview Avatar and "
                              "Animate Avatar."),
                io.String.Output(display_name="note", tooltip="How large it is, how long its motion, and "
                                 "whether it can take another."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        if name not in avatar_files():
            raise ValueError(
                f"'name' is '{name}', but neither models/turnaround_avatars nor output/avatars has such "
                "a file: save one with Save Avatar, press R on the page and pick it."
            )
        with torch.inference_mode(False):
            avatar = load_avatar(Path(folder_paths.get_full_path_or_raise(AVATARS, name)))
        return io.NodeOutput(avatar, run.say(cls, described(avatar)))

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None) -> str:
        # A checkpoint changes under one name; None while the name comes from a node that has not run.
        path = folder_paths.get_full_path(AVATARS, name) if name else None
        return f"{name} {Path(path).stat().st_mtime_ns if path else 'missing'}"


def described(avatar: Avatar) -> str:
    kind = (
        "on a body, so it can take other motions"
        if avatar.on_body
        else "without a body, so it plays its own motion"
    )
    return (
        f"{len(avatar.splats)} Gaussians, {avatar.frame_count} frames at {avatar.fps:g} frames a second; "
        f"{kind}"
    )


# --- core's Gaussians -----------------------------------------------------------------------------


class AvatarToSplats(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundAvatarToSplats",
            display_name="Avatar to Splats",
            category=CATEGORY,
            description="An avatar as the Gaussians of ComfyUI's own splat nodes, for previewing, "
            "rendering and saving with them. They show one moment.",
            inputs=[
                AVATAR.Input("avatar", tooltip="From Distill Avatar, Animate Avatar or Load Avatar."),
                io.Float.Input("frame", default=0.0, min=-1.0, max=100_000.0, step=0.25,
                               tooltip="Which moment, in frames of the avatar; may lie between two. -1 = "
                               "all frames as a batch, of which most nodes show the first."),
            ],
            outputs=[SPLAT.Output(display_name="splat", tooltip="Gaussians in metres, y down.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, avatar: Avatar, frame: float) -> io.NodeOutput:
        if frame != -1:
            check_frame(avatar, "frame", frame)
        times = [frame] if frame != -1 else range(avatar.frame_count)
        with torch.inference_mode(False):
            clouds = [avatar.at(time) for time in times]
            splats = Types.SPLAT(
                torch.stack([s.means for s in clouds]),
                torch.stack([s.log_scales.exp() for s in clouds]),
                torch.stack([F.normalize(s.rotations, dim=1) for s in clouds]),
                torch.stack([s.opacities.sigmoid()[:, None] for s in clouds]),
                torch.stack([s.sh for s in clouds]),
            )
        return io.NodeOutput(splats)


NODES: list[type[io.ComfyNode]] = [SaveAvatar, LoadAvatar, *([AvatarToSplats] if SPLAT else [])]
