"""View sync against plain float64 loops, and what must never mix or change."""

import math

import pytest
import torch
from torch import Tensor
from turnaround.models.tiny.multi_view_dit import wan_rope
from turnaround.models.view_sync import (
    HEAD_DIM,
    MODES,
    Layout,
    SyncLayer,
    ViewSync,
    across_views,
    by_moments,
    extended_attention,
    per_token,
    plain_attention,
    rotate,
    sync_layout,
)

HEADS = 2
DIM = HEADS * HEAD_DIM
CHUNKS, VIEWS, GRID = 2, 3, (2, 2, 2)
T, H, W = GRID
TOKENS = math.prod(GRID)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def random_layer(seed: int = 0) -> SyncLayer:
    """Every weight random, so that none can be forgotten unseen."""
    layer = SyncLayer(DIM)
    for n, (name, weight) in enumerate(layer.named_parameters()):
        weight.copy_(draw(*weight.shape, seed=100 * seed + n) * DIM**-0.5)
        if name.startswith("norm_"):
            weight.add_(1)
    return layer.requires_grad_(False)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [Lq, C], [Lk, C] twice -> [Lq, C]
    """Softmax attention, one head after the other."""
    out = []
    for a, b, c in zip(*(t.split(HEAD_DIM, -1) for t in (q, k, v)), strict=True):
        out.append(torch.softmax(a @ b.T / math.sqrt(HEAD_DIM), -1) @ c)
    return torch.cat(out, -1)


def layout(mode: str = "frame") -> Layout:
    """Of the random tokens; the weights differ, so that each must find its view."""
    weights = torch.tensor([1.0, 0.25, 0.6]) if mode == "weighted" else None
    return Layout(VIEWS, GRID, mode, weights)


def seen_from(mode: str, t: int) -> list[tuple[int, int]]:  # [(view, token)]
    """What a token at latent frame t looks at, by the words of the mode."""
    frame_tokens = H * W
    moments = range(T) if mode == "dense" else [t]
    return [
        (view, moment * frame_tokens + place)
        for view in range(VIEWS)
        for moment in moments
        for place in range(frame_tokens)
    ]


def turn(x: Tensor, pe: Tensor) -> Tensor:  # [C], [64, 2, 2] -> [C]
    """Each pair of neighbouring channels times its 2x2 matrix, the same in every head."""
    return (pe @ x.view(HEADS, -1, 2, 1)).flatten()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def formula(layer: SyncLayer, x: Tensor, vec: Tensor, pe: Tensor, mode: str) -> Tensor:
    """The trained form in float64; `vec` has one row a latent frame, [n V, T, 6, C]."""
    layer = layer.double()
    x, vec, pe = x.double(), vec.double(), pe.double()[0, :, 0]
    out = x.clone()
    for chunk in range(CHUNKS):
        for t in range(T):
            where = seen_from(mode, t)
            rows = [
                layer.modulation[0] + vec[chunk * VIEWS + v, i // (H * W), :3] for v, i in where
            ]
            shift, scale, gate = (torch.stack([r[i] for r in rows]) for i in range(3))
            tokens = torch.stack([x[chunk * VIEWS + v, i] for v, i in where])
            centred = tokens - tokens.mean(-1, keepdim=True)
            y = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            y = y * (1 + scale) + shift
            q, k = (
                torch.stack([turn(row, pe[i]) for row, (_, i) in zip(t_, where, strict=True)])
                for t_ in (
                    rms(layer.q(y), layer.norm_q.weight),
                    rms(layer.k(y), layer.norm_k.weight),
                )
            )
            if mode == "weighted":
                k = torch.stack(
                    [
                        layout(mode).weights[v].double() * row
                        for row, (v, _) in zip(k, where, strict=True)
                    ]
                )
            y = gate * layer.projector(attend(q, k, layer.v(y)))
            for row, (v, i) in zip(y, where, strict=True):
                if i // (H * W) == t:
                    out[chunk * VIEWS + v, i] += row
    layer.float()
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ["one row", "one row of four axes", "a row a frame"])
def test_trained_form_is_the_plain_formula(rows, mode):
    layer, x, pe = random_layer(), draw(CHUNKS * VIEWS, TOKENS, DIM, seed=1), wan_rope(GRID)
    vec = draw(CHUNKS * VIEWS, T if rows == "a row a frame" else 1, 6, DIM, seed=2)
    expected = formula(layer, x, vec.expand(-1, T, -1, -1), pe, mode)
    given = vec[:, 0] if rows == "one row" else vec
    out = layer(x, given, pe, layout(mode))
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_untrained_layer_changes_no_bit():
    layer = SyncLayer(DIM).requires_grad_(False)
    x, vec = draw(VIEWS, TOKENS, DIM), draw(VIEWS, 6, DIM, seed=1)
    assert torch.equal(layer(x, vec, wan_rope(GRID), layout()), x)


def test_permuting_views_permutes_the_trained_result():
    layer, pe = random_layer(), wan_rope(GRID)
    x, vec = draw(VIEWS, TOKENS, DIM), draw(VIEWS, 6, DIM, seed=1)
    order = torch.tensor([2, 0, 1])
    out = layer(x, vec, pe, layout())
    assert not torch.allclose(out[order], out, atol=1e-2)
    torch.testing.assert_close(
        layer(x[order], vec[order], pe, layout()), out[order], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, T, None])
def test_one_moment_after_another_gives_the_same(mode, rows):
    layer, pe = random_layer(), wan_rope(GRID)
    x = draw(CHUNKS * VIEWS, TOKENS, DIM)
    vec = draw(len(x), *([rows] if rows else []), 6, DIM, seed=1)
    expected = layer(x, vec, pe, layout(mode))
    out = by_moments(layer, x, vec, pe, layout(mode))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["trained", "training-free"])
def test_only_the_same_moment_and_chunk_is_seen(form):
    layer, vec = random_layer(), draw(CHUNKS * VIEWS, 6, DIM, seed=1)

    def across(x: Tensor) -> Tensor:
        if form == "trained":
            return layer(x, vec, wan_rope(GRID), layout())
        both = extended_attention(plain_attention, x, x, x, HEADS, layout(), 1.0)
        return 2 * both - plain_attention(x, x, x, HEADS)  # the attention over views alone

    x = draw(CHUNKS * VIEWS, TOKENS, DIM)
    changed = x.clone()
    # View 1 of the first chunk, second latent frame.
    changed[1, H * W :] += draw(H * W, DIM, seed=5)
    difference = (across(changed) - across(x)).abs().amax(-1)
    assert difference[:VIEWS, : H * W].max() < 5e-6
    assert difference[VIEWS:].max() < 5e-6
    assert (difference[:VIEWS, H * W :] > 1e-5).all()


@pytest.mark.parametrize("mode", MODES)
def test_every_token_attends_to_what_its_mode_lets_it_see(mode):
    q, k, v = (draw(CHUNKS * VIEWS, TOKENS, DIM, seed=s) for s in range(3))
    out = across_views(plain_attention, q, k, v, HEADS, layout(mode)).double()
    q, k, v = q.double(), k.double(), v.double()
    for b in range(CHUNKS * VIEWS):
        first = b // VIEWS * VIEWS
        for i in range(TOKENS):
            where = seen_from(mode, i // (H * W))
            scale = [layout(mode).weights[m].item() if mode == "weighted" else 1 for m, _ in where]
            keys = torch.stack(
                [k[first + m, j] * s for (m, j), s in zip(where, scale, strict=True)]
            )
            values = torch.stack([v[first + m, j] for m, j in where])
            expected = attend(q[b, i : i + 1], keys, values)[0]
            torch.testing.assert_close(out[b, i], expected, atol=1e-5, rtol=1e-5)


def test_weights_of_one_are_the_frame_mode():
    q, k, v = (draw(CHUNKS * VIEWS, TOKENS, DIM, seed=s) for s in range(3))
    weighted = Layout(VIEWS, GRID, "weighted", torch.ones(VIEWS))
    out = across_views(plain_attention, q, k, v, HEADS, weighted)
    assert torch.equal(out, across_views(plain_attention, q, k, v, HEADS, layout()))


@pytest.mark.parametrize(
    ("mode", "weights", "said"),
    [
        ("all", None, "got all"),
        ("weighted", None, "each of the 3 views, got none"),
        ("weighted", torch.ones(2), "each of the 3 views, got 2"),
    ],
)
def test_layout_that_can_not_be_is_refused(mode, weights, said):
    with pytest.raises(ValueError, match=said):
        Layout(VIEWS, GRID, mode, weights)


def test_reference_frame_in_front_shares_the_rows_as_comfyui_has_it():
    """Two rows for five tokens: three and two."""
    rows = torch.tensor([[[1.0], [2.0]]])
    assert per_token(rows, 5)[0, :, 0].tolist() == [1, 1, 1, 2, 2]


def test_rotation_multiplies_pairs_as_complex_numbers():
    x, pe = draw(2, TOKENS, HEADS, HEAD_DIM), wan_rope(GRID)
    angle = torch.atan2(pe[0, :, 0, :, 1, 0], pe[0, :, 0, :, 0, 0]).double()
    expected = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    expected = expected * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    out = rotate(x, pe).double()
    torch.testing.assert_close(out, torch.view_as_real(expected).flatten(-2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5])
def test_training_free_form_is_the_plain_formula(strength):
    q, k, v = (draw(CHUNKS * VIEWS, TOKENS, DIM, seed=s) for s in range(3))
    out = extended_attention(plain_attention, q, k, v, HEADS, layout(), strength)
    q, k, v = q.double(), k.double(), v.double()
    for b in range(CHUNKS * VIEWS):
        own = attend(q[b], k[b], v[b])
        views = range(b // VIEWS * VIEWS, (b // VIEWS + 1) * VIEWS)
        for t in range(T):
            moment = slice(t * H * W, (t + 1) * H * W)
            keys, values = (torch.cat([z[i, moment] for i in views]) for z in (k, v))
            across = attend(q[b, moment], keys, values)
            expected = (own[moment] + strength * across) / (1 + strength)
            torch.testing.assert_close(out[b, moment].double(), expected, atol=1e-5, rtol=1e-5)


def test_training_free_form_at_strength_zero_is_plain_attention_to_the_bit():
    q, k, v = (draw(VIEWS, TOKENS, DIM, seed=s) for s in range(3))
    out = extended_attention(plain_attention, q, k, v, HEADS, layout(), 0)
    assert torch.equal(out, plain_attention(q, k, v, HEADS))


def test_permuting_views_permutes_the_training_free_result():
    q, k, v = (draw(VIEWS, TOKENS, DIM, seed=s) for s in range(3))
    order = torch.tensor([1, 2, 0])
    out = extended_attention(plain_attention, q, k, v, HEADS, layout(), 1.0)
    permuted = extended_attention(
        plain_attention, q[order], k[order], v[order], HEADS, layout(), 1.0
    )
    torch.testing.assert_close(permuted, out[order], atol=1e-5, rtol=1e-5)


def test_layout_of_a_sync_file_is_read_from_its_keys():
    sync = ViewSync(DIM, [1, 10, 3], references=[3])
    assert sync_layout(sync.state_dict()) == (DIM, [1, 3, 10], [3])


def test_file_without_sync_weights_is_refused():
    with pytest.raises(ValueError, match="holds no view-sync weights"):
        sync_layout({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)})
