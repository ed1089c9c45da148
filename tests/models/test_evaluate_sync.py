"""The page about view sync: its groups and its measures, where the right number is known."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate_sync as sync  # noqa: E402  (a script beside the tests' folders)

H, W = 24, 20


@pytest.fixture
def truth():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 3, H, W, generator=generator)


def body(margin: int = 4):
    masks = torch.zeros(2, 3, H, W)
    masks[..., margin:-margin, margin:-margin] = 1
    return masks


@pytest.mark.parametrize("together", [1, 2, 4, 8])
def test_every_view_is_in_one_group(together):
    groups = sync.groups(8, together)
    assert all(len(group) == together for group in groups)
    assert sorted(v for group in groups for v in group) == list(range(8))


def test_all_views_are_one_group_when_no_number_is_given():
    assert sync.groups(8, 0) == [list(range(8))]


def test_views_of_a_group_stand_evenly_around():
    assert sync.groups(8, 2) == [[0, 4], [1, 5], [2, 6], [3, 7]]  # opposite each other
    assert sync.groups(8, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_truth_has_all_its_detail(truth):
    assert sync.detail(truth, truth, body()) == pytest.approx(100)


def test_half_the_contrast_is_a_quarter_of_the_detail(truth):
    assert sync.detail(0.5 + 0.5 * (truth - 0.5), truth, body()) == pytest.approx(25)


def test_a_plain_colour_and_a_shift_of_colour_change_no_detail(truth):
    assert sync.detail(torch.full_like(truth, 0.3), truth, body()) == 0
    assert sync.detail(truth + 0.2, truth, body()) == pytest.approx(100, rel=1e-4)


def test_blur_lowers_detail(truth):
    blurred = F.avg_pool2d(truth.flatten(0, 1), 3, 1, 1).view_as(truth)
    assert sync.detail(blurred, truth, body()) < 40


def test_outline_and_background_are_no_detail(truth):
    masks = body()
    inside = F.max_pool2d(1 - masks, 2 * sync.INNER + 1, 1, sync.INNER)[:, :, None] == 0
    # Differences reach one pixel up and left of where they count.
    near = F.max_pool2d(inside.flatten(0, 1).float(), 3, 1, 1).view(2, 3, 1, H, W) > 0
    elsewhere = torch.where(near, truth, 1 - truth)
    assert sync.detail(elsewhere, truth, masks) == pytest.approx(100)


def clip(**cross: float) -> dict:
    rest = dict.fromkeys(sync.COLUMNS, 1.0)
    return {name: {**rest, "cross": value} for name, value in cross.items()}


def test_change_is_taken_clip_by_clip():
    rows = (sync.Row("off"), sync.Row("on"))
    # 10 % and 30 % lower: 20 ± 14.1; of the means, 30 and 23, it would be 23.3.
    lines = sync.table(rows, [clip(off=20.0, on=18.0), clip(off=40.0, on=28.0)]).splitlines()
    assert lines[2].endswith("| 30.00 |  |")
    assert lines[3].endswith("| 23.00 | -20.0 ± 14.1 |")


def test_one_clip_has_no_spread():
    rows = (sync.Row("off"), sync.Row("on"))
    assert sync.table(rows, [clip(off=20.0, on=21.0)]).endswith("| 21.00 | +5.0 |")
