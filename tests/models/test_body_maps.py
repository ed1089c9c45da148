"""Body maps against the exact truth of the synthetic performers, and against formulas."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models import body_maps
from turnaround.models.body import Body, deformation
from turnaround.models.body_maps import (
    MapSettings,
    latent_starts,
    pose_colors,
    ray_directions,
    reference_masks,
    subframe_motion,
)
from turnaround.models.body_sources import sample_body
from turnaround.models.cameras import orbit_rig
from turnaround.models.geometry import encode_normals
from turnaround.models.performer import draw_appearance, pose_performer, render_geometry
from turnaround.models.performer_truth import surface_truth

W, H, FRAMES = 48, 64, 6
GREY = 128 / 255
STEP = 0.5001 / 255
"""Half a byte: as near as a byte comes to any colour."""
TIMES = 1.2 + torch.arange(FRAMES) / 16
AZIMUTHS = torch.tensor([0, math.pi / 2, math.pi])
RIG = orbit_rig(AZIMUTHS, torch.tensor([0.1, 0.1, 0.1]), 3.8, math.radians(35), W, H)


def render_body_maps(*args, **options):
    """The maps with bytes as 0..1."""
    maps = body_maps.render_body_maps(*args, **options)
    bytes_ = {
        n: v.float() / 255 for n, v in vars(maps).items() if getattr(v, "dtype", 0) == torch.uint8
    }
    return replace(maps, **bytes_)


@pytest.fixture(scope="module")
def body() -> Body:
    return sample_body("kira", "dance_a", TIMES, 1_000_003, 16.0)


@pytest.fixture(scope="module")
def maps(body):
    return render_body_maps(body, RIG)


@pytest.fixture(scope="module")
def truth():
    posed = pose_performer("kira", "dance_a", TIMES, draw_appearance(1_000_003))
    return posed, surface_truth(posed, RIG)


def at(pictures: Tensor, mask: Tensor) -> Tensor:  # [V, F, 3, H, W] -> [n, 3]
    return pictures.movedim(2, -1)[mask]


def test_depth_and_normals_are_the_exact_truth_of_the_performer(maps, truth):
    posed, _ = truth
    for v in range(3):
        depth, normals = render_geometry(posed, 4, RIG.K[v], RIG.T_camera_world[v], W, H)
        hit = depth > 0
        assert hit.sum() > 100
        assert torch.equal(maps.depth[v, 4], depth)
        local = normals.movedim(0, -1)[hit] @ RIG.T_camera_world[v, :3, :3].T
        drawn = maps.normals[v, 4].movedim(0, -1)
        torch.testing.assert_close(drawn[hit], encode_normals(local), atol=STEP, rtol=0)
        assert (drawn[~hit] == GREY).all()


def test_pose_is_the_template_place_of_the_surface(maps, truth, body):
    surface = truth[1]
    hit = surface.depth > 0
    low, high = body.rest.amin(0), body.rest.amax(0)
    expected = 0.5 + (at(surface.places, hit) - (low + high) / 2) / (high - low).max()
    torch.testing.assert_close(at(maps.pose, hit), expected, atol=STEP, rtol=0)
    assert (at(maps.pose, ~hit) == 0).all()


def test_pose_colours_keep_the_shape_of_the_template():
    rest = torch.tensor([[-1.0, -3, 0], [1, 5, 0.5]])
    colors = pose_colors(rest)
    torch.testing.assert_close(colors[:, 1], torch.tensor([0.0, 1]))
    torch.testing.assert_close(colors.mean(0), torch.full((3,), 0.5))
    torch.testing.assert_close(colors[1] - colors[0], (rest[1] - rest[0]) / 8)


def test_latent_frames_begin_at_0_1_5_9():
    assert latent_starts(10).tolist() == [0, 1, 1, 1, 1, 5, 5, 5, 5, 9]


def test_motion_is_none_where_a_latent_frame_begins(maps, body):
    assert (maps.motion[:, [0, 1, 5]] == GREY).all()
    assert (maps.motion[:, 4] != GREY).any()
    moved = subframe_motion(body.vertices)
    torch.testing.assert_close(moved[4], body.vertices[4] - body.vertices[1])


def test_motion_is_told_in_the_axes_of_each_camera():
    """A step of 0.1 m to +x is to the right in front, towards the camera at 90 degrees (-z),
    and to the left from behind."""
    rig = orbit_rig(AZIMUTHS, torch.zeros(3), 3.8, math.radians(35), W, H)
    still = sample_body("kira", "dance_a", TIMES[:1], 3, 16.0)
    steps = torch.tensor([0, 0, 1.0])[:, None, None] * torch.tensor([0.1, 0, 0])
    walk = replace(still, vertices=still.vertices + steps)
    maps = render_body_maps(walk, rig)
    assert maps.motion_scale == pytest.approx(0.1, rel=1e-4)
    hit = maps.depth[:, 2] > 0
    for v, axes in enumerate(([1.0, 0, 0], [0, 0, -1.0], [-1.0, 0, 0])):
        drawn = maps.motion[v, 2].movedim(0, -1)[hit[v]]
        expected = 0.5 + 0.5 * torch.tensor(axes)
        torch.testing.assert_close(drawn, expected.expand_as(drawn), atol=STEP + 1e-4, rtol=0)


def test_deformation_is_encoded_by_the_stated_scale(maps, truth, body):
    surface = truth[1]
    hit = surface.depth > 0
    shift = deformation(body)
    _, f, _, _ = hit.nonzero(as_tuple=True)
    corners = shift[f[:, None], body.faces[surface.faces[hit]]]
    expected = (corners * surface.barycentrics[hit][..., None]).sum(1)
    drawn = (at(maps.deformation, hit) - 0.5) * 2 * maps.deformation_scale
    step = 2 * STEP * maps.deformation_scale
    torch.testing.assert_close(drawn, expected, atol=step, rtol=0)
    assert maps.deformation_scale == pytest.approx(float(shift.norm(dim=-1).max()))


def test_too_small_a_scale_is_cut_off_and_told(body):
    maps = render_body_maps(
        body.resampled(2), RIG, MapSettings(deformation_scale=0.1, motion_scale=50.0)
    )
    assert (maps.deformation_scale, maps.motion_scale) == (0.1, 50.0)
    assert maps.deformation.min() == 0 and maps.deformation.max() == 1
    assert maps.longest[0] > 5 and maps.longest[1] < 0.1


def test_still_body_has_plain_maps_not_magnified_rounding(body):
    still = replace(body, vertices=body.rest.expand(2, -1, -1).contiguous())
    maps = render_body_maps(still, RIG)
    assert (maps.motion == GREY).all()
    assert (maps.deformation - GREY).abs().max() <= 2 * STEP  # zero lies between two bytes


def test_rays_go_through_the_pixels(maps, truth):
    """A depth times its ray, in the camera's axes, projects to the centre of its pixel."""
    rays = ray_directions(RIG)
    torch.testing.assert_close(maps.rays[:, 3], 0.5 + 0.5 * rays, atol=STEP, rtol=0)
    torch.testing.assert_close(rays.norm(dim=1), torch.ones(3, H, W))
    for v in range(3):
        local = RIG.T_camera_world[v, :3, :3] @ rays[v].flatten(1)
        pixels = (RIG.K[v] @ local)[:2] / local[2]
        x, y = torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy")
        torch.testing.assert_close(pixels[0].view(H, W), x, atol=1e-3, rtol=0)
        torch.testing.assert_close(pixels[1].view(H, W), y, atol=1e-3, rtol=0)
    # The camera at 90 degrees stands at +x and looks along -x, its horizon tilted by 0.1.
    middle = rays[1, :, H // 2, W // 2]
    assert middle[0] < -0.99 and abs(middle[1] - math.sin(0.1)) < 0.02


def test_reference_camera_sees_all_it_draws(maps):
    drawn = maps.depth[0] > 0
    assert (maps.visibility[0][drawn] == 1).all() and (maps.visibility[0][~drawn] == 0).all()


def test_visibility_has_three_states_and_fades_behind(maps):
    assert maps.visibility.unique().tolist() == pytest.approx([0.0, GREY, 1.0])
    assert ((maps.visibility > 0) == (maps.depth > 0)).all()
    shares = (maps.visibility == 1).float().sum((1, 2, 3)) / (maps.depth > 0).sum((1, 2, 3))
    assert 0.25 < shares[1] < 0.75  # from the side: about half
    assert shares[2] < 0.05  # from behind: rims at most


def plate(z: float, half: float) -> tuple[Tensor, Tensor]:
    """A square that faces -z, towards the camera at azimuth 0."""
    x = torch.tensor([-half, half, half, -half])
    y = torch.tensor([-half, -half, half, half])
    return torch.stack([x, y, torch.full((4,), z)], 1), torch.tensor([[0, 2, 1], [0, 3, 2]])


def test_what_another_part_hides_is_unseen_though_it_faces_the_camera():
    """A small plate 1 m before a large one; seen from 30 degrees, its shadow lies beside it."""
    (front, faces), (back, _) = plate(-0.5, 0.2), plate(0.5, 0.6)
    both = torch.cat([front, back])
    scene = Body(both[None], torch.cat([faces, faces + 4]), both)
    rig = orbit_rig(torch.tensor([0, math.pi / 6]), torch.zeros(2), 4.0, math.radians(35), 96, 96)
    maps = render_body_maps(scene, rig)
    # The shadow of a plate at 3.5 m on one at 4.5 m is 4.5 / 3.5 as wide.
    half = 0.2 * 4.5 / 3.5
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    rays = ray_directions(rig)[1]
    points = rig.centers[1][:, None, None] + rays * (0.5 - rig.centers[1, 2]) / rays[2]
    on_back = (maps.depth[1, 0] > 0) & (maps.pose[1, 0, 2] > 0.5)
    inside = (points[0].abs() < half - 0.03) & (points[1].abs() < half - 0.03)
    outside = (points[0].abs() > half + 0.03) | (points[1].abs() > half + 0.03)
    assert (on_back & inside).sum() > 50 and (on_back & outside).sum() > 50
    assert (maps.visibility[1, 0][on_back & inside] == GREY).all()
    assert (maps.visibility[1, 0][on_back & outside] == 1).all()


def test_unseen_normals_turn_black_where_the_surface_faces_away(body, truth):
    maps = render_body_maps(body.resampled(1), RIG, MapSettings(unseen_normals="black"))
    surface = truth[1]
    hit = surface.depth[:, :1] > 0
    to_camera = F.normalize(RIG.centers[0], dim=0)
    facing = (surface.normals_world[:, :1] * to_camera[:, None, None]).sum(2)
    black = (maps.normals == 0).all(2)
    assert black[1:][hit[1:] & (facing[1:] < -0.4)].all()
    assert not black[hit & (facing > 0.4)].any()
    assert not black[0].any() and not black[~hit].any()


def test_another_reference_view_sees_its_own_side(body):
    maps = render_body_maps(body.resampled(1), RIG, MapSettings(2, 1))
    assert (maps.visibility[2][maps.depth[2] > 0] == 1).all()
    assert (maps.visibility[0] == 1).float().sum() < 0.05 * (maps.depth[0] > 0).sum()
    assert maps.reference_mask[2].all() and not maps.reference_mask[:2].any()


def test_reference_mask_marks_the_first_frames_of_the_given_view():
    given, crop = reference_masks(RIG, 5, MapSettings(reference_view=2, reference_frames=2))
    assert given.shape == crop.shape == (3, 5, H, W)
    assert given[2, :2].all() and given.sum() == 2 * H * W and not crop.any()


def test_all_views_can_be_given():
    given, _ = reference_masks(RIG, 5, MapSettings(reference_view=-1, reference_frames=100))
    assert given.all()


def test_crop_mask_marks_padding_of_given_pictures_alone():
    settings = MapSettings(reference_view=1, reference_frames=1, margins=(4, 0, 3, 10))
    _, crop = reference_masks(RIG, 5, settings)
    assert crop[1, 0, :, :4].all() and crop[1, 0, :, -3:].all() and crop[1, 0, -10:].all()
    assert crop.sum() == W * H - (W - 7) * (H - 10)


def test_margins_larger_than_the_picture_are_refused(body):
    with pytest.raises(ValueError, match="margins leave nothing of the 48x64"):
        render_body_maps(body, RIG, MapSettings(margins=(24, 0, 24, 0)))


@pytest.mark.parametrize("view", [3, -2])
def test_missing_reference_view_is_refused(body, view):
    with pytest.raises(ValueError, match=f"'reference_view' is {view}, but the rig has 3"):
        render_body_maps(body, RIG, MapSettings(reference_view=view))


def test_how_many_frames_are_drawn_at_once_changes_no_pixel(body, maps, monkeypatch):
    steps = []
    monkeypatch.setitem(body_maps.PIXELS_AT_ONCE, "cpu", W * H * 4)
    split = render_body_maps(body, RIG, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(n, 8) for n in range(1, 9)]  # (3 views + the reference) x 2 chunks
    for name, value in vars(maps).items():
        if torch.is_tensor(value):
            assert torch.equal(getattr(split, name), value), name


def test_all_maps_are_pictures(maps):
    for name in ("pose", "deformation", "motion", "rays", "normals"):
        pictures = getattr(maps, name)
        assert pictures.shape == (3, FRAMES, 3, H, W)
        assert pictures.isfinite().all() and pictures.min() >= 0 and pictures.max() <= 1


def test_camera_inside_the_body_gives_no_nan(body):
    rig = replace(RIG, T_camera_world=torch.eye(4).repeat(3, 1, 1))
    maps = render_body_maps(body.resampled(1), rig)
    assert all(v.isfinite().all() for v in vars(maps).values() if torch.is_tensor(v))


def test_one_frame_is_enough(body):
    maps = render_body_maps(body.resampled(1), RIG)
    assert maps.depth.shape == (3, 1, H, W) and (maps.motion == GREY).all()
