"""Views: what is refused, what sizes become, how pictures are laid out."""

import math

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import (
    Views,
    as_pictures,
    contact_sheet,
    grid_columns,
    grid_picture,
    grid_video,
    label_pictures,
    reference_frames,
    resize_frames,
    snap_frames,
    snap_size,
    view_labels,
)


def ring(views: int, width: int = 16, height: int = 16):
    azimuths = torch.arange(views) * (2 * math.pi / views)
    return orbit_rig(azimuths, torch.zeros(views), 3.0, 0.6, width, height)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"frames": torch.zeros(2, 3, 16, 16)}, "need frames of shape"),
        ({"frames": torch.zeros(2, 3, 2, 16, 16)}, "1 or 3"),
        ({"frames": torch.zeros(2, 0, 3, 16, 16)}, "are empty"),
        ({"masks": torch.zeros(2, 2, 16, 16)}, "2 views x 3 frames of 16x16, but the masks"),
        ({"masks": torch.zeros(2, 3, 16, 15)}, "of the same size"),
        ({"rig": ring(3)}, "hold 2 views, but the rig has 3 cameras"),
        ({"rig": ring(2, 32, 16)}, "are 16x16, but the rig's pictures are 32x16"),
        ({"fps": 0.0}, "above 0, got 0.0"),
        ({"fps": float("nan")}, "above 0, got nan"),
    ],
)
def test_views_that_do_not_fit_are_refused_in_one_sentence(parts, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        Views(**{"frames": torch.zeros(2, 3, 3, 16, 16), **parts})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_views_report_every_byte_they_hold():
    rig = ring(2)
    views = Views(torch.zeros(2, 3, 3, 16, 16), torch.zeros(2, 3, 16, 16), rig)
    assert views.get_ram_usage() == 4 * (2 * 3 * 16 * 16 * (3 + 1)) + rig.get_ram_usage()
    assert len(views) == 2


@pytest.mark.parametrize(
    ("count", "snapped"), [(1, 1), (2, 1), (4, 1), (5, 5), (8, 5), (9, 9), (50, 49), (53, 53)]
)
def test_frames_snap_down_to_4n_plus_1(count, snapped):
    assert snap_frames(count) == snapped


@pytest.mark.parametrize(
    ("size", "snapped"),
    [((1, 1), (16, 16)), ((16, 32), (16, 32)), ((100, 60), (96, 64)), ((1919, 1080), (1920, 1088))],
)
def test_sizes_snap_to_the_nearest_multiple_of_16(size, snapped):
    assert snap_size(*size) == snapped


def disc(width: int, height: int, radius: float, channels: int):
    """A white disc in the middle, smooth over one pixel."""
    y = torch.arange(height)[:, None] + 0.5 - height / 2
    x = torch.arange(width) + 0.5 - width / 2
    picture = (radius - (x**2 + y**2).sqrt() + 0.5).clamp(0, 1)
    return picture.expand(1, channels, height, width)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(48, 48), (96, 32), (32, 96), (200, 96), (61, 45), (81, 60)])
def test_a_disc_stays_a_disc_at_any_size(channels, size):
    resized = resize_frames(disc(80, 60, 10.0, channels), *size)
    assert resized.shape == (1, channels, size[1], size[0])
    assert resized.min() >= 0 and resized.max() <= 1
    scale = max(size[0] / 80, size[1] / 60)
    ink = resized[0, 0].double()
    width, height = ink.sum(1).max(), ink.sum(0).max()
    # The disc's diameter is 20 source pixels; rounding to whole pixels may cost one.
    assert abs(float(width) - 20 * scale) < 1 and abs(float(height) - 20 * scale) < 1


def test_a_resize_to_the_same_size_changes_nothing():
    frames = torch.rand(2, 3, 17, 19, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_frames(frames, 19, 17), frames)


def test_a_cut_without_scaling_keeps_the_middle():
    frames = torch.rand(1, 3, 20, 40, generator=torch.Generator().manual_seed(0))
    # Bicubic at scale 1 has one tap of weight 1.
    assert torch.allclose(resize_frames(frames, 20, 20), frames[..., 10:30], atol=1e-6)


def test_labels_leave_other_pixels_alone():
    pictures = torch.full((2, 3, 64, 96), 0.5)
    labelled = label_pictures(pictures, ["0°", "left front"])
    assert (pictures == 0.5).all()
    changed = (labelled != pictures).any(1)
    assert changed.any((1, 2)).all()
    # A label is at most 12 pixels high in a 64-pixel picture, in the upper left.
    assert not changed[:, 14:].any() and not changed[0, :, 30:].any()
    assert labelled.min() >= 0 and labelled.max() <= 1


def test_labels_longer_than_the_picture_are_cut():
    assert label_pictures(torch.zeros(1, 3, 4, 6), ["a very long name"]).shape == (1, 3, 4, 6)
    assert label_pictures(torch.zeros(1, 3, 16, 16), [""]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 64])
def test_a_grid_holds_every_picture_in_order(count):
    pictures = (torch.arange(count) + 1.0)[:, None, None, None].expand(-1, 3, 2, 5)
    columns = grid_columns(count)
    rows = math.ceil(count / columns)
    grid = grid_picture(pictures)
    assert grid.shape == (3, rows * 2, columns * 5) and columns >= rows
    cells = grid[0, ::2, ::5].flatten()
    assert cells[:count].tolist() == list(range(1, count + 1)) and not cells[count:].any()


def test_a_contact_sheet_has_a_row_a_view_and_time_from_left_to_right():
    times = torch.arange(9.0)[None, :, None, None, None] / 10
    views = Views(times.expand(3, 9, 3, 16, 24).clone())
    sheet = contact_sheet(views, 5)
    assert sheet.shape == (3, 3 * 16, 5 * 24)
    # The lower right corner of a cell is free of labels.
    assert torch.allclose(sheet[0, 15, 23::24], torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]))
    assert contact_sheet(views, 20).shape == (3, 3 * 16, 9 * 24)
    assert contact_sheet(views, 1).shape == (3, 3 * 16, 24)


@pytest.mark.parametrize(("count", "size"), [(1, (16, 16)), (5, (32, 64)), (64, (96, 192))])
def test_a_grid_video_keeps_the_frames(count, size):
    views = Views(torch.rand(count, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert grid_video(views).shape == (3, 3, *size)


def test_a_grid_too_large_for_players_is_shrunk_in_proportion():
    views = Views(torch.zeros(4, 1, 3, 400, 1600))  # 3 columns x 2 rows: 4800x800
    assert grid_video(views).shape == (1, 3, 2 * 341, 3 * 1365)


def test_depth_becomes_near_bright_and_empty_black():
    depth = torch.zeros(1, 1, 1, 2, 3)
    depth[..., 0, :] = torch.tensor([1.0, 2.0, 3.0])
    pictures = as_pictures(Views(depth))
    assert pictures.shape == (1, 1, 3, 2, 3)
    assert torch.allclose(pictures[0, 0, 0, 0], torch.tensor([1.0, 0.6, 0.2]))
    assert not pictures[..., 1, :].any()
    assert not as_pictures(Views(torch.zeros_like(depth))).any()


def test_labels_are_the_cameras_names_or_numbers():
    frames = torch.zeros(4, 1, 3, 16, 16)
    assert view_labels(Views(frames)) == ("0", "1", "2", "3")
    assert view_labels(Views(frames, rig=ring(4))) == ("0°", "90°", "180°", "270°")


def test_reference_shows_the_performer_alone_at_eighty_percent():
    """A 10 x 20 performer in a 60 x 80 picture, into 40 x 50: 40 rows of 50, 20 columns of 40."""
    masks = torch.zeros(2, 80, 60)
    masks[:, 30:50, 40:50] = 1
    frames = torch.rand(2, 3, 80, 60, generator=torch.Generator().manual_seed(0))
    frames = torch.where(masks[:, None] > 0, torch.ones(()), frames)
    result = reference_frames(frames, masks, 40, 50, background=0.5)
    assert result.shape == (2, 3, 50, 40)
    white = (result > 0.75).all(1)
    assert white.any(2).sum(1).tolist() == [40, 40] and white.any(1).sum(1).tolist() == [20, 20]
    around = torch.ones(50, 40, dtype=torch.bool)
    around[4:46, 9:31] = False
    assert (result[..., around] - 0.5).abs().max() < 1e-6


def test_reference_of_a_large_picture_is_averaged_not_sampled():
    """Fine stripes become their mean, where single samples would alias."""
    stripes = (torch.arange(400) % 2).float().expand(1, 3, 400, 400)
    result = reference_frames(stripes, torch.ones(1, 400, 400), 20, 20, background=0.5)
    # 25 columns a window: one stripe too many or too few is 1/50 of them.
    assert (result - 0.5).abs().max() < 0.021


def test_reference_window_is_one_for_the_whole_clip():
    masks = torch.zeros(2, 40, 40)
    masks[0, 10:20, 5:10], masks[1, 10:20, 30:35] = 1, 1
    result = reference_frames(torch.ones(2, 3, 40, 40), masks, 40, 40, background=0.0)
    first, second = (frame[0].sum(0).nonzero()[:, 0].float().mean() for frame in result)
    assert second - first == pytest.approx(25 * 0.8 * 40 / 30, abs=1)


def test_reference_without_a_performer_is_refused():
    with pytest.raises(ValueError, match="The reference shows nobody"):
        reference_frames(torch.ones(1, 3, 8, 8), torch.zeros(1, 8, 8), 8, 8, 0.5)
