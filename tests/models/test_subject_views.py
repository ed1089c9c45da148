"""Which references are used, who sees a subject, and what its fields see."""

import math

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.subject import Shape, Subject, SubjectNet, pictures_of
from turnaround.models.subject_views import (
    bands,
    check_sees,
    fitted,
    from_nearest,
    look,
    references_of,
    spread,
)

R, W, H = 12, 48, 64


def ring(count: int, first: float = 0.0, elevation: float = 0.1, distance: float = 3.0):
    angles = first + torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.full((count,), elevation), distance, 0.7, W, H)


def draw(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def subject():
    pictures = pictures_of(
        draw(R, 3, H, W).sigmoid(), torch.ones(R, H, W), draw(R, 16, 1, H // 8, W // 8), ring(R)
    )
    net = SubjectNet(Shape(32, (0, 1), 16, 0.4))
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.add_(0.2 * draw(*p.shape, seed=n))
        for field in net.fields.values():
            field.head.bias[0] -= 2  # thin fog, here and there
    return Subject(net, pictures, ())


def test_references_are_spread_round_the_subject(subject):
    assert references_of(subject, 4) == [0, 3, 6, 9]
    assert references_of(subject, 2) == [0, 6]
    assert references_of(subject, R) == references_of(subject, 99) == list(range(R))


def test_the_next_reference_is_the_farthest_from_all_chosen():
    directions = draw(30, 3)
    chosen = spread(directions, 8)
    towards = torch.nn.functional.normalize(directions.double(), dim=1)
    apart = torch.arccos((towards[chosen] @ towards[chosen].T).clamp(-1, 1)).fill_diagonal_(9)
    covered = torch.arccos((towards @ towards[chosen].T).clamp(-1, 1)).amin(1)
    # Farthest points: all directions are closer to a chosen one than chosen ones to each other.
    assert covered.max() <= apart.min() + 1e-6
    assert chosen[0] == 0 and chosen == sorted(set(chosen)) and len(chosen) == 8


def test_of_equals_the_first_is_chosen():
    assert spread(torch.eye(3).repeat_interleave(2, 0), 3) == [0, 2, 4]


def test_how_far_cameras_stand_from_the_learned_pictures(subject):
    angles = from_nearest(subject, ring(R, first=math.radians(10), elevation=0.1, distance=5.0))
    # 10 degrees along a circle at elevation 0.1.
    between = math.acos(math.cos(0.1) ** 2 * math.cos(math.radians(10)) + math.sin(0.1) ** 2)
    torch.testing.assert_close(angles.float(), torch.full((R,), between), atol=1e-4, rtol=0)
    assert from_nearest(subject, ring(R)).max() < 1e-3


def test_a_camera_that_looks_elsewhere_is_named(subject):
    check_sees(subject, ring(5, 0.2))
    rig = ring(3, 0.2)
    away = rig.T_camera_world.clone()
    away[1, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0])) @ away[1, :3]  # turned round
    moved = type(rig)(rig.K, away, W, H)
    with pytest.raises(ValueError, match=r"1 of 3 cameras of 'rig' \(131°\) don't see the subject"):
        check_sees(subject, moved)


def test_a_rig_is_scaled_to_the_tokens_that_are_sampled():
    rig = ring(3)
    assert fitted(rig, (4, 3)) is rig
    twice = fitted(rig, (8, 6))
    assert (twice.width, twice.height) == (2 * W, 2 * H)
    torch.testing.assert_close(twice.K[:, :2], 2 * rig.K[:, :2])
    with pytest.raises(ValueError, match="4x3 tokens, but those of 'rig' are 48x64"):
        fitted(rig, (3, 4))


def test_bands_cover_a_picture_once():
    for size in ((3, 2), (900, 700), (1, 5000)):
        rows = [row for top, count in bands(size) for row in range(top, top + count)]
        assert rows == list(range(size[0]))


def test_what_is_looked_at_in_parts_is_what_the_field_shows(subject, monkeypatch):
    features = {i: draw(R, 32, 4, 3, seed=5 + i) for i in (0, 1)}
    known = subject.known()
    rays = ring(2, 0.3).resized(9, 12)
    wanted = rays.K, subject.space.normalised(rays.T_camera_world)
    monkeypatch.setattr("turnaround.models.subject_views.RAYS_AT_ONCE", 30)  # bands of 3 rows
    calls = []
    with torch.no_grad():
        rgb, alpha, depth = look(subject.net, features, known, wanted, (12, 9), calls.append)
        whole = subject.net.look(features, known, wanted, (12, 9))
    torch.testing.assert_close(rgb, whole.rgb)
    torch.testing.assert_close(alpha, whole.alpha)
    assert calls == list(range(1, 9))
    torch.testing.assert_close(depth, torch.where(alpha < 0.5, 0.0, whole.median_depth))
    assert 0 < (alpha < 0.5).float().mean() < 1
