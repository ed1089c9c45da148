"""Other people's sync weights: files of every layout against the published formulas in loops."""

import cmath
import math

import pytest
import safetensors.torch
import torch
from torch import Tensor
from turnaround.models.cameras import orbit_rig
from turnaround.models.sync_layouts import build, camera_numbers, check_name, of_others
from turnaround.models.view_sync import Layout, ViewSync

DIM, BLOCKS = 128, (0, 1)
CHUNKS, VIEWS, GRID = 2, 3, (2, 2, 3)
T, H, W = GRID
TOKENS = math.prod(GRID)
LAYOUTS = {
    # name, attention, has a projector and a camera encoder
    "syncammaster": ("mvs_attn", True),
    "4danyone": ("self_attn_mvs", False),
    "4danyone_cameras": ("self_attn_mvs", True),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sync_weights(kind: str, dim: int = DIM, blocks=BLOCKS, prefix: str = "") -> dict[str, Tensor]:
    """A file's sync weights, random, of a size that keeps signals near 1."""
    attention, cameras = LAYOUTS[kind]
    shapes = {f"{attention}.{n}.weight": (dim, dim) for n in "qkvo"}
    shapes |= {f"{attention}.{n}.bias": (dim,) for n in "qkvo"}
    shapes |= {f"{attention}.norm_{n}.weight": (dim,) for n in "qk"}
    shapes["modulation_mvs"] = (1, 3, dim)
    if cameras:
        shapes |= {"projector.weight": (dim, dim), "projector.bias": (dim,)}
        shapes |= {"cam_encoder.weight": (dim, 12), "cam_encoder.bias": (dim,)}
    weights = {}
    for block in blocks:
        for n, (name, shape) in enumerate(shapes.items()):
            value = draw(*shape, seed=100 * block + n) * shape[-1] ** -0.5
            # Sharp queries and keys, so that where a token sits decides what it sees.
            weights[f"{prefix}blocks.{block}.{name}"] = value + 2 if "norm_" in name else value
    return weights


BASE = {
    "blocks.0.self_attn.q.weight": draw(4, 4),
    "blocks.0.modulation": draw(1, 6, 4),
    "patch_embedding.weight": draw(4, 4),
}


@pytest.fixture
def saved(tmp_path):
    """Weights that went through a file."""

    def of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        safetensors.torch.save_file(weights, tmp_path / "sync.safetensors")
        return safetensors.torch.load_file(tmp_path / "sync.safetensors")

    return of


def cameras(views: int = VIEWS) -> Tensor:
    azimuths = 0.3 + 1.1 * torch.arange(views)
    rig = orbit_rig(azimuths, torch.full((views,), 0.2), 3.0, math.radians(50), 64, 64)
    return rig.T_camera_world


def layout(**changes) -> Layout:
    values = {"views": VIEWS, "grid": GRID, "cameras": cameras(), "numbers": torch.arange(VIEWS)}
    return Layout(**(values | changes))


def inputs(dim: int = DIM) -> tuple[Tensor, Tensor]:  # tokens, modulation of every latent frame
    return draw(CHUNKS * VIEWS, TOKENS, dim, seed=5), draw(CHUNKS * VIEWS, T, 6, dim, seed=6)


NO_PE = torch.empty(0)

# The published formulas in float64, token by token.


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def twelve(poses: list[Tensor], first: int) -> list[Tensor]:
    """Position and axes of each camera in the frame of the first, rows of [R | t / 2 m]."""
    out = []
    for T_camera_world in poses:
        relative = poses[first] @ torch.linalg.inv(T_camera_world)
        relative[:3, 3] /= 2
        out.append(relative[:3].reshape(12))
    return out


def turn(x: Tensor, place: tuple[int, int, int]) -> Tensor:  # [128] -> [128], one head
    angles = [
        position / 10000 ** (2 * i / channels)
        for position, channels in zip(place, (44, 42, 42), strict=True)
        for i in range(channels // 2)
    ]
    out = []
    for i, angle in enumerate(angles):
        pair = complex(x[2 * i], x[2 * i + 1]) * cmath.exp(1j * angle)
        out += [pair.real, pair.imag]
    return torch.tensor(out, dtype=torch.float64)


def attend(weights, name: str, y: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
    """[N, C] tokens that all see each other."""

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q = rms(linear(weights, f"{name}.q", y), weights[f"{name}.norm_q.weight"])
    k = rms(linear(weights, f"{name}.k", y), weights[f"{name}.norm_k.weight"])
    v = linear(weights, f"{name}.v", y)
    heads = []
    for a, b, c in zip(*(x.split(128, -1) for x in (q, k, v)), strict=True):
        a, b = (torch.stack([turn(*pair) for pair in zip(x, places, strict=True)]) for x in (a, b))
        heads.append(torch.softmax(a @ b.T / math.sqrt(128), -1) @ c)
    return linear(weights, f"{name}.o", torch.cat(heads, -1))


def formula(weights, block: int, x: Tensor, vec: Tensor, poses: Tensor, numbers: list[int]):
    """`vec` has one row a latent frame."""
    start = f"blocks.{block}."
    w = {k.removeprefix(start): v.double() for k, v in weights.items() if k.startswith(start)}
    name = "mvs_attn" if "mvs_attn.q.weight" in w else "self_attn_mvs"
    x, vec = x.double(), vec.double()
    told = twelve(list(poses.double()), numbers.index(min(numbers)))
    out = x.clone()
    for chunk in range(len(x) // VIEWS):
        for t in range(T):
            tokens, gates, where, places = [], [], [], []
            for view in range(VIEWS):
                item = chunk * VIEWS + view
                shift, scale, gate = w["modulation_mvs"][0] + vec[item, t, :3]
                for row in range(H):
                    for column in range(W):
                        token = (t * H + row) * W + column
                        y = x[item, token]
                        y = (y - y.mean()) / (y.var(correction=0) + 1e-6).sqrt()
                        y = y * (1 + scale) + shift
                        if "cam_encoder.weight" in w:
                            y = y + linear(w, "cam_encoder", told[view])
                        tokens.append(y)
                        gates.append(gate)
                        where.append((item, token))
                        places.append((numbers[view], row, column))
            change = attend(w, name, torch.stack(tokens), places)
            if "projector.weight" in w:
                change = linear(w, "projector", change)
            for place, gate, value in zip(where, gates, change, strict=True):
                out[place] += gate * value
    return out


@pytest.mark.parametrize(
    "kind, dim", [("syncammaster", 256), ("4danyone", 128), ("4danyone_cameras", 128)]
)
def test_layer_is_the_published_formula(saved, kind, dim):
    weights = saved(sync_weights(kind, dim) | BASE)
    sync = build(weights).requires_grad_(False)
    x, vec = inputs(dim)
    numbers = [2, 0, 5]
    given = layout(numbers=torch.tensor(numbers))
    result = sync.blocks["1"](x, vec, NO_PE, given)
    expected = formula(weights, 1, x, vec, given.cameras, numbers)
    assert (expected - x).abs().mean() > 0.3  # the change is no detail
    # float32 against float64 through six products of 128 to 256 terms of size 1.
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def test_one_row_for_all_frames_is_the_same_row_in_each():
    layer = build(sync_weights("syncammaster")).blocks["0"].requires_grad_(False)
    x, vec = inputs()
    one = layer(x, vec[:, 0], NO_PE, layout())
    each = layer(x, vec[:, :1].expand(-1, T, -1, -1), NO_PE, layout())
    assert torch.equal(one, each)
    assert not torch.equal(one, layer(x, vec, NO_PE, layout()))


def test_zero_projector_changes_nothing():
    weights = sync_weights("syncammaster")
    for part in ("weight", "bias"):
        weights[f"blocks.0.projector.{part}"].zero_()
    x, vec = inputs()
    assert torch.equal(build(weights).blocks["0"](x, vec, NO_PE, layout()), x)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_order_of_views_does_not_matter(kind):
    layer = build(sync_weights(kind)).blocks["0"].requires_grad_(False)
    x, vec = inputs()
    order = torch.tensor([2, 0, 1])
    both = torch.cat([order, VIEWS + order])
    given = layout(numbers=torch.tensor([4, 1, 3]))
    shuffled = layout(cameras=given.cameras[order], numbers=given.numbers[order])
    result = layer(x[both], vec[both], NO_PE, shuffled)
    torch.testing.assert_close(result, layer(x, vec, NO_PE, given)[both], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rope_counts_the_views(kind):
    """The distance between two views' numbers matters, and nothing else of them."""
    layer = build(sync_weights(kind)).blocks["0"].requires_grad_(False)
    x, vec = inputs()

    def change(numbers: list[int] | None) -> Tensor:
        given = None if numbers is None else torch.tensor(numbers)
        return layer(x, vec, NO_PE, layout(numbers=given)) - x

    usual = change([0, 1, 2])
    assert torch.equal(change(None), usual)
    torch.testing.assert_close(change([7, 8, 9]), usual, rtol=1e-4, atol=1e-4)
    # The first view stays the first, so the cameras say the same.
    assert (change([0, 2, 1]) - usual).abs().max() > 0.05


@pytest.mark.parametrize("kind", LAYOUTS)
def test_chunks_and_latent_frames_do_not_mix(kind):
    layer = build(sync_weights(kind)).blocks["0"].requires_grad_(False)
    x, vec = inputs()
    other = x.clone()
    other[0, : H * W] = draw(H * W, DIM, seed=9)  # chunk 0, view 0, frame 0
    a, b = (layer(t, vec, NO_PE, layout()) for t in (x, other))
    same = (a == b).all(-1).unflatten(0, (CHUNKS, VIEWS)).unflatten(-1, (T, H * W))
    assert same[1].all() and same[0, :, 1].all()
    assert not same[0, :, 0].any()


def test_weighted_mode_scales_the_keys_of_a_view():
    """Equal weights are frame mode with sharper keys; a small weight blurs what is seen of a view."""
    layer = build(sync_weights("4danyone")).blocks["0"].requires_grad_(False)
    x, vec = inputs()
    plain = layer(x, vec, NO_PE, layout())
    ones = layer(x, vec, NO_PE, layout(mode="weighted", weights=torch.ones(VIEWS)))
    torch.testing.assert_close(ones, plain, rtol=1e-5, atol=1e-5)
    uneven = layout(mode="weighted", weights=torch.tensor([1.0, 0.1, 1.0]))
    assert (layer(x, vec, NO_PE, uneven) - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["syncammaster", "4danyone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_own_error(saved, kind, dtype):
    weights = saved({k: v.to(dtype) for k, v in sync_weights(kind).items()})
    layer = build(weights, dtype=dtype).blocks["0"].requires_grad_(False)
    x, vec = (t.to(dtype) for t in inputs())
    result = layer(x, vec, NO_PE, layout())
    assert result.dtype == dtype
    expected = formula(weights, 0, x, vec, cameras(), [0, 1, 2])
    error = (result - expected).square().mean().sqrt() / (expected - x).square().mean().sqrt()
    # A dozen roundings in a row, made sharper by the softmax.
    assert error < 8 * torch.finfo(dtype).eps


# What the twelve numbers are.


def test_camera_numbers_are_those_of_the_training_set():
    """From Unreal's camera matrices (x forward, y right, z up, centimetres), as its loader made them."""
    poses = cameras(4).double()
    to_unreal = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]], dtype=torch.float64)
    loaded = []
    for T_camera_world in poses:
        T_world_camera = torch.linalg.inv(T_camera_world)
        right, down, forward = (to_unreal @ T_world_camera[:3, i] for i in range(3))
        unreal = torch.eye(4, dtype=torch.float64)
        unreal[:3] = torch.stack(
            [forward, right, -down, to_unreal @ T_world_camera[:3, 3] * 100], dim=1
        )
        axes = unreal[:, [1, 2, 0, 3]]
        axes[:3, 1] *= -1
        axes[:3, 3] /= 200
        loaded.append(axes)
    expected = [(torch.linalg.inv(loaded[1]) @ pose)[:3].reshape(12) for pose in loaded]
    torch.testing.assert_close(
        camera_numbers(poses.float(), first=1).double(), torch.stack(expected), rtol=0, atol=1e-6
    )


def test_camera_numbers_by_hand():
    """A second camera one metre to the right of the first, turned a quarter to the left."""
    first, second = torch.eye(4), torch.eye(4)
    # The second looks along -x of the first: its right is the first's forward.
    second[:3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    second[:3, 3] = -second[:3, :3] @ torch.tensor([1.0, 0, 0])
    numbers = camera_numbers(torch.stack([first, second]), first=0)
    assert numbers.tolist() == [
        [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        [0, 0, -1, 0.5, 0, 1, 0, 0, 1, 0, 0, 0],
    ]


def test_first_camera_is_the_one_with_the_smallest_number():
    layer = build(sync_weights("syncammaster")).blocks["0"].requires_grad_(False)
    x, vec = inputs()
    numbers = torch.tensor([3, 1, 2])
    moved = cameras() @ torch.linalg.inv(cameras()[1])  # the same cameras, the world at camera 1
    results = [
        layer(x, vec, NO_PE, layout(cameras=poses, numbers=numbers)) for poses in (cameras(), moved)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_cameras_are_asked_for_where_they_were_trained():
    x, vec = inputs()
    bare = build(sync_weights("4danyone"))
    assert not bare.needs_cameras
    bare.blocks["0"](x, vec, NO_PE, layout(cameras=None))
    trained = build(sync_weights("syncammaster"))
    assert trained.needs_cameras
    with pytest.raises(ValueError, match="trained with cameras: connect the rig"):
        trained.blocks["0"](x, vec, NO_PE, layout(cameras=None))


# Files.


@pytest.mark.parametrize("prefix", ["", "pipe.dit.", "model.diffusion_model.", "module."])
@pytest.mark.parametrize("kind, name", [("syncammaster", "SynCamMaster"), ("4danyone", "4DAnyone")])
def test_layout_is_recognised_behind_any_prefix(saved, kind, name, prefix):
    base = {prefix + key: value for key, value in BASE.items()}
    weights = saved(sync_weights(kind, blocks=(3, 10), prefix=prefix) | base)
    assert of_others(weights)
    sync = build(weights)
    assert (
        sync.name == name
        and sync.dim == DIM
        and list(sync.blocks) == ["3", "10"]
        and len(sync.references) == 0
    )
    assert all(layer.place == "before_text" for layer in sync.blocks.values())
    assert sync.ignored == len(BASE)
    part = {"SynCamMaster": "mvs_attn", "4DAnyone": "self_attn_mvs"}[name]
    assert torch.equal(
        sync.blocks["10"].get_parameter(f"{part}.q.weight"),
        weights[f"{prefix}blocks.10.{part}.q.weight"],
    )


def test_blocks_without_sync_are_left_out():
    """Variants with cameras give every block a projector, those without sync too."""
    weights = sync_weights("4danyone_cameras")
    weights = {k: v for k, v in weights.items() if "blocks.0" not in k or "mvs" not in k}
    sync = build(weights)
    assert list(sync.blocks) == ["1"]
    assert sync.ignored == 4


def test_own_format_is_not_taken_for_theirs():
    own = ViewSync(DIM, BLOCKS).state_dict()
    assert "blocks.0.projector.weight" in own
    assert not of_others(own)


def without(key: str):
    return lambda w: {k: v for k, v in w.items() if k != key}


def with_value(key: str, *shape: int):
    return lambda w: w | {key: torch.zeros(shape)}


BROKEN = {
    "missing weight": (without("blocks.1.mvs_attn.o.bias"), "no 'blocks.1.mvs_attn.o.bias'"),
    "missing rows": (without("blocks.0.modulation_mvs"), "no 'blocks.0.modulation_mvs'"),
    "missing cameras": (without("blocks.1.cam_encoder.weight"), "no 'blocks.1.cam_encoder.weight'"),
    "only rows of a block": (
        with_value("blocks.7.modulation_mvs", 1, 3, DIM),
        "no 'blocks.7.mvs_attn.q.weight'",
    ),
    "another width": (
        with_value("blocks.1.mvs_attn.k.weight", 256, 256),
        r"'blocks.1.mvs_attn.k.weight' .* shape \[256, 256\] where \[128, 128\]",
    ),
    "other cameras": (
        with_value("blocks.0.cam_encoder.weight", DIM, 16),
        r"'blocks.0.cam_encoder.weight' .* \[128, 16\] where \[128, 12\]",
    ),
    "one too many": (
        with_value("blocks.0.mvs_attn.q.scale_weight"),
        "too many, 'blocks.0.mvs_attn.q.scale_weight'",
    ),
    "twice": (
        lambda w: w | {f"ema.{k}": v for k, v in w.items()},
        "more than once .under '' and 'ema.'",
    ),
    "source stream": (
        with_value("blocks.0.cross_attn_src.q.weight", DIM, DIM),
        "stream of source tokens .'blocks.0.cross_attn_src.q.weight'",
    ),
    "another model": (lambda w: BASE, "no 'blocks.<n>.mvs_attn.q.weight' .SynCamMaster. or"),
    "empty": (lambda w: {}, "holds no view-sync weights"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_file_is_refused_in_one_sentence(saved, case):
    change, message = BROKEN[case]
    weights = saved({k: v.clone() for k, v in change(sync_weights("syncammaster")).items()})
    with pytest.raises(ValueError, match=message) as error:
        build(weights)
    assert "\n" not in str(error.value)


def test_width_that_no_wan_has_is_refused():
    with pytest.raises(
        ValueError, match="'blocks.0.mvs_attn.q.weight'.* 96 rows.* multiple of 128"
    ):
        build(sync_weights("syncammaster", dim=96))


@pytest.mark.parametrize("name", ["step20000.ckpt", "a/b/sync.PTH", "sync.pt", "sync.bin"])
def test_files_that_can_run_code_are_refused_with_the_way_out(name):
    with pytest.raises(ValueError, match="weights_only=True.*safetensors'") as error:
        check_name(name)
    assert "\n" not in str(error.value) and "a/b" not in str(error.value)


def test_safetensors_are_let_through():
    check_name("sync/step20000.ckpt.safetensors")


def test_the_way_out_works(tmp_path):
    """What the sentence tells a creator to run turns the published kind of file into one that loads."""
    weights = sync_weights("syncammaster")
    source, target = tmp_path / "step1.ckpt", tmp_path / "step1.safetensors"
    torch.save(weights, source)
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    safetensors.torch.save_file(loaded, target)
    sync = build(safetensors.torch.load_file(target))
    assert (sync.name, sync.dim, list(sync.blocks)) == ("SynCamMaster", DIM, ["0", "1"])
