"""Get Models: the checkpoints that the pack's routes want, fetched when a creator says so."""

from pathlib import Path, PurePath

import folder_paths
from comfy_api.latest import io

from ..models.checkpoints import ROUTES, Checkpoint, Route, gigabytes, route
from ..models.fetch_checkpoint import check_room, fetch
from . import run
from .embedded import TINY

CATEGORY = "Turnaround/0 models"
OLD_NAMES = ("unet", "clip")
"""Folders that ComfyUI still looks into, and lists first, but no longer names anywhere."""


def folder_for(kind: str) -> Path:
    """Where a new file of this kind goes: the folder that extra_model_paths.yaml makes the default,
    or ComfyUI's own.

    Raises:
        ValueError: this ComfyUI knows no such kind.
    """
    known = folder_paths.folder_names_and_paths
    if kind not in known:
        raise ValueError(
            f"This ComfyUI has no models of the kind '{kind}': it is older than the node that reads "
            "them. Update ComfyUI first."
        )
    own = Path(folder_paths.models_dir)
    legacy = [own / name for name in OLD_NAMES]
    folders = [Path(p) for p in folder_paths.get_folder_paths(kind)]
    return next(p for p in folders if p not in legacy and not p.is_relative_to(TINY))


def found(checkpoint: Checkpoint) -> str | None:
    """Where the file lies in any folder that ComfyUI reads, those of other programs included."""
    if checkpoint.folder not in folder_paths.folder_names_and_paths:
        return None
    names = folder_paths.get_filename_list(checkpoint.folder)
    name = next((n for n in names if PurePath(n).name == checkpoint.file), None)
    return folder_paths.get_full_path(checkpoint.folder, name) if name else None


def described(checkpoint: Checkpoint) -> str:
    place = found(checkpoint)
    if place:
        return f"{checkpoint.file}: there, in {Path(place).parent}"
    return (
        f"{checkpoint.file}: missing, {gigabytes(checkpoint.size)}, licence {checkpoint.licence}, "
        f"goes to models/{checkpoint.folder}"
    )


def report(wanted: Route) -> str:
    """The verdict first, as the node shows two lines; then every file."""
    missing = [c for c in wanted.checkpoints if not found(c)]
    if missing:
        size = gigabytes(sum(c.size for c in missing))
        verdict = f"{len(missing)} of {len(wanted.checkpoints)} files missing, {size}"
    else:
        verdict = "all files are there"
    lines = map(described, wanted.checkpoints)
    return "\n".join([f"{wanted.name}: {verdict}", *lines, f"for {wanted.unlocks}"])


class GetModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundGetModels",
            display_name="Get Models",
            category=CATEGORY,
            description="Says which files a route needs, and which of them are there; fetches the "
            "missing ones from the Hugging Face hub, but only with its switch on.",
            inputs=[
                io.Combo.Input("what", options=[r.name for r in ROUTES],
                               tooltip="Files that are used together: the model, its text encoder, "
                               "its VAE. The help page has sizes and licences."),
                io.Boolean.Input("download", default=False, label_on="fetch",
                                 label_off="only look",
                                 tooltip="Off: nothing is fetched, the note lists what is missing. On: "
                                 "Run fetches it; Cancel stops at once, and the next Run goes on from "
                                 "there."),
            ],
            outputs=[
                io.String.Output(display_name="note", tooltip="Every file: where it is, or how large "
                                 "it is and under which licence."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, what: str, download: bool) -> io.NodeOutput:
        wanted = route(what)
        missing = [c for c in wanted.checkpoints if not found(c)]
        if download and missing:
            folders = {c: folder_for(c.folder) for c in missing}
            check_room(folders)
            bar = run.progress(sum(c.size for c in missing))
            done = 0
            for number, checkpoint in enumerate(missing, 1):
                run.say(cls, f"fetching {number} of {len(missing)}: {checkpoint.file}, "
                        f"{gigabytes(checkpoint.size)}")  # fmt: skip
                fetch(checkpoint, folders[checkpoint], _share(bar, done, missing))
                done += checkpoint.size
        return io.NodeOutput(run.say(cls, report(wanted)))

    @classmethod
    def fingerprint_inputs(cls, what: str, download: bool) -> str:
        # Files come and go without this node.
        return f"{what} {download} " + " ".join(str(found(c)) for c in route(what).checkpoints)


def _share(bar: run.Progress, done: int, missing: list[Checkpoint]):
    """Progress of one file as progress of them all."""
    total = sum(c.size for c in missing)
    return lambda there, _: bar(min(done + there, total), total)


NODES: list[type[io.ComfyNode]] = [GetModels]
