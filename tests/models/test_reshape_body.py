"""One body's motion with another's shape: rods by formula, performers against the true build."""

import math

import pytest
import torch
from turnaround.models.body import Body
from turnaround.models.body_sources import sample_body
from turnaround.models.performer import load_performers
from turnaround.models.reshape_body import _gradients, _stretches, reshaped

pytestmark = pytest.mark.usefixtures("one_thread")


def rod(length: float, angles: list[float]) -> Body:
    """A square tube along y of eight rings, turned in the picture's plane by so many radians."""
    rings = torch.linspace(-0.5, 0.5, 8)
    ring = 0.1 * torch.tensor([[-1.0, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]])
    rest = torch.cat([ring + torch.tensor([0, float(y), 0]) for y in rings])
    faces = []
    for n in range(7):
        for k in range(4):
            a, b = 4 * n + k, 4 * n + (k + 1) % 4
            faces += [[a, b, a + 4], [b, b + 4, a + 4]]
    scale = torch.tensor([1, length, 1.0])
    frames = []
    for angle in angles:
        c, s = math.cos(angle), math.sin(angle)
        frames.append(rest * scale @ torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]]))
    return Body(torch.stack(frames), torch.tensor(faces), rest)


def test_gradients_fall_into_turn_and_stretch():
    body = rod(1.5, [0.7])
    stretch = _stretches(_gradients(body.rest.double(), body.vertices.double(), body.faces))
    # Along the rod 1.5, around it 1; across a triangle, where nothing is known, the root of 1.5.
    known = torch.tensor([1, 1.5, 1.5**0.5]).double().sort().values
    assert torch.allclose(torch.linalg.eigvalsh(stretch), known.expand(1, 56, 3), atol=1e-5)
    assert torch.allclose(stretch[..., 1, 1], torch.tensor(1.5).double(), atol=1e-5)


def test_a_rod_turns_like_the_one_and_is_as_long_as_the_other():
    short, long = rod(1.0, [0.0, 0.5, 1.2]), rod(1.4, [2.0])
    got = reshaped(short, long).vertices
    truth = rod(1.4, [0.0, 0.5, 1.2]).vertices
    middle = got.mean(1, keepdim=True)
    assert torch.allclose(got - middle, truth, atol=1e-4)
    # It stands on the same ground (y counts downwards), as a clip.
    assert float(got[..., 1].max()) == pytest.approx(float(short.vertices[..., 1].max()), abs=1e-5)


def test_a_mesh_that_is_cut_along_seams_stays_in_one_piece():
    def cut(body: Body) -> Body:
        """Every triangle has vertices of its own."""
        corners = body.faces.flatten()
        faces = torch.arange(len(corners)).view(-1, 3)
        return Body(body.vertices[:, corners], faces, body.rest[corners])

    short, long = rod(1.0, [0.0, 0.5]), rod(1.4, [2.0])
    whole = reshaped(short, long).vertices[:, short.faces.flatten()]
    pieces = reshaped(cut(short), cut(long)).vertices
    assert torch.allclose(whole - whole[:, :1], pieces - pieces[:, :1], atol=1e-4)


def test_a_body_keeps_its_own_shape():
    rods = rod(1.2, [0.0, 0.4])
    assert torch.allclose(reshaped(rods, rods).vertices, rods.vertices, atol=1e-4)


def test_a_performer_dances_with_the_build_of_another():
    times = 1.2 + torch.arange(2) / 4
    body = sample_body("jon", "dance_a", times, 5, 16.0)
    truth = sample_body("iris", "dance_a", times, 5, 16.0).vertices
    reference = sample_body("iris", "walk", torch.tensor([0.3, 0.8]), 5, 16.0)
    result = reshaped(body, reference)
    assert result.frame_count == 2 and torch.equal(result.faces, body.faces)

    def off(vertices):
        return float((vertices - vertices.mean(1, keepdim=True) - truth
                      + truth.mean(1, keepdim=True)).norm(dim=-1).mean())  # fmt: skip

    # 10 cm apart before; what is left is what builds differ by in turns (shoulders, hips).
    assert off(body.vertices) > 0.09 and off(result.vertices) < 0.03
    # Eyes hang in no triangle of the skin, and yet they stay in the head.
    bank = load_performers()
    eyes = bank.faces[bank.tensors["face_is_eye"]].unique()
    gap = torch.cdist(result.vertices[0, eyes], truth[0, eyes]).amin(1)
    spread = (result.vertices[0, eyes].amax(0) - result.vertices[0, eyes].amin(0)).max()
    assert float(spread) < 0.15 and gap.isfinite().all()


def test_other_meshes_are_refused():
    with pytest.raises(ValueError, match="'reference' has 13524 vertices"):
        reshaped(rod(1, [0.0]), sample_body("kira", "walk", torch.tensor([0.3]), 5, 16.0))
