"""The ComfyUI layer. `NODES` lists every node in the order in which data flows."""

from comfy_api.latest import ComfyExtension, io

from . import (
    annotators,
    body,
    cameras,
    cloud,
    conditioning,
    conditioning_svd,
    conditions,
    depth,
    embedded,
    geometry,
    human,
    sampler,
    views,
)

NODES: list[type[io.ComfyNode]] = [
    *views.NODES,
    *human.NODES,
    *annotators.NODES,
    *depth.NODES,
    *geometry.NODES,
    *cameras.NODES,
    *conditions.NODES,
    *body.NODES,
    *cloud.NODES,
    *conditioning.NODES,
    *conditioning_svd.NODES,
    *sampler.NODES,
]


class TurnaroundExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load: ComfyUI 0.3.75 never calls it.
        embedded.register()
        annotators.register()
        return NODES
