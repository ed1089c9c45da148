"""Deflicker: every kind of flicker goes, what moves stays sharp, real changes of light stay.

The scene is drawn, so its flow is exact: the camera pans over a texture before which a textured disc
moves on a curve."""

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.deflicker import DeflickerSettings, deflicker
from turnaround.models.deflicker_colour import lasting_changes, slow
from turnaround.models.deflicker_places import beside
from turnaround.models.deflicker_texture import averaged, misplaced, smoothed
from turnaround.models.filters import gaussian
from turnaround.models.metrics import psnr, sample

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, SIZE = 13, 96
PAN = torch.tensor([1.6, 0.7])
"""Pixels a frame."""


def blobs(seed: int, size: int, cells=(6, 12, 24, 48)) -> torch.Tensor:  # [3, size, size]
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(
            torch.randn(1, 3, n, n, generator=generator), (size, size), mode="bicubic"
        )[0]
        for n in cells
    ]  # fmt: skip
    return (0.45 + 0.07 * sum(layers)).clamp(0.05, 0.95)


def places() -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    return x, y


def disc_at(f: int) -> torch.Tensor:  # [2]
    t = torch.tensor(float(f))
    return torch.stack([30 + 2.5 * t, 48 + 14 * torch.sin(t / 6)])


def scene(
    frames: int = FRAMES, pan: torch.Tensor = PAN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """frames [F, 3, H, W], flow there [F - 1, 2, H, W], where it is exact [F - 1, H, W]."""
    ground, skin = blobs(0, 160), blobs(1, 64)
    x, y = places()
    pictures, flows, kept = [], [], []
    for f in range(frames):
        now, then = disc_at(f), disc_at(f + 1)
        at = f * pan
        far = sample(ground[None], (x + at[0])[None], (y + at[1])[None])[0]
        near = sample(skin[None], (x - now[0] + 32)[None], (y - now[1] + 32)[None])[0]
        away = ((x - now[0]) ** 2 + (y - now[1]) ** 2).sqrt()
        inside = (15 - away).clamp(-0.5, 0.5) + 0.5
        pictures.append(inside * near + (1 - inside) * far)
        flows.append(torch.where(away < 15, (then - now).view(2, 1, 1), -pan.view(2, 1, 1)))
        ahead = torch.stack([x, y]) + flows[-1]
        covered = ((ahead[0] - then[0]) ** 2 + (ahead[1] - then[1]) ** 2).sqrt() < 17
        edge = (away - 15).abs() < 2
        within = (ahead > 1).all(0) & (ahead < SIZE - 1).all(0)
        kept.append(within & ~edge & ((away < 15) | ~covered))
    return torch.stack(pictures), torch.stack(flows[:-1]), torch.stack(kept[:-1])


def warping_error(frames, flow, kept) -> float:
    x, y = places()
    later = sample(frames[1:], x + flow[:, 0], y + flow[:, 1])
    return float((later - frames[:-1]).square().mean(1)[kept].mean().sqrt())


def sharpness(frames) -> float:
    return float(frames.diff(dim=-1).square().mean() + frames.diff(dim=-2).square().mean())


def coarse(frames: int, channels: int, cells: int, seed: int) -> torch.Tensor:
    """Smooth noise of its own in every frame, root mean square 1, [F, channels, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    field = F.interpolate(
        torch.randn(frames, channels, cells, cells, generator=generator),
        (SIZE, SIZE),
        mode="bicubic",
    )
    return field / field.square().mean().sqrt()


def exposure(frames):
    generator = torch.Generator().manual_seed(2)
    return frames * torch.exp(0.12 * torch.randn(len(frames), 1, 1, 1, generator=generator))


def colour(frames):
    return frames * (1 + 0.06 * coarse(len(frames), 3, 3, 3)) + 0.02 * coarse(len(frames), 3, 3, 4)


def texture(frames):
    n = len(frames)
    return frames + 0.02 * coarse(n, 3, SIZE, 5) + 0.035 * coarse(n, 1, SIZE // 3, 6)


def wobble(frames):
    x, y = places()
    bend = 0.9 * coarse(len(frames), 2, 5, 7)
    return sample(frames, x + bend[:, 0], y + bend[:, 1])


@pytest.fixture(scope="module")
def clean():
    return scene()


# What is asked for: decibels gained; share of the warping error that may be left.
GOALS = {exposure: (5.0, 0.3), colour: (6.0, 0.4), texture: (3.0, 0.55), wobble: (2.0, 0.6)}


@pytest.mark.parametrize("fault", GOALS, ids=lambda fault: fault.__name__)
def test_flicker_goes_and_sharpness_stays(clean, fault):
    truth, flow, kept = clean
    bad = fault(truth).clamp(0, 1)
    result = deflicker(bad)
    gained, left = GOALS[fault]
    assert psnr(result.frames, truth) > psnr(bad, truth) + gained
    assert warping_error(result.frames, flow, kept) < left * warping_error(bad, flow, kept)
    # Against the sharper of none: wobble itself blurs, grain seems sharp.
    assert 0.88 < sharpness(result.frames) / min(sharpness(bad), sharpness(truth)) < 1.1


@pytest.fixture(scope="module")
def standing():
    """The camera stands; only the disc moves."""
    return scene(pan=torch.zeros(2))


def test_wobble_before_a_camera_that_stands_goes_by_more_than_half(standing):
    """The mean of all frames tells it better than flow does, and what is left is averaged away."""
    truth, flow, kept = standing
    bad = wobble(truth).clamp(0, 1)
    result = deflicker(bad)
    assert result.wobble == pytest.approx(0.9, abs=0.3)
    assert psnr(result.frames, truth) > psnr(bad, truth) + 3
    assert warping_error(result.frames, flow, kept) < 0.3 * warping_error(bad, flow, kept)
    assert 0.88 < sharpness(result.frames) / sharpness(truth) < 1.1


def disc(frames) -> torch.Tensor:  # [F, H, W] bool, well inside it
    x, y = places()
    at = [disc_at(f) for f in range(len(frames))]
    return torch.stack([((x - p[0]) ** 2 + (y - p[1]) ** 2).sqrt() < 11 for p in at])


def test_what_moves_wobbles_as_what_stands_does(standing):
    """The disc is straightened too, though its own motion alone could not tell how far to trust it."""
    truth, inside = standing[0], disc(standing[0])
    bad = wobble(truth).clamp(0, 1)
    assert psnr(deflicker(bad).frames, truth, inside) > psnr(bad, truth, inside) + 1


def test_noise_is_not_taken_for_wobble_of_what_moves(standing):
    """Noise makes still pictures and flow seem to wobble: bending the disc would cost 2 dB."""
    truth, inside = standing[0], disc(standing[0])
    bad = texture(truth).clamp(0, 1)
    kept, bent = (
        psnr(deflicker(bad, DeflickerSettings(places=p)).frames, truth, inside) for p in (0.0, 1.0)
    )
    assert bent > kept - 0.5


def test_a_clean_clip_of_a_standing_camera_stays(standing):
    truth = standing[0]
    result = deflicker(truth)
    assert psnr(result.frames, truth) > 50 and result.wobble == 0


def test_misplaced_pictures_differ_as_slopes_say():
    """Of a plain slope: two pictures, each bent by `sigma` along x, differ by its slope times that."""
    slope, sigma = 0.01, 0.5
    ramp = slope * torch.arange(32.0).expand(3, 32, 32)
    found = misplaced(ramp, torch.full((32, 32), sigma))[8:-8, 8:-8]
    torch.testing.assert_close(found, torch.full_like(found, 2 * (slope * sigma) ** 2))


def test_points_on_smooth_paths_lie_beside_nothing():
    """A whole picture on a parabola: `beside` finds nothing; one frame of it shifted: that shift."""
    generator = torch.Generator().manual_seed(11)
    picture = gaussian(torch.randn(3, 48, 48, generator=generator), 2.0)
    paths = torch.stack([0.02 * (torch.arange(11.0) - 5) ** 2, torch.zeros(11)], 1)
    for shift in (0.0, 0.6):
        at = paths.clone()
        at[5, 0] += shift
        there = at.diff(dim=0).view(-1, 2, 1, 1).expand(-1, -1, 48, 48)
        moves = torch.ones(48, 48)
        field = beside((there, -there), 5, picture, moves, 0.6)
        assert float((field[0, 12:-12, 12:-12] - shift).abs().max()) < 0.25
        assert float(field[1].abs().max()) < 0.05
        assert float(beside((there, -there), 5, picture, 0 * moves, 0.6).abs().max()) == 0


def test_a_clean_clip_hardly_changes(clean):
    truth, flow, kept = clean
    result = deflicker(truth)
    assert psnr(result.frames, truth) > 42
    assert result.wobble == 0 and len(result.shots) == 1 and result.notes == ()
    assert warping_error(result.frames, flow, kept) <= 1.02 * warping_error(truth, flow, kept)


def test_it_is_better_than_a_median_and_than_the_mean_of_neighbours(clean):
    truth = clean[0]
    bad = texture(colour(truth)).clamp(0, 1)
    padded = torch.cat([bad[:1], bad, bad[-1:]])
    window = torch.stack([padded[:-2], padded[1:-1], padded[2:]])
    ours = psnr(deflicker(bad).frames, truth)
    assert ours > psnr(window.median(0).values, truth) + 3
    assert ours > psnr(window.mean(0), truth) + 2


def test_what_is_switched_off_does_nothing(clean):
    bad = exposure(clean[0]).clamp(0, 1)
    off = deflicker(bad, DeflickerSettings(colour=0, places=0, texture=0))
    assert torch.equal(off.frames, bad) and torch.equal(off.gains, torch.ones(FRAMES, 3))


def test_half_the_strength_takes_half_of_it(clean):
    bad = exposure(clean[0]).clamp(0, 1)
    whole, half = (
        deflicker(bad, DeflickerSettings(colour=s, places=0, texture=0)).frames for s in (1.0, 0.5)
    )
    assert torch.allclose(half - bad, (whole - bad) / 2, atol=0.02)


COLOUR_ALONE = DeflickerSettings(places=0, texture=0)


def test_light_that_changes_slowly_stays(clean):
    dusk = clean[0] * torch.linspace(1.0, 0.5, FRAMES).view(-1, 1, 1, 1)
    assert psnr(deflicker(dusk, COLOUR_ALONE).frames, dusk) > 40


def test_light_that_changes_for_good_stays_but_its_flicker_goes(clean):
    lamp = clean[0] * torch.where(torch.arange(FRAMES) < 6, 0.55, 1.0).view(-1, 1, 1, 1)
    assert psnr(deflicker(lamp, COLOUR_ALONE).frames, lamp) > 40
    bad = exposure(lamp).clamp(0, 1)
    assert psnr(deflicker(bad, COLOUR_ALONE).frames, lamp) > psnr(bad, lamp) + 4


def test_slow_values_keep_lines_and_steps():
    t = torch.arange(40.0)
    line, step = 0.02 * t, (t > 20).float()
    noise = 0.03 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    for truth in (line, step):
        smooth = slow(truth[:, None] + noise)
        assert (smooth - truth[:, None]).square().mean().sqrt() < 0.016  # about 0.03 / sqrt(5)
    assert lasting_changes(step[:, None] + noise) == [21]
    assert lasting_changes(line[:, None] + noise) == lasting_changes(noise) == []


def test_shots_are_apart(clean):
    first = exposure(clean[0][:5]).clamp(0, 1)
    second = texture(blobs(5, SIZE).expand(4, -1, -1, -1)).clamp(0, 1)
    together = deflicker(torch.cat([first, second]))
    assert together.shots == [range(0, 5), range(5, 9)]
    assert torch.equal(together.frames[:5], deflicker(first).frames)
    assert torch.equal(together.frames[5:], deflicker(second).frames)
    assert together.notes == ("2 shots (cuts at frame 5), each by itself",)


def test_texture_looks_only_so_many_frames_around(clean):
    """So long clips are made frame after frame, and what lies far away changes nothing."""
    looks = smoothed(clean[0])
    flows = clean[1], -clean[1]
    frame = clean[0].__getitem__
    near = [averaged(4, frame, looks[:n], flows, 1e-4, 2) for n in (FRAMES, 7)]
    assert torch.equal(*near)
    asked = []
    averaged(6, lambda g: asked.append(g) or clean[0][g], looks, flows, 1e-4, 2)
    assert set(asked) == {4, 5, 6, 7, 8}


def test_few_frames_and_spoilt_ones(clean):
    truth = clean[0]
    one = deflicker(truth[:1])
    assert torch.equal(one.frames, truth[:1]) and "single frame" in one.notes[0]
    two = deflicker(torch.cat([truth[:1], truth[1:2] * 0.8]))
    assert two.frames.isfinite().all() and float(two.frames.diff(dim=0).mean().abs()) < 0.02
    bad = truth[:6].clone()
    bad[2, :, 10:20] = torch.nan
    result = deflicker(bad).frames
    assert result.isfinite().all() and psnr(result[4:], truth[4:6]) > 35
    still = truth[:1].expand(5, -1, -1, -1)
    assert psnr(deflicker(still).frames, still) > 60
    blank = torch.full((4, 3, 32, 40), 0.3)
    assert torch.allclose(deflicker(blank).frames, blank, atol=1e-4)


def test_tiny_pictures_are_refused():
    with pytest.raises(ValueError, match="at least 16 pixels"):
        deflicker(torch.rand(3, 3, 12, 40))


def test_it_tells_how_far_it_is_and_can_be_stopped(clean):
    seen = []
    deflicker(clean[0][:5], on_step=lambda done, total, preview=None: seen.append((done, total)))
    assert seen[-1] == (65, 65) and all(a[0] <= b[0] for a, b in zip(seen, seen[1:], strict=False))

    def stop(*_):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        deflicker(clean[0][:5], on_step=stop)
