"""The scores of docs/SUBJECT.md tell what they should."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from turnaround.models.subject_memory import A_PLACE, MARGIN

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import subject_page as page  # noqa: E402
import subject_scores as score  # noqa: E402  (a script beside the tests' folders)
import subjects  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
W, H = 96, 120
EIGHT = subjects.spiral_rig(8, W, H, first=0.7, lowest=0.0, highest=0.4)
MESHES = {"truck": subjects.truck(), "lamp": subjects.lamp()}


def drawn(name: str):
    return lambda rig, behind: subjects.thing(MESHES[name], rig, behind)


def seen(name: str, rig=EIGHT, seed: int = 0) -> subjects.Seen:
    return drawn(name)(rig, subjects.rooms(len(rig), rig.width, rig.height, seed))


@pytest.fixture(scope="module")
def truck() -> score.Known:
    learned = seen("truck", subjects.spiral_rig(12, W, H), seed=5)
    poses = score.poses_of(drawn("truck"), EIGHT)
    return score.Known(seen("truck"), EIGHT, poses, score.patches(learned.frames, learned.masks))


def test_identity_is_the_subjects_own_whatever_the_view_or_room(truck):
    own = score.identity_distance(score.patches(truck.seen.frames, truck.seen.masks), truck.patches)
    lamp = seen("lamp")
    other = score.identity_distance(score.patches(lamp.frames, lamp.masks), truck.patches)
    assert own < 0.25 * other
    assert score.identity_distance(truck.patches, truck.patches) == 0


def test_identity_grows_as_colors_leave(truck):
    masks, distances = truck.seen.masks, []
    for share in (0.0, 0.2, 0.5, 1.0):
        pale = torch.lerp(truck.seen.frames, torch.tensor(0.5), share)
        distances.append(score.identity_distance(score.patches(pale, masks), truck.patches))
    assert distances == sorted(distances) and distances[-1] > 5 * distances[0]


def test_cameras_are_found_whatever_the_room(truck):
    """Grid steps are 5 and 10 degrees."""
    for frames in (truck.seen.frames, seen("truck", seed=9).frames):
        away = score.camera_errors(frames, truck.poses, EIGHT)
        assert float(away.max()) < 10 and float(away.mean()) < 5


def test_cameras_are_found_in_pale_and_blurred_pictures(truck):
    soft = torch.nn.functional.avg_pool2d(truck.seen.frames, 9, 1, 4)
    soft = torch.lerp(soft, torch.tensor(0.5), 0.3)
    assert float(score.camera_errors(soft, truck.poses, EIGHT).max()) < score.NEAR


def test_another_view_is_another_camera(truck):
    turned = truck.seen.frames.roll(1, 0)
    away = score.camera_errors(turned, truck.poses, EIGHT)
    true = score._degrees(score.directions(EIGHT).roll(1, 0), score.directions(EIGHT))
    assert float((away - true).abs().max()) < 8


def test_empty_pictures_are_right_no_more_often_than_chance_could_be(truck):
    got = score.scores(torch.full_like(truck.seen.frames, 0.5), truck)
    assert 1 < score.chance(truck.poses, EIGHT) < 10
    assert got["right"] <= 25 and got["detail"] == 0 and got["cross"] < 1e-3


def test_the_truth_scores_best(truck):
    got = score.scores(truck.seen.frames, truck)
    assert got["right"] == 100 and got["detail"] == pytest.approx(100)
    assert got["psnr"] == float("inf")


# What the page says of them


@dataclass(frozen=True)
class OneSubject:
    scores: dict


def figures(psnr: float, right: float, identity: float, cross: float = 4.0) -> dict[str, float]:
    return {
        "psnr": psnr, "identity": identity, "right": right, "away": 5, "cross": cross, "detail": 20,
    }  # fmt: skip


def as_published() -> OneSubject:
    rows = {
        page.NONE: figures(11, 3, 28), page.WORDS: figures(12, 10, 22),
        page.FIELD: figures(20, 90, 4, 5.0), page.RENDERING: figures(20.1, 92, 4, 4.5),
        page.COMPLETION: figures(20.2, 93, 4, 4.4), page.TRIP: figures(24, 100, 2),
    }  # fmt: skip
    return OneSubject({rooms: dict(rows) for rooms in (False, True)})


def test_goals_are_met_by_what_was_published():
    assert len(page.goals({"a": as_published()})) == 8
    assert all(goal.met for goal in page.goals({"a": as_published()}))


@pytest.mark.parametrize(
    ("row", "scores", "missed"),
    [
        (page.FIELD, figures(14, 90, 4, 5.0), "PSNR"),
        (page.FIELD, figures(20, 90, 23, 5.0), "identity"),
        (page.RENDERING, figures(20.1, 12, 4, 4.5), "cameras"),
        (page.COMPLETION, figures(20.2, 80, 4, 4.4), "cameras"),
        (page.RENDERING, figures(20.1, 92, 4, 5.5), "the parts"),
        (page.COMPLETION, figures(19.2, 93, 4, 4.4), "the parts"),
    ],
)
def test_a_goal_can_be_missed(row, scores, missed):
    found = as_published()
    found.scores[True][row] = scores
    misses = [goal.text for goal in page.goals({"a": found}) if not goal.met]
    assert len(misses) == 1 and misses[0].startswith(missed)


def test_means_are_over_subjects():
    other = as_published()
    other.scores[False][page.FIELD] = figures(10, 50, 8)
    mean = page.mean_of({"a": as_published(), "b": other}, rooms=False)[page.FIELD]
    assert (mean["psnr"], mean["right"], mean["identity"]) == (15, 70, 6)
    assert "| **field** | 15.00 | 6.00 | 70 |" in page.table({page.FIELD: mean}, [page.FIELD])


def test_what_a_field_keeps_is_what_is_counted():
    """models/subject_memory.py's figure, with the fifth that it adds."""
    assert 1.0 < MARGIN * A_PLACE / page.kept_bytes() < 1.4
