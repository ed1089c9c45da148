"""A learned subject inside the real ComfyUI, on a tiny random Wan."""

import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.subject import Shape, Subject, SubjectNet, pictures_of
from turnaround.models.subject_training import Settings, SubjectTraining
from turnaround.nodes import patch, patch_subject
from turnaround.nodes.patch_subject import Once, SubjectWrapper, with_subject
from turnaround.nodes.subject_training import Learning

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, BLOCKS, TEXT = 128, 2, 4096
"""Of the tiny Wan in conftest.py."""
R, V, H, W = 5, 3, 64, 48
LATENT = (16, 1, H // 8, W // 8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ring(count: int, first: float = 0.0):
    angles = first + torch.arange(count) * (2 * math.pi / count)
    return orbit_rig(angles, torch.full((count,), 0.1), 3.0, 0.7, W, H)


@pytest.fixture
def subject():
    with torch.inference_mode(False):
        frames, masks = noise(R, 3, H, W).sigmoid(), torch.ones(R, H, W)
        pictures = pictures_of(frames, masks, noise(R, *LATENT, seed=1), ring(R))
        net = SubjectNet(Shape(DIM, (0, 1), 16, 0.4))
        with torch.no_grad():
            for n, p in enumerate(net.parameters()):
                p.add_(0.05 * noise(*p.shape, seed=n))
        return Subject(net, pictures, ())


def wrapped(model, subject, rig, **more):
    references = model.model.process_latent_in(subject.pictures.latents)
    wrapper = SubjectWrapper(
        "turnaround_subject_0", subject.net, references, Once(subject, rig), **more
    )
    return with_subject(model, wrapper, None), wrapper


def conditioning(seed: int = 20, views: int = V) -> list:
    return [
        [
            noise(1, 4, TEXT, seed=seed),
            {"concat_latent_image": noise(views, 32, *LATENT[1:], seed=3)},
        ]
    ]


def sample(model, rows=slice(None), positive=None, cfg=1.0, negative=None) -> Tensor:
    start = noise(V, *LATENT, seed=7)[rows]
    return comfy.sample.sample(
        model, start, 2, cfg, "euler", "simple", positive or conditioning(), negative or [],
        torch.zeros_like(start), seed=0, disable_pbar=True,
    )  # fmt: skip


def test_an_unlearned_subject_changes_nothing(wan, subject):
    """But for its words, which are empty ones then."""
    subject.net.load_state_dict(SubjectNet(subject.net.shape).state_dict())
    ((text, told),) = conditioning()
    longer = [[torch.cat([text, torch.zeros(1, 4, TEXT)], 1), told]]
    assert torch.equal(sample(wrapped(wan, subject, ring(V))[0]), sample(wan, positive=longer))


def test_every_view_gets_its_own_camera(wan, subject):
    """All together as one by one."""
    rig = ring(V, 0.3)
    together = sample(wrapped(wan, subject, rig)[0])
    for v in range(V):
        ((text, told),) = conditioning()
        own = [[text, {"concat_latent_image": told["concat_latent_image"][v : v + 1]}]]
        alone = sample(wrapped(wan, subject, rig.select([v]))[0], slice(v, v + 1), own)
        torch.testing.assert_close(together[v : v + 1], alone, atol=1e-4, rtol=1e-4)
    turned = sample(wrapped(wan, subject, ring(V, 0.9))[0])
    assert (turned - together).abs().max() > 1e-2


def test_views_may_be_latent_frames(wan, subject):
    """The tokens of frame v get what camera v sees: a block's change is that of views as items."""
    rig = ring(V, 0.3)
    as_items, as_frames = {}, {}
    for found, shape in ((as_items, (V, 16, 1)), (as_frames, (1, 16, V))):
        model, wrapper = wrapped(wan, subject, rig)
        start = torch.zeros(*shape, *LATENT[2:])
        told = [
            [
                noise(1, 4, TEXT),
                {"concat_latent_image": torch.zeros(shape[0], 32, *start.shape[2:])},
            ]
        ]
        comfy.sample.sample(model, start, 1, 1.0, "euler", "simple", told, [], start, seed=0,
                            disable_pbar=True)  # fmt: skip
        found.update(wrapper.render.renderings.features)
    for i in as_items:
        assert torch.equal(as_items[i], as_frames[i])


def test_references_don_t_depend_on_prompt_or_views(wan, subject):
    model, wrapper = wrapped(wan, subject, ring(V))
    sample(model)
    first = {i: f.clone() for i, f in wrapper.features.items()}
    sample(model, positive=conditioning(seed=99), cfg=3.0, negative=conditioning(seed=5))
    for i, f in wrapper.features.items():
        torch.testing.assert_close(f, first[i], atol=1e-5, rtol=1e-5)
    assert first[0].shape == (R, DIM, H // 16, W // 16)


def test_it_acts_in_its_share_of_the_steps_alone(wan, subject):
    never, _ = wrapped(wan, subject, ring(V), sigmas=(0.0, -1.0))
    assert torch.equal(sample(never), sample(wan))


def test_beside_view_sync_and_a_reference(wan, subject, sync):
    """The reference's tokens, in front of the views, are left alone; order doesn't matter."""
    reference = noise(1, *LATENT, seed=40)
    settings = dict(sync=sync, views=V, reference=reference, reference_is_text=False)
    one = wrapped(patch.apply_view_sync(wan, **settings), subject, ring(V))[0]
    other = patch.apply_view_sync(wrapped(wan, subject, ring(V))[0], **settings)
    assert sample(one).isfinite().all()
    assert sample(other).isfinite().all()


@pytest.mark.parametrize(("rig", "problem"), [(4, "has 4 cameras, but 3 views of 1 latent frames")])
def test_another_number_of_cameras_is_refused(wan, subject, rig, problem):
    with pytest.raises(ValueError, match=problem):
        sample(wrapped(wan, subject, ring(rig))[0])


def test_references_are_told_nothing_of_the_views_pictures():
    x, references = torch.ones(2, 16, 6, 4, 8), torch.ones(5, 16, 1, 2, 6)
    told = patch_subject.told_of_references
    assert told(torch.ones(2, 24, 6, 32, 64), x, references).shape == (5, 24, 1, 16, 48)
    assert not told(torch.ones(2, 24, 6, 32, 64), x, references).any()
    assert told(torch.ones(2, 3, 96, 6, 4, 8), x, references).shape == (5, 3, 96, 1, 2, 6)
    text = torch.randn(2, 7, 32)
    assert torch.equal(told(text, x, references), text[:1].expand(5, 7, 32))
    assert told(None, x, references) is None


def test_another_model_is_refused(wan, subject):
    net = SubjectNet(Shape(64, (0, 1), 16, 0.4))
    other = Subject(net, subject.pictures, ())
    with pytest.raises(ValueError, match="learned with a model of width 64 .* width 128 and 2"):
        wrapped(wan, other, ring(V))


def test_learning_lowers_the_loss_and_leaves_the_model_alone(wan, subject):
    """A model that was loaded in inference mode, as nodes load it."""
    before = {k: v.clone() for k, v in wan.model.diffusion_model.state_dict().items()}
    parameters = dict(wan.model.diffusion_model.named_parameters())
    with torch.inference_mode(False), torch.enable_grad():
        fresh = Subject(SubjectNet(subject.net.shape), subject.pictures, ())
        training = SubjectTraining(fresh, Settings(12, targets=1, references=3))
        clean = subject.pictures.latents
        references = wan.model.process_latent_in(clean)
        wrapper = SubjectWrapper("turnaround_subject_0", fresh.net, references, None)
        guider = comfy.samplers.CFGGuider(with_subject(wan, wrapper, None))
        told = [[noise(1, 4, TEXT), {"concat_latent_image": noise(R, 32, *LATENT[1:], seed=3)}]]
        guider.set_conds(told, [])
        guider.set_cfg(1.0)
        guider.sample(torch.zeros_like(clean), clean, Learning(training, wrapper, lambda *_: None),
                      torch.tensor([1.0, 0.0]), seed=0, disable_pbar=True)  # fmt: skip
    assert sum(training.losses[-4:]) < 0.9 * sum(training.losses[:4])
    assert all(p.grad is not None for p in fresh.net.injections.parameters())
    for name, parameter in wan.model.diffusion_model.named_parameters():
        assert parameter is parameters[name] and torch.equal(parameter, before[name])
