"""Lists the embedded Turnaround-Tiny weights in ComfyUI's own loaders."""

from pathlib import Path

import folder_paths

TINY = Path(__file__).parent.parent / "models" / "tiny"
SUBJECTS = "turnaround_subjects"
"""Folder of learned subjects; those that were saved or stopped lie in output/subjects."""
AVATARS = "turnaround_avatars"
"""Folder of avatars; those that were saved or stopped lie in output/avatars."""


def register() -> None:
    """Add the embedded folders behind the creator's own: a file of theirs with the same name wins."""
    for kind in ("diffusion_models", "vae", "model_patches"):
        folder_paths.add_model_folder_path(kind, str(TINY / kind))
    own = Path(folder_paths.models_dir) / "turnaround_human"
    for folder in (own, TINY / "human"):
        folder_paths.add_model_folder_path("turnaround_human", str(folder))
    for kind, saved in ((SUBJECTS, "subjects"), (AVATARS, "avatars")):
        outputs = Path(folder_paths.get_output_directory()) / saved
        for folder in (Path(folder_paths.models_dir) / kind, outputs):
            folder_paths.add_model_folder_path(kind, str(folder))


def safetensors_in(kind: str) -> list[str]:
    """Names of the safetensors files in a folder kind of the pack; none before it is registered."""
    if kind not in folder_paths.folder_names_and_paths:
        return []
    return [n for n in folder_paths.get_filename_list(kind) if n.endswith(".safetensors")]
