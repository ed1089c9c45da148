"""The annotator nodes in ComfyUI: files, sockets, neighbours, and what is refused."""

import importlib.util
import math
import sys

import folder_paths
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from safetensors.torch import save_file
from turnaround.models.annotators import (
    ANNOTATORS,
    MIDAS,
    NORMALBAE,
    OPENPOSE,
    ZOE,
    _library,
    normals_from_normalbae,
)
from turnaround.models.cameras import intrinsics, orbit_rig
from turnaround.models.geometry import encode_normals
from turnaround.models.views import Views
from turnaround.nodes import annotators
from turnaround.nodes.annotators import AnnotateDepth, AnnotateNormals, AnnotatePose
from turnaround.nodes.depth import AlignDepth, RefineDepth

FRAMES, HEIGHT, WIDTH = 2, 70, 50
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("controlnet_aux") is None,
    reason="the optional package controlnet-aux is not installed",
)


class _Hidden:
    unique_id = "1"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, one_thread):
    # Notes are read from the output; without a server there is nobody to send them to.
    for node in (AnnotateDepth, AnnotateNormals, AnnotatePose, AlignDepth, RefineDepth):
        monkeypatch.setattr(node, "hidden", _Hidden())
    monkeypatch.delitem(sys.modules, "server", raising=False)


def small_weights(annotator):
    """Seeded weights for a net of the library whose values lie over each other in memory: a file
    of them takes kilobytes, not hundreds of megabytes."""
    with _library(), torch.inference_mode(False):
        shapes = {k: v.shape for k, v in annotator.build().state_dict().items()}
    pool = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        if len(shape) < 2:
            is_scale = name.endswith(("running_var", "weight"))
            weights[name] = torch.full((1,), float(is_scale)).expand(shape)
            continue
        fan_in = math.prod(shape[1:])
        steps = [7 ** (len(shape) - 1 - n) % 11 + 1 for n in range(len(shape))]
        assert sum(s * (n - 1) for s, n in zip(steps, shape, strict=True)) < len(pool)
        weights[name] = (pool * fan_in**-0.5).as_strided(shape, steps)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as the public repository has them: MiDaS plain, NormalBae from a parallel training,
    OpenPose without its branches."""
    path = tmp_path_factory.mktemp("controlnet_aux")
    torch.save(small_weights(MIDAS), path / MIDAS.file)
    parallel = {f"module.{k}": v for k, v in small_weights(NORMALBAE).items()}
    (path / "below").mkdir()
    torch.save({"model": parallel}, path / "below" / NORMALBAE.file)
    branchless = {k.split(".", 1)[1]: v for k, v in small_weights(OPENPOSE).items()}
    torch.save(branchless, path / OPENPOSE.file)
    return path


@pytest.fixture
def use(monkeypatch):
    """Make a folder ComfyUI's folder of annotators."""

    def of(path):
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, annotators.FOLDER, ([str(path)], set())
        )
        folder_paths.filename_list_cache.pop(annotators.FOLDER, None)

    yield of
    folder_paths.filename_list_cache.pop(annotators.FOLDER, None)


def pictures():
    return torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(2))


def run_as_dropped(node, **connected):
    """A node's outputs with every widget as it comes."""
    widgets = {
        part.id: part.options[0] if getattr(part, "options", None) else part.default
        for part in node.define_schema().inputs
        if getattr(part, "options", None) or getattr(part, "default", None) is not None
    }
    return node.execute(**{**widgets, **connected}).result


def video(**parts):
    return Views(pictures().movedim(-1, 1)[None], **parts)


# --- files ----------------------------------------------------------------------------------------


def test_the_folder_is_one_of_comfyuis_own(monkeypatch):
    monkeypatch.delitem(folder_paths.folder_names_and_paths, annotators.FOLDER, raising=False)
    assert annotators.files() == []
    annotators.register()
    (path,) = folder_paths.get_folder_paths(annotators.FOLDER)
    assert path.startswith(folder_paths.models_dir) and path.endswith("controlnet_aux")
    monkeypatch.delitem(folder_paths.folder_names_and_paths, annotators.FOLDER)


def test_lists_name_the_public_files_and_ones_own(use, tmp_path):
    for name in ("mine.safetensors", "notes.txt", NORMALBAE.file):
        (tmp_path / name).touch()
    use(tmp_path)
    assert annotators.choices("depth") == [MIDAS.file, ZOE.file, "mine.safetensors"]
    assert annotators.choices("pose") == [OPENPOSE.file, "mine.safetensors"]


@pytest.mark.parametrize("annotator", ANNOTATORS, ids=lambda a: a.label)
def test_a_missing_file_is_one_sentence(use, tmp_path, annotator):
    use(tmp_path)
    with pytest.raises(
        ValueError,
        match=f"'{annotator.file}' is not in ComfyUI/models/controlnet_aux: .*lllyasviel/Annotators",
    ):
        annotators.load_annotator(annotator.file, annotator.task)


class _Trap:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_never_run(use, tmp_path):
    sprung = tmp_path / "sprung.txt"
    torch.save({"model": {MIDAS.key: torch.zeros(1)}, "x": _Trap(sprung)}, tmp_path / MIDAS.file)
    use(tmp_path)
    with pytest.raises(ValueError, match="holds more than weights, which is never run"):
        annotators.load_annotator(MIDAS.file, "depth")
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_half_a_download_is_one_sentence(use, tmp_path, name):
    whole = tmp_path / f"whole.{name}"
    (save_file if name.endswith("tensors") else torch.save)({"a": torch.zeros(999)}, whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[:1500])
    use(tmp_path)
    with pytest.raises(ValueError, match=f"'{name}' can't be read: it is damaged"):
        annotators.load_annotator(name, "pose")


def test_another_nets_file_is_one_sentence(use, tmp_path):
    save_file({NORMALBAE.key: torch.zeros(1)}, tmp_path / "mine.safetensors")
    use(tmp_path)
    with pytest.raises(ValueError, match="holds NormalBae, a net for normals, but depth"):
        AnnotateDepth.execute("mine.safetensors", 64, images=pictures())


# --- the clip -------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [AnnotateDepth, AnnotateNormals, AnnotatePose])
def test_the_clip_is_looked_at_before_any_file(node):
    options = {} if node is AnnotatePose else {"resolution": 64}
    frames = pictures().movedim(-1, 1)[None]
    for clip, sentence in (
        ({}, "Connect 'video' or 'images'"),
        ({"video": Views(frames.repeat(2, 1, 1, 1, 1))}, "has 2 views: pick one"),
        ({"video": Views(frames[:, :, :1])}, "carries depth, not colour"),
        ({"images": pictures() * torch.nan}, "Frame 0 of the clip holds values"),
        ({"images": torch.zeros(1, 10, 100, 3)}, "100x10, too narrow"),
    ):
        with pytest.raises(ValueError, match=sentence):
            node.execute("no file", **options, **clip)


# --- the nets -------------------------------------------------------------------------------------


@needs_library
def test_depth_pictures_fit_the_clip_and_midas_has_no_metres(use, folder):
    use(folder)
    image, metres, note = AnnotateDepth.execute(MIDAS.file, 64, images=pictures()).result
    assert image.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert image.min() == 0 and image.max() == 1  # over the clip
    assert note == "MiDaS: near is white, brightness follows 1 / depth"
    assert isinstance(metres, ExecutionBlocker) and "Align Depth" in metres.message
    # The pictures go on into Align Depth, with a metric depth that knows the left half alone.
    target = 1 / (0.2 + 0.3 * image.mean(-1))
    known = target.clone()
    known[..., WIDTH // 2 :] = 0
    out, *_ = run_as_dropped(
        AlignDepth,
        depth=image,
        metric=Views(known[None, :, None]),
        mask=torch.ones_like(known),
        runs_with="inverse depth",
    )
    torch.testing.assert_close(out.frames[0, :, 0], target, atol=1e-3, rtol=0)


@needs_library
def test_normals_fit_the_clip_and_refine_depth(use, folder):
    use(folder)
    (image,) = AnnotateNormals.execute(NORMALBAE.file, 64, video=video()).result
    assert image.shape == (FRAMES, HEIGHT, WIDTH, 3)
    vectors = 2 * image - 1
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(FRAMES, HEIGHT, WIDTH))
    flat = Views(torch.full((1, FRAMES, 1, HEIGHT, WIDTH), 2.0))
    out, *_ = run_as_dropped(RefineDepth, depth_views=flat, normals=image)
    assert out.frames.isfinite().all()


def test_a_wall_that_normalbae_sees_turned_right_is_turned_right_by_refine_depth():
    """Its colours need no switch: they are the default of Refine Depth."""
    slope = 0.5  # metres of depth a metre to the right, as the left wall of a corridor
    K = intrinsics(math.radians(40), WIDTH, HEIGHT)
    x = (torch.arange(WIDTH) + 0.5 - K[0, 2]) / K[0, 0]
    wall = (2 / (1 - slope * x)).expand(1, HEIGHT, WIDTH)
    facing = torch.tensor([slope, 0.0, -1.0])  # camera axes, towards the camera
    # NormalBae's x grows to the left and its z towards the camera.
    said = (-facing / facing.norm()).view(1, 3, 1, 1).expand(1, 3, HEIGHT, WIDTH)
    image = encode_normals(normals_from_normalbae(said).movedim(1, -1))
    flat = Views(torch.full((1, 1, 1, HEIGHT, WIDTH), 2.0))
    out, *_ = run_as_dropped(RefineDepth, depth_views=flat, normals=image, reach=200.0)
    refined = out.frames[0, :, 0]
    asked = wall[..., -1] / wall[..., 0]
    torch.testing.assert_close(refined[..., -1] / refined[..., 0], asked, atol=0.02, rtol=0)


@needs_library
def test_pose_fits_the_clip_and_nobody_is_said(use, folder):
    use(folder)
    pose, preview, note = AnnotatePose.execute(OPENPOSE.file, images=pictures()).result
    assert [(f["canvas_width"], f["canvas_height"]) for f in pose] == [(WIDTH, HEIGHT)] * FRAMES
    assert preview.shape == (FRAMES, HEIGHT, WIDTH, 3)
    found = [len(f["people"]) for f in pose]
    assert note == annotators.describe(found)


def test_notes_count_people():
    assert annotators.describe([0, 0]).startswith("nobody was found in any frame")
    assert annotators.describe([1, 0, 2]) == (
        "up to 2 people in a frame; nobody was found in 1 of 3 frames"
    )


def test_skeletons_are_drawn_between_points_that_were_found():
    person = torch.zeros(1, 18, 3)
    person[0, 1] = torch.tensor([10.0, 10, 1])
    person[0, 2] = torch.tensor([40.0, 10, 1])  # neck to right shoulder; the rest is missing
    black = torch.zeros(1, 3, 20, 60)
    drawn = annotators.skeletons(black, [person])[0].amax(0)
    assert drawn[10, 12:38].min() > 0.5
    drawn[9:12, 9:42] = 0
    assert drawn.max() == 0


def test_zoe_gives_metres_with_the_clips_camera(monkeypatch):
    rig = orbit_rig(torch.zeros(1), torch.zeros(1), 3.0, math.radians(25), WIDTH, HEIGHT)
    masks = torch.ones(1, FRAMES, HEIGHT, WIDTH)

    class Slope(torch.nn.Module):
        """Zoe takes gigabytes: this says 1 metre on the left and 3 on the right."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def infer(self, picture):
            return torch.linspace(1, 3, picture.shape[-1]).expand(1, 1, *picture.shape[-2:])

    monkeypatch.setattr(annotators, "_start", lambda *_: (ZOE, Slope()))
    image, metres, note = AnnotateDepth.execute(
        ZOE.file, 64, video=video(masks=masks, rig=rig, fps=24.0)
    ).result
    assert metres.rig is rig and metres.fps == 24.0 and metres.masks is masks
    row = metres.frames[0, 0, 0, 30]
    assert row[0] < 1.1 and row[-1] > 2.9 and (row.diff() > 0).all()
    assert image[0, 30, [0, -1], 0].tolist() == pytest.approx([1, 0], abs=1e-5)
    assert note == "Zoe: near is white, brightness follows depth, 1.0 to 3.0 m"


@needs_library
def test_progress_comes_with_a_picture_and_the_cancel_button_works(use, folder, monkeypatch):
    import comfy.model_management as mm
    import comfy.utils

    use(folder)
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *a, **k: seen.append(a))
    AnnotatePose.execute(OPENPOSE.file, images=pictures())
    assert seen[-1][0] == seen[-1][1] == FRAMES and seen[-1][2] is not None
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            AnnotatePose.execute(OPENPOSE.file, images=pictures())
    finally:
        mm.interrupt_current_processing(False)
