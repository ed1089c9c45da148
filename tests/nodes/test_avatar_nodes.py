"""Avatars in the real ComfyUI: distilled from a small performer, shown, saved and loaded."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from turnaround.models.avatar import Avatar
from turnaround.models.avatar_memory import training_bytes
from turnaround.models.cameras import orbit_rig
from turnaround.models.splat_clips import read_clip_ply
from turnaround.models.splat_files import read_ply, read_splat
from turnaround.models.view_weights import ViewWeights
from turnaround.models.views import Views
from turnaround.nodes import avatar_files, distill_avatar, embedded, render_avatar
from turnaround.nodes import run as run_module
from turnaround.nodes.avatar_files import AvatarToSplats, LoadAvatar, SaveAvatar
from turnaround.nodes.body import SampleBody
from turnaround.nodes.distill_avatar import GO_ON, STOP, DistillAvatar
from turnaround.nodes.render_avatar import BACK, FROZEN, ROUND, AvatarTurntable, RenderAvatar
from turnaround.nodes.views import SamplePerformer

pytestmark = pytest.mark.usefixtures("one_thread")

V, F, W, H = 4, 5, 48, 64
WHO = ("kira (unseen)", "dance_a (unseen)")
SETTINGS = dict(
    preset="draft", steps=6, gaussians=1500, resolution=64, training_seed=0, when_cancelled=STOP,
    filename_prefix="avatars/kira",
)  # fmt: skip
RENDER = dict(first_frame=0.0, last_frame=-1.0, speed=1.0, fps=0.0, background="grey")
TURN = dict(
    seconds=0.5, turns=1.0, motion=ROUND, first_frame=0.0, speed=1.0, fps=8.0, start_azimuth=0.0,
    elevation=0.0, fov=35.0, distance=0.0, width=48, height=64, background="grey",
)  # fmt: skip


def ring(count: int = V, width: int = W, height: int = H):
    angles = torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.full((count,), 0.1), 3.4, 0.6, width, height)


@pytest.fixture(scope="module")
def footage():
    """VIEWS [4, 5, 3, 64, 48] of a performer with masks and rig, and its body."""
    with torch.inference_mode():
        truth = SamplePerformer.execute(*WHO, F, W, H, 0.2, 1_000_003, ring()).args[2]
        body = SampleBody.execute(*WHO, F, 0.2, 1_000_003).args[0]
    return truth, body


@pytest.fixture(scope="module")
def learned(footage) -> Avatar:
    """One that was given 60 steps."""
    views, body = footage
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        _host(patch)
        return distill(footage, steps=60).args[0]


def _host(patch: pytest.MonkeyPatch) -> None:
    hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None)
    for node in (
        DistillAvatar, SaveAvatar, LoadAvatar, RenderAvatar, AvatarTurntable, AvatarToSplats,
        SamplePerformer, SampleBody,
    ):  # fmt: skip
        patch.setattr(node, "hidden", hidden)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch, caplog) -> Path:
    """Nodes have an id, as in a run; ComfyUI's output folder is an empty one."""
    caplog.set_level(logging.INFO, logger="turnaround")
    _host(monkeypatch)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    there = ([str(tmp_path / "avatars")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, embedded.AVATARS, there)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "avatars"


def distill(footage, **changes):
    views, body = footage
    given = {"views": views, "body": body, **SETTINGS, **changes}
    return DistillAvatar.execute(**given)


def same(a: Avatar, b: Avatar) -> bool:
    pairs = zip(a._comfy_cache_tensors(), b._comfy_cache_tensors(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def stop_at(monkeypatch, step: int, error=mm.InterruptProcessingException) -> None:
    """The cancel button, pressed after so many steps."""
    plain = run_module.progress

    def progress(total: int):
        bar = plain(total)

        def on_step(done, total, preview=None):
            bar(done, total, preview)
            if total == SETTINGS["steps"] and done == step:
                raise error

        return on_step

    monkeypatch.setattr(run_module, "progress", progress)


# --- distil ---------------------------------------------------------------------------------------


def test_views_and_a_body_become_an_avatar(footage, output):
    avatar, loss, pictures, note = distill(footage).args
    assert avatar.on_body and avatar.frame_count == F and avatar.fps == 16.0
    assert len(loss["loss"]) == 6 and all(math.isfinite(x) for x in loss["loss"])
    assert pictures.shape == (V, H, 2 * W, 3) and pictures.min() >= 0 and pictures.max() <= 1
    assert f"from {V} views x {F} frames of {W}x{H}, 6 steps" in note and "on the body" in note
    assert not list(output.glob("*"))
    assert not any(t.requires_grad for t in avatar._comfy_cache_tensors())


def test_it_looks_like_the_performer_from_unseen_cameras(footage, learned):
    """Closer than the mean colour of the performer would be."""
    rig = ring(2)
    rig = replace(rig, T_camera_world=ring(8).T_camera_world[[1, 5]])
    truth = SamplePerformer.execute(*WHO, F, W, H, 0.2, 1_000_003, rig).args[2]
    colors, *_ = RenderAvatar.execute(learned, rig=rig, **RENDER).args
    inside = truth.masks > 0.5
    shown, wanted = (v.float().movedim(2, -1) for v in (colors.frames / 255, truth.frames))
    off = (shown - wanted)[inside].square().mean()
    flat = (wanted[inside].mean(0) - wanted[inside]).square().mean()
    assert off < 0.4 * flat
    assert ((colors.masks > 0.5) == inside).float().mean() > 0.95


def test_without_a_body_it_plays_the_motion_of_the_views(footage, output):
    views, _ = footage
    avatar, loss, _, note = distill((views, None), steps=4).args
    assert not avatar.on_body and avatar.frame_count == F and avatar.fps == 16.0
    assert "Gaussians without a body from 4 views" in note and len(loss["loss"]) == 4
    colors = render(avatar, rig=ring(2))[0]
    assert ((colors.masks[0] > 0.5) == (views.masks[0] > 0.5)).float().mean() > 0.9
    note = save(avatar, avatar_files.OWN)
    again, note = LoadAvatar.execute("kira_00001_.safetensors").args
    assert same(again, avatar) and "without a body, so it plays its own motion" in note


def test_getting_ready_without_a_body_can_be_cancelled(footage, output, monkeypatch):
    plain = run_module.progress

    def progress(total: int):
        bar = plain(total)

        def on_step(done, total, preview=None):
            if total == 2 * F:
                mm.interrupt_current_processing()
            bar(done, total, preview)

        return on_step

    monkeypatch.setattr(run_module, "progress", progress)
    with pytest.raises(mm.InterruptProcessingException):
        distill((footage[0], None))
    assert not list(output.glob("*"))


def test_the_same_seed_learns_the_same_and_another_another(footage):
    one, again, other = (
        distill(footage, training_seed=seed, steps=3).args[0] for seed in (1, 1, 2)
    )
    assert same(one, again) and not same(one, other)


def test_what_was_cancelled_lies_in_a_file(footage, output, monkeypatch):
    whole = distill(footage, steps=6).args[0]
    stop_at(monkeypatch, 4)
    with pytest.raises(mm.InterruptProcessingException):
        distill(footage)
    (file,) = output.glob("*")
    assert file.name == "kira_00001_checkpoint.safetensors"
    avatar, note = LoadAvatar.execute(file.name).args
    assert avatar.on_body and avatar.frame_count == F
    assert "5 frames at 16 frames a second" in note and "can take other motions" in note
    assert not same(avatar, whole)


def test_or_the_graph_goes_on_with_it(footage, output, monkeypatch):
    stop_at(monkeypatch, 4)
    avatar, loss, pictures, note = distill(footage, when_cancelled=GO_ON).args
    assert len(loss["loss"]) == 4 and "this is the avatar so far" in note
    assert avatar.frame_count == F and len(pictures) == V
    assert not list(output.glob("*"))


@pytest.mark.parametrize("when", [STOP, GO_ON])
def test_cancelled_before_the_first_step_there_is_nothing(footage, output, monkeypatch, when):
    stop_at(monkeypatch, 0)
    with pytest.raises(mm.InterruptProcessingException):
        distill(footage, when_cancelled=when)
    assert not list(output.glob("*"))


def test_the_cancel_button_of_the_host_is_heard_after_one_step(footage, output, monkeypatch):
    plain = distill_avatar.Distilling.learn
    steps = []

    def learn(self):
        steps.append(self.step)
        if len(steps) == 3:
            mm.interrupt_current_processing()
        return plain(self)

    monkeypatch.setattr(distill_avatar.Distilling, "learn", learn)
    with pytest.raises(mm.InterruptProcessingException):
        distill(footage, steps=50)
    assert steps == [0, 1, 2] and len(list(output.glob("*"))) == 1


def test_an_error_loses_nothing(footage, output, monkeypatch):
    stop_at(monkeypatch, 3, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        distill(footage)
    (file,) = output.glob("*")
    assert LoadAvatar.execute(file.name).args[0].frame_count == F


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["accelerator", "python", "torch"],
)
def test_where_memory_runs_out_there_are_fewer_gaussians_and_a_sentence(
    footage, monkeypatch, error
):
    plain = distill_avatar.Distilling.learn

    def learn(self):
        if self.settings.most > 1000:
            raise error
        return plain(self)

    monkeypatch.setattr(distill_avatar.Distilling, "learn", learn)
    avatar, _, _, note = distill(footage, gaussians=4000, steps=1).args
    assert len(avatar.splats) <= 1000
    assert "memory ran out with 4000 Gaussians, so there are 2000 at most" in note
    assert "memory ran out with 2000 Gaussians, so there are 1000 at most" in note


def test_where_memory_is_short_from_the_beginning_there_are_fewer(footage, monkeypatch):
    views, body = footage
    sizes = {most: distill_avatar.settings_of("draft", 1, most, 0) for most in (1200, 1500)}
    small = replace(views, frames=views.frames.float())
    ready = distill_avatar.ready_views(small, None, None, 64, [])
    need = {m: training_bytes(s, ready, body) + ready.get_ram_usage() for m, s in sizes.items()}
    monkeypatch.setattr(mm, "get_total_memory", lambda *_: need[1200] + 4)
    avatar, _, _, note = distill(footage, steps=1).args
    assert "memory is short, so there are 1200 Gaussians at most" in note
    assert len(avatar.splats) == 1200
    monkeypatch.setattr(mm, "get_total_memory", lambda *_: 1 << 20)
    with pytest.raises(
        ValueError, match="needs .* MiB of memory at least, and .* lower 'resolution'"
    ):
        distill(footage)


def test_when_the_last_pictures_fail_what_was_learned_is_there(footage, output, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(distill_avatar, "beside_given", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        distill(footage, steps=2)
    (file,) = output.glob("*")
    assert LoadAvatar.execute(file.name).args[0].frame_count == F


def test_where_even_few_gaussians_are_too_many_it_says_what_to_do(footage, monkeypatch):
    def learn(self):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(distill_avatar.Distilling, "learn", learn)
    with pytest.raises(ValueError, match="out of memory even with 1500 Gaussians: lower"):
        distill(footage)


def test_larger_views_are_made_smaller(footage):
    views, body = footage
    big = Views(
        views.frames.repeat_interleave(2, 3).repeat_interleave(2, 4),
        views.masks.repeat_interleave(2, 2).repeat_interleave(2, 3), ring(V, 2 * W, 2 * H), 16.0,
    )  # fmt: skip
    avatar, _, pictures, note = distill((big, body), steps=2).args
    assert f"learned at {W}x{H} instead of {2 * W}x{2 * H}" in note
    assert pictures.shape[1:3] == (H, 2 * W)
    assert same(avatar, distill(footage, steps=2).args[0])


def test_masks_and_cameras_may_come_from_sockets(footage):
    views, body = footage
    bare = Views(views.frames, None, None, views.fps)
    masks = views.masks.float().flatten(0, 1)
    one = distill((bare, body), steps=2, mask=masks, rig=views.rig).args[0]
    assert same(one, distill(footage, steps=2).args[0])


def test_a_plain_background_needs_no_masks(footage):
    views, body = footage
    inside = views.masks.float()[:, :, None]
    plain = views.frames.float() * inside + 0.5 * (1 - inside)
    note = distill((Views(plain, None, views.rig, 16.0), body), steps=2).args[3]
    assert "masks were guessed from a plain background" in note


def test_pictures_without_a_person_are_left_out_and_said(footage):
    views, body = footage
    masks = views.masks.clone()
    masks[1, :2] = 0
    note = distill((replace(views, masks=masks), body), steps=1).args[3]
    assert "2 pictures show nobody and were left out (2 of view 90°)" in note


def test_without_the_compiler_it_says_how_to_be_quicker(footage, monkeypatch):
    assert "numba" not in distill(footage, steps=1).args[3]
    monkeypatch.setattr(distill_avatar, "fastest_way", lambda *given: "torch")
    monkeypatch.setattr(distill_avatar, "COMPILING", 1)
    assert "pip install numba" in distill(footage, steps=1).args[3]


def test_a_view_that_disagrees_is_named(footage):
    """One camera is not where the rig has it."""
    views, body = footage
    frames, masks = views.frames.clone(), views.masks.clone()
    frames[2], masks[2] = (t[2].roll(8, -1) for t in (frames, masks))
    spoiled = replace(views, frames=frames, masks=masks)
    note = distill((spoiled, body), steps=60).args[3]
    assert "view 180° disagrees with the others" in note
    assert "disagrees" not in distill(footage, steps=60).args[3]


def test_a_body_that_does_not_fit_is_refused(footage):
    views, body = footage
    turned = body.vertices * torch.tensor([-1.0, 1.0, -1.0])
    with pytest.raises(ValueError, match="'body' doesn't fit the views: its outline and the masks"):
        distill((views, replace(body, vertices=turned, neutral=None)))


def test_a_view_of_small_weight_counts_less(footage):
    labels = ring().labels
    even, uneven = (
        distill(footage, steps=4, weights=ViewWeights(torch.tensor(w), labels)).args[0]
        for w in ([1.0] * V, [1.0, 0.05, 1.0, 0.05])
    )
    assert not same(even, uneven)
    assert same(even, distill(footage, steps=4).args[0])


def turned_round(rig) -> torch.Tensor:
    return torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ rig.T_camera_world


BAD = {
    "no cameras": (lambda v, b: {"views": replace(v, rig=None)}, "'views' know no cameras: connect"),
    "too few cameras": (lambda v, b: {"rig": ring(3)}, "'rig' has 3 cameras but 'views' 4 views"),
    "another shape": (lambda v, b: {"rig": ring(V, 64, 64)}, "another shape: connect the rig of"),
    "depth": (lambda v, b: {"views": Views(v.frames[:, :, :1].float())}, "'views' hold depth"),
    "NaN": (lambda v, b: {"views": replace(v, frames=v.frames.float() / 0 * 0)}, "NaN or infinity"),
    "few masks": (lambda v, b: {"mask": v.masks[0, :3].float()}, "'mask' has 3 masks but there are 4"),
    "empty masks": (lambda v, b: {"mask": 0 * v.masks.float().flatten(0, 1)}, "empty in every frame"),
    "one view": (lambda v, b: {"views": Views(v.frames[:1], v.masks[:1], v.rig.select([0]))}, "hold 1"),
    "frames": (lambda v, b: {"body": replace(b, vertices=b.vertices[:3], neutral=None)}, "5 frames"),
    "weights": (
        lambda v, b: {"weights": ViewWeights(torch.ones(3), ("a", "b", "c"))},
        "'weights' are of 3 views, but 'views' are 4",
    ),
    "cameras that look away": (
        lambda v, b: {"rig": replace(v.rig, T_camera_world=turned_round(v.rig))},
        "cameras of 'views' look away from each other",
    ),
    "prefix": (lambda v, b: {"filename_prefix": "../avatar"}, "below ComfyUI's output folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_sentence(footage, case):
    make, words = BAD[case]
    with pytest.raises(ValueError, match=words) as error:
        distill(footage, **make(*footage))
    assert len(str(error.value).splitlines()) == 1


def test_a_noisy_background_without_masks_is_one_sentence(footage):
    views, body = footage
    noisy = torch.rand(V, F, 3, H, W, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="'views' have no masks, and the background is not plain"):
        distill((Views(noisy, None, views.rig, 16.0), body))


def test_finer_presets_are_saved_with_what_changes_with_the_pose(footage, output):
    avatar = distill(footage, preset="standard", steps=3).args[0]
    assert avatar.splats.degree > 0 and avatar.motion.detail is not None
    SaveAvatar.execute(avatar, "avatars/kira", avatar_files.OWN, 0, avatar_files.WORLD)
    again = LoadAvatar.execute("kira_00001_.safetensors").args[0]
    assert same(again, avatar)
    one, other = (
        render(a, rig=ring(1), first_frame=1.5, last_frame=1.5)[0] for a in (avatar, again)
    )
    assert torch.equal(one.frames, other.frames) and one.masks.amax() > 0.5


# --- show -----------------------------------------------------------------------------------------


def render(avatar, **changes):
    return RenderAvatar.execute(avatar, **{**RENDER, **changes}).args


def test_all_frames_are_drawn_for_every_camera(learned):
    rig = ring(3)
    colors, depth, normals, note = render(learned, rig=rig)
    assert colors.frames.shape == normals.frames.shape == (3, F, 3, H, W)
    assert depth.frames.shape == (3, F, 1, H, W) and colors.fps == 16.0 and colors.rig is rig
    there = depth.masks
    assert torch.equal(there, colors.masks >= 0.5) and 0.05 < there.float().mean() < 0.6
    assert (depth.frames[:, :, 0][there] > 2).all() and (depth.frames[:, :, 0][~there] == 0).all()
    assert note == "5 frames from 3 cameras, 16 frames a second"


@pytest.mark.parametrize(
    ("changes", "count", "fps"),
    [
        ({"first_frame": 2.0, "last_frame": 2.0}, 1, 16.0),
        ({"first_frame": 1.0, "last_frame": 3.0}, 3, 16.0),
        ({"speed": 0.5}, 9, 16.0),
        ({"fps": 32.0}, 9, 32.0),
        ({"fps": 32.0, "speed": 2.0}, 5, 32.0),
    ],
)
def test_a_part_of_the_motion_at_any_speed(learned, changes, count, fps):
    colors = render(learned, rig=ring(1), **changes)[0]
    assert colors.frames.shape[1] == count and colors.fps == fps


def test_slow_motion_passes_through_the_frames(learned):
    whole, slow = (render(learned, rig=ring(1), speed=s)[0].frames for s in (1.0, 0.5))
    assert torch.equal(slow[:, ::2], whole)
    between = (slow[:, 1::2].float() - whole[:, :-1].float()).abs().mean()
    assert between > 0.1


def test_without_a_rig_eight_cameras_stand_round_it(learned):
    colors = render(learned, first_frame=0.0, last_frame=0.0)[0]
    assert len(colors) == 8 and colors.frames.shape[-2:] == (512, 384)
    assert not colors.masks[:, :, 0].any() and not colors.masks[..., 0].any()


def test_a_picture_may_be_behind_it(learned):
    picture = torch.zeros(1, 2 * H, 2 * W, 3)
    picture[..., 1] = 1
    colors = render(learned, rig=ring(1), background_picture=picture)[0]
    empty = colors.masks[0] == 0
    assert (colors.frames[0].movedim(1, -1)[empty] == torch.tensor([0, 255, 0])).all()


def test_a_camera_that_sees_nothing_is_named(learned):
    rig = ring(2)
    away = rig.T_camera_world.clone()
    away[1] = turned_round(rig)[1]
    note = render(learned, rig=replace(rig, T_camera_world=away, names=("a", "b")))[3]
    assert "cameras b see nothing of the avatar" in note


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_frame": 9.0}, "'first_frame' is 9, but the avatar's motion has the frames 0 to 4"),
        ({"last_frame": 4.5}, "'last_frame' is 4.5"),
        ({"first_frame": 3.0, "last_frame": 1.0}, "lies before 'first_frame', 3: raise it"),
    ],
)
def test_frames_that_are_not_there_are_one_sentence(learned, changes, words):
    with pytest.raises(ValueError, match=words):
        render(learned, rig=ring(1), **changes)


def test_pictures_beyond_the_memory_are_one_sentence(learned, monkeypatch):
    monkeypatch.setattr(mm, "get_total_memory", lambda *_: 1000)
    with pytest.raises(ValueError, match="Pictures of 2 views x 5 frames of 48x64 need"):
        render(learned, rig=ring(2))
    with pytest.raises(ValueError, match="4 pictures of 48x64 need .*: lower 'seconds'"):
        turn(learned)


def turn(avatar, **changes):
    return AvatarTurntable.execute(avatar, **{**TURN, **changes}).args


def test_the_camera_goes_round(learned):
    video, images, masks = turn(learned, motion=FROZEN)
    assert images.shape == (4, H, W, 3) and masks.shape == (4, H, W)
    components = video.get_components()
    assert components.frame_rate == 8 and len(components.images) == 4
    # The first picture is from the front; a quarter of a turn later the camera stands at 90 degrees.
    rig = render_avatar.framing(learned).orbit(
        torch.tensor([0.0, math.pi / 2]), 0.0, math.radians(35), W, H
    )
    moment = render(learned, rig=rig, first_frame=0.0, last_frame=0.0)[0]
    for shown, view in ((0, 0), (1, 1)):
        seen = (images[shown].movedim(-1, 0) * 255).round()
        assert torch.equal(seen, moment.frames[view, 0].float())


def test_standing_still_the_motion_is_seen_there_and_back(learned):
    _, images, _ = turn(learned, motion=BACK, turns=0.0, seconds=1.0, fps=16.0)
    assert len(images) == 16
    assert torch.equal(images[0], images[8]) and torch.equal(images[1], images[7])
    assert not torch.equal(images[0], images[4])


def test_more_pictures_than_a_rig_has_cameras(learned, monkeypatch):
    whole = turn(learned, seconds=1.0)[1]
    monkeypatch.setattr(render_avatar, "MAX_VIEWS", 3)
    assert torch.equal(turn(learned, seconds=1.0)[1], whole)


# --- files ----------------------------------------------------------------------------------------


def save(avatar, format, **changes):
    settings = dict(filename_prefix="avatars/kira", frame=2, axes=avatar_files.WORLD)
    return SaveAvatar.execute(avatar, format=format, **{**settings, **changes}).args[0]


def test_saved_and_loaded_it_is_the_same(learned, output):
    note = save(learned, avatar_files.OWN)
    assert note.startswith("output/avatars/kira_00001_.safetensors: ")
    assert avatar_files.avatar_files() == ["kira_00001_.safetensors"]
    again, _ = LoadAvatar.execute("kira_00001_.safetensors").args
    assert same(again, learned) and again.fps == learned.fps
    before = LoadAvatar.fingerprint_inputs("kira_00001_.safetensors")
    save(learned, avatar_files.OWN)
    assert [f.name for f in sorted(output.glob("*"))][1] == "kira_00002_.safetensors"
    assert LoadAvatar.fingerprint_inputs("kira_00001_.safetensors") == before


def test_every_format_holds_what_is_seen(learned, output):
    """Read back: places of the Gaussians at the frame, and their colours under its light."""
    wanted = learned.at(2)
    for format in avatar_files.FORMATS:
        save(learned, format)
    names = {f.name for f in output.glob("*")}
    assert {"kira_00001_.safetensors", "kira_00002_frame0002.ply", "kira_00004_clip.ply"} <= names
    assert len([n for n in names if n.startswith("kira_00003_frame")]) == F
    assert len([n for n in names if n.startswith("kira_00006_frame") and n.endswith(".splat")]) == F
    glb = (output / "kira_00007_frame0002.glb").read_bytes()
    assert glb[:4] == b"glTF" and b"KHR_gaussian_splatting" in glb
    for read in (
        read_ply(output / "kira_00002_frame0002.ply"), read_ply(output / "kira_00003_frame0002.ply"),
        read_clip_ply(output / "kira_00004_clip.ply").frame(2),
    ):  # fmt: skip
        torch.testing.assert_close(read.means, wanted.means, atol=1e-5, rtol=0)
        torch.testing.assert_close(read.sh, wanted.sh, atol=1e-5, rtol=1e-5)
    splat = read_splat(output / "kira_00005_frame0002.splat").means.sort(0).values
    torch.testing.assert_close(splat, wanted.means.sort(0).values, atol=1e-5, rtol=0)
    assert read_clip_ply(output / "kira_00004_clip.ply").fps == 16.0


def test_axes_turn_a_file_upright(learned, output):
    save(learned, avatar_files.ONE_PLY, axes="y up (most programs)", frame=0)
    means, wanted = read_ply(output / "kira_00001_frame0000.ply").means, learned.at(0).means
    torch.testing.assert_close(means, wanted * torch.tensor([1.0, -1, -1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", [avatar_files.EACH_PLY, avatar_files.CLIP_PLY])
def test_cancelled_on_the_way_no_file_is_left(learned, output, monkeypatch, format):
    plain = run_module.progress

    def progress(total: int):
        bar = plain(total)

        def on_step(done, total, preview=None):
            bar(done, total, preview)
            if done == 3:
                raise mm.InterruptProcessingException

        return on_step

    monkeypatch.setattr(run_module, "progress", progress)
    with pytest.raises(mm.InterruptProcessingException):
        save(learned, format)
    assert not list(output.glob("*"))


def test_a_frame_that_is_not_there_is_one_sentence(learned, output):
    with pytest.raises(
        ValueError, match="'frame' is 7, but the avatar's motion has the frames 0 to 4"
    ):
        save(learned, avatar_files.ONE_SPLAT, frame=7)
    with pytest.raises(ValueError, match="below ComfyUI's output folder"):
        save(learned, avatar_files.OWN, filename_prefix="/tmp/avatar")


def test_what_can_not_be_loaded_is_one_sentence(output):
    with pytest.raises(
        ValueError, match="'name' is 'x.safetensors', but neither .*: save one with"
    ):
        LoadAvatar.execute("x.safetensors")
    output.mkdir()
    (output / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="'y.safetensors' can't be read as an avatar"):
        LoadAvatar.execute("y.safetensors")
    assert "missing" in LoadAvatar.fingerprint_inputs(None)


def test_core_s_splats_are_activated(learned, monkeypatch):
    """With a stand-in for the class of newer ComfyUI, of the same fields."""

    class SPLAT:
        def __init__(self, positions, scales, rotations, opacities, sh, counts=None):
            self.__dict__.update(locals())

    monkeypatch.setattr(avatar_files.Types, "SPLAT", SPLAT, raising=False)
    one, every = (AvatarToSplats.execute(learned, frame).args[0] for frame in (2.0, -1.0))
    N, wanted = len(learned.splats), learned.at(2)
    assert one.positions.shape == (1, N, 3) and every.positions.shape == (F, N, 3)
    assert one.opacities.shape == (1, N, 1) and one.sh.shape == (1, N, 1, 3)
    torch.testing.assert_close(every.positions[2], wanted.means)
    assert torch.equal(every.positions[2], one.positions[0])
    torch.testing.assert_close(one.scales[0].log(), wanted.log_scales, atol=1e-4, rtol=0)
    torch.testing.assert_close(one.rotations.norm(dim=-1), torch.ones(1, N))
    assert (one.opacities > 0).all() and (one.opacities < 1).all()
    with pytest.raises(ValueError, match="'frame' is 5"):
        AvatarToSplats.execute(learned, 5.0)
