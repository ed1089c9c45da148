"""Smoothed frames back into the sampler: Latent Guidance and Smooth Loop."""

from comfy_api.latest import io

NODES: list[type[io.ComfyNode]] = []
