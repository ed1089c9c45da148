"""The ComfyUI layer. `NODES` lists every node in the order in which data flows."""

from comfy_api.latest import ComfyExtension, io

from . import (
    animate,
    annotators,
    apply_subject,
    background,
    body,
    cameras,
    cloud,
    conditioning,
    conditioning_svd,
    conditioning_wan,
    conditions,
    continue_views,
    decoder_tuning,
    deflicker,
    depth,
    depth_aware,
    embedded,
    flow,
    geometry,
    get_models,
    human,
    implicit,
    latent_frames,
    pose,
    prompts,
    refine,
    refine_latents,
    sampler,
    silhouettes,
    smooth_loop,
    subject_files,
    train_subject,
    views,
    weights,
    windows,
)

NODES: list[type[io.ComfyNode]] = [
    *views.NODES,
    *human.NODES,
    *annotators.NODES,
    *depth.NODES,
    *geometry.NODES,
    *silhouettes.NODES,
    *cameras.NODES,
    *conditions.NODES,
    *body.NODES,
    *animate.NODES,
    *cloud.NODES,
    *conditioning.NODES,
    *conditioning_wan.NODES,
    *conditioning_svd.NODES,
    *prompts.NODES,
    *sampler.NODES,
    *windows.NODES,
    *weights.NODES,
    *continue_views.NODES,
    *pose.NODES,
    *refine.NODES,
    *refine_latents.NODES,
    *background.NODES,
    *flow.NODES,
    *deflicker.NODES,
    *implicit.NODES,
    *smooth_loop.NODES,
    *decoder_tuning.NODES,
    *train_subject.NODES,
    *subject_files.NODES,
    *apply_subject.NODES,
    *depth_aware.NODES,
    *latent_frames.NODES,
    *get_models.NODES,
]


class TurnaroundExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load: ComfyUI 0.3.75 never calls it.
        embedded.register()
        annotators.register()
        return NODES
