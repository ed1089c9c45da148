"""Body from BVH: files of the input folder, on the pack's performers and on other bodies."""

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from turnaround.models import fit_skeleton
from turnaround.models.body import Body
from turnaround.models.performer import PARENTS, load_performers
from turnaround.models.skeleton import performer_skeleton
from turnaround.nodes import body_bvh as nodes
from turnaround.nodes.body import SampleBody

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bvh_writer import MIXAMO, bvh_text  # noqa: E402  (beside the tests' folders)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = dict(
    performer="kira (unseen)", frames=5, start=0.0, fps=16.0, speed=1.0, faces=nodes.AS_FILED,
    clothes_seed=1_000_003,
)  # fmt: skip
RATE = 16


@pytest.fixture(autouse=True)
def folder(monkeypatch, caplog, tmp_path):
    """Nodes have an id, as in a run; the input folder is an empty one."""
    caplog.set_level(logging.INFO, logger="turnaround")
    for node in [*nodes.NODES, SampleBody]:
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="1"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    return tmp_path


def walk(frames: int = 9) -> str:
    """A figure that lifts its left arm by a quarter turn, and goes 1 m forwards."""
    joints = performer_skeleton().joints
    turns = torch.eye(3).repeat(frames, 17, 1, 1)
    angle = torch.linspace(0, torch.pi / 2, frames)
    c, s = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    lifted = torch.stack([c, s, zero, -s, c, zero, zero, zero, one], 1).view(frames, 3, 3)
    for j in (5, 6, 7):
        turns[:, j] = lifted
    root = torch.zeros(frames, 3)
    root[:, 2] = -torch.linspace(0, 1, frames)
    return bvh_text(MIXAMO, PARENTS, joints, turns, root, 1 / RATE)


def made(**settings):
    return nodes.BodyFromBVH.execute("walk.bvh", **(SETTINGS | settings)).result


def test_every_input_and_output_has_a_tooltip():
    for part in [
        *nodes.BodyFromBVH.define_schema().inputs,
        *nodes.BodyFromBVH.define_schema().outputs,
    ]:
        assert part.tooltip, part


def test_files_of_the_input_folder_are_listed(folder):
    assert nodes.bvh_files() == []
    (folder / "dance").mkdir()
    for name in ("walk.BVH", "b.txt", "dance/a.bvh"):
        (folder / name).write_text(walk())
    assert nodes.bvh_files() == ["walk.BVH", "dance/a.bvh"]
    schema = nodes.BodyFromBVH.define_schema()
    assert schema.inputs[0].options == ["walk.BVH", "dance/a.bvh"]


def test_a_performer_walks_and_lifts_the_arm(folder):
    (folder / "walk.bvh").write_text(walk())
    body, note = made(frames=9)
    (still,) = SampleBody.execute("kira (unseen)", "walk", 1, 0.2, 1_000_003).result
    assert torch.equal(body.faces, still.faces) and torch.equal(body.rest, still.rest)
    assert torch.equal(body.colors, still.colors) and body.fps == 16
    assert "0.5 s at 16 frames a second" in note
    way = body.vertices[-1] - body.vertices[0]
    weights = load_performers().tensors["weights"].float() / 255
    arm = weights[:, [6, 7]].sum(1) > 0.95
    others = weights[:, [2, 5, 6, 7]].sum(1) == 0
    # The whole goes 1 m, times by how much longer kira's legs are than the mean's.
    forwards = way[others]
    assert torch.allclose(forwards, forwards.mean(0).expand_as(forwards), atol=1e-4)
    assert float(forwards[:, 2].mean()) == pytest.approx(-0.9, abs=0.2)
    assert (way[arm, 1] - forwards[:, 1].mean()).mean() < -0.2  # up


def test_a_body_of_its_own_is_moved_in_its_own_build(folder):
    (folder / "walk.bvh").write_text(walk())
    (leo,) = SampleBody.execute("leo (unseen)", "walk", 5, 0.2, 1_000_003).result
    body, _ = made(body=leo)
    truth, _ = made(performer="leo (unseen)")
    assert torch.equal(body.rest, leo.rest) and body.frame_count == 5
    assert (body.vertices - truth.vertices).norm(dim=-1).mean() < 0.004


def test_length_and_speed(folder):
    (folder / "walk.bvh").write_text(walk(33))
    whole, note = made(frames=0)
    assert whole.frame_count == 33 and "33 frames" in note
    fast, _ = made(frames=0, speed=2.0)
    assert fast.frame_count == 17
    some, _ = made(frames=5, start=1.0, speed=2.0)
    assert torch.allclose(some.vertices[-1] - some.vertices[0], whole.vertices[24] - whole.vertices[16],
                          atol=1e-5)  # fmt: skip
    _, note = made(frames=6, start=1.8)
    assert "last pose is held" in note and "such as 5" in note


def test_sentences(folder, monkeypatch):
    with pytest.raises(ValueError, match="'file' is 'walk.bvh'"):
        made()
    (folder / "walk.bvh").write_text(walk())
    with pytest.raises(ValueError, match="over at 0.5 s"):
        made(start=3.0)
    (folder / "walk.bvh").write_text("HIERARCHY\n")
    with pytest.raises(ValueError, match="'walk.bvh' is no BVH"):
        made()
    (folder / "walk.bvh").write_text(walk())
    monkeypatch.setattr(fit_skeleton, "ARMS", (0.0,))
    monkeypatch.setattr(fit_skeleton, "STEPS", 5)
    points = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.5, 0.1, 1]
    )
    flat = Body(points[None], torch.arange(30).view(10, 3), points)
    with pytest.raises(ValueError, match="no bones can be found"):
        made(body=flat)


def test_a_changed_file_runs_again(folder):
    (folder / "walk.bvh").write_text(walk())
    before = nodes.BodyFromBVH.fingerprint_inputs("walk.bvh", frames=5)
    assert before == nodes.BodyFromBVH.fingerprint_inputs("walk.bvh", frames=5)
    os.utime(folder / "walk.bvh", ns=(1, 1))
    assert before != nodes.BodyFromBVH.fingerprint_inputs("walk.bvh", frames=5)
    assert "missing" in nodes.BodyFromBVH.fingerprint_inputs(None)
