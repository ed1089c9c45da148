"""Distilling without a body: a painted ball on its way, seen from all sides."""

import math
from dataclasses import replace

import pytest
import torch
import trimesh
from torch import Tensor
from turnaround.models.avatar_free import carried, follow
from turnaround.models.avatar_free_training import FreeTraining
from turnaround.models.avatar_start import Skin, most_seen, skins, splats_on_skin, thinned
from turnaround.models.avatar_tracking import track, track_in_turns
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.distilling import Settings
from turnaround.models.metrics import psnr
from turnaround.models.rasterize_mesh import rasterize_mesh
from turnaround.models.rasterize_splats import render
from turnaround.models.views import Views

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, VIEWS, FRAMES, RADIUS = 48, 6, 3, 0.4
STEP = torch.tensor([0.12, 0.03, 0.0])
"""Metres a frame."""


def ball() -> tuple[Tensor, Tensor, Tensor]:
    """Vertices in all frames [F, N, 3], faces, colours [N, 3]."""
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=RADIUS)
    rest, faces = torch.from_numpy(mesh.vertices).float(), torch.from_numpy(mesh.faces).long()
    colors = torch.stack([(5 * rest[:, i]).sin() > 0 for i in range(3)], 1) * 0.7 + 0.15
    way = (torch.arange(FRAMES) - 1)[:, None, None] * STEP
    return rest + way, faces, colors


def ring(count: int, first: float, elevation: float) -> Rig:
    angles = first + torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.full((count,), elevation), 3.0, 0.5, SIZE, SIZE)


def seen(rig: Rig) -> Views:
    """Exact pictures and masks, drawn at twice the size before grey."""
    vertices, faces, colors = ball()
    scale, pictures = torch.tensor([[2.0], [2.0], [1.0]]), []
    for K, T in zip(rig.K, rig.T_camera_world, strict=True):
        camera = vertices @ T[:3, :3].T + T[:3, 3]
        drawn = rasterize_mesh(camera, faces, K * scale, 2 * SIZE, 2 * SIZE)
        hit = (drawn.faces >= 0)[..., None].float()
        color = drawn.interpolate(colors.expand(FRAMES, -1, -1), faces)
        pictures.append(torch.cat([color + (1 - hit) * 0.5, hit], -1).movedim(-1, 1))
    halved = torch.stack([torch.nn.functional.avg_pool2d(p, 2) for p in pictures])
    return Views(halved[:, :, :3], halved[:, :, 3], rig, 12.0)


@pytest.fixture(scope="module")
def views() -> Views:
    return seen(ring(VIEWS, 0.0, 0.2))


@pytest.fixture(scope="module")
def carved(views) -> list[Skin]:
    return skins(views)


@pytest.fixture(scope="module")
def few(carved) -> list[Skin]:
    """With fewer points, which is quicker."""
    return [thinned(skin, 500) for skin in carved]


SMALL = Settings(steps=24, gaussians=400, most=450, seed=3)


def trained(views: Views, settings: Settings, steps: int) -> FreeTraining:
    training = FreeTraining(views, settings, way="torch")
    for _ in range(steps):
        training.learn()
    return training


def held_out(training: FreeTraining) -> float:
    """PSNR of the ball from cameras between those it was learned from."""
    rig, avatar, grey = ring(2, 0.5, 0.0), training.avatar, torch.full((3,), 0.5)
    truth = seen(rig)
    drawn = [
        [render(avatar.at(f), K, T, SIZE, SIZE, grey, way="torch").color for f in range(FRAMES)]
        for K, T in zip(rig.K, rig.T_camera_world, strict=True)
    ]
    return psnr(torch.stack([torch.stack(d) for d in drawn]), truth.frames, truth.masks)


def test_the_skin_of_a_ball_is_a_ball(carved):
    for f, skin in enumerate(carved):
        out = skin.points - (f - 1) * STEP
        # Outlines of six cameras in a ring enclose a ball with caps; a pixel is 3 cm wide.
        assert (out.norm(dim=1) > RADIUS - 0.05).all()
        around = out[:, 1].abs() < 0.2
        assert (out[around].norm(dim=1) < RADIUS + 0.08).all()
        straight = torch.nn.functional.normalize(out[around], dim=1)
        assert ((straight * skin.normals[around]).sum(1) > 0.7).float().mean() > 0.95


def test_the_skin_has_the_colours_that_views_show(carved):
    skin = carved[1]
    expected = torch.stack([(5 * skin.points[:, i]).sin() > 0 for i in range(3)], 1) * 0.7 + 0.15
    around = (skin.points[:, 1].abs() < 0.2) & (skin.points.abs() > 0.08).all(1)
    off = (skin.colors - expected)[around].abs()
    # The hull stands up to a pixel or two before the ball, so borders of patches lie elsewhere.
    assert (off < 0.3).float().mean() > 0.8 and around.sum() > 50


def test_a_moment_that_nobody_saw_has_no_skin(views):
    masks = views.masks.clone()
    masks[:, 1] = 0
    found = skins(replace(views, masks=masks))
    assert found[1] is None and found[0] is not None and found[2] is not None


def test_the_frame_with_the_largest_outlines_is_chosen():
    masks = torch.zeros(2, 4, 8, 8)
    masks[:, :, :2, :2] = 1
    masks[:, 3, :4, :4] = 1
    assert most_seen(masks, [True] * 4) == 3
    assert most_seen(masks, [True, True, True, False]) == 1


def test_gaussians_lie_flat_on_the_skin(carved):
    skin = thinned(carved[1], 300)
    splats = splats_on_skin(skin, degree=1)
    assert len(splats) == 300 and splats.degree == 1
    shortest = splats.covariances() @ skin.normals[..., None]
    least = splats.log_scales.exp().amin(1).square()
    assert torch.allclose(shortest[..., 0], least[:, None] * skin.normals, atol=1e-8)


def test_nodes_carry_the_skin_along(few):
    tracked = track(few, 1, 20, VIEWS)
    nodes, points = tracked.nodes, few[1].points
    assert tracked.apart[1] == 0
    held = follow(points, nodes)
    for f in range(FRAMES):
        went = (carried(points, held, nodes, f) - points).mean(0)
        assert (went - (f - 1) * STEP).norm() < 0.02


def turned_round(skin: Skin, axis: int) -> Skin:
    """Half a turn, so that every place of the coloured ball has another colour."""
    round_ = skin.points.new_full((3,), -1.0)
    round_[axis] = 1
    return Skin(skin.points * round_, skin.normals * round_, skin.colors)


def other_paint(skin: Skin) -> Skin:
    """Colours of somebody else: nothing fits whichever way it is turned."""
    return replace(skin, colors=1 - skin.colors.mean(1, keepdim=True).expand(-1, 3))


def test_a_skin_is_followed_until_it_is_lost(few):
    skins_ = [few[0], few[1], other_paint(few[1]), few[2]]
    tracked = track(skins_, 1, 20, VIEWS)
    assert (tracked.first, tracked.end, tracked.frame) == (0, 2, 1)
    assert tracked.nodes.frame_count == len(tracked.apart) == 2
    assert tracked.apart[1] == 0 and tracked.apart[0] > 0


def test_a_skin_that_turned_far_between_two_frames_is_found_again(few):
    tracked = track([few[1], turned_round(few[1], 1)], 0, 20, VIEWS)
    assert tracked.end == 2
    points = few[1].points
    there = carried(points, follow(points, tracked.nodes), tracked.nodes, 1)
    assert (there - turned_round(few[1], 1).points).norm(dim=1).median() < 0.05


def test_every_frame_has_one_turn(views, few):
    masks = views.masks[:, [0, 1, 1, 2, 2]]
    skins_ = [few[0], few[1], None, other_paint(few[1]), other_paint(few[2])]
    steps = []
    tracked = track_in_turns(skins_, masks, 20, lambda done, total: steps.append((done, total)))
    assert [(t.first, t.end) for t in tracked] == [(0, 3), (3, 5)]
    assert all(t.first <= t.frame < t.end and t.apart[t.frame - t.first] == 0 for t in tracked)
    assert steps[-1] == (5, 5) and steps == sorted(steps)
    # Three cameras enclose too much beside the performer to tell.
    assert len(track_in_turns(skins_, masks[:3], 20)) == 1
    one = track_in_turns(few, views.masks, 20)
    assert len(one) == 1 and one[0].nodes.frame_count == FRAMES


def test_moments_without_a_skin_lie_between_their_neighbours_or_hold_the_last(few):
    points = few[1].points
    for known, missing in (([0, 2], 1), ([0, 1], 2), ([1, 2], 0)):
        found = [skin if f in known else None for f, skin in enumerate(few)]
        nodes = track(found, known[0], 20, VIEWS).nodes
        held = follow(points, nodes)
        there = [carried(points, held, nodes, f).mean(0) for f in range(FRAMES)]
        if missing == 1:
            assert torch.allclose(there[1], (there[0] + there[2]) / 2, atol=0.01)
        else:
            assert torch.allclose(there[missing], there[1], atol=1e-6)


def test_an_avatar_is_learned_from_all_sides_without_a_body(views):
    training = trained(views, SMALL, 0)
    begun = held_out(training)
    for _ in range(SMALL.steps):
        training.learn()
    learned = held_out(training)
    assert learned > 19 and learned > begun + 1
    avatar = training.avatar
    assert not avatar.on_body and avatar.frame_count == FRAMES and avatar.fps == 12.0
    assert 400 < len(avatar.splats) <= 450


@pytest.fixture(scope="module")
def repainted(views) -> Views:
    """From the third frame on the ball has the colours of its negative."""
    frames, masks = views.frames.clone(), views.masks[:, 2, None]
    grey = 0.5 * (1 - masks)
    frames[:, 2] = masks * (0.3 + 0.4 * (1 - frames[:, 2].mean(1, keepdim=True))) + grey
    return replace(views, frames=frames)


def test_clouds_take_turns_where_a_performer_can_not_be_followed(repainted):
    training = trained(repainted, replace(SMALL, steps=30), 30)
    assert training.turns == [0, 0, 1]
    avatar, (first, second) = training.avatar, training.avatar.motion.clouds
    assert avatar.frame_count == FRAMES and len(avatar.splats) == len(first) + len(second)
    # Each has the square root of a half of what one cloud would have.
    assert max(len(first), len(second)) <= 450 * 0.5**0.5 + 1
    assert min(len(first), len(second)) > 200
    rig, grey = repainted.rig, torch.full((3,), 0.5)
    for f in range(FRAMES):
        drawn = render(
            avatar.at(f), rig.K[0], rig.T_camera_world[0], SIZE, SIZE, grey, way="torch"
        ).color
        assert psnr(drawn[None], repainted.frames[:1, f], repainted.masks[:1, f]) > 17
    steps = [training.losses[i] for i in range(30) if training.draw(i)[1] == 2]
    assert sum(steps[-2:]) < sum(steps[:2])


def test_the_same_seed_gives_the_same_free_avatar(views):
    one, same = (trained(views, replace(SMALL, steps=3), 3).avatar for _ in range(2))
    for a, b in zip(one._comfy_cache_tensors(), same._comfy_cache_tensors(), strict=True):
        assert torch.equal(a, b)


def test_masks_that_meet_nowhere_are_refused(views):
    masks = torch.zeros_like(views.masks)
    # Pictures' upper and lower edges, in turn: no place lies within both.
    masks[::2, :, :3] = 1
    masks[1::2, :, -3:] = 1
    with pytest.raises(ValueError, match="meet nowhere in space"):
        FreeTraining(replace(views, masks=masks), SMALL, way="torch")


def test_two_views_are_enough_to_begin(views):
    two = Views(views.frames[:2], views.masks[:2], views.rig.select([0, 1]), 12.0)
    training = trained(two, replace(SMALL, steps=2), 2)
    assert all(math.isfinite(loss) for loss in training.losses)


def test_getting_ready_is_counted(views):
    calls = []
    FreeTraining(views, SMALL, way="torch", on_step=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (2 * FRAMES, 2 * FRAMES)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
