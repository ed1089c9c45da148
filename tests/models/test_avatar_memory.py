"""Memory of distilling, counted before the first step."""

from dataclasses import replace

import pytest
import torch
from turnaround.models.avatar_memory import LEAST, most_that_fit, training_bytes
from turnaround.models.body import Body
from turnaround.models.distilling import PRESETS
from turnaround.models.views import Views


def views(size: int) -> Views:
    return Views(torch.zeros(2, 3, 3, size, size, dtype=torch.uint8))


BODY = Body(torch.zeros(3, 1000, 3), torch.zeros(10, 3, dtype=torch.int64), torch.zeros(1000, 3))


@pytest.mark.parametrize(
    ("count", "size", "measured"),
    [(5000, 256, 42), (5000, 1024, 646), (100_000, 1024, 704), (200_000, 1024, 854)],
)
def test_what_was_measured_fits_and_not_much_is_wasted(count, size, measured):
    settings = replace(PRESETS["draft"], most=count)
    counted = training_bytes(settings, views(size), None) / 2**20
    assert measured <= counted < 1.6 * measured + 10


def test_more_of_everything_needs_more():
    draft = PRESETS["draft"]
    base = training_bytes(draft, views(64), None)
    assert training_bytes(draft, views(128), None) > base
    assert training_bytes(replace(draft, degree=2), views(64), None) > base
    assert training_bytes(draft, views(64), BODY) > base
    assert training_bytes(replace(draft, detail=True), views(64), BODY) > training_bytes(
        replace(draft, detail=False), views(64), BODY
    )


def test_a_longer_clip_without_a_body_may_need_more_clouds():
    full = PRESETS["full"]
    one, many = (Views(torch.zeros(2, n, 3, 8, 8, dtype=torch.uint8)) for n in (1, 40))
    grown = [training_bytes(full, v, None) for v in (one, many)]
    # A few in turns are held beside the one that learns, but never all that many frames could be.
    assert 1000 * full.most < grown[1] - grown[0] < 3000 * full.most
    longer = Views(torch.zeros(2, 160, 3, 8, 8, dtype=torch.uint8))
    assert training_bytes(full, longer, None) - grown[1] < 10 * full.most


def test_as_many_are_taken_as_fit():
    settings = replace(PRESETS["full"], degree=1)
    needed = training_bytes(settings, views(128), BODY)
    assert most_that_fit(needed + 100, settings, views(128), BODY) == settings.most
    half = most_that_fit(needed // 2, settings, views(128), BODY)
    assert LEAST <= half < settings.most
    assert training_bytes(replace(settings, most=half), views(128), BODY) <= needed // 2


def test_too_little_memory_is_said_with_both_figures():
    with pytest.raises(ValueError, match=r"needs \d+ MiB of memory at least, and 4 MiB are free"):
        most_that_fit(4 << 20, PRESETS["draft"], views(256), None)
