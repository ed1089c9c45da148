"""Latent completion: where it acts, when, and with which noise."""

import pytest
import torch
from turnaround.models.latent_completion import Completion, completed

SHAPE = (3, 4, 2, 5, 6)
MASK = torch.rand(3, 1, 2, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.4


def flow(sigma, noise, x0):
    return sigma * noise + (1 - sigma) * x0


def added(sigma, noise, x0):
    return x0 + sigma * noise


def some(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def completion(until=0.5, seed=7, noise_scaling=flow):
    return Completion(MASK, noise_scaling, until, seed)


@pytest.mark.parametrize("formula", [flow, added])
def test_inside_it_is_the_noised_prediction_and_outside_nothing_changes(formula):
    x_t, x0, noise, sigma = some(1), some(2), some(3), torch.tensor(0.7)
    out, inside = completed(x_t, x0, noise, sigma, MASK, formula), MASK.expand(SHAPE)
    assert torch.equal(out[~inside], x_t[~inside])
    assert torch.equal(out[inside], formula(sigma, noise, x0)[inside])


def test_the_first_step_is_left_alone():
    x_t = some(1)
    assert completion().shown(x_t, torch.tensor(1.0)) is x_t


def test_at_the_next_step_noise_of_its_level_lies_on_the_prediction():
    # Enough cells for the spread of what is left after the prediction to be known to a few percent.
    shape = (3, 64, 2, 5, 6)
    one, x_t, x0, sigma = completion(), some(1, shape), some(2, shape), 0.8
    one.shown(x_t, torch.tensor(1.0))
    one.predicted(x0)
    out, inside = one.shown(x_t, torch.full((3,), sigma)), MASK.expand(shape)
    assert torch.equal(out[~inside], x_t[~inside])
    noise = ((out - (1 - sigma) * x0) / sigma)[inside]
    assert abs(float(noise.std()) - 1) < 0.05 and abs(float(noise.mean())) < 0.05
    assert not torch.allclose(out[inside], x_t[inside])


def run(one, levels=(1.0, 0.9, 0.8, 0.7)):
    shown = []
    for number, level in enumerate(levels):
        shown.append(one.shown(some(10 + number), torch.tensor(level)))
        one.predicted(some(20 + number))
    return shown


def test_noise_is_new_at_every_step():
    one, x0 = completion(until=0.0), torch.zeros(SHAPE)
    one.predicted(x0)
    a, b = (one.shown(some(1), torch.tensor(0.8)) for _ in range(2))
    inside = MASK.expand(SHAPE)
    assert abs(torch.corrcoef(torch.stack([a[inside], b[inside]]))[0, 1]) < 0.15


def test_noise_is_not_the_one_that_the_sampler_began_with():
    one = completion(seed=7, noise_scaling=added)
    one.predicted(torch.zeros(SHAPE))
    out, inside = one.shown(torch.zeros(SHAPE), torch.tensor(1.0)), MASK.expand(SHAPE)
    assert not torch.allclose(out[inside], some(7)[inside])


def test_the_same_seed_gives_the_same_and_reset_begins_anew():
    one = completion()
    first, same, other = run(one), run(completion()), run(completion(seed=8))
    one.reset()
    again = run(one)
    for a, b, c in zip(first, same, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(first[1], other[1])


def test_below_its_last_level_latents_are_left_alone():
    shown = run(completion(until=0.75))
    assert not torch.equal(shown[2], some(12))
    assert torch.equal(shown[3], some(13))


def test_the_samplers_own_latent_and_the_prediction_are_not_written_to():
    one, x_t, x0 = completion(noise_scaling=added), some(1), some(2)
    one.predicted(x0)
    one.shown(x_t, torch.tensor(0.8))
    assert torch.equal(x_t, some(1)) and torch.equal(x0, some(2))


def test_half_precision_stays_so():
    one = completion()
    one.predicted(some(2))
    assert one.shown(some(1).bfloat16(), torch.tensor(0.8)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 6), (3, 4, 1, 5, 6), (3, 4, 2, 6, 6)])
def test_a_latent_of_another_size_gets_a_sentence(shape):
    one = completion()
    one.predicted(some(2, shape))
    with pytest.raises(ValueError, match="3 items of"):
        one.shown(some(1, shape), torch.tensor(0.8))
