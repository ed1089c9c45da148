"""The geometry nodes: what is guessed is said, what cannot work is one sentence."""

import math

import pytest
import torch
from turnaround.models.cameras import Rig, intrinsics, orbit_rig
from turnaround.models.points import unproject_depth
from turnaround.models.views import Views
from turnaround.nodes import run
from turnaround.nodes.conditions import RenderConditions
from turnaround.nodes.geometry import CONVENTIONS, PerformerGeometry

SIZE, FRAMES = 48, 5
FOV = math.radians(30)


class _Hidden:
    unique_id = "1"


@pytest.fixture(autouse=True)
def _hidden(monkeypatch):
    monkeypatch.setattr(PerformerGeometry, "hidden", _Hidden())
    monkeypatch.setattr(RenderConditions, "hidden", _Hidden())


def ball():
    """Depth and mask [F, H, W] of a ball of half a metre, 3 m away, before a wall at 5 m."""
    rays = unproject_depth(torch.ones(1, SIZE, SIZE), intrinsics(FOV, SIZE, SIZE))[0]
    a, b = rays.square().sum(0), rays[2] * 3
    inner = b * b - a * (9 - 0.25)
    depth = torch.where(inner > 0, (b - inner.clamp(min=0).sqrt()) / a, 5.0)
    return depth.repeat(FRAMES, 1, 1), (inner > 0).float().repeat(FRAMES, 1, 1)


def clip(masks=True):
    frames = torch.where(ball()[1][:, None] > 0.5, 0.8, 0.2).expand(-1, 3, -1, -1)
    return Views(frames[None], ball()[1][None] if masks else None, None, 16.0)


def image(depth):
    return depth[..., None].expand(-1, -1, -1, 3)


def geometry(video=None, convention="metres", height=1.0, erosion=1, **sockets):
    return PerformerGeometry.execute(
        video or clip(), convention, math.degrees(FOV), height, erosion, **sockets
    ).result[:3]


def test_exact_depth_gives_points_depth_and_no_note():
    depth, masks = ball()
    cloud, used, note = geometry(depth_views=Views(depth[None, :, None]))
    assert cloud.frame_count == FRAMES and note == ""
    assert used.frames.shape == (1, FRAMES, 1, SIZE, SIZE)
    assert torch.equal(used.frames[0, :, 0][masks > 0.5], depth[masks > 0.5])


def test_performer_is_the_clip_with_the_mask_that_was_used():
    _, masks = ball()
    video = clip(masks=False)
    *_, performer, _ = PerformerGeometry.execute(
        video, "metres", math.degrees(FOV), 1.0, 1, mask=masks
    ).result
    assert torch.equal(performer.frames, video.frames)
    assert torch.equal(performer.masks[0], masks)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_of_the_menu_runs(convention):
    depth, _ = ball()
    pictures = {
        "metres": depth, "inverse (1/metres)": 1 / depth,
        "near is white": 1 - (depth - 2) / 3, "near is black": (depth - 2) / 3,
    }[convention]  # fmt: skip
    cloud, _, note = geometry(convention=convention, depth=image(pictures))
    assert len(cloud.positions) and "inside out" not in note


def test_missing_depth_and_mask_are_guessed_and_said():
    _, _, note = geometry(clip(masks=False))
    assert "no mask" in note and "no depth" in note and "guess" in note


def test_depth_of_another_size_is_scaled_and_said():
    depth, _ = ball()
    _, _, note = geometry(depth=image(depth[:, ::2, ::2]))
    assert f"'depth' was scaled from 24x24 to {SIZE}x{SIZE}" in note


def test_longer_depth_is_cut_and_said():
    depth, _ = ball()
    _, _, note = geometry(depth=image(torch.cat([depth, depth])))
    assert "'depth' had 10 frames, the first 5 are used" in note


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_depth_frames_are_refused_with_both_numbers(count):
    with pytest.raises(ValueError, match=f"'depth' has {count} frames but the video has 5"):
        geometry(depth=image(ball()[0][:count]))


def test_depth_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="'depth' is 24x48 but the video is 48x48"):
        geometry(depth=image(ball()[0][:, :, :24]))


def test_colour_in_the_depth_views_socket_is_refused():
    with pytest.raises(ValueError, match="carries colour, not depth"):
        geometry(depth_views=clip())


def test_depth_of_several_views_is_refused():
    depth = ball()[0][None, :, None].repeat(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="'depth_views' has 2 views"):
        geometry(depth_views=Views(depth))


def test_several_source_views_are_refused():
    two = Views(clip().frames.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="'video' has 2 views"):
        geometry(two)


def test_black_mask_is_refused_and_a_few_empty_frames_are_not():
    with pytest.raises(ValueError, match="black in every frame"):
        geometry(mask=torch.zeros(FRAMES, SIZE, SIZE))
    masks = ball()[1]
    masks[2] = 0
    cloud, _, note = geometry(depth=image(ball()[0]), mask=masks)
    assert "frames [2]" in note and cloud.frame_offsets.diff()[2] == 0


def test_depth_of_nothing_but_nan_is_refused():
    with pytest.raises(ValueError, match="no usable depth inside the mask"):
        geometry(depth=image(ball()[0] * float("nan")))


def test_metres_read_as_inverse_are_refused():
    with pytest.raises(ValueError, match="choose another depth convention"):
        geometry(convention="inverse (1/metres)", depth=image(ball()[0]))


def test_swapped_near_and_far_are_said():
    _, _, note = geometry(convention="near is black", depth=image(1 - (ball()[0] - 2) / 3))
    assert "inside out" in note


# ---------------------------------------------------------------- cleaning and stages


def blurred():
    """The ball's outermost ring drawn between ball and wall."""
    depth, masks = ball()
    inner = torch.nn.functional.avg_pool2d(masks, 3, 1, 1) > 0.99
    ring = (masks > 0.5) & ~inner
    return torch.where(ring, 0.5 * depth + 2.5, depth), ring


def test_clean_edges_drops_floaters_and_can_be_switched_off():
    depth, ring = blurred()
    views = Views(depth[None, :, None])
    clean, spoilt = (
        geometry(depth_views=views, erosion=0, clean_edges=on, far_side="open")[0]
        for on in (True, False)
    )
    assert len(spoilt.positions) - len(clean.positions) > 0.5 * float(ring.sum())
    far = [float(c.positions[:, 2].max()) for c in (clean, spoilt)]
    assert far[1] - far[0] > 0.5  # the ring hung a metre behind the ball


def test_exact_depth_loses_hardly_a_point_by_clean_edges():
    views = Views(ball()[0][None, :, None])
    clean, all_ = (
        len(geometry(depth_views=views, clean_edges=on)[0].positions) for on in (True, False)
    )
    assert clean > 0.99 * all_


def test_stages_are_one_labelled_picture_a_frame_of_five_tiles():
    depth, _ = ball()
    *_, stages = PerformerGeometry.execute(
        clip(), "metres", math.degrees(FOV), 1.0, 1, depth_views=Views(depth[None, :, None])
    ).result
    assert stages.shape[0] == FRAMES and stages.shape[3] == 3
    assert stages.min() >= 0 and stages.max() <= 1
    green = (stages[..., 1] > stages[..., 0] + 0.3) & (stages[..., 1] > stages[..., 2] + 0.3)
    columns = green.any(0).any(0).nonzero()[:, 0]
    assert columns.min() >= stages.shape[2] * 4 // 5  # what is kept, and no other tile


def test_accumulate_fills_a_wall_behind_what_passes_and_says_how_many_points():
    depth = torch.full((FRAMES, SIZE, SIZE), 3.0)
    for f in range(FRAMES):
        depth[f, 10:30, 8 * f : 8 * f + 6] = 2.0
    video = Views(torch.full((1, FRAMES, 3, SIZE, SIZE), 0.5), torch.ones(1, FRAMES, SIZE, SIZE))
    views = Views(depth[None, :, None])
    plain, _, note = geometry(video, depth_views=views, erosion=0)
    kept, _, told = geometry(video, depth_views=views, erosion=0, accumulate=True)
    added = len(kept.positions) - len(plain.positions)
    assert added > 0 and f"{added} points stand still" in told and "still" not in note


def test_a_mask_that_the_depth_does_not_fill_is_said():
    depth, masks = ball()
    depth[:, :, : SIZE // 2] = 0
    _, _, note = geometry(depth_views=Views(depth[None, :, None]))
    assert "50 % of the mask has no depth" in note


def test_depth_pictures_that_are_black_outside_their_own_mask_leave_that_empty():
    depth, masks = ball()
    pictures = torch.where(masks > 0.5, 1 - (depth - 2) / 3, 0.0)
    pictures[:, 20:25, 20:25] = 0
    cloud, used, _ = geometry(depth=image(pictures), convention="near is white")
    assert not used.frames[0, :, 0, 20:25, 20:25].any()


def test_coloured_depth_and_a_depth_clip_as_video_are_refused():
    depth, _ = ball()
    turbo = torch.stack([depth / 5, 1 - depth / 5, 0 * depth], -1)
    with pytest.raises(ValueError, match="'depth' is coloured"):
        geometry(depth=turbo)
    with pytest.raises(ValueError, match="'video' carries depth"):
        geometry(Views(depth[None, :, None]))


@pytest.mark.parametrize("focal", [0.5, 1e6])
def test_extreme_lenses_of_a_rig_end_in_finite_points_or_one_sentence(focal):
    K = torch.tensor([[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]])
    lens = Rig(K[None], torch.eye(4)[None], SIZE, SIZE)
    video = Views(clip().frames, clip().masks, lens)
    try:
        cloud, *_ = geometry(video, depth_views=Views(ball()[0][None, :, None]))
    except ValueError as sentence:
        assert len(str(sentence).splitlines()) == 1
    else:
        assert cloud.positions.isfinite().all() and cloud.normals.isfinite().all()


def rig(distance=3.0):
    return orbit_rig(torch.tensor([0.0, math.pi]), torch.zeros(2), distance, FOV, 32, 40)


def test_conditions_are_views_of_the_rig():
    cloud, _, _ = geometry(depth=image(ball()[0]))
    partial, normals, visibility, depth = RenderConditions.execute(cloud, rig(), "blanked").result
    for views in (partial, normals, visibility):
        assert views.frames.shape == (2, FRAMES, 3, 40, 32) and len(views.rig) == 2
    assert depth.frames.shape == (2, FRAMES, 1, 40, 32)
    assert torch.isin(visibility.frames, torch.tensor([0, 128, 255])).all()
    assert torch.equal(visibility.masks, visibility.frames[:, :, 0] == 255)
    assert partial.masks[0].sum() > 0 and partial.masks[1].sum() == 0


def test_cameras_that_look_elsewhere_are_refused():
    cloud, _, _ = geometry(depth=image(ball()[0]))
    away = orbit_rig(
        torch.zeros(1), torch.zeros(1), 3.0, FOV, 32, 32, target=torch.tensor([50.0, 0, 0])
    )
    with pytest.raises(ValueError, match="No camera of the rig sees the performer"):
        RenderConditions.execute(cloud, away, "blanked")


def test_the_cancel_button_stops_the_drawing(monkeypatch):
    import comfy.model_management as mm

    cloud, _, _ = geometry(depth=image(ball()[0]))
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            RenderConditions.execute(cloud, rig(), "blanked")
    finally:
        mm.interrupt_current_processing(False)
    assert callable(run.progress)


def test_more_pictures_than_memory_are_refused_with_both_numbers():
    cloud, *_ = geometry(depth_views=Views(ball()[0][None, :, None]))
    huge = rig().resized(48_000, 48_000).select([0] * 32)
    with pytest.raises(ValueError, match=r"need \d+ GB, but this computer has \d+ GB"):
        RenderConditions.execute(cloud, huge, "kept")
