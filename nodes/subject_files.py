"""Subjects as files: saved and loaded."""

from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..models.subject import Subject, load_subject, save_subject
from . import run
from .embedded import SUBJECTS, safetensors_in
from .sockets import SUBJECT
from .train_subject import CATEGORY, SUFFIX
from .views import check_prefix


class SaveSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundSaveSubject",
            display_name="Save Subject",
            category=CATEGORY,
            description="Saves a learned subject with everything that is needed to use it again.",
            inputs=[
                SUBJECT.Input("subject", tooltip="From Train Subject."),
                io.String.Input("filename_prefix", default="subjects/subject",
                                tooltip="Folder and name below ComfyUI's output folder; in 'subjects' "
                                "Load Subject finds it."),
                io.Boolean.Input("can_go_on", default=True,
                                 tooltip="On: training can go on from the file. Off: a third of the "
                                 "size."),
            ],
            outputs=[
                io.String.Output(display_name="note", tooltip="Where the file is, and how large."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, subject: Subject, filename_prefix: str, can_go_on: bool) -> io.NodeOutput:
        check_prefix(filename_prefix)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = Path(folder) / f"{name}_{counter:05}_{SUFFIX}"
        save_subject(file, subject if can_go_on else replace(subject, training={}))
        note = f"output/{subfolder}/{file.name}: {file.stat().st_size / 1e6:.1f} MB"
        return io.NodeOutput(run.say(cls, note))


NONE_FOUND = "(no subject found)"


def subject_files() -> list[str]:
    """Files of the creator's folder and of output/subjects."""
    return safetensors_in(SUBJECTS)


class LoadSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurnaroundLoadSubject",
            display_name="Load Subject",
            category=CATEGORY,
            description="Loads a subject that Save Subject or a stopped Train Subject has written.",
            inputs=[
                io.Combo.Input("name", options=subject_files() or [NONE_FOUND],
                               tooltip="Files in models/turnaround_subjects and output/subjects. Files "
                               "with 'checkpoint' in their name are of a training that was stopped: "
                               "Train Subject can go on from them."),
            ],
            outputs=[
                SUBJECT.Output(display_name="subject", tooltip="For Apply Subject, or for Train "
                               "Subject to go on."),
                io.String.Output(display_name="note", tooltip="What it was learned from, and with "
                                 "what kind of model."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        if name not in subject_files():
            raise ValueError(
                f"'name' is '{name}', but neither models/turnaround_subjects nor output/subjects has "
                "such a file: save one with Save Subject, press R on the page and pick it."
            )
        subject = load_subject(Path(folder_paths.get_full_path_or_raise(SUBJECTS, name)))
        return io.NodeOutput(subject, run.say(cls, _described(subject)))

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None) -> str:
        # A checkpoint grows under one name; None while the name comes from a node that has not run.
        path = folder_paths.get_full_path(SUBJECTS, name) if name else None
        return f"{name} {Path(path).stat().st_mtime_ns if path else 'missing'}"


def _described(subject: Subject) -> str:
    seen, shape = subject.pictures, subject.net.shape
    more = "training can go on" if subject.training else "saved without what going on needs"
    blocks = ", ".join(str(i) for i in shape.blocks) or "none"
    return (
        f"{len(seen)} pictures of {seen.rig.width}x{seen.rig.height}, {len(subject.losses)} steps; "
        f"for a model of width {shape.width}, in blocks {blocks}; {more}"
    )


NODES: list[type[io.ComfyNode]] = [SaveSubject, LoadSubject]
