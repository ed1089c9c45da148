"""Splats: nearest wins, no holes, chunks don't matter."""

import torch
from turnaround.models import rasterize
from turnaround.models.rasterize import EMPTY, splat

FOCAL = 40.0
SIZE = 40


def draw(positions, radii, picture=None, pictures=1):
    """[pictures, H, W] the nearest point, -1 = none, before a camera at the origin."""
    N = len(positions)
    half = SIZE / 2
    M = torch.tensor([[FOCAL, 0, half, 0], [0, FOCAL, half, 0], [0, 0, 1, 0]])
    where = torch.zeros(N, dtype=torch.int64) if picture is None else picture
    keys = splat(positions.T.contiguous(), radii, where, M, FOCAL, pictures, SIZE, SIZE)
    return torch.where(keys == EMPTY, -1, keys & 0xFFFFFFFF)


def test_nearest_point_wins_whatever_the_order():
    points = torch.tensor([[0.01, 0.01, 3.0], [0.01, 0.01, 2.0], [0.01, 0.01, 4.0]])
    radii = torch.full((3,), 0.001)
    assert draw(points, radii)[0, SIZE // 2, SIZE // 2] == 1
    assert draw(points.flip(0), radii)[0, SIZE // 2, SIZE // 2] == 1


def test_of_equal_depths_the_first_point_wins():
    points = torch.tensor([[0.01, 0.01, 2.0]]).repeat(5, 1)
    assert draw(points, torch.full((5,), 0.001)).max() == 0


def test_points_behind_the_camera_are_not_drawn():
    assert (draw(torch.tensor([[0.0, 0.0, -2.0]]), torch.tensor([0.1])) == -1).all()


def test_tiny_point_covers_the_pixel_that_it_falls_into():
    # The pixel's very corner: the worst place.
    index = draw(torch.tensor([[1e-4, 1e-4, 2.0]]), torch.tensor([1e-6]))[0]
    assert index[SIZE // 2, SIZE // 2] == 0


def test_splat_grows_with_focal_over_depth():
    near = (draw(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0.08])) >= 0).sum()
    far = (draw(torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([0.08])) >= 0).sum()
    assert near > 2.5 * far


def test_every_point_lands_in_its_own_picture():
    points = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 2.0]])
    index = draw(points, torch.full((2,), 0.01), torch.tensor([0, 2]), pictures=3)
    assert index[0].max() == 0 and index[1].max() == -1 and index[2].max() == 1


def test_chunks_do_not_change_the_picture(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 3, generator=generator) * 0.3 + torch.tensor([0.0, 0.0, 2.0])
    radii = torch.rand(3000, generator=generator) * 0.05
    whole = draw(points, radii)
    monkeypatch.setattr(rasterize, "CHUNK", 100)
    assert torch.equal(draw(points, radii), whole)


def test_no_points_leave_an_empty_picture():
    assert (draw(torch.zeros(0, 3), torch.zeros(0)) == -1).all()


def test_splats_are_round_and_cover_exactly_the_centres_in_reach():
    """Against every pixel centre by hand, for reaches from below one to the largest."""
    generator = torch.Generator().manual_seed(1)
    for pixels in (0.2, 0.6, 1.1, 2.5, 5.9, 9.0):
        place = 12 + 16 * torch.rand(2, generator=generator)
        point = torch.cat([(place - SIZE / 2) / FOCAL * 2, torch.tensor([2.0])])
        index = draw(point[None], torch.tensor([pixels * 2 / FOCAL]))[0]
        reach = max(min(pixels, rasterize.MAX_RADIUS) * 2**0.5, rasterize.LEAST_REACH)
        y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
        away = ((x - place[0]) ** 2 + (y - place[1]) ** 2).sqrt()
        sure = (away - reach).abs() > 1e-3
        assert torch.equal((index == 0)[sure], (away < reach)[sure])


def test_splats_beyond_the_border_are_cut():
    """Points outside whose splats reach into the picture colour only its edge, on the right row."""
    spots = torch.tensor([[-4.0, 20.5], [44.0, 20.5], [20.5, -4.0], [20.5, 44.0]])
    points = torch.cat([(spots - SIZE / 2) / FOCAL * 2, torch.full((4, 1), 2.0)], 1)
    index = draw(points, torch.full((4,), 0.25))[0]
    rows, columns = (index >= 0).nonzero().unbind(1)
    assert len(rows) and ((rows < 6) | (rows > 33) | (columns < 6) | (columns > 33)).all()
    assert index[20, 0] == 0 and index[20, -1] == 1 and index[0, 20] == 2 and index[-1, 20] == 3
