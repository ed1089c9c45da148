"""MV-Opt as published: descent, order and count of the blocks, gradients, what is left out."""

import math

import pytest
import torch
from turnaround.models import human_net
from turnaround.models.human_net import HumanNet, estimate_keypoints
from turnaround.models.mv_opt_paper import (
    PUBLISHED,
    SEEN,
    SUFFICIENT,
    Paper,
    Strengths,
    keypoint_losses,
    published_weights,
    refine_paper,
)

V, COUNT, SIDE, P = 3, 3, 64, 4
ORDER = [0, 2, 1]
SURFACE_ALONE = Strengths(0.0, 0.0, 0.02)
KEYPOINTS_ALONE = Strengths(1.0, 0.1, 0.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_crops(monkeypatch):
    monkeypatch.setattr(human_net, "CROP", (64, 64))


def peaked_net(dtype=torch.float32) -> HumanNet:
    """A random net whose maps have peaks, so that its keypoints depend on the picture."""
    torch.manual_seed(3)
    net = HumanNet((8, 8, 8, 8, 8), keypoints=P).to(dtype).eval()
    with torch.no_grad():
        net.joints.weight[:P] *= 30
        net.joints.weight[P:] *= 0
        net.joints.bias[P:] = 2.0
    return net


@pytest.fixture(scope="module")
def net():
    return peaked_net()


def clip(views=V, count=COUNT, seed=5, dtype=torch.float32):
    """Smooth random pictures and a crop that reaches beyond them."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(views * count, 3, 8, 8, generator=g, dtype=dtype)
    frames = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    boxes = torch.tensor([4.0, -6.0, 60.0, 66.0], dtype=dtype).expand(views, count, 4)
    return frames.unflatten(0, (views, count)).clamp(0, 1), boxes.clone()


def written_out(frames, boxes, net, front, weights, strengths):
    """F as the paper writes it, sum by sum."""
    views, count = frames.shape[:2]
    here = [
        [estimate_keypoints(net, frames[v, t][None], boxes[v, t][None])[0][0] for t in range(count)]
        for v in range(views)
    ]
    tall = boxes[0, 0, 3] - boxes[0, 0, 1]
    middle = frames.shape[-1] / 2
    total = frames.new_zeros(())
    for t in range(count):
        if t:
            step = (here[front][t] - here[front][t - 1]) / tall
            total = total + strengths.temporal * step.square().sum(-1).mean()
        for v in range(views):
            k, level = here[v][t], here[front][t]
            pose = ((k[:, 1] - level[:, 1]) / tall).square().mean()
            if views % 2 == 0:
                back = here[(v + views // 2) % views][t]
                pose = pose + ((k[:, 0] - middle + back[:, 0] - middle) / tall).square().mean()
            apart = (frames[v, t] - frames[front, t]).square().mean()
            total = total + strengths.pose * pose + strengths.surface * weights[v] * apart
    return total


@pytest.mark.parametrize("strengths", [PUBLISHED, SURFACE_ALONE, KEYPOINTS_ALONE])
@pytest.mark.parametrize("views", [2, 3])
def test_objective_never_rises_and_is_what_the_result_gives(net, views, strengths):
    frames, boxes = clip(views)
    order = [1, 0, 2][:views]
    result, history = refine_paper(frames, boxes, net, order, iterations=2, strengths=strengths)
    falls = [a - b for a, b in zip(history.total[:-1], history.total[1:], strict=True)]
    assert min(falls) >= 0
    assert history.total[-1] < 0.9 * history.total[0]
    weights = published_weights(order)
    with torch.no_grad():
        for pictures, told in ((frames, 0), (result, -1)):
            f = float(written_out(pictures, boxes, net, 1, weights, strengths))
            assert f == pytest.approx(history.total[told], rel=1e-4, abs=1e-12)
            assert f == pytest.approx(sum(history.terms[told].values()), rel=1e-4, abs=1e-12)


def test_every_block_falls_by_as_much_as_it_says_and_by_enough(net):
    frames, boxes = clip()
    weights = published_weights(ORDER)
    paper = Paper(frames, boxes, net, ORDER, weights, SURFACE_ALONE)
    now, shown = paper.moment(1), frames.clone()
    for v in (0, 1, 0, 2):
        fell = paper.descend(v, 1, now)
        after = shown.clone()
        after[v, 1] = now[v].picture.detach()
        with torch.no_grad():
            before, reached = (
                float(written_out(x, boxes, net, 0, weights, SURFACE_ALONE)) for x in (shown, after)
            )
        assert fell == pytest.approx(before - reached, rel=1e-3)
        assert fell >= SUFFICIENT * float((after[v, 1] - shown[v, 1]).square().mean()) > 0
        shown = after


def test_scale_of_a_step_is_doubled_halved_and_remembered(net):
    """Weight 0.1 bends F by 2 * 0.02 * 0.1: steps up to 1 / (0.002 + c) = 333 are good enough."""
    frames, boxes = clip()
    paper = Paper(frames, boxes, net, ORDER, torch.full((V,), 0.1), SURFACE_ALONE)
    now = paper.moment(1)
    left = [float((now[1].picture - now[0].picture).detach().norm())]
    scales = [paper.scale[1]]
    for _ in range(4):
        paper.descend(1, 1, now)
        left.append(float((now[1].picture - now[0].picture).detach().norm()))
        scales.append(paper.scale[1])
    assert scales == [100, 200, 400, 400, 400]
    # 1 - scale * 0.004 of the difference remain.
    shares = [b / a for a, b in zip(left[:-1], left[1:], strict=True)]
    assert shares == pytest.approx([0.6, 0.2, 0.2, 0.2], rel=1e-3)


def test_blocks_come_in_the_published_order_and_number(net):
    """Moment after moment; in each 8 rounds, the front view first."""
    frames, boxes = clip(count=2)
    steps = []
    _, history = refine_paper(
        frames, boxes, net, ORDER, on_step=lambda *s: steps.append(s), strengths=SURFACE_ALONE
    )
    assert history.order == [(0, t, v) for t in range(2) for _ in range(8) for v in ORDER]
    assert len(history.total) == len(history.order) + 1
    assert steps == [(n, 2 * 8 * V) for n in range(1, 2 * 8 * V + 1)]


def test_published_weights_follow_the_order():
    assert published_weights([2, 0, 3, 1]).tolist() == pytest.approx([0.25, 0.1, 0.25, 0.1])


def test_gradient_of_the_surface_loss_is_the_analytic_one(net):
    frames, boxes = clip()
    weights = torch.tensor([0.3, 0.2, 0.7])
    paper = Paper(frames, boxes, net, ORDER, weights, SURFACE_ALONE)
    now = paper.moment(1)
    x = frames[:, 1]
    for v in (1, 2):
        expected = 2 * 0.02 * weights[v] * (x[v] - x[0])
        torch.testing.assert_close(paper.slope(v, 1, now), expected)
    expected = 2 * 0.02 * (weights[1] * (x[0] - x[1]) + weights[2] * (x[0] - x[2]))
    torch.testing.assert_close(paper.slope(0, 1, now), expected)


@pytest.mark.parametrize("views", [2, 3])
def test_gradient_is_that_of_the_whole_objective(monkeypatch, views):
    """Of the front view's block and a novel view's, along a random direction, in float64."""
    # The net's heads work in float32 for half-precision weights; here everything stays float64.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    net = peaked_net(torch.float64)
    frames, boxes = clip(views, dtype=torch.float64)
    weights = torch.tensor([0.3, 0.2, 0.7], dtype=torch.float64)[:views]
    paper = Paper(frames, boxes, net, list(range(views)), weights, PUBLISHED)
    now = paper.moment(1)
    direction = torch.randn(3, SIDE, SIDE, dtype=torch.float64)
    step = 1e-7  # pixels of a larger one cross the kinks of the net's ReLU
    for v in (0, 1):
        ends = []
        for sign in (1, -1):
            moved = frames.clone()
            moved[v, 1] += sign * step * direction
            with torch.no_grad():
                ends.append(written_out(moved, boxes, net, 0, weights, PUBLISHED))
        slope = (ends[0] - ends[1]) / (2 * step)
        gradient = paper.slope(v, 1, now) / direction.numel()
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-13)
        paper.strengths = SURFACE_ALONE
        assert not torch.allclose(paper.slope(v, 1, now) / direction.numel(), gradient)
        paper.strengths = PUBLISHED


def test_keypoint_losses_of_a_known_motion():
    """Everything falls by 0.1 a frame; view 1 stands 0.2 higher; opposite views mirror each other
    but for 0.3 in one keypoint of view 3."""
    points = torch.zeros(4, 3, 2, 2, dtype=torch.float64)
    points[..., 0] = torch.tensor([[0.4, -0.1], [0.2, 0.0], [-0.4, 0.1], [-0.2, 0.3]])[:, None]
    points[..., 1] = 0.1 * torch.arange(3)[:, None]
    points[1, ..., 1] -= 0.2
    known = torch.ones(4, 3, 2, dtype=torch.bool)
    temporal, pose = keypoint_losses(points, known, 0)
    assert float(temporal) == pytest.approx(2 * 0.1**2)
    # Both of a pair of views count their sideways difference.
    assert float(pose) == pytest.approx(3 * 0.2**2 + 3 * 2 * 0.3**2 / 2)
    _, odd = keypoint_losses(points[:3], known[:3], 0)
    assert float(odd) == pytest.approx(3 * 0.2**2)


def test_view_equal_to_the_front_view_has_no_surface_loss(net):
    frames, boxes = clip()
    frames[1:] = frames[0]
    result, history = refine_paper(frames, boxes, net, ORDER, strengths=SURFACE_ALONE)
    assert history.total == [0.0] * len(history.total)
    assert torch.equal(result, frames)
    frames[2, 1] = 1 - frames[0, 1]
    _, history = refine_paper(frames, boxes, net, ORDER, iterations=0)
    expected = 0.02 * 0.25 * float((frames[2, 1] - frames[0, 1]).square().mean())
    assert history.terms[0]["surface"] == pytest.approx(expected)


def test_surface_loss_alone_makes_all_views_the_same_picture(net):
    """What the literal objective asks for."""
    frames, boxes = clip(count=1)
    weights = torch.ones(V)
    result, _ = refine_paper(frames, boxes, net, ORDER, weights, 8, strengths=SURFACE_ALONE)
    before, after = ((x[1:] - x[:1]).abs().amax() for x in (frames, result))
    assert after < 0.05 * before


def test_pixels_stay_between_black_and_white(net):
    frames, boxes = clip()
    frames = (3 * frames - 1).clamp(0, 1)  # a third of the pixels lies at either end
    result, _ = refine_paper(frames, boxes, net, ORDER, None, 2, None, Strengths(1e4, 1e4, 0.02))
    assert result.min() >= 0 and result.max() <= 1
    assert not torch.equal(result, frames)


def test_same_input_gives_the_same_result_and_is_not_touched(net):
    frames, boxes = clip(count=2)
    kept = frames.clone()
    first, history = refine_paper(frames, boxes, net, ORDER, iterations=2)
    second, again = refine_paper(frames, boxes, net, ORDER, iterations=2)
    assert torch.equal(first, second) and history.total == again.total
    assert torch.equal(frames, kept)
    assert all(p.grad is None for p in net.parameters())


def test_works_in_inference_mode_on_a_net_made_there():
    frames, boxes = clip(count=2)
    plain, _ = refine_paper(frames, boxes, peaked_net(), ORDER, iterations=1)
    with torch.inference_mode():
        given = [t.clone() for t in (frames, boxes, published_weights(ORDER))]
        weights = given.pop()
        result, _ = refine_paper(*given, peaked_net(), ORDER, weights, iterations=1)
        assert given[0].is_inference()
    torch.testing.assert_close(result, plain)


def test_pictures_without_anybody_have_no_keypoint_losses(net):
    """One view is empty, and the front view for one moment: only the rest is compared."""
    frames, boxes = clip()
    boxes[2], boxes[0, 1] = math.nan, 0.0
    result, history = refine_paper(frames, boxes, net, ORDER, None, 2, None, KEYPOINTS_ALONE)
    assert torch.equal(result[2], frames[2]) and torch.equal(result[:, 1], frames[:, 1])
    assert not torch.equal(result[1, 0], frames[1, 0])
    assert history.terms[0]["temporal"] == 0 < history.terms[0]["pose"]
    assert result.isfinite().all()
    boxes[:] = math.nan
    result, history = refine_paper(frames, boxes, net, ORDER, strengths=KEYPOINTS_ALONE)
    assert torch.equal(result, frames) and history.total[-1] == 0


def test_keypoints_that_are_not_sure_do_not_count():
    frames, boxes = clip()
    net = peaked_net()
    with torch.no_grad():
        net.joints.bias[P:] = torch.logit(torch.tensor([SEEN - 0.01] * (P - 1) + [SEEN + 0.01]))
    paper = Paper(frames, boxes, net, ORDER, torch.ones(V), PUBLISHED)
    assert paper.known[..., -1].all() and not paper.known[..., :-1].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(frames=torch.full((V, COUNT, 3, 8, 8), math.nan)), "NaN"),
        (dict(frames=torch.zeros(V, 0, 3, 8, 8)), "no frames"),
        (dict(boxes=torch.zeros(V, 1, 4)), "one crop for each"),
        (dict(order=[0, 1, 1]), "each of the 3 views once"),
        (dict(weights=torch.ones(2)), "3 numbers"),
        (dict(weights=torch.tensor([1.0, -1.0, 0.0])), "at least 0"),
    ],
)
def test_bad_input_is_said_in_words(net, change, words):
    frames, boxes = clip()
    given = dict(frames=frames, boxes=boxes, net=net, order=ORDER) | change
    with pytest.raises(ValueError, match=words):
        refine_paper(**given)
