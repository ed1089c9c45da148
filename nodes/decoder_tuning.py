"""A VAE decoder tuned to one clip."""

from comfy_api.latest import io

NODES: list[type[io.ComfyNode]] = []
