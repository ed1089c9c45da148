"""Deflicker: takes flicker out of any clip, quickly."""

from comfy_api.latest import io

NODES: list[type[io.ComfyNode]] = []
