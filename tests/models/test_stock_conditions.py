"""Layouts of published checkpoints, against loops that spell them out."""

import torch
from turnaround.models.stock_conditions import (
    start_clip,
    unknown_frames,
    vace_mask,
    vace_parts,
)
from turnaround.models.views import latent_frames


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_a_latent_frame_holds_four_frames_after_the_first():
    assert [latent_frames(f) for f in (1, 4, 5, 8, 9, 49)] == [1, 1, 2, 2, 3, 13]


def test_seen_colours_are_kept_and_the_rest_is_made_from_the_control():
    control, partial = draw(2, 3, 16, 8), draw(2, 3, 16, 8, seed=1)
    seen = draw(2, 16, 8, seed=2) > 0.5
    inactive, reactive, make = vace_parts(control, partial, seen)
    where = seen[:, None].expand_as(control)
    torch.testing.assert_close(inactive[where], partial[where])
    torch.testing.assert_close(reactive[~where], control[~where])
    assert (inactive[~where] == 0.5).all() and (reactive[where] == 0.5).all()
    assert torch.equal(make, (~seen).float())


def test_without_known_colours_everything_is_made():
    control = draw(1, 3, 8, 8)
    inactive, reactive, make = vace_parts(control, None, None)
    assert (inactive == 0.5).all() and (make == 1).all()
    torch.testing.assert_close(reactive, control)


def test_pixels_of_a_latent_pixel_are_the_channels_of_the_mask():
    make = (draw(9, 16, 24) > 0.5).float()
    mask = vace_mask(make)
    assert mask.shape == (64, 3, 2, 3)
    for t, frame in enumerate((1, 4, 7)):  # the middles of three thirds of nine frames
        for y in range(8):
            for x in range(8):
                assert torch.equal(mask[8 * y + x, t], make[frame, y::8, x::8])


def test_clip_begins_as_told_and_is_grey_from_there():
    start = draw(2, 3, 4, 4)
    clip = start_clip(start, 5)
    assert clip.shape == (5, 3, 4, 4)
    assert torch.equal(clip[:2], start) and (clip[2:] == 0.5).all()
    mask = unknown_frames(1, (2, 3, 4))
    assert mask.shape == (1, 1, 2, 3, 4) and not mask[:, :, 0].any() and mask[:, :, 1].all()
