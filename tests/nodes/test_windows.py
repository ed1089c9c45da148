"""View Windows in the real ComfyUI, on tiny random Wans: against runs by hand, and beside others."""

import logging
import math
import weakref

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.wan import model as wan_models
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from turnaround.models.cameras import orbit_angles, orbit_rig
from turnaround.models.view_windows import STREAM_COPIES, SYNC_COPIES, Plan
from turnaround.nodes import patch, windows

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, BLOCKS = 128, 2
"""Of the tiny Wan in conftest.py."""
VIEWS, FRAMES, H, W = 5, 4, 2, 4
STEPS = 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(seed: int, views: list[int], frames: slice) -> list:
    """A text and two conditions for every view."""
    text, latents = draw(VIEWS, 4, 4096, seed=seed), draw(VIEWS, 32, FRAMES, H, W, seed=seed + 1)
    return [[text[views], {"concat_latent_image": latents[views][:, :, frames]}]]


def sample(
    model, views=range(VIEWS), frames=slice(None), cfg=1.0, steps=STEPS, sampler="euler"
) -> Tensor:
    views = list(views)
    noise = draw(VIEWS, 16, FRAMES, H, W, seed=7)[views][:, :, frames]
    positive, negative = (conditioning(s, views, frames) for s in (20, 30))
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive, negative, torch.zeros_like(noise),
        seed=0, disable_pbar=True,
    )  # fmt: skip


def ring(views: int, span: float = 2 * math.pi):
    return orbit_rig(*orbit_angles(views, 0.0, span, 0.0), 3.0, 0.6, 16, 16)


def node(model, rig=None, **settings):
    """(model, note) of the node."""
    given = {
        "views_per_group": 0, "view_overlap": 1, "frames_per_window": 0, "frame_overlap": 4,
        "views_at_once": 0, **settings,
    }  # fmt: skip
    return windows.ViewWindows.execute(model, rig=rig, **given).args


def windowed(model, rig=None, **settings):
    return node(model, rig, **settings)[0]


def refusal(call) -> str:
    """The sentence with which a call refuses its inputs."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


class Spy:
    """Another pack's wrapper: notes what passes."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        self.calls.append({"args": args, "kwargs": kwargs, "out": out})
        return out

    def tiles(self) -> list[dict]:
        return [c["args"][5][patch.TILE] for c in self.calls]


def spied(model, kind=WrappersMP.APPLY_MODEL):
    spy, model = Spy(), model.clone()
    model.add_wrapper_with_key(kind, f"spy_{id(spy)}", spy)
    return model, spy


def synced(wan, sync, trained: bool):
    return patch.apply_view_sync(wan, sync if trained else None)


# --- equalities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "trained", "free"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_tile_is_the_model_to_the_bit(wan, sync, form, cfg):
    model = wan if form == "plain" else synced(wan, sync, form == "trained")
    whole = windowed(model, ring(VIEWS), views_per_group=VIEWS, frames_per_window=13)
    assert torch.equal(sample(whole, cfg=cfg, steps=2), sample(model, cfg=cfg, steps=2))


@pytest.mark.parametrize("settings", [
    {"views_per_group": 2, "view_overlap": 1}, {"views_per_group": 3, "view_overlap": 0},
    {"views_at_once": 1}, {"views_at_once": 2}, {"views_per_group": 4, "views_at_once": 3},
])  # fmt: skip
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_without_view_sync_views_are_independent_whatever_the_groups(wan, settings, cfg):
    model, spy = spied(windowed(wan, **settings))
    result = sample(model, cfg=cfg, steps=2)
    # Guidance enlarges the rounding.
    torch.testing.assert_close(result, sample(wan, cfg=cfg, steps=2), atol=3e-5, rtol=1e-5)
    most = min(v for k, v in settings.items() if k != "view_overlap")
    seen = [t["views"] for t in spy.tiles()]
    # Every view once a step, so that nothing is done twice.
    assert max(map(len, seen)) == most and sum(map(len, seen)) == 2 * VIEWS


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("trained", [True, False])
def test_views_at_once_change_nothing(wan, sync, trained, at_once):
    model = synced(wan, sync, trained)
    result = sample(windowed(model, views_at_once=at_once), steps=2)
    torch.testing.assert_close(result, sample(model, steps=2), atol=1e-5, rtol=1e-5)


def test_views_at_once_reach_the_blocks(wan, sync):
    seen = []
    hook = wan.model.diffusion_model.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    try:
        sample(windowed(patch.apply_view_sync(wan, sync), views_at_once=2), steps=1, cfg=3.0)
    finally:
        hook.remove()
    assert seen == [4, 4, 2]  # of both conditionings


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("settings", [
    {"views_per_group": 3}, {"views_per_group": 3, "frames_per_window": 9, "frame_overlap": 4},
])  # fmt: skip
def test_positive_and_negative_in_one_batch_equal_two_runs(wan, sync, trained, settings):
    model, spy = spied(windowed(synced(wan, sync, trained), ring(VIEWS), **settings))
    together = sample(model, cfg=3.0, steps=3)
    assert {len(c["args"][0]) for c in spy.calls} == {2 * settings["views_per_group"]}
    spy.calls.clear()

    def one_by_one(args: dict) -> list[Tensor]:
        rest = (args["input"], args["sigma"], args["model_options"])
        return [comfy.samplers.calc_cond_batch(args["model"], [c], *rest)[0] for c in args["conds"]]

    model.model_options["sampler_calc_cond_batch_function"] = one_by_one
    separate = sample(model, cfg=3.0, steps=3)
    assert {len(c["args"][0]) for c in spy.calls} == {settings["views_per_group"]}
    torch.testing.assert_close(together, separate, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "dpm_2", "uni_pc"])
def test_same_seed_same_result_with_every_kind_of_sampler(wan, sync, sampler):
    model = windowed(patch.apply_view_sync(wan, sync), views_per_group=3)
    results = [sample(model, sampler=sampler, steps=3) for _ in range(2)]
    assert torch.equal(*results) and results[0].isfinite().all()


# --- the join -------------------------------------------------------------------------------------


def joined(parts: list[tuple[list[int], Tensor]], length: int) -> Tensor:
    """Neighbouring parts of axis 0, each mixed with the next by a linear ramp (float64)."""
    total = torch.zeros(length, *parts[0][1].shape[1:], dtype=torch.float64)
    for n, (items, part) in enumerate(parts):
        shared = [len({*items} & {*parts[m % len(parts)][0]}) for m in (n - 1, n + 1)]
        if items[0] == 0 and parts[-1][0][-1] == length - 1:
            shared[0] = 0
        if items[-1] == length - 1 and parts[0][0][0] == 0:
            shared[1] = 0
        for i, item in enumerate(items):
            rise, fall = (i + 1) / (shared[0] + 1), (len(items) - i) / (shared[1] + 1)
            total[item] += min(1.0, rise, fall) * part[i].double()
    return total


@pytest.mark.parametrize("trained", [True, False])
def test_windows_in_time_are_joined_by_linear_ramps(wan, sync, trained):
    model = synced(wan, sync, trained)
    # 9 pictures are 3 latent frames, of which 4 pictures, or 2 frames, are shared.
    result = sample(windowed(model, frames_per_window=9, frame_overlap=8), steps=1)
    parts = [
        (list(range(a, a + 3)), sample(model, frames=slice(a, a + 3), steps=1).movedim(2, 0))
        for a in (0, 1)
    ]
    expected = joined(parts, FRAMES).movedim(0, 2)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result, sample(model, steps=1), atol=1e-2)


@pytest.mark.parametrize("trained", [True, False])
def test_groups_on_an_arc_are_joined_by_linear_ramps(wan, sync, trained):
    model = synced(wan, sync, trained)
    result = sample(windowed(model, ring(VIEWS, math.pi), views_per_group=3), steps=1)
    groups = [[0, 1, 2], [2, 3, 4]]
    parts = [(group, sample(model, views=group, steps=1)) for group in groups]
    expected = joined(parts, VIEWS)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result, sample(model, steps=1), atol=1e-3)


def test_every_call_is_the_weighted_sum_of_its_tiles(wan, sync):
    """At every step, groups on the move and windows: what comes out is what the tiles gave."""
    outside, outer = spied(patch.apply_view_sync(wan, sync))
    settings = {"views_per_group": 3, "frames_per_window": 9, "frame_overlap": 4}
    model, inner = spied(windowed(outside, ring(VIEWS), **settings))
    sample(model, cfg=2.0)
    plan, tiles = Plan(3, 1, 3, 1, tuple(range(VIEWS))), iter(inner.calls)
    for step, call in enumerate(outer.calls):
        x, expected = call["args"][0], torch.zeros(call["out"].shape, dtype=torch.float64)
        for group in plan.groups(VIEWS, step, STEPS):
            for window in plan.windows(FRAMES):
                tile = next(tiles)
                rows = [c * VIEWS + v for c in (0, 1) for v in group.items]
                cells = torch.meshgrid(*map(torch.tensor, (rows, window.items)), indexing="ij")
                assert torch.equal(tile["args"][0].movedim(2, 1), x.movedim(2, 1)[tuple(cells)])
                weights = torch.outer(group.weights.repeat(2), window.weights).double()
                part = tile["out"].double().movedim(2, 1) * weights[..., None, None, None]
                expected.movedim(2, 1)[tuple(cells)] += part
        torch.testing.assert_close(call["out"].double(), expected, atol=1e-5, rtol=1e-5)
    assert next(tiles, None) is None


# --- who is with whom -----------------------------------------------------------------------------


def groups_of_run(model, **kwargs) -> dict[float, list[list[int]]]:
    """The groups at every noise level."""
    model, spy = spied(model)
    sample(model, **kwargs)
    seen: dict[float, list[list[int]]] = {}
    for call in spy.calls:
        groups = seen.setdefault(float(call["args"][1][0]), [])
        group = call["args"][5][patch.TILE]["views"]
        groups += [group] if group not in groups else []
    return seen


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_groups_move_on_while_noise_is_high_and_stand_still_in_the_end(wan, sync, sampler):
    model = windowed(patch.apply_view_sync(wan, sync), ring(VIEWS), views_per_group=3)
    at_sigma = groups_of_run(model, steps=10, sampler=sampler)
    assert len(at_sigma) == 10 and list(at_sigma) == sorted(at_sigma, reverse=True)
    for step, groups in enumerate(at_sigma.values()):
        first = step if step < 8 else 0
        expected = [[(first + a + j) % VIEWS for j in range(3)] for a in (0, 1, 3)]
        assert groups == expected
        assert {v for group in groups for v in group} == set(range(VIEWS))


def test_calls_between_steps_stay_with_the_groups_of_their_step(wan, sync):
    model = windowed(patch.apply_view_sync(wan, sync), ring(VIEWS), views_per_group=3)
    at_sigma = groups_of_run(model, steps=4, sampler="dpm_2")
    sigmas = list(at_sigma)
    assert len(sigmas) > 4
    # From the second on, every step asks at its beginning and halfway.
    assert at_sigma[sigmas[0]] == at_sigma[sigmas[1]] != at_sigma[sigmas[2]]
    assert at_sigma[sigmas[2]] == at_sigma[sigmas[3]]


def test_groups_are_neighbours_by_azimuth_in_whatever_order_the_batch_is(wan, sync):
    mixed = [3, 0, 4, 1, 2]
    model = windowed(patch.apply_view_sync(wan, sync), ring(VIEWS).select(mixed), views_per_group=2)
    for groups in groups_of_run(model).values():
        for a, b in groups:
            assert (mixed[b] - mixed[a]) % VIEWS == 1


def test_rest_of_the_run_is_told_which_part_it_holds(wan, sync):
    model, spy = spied(
        windowed(patch.apply_view_sync(wan, sync), views_per_group=3, frames_per_window=9)
    )
    sample(model, steps=1)
    assert spy.tiles()[0] == {
        "views": [0, 1, 2], "frames": [0, 1, 2], "of_views": VIEWS, "of_frames": FRAMES,
    }  # fmt: skip
    assert {tuple(t["frames"]) for t in spy.tiles()} == {(0, 1, 2), (1, 2, 3)}
    assert {len(c["args"][5]["sigmas"]) for c in spy.calls} == {3}


@pytest.mark.parametrize("trained", [True, False])
def test_reference_of_the_moment_is_in_every_tile(wan, sync, trained):
    reference = draw(1, 16, FRAMES, H, W, seed=40)

    def model(frames: slice):
        own = reference[:, :, frames]
        return patch.apply_view_sync(wan, sync if trained else None, reference=own)

    settings = {"views_per_group": 3, "frames_per_window": 9, "frame_overlap": 8}
    result = sample(windowed(model(slice(None)), ring(VIEWS, math.pi), **settings), steps=1)
    in_time = []
    for a in (0, 1):
        frames = slice(a, a + 3)
        groups = [(g, sample(model(frames), g, frames, steps=1)) for g in ([0, 1, 2], [2, 3, 4])]
        in_time.append((list(range(a, a + 3)), joined(groups, VIEWS).movedim(2, 0)))
    expected = joined(in_time, FRAMES).movedim(0, 2)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


# --- what other checkpoints are given -------------------------------------------------------------


def clip_vision():
    out = type("Output", (), {})()
    out.penultimate_hidden_states = draw(VIEWS, 6, 1280, seed=5)
    return out


def latents(channels: int, seed: int) -> Tensor:
    return draw(VIEWS, channels, FRAMES, H, W, seed=seed)


def picture() -> dict:
    """The first frame is known."""
    mask = torch.ones(VIEWS, 1, FRAMES, H, W)
    mask[:, :, :1] = 0
    return {"concat_latent_image": latents(16, 1), "concat_mask": mask}


KINDS = {
    "I2V": (
        {"in_dim": 36, "model_type": "i2v"},
        lambda: {**picture(), "clip_vision_output": clip_vision()},
    ),
    "VACE": (
        {"net": wan_models.VaceWanModel, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
        lambda: {"vace_frames": 2 * [latents(32, 2)], "vace_mask": 2 * [latents(64, 3)],
                 "vace_strength": [1.0, 0.5]},
    ),
    "Fun-Control": (
        {"in_dim": 48, "model_type": "i2v", "in_dim_ref_conv": 16},
        lambda: {"concat_latent_image": latents(32, 4), "clip_vision_output": clip_vision(),
                 "reference_latents": [draw(VIEWS, 16, 1, H, W)]},
    ),
    "Fun-Camera": (
        {"net": wan_models.CameraWanModel, "in_dim": 32, "model_type": "camera",
         "in_dim_control_adapter": 24},
        lambda: {"concat_latent_image": latents(16, 1), "clip_vision_output": clip_vision(),
                 "camera_conditions": draw(VIEWS, 24, FRAMES, 8 * H, 8 * W, seed=6)},
    ),
    "more frames": (
        {"in_dim": 16}, lambda: {"time_dim_concat": draw(VIEWS, 16, 3, H, W, seed=8)},
    ),
    "5B": ({"in_dim": 48, "out_dim": 48}, dict),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request, randomise):
    """(model, its latent channels, what a graph gives it)."""
    layers, given = KINDS[request.param]
    layers = {"in_dim": 16, "net": wan_models.WanModel, **layers}
    dit = layers.pop("net")(
        dim=DIM, ffn_dim=256, num_heads=1, num_layers=BLOCKS, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init, **layers,
    )  # fmt: skip
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(randomise(dit, 0))
    return model, layers.get("out_dim", 16), given


def of_part(value, views: list[int], frames: slice):
    """What a graph would give for some views and frames alone."""
    if isinstance(value, list):
        return [of_part(v, views, frames) for v in value]
    if isinstance(value, Tensor):
        value = value[views]
        return value[:, :, frames] if value.ndim == 5 and value.shape[2] == FRAMES else value
    if hasattr(value, "penultimate_hidden_states"):
        out = type(value)()
        out.penultimate_hidden_states = value.penultimate_hidden_states[views]
        return out
    return value


def sample_kind(kind, model, views=range(VIEWS), frames=slice(None)) -> Tensor:
    """One step, the first frame kept (5B: told to the model as a mask)."""
    _, channels, given = kind
    views = list(views)

    def own(value):
        return of_part(value, views, frames)

    values = {key: own(value) for key, value in given().items()}
    positive, negative = ([[own(draw(VIEWS, 4, 4096, seed=s)), dict(values)]] for s in (8, 9))
    mask = torch.ones(VIEWS, 1, FRAMES, H, W)
    mask[:, :, :1] = 0
    return comfy.sample.sample(
        model, own(draw(VIEWS, channels, FRAMES, H, W, seed=7)), 1, 2.0, "euler", "simple",
        positive, negative, own(draw(VIEWS, channels, FRAMES, H, W, seed=11)),
        noise_mask=own(mask), seed=0, disable_pbar=True,
    )  # fmt: skip


@pytest.mark.parametrize("trained", [True, False])
def test_everything_the_model_is_given_is_divided_with_the_latent(kind, sync, trained):
    model = synced(kind[0], sync, trained)
    settings = {"views_per_group": 3, "frames_per_window": 9, "frame_overlap": 8}
    result = sample_kind(kind, windowed(model, ring(VIEWS, math.pi), **settings))
    in_time = []
    for a in (0, 1):
        frames = slice(a, a + 3)
        groups = [(g, sample_kind(kind, model, g, frames)) for g in ([0, 1, 2], [2, 3, 4])]
        in_time.append((list(range(a, a + 3)), joined(groups, VIEWS).movedim(2, 0)))
    expected = joined(in_time, FRAMES).movedim(0, 2)
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=1e-4)
    assert (result - sample_kind(kind, model)).abs().max() > 1e-3


def test_checkpoints_without_view_sync_give_the_plain_result(kind):
    result = sample_kind(kind, windowed(kind[0], views_per_group=2))
    torch.testing.assert_close(result, sample_kind(kind, kind[0]), atol=1e-5, rtol=1e-5)


def test_lists_and_dicts_are_divided_too(wan, sync):
    """As newer ComfyUIs give clips in context, and ControlNets their layers."""
    given = draw(VIEWS, 8, seed=3)

    def guided(executor, *args, **kwargs):
        return executor(*args[:4], {"output": [given, None]}, *args[5:], context_latents=[given])

    model = patch.apply_view_sync(wan, sync)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "guide", guided)
    model, spy = spied(windowed(model, views_per_group=3))
    sample(model, steps=1)
    for call, tile in zip(spy.calls, spy.tiles(), strict=True):
        expected = given[tile["views"]]
        assert torch.equal(call["args"][4]["output"][0], expected)
        assert torch.equal(call["kwargs"]["context_latents"][0], expected)


def test_guides_that_do_not_run_with_the_latent_are_refused_in_time_only(wan):
    """Sound, faces and poses have a length of their own."""

    def guided(executor, x, t, *args, **kwargs):
        return executor(x, t, *args, face_pixel_values=draw(len(x), 3, 13, 8, 8), **kwargs)

    model = wan.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "guide", guided)
    sample(windowed(model, views_per_group=2), steps=1)
    text = refusal(lambda: sample(windowed(model, frames_per_window=9), steps=1))
    assert "'face_pixel_values'" in text and "frames_per_window to 0" in text


# --- beside others --------------------------------------------------------------------------------


def test_original_model_is_untouched(wan):
    before = sample(wan, steps=1)
    sample(windowed(wan, views_per_group=2, views_at_once=1), steps=1)
    assert not wan.get_all_wrappers(WrappersMP.APPLY_MODEL)
    assert torch.equal(sample(wan, steps=1), before)


def test_nothing_of_a_run_stays_in_the_model(wan):
    model = windowed(wan, views_at_once=2)
    sample(model, steps=1)
    assert patch.VIEWS_AT_ONCE not in model.model_options["transformer_options"]


def test_view_sync_may_come_after_view_windows(wan, sync):
    after = patch.apply_view_sync(windowed(wan, views_per_group=3), sync)
    before = windowed(patch.apply_view_sync(wan, sync), views_per_group=3)
    assert torch.equal(sample(after, steps=2), sample(before, steps=2))


def test_wrappers_of_others_are_called_on_either_side(wan, sync):
    outside, outer = spied(patch.apply_view_sync(wan, sync))
    model, inner = spied(windowed(outside, views_per_group=3))
    sample(model, steps=1)
    assert [len(c["args"][0]) for c in outer.calls] == [VIEWS]
    assert [len(c["args"][0]) for c in inner.calls] == [3, 3, 3]


# --- progress and interruption --------------------------------------------------------------------


def counted(model, on_tile):
    model = model.clone()
    model.model_options["transformer_options"][windows.PROGRESS] = on_tile
    return model


def test_progress_counts_the_tiles_of_every_call(wan, sync):
    seen = []
    model = windowed(
        patch.apply_view_sync(wan, sync), views_per_group=3, frames_per_window=9, frame_overlap=4
    )
    sample(counted(model, lambda *counts: seen.append(counts)), steps=2)
    assert seen == 2 * [(n, 6) for n in range(1, 7)]


def test_progress_of_a_single_tile(wan):
    seen = []
    sample(counted(windowed(wan), lambda *counts: seen.append(counts)), steps=2)
    assert seen == [(1, 1), (1, 1)]


def test_cancelling_stops_before_the_next_tile(wan):
    asked, seen = [], []

    def inside(executor, *args, **kwargs):
        asked.append(args[5][patch.TILE]["views"])
        return executor(*args, **kwargs)

    def cancel(done, total):
        seen.append(done)
        if done == 2:
            comfy.model_management.interrupt_current_processing(True)

    model = counted(windowed(wan, views_per_group=1, view_overlap=0), cancel)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "inside", inside)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model)
    assert seen == [1, 2] and asked == [[0], [1]]


# --- memory ---------------------------------------------------------------------------------------


def prepared(model) -> list[int]:
    """What ComfyUI is asked to make room for."""
    model, spy = spied(model, WrappersMP.PREPARE_SAMPLING)
    sample(model, steps=1)
    return list(spy.calls[0]["args"][1])


def test_comfyui_makes_room_for_the_largest_tile(wan, sync):
    model = patch.apply_view_sync(wan, sync)
    assert prepared(windowed(model)) == [VIEWS, 16, FRAMES, H, W]
    settings = {"views_per_group": 3, "frames_per_window": 9}
    assert prepared(windowed(model, **settings)) == [3, 16, 3, H, W]
    assert prepared(windowed(wan, **settings)) == [3, 16, 3, H, W]
    assert prepared(windowed(wan, views_at_once=2)) == [2, 16, FRAMES, H, W]


def test_views_that_see_each_other_are_all_held(wan, sync):
    """One at a time in the blocks needs more than one, and less than all."""
    model = patch.apply_view_sync(wan, sync)
    assert 1 < prepared(windowed(model, views_at_once=1))[0] < VIEWS


def test_reference_counts_as_one_view_more(wan, sync):
    reference = draw(1, 16, FRAMES, H, W)
    model = patch.apply_view_sync(wan, sync, reference=reference)
    assert prepared(windowed(model))[0] == VIEWS + 1


def shown(model, caplog) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="turnaround"):
        sample(model, steps=1)
    return [m for m in caplog.messages if m.startswith("Turnaround")][-1]


def test_estimate_is_shown_before_sampling(wan, sync, caplog, monkeypatch):
    model = patch.apply_view_sync(wan, sync)
    one = windows.tile_memory(model, [1, 16, FRAMES, H, W]).item
    monkeypatch.setattr(windows, "free_room", lambda model: 10 * one)
    text = shown(windowed(model), caplog)
    whole = f"{5 * one / 1e6:.0f} MB at once, {10 * one / 1e6:.0f} MB free"
    assert f"5 views x 4 latent frames of 4x2: about {whole}" in text and "\n" not in text
    assert "at a time" not in text and "too much" not in text


def test_as_many_views_at_once_as_fit_are_chosen_and_change_nothing(wan, sync, caplog, monkeypatch):
    model = patch.apply_view_sync(wan, sync)
    memory = windows.tile_memory(model, [VIEWS, 16, FRAMES, H, W])
    for at_once in (1, 2, 3):
        room = memory.needed(at_once)
        monkeypatch.setattr(windows, "free_room", lambda model, room=room: room)
        text = shown(windowed(model), caplog)
        assert f"works on {at_once} at a time, which takes {room / 1e6:.0f} MB" in text
        result = sample(windowed(model), steps=2)
        torch.testing.assert_close(result, sample(model, steps=2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_too_little_memory_is_said(wan, sync, caplog, monkeypatch, trained):
    monkeypatch.setattr(windows, "free_room", lambda model: 0)
    text = shown(windowed(synced(wan, sync, trained)), caplog)
    assert "too much" in text and ("at a time" in text) is trained


def test_where_blocks_need_all_views_the_estimate_says_so(wan, sync, make_sync):
    """Training-free, layers on some blocks, another pack's patch before."""

    class Other:
        def __call__(self, args, extra):
            return extra["original_block"](args)

    patched = wan.clone()
    patched.set_model_patch_replace(Other(), "dit", "double_block", 1)
    assert windows.works_in_parts(patch.apply_view_sync(wan, sync))
    for model in (
        patch.apply_view_sync(wan),
        patch.apply_view_sync(wan, make_sync(blocks=[0])),
        patch.apply_view_sync(patched, sync),
    ):
        assert not windows.works_in_parts(model)
        assert prepared(windowed(model, views_at_once=1))[0] == VIEWS


def test_estimate_grows_with_views_frames_and_size(wan, sync):
    for model in (wan, patch.apply_view_sync(wan, sync), patch.apply_view_sync(wan)):
        base = [4, 16, 3, 8, 8]
        needs = windows.tile_memory(model, base)
        for axis in (0, 2, 3, 4):
            larger = [2 * n if i == axis else n for i, n in enumerate(base)]
            more = windows.tile_memory(model, larger)
            for at_once in range(1, 5):
                assert more.needed(at_once) >= needs.needed(at_once)
            assert more.needed(more.items) == 2 * needs.needed(needs.items)


def test_free_room_on_the_cpu_is_what_the_system_has(wan):
    room = windows.free_room(wan)
    total = comfy.model_management.get_total_memory(torch.device("cpu"))
    assert 0 < room <= total


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made in this context held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.held = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key) -> None:
        self.now -= self.held.pop(key, 0)


def test_estimate_covers_what_a_model_of_real_proportions_holds(randomise):
    """Copies of the tokens, of which Wan's feed-forward takes nearly six."""
    views, dim, tokens = 8, 256, 2 * 8 * 8
    dit = wan_models.WanModel(
        in_dim=16, dim=dim, ffn_dim=6 * dim, num_heads=2, num_layers=1, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    model = comfy.sd.load_diffusion_model_state_dict(randomise(dit, 0))
    layers = patch.ViewSync(dim, [0], operations=comfy.ops.manual_cast)
    layers.load_state_dict(randomise(layers, 1000))
    cpu = torch.device("cpu")
    sync = comfy.model_patcher.ModelPatcher(layers, load_device=cpu, offload_device=cpu)
    model = patch.apply_view_sync(model, sync)
    copy = tokens * dim * 4

    def peak(views: int, at_once: int) -> float:
        options = dict(model.model_options["transformer_options"])
        options |= {"wrappers": model.wrappers, "cond_or_uncond": [0]}
        options |= {patch.VIEWS_AT_ONCE: at_once}
        inputs = (draw(views, 16, 2, 16, 16), torch.ones(views), draw(views, 4, 4096))
        with LiveBytes() as live:
            model.model.diffusion_model(*inputs, transformer_options=options)
        return live.peak / copy

    item = peak(1, 1)
    memory = windows.Memory(item, 1.0, views, True, moments=2)
    for at_once in (1, 2, 4, 8):
        measured = peak(views, at_once)
        assert measured <= 1.1 * memory.needed(at_once)
    assert peak(views, 1) < 0.8 * peak(views, views)
    assert STREAM_COPIES < SYNC_COPIES < item


# --- refusals and notes ---------------------------------------------------------------------------


def test_rig_with_other_cameras_than_the_latent_is_refused_before_anything_is_loaded(wan):
    model, spy = spied(windowed(wan, ring(6), views_per_group=2), WrappersMP.PREPARE_SAMPLING)
    text = refusal(lambda: sample(model))
    assert "6 cameras" in text and "brings 5 views" in text and not spy.calls


@pytest.mark.parametrize("overlap", [3, 4])
def test_overlap_as_large_as_the_group_is_refused(wan, overlap):
    text = refusal(lambda: windowed(wan, views_per_group=3, view_overlap=overlap))
    assert "3 views" in text and f"share {overlap}" in text


@pytest.mark.parametrize("overlap", [9, 12])
def test_window_no_longer_than_the_overlap_is_refused(wan, overlap):
    text = refusal(lambda: windowed(wan, frames_per_window=9, frame_overlap=overlap))
    assert "9 pictures" in text and f"share {overlap}" in text


@pytest.mark.parametrize(("pictures", "starts"), [(0, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_overlap_in_time_is_at_least_what_was_asked(wan, pictures, starts):
    """3 pictures are no whole latent frame, so a whole one is shared."""
    model, spy = spied(windowed(wan, frames_per_window=5, frame_overlap=pictures))
    sample(model, steps=1)
    assert [t["frames"][0] for t in spy.tiles()] == starts


def test_overlaps_without_groups_and_windows_do_not_matter(wan):
    assert torch.equal(
        sample(windowed(wan, view_overlap=99, frame_overlap=99), steps=1), sample(wan, steps=1)
    )


def test_applying_twice_is_refused(wan):
    assert "already" in refusal(lambda: windowed(windowed(wan)))


def test_model_that_is_no_wan_is_refused():
    class Still(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)

    cpu = torch.device("cpu")
    still = comfy.model_patcher.ModelPatcher(Still(), load_device=cpu, offload_device=cpu)
    text = refusal(lambda: windowed(still, views_per_group=2))
    assert "not a Wan-type video model" in text and "fewer views" in text


def test_latent_of_pictures_is_refused(wan):
    noise = draw(2, 16, H, W)
    text = refusal(
        lambda: comfy.sample.sample(
            windowed(wan), noise, 1, 1.0, "euler", "simple", [[draw(1, 4, 4096), {}]],
            [[draw(1, 4, 4096), {}]], noise, seed=0, disable_pbar=True,
        )
    )  # fmt: skip
    assert "4 dimensions" in text and "video's has 5" in text


def test_note_says_what_will_be_done(wan):
    note = node(wan, ring(8), views_per_group=4, view_overlap=2, frames_per_window=32)[1]
    assert "4 groups of up to 4 views around a ring" in note
    assert "windows of 32 pictures became 33" in note and "9 latent frames" in note
    assert "along an arc" in node(wan, ring(8, math.pi), views_per_group=4)[1]
    assert node(wan)[1] == ""
