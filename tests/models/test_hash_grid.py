"""The hash encoding against a loop in float64 that follows the paper's words, and by hand."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from turnaround.models import hash_grid
from turnaround.models.hash_grid import PRIMES, WAYS, HashGrid, fastest_way, summed_in_integers

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {2: (2, 6, 2, 9, 4, 1.8), 3: (3, 6, 2, 9, 3, 1.6)}
"""Of both kinds of levels: in 2D 4, 7, 12, 23, 41 and 75 cells, in 3D 3, 4, 7, 12, 19 and 31; 512 entries."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_of(dims: int, dtype: torch.dtype = torch.float64) -> HashGrid:
    grid = HashGrid(*SETTINGS[dims]).to(dtype)
    table = torch.randn(grid.table.shape, dtype=dtype, generator=seeded(1))
    grid.table.data.copy_(table)
    return grid


def scattered(count: int, dims: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dims, dtype=torch.float64, generator=seeded(seed))


def entry(grid: HashGrid, level: int, vertex: tuple[int, ...]) -> int:
    """Where a vertex's features lie."""
    along, size = grid.resolution(level) + 1, grid.table.shape[1]
    if along**grid.dims <= size:
        return sum(v * along**axis for axis, v in enumerate(vertex))
    hashed = 0
    for v, prime in zip(vertex, PRIMES, strict=False):
        hashed ^= v * prime
    return hashed % size


def by_loop(grid: HashGrid, points: Tensor) -> Tensor:
    """Every point, level and corner by itself."""
    rows = []
    for point in points.clamp(0, 1):
        row = []
        for level in range(grid.levels):
            n = grid.resolution(level)
            low = [min(math.floor(float(x.detach()) * n), n - 1) for x in point]
            total = torch.zeros(grid.features, dtype=points.dtype)
            for corner in itertools.product((0, 1), repeat=grid.dims):
                weight = 1.0
                for axis, upper in enumerate(corner):
                    toward = point[axis] * n - low[axis]
                    weight = weight * (toward if upper else 1 - toward)
                vertex = tuple(i + c for i, c in zip(low, corner, strict=True))
                total = total + weight * grid.table[level, entry(grid, level, vertex)]
            row.append(total)
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_what_a_loop_finds(dims):
    grid = grid_of(dims)
    kinds = {(grid.resolution(level) + 1) ** dims <= 512 for level in range(grid.levels)}
    assert kinds == {True, False}
    points = scattered(40, dims)
    torch.testing.assert_close(grid(points), by_loop(grid, points), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_its_gradients_are_those_of_the_loop(dims):
    grid, points = grid_of(dims), scattered(10, dims).requires_grad_()
    pull = torch.randn(10, grid.levels * grid.features, dtype=torch.float64, generator=seeded(2))
    found = torch.autograd.grad((grid(points) * pull).sum(), (grid.table, points))
    expected = torch.autograd.grad((by_loop(grid, points) * pull).sum(), (grid.table, points))
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_are_the_slopes(dims):
    grid = HashGrid(dims, 3, 2, 4, 2, 1.7).double()
    grid.table.data.normal_(generator=seeded(3))
    points = scattered(6, dims, seed=4).requires_grad_()

    def features(table: Tensor, points: Tensor) -> Tensor:
        return torch.func.functional_call(grid, {"table": table}, (points,))

    torch.autograd.gradcheck(features, (grid.table, points))


def test_the_coarsest_features_come_first():
    grid = grid_of(2)
    with torch.no_grad():
        grid.table.copy_(torch.arange(12.0).view(6, 1, 2).expand_as(grid.table))
    # Weights of a cell's corners sum to one.
    torch.testing.assert_close(grid(scattered(5, 2)), torch.arange(12.0).double().expand(5, 12))


@pytest.mark.parametrize("dims", [2, 3])
def test_corners_of_the_square_and_the_cube_are_vertices(dims):
    grid = grid_of(dims)
    for corner in itertools.product((0, 1), repeat=dims):
        found = grid(torch.tensor([corner], dtype=torch.float64))[0].view(grid.levels, -1)
        for level in range(grid.levels):
            vertex = tuple(c * grid.resolution(level) for c in corner)
            expected = grid.table[level, entry(grid, level, vertex)]
            torch.testing.assert_close(found[level], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_points_outside_count_as_at_the_border(dims):
    grid = grid_of(dims)
    points = (scattered(50, dims) * 3 - 1).requires_grad_()
    found = grid(points)
    torch.testing.assert_close(found, grid(points.clamp(0, 1)), atol=0, rtol=0)
    (slope,) = torch.autograd.grad(found.square().sum(), points)
    outside = (points < 0) | (points > 1)
    assert outside.any() and (slope[outside] == 0).all() and (slope[~outside] != 0).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_features_do_not_jump_between_cells(dims):
    grid, step = grid_of(dims), 1e-9
    for level in range(grid.levels):
        n = grid.resolution(level)
        for axis in range(dims):
            here = scattered(n - 1, dims, seed=level)
            here[:, axis] = torch.arange(1, n) / n
            move = torch.zeros(dims, dtype=torch.float64)
            move[axis] = step
            # Features are normal, so slopes stay below 20 a cell.
            jump = (grid(here + move) - grid(here - move)).detach()[:, 2 * level : 2 * level + 2]
            assert jump.abs().max() < 2 * step * n * 20


@pytest.mark.parametrize("dims", [2, 3])
def test_any_chunk_gives_the_same(dims):
    grid, points = grid_of(dims, torch.float32), scattered(1000, dims).float()
    whole = grid(points)
    for size in (1, 7, 256):
        parts = torch.cat([grid(part) for part in points[:100].split(size)])
        torch.testing.assert_close(parts, whole[:100], atol=0, rtol=0)


def test_no_points_no_features():
    for dims in (2, 3):
        points = torch.zeros(0, dims, requires_grad=True)
        found = grid_of(dims, torch.float32)(points)
        assert found.shape == (0, 12)
        found.sum().backward()
        assert points.grad.shape == (0, dims)


def test_what_is_no_number_stays_with_its_point():
    grid = grid_of(3, torch.float32)
    points = torch.rand(4, 3, generator=seeded(5))
    points[2, 1] = math.nan
    assert grid(points).isnan().all(1).tolist() == [False, False, True, False]


def test_features_begin_small_and_the_same_from_the_same_seed():
    first, again, other = (HashGrid(2, 3, 2, 10, 16, 1.4, seeded(s)).table for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.9e-4 < first.abs().max() <= 1e-4 and first.mean().abs() < 5e-6


def lattices_of(grid: HashGrid) -> hash_grid.Lattices:
    return hash_grid.Lattices(grid.cells, grid.factors, grid.direct)


def all_of(way: str, grid: HashGrid, points: Tensor, pull: Tensor) -> list[Tensor]:
    """Features, gradient in the points, gradient in the table."""
    given = points, grid.table, lattices_of(grid)
    found = WAYS[way].encode(*given)
    slopes = WAYS[way].slope_of_points, WAYS[way].slope_of_table
    return [t.detach() for t in (found, *(slope(*given, pull) for slope in slopes))]


@pytest.mark.parametrize(
    ("dims", "features", "dtype", "close"),
    [(2, 2, torch.float32, 2e-5), (3, 2, torch.float32, 2e-5), (3, 1, torch.float64, 1e-12)],
)
def test_numba_finds_what_torch_finds(dims, features, dtype, close):
    pytest.importorskip("numba")
    settings = list(SETTINGS[dims])
    settings[2] = features
    grid = HashGrid(*settings).to(dtype)
    grid.table.data.normal_(generator=seeded(7))
    # Beyond the border, on it, and no numbers; more than a block and less than two.
    points = torch.rand(700, dims, generator=seeded(6)).to(dtype) * 1.2 - 0.1
    points[:3] = torch.tensor([0.0, 1.0, math.nan])[:, None]
    pull = torch.randn(700, grid.levels * features, dtype=dtype, generator=seeded(8))
    mine, right = (all_of(way, grid, points, pull) for way in ("numba", "torch"))
    torch.testing.assert_close(mine[0], right[0], atol=0, rtol=0, equal_nan=True)
    # Sums in another order.
    for a, b in zip(mine[1:], right[1:], strict=True):
        around = close * float(b.abs().nanmean())
        torch.testing.assert_close(a, b, atol=around, rtol=close, equal_nan=True)


@pytest.mark.parametrize("way", ["torch", "numba"])
@pytest.mark.parametrize("dims", [2, 3])
def test_threads_change_nothing(way, dims, monkeypatch):
    if way == "numba":
        pytest.importorskip("numba")
        from turnaround.models import hash_grid_numba

        monkeypatch.setattr(hash_grid_numba, "SHARE", 600)
    grid = grid_of(dims, torch.float32)
    points = torch.rand(3000, dims, generator=seeded(10))
    pull = torch.randn(3000, grid.levels * grid.features, generator=seeded(11))
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(all_of(way, grid, points, pull))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_numba_is_taken_for_many_points_where_it_works(monkeypatch):
    pytest.importorskip("numba")
    cpu, many = torch.device("cpu"), hash_grid.COMPILING
    assert fastest_way(cpu, many) == "numba"
    assert fastest_way(cpu, many - 1) == fastest_way(torch.device("cuda"), many) == "torch"
    monkeypatch.setitem(WAYS, "numba", hash_grid.Way(None, None, None))
    hash_grid._numba_works.cache_clear()
    assert fastest_way(cpu, many) == "torch"
    hash_grid._numba_works.cache_clear()


def test_sums_in_integers_do_not_depend_on_the_order():
    places = torch.randint(50, (10_000,), generator=seeded(12))
    values = torch.randn(10_000, generator=seeded(13)) * 1e-6
    found = summed_in_integers(50, places, values)
    order = torch.randperm(10_000, generator=seeded(14))
    assert torch.equal(found, summed_in_integers(50, places[order], values[order]))
    right = torch.zeros(50, dtype=torch.float64).index_add_(0, places, values.double())
    torch.testing.assert_close(found, right.float(), atol=1e-14, rtol=1e-6)
    assert not summed_in_integers(50, places, values * 0).any()


@pytest.mark.parametrize("dims", [2, 3])
def test_points_at_once_change_rounding_alone(dims, monkeypatch):
    grid, points = grid_of(dims), scattered(30, dims)
    pull = torch.randn(30, 12, dtype=torch.float64, generator=seeded(15))
    right = all_of("torch", grid, points, pull)
    monkeypatch.setattr(hash_grid, "AT_ONCE", 7)
    for mine, expected in zip(all_of("torch", grid, points, pull), right, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-12)


def test_nothing_stays_behind_on_another_device():
    """Without memory or values, but tensors of two devices would not go together."""
    for dims in (2, 3):
        grid = HashGrid(*SETTINGS[dims]).to("meta")
        points = torch.zeros(9, dims, device="meta", requires_grad=True)
        found = grid(points)
        assert found.shape == (9, 12) and found.device.type == "meta"
        found.sum().backward()
        assert grid.table.grad.shape == grid.table.shape and points.grad.shape == (9, dims)


@pytest.mark.parametrize("way", ["torch", "numba"])
def test_it_can_be_read_in_inference_mode(way, monkeypatch):
    if way == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(hash_grid, "fastest_way", lambda *_: way)
    grid, points = grid_of(2, torch.float32), torch.rand(20, 2, generator=seeded(16))
    with torch.inference_mode():
        found = grid(points)
    assert torch.equal(found, grid(points).detach())


def test_published_sizes():
    canonical, deformation = HashGrid(2, 16, 2, 5, 16, 1.44), HashGrid(3, 16, 2, 5, 16, 1.38)
    assert [canonical.resolution(level) for level in (0, 1, 15)] == [16, 23, 3798]
    assert [deformation.resolution(level) for level in (0, 1, 15)] == [16, 22, 2005]


def test_other_points_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="2 or 3 axes, not 4"):
        HashGrid(4, 2, 2, 4, 2, 1.5)
    with pytest.raises(ValueError, match=r"points \[N, 3\], not \[5, 2\]"):
        grid_of(3)(scattered(5, 2))
