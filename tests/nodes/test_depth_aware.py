"""Depth-Aware Rendering in the real ComfyUI, on a tiny random Wan."""

import math

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.feature_mesh import carried, middle_view
from turnaround.models.latent_completion import OWN_NOISE
from turnaround.models.subject import Shape, Subject, SubjectNet, pictures_of
from turnaround.models.unseen import STRENGTH, TINT
from turnaround.models.views import Views
from turnaround.nodes import depth_aware, patch, patch_subject, windows
from turnaround.nodes.apply_subject import apply_subject
from turnaround.nodes.patch_subject import KEY as SUBJECT

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT, V, H, W = 4096, 3, 64, 48
h, w = H // 8, W // 8
ANCHOR = 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


RIG = orbit_rig(torch.tensor([-0.5, 0.0, 0.5]), torch.full((V,), 0.1), 3.0, 0.7, W, H)


@pytest.fixture
def subject() -> Subject:
    """Of random weights, for the tiny Wan."""
    with torch.inference_mode(False):
        pictures = pictures_of(
            draw(V, 3, H, W).sigmoid(), torch.ones(V, H, W), draw(V, 16, 1, h, w, seed=1), RIG
        )
        net = SubjectNet(Shape(128, (0, 1), 16, 0.4))
        with torch.no_grad():
            for n, p in enumerate(net.parameters()):
                p.add_(0.05 * draw(*p.shape, seed=n))
        return Subject(net, pictures, ())


def wall(rig: Rig = RIG, frames: int = 1) -> Views:
    """A ball of radius 0.5 in the middle, as every camera sees it: metres, 0 beside it."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(rig.K[0]).T
    square, along = rays.square().sum(-1), 3.0 * rays[..., 2]
    root = along**2 - square * (9 - 0.25)
    depth = torch.where(root > 0, (along - root.clamp(min=0).sqrt()) / square, 0.0)
    return Views(depth.expand(len(rig), frames, 1, H, W), None, rig)


def node(model, depth=None, rig=RIG, anchor=ANCHOR, carry="picture", share=1.0, completion=0.0,
         seed=0, colors=None):  # fmt: skip
    return depth_aware.DepthAwareRendering.execute(
        model, rig, depth or wall(), anchor, carry, share, completion, seed, colors
    ).args


def patched(*args, **settings):
    return node(*args, **settings)[0]


def wrapper_of(model) -> depth_aware.DepthAware:
    return model.get_wrappers(WrappersMP.PREDICT_NOISE, depth_aware.KEY)[0]


def sample(model, frames=1, cfg=1.0, steps=2, sampler="euler", layout="items") -> Tensor:
    start = draw(V, 16, frames, h, w, seed=7)
    told = [draw(V, 32, frames, h, w, seed=3)]
    if layout == "frames":
        start = rearrange(start, "v c 1 h w -> 1 c v h w")
        told = [rearrange(told[0], "v c 1 h w -> 1 c v h w")]
    positive, negative = (
        [[draw(1, 4, TEXT, seed=s), {"concat_latent_image": told[0]}]] for s in (20, 30)
    )
    return comfy.sample.sample(
        model, start, steps, cfg, sampler, "simple", positive, negative, torch.zeros_like(start),
        seed=0, disable_pbar=True,
    )  # fmt: skip


def refusal(call) -> str:
    """The sentence with which a call refuses its inputs."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


def by_hand(views: Tensor, rig: Rig = RIG, grid=(h, w)) -> Tensor:  # [V, c, T, h, w]
    """What the anchor shows in the others, cell by cell."""
    depth = wall(rig, views.shape[2]).frames[ANCHOR, :, 0]
    there = carried(depth, rig, ANCHOR, grid)
    rows, out = there.shares.to_dense(), views.clone()
    for n, (v, t, y, x) in enumerate(there.seen.nonzero().tolist()):
        if v != ANCHOR:
            own = rearrange(views[ANCHOR], "c t h w -> (t h w) c")
            out[v, :, t, y, x] = rows[n] @ own
    assert there.seen.any() and not there.seen.all()
    return out


# --- the picture that is being made ---------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "sync", "windows"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_what_the_last_step_predicts_is_carried(wan, sync, form, cfg):
    """Of one step from pure noise, the result is the prediction."""
    base = patch.apply_view_sync(wan, sync) if form == "sync" else wan
    if form == "windows":
        given = {"view_overlap": 0, "frames_per_window": 0, "frame_overlap": 4, "views_at_once": 0}
        base = windows.ViewWindows.execute(wan, rig=None, views_per_group=2, **given).args[0]
    made = sample(patched(base), cfg=cfg, steps=1)
    torch.testing.assert_close(made, by_hand(sample(base, cfg=cfg, steps=1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("carry", ["picture", "subject", "both"])
@pytest.mark.parametrize("completion", [0.0, 1.0])
def test_latent_frames_as_views_are_treated_as_batch_items(carry, completion):
    """Whatever the model predicts, in either layout, step after step."""

    def predictions(layout: str) -> list[Tensor]:
        model = depth_aware.DepthAware(
            wall().frames[ANCHOR, :, 0], RIG, ANCHOR, depth_aware.CARRY[carry], 0.0,
            0.0 if completion else math.inf, 5, False,
        )  # fmt: skip
        found = []

        def turned(x: Tensor) -> Tensor:
            return x if layout == "items" else rearrange(x, "v c 1 h w -> 1 c v h w")

        class Executor:
            class class_obj:
                class inner_model:
                    class model_sampling:
                        @staticmethod
                        def noise_scaling(sigma, noise, x0):
                            return sigma * noise + (1 - sigma) * x0

            def __call__(self, x, sigma, options, seed):
                views = model.as_views(x)
                told = options.get("transformer_options", {}).get(patch_subject.CARRIED, ())
                assert [c.seen.shape for c in told] == (
                    [(V, 1, h // 2, w // 2)] if carry != "picture" else []
                )
                return model.like(views.cumsum(2).sin(), x)

        for n, sigma in enumerate((1.0, 0.7, 0.4)):
            x = turned(draw(V, 16, 1, h, w, seed=n))
            found.append(model.as_views(model(Executor(), x, torch.tensor([sigma]), {}, 0)))
        return found

    for a, b in zip(predictions("items"), predictions("frames"), strict=True):
        assert torch.equal(a, b)


def test_latent_frames_as_views_are_sampled(wan):
    made = sample(patched(wan), layout="frames", steps=1)
    plain = rearrange(sample(wan, layout="frames", steps=1), "1 c v h w -> v c 1 h w")
    expected = rearrange(by_hand(plain), "v c 1 h w -> 1 c v h w")
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_every_latent_frame_has_the_depth_of_its_moment(wan):
    """Depth of 5 frames for 2 latent frames: the first, and the second of the four after it."""
    depth = wall(frames=5).frames.clone()
    depth[:, [1, 3, 4]] = 0  # no surface at all: would show if they were taken
    depth[:, 0, :, : H // 2] = 0
    model = patched(wan, Views(depth, None, RIG))
    sample(model, frames=2, steps=1)
    (there,) = wrapper_of(model).found.values()
    assert there.seen.shape == (V, 2, h, w)
    assert not there.seen[ANCHOR, 0, : h // 2].any() and there.seen[ANCHOR, 0].any()
    assert there.seen[ANCHOR, 1, : h // 2].any()
    one = patched(wan)
    sample(one, frames=2, steps=1)
    (there,) = wrapper_of(one).found.values()
    assert torch.equal(there.seen[:, 0], there.seen[:, 1])


def test_frames_as_batch_items_are_grouped_by_view():
    """Stable Video Diffusion's latents."""
    model = depth_aware.DepthAware(
        wall(frames=2).frames[ANCHOR, :, 0], RIG, ANCHOR, (False, True), 0.0, math.inf, 0, True
    )
    x = draw(V * 2, 4, h, w)
    views = model.as_views(x)
    assert torch.equal(views[1, :, 1], x[3]) and torch.equal(model.like(views, x), x)
    torch.testing.assert_close(model._carried(views), by_hand(views), atol=1e-5, rtol=1e-5)


# --- the subject's features -----------------------------------------------------------------------


def test_the_subjects_features_are_carried_before_they_are_injected(wan, subject):
    """What the blocks are given is, where the anchor's surface is seen, what the anchor's field has
    there; one token after another."""
    given = {}

    def note(executor, *args, **kwargs):
        given[name] = args[5][f"{SUBJECT}_0"].rendered
        return executor(*args, **kwargs)

    for name in ("plain", "carried", "picture"):
        model = apply_subject(wan, subject, RIG)
        if name != "plain":
            model = patched(model, carry="subject" if name == "carried" else "picture")
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
        sample(model, steps=1)
    for i, tokens in given["plain"].items():
        assert torch.equal(given["picture"][i], tokens)
        maps = rearrange(tokens, "v (h w) c -> v c 1 h w", h=h // 2)
        expected = rearrange(by_hand(maps, grid=(h // 2, w // 2)), "v c 1 h w -> v 1 (h w) c")
        torch.testing.assert_close(given["carried"][i], expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(expected[:, 0], tokens)


@pytest.mark.parametrize("frames", [1, 2])
def test_order_with_apply_subject_and_view_sync_does_not_matter(wan, subject, sync, frames):
    results = []
    steps = {
        "sync": lambda m: patch.apply_view_sync(m, sync),
        "subject": lambda m: apply_subject(m, subject, RIG),
        "depth": lambda m: patched(m, carry="both", completion=0.8),
    }
    for order in (("sync", "subject", "depth"), ("depth", "subject", "sync"),
                  ("subject", "depth", "sync")):  # fmt: skip
        model = wan
        for name in order:
            model = steps[name](model)
        results.append(sample(model, frames=frames, cfg=2.0, steps=3))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert results[0].isfinite().all()


def test_views_in_windows_get_the_carried_features_of_their_cameras(wan, subject):
    """Two latent frames in windows of one, views in groups of two: as all together."""
    given = {"view_overlap": 0, "views_per_group": 2, "frame_overlap": 0, "views_at_once": 0}
    model = patched(apply_subject(wan, subject, RIG), carry="subject")
    seen = {}

    def note(executor, *args, **kwargs):
        tile = args[5].get(patch.TILE)
        found = args[5][f"{SUBJECT}_0"].rendered[0]
        seen[None if tile is None else (tuple(tile["views"]), tuple(tile["frames"]))] = found
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    sample(model, frames=2, steps=1)
    windowed = windows.ViewWindows.execute(model, rig=None, frames_per_window=1, **given).args[0]
    sample(windowed, frames=2, steps=1)
    whole = seen.pop(None)
    assert len(seen) == 4 and whole.shape[:2] == (V, 2)
    for (views, frames), part in seen.items():
        assert torch.equal(part, whole[list(views)][:, list(frames)])


# --- completion -----------------------------------------------------------------------------------


def test_completion_shows_the_model_what_it_predicted_noised_anew(wan):
    """In the newly visible region alone, from the second step on, until its share ends."""
    model = patched(wan, share=0.0, completion=0.5, seed=9).clone()
    shown, predicted = [], []

    def note(executor, x, sigma, *args, **kwargs):
        out = executor(x, sigma, *args, **kwargs)
        shown.append((x.clone(), float(sigma.flatten()[0])))
        predicted.append(out.clone())
        return out

    class Fixed(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra, callback, noise, *_, **__):
            for n, sigma in enumerate(sigmas[:-1]):
                x = draw(V, 16, 1, h, w, seed=50 + n)
                wrap(x, sigma.expand(V), model_options=extra["model_options"], seed=0)
            return noise

    # Added later, so it stands inside and sees what the model is shown.
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "note", note)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[draw(1, 4, TEXT), {}]], [])
    for _ in range(2):  # a second sampling begins anew
        shown.clear(), predicted.clear()
        start = torch.zeros(V, 16, 1, h, w)
        guider.sample(start, start, Fixed(), sigmas, seed=0, disable_pbar=True)
        fresh = torch.Generator().manual_seed(9 + OWN_NOISE)
        new = carried(wall().frames[ANCHOR, :, 0], RIG, ANCHOR, (h, w)).newly_visible()[:, None]
        assert new.any() and not new[ANCHOR].any()
        for n, (x, sigma) in enumerate(shown):
            expected = draw(V, 16, 1, h, w, seed=50 + n)
            if n == 1:
                noise = torch.randn(expected.shape, generator=fresh)
                level = torch.tensor(sigma)
                told = level * noise + (1 - level) * predicted[0]
                expected = torch.where(new, told, expected)
                assert not torch.equal(expected, draw(V, 16, 1, h, w, seed=51))
            torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-6)


def test_completions_seed_counts(wan):
    results = [sample(patched(wan, share=0.0, completion=0.9, seed=s), steps=4) for s in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "heun"])
def test_every_kind_of_sampler_gives_the_same_twice(wan, sampler):
    model = patched(wan, completion=0.5)
    results = [sample(model, steps=3, sampler=sampler) for _ in range(2)]
    assert torch.equal(*results) and results[0].isfinite().all()


# --- off, and bad input ---------------------------------------------------------------------------


def test_off_is_the_model_itself(wan):
    model, pictures, note = node(wan, share=0.0, completion=0.0)
    assert model is wan and "share and completion are 0" in note
    assert pictures.shape == (V, H, W, 3)
    model, _, note = node(wan, wall(RIG.select([1])), RIG.select([1]), anchor=-1)
    assert model is wan and "no other" in note


def test_in_its_share_of_the_steps_alone(wan):
    plain = sample(wan, steps=4)
    first = patched(wan, share=0.01)
    assert not torch.equal(sample(first, steps=4), plain)
    calls = []
    model = patched(wan, share=0.5)
    wrapper = wrapper_of(model)
    carry = wrapper._carried
    wrapper._carried = lambda x0: calls.append(1) or carry(x0)
    sample(model, steps=4)
    assert len(calls) == 2


def test_the_given_model_stays_as_it_was(wan):
    before = sample(wan)
    patched(wan, completion=0.5)
    assert torch.equal(sample(wan), before)


def test_what_does_not_belong_together_is_said(wan):
    colors = Views(torch.zeros(V, 1, 3, H, W), None, RIG)
    assert "'depth' holds colors" in refusal(lambda: node(wan, colors))
    assert "'colors' holds depth" in refusal(lambda: node(wan, colors=wall()))
    assert "'depth' has 2 views" in refusal(lambda: node(wan, wall(RIG.select([0, 1]))))
    assert "'anchor' is view 3" in refusal(lambda: node(wan, anchor=3))
    assert "nothing above 0" in refusal(lambda: node(wan, Views(torch.zeros(V, 1, 1, H, W))))
    assert "another shape" in refusal(lambda: node(wan, Views(torch.ones(V, 1, 1, W, H))))
    rig = orbit_rig(torch.arange(4) * 0.3, torch.zeros(4), 3.0, 0.7, W, H)
    text = refusal(lambda: sample(patched(wan, wall(rig), rig)))
    assert "has 4 cameras, but the latent brings shape [3, 16, 1, 8, 6]" in text
    text = refusal(lambda: sample(patched(wan, wall(frames=9)), frames=2))
    assert "2 latent frames, but 'depth' of Depth-Aware Rendering has 9 frames, which are 3" in text
    wide = orbit_rig(torch.arange(3) * 0.3, torch.zeros(3), 3.0, 0.7, 2 * W, H)
    depth = Views(torch.ones(V, 1, 1, H, 2 * W), None, wide)
    assert "another shape" in refusal(lambda: sample(patched(wan, depth, wide)))


def test_depth_of_the_anchor_alone_and_of_another_size(wan):
    whole, alone = node(wan)[1], node(wan, Views(wall().frames[[ANCHOR]]))[1]
    assert torch.equal(whole, alone)
    finer = torch.nn.functional.interpolate(wall().frames[:, 0], scale_factor=2)[:, None]
    assert (node(wan, Views(finer))[1] - whole).abs().mean() < 0.05


def test_cancelling_is_obeyed(wan):
    model = patched(wan)
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(model)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert wrapper_of(model).completion is None


def test_the_picture_shows_what_is_carried_and_what_is_new(wan):
    """The anchor's colors where its surface is seen; orange over what is newly visible; the anchor as
    it is."""
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(V, 1, 3, H, W)
    _, pictures, note = node(wan, colors=Views(red.contiguous(), None, RIG))
    torch.testing.assert_close(pictures[ANCHOR], red[0, 0].movedim(0, -1))
    size = H // 16, W // 16
    there = carried(wall().frames[ANCHOR, :, 0], RIG, ANCHOR, size)
    new = there.newly_visible()[:, 0].repeat_interleave(16, 1).repeat_interleave(16, 2)
    orange = torch.tensor(TINT) / 255
    grey_and_orange = 0.5 + STRENGTH * (orange - 0.5)
    assert new.any() and (~new[0]).any()
    corner = pictures[0, 0, 0]
    assert new[0, 0, 0]
    torch.testing.assert_close(corner, grey_and_orange, atol=1e-4, rtol=0)
    middle = pictures[0, H // 2, W // 2]
    torch.testing.assert_close(middle, torch.tensor([1.0, 0.0, 0.0]), atol=1e-4, rtol=0)
    assert "of the other views it tells" in note


def test_the_middle_view_is_the_anchor(wan):
    assert depth_aware.anchor_of(RIG, -1) == middle_view(RIG) == ANCHOR
    assert torch.equal(node(wan, anchor=-1)[1], node(wan, anchor=ANCHOR)[1])
