"""The page's file of an avatar: there and back to its stated precision, what is left out, its key."""

import json
import math
import struct
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models.avatar import Avatar, NodeMotion, SkinMotion
from turnaround.models.avatar_free import NodeCloud, follow, nodes_at_rest
from turnaround.models.avatar_light import even_light
from turnaround.models.avatar_mesh import splats_on_body
from turnaround.models.body import Body
from turnaround.models.cameras import orbit_rig
from turnaround.models.fit_body import spread_evenly
from turnaround.models.rasterize_splats import PIXEL_LOW_PASS, render
from turnaround.models.splat_stream import (
    MAGIC,
    kept_times,
    read_splat_stream,
    stream_key,
    write_splat_stream,
)
from turnaround.models.splats import C0

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, FRAMES = 300, 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_avatar(degree: int = 1, frames: int = FRAMES) -> Avatar:
    """A box that shears and walks off, lit from one side, of coloured Gaussians."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = torch.tensor([[s[0], s[i + 1], s[i]] for s in sides for i in (1, 2)])
    rest = corners * torch.tensor([0.3, 0.8, 0.2])
    steps = torch.arange(frames)[:, None, None] / 4
    lean = torch.tensor([1.0, 0, 0]) * rest[:, 1:2]
    body = Body(rest + steps * (0.4 * lean + torch.tensor([0.2, 0, 0.1])), faces, rest, fps=12.0)
    splats, _ = splats_on_body(body, COUNT, degree)
    splats = replace(
        splats,
        rotations=noise(COUNT, 4, seed=1),
        log_scales=splats.log_scales + 0.5 * noise(COUNT, 3, seed=2),
        opacities=2 * noise(COUNT, seed=3),
        sh=0.4 * noise(COUNT, (degree + 1) ** 2, 3, seed=4),
    )
    light = even_light(rest) + 0.3 * noise(9, 3, seed=5)
    return Avatar(splats, SkinMotion(body, spread_evenly(rest[faces], COUNT), light), body.fps)


def visible(splats):
    return splats.select(splats.opacities.sigmoid() >= 1 / 255)


def stored(tmp_path, avatar, **given):
    made = write_splat_stream(tmp_path / "a.turnsplat", avatar, **given)
    return made, *read_splat_stream((tmp_path / "a.turnsplat").read_bytes())


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_every_frame_comes_back_to_the_stated_precision(tmp_path, degree):
    avatar = make_avatar(degree)
    made, header, frames = stored(tmp_path, avatar)
    assert made.frames == len(frames) == FRAMES and header["times"] == [0, 1, 2, 3, 4]
    assert header["fps"] == 12 and header["degree"] == degree and made.note == ""
    assert made.size == (tmp_path / "a.turnsplat").stat().st_size
    size = torch.tensor(header["size"])
    for f, got in enumerate(frames):
        true = visible(avatar.at(f))
        assert len(got) == len(true) == made.gaussians
        assert ((got.means - true.means).abs() <= size / 131070 * 1.01 + 1e-6).all()
        girths = header["girth"]
        assert (got.log_scales - true.log_scales).abs().max() <= (girths[1] - girths[0]) / 509
        paints = header["paint"]
        assert (C0 * (got.sh - true.sh)[:, 0]).abs().max() <= (paints[1] - paints[0]) / 509
        assert (got.opacities.sigmoid() - true.opacities.sigmoid()).abs().max() <= 1 / 509
        a, b = F.normalize(got.rotations, dim=1), F.normalize(true.rotations, dim=1)
        turns = 2 * torch.arccos((a * b).sum(1).abs().clamp(max=1))
        assert turns.max() < math.radians(1)
        # Eight bits of a harmonic times eight bits of the light on it.
        rest = (got.sh - true.sh)[:, 1:]
        bound = header["sheen"] * header["gain"] * (1 / 254 + 1 / 510)
        assert not rest.numel() or rest.abs().max() <= bound


def test_pictures_of_what_comes_back_are_the_same(tmp_path):
    avatar = make_avatar()
    _, _, frames = stored(tmp_path, avatar)
    rig = orbit_rig(torch.tensor([0.4]), torch.tensor([0.2]), 3.0, 0.8, 96, 128)
    for f in (0, FRAMES - 1):
        a, b = (
            render(s, rig.K[0], rig.T_camera_world[0], 96, 128, low_pass=PIXEL_LOW_PASS).color
            for s in (frames[f], avatar.at(f))
        )
        error = (a.clamp(0, 1) - b.clamp(0, 1)).square().mean()
        assert -10 * error.log10() > 45
        assert b.std() > 0.1


def taking_turns() -> Avatar:
    """Two clouds of half the Gaussians, the first for two frames, the second for three."""
    splats, clouds = make_avatar().splats, []
    for part, frames in zip(torch.arange(COUNT).chunk(2), (2, 3), strict=True):
        means = splats.means[part]
        nodes = nodes_at_rest(means, 8, frames)
        nodes = replace(nodes, goes=0.1 * noise(frames, 8, 3))
        clouds.append(NodeCloud(nodes, follow(means, nodes), F.normalize(means, dim=1)))
    return Avatar(splats, NodeMotion(tuple(clouds), even_light(splats.means)), 12.0)


def test_a_cloud_is_hidden_when_it_is_not_its_turn(tmp_path):
    avatar = taking_turns()
    made, header, frames = stored(tmp_path, avatar)
    there = [visible(avatar.at(f)) for f in range(FRAMES)]
    assert [len(visible(got)) for got in frames] == [len(true) for true in there]
    assert made.gaussians == len(there[0]) + len(there[-1]) and made.note == ""
    for got, true in zip(frames, there, strict=True):
        apart = (visible(got).means - true.means).abs()
        assert (apart <= torch.tensor(header["size"]) / 131070 * 1.01 + 1e-6).all()
        girths = header["girth"]
        step = (visible(got).log_scales - true.log_scales).abs().max()
        assert step <= (girths[1] - girths[0]) / 509


def test_what_waits_for_its_turn_takes_little_room(tmp_path):
    avatar = taking_turns()
    both, _, _ = stored(tmp_path, avatar)
    one = replace(avatar, motion=replace(avatar.motion, clouds=(
        replace(avatar.motion.clouds[0], nodes=nodes_at_rest(avatar.splats.means[:150], 8, 5)),
    )), splats=avatar.splats.select(torch.arange(150)))  # fmt: skip
    alone, _, _ = stored(tmp_path, one)
    assert both.size < 3 * alone.size


def test_neighbouring_quaternions_have_one_sign(tmp_path):
    """The page blends them as they are: of opposite signs they would turn the long way round."""
    _, _, frames = stored(tmp_path, make_avatar())
    for a, b in zip(frames, frames[1:], strict=False):
        assert ((a.rotations * b.rotations).sum(1) > 0).all()


def test_one_frame_is_enough(tmp_path):
    made, header, frames = stored(tmp_path, make_avatar(frames=1))
    assert made.frames == 1 and header["frames"] == 1 and len(frames) == 1


def test_frames_are_thinned_evenly_and_said(tmp_path):
    made, header, frames = stored(tmp_path, make_avatar(), most=3 * COUNT)
    assert header["times"] == [0, 2, 4] and header["frames"] == FRAMES and len(frames) == 3
    assert "3 of 5 frames" in made.note
    true = visible(make_avatar().at(2))
    assert (frames[1].means - true.means).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("frames", "gaussians", "most", "times"),
    [(5, 10, 50, [0, 1, 2, 3, 4]), (5, 10, 29, [0, 4]), (5, 10, 9, [0]), (1, 10, 0, [0]),
     (6, 1, 3, [0, 2, 5])],
)  # fmt: skip
def test_kept_times(frames, gaussians, most, times):
    assert kept_times(frames, gaussians, most) == times


def test_dust_and_what_nobody_sees_is_left_out(tmp_path):
    avatar = make_avatar()
    splats = avatar.splats
    means, opacities = splats.means.clone(), splats.opacities.clone()
    opacities[:] = 1.0
    opacities[:7] = -9.0
    means[10] = torch.tensor([900.0, 0, 0])
    means[11] = math.nan
    made, header, _ = stored(
        tmp_path, replace(avatar, splats=replace(splats, means=means, opacities=opacities))
    )
    assert made.gaussians == header["count"] == COUNT - 9
    assert made.note.startswith("2 Gaussians")
    assert max(header["size"]) < 10


def test_nothing_to_see_is_one_sentence(tmp_path):
    avatar = make_avatar()
    gone = replace(avatar.splats, opacities=torch.full((COUNT,), -20.0))
    with pytest.raises(ValueError, match="'avatar' has no Gaussian"):
        stored(tmp_path, replace(avatar, splats=gone))
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_writing_leaves_no_file(tmp_path):
    def stop(done, total):
        assert total == FRAMES
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        stored(tmp_path, make_avatar(), on_step=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_key_tells_avatars_apart():
    avatar = make_avatar()
    sh = avatar.splats.sh.clone()
    assert stream_key(avatar) == stream_key(make_avatar())
    sh[3, 0, 1] += 1e-3
    others = [
        replace(avatar, fps=24.0),
        replace(avatar, splats=replace(avatar.splats, sh=sh)),
        make_avatar(frames=4),
    ]
    assert len({stream_key(a) for a in [avatar, *others]}) == 4


def test_the_header_is_as_described(tmp_path):
    stored(tmp_path, make_avatar())
    content = (tmp_path / "a.turnsplat").read_bytes()
    assert content[:8] == MAGIC
    (length,) = struct.unpack_from("<I", content, 8)
    header = json.loads(content[12 : 12 + length])
    assert length % 4 == 0 and header["low_pass"] == PIXEL_LOW_PASS
    assert header["count"] <= COUNT


def test_a_cut_file_is_refused(tmp_path):
    stored(tmp_path, make_avatar())
    content = (tmp_path / "a.turnsplat").read_bytes()
    (length,) = struct.unpack_from("<I", content, 8)
    (first,) = struct.unpack_from("<I", content, 12 + length)
    with pytest.raises(ValueError, match="cut off"):
        read_splat_stream(content[: 16 + length + first])
    with pytest.raises(ValueError, match="run the node again"):
        read_splat_stream(b"TURNCLD1" + content[8:])
