"""Implicit video: a clip as one canonical picture and a deformation, fitted and rendered."""

from comfy_api.latest import io

NODES: list[type[io.ComfyNode]] = []
