"""The page about MV-Opt: its measures, where the right number is known, and its check of the goals."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate_refine as page  # noqa: E402  (a script beside the tests' folders)
import faults  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

V, COUNT, H, W = 2, 4, 96, 80
STEP = torch.tensor([1.5, -1.0])
"""Pixels that everything moves from one frame to the next."""


def texture(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # [..., h, w] -> [..., 3, h, w]
    """Blobs some five pixels wide that do not repeat, exact at any place."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.rand(3, 12, 3, generator=generator)
    turn, phase = 2 * torch.pi * waves[..., 0], 2 * torch.pi * waves[..., 1]
    speed = 0.4 + 0.7 * waves[..., 2]
    along = x[..., None, None, :, :] * (speed * turn.cos())[..., None, None]
    along = along + y[..., None, None, :, :] * (speed * turn.sin())[..., None, None]
    return (0.5 + 0.8 * (along + phase[..., None, None]).sin().mean(-3)).clamp(0, 1)


def pictures(shift=(0.0, 0.0), late: float = 0.0) -> torch.Tensor:  # [V, F, 3, H, W]
    """The texture moving by STEP a frame, its content shifted, and late by so many frames."""
    x, y = torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy")
    way = STEP * (torch.arange(COUNT)[:, None] - late) + torch.tensor(shift)
    frames = texture(x - way[:, 0, None, None], y - way[:, 1, None, None])
    return torch.stack([frames, 1 - frames])


def places() -> torch.Tensor:  # [V, F, P, 2]
    x, y = torch.meshgrid(torch.arange(28.0, 56, 13), torch.arange(32.0, 66, 16), indexing="xy")
    start = torch.stack([x, y], -1).flatten(0, 1)
    return (start + STEP * torch.arange(COUNT)[:, None, None]).expand(V, -1, -1, -1)


def marks(truth: torch.Tensor | None = None) -> page.Marks:
    truth = pictures() if truth is None else truth
    where = places()
    seen = torch.ones(where.shape[:3], dtype=torch.bool)
    return page.Marks.of(truth, torch.ones(V, COUNT, H, W), where, seen)


@pytest.fixture(scope="module")
def found() -> page.Marks:
    return marks()


def missed(found: page.Marks, result: torch.Tensor, shift) -> float:  # pixels, RMS
    assert found.kept.all()
    return page.rms((found.shifts(result) - torch.tensor(shift))[found.kept])


def test_nothing_moved_is_found_where_it_was(found):
    assert missed(found, pictures(), (0.0, 0.0)) < 1e-3


@pytest.mark.parametrize("shift", [(0.4, -0.3), (-2.6, 1.2), (6.5, 4.7)])
def test_a_known_shift_is_found(found, shift):
    assert missed(found, pictures(shift), shift) < 0.1


def test_a_cast_of_colours_and_a_change_of_brightness_do_not_move_anything(found):
    gain, offset = torch.tensor([[0.7, 1.1, 0.9], [0.1, -0.05, 0.0]])[..., None, None]
    assert missed(found, pictures((1.3, 0.6)) * gain + offset, (1.3, 0.6)) < 0.1


def test_a_bent_picture_is_followed(found):
    x, y = torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy")
    # Every mark stands still, but its surroundings are stretched by a quarter across.
    where = places()
    stretched = pictures()
    for v in range(V):
        for f in range(COUNT):
            near = (where[v, f] - torch.stack([x, y], -1)[:, :, None]).norm(dim=-1).argmin(-1)
            middle = where[v, f][near]
            at = torch.stack([middle[..., 0] + 0.8 * (x - middle[..., 0]), y], -1)
            truth = pictures()[v, f][None]
            stretched[v, f] = page.read(truth, torch.tensor([0]), at[None])[0]
    # A patch that is only shifted errs by 0.12.
    assert missed(found, stretched, (0.0, 0.0)) < 0.06


def test_plain_surfaces_bear_no_marks():
    assert not marks(torch.full((V, COUNT, 3, H, W), 0.4)).kept.any()
    # A stripe tells where it is across, not along.
    x = torch.arange(W) + 0.5
    assert not marks((0.5 + 0.4 * (x / 3).sin()).expand(V, COUNT, 3, H, W)).kept.any()


def test_what_a_view_does_not_show_is_not_looked_for():
    where = places()
    seen = torch.rand(where.shape[:3], generator=torch.Generator().manual_seed(3)) > 0.5
    kept = page.Marks.of(pictures(), torch.ones(V, COUNT, H, W), where, seen)
    assert torch.equal(kept.kept, seen)
    shifts = kept.shifts(pictures((2.0, 0.0)))
    assert (shifts[~seen] == 0).all()
    assert (shifts[seen] - torch.tensor([2.0, 0.0])).norm(dim=-1).max() < 0.2


@pytest.mark.parametrize("late", [0.0, 0.5, 1.0])
def test_lag_of_a_late_result_is_its_delay(found, late):
    shifts = found.shifts(pictures(late=late))
    assert page.lag(shifts, found.velocity, found.kept) == pytest.approx(late, abs=0.02)


def test_a_late_result_at_constant_speed_does_not_jitter(found):
    assert page.jitter(found.shifts(pictures(late=1.0)), found.kept) < 0.1


def test_a_shake_is_no_lag():
    velocity = torch.ones(1, 100, 1, 2)
    shake = torch.tensor([1.0, -1.0]).repeat(50)[None, :, None, None].expand(1, 100, 1, 2)
    kept = torch.ones(1, 100, 1, dtype=torch.bool)
    assert page.lag(shake, velocity, kept) == pytest.approx(0)
    # (1, 1) to (-1, -1) and back: second differences of 4 along both axes.
    assert page.jitter(shake, kept) == pytest.approx(4 * 2**0.5)


def test_jitter_counts_only_three_kept_frames_in_a_row():
    shifts = torch.zeros(1, 5, 1, 2)
    shifts[0, 4] = 100.0
    kept = torch.ones(1, 5, 1, dtype=torch.bool)
    kept[0, 4] = False
    assert page.jitter(shifts, kept) == 0
    assert math.isnan(page.jitter(shifts, kept & False))


# A whole clip


def clip(masks: torch.Tensor | None = None) -> page.Clip:
    rig = orbit_rig(torch.tensor([0.0, 0.5]), torch.zeros(2), 3.0, 0.6, W, H)
    truth = pictures()
    masks = torch.ones(V, COUNT, H, W) if masks is None else masks
    flow = STEP[:, None, None].expand(V, COUNT - 1, 2, H, W)
    seen = torch.ones(V, COUNT - 1, H, W, dtype=torch.bool)
    hand = torch.tensor([40.0, 48.0]).expand(V, COUNT, 2)
    return page.Clip("waves", Views(truth, masks, rig), flow, seen, hand, marks(), masks, {}, {})


@pytest.fixture(scope="module")
def waves() -> page.Clip:
    return clip()


def test_the_truth_has_perfect_scores(waves):
    scores = page.scores(waves.truth.frames, waves)
    assert scores["person"] == math.inf
    assert scores["detail"] == pytest.approx(100)
    # Reading between pixels costs a little, as everywhere.
    assert scores["flicker"] < 2
    assert scores["off"] < 1e-3 and scores["jitter"] < 2e-3 and abs(scores["lag"]) < 1e-3
    assert math.isnan(scores["cross"])  # no surface is known


def test_blur_costs_detail_and_moves_nothing(waves):
    blurred = F.avg_pool2d(waves.truth.frames.flatten(0, 1), 3, 1, 1).unflatten(0, (V, COUNT))
    scores = page.scores(blurred, waves)
    assert scores["detail"] < 80
    assert scores["off"] < 0.1


def test_flicker_and_jitter_show_in_their_own_columns(waves):
    clean = page.scores(waves.truth.frames, waves)
    dark = page.scores(page.faulty(waves.truth.frames, waves.hand, "flicker"), waves)
    shaken = page.scores(page.faulty(waves.truth.frames, waves.hand, "jitter"), waves)
    assert dark["flicker"] > clean["flicker"] + 3 and dark["jitter"] < 0.05
    assert shaken["jitter"] > 0.5 and shaken["off"] > 0.3 and dark["off"] < 0.05


def test_the_measure_finds_what_faults_put_in(waves):
    errors = page.errors_of_measure(waves)
    assert set(errors) == set(page.PLACES)
    assert all(put > 0.4 and miss < 0.25 for put, miss in errors.values())


def test_what_a_limb_puts_in_is_known_at_the_hand(waves):
    put = page.shifts_put_in(waves, "limb")
    assert (put[0] == 0).all() or put[0].norm(dim=-1).max() < 1e-3  # the reference
    near = (places()[1, 0] - waves.hand[1, 0]).norm(dim=-1).argmin()
    # The hand comes to lie where its own shift reaches: less than the whole, as it fades there.
    length = float(put[1, 0, near].norm())
    assert 0.6 * faults.LIMB * W < length < 1.02 * faults.LIMB * W


@pytest.mark.parametrize("fault", page.PLACES)
def test_a_known_shift_can_be_undone(waves, fault):
    truth = waves.truth.frames
    inner = (..., slice(8, -8), slice(8, -8))  # what left the picture can't come back
    before = (page.faulty(truth, waves.hand, fault) - truth)[inner].square().mean()
    assert (page.undone(waves, fault) - truth)[inner].square().mean() < 0.05 * before


def test_all_faults_together_are_worse_than_each(waves):
    frames, hand = waves.truth.frames, waves.hand

    def error(fault: str) -> float:
        return float((page.faulty(frames, hand, fault) - frames).square().mean())

    assert error(page.NOTHING) == 0
    assert error(page.ALL) > max(error(fault) for fault in faults.FAULTS)
    assert set(page.ORDER) == set(faults.FAULTS)


# Simple ways


def test_a_median_takes_a_flash_out_of_a_still_clip(waves):
    still = waves.truth.frames[:, :1].expand(-1, COUNT, -1, -1, -1).clone()
    flashed = still.clone()
    flashed[:, 1] = 1
    assert torch.equal(page.of_median(flashed, waves), still)


def test_matched_colours_take_a_cast_away(waves):
    same = waves.truth.frames[:1].expand(V, -1, -1, -1, -1).clone()
    cast = same.clone()
    cast[1] = cast[1] * torch.tensor([0.9, 1.0, 0.8])[:, None, None]
    matched = page.of_colour_match(cast, waves)
    # OpenCV's way to Lab and back is good to half a byte.
    assert (matched[0] - same[0]).abs().max() < 4e-3
    assert (matched[1] - same[1]).square().mean() < 0.2 * (cast[1] - same[1]).square().mean()


def test_colours_outside_of_the_performer_are_not_matched():
    masks = torch.ones(V, COUNT, H, W)
    masks[..., :20] = 0
    matched = page.of_colour_match(pictures(), clip(masks))
    assert torch.equal(matched[..., :20], pictures()[..., :20])


def test_a_blend_along_flow_lowers_noise_of_moving_pictures(waves):
    truth = waves.truth.frames
    noise = 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    blended = page.of_flow_blend(truth + noise, waves)
    inner = (..., slice(16, -16), slice(16, -16))
    assert (blended - truth)[inner].square().mean() < 0.7 * noise[inner].square().mean()


def test_corners_follow_the_flow(waves):
    where, seen = page.tracked(
        waves.truth.frames, waves.truth.masks, waves.flow, torch.ones(V, COUNT - 1, H, W)
    )
    assert seen.sum() > 20
    steps = (where[:, 1:] - where[:, :-1])[seen[:, 1:]]
    assert (steps - STEP).abs().max() < 1e-4


# Goals and tables


def pair(**after: float) -> tuple[dict, dict]:
    before = {
        "person": 25.0, "cross": 5.0, "flicker": 5.0, "jitter": 2.0, "off": 1.0, "lag": 0.0,
        "detail": 100.0,
    }  # fmt: skip
    return before, {**before, "person": 30.0, "jitter": 0.5, **after}


def good() -> dict:
    return {fault: pair() for fault in page.EVERY if fault != page.NOTHING}


def test_goals_can_all_be_met():
    assert all(goal.met for goal in page.goals(good()))


@pytest.mark.parametrize(
    ("fault", "after", "broken"),
    [
        ("colour", {"person": 27.9}, [0]),
        ("flicker", {"person": math.nan}, [0, 4]),
        ("wobble", {"jitter": 1.1}, [1]),
        ("jitter", {"lag": -0.3}, [2]),
        ("blotches", {"detail": 96.0}, [3]),
        ("ghost", {"person": 24.8}, [4]),
    ],
)
def test_a_goal_is_missed(fault, after, broken):
    checked = page.goals(good() | {fault: pair(**after)})
    assert [n for n, goal in enumerate(checked) if not goal.met] == broken
    lines = page.goals_table(checked).splitlines()[2:]
    assert [n for n, line in enumerate(lines) if "miss" in line] == broken


def test_detail_that_a_fault_took_is_not_asked_for():
    before, after = pair(detail=79.0)
    assert page.goals(good() | {"wobble": ({**before, "detail": 80.0}, after)})[3].met


def test_clean_pictures_have_nothing_to_gain():
    before, after = pair(person=45.0)
    found = good() | {page.NOTHING: ({**before, "person": math.inf}, after)}
    assert page.goals(found)[4].met
    assert page.pairs_table(found).splitlines()[-1].startswith("| nothing | ∞ → 45.00 |")


def test_gains_are_taken_from_the_pictures_before():
    before, after = pair(detail=98.0)
    clean = {**before, "person": math.inf}
    lines = page.gains_table(
        {"nothing": clean, "ghost": before}, {"way": {"nothing": after, "ghost": after}}
    ).splitlines()
    assert lines[2] == "| *before: PSNR* | ∞ | 25.00 | 2.00 | 100.0 |"
    assert lines[3] == "| way | 30.0 dB | +5.00 | 0.50 | 98.0 |"


def test_the_lowest_cell_is_named():
    before, after = pair()
    worse = {**after, "person": 24.8}
    rows = {"a": {"ghost": after, "limb": worse}, "b": {"ghost": after, "limb": after}}
    found = page.lowest_cell({"ghost": before, "limb": before}, rows)
    assert found == "a, limb (-0.20 dB; at least -0.1: **miss**)"
    fine = page.lowest_cell({"ghost": before}, {"b": {"ghost": after}})
    assert fine == "b, ghost (+5.00 dB; at least -0.1: pass)"


def test_means_are_taken_over_clips():
    before, after = pair()
    other = {**after, "person": 20.0}
    assert page.mean_scores([{"a": after}, {"a": other}])["a"]["person"] == 25.0
