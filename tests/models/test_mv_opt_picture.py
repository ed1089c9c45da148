"""The picture of a falling objective: what is drawn where."""

import numpy as np
import pytest
from turnaround.models.mv_opt_objective import History
from turnaround.models.mv_opt_picture import COLOURS, CURVE, HEIGHT, WIDTH, history_picture


def told(total: list[float], *terms: dict[str, float]) -> History:
    return History(total, [(0, 0, n) for n in range(len(total) - 1)], list(terms))


def where(picture, colour) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of one colour."""
    return (np.asarray(picture) == colour).all(-1).nonzero()


def test_the_curve_goes_down_from_left_to_right():
    before, after = {"a": 90.0, "b": 10.0}, {"a": 5.0, "b": 5.0}
    picture = history_picture(told([100.0, 50.0, 20.0, 10.0], before, after))
    assert picture.size == (WIDTH, HEIGHT)
    rows, columns = where(picture, CURVE)
    heights = [rows[columns == c].mean() for c in np.unique(columns)]
    # Of a falling line; its two pixels of width may round to the same row.
    assert (np.diff(heights) > -0.6).all() and heights[-1] > heights[0] + HEIGHT / 2


def test_equal_ratios_are_equal_steps():
    """The axis is logarithmic: 100, 10, 1 is a straight line."""
    terms = {"a": 1.0}
    rows, columns = where(history_picture(told([100.0, 10.0, 1.0], terms, terms)), CURVE)
    line = np.polyfit(columns, rows, 1)
    assert np.abs(np.polyval(line, columns) - rows).max() < 2.5


def test_bars_are_as_high_as_their_terms():
    before, after = {"a": 60.0, "b": 40.0}, {"a": 20.0, "b": 0.0}
    picture = history_picture(told([100.0, 20.0], before, after))
    legend = 13 * 13  # pixels of a square beside its name
    areas = [len(where(picture, c)[0]) - legend for c in COLOURS[:2]]
    # 60 before and 20 after against 40 before alone; edges are a pixel.
    assert areas[0] / areas[1] == pytest.approx(2.0, rel=0.05)
    assert not len(where(picture, COLOURS[2])[0])


def test_histories_of_nothing_and_of_one_value_have_a_picture():
    empty = np.asarray(history_picture(History()))
    assert empty.shape == (HEIGHT, WIDTH, 3) and len(np.unique(empty)) > 2
    for total in ([5.0], [0.0, 0.0]):
        history_picture(told(total, {"a": total[0]}, {"a": total[0]}))
