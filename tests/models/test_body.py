"""The body: what it refuses, its centre, its time, and what counts as a deformation."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from turnaround.models.body import (
    Body,
    deformation,
    facing_outwards,
    place_template,
    vertex_areas,
)

FACES = torch.tensor(
    [[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7], [0, 1, 5], [0, 5, 4],
     [1, 2, 6], [1, 6, 5], [2, 3, 7], [2, 7, 6], [3, 0, 4], [3, 4, 7]]
)  # fmt: skip


def box() -> Tensor:  # [8, 3]
    """A box of 0.4 x 1.6 x 0.2 m around the origin; FACES are seen from outside."""
    x, y, z = 0.2, 0.8, 0.1
    return torch.tensor(
        [[-x, -y, -z], [x, -y, -z], [x, y, -z], [-x, y, -z],
         [-x, -y, z], [x, -y, z], [x, y, z], [-x, y, z]]
    )  # fmt: skip


def turn(yaw: float, pitch: float = 0.0) -> Tensor:  # [3, 3]
    c, s, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    about_y = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return about_y @ torch.tensor([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])


def walking(frames: int = 5) -> Body:
    """The box walks, turns and leans as one piece."""
    angles = torch.arange(frames) * 0.7
    moved = [
        box() @ turn(float(a), 0.3 * float(a)).T + torch.tensor([float(a), 0, 1]) for a in angles
    ]
    return Body(torch.stack(moved), FACES, box())


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"vertices": torch.zeros(0, 8, 3)}, "holds no mesh"),
        ({"vertices": torch.zeros(8, 3)}, r"\[frames, vertices, 3\]"),
        ({"faces": FACES[:0]}, "needs triangles"),
        ({"faces": FACES[:, :2]}, "needs triangles"),
        ({"faces": FACES + 1}, "names vertex 8, but there are 8"),
        ({"faces": FACES - 1}, "the mesh file is damaged"),
        ({"rest": box()[:7]}, r"rest of shape \[8, 3\]"),
        ({"colors": torch.zeros(5, 3)}, r"colors of shape \[8, 3\]"),
        ({"neutral": torch.zeros(4, 8, 3)}, r"neutral of shape \[5, 8, 3\]"),
        ({"vertices": torch.full((5, 8, 3), math.nan)}, "NaN, infinity or places farther"),
        ({"vertices": torch.full((5, 8, 3), 2000.0)}, "its unit"),
        ({"rest": torch.full((8, 3), math.inf)}, "The rest of the body hold NaN"),
        ({"fps": 0.0}, "above 0"),
    ],
)
def test_what_is_no_body_is_refused_in_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(walking(), **change)


def test_far_too_large_body_is_refused_before_anything_is_computed():
    huge = torch.zeros(1, 1, 3).expand(30_000, 10_000, 3)  # no memory behind it
    with pytest.raises(ValueError, match="10000 vertices in 30000 frames, more than fit"):
        Body(huge, FACES, torch.zeros(10_000, 3))


def test_centred_body_has_its_mean_box_at_the_origin():
    body = replace(walking(), neutral=walking().vertices + 1).centred()
    boxes = (body.vertices.amin(1) + body.vertices.amax(1)) / 2
    torch.testing.assert_close(boxes.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    # The neutral body moves along: what differs is not changed.
    torch.testing.assert_close(body.neutral - body.vertices, torch.ones(5, 8, 3))


def test_extent_is_the_outermost_vertex():
    width, height = Body(box()[None], FACES, box()).extent()
    assert width == pytest.approx(math.hypot(0.2, 0.1)) and height == pytest.approx(0.8)


def test_resampling_keeps_both_ends_and_moves_straight_between():
    straight = box() + torch.arange(4.0)[:, None, None]
    body = Body(straight, FACES, box(), neutral=straight + 1, fps=30).resampled(7)
    torch.testing.assert_close(body.vertices, box() + torch.arange(7.0)[:, None, None] / 2)
    torch.testing.assert_close(body.neutral, body.vertices + 1)
    assert body.fps == 60  # the same 0.1 s, twice as many steps
    assert torch.equal(body.resampled(2).vertices, straight[[0, 3]])


def test_one_frame_can_be_held():
    held = Body(box()[None], FACES, box()).resampled(5)
    assert torch.equal(held.vertices, box().expand(5, 8, 3)) and held.fps == 16


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="at least 1 frame"):
        walking().resampled(0)


def test_inside_out_meshes_are_turned_over():
    assert torch.equal(facing_outwards(FACES, box() + 5), FACES)
    assert torch.equal(facing_outwards(FACES.flip(1), box() + 5).flip(1), FACES.flip(1))


def test_placement_recovers_a_rigid_motion():
    R, t = turn(2.0, 0.5), torch.tensor([0.3, -0.2, 1.5])
    placed = place_template(box(), (box() @ R.T + t)[None], vertex_areas(box(), FACES))
    torch.testing.assert_close(placed.rotations[0], R, atol=1e-5, rtol=0)
    torch.testing.assert_close(placed.offsets[0], t, atol=1e-5, rtol=0)


def test_placement_never_mirrors():
    mirrored = (box() * torch.tensor([-1.0, 1, 1]) + 0.01 * box().roll(1, 0))[None]
    placed = place_template(box(), mirrored, vertex_areas(box(), FACES))
    assert torch.linalg.det(placed.rotations[0]) == pytest.approx(1, abs=1e-5)


def test_walking_and_turning_is_no_deformation():
    assert deformation(walking()).abs().max() < 1e-5


def test_crowded_vertices_weigh_no_more_than_their_surface():
    """A thousand vertices without surface at one corner must not pull the template there."""
    crowd = box()[:1].expand(1000, 3)
    rest = torch.cat([box(), crowd])
    posed = torch.cat([box(), crowd + 0.5])
    placed = place_template(rest, posed[None], vertex_areas(rest, FACES))
    torch.testing.assert_close(placed.offsets[0], torch.zeros(3), atol=1e-6, rtol=0)


def test_deformation_is_told_in_the_axes_of_the_template():
    """A bump of 1 cm to the body's side stays one to the side, wherever the body turns."""
    walk = walking()
    bump = torch.zeros(8, 3)
    bump[3, 0] = 0.01
    R, t = turn(0.7, 0.21), torch.tensor([0.7, 0.0, 1.0])  # frame 1 of the walk
    moved = walk.vertices.clone()
    moved[1] = (box() + bump) @ R.T + t
    body = replace(walk, vertices=moved, neutral=walk.vertices)
    shift = deformation(body)
    torch.testing.assert_close(shift[1], bump, atol=2e-6, rtol=0)
    assert shift[[0, 2, 3, 4]].abs().max() < 2e-6
    # Without the neutral body, the placement takes a part of the bump: not more than all of it.
    assert 0.003 < deformation(replace(body, neutral=None))[1, 3, 0] < 0.01


def test_flat_body_is_refused():
    with pytest.raises(ValueError, match="no surface"):
        deformation(Body(torch.zeros(2, 8, 3), FACES, torch.zeros(8, 3)))


def test_memory_is_reported_for_the_cache():
    body = replace(walking(), colors=torch.zeros(8, 3))
    assert body.get_ram_usage() == 4 * (5 * 8 * 3 + 8 * 3 + 8 * 3) + 8 * 12 * 3
