"""Depth from masks and colours: shapes whose hull can be computed by hand, and a performer."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models import performer, performer_truth
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.silhouettes import depth_from_silhouettes, refine_depth_by_colour

W, H, DISTANCE, RADIUS = 48, 64, 3.0, 0.4
pytestmark = pytest.mark.usefixtures("one_thread")


def ring(views: int, width: int = W, height: int = H) -> Rig:
    azimuths = torch.arange(views) * (2 * math.pi / views)
    return orbit_rig(azimuths, torch.zeros(views), DISTANCE, 0.5, width, height)


def rays(rig: Rig, finer: int = 1) -> Tensor:  # [V, H, W, 3] world, 1 m of depth long
    """Through pixel centres; `finer` times as many along each side."""
    y = (torch.arange(rig.height * finer) + 0.5) / finer
    x = (torch.arange(rig.width * finer) + 0.5) / finer
    pixels = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(len(y), len(x))], -1)
    matrix = rig.T_camera_world[:, :3, :3].mT @ torch.linalg.inv(rig.K)
    return torch.einsum("vij,hwj->vhwi", matrix, pixels)


def soft(inside: Tensor, finer: int) -> Tensor:  # [V, h, w] -> [V, 1, H, W]
    """The covered share of every pixel."""
    return F.avg_pool2d(inside.float(), finer)[:, None]


def ball_masks(rig: Rig, centre=(0.0, 0.0, 0.0), finer: int = 8) -> Tensor:
    """A ball of RADIUS."""
    ways = F.normalize(rays(rig, finer), dim=-1)
    to = (torch.tensor(centre) - rig.centers)[:, None, None]
    along = (ways * to).sum(-1, keepdim=True)
    return soft((to - along * ways).norm(dim=-1) < RADIUS, finer)


def pole_masks(rig: Rig, finer: int = 4) -> Tensor:
    """An upright pole, 0.1 m thick and 1 m high."""
    ways, eyes = rays(rig, finer), rig.centers[:, None, None]
    along = -(ways * eyes)[..., [0, 2]].sum(-1) / ways[..., [0, 2]].square().sum(-1)
    nearest = eyes + along[..., None] * ways
    return soft((nearest[..., [0, 2]].norm(dim=-1) < 0.05) & (nearest[..., 1].abs() < 0.5), finer)


def test_a_ball_stands_where_tangents_from_the_side_put_it():
    rig = ring(8)
    depth = depth_from_silhouettes(ball_masks(rig), rig)
    # Cameras at 90 degrees touch the ball a little behind its front, so their tangents cross the
    # line of sight at r D / sqrt(D^2 - r^2) before the centre. Voxels here are 1 cm.
    front = RADIUS * DISTANCE / math.sqrt(DISTANCE**2 - RADIUS**2)
    middle = depth[:, 0, H // 2 - 1 : H // 2 + 1, W // 2 - 1 : W // 2 + 1]
    torch.testing.assert_close(middle, torch.full_like(middle, DISTANCE - front), rtol=0, atol=3e-3)


def test_the_hull_holds_the_ball_and_is_smoother_than_its_voxels():
    rig = ring(8)
    depth = depth_from_silhouettes(ball_masks(rig), rig)[:, 0]
    ways = rays(rig)
    a, b = ways.square().sum(-1), (ways * rig.centers[:, None, None]).sum(-1)
    inner = b * b - a * (DISTANCE**2 - RADIUS**2)
    true = (-b - inner.clamp(min=0).sqrt()) / a
    sure = inner > 0.4 * inner.amax()  # away from the rim
    assert ((depth - true)[sure] < 5e-3).all()
    assert (true - depth)[sure].median() < 0.02
    # Second differences of a hull of cones are those of its curvature, millimetres; steps of a
    # centimetre voxel would show as up to 10 mm.
    bend = torch.diff(depth[0, H // 2 - 6 : H // 2 + 6, W // 2 - 3 : W // 2 + 3], n=2, dim=0).abs()
    assert bend.median() < 4e-3


def test_every_pixel_of_the_masks_has_depth_and_no_other():
    rig = ring(8)
    masks = ball_masks(rig, (0.1, -0.2, 0.15))
    depth = depth_from_silhouettes(masks, rig)
    assert torch.equal(depth > 0, masks > 0.5)


def test_depth_scales_with_the_cameras():
    rig = ring(4)
    T = rig.T_camera_world.clone()
    T[:, :3, 3] *= 7
    masks = ball_masks(rig)
    large = depth_from_silhouettes(masks, replace(rig, T_camera_world=T))
    torch.testing.assert_close(large, 7 * depth_from_silhouettes(masks, rig), rtol=0, atol=5e-3)


def test_a_hole_in_one_mask_cuts_nothing_off():
    rig = ring(8)
    masks = pole_masks(rig)
    whole = depth_from_silhouettes(masks, rig)
    broken = masks.clone()
    broken[3, :, H // 2 - 6 : H // 2 + 6] = 0
    mended = depth_from_silhouettes(broken, rig)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(mended[others] > 0, masks[others] > 0.5)
    away = (mended - whole)[others].abs()[masks[others] > 0.5]
    assert (
        away.max() < 0.03
    )  # the pole is 0.1 m thick; where it was cut, it is seen from fewer sides
    assert not mended[3, 0, H // 2].any()


def test_views_and_frames_without_performer_stay_empty():
    rig = ring(8)
    masks = ball_masks(rig).repeat(1, 3, 1, 1)
    masks[2, 0] = 0
    masks[2:, 1] = 0
    steps = []
    depth = depth_from_silhouettes(masks, rig, lambda *step: steps.append(step))
    assert not depth[2, 0].any() and not depth[:, 1].any()
    assert torch.equal(depth[3, 0] > 0, masks[3, 0] > 0.5) and depth[0, 2].any()
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_masks_of_other_cameras_give_nothing():
    rig = ring(4)
    masks = torch.zeros(4, 1, H, W)
    masks[:2, :, :8] = 1  # high above in two views, far below in the others
    masks[2:, :, -8:] = 1
    assert not depth_from_silhouettes(masks, rig).any()


def test_two_cameras_are_refused_in_one_sentence():
    rig = ring(2)
    with pytest.raises(ValueError, match="at least 3 cameras .* 'views' has 2: connect") as caught:
        depth_from_silhouettes(ball_masks(rig, finer=1), rig)
    assert ". " not in str(caught.value)


# --- colour ---------------------------------------------------------------------------------------


def wall(rig: Rig, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [V, 1, 3, H, W] and depth [V, 1, H, W] of a wall at z = 0, 1 m wide, with a pattern."""
    ways = rays(rig)
    depth = -rig.centers[:, None, None, 2] / ways[..., 2]
    places = rig.centers[:, None, None] + depth[..., None] * ways
    grid = 2 * places[..., :2]
    inside = (grid.abs() < 1).all(-1)
    shown = F.grid_sample(pattern.expand(len(rig), -1, -1, -1), grid, align_corners=False)
    return (shown * inside[:, None])[:, None], (depth * inside)[:, None]


def three() -> Rig:
    return orbit_rig(torch.tensor([-0.4, 0.0, 0.4]), torch.zeros(3), DISTANCE, 0.5, W, H)


def blobs(seed: int = 0) -> Tensor:  # [1, 3, 96, 96]
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (96, 96), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("exposure", [1.0, 0.75])
def test_colours_move_a_place_to_where_the_views_agree(exposure):
    rig = three()
    frames, depth = wall(rig, blobs())
    frames[1] *= exposure  # of a whole view: says nothing
    inside = depth[1, 0] > 0
    refined = refine_depth_by_colour(frames, (depth - 0.06).clamp(min=0), rig)
    error = (refined - depth)[1, 0][inside].abs()
    # Places are tried 1 to 1.5 cm apart.
    assert error.median() < 0.01 and (error < 0.02).float().mean() > 0.8
    # What is right stays.
    assert (refine_depth_by_colour(frames, depth, rig) - depth)[1, 0].abs().median() < 1e-3


def test_bytes_are_read_as_pictures():
    rig = three()
    frames, depth = wall(rig, blobs())
    frames = (frames * 255).round()
    fat = (depth - 0.06).clamp(min=0)
    refined = refine_depth_by_colour(frames.byte(), fat, rig)
    assert torch.equal(refined, refine_depth_by_colour(frames / 255, fat, rig))


def test_without_pattern_or_with_noise_the_hull_keeps_its_word():
    rig = three()
    frames, depth = wall(rig, torch.full((1, 3, 96, 96), 0.6))
    fat = (depth - 0.06).clamp(min=0)
    inner = (
        F.avg_pool2d((depth[1] > 0).float(), 15, 1, 7)[0] > 0.999
    )  # the wall's edge is a pattern
    assert torch.equal(refine_depth_by_colour(frames, fat, rig)[1, 0][inner], fat[1, 0][inner])
    noise = 0.1 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(1))
    noisy = refine_depth_by_colour(frames + noise, fat, rig)
    assert torch.equal(noisy[1, 0][inner], fat[1, 0][inner])


def test_views_that_share_no_surface_leave_depth_alone():
    rig = ring(3)  # 120 degrees apart
    masks = ball_masks(rig)
    depth = depth_from_silhouettes(masks, rig)
    coarse = torch.rand(3, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    frames = F.interpolate(coarse, (H, W), mode="bilinear")[:, None]
    assert torch.equal(refine_depth_by_colour(frames, depth, rig), depth)


# --- a performer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def performed():
    look = performer.draw_appearance(1_000_003)
    posed = performer.pose_performer("leo", "dance_b", torch.tensor([0.4]), look)
    angles = torch.arange(8) * (math.pi / 4)
    rig = orbit_rig(angles, torch.zeros(8), 4.3, math.radians(35), 120, 150)
    clip = performer.render_performer(posed, look, rig)
    return clip, performer_truth.surface_truth(posed, rig).depth, rig


def right(depth: Tensor, true: Tensor) -> float:
    """The share of the true surface that is hit to 2 cm."""
    shown = true > 0
    return float(((depth - true).abs() < 0.02)[shown].float().mean())


def test_a_performer_from_eight_sides_is_right_to_centimetres(performed):
    clip, true, rig = performed
    hull = depth_from_silhouettes(clip.masks, rig)
    refined = refine_depth_by_colour(clip.frames, hull, rig)
    both = (true > 0) & (refined > 0)
    assert (refined - true)[both].abs().median() < pixel_width(rig) / 2
    assert right(refined, true) > right(hull, true) + 0.03 > 0.75


def pixel_width(rig: Rig) -> float:
    """Metres that a pixel spans at the performer."""
    return 4.3 / float(rig.K[0, 0, 0])
