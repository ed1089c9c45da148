"""What MV-Opt compares: planes, balls and shifts by hand, and dense algebra."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models import mv_opt_links as links
from turnaround.models.cameras import Rig, orbit_rig, project
from turnaround.models.mv_opt_links import (
    FEWEST,
    MOST,
    STANDING,
    USUAL,
    USUAL_SHARE,
    across_views,
    add_normal,
    basis,
    bends,
    casts_of,
    drift_of,
    gaussian,
    grown,
    node_weights,
    outline_shifts,
    over_time,
    spread,
)  # fmt: skip

W, H = 64, 48
FOCAL = 80.0
RADIUS = 0.6

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def side_by_side(*metres: float, distance: float = 2.0) -> Rig:
    """Cameras that look along +z, moved sideways."""
    K = torch.tensor([[FOCAL, 0, W / 2], [0, FOCAL, H / 2], [0, 0, 1]]).repeat(len(metres), 1, 1)
    T = torch.eye(4).repeat(len(metres), 1, 1)
    T[:, 0, 3], T[:, 2, 3] = -torch.tensor(metres), distance
    return Rig(K, T, W, H)


def ring(views: int = 4, step: float = 0.6) -> Rig:
    return orbit_rig(torch.arange(views) * step, torch.full((views,), 0.2), 3.0, 0.6, W, H)


def ball(rig: Rig, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Depth [V, F, H, W] of a ball that moves, and its places in the world [V, F, H, W, 3]."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1)
    turn = rig.T_camera_world[:, :3, :3].mT @ torch.linalg.inv(rig.K)
    rays = torch.einsum("vij,hwj->vhwi", turn, pixels)[:, None]
    to = (centres - rig.centers[:, None])[:, :, None, None]  # [V, F, 1, 1, 3]
    a, b = rays.square().sum(-1), (rays * to).sum(-1)
    root = b.square() - a * (to.square().sum(-1) - RADIUS**2)
    depth = torch.where(root > 0, (b - root.clamp(min=0).sqrt()) / a, 0.0)
    return depth, rig.centers[:, None, None, None] + rays * depth[..., None]


def world_of(places: Tensor, world: Tensor) -> Tensor:
    """[N, 3] what lies behind pixel centres."""
    columns, rows = (places - 0.5).long().unbind(1)
    return world[rows, columns]


# --- across views ---------------------------------------------------------------------------------


def test_a_plane_is_seen_eight_pixels_further_by_a_camera_beside():
    # 0.2 m at 2 m with a focal length of 80 pixels.
    link, *others = across_views(torch.full((2, 1, H, W), 2.0), side_by_side(0.0, 0.2))
    assert not others and (link.here, link.there, link.over_time) == ((0, 0), (1, 0), False)
    expected = link.places_here - torch.tensor([8.0, 0.0])
    torch.testing.assert_close(link.places_there, expected, atol=1e-4, rtol=0)
    # The last column has no neighbour to mix with; each of the drawn places stands for some.
    shared = H * (W - 8)
    assert len(link.places_here) == MOST
    assert shared * 0.95 < MOST * link.share <= shared
    assert len({tuple(p) for p in link.places_here.tolist()}) == MOST
    assert link.counts.sum() == MOST and torch.equal(
        link.cells.bincount().float(), link.counts.float()
    )


def test_cells_are_squares_of_the_picture_here():
    link = across_views(torch.full((2, 1, H, W), 2.0), side_by_side(0.0, 0.2))[0]
    for cell in range(len(link.counts)):
        inside = (link.places_here[link.cells == cell] / links.CELL).long()
        assert (inside == inside[0]).all()
    assert len(link.counts) == -(-H // links.CELL) * -(-W // links.CELL)


def test_places_on_a_ball_are_one_surface_that_both_cameras_face():
    rig = ring()
    centres = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.05, 0.0]])
    depth, world = ball(rig, centres)
    found = across_views(depth, rig)
    assert {(k.here[0], k.there[0]) for k in found} >= {(v, v + 1) for v in range(3)}
    for k in found:
        (v, f), (w, g) = k.here, k.there
        assert f == g and v < w
        surface = world_of(k.places_here, world[v, f])
        expected = project(surface, rig.select([w]))[0][0]
        torch.testing.assert_close(k.places_there, expected, atol=1e-3, rtol=0)
        normal = (surface - centres[f]) / RADIUS
        # Up to the 2 cm by which depths may differ, behind the rim.
        assert ((normal * (rig.centers[w] - surface)).sum(1) > -0.1).all()


def test_opposite_cameras_share_nothing_and_neither_does_what_is_hidden():
    rig = orbit_rig(torch.tensor([0.0, torch.pi]), torch.zeros(2), 3.0, 0.6, W, H)
    assert across_views(ball(rig, torch.zeros(1, 3))[0], rig) == []
    depth = torch.full((2, 1, H, W), 2.0)
    depth[1, :, :, : W // 2] = 1.0  # something before the left half of the other camera
    link = across_views(depth, side_by_side(0.0, 0.0))[0]
    assert (link.places_here[:, 0] > W // 2).all() and len(link.places_here) > FEWEST


def test_few_shared_places_make_no_link():
    depth = torch.zeros(2, 1, H, W)
    depth[:, :, 10:16, 10:16] = 2.0
    assert FEWEST > 6 * 6 and across_views(depth, side_by_side(0.0, 0.0)) == []


def test_how_many_frames_at_a_time_changes_nothing():
    rig = side_by_side(0.0, 0.1, 0.25)
    depth = 2.0 + 0.1 * torch.arange(5.0)[None, :, None, None].expand(3, -1, H, W)
    whole = across_views(depth, rig, 16)
    # So many that each link's places are drawn at random.
    assert len(whole) == 3 * 5 and min(k.share for k in whole) > 2
    for chunk in (1, 2):
        parts = {(k.here, k.there): k for k in across_views(depth, rig, chunk)}
        assert len(parts) == len(whole)
        for a in whole:
            b = parts[a.here, a.there]
            assert a.share == b.share
            for name in ("places_here", "places_there", "cells", "counts"):
                assert torch.equal(getattr(a, name), getattr(b, name))


# --- over time ------------------------------------------------------------------------------------


def test_places_over_time_are_kept_where_flow_comes_back_to_the_performer():
    there, back = torch.zeros(1, 2, H, W), torch.zeros(1, 2, H, W)
    there[:, 0], back[:, 0] = 3.0, -3.0
    back[..., W // 2 :] = 0.0  # what comes to lie here did not come from there
    masks = torch.zeros(2, H, W, dtype=torch.bool)
    masks[0, 8:40, 8:60] = True
    masks[1, 8:30, 8:60] = True  # the lower rows are gone
    link, *others = over_time(there, back, masks, 1)
    assert not others and (link.here, link.there, link.over_time) == ((1, 0), (1, 1), True)
    steps = link.places_there - link.places_here
    torch.testing.assert_close(steps, torch.tensor([3.0, 0.0]).expand_as(steps))
    # At the seam bilinear reading gives less than the three pixels back; one is allowed.
    assert link.places_here[:, 0].max() + 3 <= W // 2 + 0.5
    assert link.places_here[:, 1].max() < 30
    assert len(link.places_here) == 22 * (W // 2 - 8 - 3)


def test_nobody_in_the_next_frame_makes_no_link():
    masks = torch.ones(3, H, W, dtype=torch.bool)
    masks[1] = False
    still = torch.zeros(2, 2, H, W)
    assert over_time(still, still, masks, 0) == []


# --- casts ----------------------------------------------------------------------------------------


def painted(gains: Tensor) -> tuple[Tensor, list]:
    """[V, F, 3] factors put on pictures of one colour, and links between all views and moments."""
    V, count, _ = gains.shape
    pictures = (0.4 * gains)[..., None, None].expand(-1, -1, -1, H, W)
    found = across_views(torch.full((V, count, H, W), 2.0), side_by_side(*[0.0] * V))
    still = torch.zeros(count - 1, 2, H, W)
    masks = torch.ones(count, H, W, dtype=torch.bool)
    for v in range(V):
        found += over_time(still, still, masks, v)
    return pictures, found


def test_casts_are_the_factors_that_were_put_in():
    gains = torch.ones(3, 4, 3)
    gains[1] = torch.tensor([1.2, 1.0, 0.8])  # a cast
    gains[2, ::2] = 1.1  # a flicker
    pictures, found = painted(gains)
    factors = ((0.4 * gains + links.FLOOR) / (0.4 + links.FLOOR)).log()
    expected = factors.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(casts_of(pictures, found), expected, rtol=0.03, atol=1e-3)
    assert expected[2] > 0.05


def test_clean_views_have_no_casts_and_no_links_tell_nothing():
    pictures, found = painted(torch.ones(3, 4, 3))
    assert casts_of(pictures, found).amax() < 1e-4
    assert torch.equal(casts_of(pictures, []), torch.zeros(3))


def test_links_that_disagree_by_chance_are_no_cast():
    pictures, found = painted(torch.ones(3, 4, 3))
    noisy = pictures * (1 + 0.3 * draw(3, 4, 3, H, W))  # no factor, only grain
    assert casts_of(noisy, found).amax() < 0.01


# --- where the performer stands -------------------------------------------------------------------


def figure(x: float, y: float, finer: int = 8) -> Tensor:  # [H, W] covered share
    """A disc on an upright box."""
    rows = (torch.arange(H * finer) + 0.5)[:, None] / finer - y
    columns = (torch.arange(W * finer) + 0.5) / finer - x
    disc = rows.square() + columns.square() < 9.0**2
    box = (rows > 0) & (rows < 16) & (columns.abs() < 5)
    return F.avg_pool2d((disc | box)[None].float(), finer)[0]


def test_shifts_of_an_outline_are_found_to_a_twentieth_of_a_pixel():
    true = torch.tensor([[0.0, 0.0], [0.4, -0.3], [-1.7, 2.2], [3.1, 0.75]])
    alpha = torch.stack([figure(30 + x, 20 + y) for x, y in true.tolist()])
    solid = figure(30, 20).expand_as(alpha)
    assert (outline_shifts(alpha, solid) - true).abs().max() < 0.05


def test_hair_that_the_geometry_lacks_hardly_moves_the_outline():
    alpha = figure(30.6, 20.0)
    alpha[18:22, 38:48] = 1.0  # a plait
    shift = outline_shifts(alpha[None], figure(30, 20)[None])[0]
    assert abs(float(shift[0]) - 0.6) < 0.4 and abs(float(shift[1])) < 0.3


def test_nobody_has_no_outline():
    pair = torch.stack([figure(30, 20), torch.zeros(H, W)])
    assert outline_shifts(pair.flip(0), pair).isnan().all()


def test_drift_is_what_changes_and_neither_what_stays_nor_what_is_usual():
    shake = 2.0 * torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    size = float(shake.square().mean().sqrt())
    expected = shake * (1 - (STANDING / size) ** 2)
    for always in (0.0, 5.0):
        torch.testing.assert_close(drift_of(shake + always), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(drift_of(shake * (0.9 * STANDING / size)), torch.zeros(5, 2))


def test_frames_without_an_outline_have_no_drift_and_two_frames_tell_nothing():
    shifts = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [torch.nan, torch.nan], [0.0, 0.0]])
    drift = drift_of(shifts)
    assert drift.isfinite().all() and drift[0, 0] > 1 and torch.equal(drift[2], torch.zeros(2))
    assert torch.equal(drift_of(shifts[:3]), torch.zeros(3, 2))


# --- accelerations --------------------------------------------------------------------------------

FALL = 9.81 / 16**2
"""Metres a frame², at 16 frames a second."""


def falling(shake: Tensor, views: int = 4) -> tuple:
    """(flows, masks, depth, rig) of a ball in free fall; `shake` [V, F, 2] moves whole pictures."""
    count, rig = shake.shape[1], ring(views)
    time = torch.arange(count) - count / 2
    centres = torch.zeros(count, 3)
    centres[:, 1] = FALL / 2 * time.square() - 0.1
    depth, world = ball(rig, centres)

    def flow(v: int, f: int, g: int) -> Tensor:
        camera = rig.select([v])
        points = world[v, f].flatten(0, 1)
        ends = project(points + centres[g] - centres[f], camera)[0][0]
        step = (ends - project(points, camera)[0][0]).T.unflatten(1, (H, W))
        inside = depth[v, f] > 0
        # The flow of the ball goes on outside of it, as every smooth flow does.
        step = torch.where(inside, step, step[:, inside].mean(1)[:, None, None])
        return step + (shake[v, g] - shake[v, f])[:, None, None]

    flows = [
        (torch.stack([flow(v, f, f + 1) for f in range(count - 1)]),
         torch.stack([flow(v, f + 1, f) for f in range(count - 1)]))
        for v in range(views)
    ]  # fmt: skip
    return flows, depth > 0, depth, rig


def second_difference(values: Tensor, f: int) -> Tensor:
    return values[f + 1] - 2 * values[f] + values[f - 1]


def test_a_ball_in_free_fall_is_left_falling():
    still = torch.zeros(4, 5, 2)
    scene = falling(still)
    found = bends(*scene, still)
    assert len(found) == 4 * 3
    # Unexplained, it would be a pixel a frame², far above what is usual.
    assert FALL * float(scene[3].K[0, 1, 1]) / 3.0 > 2 * USUAL
    assert max(float(b.excess.abs().max()) for b in found) < 0.05


def test_a_view_that_shakes_is_found_and_the_others_are_left():
    shake = torch.zeros(4, 5, 2)
    shake[2, :, 0] = torch.tensor([1.5, -1.5, 1.5, -1.5, 1.5])
    flows, masks, depth, rig = falling(shake)
    found = {(b.view, b.frame): b.excess for b in bends(flows, masks, depth, rig, 0 * shake)}
    fall = FALL * float(rig.K[0, 1, 1]) / 3.0
    usual = USUAL + USUAL_SHARE * fall
    for f in (1, 2, 3):
        true = second_difference(shake[2], f)  # 6 pixels
        mean = found[2, f].mean(0)
        assert (mean - true).abs().max() < 6 * (usual / 6) ** 2 + 0.5
        for v in (0, 1, 3):
            assert found[v, f].abs().max() < 0.5


def test_drift_that_is_known_comes_back_in_full():
    """It does not blur what the views agree on, so all may shake at once."""
    shake = torch.zeros(4, 5, 2)
    shake[:, :, 0] = draw(4, 5)
    found = bends(*falling(shake), shake)
    for b in found:
        true = second_difference(shake[b.view], b.frame)
        assert (b.excess - true).abs().max() < 0.1


def test_one_view_alone_has_no_bends():
    flows, masks, depth, rig = falling(torch.zeros(1, 4, 2), views=1)
    assert bends(flows, masks, depth, rig, torch.zeros(1, 4, 2)) == []


def test_node_weights_carry_linear_functions_exactly():
    low, counts = torch.tensor([-1.0, 0.5, 2.0]), (3, 4, 5)
    points = low + links.GRID * torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) * (
        torch.tensor(counts) - 1
    )
    nodes = torch.stack(torch.meshgrid(*(torch.arange(n) for n in counts), indexing="ij"), -1)
    places = low + links.GRID * nodes.flatten(0, 2)
    weights = node_weights(points, low, counts)
    torch.testing.assert_close(weights @ places, points, atol=1e-3, rtol=0)
    torch.testing.assert_close(weights.sum(1), torch.ones(20))


# --- grids ----------------------------------------------------------------------------------------


def test_places_read_a_grid_as_pictures_are_covered_by_it():
    grid, size = draw(2, 4, 6), (H, W)
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], -1) + 0.5
    at = basis(places, size, (4, 6))
    everywhere = spread(grid, size).flatten(1).T
    torch.testing.assert_close(at.read(grid), everywhere, atol=1e-5, rtol=0)
    torch.testing.assert_close(at.dense(24) @ grid.flatten(1).T, everywhere, atol=1e-5, rtol=0)
    torch.testing.assert_close(grid.flatten(1) @ at.mean(24), everywhere.mean(0), atol=1e-5, rtol=0)
    corner = basis(torch.tensor([[0.0, 0.0], [float(W), float(H)], [-9.0, 99.0]]), size, (4, 6))
    expected = torch.stack([grid[:, 0, 0], grid[:, -1, -1], grid[:, -1, 0]])
    torch.testing.assert_close(corner.read(grid), expected, atol=0.01, rtol=0)


def test_normal_equations_are_those_of_the_dense_matrix():
    at = basis(torch.rand(50, 2).double() * torch.tensor([W, H]), (H, W), (3, 5))
    J, weight, residual = draw(50, 2).double(), draw(50, seed=1).abs().double(), draw(50, seed=2)
    curvature, slope = torch.eye(30).double(), torch.ones(30).double()
    add_normal(curvature, slope, at, J, weight, residual.double())
    dense = at.dense(15)
    A = torch.cat([J[:, :1] * dense, J[:, 1:] * dense], 1)
    expected = torch.eye(30) + A.T @ (weight[:, None] * A)
    torch.testing.assert_close(curvature, expected)
    torch.testing.assert_close(slope, 1 + A.T @ (weight * residual))


def test_blur_keeps_what_is_plain_and_widens_by_its_sigma():
    plain = torch.full((1, 20, 24), 0.3)
    torch.testing.assert_close(gaussian(plain, 2.0), plain)
    spot = torch.zeros(1, 41, 41)
    spot[0, 20, 20] = 1
    wide = gaussian(spot, 2.0)[0]
    away = torch.arange(41.0) - 20
    assert float(wide.sum()) == pytest.approx(1, abs=1e-5)
    assert float((wide.sum(0) * away**2).sum()) == pytest.approx(4.0, rel=0.05)


def test_masks_grow_by_squares():
    mask = torch.zeros(1, 12, 12)
    mask[0, 5, 6] = 1
    expected = torch.zeros(1, 12, 12)
    expected[0, 3:8, 4:9] = 1
    assert torch.equal(grown(mask, 2), expected)
