"""A stable background: against the true one, for cameras that stand and that turn, and for bad masks."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models import background
from turnaround.models.background import (
    Canvas,
    canvas_of,
    compose,
    exposure,
    matte_of,
    pixel_grid,
    sample,
    stable_background,
    steady_mean,
    warp_places,
)
from turnaround.models.cameras import orbit_rig
from turnaround.models.performer import draw_appearance, pose_performer, render_performer
from turnaround.models.views import Views, to_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, FRAMES = 96, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


def wall(size: int = SIZE, seed: int = 0, boxes: int = 60) -> Tensor:  # [3, size, size]
    """Boxes of many colours and sizes, so that every place looks different."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.full((3, size, size), 0.5)
    for _ in range(boxes):
        x, y, w, h = (torch.rand(4, generator=generator) * size).long().tolist()
        w, h = 4 + w // 6, 4 + h // 6
        picture[:, y : y + h, x : x + w] = 0.15 + 0.7 * torch.rand(3, 1, 1, generator=generator)
    return torch.nn.functional.avg_pool2d(picture[None], 3, 1, 1, count_include_pad=False)[0]


@pytest.fixture(scope="module")
def performer() -> tuple[Tensor, Tensor]:
    """A dancer before black, colour times coverage [F, 3, H, W], and the coverage [F, H, W]."""
    times = 0.2 + torch.arange(FRAMES) / 10
    look = draw_appearance(3)
    rig = orbit_rig(torch.zeros(1), torch.zeros(1), 3.2, 0.75, SIZE, SIZE)
    clip = render_performer(pose_performer("kira", "dance_a", times, look), look, rig, (0.0,) * 3)
    return clip.frames[0], clip.masks[0]


def before(performer, behind: Tensor) -> Tensor:  # [F, 3, H, W]
    picture, mask = performer
    return picture + (1 - mask[:, None]) * behind


def flickering(performer, noise: float = 0.04) -> tuple[Tensor, Tensor]:
    """The dancer before a wall with noise that is new in every frame: frames and true wall."""
    truth = wall()
    behind = truth + noise * draw(FRAMES, 3, SIZE, SIZE)
    return before(performer, behind).clamp(0, 1), truth


def one_view(frames: Tensor, masks: Tensor) -> Views:
    return Views(frames[None], masks[None])


def test_plate_is_the_true_background_and_stands_still(performer):
    frames, truth = flickering(performer)
    masks = performer[1]
    result = stable_background(one_view(frames, masks), grow=2)
    seen = ~result.holes[0]
    assert 0.9 < seen.float().mean() < 1
    # Noise of 0.04 is 28 dB; nine frames bring 9.5 dB, and fewer where the dancer was.
    assert psnr(frames[0][:, masks[0] == 0], truth[:, masks[0] == 0]) < 29
    assert psnr(result.plates[0][:, seen], truth[:, seen]) > 35
    past = (masks == 0).all(0)
    assert frames[:, :, past].std(0).mean() > 0.03
    assert result.frames[0][:, :, past].std(0).max() == 0


def test_performer_is_untouched_to_the_bit(performer):
    frames, _ = flickering(performer)
    matte = matte_of(performer[1])
    frames[0] *= 1.5  # some of it beyond white
    result = stable_background(one_view(frames, performer[1]))
    inside, outside = ((matte == m)[:, None].expand_as(frames) for m in (1, 0))
    assert inside.float().mean() > 0.05
    assert torch.equal(result.frames[0][inside], frames[inside])
    plate = result.plates[0].expand_as(frames)
    assert torch.equal(result.frames[0][outside], plate[outside])


def test_plain_grey_stays_as_it_is(performer):
    masks = performer[1]
    frames = before(performer, torch.tensor(0.5))
    result = stable_background(one_view(frames, masks))
    outside = (masks == 0)[:, None].expand_as(frames)
    assert (result.frames[0] - frames)[outside].abs().max() < 1e-3
    assert (result.plates - 0.5).abs().max() < 1e-3


def test_bytes_stay_bytes_and_show_the_same(performer):
    frames, _ = flickering(performer)
    whole = stable_background(one_view(frames, performer[1]))
    small = stable_background(one_view(to_bytes(frames), performer[1] > 0.5))
    assert small.frames.dtype == torch.uint8
    inside = (matte_of(performer[1] > 0.5) == 1)[:, None].expand_as(frames)
    assert torch.equal(small.frames[0][inside], to_bytes(frames)[inside])
    # The same samples count, but for those at the border of what strays.
    assert (small.plates - whole.plates).abs().median() < 1 / 255


def test_mean_leaves_out_what_strays():
    samples = 0.4 + 0.01 * draw(9, 3, 4, 4)
    samples[2] = 0.9  # a passer-by
    known = torch.ones(9, 4, 4, dtype=torch.bool)
    known[5:, 0] = False
    samples[5:, :, 0] = torch.nan  # what is not known does not count, whatever it is
    plate = steady_mean(samples, known)
    assert (plate - 0.4).abs().max() < 0.025
    known[:, 1, 1] = False
    assert steady_mean(samples, known)[:, 1, 1].isnan().all()
    # Two samples that differ: both count.
    pair = torch.tensor([0.2, 0.6])[:, None, None, None].expand(2, 3, 1, 1)
    both = torch.ones(2, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(steady_mean(pair, both), torch.full((3, 1, 1), 0.4))


def test_exposure_that_drifts_is_found_and_noise_is_not(performer):
    frames, truth = flickering(performer, 0.02)
    known = performer[1] == 0
    assert torch.equal(exposure(frames, known), torch.ones(FRAMES, 3))
    gains = (1 + 0.08 * draw(FRAMES, 3, seed=1)).clamp(max=1.1)
    gains = gains / gains.median(0).values
    bright = (frames * gains[..., None, None]).clamp(0, 1)
    assert (exposure(bright, known) - gains).abs().max() < 0.005
    result = stable_background(one_view(bright, performer[1]), grow=2)
    seen = ~result.holes[0]
    assert psnr(result.plates[0][:, seen], truth[:, seen]) > 35
    assert "brightness drifted" in result.notes[-1]


def test_grow_keeps_a_rim_out_of_the_plate():
    """A white performer who stands still, and a mask that is two pixels too tight."""
    masks = torch.zeros(FRAMES, SIZE, SIZE)
    masks[:, 22:78, 40:60] = 1
    frames = wall().expand(FRAMES, -1, -1, -1).clone()
    frames[:, :, 20:80, 38:62] = 1.0
    rim, clean = (
        stable_background(one_view(frames, masks), grow=grow).plates.max() for grow in (0, 2)
    )
    assert rim == 1 and clean < 0.9


def test_a_new_background_leaves_no_rim_of_the_old_one():
    """Red before green, on blue: what is left of green at the edge."""
    mask = torch.zeros(SIZE, SIZE)
    mask[20:70, 30:60] = 1
    soft = torch.nn.functional.avg_pool2d(mask[None], 3, 1, 1)
    red, green, blue = torch.eye(3)[..., None, None]
    frame = soft * red + (1 - soft) * green
    views = one_view(frame[None], mask[None])
    result = stable_background(views, plate=blue.expand(3, SIZE, SIZE)[None])
    # Half of an edge pixel is green in the frame; the second pixel, a third, is all performer's.
    assert result.frames[0, 0, 1].max() < 0.34
    ring = (matte_of(mask[None])[0] > 0) & (matte_of(mask[None])[0] < 1)
    assert frame[1][ring].mean() > 0.3
    plain = compose(frame, matte_of(mask[None])[0], blue.expand_as(frame), 0 * mask[None])
    assert result.frames[0, 0, 1][ring].mean() < 0.7 * plain[1][ring].mean()


def turning(degrees: float) -> Tensor:  # [F, 3, 3] float64
    """To the first frame's pixels from those of a camera that pans, nods and rolls a little."""
    focal, half = 1.3 * SIZE, SIZE / 2
    K = torch.tensor([[focal, 0, half], [0, focal, half], [0, 0, 1]], dtype=torch.float64)
    found = []
    for f in range(FRAMES):
        pan, nod, roll = (math.radians(a * f / (FRAMES - 1)) for a in (degrees, degrees / 5, 2))
        spin = [[0, -roll, pan], [roll, 0, -nod], [-pan, nod, 0]]
        R = torch.linalg.matrix_exp(torch.tensor(spin, dtype=torch.float64))
        found.append(K @ R @ torch.linalg.inv(K))
    return torch.stack(found)


def filmed(performer, to_first: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """The dancer before a wall that the camera turns past: frames, and the true backgrounds."""
    big = wall(3 * SIZE, boxes=900)
    grid = pixel_grid(Canvas(0, 0, SIZE, SIZE), slice(0, SIZE))
    behind = torch.stack([sample(big, warp_places(grid, H) + SIZE) for H in to_first])
    return before(performer, (behind + noise * draw(*behind.shape)).clamp(0, 1)), behind


@pytest.mark.parametrize(
    ("degrees", "noise", "error"),
    # Past about 8 degrees half of the points have left the picture, and others carry on.
    [(6.0, 0.0, 0.5), (6.0, 0.02, 0.5), (16.0, 0.0, 1.5)],
)
def test_camera_that_turns_is_followed(performer, degrees, noise, error):
    to_first = turning(degrees)
    frames, behind = filmed(performer, to_first, noise)
    result = stable_background(one_view(frames, performer[1]), grow=2, follow=True)
    grid = pixel_grid(Canvas(0, 0, SIZE, SIZE), slice(0, SIZE, 8), 8).double()
    for found, true in zip(result.motions[0], to_first, strict=True):
        # In the frame's own pixels, where errors are seen.
        back = warp_places(warp_places(grid, found), torch.linalg.inv(true))
        assert (back - grid).norm(dim=-1).max() < error
    past = (performer[1] == 0)[:, None].expand_as(frames)
    assert psnr(result.frames[0][past], behind[past]) > 35
    assert "moves by up to" in " ".join(result.notes)


def test_camera_that_stands_still_needs_no_following(performer):
    frames, _ = flickering(performer, 0.02)
    still, followed = (
        stable_background(one_view(frames, performer[1]), follow=follow) for follow in (False, True)
    )
    assert followed.motions == (None,)
    assert torch.equal(still.frames, followed.frames)
    assert still.notes == followed.notes


def test_nothing_to_follow_is_said(performer):
    frames = before(performer, torch.tensor(0.5))
    result = stable_background(one_view(frames, performer[1]), follow=True)
    assert result.motions == (None,)
    assert "could not be followed" in result.notes[-1] and "stand still" in result.notes[-1]


def shifts(pixels: list[float]) -> Tensor:
    to_first = torch.eye(3, dtype=torch.float64).repeat(len(pixels), 1, 1)
    to_first[:, 0, 2] = torch.tensor(pixels, dtype=torch.float64)
    return to_first


def test_camera_that_jumps_is_followed():
    """Farther between frames than points can be tracked: corners are known by their looks."""
    size, to_first = 2 * SIZE, shifts([0, 45, 10])
    grid = pixel_grid(Canvas(0, 0, size, size), slice(0, size))
    grain = torch.nn.functional.avg_pool2d(draw(1, 3, 3 * size, 3 * size), 7, 1, 3)[0]
    big = (0.5 + 1.2 * grain).clamp(0, 1)
    frames = torch.stack([sample(big, warp_places(grid, H) + size) for H in to_first])
    masks = torch.zeros(3, size, size)
    masks[:, 60:120, 80:110] = 1
    result = stable_background(one_view(frames, masks), follow=True)
    assert (result.motions[0] - to_first)[:, :2, 2].abs().max() < 0.5


def test_canvas_holds_all_frames_up_to_twice_their_size():
    assert canvas_of(None, (60, 40)) == Canvas(0, 0, 60, 40)
    assert canvas_of(shifts([0, 10, 30]), (60, 40)) == Canvas(0, 0, 96, 40)  # 90 in steps of 16
    assert canvas_of(shifts([0, -10, 30]), (60, 40)) == Canvas(-10, 0, 112, 40)
    assert canvas_of(shifts([0, -90, 30]), (60, 40)) == Canvas(-45, 0, 120, 40)


def test_what_looks_past_the_plate_keeps_its_own_background(monkeypatch, performer):
    to_first = shifts([18.0 * f for f in range(FRAMES)])
    frames, behind = filmed(performer, to_first)
    monkeypatch.setattr(background, "camera_motion", lambda film, step: (to_first, "moves"))
    result = stable_background(one_view(frames, performer[1]), follow=True)
    assert result.plates.shape[-1] == 2 * SIZE
    assert "look past" in result.notes[-1]
    kept = 18 * (FRAMES - 1) + SIZE - 2 * SIZE  # columns of the last frame beyond the plate
    assert torch.equal(result.frames[0, -1, :, :, -kept:], frames[-1, :, :, -kept:])
    past = (performer[1] == 0)[:, None].expand_as(frames)
    assert psnr(result.frames[0][past], behind[past]) > 40


@pytest.mark.parametrize("follow", [False, True])
def test_plate_that_comes_back_gives_the_same_views(performer, follow):
    """A view that moves beside one that does not: their plates share one size."""
    moving, _ = filmed(performer, turning(6.0))
    still, _ = flickering(performer)
    views = Views(torch.stack([moving, still]), performer[1].expand(2, -1, -1, -1))
    first = stable_background(views, 2, follow)
    assert (first.plates.shape[-1] > SIZE) == follow
    assert first.holes.shape == first.plates[:, 0].shape
    again = stable_background(views, 2, follow, first.plates)
    assert torch.equal(again.frames, first.frames)
    assert torch.equal(again.holes, first.holes)
    assert "taken from 'plate'" in again.notes[0]


def test_one_picture_of_any_size_is_every_views_background(performer):
    frames, _ = flickering(performer)
    views = Views(frames.expand(2, -1, -1, -1, -1), performer[1].expand(2, -1, -1, -1))
    picture = torch.zeros(1, 3, 40, 90)
    picture[..., 20:70] = torch.tensor([0.2, 0.3, 0.9])[:, None, None]  # its middle fills a square
    result = stable_background(views, plate=picture)
    assert result.plates.shape == (2, 3, SIZE, SIZE)
    blue = torch.tensor([0.2, 0.3, 0.9])[:, None].expand(3, int((performer[1][0] == 0).sum()))
    torch.testing.assert_close(result.frames[1, 0][:, performer[1][0] == 0], blue)


def test_memory_is_bounded_by_rows_that_change_nothing(monkeypatch, performer):
    frames, _ = filmed(performer, turning(6.0))
    views = one_view(frames, performer[1])
    whole = [stable_background(views, follow=follow) for follow in (False, True)]
    monkeypatch.setattr(background, "VALUES", 7 * FRAMES * 3 * SIZE)
    for follow, expected in enumerate(whole):
        parts = stable_background(views, follow=bool(follow))
        torch.testing.assert_close(parts.plates, expected.plates, atol=1e-6, rtol=0)


def test_views_without_any_background():
    frames = wall().expand(2, FRAMES, -1, -1, -1).clone()
    masks = torch.ones(2, FRAMES, SIZE, SIZE)
    with pytest.raises(ValueError, match="covers the whole picture"):
        stable_background(Views(frames, masks))
    masks[0, :, :, 40:] = 0
    result = stable_background(Views(frames, masks))
    assert torch.equal(result.frames[1], frames[1])
    assert result.holes[1].all() and (result.plates[1] == 0.5).all()
    assert result.notes[-1].startswith("view 1: no frame shows any background")
    other = stable_background(Views(frames, masks), plate=torch.zeros(1, 3, 8, 8))
    assert torch.equal(other.frames[1], frames[1])  # all performer, as the mask says


def test_nobody_in_some_frames_and_one_frame_alone(performer):
    frames, truth = flickering(performer, 0.02)
    masks = performer[1].clone()
    masks[4] = 0
    frames[4] = truth
    result = stable_background(one_view(frames, masks))
    assert torch.equal(result.frames[0, 4], result.plates[0])
    assert "some masks are black" in result.notes[-1]
    for follow in (False, True):
        alone = stable_background(one_view(frames[:1], masks[:1]), grow=2, follow=follow)
        past = ~alone.holes[0]
        torch.testing.assert_close(alone.plates[0][:, past], frames[0][:, past])
        assert alone.plates.isfinite().all()


def test_what_was_never_seen_is_painted_from_around_it():
    """A performer who never leaves a ramp of brightness: Telea continues it."""
    ramp = torch.linspace(0.2, 0.8, SIZE).expand(3, SIZE, SIZE)
    masks = torch.zeros(3, SIZE, SIZE)
    masks[:, 30:60, 40:52] = 1
    frames = torch.where(masks[:, None] > 0, 1.0, ramp)
    result = stable_background(one_view(frames, masks), grow=2)
    assert result.holes[0].sum() == (30 + 4) * (12 + 4)
    assert (result.plates[0] - ramp).abs().max() < 0.05


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("grow", [2, 40])  # at 40 too little is left to follow
def test_progress_rises_to_the_end(performer, follow, grow):
    frames, _ = filmed(performer, turning(6.0))
    seen = []
    views = one_view(frames, performer[1])
    stable_background(views, grow, follow, None, lambda *step: seen.append(step))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and set(totals) == {(3 if follow else 2) * FRAMES}
    assert done[-1] == totals[-1] and len(done) > FRAMES
