"""Training scenes: exact files, live rendering that depends on nothing but seed and step."""

import numpy as np
import pytest
import torch
from turnaround.models.tiny.render_scenes import live_scenes, render_scene
from turnaround.models.tiny.scenes import LiveScenes, SceneFolder, crop, load_scene, save_scene

SMALL = {"views": 4, "frames": 2, "width": 32, "height": 48}


@pytest.fixture(scope="module")
def scene():
    return render_scene(5, "train", **SMALL)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_scene_is_the_same_for_its_seed_and_another_for_another(scene):
    assert same(scene, render_scene(5, "train", **SMALL))
    assert not same(scene, render_scene(6, "train", **SMALL))


def test_scene_shows_a_performer_and_what_view_0_knows_of_it(scene):
    assert scene.frames.shape == (4, 2, 48, 32, 3) and scene.masks.shape == (4, 2, 48, 32)
    inside = scene.masks == 255
    assert inside.flatten(1).sum(1).min() > 40
    seen = (scene.normals > 0).any(-1)
    # The source camera sees nearly all of its own view, and little of the one from behind.
    shares = [float((seen & inside)[v].sum() / inside[v].sum()) for v in range(4)]
    assert shares[0] > 0.9 and min(shares[1:]) < 0.4


def test_written_scene_is_read_back(scene, tmp_path):
    path = tmp_path / "a.npz"
    save_scene(path, scene)
    assert same(load_scene(path), scene)
    assert same(SceneFolder(tmp_path).choose(np.random.default_rng(0), 0), scene)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_folder_without_scenes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There are no scenes in .*: run render_scenes.py first"):
        SceneFolder(tmp_path)


def test_live_scenes_depend_on_generator_and_step_alone():
    """A resumed run, whose cache is empty, gets what the first one got."""
    asked: list[int] = []

    def render(seed: int) -> int:
        asked.append(seed)
        return seed

    def run(live: LiveScenes, steps: range) -> list[int]:
        return [live.choose(np.random.default_rng((0, step)), step) for step in steps]

    first = LiveScenes(render, fresh=0.5, window=16)
    whole = run(first, range(100))
    assert run(LiveScenes(render, fresh=0.5, window=16), range(50, 100)) == whole[50:]
    asked.clear()
    run(first, range(99, 100))
    assert len(asked) <= 1  # kept
    # The window slides: 16 wide, and half a scene a step.
    assert max(whole[:10]) < 13 and min(whole[90:]) >= 45 + 8 - 16


def test_live_scenes_of_another_seed_are_others(monkeypatch):
    from turnaround.models.tiny import render_scenes

    seeds: list[int] = []
    monkeypatch.setattr(render_scenes, "render_scene", lambda seed, *_, **__: seeds.append(seed))
    for seed in (0, 1):
        live_scenes("train", "cpu", seed).choose(np.random.default_rng(0), 0)
    assert seeds[0] != seeds[1]


def test_crop_is_a_window_around_the_performer(scene):
    rng = np.random.default_rng(0)
    for _ in range(5):
        window = crop(scene, rng, frames=2, size=16)
        assert window.shape == (3, 2, 16, 16)
        assert (window - 128 / 255).abs().max() > 0.1  # not background alone
