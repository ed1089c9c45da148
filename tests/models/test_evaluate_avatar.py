"""What docs/AVATAR.md compares: scores, goals and the scenes' shots."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import avatar_page as page  # noqa: E402
import avatar_rows as rows  # noqa: E402
import avatar_scenes as scenes  # noqa: E402  (scripts beside the tests' folders)

pytestmark = pytest.mark.usefixtures("one_thread")


def found(camera: float, motion: float, strong: float | None = None) -> rows.Found:
    values = {"camera": camera, "motion": motion, "strong": motion if strong is None else strong}
    scores = {g: {"psnr": v, "ssim": 0.9, "haarpsi": 0.8} for g, v in values.items()}
    return rows.Found(scores, 900, 20_000, 100.0, 90.0, 50.0)


def met(table: dict[str, rows.Found]) -> list[bool]:
    return [goal.met for goal in page.goals(table)]


def test_goals_pass_and_miss():
    main = rows.MAIN.name
    assert met({main: found(30.1, 27.2)}) == [True, True, True, True]
    assert met({main: found(29.9, 27.2)}) == [False, True, True, True]
    assert met({main: found(31.0, 27.9, 28.1)}) == [True, False, True, True]
    slow = replace(found(30.1, 29.0), seconds=181.0)
    assert met({main: slow})[-1] is False
    with_net = {main: found(31.0, 30.0), "with the detail net": found(31.0, 30.05)}
    assert met(with_net)[-1] is False
    with_net["with the detail net"] = found(31.0, 30.2)
    assert met(with_net)[-1] is True
    assert all(way.name in page.table(with_net, [way.name]) for way in (rows.MAIN,))


def scene(offset: int) -> tuple[torch.Tensor, scenes.Scene]:
    """Pictures that are wrong by so much inside the performer, and by anything outside."""
    truths = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    insides = torch.zeros(2, 16, 16)
    insides[:, 4:12, 4:12] = 1
    pictures = truths + (insides[:, None] * offset).to(torch.uint8)
    pictures[:, :, :2] = 255
    none = torch.zeros(0, 3)
    shots = torch.tensor([[1, 0, 0], [4, 0, 1]])
    return pictures, scenes.Scene(
        truths[None, :1], insides[None, :1], torch.eye(3)[None], torch.eye(4)[None], none[None],
        none.long(), none, shots, truths, insides, torch.ones(1),
    )  # fmt: skip


def test_only_the_performer_counts_and_only_what_was_drawn():
    pictures, truth = scene(51)
    scores = rows.scores(pictures, torch.tensor([True, False]), truth)
    assert list(scores) == ["camera"]
    assert scores["camera"]["psnr"] == pytest.approx(13.979, abs=1e-2)  # 20 log10(255 / 51)


def test_every_group_is_looked_at_from_cameras_that_were_not_learned():
    shots = scenes.shots_of(8, [8, 9])
    assert {scenes.GROUPS[g] for g, _, _ in shots} == set(scenes.GROUPS) == set(page.GROUPS)
    assert all(v >= 8 for g, v, _ in shots if scenes.GROUPS[g] != "learned")
    count = scenes.FRAMES + len(scenes.BETWEEN) + sum(
        len(t) for _, t in (*scenes.MOTIONS, *scenes.STRONG)
    )  # fmt: skip
    assert {m for _, _, m in shots if m >= scenes.FRAMES} == set(range(scenes.FRAMES, count))


def test_names_of_rows_are_files_of_their_own():
    assert len({way.file for way in rows.WAYS}) == len(rows.WAYS)
    assert {way.name for _, way in page.SHOWN} <= {way.name for way in rows.WAYS}
