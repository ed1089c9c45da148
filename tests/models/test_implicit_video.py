"""Implicit video: fields against plain formulas, places, pieces and rendering at any time and size."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models.implicit_video import (
    DIVISOR,
    MARGIN,
    Field,
    FieldSize,
    ImplicitVideo,
    Layer,
    Piece,
    annealed,
    places_of,
    read,
    read_smooth,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = FieldSize(3, 2, 8, 4, 1.5, 8, 2)
W, H, F = 24, 16, 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waves(phase: float = 0.0, width: int = W, height: int = H) -> Tensor:
    """[3, height, width] a smooth pattern."""
    x, y = places_of((width, height)).T.view(2, height, width)
    return torch.stack([0.5 + 0.4 * torch.sin(5 * (x - phase) + k + 3 * y) for k in range(3)])


def known_layer(picture: Tensor, motion: Tensor) -> Layer:
    layer = Layer(SMALL, SMALL, True, seeded())
    layer.know(picture, (MARGIN, MARGIN))
    layer.motion = motion
    return layer


def sliding(speed: float, frames: int = F) -> ImplicitVideo:
    """A pattern that moves to the right by `speed` widths a frame, as one piece."""
    far = places_of((160, 96)) * (1 + 2 * MARGIN) - MARGIN
    x, y = far.T.view(2, 96, 160)
    colours = [0.5 + 0.4 * torch.sin(5 * x + k + 3 * y) for k in range(3)]
    picture = torch.stack([*colours, torch.ones(96, 160)])
    motion = torch.zeros(frames, 2, 1, 1)
    motion[:, 0, 0, 0] = -speed * torch.arange(frames)
    piece = Piece([known_layer(picture, motion)], frames // 2, (0, frames - 1), range(frames))
    return ImplicitVideo([[piece]], frames, (W, H), 2, (2, 3))


# --- fields ---------------------------------------------------------------------------------------


def test_a_field_is_the_mlp_of_coordinates_and_features():
    field = Field(2, 3, SMALL, seeded(), silent=False).double()
    points = torch.rand(7, 2, dtype=torch.float64, generator=seeded(1))
    x = torch.cat([points, field.grid(points)], 1)
    first, _, second, _, last = field.mlp
    for layer in (first, second):
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(field(points), x @ last.weight.T + last.bias)


def test_a_silent_field_says_nothing_but_learns():
    field = Field(3, 2, SMALL, seeded(), silent=True)
    points = torch.rand(9, 3, generator=seeded(1))
    out = field(points)
    assert not out.any()
    (out - 1).square().sum().backward()
    assert field.mlp[-1].weight.grad.any() and field.mlp[-1].bias.grad.any()


def test_levels_that_are_not_heard_change_nothing():
    field = Field(3, 2, SMALL, seeded(), silent=False)
    points = torch.rand(9, 3, generator=seeded(1))
    share = torch.tensor([1.0, 0.0, 0.0])
    before = field(points, share)
    with torch.no_grad():
        field.grid.table[1:] += 1
    assert torch.equal(field(points, share), before)
    assert not torch.equal(field(points), before)


def test_annealing_is_a_cosine_a_level():
    torch.testing.assert_close(annealed(4, 0.0), torch.zeros(4))
    torch.testing.assert_close(annealed(4, 4.0), torch.ones(4))
    half = (1 - math.cos(math.pi * 0.25)) / 2
    torch.testing.assert_close(annealed(4, 1.25), torch.tensor([1.0, half, 0.0, 0.0]))
    assert not annealed(4, -3.0).any()


def test_the_same_seed_makes_the_same_field():
    one, two, other = (Field(2, 3, SMALL, seeded(s), False) for s in (4, 4, 5))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.grid.table, other.grid.table)


# --- layers ---------------------------------------------------------------------------------------


def test_coordinates_are_those_of_codef():
    layer = Layer(SMALL, SMALL, False, seeded())
    points = torch.rand(6, 2, generator=seeded(2))
    moment = torch.full((6, 1), 2 / 4)
    learned = layer.deformation(torch.cat([points, moment], 1)) / DIVISOR
    torch.testing.assert_close(layer.places(points, 2.0, 5), points + learned)
    torch.testing.assert_close(layer.colours(points), layer.canonical((points + 0.3) / 1.6))


def test_what_is_known_is_shown_whatever_was_learned():
    layer = Layer(SMALL, SMALL, False, seeded())
    picture = torch.rand(4, 32, 32, generator=seeded(3))
    layer.know(picture, (MARGIN, MARGIN))
    places = places_of((32, 32)) * (1 + 2 * MARGIN) - MARGIN
    shown = layer.colours(places).T.view_as(picture)
    torch.testing.assert_close(shown, picture, atol=1e-5, rtol=0)


def test_motion_between_frames_is_in_between():
    motion = torch.rand(3, 2, 4, 4, generator=seeded(4))
    layer = known_layer(torch.zeros(4, 8, 8), motion)
    points = torch.rand(5, 2, generator=seeded(5))
    between = layer.places(points, 1.25, 3)
    ends = [layer.places(points, t, 3) for t in (1.0, 2.0)]
    torch.testing.assert_close(between, torch.lerp(*ends, 0.25))


def test_layers_in_front_cover_those_behind():
    size = (4, 16, 16)
    behind, front = torch.zeros(size), torch.ones(size)
    front[3, :, :8] = 0  # nothing on the left
    layers = [known_layer(p, torch.zeros(1, 2, 1, 1)) for p in (behind, front)]
    piece = Piece(layers, 0, (0, 0), range(1))
    left, right = piece.colours(torch.tensor([[0.1, 0.5], [0.9, 0.5]]), 0.0)
    torch.testing.assert_close(left, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(right, torch.ones(3), atol=1e-5, rtol=0)


def test_coarse_grids_are_read_without_edges():
    grid = torch.rand(3, 4, 4, generator=seeded(6))
    corners = read_smooth(grid, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(corners, torch.stack([grid[:, 0, 0], grid[:, -1, -1]]))
    torch.testing.assert_close(
        read_smooth(grid[:, :1, :1], torch.rand(2, 2)), grid[:, 0, 0].expand(2, -1)
    )


def test_pictures_are_read_at_their_pixels():
    picture = waves()
    back = read(picture, places_of((W, H))).T.view_as(picture)
    torch.testing.assert_close(back, picture, atol=1e-5, rtol=0)


# --- pieces and rendering -------------------------------------------------------------------------


def empty_piece(key: int, reach: tuple[int, int], shot: range) -> Piece:
    return Piece([known_layer(torch.zeros(4, 4, 4), torch.zeros(1, 2, 1, 1))], key, reach, shot)


def test_pieces_are_blended_between_keys_and_never_across_a_cut():
    pieces = [empty_piece(0, (0, 4), range(6)), empty_piece(4, (0, 5), range(6)),
              empty_piece(7, (6, 9), range(6, 10))]  # fmt: skip
    video = ImplicitVideo([pieces], 10, (4, 4), 2, (2, 2))

    def at(time: float) -> list[tuple[int, float]]:
        return [(p.key, w) for p, w in video.pieces_at(0, time)]

    assert at(0) == [(0, 1.0)] and at(4) == [(4, 1.0)] and at(9) == [(7, 1.0)]
    assert at(1) == [(0, 0.75), (4, 0.25)]
    assert at(5.9) == [(4, 1.0)] and at(6) == [(7, 1.0)]
    assert at(-3) == [(0, 1.0)] and at(99) == [(7, 1.0)]


@pytest.mark.parametrize("time", [0.0, 1.5, 2.25, 4.0])
def test_slow_motion_of_a_sliding_pattern_is_exact(time):
    speed = 0.03
    shown = sliding(speed).render([time])[0, 0]
    # The canonical picture is read between its pixels, cubically.
    torch.testing.assert_close(shown, waves(speed * time), atol=2e-3, rtol=0)


def test_any_size_shows_the_same_places():
    shown = sliding(0.03).render([1.0], (50, 40))[0, 0]
    torch.testing.assert_close(shown, waves(0.03, 50, 40), atol=2e-3, rtol=0)


def test_chunks_change_nothing(monkeypatch):
    from turnaround.models import implicit_video

    video = sliding(0.02)
    whole = video.render([0.5, 3.0])
    monkeypatch.setattr(implicit_video, "POINTS", 37)
    torch.testing.assert_close(video.render([0.5, 3.0]), whole, atol=1e-6, rtol=0)


def test_what_is_not_smooth_is_shown_only_on_request():
    video = sliding(0.0)
    with torch.no_grad():
        video.gain[0, 2] = 0.2
        video.jitter[0, 2, 0] = 0.05
    steady, faulty = (video.render([2.0], smooth=s)[0, 0] for s in (True, False))
    torch.testing.assert_close(steady, waves(), atol=2e-3, rtol=0)
    bent = (waves(-0.05) * math.exp(0.2)).clamp(0, 1)
    torch.testing.assert_close(faulty, bent, atol=3e-3, rtol=0)


def test_detail_is_carried_along_the_motion():
    speed = 2 / W
    video = sliding(speed)
    video.detail = torch.zeros(1, F, 3, H, W, dtype=torch.float16)
    for n in range(F):
        video.detail[0, n, :, 6, 5 + 2 * n] = 0.1
    plain = sliding(speed)
    added = video.render([1.0, 1.5])[0] - plain.render([1.0, 1.5])[0]
    assert added[0, 0].argmax() == 6 * W + 7
    # Half-way between two frames the dot stands in the middle, not at both ends.
    assert added[1, 0].argmax() == 6 * W + 8 and float(added[1, 0].amax()) > 0.08


def test_pictures_of_canonical_and_deformation():
    video = sliding(0.1)
    canonical = video.canonical_picture()
    assert canonical.shape == (3, round(1.6 * H), round(1.6 * W))
    ways = video.deformation_picture(0, [0.0, 4.0])
    assert ways.shape == (2, 3, H, W)
    assert ways[0].amin() > 0.98, "what lies where it is read is white"
    # What has moved to the right reads to its left: cyan.
    r, g, b = ways[1].mean((1, 2))
    assert r < 0.2 and g > 0.8 and b > 0.8
