"""Animate Avatar: other motions, other builds, other meshes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from turnaround.models import fit_skeleton
from turnaround.models.avatar import Avatar, NodeMotion, SkinMotion
from turnaround.models.avatar_free import NodeCloud, follow, nodes_at_rest
from turnaround.models.avatar_mesh import splats_on_body
from turnaround.models.body import Body
from turnaround.models.body_sources import sample_body
from turnaround.models.repose import moved_like
from turnaround.nodes import animate_avatar as nodes

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = 0.3 + torch.arange(5) / 8


@pytest.fixture(autouse=True)
def _hosted(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="turnaround")
    monkeypatch.setattr(nodes.AnimateAvatar, "hidden", SimpleNamespace(unique_id="1"))


def person(name: str, motion: str = "dance_a", seed: int = 1_000_003) -> Body:
    return sample_body(name, motion, TIMES, seed, 8.0)


def avatar(body: Body) -> Avatar:
    splats, places = splats_on_body(body, 300)
    return Avatar(splats, SkinMotion(body, places, torch.zeros(9, 3)), 8.0)


def animated(of: Avatar, body: Body, build: float = 0.0, frames: int = 0, speed: float = 1.0):
    return nodes.AnimateAvatar.execute(of, body, build, frames, speed).result


def other_mesh(body: Body, seed: int = 0) -> Body:
    """The same surface, numbered anew, so that nothing is known of it."""
    order = torch.randperm(len(body.rest), generator=torch.Generator().manual_seed(seed))
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order))
    return Body(body.vertices[:, order], number[body.faces], body.rest[order], fps=body.fps)


def off(one: Body, other: Body) -> float:
    """Metres, mean; each frame may stand elsewhere."""
    gap = one.vertices - other.vertices
    return float((gap - gap.mean(1, keepdim=True)).norm(dim=-1).mean())


def test_every_input_and_output_has_a_tooltip():
    schema = nodes.AnimateAvatar.define_schema()
    for part in [*schema.inputs, *schema.outputs]:
        assert part.tooltip, part


def test_it_keeps_its_own_build_or_takes_the_others():
    mine, theirs = avatar(person("kira")), person("leo", "walk", 5)
    own, body, note = animated(mine, theirs)
    truth = person("kira", "walk")
    assert own.frame_count == 5 and note == "5 frames at 8 a second"
    assert off(body, truth) < 0.006 < 0.03 < off(theirs, truth)
    taken, whole, _ = animated(mine, theirs, build=1.0)
    assert torch.allclose(whole.vertices, theirs.centred().vertices, atol=1e-6)
    _, half, _ = animated(mine, theirs, build=0.5)
    middle = (body.vertices + whole.vertices) / 2
    assert off(half, Body(middle, half.faces, half.rest)) < 1e-5
    moved = own.at(2).means
    assert (moved - taken.at(2).means).norm(dim=1).mean() > 0.01
    assert torch.equal(own.motion.body.vertices, body.vertices)


def test_its_own_motion_comes_back():
    mine = avatar(person("kira"))
    _, body, _ = animated(mine, person("kira"))
    assert off(body, person("kira")) < 0.004


def test_a_body_of_another_mesh_moves_it_by_bones(monkeypatch):
    # One of twelve ways to begin is enough where the way that it stands is known.
    monkeypatch.setattr(fit_skeleton, "FACES", (0.0,))
    monkeypatch.setattr(fit_skeleton, "ARMS", (0.0,))
    monkeypatch.setattr(fit_skeleton, "STEPS", 60)
    mine, theirs = avatar(person("kira")), other_mesh(person("leo", "walk"))
    steps = []
    body = moved_like(mine.motion.body, theirs, 0.0, lambda: steps.append(1))
    truth = person("kira", "walk")
    assert off(body, truth) < 0.03 and len(steps) == 90
    assert len(body.rest) == len(truth.rest)


def test_what_another_mesh_can_not_lend_is_said(monkeypatch):
    mine, theirs = avatar(person("kira")), other_mesh(person("leo", "walk"))
    monkeypatch.setattr(nodes, "moved_like", lambda own, *_: own)
    *_, note = animated(mine, theirs, build=1.0)
    assert "by bones" in note and "stays the avatar's own" in note


def test_two_bodies_of_one_unknown_mesh_need_no_bones():
    mine, theirs = other_mesh(person("kira")), other_mesh(person("leo", "walk"))
    assert off(moved_like(mine, theirs, 0.0), other_mesh(person("kira", "walk"))) < 0.025


def test_frames_and_speed():
    mine, theirs = avatar(person("kira")), person("leo", "walk")
    out, body, _ = animated(mine, theirs, frames=9, speed=2.0)
    assert out.frame_count == body.frame_count == 9 and out.fps == 32


def test_an_avatar_without_a_body_is_refused():
    splats, _ = splats_on_body(person("kira"), 40)
    held = nodes_at_rest(splats.means, 9, 4)
    cloud = NodeCloud(held, follow(splats.means, held), splats.means)
    free = Avatar(splats, NodeMotion((cloud,), torch.zeros(9, 3)), 8.0)
    with pytest.raises(ValueError, match="distilled without a body"):
        animated(free, person("leo"))
