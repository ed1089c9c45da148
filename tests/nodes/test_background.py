"""Stable Background in the real ComfyUI: what comes in by every socket, what goes out, what is refused."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views
from turnaround.nodes.background import StableBackground

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, FRAMES, WIDTH, HEIGHT = 2, 4, 48, 32
WALL = torch.tensor([0.2, 0.4, 0.6])[:, None, None]


@pytest.fixture(autouse=True)
def _said(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="turnaround")
    monkeypatch.setattr(StableBackground, "hidden", SimpleNamespace(unique_id="1"))


def performer() -> Tensor:  # [V, F, H, W]
    """A box of 8 x 16 that walks right by 8 pixels a frame."""
    masks = torch.zeros(VIEWS, FRAMES, HEIGHT, WIDTH)
    for f in range(FRAMES):
        masks[:, f, 8:24, 8 + 8 * f : 16 + 8 * f] = 1
    return masks


def views(masks: Tensor | None = None, flicker: float = 0.05) -> Views:
    """A white box before a wall that flickers; without masks, unless given."""
    noise = torch.randn(VIEWS, FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    frames = torch.where(performer()[:, :, None] > 0, 0.95, WALL + flicker * noise)
    azimuths = torch.tensor([0.0, math.pi])
    rig = orbit_rig(azimuths, torch.zeros(VIEWS), 3.0, 0.6, WIDTH, HEIGHT)
    return Views(frames.clamp(0, 1), masks, rig, 12.0)


def steady(given: Views, **sockets) -> tuple[Views, Tensor, Tensor, str]:
    return StableBackground.execute(given, **(dict(grow=1, camera="still") | sockets)).args


def refusal(given: Views, **sockets) -> str:
    with pytest.raises(ValueError) as refused:
        steady(given, **sockets)
    return str(refused.value)


def test_performer_stays_and_the_background_stops():
    given, masks = views(performer()), performer()
    result, plate, hole, note = steady(given)
    assert result.rig is given.rig and result.fps == 12.0 and torch.equal(result.masks, masks)
    inside = torch.nn.functional.max_pool2d(1 - masks, 5, 1, 2) == 0
    assert inside.any()
    for colour in range(3):
        assert torch.equal(result.frames[:, :, colour][inside], given.frames[:, :, colour][inside])
    assert plate.shape == (VIEWS, HEIGHT, WIDTH, 3) and plate.is_contiguous()
    assert hole.shape == (VIEWS, HEIGHT, WIDTH) and hole.dtype == torch.float32
    past = masks.sum(1) == 0
    assert result.frames[0, :, :, past[0]].std(0).max() == 0
    top = given.frames[..., :4, :]  # without the performer
    assert (plate.movedim(-1, 1) - WALL).abs().mean() < 0.7 * (top - WALL).abs().mean()
    assert note == ""  # every place was seen


def test_mask_comes_from_views_or_masks_or_the_clip():
    """Whatever brings them, the same masks give the same result."""
    masks = performer()
    expected = steady(views(masks))
    flat = masks.flatten(0, 1)
    for mask in (views(masks), flat):
        result = steady(views(), mask=mask)
        assert torch.equal(result[0].frames, expected[0].frames)
    # The socket wins over the views' own masks.
    result = steady(views(torch.ones_like(masks)), mask=flat)
    assert torch.equal(result[0].frames, expected[0].frames)
    half = torch.nn.functional.avg_pool2d(flat[:, None], 2)[:, 0]
    result = steady(views(), mask=half)
    assert "scaled from 24x16 to 48x32" in result[3]
    one = steady(views(), mask=masks[0, 0])[0].masks
    assert torch.equal(one, masks[0, 0].expand_as(masks))


def test_without_any_mask_a_plain_background_tells():
    result, _, _, note = steady(views(flicker=0.01))
    assert "guessed from the plain background" in note
    assert ((result.masks > 0.5) == (performer() > 0.5)).float().mean() > 0.99
    busy = torch.rand(1, FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    assert "view 0 is not plain enough" in refusal(Views(busy))


def test_plate_goes_out_and_comes_back():
    masks = performer()
    masks[:, :, 8:24, 24:32] = 1  # never seen there
    given = views(masks)
    _, plate, hole, note = steady(given)
    assert hole[:, 8:24, 24:32].min() == 1
    assert "painted in: 0° " in note
    inpainted = torch.where(hole[..., None] > 0, 0.1, plate)
    result, again, _, note = steady(given, plate=inpainted)
    assert torch.equal(again, inpainted)
    assert "taken from 'plate'" in note
    past = masks.sum(1) == 0
    for v in range(VIEWS):
        shown = result.frames[v, 0][:, past[v]]
        assert torch.equal(shown, inpainted.movedim(-1, 1)[v][:, past[v]])
    # One picture with alpha, of another size.
    result, plate, _, _ = steady(given, plate=torch.full((1, 20, 20, 4), 0.7))
    assert plate.shape == (VIEWS, HEIGHT, WIDTH, 3)
    torch.testing.assert_close(plate, torch.full_like(plate, 0.7))


def test_follow_says_what_it_could_not_follow():
    note = steady(views(performer(), flicker=0), camera="follow")[3]
    assert note.startswith("views 0°, 180°: the camera could not be followed")


def test_bytes_pass():
    given = views(performer())
    small = Views((given.frames * 255).byte(), performer() > 0.5, given.rig)
    result, plate, _, _ = steady(small)
    assert result.frames.dtype == torch.uint8 and plate.dtype == torch.float32
    assert (plate.movedim(-1, 1) - WALL).abs().mean() < 0.04


def test_bad_input_is_refused_in_one_sentence():
    masks = performer()
    good = views(masks)
    broken = good.frames.clone()
    broken[1, 2, 0, 3, 4] = torch.nan
    bad_mask = masks.flatten(0, 1).clone()
    bad_mask[3] = torch.inf
    depth = Views(torch.ones(VIEWS, FRAMES, 1, HEIGHT, WIDTH), masks)
    plate = torch.zeros(VIEWS, 8, 8, 3)
    for given, sockets, parts in (
        (Views(broken, masks, good.rig), {}, ["'views'", "NaN", "view 180°", "[2]"]),
        (depth, {}, ["'views'", "depth"]),
        (good, dict(mask=bad_mask), ["'mask'", "NaN"]),
        (good, dict(mask=bad_mask[:5]), ["'mask'", "5 masks", "2 views x 4 frames"]),
        (good, dict(mask=views()), ["'mask'", "without masks"]),
        (good, dict(mask=Views(broken[:1], masks[:1])), ["'mask'", "1 views", "2 x 4"]),
        (good, dict(mask=torch.ones(8, 32, 32)), ["'mask'", "32x32", "48x32"]),
        (good, dict(mask=torch.zeros(8, HEIGHT, WIDTH)), ["black in every frame"]),
        (good, dict(mask=torch.ones(8, HEIGHT, WIDTH)), ["covers the whole picture"]),
        (good, dict(plate=plate[[0, 0, 1]]), ["'plate'", "3 pictures", "2 views"]),
        (good, dict(plate=plate * torch.nan), ["'plate'", "NaN"]),
    ):
        said = refusal(given, **sockets)
        assert all(part in said for part in parts), said
        assert said.count(". ") == 0, "one sentence"


def test_mask_takes_masks_and_views():
    kinds = {i.id: i.get_io_type() for i in StableBackground.define_schema().inputs}
    assert set(kinds["mask"].split(",")) == {"MASK", "TURNAROUND_VIEWS"}
