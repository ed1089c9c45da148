"""A learned subject: its file, what a step looks at, the losses, and going on from a file."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.subject import (
    Shape,
    Subject,
    SubjectNet,
    load_subject,
    nearest_to,
    pictures_of,
    save_subject,
)
from turnaround.models.subject_lora import LoRA
from turnaround.models.subject_training import (
    SURROUNDINGS,
    Settings,
    SubjectTraining,
    diffusion_loss,
    draw,
    field_loss,
)

R, H, W, WIDTH, BLOCKS = 6, 48, 32, 16, (0, 2)
SIZE = (H // 16, W // 16)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pictures():
    angles = torch.arange(R) * (2 * math.pi / R)
    rig = orbit_rig(angles, torch.full((R,), 0.2), 3.0, 0.7, W, H)
    frames = noise(R, 3, H, W).sigmoid()
    masks = torch.zeros(R, H, W)
    masks[:, 8:40, 8:24] = 1
    return pictures_of(frames, masks, noise(R, 4, 1, H // 8, W // 8, seed=1), rig)


SHAPE = Shape(WIDTH, BLOCKS, 8, 0.4, text_width=12, channels=4)


def untrained(pictures, seed: int = 0) -> Subject:
    return Subject(SubjectNet(SHAPE, seed), pictures, ())


@pytest.fixture
def subject(pictures):
    """Nothing of it at its beginning, so that an error can't hide."""
    subject = untrained(pictures)
    with torch.no_grad():
        for n, p in enumerate(subject.net.parameters()):
            p.add_(0.1 * noise(*p.shape, seed=n))
    return subject


def test_means_over_cells_are_of_the_subject_alone(pictures):
    """Cells of 4 pixels for masks and of 8 for colors; the mask covers columns 8 to 24, rows 8 to 40."""
    assert pictures.size == SIZE
    covered = torch.zeros(12, 8)
    covered[2:10, 2:6] = 1
    assert torch.equal(pictures.masks[0], covered)
    outside = torch.nn.functional.avg_pool2d(covered[None], 2)[0] == 0
    assert bool((pictures.colors[:, :, outside] == 0).all())
    assert bool((pictures.colors[:, :, ~outside] > 0).all())


def test_injection_begins_as_nothing(pictures):
    net, x = untrained(pictures).net, noise(2, 6, WIDTH)
    assert torch.equal(net.inject(2, x, noise(2, 6, WIDTH + 1, seed=3)), x)


def test_tokens_change_as_far_as_the_subject_covers_them(subject):
    x, features = noise(2, 6, WIDTH), noise(2, 6, WIDTH, seed=3)
    covered = torch.tensor([0.0, 0.0, 0.25, 0.5, 1.0, 1.0])[:, None].expand(2, -1, -1)
    whole = subject.net.inject(2, x, torch.cat([features, torch.ones(2, 6, 1)], -1)) - x
    part = subject.net.inject(2, x, torch.cat([features, covered], -1))
    assert whole.abs().amin() > 0 and torch.equal(part[:, :2], x[:, :2])
    torch.testing.assert_close(part - x, covered * whole, atol=1e-5, rtol=1e-4)


def test_a_token_is_covered_as_far_as_any_of_its_rays_is(subject):
    features = {i: noise(R, WIDTH, *SIZE, seed=i) for i in BLOCKS}
    found = subject.net.render(
        features, subject.known(), subject.cameras(subject.pictures.rig), SIZE
    )
    (h, w), alpha = SIZE, found.fine.alpha
    most = alpha.unflatten(2, (w, 2)).unflatten(1, (h, 2)).amax((2, 4))
    assert all(torch.equal(f[:, -1], most) for f in found.features.values())


def test_file_gives_back_the_same_subject(subject, tmp_path):
    path = tmp_path / "she.safetensors"
    told = Subject(subject.net, subject.pictures, (2.5, 0.1), {"0.step": torch.arange(3)})
    save_subject(path, told)
    again = load_subject(path)
    assert [p.name for p in tmp_path.iterdir()] == ["she.safetensors"]
    assert again.losses == (2.5, 0.1) and torch.equal(again.training["0.step"], torch.arange(3))
    assert again.net.shape == subject.net.shape
    features = {i: noise(R, WIDTH, *SIZE, seed=i) for i in BLOCKS}
    rendered = [
        s.net.render(features, s.known(), s.cameras(s.pictures.rig), SIZE) for s in (subject, again)
    ]
    for i in BLOCKS:
        assert torch.equal(rendered[0].features[i], rendered[1].features[i])


def test_other_files_are_refused_by_name(subject, tmp_path):
    other = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"'lora\.safetensors' is no subject: choose"):
        load_subject(other)
    whole = tmp_path / "whole.safetensors"
    save_subject(whole, subject)
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"'whole\.safetensors' can't be read as a subject"):
        load_subject(whole)


def all_round(count: int) -> Tensor:  # [count, 4, 4]
    angles = torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.zeros(count), 1.0, 0.7, W, H).T_camera_world


@pytest.mark.parametrize("count", [2, 3, 40])
def test_a_target_is_never_its_own_reference(count):
    settings = Settings(steps=10, targets=2, references=5)
    seen = set()
    for step in range(60):
        drawn = draw(settings, step, all_round(count))
        assert not set(drawn.targets) & set(drawn.references)
        assert min(5, count - len(drawn.targets)) <= len(drawn.references) <= 10
        seen.update(drawn.targets)
        strata = sorted(int(level * len(drawn.levels)) for level in drawn.levels)
        assert strata == list(range(len(drawn.targets)))
    assert len(seen) == count if count < 40 else len(seen) > 30


def test_references_stand_near_a_target_and_are_not_always_the_same():
    """Of 40 all round: the five nearest of a random half, so within some 30 degrees, not 180."""
    settings, seen = Settings(steps=10, targets=1, references=5), set()
    for step in range(60):
        drawn = draw(settings, step, all_round(40))
        apart = [abs((r - drawn.targets[0] + 20) % 40 - 20) for r in drawn.references]
        assert len(apart) == 5 and max(apart) <= 10
        seen.update(apart)
    assert seen >= set(range(1, 6))


def test_a_target_reads_the_references_that_stand_nearest(subject):
    """Others may as well not be there."""
    rig, features = subject.pictures.rig, {i: noise(R, WIDTH, *SIZE, seed=i) for i in BLOCKS}
    targets = subject.cameras(orbit_rig(torch.tensor([0.1, 2.0]), torch.zeros(2), 3.0, 0.7, W, H))
    near = nearest_to(subject.space.normalised(rig.T_camera_world), targets[1], 3)
    assert near.tolist() == [[0, 1, 5], [1, 2, 3]]
    both = subject.net.render(features, subject.known(), targets, SIZE, nearest=3)
    for n, chosen in enumerate(near.tolist()):
        some = {i: f[chosen] for i, f in features.items()}
        target = tuple(part[n : n + 1] for part in targets)
        alone = subject.net.render(some, subject.known(chosen), target, SIZE)
        torch.testing.assert_close(alone.features[2][0], both.features[2][n])
        torch.testing.assert_close(alone.fine.median_depth[0], both.fine.median_depth[n])


def test_a_step_depends_on_seed_and_step_alone():
    one, same, other = (draw(Settings(9, seed=s), 4, all_round(30)) for s in (1, 1, 2))
    assert one.targets == same.targets and one.levels == same.levels
    assert torch.equal(*(torch.rand(3, generator=d.generator) for d in (one, same)))
    assert (one.targets, one.levels) != (other.targets, other.levels)


def test_error_outside_the_subject_counts_a_tenth():
    clean, masks = torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 8, 8)
    masks[:, 1, 0::4] = 0.3  # all of a token counts when some of it is the subject
    inside, outside = (clean.clone() for _ in range(2))
    inside[..., :2, :] = 1
    outside[..., 2:, :] = 1
    sigma = torch.tensor([0.5])
    a, b = (float(diffusion_loss(x, clean, sigma, masks)) for x in (inside, outside))
    # Half of the numbers are off by 1 / 0.5.
    assert a == pytest.approx(2.0) and b == pytest.approx(2.0 * SURROUNDINGS)
    assert float(diffusion_loss(clean, clean, sigma, masks)) == 0


def test_field_losses_are_zero_where_it_shows_the_pictures(subject):
    net, seen = subject.net, subject.pictures
    features = {i: noise(R, WIDTH, *SIZE, seed=i) for i in BLOCKS}
    net.measure(features, seen.latents[:, :, 0])
    found = net.render(features, subject.known(), subject.cameras(seen.rig), SIZE)
    pool = torch.nn.functional.avg_pool2d
    clean, alpha = net.normed(seen.latents[:, :, 0]), pool(seen.masks[:, None], 2)[:, 0]
    torch.testing.assert_close(clean.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    coarse = replace(found.coarse, rgb=pool(seen.colors, 2), alpha=pool(alpha[:, None], 2)[:, 0])
    fine = replace(found.fine, rgb=seen.colors, alpha=alpha)
    perfect = replace(found, coarse=coarse, fine=fine, latents=clean)
    assert float(field_loss(net, perfect, seen)) < 1e-10
    for part in ("coarse", "fine", "latents"):
        wrong = replace(perfect, **{part: getattr(found, part)})
        assert field_loss(net, wrong, seen) > 1e-3


def learned(subject: Subject, steps: int, blocks=BLOCKS) -> SubjectTraining:
    """With a model that passes on what the last block's field gives, mixed."""
    features = {i: noise(R, WIDTH, *SIZE, seed=i) for i in blocks}
    mix, base = noise(WIDTH, 4, seed=9), noise(2, 6, WIDTH, seed=8)
    training = SubjectTraining(subject, Settings(6, seed=3))

    def denoise(drawn):
        near = {i: f[drawn.references] for i, f in features.items()}
        found = training.render(near, drawn) if blocks else None
        tokens = base
        for block, seen in found.features.items() if found else ():
            tokens = training.net.inject(block, tokens, seen.flatten(2).mT)
        if training.net.lora is not None:
            tokens = (
                tokens + tokens @ training.net.lora.down[0, 0].mT @ training.net.lora.up[0, 0].mT
            )
        words = training.net.words.sum() * 0.1
        made = (tokens @ mix).mT.unflatten(2, SIZE)[:, :, None] + words
        made = torch.nn.functional.interpolate(made, (1, H // 8, W // 8))
        clean = subject.pictures.latents[drawn.targets]
        return made, clean, torch.tensor(drawn.levels).clamp(min=0.1), found

    for _ in range(steps):
        training.learn(denoise)
    return training


def with_shape(pictures, **other) -> Subject:
    return Subject(SubjectNet(replace(SHAPE, **other)), pictures, ())


@pytest.mark.parametrize(
    "other",
    [{}, {"rank": 2, "depth": 1}, {"tokens": 0}, {"blocks": (), "rank": 2, "depth": 1}],
    ids=["fields", "lora", "no words", "words and lora alone"],
)
def test_going_on_from_a_file_ends_where_one_piece_ends(pictures, tmp_path, other):
    blocks = other.get("blocks", BLOCKS)
    whole = learned(with_shape(pictures, **other), 6, blocks)
    first = learned(with_shape(pictures, **other), 3, blocks).subject
    save_subject(tmp_path / "s.safetensors", first)
    kept = {k: v.clone() for k, v in first.training.items()}
    again = load_subject(tmp_path / "s.safetensors")
    second = learned(again, 3, blocks)
    assert second.losses == whole.losses
    for a, b in zip(whole.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)
    if again.net.lora is not None:
        assert bool(again.net.lora.up.any())
    # What it went on from is still there.
    assert all(torch.equal(again.training[k], v) for k, v in kept.items())


def test_a_state_of_another_net_is_refused(pictures):
    training = learned(untrained(pictures), 1)
    state = {**training.state(), "0.exp_avg": torch.zeros(7)}
    other = replace(untrained(pictures), training=state)
    with pytest.raises(ValueError, match="'subject' holds what another training left"):
        SubjectTraining(other, Settings(6))


def test_layers_with_a_lora_in_place_give_what_its_weights_added_give():
    block = torch.nn.ModuleDict(
        {
            part: torch.nn.ModuleDict({n: torch.nn.Linear(WIDTH, WIDTH) for n in "qkvo"})
            for part in ("self_attn", "cross_attn")
        }
    )
    lora = LoRA(WIDTH, 1, 3, torch.Generator().manual_seed(0))
    x, layer = noise(2, 5, WIDTH), block["cross_attn"]["v"]
    plain = layer(x)
    with lora.in_place([block]):
        assert torch.equal(layer(x), plain)  # it begins as nothing
    with torch.no_grad():
        lora.up.copy_(noise(*lora.up.shape, seed=5))
    with lora.in_place([block]):
        changed = layer(x)
    up, down = lora.layers()["blocks.0.cross_attn.v"]
    wanted = torch.nn.functional.linear(x, layer.weight + up @ down, layer.bias)
    torch.testing.assert_close(changed, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed, plain, atol=0.1)
    with pytest.raises(RuntimeError), lora.in_place([block]):
        raise RuntimeError
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_keeps_it(subject, dtype):
    x = noise(2, 6, WIDTH).to(dtype)
    features = noise(2, 6, WIDTH + 1, seed=3).sigmoid().to(dtype)
    changed = subject.net.inject(2, x, features)
    assert changed.dtype == dtype
    exact = subject.net.inject(2, x.float(), features.float())
    torch.testing.assert_close(changed.float(), exact, atol=0.02, rtol=0.01)


def test_small_gradients_come_through_a_model_of_half_precision(pictures):
    """A billionth is nothing in float16."""
    training = SubjectTraining(with_shape(pictures, blocks=()), Settings(6))

    def denoise(drawn):
        clean = pictures.latents[drawn.targets]
        half = training.net.words.sum().half()
        made = clean + 1 + 1e-9 * half.float()
        return made, clean, torch.ones(len(clean)), None

    training.learn(denoise)
    assert bool((training.net.words != 0).all())
