"""Train the tiny multi-view DiT: `python models/tiny dit --help`.

A Wan DiT with 48 input channels (noise 16, partial colour 16, normals 16), by flow matching
(rectified flow, Liu 2022: x_t = (1 - sigma) x + sigma e, target e - x; timestep shift as in Wan).
As in MV-Performer, the per-view model learns first to complete what the source camera did not see,
with the performer's own video as a reference in its text cross-attention; then, with `--sync`, the
view-sync layers train, the views of one scene together. In the paper they train alone, in a large
model that rests; behind this small one they gained nothing alone, so the layers that work on the same
tokens (self-attention, feed-forward, patch embedding) go on training with them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..geometry import BACKGROUND as GREY
from ..views import reference_frames
from .autoencoder import TinyVAE, encode_linearly, encoder_as_convolution
from .layout import WAN21_RGB_BIAS, WAN21_RGB_FACTORS, dit_to_native
from .multi_view_dit import MultiViewDiT
from .render_scenes import add_scene_options, scenes_of
from .scenes import KINDS, Scene, Scenes
from .training import Run, Settings, common_options, prepare, run_options

TRAIN_SHIFT = 5.0
"""Towards high noise, as ComfyUI samples these models (8 by default); the end of the schedule needs
practice too."""
DROP_NORMALS, DROP_REFERENCE = 0.1, 0.2
"""Shares of scenes without, so that a graph may leave them out and an ablation means something."""
PERMUTE_COLORS = 0.5
DROP_SYNC = 0.25
"""Share of the steps of the second stage without sync, so that it can be left out when sampling."""


class SceneBatches:
    """Scenes as latents: the reference (view 0, the source camera), then the views to make."""

    def __init__(self, scenes: Scenes, vae: TinyVAE, device: torch.device) -> None:
        self.scenes, self.device = scenes, device
        self.convolution = [t.to(device) for t in encoder_as_convolution(vae)]

    def _pictures(self, scene: Scene, rng: np.random.Generator, views: int, still: bool) -> Tensor:
        """[kind, 1 + views, 3, F, H, W] 0..1; kinds: truth, partial colour, normals."""
        V, frames = scene.frames.shape[:2]
        chosen = [0, *rng.permutation(V)[:views]]
        moments = list(range(frames))[:: rng.choice([-1, 1])]
        if still:
            moments = [moments[rng.integers(frames)]]
        kinds = [getattr(scene, kind)[chosen][:, moments] for kind in KINDS]
        pictures = torch.stack(kinds).to(self.device).permute(0, 1, 5, 2, 3, 4).float() / 255
        mask = scene.masks[0, moments].to(self.device).float() / 255
        H, W = mask.shape[1:]
        source = reference_frames(pictures[0, 0].movedim(0, 1), mask, W, H, GREY)
        pictures[0, 0] = source.movedim(1, 0)
        if rng.random() < PERMUTE_COLORS:
            pictures[:2] = pictures[:2][:, :, rng.permutation(3)]
        if rng.random() < 0.5:
            pictures = pictures.flip(-1)
            seen = pictures[2].amax(1) > 0  # black stays black
            pictures[2, :, 0] = torch.where(seen, 1 - pictures[2, :, 0], 0.0)
        if rng.random() < DROP_NORMALS:
            pictures[2] = GREY
        return pictures

    def draw(
        self, rng: np.random.Generator, step: int, scenes: int, views: int, still: bool
    ) -> tuple[Tensor, Tensor]:  # clean [scenes, 1 + views, 16, T, h, w], conditions [.., 32, ..]
        pictures = torch.stack(
            [
                self._pictures(self.scenes.choose(rng, step), rng, views, still)
                for _ in range(scenes)
            ]
        )
        latents = encode_linearly(pictures.flatten(0, 2), *self.convolution)
        clean, partial, normals = latents.unflatten(0, pictures.shape[:3]).unbind(1)
        # The reference is known in full, and nothing else of it.
        partial[:, 0], normals[:, 0] = clean[:, 0], 0
        return clean, torch.cat([partial, normals], dim=2)


def draw_sigma(rng: np.random.Generator, count: int) -> Tensor:
    """[count] stratified over the schedule, then shifted."""
    u = (rng.permutation(count) + rng.random(count)) / count
    return torch.from_numpy(TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)).float()


def flow_loss(
    model: MultiViewDiT,
    clean: Tensor,  # [scenes, V, 16, T, h, w]
    conditions: Tensor,  # [scenes, V, 32, T, h, w]
    sigma: Tensor,  # [scenes, V]; 0 for a reference
    with_reference: bool,
    synced: bool,
) -> Tensor:
    """Rectified-flow loss over all views but the reference."""
    views, first = clean.shape[1], 1 if with_reference else 0
    s, noise = sigma[..., None, None, None, None], torch.randn_like(clean)
    x = torch.cat([(1 - s) * clean + s * noise, conditions], 2).flatten(0, 1)
    flow = model(x, sigma.flatten(), views, with_reference, synced).unflatten(0, (-1, views))
    return (flow - (noise - clean))[:, first:].square().mean()


@torch.no_grad()
def sample(
    model: MultiViewDiT,
    clean: Tensor,  # [1, 1 + V, 16, T, h, w]; only the reference is looked at
    conditions: Tensor,
    synced: bool,
    steps: int = 8,
) -> Tensor:  # [1, 1 + V, 16, T, h, w]
    """Euler steps down ComfyUI's default schedule (shift 8), for progress pictures."""
    u = torch.linspace(1, 0, steps + 1)
    sigmas = 8 * u / (1 + 7 * u)
    x = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    x[:, 0] = clean[:, 0]
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        sigma = now.expand(x.shape[1]).clone().to(x)
        sigma[0] = 0
        both = torch.cat([x, conditions], 2)[0]
        flow = model(both, sigma, x.shape[1], with_reference=True, synced=synced)[None]
        x[:, 1:] += (after - now) * flow[:, 1:]
    return x


def preview(latents: Tensor) -> Tensor:  # [16, h, w] -> [3, 8 h, 8 w] 0..1
    """ComfyUI's linear preview of Wan 2.1 latents."""
    rgb = torch.einsum("chw,cr->rhw", latents, WAN21_RGB_FACTORS.to(latents))
    rgb = (rgb + WAN21_RGB_BIAS.to(latents)[:, None, None] + 1) / 2
    return rgb.clamp(0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)


def progress_picture(model: MultiViewDiT, clean: Tensor, conditions: Tensor, synced: bool):
    """Rows: truth, partial colour, sampled; the middle frame of every view."""
    middle = clean.shape[3] // 2
    rows = (clean, conditions[:, :, :16], sample(model, clean, conditions, synced))
    return torch.cat(
        [torch.cat([preview(v[:, middle]) for v in row[0]], dim=2) for row in rows], dim=1
    )


def main() -> None:
    parser = common_options(__doc__, steps=8000, batch=2, lr=1e-3)
    add_scene_options(parser)
    parser.add_argument("--vae", type=Path, required=True, help="its encoder makes the latents")
    parser.add_argument("--start", type=Path, help="weights of the whole model to begin with")
    parser.add_argument(
        "--sync", action="store_true", help="the second stage: views attend to each other"
    )
    parser.add_argument("--views", type=int, default=3, help="of a scene at a time")
    parser.add_argument("--stills", type=float, default=0.5, help="share of single-frame steps")
    parser.add_argument("--whole", type=Path, help="write the whole model here, to --start from")
    parser.add_argument("--export", type=Path, help="write the native DiT here")
    parser.add_argument("--export-sync", type=Path, help="write its sync weights here")
    args = parser.parse_args()
    prepare(args)
    vae = TinyVAE()
    vae.load_state_dict({k: v.float() for k, v in load_file(args.vae).items()})
    model = MultiViewDiT()
    if args.start:
        model.load_state_dict(load_file(args.start))
    if args.sync:
        model.start_sync()
    model.requires_grad_(False)
    trained = trained_parts(model, args.sync)
    for module in trained.values():
        module.requires_grad_(True)
    run = Run(trained, Settings.of(args, warmup=100, decay=0.999), **run_options(args))
    model.to(run.device)
    data = SceneBatches(scenes_of(args), vae, run.device)
    shown = data.draw(np.random.default_rng(1), 0, 1, 5, False)

    def step_loss(rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        still = rng.random() < args.stills
        # A still is a third of a clip: three times as many make a step of about equal work.
        clean, conditions = data.draw(
            rng, step, args.batch * (3 if still else 1), args.views, still
        )
        S, V = clean.shape[:2]
        # Views that are synchronised share one noise level, as they do when sampling.
        sigma = draw_sigma(rng, S)[:, None].expand(S, V) if args.sync else draw_sigma(rng, S * V)
        sigma = sigma.reshape(S, V).clone()
        sigma[:, 0] = 0
        parts = [clean, conditions, sigma.to(run.device)]
        with_reference = rng.random() >= DROP_REFERENCE
        if not with_reference:
            parts = [t[:, 1:] for t in parts]
        synced = args.sync and rng.random() >= DROP_SYNC
        return {"flow": flow_loss(model, *parts, with_reference, synced)}

    run.fit(step_loss, lambda _: progress_picture(model, *shown, args.sync))
    with run.averaged():
        weights = {k: v.cpu().clone() for k, v in model.state_dict().items()}
    if args.whole:
        save_file(weights, args.whole)
    if args.export:
        export(weights, args.export, "dit.")
    if args.export_sync:
        export(weights, args.export_sync, "sync.")


def trained_parts(model: MultiViewDiT, sync: bool) -> dict[str, nn.Module]:
    """What a stage trains; the second's fits a checkpoint's limit (see `training`)."""
    if not sync:
        return {"dit": model.dit, "references": model.sync.references}
    blocks = model.dit.blocks
    return {
        "sync": model.sync.blocks,
        "self_attention": nn.ModuleList(block.attn1 for block in blocks),
        "feed_forward": nn.ModuleList(block.ffn for block in blocks),
        "patch_embedding": model.dit.patch_embedding,
    }


def export(weights: dict[str, Tensor], path: Path, start: str) -> None:
    """Write one part of the whole model ("dit." or "sync.") in half precision, for ComfyUI."""
    part = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    native = dit_to_native(part) if start == "dit." else part
    save_file({k: v.half().contiguous() for k, v in native.items()}, path)


if __name__ == "__main__":
    main()
