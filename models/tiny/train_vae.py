"""Train the tiny VAE: `python models/tiny vae --help`.

The encoder is computed from the data (`autoencoder_start.py`) and stays; training is of the decoder, from
its least-squares start, by a Huber loss on pixels (Huber 1964) and L1 on their differences
(the gradient term of CoDeF and many depth networks).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from .autoencoder import TinyVAE
from .autoencoder_start import start_decoder, start_encoder
from .pictures import procedural_picture
from .render_scenes import add_scene_options, scenes_of
from .scenes import Scenes, crop
from .training import Run, Settings, common_options, prepare, run_options

START_CLIPS = (200, 64)
"""Clips for the start of the encoder and of the decoder."""
PROCEDURAL = 0.1
"""Share of crops that show no performer."""


def loss_terms(output: Tensor, clip: Tensor) -> dict[str, Tensor]:
    """Both [B, 3, F, H, W], 0..1."""
    return {
        "pixels": 10 * F.huber_loss(output, clip, delta=0.1),
        "gradients": sum(
            (output.diff(dim=d) - clip.diff(dim=d)).abs().mean() for d in (-1, -2)
        ),
    }  # fmt: skip


class ClipSource:
    """Batches of crops around performers: true views, partial colours, normal maps."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def _crop(self, rng: np.random.Generator, step: int, frames: int, size: int) -> Tensor:
        if rng.random() < PROCEDURAL:
            # A moving window over one picture makes a clip with exact motion.
            picture = procedural_picture(rng, size + 2 * frames)
            y, x = frames * (1 - (step := rng.integers(-1, 2, 2)))
            starts = [(y + i * step[0], x + i * step[1]) for i in range(frames)]
            clip = np.stack([picture[a : a + size, b : b + size] for a, b in starts])
            return torch.from_numpy(clip).permute(3, 0, 1, 2).float()
        return crop(self.scenes.choose(rng, step), rng, frames, size)

    def batch(
        self, rng: np.random.Generator, step: int, count: int, frames: int, size: int
    ) -> Tensor:  # [count, 3, frames, size, size], 0..1
        crops = [self._crop(rng, step, frames, size) for _ in range(count)]
        return torch.stack([c.to(crops[0].device) for c in crops])


def load_start(args, source: ClipSource) -> TinyVAE:
    """The computed start; kept in the folder, so that it is computed once."""
    vae, path = TinyVAE(), args.folder / "start.safetensors"
    if not path.exists():
        rng = np.random.default_rng(args.seed)
        start_encoder(vae, source.batch(rng, 0, START_CLIPS[0], 8, args.size))
        start_decoder(vae, source.batch(rng, 0, START_CLIPS[1], 9, args.size))
        args.folder.mkdir(parents=True, exist_ok=True)
        save_file(vae.state_dict(), path)
    vae.load_state_dict(load_file(path))
    return vae


def export(vae: TinyVAE, run: Run, path: Path) -> None:
    """Write the whole VAE with averaged decoder weights.

    In bfloat16: ComfyUI takes a float16 file of this layout for one made for Hunyuan Video.
    """
    with run.averaged():
        weights = {k: v.bfloat16().cpu().contiguous() for k, v in vae.state_dict().items()}
    save_file(weights, path)


def main() -> None:
    parser = common_options(__doc__, steps=4000, batch=2, lr=3e-4)
    add_scene_options(parser)
    parser.add_argument("--frames", type=int, default=9, help="of a clip, 4n + 1")
    parser.add_argument("--size", type=int, default=64, help="of a crop, a multiple of 8")
    parser.add_argument("--export", type=Path, help="write the VAE here at the end")
    args = parser.parse_args()
    prepare(args)
    source = ClipSource(scenes_of(args))
    vae = load_start(args, source).to(memory_format=torch.channels_last)
    run = Run(vae.decoder, Settings.of(args, warmup=100), **run_options(args))
    vae.to(run.device)
    shown = source.batch(np.random.default_rng(1), 0, 6, args.frames, 2 * args.size).to(run.device)

    def step_loss(rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        clip = source.batch(rng, step, args.batch, args.frames, args.size).to(run.device)
        with torch.no_grad():
            latents = vae.encode(clip)
        return loss_terms(vae.decode(latents), clip)

    def picture(_step: int) -> Tensor:
        middle = args.frames // 2
        pair = torch.cat([shown[:, :, middle], vae.decode(vae.encode(shown))[:, :, middle]], 2)
        return torch.cat(list(pair), 2)

    run.fit(step_loss, picture)
    if args.export:
        export(vae, run, args.export)


if __name__ == "__main__":
    main()
