"""Pictures of an avatar, where cameras stand round it, and which moments are shown."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from turnaround.models.avatar import Avatar, SkinMotion
from turnaround.models.avatar_light import even_light
from turnaround.models.avatar_mesh import splats_on_body
from turnaround.models.avatar_pictures import (
    Swing,
    avatar_pictures,
    framing,
    played_times,
    turning_times,
)
from turnaround.models.body import Body
from turnaround.models.cameras import orbit_rig, project

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 48


def box(centre: Tensor) -> tuple[Tensor, Tensor]:
    """[8, 3] and [12, 3], outwards: 0.6 x 1.6 x 0.4 m."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [[s[0], s[i + 1], s[i]] for s in sides for i in (1, 2)]
    return corners * torch.tensor([0.3, 0.8, 0.2]) + centre, torch.tensor(faces)


CENTRE = torch.tensor([1.0, -0.5, 2.0])
STEP = torch.tensor([0.4, 0, 0])


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    """A red box that stands off the origin and goes 0.4 m to the right with each of three frames."""
    vertices, faces = box(CENTRE)
    moving = torch.stack([vertices + n * STEP for n in range(3)])
    body = Body(moving, faces, vertices, fps=12.0)
    splats, places = splats_on_body(body, 600, degree=0)
    red = torch.tensor([1.7, -1.7, -1.7]).expand(len(splats), 1, 3)
    solid = replace(splats, sh=red.clone(), opacities=torch.full_like(splats.opacities, 6.0))
    return Avatar(solid, SkinMotion(body, places, even_light(body.rest)), 12.0)


def ring(count: int = 2, centre: Tensor = CENTRE):
    angles = torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.zeros(count), 4.0, 0.6, SIZE, SIZE, centre)


def test_a_shot_shows_its_camera_at_its_time(avatar):
    rig, shots = ring(), [(0, 0.0), (1, 0.0), (0, 2.0), (0, 1.0)]
    seen = avatar_pictures(avatar, rig, shots, torch.tensor([0.0, 0, 1]), geometry=True)
    assert seen.color.shape == (4, 3, SIZE, SIZE) and seen.color.dtype == torch.uint8
    middle = seen.alpha.sum(1) @ (torch.arange(SIZE) + 0.5) / seen.alpha.sum((1, 2))
    wanted = project(torch.stack([CENTRE, CENTRE + STEP, CENTRE + 2 * STEP]), rig)[0][..., 0]
    expected = [wanted[0, 0], wanted[1, 0], wanted[0, 2], wanted[0, 1]]
    assert middle.tolist() == pytest.approx([float(x) for x in expected], abs=1.2)
    # Red on blue, at the front's distance, facing the camera; nothing in the corner.
    assert seen.color[0, 0, 24, 24] > 200 and seen.color[0, 2, 24, 24] < 40
    assert seen.color[0, :, 0, 0].tolist() == [0, 0, 255]
    assert float(seen.depth[0, 24, 24]) == pytest.approx(3.8, abs=0.1)
    assert seen.normals[0, 2, 24, 24] > 240
    assert seen.depth[0, 0, 0] == 0 and seen.normals[0, :, 0, 0].tolist() == [128] * 3


def test_shots_are_the_same_alone_and_together_and_are_counted(avatar):
    rig, shots, told = ring(), [(0, 0.5), (1, 0.5), (1, 1.25)], []
    together = avatar_pictures(avatar, rig, shots, on_step=lambda *a: told.append(a))
    for i, shot in enumerate(shots):
        alone = avatar_pictures(avatar, rig, [shot])
        assert torch.equal(alone.color[0], together.color[i])
        assert torch.equal(alone.alpha[0], together.alpha[i])
    assert [a[:2] for a in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[0][2].shape == (3, SIZE, SIZE) and together.depth is None


def test_behind_a_picture_lies_every_pixel_of_it(avatar):
    ground = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    seen = avatar_pictures(avatar, ring(), [(0, 0.0)], ground)
    empty = seen.alpha[0] == 0
    assert empty.float().mean() > 0.3
    off = (seen.color[0].float() / 255 - ground)[:, empty].abs().max()
    assert off < 0.003


def test_all_of_an_avatar_is_in_the_pictures_of_its_orbit(avatar):
    found = framing(avatar)
    torch.testing.assert_close(found.centre, CENTRE + STEP, atol=0.03, rtol=0)
    assert found.half_height == pytest.approx(0.8, abs=0.05)
    rig = found.orbit(torch.arange(5) * 1.2, 0.3, 0.5, SIZE, 2 * SIZE)
    pixels, depth = project(avatar.motion.body.vertices.flatten(0, 1), rig)
    assert (depth > 0).all() and (pixels >= 0).all()
    assert (pixels <= torch.tensor([SIZE, 2 * SIZE])).all()
    # And large in them: from the front its way fills the width.
    assert float(pixels[0, :, 0].amax() - pixels[0, :, 0].amin()) > 0.75 * SIZE
    assert float(found.orbit(torch.zeros(1), 0, 0.5, 9, 9, 7.0).centers[0, 2]) == pytest.approx(
        float(found.centre[2]) - 7
    )


def test_dust_far_away_does_not_make_an_avatar_small(avatar):
    means = avatar.splats.means.clone()
    means[0] = 50.0
    assert framing(replace(avatar, splats=replace(avatar.splats, means=means))).half_height < 1
    means[1] = math.nan
    broken = framing(replace(avatar, splats=replace(avatar.splats, means=means)))
    assert broken.centre.isfinite().all() and broken.half_height < 1
    with pytest.raises(ValueError, match="NaN or infinity in all its places"):
        framing(replace(avatar, splats=replace(avatar.splats, means=means * math.nan)))


def test_a_camera_that_swings_goes_all_round_where_cameras_stand_all_round():
    swing = Swing(ring(6), CENTRE)
    rigs = [swing.at(n / 40) for n in range(40)]
    around = torch.stack([r.centers[0] - CENTRE for r in rigs])
    assert around.norm(dim=1).tolist() == pytest.approx([4.0] * 40, abs=1e-4)
    azimuths = torch.atan2(around[:, 0], -around[:, 2])
    assert len({round(float(a), 3) for a in azimuths}) == 40
    assert azimuths.diff().remainder(2 * math.pi).tolist() == pytest.approx(
        [math.pi / 20] * 39, abs=1e-5
    )
    # It begins where no camera stands.
    gaps = (azimuths[0] - torch.arange(6) * math.pi / 3).remainder(2 * math.pi)
    assert float(torch.minimum(gaps, 2 * math.pi - gaps).min()) == pytest.approx(
        math.pi / 6, abs=1e-3
    )
    torch.testing.assert_close(rigs[0].K[0], ring(6).K[0])


def test_else_it_swings_between_the_outermost():
    angles = torch.tensor([-0.4, 0.0, 0.5])
    rig = orbit_rig(angles, torch.full((3,), 0.2), 3.0, 0.6, SIZE, SIZE, CENTRE)
    swing = Swing(rig, CENTRE)
    away = torch.cat([swing.at(n / 60).centers for n in range(60)]) - CENTRE
    azimuths = torch.atan2(away[:, 0], -away[:, 2])
    assert float(azimuths.min()) == pytest.approx(-0.4, abs=0.01)
    assert float(azimuths.max()) == pytest.approx(0.5, abs=0.01)
    elevation = torch.atan2(-away[:, 1], away[:, [0, 2]].norm(dim=1))
    torch.testing.assert_close(elevation, torch.full((60,), 0.2), atol=1e-4, rtol=0)


def test_times_that_are_played():
    assert played_times(0, 3, 1) == [0, 1, 2, 3]
    assert played_times(1, 3, 0.5) == [1, 1.5, 2, 2.5, 3]
    assert played_times(2, 2, 1) == [2]
    assert played_times(0, 3, 2) == [0, 2]
    assert turning_times(3, 7, 1.0, False) == [0, 1, 2, 0, 1, 2, 0]
    assert turning_times(3, 7, 1.0, True) == [0, 1, 2, 1, 0, 1, 2]
    assert turning_times(3, 5, 0.5, True) == [0, 0.5, 1, 1.5, 2]
    assert turning_times(1, 3, 1.0, True) == [0, 0, 0]
    assert turning_times(3, 4, 1.0, True, 1.5) == [1.5, 1.5, 0.5, 0.5]
    assert turning_times(3, 4, 1.0, False, 2.0) == [2, 0, 1, 2]
    # Between the last frame and the first there is no motion: the last is held.
    assert turning_times(3, 7, 0.5, False) == [0, 0.5, 1, 1.5, 2, 2, 0]
