"""The training loop that every trainer of the tiny family shares: seeded, in slices, resumable.

AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", decay on matrices only), a
linear warm-up and a cosine to 5 % (the same, "SGDR"), clipped gradients, and an average of the
weights (Polyak) whose memory grows from one step to its full length.

What is promised: with equal seed, device and number of threads the trained weights are equal to the
bit, however often the run was interrupted. Nothing random outlives a step: numpy's and torch's
generators are seeded anew from (seed, step). On CUDA this holds as far as the kernels themselves
are deterministic. Checkpoints keep weights and both Adam moments exactly, at any size; the average
too, while everything fits `MAX_FILES` files of `MAX_BYTES`, which is up to 8.3 million parameters.
Beyond, the average is kept as its difference from the weights in 8 bits: off by at most 1/254 of
the largest difference in each run of 256 numbers, at each interruption, and forgotten as the
average moves on. The trained weights do not depend on it.

    args = common_options(__doc__, steps=20_000, batch=8, lr=1e-3).parse_args()
    prepare(args)
    net = Net()
    run = Run(net, Settings.of(args, warmup=200), **run_options(args))

    def step_loss(rng, step):
        batch = source.batch(rng, args.batch).to(run.device)
        return {"pixels": (net(batch) - batch).abs().mean()}

    run.fit(step_loss, picture=lambda step: net(example)[0])
    run.export(args.folder / "net.safetensors", rename=to_native, dtype=torch.float16)
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

MAX_BYTES = 16 * 2**20
MAX_FILES = 8
FINAL_SHARE = 0.05  # of the learning rate, at the last step
MAX_BAD_STEPS = 10  # in a row
LOG_SECONDS = 30
SAVE_MINUTES = 5
BLOCK = 256  # numbers that share one scale in an 8-bit average

StepLoss = Callable[[np.random.Generator, int], Mapping[str, Tensor]]
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What, beside the code and the batches, determines the weights."""

    seed: int = 0
    lr: float = 1e-3
    steps: int = 10_000
    warmup: int = 100
    decay: float = 0.998  # of the average
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient
    betas: tuple[float, float] = (0.9, 0.99)

    @classmethod
    def of(cls, args: argparse.Namespace, **more) -> Settings:
        return cls(seed=args.seed, lr=args.lr, steps=args.steps, **more)

    def learning_rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - 1 - self.warmup))
        return self.lr * (FINAL_SHARE + (1 - FINAL_SHARE) * (0.5 + 0.5 * math.cos(math.pi * done)))

    def average_decay(self, updates: int) -> float:  # updates made before this one
        return min(self.decay, (updates + 1) / (updates + 20))


def common_options(
    description: str | None, *, steps: int, batch: int, lr: float
) -> argparse.ArgumentParser:
    """The options of every trainer; each adds its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="checkpoint, loss curve, pictures; goes on")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=steps, help="of the whole run, over all slices")
    add("--minutes", type=float, default=math.inf, help="of this slice; the same command goes on")
    add("--batch", type=int, default=batch)
    add("--lr", type=float, default=lr, help="peak learning rate")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--picture-minutes", type=float, default=5, help="between progress pictures")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--compile", action="store_true", help="torch.compile, on CUDA only")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Threads, log and the seed of the initial weights: call it before building a module."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def run_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of `Run` that stand in the common options."""
    return dict(
        folder=args.folder,
        minutes=args.minutes,
        picture_minutes=args.picture_minutes,
        device=None if args.device == "auto" else args.device,
        compiled=args.compile,
    )


class Run:
    """One training run in one folder; it goes on from the folder's checkpoint if there is one."""

    def __init__(
        self,
        modules: nn.Module | Mapping[str, nn.Module],
        settings: Settings,
        folder: Path,
        minutes: float = math.inf,
        picture_minutes: float = 5,
        device: str | None = None,
        compiled: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self.started = clock, clock()
        self.settings, self.folder = settings, Path(folder)
        self.seconds_allowed, self.picture_seconds = 60 * minutes, 60 * picture_minutes
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.on_cuda = self.device.type == "cuda"
        self.module = modules if isinstance(modules, nn.Module) else nn.ModuleDict(modules)
        self.module.to(self.device)
        self.weights: dict[str, Tensor] = self.module.state_dict()  # shares the modules' memory
        self.average = {name: w.detach().clone() for name, w in self.weights.items()}
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        trained = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=[p for p in trained if p.ndim > 1], weight_decay=settings.weight_decay),
                dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0),
            ],
            lr=settings.lr,
            betas=settings.betas,
            fused=True,
        )
        self.step = self.skipped = self.skipped_in_row = 0
        self.seconds_before = self.save_seconds = 0.0
        self.stopping = ""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if found := checkpoints(self.folder):
            self._load(found[-1])
        self._cut_curve()
        if compiled and self.on_cuda:
            single = isinstance(modules, nn.Module)
            for module in [modules] if single else modules.values():
                module.compile()  # in place: the names of the weights stay

    @property
    def seconds(self) -> float:
        """Training time over all slices."""
        return self.seconds_before + self.clock() - self.started

    def autocast(self) -> torch.autocast:
        """bf16 on CUDA alone: on a CPU without bf16 units it is hundreds of times slower."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_cuda)

    def fit(self, step_loss: StepLoss, picture: Callable[[int], Tensor] | None = None) -> bool:
        """Train until the steps or the minutes are over, save, and tell whether all are done.

        The loss is the sum of `step_loss`'s terms. `picture` gives [3, H, W] in 0..1, and sees the
        averaged weights in eval mode.
        """
        self.stopping = ""
        self.module.train()
        sums, counted = defaultdict(float), defaultdict(int)
        saved = pictured = logged = self.clock()
        logged_step = first_step = self.step
        with self._stop_signals():
            while self.step < self.settings.steps and not self.stopping:
                began = self.clock()
                for name, value in self._train_step(step_loss).items():
                    sums[name] += value
                    counted[name] += 1
                now = self.clock()
                # Stop while there is time for one more step that is not taken, and for saving.
                reserve = now - began + self.save_seconds
                if now - self.started + reserve >= self.seconds_allowed:
                    self.stopping = self.stopping or "the minutes are over"
                ending = bool(self.stopping) or self.step == self.settings.steps
                if ending or now - logged >= LOG_SECONDS:
                    speed = (self.step - logged_step) / max(now - logged, 1e-9)
                    self._report({k: sums[k] / counted[k] for k in sums}, speed)
                    sums.clear()
                    counted.clear()
                    logged, logged_step = now, self.step
                if ending or now - saved >= 60 * SAVE_MINUTES:
                    self.save()
                    saved = self.clock()
                if picture and (ending or now - pictured >= self.picture_seconds):
                    self._draw(picture)
                    pictured = self.clock()
        done = self.step >= self.settings.steps
        if not done:
            log.info(
                "stopped at step %d of %d (%s); the same command goes on",
                self.step,
                self.settings.steps,
                self.stopping,
            )
        elif self.step == first_step:
            log.info("all %d steps were already done", self.step)
        return done

    def _train_step(self, step_loss: StepLoss) -> dict[str, float]:
        """One step; gives the terms, or nothing when the step was skipped."""
        rng = np.random.default_rng((self.settings.seed, self.step))
        self._seed_torch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.step)
        with self.autocast():
            terms = step_loss(rng, self.step)
            loss = sum(terms.values())
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        # One transfer a step; the norm also catches a finite loss with a broken gradient.
        values = torch.stack([v.detach().float() for v in (loss, norm, *terms.values())]).tolist()
        self.step += 1
        if not all(map(math.isfinite, values)):
            self.skipped += 1
            self.skipped_in_row += 1
            if self.skipped_in_row >= MAX_BAD_STEPS:
                bad = [k for k, v in zip(terms, values[2:], strict=True) if not math.isfinite(v)]
                raise ValueError(
                    f"Training stopped at step {self.step}: {MAX_BAD_STEPS} steps in a row gave no "
                    f"finite number in {', '.join(bad) or 'the gradient'}; "
                    "lower --lr and go on from the last checkpoint."
                )
            return {}
        self.skipped_in_row = 0
        self.optimizer.step()
        self._update_average()
        return {"loss": values[0], **dict(zip(terms, values[2:], strict=True))}

    def _seed_torch(self) -> None:
        sequence = np.random.SeedSequence((self.settings.seed, self.step, 1))
        seed = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if self.on_cuda:
            torch.cuda.manual_seed(seed)

    @torch.no_grad()
    def _update_average(self) -> None:
        share = 1 - self.settings.average_decay(self.step - self.skipped - 1)
        floats = [k for k, w in self.weights.items() if w.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[k] for k in floats], [self.weights[k] for k in floats], share
        )
        for name in self.weights.keys() - set(floats):  # counters
            self.average[name].copy_(self.weights[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules with their averaged weights, in eval mode and without gradients."""
        current = {name: w.clone() for name, w in self.weights.items()}
        modes = [(module, module.training) for module in self.module.modules()]
        try:
            self._set_weights(self.average)
            self.module.eval()
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self._set_weights(current)
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def _set_weights(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    def export(
        self, path: Path, rename: Rename | None = None, dtype: torch.dtype = torch.float16
    ) -> None:
        """Write the averaged weights; `rename` maps the whole dictionary, as `vae_to_native`."""
        weights = {name: w.cpu() for name, w in self.average.items()}
        weights = rename(weights) if rename else weights
        cast = {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()}
        for name, w in cast.items():
            if not torch.isfinite(w).all():
                raise ValueError(f"Weight {name} does not fit {dtype}: export as torch.bfloat16.")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        cast = {k: w.clone(memory_format=torch.contiguous_format) for k, w in cast.items()}
        save_file(cast, partial, {"step": str(self.step), "seed": str(self.settings.seed)})
        partial.replace(path)

    def save(self) -> Path:
        """Write a checkpoint: whole and under its final name, or not at all."""
        target = self.folder / f"checkpoint-{self.step:08d}"
        if target.exists():
            return target
        began = self.clock()
        state = dict(
            step=self.step,
            skipped=self.skipped,
            skipped_in_row=self.skipped_in_row,
            seconds=self.seconds,
            settings=asdict(self.settings),
        )
        shards = pack(self._tensors(), MAX_BYTES)
        if len(shards) > MAX_FILES:
            shards = pack(self._tensors(small=True), MAX_BYTES)
        partial = self.folder / (target.name + ".tmp")
        partial.mkdir()
        for i, shard in enumerate(shards):
            file = partial / f"{i:02d}.safetensors"
            save_file(shard, file, {"run": json.dumps(state)} if i == 0 else None)
            flush(file)
        flush(partial)
        partial.rename(target)
        flush(self.folder)
        for old in checkpoints(self.folder):
            if old != target:
                shutil.rmtree(old)
        self.save_seconds = self.clock() - began
        return target

    def _tensors(self, small: bool = False) -> dict[str, Tensor]:
        """All that a checkpoint keeps, on the CPU; `small` with the average in 8 bits."""
        tensors = {f"weight/{name}": w for name, w in self.weights.items()}
        for name, average in self.average.items():
            if small and average.is_floating_point():
                codes, scales = to_8_bits(average - self.weights[name])
                tensors |= {f"average_codes/{name}": codes, f"average_scales/{name}": scales}
            else:
                tensors[f"average/{name}"] = average
        for name, parameter in self.parameters.items():
            # A parameter that no loss has reached so far has no moments.
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam_{key}/{name}"] = value
        return {key: t.detach().cpu() for key, t in tensors.items()}

    @torch.no_grad()
    def _load(self, checkpoint: Path) -> None:
        tensors, state = load_checkpoint(checkpoint)
        names = {key.partition("/")[2] for key in tensors if key.startswith("weight/")}
        fits = names == self.weights.keys() and all(
            tensors[f"weight/{name}"].shape == w.shape for name, w in self.weights.items()
        )
        if not fits:
            raise ValueError(
                f"The checkpoint in {self.folder} is of another network: choose another --folder, "
                "or build the network as it was."
            )
        mine, theirs = json.loads(json.dumps(asdict(self.settings))), state["settings"]
        if mine["seed"] != theirs["seed"]:
            raise ValueError(
                f"The run in {self.folder} has seed {theirs['seed']}, not {mine['seed']}: choose "
                "another --folder, or that seed."
            )
        changed = [f"{k} {theirs.get(k)} -> {v}" for k, v in mine.items() if theirs.get(k) != v]
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight/{name}"])
            average = self.average[name]
            if f"average/{name}" in tensors:
                average.copy_(tensors[f"average/{name}"])
            else:
                difference = from_8_bits(
                    tensors[f"average_codes/{name}"], tensors[f"average_scales/{name}"]
                )
                average.copy_(weight + difference.view_as(weight).to(weight))
        for name, parameter in self.parameters.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"adam_step/{name}" in tensors:
                self.optimizer.state[parameter] = {
                    key: tensors[f"adam_{key}/{name}"].to(self.device) for key in keys
                }
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_row, self.seconds_before = state["skipped_in_row"], state["seconds"]
        log.info("goes on from step %d; %s", self.step, ", ".join(changed) or "same settings")

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the step end; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.getsignal(kind) for kind in kinds}

        def restore(*_) -> None:
            for kind, handler in before.items():
                signal.signal(kind, handler)

        def stop(number: int, _frame) -> None:
            self.stopping = signal.Signals(number).name
            restore()

        for kind in kinds:
            signal.signal(kind, stop)
        try:
            yield
        finally:
            restore()

    def _report(self, means: dict[str, float], speed: float) -> None:
        left = (self.settings.steps - self.step) / max(speed, 1e-9) / 60
        log.info(
            "step %d  %.0f%%  %s  %.2f steps/s  %.0f min left%s",
            self.step,
            100 * self.step / self.settings.steps,
            "  ".join(f"{k} {v:.4f}" for k, v in means.items()),
            speed,
            left,
            f"  {self.skipped} skipped" if self.skipped else "",
        )
        extra = {"lr": self.settings.learning_rate(self.step - 1), "skipped": self.skipped}
        with self._curve.open("a", newline="") as file:
            seconds = round(self.seconds, 1)
            csv.writer(file).writerows([self.step, seconds, *kv] for kv in (means | extra).items())

    @property
    def _curve(self) -> Path:
        return self.folder / "curve.csv"

    def _cut_curve(self) -> None:
        """Drop what a killed slice wrote after its last checkpoint: it comes again."""
        rows: list[list[str]] = []
        if self._curve.exists():
            with self._curve.open(newline="") as file:
                rows = [r for r in list(csv.reader(file))[1:] if int(r[0]) <= self.step]
        with self._curve.open("w", newline="") as file:
            csv.writer(file).writerows([["step", "seconds", "name", "value"], *rows])

    def _draw(self, picture: Callable[[int], Tensor]) -> None:
        from PIL import Image

        with self.averaged():
            pixels = picture(self.step).detach().float().clamp(0, 1).mul(255).round().byte()
        (self.folder / "pictures").mkdir(exist_ok=True)
        path = self.folder / "pictures" / f"{self.step:08d}.png"
        Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy()).save(path)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last; there are two when a run was killed between them."""
    return sorted(p for p in folder.glob("checkpoint-*") if p.name[len("checkpoint-") :].isdigit())


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors, put together again, and the state of the run."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    state: dict = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            state |= json.loads((file.metadata() or {}).get("run", "{}"))
            for key in list(file.keys()):
                if "@" in key:
                    name, offset, shape = key.split("@")
                    pieces[name, shape][int(offset)] = file.get_tensor(key)
                else:
                    tensors[key] = file.get_tensor(key)
    for (name, shape), parts in pieces.items():
        flat = torch.cat([parts[offset] for offset in sorted(parts)])
        tensors[name] = flat.view([int(n) for n in shape.split("x")])
    return tensors, state


def pack(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Fill files of at most `max_bytes`, header included; a tensor may run over several.

    A piece of a tensor is flat, and named `key@offset@shape`.
    """
    empty = max_bytes - 4096  # less the length of the header, the run's state, padding
    shards, free = [{}], empty
    for key, tensor in tensors.items():
        flat, offset = tensor.reshape(-1), 0
        shape = "x".join(map(str, tensor.shape))
        entry = len(key) + len(shape) + 200  # what the header says of one tensor, at most
        while offset < len(flat) or offset == 0:
            count = min(len(flat) - offset, max(0, free - entry) // tensor.element_size())
            if count == len(flat):
                shards[-1][key] = tensor.clone(memory_format=torch.contiguous_format)
            elif count > 0:
                shards[-1][f"{key}@{offset}@{shape}"] = flat[offset : offset + count].clone()
            else:
                shards.append({})
                free = empty
                continue
            free -= entry + count * tensor.element_size()
            offset += max(1, count)
    return shards


def to_8_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N] in -127..127 and one scale for each `BLOCK` of them."""
    flat = values.detach().float().reshape(-1)
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1) / 127
    codes = (blocks / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    return codes.view(-1)[: len(flat)], scales


def from_8_bits(codes: Tensor, scales: Tensor) -> Tensor:  # [N]
    return codes * scales.repeat_interleave(BLOCK)[: len(codes)]


def flush(path: Path) -> None:
    """Have the disk hold it before the next step of an atomic write."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
