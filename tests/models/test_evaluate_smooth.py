"""The page about smoothing: its clips and measures, where the right number is known, and its goals."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_faults  # noqa: E402  (scripts beside the tests' folders)
import evaluate_smooth as run  # noqa: E402
import smooth_clips  # noqa: E402
import smooth_page as page  # noqa: E402
import smooth_ways as ways  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

V, COUNT, H, W = 2, 6, 48, 40
STEP = 2
"""Pixels to the right that everything moves from one frame to the next."""


@pytest.fixture
def clip():
    """Noise moving by whole pixels, so that nothing is resampled."""
    wide = torch.rand(V, 3, H, W + STEP * COUNT, generator=torch.Generator().manual_seed(0))
    wide = 0.3 + 0.4 * wide
    frames = [wide[..., STEP * (COUNT - f) :][..., :W] for f in range(COUNT)]
    masks = torch.zeros(V, COUNT, H, W)
    masks[..., 8:-8, 8:-8] = 1
    flow = torch.zeros(V, COUNT - 1, 2, H, W)
    flow[:, :, 0] = STEP
    seen = torch.ones(V, COUNT - 1, H, W, dtype=torch.bool)
    return smooth_clips.Clip("noise", torch.stack(frames, 1), masks, flow, seen)


# Measures


def test_the_clean_clip_has_nothing_wrong(clip):
    found = smooth_clips.scores(clip.frames, clip)
    assert math.isinf(found["whole"]) and math.isinf(found["person"])
    assert found["added"] == 0
    assert found["warping"] < 1e-4
    assert found["detail"] == found["detail_whole"] == 100


def test_an_error_that_lasts_is_no_flicker(clip):
    found = smooth_clips.scores(clip.frames + 0.1, clip)
    assert found["whole"] == pytest.approx(20, abs=1e-4)
    assert found["added"] < 1e-4 and found["warping"] < 1e-4


def test_flicker_is_measured_as_it_was_put_in(clip):
    signs = torch.tensor([1.0, -1.0] * (COUNT // 2)).view(1, -1, 1, 1, 1)
    found = smooth_clips.scores(clip.frames + 0.02 * signs, clip)
    # Neighbouring frames differ by 0.04.
    assert found["warping"] == pytest.approx(4, rel=1e-4)
    assert found["added"] == pytest.approx(4, rel=1e-4)


def test_what_the_clean_clip_flickers_itself_is_not_added(clip):
    signs = torch.tensor([1.0, -1.0] * (COUNT // 2)).view(1, -1, 1, 1, 1)
    restless = smooth_clips.Clip(
        "restless", clip.frames + 0.02 * signs, clip.masks, clip.flow, clip.seen
    )
    assert smooth_clips.scores(restless.frames, restless)["warping"] == pytest.approx(4, rel=1e-4)
    assert smooth_clips.scores(restless.frames, restless)["added"] == 0


def test_blur_lowers_the_detail_and_errors_outside_do_not_touch_the_person(clip):
    flat = clip.frames.clone()
    flat[..., :8] = 0.5
    found = smooth_clips.scores(flat, clip)
    assert math.isinf(found["person"]) and found["whole"] < 30
    assert found["detail"] == 100 and found["detail_whole"] < 90
    assert smooth_clips.scores(0.5 * clip.frames, clip)["detail"] == pytest.approx(25, rel=1e-4)


def test_a_limb_that_is_gone_is_off_and_noise_is_not(clip):
    gone = clip.frames.clone()
    gone[:, 0, :, 8:24, 8:-8] += 0.3  # half of the performer in one frame of six
    assert smooth_clips.scores(gone, clip)["off"] == pytest.approx(100 / 12, rel=0.15)
    noise = 0.1 * torch.randn(clip.frames.shape, generator=torch.Generator().manual_seed(0))
    assert smooth_clips.scores(clip.frames + noise, clip)["off"] < 0.1


def test_every_view_and_frame_flickers_by_itself(clip):
    assert torch.equal(clip.flickering(smooth_clips.CLEAN), clip.frames)
    for fault in clip_faults.FAULTS:
        away = clip.flickering(fault) - clip.frames
        assert away.abs().mean((2, 3, 4)).min() > 1e-4
        assert torch.equal(clip.flickering(fault) - clip.frames, away)
    factors = (clip.flickering("exposure") / clip.frames).flatten(2).mean(2)
    assert len(factors.flatten().unique()) == V * COUNT


def test_a_person_before_a_room_moves_as_stated():
    clip = smooth_clips.synthetic(3, 2, 3, (64, 80))
    assert clip.frames.shape == (2, 3, 3, 80, 64) and clip.depth.shape == (2, 3, 80, 64)
    body = clip.masks[:, :-1] > 0.5
    assert 0.05 < float(body.float().mean()) < 0.5
    assert clip.flow.norm(dim=2)[body].mean() > 0.5
    # The room stands still, most of the performer is seen again, and along the flow colours agree.
    empty = clip.masks[:, :-1] == 0
    assert clip.flow.norm(dim=2)[empty].max() == 0
    assert clip.seen[body].float().mean() > 0.4
    along = smooth_clips.scores(clip.frames, clip)["warping"]
    still = smooth_clips.Clip(clip.name, clip.frames, clip.masks, 0 * clip.flow, clip.seen)
    assert along < 0.5 * smooth_clips.scores(clip.frames, still)["warping"]
    # Views of one performer agree about the surface that both see.
    assert smooth_clips.cross_view(clip.frames, clip) < 10


# Ways


def test_medians_take_short_flashes_out_of_a_still_clip(clip):
    still = clip.frames[:, :1].expand(-1, COUNT, -1, -1, -1)
    once, twice = still.clone(), still.clone()
    once[:, 2], twice[:, 2:4] = 1, 1
    assert torch.equal(ways.of_median(once, 1), still)
    assert not torch.equal(ways.of_median(twice, 1), still)
    assert torch.equal(ways.of_median(twice, 2), still)


def test_codef_stops_when_its_time_is_over():
    from turnaround.models.implicit_video import FieldSize

    tiny = FieldSize(2, 2, 8, 4, 1.5, 8, 1)
    frames = torch.rand(1, 4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    some, few = ways.of_codef(frames, 0.05, canonical=tiny, deformation=tiny)
    assert some.shape == frames.shape and some.isfinite().all()
    _, more = ways.of_codef(frames, 0.5, canonical=tiny, deformation=tiny)
    assert 1 <= few < more < 10_000


# Goals and tables


def figures(**others: float) -> dict[str, float]:
    return {
        "whole": 25.0, "person": 25.0, "warping": 5.0, "added": 4.0, "off": 1.0, "detail": 90.0,
        "detail_whole": 90.0,
    } | others  # fmt: skip


GOOD = {"whole": 30.0, "person": 30.0, "warping": 2.0, "added": 1.0, "detail": 99.0}


def found(fault: str = "colour", **others: float) -> page.Found:
    """Two kinds and the clean clip, all goals met but for what `others` change in one of them."""
    rows = {
        page.AS_IT_IS: figures(warping=10.0, added=9.0),
        "median": figures(),
        page.FIT: figures(**GOOD),
    }
    changed = {name: dict(row) for name, row in rows.items()}
    changed[page.FIT] |= others
    clean = {name: figures(whole=45.0, added=0.0) for name in rows}
    all_rows = {smooth_clips.CLEAN: clean, "colour": rows, "wobble": rows}
    return all_rows | {fault: changed if fault != smooth_clips.CLEAN else clean | {
        page.FIT: clean[page.FIT] | others
    }}  # fmt: skip


def test_goals_can_all_be_met_and_only_ways_that_ran_are_asked():
    goals = page.goals(found())
    assert len(goals) == 5 and all(goal.met for goal in goals)


@pytest.mark.parametrize(
    ("fault", "others", "broken"),
    [
        ("colour", {"whole": 25.0}, [0]),
        ("wobble", {"person": math.nan}, [0]),
        ("wobble", {"warping": 4.1}, [1]),
        ("wobble", {"warping": 5.5}, [0, 1]),
        ("colour", {"added": 3.7}, [2]),
        ("colour", {"detail": 94.9}, [3]),
        ("colour", {"detail": 105.1}, [3]),
        (smooth_clips.CLEAN, {"whole": 39.9}, [4]),
    ],
)
def test_a_goal_is_missed(fault, others, broken):
    goals = page.goals(found(fault, **others))
    assert [n for n, goal in enumerate(goals) if not goal.met] == broken


def test_who_is_better_is_named_with_both_figures():
    lost = page.beaten_by(found("wobble", warping=5.5), page.FIT)
    assert lost == ["wobble: warping 5.50, median 5.00"]
    # A picture without detail is steady for nothing, and clean clips and our own other way are no
    # rivals.
    blank = found("wobble", warping=5.5)
    blank["wobble"]["median"]["detail_whole"] = 49.0
    assert page.beaten_by(blank, page.FIT) == []
    rows = found()
    rows["colour"][page.QUICK] = figures(whole=50.0)
    assert page.beaten_by(rows, page.FIT) == []


def test_shares_are_percent_of_the_input():
    rows = page.with_shares(found()["colour"])
    assert rows[page.FIT]["share"] == pytest.approx(20)
    assert rows[page.FIT]["added_share"] == pytest.approx(100 / 9)
    assert math.isnan(page.with_shares(found()["clean"])[page.FIT]["added_share"])


def test_means_are_taken_over_clips_that_know_the_figure():
    one, two, three = ({"a": {"way": {"s": x}}} for x in (1.0, 3.0, math.nan))
    assert page.mean_of([one, two, three])["a"]["way"]["s"] == 2
    assert math.isnan(page.mean_of([three])["a"]["way"]["s"])


def test_tables_have_a_row_a_way():
    lines = page.ways_table(found()["colour"]).splitlines()
    assert len(lines) == 2 + 3
    assert lines[-1].startswith(
        f"| {page.FIT} | 30.00 | 30.00 | 2.00 | 20 | 1.00 | 11 | 1.0 | 99.0 |"
    )
    lines = page.one_measure_table(found(), "whole").splitlines()
    assert lines[0] == "| | clean | colour | wobble |"
    assert lines[-1] == f"| {page.FIT} | 45.00 | 30.00 | 30.00 |"


# The picture


def test_a_slice_shows_the_middle_column_over_time(clip):
    view = clip.frames[0]
    shown = run.slices(view)
    assert shown.shape == view.shape[1:]
    assert torch.equal(shown[..., 0], view[0, :, :, W // 2])
    assert torch.equal(shown[..., -1], view[-1, :, :, W // 2])


def test_a_sheet_has_a_column_a_way(clip):
    pictures = {"one": clip.frames, "two": clip.frames}
    assert run.sheet([pictures]).shape == (3, 2 * H, 2 * W)
