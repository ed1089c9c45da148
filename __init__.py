"""Turnaround: synchronised multi-view video of a performer, as ComfyUI nodes."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """Called by ComfyUI; `nodes/` is imported here so that `models/` loads without ComfyUI."""
    from .nodes import TurnaroundExtension

    return TurnaroundExtension()
