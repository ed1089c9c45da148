"""Tuning a decoder whose truth is known, windows against the whole clip, and the file."""

import json
import math

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from turnaround.models.decoder_tuning import (
    LEAD,
    MARGIN,
    Clips,
    Tuning,
    decoding_weights,
    draw_window,
    load_delta,
    low_rank,
    pack_delta,
    save_delta,
    tune_decoder,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CELL = 2
"""Pixels a side of the toy's latent cell."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def toy(weights: dict[str, Tensor], latents: Tensor) -> Tensor:  # [C, t, h, w] -> [f, 3, H, W]
    """Every cell becomes four frames of its pixels, by itself; the first three frames are dropped, as
    video VAEs do. What is right in a window is then right in the whole, to the last bit or two."""
    made = (
        torch.einsum("oc,cthw->othw", weights["decoder"], latents)
        + weights["bias"][:, None, None, None]
    )
    frames = rearrange(made, "(f k a b) t h w -> (t f) k (h a) (w b)", k=3, a=CELL, b=CELL)
    return frames[weights["decoder"].shape[0] // (3 * CELL * CELL) - 1 :]


def truth(per_latent: int = 4) -> dict[str, Tensor]:
    outputs = per_latent * 3 * CELL * CELL
    return {
        "decoder": 0.1 * draw(outputs, 5, seed=1),
        "bias": 0.1 * draw(outputs, seed=2),
        "encoder": draw(7, seed=3),
    }


def clips_of(weights: dict[str, Tensor], V=2, T=6, h=8, w=9) -> Clips:
    latents = draw(V, 5, T, h, w, seed=4)
    return Clips(latents, torch.stack([toy(weights, z) for z in latents]))


SMALL = Tuning(steps=40, rate=1e-2, window=6, moments=4)


@pytest.mark.parametrize("per_latent", [1, 4])
def test_windows_hold_the_frames_that_the_decoder_makes_of_them(per_latent):
    weights = truth(per_latent)
    clips = clips_of(weights)
    assert clips.per_latent == per_latent
    generator, places = torch.Generator().manual_seed(0), torch.zeros(clips.frames.shape)
    for _ in range(400):
        window = draw_window(clips, SMALL, generator)
        frames, rows, columns = window.counts
        made = toy(weights, window.latents)[frames, :, rows, columns]
        torch.testing.assert_close(made, window.frames)
        # They are views of the clip: marking them marks what was looked at.
        offset = window.frames.storage_offset()
        places.as_strided(window.frames.shape, window.frames.stride(), offset).fill_(1.0)
    assert places.all(), "every pixel of every frame is looked at"


def test_what_a_window_cannot_know_does_not_count():
    clips = clips_of(truth())
    generator = torch.Generator().manual_seed(0)
    windows = [draw_window(clips, SMALL, generator) for _ in range(100)]
    frames, rows, columns = zip(*(w.counts for w in windows), strict=True)
    assert {f.start for f in frames} == {0, 4 * (LEAD - 1) + 1}  # from the clip's start or not
    assert {r.start for r in rows} == {0, MARGIN * CELL}
    assert {6 * CELL - c.stop for c in columns} == {0, MARGIN * CELL}


def test_only_what_decodes_is_tuned():
    weights = truth()
    window = draw_window(clips_of(weights), SMALL, torch.Generator().manual_seed(0))
    assert decoding_weights(toy, weights, window) == ["decoder", "bias"]


def test_tuning_finds_the_true_decoder():
    true = truth()
    start = {n: w + 0.05 * draw(*w.shape, seed=9) for n, w in true.items()}
    kept = {n: w.clone() for n, w in start.items()}
    delta, losses = tune_decoder(toy, start, clips_of(true), SMALL)
    assert set(delta) == {"decoder", "bias"}
    assert losses[-1] < 0.15 * losses[0]
    for name, difference in delta.items():
        wanted = true[name] - start[name]
        assert (start[name] + difference - true[name]).norm() < 0.2 * wanted.norm()
    assert all(torch.equal(start[n], kept[n]) for n in start), "what came in is unchanged"


def test_same_seed_same_decoder():
    start = truth()
    clips = clips_of({n: 1.1 * w for n, w in start.items()})
    short = Tuning(steps=5, window=6)
    first, again, other = (tune_decoder(toy, start, clips, short, seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["decoder"], other["decoder"])


def test_progress_comes_with_pictures():
    start, seen = truth(), []
    tune_decoder(
        toy, start, clips_of(start), Tuning(steps=25, window=6), 0, lambda *a: seen.append(a)
    )
    assert [a[:2] for a in seen] == [(n, 25) for n in range(1, 26)]
    shown = [n for n, (*_, picture) in enumerate(seen) if picture is not None]
    assert shown == [0, 20]
    assert seen[0][2].shape[0] == 3 and seen[0][2].shape[2] > seen[0][2].shape[1]


def test_lengths_that_tell_nothing_are_refused():
    with pytest.raises(ValueError, match="8 frames into 3 latent frames.*clip of 7 frames"):
        Clips(torch.zeros(1, 4, 3, 2, 2), torch.zeros(1, 8, 3, 16, 16))


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 4, 3, 3)])
def test_factors_are_the_nearest_of_their_rank(shape):
    """Eckart and Young: what is left are the singular values beyond the rank."""
    weight, rank = draw(*shape), 3
    up, down = low_rank(weight, rank)
    left = weight.flatten(1) - up @ down
    values = torch.linalg.svdvals(weight.flatten(1).double())
    assert float(left.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-5)
    assert float(up.norm()) == pytest.approx(float(down.norm()), rel=1e-4)


def test_factors_that_save_nothing_are_not_made():
    assert low_rank(draw(8), 1) is None  # a bias
    assert low_rank(draw(6, 6), 3) is None
    assert low_rank(draw(60, 60), 0) is None


def test_nothing_changed_is_nothing_still():
    up, down = low_rank(torch.zeros(20, 30), 2)
    assert not (up @ down).any()


def test_file_brings_the_difference_back(tmp_path):
    untuned = {"a": draw(30, 50), "b": draw(7), "encoder": draw(4)}
    delta = {"a": 1e-3 * draw(30, 2, seed=1) @ draw(2, 50, seed=2), "b": 1e-3 * draw(7, seed=3)}
    for rank in (0, 2):
        packed = pack_delta(delta, untuned, rank)
        save_delta(tmp_path / "x.safetensors", packed)
        back = load_delta(tmp_path / "x.safetensors", untuned)
        for name, difference in delta.items():
            # Half precision keeps 11 bits.
            assert (back[name] - difference).norm() < 2**-11 * difference.norm()
        assert packed.kept == pytest.approx(1.0, abs=1e-6)
        assert packed.bytes == 2 * (7 + (30 * 50 if rank == 0 else 2 * (30 + 50)))
        assert (tmp_path / "x.safetensors").stat().st_size < packed.bytes + 1000


def test_share_that_is_kept_is_told():
    delta = {"a": torch.diag(torch.tensor([3.0, 4.0] + 18 * [0.0]))}
    packed = pack_delta(delta, {"a": torch.zeros(20, 20)}, 1)
    assert packed.kept == pytest.approx(16 / 25)


def saved(tmp_path, **changes):
    untuned = {"a": draw(30, 50)}
    packed = pack_delta({"a": 1e-3 * draw(30, 50)}, untuned, 2)
    path = tmp_path / "x.safetensors"
    save_file(
        changes.get("tensors", packed.tensors), path, packed.metadata | changes.get("metadata", {})
    )
    return path, untuned


def test_other_vaes_are_told_apart(tmp_path):
    path, untuned = saved(tmp_path)
    with pytest.raises(ValueError, match=r"another kind of VAE: 'a' is not in this one"):
        load_delta(path, {"b": draw(30, 50)})
    with pytest.raises(ValueError, match=r"'a' is \[30, 50\] there and \[30, 40\] here"):
        load_delta(path, {"a": draw(30, 40)})
    with pytest.raises(ValueError, match="same build but other weights"):
        load_delta(path, {"a": 1.1 * untuned["a"]})
    load_delta(path, {"a": untuned["a"].half()})  # the same, loaded in half precision


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metadata": {"kind": "other"}}, "is no decoder delta"),
        ({"metadata": {"weights": "["}}, "can't be read"),
        ({"metadata": {"weights": "[]"}}, "can't be read"),
        ({"metadata": {"weights": json.dumps({"a": 3})}}, "can't be read"),
        ({"tensors": {"b.diff": torch.zeros(3)}}, "can't be read"),
        ({"tensors": {"a.up": torch.zeros(30, 2), "a.down": torch.zeros(2, 9)}}, "can't be read"),
        ({"tensors": {"a.diff": torch.full((30, 50), math.nan)}}, "can't be read"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(tmp_path, changes, sentence):
    path, untuned = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence):
        load_delta(path, untuned)


def test_broken_files_are_refused_in_a_sentence(tmp_path):
    path, untuned = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="can't be read as a decoder delta"):
        load_delta(path, untuned)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="can't be read as a decoder delta"):
        load_delta(path, untuned)
