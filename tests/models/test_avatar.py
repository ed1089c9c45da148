"""An avatar's times, its motions, and its file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from turnaround.models.avatar import (
    Avatar,
    Detail,
    NodeMotion,
    SkinMotion,
    load_avatar,
    save_avatar,
)
from turnaround.models.avatar_free import NodeCloud, Nodes, between, follow, nodes_at_rest
from turnaround.models.avatar_light import even_light, lit
from turnaround.models.avatar_mesh import Skin, pose_spots, posed, splats_on_body
from turnaround.models.avatar_uv import Atlas, DetailNet, moved_maps, shown_by
from turnaround.models.body import Body
from turnaround.models.fit_body import Places, spread_evenly
from turnaround.models.splat_clips import read_clip_ply, write_clip_ply
from turnaround.models.splats import Splats

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 40


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def box() -> tuple[Tensor, Tensor]:
    """[8, 3] and [12, 3], outwards, 1.6 m high."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [[s[0], s[i + 1], s[i]] for s in sides for i in (1, 2)]
    return corners * torch.tensor([0.3, 0.8, 0.2]), torch.tensor(faces)


@pytest.fixture
def body() -> Body:
    """Three moments: as it is, sheared, and gone."""
    vertices, faces = box()
    sheared = vertices + 0.3 * vertices[:, 1:2] * torch.tensor([1.0, 0, 0])
    return Body(torch.stack([vertices, sheared, vertices + 1]), faces, vertices, fps=12.0)


@pytest.fixture
def on_body(body) -> Avatar:
    splats, _ = splats_on_body(body, COUNT, degree=1)
    light = even_light(body.rest) + 0.2 * noise(9, 3)
    places = spread_evenly(body.rest[body.faces], COUNT)
    return Avatar(splats, SkinMotion(body, places, light), body.fps)


@pytest.fixture
def in_detail(on_body) -> Avatar:
    """With a net that is no longer at its beginning."""
    body, net = on_body.motion.body, DetailNet(seed=5)
    with torch.no_grad():
        net.last.weight.add_(0.3 * noise(*net.last.weight.shape))
    skin, atlas = Skin(body.rest, body.faces), Atlas(body.rest, body.faces, 32)
    shown = shown_by([moved_maps(atlas, body.rest, skin.pose(v)) for v in body.vertices])
    return replace(on_body, motion=replace(on_body.motion, detail=Detail(net, shown)))


def in_clouds(*frames: int) -> Avatar:
    """Without a body: clouds of so many frames take turns."""
    splats = Splats(
        noise(COUNT, 3), noise(COUNT, 4), noise(COUNT, 3) - 3, noise(COUNT), noise(COUNT, 1, 3)
    )
    normals = F.normalize(noise(COUNT, 3, seed=2), dim=1)
    clouds = []
    for part, count in zip(torch.arange(COUNT).chunk(len(frames)), frames, strict=True):
        rest = nodes_at_rest(splats.means[part], 9, count)
        quats, goes = rest.quats + noise(count, 9, 4), noise(count, 9, 3, seed=1)
        nodes = Nodes(rest.places, rest.reach, quats, goes)
        clouds.append(NodeCloud(nodes, follow(splats.means[part], nodes), normals[part]))
    light = even_light(normals) + 0.1 * noise(9, 3)
    return Avatar(splats, NodeMotion(tuple(clouds), light), 24.0)


@pytest.fixture
def free() -> Avatar:
    return in_clouds(4)


@pytest.fixture
def in_turns() -> Avatar:
    return in_clouds(2, 1, 3)


def same(one: Splats, other: Splats) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_an_avatar_at_a_frame_is_its_gaussians_on_that_body(on_body):
    motion = on_body.motion
    for f in range(3):
        pose = Skin(motion.body.rest, motion.body.faces).pose(motion.body.vertices[f])
        stand = pose_spots(motion.spots, pose)
        there = lit(posed(on_body.splats, motion.spots, stand), stand.normals, motion.light)
        assert same(on_body.at(f), there)


def test_steady_motion_is_steady_between_frames_and_ends_with_the_clip(body):
    steady = torch.arange(4.0)[:, None] * torch.tensor([1.0, -2.0, 0.5])
    for time in (0.25, 1.5, 2.75):
        assert torch.allclose(between(steady, time), time * torch.tensor([1.0, -2.0, 0.5]))
    assert torch.equal(between(body.vertices, 2), body.vertices[2])
    assert torch.equal(between(body.vertices, -3), body.vertices[0])
    assert torch.equal(between(body.vertices, 99.5), body.vertices[2])
    assert torch.equal(between(body.vertices[:1], 0.5), body.vertices[0])


@pytest.mark.parametrize("kind", ["on_body", "in_detail", "free", "in_turns"])
def test_an_avatar_on_another_device_is_the_same(kind, request):
    avatar = request.getfixturevalue(kind)
    assert same(avatar.to(torch.device("cpu")).at(0.6), avatar.at(0.6))


@pytest.mark.parametrize("kind", ["on_body", "in_detail", "free", "in_turns"])
def test_what_is_loaded_is_what_was_saved(kind, tmp_path, request):
    avatar = request.getfixturevalue(kind)
    path = tmp_path / "avatar.safetensors"
    save_avatar(path, avatar)
    again = load_avatar(path)
    assert again.fps == avatar.fps and again.on_body == avatar.on_body
    before, after = avatar._comfy_cache_tensors(), again._comfy_cache_tensors()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
    assert again.get_ram_usage() == avatar.get_ram_usage() > 0
    for time in (0, 0.4, 2):
        assert same(again.at(time), avatar.at(time))
    assert [p.name for p in tmp_path.iterdir()] == ["avatar.safetensors"]


def test_at_any_time_one_cloud_is_shown(in_turns):
    sizes = [len(cloud) for cloud in in_turns.motion.clouds]
    starts = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    for time, turn in ((-1, 0), (0, 0), (1.49, 0), (1.5, 1), (2.4, 1), (2.5, 2), (3, 2), (9, 2)):
        there = in_turns.at(time)
        own = torch.zeros(COUNT, dtype=torch.bool)
        own[starts[turn] : starts[turn + 1]] = True
        assert (there.opacities[~own].sigmoid() < 1e-6).all()
        assert torch.equal(there.opacities[own], in_turns.splats.opacities[own])
        assert same(in_turns.shown(time), there.select(own))


def test_each_cloud_moves_in_its_turn_and_else_holds_still(in_turns):
    third = slice(COUNT - len(in_turns.motion.clouds[2]), None)
    assert torch.equal(in_turns.at(0).means[third], in_turns.at(3).means[third])
    assert not torch.equal(in_turns.at(3).means[third], in_turns.at(4).means[third])
    alone = in_turns.motion.clouds[2].at(in_turns.splats.select(torch.arange(COUNT)[third]), 1.3)[0]
    assert torch.equal(in_turns.at(4.3).means[third], alone.means)
    assert in_turns.frame_count == 6


def test_one_cloud_is_saved_as_it_was_before_there_were_several(free, tmp_path):
    save_avatar(tmp_path / "a.safetensors", free)
    names = {n for n in load_file(tmp_path / "a.safetensors") if not n.startswith("splats.")}
    assert names == {
        "nodes.places", "nodes.reach", "nodes.quats", "nodes.goes", "followed.nodes",
        "followed.weights", "normals", "light",
    }  # fmt: skip


def test_a_file_that_lacks_part_of_a_cloud_is_refused(in_turns, tmp_path):
    path = tmp_path / "a.safetensors"
    save_avatar(path, in_turns)
    tensors = load_file(path)
    del tensors["normals1"]
    save_file(tensors, path, metadata={"kind": "turnaround_avatar", "fps": "24.0"})
    with pytest.raises(ValueError, match="can't be read as an avatar"):
        load_avatar(path)


def test_clouds_that_take_turns_are_in_a_clips_file(in_turns, tmp_path):
    path, frames = tmp_path / "clip.ply", [in_turns.at(f) for f in range(6)]
    write_clip_ply(path, frames[0], frames, 24.0)
    clip = read_clip_ply(path)
    for f, there in enumerate(frames):
        assert torch.allclose(clip.frame(f).opacities, there.opacities, atol=1e-5)
        assert torch.allclose(clip.frame(f).means, there.means, atol=1e-5)


def test_detail_is_what_the_net_says_of_the_pose(in_detail, on_body):
    plain, changed = on_body.at(1), in_detail.at(1)
    assert (changed.means - plain.means).abs().max() > 1e-4
    assert not changed.means.requires_grad


def test_another_motion_takes_the_avatar_along(on_body, body):
    far = replace(body, vertices=2 * body.vertices[[2, 0]], rest=body.rest + 5, fps=30.0)
    moved = on_body.moved(far)
    assert moved.frame_count == 2 and moved.fps == 30.0
    twice = moved.at(1)
    once = on_body.at(0)
    assert (twice.means - 2 * once.means).abs().max() < 1e-5


def test_other_bodies_are_refused(on_body, free, body):
    other = replace(body, faces=body.faces.roll(1, 0))
    with pytest.raises(ValueError, match="use the motion of the body"):
        on_body.moved(other)
    with pytest.raises(ValueError, match="distilled without a body"):
        free.moved(body)


def test_gaussians_without_a_place_are_refused(on_body):
    with pytest.raises(ValueError, match="distil it again"):
        Avatar(on_body.splats.select(torch.arange(3)), on_body.motion, 16.0)
    with pytest.raises(ValueError, match="above 0"):
        replace(on_body, fps=0.0)


def damaged(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
        return
    if how == "text":
        path.write_text("no tensors")
        return
    tensors = load_file(path)
    if how == "missing":
        del tensors["splats.sh"]
    elif how == "far":
        tensors["places.faces"][3] = 99
    else:
        tensors["splats.extra"] = torch.zeros(1)
    save_file(tensors, path, metadata={"kind": "turnaround_avatar", "fps": "16.0"})


@pytest.mark.parametrize("how", ["cut", "text", "missing", "far", "unknown"])
def test_a_damaged_file_is_told_in_one_sentence(how, on_body, tmp_path):
    path = tmp_path / "broken.safetensors"
    save_avatar(path, on_body)
    damaged(path, how)
    with pytest.raises(ValueError, match=r"^'broken.safetensors' can't be read as an avatar"):
        load_avatar(path)


def test_another_file_is_no_avatar(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="'other.safetensors' is no avatar: choose"):
        load_avatar(path)


def test_places_are_kept_not_made_anew(on_body, tmp_path):
    """A Gaussian that has moved away stays bound where it was."""
    places = Places(on_body.motion.places.faces.flip(0), on_body.motion.places.weights)
    other = replace(on_body, motion=replace(on_body.motion, places=places))
    save_avatar(tmp_path / "a.safetensors", other)
    assert same(load_avatar(tmp_path / "a.safetensors").at(1), other.at(1))
    assert not same(other.at(1), on_body.at(1))
