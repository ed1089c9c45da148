"""View Weights and Sample Unseen Only in the real ComfyUI: what reaches samplers, and what is refused."""

import logging
import math
from types import SimpleNamespace

import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from torch import Tensor
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.geometry import EMPTY, SEEN, UNSEEN_SIDE
from turnaround.models.view_weights import ViewWeights
from turnaround.models.views import Views
from turnaround.nodes import sampler
from turnaround.nodes import weights as nodes

import nodes as core

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS = 3
SHAPE = (16, 2, 4, 6)
"""A view's latent: channels, frames, height, width; of 5 pictures of 48x32."""


@pytest.fixture(autouse=True)
def _said(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="turnaround")
    for node in nodes.NODES:
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="1"))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ring(views: int = VIEWS) -> Rig:
    azimuths = torch.arange(views) * (2 * math.pi / views)
    return orbit_rig(azimuths, torch.zeros(views), 3.0, 0.6, 48, 32)


def visibility(views: int = VIEWS) -> Views:
    """Seen in view 0; in the others the left half of a bar is the unseen side, in view 2 later."""
    states = torch.full((views, 5, 32, 48), EMPTY)
    states[..., 16:32] = SEEN
    states[1, :, :, 16:24] = UNSEEN_SIDE
    states[2, 1:, :, 16:24] = UNSEEN_SIDE
    frames = states.to(torch.uint8)[:, :, None].expand(-1, -1, 3, -1, -1)
    return Views(frames, states == SEEN, ring(views))


def weigh(**widgets) -> tuple[ViewWeights, Tensor, str]:
    defaults = dict(
        rig=ring(), method="by angle", falloff=0.9, weight_list="1, 1, 1", scale="largest is 1"
    )
    return nodes.ViewWeightsNode.execute(**(defaults | widgets)).args


def mask_latent(samples: Tensor | None = None, grow=0, background="keep", **extra):
    """Latent, picture and note of Sample Unseen Only."""
    samples = draw(VIEWS, *SHAPE, seed=5) if samples is None else samples
    latent = {"samples": samples, **extra}
    return nodes.UnseenOnly.execute(latent, visibility(), grow, background).args


def conditions(seed: int) -> list:
    extra = {"concat_latent_image": draw(VIEWS, 32, *SHAPE[1:], seed=seed)}
    return [[draw(1, 4, 4096, seed=seed + 1), extra]]


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


# --- View Weights ---------------------------------------------------------------------------------


def test_weights_by_angle():
    weights, picture, note = weigh()
    # At 120 degrees a ball shows a quarter of the side that the source camera sees.
    expected = [1, math.exp(-0.9 * 0.75), math.exp(-0.9 * 0.75)]
    assert weights.values.tolist() == pytest.approx(expected)
    assert weights.labels == ("0°", "120°", "240°")
    assert picture.shape == (1, 512, 832, 3) and 0 <= picture.min() < picture.max() <= 1
    assert note == "by angle: 0° 1.00, 120° 0.51, 240° 0.51"


def test_weights_by_visibility():
    # Half of the performer is unseen in view 1, and in view 2 in 4 of 5 pictures.
    expected = [1, math.exp(-2 * 0.5), math.exp(-2 * 0.4)]
    weights = weigh(method="by visibility", falloff=2.0, visibility=visibility())[0]
    assert weights.values.tolist() == pytest.approx(expected)


def test_list_is_scaled_or_left_as_given():
    text = "0.25, 0.25, 0.1"
    scaled = weigh(method="list", weight_list=text)[0]
    assert scaled.values.tolist() == pytest.approx([1, 1, 0.4])
    given = weigh(method="list", weight_list=text, scale="as given")[0]
    assert given.values.tolist() == pytest.approx([0.25, 0.25, 0.1])


def test_rig_without_the_front_has_a_view_that_counts_fully():
    behind = ring(4).select([1, 2, 3])
    assert weigh(rig=behind)[0].values.amax() == 1
    assert weigh(rig=behind, scale="as given")[0].values.amax() == pytest.approx(math.exp(-0.45))


def test_weights_that_do_not_fit_are_refused_in_one_sentence():
    assert "needs 'visibility'" in refusal(lambda: weigh(method="by visibility"))
    said = refusal(lambda: weigh(method="by visibility", rig=ring(4), visibility=visibility()))
    assert "3 views" in said and "4 cameras" in said
    said = refusal(lambda: weigh(method="list", weight_list="1, 1"))
    assert "2 numbers" in said and "3 cameras" in said
    # So far apart that the smaller one is nothing beside the larger.
    assert "view 1 (120°) is 0" in refusal(
        lambda: weigh(method="list", weight_list="1e30, 1e-30, 1")
    )


def noisy_views(bad: int, masks: bool = True) -> Views:
    """A bar seen by eight cameras in a ring, one of them full of noise."""
    views, generator = 8, torch.Generator().manual_seed(0)
    inside = torch.zeros(views, 3, 32, 48, dtype=torch.bool)
    inside[..., 4:-4, 16:32] = True
    frames = torch.where(inside[:, :, None], 0.8, 0.5).expand(-1, -1, 3, -1, -1).clone()
    frames[bad] += 0.1 * torch.randn(frames[bad].shape, generator=generator)
    return Views(frames.clamp(0, 1), inside if masks else None, ring(views))


def test_weights_by_noise():
    weights, picture, note = weigh(method="by noise", rig=ring(8), views=noisy_views(3))
    assert weights.values.argmin() == 3 and weights.values.amax() == 1
    assert weights.values[3] < 0.1 < 0.5 < weights.values[[0, 1, 2, 4, 5, 6, 7]].amin()
    assert picture.shape[0] == 1 and note.startswith("by noise (from differences between views,")
    even = weigh(method="by noise", rig=ring(8), views=noisy_views(3), falloff=0.0)[0]
    assert even.values.tolist() == [1] * 8


def test_views_without_masks_are_weighed_by_their_plain_background_or_over_time():
    given = noisy_views(3, masks=False)
    assert weigh(method="by noise", rig=ring(8), views=given)[0].values.argmin() == 3
    frames = torch.rand(given.frames.shape, generator=torch.Generator().manual_seed(1)) / 10
    frames[5] *= 5
    weights, _, note = weigh(method="by noise", rig=ring(8), views=Views(frames))
    assert "from flicker alone" in note and weights.values.argmin() == 5


def test_noise_needs_fitting_views():
    assert "needs 'views'" in refusal(lambda: weigh(method="by noise"))
    said = refusal(lambda: weigh(method="by noise", views=noisy_views(0)))
    assert "'views' are 8" in said and "3 cameras" in said
    depth = Views(torch.ones(3, 3, 1, 32, 48))
    assert "carry depth" in refusal(lambda: weigh(method="by noise", views=depth))
    single = Views(torch.rand(3, 1, 3, 32, 48, generator=torch.Generator().manual_seed(0)))
    assert "1 frames are too few" in refusal(lambda: weigh(method="by noise", views=single))


def test_view_sync_follows_the_weights(wan, sync):
    def latents(mode: str, weights: ViewWeights | None) -> Tensor:
        model = sampler.ViewSyncNode.execute(
            wan, 1.0, 0.0, 1.0, sync, mode=mode, weights=weights
        ).args[0]
        empty = {"samples": torch.zeros(VIEWS, *SHAPE)}
        return core.common_ksampler(
            model, 3, 1, 1.0, "euler", "simple", conditions(20), conditions(20), empty
        )[0]["samples"]

    frame = latents("frame", None)
    assert torch.equal(latents("weighted", weigh(falloff=0.0)[0]), frame)
    assert (latents("weighted", weigh(falloff=5.0)[0]) - frame).abs().max() > 1e-3


# --- Sample Unseen Only ---------------------------------------------------------------------------


def test_mask_is_one_where_it_was_not_seen():
    latent, picture, note = mask_latent()
    mask = latent["noise_mask"]
    expected = torch.zeros(VIEWS, 1, *SHAPE[1:])
    expected[1, ..., 2] = 1
    expected[2, 0, 1, :, 2] = 1
    assert torch.equal(mask, expected)
    # One picture a latent frame, three views side by side.
    assert picture.shape == (2, 32, 3 * 48, 3)
    assert note == "made anew: 0° 0%, 120° 17%, 240° 8%"


def test_host_takes_the_mask_as_it_is():
    mask = mask_latent()[0]["noise_mask"]
    shape = torch.Size((VIEWS, *SHAPE))
    assert torch.equal(comfy.utils.reshape_mask(mask, shape), mask.expand(shape))


def with_ksampler(model, latent: dict, **settings) -> Tensor:
    return core.common_ksampler(
        model, 3, 3, positive=conditions(20), negative=conditions(30), latent=latent, **settings
    )[0]["samples"]


def with_multi_view_sampler(model, latent: dict, **settings) -> Tensor:
    return sampler.MultiViewSampler.execute(
        model, conditions(20), conditions(30), latent, seed=3, steps=3, denoise=1.0,
        sync_strength=1.0, **settings,
    ).args[0]["samples"]  # fmt: skip


def with_custom_sampler(model, latent: dict, cfg, sampler_name, scheduler) -> Tensor:
    guider = custom.CFGGuider.execute(model, conditions(20), conditions(30), cfg).args[0]
    sigmas = custom.BasicScheduler.execute(model, scheduler, 3, 1.0).args[0]
    chosen = comfy.samplers.sampler_object(sampler_name)
    noise = custom.Noise_RandomNoise(3)
    out = custom.SamplerCustomAdvanced.execute(noise, guider, chosen, sigmas, latent).args
    return out[0]["samples"]


@pytest.mark.parametrize("sample", [with_ksampler, with_multi_view_sampler, with_custom_sampler])
@pytest.mark.parametrize(
    ("name", "trace"),
    # ComfyUI's uni_pc stops at a noise of 0.001 and leaves that in, unit noise times 5 at most.
    [("euler", 1e-5), ("dpmpp_2m_sde", 1e-5), ("uni_pc", 0.015)],
)
def test_any_sampler_changes_the_unseen_alone(wan, sample, name, trace):
    latent = mask_latent()[0]
    result = sample(wan, latent, cfg=2.0, sampler_name=name, scheduler="simple")
    made = latent["noise_mask"].expand_as(result) > 0
    before = latent["samples"]
    # Through the latent format's scale and back: float noise.
    torch.testing.assert_close(result[~made], before[~made], atol=trace, rtol=1e-5)
    change = (result - before).abs()
    assert change[made].median() > 0.1
    # In every view and moment with something to make, and nowhere else.
    anew = latent["noise_mask"][:, 0].flatten(2).amax(2) > 0
    assert torch.equal(change.amax((1, 3, 4)) > 2 * trace, anew)


def test_what_is_made_depends_on_what_is_kept(wan):
    """Kept parts are there, noised, while the rest is made: it can continue them."""
    first = mask_latent()[0]
    other = mask_latent(draw(VIEWS, *SHAPE, seed=6))[0]
    settings = dict(cfg=1.0, sampler_name="euler", scheduler="simple")
    made = first["noise_mask"].expand(VIEWS, *SHAPE) > 0
    change = (with_ksampler(wan, first, **settings) - with_ksampler(wan, other, **settings))[made]
    assert change.abs().max() > 1e-2


def test_mask_that_was_there_still_keeps():
    other = torch.ones(VIEWS, 1, *SHAPE[1:])
    other[1, :, 0] = 0
    latent = mask_latent(noise_mask=other, batch_index=[4, 5, 6])[0]
    expected = mask_latent()[0]["noise_mask"]
    assert expected[1, :, 0].any()
    expected[1, :, 0] = 0
    assert torch.equal(latent["noise_mask"], expected)
    assert latent["batch_index"] == [4, 5, 6]


def test_given_latent_is_left_alone():
    given = {"samples": draw(VIEWS, *SHAPE)}
    latent = nodes.UnseenOnly.execute(given, visibility(), 1, "make").args[0]
    assert set(given) == {"samples"} and latent["samples"] is given["samples"]


def test_latents_that_do_not_fit_are_refused_in_one_sentence():
    some = draw(VIEWS, *SHAPE)
    one_empty = some.clone()
    one_empty[1] = 0
    broken = some.clone()
    broken[0, 0, 0, 0, 0] = float("nan")
    for samples, parts in (
        (torch.zeros(VIEWS, *SHAPE), ["'latent' is empty", "Encode Views"]),
        (one_empty, ["Views [1] of 'latent' are empty"]),
        (broken, ["NaN"]),
        (some[:, :, 0], ["pictures", "[3, 16, 4, 6]"]),
        (some[:2], ["2 views", "'visibility' 3"]),
        (draw(VIEWS, 16, 3, 4, 6), ["3 latent frames, that is 9 pictures", "'visibility' 5"]),
        (draw(VIEWS, 16, 2, 4, 5), ["5x4 latent pixels", "48x32"]),
    ):
        said = refusal(lambda s=samples: mask_latent(s))
        assert all(part in said for part in parts), said
