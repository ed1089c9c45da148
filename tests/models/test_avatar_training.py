"""Distilling a small avatar: a painted ball that turns and grows, seen from all sides."""

import math
from dataclasses import replace

import pytest
import torch
import trimesh
from torch import Tensor
from turnaround.models.avatar_pictures import drawn_shots
from turnaround.models.avatar_training import AvatarTraining
from turnaround.models.body import Body
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.distilling import PRESETS, Settings
from turnaround.models.metrics import psnr
from turnaround.models.rasterize_mesh import rasterize_mesh
from turnaround.models.rasterize_splats import render
from turnaround.models.views import Views

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, VIEWS = 32, 6


def ball() -> Body:
    """Two moments: as it is; turned, moved and larger."""
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.5)
    rest, faces = torch.from_numpy(mesh.vertices).float(), torch.from_numpy(mesh.faces).long()
    c, s = math.cos(0.9), math.sin(0.9)
    turn = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    after = 1.1 * rest @ turn.T + torch.tensor([0.1, 0.05, 0])
    colors = torch.stack([(4 * rest[:, i]).sin() > 0 for i in range(3)], 1) * 0.7 + 0.15
    return Body(torch.stack([rest, after]), faces, rest, colors)


def seen(body: Body, rig: Rig, grey: float = 0.5) -> tuple[Tensor, Tensor]:
    """Exact pictures [V, F, 3, H, W] and masks [V, F, H, W], drawn at twice the size."""
    scale, pictures = torch.tensor([[2.0], [2.0], [1.0]]), []
    for K, T in zip(rig.K, rig.T_camera_world, strict=True):
        camera = body.vertices @ T[:3, :3].T + T[:3, 3]
        drawn = rasterize_mesh(camera, body.faces, K * scale, 2 * rig.width, 2 * rig.height)
        hit = (drawn.faces >= 0)[..., None].float()
        color = drawn.interpolate(body.colors.expand(2, -1, -1), body.faces)
        pictures.append(torch.cat([color + (1 - hit) * grey, hit], -1).movedim(-1, 1))
    halved = torch.stack([torch.nn.functional.avg_pool2d(p, 2) for p in pictures])
    return halved[:, :, :3], halved[:, :, 3]


def ring(count: int, first: float, elevation: float) -> Rig:
    angles = first + torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.full((count,), elevation), 3.0, 0.5, SIZE, SIZE)


@pytest.fixture(scope="module")
def footage() -> tuple[Views, Body]:
    body, rig = ball(), ring(VIEWS, 0.0, 0.2)
    frames, masks = seen(body, rig)
    return Views(frames, masks, rig, 12.0), replace(body, colors=None)


SMALL = Settings(steps=40, gaussians=400, most=500, detail=False, seed=3)


def trained(
    footage, settings: Settings, steps: int, weights: Tensor | None = None
) -> AvatarTraining:
    training = AvatarTraining(*footage, settings, weights, "torch")
    for _ in range(steps):
        training.learn()
    return training


def held_out(training: AvatarTraining) -> float:
    """PSNR of the ball from cameras between those it was learned from."""
    rig, avatar = ring(2, 0.5, 0.0), training.avatar
    frames, masks = seen(ball(), rig)
    grey = torch.full((3,), 0.5)
    drawn = [
        [render(avatar.at(f), K, T, SIZE, SIZE, grey, way="torch").color for f in range(2)]
        for K, T in zip(rig.K, rig.T_camera_world, strict=True)
    ]
    return psnr(torch.stack([torch.stack(d) for d in drawn]), frames, masks)


def test_an_avatar_is_learned_from_all_sides(footage):
    training = trained(footage, SMALL, 0)
    begun = held_out(training)
    for _ in range(40):
        training.learn()
    learned = held_out(training)
    assert learned > 19 and learned > begun + 3
    assert training.avatar.fps == 12.0 and training.avatar.frame_count == 2
    assert len(training.losses) == 40
    assert sum(training.losses[-12:]) < 0.7 * sum(training.losses[:12])


def test_the_same_seed_gives_the_same_avatar(footage):
    one, same = (trained(footage, replace(SMALL, steps=4), 4).avatar for _ in range(2))
    other = trained(footage, replace(SMALL, steps=4, seed=4), 4).avatar
    for a, b in zip(one._comfy_cache_tensors(), same._comfy_cache_tensors(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.splats.means, other.splats.means)


def test_an_avatar_taken_on_the_way_stays_as_it_was(footage):
    training = trained(footage, replace(SMALL, detail=True), 10)
    avatar = training.avatar
    before = [t.clone() for t in avatar._comfy_cache_tensors()]
    training.learn()
    training.learn()
    assert all(
        torch.equal(a, b) for a, b in zip(before, avatar._comfy_cache_tensors(), strict=True)
    )


def test_gaussians_grow_to_what_may_be_spent(footage):
    training = trained(footage, SMALL, 25)
    assert 400 < len(training.growing) <= 500
    assert len(training.places.faces) == len(training.growing) == len(training.spots)


def test_a_view_that_counts_nothing_is_not_looked_at(footage):
    views, body = footage
    spoiled = views.frames.clone()
    spoiled[2] = 1 - spoiled[2]
    weights = torch.ones(VIEWS)
    weights[2] = 0
    settings = replace(SMALL, steps=6)
    one = trained(footage, settings, 6, weights).avatar
    same = trained((replace(views, frames=spoiled), body), settings, 6, weights).avatar
    assert torch.equal(one.splats.sh, same.splats.sh)


def test_views_that_count_less_pull_less(footage):
    """With half of the views' colours swapped, the avatar looks like those that count."""
    views, _ = footage
    spoiled = views.frames.clone()
    spoiled[::2] = spoiled[::2].flip(2)
    footage = (replace(views, frames=spoiled), footage[1])
    weights = torch.tensor([0.1, 1.0] * (VIEWS // 2))
    settings = replace(SMALL, steps=20)
    even, uneven = (held_out(trained(footage, settings, 20, w)) for w in (None, weights))
    assert uneven > even + 1


def test_every_picture_is_looked_at_before_any_comes_again(footage):
    training = trained(footage, SMALL, 0)
    drawn = [training.draw(step)[:2] for step in range(4 * VIEWS)]
    assert len(set(drawn[: 2 * VIEWS])) == len(set(drawn[2 * VIEWS :])) == 2 * VIEWS
    assert drawn[: 2 * VIEWS] != drawn[2 * VIEWS :]


def test_presets_spend_more_and_more():
    draft, standard, full = PRESETS.values()
    assert draft.steps < standard.steps < full.steps and draft.most < standard.most < full.most
    assert draft.rate_at(0) == 1 and draft.rate_at(draft.steps) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rig": None}, "'views' have no cameras: connect"),
        ({"masks": None}, "'views' have no masks: connect"),
        ({"masks": "empty"}, "masks of 'views' are empty in every frame"),
        ({"frames": "short"}, "'views' have 1 frames, 'body' has 2"),
        ({"frames": "depth"}, "'views' hold depth, not colours"),
    ],
)
def test_footage_that_tells_nothing_is_refused(footage, change, words):
    views, body = footage
    made = {
        "empty": {"masks": torch.zeros_like(views.masks)},
        "short": {"frames": views.frames[:, :1], "masks": views.masks[:, :1]},
        "depth": {"frames": views.frames[:, :, :1]},
    }
    for value in change.values():
        change = made.get(value, change) if isinstance(value, str) else change
    with pytest.raises(ValueError, match=words):
        AvatarTraining(replace(views, **change), body, SMALL)


def test_weights_and_lonely_cameras_are_refused(footage):
    views, body = footage
    with pytest.raises(ValueError, match="one number of 0 or more for each of 6 views"):
        AvatarTraining(views, body, SMALL, torch.ones(3))
    one = Views(views.frames[:1], views.masks[:1], views.rig.select([0]))
    with pytest.raises(ValueError, match="hold 1 camera"):
        AvatarTraining(one, body, SMALL)


def test_gaussians_that_all_faded_stay_one_avatar(footage):
    training = trained(footage, SMALL, 1)
    with torch.no_grad():
        training.growing.values["opacities"].fill_(-9.0)
    training.grow()
    assert len(training.growing) == len(training.avatar.splats) >= 400


def test_avatars_are_learned_as_they_are_drawn(footage):
    """The same low-pass filter, or pictures would be sharper or softer than what was learned."""
    training, rig = trained(footage, SMALL, 1), footage[0].rig
    whole = training.truth(0, 1, (0, 0, SIZE, SIZE))
    ground = torch.tensor([0.2, 0.4, 0.6])
    with torch.no_grad():
        learned = training.render(training.stand(training.growing.splats, 1), 0, whole, ground)
    (drawn,) = drawn_shots(training.avatar, rig, [(0, 1.0)], ground, way="torch")
    assert torch.allclose(learned.color, drawn.color, atol=1e-5)


def test_an_empty_frame_is_left_out(footage):
    views, body = footage
    masks = views.masks.clone()
    masks[0, 1] = 0
    training = AvatarTraining(replace(views, masks=masks), body, SMALL, way="torch")
    assert (0, 1) not in {shown[:2] for shown in training.shown}
    assert len(training.shown) == 2 * VIEWS - 1


def test_getting_ready_can_be_stopped_before_every_pose_picture_and_map(footage):
    called, detailed = [], replace(SMALL, detail=True)
    AvatarTraining(*footage, detailed, None, "torch", lambda: called.append(1))
    poses, pictures, maps = 2, 2 * VIEWS, 2
    assert len(called) == poses + pictures + maps

    def stop():
        called.pop()
        if not called:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        AvatarTraining(*footage, detailed, None, "torch", stop)
