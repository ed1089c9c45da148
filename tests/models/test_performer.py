"""The synthetic performers: baked file, skinning, looks, and exactness of the renders."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from turnaround.models import performer
from turnaround.models.cameras import Rig, orbit_rig, project
from turnaround.models.performer import (
    ASSET,
    CLOTHES_SEEDS,
    JOINTS,
    SPLITS,
    clothes_seed,
    draw_appearance,
    garment_distances,
    load_performers,
    motion_seconds,
    pose_performer,
    render_color,
    render_colors,
    render_performer,
    surface_coordinates,
    vertex_normals,
)
from turnaround.models.tiny import render_scenes

W, H = 48, 60


def ring(*degrees: float) -> Rig:
    azimuths = torch.tensor([math.radians(d) for d in degrees])
    return orbit_rig(azimuths, torch.zeros(len(degrees)), 3.2, math.radians(38), W, H)


def posed(character="ben", motion="walk", times=(0.3,), seed=3, yaw=0.0):
    return pose_performer(character, motion, torch.tensor(times), draw_appearance(seed), yaw)


@pytest.fixture(scope="module")
def clip():
    body, rig = posed(), ring(0, 180)
    return body, rig, render_performer(body, draw_appearance(3), rig)


def test_asset_is_plain_safetensors_below_the_size_limit():
    assert ASSET.stat().st_size < 8e6
    tensors = load_file(ASSET)
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert tensors["faces"].max() < tensors["rest_vertices"].shape[1]
    bank = load_performers()
    assert len(bank.characters) == len(tensors["rest_vertices"]) >= 10


def test_splits_are_disjoint_and_cover_the_bank():
    bank = load_performers()
    for kind, names in ((0, bank.characters), (1, bank.motions)):
        for a, b in combinations(SPLITS, 2):
            assert not set(SPLITS[a][kind]) & set(SPLITS[b][kind])
        assert set().union(*(SPLITS[s][kind] for s in SPLITS)) == set(names)


def test_skinning_without_rotation_keeps_the_rest_body(monkeypatch):
    bank, look = load_performers(), draw_appearance(3)
    frames = torch.eye(3).expand(1, len(JOINTS), 3, 3)
    monkeypatch.setattr(performer, "sample_motion", lambda *_: (frames, torch.zeros(1, 3)))
    monkeypatch.setattr(performer, "rest_alignment", lambda _: torch.eye(3))
    body = pose_performer("ada", "walk", torch.zeros(1), look)
    index = bank.characters.index("ada")
    rest = bank.tensors["rest_vertices"][index].float()
    inside = garment_distances(surface_coordinates(bank), look).values()
    bare = torch.stack(list(inside)).amax(0) <= 0  # clothes stand off the body; skin does not
    assert bare.sum() > 1000
    moved = body.vertices[0] - rest
    # Only the clip's centring is left: one shift for all.
    torch.testing.assert_close(
        moved[bare], moved[bare][:1].expand_as(moved[bare]), rtol=0, atol=1e-5
    )
    joints = body.joints[0] - bank.tensors["rest_joints"][index]
    torch.testing.assert_close(joints, moved[bare][:1].expand_as(joints), rtol=0, atol=1e-5)


def test_blending_weights_sum_to_one_within_their_rounding():
    sums = load_performers().tensors["weights"].float().sum(1) / 255
    assert (sums - 1).abs().max() < 17 * 0.5 / 255


def test_the_same_seed_gives_the_same_clip_and_another_does_not():
    rig = ring(0)

    def picture(seed):
        camera = (rig.K[0], rig.T_camera_world[0], W, H, (0.5, 0.5, 0.5))
        return render_color(posed(seed=seed), 0, draw_appearance(seed), *camera)[0]

    first = picture(5)
    assert torch.equal(first, picture(5))
    assert not torch.equal(first, picture(6))


def test_bodies_stand_upright_and_face_the_camera_at_azimuth_0():
    body = posed("ada", "walk")
    joint = dict(zip(JOINTS, body.joints[0], strict=True))
    assert joint["head"][1] < joint["pelvis"][1] < joint["ankle.L"][1]  # y points down
    assert joint["shoulder.L"][0] > joint["shoulder.R"][0]  # their left is the picture's right
    eyes = load_performers().faces[load_performers().tensors["face_is_eye"]].unique()
    assert body.vertices[0, eyes, 2].mean() < joint["head"][2]  # eyes towards -z


def test_front_and_back_differ_in_the_pictures(clip):
    _, _, rendered = clip
    front, back = rendered.frames[0, 0], rendered.frames[1, 0].flip(-1)
    seen = (rendered.masks[0, 0] > 0.99) & (rendered.masks[1, 0].flip(-1) > 0.99)
    assert (front - back).abs().amax(0)[seen].mean() > 0.03


def test_yaw_turns_the_performer_about_the_up_axis():
    still, turned = posed().vertices[0], posed(yaw=math.pi / 2).vertices[0]
    # Quarter turn: x takes z's place; centring shifts the box, so compare mean-free.
    expected = torch.stack([still[:, 2], still[:, 1], -still[:, 0]], -1)
    expected = expected - expected.mean(0)
    torch.testing.assert_close(turned - turned.mean(0), expected, rtol=0, atol=1e-4)


def test_clips_are_centred_and_stay_in_step_with_time():
    times = torch.linspace(0, motion_seconds(load_performers(), "walk"), 6)
    body = pose_performer("ben", "walk", times, draw_appearance(0))
    box = (body.vertices.amin(1) + body.vertices.amax(1)) / 2
    assert box.mean(0).abs().max() < 1e-4
    fine = pose_performer("ben", "walk", times[1] + torch.arange(8) / 64, draw_appearance(0))
    speed = (fine.joints[1:] - fine.joints[:-1]).norm(dim=-1) * 64
    assert speed.max() < 6  # metres a second: a walker's swinging foot makes 3 to 4


def test_depth_agrees_with_the_projection_of_visible_vertices(clip):
    body, rig, rendered = clip
    pixels, depth = project(body.vertices[0], rig)
    cell = pixels.floor().long()
    for v in range(len(rig)):
        x, y = cell[v].unbind(-1)
        assert (x >= 0).all() and (x < W).all() and (y >= 0).all() and (y < H).all()
        picture = rendered.depth[v, 0]
        # No vertex lies in front of the picture's depth by more than the surface's slope can
        # explain within its pixel's neighbours.
        nearest = torch.where(picture > 0, picture, torch.inf)
        nearest = -torch.nn.functional.max_pool2d(-nearest[None, None], 3, 1, 1)[0, 0]
        hit = nearest[y, x].isfinite()
        assert (nearest[y, x] - depth[v])[hit].quantile(0.99) < 0.05
        assert hit.float().mean() > 0.98


def test_depth_points_lie_on_the_body(clip):
    body, rig, rendered = clip
    y, x = (rendered.depth[0, 0] > 0).nonzero().unbind(-1)
    z = rendered.depth[0, 0, y, x]
    K = rig.K[0]
    camera = torch.stack(
        [(x + 0.5 - K[0, 2]) / K[0, 0] * z, (y + 0.5 - K[1, 2]) / K[1, 1] * z, z], -1
    )
    T = rig.T_camera_world[0]
    world = (camera - T[:3, 3]) @ T[:3, :3]
    # Within one edge of a triangle: the longest edges of these bodies are a few centimetres.
    assert torch.cdist(world, body.vertices[0]).amin(1).max() < 0.03


def test_masks_depth_and_normals_tell_the_same_figure(clip):
    _, _, rendered = clip
    full, none = rendered.masks > 0.99, rendered.masks == 0
    # Samples of the mask surround the pixel centre: a gap thinner than a sample's spacing may
    # slip between them, a few times on a figure of some 400 pixels.
    assert (rendered.depth[full] > 0).float().mean() > 0.99
    assert (rendered.depth[none] == 0).float().mean() > 0.99
    hit = rendered.depth > 0
    length = rendered.normals.norm(dim=2)
    torch.testing.assert_close(length[hit], torch.ones(int(hit.sum())), rtol=0, atol=1e-4)
    assert length[~hit].abs().max() == 0


def test_normals_face_the_camera_where_the_surface_is_seen(clip):
    _, rig, rendered = clip
    for v in range(len(rig)):
        hit = rendered.depth[v, 0] > 0
        toward = -torch.einsum("chw,c->hw", rendered.normals[v, 0], rig.T_camera_world[v, 2, :3])
        assert (toward[hit] > -0.1).float().mean() > 0.98
        assert toward[hit].mean() > 0.4


def test_vertex_normals_of_a_sphere_are_its_radii():
    theta, phi = torch.meshgrid(
        torch.linspace(0.3, 2.8, 30), torch.arange(60) * torch.pi / 30, indexing="ij"
    )
    points = torch.stack([theta.sin() * phi.cos(), theta.cos(), theta.sin() * phi.sin()], -1)
    ring_, step = torch.meshgrid(torch.arange(29), torch.arange(60), indexing="ij")
    a, b = ring_ * 60 + step, ring_ * 60 + (step + 1) % 60
    faces = torch.stack([torch.stack([a, b, b + 60], -1), torch.stack([a, b + 60, a + 60], -1)])
    normals = vertex_normals(points.reshape(1, -1, 3), faces.reshape(-1, 3))[0]
    inner = slice(60, -60)  # the open rims see one side only
    cosine = (normals * points.reshape(-1, 3)).sum(-1)[inner]
    assert cosine.abs().min() > 0.99
    assert cosine.sign().unique().numel() == 1


def test_clothes_seeds_of_two_splits_never_meet():
    assert CLOTHES_SEEDS.keys() == SPLITS.keys()
    for a, b in combinations(CLOTHES_SEEDS.values(), 2):
        assert max(a.start, b.start) >= min(a.stop, b.stop)
    draws = np.random.default_rng(0).integers(1 << 30, size=2000).tolist()
    for split, seeds in CLOTHES_SEEDS.items():
        # Including the draws that are another split's own.
        for draw in [*draws, 0, 1_000_003, 2_000_000, 2_999_999, 3_000_000, (1 << 30) - 1]:
            assert clothes_seed(split, draw) in seeds
    assert clothes_seed("test", 1_000_003) == 1_000_003  # what the evaluations wear


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_take_people_motions_and_clothes_of_their_split(split, monkeypatch):
    taken = []

    class Stop(Exception):
        pass

    def pose(character, motion, *_, **__):
        taken.append((character, motion))
        raise Stop

    def appearance(seed):
        assert seed in CLOTHES_SEEDS[split]
        return draw_appearance(seed)

    monkeypatch.setattr(render_scenes, "pose_performer", pose)
    monkeypatch.setattr(render_scenes, "draw_appearance", appearance)
    for seed in range(20):
        with pytest.raises(Stop):
            render_scenes.render_scene(seed, split, 2, 1, 16, 16)
    characters, motions = (set(part) for part in zip(*taken, strict=True))
    assert characters <= set(SPLITS[split][0])
    assert motions <= set(SPLITS[split][1])


def test_a_batch_of_different_people_is_their_single_pictures_to_the_bit():
    rig, looks = ring(0, 140), [draw_appearance(3), draw_appearance(4)]
    bodies = [posed("ben", seed=3), posed("ada", "run", seed=4)]
    behind = [(0.5, 0.5, 0.5), torch.rand(3, H, W, generator=torch.Generator().manual_seed(0))]
    vertices, normals = (
        torch.stack([getattr(b, name)[0] for b in bodies]) for name in ("vertices", "normals")
    )
    batch = render_colors(vertices, normals, looks, rig.K, rig.T_camera_world, W, H, behind)
    for i, body in enumerate(bodies):
        camera = (rig.K[i], rig.T_camera_world[i], W, H)
        single = render_color(body, 0, looks[i], *camera, behind[i])
        assert all(torch.equal(part[i], one) for part, one in zip(batch, single, strict=True))


def test_batched_clip_is_the_clip_drawn_one_by_one(clip):
    body, rig, rendered = clip
    batched = render_performer(body, draw_appearance(3), rig, batch=2)
    for name in ("frames", "masks", "depth", "normals"):
        assert torch.equal(getattr(batched, name), getattr(rendered, name))


def test_background_picture_stands_unchanged_where_nobody_is():
    behind = torch.rand(3, H, W, generator=torch.Generator().manual_seed(1))
    rig = ring(0)
    camera = (rig.K[0], rig.T_camera_world[0], W, H)
    picture, mask = render_color(posed(), 0, draw_appearance(3), *camera, behind)
    free = mask == 0
    assert free.any()
    torch.testing.assert_close(picture[:, free], behind[:, free], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="size of the view"):
        render_color(posed(), 0, draw_appearance(3), *camera, behind[:, 1:])
