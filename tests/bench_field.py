"""What a feature field costs: `.venv/bin/python tests/bench_field.py [--quick]`.

Method
- A subject's fields with random features, latents and outlines: 8 targets from 8 references around the
  origin, at Turnaround-Tiny's size (256 wide, 15x12 tokens, 4 of 8 blocks) and at Wan2.1-1.3B's (1536
  wide, 30x52 tokens, 12 of 30 blocks), 64 wide inside: 24 samples on one ray a token, then 12 on four, and
  what is made of that for every block. On CUDA in bfloat16, elsewhere in float32.
- "block" is what one block of the DiT computes at the same tokens, from random numbers: the matrix
  products of self-attention, text cross-attention (512 tokens) and feed-forward (4 times the width),
  and attention among all tokens of all targets. So it is no less than a real block takes, but for norms
  and modulation. "injection" joins a rendered map to the block's tokens: with references that stand
  still a subject is rendered once, and this is all that a step of sampling costs. Shares are of a step,
  all blocks with the injections of the chosen ones: of one that renders anew and of one that does not.
- The ways run in turn in one process; after a warm-up the median of the rounds counts. "busy" is
  processor time of all threads together: other work on the machine delays the clock, hardly this (of
  an accelerator it says nothing).
- Stages: Python's profiler over one call, by the functions of models/feature_*.py, each with what it
  calls; so shares overlap where one calls another. On CUDA they are left out: it runs behind Python.
- Training: a step of 2 targets from 5 references, forward, backward and fused Adam, at several sizes
  of chunk; peak memory is what it needs above what was resident before it, the fields' own parameters
  and moments not counted (on CUDA: of the allocator).
- `--learn 250`: instead of all this, so many steps of training on a synthetic performer, and what the
  field then shows from cameras that it was not trained with. 30 pictures of 192x240 on a ring at uneven
  heights, a step has 3 of them as targets and 5 others as references; features are Turnaround-Tiny's
  latents in patches of 2x2, mixed at random to 256 channels. Scores are of 8 cameras between, from 8
  references, in tokens before grey: of all of the picture, and of tokens with any of the performer; beside
  the picture of the nearest reference. No diffusion model takes part: it shows that the field learns.
"""

import argparse
import cProfile
import math
import os
import pstats
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_geometry import load_pack, machine, race, resident, seconds_of, start_counting
from torch import Tensor
from torch.nn import functional as F

VIEWS, REFERENCES, SAMPLES = 8, 8, 24
TRAINED_VIEWS, TRAINED_REFERENCES = 2, 5
TEXT = 512
CHUNKS = (2**11, 2**13, 2**15, 2**18)
"""Rows, that is places x references; "field" without a number is the pack's own choice."""
FEW_CHUNKS = (2**13, 2**18)
"""At Wan's size, where a call takes a CPU some seconds."""
LEAST_SHARE = 0.02
GOAL_SHARE, GOAL_STEP = 0.3, 0.3
"""Of a sampling step with cached references; seconds of a training step at Tiny's size."""


@dataclass(frozen=True)
class Case:
    name: str
    width: int
    hidden: int
    size: tuple[int, int]
    heads: int
    blocks: tuple[int, ...]
    """That the subject goes into."""
    depth: int
    """All blocks."""


TINY = Case("Turnaround-Tiny", 256, 64, (15, 12), 2, (1, 3, 5, 7), 8)
WAN = Case("Wan2.1-1.3B", 1536, 64, (30, 52), 12, tuple(range(1, 24, 2)), 30)


class Scene:
    """A subject's fields with what they are given."""

    def __init__(self, case: Case, views: int, references: int, device: torch.device) -> None:
        from turnaround.models.cameras import orbit_rig
        from turnaround.models.feature_rays import visible_reach
        from turnaround.models.subject import Known, Shape, SubjectNet

        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        h, w = case.size

        def ring(count: int, start: float):
            azimuths = start + torch.arange(count) * 2 * math.pi / count
            rig = orbit_rig(azimuths, torch.zeros(count), 1.0, math.radians(35), w, h)
            return rig.K.to(device), rig.T_camera_world.to(device)

        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(references, *shape, generator=generator).to(device, self.dtype)

        K, T = ring(references, 0.0)
        self.features = {i: drawn(case.width, h, w) for i in case.blocks}
        self.known = Known(K, T, drawn(16, 2 * h, 2 * w), drawn(4 * h, 4 * w).sigmoid())
        self.targets = ring(views, 0.2)
        reach = visible_reach(K.cpu(), T.cpu(), case.size)
        shape = Shape(case.width, case.blocks, case.hidden, reach, text_width=1)
        self.net = SubjectNet(shape).to(device, self.dtype)
        self.tokens = torch.randn(1, views * h * w, case.width, generator=generator)
        self.tokens = self.tokens.to(device, self.dtype)

    def rays(self, rows: int) -> int:
        """So many in a chunk of this many rows."""
        return max(1, rows // (len(self.known.K) * SAMPLES))

    def render(self, rows: int | None = None):
        chunk = self.rays(rows) if rows else None
        return self.net.render(self.features, self.known, self.targets, self.case.size, chunk=chunk)

    def inject(self, features: Tensor) -> Tensor:
        """Behind one of the blocks."""
        return self.net.inject(self.case.blocks[0], self.tokens, features)

    def trainer(self, rows: int) -> Callable:
        """One step of training, ready to be called."""
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator(self.device).manual_seed(0)

        def step() -> None:
            got = self.net.render(
                self.features, self.known, self.targets, self.case.size, generator, self.rays(rows)
            )
            loss = sum(f.square().mean() for f in got.features.values()) + got.latents.mean()
            for field in (got.coarse, got.fine):
                loss = loss + field.rgb.mean() + field.alpha.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step


def block(scene: Scene) -> Callable:
    """The products and attentions of a DiT's block over all tokens of all targets."""
    C, heads, x = scene.case.width, scene.case.heads, scene.tokens
    generator = torch.Generator().manual_seed(1)

    def weight(inputs: int, outputs: int) -> Tensor:
        drawn = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        return drawn.to(x)

    own, other = ([weight(C, C) for _ in range(4)] for _ in range(2))
    up, down, text = weight(C, 4 * C), weight(4 * C, C), weight(C, TEXT)[None]

    def attended(x: Tensor, source: Tensor, weights: list[Tensor]) -> Tensor:
        q, k, v = (
            F.linear(t, m).unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, m in zip((x, source, source), weights, strict=False)
        )
        together = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return F.linear(together, weights[3])

    def run() -> None:
        y = x + attended(x, x, own)
        y = y + attended(y, text, other)
        F.linear(F.gelu(F.linear(y, up), approximate="tanh"), down)

    return run


@torch.no_grad()
def compare(scene: Scene, repeats: int, chunks: tuple[int, ...]) -> None:
    """A subject rendered for all its blocks, by chunks, beside one block and one injection."""
    case = scene.case
    rendered = scene.render().features[case.blocks[0]].flatten(2).mT.flatten(0, 1)[None]
    ways = {
        f"fields, chunks of 2^{round(math.log2(n))}": lambda n=n: scene.render(n) for n in chunks
    }
    ways["fields"] = scene.render
    ways["injection"] = lambda: scene.inject(rendered)
    ways["block"] = block(scene)
    taken = race(ways, repeats)
    from turnaround.models.subject import FINE_SAMPLES, RAYS

    rows = len(scene.targets[0]) * math.prod(case.size) * len(scene.known.K)
    rows *= SAMPLES + RAYS**2 * FINE_SAMPLES
    print(f"\n{case.name + ', rendering':30}      ms    busy  ns a row")
    for name, t in taken.items():
        each = f"{1e9 * t.busy / rows:9.1f}" if name.startswith("fields") else ""
        print(f"{name:30} {1e3 * t.median:7.1f} {1e3 * t.busy:7.1f} {each}")
    clock = "median" if scene.device.type == "cuda" else "busy"
    fields, injection, block_ = (
        getattr(taken[name], clock) for name in ("fields", "injection", "block")
    )
    ours, rest = len(case.blocks) * injection, case.depth * block_
    anew, kept = ((part + ours) / (part + ours + rest) for part in (fields, 0.0))
    met = "met" if kept <= GOAL_SHARE else "missed"
    print(f"share of a step: {anew:.0%} rendered anew, {kept:.1%} kept")
    print(f"Goal: at most {GOAL_SHARE:.0%} of a step with references kept: {met}")


@torch.no_grad()
def show_stages(scene: Scene) -> None:
    profiler = cProfile.Profile()
    profiler.runcall(scene.render)
    stats = pstats.Stats(profiler)
    print(f"\n{scene.case.name + ', stages of a call':30} share  calls")
    found = []
    for (file, _, name), (_, calls, _, total, _) in stats.stats.items():
        if Path(file).stem.startswith("feature_") and total > LEAST_SHARE * stats.total_tt:
            found.append((total / stats.total_tt, name, calls))
    for share, name, calls in sorted(found, reverse=True):
        print(f"{name:30} {share:5.0%}  {calls:5}")


def compare_training(scene: Scene, chunks: tuple[int, ...]) -> None:
    """Steps by sizes of chunk, each twice after a warm-up, and their peak memory."""
    print(f"\n{scene.case.name + ', training':30}  s a step    busy  MiB")
    times = []
    for rows in chunks:
        step = scene.trainer(rows)
        step()
        before = start_counting(scene.device)
        taken = [seconds_of(step) for _ in range(2)]
        if scene.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        else:
            peak = resident("VmHWM") - before if before is not None else math.nan
        clock, busy = (min(column) for column in zip(*taken, strict=True))
        times.append(busy)
        name = f"chunks of 2^{round(math.log2(rows))}"
        print(f"{name:30} {clock:9.2f} {busy:7.2f} {peak / 2**20:4.0f}")
    if scene.case is TINY and scene.device.type == "cpu":
        met = "met" if min(times) <= GOAL_STEP else "missed"
        print(f"Goal: a step within {GOAL_STEP} s of one core: {met} ({min(times):.2f} s)")


# What it learns


@dataclass(frozen=True)
class Lesson:
    """Pictures of a performer in tokens, the first 30 to learn from."""

    cameras: tuple[Tensor, Tensor]  # [N, 3, 3] in tokens, [N, 4, 4] of the subject's space
    features: Tensor  # [N, C, h, w]
    color: Tensor  # [N, 3, h, w] times alpha
    alpha: Tensor  # [N, h, w]
    depth: Tensor  # [N, h, w] mean of what is covered, units of the space
    scale: float  # metres a unit

    def references(self, chosen: list[int]):
        from turnaround.models.feature_field import References

        return References(self.features[chosen], *self.at(chosen), masks=self.alpha[chosen])

    def at(self, chosen: list[int]) -> list[Tensor]:
        return [part[chosen] for part in self.cameras]


LEARNED, LEARNED_AT_ONCE, UNSEEN, TOKEN = 30, 3, 8, 16
SHOWN = list(range(0, 24, 3))
"""Eight of the thirty, as references of the unseen cameras."""
RATE, COLOR, OUTLINE, FEATURES = 6e-3, 50.0, 10.0, 0.1


def lesson(width: int) -> Lesson:
    from safetensors.torch import load_file
    from turnaround.models.cameras import orbit_rig
    from turnaround.models.feature_rays import subject_space
    from turnaround.models.performer import draw_appearance, pose_performer, render_performer
    from turnaround.models.tiny.autoencoder import TinyVAE, encode_linearly, encoder_as_convolution

    generator = torch.Generator().manual_seed(1)
    look = draw_appearance(7)
    posed = pose_performer("kira", "dance_a", torch.tensor([0.5]), look)
    learned = torch.arange(LEARNED) / LEARNED
    azimuths = 2 * math.pi * torch.cat([learned, (torch.arange(UNSEEN) + 0.37) / UNSEEN])
    heights = torch.rand(LEARNED + UNSEEN, generator=generator) * 2 - 1
    elevations = heights * math.radians(18)
    rig = orbit_rig(azimuths, elevations, 4.1, math.radians(35), 192, 240)
    clip = render_performer(posed, look, rig)
    frames, masks, depth = clip.frames[:, 0], clip.masks[:, :1], clip.depth[:, :1]
    vae = TinyVAE()
    folder = Path(__file__).resolve().parent.parent / "models" / "tiny" / "vae"
    weights = load_file(next(folder.glob("*.safetensors")))
    vae.load_state_dict({name: weight.float() for name, weight in weights.items()})
    latents = encode_linearly(frames[:, :, None], *encoder_as_convolution(vae))[:, :, 0]
    patches = F.pixel_unshuffle(latents, 2)
    mixing = torch.randn(width, patches.shape[1], generator=generator) / patches.shape[1] ** 0.5
    space = subject_space(rig.T_camera_world[:LEARNED])
    tokens = rig.resized(192 // TOKEN, 240 // TOKEN)
    alpha = F.avg_pool2d(masks, TOKEN)
    covered = F.avg_pool2d((depth > 0).float(), TOKEN).clamp(min=1e-6)
    return Lesson(
        (tokens.K, space.normalised(rig.T_camera_world)),
        torch.einsum("cp,nphw->nchw", mixing, patches).tanh(),
        F.avg_pool2d(frames, TOKEN) - 0.5 * (1 - alpha),
        alpha[:, 0],
        (F.avg_pool2d(depth, TOKEN) / covered)[:, 0] / space.scale,
        space.scale,
    )


def scores(taught: Lesson, features: Tensor, color: Tensor, alpha: Tensor, depth: Tensor) -> str:
    """Of the unseen cameras."""
    unseen = slice(LEARNED, None)
    true_alpha, goal = taught.alpha[unseen], taught.features[unseen]
    error = color - taught.color[unseen] - 0.5 * (alpha - true_alpha)[:, None]
    square = error.square().mean(1)
    inside, solid = true_alpha > 0.05, true_alpha > 0.9
    away = (depth - taught.depth[unseen])[solid].abs().mean() * taught.scale
    told = goal.var() / (features - goal).square().mean()
    return (
        f"{-10 * square.mean().log10():8.2f} {-10 * square[inside].mean().log10():10.2f} "
        f"{10 * told.log10():9.2f} {(alpha - true_alpha).abs().mean():7.3f} {100 * away:9.1f}"
    )


def learn(steps: int, hidden: int, rate: float) -> None:
    from turnaround.models.feature_field import FeatureField
    from turnaround.models.feature_rays import visible_reach

    taught = lesson(TINY.width)
    size, unseen = TINY.size, list(range(LEARNED, LEARNED + UNSEEN))
    reach = visible_reach(*taught.at(list(range(LEARNED))), size)
    generator = torch.Generator().manual_seed(0)
    field = FeatureField(TINY.width, hidden, reach, SAMPLES, generator)
    optimizer = torch.optim.Adam(field.parameters(), lr=rate, fused=True)

    def rate_at(step: int) -> float:
        decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        return min(1, (step + 1) / 20) * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)

    def step() -> None:
        order = torch.randperm(LEARNED, generator=generator).tolist()
        targets = order[:LEARNED_AT_ONCE]
        others = order[LEARNED_AT_ONCE : LEARNED_AT_ONCE + TRAINED_REFERENCES]
        got = field.render(
            taught.references(others), *taught.at(targets), size, generator=generator
        )
        error = got.rgb - taught.color[targets]
        outline = got.alpha - taught.alpha[targets]
        before_grey = error - 0.5 * outline[:, None]
        loss = COLOR * before_grey.square().mean() + OUTLINE * outline.square().mean()
        features = got.features - taught.features[targets]
        loss = loss + FEATURES * features.square().mean() / taught.features.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def show(done: int, busy: float) -> None:
        got = field.render(taught.references(SHOWN), *taught.at(unseen), size)
        row = scores(taught, got.features, got.rgb, got.alpha, got.depth)
        print(f"{f'{done} steps, {busy:.0f} s busy':28} {row}", flush=True)

    print(f"{'':28}   PSNR  performer  features   alpha  depth, cm")
    eyes = torch.stack([-T[:3, :3].mT @ T[:3, 3] for T in taught.cameras[1]])
    for name, shown in (("the 8", SHOWN), ("all 30", list(range(LEARNED)))):
        near = torch.cdist(eyes[unseen], eyes[shown]).argmin(1)
        parts = (taught.features, taught.color, taught.alpha, taught.depth)
        row = scores(taught, *(part[torch.tensor(shown)[near]] for part in parts))
        print(f"{f'nearest of {name} references':28} {row}")
    busy = 0.0
    for done in range(1, steps + 1):
        busy += seconds_of(step)[1]
        if done % max(1, steps // 4) == 0:
            show(done, busy)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the feature field.")
    parser.add_argument("--learn", type=int, default=0, metavar="STEPS")
    parser.add_argument("--hidden", type=int, default=TINY.hidden, help="of --learn")
    parser.add_argument("--rate", type=float, default=RATE, help="of --learn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="Tiny's size only, 2 rounds")
    chosen = parser.parse_args()
    repeats = 2 if chosen.quick else chosen.repeats
    threads = torch.get_num_threads()
    load_pack()
    torch.set_num_threads(threads)  # the tests keep to two
    if chosen.learn:
        return learn(chosen.learn, chosen.hidden, chosen.rate)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{machine(device)}, {threads} of {os.cpu_count()} threads, torch {torch.__version__}; "
        f"median of {repeats} rounds"
    )
    for case in (TINY,) if chosen.quick else (TINY, WAN):
        scene = Scene(case, VIEWS, REFERENCES, device)
        chunks = CHUNKS if case is TINY or device.type == "cuda" else FEW_CHUNKS
        compare(scene, repeats, chunks)
        if device.type == "cpu":
            show_stages(scene)
        compare_training(Scene(case, TRAINED_VIEWS, TRAINED_REFERENCES, device), chunks)


if __name__ == "__main__":
    main()
