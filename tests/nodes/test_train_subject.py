"""Learning a subject in the real ComfyUI, with tiny random models and Turnaround-Tiny's VAE."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import small_checkpoints as small
import torch
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.subject import save_subject
from turnaround.models.views import Views
from turnaround.nodes import embedded, subject_files, subject_training, train_subject
from turnaround.nodes import run as run_module
from turnaround.nodes.subject_files import LoadSubject, SaveSubject
from turnaround.nodes.subject_inputs import told
from turnaround.nodes.subject_lora import with_lora
from turnaround.nodes.subject_training import (
    LearningBlock,
    RecomputedBlock,
    learnable_through,
    of_items,
)
from turnaround.nodes.train_subject import TrainSubject

pytestmark = pytest.mark.usefixtures("one_thread")

R, W, H = 6, 32, 48
SETTINGS = dict(
    steps=3, learning_rate=6e-3, blocks="all", resolution=48, words=2, lora_rank=0, targets=2,
    views_as="items", frame=0, training_seed=0, filename_prefix="subjects/truck",
)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ring(count: int, width: int = W, height: int = H) -> Rig:
    angles = torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.full((count,), 0.1), 3.0, 0.7, width, height)


def pictures(count: int = R, width: int = W, height: int = H) -> tuple[torch.Tensor, torch.Tensor]:
    """A coloured block on grey: [R, 3, H, W] and masks."""
    frames, masks = torch.full((count, 3, height, width), 0.5), torch.zeros(count, height, width)
    inside = slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4)
    masks[:, *inside] = 1
    colors = 0.5 + 0.4 * noise(count, 3, 1, 1).sign()
    frames[:, :, *inside] = colors.expand(-1, -1, height, width)[:, :, *inside]
    return frames, masks


def views(count: int = R, **changes) -> Views:
    frames, masks = pictures(count)
    return replace(Views(frames[:, None], masks[:, None], ring(count)), **changes)


@pytest.fixture(scope="module")
def vae():
    path = embedded.TINY / "vae" / "turnaround_tiny_vae.safetensors"
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch, caplog) -> Path:
    """Nodes have an id, as in a run; ComfyUI's output folder is an empty one."""
    caplog.set_level(logging.INFO, logger="turnaround")
    hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None)
    for node in (TrainSubject, SaveSubject, LoadSubject):
        monkeypatch.setattr(node, "hidden", hidden)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    there = ([str(tmp_path / "subjects")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, embedded.SUBJECTS, there)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    # One look, quickly; a test of its own has all of them.
    for module, name in ((train_subject, "SHOWN"), (train_subject, "DETAIL_AT_END"),
                         (subject_training, "EULER_STEPS")):  # fmt: skip
        monkeypatch.setattr(module, name, 1)
    return tmp_path / "subjects"


def train(model, vae, **changes):
    changes.setdefault("views", views() if "images" not in changes else None)
    return TrainSubject.execute(model, vae, **{**SETTINGS, **changes}).args


def same(a, b) -> bool:
    """Of two subjects, all that was learned."""
    pairs = zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True)
    return a.losses == b.losses and all(torch.equal(x, y) for x, y in pairs)


class Untouched:
    """A model whose weights, patches and hooks must be what they were."""

    def __init__(self, model) -> None:
        self.model, dit = model, model.model.diffusion_model
        self.parameters = {k: (p, p.clone()) for k, p in dit.named_parameters()}

    def check(self) -> None:
        dit = self.model.model.diffusion_model
        for name, parameter in dit.named_parameters():
            before, values = self.parameters[name]
            assert parameter is before and torch.equal(parameter.float(), values.float()), name
        assert not any(m._forward_hooks for m in dit.modules())
        assert not self.model.wrappers and not self.model.patches
        assert "patches_replace" not in self.model.model_options["transformer_options"]


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


def test_pictures_become_a_subject_and_the_model_stays(wan, vae, output, monkeypatch):
    monkeypatch.setattr(train_subject, "SHOWN", 4)
    monkeypatch.setattr(train_subject, "DETAIL_AT_END", 2)
    before = Untouched(wan)
    subject, loss, shown, note = train(wan, vae)
    before.check()
    assert len(loss["loss"]) == 3 and all(math.isfinite(x) for x in loss["loss"])
    assert subject.losses == tuple(loss["loss"]) and subject.net.shape.blocks == (0, 1)
    assert len(subject.pictures) == R and subject.pictures.latents.shape == (
        R,
        16,
        1,
        H // 8,
        W // 8,
    )
    # A given picture, what the fields see and what is sampled, from four cameras.
    assert shown.shape == (4, H, 3 * W, 3) and shown.isfinite().all()
    assert f"{R} pictures of {W}x{H}, 3 steps" in note and "left out" not in note
    assert not list(output.glob("*"))  # the checkpoint is gone
    assert not any(p.requires_grad for p in subject.net.parameters())


def test_it_learns(wan, vae):
    losses = train(wan, vae, steps=25, targets=1)[1]["loss"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["fields", "lora"])
def test_what_was_stopped_goes_on_to_the_same_end(wan, vae, output, monkeypatch, changes):
    whole, *_ = train(wan, vae, **changes)
    before = Untouched(wan)
    with monkeypatch.context() as during:
        stop_at(during, 2)
        with pytest.raises(mm.InterruptProcessingException):
            train(wan, vae, **changes)
    before.check()
    (file,) = output.glob("*")
    assert file.name == "truck_00001_checkpoint.safetensors"
    stopped, note = LoadSubject.execute(file.name).args
    assert len(stopped.losses) == 2 and "training can go on" in note
    kept = {k: v.clone() for k, v in stopped.net.state_dict().items()}
    # Without the pictures, and with them.
    for more in ({"views": None}, {"views": views()}):
        again, _, _, note = train(wan, vae, subject=stopped, **more, **changes)
        assert same(again, whole)
        assert "1 steps in" in note
    assert all(torch.equal(stopped.net.state_dict()[k], v) for k, v in kept.items())


def test_an_error_loses_nothing_and_leaves_the_model(wan, vae, output, monkeypatch):
    before = Untouched(wan)
    stop_at(monkeypatch, 1, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        train(wan, vae, lora_rank=2)
    before.check()
    (file,) = output.glob("*")
    assert len(LoadSubject.execute(file.name).args[0].losses) == 1


def test_when_the_last_pictures_fail_what_was_learned_is_there(wan, vae, output, monkeypatch):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as during:
        during.setattr(train_subject, "decode_views", fails)
        with pytest.raises(ValueError, match="Learning ran out of memory: lower 'targets'"):
            train(wan, vae)
    (file,) = output.glob("*")
    assert len(LoadSubject.execute(file.name).args[0].losses) == 3


def test_saved_and_loaded_it_is_the_same(wan, vae, output):
    subject, *_ = train(wan, vae)
    (note,) = SaveSubject.execute(subject, "subjects/truck", True).args
    assert "output/subjects/truck_00001_.safetensors" in note
    assert subject_files.subject_files() == ["truck_00001_.safetensors"]
    again, _ = LoadSubject.execute("truck_00001_.safetensors").args
    assert same(again, subject)
    assert all(torch.equal(again.training[k], v) for k, v in subject.training.items())
    SaveSubject.execute(subject, "subjects/truck", False)
    less = LoadSubject.execute("truck_00002_.safetensors").args[0]
    assert same(less, subject) and not less.training
    sizes = [f.stat().st_size for f in sorted(output.glob("*"))]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize(
    "changes",
    [{"views_as": "latent frames"}, {"words": 0}, {"blocks": "every second"}, {"targets": 9},
     {"views_as": "latent frames", "lora_rank": 2}],
    ids=lambda c: ", ".join(f"{k} {v}" for k, v in c.items()),
)  # fmt: skip
def test_other_settings_learn_too(wan, vae, changes):
    before = Untouched(wan)
    subject, _, shown, _ = train(wan, vae, steps=2, **changes)
    before.check()
    assert all(math.isfinite(x) for x in subject.losses) and shown.isfinite().all()
    if "lora_rank" in changes:
        assert bool(subject.net.lora.up.any())


def test_views_as_latent_frames_are_denoised_as_one_item():
    class Cond:
        def __init__(self, cond):
            self.cond = cond

        _copy_with = property(lambda self: type(self))

    conds = [{"model_conds": {
        "c_concat": Cond(torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 2, 1, 3, 4)),
        "vace_context": Cond(torch.zeros(1, 1, 96, 1, 3, 4)),
        "c_crossattn": Cond(torch.zeros(1, 7, 8)),
    }}]  # fmt: skip
    (told_of,) = of_items(conds, [3, 1], 5, as_frames=True)
    shapes = {k: tuple(c.cond.shape) for k, c in told_of["model_conds"].items()}
    assert shapes == {
        "c_concat": (1, 2, 2, 3, 4), "vace_context": (1, 1, 96, 2, 3, 4), "c_crossattn": (1, 7, 8),
    }  # fmt: skip
    assert told_of["model_conds"]["c_concat"].cond[0, 0, :, 0, 0].tolist() == [3, 1]


def test_a_lora_as_patches_is_the_lora_as_hooks(wan, vae):
    subject, *_ = train(wan, vae, lora_rank=2, steps=1)
    lora = subject.net.lora
    with torch.inference_mode(False), torch.no_grad():
        lora.up.copy_(0.2 * noise(*lora.up.shape, seed=4))
    start = noise(1, 16, 1, H // 8, W // 8, seed=7)
    positive = [[noise(1, 4, 4096), {"concat_latent_image": noise(1, 32, 1, H // 8, W // 8)}]]

    def sample(model):
        return comfy.sample.sample(
            model, start, 2, 1.0, "euler", "simple", positive, [], torch.zeros_like(start), seed=0,
            disable_pbar=True,
        )  # fmt: skip

    plain = sample(wan)
    with lora.in_place(wan.model.diffusion_model.blocks):
        hooked = sample(wan)
    patched = sample(with_lora(wan, subject.net))
    torch.testing.assert_close(patched, hooked, atol=1e-4, rtol=1e-4)
    assert (patched - plain).abs().max() > 1e-2
    assert torch.equal(sample(wan), plain)


def test_blocks_computed_anew_give_the_same_gradient(wan):
    """A block of the model, its text and its tokens."""
    with torch.inference_mode(False), torch.enable_grad():
        weight = noise(8, 8).requires_grad_()
        args = {"img": noise(2, 3, 8, seed=1).requires_grad_(), "txt": noise(2, 4, 8, seed=2)}

        def block(args):
            return {"img": (args["img"] @ weight).tanh() + args["txt"].mean(1, keepdim=True)}

        anew = RecomputedBlock(0, None, None, "key")
        found = []
        for out in (block(args), anew(args, {"original_block": block})):
            weight.grad = None
            out["img"].square().sum().backward()
            found.append((out["img"].detach(), weight.grad.clone()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_where_memory_is_short_blocks_are_computed_anew_to_the_same_losses(wan, vae, monkeypatch):
    plain, *_ = train(wan, vae)
    monkeypatch.setattr(train_subject, "PLENTY", 0.0)
    used = []
    monkeypatch.setattr(
        RecomputedBlock, "_kept",
        lambda self, *a, kept=RecomputedBlock._kept: used.append(1) or kept(self, *a),
    )  # fmt: skip
    anew, *_ = train(wan, vae)
    assert used and anew.losses[0] == plain.losses[0]
    # Adam's first steps take the sign of each gradient: a last digit may turn some.
    assert anew.losses == pytest.approx(plain.losses, rel=0.01)


def test_a_step_that_does_not_fit_is_one_sentence_before_it_begins(wan, vae, output, monkeypatch):
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 1000)
    with pytest.raises(ValueError, match="learning needs about .* GB beside the model, but 0.0 GB"):
        train(wan, vae)
    assert not list(output.glob("*"))


def test_the_cancel_button_is_heard_on_the_way_back(wan):
    """Of a step, half the time and more."""
    with torch.inference_mode(False), torch.enable_grad():
        x = noise(2, 3, 8).requires_grad_()
        block = LearningBlock(0, None, None, "key")
        out = block({"img": x}, {"original_block": lambda args: {"img": args["img"] * 2}})
        mm.interrupt_current_processing()
        with pytest.raises(mm.InterruptProcessingException):
            out["img"].sum().backward()


# --- what is connected ----------------------------------------------------------------------------


def clip(count: int = R, width: int = W, height: int = H) -> dict:
    frames, masks = pictures(count, width, height)
    return {"images": frames.movedim(1, -1), "masks": masks}


def test_a_clip_without_cameras_is_one_even_turn(wan, vae):
    subject, _, _, note = train(wan, vae, **clip())
    assert "no cameras are connected, so one even turn" in note and "Turntable Rig" in note
    step = subject.pictures.rig.azimuths.diff().remainder(2 * math.pi)
    torch.testing.assert_close(step, torch.full((R - 1,), 2 * math.pi / R), atol=1e-4, rtol=0)


def test_a_clip_as_one_view_is_the_same(wan, vae):
    frames, masks = pictures()
    one, *_ = train(wan, vae, steps=1, **clip())
    other, *_ = train(wan, vae, steps=1, views=Views(frames[None], masks[None]))
    assert same(one, other)


def test_a_plain_background_needs_no_masks(wan, vae):
    note = train(wan, vae, steps=1, images=clip()["images"])[3]
    assert "masks were guessed from a plain background" in note


def test_a_rig_on_the_socket_counts_before_that_of_the_views(wan, vae):
    rig = replace(ring(R), K=1.1 * ring(R).K)
    rig.K[:, 2, 2] = 1
    subject, *_ = train(wan, vae, steps=1, rig=rig)
    torch.testing.assert_close(subject.pictures.rig.K, rig.K)


def test_pictures_are_made_smaller_with_their_rig(wan, vae):
    big = clip(R, 200, 300)
    subject, *_ = train(wan, vae, steps=1, rig=ring(R, 200, 300), **big)
    rig = subject.pictures.rig
    assert (rig.width, rig.height) == (32, 48)
    torch.testing.assert_close(rig.K, ring(R).K, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("with_rig", [True, False])
def test_of_two_hundred_pictures_thirty_are_used(wan, vae, with_rig):
    frames, masks = pictures(200, 32, 32)
    rig = {"rig": ring(200, 32, 32)} if with_rig else {}
    subject, _, _, note = train(wan, vae, steps=1, images=frames.movedim(1, -1), masks=masks, **rig)
    assert len(subject.pictures) == 30 and "30 of 200 are used, evenly chosen" in note
    turned = subject.pictures.rig.azimuths.diff().remainder(2 * math.pi)
    assert float(turned.max()) < 2.1 * 2 * math.pi / 30 / 2 * 1.2


def test_pictures_without_the_subject_are_left_out_by_number(wan, vae):
    given = clip()
    given["masks"][2] = 0
    note = train(wan, vae, steps=1, **given)[3]
    assert "left out: picture 3 without the subject" in note and "5 pictures of" in note


def test_moments_of_views_are_chosen_by_frame(wan, vae):
    frames, masks = pictures()
    two = Views(
        torch.stack([torch.zeros_like(frames), frames], 1), torch.stack([masks, masks], 1), ring(R)
    )
    one, *_ = train(wan, vae, steps=1)
    other, *_ = train(wan, vae, steps=1, views=two, frame=1)
    assert same(one, other)
    with pytest.raises(ValueError, match="'frame' is 2, but 'views' have 2 frames: use 0 to 1"):
        train(wan, vae, views=two, frame=2)


def looking_away(count: int) -> Rig:
    rig = ring(count)
    T = rig.T_camera_world.clone()
    T[:, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0])) @ T[:, :3]
    return replace(rig, T_camera_world=T)


def textured(count: int = R) -> torch.Tensor:
    return noise(count, H, W, 3, seed=5).sigmoid()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"views": None}, "Connect either 'views' or 'images', none of them is connected"),
        ({"images": textured(), "views": views()}, "Connect either .* both are connected"),
        (clip(1), "'images' has one picture, and one shows nothing of depth"),
        ({"views": views(1)}, "'views' has one picture"),
        ({**clip(), "masks": torch.zeros(R, H, W)}, "show the subject in 0 of 6 pictures"),
        ({**clip(), "masks": torch.ones(R, H, W)}, "white in all corners .* put Invert Mask"),
        ({**clip(), "masks": torch.zeros(4, H, W)}, "'masks' has 4 masks but 'images' 6 pictures"),
        ({**clip(), "masks": torch.zeros(R, 9, 9)}, "'masks' are 9x9 but the pictures of 'images'"),
        ({**clip(), "rig": ring(5)}, "'rig' has 5 cameras but 'images' 6 pictures"),
        ({**clip(), "rig": ring(R, 80, 64)}, "'rig' is for pictures of 80x64 .* another shape"),
        ({**clip(), "rig": looking_away(R)}, "cameras of 'images' don't look at a common place"),
        ({"images": textured()}, "'images' has no masks, .* Human Geometry"),
        ({"images": textured() * torch.nan}, "'images' hold NaN or infinity"),
        ({**clip(), "masks": torch.full((R, H, W), torch.nan)}, "masks of 'images' hold NaN"),
        ({"views": Views(torch.ones(R, 1, 1, H, W))}, "'views' hold depth, not colours"),
        ({"filename_prefix": "../she"}, "files go only below ComfyUI's output folder"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_input_is_one_sentence(wan, vae, output, changes, problem):
    with pytest.raises(ValueError, match=problem):
        train(wan, vae, **changes)
    assert not list(output.glob("*"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"words": 3}, "blocks 0, 1, 2 words and a LoRA of rank 0, but the settings ask for .* 3 words"),
        ({"lora_rank": 4}, "the settings ask for .* rank 4: set 'blocks', 'words'"),
        ({"views": views(5)}, "learned from other pictures .6 of 32x48. than those of 'views' .5 of"),
        (clip(), "learned from other pictures"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_going_on_with_something_else_is_one_sentence(wan, vae, changes, problem):
    subject, *_ = train(wan, vae, steps=1)
    with pytest.raises(ValueError, match=problem):
        train(wan, vae, subject=subject, **changes)


def test_going_on_with_a_model_of_another_width_is_one_sentence(wan, vae, output):
    subject, *_ = train(wan, vae, steps=1)
    net = type(subject.net)(replace(subject.net.shape, width=64))
    output.mkdir(exist_ok=True)
    save_subject(output / "other.safetensors", replace(subject, net=net, training={}))
    other, note = LoadSubject.execute("other.safetensors").args
    assert "for a model of width 64" in note
    with pytest.raises(ValueError, match="learned with a model of width 64, but 'model' has width"):
        train(wan, vae, subject=other, views=None)


def test_steps_that_are_done_already_are_told(wan, vae):
    subject, *_ = train(wan, vae)
    again, _, shown, note = train(wan, vae, subject=subject, views=None)
    assert same(again, subject) and "raise 'steps' to go on" in note
    assert shown.shape == (1, H, 3 * W, 3)


def test_other_files_are_refused(output):
    output.mkdir(exist_ok=True)
    (output / "broken.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"'broken\.safetensors' can't be read as a subject"):
        LoadSubject.execute("broken.safetensors")
    with pytest.raises(ValueError, match="'name' is '../x', but neither"):
        LoadSubject.execute("../x")


# --- what the model is told -----------------------------------------------------------------------

KINDS = {
    "t2v": dict(kind="t2v"),
    "vace": dict(kind="vace", vace_layers=2, vace_in_dim=96),
    "i2v 2.1": dict(kind="i2v", in_dim=36),
    "i2v 2.2": dict(kind="t2v", in_dim=36),
    "fun-control 2.1": dict(kind="i2v", in_dim=48, in_dim_ref_conv=16),
    "fun-control 2.2": dict(kind="t2v", in_dim=52, in_dim_ref_conv=16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views_as", ["items", "latent frames"])
def test_every_kind_of_wan_learns(vae, kind, views_as):
    model = comfy.sd.load_diffusion_model_state_dict(small.transformer(**KINDS[kind]))
    before = Untouched(model)
    positive = [[noise(1, 5, 4096, seed=3), {}]]
    subject, _, shown, note = train(model, vae, steps=1, positive=positive, views_as=views_as)
    before.check()
    assert math.isfinite(subject.losses[0]) and shown.isfinite().all() and "no text" not in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_models_of_low_precision_learn_what_precise_ones_learn(
    wan, wan_weights, vae, dtype, lora_rank
):
    """The steps' first loss: the field's part and the model's."""
    model = comfy.sd.load_diffusion_model_state_dict(wan_weights(), {"dtype": dtype})
    assert next(model.model.diffusion_model.blocks.parameters()).dtype == dtype
    before = Untouched(model)
    subject, *_ = train(model, vae, steps=2, lora_rank=lora_rank)
    before.check()
    precise, *_ = train(wan, vae, steps=2, lora_rank=lora_rank)
    assert subject.losses[0] == pytest.approx(precise.losses[0], rel=0.05)
    assert all(bool(p.isfinite().all()) for p in subject.net.parameters())


def test_packed_weights_are_one_sentence_and_come_back():
    class Packed(torch.Tensor):
        pass

    layer = torch.nn.Linear(3, 3)
    weight, layer.bias = layer.weight, torch.nn.Parameter(torch.zeros(3).as_subclass(Packed))
    refused = pytest.raises(ValueError, match="'model' has packed weights .such as GGUF.")
    with refused, learnable_through(layer):
        pass
    assert layer.weight is weight


def test_a_text_model_without_text_is_told(vae):
    model = comfy.sd.load_diffusion_model_state_dict(small.transformer("t2v"))
    assert "no text is connected" in train(model, vae, steps=1)[3]


def test_turnarounds_models_know_nothing_as_they_were_trained_to(wan, vae):
    subject, *_ = train(wan, vae, steps=1)
    ((_, values),), _ = told(wan, vae, None, subject.pictures)
    colors, normals = values["concat_latent_image"].split(16, 1)
    grey = vae.encode(torch.full((1, H, W, 3), 0.5))
    torch.testing.assert_close(colors, grey, atol=1e-5, rtol=1e-5)
    assert torch.equal(normals, colors)


def test_a_model_and_a_vae_of_other_latents_are_one_sentence(wan, vae):
    model = comfy.sd.load_diffusion_model_state_dict(
        small.transformer("t2v", in_dim=48, out_dim=48)
    )
    with pytest.raises(
        ValueError, match="'vae' makes latents of 16 channels, but 'model' works on 48"
    ):
        train(model, vae)
    with pytest.raises(ValueError, match="'vae' makes latents of 48 channels, but subjects"):
        train(wan, small.loaded_large_vae())


def test_conditions_of_another_size_are_one_sentence(wan, vae):
    told_of = {"concat_latent_image": noise(R, 32, 1, 3, 3)}
    with pytest.raises(ValueError, match="view conditions of 'positive' are for 6 views"):
        train(wan, vae, positive=[[noise(1, 5, 4096), told_of]])


def test_looking_takes_at_most_a_share_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train_subject.time, "monotonic", lambda: now[0])
    looking = train_subject.Sometimes(0.1, at_least=1.0)
    assert not looking.due()
    now[0] = 1.0
    assert looking.due()
    with looking.taken():
        now[0] += 2.0
    now[0] += 19.0
    assert not looking.due()
    now[0] += 1.0
    assert looking.due()
