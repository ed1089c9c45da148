"""Train the tiny multi-view DiT: `python -m turnaround.models.tiny.train_dit --help`.

A Wan DiT with 48 input channels (noise 16, partial colour 16, normals 16), by flow matching
(rectified flow: x_t = (1 - sigma) x + sigma e, target e - x). As in MV-Performer, the per-view model
learns first to complete what the source camera did not see; then only the view-sync layers train,
with the views of one scene in one batch.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..view_sync import ViewSync
from .layout import dit_to_native
from .scenes import KINDS, load_scene
from .train_vae import build_vae, use_single_frame_convolutions

log = logging.getLogger(__name__)

CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=128,
    in_channels=48,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=1024,
    num_layers=8,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
)
TRAIN_SHIFT = 5.0
"""Wan's timestep shift, towards high noise: ComfyUI samples these models with 8 by default, and the
end of the schedule needs practice too."""


def build_dit() -> torch.nn.Module:
    """The tiny DiT as diffusers' WanTransformer3DModel."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**CONFIG)


def wan_rope(
    grid: tuple[int, int, int],  # latent frames, token rows, token columns
    head_dim: int = 128,
) -> Tensor:  # [1, L, 1, head_dim / 2, 2, 2]
    """Wan's rotation matrices, in the layout that ComfyUI hands to a block as `pe`."""
    axes = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    positions = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"), -1
    ).reshape(-1, 3)
    angles = torch.cat(
        [
            positions[:, i, None] * 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
            for i, d in enumerate(axes)
        ],
        dim=-1,
    )
    cos, sin = angles.cos(), angles.sin()
    pe = torch.stack([cos, -sin, sin, cos], dim=-1).reshape(*angles.shape, 2, 2)
    return pe.float()[None, :, None]


def add_sync(dit: torch.nn.Module, sync: ViewSync) -> dict:
    """Run the sync layers after their blocks, as nodes/patch.py does in ComfyUI.

    Gives a dict that must hold `views` and `grid` at every run.
    """
    state: dict = {}

    def hook(layer):
        def run(_block, inputs, output):
            grid = state["grid"]
            return layer(output, inputs[2], wan_rope(grid), state["views"], grid)

        return run

    for index, layer in sync.blocks.items():
        dit.blocks[int(index)].register_forward_hook(hook(layer))
    return state


@torch.no_grad()
def encode_scenes(folder: Path, vae_weights: Path, seconds: float, stills: int, seed: int) -> None:
    """Encode rendered scenes that have no latents yet, until the time is over.

    `stills` > 0 encodes that many single frames of a scene instead of its clip: a hundredth of the
    work, and most of what there is to learn about completing a view. Processes with different
    seeds share the work by going through the scenes in different orders.
    """
    vae = build_vae().eval()
    vae.load_state_dict(load_file(vae_weights))
    use_single_frame_convolutions()
    stop = time.monotonic() + seconds
    paths = sorted(folder.glob("*.npz"))
    for path in (paths[i] for i in np.random.default_rng(seed).permutation(len(paths))):
        target = path.with_suffix(".stills" if stills else ".latents")
        if target.exists():
            continue
        scene = load_scene(path)
        latents = {}
        for name in KINDS:
            clips = torch.from_numpy(getattr(scene, name)).permute(0, 4, 1, 2, 3) / 127.5 - 1
            if stills:
                chosen = torch.linspace(0, clips.shape[2] - 1, stills).round().long()
                pictures = rearrange(clips[:, :, chosen], "v c s h w -> (v s) c 1 h w")
                z = vae.quant_conv(vae.encoder(pictures))[:, :16]
                latents[name] = rearrange(z, "(v s) c 1 h w -> v c s h w", s=stills).half()
            else:
                latents[name] = vae.encode(clips).latent_dist.mode().half()
        partial = target.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in latents.items()}, partial)
        partial.rename(target)
        if time.monotonic() > stop:
            return


class LatentFolder:
    """Encoded scenes, all in memory (about half a megabyte each); new ones are noticed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clips, self.stills = folder, {}, {}
        self.refresh()

    def refresh(self) -> None:
        for pattern, scenes in (("*.latents", self.clips), ("*.stills", self.stills)):
            for path in self.folder.glob(pattern):
                if path not in scenes:
                    scenes[path] = load_file(path)

    def sample(
        self,
        rng: np.random.Generator,
        views: int,
        still_share: float,
    ) -> tuple[Tensor, Tensor]:
        """Clean latents [v, 16, T, h, w] and conditions [v, 32, T, h, w]; view 0 is the source."""
        still = bool(self.stills) and (not self.clips or rng.random() < still_share)
        scenes = list((self.stills if still else self.clips).values())
        scene = scenes[rng.integers(len(scenes))]
        V = len(scene["frames"])
        keep = [0, *(1 + rng.permutation(V - 1)[: views - 1])]
        x, p, n = (scene[k][keep].float() for k in KINDS)
        if still:
            f = rng.integers(x.shape[2])
            x, p, n = (t[:, :, f : f + 1] for t in (x, p, n))
        return x, torch.cat([p, n], dim=1)


def flow_loss(dit, clean: Tensor, conditions: Tensor, sigma: Tensor) -> Tensor:
    """Rectified-flow loss; sigma [v] in 0..1."""
    noise = torch.randn_like(clean)
    s = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - s) * clean + s * noise
    text = clean.new_zeros(len(clean), 1, CONFIG["text_dim"])
    flow = dit(torch.cat([x, conditions], 1), sigma * 1000, text, return_dict=False)[0]
    return (flow - (noise - clean)).square().mean()


def draw_sigma(rng: np.random.Generator, count: int) -> Tensor:
    """Stratified over the schedule, then shifted."""
    u = (rng.permutation(count) + rng.random(count)) / count
    return torch.from_numpy(TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)).float()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    dit = build_dit().train()
    torch.nn.init.zeros_(dit.proj_out.weight)
    torch.nn.init.zeros_(dit.proj_out.bias)
    if args.resume:
        dit.load_state_dict(load_file(args.resume))
    trained = dit
    data = LatentFolder(args.data)
    if args.sync:
        dit.requires_grad_(False)
        trained = ViewSync(
            CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"],
            blocks=range(args.sync_every - 1, CONFIG["num_layers"], args.sync_every),
        )
        if args.resume_sync:
            trained.load_state_dict(load_file(args.resume_sync))
        state = add_sync(dit, trained)
    average = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    start, logged, step, recent = time.monotonic(), 0.0, 0, []
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        scenes = [data.sample(rng, args.views, args.stills)]
        # A still is a third of a clip: take more of them, for steps of about equal work.
        while not args.sync and scenes[0][0].shape[2] == 1 and len(scenes) < 4:
            scenes.append(data.sample(rng, args.views, 1.0))
        clean, conditions = (torch.cat(part) for part in zip(*scenes, strict=True))
        V = len(clean)
        if args.sync:
            _, _, T, h, w = clean.shape
            state.update(views=V, grid=(T, h // 2, w // 2))
        # Views that are synchronised share one noise level, as they do when sampling.
        sigma = draw_sigma(rng, 1).expand(V) if args.sync else draw_sigma(rng, V)
        loss = flow_loss(dit, clean, conditions, sigma)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        for key, value in trained.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        step += 1
        recent = [*recent[-199:], loss.item()]
        if time.monotonic() - logged > 30:
            logged = time.monotonic()
            data.refresh()
            log.info(
                "%5d  %3.0f%%  loss %.4f  %d scenes",
                step,
                100 * done,
                sum(recent) / len(recent),
                len(data.clips),
            )
            save_file(average, args.out)
    save_file(average, args.out)
    log.info("%d steps; wrote %s", step, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of scenes and latents")
    parser.add_argument("--out", type=Path, help="weights (diffusers keys, or sync keys)")
    parser.add_argument("--resume", type=Path, help="DiT weights to go on from, or to synchronise")
    parser.add_argument("--encode", type=Path, help="only encode the scenes, with this VAE")
    parser.add_argument("--still-frames", type=int, default=0, help="with --encode: single frames")
    parser.add_argument("--stills", type=float, default=0.5, help="share of steps on single frames")
    parser.add_argument("--resume-sync", type=Path, help="sync weights to go on from")
    parser.add_argument("--sync", action="store_true", help="train only the sync layers")
    parser.add_argument("--sync-every", type=int, default=1, help="a sync layer every n blocks")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="only convert --out to native keys, half size")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.encode:
        torch.set_num_threads(args.threads)
        encode_scenes(args.data, args.encode, 60 * args.minutes, args.still_frames, args.seed)
    elif args.export:
        weights = load_file(args.out)
        native = weights if args.sync else dit_to_native(weights)
        save_file({k: v.half().contiguous() for k, v in native.items()}, args.export)
    else:
        train(args)


if __name__ == "__main__":
    main()
