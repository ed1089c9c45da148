"""What every long node needs from ComfyUI: progress with a picture, interruption, devices, notes."""

import itertools
import logging
import sys
from collections.abc import Callable

import comfy.model_management as mm
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ..models.cameras import Rig

log = logging.getLogger("turnaround")

Progress = Callable[..., None]
PREVIEW_SIZE = 512


def to_pil(picture: Tensor) -> Image.Image:
    """[3, H, W] 0..1 as a PIL picture."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().movedim(0, -1)
    return Image.fromarray(pixels.cpu().numpy())


def progress(total: int) -> Progress:
    """A callback (done, total, preview=None) that moves the bar and obeys the cancel button."""
    bar = comfy.utils.ProgressBar(total)

    def on_step(done: int, total: int, preview: Tensor | None = None) -> None:
        mm.throw_exception_if_processing_interrupted()
        image = ("JPEG", to_pil(preview), PREVIEW_SIZE) if preview is not None else None
        bar.update_absolute(done, total, image)

    return on_step


def counted(total: int) -> Callable[[], None]:
    """The same for those who don't count themselves: a step a call."""
    on_step, done = progress(total), itertools.count(1)
    return lambda: on_step(min(next(done), total), total)


def drawing_device(memory: int) -> torch.device:
    """Where points and meshes are drawn, with so many bytes free there.

    Accelerators other than CUDA's lack the whole numbers and doubles that it needs.
    """
    device = mm.get_torch_device()
    if device.type != "cuda":
        return torch.device("cpu")
    mm.free_memory(memory, device)
    return device


def check_memory(what: str, rig: Rig, frames: int, bytes_a_pixel: int) -> None:
    """One sentence instead of a computer that runs out of memory."""
    need = len(rig) * frames * rig.width * rig.height * bytes_a_pixel
    total = mm.get_total_memory(torch.device("cpu"))
    if need > total:
        raise ValueError(
            f"{what} of {len(rig)} views x {frames} frames of {rig.width}x{rig.height} need "
            f"{need / 1e9:.0f} GB, but this computer has {total / 1e9:.0f} GB: use fewer views or "
            "frames, or a smaller rig."
        )


def say(node: type, text: str) -> str:
    """Show a note on the node and in the log; gives the text back."""
    if not text:
        return text
    log.info("Turnaround: %s", text)
    # Looked up, not imported: importing it would start half of a server where none runs.
    server = sys.modules.get("server")
    instance = getattr(server.PromptServer, "instance", None) if server else None
    if instance is not None:
        instance.send_progress_text(text, node.hidden.unique_id)
    return text
