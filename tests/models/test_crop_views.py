"""Views cut out around the performer: K follows to a fraction of a pixel."""

import math
from dataclasses import replace

import pytest
import torch
from turnaround.models import performer
from turnaround.models.cameras import Rig, orbit_rig, project
from turnaround.models.crop_views import cropped_views, cut_pictures, performer_window
from turnaround.models.lenses import Lens
from turnaround.models.views import Views

W, H = 120, 160


def ring(views: int) -> Rig:
    azimuths = torch.arange(views) * (2 * math.pi / views)
    return orbit_rig(azimuths, torch.zeros(views), 3.0, 0.9, W, H)


def spots(rig: Rig, points: torch.Tensor, sigma: float) -> torch.Tensor:  # [V, 1, 3, H, W]
    """A soft dot where the point of each view lies."""
    at, _ = project(points, rig)
    y, x = torch.meshgrid(
        torch.arange(rig.height) + 0.5, torch.arange(rig.width) + 0.5, indexing="ij"
    )
    away = (x - at[:, 0, 0, None, None]).square() + (y - at[:, 0, 1, None, None]).square()
    return torch.exp(-away / 2 / sigma**2)[:, None, None].expand(-1, 1, 3, -1, -1).contiguous()


def place(picture: torch.Tensor) -> torch.Tensor:  # [H, W] -> [2]
    h, w = picture.shape
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    return torch.stack([(picture * x).sum(), (picture * y).sum()]) / picture.sum()


@pytest.mark.parametrize("size", [(48, 64), (32, 96), (160, 128)])
def test_a_point_stands_where_the_new_k_projects_it(size):
    rig, point = ring(3), torch.tensor([[0.13, -0.21, 0.08]])
    frames = spots(rig, point, 3.0)
    masks = (frames[:, :, 0] > 0.01).float()
    found, _ = cropped_views(Views(frames, masks, rig), rig, *size, 0.2)
    assert (found.rig.width, found.rig.height) == size == found.frames.shape[:-3:-1]
    for v, at in enumerate(project(point, found.rig)[0][:, 0]):
        assert (place(found.frames[v, 0, 0]) - at).norm() < 0.05


def test_it_is_what_a_camera_with_the_new_k_would_have_seen():
    posed = performer.pose_performer(
        performer.load_performers().characters[0], performer.load_performers().motions[0],
        torch.tensor([0.2, 0.6]), performer.draw_appearance(3),
    )  # fmt: skip
    rig, look = ring(2), performer.draw_appearance(3)
    rig = rig.resized(4 * W, 4 * H)
    clip = performer.render_performer(posed, look, rig)
    found, windows = cropped_views(Views(clip.frames, clip.masks, rig), rig, 96, 128, 0.12)
    true = performer.render_performer(posed, look, found.rig)
    for cut, direct in zip(found.masks.flatten(0, 1), true.masks.flatten(0, 1), strict=True):
        assert (place(cut) - place(direct)).norm() < 0.1
        assert abs(cut.sum() / direct.sum() - 1) < 0.01
    solid = ((found.masks > 0.99) & (true.masks > 0.99))[:, :, None].expand_as(true.frames)
    assert (found.frames - true.frames).abs()[solid].mean() < 0.005
    assert (windows[:, 3] - windows[:, 1] > 128).all()


def test_one_window_holds_the_performer_in_all_frames():
    masks = torch.zeros(3, H, W)
    masks[0, 40:80, 20:30] = 1
    masks[1, 60:90, 50:62] = 1
    window = performer_window(masks, 64, 64, 0.0)
    assert window.tolist() == [16, 40, 66, 90]
    wide = performer_window(masks, 64, 64, 0.5)
    assert torch.allclose((wide[2:] + wide[:2]) / 2, torch.tensor([41.0, 65.0]))
    assert wide[3] - wide[1] == 75
    assert performer_window(masks * 0, 64, 64, 0.1) is None


def test_beyond_the_picture_the_rim_repeats_and_is_no_performer():
    frames = torch.rand(1, 1, 3, H, W, generator=torch.Generator().manual_seed(0))
    frames[..., 0] = 0.25
    masks = torch.zeros(1, 1, H, W)
    masks[..., 50:110, 0:20] = 1  # reaches the left rim
    found, windows = cropped_views(Views(frames, masks), None, 64, 64, 0.2)
    left = windows[0, 0]
    beyond = math.floor(-float(left) / float(windows[0, 2] - left) * 64)
    assert beyond > 5
    assert (found.masks[..., : beyond - 1] == 0).all() and found.masks.max() == 1
    assert (found.frames[..., : beyond - 2] - 0.25).abs().max() < 1e-5 and found.rig is None


def test_shrinking_averages_and_does_not_flicker():
    stripes = (torch.arange(H) % 2.0)[:, None].expand(1, 1, H, W)
    cut = cut_pictures(stripes, torch.tensor([0.0, 0, W, H]), W // 4, H // 4)
    assert (cut[..., 2:-2, :] - 0.5).abs().max() < 0.01


def test_bytes_stay_bytes_and_lenses_stay():
    rig = replace(ring(2), lenses=(Lens((0.1,)), Lens()))
    frames = torch.rand(2, 2, 3, H, W, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 2, H, W, dtype=torch.bool)
    masks[..., 30:90, 30:60] = True
    seen = []
    floats, _ = cropped_views(Views(frames, masks, rig), rig, 32, 48, 0.1, seen.append)
    bytes_, _ = cropped_views(Views((frames * 255).round().byte(), masks, rig), rig, 32, 48, 0.1)
    assert bytes_.frames.dtype == torch.uint8 and seen == [0, 1]
    assert (bytes_.frames.float() / 255 - floats.frames).abs().max() < 1.01 / 255
    assert floats.rig.lenses == rig.lenses and floats.rig.names == rig.names


def test_views_without_a_performer_are_refused_in_one_sentence():
    frames = torch.zeros(2, 1, 3, H, W)
    masks = torch.ones(2, 1, H, W)
    masks[1] = 0
    with pytest.raises(ValueError, match="have no masks"):
        cropped_views(Views(frames), None, 32, 32, 0.1)
    with pytest.raises(ValueError, match=r"masks of view 1 \(1\) in 'views' are empty in all"):
        cropped_views(Views(frames, masks), None, 32, 32, 0.1)
    with pytest.raises(ValueError, match="hold depth"):
        cropped_views(Views(frames[:, :, :1], masks), None, 32, 32, 0.1)
