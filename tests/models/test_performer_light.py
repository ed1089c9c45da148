"""Lights and backgrounds of the synthetic performers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from turnaround.models.performer_light import (
    BACKGROUND_KINDS,
    DEFAULT_LIGHTING,
    LIGHT_KINDS,
    LIGHTS,
    Lighting,
    draw_background,
    draw_lighting,
)


def unit_normals(count: int = 200) -> torch.Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_default_light_is_its_formula_to_the_bit():
    normals, colors = unit_normals(), torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    light = torch.full((200, 1), 0.5)
    for *direction, strength in LIGHTS:
        to_light = F.normalize(torch.tensor(direction), dim=0)
        light = light + strength * (normals @ to_light).clamp(min=0)[..., None]
    assert torch.equal(DEFAULT_LIGHTING.shade(colors, normals), (colors * light).clamp(0, 1))


def test_a_light_from_the_left_brightens_what_faces_left():
    left = Lighting(((-1.0, 0.0, 0.0),), (0.4,), ((1.0, 0.5, 0.0),), ambient=(0.2, 0.2, 0.2))
    normals = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]])
    shaded = left.shade(torch.full((2, 3), 0.5), normals)
    # Ambient 0.2 and 0.4 of the light's colour on the left, ambient alone on the right.
    expected = torch.tensor([[0.3, 0.2, 0.1], [0.1, 0.1, 0.1]])
    torch.testing.assert_close(shaded, expected, rtol=0, atol=1e-6)


def test_lights_are_a_function_of_their_seed_and_all_kinds_come():
    assert draw_lighting(5) == draw_lighting(5) != draw_lighting(6)
    assert {draw_lighting(seed).kind for seed in range(40)} == set(LIGHT_KINDS)
    with pytest.raises(ValueError, match="choose one of"):
        draw_lighting(0, "disco")


def test_night_is_darker_and_backlight_darkens_the_front():
    grey, front, back = torch.full((1, 3), 0.5), torch.tensor([[0.0, 0, -1]]), torch.eye(3)[2:]
    for seed in range(10):
        night, studio = (
            draw_lighting(seed, k).shade(grey, front).mean() for k in ("night", "studio")
        )
        assert night < studio
        behind = draw_lighting(seed, "backlit")
        assert behind.shade(grey, front).mean() < behind.shade(grey, back).mean()


@pytest.mark.parametrize("kind", BACKGROUND_KINDS)
@pytest.mark.parametrize("size", [(1, 1), (40, 24), (9, 64)])
def test_backgrounds_are_pictures_of_their_seed(kind, size):
    first, again, other = (
        draw_background(np.random.default_rng(s), *size, kind) for s in (3, 3, 4)
    )
    assert first.shape == (3, *size)
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind == "grey")


def test_night_falls_on_the_background_too():
    night = draw_lighting(1, "night")
    dark = draw_background(np.random.default_rng(0), 8, 8, "grey", lighting=night)
    expected = torch.tensor(night.ambient) * night.exposure  # 0.5 grey under ambient over 0.5
    torch.testing.assert_close(dark[:, 0, 0], expected)
    plain = draw_background(np.random.default_rng(0), 8, 8, "grey", lighting=DEFAULT_LIGHTING)
    assert (plain == 0.5).all()
