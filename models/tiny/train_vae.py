"""Train the tiny VAE: `python -m turnaround.models.tiny.train_vae --help`.

A Wan 2.1 VAE (causal 3D convolutions, 8x8 in space, 4x in time, 16 channels) with a sixth of the
published width. Single frames come first, as cheap 2D convolutions on each kernel's last tap, the
only one a lone frame reaches; then short clips train the temporal taps. Beside the reconstruction
(L1 on pixels and on their gradients), two terms shape the latent: channels of zero mean and unit
deviation, and ComfyUI's own linear latent preview of Wan 2.1 must show the picture.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from .layout import WAN21_RGB_BIAS, WAN21_RGB_FACTORS, vae_to_native
from .pictures import procedural_picture
from .scenes import SceneFolder

log = logging.getLogger(__name__)

CONFIG = dict(
    base_dim=16,
    z_dim=16,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    temperal_downsample=[False, True, True],
)


def build_vae() -> torch.nn.Module:
    """The tiny VAE as diffusers' AutoencoderKLWan."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**CONFIG)


@torch.no_grad()
def initialise(vae: torch.nn.Module) -> None:
    """Unit-gain convolutions on the last temporal tap, quiet residual branches.

    With torch's default, which shares a third of its variance with taps that a lone frame never
    reaches, the signal fades along the skip path and training hardly starts.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            continue
        module.bias.normal_(0, 0.05)  # mid grey is 0: a zero vector has no direction to normalise
        weight = module.weight
        fan_in = weight[0, :, -1].numel() if weight.ndim == 5 else weight[0].numel()
        weight.zero_()
        tap = weight[:, :, -1] if weight.ndim == 5 else weight
        quiet = 0.2 if name.endswith((".conv2", ".proj")) else 1.0
        tap.normal_(0, quiet * fan_in**-0.5)
    for name, module in vae.named_modules():
        if name.endswith("time_conv"):
            start_as_copy(module)


def start_as_copy(time_conv: torch.nn.Module) -> None:
    """Let a temporal resampling begin as the mean of two frames, or as repeating one.

    Single-frame training never reaches these convolutions; anything but a copy would scramble the
    channels that it has learned.
    """
    out_channels, in_channels = time_conv.weight.shape[:2]
    eye = torch.eye(in_channels).repeat(out_channels // in_channels, 1)[:, :, None, None]
    time_conv.weight.zero_()
    time_conv.bias.zero_()
    if out_channels == in_channels:  # downsampling
        time_conv.weight[:, :, 1] = time_conv.weight[:, :, 2] = eye / 2
    else:
        time_conv.weight[:, :, 2] = eye


def use_single_frame_convolutions() -> None:
    """Compute a lone frame's causal 3x3x3 convolution as the 3x3 one it is (2.3x faster)."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    whole = WanCausalConv3d.forward

    def forward(self, x, cache_x=None):
        if self.kernel_size == (3, 3, 3) and x.shape[2] == 1 and cache_x is None:
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=1).unsqueeze(2)
        return whole(self, x, cache_x)

    WanCausalConv3d.forward = forward


def autoencode(
    vae: torch.nn.Module,
    clip: Tensor,  # [B, 3, F, H, W], -1..1
) -> tuple[Tensor, Tensor]:  # latents [B, 16, T, h, w], clip again
    """Encode and decode; F = 1 skips the frame-by-frame caches."""
    if clip.shape[2] == 1:
        latents = vae.quant_conv(vae.encoder(clip))[:, : CONFIG["z_dim"]]
        return latents, vae.decoder(vae.post_quant_conv(latents))
    latents = vae.encode(clip).latent_dist.mode()
    return latents, vae.decode(latents).sample


def _gradients(clip: Tensor) -> tuple[Tensor, Tensor]:
    return clip.diff(dim=-1), clip.diff(dim=-2)


def loss_terms(latents: Tensor, output: Tensor, clip: Tensor) -> dict[str, Tensor]:
    """The weighted terms of the loss."""
    dims = (0, 2, 3, 4)
    preview = torch.einsum("bcthw,cr->brthw", latents, WAN21_RGB_FACTORS)
    preview = preview + WAN21_RGB_BIAS.view(1, 3, 1, 1, 1)
    small = (
        F.interpolate(clip[:, :, ::4], size=latents.shape[2:], mode="trilinear", antialias=False)
        if clip.shape[2] > 1
        else F.avg_pool3d(clip, (1, 8, 8))
    )
    return {
        "pixels": (output - clip).abs().mean(),
        "gradients": sum(
            (a - b).abs().mean() for a, b in zip(_gradients(output), _gradients(clip), strict=True)
        ),
        "latent_mean": 0.02 * latents.mean(dims).square().mean(),
        "latent_std": 0.02 * (latents.std(dims) - 1).square().mean(),
        "preview": 0.02 * (preview - small).abs().mean(),
    }


class PictureSource:
    """Batches of crops: procedural pictures, and rendered scenes as soon as there are some."""

    def __init__(self, folder: Path | None, frames: int, size: int, seed: int) -> None:
        self.scenes = SceneFolder(folder) if folder else None
        self.frames, self.size = frames, size
        self.rng = np.random.default_rng(seed)

    def _crop(self) -> np.ndarray:  # [F, size, size, 3]
        if self.scenes is None or not len(self.scenes) or self.rng.random() < 0.1:
            # A moving window over one picture makes a clip with exact motion.
            picture = procedural_picture(self.rng, self.size + 2 * self.frames)
            y, x = self.frames * (1 - (step := self.rng.integers(-1, 2, 2)))
            starts = [(y + i * step[0], x + i * step[1]) for i in range(self.frames)]
            return np.stack([picture[a : a + self.size, b : b + self.size] for a, b in starts])
        return self.scenes.crop(self.rng, self.frames, self.size)

    def batch(self, count: int) -> Tensor:  # [count, 3, F, size, size], -1..1
        crops = np.stack([self._crop() for _ in range(count)])
        return torch.from_numpy(crops).permute(0, 4, 1, 2, 3).float() * 2 - 1


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    use_single_frame_convolutions()
    vae = build_vae().train()
    if args.resume:
        vae.load_state_dict(load_file(args.resume))
    else:
        initialise(vae)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    source = PictureSource(args.data, args.frames, args.size, args.seed)
    start = time.monotonic()
    step, logged = 0, 0.0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * done)))
        clip = source.batch(args.batch)
        latents, output = autoencode(vae, clip)
        terms = loss_terms(latents, output, clip)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 20))
        for key, value in vae.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        step += 1
        if time.monotonic() - logged > 30:
            logged = time.monotonic()
            psnr = -10 * ((output - clip) / 2).square().mean().log10()
            log.info(
                "%5d  %3.0f%%  PSNR %.2f dB  %s",
                step,
                100 * done,
                psnr,
                "  ".join(f"{k} {v:.4f}" for k, v in terms.items()),
            )
            save_file(average, args.out)
    save_file(average, args.out)
    log.info("%d steps; wrote %s", step, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="weights (diffusers keys)")
    parser.add_argument("--resume", type=Path, help="weights to go on from")
    parser.add_argument("--data", type=Path, help="folder of rendered scenes (scenes.py)")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--frames", type=int, default=1, help="1, or 4n+1")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="only convert --out to native keys, half size")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.export:
        native = vae_to_native(load_file(args.out))
        save_file({k: v.half().contiguous() for k, v in native.items()}, args.export)
    else:
        train(args)


if __name__ == "__main__":
    main()
