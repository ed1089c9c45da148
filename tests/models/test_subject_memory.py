"""What a step needs: what was measured, and what makes it more."""

from dataclasses import replace

import pytest
from turnaround.models.subject import Shape
from turnaround.models.subject_memory import A_PLACE, MARGIN, Backbone, step_bytes

TINY = Backbone(256, 1024, 8, 4)
WORDS_ALONE = Shape(256, (), 64, 0.3)


def of(backbone=TINY, shape=WORDS_ALONE, anew=False, **changes) -> int:
    given = dict(learned=0, pictures=8, targets=2, references=5, tokens=180) | changes
    return step_bytes(backbone, shape, anew=anew, **given)


def test_turnaround_tinys_blocks_need_what_was_measured():
    """43.3 MB of 8 blocks, 86.4 with twice the targets; 3.5 when they are computed anew."""
    one = 43.3e6 / 8
    assert of() == pytest.approx(MARGIN * (43.3e6 + one), rel=0.02)
    assert of(targets=4) == pytest.approx(2 * of(), rel=0.01)
    assert of(anew=True) == pytest.approx(MARGIN * (3.5e6 + one), rel=0.02)


def test_fields_and_features_come_on_top():
    shape = replace(WORDS_ALONE, blocks=(1, 3, 5, 7))
    places = 5 * (24 + 4 * 12) * 2 * 180
    features = 4 * (8 + 4) * 180 * 256 * 4
    assert of(shape=shape) - of() == pytest.approx(MARGIN * (places * A_PLACE + features), rel=1e-3)
    assert of(learned=1000) - of() == 16_000


def test_half_precision_and_smaller_pictures_need_less():
    assert of(replace(TINY, item=2)) == pytest.approx(of() / 2, rel=0.01)
    assert of(tokens=90) == pytest.approx(of() / 2, rel=0.01)
