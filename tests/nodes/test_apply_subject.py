"""Apply Subject and Render Subject in the real ComfyUI, on a tiny random Wan."""

import math
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.subject import (
    Shape,
    Subject,
    SubjectNet,
    pictures_of,
)
from turnaround.models.subject_views import look, references_of
from turnaround.nodes import apply_subject, embedded, patch, windows
from turnaround.nodes.patch_subject import KEY, OFF, SubjectBlock
from turnaround.nodes.subject_files import LoadSubject, SaveSubject

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, TEXT = 128, 4096
"""Of the tiny Wan in conftest.py."""
R, V, H, W = 6, 3, 64, 48
LATENT = (16, 1, H // 8, W // 8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ring(count: int, first: float = 0.0) -> Rig:
    angles = first + torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.full((count,), 0.1), 3.0, 0.7, W, H)


RIG = ring(V, 0.3)


def learned(blocks=(0, 1), seed: int = 0) -> Subject:
    with torch.inference_mode(False):
        pictures = pictures_of(
            draw(R, 3, H, W).sigmoid(), torch.ones(R, H, W), draw(R, *LATENT, seed=1), ring(R)
        )
        net = SubjectNet(Shape(DIM, blocks, 16, 0.4))
        with torch.no_grad():
            for n, p in enumerate(net.parameters()):
                p.add_(0.05 * draw(*p.shape, seed=seed + n))
        return Subject(net, pictures, ())


@pytest.fixture
def subject():
    return learned()


def node(model, subject, rig=RIG, share=1.0, image_guidance=1.0, references=8):
    """(model, note) of Apply Subject."""
    given = {"share": share, "image_guidance": image_guidance, "references": references}
    return apply_subject.ApplySubject.execute(model, subject, rig, **given).args


def applied(*args, **settings):
    return node(*args, **settings)[0]


def conditioning(seed: int, views: int = V) -> list:
    pictures = draw(views, 32, *LATENT[1:], seed=3)
    return [[draw(1, 4, TEXT, seed=seed), {"concat_latent_image": pictures}]]


def sample(model, cfg=1.0, steps=2, positive=None, sampler="euler", **more) -> Tensor:
    start = draw(V, *LATENT, seed=7)
    return comfy.sample.sample(
        model, start, steps, cfg, sampler, "simple", positive or conditioning(20),
        conditioning(30), torch.zeros_like(start), seed=0, disable_pbar=True, **more,
    )  # fmt: skip


def refusal(call) -> str:
    """The sentence with which a call refuses its inputs."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


# --- nothing is done where nothing is asked -------------------------------------------------------


def test_share_zero_is_the_model_itself(wan, subject):
    model, note = node(wan, subject, share=0.0)
    assert model is wan and "share is 0" in note


def test_the_given_model_and_subject_stay_as_they_were(wan, subject):
    before = sample(wan)
    kept = {k: v.clone() for k, v in subject.net.state_dict().items()}
    assert not torch.equal(sample(applied(wan, subject, image_guidance=2.0)), before)
    assert torch.equal(sample(wan), before)
    assert "sampler_post_cfg_function" not in wan.model_options
    assert all(torch.equal(v, kept[k]) for k, v in subject.net.state_dict().items())


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance_one_runs_nothing_more(wan, subject, cfg):
    calls = []

    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    results = []
    for guidance in (1.0, 2.0):
        model = applied(wan, subject, image_guidance=guidance).clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
        results.append((sample(model, cfg, steps=2), len(calls)))
        calls.clear()
    assert (results[0][1], results[1][1]) == (2, 4)
    assert torch.equal(results[0][0], sample(applied(wan, subject), cfg))


# --- where it acts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "on"), [(0.5, 2), (0.75, 3), (0.8, 4), (1.0, 4), (0.01, 1)])
def test_it_acts_in_the_first_share_of_the_steps(wan, subject, share, on):
    """A step that begins where the share ends is off, for whichever table of noise levels."""
    runs = []

    def note(executor, *args, **kwargs):
        options = args[5]
        runs.append(f"{KEY}_0" in options)
        return executor(*args, **kwargs)

    for scheduler in ("simple", "sgm_uniform"):
        model = applied(wan, subject, share=share).clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
        start = draw(V, *LATENT, seed=7)
        comfy.sample.sample(
            model, start, 4, 1.0, "euler", scheduler, conditioning(20), [], start, seed=0,
            disable_pbar=True,
        )  # fmt: skip
    assert runs == 2 * ([True] * on + [False] * (4 - on))


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance_is_the_published_sum(wan, subject, cfg):
    """x_u + g_t (x_c - x_i) + g_i (x_i - x_u), of three runs by hand, in float64."""
    g, x = 3.5, draw(V, *LATENT, seed=11)
    sigma = torch.full((V,), 0.7)
    plain, with_it = wan, applied(wan, subject)

    def predicted(model, cond) -> Tensor:
        found = []

        class Once(comfy.samplers.Sampler):
            def sample(self, wrap, sigmas, extra, callback, noise, *_, **__):
                options = extra["model_options"]
                (out,) = comfy.samplers.calc_cond_batch(
                    wrap.inner_model, [wrap.conds["positive"]], x, sigma, options
                )
                found.append(out.double())
                return noise

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(cond, [])
        guider.sample(x, torch.zeros_like(x), Once(), torch.tensor([0.7, 0.0]), seed=0,
                      disable_pbar=True)  # fmt: skip
        return found[0]

    c, i = (predicted(with_it, conditioning(s)) for s in (20, 30))
    if cfg == 1:  # no negative is run
        i, u = c, predicted(plain, conditioning(20))
        expected = u + g * (i - u)
    else:
        u = predicted(plain, conditioning(30))
        expected = u + cfg * (c - i) + g * (i - u)

    made = []

    class Guided(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra, callback, noise, *_, **__):
            made.append(wrap(x, sigma, model_options=extra["model_options"], seed=0))
            return noise

    guider = comfy.samplers.CFGGuider(applied(wan, subject, image_guidance=g))
    guider.set_conds(conditioning(20), conditioning(30))
    guider.set_cfg(cfg)
    guider.sample(x, torch.zeros_like(x), Guided(), torch.tensor([0.7, 0.0]), seed=0,
                  disable_pbar=True)  # fmt: skip
    torch.testing.assert_close(made[0].double(), expected, atol=2e-4, rtol=1e-4)
    assert (expected - c).abs().max() > 0.05


def test_guidance_formula_on_a_recorded_model(monkeypatch):
    """Which conditioning is run once more, with what told, and how it is summed."""
    asked = []

    def calc(model, conds, x, sigma, options):
        asked.append((model, conds, options["transformer_options"][OFF]))
        return [torch.full_like(x, 2.0)]

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", calc)
    guide = apply_subject.SubjectGuidance("me", 3.5, end=0.2)
    x = torch.zeros(1, 2)
    args = {
        "denoised": x + 10, "cond": "positive", "uncond": "negative", "cond_denoised": x + 7,
        "uncond_denoised": x + 5, "model": "model", "input": x, "sigma": torch.tensor([0.5]),
        "model_options": {"transformer_options": {OFF: ("other",)}},
    }  # fmt: skip
    assert torch.equal(guide(args), x + 10 + 2.5 * (5 - 2))
    assert torch.equal(guide({**args, "uncond": None}), x + 10 + 2.5 * (7 - 2))
    assert asked == [
        ("model", ["negative"], ("other", "me")), ("model", ["positive"], ("other", "me")),
    ]  # fmt: skip
    assert torch.equal(guide({**args, "sigma": torch.tensor([0.1])}), x + 10)
    assert len(asked) == 2
    assert args["model_options"] == {"transformer_options": {OFF: ("other",)}}


def test_in_the_run_without_subject_views_still_look_at_each_other(wan, subject, sync):
    seen = []

    def note(executor, *args, **kwargs):
        options = args[5]
        seen.append((f"{KEY}_0" in options, any(k.startswith(patch.KEY) for k in options)))
        return executor(*args, **kwargs)

    model = patch.apply_view_sync(applied(wan, subject, image_guidance=2.0), sync).clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    sample(model, steps=1)
    assert seen == [(True, True), (False, True)]


# --- beside other patches -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trained", "free", "reference"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_order_with_view_sync_does_not_matter(wan, subject, sync, form, cfg):
    settings = {"sync": None if form == "free" else sync, "views": V}
    if form == "reference":
        settings |= {"reference": draw(1, *LATENT, seed=40), "reference_is_text": False}
    one = applied(patch.apply_view_sync(wan, **settings), subject, image_guidance=1.5)
    other = patch.apply_view_sync(applied(wan, subject, image_guidance=1.5), **settings)
    results = [sample(m, cfg) for m in (one, other)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(applied(wan, subject, image_guidance=1.5), cfg))


def test_view_windows_give_every_group_its_own_cameras(wan, subject):
    """Without view sync, views are independent, whatever the groups."""
    given = {"view_overlap": 0, "frames_per_window": 0, "frame_overlap": 4, "views_at_once": 0}
    whole = applied(wan, subject)
    for model in (whole, wan):
        grouped = windows.ViewWindows.execute(model, rig=None, views_per_group=2, **given).args[0]
        model = grouped if model is whole else applied(grouped, subject)
        torch.testing.assert_close(sample(model), sample(whole), atol=1e-5, rtol=1e-5)


def test_views_as_latent_frames_in_windows_get_their_cameras(wan, subject):
    """Windows of one latent frame each: every frame as if it were alone."""
    start = draw(1, 16, V, *LATENT[2:], seed=7)
    told = [[draw(1, 4, TEXT), {}]]

    def run(model, x):
        return comfy.sample.sample(
            model, x, 2, 1.0, "euler", "simple", told, [], torch.zeros_like(x), seed=0,
            disable_pbar=True,
        )  # fmt: skip

    given = {"view_overlap": 0, "views_per_group": 0, "frame_overlap": 0, "views_at_once": 0}
    model = windows.ViewWindows.execute(
        applied(wan, subject), rig=None, frames_per_window=1, **given
    ).args[0]
    together = run(model, start)
    for v in range(V):
        alone = run(applied(wan, subject, RIG.select([v])), start[:, :, v : v + 1])
        torch.testing.assert_close(together[:, :, v : v + 1], alone, atol=1e-4, rtol=1e-4)


def test_two_subjects_one_after_the_other(wan, subject):
    """Each has its own references, words, share and guidance; the second stays off where it is off."""
    other = learned(seed=100)
    both = applied(applied(wan, subject), other)
    result = sample(both)
    assert not torch.equal(result, sample(applied(wan, subject)))
    assert not torch.equal(result, sample(applied(wan, other)))
    # References of the second don't meet the first: they are those of the second alone.
    found = {}
    for name, model in (("both", both), ("alone", applied(wan, other))):
        wrapper = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)[-1]
        run = wrapper._run_references

        def recorded(*args, run=run, name=name):
            found[name] = run(*args)
            return found[name]

        wrapper._run_references = recorded
        sample(model)
    for i in found["alone"]:
        torch.testing.assert_close(found["both"][i], found["alone"][i], atol=1e-5, rtol=1e-5)
    half = applied(applied(wan, subject), other, share=0.5)
    first = applied(applied(wan, subject), other)
    assert not torch.equal(sample(half, steps=4), sample(first, steps=4))


def test_references_do_not_meet_view_sync(wan, subject, sync):
    """What the fields are given is the same beside a sync that stands around the subject."""
    found = {}
    for name, model in (("alone", wan), ("beside", patch.apply_view_sync(wan, sync))):
        model = applied(model, subject)
        wrapper = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)[-1]
        run = wrapper._run_references
        wrapper._run_references = lambda *args, run=run, name=name: found.setdefault(
            name, run(*args)
        )
        sample(model, steps=1)
    for i in found["alone"]:
        torch.testing.assert_close(found["beside"][i], found["alone"][i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "heun", "uni_pc"])
def test_every_kind_of_sampler_gives_the_same_twice(wan, subject, sampler):
    model = applied(wan, subject, image_guidance=1.5)
    results = [sample(model, 2.0, steps=3, sampler=sampler) for _ in range(2)]
    assert torch.equal(*results) and results[0].isfinite().all()


def test_another_packs_function_after_guidance_is_kept(wan, subject):
    calls = []

    def other(args):
        calls.append(1)
        return args["denoised"]

    model = wan.clone()
    model.set_model_sampler_post_cfg_function(other)
    sample(applied(model, subject, image_guidance=2.0), steps=2)
    assert len(calls) == 2


# --- references, weights, precision ---------------------------------------------------------------


def test_as_many_references_as_asked_run_through_the_model_once(wan, subject):
    items = []
    model = applied(wan, subject, references=3)
    wrapper = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)[-1]
    run = wrapper._run_references
    wrapper._run_references = lambda *args: items.append(len(wrapper.references)) or run(*args)
    sample(model, steps=3)
    assert items == [3] and wrapper.seen is None
    assert references_of(subject, 3) == [0, 1, 3]
    assert wrapper.features is None and wrapper.render.renderings is None


def test_weights_are_loaded_with_the_model(wan, subject):
    model = applied(wan, subject)
    blocks = model.model_options["transformer_options"]["patches_replace"]["dit"]
    block = blocks[("double_block", 0)]
    assert isinstance(block, SubjectBlock)
    assert block.weights in model.get_nested_additional_models() or block.weights in block.models()


def test_a_model_of_half_precision(wan_weights, subject):
    weights = {k: v.to(torch.bfloat16) for k, v in wan_weights().items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.bfloat16})
    half = sample(applied(model, subject))
    full = sample(model)
    assert half.isfinite().all() and (half - full).abs().max() > 1e-2


def test_saved_loaded_and_applied_to_the_bit(wan, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    there = ([str(tmp_path / "subjects")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, embedded.SUBJECTS, there)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for node in (SaveSubject, LoadSubject):
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="1"))
    before = sample(applied(wan, subject))
    SaveSubject.execute(subject, "subjects/a", False)
    again, _ = LoadSubject.execute("a_00001_.safetensors").args
    assert torch.equal(sample(applied(wan, again)), before)


def test_words_alone(wan):
    """A subject without fields: its words follow the text, and no references are run."""
    subject = learned(blocks=())
    ((text, told),) = conditioning(20)
    longer = [[torch.cat([text, subject.net.words[None]], 1), told]]
    assert torch.equal(sample(applied(wan, subject)), sample(wan, positive=longer))


# --- bad input ------------------------------------------------------------------------------------


def test_what_does_not_belong_together_is_said(wan, subject):
    text = refusal(lambda: sample(applied(wan, subject, ring(4))))
    assert "has 4 cameras, but 3 views" in text
    away = orbit_rig(torch.zeros(2), torch.zeros(2), 3.0, 0.7, W, H)
    moved = away.T_camera_world.clone()
    moved[:, 0, 3] += 50
    far = Rig(away.K, moved, W, H)
    assert "2 of 2 cameras" in refusal(lambda: applied(wan, subject, far))
    wide = orbit_rig(torch.arange(3.0), torch.zeros(3), 3.0, 0.7, H, W)
    assert "another shape" in refusal(lambda: sample(applied(wan, subject, wide)))
    small = Subject(SubjectNet(Shape(64, (0, 1), 16, 0.4)), subject.pictures, ())
    assert "width 64" in refusal(lambda: applied(wan, small))
    deep = Subject(SubjectNet(Shape(DIM, (0, 7), 16, 0.4)), subject.pictures, ())
    assert "at least 8 blocks" in refusal(lambda: applied(wan, deep))
    channels = pictures_of(
        draw(R, 3, H, W).sigmoid(), torch.ones(R, H, W), draw(R, 48, 1, 8, 6), ring(R)
    )
    text = refusal(lambda: applied(wan, Subject(subject.net, channels, ())))
    assert "latents of 48 channels" in text


def test_a_unet_is_refused():
    class Model:
        def get_model_object(self, name):
            return torch.nn.Linear(1, 1)

    text = refusal(lambda: apply_subject.apply_subject(Model(), learned(), RIG))
    assert "no subject can be put into it" in text


def interrupted(call) -> None:
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            call()
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_cancelling_is_obeyed(wan, subject):
    model = applied(wan, subject)
    interrupted(lambda: sample(model))
    assert model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)[-1].seen is None
    interrupted(lambda: apply_subject.RenderSubject.execute(wan, subject, RIG, "1"))


# --- look -----------------------------------------------------------------------------------------


def test_render_subject_shows_what_the_fields_see(wan, subject):
    """Of the features that the references have in this model, on the rig's size."""
    found = {}
    model = applied(wan, subject)
    wrapper = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)[-1]
    run = wrapper._run_references
    wrapper._run_references = lambda *args: found.setdefault("features", run(*args))
    sample(model, steps=1)
    features, detail = found["features"], 2
    size = H * detail // 16, W * detail // 16
    rays = RIG.resized(size[1], size[0])
    wanted = rays.K, subject.space.normalised(rays.T_camera_world)
    rgb, alpha, depth = look(subject.net, features, subject.known(), wanted, size)
    made = apply_subject.render_subject(wan, subject, RIG, detail)
    for a, b in zip(made, (rgb, alpha, depth * subject.space.scale), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    colors, metres, note = apply_subject.RenderSubject.execute(wan, subject, RIG, "2").args
    assert colors.frames.shape == (V, 1, 3, H, W) and metres.frames.shape == (V, 1, 1, H, W)
    assert colors.masks.shape == (V, 1, H, W) and colors.rig is RIG and metres.rig is RIG
    # Nearest: every depth is one that a ray has found.
    assert set(metres.frames.unique().tolist()) <= set(made[2].unique().tolist())
    torch.testing.assert_close(
        metres.frames[:, 0, 0, 4::8, 4::8], made[2], msg="8 pixels a ray, those in the middle"
    )
    assert "m away" in note or "nothing is to be seen" in note


def test_render_subject_does_not_mind_patches_for_views(wan, subject, sync):
    """The model as it is patched for sampling: with View Sync for 8 views, View Windows, a subject."""
    given = {"view_overlap": 0, "frames_per_window": 0, "frame_overlap": 4, "views_at_once": 0}
    model = patch.apply_view_sync(applied(wan, subject), sync, views=8)
    model = windows.ViewWindows.execute(model, rig=ring(8), views_per_group=2, **given).args[0]
    for a, b in zip(
        apply_subject.render_subject(model, subject, RIG, 1),
        apply_subject.render_subject(wan, subject, RIG, 1), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY), "the given model stays as it was"


def test_render_subject_without_fields_says_so(wan):
    text = refusal(lambda: apply_subject.RenderSubject.execute(wan, learned(()), RIG, "1"))
    assert "without fields" in text
