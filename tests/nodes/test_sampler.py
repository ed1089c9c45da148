"""Sampling nodes in the real ComfyUI, on a tiny random Wan: beside its own KSampler."""

import asyncio
import copy
import math

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import execution
import folder_paths
import pytest
import torch
from comfy.latent_formats import SD15, Wan21
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.geometry import SEEN, UNSEEN_SIDE
from turnaround.models.views import Views
from turnaround.nodes import sampler, windows
from turnaround.nodes.weights import UnseenOnly

import nodes as core

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS = 3
SHAPE = (16, 2, 4, 6)
"""A view's latent: channels, frames, height, width."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ring(views: int, size: int = 16):
    azimuths = torch.arange(views) * (2 * math.pi / views)
    return orbit_rig(azimuths, torch.zeros(views), 3.0, 0.6, size, size)


def conditioning(seed: int, views: list[int], shape: tuple[int, ...] = SHAPE) -> list:
    """Text, and the two conditions of some of the views."""
    latents = draw(VIEWS, 32, *shape[1:], seed=seed)[views]
    return [[draw(1, 4, 4096, seed=seed + 1), {"concat_latent_image": latents}]]


def inputs(views=range(VIEWS), **changed) -> dict:
    """What both samplers take; the noise of a view stays with the view (`batch_index`)."""
    views = list(views)
    latent = {"samples": torch.zeros(len(views), *SHAPE), "batch_index": views}
    return {
        "positive": conditioning(20, views), "negative": conditioning(30, views),
        "latent": latent, "seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
        "scheduler": "simple", "denoise": 1.0, **changed,
    }  # fmt: skip


def ours(
    model, views=range(VIEWS), sync=None, sync_strength=1.0, rig=None, visibility=None, **changed
) -> Tensor:
    """The latents of Multi-View Sampler."""
    out = sampler.MultiViewSampler.execute(
        model, **inputs(views, **changed), sync_strength=sync_strength, sync=sync, rig=rig,
        visibility=visibility,
    )  # fmt: skip
    return out.args[0]["samples"]


def native(model, views=range(VIEWS), **changed) -> Tensor:
    """The latents of ComfyUI's KSampler."""
    return core.common_ksampler(model, **inputs(views, **changed))[0]["samples"]


def view_sync(model, sync=None, rig=None, strength=1.0, start=0.0, end=1.0):
    """The node View Sync."""
    return sampler.ViewSyncNode.execute(model, strength, start, end, sync, rig).args[0]


def refusal(call) -> str:
    """The sentence with which a call refuses its inputs."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


# --- beside ComfyUI's own sampler -----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg": 3.0},
        {"steps": 3, "sampler_name": "euler_ancestral", "scheduler": "karras"},
        {"steps": 3, "sampler_name": "uni_pc", "cfg": 2.0},
        {"steps": 3, "sampler_name": "heun", "scheduler": "sgm_uniform"},
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_same_latents_as_view_sync_and_ksampler(wan, sync, trained, settings):
    weights = sync if trained else None
    result = ours(wan, sync=weights, **settings)
    assert torch.equal(result, native(view_sync(wan, weights), **settings))
    assert (result - native(wan, **settings)).abs().max() > 1e-2


def test_model_from_view_sync_keeps_its_setting(wan, sync):
    before = view_sync(wan, sync, strength=0.4)
    assert torch.equal(ours(before, sync=sync, sync_strength=1.0), native(before))


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_sync_strength_is_that_of_view_sync(wan, sync, strength):
    expected = native(view_sync(wan, sync, strength=strength))
    assert torch.equal(ours(wan, sync=sync, sync_strength=strength), expected)


def test_part_of_a_latent_is_kept_as_ksampler_keeps_it(wan, sync):
    mask = torch.zeros(VIEWS, 1, *SHAPE[1:])
    mask[..., 3:] = 1
    latent = {"samples": draw(VIEWS, *SHAPE, seed=5), "noise_mask": mask}
    result = ours(wan, sync=sync, latent=latent, denoise=0.6)
    assert torch.equal(result, native(view_sync(wan, sync), latent=latent, denoise=0.6))
    torch.testing.assert_close(result[..., :3], latent["samples"][..., :3], atol=1e-5, rtol=1e-5)
    assert (result - latent["samples"])[..., 3:].abs().max() > 0.1


def test_denoise_zero_gives_the_latent_back(wan, sync):
    samples = draw(VIEWS, *SHAPE, seed=5)
    assert torch.equal(ours(wan, sync=sync, latent={"samples": samples}, denoise=0.0), samples)


@pytest.mark.parametrize("trained", [True, False])
def test_strength_zero_is_the_plain_model_to_the_bit(wan, sync, trained):
    weights = sync if trained else None
    plain = native(wan, cfg=3.0)
    assert torch.equal(ours(wan, sync=weights, sync_strength=0.0, cfg=3.0), plain)
    assert torch.equal(native(view_sync(wan, weights, strength=0.0), cfg=3.0), plain)


def test_model_from_view_sync_keeps_its_own_setting(wan, sync):
    synced = view_sync(wan, sync, strength=0.4, end=0.5)
    for strength in (0.0, 1.0):
        assert torch.equal(ours(synced, sync_strength=strength), native(synced))


# --- views ----------------------------------------------------------------------------------------


def test_without_sync_every_view_is_its_own_run(wan):
    together = ours(wan, sync_strength=0.0)
    for v in range(VIEWS):
        alone = ours(wan, [v], sync_strength=0.0)
        torch.testing.assert_close(together[v : v + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_permuting_views_permutes_the_result(wan, sync, trained):
    weights = sync if trained else None
    order = [2, 0, 1]
    result = ours(wan, sync=weights, cfg=2.0)
    permuted = ours(wan, order, sync=weights, cfg=2.0)
    assert (result - permuted).abs().max() > 0.1
    torch.testing.assert_close(permuted, result[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_one_view_is_the_plain_model_to_the_bit(wan, sync, trained):
    result = ours(wan, [1], sync=sync if trained else None, rig=ring(1))
    assert torch.equal(result, native(wan, [1]))


def test_one_set_of_conditions_serves_all_views(wan, sync):
    same = [[text, {"concat_latent_image": extra["concat_latent_image"].expand(VIEWS, -1, -1, -1, -1)}]
            for text, extra in conditioning(20, [0])]  # fmt: skip
    result = ours(wan, sync=sync, positive=conditioning(20, [0]))
    torch.testing.assert_close(result, ours(wan, sync=sync, positive=same))


def test_text_to_video_model_needs_no_conditions(wan_weights):
    """Any Wan works in the training-free form, from ComfyUI's own empty latent."""
    plain = comfy.sd.load_diffusion_model_state_dict(wan_weights(in_dim=16))
    text = [[draw(1, 4, 4096), {}]]
    still = {"samples": torch.zeros(VIEWS, 4, 4, 6)}
    given = {"positive": text, "negative": text, "latent": still}
    result = ours(plain, **given)
    assert result.shape == (VIEWS, 16, 1, 4, 6)
    assert torch.equal(result, native(view_sync(plain), **given))


# --- same and other seeds, nothing left behind ----------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_same_seed_same_result_and_another_seed_another(wan, sync, seed):
    result = ours(wan, sync=sync, seed=seed)
    assert torch.equal(result, ours(wan, sync=sync, seed=seed))
    assert (result - ours(wan, sync=sync, seed=1)).abs().mean() > 0.1


@pytest.mark.parametrize("trained", [True, False])
def test_model_and_inputs_are_untouched(wan, sync, trained):
    latent = {"samples": torch.zeros(VIEWS, *SHAPE), "note": "mine"}
    given = inputs(latent=latent, cfg=2.0)
    before, plain = copy.deepcopy(given), native(wan)
    node = sampler.MultiViewSampler.execute
    out = node(wan, **given, sync=sync if trained else None, sync_strength=1.0).args[0]
    assert set(out) == set(latent) and out["note"] == "mine"
    assert out["samples"].abs().max() > 0.1 and not latent["samples"].any()
    for name in ("positive", "negative"):
        (text, extra), (old_text, old_extra) = given[name][0], before[name][0]
        assert torch.equal(text, old_text) and set(extra) == {"concat_latent_image"}
        assert torch.equal(extra["concat_latent_image"], old_extra["concat_latent_image"])
    assert "patches_replace" not in wan.model_options["transformer_options"]
    assert not wan.get_all_wrappers(WrappersMP.DIFFUSION_MODEL)
    assert torch.equal(native(wan), plain)


def test_interruption_stops_within_a_step_and_leaves_the_model_usable(wan, sync):
    expected = ours(wan, sync=sync)
    seen = []

    def cancels_in_step_two(args: dict, extra: dict) -> dict:
        seen.append(len(args["img"]))
        if len(seen) == 2:
            comfy.model_management.interrupt_current_processing()
        return extra["original_block"](args)

    model = wan.clone()
    model.set_model_patch_replace(cancels_in_step_two, "dit", "double_block", 0)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ours(model, sync=sync, steps=6)
    assert seen == [VIEWS, VIEWS]
    assert not comfy.model_management.processing_interrupted()
    assert torch.equal(ours(wan, sync=sync), expected)


# --- progress and preview -------------------------------------------------------------------------


@pytest.fixture
def reports(monkeypatch):
    """What ComfyUI's progress bar is told: (done, total, preview)."""
    told: list[tuple] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: told.append((done, total, preview))
    )  # fmt: skip
    return told


@pytest.mark.parametrize("settings", [{}, {"denoise": 0.5}, {"sampler_name": "heun"}])
def test_progress_counts_every_step_and_shows_a_picture(wan, reports, settings):
    ours(wan, steps=4, **settings)
    assert [(done, total) for done, total, _ in reports] == [(n, 4) for n in (1, 2, 3, 4)]
    for _, _, (kind, image, limit) in reports:
        # 3 columns of tiles 128 high, as wide as 6 x 4 latent pixels are.
        assert (kind, image.size, limit) == ("JPEG", (3 * 192, 128), 512)


def test_preview_shows_the_middle_frame_of_every_view(wan, reports):
    """After the last step it is the result, through ComfyUI's map from latents to colours."""
    views = 5
    latent = {"samples": torch.zeros(views, *SHAPE)}
    conditions = [[draw(1, 4, 4096), {"concat_latent_image": draw(views, 32, *SHAPE[1:])}]]
    result = ours(wan, latent=latent, positive=conditions, rig=ring(views))
    wan_format = Wan21()
    factors = torch.tensor(wan_format.latent_rgb_factors)
    bias = torch.tensor(wan_format.latent_rgb_factors_bias)
    middle = wan_format.process_in(result)[:, :, SHAPE[1] // 2]
    colors = (torch.einsum("vchw,ck->vkhw", middle, factors) + bias[:, None, None] + 1) / 2
    image = reports[-1][2][1]
    assert image.size == (4 * 192, 2 * 128)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(256, 768, 3).movedim(-1, 0) / 255
    for v in range(views):
        row, column = divmod(v, 4)
        tile = pixels[:, row * 128 :, column * 192 :][:, :128, :192]
        centers = tile[:, 16::32, 16::32]  # a latent pixel is 32 pixels wide
        # The label covers part of the first row. The enlarging is half a pixel off the centres.
        expected = colors[v].clamp(0, 1)[:, 1:]
        torch.testing.assert_close(centers[:, 1:], expected, atol=0.05, rtol=0)
        assert expected.std() > 0.1
    assert not pixels[:, 128:, 192:].any()  # unused places


def test_preview_carries_the_labels_of_the_rig(wan, reports):
    ours(wan, rig=ring(VIEWS), steps=1)
    ours(wan, rig=None, steps=1)
    ours(wan, rig=None, steps=1)
    labelled, numbered, again = (picture.tobytes() for _, _, (_, picture, _) in reports)
    assert labelled != numbered and numbered == again


@pytest.mark.parametrize("sampler_name", ["euler", "heun"])
def test_progress_counts_groups_of_view_windows_too(wan, sync, reports, sampler_name):
    grouped = windows.ViewWindows.execute(view_sync(wan, sync), 2, 1, 0, 0, 0).args[0]
    ours(grouped, sampler_name=sampler_name)
    done = [r[0] for r in reports]
    assert done == sorted(done) and done[-1] == 200 and {r[1] for r in reports} == {200}
    # Two steps of three groups: what falls between the steps was shown as well.
    assert {33, 66, 100, 133, 166} <= set(done)


# --- only what was not seen -----------------------------------------------------------------------


def test_visibility_keeps_what_was_seen_as_the_node_before_it_would(wan, sync):
    frames = torch.zeros(VIEWS, 5, 3, 32, 48, dtype=torch.uint8)
    frames[0], frames[1, ..., :24] = SEEN, SEEN
    frames[1, ..., 24:], frames[2] = UNSEEN_SIDE, UNSEEN_SIDE
    visibility = Views(frames)
    content = {"samples": draw(VIEWS, *SHAPE, seed=5)}
    result = ours(wan, sync=sync, latent=content, visibility=visibility)
    masked = UnseenOnly.execute(content, visibility, 1, "keep").args[0]
    assert torch.equal(result, native(view_sync(wan, sync), latent=masked))
    torch.testing.assert_close(result[0], content["samples"][0], atol=1e-5, rtol=1e-5)
    # One latent pixel of margin in a latent of six.
    torch.testing.assert_close(
        result[1, ..., :2], content["samples"][1, ..., :2], atol=1e-5, rtol=1e-5
    )
    assert (result[1, ..., 2:] - content["samples"][1, ..., 2:]).abs().amin() > 0
    assert (result[2] - content["samples"][2]).abs().amin() > 0


def test_visibility_with_nothing_to_keep_is_refused(wan):
    visibility = Views(torch.full((VIEWS, 5, 3, 32, 48), SEEN, dtype=torch.uint8))
    assert "there is nothing to keep" in refusal(lambda: ours(wan, visibility=visibility))


# --- refusals: every sentence for a creator -------------------------------------------------------


def test_rig_with_other_cameras_than_the_latent_is_refused(wan):
    assert refusal(lambda: ours(wan, rig=ring(4))) == (
        "The rig has 4 cameras but the latent 3 views: connect the rig that the conditions were "
        "rendered with."
    )


def test_view_sync_of_another_rig_is_refused_while_sampling(wan):
    text = refusal(lambda: native(view_sync(wan, rig=ring(4))))
    assert "set for 4 views, but the latent brings 3" in text


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_model_that_is_no_wan_is_refused(strength):
    class Still(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model, self.latent_format = torch.nn.Linear(2, 2), SD15()

    cpu = torch.device("cpu")
    still = comfy.model_patcher.ModelPatcher(Still(), load_device=cpu, offload_device=cpu)
    text = [[draw(1, 4, 768), {}]]
    given = {"positive": text, "negative": text, "latent": {"samples": torch.zeros(3, 4, 8, 8)}}
    sentence = "'model' is not a Wan-type video model"
    assert sentence in refusal(lambda: ours(still, sync_strength=strength, **given))
    assert sentence in refusal(lambda: view_sync(still))


def test_sync_weights_of_another_width_are_refused(wan, make_sync):
    wide = make_sync(dim=256)
    for call in (lambda: ours(wan, sync=wide), lambda: view_sync(wan, wide)):
        assert refusal(call) == (
            "The sync weights are for a model of width 256 with at least 2 blocks, but this model "
            "has width 128 and 2 blocks: choose the sync file that belongs to the model."
        )


def test_view_sync_that_ends_before_it_starts_is_refused(wan):
    assert "start_percent is 0.8" in refusal(lambda: view_sync(wan, start=0.8, end=0.2))


WIDGETS = {
    "seed": 0, "steps": 12, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
    "denoise": 1.0, "sync_strength": 1.0,
}  # fmt: skip


def host_errors(monkeypatch, node, **widgets) -> dict[str, str]:
    """What ComfyUI says of a node whose sockets are all free: input -> kind of error."""
    name = node.GET_SCHEMA().node_id
    monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, name, node)
    prompt = {"1": {"class_type": name, "inputs": widgets}}
    _, errors, _ = asyncio.run(execution.validate_inputs("run", prompt, "1", {}))
    return {e["extra_info"]["input_name"]: e["type"] for e in errors}


def test_missing_sockets_are_named_by_comfyui(monkeypatch):
    missing = host_errors(monkeypatch, sampler.MultiViewSampler, **WIDGETS)
    wanted = ("model", "positive", "negative", "latent")
    assert missing == dict.fromkeys(wanted, "required_input_missing")
    widgets = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    missing = host_errors(monkeypatch, sampler.ViewSyncNode, **widgets)
    assert missing == {"model": "required_input_missing"}


@pytest.mark.parametrize(
    ("widget", "too_small", "too_big"),
    [
        ("steps", 0, 201),
        ("denoise", -0.1, 1.1),
        ("cfg", -1.0, 31.0),
        ("sync_strength", -0.1, 4.1),
        ("seed", -1, 2**64),
    ],
)
def test_comfyui_refuses_values_beyond_the_limits(monkeypatch, widget, too_small, too_big):
    for value, kind in ((too_small, "smaller_than_min"), (too_big, "bigger_than_max")):
        changed = {**WIDGETS, widget: value}
        errors = host_errors(monkeypatch, sampler.MultiViewSampler, **changed)
        assert errors[widget] == f"value_{kind}"


def test_samplers_and_schedulers_are_all_of_comfyui():
    options = {
        i.id: getattr(i, "options", None) for i in sampler.MultiViewSampler.GET_SCHEMA().inputs
    }
    required = core.KSampler.INPUT_TYPES()["required"]
    for name in ("sampler_name", "scheduler"):
        assert list(options[name]) == list(required[name][0])


# --- Load View Sync -------------------------------------------------------------------------------


@pytest.fixture
def patches(tmp_path, monkeypatch):
    """ComfyUI's folder of model patches, empty for one test."""
    known = folder_paths.folder_names_and_paths["model_patches"]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "model_patches", ([str(tmp_path)], known[1])
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_sync_file_is_listed_and_loaded(wan, sync, patches):
    weights = {k: v.clone() for k, v in sync.model.state_dict().items()}
    save_file(weights, patches / "my_sync.safetensors")
    schema = sampler.LoadViewSync.define_schema()
    assert list(schema.inputs[0].options) == ["my_sync.safetensors"]
    loaded = sampler.LoadViewSync.execute("my_sync.safetensors").args[0]
    assert torch.equal(ours(wan, sync=loaded), ours(wan, sync=sync))


def test_file_that_holds_no_sync_weights_is_refused(patches):
    save_file({"blocks.0.weight": torch.zeros(1)}, patches / "lora.safetensors")
    text = refusal(lambda: sampler.LoadViewSync.execute("lora.safetensors"))
    assert "holds no view-sync weights" in text.replace("This file ", "")


# --- reference ------------------------------------------------------------------------------------


def test_sampler_with_a_reference_is_view_sync_and_ksampler(wan, sync):
    reference = {"samples": draw(1, *SHAPE, seed=5)}
    model = sampler.ViewSyncNode.execute(wan, 1.0, 0.0, 1.0, sync, None, reference).args[0]
    out = sampler.MultiViewSampler.execute(
        wan, **inputs(), sync_strength=1.0, sync=sync, reference=reference
    )
    assert torch.equal(out.args[0]["samples"], native(model))
    assert not torch.allclose(native(model), ours(wan, sync=sync), atol=1e-3)
