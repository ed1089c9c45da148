"""What the model is told of every view, beside ComfyUI's own single-view nodes."""

import asyncio
import math
from dataclasses import replace

import comfy.clip_vision
import comfy.sd
import comfy.utils
import execution
import pytest
import small_checkpoints as small
import torch
from comfy_extras import nodes_wan
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.geometry import BACKGROUND
from turnaround.models.views import Views, reference_frames
from turnaround.nodes import check_conditions, conditioning, conditioning_wan, prompts
from turnaround.nodes.views import frames_to_image

import nodes as core

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS = 3
SHAPE = (16, 2, 4, 6)
"""A view's latent: channels, frames, height, width."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int = 1, seed: int = 0, **values) -> list:
    return [[draw(rows, 4, 4096, seed=seed), values]]


def refusal(call) -> str:
    """The sentence with which a call refuses its inputs."""
    with pytest.raises(ValueError) as caught:
        call()
    words = str(caught.value)
    sentences = words.replace("Fun-Control 1.1", "").replace("v1.1_1.3B", "").replace("1.3B", "")
    assert words.endswith(".") and ". " not in sentences and "\n" not in words, "not one sentence"
    return words


@pytest.fixture(scope="module")
def vae():
    """A tiny Wan VAE with random weights, through ComfyUI's own detection."""
    return comfy.sd.VAE(sd=small.vae())


@pytest.fixture(scope="module")
def large_vae():
    return small.loaded_large_vae()


@pytest.fixture
def reports(monkeypatch):
    """What ComfyUI's progress bar is told: (done, total)."""
    told: list[tuple] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: told.append((done, total))
    )
    return told


def pictures(seed: int, views: int = 2, frames: int = 5, width: int = 32, height: int = 16, **more):
    generator = torch.Generator().manual_seed(seed)
    return Views(torch.rand(views, frames, 3, height, width, generator=generator), **more)


def seen_masks(views: int = 2, frames: int = 5, width: int = 32, height: int = 16) -> Tensor:
    return (
        torch.rand(views, frames, height, width, generator=torch.Generator().manual_seed(9)) > 0.5
    )


def one_view(views: Views | None, v: int) -> Views | None:
    if views is None:
        return None
    masks = views.masks[v : v + 1] if views.masks is not None else None
    return Views(views.frames[v : v + 1], masks)


def images(views: Views, v: int) -> Tensor:
    """One view as ComfyUI's IMAGE."""
    return frames_to_image(views.frames[v])


# --- Multi-View Conditioning ----------------------------------------------------------------------


def condition(vae, partial: Views, normals: Views | None, **texts):
    return conditioning.MultiViewConditioning.execute(vae, partial, normals, **texts).args


def test_conditions_are_colour_then_normals_of_every_view(vae, reports):
    partial, normals = pictures(0), pictures(1)
    positive, negative, latent, note, _ = condition(vae, partial, normals)
    assert note == "" and reports == [(n, 4) for n in (1, 2, 3, 4)]
    assert latent["samples"].shape == (2, 16, 2, 2, 4) and not latent["samples"].any()
    for (empty, extra), *others in (positive, negative):
        assert not others and empty.shape == (1, 1, 4096) and not empty.any()
        image = extra["concat_latent_image"]
        assert image.shape == (2, 32, 2, 2, 4)
        for v in range(2):
            for part, views in ((image[v, :16], partial), (image[v, 16:], normals)):
                expected = vae.encode(images(views, v))[0]
                torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


def test_text_is_kept_and_its_conditioning_untouched(vae):
    texts = {"positive": text(seed=1, mark=1), "negative": text(seed=2)}
    results = condition(vae, pictures(0, frames=1), pictures(1, frames=1), **texts)
    for given, result in zip(texts.values(), results[:2], strict=True):
        assert torch.equal(result[0][0], given[0][0])
        assert set(result[0][1]) == {*given[0][1], "concat_latent_image"}
        assert "concat_latent_image" not in given[0][1]


def test_sizes_that_the_vae_does_not_take_are_changed_with_a_note(vae):
    partial, normals = (pictures(s, frames=6, width=35, height=20) for s in (0, 1))
    _, _, latent, note, _ = condition(vae, partial, normals)
    assert latent["samples"].shape == (2, 16, 2, 2, 4)
    assert "6 frames became 5" in note and "35x20 became 32x16" in note


@pytest.mark.parametrize("other", [{"views": 3}, {"frames": 9}, {"width": 48}])
def test_conditions_that_differ_are_refused(vae, other):
    words = refusal(lambda: condition(vae, pictures(0), pictures(1, **other)))
    assert words.startswith("'partial' has 2 views x 5 frames of 32x16 but 'normals' ")
    assert words.endswith("draw both for the same rig and clip.")


def test_depth_as_normals_is_refused(vae):
    depth = Views(pictures(1).frames[:, :, :1])
    assert "'normals' holds depth" in refusal(lambda: condition(vae, pictures(0), depth))


def test_without_normals_they_are_as_grey_as_where_nothing_is_known(vae):
    partial = pictures(0)
    grey = Views(torch.full_like(partial.frames, BACKGROUND))
    without, told = (condition(vae, partial, n)[0][0][1] for n in (None, grey))
    assert torch.equal(without["concat_latent_image"], told["concat_latent_image"])


def test_empty_conditioning_is_that_of_grey_pictures(vae):
    rig = orbit_rig(torch.arange(3.0), torch.zeros(3), 3.0, 0.7, 35, 16)
    given = text(seed=1)
    positive, negative, latent, note = conditioning.EmptyViewConditioning.execute(
        vae, rig, 6, given
    ).args
    assert "6 frames became 5" in note and "35x16 became 32x16" in note
    grey = Views(torch.full((3, 5, 3, 16, 32), BACKGROUND))
    expected = condition(vae, grey, grey)
    assert torch.equal(latent["samples"], expected[2]["samples"])
    assert torch.equal(positive[0][0], given[0][0]) and not negative[0][0].any()
    for made, wanted in zip((positive, negative), expected[:2], strict=True):
        assert torch.equal(made[0][1]["concat_latent_image"], wanted[0][1]["concat_latent_image"])


def source_video(frames: int = 5, masked: bool = True) -> Views:
    """A white square on black, of another size than the views."""
    masks = torch.zeros(1, frames, 40, 30)
    masks[:, :, 10:20, 5:15] = 1
    return Views(masks[:, :, None].expand(-1, -1, 3, -1, -1), masks if masked else None)


def test_reference_is_the_performer_cut_out_and_of_the_size_of_the_views(vae):
    video = source_video()
    _, _, latent, _, reference = condition(vae, pictures(0), pictures(1), reference=video)
    assert reference["samples"].shape == (1, *latent["samples"].shape[1:])
    cut = reference_frames(video.frames[0], video.masks[0], 32, 16, BACKGROUND)
    assert torch.equal(reference["samples"], vae.encode(frames_to_image(cut)))


def test_without_a_reference_there_is_no_reference_output(vae):
    assert condition(vae, pictures(0), pictures(1))[4] is None


def test_reference_without_mask_or_too_short_is_refused(vae):
    def refer(reference: Views) -> str:
        return refusal(lambda: condition(vae, pictures(0), pictures(1), reference=reference))

    assert "'reference' needs one video with a mask" in refer(source_video(masked=False))
    assert "'reference' has 3 frames but the views 5" in refer(source_video(frames=3))


def test_single_picture_as_reference_is_a_clip_that_stands_still(vae):
    def refer(reference: Views) -> Tensor:
        return condition(vae, pictures(0), pictures(1), reference=reference)[4]["samples"]

    picture = source_video(frames=1)
    still = replace(
        picture,
        frames=picture.frames.expand(-1, 5, -1, -1, -1),
        masks=picture.masks.expand(-1, 5, -1, -1),
    )
    assert torch.equal(refer(picture), refer(still))


# --- VACE -----------------------------------------------------------------------------------------


def tell_vace(vae, control: Views, positive=None, negative=None, strength=1.0, **views):
    given = positive or text(), negative or text(seed=1)
    return conditioning_wan.VaceConditioning.execute(*given, vae, control, strength, **views).args


def vace_inputs(frames: int = 5, reference: bool = True) -> dict:
    """Control, partial with what was seen of it, and a reference picture without a mask."""
    given = {
        "control": pictures(0, frames=frames),
        "partial": pictures(1, frames=frames, masks=seen_masks(frames=frames)),
    }
    return given | ({"reference": pictures(2, views=1, frames=3)} if reference else {})


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("reference", [False, True], ids=["plain", "reference"])
def test_vace_is_told_bit_for_bit_as_by_the_node_for_one_video(vae, reference, frames):
    given = vace_inputs(frames, reference)
    positive, negative, latent, trim, note = tell_vace(vae, **given, strength=0.7)
    assert note == "" and trim == int(reference)
    V, T = 2, (frames - 1) // 4 + 1 + trim
    assert latent["samples"].shape == (V, 16, T, 2, 4) and not latent["samples"].any()
    told = positive[0][1]
    assert told["vace_frames"][0].shape == (V, 32, T, 2, 4)
    assert told["vace_mask"][0].shape == (V, 64, T, 2, 4)
    for v in range(V):
        seen = given["partial"].masks[v]
        video = torch.where(
            seen[..., None], images(given["partial"], v), images(given["control"], v)
        )
        picture = images(given["reference"], 0) if reference else None
        expected = nodes_wan.WanVaceToVideo.execute(
            text(), text(seed=1), vae, 32, 16, frames, 1, 0.7, video, (~seen).float(), picture
        ).args
        assert expected[3] == trim
        for ours, theirs in zip((positive, negative), expected[:2], strict=True):
            assert torch.equal(ours[0][0], theirs[0][0])
            assert ours[0][1]["vace_strength"] == theirs[0][1]["vace_strength"] == [0.7]
            for key in ("vace_frames", "vace_mask"):
                assert torch.equal(ours[0][1][key][0][v : v + 1], theirs[0][1][key][0]), key


def test_vace_of_several_views_is_each_view_by_itself(vae, reports):
    given = vace_inputs()
    together = tell_vace(vae, **given)[0][0][1]
    assert reports == [(n, 5) for n in range(1, 6)]  # a reference, and two clips of each view
    for v in range(2):
        each = {k: one_view(views, v) if k != "reference" else views for k, views in given.items()}
        alone = tell_vace(vae, **each)[0][0][1]
        for key in ("vace_frames", "vace_mask"):
            assert torch.equal(together[key][0][v : v + 1], alone[key][0])


def test_visibility_decides_what_is_kept(vae):
    given = vace_inputs(reference=False)
    other = ~given["partial"].masks
    told = tell_vace(vae, **given, visibility=pictures(5, masks=other))[0][0][1]
    partial = Views(given["partial"].frames, other)
    expected = tell_vace(vae, given["control"], partial=partial)[0][0][1]
    assert torch.equal(told["vace_mask"][0], expected["vace_mask"][0])
    assert torch.equal(told["vace_frames"][0], expected["vace_frames"][0])


def test_depth_is_shown_near_as_bright(vae):
    """As VACE's own depth maps are: 1 where nearest, 0 where nothing is."""
    metres = torch.zeros(1, 1, 1, 16, 16)
    metres[..., :8, :] = 2.0
    metres[..., 8:12, :] = 4.0
    told = tell_vace(vae, Views(metres))[0][0][1]["vace_frames"][0][:, 16:]
    bright = torch.zeros(1, 16, 16, 3)
    bright[:, :8], bright[:, 8:12] = 1.0, 0.2
    torch.testing.assert_close(told, vae.encode(bright), atol=1e-5, rtol=1e-5)


def test_masked_reference_is_cut_out_on_white(vae):
    video = source_video()
    told = tell_vace(vae, pictures(0), reference=video)[0][0][1]["vace_frames"][0]
    cut = reference_frames(video.frames[0, :1], video.masks[0, :1], 32, 16, 1.0)
    assert torch.equal(told[:, :16, :1], vae.encode(frames_to_image(cut)).expand(2, -1, -1, -1, -1))


def test_every_view_may_have_its_own_reference(vae):
    pair = pictures(3, frames=1)
    told = tell_vace(vae, pictures(0), reference=pair)[0][0][1]["vace_frames"][0]
    for v in range(2):
        assert torch.equal(told[v : v + 1, :16, :1], vae.encode(images(pair, v)))


def test_a_second_vace_condition_goes_behind_the_first(vae):
    first = tell_vace(vae, **vace_inputs())
    second = tell_vace(vae, pictures(7), first[0], first[1], 0.5, reference=pictures(8, views=1))
    told = second[0][0][1]
    assert [len(told[k]) for k in ("vace_frames", "vace_mask", "vace_strength")] == [2, 2, 2]
    assert torch.equal(told["vace_frames"][0], first[0][0][1]["vace_frames"][0])
    assert len(first[0][0][1]["vace_frames"]) == 1


def test_what_vace_can_not_use_is_refused(vae, large_vae):
    given = vace_inputs(reference=False)

    def refuse(**changed) -> str:
        return refusal(lambda: tell_vace(vae, **{**given, **changed}))

    words = refuse(partial=pictures(1, views=3, masks=seen_masks(3)))
    assert words.startswith(
        "'control' has 2 views x 5 frames of 32x16 but 'partial' 3 x 5 of 32x16"
    )
    words = refuse(visibility=pictures(1, frames=9, masks=seen_masks(frames=9)))
    assert "'visibility' 2 x 9 of 32x16" in words
    assert "'partial' has no mask of what was seen" in refuse(partial=pictures(1))
    assert "'visibility' has no mask" in refuse(visibility=pictures(1))
    assert "'partial', which has them, is free" in refuse(partial=None, visibility=pictures(1))
    assert "'reference' has 3 views but there are 2" in refuse(reference=pictures(0, views=3))
    assert "'positive' brings 4 texts but there are 2 views" in refuse(positive=text(4))
    assert "'negative' brings 3 texts but there are 2 views" in refuse(negative=text(3))
    words = refusal(lambda: tell_vace(large_vae, **given))
    assert "makes latents of 48 channels, but VACE models work on 16" in words
    broken = given["control"].frames.clone()
    broken[1, 2, 0, 0, 0] = math.nan
    assert "'control' has pixels that are no numbers in view 1" in refuse(control=Views(broken))


# --- Fun-Control ----------------------------------------------------------------------------------


def tell_fun(vae, control: Views, positive=None, **views):
    given = positive or text(), text(seed=1)
    return conditioning_wan.FunControlConditioning.execute(*given, vae, control, **views).args


@pytest.mark.parametrize("started", [False, True])
def test_fun_control_is_told_bit_for_bit_as_by_the_nodes_for_one_video(vae, started):
    control, start, reference = pictures(0), pictures(1), pictures(2, views=1)
    views = {"start": start} if started else {}
    positive, negative, latent, note = tell_fun(vae, control, reference=reference, **views)
    assert note == "" and latent["samples"].shape == (2, 16, 2, 2, 4)
    size = (vae, 32, 16, 5, 1)
    for v in range(2):
        first = images(start, v)[:1] if started else None
        video = {"start_image": first, "control_video": images(control, v)}
        one = nodes_wan.WanFunControlToVideo.execute(text(), text(seed=1), *size, **video).args
        two = nodes_wan.Wan22FunControlToVideo.execute(
            text(), text(seed=1), *size, **video, ref_image=images(reference, 0)[:1]
        ).args
        for ours, old, new in zip((positive, negative), one[:2], two[:2], strict=True):
            told = ours[0][1]
            image = told["concat_latent_image"][v : v + 1]
            assert torch.equal(image, old[0][1]["concat_latent_image"])
            assert torch.equal(image, new[0][1]["concat_latent_image"])
            assert torch.equal(told["concat_mask"], new[0][1]["concat_mask"])
            assert told["concat_mask_index"] == new[0][1]["concat_mask_index"]
            assert torch.equal(told["reference_latents"][0], new[0][1]["reference_latents"][0])


def test_fun_control_of_the_large_vae_has_its_channels_and_sizes(large_vae):
    control = pictures(0, frames=5, width=70, height=40)
    positive, _, latent, note = tell_fun(large_vae, control)
    assert note == "70x40 became 64x32 (sizes must be multiples of 32)"
    assert latent["samples"].shape == (2, 48, 2, 2, 4)
    told = positive[0][1]
    assert told["concat_latent_image"].shape == (2, 96, 2, 2, 4) and told["concat_mask_index"] == 48


def test_fun_control_shows_one_clip_vision_output_to_all(vae, clip_vision):
    seen = clip_vision.encode_image(images(pictures(0), 0)[:1])
    positive, negative, *_ = tell_fun(vae, pictures(0), clip_vision_output=seen)
    assert positive[0][1]["clip_vision_output"] is negative[0][1]["clip_vision_output"] is seen


def test_what_fun_control_can_not_use_is_refused(vae):
    control = pictures(0)
    words = refusal(lambda: tell_fun(vae, control, start=pictures(1, views=3)))
    assert "'start' has 3 views but 'control' 2" in words
    words = refusal(lambda: tell_fun(vae, control, reference=pictures(1, views=3)))
    assert "'reference' has 3 views but there are 2" in words
    assert "brings 4 texts" in refusal(lambda: tell_fun(vae, control, text(4)))


# --- image to video -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_vision(tmp_path_factory):
    """CLIP's vision half as ComfyUI builds it, of two layers, for pictures of 28 pixels."""
    file = tmp_path_factory.mktemp("clip_vision") / "config.json"
    file.write_text(
        '{"hidden_size": 1280, "num_hidden_layers": 2, "intermediate_size": 16, "image_size": 28,'
        '"num_attention_heads": 16, "hidden_act": "gelu", "num_channels": 3, "patch_size": 14,'
        '"projection_dim": 8, "model_type": "clip_vision_model"}'
    )
    model = comfy.clip_vision.ClipVisionModel(str(file))
    model.load_sd(small.random_weights(model.model))
    return model


def tell_i2v(vae, start: Views, frames=9, start_frames=1, positive=None, clip_vision=None):
    given = positive or text(), text(seed=1), vae, start
    node = conditioning_wan.I2VConditioning
    return node.execute(*given, frames, start_frames, clip_vision=clip_vision).args


@pytest.mark.parametrize("start_frames", [1, 5])
def test_i2v_is_told_bit_for_bit_as_by_the_node_for_one_video(vae, start_frames):
    start = pictures(0)
    positive, negative, latent, note = tell_i2v(vae, start, 9, start_frames)
    assert note == "" and latent["samples"].shape == (2, 16, 3, 2, 4)
    assert set(latent) == {"samples"} and not latent["samples"].any()
    for v in range(2):
        expected = nodes_wan.WanImageToVideo.execute(
            text(), text(seed=1), vae, 32, 16, 9, 1, images(start, v)[:start_frames]
        ).args
        for ours, theirs in zip((positive, negative), expected[:2], strict=True):
            told, wanted = ours[0][1], theirs[0][1]
            image = told["concat_latent_image"][v : v + 1]
            assert torch.equal(image, wanted["concat_latent_image"])
            assert torch.equal(told["concat_mask"], wanted["concat_mask"])


def test_wan_22_5b_begins_in_the_latent_as_by_the_node_for_one_video(large_vae):
    start = pictures(0, width=64, height=32)
    positive, negative, latent, note = tell_i2v(large_vae, start)
    assert note == "" and positive[0][1] == negative[0][1] == {}
    assert latent["samples"].shape == (2, 48, 3, 2, 4)
    for v in range(2):
        expected = nodes_wan.Wan22ImageToVideoLatent.execute(
            large_vae, 64, 32, 9, 1, images(start, v)[:1]
        ).args[0]
        for key in ("samples", "noise_mask"):
            assert torch.equal(latent[key][v : v + 1], expected[key])


def test_every_view_is_shown_to_clip_vision_uncut(vae, clip_vision, reports):
    start = pictures(0)
    positive, *_ = tell_i2v(vae, start, clip_vision=clip_vision)
    assert reports == [(n, 4) for n in (1, 2, 3, 4)]
    states = positive[0][1]["clip_vision_output"].penultimate_hidden_states
    assert states.shape == (2, 5, 1280)
    for v in range(2):
        seen = clip_vision.encode_image(images(start, v)[:1], crop=False)
        assert torch.equal(states[v : v + 1], seen.penultimate_hidden_states)
        cropped = clip_vision.encode_image(images(start, v)[:1], crop=True)
        assert not torch.allclose(states[v : v + 1], cropped.penultimate_hidden_states)


def test_start_frames_beyond_the_clip_are_told(vae):
    start = pictures(0, frames=6)
    _, _, latent, note = tell_i2v(vae, start, frames=10, start_frames=9)
    assert latent["samples"].shape[2] == 3
    assert "10 frames became 9" in note and "5 of 9 start frames were taken" in note


# --- View Prompts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """Wan's text encoder with its tokenizer, in small."""
    return small.clip(small.text_encoder())


def ring(*degrees: float):
    azimuths = torch.tensor([math.radians(d) for d in degrees])
    return orbit_rig(azimuths, torch.zeros(len(degrees)), 3.0, 0.6, 16, 16)


def test_every_view_has_its_text_as_the_host_encodes_it(clip, reports):
    rig, node = ring(0, 90, 0), prompts.ViewPrompts
    [[stacked, values]], listed = node.execute(clip, rig, "a coat", "facing left or right").args
    assert listed.splitlines() == [
        "0°: a coat, front view, facing the camera",
        "90°: a coat, side view in profile, facing left",
        "0°: a coat, front view, facing the camera",
    ]
    assert stacked.shape == (3, 512, 4096) and values["pooled_output"] is None
    assert reports == [(1, 3), (2, 3), (3, 3)]
    for row, line in zip(stacked, listed.splitlines(), strict=True):
        tokens = clip.tokenize(line.split(": ", 1)[1])
        assert torch.equal(row, clip.encode_from_tokens_scheduled(tokens)[0][0][0])
    assert not torch.equal(stacked[0], stacked[1])


def test_texts_longer_than_512_tokens_are_filled_up_as_wan_fills_up(clip):
    rig, long = ring(0, 180), "zq {view} " * 60
    stacked = prompts.ViewPrompts.execute(clip, rig, long, "own left or right side").args[0][0][0]
    alone = [
        clip.encode_from_tokens_scheduled(clip.tokenize(long.strip().replace("{view}", words)))[0][
            0
        ]
        for words in ("view from the front", "view from behind")
    ]
    lengths = [encoded.shape[1] for encoded in alone]
    assert min(lengths) > 512 and lengths[0] != lengths[1]
    for row, encoded in zip(stacked, alone, strict=True):
        assert torch.equal(row[: encoded.shape[1]], encoded[0])
        assert not row[encoded.shape[1] :].any()


def test_pooled_texts_are_stacked_too():
    """As text encoders of other models give them."""
    entries = tuple([draw(1, 4, 8, seed=s), {"pooled_output": draw(1, 6, seed=s)}] for s in (0, 1))
    stacked, values = prompts._one_batch(entries)
    assert stacked.shape == (2, 4, 8)
    assert torch.equal(values["pooled_output"][1:], entries[1][1]["pooled_output"])


def test_checkpoint_without_a_text_encoder_is_refused():
    node = prompts.ViewPrompts
    words = refusal(lambda: node.execute(None, ring(0), "a coat", "text alone"))
    assert "has no text encoder" in words


# --- do conditions, latent, rig and model belong together? ----------------------------------------


@pytest.fixture(scope="module")
def models():
    """One tiny random model of a kind, through ComfyUI's own detection."""
    made = {}

    def of(kind: str):
        if kind not in made:
            weights = {
                "t2v": lambda: small.transformer(),
                "turnaround": lambda: small.transformer(in_dim=48),
                "i2v": lambda: small.transformer("i2v", 36),
                "fun": lambda: small.transformer("i2v", 48, in_dim_ref_conv=16),
                "vace": small.vace,
                "5b": lambda: small.transformer(in_dim=48, out_dim=48),
            }[kind]()
            made[kind] = comfy.sd.load_diffusion_model_state_dict(weights)
        return made[kind]

    return of


def check(model, positive: list, negative: list | None = None, latent=(VIEWS, *SHAPE), rig=None):
    check_conditions.check_conditions(model, positive, negative or [], torch.zeros(latent), rig)


def told(rows: int = VIEWS, shape=SHAPE, channels: int = 32, **values) -> list:
    return text(concat_latent_image=torch.zeros(rows, channels, *shape[1:]), **values)


def vace_told(rows: int = VIEWS, shape=SHAPE) -> list:
    frames, mask = torch.zeros(rows, 32, *shape[1:]), torch.zeros(rows, 64, *shape[1:])
    return text(vace_frames=[frames], vace_mask=[mask], vace_strength=[1.0])


def clip_states(rows: int) -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output.penultimate_hidden_states = torch.zeros(rows, 5, 1280)
    return output


OTHERS = {
    "views": (2, SHAPE, "2 views x 2 latent frames of 6x4"),
    "length": (VIEWS, (16, 3, 4, 6), "3 views x 3 latent frames of 6x4"),
    "size": (VIEWS, (16, 2, 4, 4), "3 views x 2 latent frames of 4x4"),
}
OWN = "3 views x 2 latent frames of 6x4"


@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("other", OTHERS)
def test_conditions_that_do_not_fit_the_latent_are_refused(models, side, other):
    rows, shape, measured = OTHERS[other]
    for kind, make, name in (
        ("turnaround", told, "view conditions"),
        ("vace", vace_told, "VACE conditions"),
    ):
        given = {"positive": make(), "negative": make(), side: make(rows, shape)}
        words = refusal(lambda kind=kind, given=given: check(models(kind), **given))
        assert words.startswith(
            f"The {name} of '{side}' are for {measured} but the latent has {OWN}:"
        )


@pytest.mark.parametrize("kind", ["turnaround", "vace"])
def test_one_row_or_one_a_view_fits(models, kind):
    make = told if kind == "turnaround" else vace_told
    for rows in (1, VIEWS):
        check(models(kind), make(rows), make(rows), rig=ring(0, 90, 180))


@pytest.mark.parametrize(
    ("name", "value", "measured"),
    [
        ("concat_mask", torch.zeros(2, 1, *SHAPE[1:]), "masks of the view conditions"),
        ("clip_vision_output", clip_states(2), "CLIP Vision pictures"),
        ("reference_latents", [torch.zeros(2, 16, 1, 4, 6)], "reference pictures"),
    ],
)
def test_whatever_has_a_row_a_view_is_checked(models, name, value, measured):
    words = refusal(lambda: check(models("fun"), told(**{name: value})))
    assert words.startswith(f"The {measured} of 'positive' are for 2 views")
    assert "but the latent has 3 views" in words


def test_reference_of_another_size_is_refused(models):
    reference = [torch.zeros(1, 16, 1, 8, 8)]
    words = refusal(lambda: check(models("fun"), told(reference_latents=reference)))
    assert "are for 1 view of 8x8 but the latent has 3 views of 6x4" in words


def test_texts_of_another_rig_are_refused(models):
    plain = text(4)
    words = refusal(lambda: check(models("t2v"), plain))
    assert "'positive' brings 4 texts but there are 3 views" in words
    check(models("t2v"), text(VIEWS), text(1))


def test_text_of_another_encoder_is_refused(models):
    clip_text = [[draw(1, 77, 768), {}]]
    words = refusal(lambda: check(models("t2v"), text(), clip_text))
    assert "'negative' has 768 numbers a token but the model reads 4096" in words


def test_second_of_two_joined_conditions_is_checked_too(models):
    words = refusal(lambda: check(models("turnaround"), told() + told(2)))
    assert "are for 2 views x" in words


def test_rig_with_other_cameras_than_the_latent_is_refused(models):
    words = refusal(lambda: check(models("turnaround"), told(), rig=ring(0, 90)))
    assert "The rig has 2 cameras but the latent 3 views" in words


@pytest.mark.parametrize(
    ("kind", "channels", "node"),
    [
        ("turnaround", 48, "Multi-View Conditioning, or Multi-View Fun-Control Conditioning"),
        ("fun", 48, "Multi-View Fun-Control Conditioning"),
        ("i2v", 36, "Multi-View I2V Conditioning"),
    ],
)
def test_conditions_that_are_missing_are_refused_with_their_node(models, kind, channels, node):
    words = refusal(lambda: check(models(kind), text()))
    assert f"takes {channels} channels but 'positive' carries no view conditions" in words
    assert node in words


@pytest.mark.parametrize(
    ("kind", "channels", "brought"), [("t2v", 32, 48), ("i2v", 32, 48), ("fun", 16, 32)]
)
def test_model_with_other_room_for_conditions_is_refused(models, kind, channels, brought):
    """ComfyUI would leave them out, or cut them off, without a word."""
    words = refusal(lambda: check(models(kind), told(channels=channels)))
    takes = models(kind).model.diffusion_model.patch_embedding.weight.shape[1]
    assert f"takes {takes} input channels but latent and conditions bring {brought}" in words


def test_what_the_model_would_leave_out_is_refused(models):
    words = refusal(lambda: check(models("t2v"), vace_told()))
    assert "'positive' brings VACE conditions but the model is no VACE model" in words
    reference = {"reference_latents": [torch.zeros(1, 16, 1, 4, 6)]}
    words = refusal(lambda: check(models("i2v"), told(channels=16, **reference)))
    assert "brings a reference picture but the model has no place for one" in words
    cameras = {"camera_conditions": torch.zeros(VIEWS, 24, 2, 32, 48)}
    words = refusal(lambda: check(models("i2v"), told(channels=16, **cameras)))
    assert "the model is no Fun-Camera model" in words


def test_latent_of_another_vae_is_refused(models):
    words = refusal(lambda: check(models("5b"), text()))
    assert "The latent has 16 channels but the model works on 48" in words
    check(models("5b"), text(), latent=(VIEWS, 48, 2, 4, 6))


# --- sockets --------------------------------------------------------------------------------------


def missing_sockets(monkeypatch, node, **widgets) -> set[str]:
    """What ComfyUI says of a node whose sockets are all free."""
    name = node.GET_SCHEMA().node_id
    monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, name, node)
    prompt = {"1": {"class_type": name, "inputs": widgets}}
    _, errors, _ = asyncio.run(execution.validate_inputs("run", prompt, "1", {}))
    assert {e["type"] for e in errors} == {"required_input_missing"}
    return {e["extra_info"]["input_name"] for e in errors}


def test_missing_sockets_are_named_by_comfyui(monkeypatch):
    always = {"positive", "negative", "vae"}
    for node, widgets, wanted in (
        (conditioning.MultiViewConditioning, {}, {"vae", "partial"}),
        (conditioning.EmptyViewConditioning, {"frames": 1}, {"vae", "rig"}),
        (conditioning_wan.VaceConditioning, {"strength": 1.0}, always | {"control"}),
        (conditioning_wan.FunControlConditioning, {}, always | {"control"}),
        (conditioning_wan.I2VConditioning, {"frames": 5, "start_frames": 1}, always | {"start"}),
        (prompts.ViewPrompts, {"text": "", "wording": "text alone"}, {"clip", "rig"}),
    ):
        assert missing_sockets(monkeypatch, node, **widgets) == wanted
