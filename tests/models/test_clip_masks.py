"""Masks by the colours of a clip: what is lost comes back, what is too much goes, errors stay small."""

import torch
from turnaround.models.clip_masks import refine_masks
from turnaround.models.metrics import mask_iou

F, H, W = 3, 96, 80


def clip():
    """A red performer, 20 wide, who walks through a green room with noise: pictures and truth."""
    noise = 0.04 * torch.randn(F, 3, H, W, generator=torch.Generator().manual_seed(0))
    truth = torch.zeros(F, H, W)
    for f in range(F):
        truth[f, 16:80, 24 + 6 * f : 44 + 6 * f] = 1
    red, green = torch.tensor([0.8, 0.2, 0.2]), torch.tensor([0.2, 0.6, 0.3])
    pictures = torch.where(truth[:, None] > 0, red[:, None, None], green[:, None, None])
    return (pictures + noise).clamp(0, 1), truth


def unsure(truth):
    """A net's answer: half of the body lost, a table leg and a line on the floor taken along."""
    share = 0.95 * truth
    share[:, 40:64] *= 0.4  # 0.38 there: lost
    share[:, 60:90, 70:74] = 0.7
    share[:, 88:90, :] = 0.95
    return share


def test_a_lost_chest_comes_back_and_furniture_goes():
    pictures, truth = clip()
    share = unsure(truth)
    assert mask_iou(share, truth) < 0.65
    assert mask_iou(refine_masks(pictures, share), truth) > 0.97


def test_colours_of_one_frame_help_another():
    """In the last frame hardly anything is sure; the others know what red is."""
    pictures, truth = clip()
    share = unsure(truth)
    share[-1] = 0.45 * truth[-1]
    share[-1, 20:50] = 0.95 * truth[-1, 20:50]
    assert mask_iou(refine_masks(pictures, share)[-1], truth[-1]) > 0.95


def test_a_frame_that_would_change_too_much_keeps_its_answer():
    pictures, truth = clip()
    wrong = 0.95 * truth.roll(40, 1)  # a box beside the performer, across both colours
    refined = refine_masks(pictures, wrong, together=False)
    area, new = ((m > 0.5).flatten(1).sum(1) for m in (wrong, refined))
    assert (new >= 0.5 * area).all() and (new <= 2.5 * area).all()


def test_nobody_stays_nobody():
    pictures, truth = clip()
    nobody = torch.full_like(truth, 0.01)
    torch.testing.assert_close(refine_masks(pictures, nobody), nobody)


def test_same_clip_same_mask_and_every_frame_is_counted():
    pictures, truth = clip()
    pictures, truth = pictures.repeat(6, 1, 1, 1), truth.repeat(6, 1, 1)  # more than a window
    done = []
    first = refine_masks(
        pictures, unsure(truth), on_step=lambda count, preview=None: done.append(count)
    )
    assert sum(done) == len(truth)
    assert torch.equal(first, refine_masks(pictures, unsure(truth)))
