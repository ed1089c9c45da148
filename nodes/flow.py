"""Motion from picture to picture: optical flow, flow of a body, flow of other nodes."""

from comfy_api.latest import io

NODES: list[type[io.ComfyNode]] = []
