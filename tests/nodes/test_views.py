"""Views in and out of the real ComfyUI: sockets, snapping, VAE, files, interruption."""

import math
from fractions import Fraction

import av
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan.vae import WanVAE
from turnaround.models.cameras import orbit_rig
from turnaround.models.views import Views
from turnaround.nodes import run
from turnaround.nodes import views as nodes
from turnaround.nodes.clips import ImagesToViews


def ring(views: int, width: int = 16, height: int = 16, names: tuple[str, ...] = ()):
    azimuths = torch.arange(views) * (2 * math.pi / views)
    rig = orbit_rig(azimuths, torch.zeros(views), 3.0, 0.6, width, height)
    return rig if not names else type(rig)(rig.K, rig.T_camera_world, width, height, names)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_vae(network: torch.nn.Module) -> comfy.sd.VAE:
    """A native VAE with random weights, through ComfyUI's own detection."""
    generator = torch.Generator().manual_seed(1)
    sd = {
        k: torch.randn(v.shape, generator=generator) * 0.1 + (1.0 if k.endswith("gamma") else 0.0)
        for k, v in network.state_dict().items()
    }
    return comfy.sd.VAE(sd=sd)


@pytest.fixture(scope="module")
def wan_vae():
    # The layers are too small to share between threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = dict(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[])
    yield random_vae(WanVAE(**config, temperal_downsample=[False, True, True]))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def image_vae():
    config = dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32)
    config |= dict(ch_mult=[1, 2, 4, 4], num_res_blocks=2, attn_resolutions=[], dropout=0.0)
    network = AutoencoderKL(ddconfig=config, embed_dim=4)
    return comfy.sd.VAE(
        sd=network.state_dict(), config={"params": {"ddconfig": config, "embed_dim": 4}}
    )


@pytest.fixture
def folders(tmp_path):
    """ComfyUI's output and temp folders, moved for one test."""
    before = folder_paths.get_output_directory(), folder_paths.get_temp_directory()
    (tmp_path / "output").mkdir()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    yield tmp_path
    folder_paths.set_output_directory(before[0])
    folder_paths.set_temp_directory(before[1])


def files_below(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def frame_count(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


# Images and back, Video


@pytest.mark.parametrize("with_rig", [False, True])
def test_images_to_views_and_back_is_exact(with_rig):
    images, mask = noise(6, 18, 22, 3), noise(6, 18, 22, seed=1)
    rig = ring(2) if with_rig else None
    views = ImagesToViews.execute(images, 2, 24.0, rig, mask).args[0]
    assert views.frames.shape == (2, 3, 3, 18, 22) and views.fps == 24.0
    if with_rig:
        assert (views.rig.width, views.rig.height) == (22, 18)
    back, back_mask = nodes.ViewsToImages.execute(views, -1).args
    assert torch.equal(back, images) and torch.equal(back_mask, mask)
    second, _ = nodes.ViewsToImages.execute(views, 1).args
    assert torch.equal(second, images[3:])


def test_a_single_flat_mask_fits_a_single_image():
    views = ImagesToViews.execute(noise(1, 16, 16, 3), 1, 16.0, None, noise(16, 16)).args[0]
    assert views.masks.shape == (1, 1, 16, 16)


def test_images_that_views_can_not_share_are_refused():
    with pytest.raises(ValueError, match="7 images can't be shared evenly by 2 views"):
        ImagesToViews.execute(noise(7, 16, 16, 3), 2, 16.0)
    with pytest.raises(ValueError, match="7 images can't be shared evenly by 3 views"):
        ImagesToViews.execute(noise(7, 16, 16, 3), 7, 16.0, ring(3))
    with pytest.raises(ValueError, match="6 images but 5 masks"):
        ImagesToViews.execute(noise(6, 16, 16, 3), 2, 16.0, None, noise(5, 16, 16))


def test_a_view_number_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'view' is 2, but there are 2 views: use 0 to 1"):
        nodes.ViewsToImages.execute(Views(noise(2, 1, 3, 16, 16)), 2)


def test_views_without_masks_are_white_all_over():
    _, masks = nodes.ViewsToImages.execute(Views(noise(2, 3, 3, 16, 16)), 0).args
    assert masks.shape == (3, 16, 16) and (masks == 1).all()


@pytest.mark.parametrize(("view", "size"), [(0, (16, 22)), (-1, (16, 44))])
def test_views_to_video_can_be_saved_by_core_even_at_odd_sizes(tmp_path, view, size):
    views = Views(noise(2, 5, 3, 17, 22), fps=12.5)
    video = nodes.ViewsToVideo.execute(views, view).args[0]
    components = video.get_components()
    assert components.images.shape == (5, *size, 3) and components.frame_rate == Fraction(25, 2)
    video.save_to(str(tmp_path / "clip.mp4"))
    assert frame_count(tmp_path / "clip.mp4") == 5


# VAE


def test_views_are_encoded_and_decoded_one_by_one(wan_vae):
    views = Views(noise(2, 5, 3, 16, 32))
    latent, note = nodes.EncodeViews.execute(views, wan_vae).args
    samples = latent["samples"]
    assert samples.shape == (2, 16, 2, 2, 4) and note == ""
    decoded = nodes.DecodeViews.execute(latent, wan_vae, 12.0).args[0]
    assert decoded.frames.shape == (2, 5, 3, 16, 32) and decoded.fps == 12.0
    for v in range(2):
        alone = nodes.EncodeViews.execute(Views(views.frames[v : v + 1]), wan_vae).args[0]
        assert torch.equal(alone["samples"], samples[v : v + 1])
        back = nodes.DecodeViews.execute(alone, wan_vae, 12.0).args[0]
        assert torch.equal(back.frames[0], decoded.frames[v])
    # The comparison means something: views differ.
    assert (samples[0] - samples[1]).abs().max() > 1e-3
    assert (decoded.frames[0] - decoded.frames[1]).abs().max() > 1e-3


def test_encoding_agrees_with_the_native_node_for_one_view(wan_vae):
    images = noise(5, 16, 16, 3)
    views = Views(images.movedim(-1, 1)[None])
    samples = nodes.EncodeViews.execute(views, wan_vae).args[0]["samples"]
    assert torch.equal(samples, wan_vae.encode(images))


@pytest.mark.parametrize(
    ("shape", "latent_shape"),
    [
        ((1, 1, 3, 16, 16), (1, 16, 1, 2, 2)),
        ((2, 7, 3, 17, 30), (2, 16, 2, 2, 4)),
        ((64, 1, 3, 16, 16), (64, 16, 1, 2, 2)),
    ],
)
def test_views_of_any_count_and_size_are_encoded(wan_vae, shape, latent_shape):
    latent, note = nodes.EncodeViews.execute(Views(noise(*shape)), wan_vae).args
    assert latent["samples"].shape == latent_shape
    assert ("became" in note) == (shape[1] == 7)
    back = nodes.DecodeViews.execute(latent, wan_vae, 16.0, ring(shape[0], 64, 64)).args[0]
    assert len(back) == shape[0] and back.rig.width == back.frames.shape[-1]


def test_depth_views_are_encoded_as_grey(wan_vae):
    depth = noise(1, 1, 1, 16, 16) + 1
    latent, _ = nodes.EncodeViews.execute(Views(depth), wan_vae).args
    assert latent["samples"].shape == (1, 16, 1, 2, 2)


def test_a_vae_for_pictures_is_refused(image_vae):
    with pytest.raises(ValueError, match="'vae' is one for still pictures"):
        nodes.EncodeViews.execute(Views(noise(1, 1, 3, 16, 16)), image_vae)
    with pytest.raises(ValueError, match="'vae' is one for still pictures"):
        nodes.DecodeViews.execute({"samples": torch.zeros(1, 16, 1, 2, 2)}, image_vae, 16.0)


def test_a_latent_that_does_not_fit_is_refused(wan_vae):
    with pytest.raises(ValueError, match="'latent' holds pictures"):
        nodes.DecodeViews.execute({"samples": torch.zeros(1, 4, 2, 2)}, wan_vae, 16.0)
    with pytest.raises(ValueError, match="The rig has 3 cameras but the latent 2 views"):
        nodes.DecodeViews.execute({"samples": torch.zeros(2, 16, 1, 2, 2)}, wan_vae, 16.0, ring(3))


# Files


def test_save_writes_every_view_and_the_grid_under_safe_names(folders):
    names = ("../../etc/x", "left: 90°", "n" * 300)
    views = Views(noise(3, 2, 3, 16, 16), rig=ring(3, names=names))
    output = nodes.SaveViews.execute(views, "shots/dance", 18)
    stem = "output/shots/dance_00001_"
    expected = [f"{stem}grid.mp4", f"{stem}view00_etcx.mp4", f"{stem}view01_left90.mp4"]
    assert files_below(folders) == [*expected, f"{stem}view02_{'n' * 40}.mp4"]
    (shown,) = output.ui.as_dict()["images"]
    assert shown == {"filename": "dance_00001_grid.mp4", "subfolder": "shots", "type": "output"}
    assert all(frame_count(folders / f) == 2 for f in files_below(folders))


def test_a_second_save_keeps_the_first(folders):
    views = Views(noise(1, 1, 3, 16, 16))
    nodes.SaveViews.execute(views, "dance", 18)
    nodes.SaveViews.execute(views, "dance", 18)
    assert [f for f in files_below(folders) if "grid" in f] == [
        "output/dance_00001_grid.mp4",
        "output/dance_00002_grid.mp4",
    ]


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/x", "", " ", ".", "./"])
def test_a_prefix_outside_the_output_folder_is_refused(folders, prefix):
    with pytest.raises(ValueError, match="only below ComfyUI's output folder"):
        nodes.SaveViews.execute(Views(noise(1, 1, 3, 16, 16)), prefix, 18)
    assert files_below(folders) == []


# Sample Performer


def test_the_sample_performer_gives_the_truth_of_any_rig():
    schema = nodes.SamplePerformer.GET_SCHEMA()
    options = {i.id: i.options for i in schema.inputs if hasattr(i, "options")}
    who, motion = options["performer"][0], options["motion"][0]
    assert "unseen" in who and "unseen" in motion
    video, depth, truth = nodes.SamplePerformer.execute(
        who, motion, 1, 64, 64, 0.2, 1_000_003, ring(2, 48, 80)
    ).args
    assert video.frames.shape == (1, 1, 3, 64, 64) and depth.frames.shape == (1, 1, 1, 64, 64)
    assert truth.frames.shape == (2, 1, 3, 80, 48) and truth.masks.shape == (2, 1, 80, 48)
    assert video.rig.labels == ("0°",) and truth.rig.labels == ("0°", "180°")
    # The mask is coverage: 0 exactly where the picture is background, 1 deep inside,
    # and depth is known there alone.
    mask = video.masks[0, 0]
    assert 0.05 < mask.mean() < 0.6 and mask.unique().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (video.frames[0, 0][:, mask == 0] == 0.5).all()
    assert (depth.frames[0, 0, 0][mask == 1] > 0).all()
    assert not depth.frames[0, 0, 0][mask == 0].any()
    # The whole performer is in the picture.
    assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()


def test_without_a_rig_the_truth_is_the_source():
    schema = nodes.SamplePerformer.GET_SCHEMA()
    who, motion = (i.options[-1] for i in schema.inputs[:2])
    video, _, truth = nodes.SamplePerformer.execute(who, motion, 1, 64, 64, 0.0, 7).args
    assert truth is video


# Progress and notes


def test_notes_are_logged_and_silence_is_not(caplog):
    with caplog.at_level("INFO", logger="turnaround"):
        assert run.say(nodes.EncodeViews, "") == ""
        assert run.say(nodes.EncodeViews, "7 frames became 5") == "7 frames became 5"
    assert [r.getMessage() for r in caplog.records] == ["Turnaround: 7 frames became 5"]


def test_progress_obeys_the_cancel_button():
    on_step = run.progress(2)
    on_step(1, 2, noise(3, 8, 8))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        on_step(2, 2)
    on_step(2, 2)


def test_encoding_stops_when_cancelled(wan_vae):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        nodes.EncodeViews.execute(Views(noise(2, 1, 3, 16, 16)), wan_vae)


def test_saving_stops_when_cancelled_and_leaves_no_partial_file(folders):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        nodes.SaveViews.execute(Views(noise(4, 1, 3, 16, 16)), "dance", 18)
    assert not [f for f in files_below(folders) if not f.endswith(".mp4")]


def test_progress_shows_a_picture_through_comfyuis_hook():
    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda *args, **_: seen.append(args))
    try:
        run.progress(3)(1, 3, torch.full((3, 8, 4), 2.0))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    ((done, total, (kind, picture, _)),) = [s[:3] for s in seen]
    assert (done, total, kind) == (1, 3, "JPEG")
    assert picture.size == (4, 8) and picture.getpixel((0, 0)) == (255, 255, 255)
