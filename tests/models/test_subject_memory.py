"""What a step needs: what was measured, and what makes it more."""

from dataclasses import replace

import pytest
import torch
from turnaround.models.cameras import orbit_rig
from turnaround.models.subject import Shape, Subject, SubjectNet, pictures_of
from turnaround.models.subject_memory import A_PLACE, MARGIN, Backbone, step_bytes
from turnaround.models.subject_training import Settings, SubjectTraining, draw, field_loss

TINY = Backbone(256, 1024, 8, 4)
WORDS_ALONE = Shape(256, (), 64, 0.3)


def of(backbone=TINY, shape=WORDS_ALONE, anew=False, **changes) -> int:
    given = dict(learned=0, pictures=8, targets=2, references=5, tokens=180) | changes
    return step_bytes(backbone, shape, anew=anew, **given)


def test_turnaround_tinys_blocks_need_what_was_measured():
    """43.3 MB of 8 blocks, 86.4 with twice the targets; 3.5 when they are computed anew."""
    one = 43.3e6 / 8
    assert of() == pytest.approx(MARGIN * (43.3e6 + one), rel=0.02)
    assert of(targets=4) == pytest.approx(2 * of(), rel=0.01)
    assert of(anew=True) == pytest.approx(MARGIN * (3.5e6 + one), rel=0.02)


def test_fields_and_features_come_on_top():
    shape = replace(WORDS_ALONE, blocks=(1, 3, 5, 7))
    places = 5 * (24 + 4 * 12) * 2 * 180
    features = 4 * (8 + 4) * 180 * 256 * 4
    assert of(shape=shape) - of() == pytest.approx(MARGIN * (places * A_PLACE + features), rel=1e-3)
    assert of(learned=1000) - of() == 16_000


def test_half_precision_and_smaller_pictures_need_less():
    assert of(replace(TINY, item=2)) == pytest.approx(of() / 2, rel=0.01)
    assert of(tokens=90) == pytest.approx(of() / 2, rel=0.01)


def test_fields_keep_as_much_as_is_counted():
    """All that is held for the gradient of a step's fields, but the weights, at Tiny's sizes."""
    references, h, w, blocks = 5, 6, 5, (1, 3, 5, 7)
    count = references + 2
    angles = torch.arange(count) * (6.28 / count)
    rig = orbit_rig(angles, torch.full((count,), 0.2), 3.0, 0.7, 16 * w, 16 * h)
    shown = torch.ones(count, 3, 16 * h, 16 * w), torch.ones(count, 16 * h, 16 * w)
    pictures = pictures_of(*shown, torch.ones(count, 16, 1, 2 * h, 2 * w), rig)
    net = SubjectNet(Shape(TINY.width, blocks, 64, 0.8))
    training = SubjectTraining(Subject(net, pictures, ()), Settings(1, references=references))
    drawn = draw(training.settings, 0, training.known.T_camera_world)
    read = len(drawn.references)
    features = {i: torch.ones(read, TINY.width, h, w) for i in blocks}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = training.render(features, drawn)
        field_loss(net, found, pictures.select(drawn.targets))
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    held = sum(size for where, (size, _) in kept.items() if where not in weights)
    places = min(read, references) * (24 + 4 * 12) * 2 * h * w
    assert held == pytest.approx(places * A_PLACE, rel=0.1)
