"""Views as latent frames and back, and the same in the real ComfyUI on a tiny random Wan."""

import comfy.sample
import pytest
import torch
from torch import Tensor
from turnaround.nodes.latent_frames import LatentFramesAsViews, ViewsAsLatentFrames

pytestmark = pytest.mark.usefixtures("one_thread")

V, C, h, w = 5, 16, 4, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lined_up(latent: dict, positive=None, negative=None):
    return ViewsAsLatentFrames.execute(latent, positive, negative).args


def apart(latent: dict) -> dict:
    return LatentFramesAsViews.execute(latent).args[0]


def refusal(call) -> str:
    """The sentence with which a call refuses its inputs."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, "not one sentence"
    return text


@pytest.mark.parametrize("mask", [None, (V, h, w), (V, 1, 1, h, w), (1, 1, h, w), (V, 1, h, w)])
def test_round_trip_is_exact(mask):
    latent = {"samples": draw(V, C, 1, h, w), "batch_index": [3, 1, 2, 0, 4], "kept": "this"}
    if mask is not None:
        latent["noise_mask"] = draw(*mask, seed=1).sigmoid()
    clip, _, _, note = lined_up(latent)
    assert clip["samples"].shape == (1, C, V, h, w) and note.startswith("5 views")
    for v in range(V):
        assert torch.equal(clip["samples"][0, :, v], latent["samples"][v, :, 0])
    again = apart(clip)
    assert torch.equal(again["samples"], latent["samples"])
    assert again["kept"] == "this" and "batch_index" not in clip
    if mask is not None:
        assert clip["noise_mask"].shape == (1, 1, V, h, w)
        expected = latent["noise_mask"].reshape(-1, 1, 1, h, w).expand(V, 1, 1, h, w)
        assert torch.equal(again["noise_mask"], expected)


def test_a_mask_of_the_whole_clip_is_every_views():
    mask = draw(1, 1, 1, h, w).sigmoid()
    again = apart({"samples": draw(1, C, V, h, w), "noise_mask": mask})
    assert torch.equal(again["noise_mask"], mask.expand(V, 1, 1, h, w))


def test_what_is_told_of_every_view_goes_along():
    text, pooled = draw(1, 4, 8), draw(1, 8)
    own, for_all = draw(V, 20, 1, h, w, seed=2), draw(1, 4, 1, h, w, seed=3)
    control, references = [draw(V, 32, 1, h, w, seed=4)], [draw(V, C, 1, h, w, seed=5)]
    told = {
        "concat_latent_image": own, "concat_mask": for_all, "vace_frames": control,
        "vace_strength": [1.0], "reference_latents": references, "pooled_output": pooled,
    }  # fmt: skip
    _, positive, negative, _ = lined_up({"samples": draw(V, C, 1, h, w)}, [[text, told]])
    ((same, made),) = positive
    assert negative is None and same is text and made["pooled_output"] is pooled
    assert made["vace_strength"] == [1.0]
    for v in range(V):
        assert torch.equal(made["concat_latent_image"][0, :, v], own[v, :, 0])
        assert torch.equal(made["concat_mask"][0, :, v], for_all[0, :, 0])
        assert torch.equal(made["vace_frames"][0][0, :, v], control[0][v, :, 0])
    assert torch.equal(made["reference_latents"][0], references[0][:1])
    assert told["concat_latent_image"] is own, "the given conditioning stays as it was"


def test_a_clip_of_one_view_is_sampled_as_that_view(wan):
    """Layouts agree where there is nothing to attend to; with more views, they see each other."""

    def run(samples, positive):
        start = draw(*samples.shape, seed=7)
        return comfy.sample.sample(
            wan, start, 2, 1.0, "euler", "simple", positive, [], samples, seed=0, disable_pbar=True
        )

    samples = torch.zeros(V, C, 1, h, w)
    told = [[draw(1, 4, 4096), {"concat_latent_image": draw(V, 32, 1, h, w, seed=3)}]]
    one = [[told[0][0], {"concat_latent_image": told[0][1]["concat_latent_image"][:1]}]]
    clip, positive, *_ = lined_up({"samples": samples[:1]}, one)
    assert torch.equal(run(clip["samples"], positive), run(samples[:1], one))
    clip, positive, *_ = lined_up({"samples": samples}, told)
    together = run(clip["samples"], positive)
    other = [[told[0][0], {"concat_latent_image": told[0][1]["concat_latent_image"].clone()}]]
    other[0][1]["concat_latent_image"][-1] += 1
    changed = run(clip["samples"], lined_up({"samples": samples}, other)[1])
    assert (changed[:, :, 0] - together[:, :, 0]).abs().max() > 1e-3


def test_what_is_no_row_of_views_is_refused():
    text = refusal(lambda: lined_up({"samples": draw(V, C, 3, h, w)}))
    assert "3 latent frames a view" in text
    assert "no frames a view" in refusal(lambda: lined_up({"samples": draw(V, C, h, w)}))
    assert "one clip" in refusal(lambda: apart({"samples": draw(V, C, 1, h, w)}))
    latent = {"samples": draw(V, C, 1, h, w)}
    texts = [[draw(V, 4, 8), {}]]
    assert "'negative' has 5 texts" in refusal(lambda: lined_up(latent, None, texts))
    for shape in ((3, 32, 1, h, w), (1, 32, V, h, w)):
        told = [[draw(1, 4, 8), {"concat_latent_image": draw(*shape)}]]
        text = refusal(lambda told=told: lined_up(latent, told))
        assert "'concat_latent_image' of 'positive'" in text
