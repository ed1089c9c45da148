"""What is said about views and bodies that don't do."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from turnaround.models.avatar_checks import (
    disagreeing_note,
    empty_note,
    few_views_note,
    misfit_note,
    overlaps,
    turns_note,
)
from turnaround.models.body import Body
from turnaround.models.cameras import orbit_rig
from turnaround.models.rasterize_mesh import rasterize_mesh
from turnaround.models.views import Views

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, VIEWS, FRAMES = 48, 4, 3


def box() -> Body:
    """0.6 x 1.6 x 0.4 m, on its way along x."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = torch.tensor([[s[0], s[i + 1], s[i]] for s in sides for i in (1, 2)])
    rest = corners * torch.tensor([0.3, 0.8, 0.2])
    way = torch.arange(FRAMES)[:, None, None] * torch.tensor([0.1, 0, 0])
    return Body(rest + way, faces, rest)


@pytest.fixture(scope="module")
def views() -> Views:
    rig = orbit_rig(
        torch.arange(VIEWS) * (2 * math.pi / VIEWS), torch.zeros(VIEWS), 4.0, 0.6, SIZE, SIZE
    )
    body, masks = box(), torch.zeros(VIEWS, FRAMES, SIZE, SIZE)
    for v, (K, T) in enumerate(zip(rig.K, rig.T_camera_world, strict=True)):
        camera = body.vertices @ T[:3, :3].T + T[:3, 3]
        masks[v] = (rasterize_mesh(camera, body.faces, K, SIZE, SIZE).faces >= 0).float()
    return Views(masks[:, :, None].expand(-1, -1, 3, -1, -1), masks, rig)


def test_the_body_of_the_views_fits(views):
    assert min(overlaps(views, box()).values()) > 0.99
    assert misfit_note(views, box()) == ""


def test_a_body_aside_overlaps_by_what_geometry_says(views):
    # Seen from the front, 0.6 m wide and 0.3 m aside: a third of the union is shared.
    aside = replace(box(), vertices=box().vertices + torch.tensor([0.3, 0, 0]))
    assert overlaps(views, aside)[0, 0] == pytest.approx(1 / 3, abs=0.06)


def test_a_body_that_is_too_small_is_told_of(views):
    smaller = replace(box(), vertices=box().vertices * 0.72)
    note = misfit_note(views, smaller)
    assert "overlap by" in note and "least in view" in note


def test_another_body_is_refused_with_view_frame_and_figure(views):
    lying = replace(box(), vertices=box().vertices[..., [1, 0, 2]])
    with pytest.raises(
        ValueError, match=r"'body' doesn't fit .* \d+ % \(least in view .*, frame \d"
    ):
        misfit_note(views, lying)


def test_bodies_are_not_compared_where_nobody_is_seen(views):
    masks = views.masks.clone()
    masks[0] = 0
    found = overlaps(replace(views, masks=masks), box())
    assert {v for v, _ in found} == {1, 2, 3}
    assert misfit_note(replace(views, masks=torch.zeros_like(masks)), box()) == ""


def test_pictures_without_a_person_are_counted_by_view_and_moment():
    masks = torch.ones(2, 3, 4, 4)
    assert empty_note(masks, ("front", "left")) == ""
    masks[1, :2] = 0
    masks[0, 1] = 0
    note = empty_note(masks, ("front", "left"))
    assert "3 pictures show nobody" in note and "1 of view front, 2 of view left" in note
    assert "no view shows anybody in frames 1:" in note


def test_two_views_are_told_of(views):
    assert few_views_note(views) == ""
    two = Views(views.frames[:2], views.masks[:2], views.rig.select([0, 1]))
    assert few_views_note(two).startswith("2 views")


def trained(views: Views, losses: list[float]):
    """What of a training is looked at: which view each step drew, and its loss."""
    return SimpleNamespace(
        step=len(losses), losses=losses, views=views, weights=torch.ones(VIEWS),
        draw=lambda step: (step % VIEWS, 0, None, None),
    )  # fmt: skip


def test_clouds_that_take_turns_are_said():
    assert turns_note([0, 0, 0]) == ""
    note = turns_note([0, 0, 1, 2, 2])
    assert "3 clouds take turns (new ones begin at frames 2, 3)" in note


def test_a_view_that_stands_out_is_named(views):
    even = [0.1] * 80
    assert disagreeing_note(trained(views, even)) == ""
    shaken = [0.2 if step % VIEWS == 2 else 0.1 for step in range(80)]
    note = disagreeing_note(trained(views, shaken))
    assert f"view {views.rig.labels[2]} disagrees" in note and "2.0 times" in note
    # Only what was learned last counts.
    early = shaken[:40] + even[:40]
    assert disagreeing_note(trained(views, early)) == ""
