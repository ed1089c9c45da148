"""Clips into the real ComfyUI: a video, pictures, the videos of calibrated cameras."""

from fractions import Fraction

import av
import comfy.model_management
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from turnaround.models.camera_views import rig_of_size
from turnaround.models.cameras import Rig
from turnaround.models.lenses import Lens
from turnaround.models.video_file import Footage, Pictures, write_mp4
from turnaround.nodes import clips as nodes
from turnaround.nodes import run


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def video_to_views(**inputs):
    """Runs the node with the defaults of its widgets."""
    widgets = dict(width=0, height=0, start_frame=0, max_frames=49, every_nth=1, fps=16.0)
    return nodes.VideoToViews.execute(**{**widgets, **inputs}).args


# Video to Views


def test_frames_and_sizes_that_fit_pass_unchanged():
    images = noise(9, 32, 48, 3)
    views, note = video_to_views(images=images)
    assert torch.equal(views.frames[0], images.movedim(-1, 1))
    assert note == "" and views.fps == 16.0 and views.masks is None


def test_a_clip_is_snapped_with_a_note():
    views, note = video_to_views(images=noise(7, 33, 45, 3))
    assert views.frames.shape == (1, 5, 3, 32, 48)
    assert "7 frames became 5" in note and "45x33 became 48x32" in note


def test_a_video_brings_its_own_rate():
    clip = InputImpl.VideoFromComponents(
        Types.VideoComponents(images=noise(9, 16, 16, 3), frame_rate=Fraction(30))
    )
    views, _ = video_to_views(video=clip, every_nth=2, fps=99.0)
    assert views.frames.shape[1] == 5 and views.fps == 15.0


def test_a_video_file_becomes_views(tmp_path):
    frames = noise(5, 3, 32, 32)
    write_mp4(tmp_path / "clip.mp4", frames, 12)
    views, _ = video_to_views(video=InputImpl.VideoFromFile(str(tmp_path / "clip.mp4")))
    assert views.frames.shape == (1, 5, 3, 32, 32) and views.fps == 12.0


def test_of_a_file_only_what_is_chosen_is_kept(tmp_path, monkeypatch):
    """A minute of a phone's video, all of it at once, takes more memory than most computers have."""
    frames = noise(1, 3, 4, 4).repeat(40, 1, 8, 8) * torch.linspace(0, 1, 40)[:, None, None, None]
    write_mp4(tmp_path / "clip.mp4", frames, 12, crf=0)
    video = InputImpl.VideoFromFile(str(tmp_path / "clip.mp4"))
    whole = video.get_components().images.movedim(-1, 1)
    monkeypatch.setattr(InputImpl.VideoFromFile, "get_components", None)
    read = []
    monkeypatch.setattr(nodes, "_unit", lambda p, unit=nodes._unit: read.append(p) or unit(p))
    views, _ = video_to_views(video=video, start_frame=3, every_nth=4, max_frames=5)
    assert torch.equal(views.frames[0], whole[3:20:4])
    assert len(read) == 5 and read[0].dtype == torch.uint8


def test_masks_of_a_file_are_counted_against_its_frames(tmp_path):
    write_mp4(tmp_path / "clip.mp4", noise(9, 3, 32, 32), 12)
    video = InputImpl.VideoFromFile(str(tmp_path / "clip.mp4"))
    mask = torch.linspace(0, 1, 9)[:, None, None].expand(-1, 32, 32)
    views, _ = video_to_views(video=video, mask=mask, every_nth=2)
    assert torch.equal(views.masks[0, :, 0, 0], mask[::2, 0, 0])
    with pytest.raises(ValueError, match="has 8 frames but the clip has 9"):
        video_to_views(video=video, mask=mask[:8])
    with pytest.raises(ValueError, match="start_frame is 9.*only 9 frames"):
        video_to_views(video=video, start_frame=9)


def test_start_step_and_limit_choose_the_frames():
    images = torch.arange(40.0)[:, None, None, None].expand(-1, 16, 16, 3) / 40
    mask = images[..., 0]
    views, _ = video_to_views(
        images=images, mask=mask, start_frame=3, every_nth=4, max_frames=5, fps=60.0
    )
    expected = torch.tensor([3.0, 7, 11, 15, 19]) / 40
    assert torch.equal(views.frames[0, :, 0, 0, 0], expected)
    assert torch.equal(views.masks[0, :, 0, 0], expected)
    assert views.fps == 15.0


def test_one_mask_serves_all_frames_and_is_scaled_with_them():
    mask = torch.zeros(60, 100)
    mask[:, 50:] = 1.0
    views, _ = video_to_views(images=noise(5, 60, 100, 3), mask=mask, width=64, height=64)
    assert views.masks.shape == (1, 5, 64, 64)
    assert not views.masks[..., :30].any() and (views.masks[..., 34:] > 0.999).all()


def test_a_file_that_is_no_video_is_named_in_one_sentence(tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"this is not a video" * 100)
    with pytest.raises(ValueError, match="'video' cannot be read as a video.*export it as mp4"):
        video_to_views(video=InputImpl.VideoFromFile(str(path)))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "Connect 'video' or 'images'"),
        ({"images": noise(3, 16, 16, 3), "start_frame": 3}, "start_frame is 3.*only 3 frames"),
        ({"images": noise(5, 16, 16, 3), "mask": noise(4, 16, 16)}, "has 4 frames .* has 5"),
        ({"images": noise(5, 16, 16, 3), "mask": noise(5, 16, 32)}, "is 32x16 but .* 16x16"),
    ],
)
def test_a_clip_that_can_not_be_used_is_refused_in_one_sentence(inputs, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        video_to_views(**inputs)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_frame_of_any_channel_count_becomes_a_colour_view(channels):
    images = noise(1, 17, 21, channels)
    views, _ = video_to_views(images=images)
    assert views.frames.shape == (1, 1, 3, 16, 16)


def test_a_file_of_sound_is_named_in_one_sentence(tmp_path):
    video = sound_only(tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match="'video' has no pictures, only sound"):
        video_to_views(video=video)
    with pytest.raises(ValueError, match="'video_1' has no pictures, only sound"):
        cameras_to_views(rig(1), video_1=video)


def test_a_clip_that_will_hardly_move_is_said():
    _, note = video_to_views(images=noise(1, 16, 16, 3))
    assert "one frame gives a still" in note
    _, note = video_to_views(images=noise(13, 16, 16, 3), fps=60.0)
    assert "60 frames a second are kept, so 13 frames last 0.2 s" in note


# Cameras to Views


def sound_only(path) -> InputImpl.VideoFromFile:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(torch.zeros(1, 4096).numpy(), "fltp", "mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return InputImpl.VideoFromFile(str(path))


def rig(views: int, width: int = 48, height: int = 32) -> Rig:
    K = torch.tensor([[50.0, 0, width / 2], [0, 50.0, height / 2], [0, 0, 1]])
    T = torch.eye(4).repeat(views, 1, 1)
    T[:, 2, 3] = 3
    names = tuple("abcdefghij"[:views])
    return Rig(K.repeat(views, 1, 1), T, width, height, names, (Lens((0.1,)),) * views)


def cameras_to_views(rig, **inputs):
    widgets = dict(longest_side=0, start_frame=0, max_frames=49, every_nth=1, offsets="")
    return nodes.CamerasToViews.execute(rig, **{**widgets, **inputs}).args


def film(path, frames: int, fps: float = 20, width: int = 48, height: int = 32):
    """A video whose picture k has the grey (k + 1) / 32."""
    grey = (torch.arange(frames) + 1.0)[:, None, None, None] / 32
    write_mp4(path, grey.expand(-1, 3, height, width), fps, crf=4)
    return InputImpl.VideoFromFile(str(path))


def numbers(views) -> list[list[int]]:
    means = views.frames.float().mean((2, 3, 4)) / 255 * 32
    return [[round(float(m)) - 1 for m in row] for row in means]


def test_every_camera_becomes_a_view_from_the_same_moment_on(tmp_path):
    videos = {f"video_{k}": film(tmp_path / f"{k}.mp4", 24) for k in (1, 2, 3)}
    views, note = cameras_to_views(
        rig(3), **videos, start_frame=1, every_nth=2, max_frames=5, offsets="10, 13, 9"
    )
    assert numbers(views) == [[2, 4, 6, 8, 10], [5, 7, 9, 11, 13], [1, 3, 5, 7, 9]]
    assert views.fps == 10.0 and views.frames.dtype == torch.uint8 and views.masks is None
    assert views.rig.lenses == rig(3).lenses and views.rig.names == ("a", "b", "c")
    assert note == "3 views x 5 frames of 48x32, 10 frames a second"


def test_the_shortest_video_ends_all(tmp_path):
    videos = {"video_1": film(tmp_path / "1.mp4", 20), "video_2": film(tmp_path / "2.mp4", 8)}
    views, note = cameras_to_views(rig(2), **videos, offsets="0 1")
    assert numbers(views) == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert "shortest video has 7 frames to use; 7 frames became 5 (video models need 4n+1)" in note


def test_one_camera_is_what_video_to_views_makes_of_its_file(tmp_path):
    write_mp4(tmp_path / "clip.mp4", noise(9, 3, 64, 96), 12, crf=8)
    video = InputImpl.VideoFromFile(str(tmp_path / "clip.mp4"))
    choice = dict(start_frame=2, every_nth=3, max_frames=9)
    one, _ = cameras_to_views(rig(1), video_1=video, longest_side=48, **choice)
    other, _ = video_to_views(video=video, width=48, height=32, **choice)
    assert one.fps == other.fps and one.frames.shape == other.frames.shape == (1, 1, 3, 32, 48)
    assert (one.frames.float() / 255 - other.frames).abs().max() < 0.51 / 255


def test_a_video_that_is_no_file_is_read_like_one(tmp_path):
    images = noise(5, 32, 48, 3)
    clip = Types.VideoComponents(images=images, frame_rate=Fraction(20))
    views, _ = cameras_to_views(rig(1), video_1=InputImpl.VideoFromComponents(clip))
    assert (views.frames[0].movedim(1, -1).float() / 255 - images).abs().max() < 0.51 / 255


class TrimmedVideo(InputImpl.VideoFromFile):
    """As newer ComfyUI's videos tell how they were trimmed."""

    def get_active_trim_window(self):
        return 0.2, 0.3


def test_a_trimmed_video_of_newer_comfyui_begins_where_it_was_trimmed(tmp_path):
    film(tmp_path / "clip.mp4", 12)
    video = TrimmedVideo(str(tmp_path / "clip.mp4"))
    views, _ = cameras_to_views(rig(1), video_1=video)
    assert numbers(views) == [[4, 5, 6, 7, 8]]  # 0.2 s of 20 a second; six frames make 4n+1 = 5


class UntoldTrim(InputImpl.VideoFromFile):
    """Of ComfyUI's versions between: trimmed, but it does not tell how."""

    def as_trimmed(self):
        raise NotImplementedError


def test_what_does_not_tell_its_trimming_is_decoded_by_comfyui(tmp_path):
    film(tmp_path / "clip.mp4", 2)
    assert isinstance(nodes._footage("video_1", UntoldTrim(str(tmp_path / "clip.mp4"))), Pictures)
    whole = InputImpl.VideoFromFile(str(tmp_path / "clip.mp4"))
    assert isinstance(nodes._footage("video_1", whole), Footage)


def test_the_size_is_that_of_the_rig_and_more_than_fits_is_refused(tmp_path, monkeypatch):
    video = film(tmp_path / "1.mp4", 5, width=96, height=64)
    views, _ = cameras_to_views(rig(1, 96, 64), video_1=video, longest_side=48)
    assert views.frames.shape[-2:] == (32, 48)
    assert torch.equal(views.rig.K, rig_of_size(rig(1, 96, 64), 48).K)
    monkeypatch.setattr(run.mm, "get_total_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="The pictures of 1 views x 5 frames of 48x32 need"):
        cameras_to_views(rig(1, 96, 64), video_1=video, longest_side=48)


@pytest.mark.parametrize(
    ("given", "widgets", "sentence"),
    [
        ("1", {}, r"1 videos came, but 'rig' has 2 cameras \(a, b\)"),
        ("", {}, "0 videos came"),
        ("123", {}, "3 videos came, but 'rig' has 2 cameras"),
        ("13", {}, "'video_2' is empty, but 'video_3' is connected"),
        ("1f", {}, "'video_2' has 25 frames a second but 'video_1' 20"),
        ("1t", {}, "'video_2' is 32x48, but 'rig' was calibrated for 48x32"),
        ("1b", {}, "'video_2' cannot be read as a video.*export it as mp4"),
        ("12", {"start_frame": 24}, "'video_1' ends before its frame 24"),
        ("12", {"offsets": "0,30"}, "'video_2' ends before its frame 30"),
        ("12", {"offsets": "1"}, "'offsets' has 1 numbers, but there are 2 videos"),
    ],
)
def test_footage_that_can_not_be_used_is_refused_in_one_sentence(
    tmp_path, given, widgets, sentence
):
    (tmp_path / "b.mp4").write_bytes(b"this is not a video" * 100)
    kinds = {
        "f": lambda path: film(path, 24, fps=25),
        "t": lambda path: film(path, 24, width=32, height=48),
        "b": lambda path: InputImpl.VideoFromFile(str(tmp_path / "b.mp4")),
    }
    videos = {}
    for k in given:
        make = kinds.get(k, lambda path: film(path, 24))
        videos[f"video_{k if k.isdigit() else 2}"] = make(tmp_path / f"clip{k}.mp4")
    with pytest.raises(ValueError, match=sentence) as error:
        cameras_to_views(rig(2), **videos, **widgets)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_long_way_to_the_first_frame_can_be_cancelled(tmp_path):
    video = film(tmp_path / "1.mp4", 24)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        cameras_to_views(rig(1), video_1=video, start_frame=20)
    assert not comfy.model_management.processing_interrupted()
