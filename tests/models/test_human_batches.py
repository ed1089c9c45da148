"""The human net's training pictures: exact truth after every change, and a trainer that learns."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from turnaround.models.human_net import CROP, HumanNet, HumanOutput
from turnaround.models.performer import JOINTS, SPLITS, load_performers
from turnaround.models.performer_truth import KEYPOINTS
from turnaround.models.tiny import human_pool, train_human
from turnaround.models.tiny.human_batches import FLIPPED, HumanBatches, as_filmed, halve
from turnaround.models.tiny.human_pool import (
    MARGIN,
    TILE,
    close_camera,
    draw_pose,
    make_background,
    mix_motion,
    render_shard,
    write_pool,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pool of two pictures of people and four backgrounds."""
    folder, shard = tmp_path_factory.mktemp("pool"), human_pool.SHARD
    human_pool.SHARD = 2
    try:
        write_pool(folder, "train", people=2, backgrounds=4, first=0, photos=None)
    finally:
        human_pool.SHARD = shard
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return HumanBatches(folder, "train", CROP)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_every_left_has_its_right_in_the_mirror():
    assert sorted(FLIPPED) == list(range(len(KEYPOINTS)))
    assert KEYPOINTS[FLIPPED[KEYPOINTS.index("wrist.L")]] == "wrist.R"
    assert FLIPPED[KEYPOINTS.index("nose")] == KEYPOINTS.index("nose")


def test_mixed_poses_are_rotations_and_differ():
    bank = load_performers()
    a, b = (mix_motion(bank, rng(s), "walk", "punch") for s in (0, 1))
    assert a.shape == (len(JOINTS), 3, 3) and not np.allclose(a, b)
    # Stored in half precision and multiplied a few times: not exact to more.
    np.testing.assert_allclose(a @ a.swapaxes(1, 2), np.eye(3)[None].repeat(17, 0), atol=0.02)
    assert (np.linalg.det(a) > 0.95).all()


@pytest.mark.parametrize("split", SPLITS)
def test_people_are_of_their_split_alone(split, monkeypatch):
    used = []
    whole = human_pool.pose_performer
    monkeypatch.setattr(human_pool, "pose_performer", lambda *a: used.append(a[:2]) or whole(*a))
    draw_pose(rng(), split, new_pose=False)
    assert used[0][0] in SPLITS[split][0] and used[0][1] in SPLITS[split][1]


def test_the_close_camera_fills_the_picture():
    posed, _, height = draw_pose(rng(), "train", True)
    rig = close_camera(posed, 1.0, 0.2, 3.0)
    camera = posed.vertices[0] @ rig.T_camera_world[0, :3, :3].T + rig.T_camera_world[0, :3, 3]
    pixels = (camera @ rig.K[0].T)[:, :2] / camera[:, 2:]
    low, high = pixels.amin(0), pixels.amax(0)
    assert float((high - low).max()) == pytest.approx(TILE - 2 * MARGIN, abs=0.1)
    torch.testing.assert_close((low + high) / 2, torch.full((2,), TILE / 2), rtol=0, atol=0.1)
    assert 1.3 < height < 2.2


def test_a_shard_is_the_same_for_the_same_number():
    a, b = render_shard(7, "validation", 1), render_shard(7, "validation", 1)
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_rendering_again_leaves_what_is_there(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    write_pool(folder, "train", people=1, backgrounds=4, first=0, photos=None)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_pool_without_the_split_is_refused(folder):
    np.save(folder / "test_backgrounds.npy", np.zeros((1, 256, 256, 3), np.uint8))
    with pytest.raises(ValueError, match="no people of split test"):
        HumanBatches(folder, "test", CROP)
    (folder / "test_backgrounds.npy").unlink()


def test_the_same_seed_gives_the_same_batch(source):
    a, b = source.batch(rng(3), 2), source.batch(rng(3), 2)
    for field in fields(a):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name))


@pytest.fixture(scope="module")
def batch(source):
    return source.batch(rng(5), 16)


def test_truth_is_whole_and_in_range(batch):
    width, height = CROP
    assert batch.pictures.shape == (16, 3, height, width)
    assert batch.pictures.min() >= 0 and batch.pictures.max() <= 1
    for field in fields(batch):
        assert getattr(batch, field.name).double().isfinite().all()
    assert (batch.masks <= batch.anyone + 1e-6).all()
    length = batch.normals.norm(dim=1)
    torch.testing.assert_close(length[batch.surface], torch.ones(int(batch.surface.sum())))
    assert (batch.masks[batch.surface] > 0.5).all()
    assert batch.relief[batch.surface].abs().median() < 0.3
    assert (batch.confidence[~batch.present] == 0).all()


def test_seen_keypoints_lie_on_or_beside_the_body(batch):
    """Joints are inside limbs, ears and toes at the rim: at most a few pixels off the mask."""
    near = torch.nn.functional.max_pool2d(batch.masks[:, None], 9, 1, 4)[:, 0]
    b, p = (batch.confidence == 1).nonzero().unbind(1)
    x, y = batch.keypoints[b, p].long().unbind(-1)
    assert len(b) > 50 and (near[b, y, x] > 0.3).float().mean() > 0.95


def place(source, person, seed, size, mirror):
    """A layer whose random turn and mirror are those of the seed; searched for the wanted one."""
    for s in range(seed, seed + 50):
        r = rng(s)
        r.normal(0, 0.16)
        if (r.random() < 0.5) == mirror:
            return source._place(rng(s), person, size, (CROP[0] / 2, CROP[1] / 2))
    raise AssertionError


@pytest.mark.parametrize("mirror", [False, True])
def test_normals_and_depth_turn_with_the_picture(source, mirror):
    """Normals that come back from the depth's slopes, after turn, scale and mirror."""
    person = {k: v[0] for k, v in source.shards[0].items()}
    layer = place(source, person, 0, 150.0, mirror)
    depth = torch.from_numpy(layer.depth)
    inner = torch.nn.functional.avg_pool2d((depth > 0).float()[None], 7, 1, 3)[0] > 0.999
    zx = (depth.roll(-1, 1) - depth.roll(1, 1)) / 2
    zy = (depth.roll(-1, 0) - depth.roll(1, 0)) / 2
    inner &= (zx.abs() < 0.03) & (zy.abs() < 0.03)
    slope = layer.focal / depth
    derived = torch.nn.functional.normalize(
        torch.stack([zx * slope, zy * slope, -depth / depth]), dim=0
    )
    stored = torch.nn.functional.normalize(torch.from_numpy(layer.normals), dim=-1).movedim(-1, 0)
    cosine = (derived * stored).sum(0)[inner]
    # Smooth normals over flat triangles, in steps of 0.2 mm: not closer than some degrees.
    assert inner.sum() > 500 and float(cosine.median()) > math.cos(math.radians(20))


def test_scale_is_pixels_a_metre(batch):
    pixels = batch.scale[batch.present, 0].exp()
    assert pixels.min() > 10 and pixels.max() < 500
    assert (batch.scale[batch.present, 1].exp() - 1.7).abs().max() < 0.35


def test_halving_keeps_units(batch):
    relief, surface, normals = halve(batch)
    assert relief.shape == (16, CROP[1] // 2, CROP[0] // 2)
    torch.testing.assert_close(normals.norm(dim=1)[surface], torch.ones(int(surface.sum())))
    assert relief[~surface].abs().max() == 0


def test_backgrounds_and_spoiling_are_pictures():
    for seed in range(6):
        assert make_background(rng(seed), [], 64).shape == (64, 64, 3)
        filmed = as_filmed(np.full((32, 24, 3), 0.5, np.float32), rng(seed))
        assert filmed.shape == (32, 24, 3) and 0 <= filmed.min() <= filmed.max() <= 1


def perfect(batch) -> HumanOutput:
    relief, _, normals = halve(batch)
    heat = torch.zeros(*batch.confidence.shape, CROP[1] // 4, CROP[0] // 4)
    return HumanOutput(
        (batch.masks - 0.5) * 40, (batch.anyone - 0.5) * 40, relief, normals, heat,
        batch.keypoints, torch.logit(batch.confidence, 1e-4), batch.scale,
    )  # fmt: skip


def test_the_truth_has_the_best_score_and_the_least_loss(batch):
    right = perfect(batch)
    terms = train_human.loss_terms(right, batch)
    for name in ("relief", "slope", "normals", "keypoints", "scale"):
        assert float(terms[name]) < 1e-5
    wrong = train_human.loss_terms(
        right._replace(mask=-right.mask, relief=right.relief + 0.1, normals=-right.normals), batch
    )
    for name in ("mask", "relief", "normals"):
        assert wrong[name] > terms[name] + 0.1

    class Oracle(torch.nn.Module):
        def forward(self, _):
            return right

    found = train_human.scores(Oracle(), [batch])
    assert found["mask IoU"] > 0.98 and found["normals, degrees"] < 0.1
    assert found["PCK@0.1 of height, seen"] == 1
    assert found["depth, relative, metric"] < 1e-5


def test_a_constant_relief_error_has_no_slope(batch):
    right = perfect(batch)
    terms = train_human.loss_terms(right._replace(relief=right.relief + 0.1), batch)
    assert terms["slope"] < 1e-5 and float(terms["relief"]) == pytest.approx(0.8, rel=1e-3)


def test_what_a_worker_makes_is_what_the_run_itself_would(source):
    def load(rng, step):
        return source.of_size((32, 32)).batch(rng, 1)

    batches = train_human.Prefetch(load, seed=3, first=5, steps=7, workers=0)
    assert len(batches) == 2
    for step in (5, 6):
        made = batches[step - 5]
        assert torch.equal(made["pictures"], batches(rng((3, step)), step).pictures)


def test_whole_frames_are_scored(folder):
    found = train_human.score_frames(HumanNet((8, 8, 8, 8, 8)).eval(), folder, "train", 1)
    assert 0 <= found["mask IoU"] <= 1 and "found" in found


def test_a_drawn_frame_holds_the_whole_person():
    behind = np.zeros((256, 256, 3), np.uint8)
    for seed in range(2):
        frame = train_human.draw_frame(rng(seed), "validation", behind)
        size = torch.tensor(frame.mask.shape[::-1])
        assert ((frame.keypoints > 0) & (frame.keypoints < size)).all()
        assert frame.mask[frame.depth > 0].min() > 0 and frame.seen.any()


def test_the_trainer_runs_goes_on_and_exports(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_human, "HumanNet", lambda: HumanNet((8, 8, 8, 8, 8)))
    monkeypatch.setattr(train_human, "CROP", (64, 64))
    monkeypatch.setattr(train_human, "STAGES", ((0.5, (32, 32)), (1.0, (64, 64))))
    common = ["train_human", "--folder", str(tmp_path), "--data", str(folder), "--batch", "2",
              "--threads", "1", "--device", "cpu"]  # fmt: skip
    exported = tmp_path / "net.safetensors"
    for steps in ("1", "2"):
        monkeypatch.setattr("sys.argv", [*common, "--steps", steps, "--export", str(exported)])
        train_human.main()
    assert load_file(exported)["stem.weight"].dtype == torch.float16
    assert list(tmp_path.glob("checkpoint-00000002")) and list((tmp_path / "pictures").iterdir())
