"""MV-Opt: the objective against itself, its steps against dense algebra, and small performers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from turnaround.models import mv_opt, mv_opt_links, mv_opt_objective, mv_opt_steps, performer
from turnaround.models.cameras import Rig, orbit_rig, project
from turnaround.models.mv_opt import Refined, paper_order, refine
from turnaround.models.mv_opt_links import Bend, across_views, over_time
from turnaround.models.mv_opt_objective import (
    GAIN,
    GAIN_STEP,
    MARGIN,
    OFFSET,
    OFFSET_STEP,
    SHIFT,
    Fields,
    History,
    Problem,
    Settings,
    Window,
    window_around,
)  # fmt: skip
from turnaround.models.mv_opt_steps import (
    SUFFICIENT,
    colour_target,
    descend,
    minimise,
    shift_target,
)
from turnaround.models.pose import Pose
from turnaround.models.views import Views

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, FRAMES, W, H = 3, 5, 64, 80
USUAL, QUICK = Settings(), Settings(iterations=2, sweeps=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the objective --------------------------------------------------------------------------------

SIDE = 40


def side_by_side(views: int) -> Rig:
    """Cameras that look along +z, each 4 pixels beside the last."""
    K = torch.tensor([[80.0, 0, SIDE / 2], [0, 80.0, SIDE / 2], [0, 0, 1]]).repeat(views, 1, 1)
    T = torch.eye(4).repeat(views, 1, 1)
    T[:, 0, 3], T[:, 2, 3] = -0.1 * torch.arange(views), 2.0
    return Rig(K, T, SIDE, SIDE)


def whole_problem(settings: Settings = USUAL, seed: int = 0, **changes) -> Problem:
    """Three views of four frames of a plane, where every term has something to say."""
    V, count = 3, 4
    rough = torch.rand(V, count, 3, SIDE // 4, SIDE // 4,
                       generator=torch.Generator().manual_seed(seed))  # fmt: skip
    pictures = torch.nn.functional.interpolate(
        rough.flatten(0, 1), (SIDE, SIDE), mode="bicubic"
    ).unflatten(0, (V, count))
    links = across_views(torch.full((V, count, SIDE, SIDE), 2.0), side_by_side(V))
    masks = torch.ones(count, SIDE, SIDE, dtype=torch.bool)
    for v in range(V):
        steps = draw(count - 1, 2, 1, 1, seed=seed + v).expand(-1, -1, SIDE, SIDE)
        links += over_time(steps, -steps, masks, v)
    places = SIDE * torch.rand(3, 30, 2, generator=torch.Generator().manual_seed(seed + 9))
    curves = [
        Bend(v, f, tuple(places), draw(30, 2, seed=seed + 10 * v + f))
        for v in range(V) for f in range(1, count - 1)
    ]  # fmt: skip
    given = dict(
        pictures=pictures, links=links, curves=curves, drift=draw(V, count, 2, seed=seed + 20),
        solid=torch.ones(V, count, SIDE, SIDE, dtype=torch.bool),
        trust=torch.tensor([1.4, 1.0, 0.6]), casts=torch.tensor([0.03, 0.1, 0.02]),
        settings=settings,
    )  # fmt: skip
    return Problem(**{**given, **changes})


def put(problem: Problem, block, fields: Fields) -> None:
    problem.fields[block] = fields
    if block in problem.looks:
        problem.keep(block, problem.read(block, problem.shown(block, fields)))


def random_fields(problem: Problem, seed: int) -> Fields:
    old = problem.fields[0, 0]
    return Fields(
        0.005 * draw(*old.colour.shape, seed=seed), 0.7 * draw(*old.shift.shape, seed=seed + 1)
    )


def shaken(problem: Problem) -> Problem:
    for n, block in enumerate(problem.fields):
        put(problem, block, random_fields(problem, 10 * n))
    return problem


def local(problem: Problem, block, fields: Fields) -> Tensor:
    values = problem.read(block, problem.shown(block, fields))
    return problem.local(block, fields, values, problem.others(block))


def test_every_term_is_on():
    terms = shaken(whole_problem()).total()
    assert set(terms) == {"surface", "temporal", "pose", "fidelity"}
    assert min(terms.values()) > 1 and max(terms.values()) < 1e6


@pytest.mark.parametrize("seed", [0, 1])
def test_what_one_block_changes_is_what_the_whole_changes(seed):
    problem, changes = shaken(whole_problem(seed=seed)), []
    for n, block in enumerate(problem.fields):
        old, new = problem.fields[block], random_fields(problem, 1000 + n)
        own = float(local(problem, block, new) - local(problem, block, old))
        before = sum(problem.total().values())
        put(problem, block, new)
        after = sum(problem.total().values())
        assert own == pytest.approx(after - before, abs=1e-5 * before)
        changes.append(abs(own) / before)
    assert sorted(changes)[len(changes) // 2] > 1e-2


def test_each_strength_scales_its_term():
    usual = shaken(whole_problem()).total()
    for name in ("surface", "temporal", "pose"):
        off = shaken(whole_problem(replace(Settings(), **{name: 0.0}))).total()
        assert off[name] == 0
        others = {k: v for k, v in usual.items() if k != name}
        assert {k: off[k] for k in others} == pytest.approx(others)
    double = shaken(whole_problem(Settings(pose=2.0, fidelity=2.0))).total()
    assert double["pose"] == pytest.approx(2 * usual["pose"])
    assert usual["fidelity"] < double["fidelity"] < 2 * usual["fidelity"]


def test_all_terms_but_links_are_0_for_pictures_that_stay_where_nothing_pulls():
    still = whole_problem(links=[], curves=[], drift=torch.zeros(3, 4, 2))
    assert set(still.total().values()) == {0.0}


# --- steps ----------------------------------------------------------------------------------------


def gradient(problem: Problem, block, fields: Fields) -> Fields:
    with torch.enable_grad():
        leaves = Fields(
            fields.colour.clone().requires_grad_(), fields.shift.clone().requires_grad_()
        )
        slopes = torch.autograd.grad(local(problem, block, leaves), (leaves.colour, leaves.shift))
    return Fields(*slopes)


def targets(problem: Problem, block) -> Fields:
    y = problem.shown(block, problem.fields[block])
    values, others = problem.read(block, y), problem.others(block)
    return Fields(
        colour_target(problem, block, values, others),
        shift_target(problem, block, values, others),
    )


def test_steps_go_down_the_slope_of_the_objective():
    problem = shaken(whole_problem())
    for block in problem.fields:
        old, slope, new = problem.fields[block], gradient(problem, block, problem.fields[block]), (
            targets(problem, block)
        )  # fmt: skip
        assert float((slope.colour * (new.colour - old.colour)).sum()) < 0
        assert float((slope.shift * (new.shift - old.shift)).sum()) < 0


@pytest.fixture
def squares(monkeypatch):
    """Differences without tails, so that the objective is a quadratic of colours."""
    for module in (mv_opt_objective, mv_opt_steps):
        monkeypatch.setattr(module, "huber", lambda x: (x * x, torch.ones_like(x)))


@pytest.mark.usefixtures("squares")
@pytest.mark.parametrize("block", [(0, 1), (1, 2), (2, 0)])
def test_one_step_on_colours_reaches_the_least_squares(block):
    """Of cells' mean colours and of fidelity, row by row, in float64."""
    problem = shaken(whole_problem())
    old, looks = problem.fields[block], problem.looks[block]
    shifted = problem.picture(block, Fields(0 * old.colour, old.shift))
    raw = mv_opt_links.read_at(shifted, looks.places).double()
    others = problem.others(block)[:, :3].double()
    rows, columns = problem.colour_grid
    n = rows * columns
    number = torch.arange(n).view(rows, columns)
    steps = torch.zeros(0, n)
    for a, b in ((number[1:], number[:-1]), (number[:, 1:], number[:, :-1])):
        one = torch.zeros(a.numel(), n)
        one[range(a.numel()), a.flatten()], one[range(a.numel()), b.flatten()] = 1, -1
        steps = torch.cat([steps, one])
    trust = math.sqrt(float(problem.trust[block[0]]))
    prior = torch.block_diag(*[
        torch.cat([trust / math.sqrt(n) / whole * torch.eye(n), steps / step])
        for whole, step in ((GAIN, GAIN_STEP), (OFFSET, OFFSET_STEP))
    ]).double() / float(problem.casts[block[0]])  # fmt: skip
    reads = looks.colour_basis.double()
    means = torch.nn.functional.one_hot(looks.cells).T.double()
    means = looks.cell_weight.double().sqrt()[:, None] * means / means.sum(1, keepdim=True)
    target = targets(problem, block).colour
    for c in range(3):
        A = torch.cat([means @ torch.cat([raw[:, c : c + 1] * reads, reads], 1), prior])
        b = torch.cat([means @ (others[:, c] - raw[:, c]), torch.zeros(len(prior))])
        if block[0] == 0:  # the front view's mean over the clip stays
            rest = (problem.colour_sum() - old.colour)[c].flatten().double()
            count = problem.pictures.shape[1]
            anchor = torch.tensor(mv_opt_objective.ANCHORS).repeat_interleave(n).double()
            anchor = 1 / (count * math.sqrt(n) * anchor)
            A = torch.cat([A, torch.diag(anchor)])
            b = torch.cat([b, -anchor * rest])
        expected = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
        torch.testing.assert_close(target[c].flatten().double(), expected, atol=2e-5, rtol=2e-3)


@pytest.mark.usefixtures("squares")
def test_one_step_on_shifts_reaches_the_minimum_of_bends_pose_and_fidelity():
    problem = shaken(whole_problem(Settings(surface=0.0, temporal=0.5, pose=2.0)))
    # Colours over time depend on the shift too; they are left out here.
    problem.looks = {b: replace(k, cell_weight=0 * k.cell_weight) for b, k in problem.looks.items()}
    for block in problem.fields:
        old = problem.fields[block]
        new = Fields(old.colour, targets(problem, block).shift)
        start, end = gradient(problem, block, old).shift, gradient(problem, block, new).shift
        assert start.abs().max() > 1 and end.norm() < 1e-4 * start.norm()


def pair_that_shakes(shake: Tensor) -> Problem:
    """One picture seen by two equal cameras, of which the second shakes; shake [F, 2] pixels."""
    rough = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    still = torch.nn.functional.interpolate(rough, (SIDE, SIDE), mode="bicubic")[0]
    count = len(shake)
    shaken = [mv_opt_objective.moved(still, s[:, None, None].expand(-1, SIDE, SIDE)) for s in shake]
    pictures = torch.stack([still.expand(count, -1, -1, -1), torch.stack(shaken)])
    depth = torch.full((2, count, SIDE, SIDE), 2.0)
    return Problem(
        pictures, across_views(depth, side_by_side(1).select([0, 0])), [],
        torch.zeros(2, count, 2), depth > 0, torch.ones(2), torch.zeros(2), Settings(),
    )  # fmt: skip


def test_texture_that_is_half_a_pixel_beside_is_moved_back():
    # 0 on average: what is always so is held to be the geometry's error.
    shake = torch.tensor([[0.6, -0.4], [-0.8, 0.1], [0.2, 0.3]])
    problem, history = pair_that_shakes(shake), History()
    minimise(problem, [1], history, lambda *_: None)
    assert history.total[-1] < 0.1 * history.total[0]
    for f in range(3):
        middle = problem.fields[1, f].shift[:, 1:-1, 1:-1].mean((1, 2))
        assert (middle + shake[f]).abs().max() < 0.1


def test_texture_counts_only_where_moving_pictures_takes_its_differences_away():
    shake = torch.tensor([[0.6, -0.4], [-0.8, 0.1], [0.2, 0.3]])
    problem = pair_that_shakes(shake)
    given = (problem.links, problem.trust, problem.casts, USUAL, lambda *_: None)
    assert mv_opt._texture_fits(problem.pictures, *given)
    other = problem.pictures.clone()
    other[1] = other[1].flip(-1)  # another texture altogether
    assert not mv_opt._texture_fits(other, *given)


def test_a_block_falls_by_as_much_as_it_says_and_by_enough_or_stays():
    problem = shaken(whole_problem())
    moves = 0
    for _ in range(6):
        for block in problem.fields:
            old, before = problem.fields[block], sum(problem.total().values())
            fell = descend(problem, block)
            new, after = problem.fields[block], sum(problem.total().values())
            away = ((new.colour - old.colour) / GAIN).square().mean()
            away = float(away + ((new.shift - old.shift) / SHIFT).square().mean())
            assert fell >= 0.999 * SUFFICIENT * away
            assert fell == pytest.approx(before - after, abs=1e-5 * before)
            moves += away > 0
    assert moves > 30


def test_the_objective_never_rises_and_ends_where_it_says():
    problem, history = shaken(whole_problem()), History()
    minimise(problem, [0, 2, 1], history, lambda *_: None)
    falls = [a - b for a, b in zip(history.total[:-1], history.total[1:], strict=True)]
    assert min(falls) >= 0 and history.total[-1] < 0.5 * history.total[0]
    end = problem.total()
    assert history.total[-1] == pytest.approx(sum(end.values()), rel=1e-5)
    assert history.terms[-1] == end and sum(history.terms[0].values()) == history.total[0]


@pytest.mark.parametrize("iterations, sweeps", [(1, 1), (3, 2)])
def test_blocks_come_moment_after_moment_in_rounds_over_the_views(iterations, sweeps):
    settings = Settings(iterations=iterations, sweeps=sweeps, enough=0.0)
    problem, history, order, steps = shaken(whole_problem(settings)), History(), [0, 2, 1], []
    minimise(problem, order, history, lambda sweep, f: steps.append((sweep, f)))
    assert len(history.total) == 1 + len(history.order)
    assert steps == [(sweep, f) for sweep, f, _ in history.order]
    moments = list(dict.fromkeys(steps))
    assert moments == [(s, f) for s in range(moments[-1][0] + 1) for f in range(4)]
    assert moments[-1][0] < sweeps and len(history.terms) == 2 + moments[-1][0]
    for moment in moments:
        views = [v for s, f, v in history.order if (s, f) == moment]
        rounds = len(views) // 3
        assert views == order * rounds and 1 <= rounds <= iterations


def test_a_sweep_that_gains_too_little_is_the_last():
    problem, history = (
        shaken(whole_problem(Settings(iterations=2, sweeps=9, enough=0.05))),
        History(),
    )
    minimise(problem, [0, 1, 2], history, lambda *_: None)
    sums = [sum(terms.values()) for terms in history.terms]
    gains = [1 - b / a for a, b in zip(sums[:-1], sums[1:], strict=True)]
    assert len(gains) < 9 and gains[-1] < 0.05 and min(gains[:-1]) >= 0.05


def test_the_front_comes_first_then_front_to_back():
    around = torch.tensor([0.0, 170.0, 40.0, -80.0, 100.0]).deg2rad()
    rig = orbit_rig(around, torch.zeros(5), 3.0, 0.6, W, H)
    assert paper_order(rig, 5) == [0, 2, 3, 4, 1]
    turned = orbit_rig(around + 2.0, torch.zeros(5), 3.0, 0.6, W, H)
    assert paper_order(turned, 5) == [0, 2, 3, 4, 1]
    assert paper_order(None, 4) == [0, 1, 2, 3]


# --- the window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tallest", [mv_opt_objective.TALLEST, 30])
def test_windows_cameras_see_what_the_cameras_see(monkeypatch, tallest):
    monkeypatch.setattr(mv_opt_objective, "TALLEST", tallest)
    rig = orbit_rig(torch.tensor([0.0, 1.0]), torch.zeros(2), 3.0, 0.6, W, H)
    inside = torch.zeros(2, 1, H, W, dtype=torch.bool)
    inside[0, 0, 20:60, 25:40] = True
    inside[1, 0, 30:78, 30:41] = True
    window = window_around(inside)
    assert (window.top, window.left) == (20 - MARGIN, 25 - MARGIN)
    assert (window.height, window.width) == (H - window.top, 41 + MARGIN - window.left)
    h, w = window.size
    assert h <= max(tallest, 8) and abs(h / window.height - w / window.width) < 0.03
    points = 0.3 * draw(10, 3)
    whole, _ = project(points, rig)
    scale = torch.tensor([w / window.width, h / window.height])
    expected = (whole - torch.tensor([window.left, window.top])) * scale
    torch.testing.assert_close(project(points, window.rig(rig))[0], expected, atol=1e-3, rtol=0)


# --- performers -----------------------------------------------------------------------------------


class Scene:
    """A small person walking, seen exactly."""

    def __init__(self, azimuths: list[float], frames: int) -> None:
        rig = orbit_rig(torch.tensor(azimuths), torch.full((len(azimuths),), 0.1), 3.2, 0.6, W, H)
        look = performer.draw_appearance(5)
        posed = performer.pose_performer("kira", "walk", 0.2 + torch.arange(frames) / 16, look)
        clip = performer.render_performer(posed, look, rig)
        self.rig, self.frames, self.depth = rig, clip.frames, clip.depth
        self.masks = clip.masks > 0.5

    def views(self, frames: Tensor | None = None, masks=True, rig=True) -> Views:
        frames = self.frames if frames is None else frames
        return Views(frames, self.masks if masks else None, self.rig if rig else None)

    def psnr(self, frames: Tensor, v: int | slice = slice(None)) -> float:
        """Of the performer against the truth, decibels."""
        away = (frames - self.frames)[v].square().mean(-3)[self.masks[v]]
        return -10 * math.log10(float(away.mean()) + 1e-10)


@pytest.fixture(scope="module")
def scene():
    return Scene([0.0, 0.5, 1.0], FRAMES)


@pytest.fixture(scope="module")
def short():
    return Scene([0.0, 0.5, 1.0], 3)


def run(scene: Scene, frames: Tensor | None = None, settings: Settings = USUAL, **changes):
    given = dict(views=scene.views(frames), depth=scene.depth, pose=None, weights=None)
    return refine(settings=settings, **{**given, **changes})


def check(result: Refined, views: Views) -> None:
    """Whatever came in."""
    assert result.frames.shape == views.frames.shape and result.frames.dtype == torch.float32
    assert result.frames.isfinite().all()
    assert result.frames.min() >= 0 and result.frames.max() <= 1
    total = result.history.total
    assert all(a >= b for a, b in zip(total[:-1], total[1:], strict=True))
    assert all(math.isfinite(x) for x in total)


@pytest.fixture(scope="module")
def clean(scene):
    return run(scene)


def cast_of(scene: Scene) -> Tensor:
    factors = torch.ones(VIEWS, FRAMES, 3)
    factors[1] = torch.tensor([1.18, 1.0, 0.85])
    return factors[..., None, None]


@pytest.fixture(scope="module")
def cast(scene):
    """One view has a cast, background and all: (bad, refined)."""
    bad = (scene.frames * cast_of(scene)).clamp(0, 1)
    return bad, run(scene, bad)


@pytest.fixture(scope="module")
def flicker(scene):
    """One view's brightness changes from frame to frame."""
    factors = torch.ones(VIEWS, FRAMES, 1, 1, 1)
    factors[2] = torch.tensor([1.12, 0.9, 1.1, 0.88, 1.05]).view(-1, 1, 1, 1)
    bad = (scene.frames * factors).clamp(0, 1)
    return bad, run(scene, bad)


SHAKE = torch.tensor([[1.5, 0.0], [-1.5, 1.0], [1.0, -1.0], [-2.0, 0.5], [1.0, -0.5]])


@pytest.fixture(scope="module")
def jitter(scene):
    """One view shakes."""
    bad = scene.frames.clone()
    for f, shift in enumerate(SHAKE):
        bad[1, f] = mv_opt_objective.moved(bad[1, f], shift[:, None, None].expand(-1, H, W))
    bad = bad.clamp(0, 1)
    return bad, run(scene, bad)


def test_clean_pictures_hardly_change(scene, clean):
    check(clean, scene.views())
    assert scene.psnr(clean.frames) > 40


def test_a_cast_is_taken_out(scene, cast):
    bad, found = cast
    check(found, scene.views())
    assert scene.psnr(found.frames, 1) > scene.psnr(bad, 1) + 5
    assert scene.psnr(found.frames, 0) > 40 and scene.psnr(found.frames, 2) > 35


def test_flicker_is_taken_out(scene, flicker):
    bad, found = flicker
    check(found, scene.views())
    assert scene.psnr(found.frames, 2) > scene.psnr(bad, 2) + 5
    assert scene.psnr(found.frames, 0) > 40 and scene.psnr(found.frames, 1) > 38


def centroid(frames: Tensor) -> Tensor:  # [F, 3, H, W] -> [F, 2] pixels
    """Of all that is not background."""
    weight = (frames - 0.5).abs().sum(1)
    x, y = torch.arange(W) + 0.5, torch.arange(H) + 0.5
    both = torch.stack([(weight * x).sum((1, 2)), (weight * y[:, None]).sum((1, 2))], 1)
    return both / weight.sum((1, 2))[:, None]


def test_a_view_that_shakes_comes_to_rest(scene, jitter):
    bad, found = jitter
    check(found, scene.views())
    true = centroid(scene.frames[1])

    def unrest(frames: Tensor) -> float:
        away = centroid(frames[1]) - true
        return float((away - away.mean(0)).square().sum(1).mean().sqrt())

    shaken_by = float((SHAKE - SHAKE.mean(0)).square().sum(1).mean().sqrt())
    assert unrest(bad) == pytest.approx(shaken_by, rel=0.05)
    assert unrest(found.frames) < 0.4 * unrest(bad)
    assert scene.psnr(found.frames, 1) > scene.psnr(bad, 1) + 2


def energy(frames: Tensor) -> float:
    return sum(float(frames.diff(dim=d).square().sum()) for d in (-1, -2))


def test_pictures_that_were_moved_stay_sharp(scene, jitter):
    bad, found = jitter
    assert energy(found.frames[1]) == pytest.approx(energy(bad[1]), rel=0.05)


def test_detail_that_reading_between_pixels_takes_is_given_back():
    x = mv_opt.gaussian(draw(3, H, W), 0.6)
    y = mv_opt_objective.moved(x, torch.full((2, H, W), 0.5))
    everywhere = torch.ones(H, W)
    assert energy(y) < 0.9 * energy(x)
    assert energy(mv_opt._sharpened(y, x, everywhere)) == pytest.approx(energy(x), rel=0.03)
    assert torch.equal(mv_opt._sharpened(x, y, everywhere), x), "sharper pictures are left"
    assert torch.equal(mv_opt._sharpened(torch.zeros(3, H, W), x, everywhere), torch.zeros(3, H, W))


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
def test_without_strengths_pictures_come_back_to_the_bit(short, fidelity):
    bad = (short.frames * torch.tensor([1.0, 1.2, 0.9]).view(-1, 1, 1, 1, 1)).clamp(0, 1)
    found = run(short, bad, Settings(temporal=0.0, pose=0.0, surface=0.0, fidelity=fidelity))
    assert torch.equal(found.frames, bad)


@pytest.mark.parametrize("name", ["surface", "temporal", "pose"])
def test_a_strength_of_0_takes_its_term_out(short, name):
    bad = short.frames.clone()
    bad[1, ::2] = mv_opt_objective.moved(bad[1, 0], torch.full((2, H, W), 2.0)).clamp(0, 1)
    first = run(short, bad, QUICK).history.terms[0]
    off = run(short, bad, replace(QUICK, **{name: 0.0})).history.terms[0]
    assert first[name] > 0 and off[name] == 0
    for other in {"surface", "temporal", "pose"} - {name}:
        assert off[other] > 0


def test_trusted_views_change_less(scene, cast):
    bad, _ = cast

    def changes(*weights: float) -> float:
        found = run(scene, bad, QUICK, weights=torch.tensor(weights)).frames
        return float((found - bad)[1].square().mean().sqrt())

    assert changes(0.1, 1.0, 0.1) < 0.97 * changes(1.0, 0.1, 1.0)


def test_only_ratios_of_weights_count_and_the_same_comes_out_twice(short):
    bad = (short.frames * torch.tensor([1.0, 1.2, 0.9]).view(-1, 1, 1, 1, 1)).clamp(0, 1)
    plain, equal = run(short, bad, QUICK), run(short, bad, QUICK, weights=torch.full((3,), 0.25))
    assert torch.equal(plain.frames, equal.frames) and plain.history == equal.history


def test_bytes_are_pictures_too_and_what_came_in_is_left(short):
    frames = (short.frames * 255).round().byte()
    frames[1] = (frames[1] * 0.8).byte()
    before = frames.clone()
    found = run(short, frames, QUICK)
    assert torch.equal(frames, before)
    assert torch.equal(found.frames, run(short, frames.float() / 255, QUICK).frames)


def test_how_many_frames_at_a_time_changes_nothing(short):
    one = run(short, None, replace(QUICK, chunk=1))
    all_at_once = run(short, None, QUICK)
    assert torch.equal(one.frames, all_at_once.frames)


def test_large_pictures_are_worked_on_small_and_corrected_in_full(scene, cast, monkeypatch):
    monkeypatch.setattr(mv_opt_objective, "TALLEST", 60)
    bad, _ = cast
    found = run(scene, bad)
    assert scene.psnr(found.frames, 1) > scene.psnr(bad, 1) + 2
    assert energy(found.frames[1]) > 0.8 * energy(scene.frames[1])


# --- the background -------------------------------------------------------------------------------


def far_from(scene: Scene) -> Tensor:  # [V, F, H, W]
    return mv_opt.grown(scene.masks.flatten(0, 1).float(), 16).view(scene.masks.shape) == 0


def test_background_follows_when_it_has_the_cast_too(scene, cast):
    bad, found = cast
    far = far_from(scene)[1]
    assert far.any()

    def error(frames: Tensor) -> float:
        return float((frames[1] - 0.5).abs().mean(1)[far].mean())

    assert error(bad) > 0.05 and error(found.frames) < 0.6 * error(bad)


def test_background_stays_when_only_the_performer_has_the_cast(scene):
    bad = torch.where(scene.masks[:, :, None], scene.frames * cast_of(scene), scene.frames)
    found = run(scene, bad.clamp(0, 1)).frames
    assert scene.psnr(found, 1) > scene.psnr(bad.clamp(0, 1), 1) + 4
    far = far_from(scene)[:, :, None].expand_as(bad)
    assert (found - bad)[far].abs().max() < 1 / 255


# --- what is missing or broken --------------------------------------------------------------------


def said(result: Refined, *words: str) -> None:
    text = "; ".join(result.notes)
    for word in words:
        assert word in text, text


def flickering(scene: Scene) -> Tensor:
    factors = torch.tensor([1.1, 0.9, 1.08])[: scene.frames.shape[1], None, None, None]
    return (scene.frames * factors).clamp(0, 1)


def test_one_view_is_steadied_over_time():
    one = Scene([0.0], 3)
    bad = flickering(one)
    found = refine(one.views(bad), one.depth, None, None, Settings())
    check(found, one.views())
    said(found, "one view")

    def unrest(frames: Tensor) -> float:
        means = torch.stack([f[:, m].mean() for f, m in zip(frames[0], one.masks[0], strict=True)])
        return float(means.std())

    assert unrest(found.frames) < 0.5 * unrest(bad)


@pytest.mark.parametrize("masks", [True, False])
def test_without_a_rig_nothing_is_compared_across_views(short, masks):
    views = short.views(flickering(short), masks=masks, rig=False)
    found = refine(views, short.depth, None, None, Settings())
    check(found, views)
    said(found, "no rig")
    assert found.history.terms[0]["surface"] == 0


@pytest.mark.parametrize("masks", [True, False])
def test_without_depth_the_shape_comes_from_outlines(short, masks):
    bad = (short.frames * torch.tensor([1.0, 1.25, 1.0]).view(-1, 1, 1, 1, 1)).clamp(0, 1)
    # Without masks the performer is found before a background that is plain in every view.
    bad = torch.where(short.masks[:, :, None], bad, short.frames)
    views = short.views(bad, masks=masks)
    found = refine(views, None, None, None, Settings())
    check(found, views)
    said(found, "shape from the outlines", *([] if masks else ["plain background"]))
    assert short.psnr(found.frames, 1) > short.psnr(bad, 1) + 1


def test_without_depth_or_masks_before_a_room_only_time_is_left(short):
    noise = torch.rand(short.frames.shape[-3:], generator=torch.Generator().manual_seed(1))
    busy = torch.where(short.masks[:, :, None], short.frames, noise)
    views = short.views(busy, masks=False)
    found = refine(views, None, None, None, QUICK)
    check(found, views)
    said(found, "no depth, and no masks")
    assert found.history.terms[0]["surface"] == 0


def test_views_that_share_nothing_say_so():
    apart = Scene([0.0, math.pi], 3)
    found = run(apart, None, QUICK)
    check(found, apart.views())
    said(found, "no two views")


def test_nobody_in_some_frames_leaves_those_as_they_are(short):
    frames, depth = short.frames.clone(), short.depth.clone()
    frames[:, 1], depth[:, 1] = 0.5, 0.0
    frames[1] *= 1.15
    views = Views(frames.clamp(0, 1), short.masks & (depth > 0), short.rig)
    found = refine(views, depth, None, None, Settings())
    check(found, views)
    assert torch.equal(found.frames[0, 1], views.frames[0, 1])


def test_a_view_with_nobody_is_named_and_stays(short):
    depth, masks = short.depth.clone(), short.masks.clone()
    depth[2], masks[2] = 0.0, False
    views = Views(short.frames, masks, short.rig)
    found = refine(views, depth, None, None, Settings())
    check(found, views)
    said(found, "nobody in views [2]")
    assert torch.equal(found.frames[2], short.frames[2])


def test_nobody_anywhere_gives_back_what_came(short):
    found = run(short, depth=torch.zeros_like(short.depth))
    said(found, "nobody was found")
    assert torch.equal(found.frames, short.frames) and found.history.total == []


def test_a_frame_of_nan_is_named_and_replaced_by_its_neighbour(short):
    frames = short.frames.clone()
    frames[1, 2, 0, 40, 30] = torch.nan
    found = run(short, frames)
    check(found, short.views())
    said(found, "view 1 frame 2")
    assert short.psnr(found.frames, 0) > 35


def test_a_view_of_nothing_but_nan_is_survived(short):
    frames = short.frames.clone()
    frames[2] = torch.nan
    check(run(short, frames, QUICK), short.views())


def test_depth_with_nan_and_infinity_is_nothing_there(short):
    depth = short.depth.clone()
    depth[1, 0, :20], depth[0, 1, 40:] = torch.nan, torch.inf
    check(run(short, None, QUICK, depth=depth), short.views())


def test_one_frame_and_two_frames_are_refined_too(short):
    for count in (1, 2):
        bad = short.frames[:, :count] * torch.tensor([1.0, 1.2, 1.0]).view(-1, 1, 1, 1, 1)
        views = Views(bad.clamp(0, 1), short.masks[:, :count], short.rig)
        check(refine(views, short.depth[:, :count], None, None, QUICK), views)


# --- pose -----------------------------------------------------------------------------------------


def pose_of(scene: Scene, shake: Tensor | None = None, sure: float = 1.0, pixels=True) -> Pose:
    """Points inside the performer, as seen by each view; `shake` [V, F, 2]."""
    V, count = scene.frames.shape[:2]
    points = (torch.tensor([0.3, 0.7, 0.2]) * draw(20, 3).clamp(-1, 1)).expand(count, -1, -1)
    seen = mv_opt.project(points, scene.rig)
    if shake is not None:
        seen = seen + shake[:, :, None]
    found = torch.full((count, 20), sure)
    names = tuple(f"point {n}" for n in range(20))
    if not pixels:
        return Pose(points, found, None, None, names)
    return Pose(points, found, seen, torch.full((V, count, 20), sure), names)


def test_a_pose_that_knows_nothing_is_not_used_and_says_so(short):
    plain = run(short, None, QUICK).frames
    for pose, word in (
        (pose_of(short, sure=0.0), "zero confidence"),
        (pose_of(short, pixels=False), "no places in the pictures"),
    ):
        found = run(short, None, QUICK, pose=pose)
        check(found, short.views())
        said(found, word)
        assert torch.equal(found.frames, plain)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_keypoints_tell_what_shakes_in_the_window_less_what_is_always_so(short, scale):
    window = Window(5, 11, 40, 60, scale)
    shake = torch.zeros(3, 3, 2)
    shake[1] = torch.tensor([[2.0, 0.0], [0.0, 0.0], [-2.0, 1.0]])
    always = torch.tensor([0.0, 4.0])  # the reader's error
    pose = pose_of(short, shake + always)
    found = mv_opt._shaken(pose, window, window.rig(short.rig), QUICK, [])
    expected = (shake - shake.median(1, keepdim=True).values) * scale
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_what_keypoints_of_all_views_shake_by_is_the_readers_error(short):
    shake = 2.0 * draw(3, 3, 2, seed=4)
    room = torch.rand(short.frames.shape, generator=torch.Generator().manual_seed(1))
    rig, solid = short.rig, short.masks
    nothing = mv_opt._drift(room, solid, shake, rig, QUICK)
    alone = shake * torch.tensor([0.05, 1.0, 0.05])[:, None, None]
    assert nothing.norm(dim=2).mean() < 0.5 * shake.norm(dim=2).mean()
    moved = mv_opt._drift(room, solid, alone, rig, QUICK)
    assert moved[1].norm(dim=1).mean() > 0.5 * shake[1].norm(dim=1).mean()
    assert not moved[[0, 2]].any()


def test_keypoints_find_shaking_before_a_room(scene):
    """Where no outline can be told from the background."""
    noise = torch.nn.functional.interpolate(
        torch.rand(1, 3, 10, 8, generator=torch.Generator().manual_seed(1)), (H, W), mode="bicubic"
    )[0]
    true = torch.where(scene.masks[:, :, None], scene.frames, noise.clamp(0, 1))
    bad = scene.frames.clone()
    for f, shift in enumerate(SHAKE):
        bad[1, f] = mv_opt_objective.moved(true[1, f], shift[:, None, None].expand(-1, H, W))
    bad[[0, 2]] = true[[0, 2]]
    bad = bad.clamp(0, 1)
    shake = torch.zeros(VIEWS, FRAMES, 2)
    shake[1] = -SHAKE  # what is read at p + shift is seen at p
    found = run(scene, bad, QUICK, pose=pose_of(scene, shake))
    check(found, scene.views())
    assert scene.psnr(found.frames, 1) > scene.psnr(bad, 1) + 2
    assert scene.psnr(found.frames, 1) > scene.psnr(run(scene, bad, QUICK).frames, 1)


# --- progress -------------------------------------------------------------------------------------


def test_progress_counts_moments_to_the_end_with_pictures_of_all_views(short):
    seen = []
    settings = Settings(iterations=2, sweeps=2)
    run(short, settings=settings, on_step=lambda *a: seen.append(a))
    done = [a[0] for a in seen]
    assert done == sorted(done) and {a[1] for a in seen} == {2 * 3}
    assert done[0] == 0 and done[-1] == 2 * 3
    pictures = [a[2] for a in seen if len(a) > 2 and a[2] is not None]
    assert 3 <= len(pictures) <= 6
    assert all(p.shape[0] == 3 and 0 <= p.min() <= p.max() <= 1 for p in pictures)


def test_what_the_callback_raises_stops_the_refiner(short):
    class Cancelled(Exception):
        pass

    def cancel(*_):
        raise Cancelled

    with pytest.raises(Cancelled):
        run(short, on_step=cancel)


@pytest.mark.parametrize(
    "module, work",
    [(mv_opt, "outline_shifts"), (mv_opt_links, "_bends_of_view"), (mv_opt_links, "_agreed"),
     (mv_opt, "_applied")],
)  # fmt: skip
def test_the_cancel_button_counts_before_every_piece_of_work(scene, monkeypatch, module, work):
    """Pieces of a quarter of a second: a row of them without a word to the caller is seconds."""
    heard, asked = [], []
    do = getattr(module, work)

    def counted(*given):
        asked.append(len(heard))
        return do(*given)

    monkeypatch.setattr(module, work, counted)
    spoiled = scene.frames.clone()
    spoiled[1] = (spoiled[1] * 0.8).roll(1, dims=-1)
    run(scene, spoiled, QUICK, on_step=lambda *_: heard.append(1))
    assert len(asked) >= 2 and len(set(asked)) == len(asked)


def test_window_of_one_pixel_is_not_too_small():
    inside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    inside[0, 0, 2, 2] = True
    assert window_around(inside) == Window(0, 0, 4, 4, 1.0)
    assert min(window_around(inside).size) == 8
