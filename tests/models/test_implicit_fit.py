"""Fitting an implicit video: losses against algebra, faults told apart, continuing, views together."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models import implicit_detail, implicit_fit, implicit_still, metrics
from turnaround.models.cameras import Rig
from turnaround.models.flow import Flow
from turnaround.models.implicit_detail import low_passed
from turnaround.models.implicit_fit import FAST, PAPER, ImplicitFit, Patch, flow_loss, slopes
from turnaround.models.implicit_pieces import keys_of
from turnaround.models.implicit_start import (
    cast_between,
    fill,
    hats,
    inverse,
    located,
    motions_to,
    path_weights,
    pixel_centres,
    tracks,
    unjittered,
    warped,
    weighted_median,
)  # fmt: skip
from turnaround.models.implicit_video import FieldSize, places_of
from turnaround.models.implicit_views import without_casts

pytestmark = pytest.mark.usefixtures("one_thread")

W, H, COUNT = 64, 40, 8
TINY = FieldSize(3, 2, 8, 4, 1.5, 8, 1)
QUICK = replace(FAST, canonical=TINY, deformation=TINY, patch=24)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenery(width: int = W, height: int = H, seed: int = 1) -> Tensor:
    """[3, height, width] blobs of all colours, some pixels wide."""
    rough = torch.rand(1, 3, height // 5, width // 5, generator=seeded(seed))
    picture = F.interpolate(rough, (height, width), mode="bicubic")[0]
    return (0.15 + 0.7 * picture).clamp(0.05, 0.95)


def gliding(step: float, count: int = COUNT) -> Tensor:
    """[1, F, 3, H, W] scenery that moves to the right by `step` pixels a frame."""
    wide = scenery(W + 40, H)
    centres = pixel_centres(wide[:, :, :W])
    frames = []
    for n in range(count):
        place = centres + torch.tensor([20 - step * n, 0.0]).view(2, 1, 1)
        grid = torch.stack([2 * place[0] / (W + 40) - 1, 2 * place[1] / H - 1], -1)[None]
        frames.append(F.grid_sample(wide[None], grid, "bicubic", align_corners=False)[0])
    return torch.stack(frames)[None].clamp(0, 1)


def still(count: int = COUNT) -> Tensor:
    return scenery().expand(1, count, -1, -1, -1).clone()


def moving_flow(step: float, count: int = COUNT) -> Flow:
    there = torch.zeros(1, count - 1, 2, H, W)
    there[:, :, 0] = step
    sure = torch.ones(1, count - 1, H, W)
    return Flow(there, -there, sure, sure)


# --- losses ---------------------------------------------------------------------------------------


def test_slopes_are_sobels():
    ramp = places_of((9, 7)).T.view(2, 7, 9).double()
    across, down = slopes(ramp)
    inside = torch.ones(5, 7, dtype=torch.float64)
    torch.testing.assert_close(across[0].abs(), inside / 9)
    torch.testing.assert_close(down[1].abs(), inside / 7)
    assert across[1].abs().max() < 1e-12 and down[0].abs().max() < 1e-12


def test_flow_loss_is_eq_7_and_has_its_gradient():
    here = torch.rand(6, 2, dtype=torch.float64, generator=seeded(2), requires_grad=True)
    there = torch.rand(6, 2, dtype=torch.float64, generator=seeded(3), requires_grad=True)
    sure = torch.tensor([1.0, 0, 0.5, 1, 1, 0], dtype=torch.float64)
    by_hand = sum(float(s) * (a - b).abs().sum() for s, a, b in zip(sure, here, there, strict=True))
    torch.testing.assert_close(flow_loss(here, there, sure, sure.sum()), by_hand / 3.5)
    assert torch.autograd.gradcheck(lambda a, b: flow_loss(a, b, sure, sure.sum()), (here, there))
    flow_loss(here, there, sure, sure.sum()).backward()
    assert not here.grad[1].any() and here.grad[0].any(), "only where flow is believed"


def test_nothing_believed_costs_nothing():
    places = torch.rand(3, 2)
    assert flow_loss(places, places + 1, torch.zeros(3), torch.tensor(0.0)) == 0


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_the_right_deformation_has_no_flow_loss_in_frames_that_are_not_square(wrong):
    """D of a slide by 3 pixels across: an error of 1 pixel costs 1 / width, not 1 / height."""
    fit = ImplicitFit(gliding(3.0), replace(QUICK, stride=0), flow=moving_flow(3.0))
    view, piece = fit.pieces[0]
    with torch.no_grad():
        fit.video.jitter.zero_()
        layer = piece.layers[0]
        layer.motion = torch.zeros(COUNT, 2, 1, 1)
        layer.motion[:, 0, 0, 0] = -(3.0 + wrong) / W * (torch.arange(COUNT) - piece.key)
        rows, columns = slice(8, 30), slice(8, 40)
        places = [piece.places(0, fit.material.points[rows, columns].reshape(-1, 2), 2)]
        part = Patch(view, 2, rows, columns, rows)
        loss = fit._flow_loss(piece, part, places, fit._believed(part)[1].sum(1), None)
    torch.testing.assert_close(float(loss), wrong / W, atol=1e-6, rtol=0)


# --- the start -----------------------------------------------------------------------------------


def test_hats_read_a_grid_as_interpolation_does():
    grid = torch.rand(1, 1, 5, 5, generator=seeded(4))
    points = places_of((11, 7))
    by_torch = F.grid_sample(grid, (2 * points - 1)[None, None], align_corners=True)[0, 0, 0]
    torch.testing.assert_close(hats((7, 11), 5, grid) @ grid.flatten(), by_torch)


def test_a_cast_is_found_in_spite_of_a_quarter_of_other_things():
    meant = torch.rand(3, 600, generator=seeded(5))
    shown = 1.2 * meant - 0.05
    shown[:, ::4] = torch.rand(3, 150, generator=seeded(6))
    gain, offset = cast_between(shown, meant, torch.ones(600), torch.ones(600, 1))
    torch.testing.assert_close(gain, torch.full((3, 1), 1.2), atol=0.03, rtol=0)
    torch.testing.assert_close(offset, torch.full((3, 1), -0.05), atol=0.02, rtol=0)


def test_tracks_follow_a_slide():
    flow = moving_flow(2.0)
    path = tracks(flow.there[0], flow.back[0], 3, 2)
    assert sorted(path) == [1, 2, 3, 4, 5]
    for m, away in path.items():
        torch.testing.assert_close(away[0], torch.full((H, W), 2.0 * (m - 3)))
        assert not away[1].any()


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_path_weights_keep_polynomials(degree):
    t = torch.tensor([-3.0, -1, 0, 2, 3])
    weights = path_weights(t, degree)
    for power in range(degree + 1):
        torch.testing.assert_close((weights * t**power).sum(), torch.tensor(0.0**power))


def test_inverse_undoes_a_bend():
    x, y = pixel_centres(torch.empty(H, W))
    bend = torch.stack([1.5 * torch.sin(y / 9), torch.cos(x / 7)])
    back = inverse(bend, 12)
    left = (back + warped(bend, back))[:, 4:-4, 4:-4]
    assert left.abs().amax() < 0.02


def test_flow_of_bent_frames_loses_its_bends():
    shifts = torch.tensor([0.5, -1.0, 0.7])
    jitter = torch.zeros(3, 2, H, W)
    jitter[:, 0] = shifts.view(3, 1, 1)
    # A slide by 2, with every frame's content shown `jitter` to the left.
    there = torch.zeros(2, 2, H, W)
    there[:, 0] = (2 - (shifts[1:] - shifts[:-1])).view(2, 1, 1)
    forth, back = unjittered(there, -there, jitter)
    torch.testing.assert_close(forth[:, 0], torch.full((2, H, W), 2.0))
    torch.testing.assert_close(back, -forth)


def test_motions_lead_to_the_key_frame():
    flow = moving_flow(2.0)
    motions = motions_to(3, 1, 5, flow.there[0], flow.back[0])
    for n, away in zip(range(1, 6), motions, strict=True):
        torch.testing.assert_close(away[0], torch.full((H, W), -2.0 * (n - 3)))


def test_places_are_found_back():
    x, y = pixel_centres(torch.empty(H, W))
    motion = torch.stack([3 + torch.sin(x / 8), torch.cos(y / 6)])
    place = torch.stack([x, y])
    assert (located(place + motion, motion, (W, H), rounds=15) - place).abs().amax() < 0.01


def test_filling_keeps_what_is_known_and_reaches_everywhere():
    field, known = torch.rand(2, 12, 20, generator=seeded(7)), torch.zeros(12, 20)
    known[3:6, 4:9] = 1
    filled = fill(field, known)
    torch.testing.assert_close(filled[:, 3:6, 4:9], field[:, 3:6, 4:9])
    part = field[:, 3:6, 4:9]
    assert filled.isfinite().all() and filled.max() <= part.max() + 1e-5
    assert filled[:, -1, -1].min() > 0


def test_weighted_median_by_hand():
    values = torch.tensor([3.0, 1.0, 2.0]).view(3, 1, 1)
    weights = torch.tensor([1.0, 1.0, 5.0]).view(3, 1)
    assert weighted_median(values, weights) == 2
    assert weighted_median(values, torch.tensor([9.0, 1.0, 1.0]).view(3, 1)) == 3


def test_keys_cover_a_shot():
    assert keys_of(range(10, 15), 6) == [(12, 10, 14)]
    assert keys_of(range(5, 35), 0) == [(19, 5, 34)]
    pieces = keys_of(range(0, 20), 6)
    assert pieces[0][:2] == (0, 0) and pieces[-1][0] == pieces[-1][2] == 19
    for (a, _, end), (b, start, _) in zip(pieces[:-1], pieces[1:], strict=True):
        assert b - a <= 6 and end == b and start == a


def test_slow_light_is_kept_and_flicker_goes():
    t = torch.arange(20.0)
    slow = 0.02 * t
    flicker = 0.1 * torch.randn(20, generator=seeded(8))
    torch.testing.assert_close(low_passed(slow, [range(20)]), slow, atol=1e-5, rtol=0)
    assert low_passed(flicker, [range(20)]).std() < 0.5 * flicker.std()
    jump = torch.cat([torch.zeros(10), torch.ones(10)])
    torch.testing.assert_close(low_passed(jump, [range(10), range(10, 20)]), jump)


def test_what_stands_still_tells_casts_and_bends():
    gains = torch.tensor([1.0, 1.15, 0.9, 1.05, 0.95, 1.1, 0.85, 1.0])
    shifts = torch.tensor([1.2, -1.0, 0.4, -1.2, 1.0, -0.2, 0.8, -1.0])
    frames = []
    for gain, shift in zip(gains, shifts, strict=True):
        bend = torch.zeros(2, H, W)
        bend[0] = shift
        frames.append(gain * warped(scenery(), bend))
    found = implicit_still.find_still(torch.stack(frames), 5, lambda: None)
    inside = found.jitter[:, :, 6:-6, 6:-6].mean((2, 3))
    torch.testing.assert_close(inside[:, 0], shifts - shifts.mean(), atol=0.2, rtol=0)
    assert inside[:, 1].abs().max() < 0.1
    ratio = found.gain.mean((1, 2, 3)) / found.gain.mean()
    torch.testing.assert_close(ratio, gains / gains.mean(), atol=0.05, rtol=0)
    assert found.share.mean() > 0.8


# --- whole fits -----------------------------------------------------------------------------------


def test_a_clean_clip_stays_as_it_is():
    for frames in (still(), gliding(1.5)):
        out = ImplicitFit(frames, QUICK).render()
        assert metrics.psnr(out, frames) > 38


def test_exposure_and_colour_are_steadied():
    gains = 1 + 0.12 * torch.randn(1, COUNT, 3, 1, 1, generator=seeded(9))
    bad = (still() * gains).clamp(0, 1)
    out = ImplicitFit(bad, QUICK).render()
    # What was cut off at white cannot come back.
    assert out.std(1).mean() < 0.15 * bad.std(1).mean()
    # Nobody can know the true light of all frames but by their mean.
    mean = bad.mean(1, keepdim=True).expand_as(bad)
    assert metrics.psnr(out, mean) > metrics.psnr(bad, mean) + 10


def test_noise_goes_and_texture_stays():
    frames = gliding(1.0)
    bad = (frames + 0.06 * torch.randn(frames.shape, generator=seeded(10))).clamp(0, 1)
    out = ImplicitFit(bad, QUICK).render()
    assert metrics.psnr(out, frames) > metrics.psnr(bad, frames) + 3


@pytest.mark.parametrize(("grain", "telling"), [(1, 1), (4, 0)])
def test_what_noise_of_single_pixels_hides_is_told_softened_what_blotches_hide_sharp(
    grain, telling
):
    """A plain limb in grain, and stripes of a pixel in blotches, each hidden at the other scale."""
    noise = torch.randn(2, 3, H // grain, W // grain, generator=seeded(14))
    one, other = 0.06 * F.interpolate(noise, (H, W), mode="bicubic")
    usual = implicit_detail._apart(one, other).mean((1, 2))
    x, y = pixel_centres(one)
    limb = 0.08 if grain == 1 else 0.13 * (-1.0) ** (x.floor() + y.floor())
    inside = (x - W / 2).abs() < 5
    away = implicit_detail._apart(one + limb * inside, other) / usual[:, None, None]
    shares = away[:, 8:-8, W // 2 - 2 : W // 2 + 2].mean((1, 2))
    assert shares[telling] > 3
    assert shares[1 - telling] < 2.5
    assert (away[:, :, :16].amax(0).mean()) < 2


def test_shaking_goes():
    frames, bad = still(), shaken()
    out = ImplicitFit(bad, QUICK).render()
    assert metrics.psnr(out, frames) > metrics.psnr(bad, frames) + 3


def shaken() -> Tensor:
    frames = still()
    for n, shift in enumerate((0.7, -0.8, 0.5, -0.6, 0.9, -0.7, 0.6, -0.6)):
        bend = torch.zeros(2, H, W)
        bend[0] = shift
        frames[0, n] = warped(frames[0, n], bend)
    return frames


def test_frames_that_no_longer_shake_are_not_shaken_back():
    fit = ImplicitFit(shaken(), QUICK)
    fit.steps(3)
    fit.retarget(still())
    assert metrics.psnr(fit.render(), still()) > 38


def test_what_flies_is_not_bent():
    """A square over shaken scenery: its jitter can't be told, and is not learned in training."""
    frames = shaken()
    for n in range(COUNT):
        left = 4 + 6 * n
        frames[0, n, :, 10:26, left : left + 12] = scenery(seed=3)[:, :16, :12]
    fit = ImplicitFit(frames, QUICK)
    fit.steps(5)
    bends = fit.video.jitter[0, :, 0].abs() * W
    rows, columns = bends.shape[1:]
    inside = [
        float(bend[18 * rows // H, (10 + 6 * n) * columns // W]) for n, bend in enumerate(bends)
    ]
    assert float(bends[:, -rows // 4 :].mean()) > 0.4
    assert sum(inside) / COUNT < 0.1


def test_no_strength_gives_the_clip_back():
    bad = still() * (1 + 0.1 * torch.randn(1, COUNT, 1, 1, 1, generator=seeded(11)))
    out = ImplicitFit(bad.clamp(0, 1), replace(QUICK, strength=0.0)).render()
    torch.testing.assert_close(out, bad.clamp(0, 1), atol=2e-3, rtol=0)


def test_render_at_frame_times_is_the_smoothed_clip():
    fit = ImplicitFit(gliding(1.0), QUICK)
    out = fit.render()
    # The detail is kept in half precision.
    torch.testing.assert_close(fit.video.render(range(COUNT)), out, atol=2e-3, rtol=0)


def test_slow_motion_of_a_fit_stands_half_way():
    fit = ImplicitFit(gliding(2.0), QUICK, flow=moving_flow(2.0))
    fit.render()
    between = fit.video.render([3.5])[0, 0]
    true = gliding(1.0, 2 * COUNT)[0, 7]
    inner = (slice(None), slice(4, -4), slice(20, -8))
    assert metrics.psnr(between[inner], true[inner]) > 32


def test_training_lowers_the_loss_and_repeats_by_seed():
    settings = replace(QUICK, known=False, stride=0, patch=0, steps=60, rate=5e-3)
    one, two, other = (ImplicitFit(gliding(0.5), settings, seed=s) for s in (3, 3, 4))
    for fit in (one, two, other):
        fit.steps(40 if fit is one else 10)
    early, late = sum(one.history.total[:5]) / 5, sum(one.history.total[-5:]) / 5
    assert late < 0.8 * early
    assert one.history.total[:10] == two.history.total != other.history.total


@pytest.mark.parametrize("known", [True, False])
def test_parts_of_a_step_add_up_to_it(known, monkeypatch):
    """Losses and gradients of a step cut into rows, of two layers, are those of the whole step."""
    masks = torch.zeros(1, 3, H, W)
    masks[..., 8:30, 20:50] = 1
    settings = replace(QUICK, known=known, stride=0, patch=0)
    fit = ImplicitFit(gliding(1.0, 3), settings, flow=moving_flow(1.0, 3), masks=masks)
    with torch.no_grad():
        for n, parameter in enumerate(fit.video.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded(n))
    piece, found = fit.pieces[0][1], []
    for pixels in (W * H, 7 * W, 1):
        monkeypatch.setattr(implicit_fit, "PART", pixels)
        fit.optimiser.zero_grad(set_to_none=True)
        terms = fit._descend(piece, fit._patch(0, 1))
        slopes_ = [p.grad.clone() for p in fit.video.parameters() if p.grad is not None]
        found.append((terms, slopes_))
    for terms, slopes_ in found[1:]:
        assert terms == pytest.approx(found[0][0], rel=1e-5)
        for one, other in zip(slopes_, found[0][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()), rtol=1e-4)
    assert {"colour", "slopes", "flow", "layers"} <= terms.keys()


def test_a_step_can_be_stopped_between_its_parts(monkeypatch):
    monkeypatch.setattr(implicit_fit, "PART", W)
    fit = ImplicitFit(still(3), replace(QUICK, known=False, stride=0, patch=0))
    calls = []
    fit.tick = lambda: calls.append(1)
    fit.steps(1)
    assert len(calls) > H


def test_new_frames_keep_the_fields_and_the_optimisers_state():
    fit = ImplicitFit(still(), QUICK)
    fit.steps(6)
    tables = [p for n, p in fit.video.named_parameters() if n.endswith("table")]
    state = fit.optimiser.state[tables[0]]
    kept = state["exp_avg"].clone(), tables[0].detach().clone()
    darker = still() * 0.8
    fit.retarget(darker)
    assert fit.optimiser.state[tables[0]] is state and torch.equal(state["exp_avg"], kept[0])
    assert torch.equal(tables[0], kept[1])
    fit.steps(2)
    assert fit.done == 8 and float(state["step"]) > 0
    assert metrics.psnr(fit.render(), darker) > 30
    with pytest.raises(ValueError, match="same clip"):
        fit.retarget(still(COUNT - 1))


def test_layers_explain_what_moves_apart():
    """A disc that slides over still scenery."""
    x, y = pixel_centres(torch.empty(H, W))
    frames, masks = still(), torch.zeros(1, COUNT, H, W)
    for n in range(COUNT):
        masks[0, n] = (((x - 16 - 4 * n) ** 2 + (y - 20) ** 2) < 81).float()
        stripes = 0.5 + 0.4 * torch.sin((x - 4 * n) / 2)
        frames[0, n] = torch.where(masks[0, n] > 0, stripes, frames[0, n])
    there = torch.zeros(1, COUNT - 1, 2, H, W)
    there[:, :, 0] = 4 * masks[:, :-1]
    back = torch.zeros_like(there)
    back[:, :, 0] = -4 * masks[:, 1:]
    sure = torch.ones(1, COUNT - 1, H, W)
    flow = Flow(there, back, sure, sure)
    shown = {}
    for name, given in (("one", None), ("two", masks)):
        fit = ImplicitFit(frames, QUICK, flow=flow, masks=given)
        fit.steps(2)
        shown[name] = metrics.psnr(fit.video.render(range(COUNT)), frames)
    assert shown["two"] > shown["one"]
    assert "layers" in fit.history.terms[0]


def test_a_reference_gives_its_look_where_it_shows_the_same():
    frames = still()
    noisy = (frames + 0.05 * torch.randn(frames.shape, generator=seeded(12))).clamp(0, 1)
    plain, helped = (ImplicitFit(noisy, QUICK, reference=r) for r in (None, scenery()))
    one, two = (metrics.psnr(f.video.render([0.0])[0, 0], scenery()) for f in (plain, helped))
    assert two > one
    settings = replace(QUICK, known=False, stride=0)
    begun = ImplicitFit(frames, settings, reference=scenery()).video.canonical_picture()
    left, top = round(0.3 * W), round(0.3 * H)
    middle = begun[:, top : top + H, left : left + W]
    torch.testing.assert_close(middle, scenery(), atol=1e-3, rtol=0)


def test_what_does_not_belong_together_is_said():
    with pytest.raises(ValueError, match="masks"):
        ImplicitFit(still(), QUICK, masks=torch.ones(1, 2, H, W))
    with pytest.raises(ValueError, match="flow"):
        ImplicitFit(still(), QUICK, flow=moving_flow(1.0, 3))


def test_what_the_tick_raises_stops_everything():
    class Cancelled(Exception):
        pass

    def cancel():
        raise Cancelled

    with pytest.raises(Cancelled):
        ImplicitFit(still(), QUICK, tick=cancel)
    fit = ImplicitFit(still(4), QUICK)
    fit.tick = cancel
    for work in (lambda: fit.steps(1), fit.render):
        with pytest.raises(Cancelled):
            work()


def test_the_published_numbers():
    """CoDeF's configuration: sizes, and the schedule in steps."""
    assert PAPER.canonical == FieldSize(16, 2, 19, 16, 1.44, 64, 2)
    assert PAPER.deformation == FieldSize(16, 2, 19, 16, 1.38, 64, 8)
    assert PAPER.steps == 10_000 and PAPER.rate == PAPER.table_rate == 1e-3
    assert (PAPER.sobel, PAPER.flow, PAPER.background) == (0.1, 1.0, 0.003)
    assert tuple(s * PAPER.steps for s in PAPER.anneal) == (4000, 8000)
    fit = ImplicitFit(still(2), replace(QUICK, known=False, stride=0, steps=10_000, rate=1e-3))
    rates = []
    for fit.done in (0, 2_499, 2_500, 5_000, 7_500, 9_999):
        fit._step()
        rates.append(fit.optimiser.param_groups[1]["lr"])
    assert rates == [1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 1.25e-4]


# --- views together -------------------------------------------------------------------------------


def test_views_agree_better_together():
    """Two cameras side by side before a wall, of which one is brighter."""
    K = torch.tensor([[80.0, 0, W / 2], [0, 80.0, H / 2], [0, 0, 1]]).repeat(2, 1, 1)
    T = torch.eye(4).repeat(2, 1, 1)
    T[1, 0, 3] = -0.1  # 4 pixels at 2 m
    rig = Rig(K, T, W, H)
    wide = scenery(W + 4, H)
    clean = torch.stack([wide[:, :, :W], wide[:, :, 4:]])[:, None].repeat(1, 4, 1, 1, 1)
    depth = torch.full((2, 4, H, W), 2.0)
    noise = 0.04 * torch.randn(clean.shape, generator=seeded(13))
    bad = (clean * torch.tensor([1.0, 1.15]).view(2, 1, 1, 1, 1) + noise).clamp(0, 1)
    alone = ImplicitFit(bad, QUICK).render()
    together = ImplicitFit(bad, QUICK, depth=depth, rig=rig).render()
    one, two = (metrics.cross_view_consistency(f, depth, rig).rmse for f in (alone, together))
    assert two < 0.4 * one
    assert (together.std((3, 4)) > 0.9 * clean.std((3, 4))).all(), "not by blurring"


def two_tinted(everywhere: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two views of a grey performer before a backdrop [V, F, 3, H, W], depth and casts."""
    depth = torch.zeros(2, 3, H, W)
    depth[:, :, 10:30, 20:44] = 2.0
    casts = torch.tensor([[-0.1] * 3, [0.1] * 3])
    tinted = 0.5 * casts.exp().view(2, 1, 3, 1, 1) - 0.1
    where = (depth[:, :, None] > 0) | everywhere
    return torch.where(where, tinted, torch.tensor(0.4)).expand(2, 3, 3, H, W), depth, casts


def test_backgrounds_keep_their_colours_when_views_agree():
    """Only the performer, the middle of the picture, is darker or brighter."""
    tinted, depth, casts = two_tinted(False)
    out = without_casts(tinted, casts, depth)
    assert (out[..., 11:29, 21:43] - 0.4).abs().max() < 2e-3
    away = out.clone()
    away[..., 4:36, 14:50] = 0.4
    assert (away - 0.4).abs().max() < 1e-4


def test_a_backdrop_that_is_tinted_like_the_performer_loses_its_cast_too():
    tinted, depth, casts = two_tinted(True)
    torch.testing.assert_close(
        without_casts(tinted, casts, depth), torch.full_like(tinted, 0.4), atol=1e-5, rtol=0
    )
