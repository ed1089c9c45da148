"""View windows: every view and moment is covered, groups move as said, joins are seamless."""

import math

import pytest
import torch
from turnaround.models.cameras import orbit_angles
from turnaround.models.view_windows import (
    Memory,
    Plan,
    Span,
    Tile,
    add,
    around,
    pieces,
    shift_at,
    spans,
    step_of,
    take,
)
from turnaround.models.views import nearest_frames

STEPS = 20


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cases():
    """Every axis of up to 9 with every size and overlap, open and closed, at every shift."""
    for length in range(1, 10):
        for size in range(1, 11):
            for overlap in range(size):
                for closed in (False, True):
                    for shift in range(4):
                        yield length, size, overlap, closed, shift


# --- spans ----------------------------------------------------------------------------------------


def test_every_item_is_covered_and_weights_add_up_to_one():
    for case in cases():
        length, size, *_ = case
        total = torch.zeros(length, dtype=torch.float64)
        for span in spans(*case):
            assert len(span.items) == min(size, length) == len(set(span.items)), case
            assert (span.weights > 0).all(), case
            total[span.items] += span.weights.double()
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0, msg=str(case))


def test_neighbouring_spans_share_at_least_the_overlap():
    for case in cases():
        length, size, overlap, closed, _ = case
        parts = spans(*case)
        if len(parts) == 1:
            continue
        pairs = list(zip(parts, parts[1:], strict=False)) + closed * [(parts[-1], parts[0])]
        for a, b in pairs:
            assert len({*a.items} & {*b.items}) >= overlap, case


def test_spans_hold_neighbours():
    for case in cases():
        length, _, _, closed, _ = case
        for span in spans(*case):
            for a, b in zip(span.items, span.items[1:], strict=False):
                assert b == (a + 1) % length if closed else b == a + 1, case


def test_open_axis_begins_at_its_start_and_ends_at_its_end():
    for length, size, overlap, closed, shift in cases():
        if not closed:
            parts = spans(length, size, overlap, closed, shift)
            assert parts[0].items[0] == 0 and parts[-1].items[-1] == length - 1


def test_no_more_spans_than_needed():
    """A span brings size - overlap new items; a ring has nothing to begin with."""
    for length, size, overlap, closed, shift in cases():
        if size >= length:
            needed = 1
        elif closed:
            needed = math.ceil(length / (size - overlap))
        else:
            needed = math.ceil((length - size) / (size - overlap)) + 1
        count = len(spans(length, size, overlap, closed, shift))
        # Shifted on an open axis, one more covers what the others left.
        assert needed <= count <= needed + (shift > 0 and not closed and size < length)


def test_windows_are_spread_evenly():
    starts = [w.items[0] for w in spans(21, 9, 4)]
    assert starts == [0, 4, 8, 12]
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_join_is_a_linear_ramp_over_the_overlap():
    first, second = spans(8, 5, 2)
    assert first.items == [0, 1, 2, 3, 4] and second.items == [3, 4, 5, 6, 7]
    torch.testing.assert_close(first.weights, torch.tensor([1, 1, 1, 2 / 3, 1 / 3]))
    torch.testing.assert_close(second.weights, torch.tensor([1 / 3, 2 / 3, 1, 1, 1]))


def test_join_on_a_ring_has_ramps_on_both_sides():
    parts = spans(6, 4, 1, closed=True)  # the two share two items at either end
    assert [p.items for p in parts] == [[0, 1, 2, 3], [3, 4, 5, 0]]
    torch.testing.assert_close(parts[0].weights, torch.tensor([0.5, 1, 1, 0.5]))


def test_pieces_share_nothing():
    assert [p.items for p in pieces(5, 2)] == [[0, 1], [2, 3], [4]]


# --- who is with whom at which step ---------------------------------------------------------------


def test_groups_move_on_by_one_view_and_stand_still_in_the_last_fifth():
    plan = Plan(views_per_group=4, order=tuple(range(8)))
    for step in range(STEPS):
        groups = [g.items for g in plan.groups(8, step, STEPS)]
        first = step % 8 if step < 16 else 0
        assert groups[0] == [(first + j) % 8 for j in range(4)]
        assert groups[1] == [(first + 4 + j) % 8 for j in range(4)]


@pytest.mark.parametrize(("steps", "fixed"), [(1, 1), (4, 1), (6, 2), (12, 3), (20, 4), (50, 10)])
def test_at_least_the_last_fifth_is_fixed(steps, fixed):
    assert [shift_at(s, steps) for s in range(steps)] == [*range(steps - fixed), *(fixed * [0])]


@pytest.mark.parametrize("closed", [True, False])
def test_every_pair_of_neighbours_meets_while_noise_is_high(closed):
    plan = Plan(views_per_group=3, order=tuple(range(9)), closed=closed)
    met = set()
    for step in range(STEPS * 4 // 5):
        for group in plan.groups(9, step, STEPS):
            met |= {(a, b) for a in group.items for b in group.items}
    assert met >= {(a, (a + 1) % 9) for a in range(9 if closed else 8)}
    assert ((8, 0) in met) is closed


def test_groups_follow_the_order_of_the_cameras():
    plan = Plan(views_per_group=2, order=(3, 0, 2, 1))
    assert [g.items for g in plan.groups(4, 0, STEPS)] == [[3, 0], [2, 1]]
    assert [g.items for g in plan.groups(4, 1, STEPS)] == [[0, 2], [1, 3]]


SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.0]


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (0.8, 1), (0.80001, 1), (0.2, 3), (0.65, 1), (0.1, 3), (0.0, 3), (1.3, 0)],
)
def test_step_of_a_noise_level_on_or_between_the_steps(sigma, step):
    assert step_of(sigma, SIGMAS) == (step, 4)


def test_call_outside_any_schedule_is_one_step():
    assert step_of(0.7, []) == (0, 1)


# --- order of the cameras -------------------------------------------------------------------------


def test_ring_is_closed_and_in_order_of_azimuth():
    azimuths, elevations = orbit_angles(8, 0.0, 2 * math.pi, 0.0)
    mixed = torch.tensor([5, 0, 3, 7, 1, 2, 6, 4])
    order, closed = around(azimuths[mixed], elevations)
    assert closed and mixed[list(order)].tolist() == list(range(8))


@pytest.mark.parametrize("span", [math.pi / 2, math.pi, 1.4 * math.pi])
def test_arc_is_open_and_begins_at_its_end(span):
    azimuths, elevations = orbit_angles(6, -span / 2, span, 0.0)
    order, closed = around(azimuths, elevations)
    assert not closed and order == (0, 1, 2, 3, 4, 5)


def test_ring_without_one_camera_is_still_a_ring():
    azimuths, elevations = orbit_angles(8, 0.0, 2 * math.pi, 0.0)
    assert around(azimuths[1:], elevations[1:]) == ((0, 1, 2, 3, 4, 5, 6), True)


def test_stacked_cameras_are_neighbours():
    azimuths, elevations = orbit_angles(8, 0.0, 2 * math.pi, 0.0, 2, 0.5)
    order, closed = around(azimuths, elevations)
    assert closed and order == (0, 4, 1, 5, 2, 6, 3, 7)


def test_cameras_of_one_azimuth_are_an_open_column():
    assert around(torch.zeros(3), torch.tensor([0.5, 0.0, 1.0])) == ((1, 0, 2), False)


def test_rounding_does_not_part_equal_azimuths():
    azimuths = torch.tensor([-1e-6, 1e-6, 2.0, 2.0 + 1e-6, 4.0, 4.0])
    order, closed = around(azimuths, torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.5]))
    assert closed and order == (0, 1, 2, 3, 4, 5)


# --- tiles ----------------------------------------------------------------------------------------


def tiles_of(plan: Plan, views: int, frames: int, step: int) -> list[Tile]:
    return [Tile(g, w) for g in plan.groups(views, step, STEPS) for w in plan.windows(frames)]


PLANS = [
    Plan(3, 1, 3, 1),
    Plan(4, 2, 0, 0, (4, 2, 0, 1, 3), False),
    Plan(0, 0, 2, 1),
    Plan(2, 0, 5, 3, (1, 0, 4, 3, 2)),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_taking_tiles_apart_and_joining_them_changes_nothing(plan, chunks):
    whole = draw(chunks * 5, 2, 7, 3, 4)
    for step in (0, 3, STEPS - 1):
        total = torch.zeros_like(whole)
        for tile in tiles_of(plan, 5, 7, step):
            add(total, take(whole, tile, chunks, 2), tile, chunks)
        torch.testing.assert_close(total, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_join_is_the_plain_formula(plan):
    """Sum of w_group w_window result, one view and frame at a time, in float64."""
    total, chunks = torch.zeros(10, 2, 7, 3, 4), 2
    expected = total.double()
    for n, tile in enumerate(tiles_of(plan, 5, 7, 1)):
        v, t = len(tile.views.items), len(tile.frames.items)
        result = draw(chunks * v, 2, t, 3, 4, seed=n)
        add(total, result, tile, chunks)
        for c in range(chunks):
            for i, view in enumerate(tile.views.items):
                for j, frame in enumerate(tile.frames.items):
                    weight = tile.views.weights[i].double() * tile.frames.weights[j].double()
                    expected[c * 5 + view, :, frame] += weight * result[c * v + i, :, j].double()
    torch.testing.assert_close(total.double(), expected, atol=1e-6, rtol=1e-6)


def test_taking_by_view_leaves_other_axes_alone():
    tile = Tile(Span([2, 0], torch.ones(2)), Span([1], torch.ones(1)))
    text = draw(6, 4, 8)
    assert torch.equal(take(text, tile, 2), text[[2, 0, 5, 3]])
    assert torch.equal(take(text, tile, 2, 1), text[[2, 0, 5, 3], 1:2])


@pytest.mark.parametrize(
    ("asked", "becomes"), [(1, 1), (5, 5), (32, 33), (34, 33), (81, 81), (2, 1)]
)
def test_windows_fill_latent_frames(asked, becomes):
    assert nearest_frames(asked) == becomes


# --- memory ---------------------------------------------------------------------------------------


def test_needs_grow_with_items_and_views_at_once():
    for together in (True, False):
        needs = [
            [Memory(15.0, 1.0, n, together).needed(k) for k in range(1, 20)] for n in range(1, 20)
        ]
        for row in needs:
            assert row == sorted(row)
        for column in zip(*needs, strict=True):
            assert list(column) == sorted(column)


def test_views_that_see_each_other_are_held_while_some_are_worked_on():
    alone, together = (Memory(15.0, 1.0, 8, t) for t in (False, True))
    assert alone.needed(1) == 15 and together.needed(1) > 5 * 15
    assert alone.needed(8) == together.needed(8) == 8 * 15


def test_as_many_as_fit_in_parts_of_one_size():
    memory = Memory(15.0, 0.0, 8, False)
    assert [memory.fitting(15 * n) for n in range(1, 10)] == [1, 2, 3, 4, 4, 4, 4, 8, 8]
    assert memory.fitting(0) == 1
