"""The feature field against plain float64 loops, and what its pictures must show."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turnaround.models import feature_field
from turnaround.models.cameras import Rig, orbit_rig
from turnaround.models.feature_field import (
    FeatureField,
    Injection,
    References,
    encoded,
    outline_votes,
)
from turnaround.models.feature_rays import (
    UNIFORM_SHARE,
    camera_rays,
    even_edges,
    importance_edges,
    median_depth,
    places_in,
    ray_weights,
    span,
    subject_space,
    visible_reach,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HIDDEN, REACH, SAMPLES, OUTPUTS = 6, 4, 0.3, 5, 7
SIZE = (4, 3)
"""Rows and columns of tokens."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ring(views: int, size: tuple[int, int] = SIZE, start: float = 0.0) -> Rig:
    """Cameras at distance 1 around the origin that see a ball of radius 0.3, at uneven heights."""
    azimuths = start + torch.arange(views) * 2 * math.pi / views
    return orbit_rig(azimuths, 0.2 * azimuths.sin(), 1.0, math.radians(40), size[1], size[0])


def cameras(rig: Rig) -> tuple[Tensor, Tensor]:
    return rig.K.double(), rig.T_camera_world.double()


def references(views: int, seed: int = 0) -> References:
    """With maps of twice the size, and outlines of three times."""
    (h, w), cams = SIZE, cameras(ring(views))
    details, masks = (
        draw(views, 2, 2 * h, 2 * w, seed=seed + 1),
        draw(views, 3 * h, 3 * w, seed=seed + 2),
    )
    return References(draw(views, WIDTH, *SIZE, seed=seed), *cams, details, masks.sigmoid())


def fresh(reach: float = REACH, samples: int = SAMPLES, **how) -> FeatureField:
    """Of two blocks' maps side by side."""
    generator = torch.Generator().manual_seed(3)
    how = {"groups": 2, "details": 2, "outputs": OUTPUTS, **how}
    return FeatureField(WIDTH, HIDDEN, reach, samples, generator=generator, **how).double()


@torch.no_grad()
def random_field(**how) -> FeatureField:
    """Every parameter random, so that none can be forgotten unseen; thick enough to hide things."""
    field = fresh(**how)
    for n, weight in enumerate(field.parameters()):
        weight.copy_(0.5 * draw(*weight.shape, seed=10 + n))
    field.head.bias[0] = 2.0
    return field.requires_grad_(False)


TARGET = ring(2, start=0.4)


def look(field: FeatureField, refs: References, rig: Rig = TARGET, **how):
    return field.render(refs, *cameras(rig), SIZE, **how)


# The slow form


def bilinear(feature_map: Tensor, u: float, v: float) -> Tensor:  # [C, h, w] -> [C]
    """Token centres at +0.5; beyond the last centre its value."""
    C, h, w = feature_map.shape
    u, v = min(max(u - 0.5, 0), w - 1), min(max(v - 0.5, 0), h - 1)
    total = torch.zeros(C, dtype=feature_map.dtype)
    for y, x in itertools.product(range(h), range(w)):
        share = max(0.0, 1 - abs(u - x)) * max(0.0, 1 - abs(v - y))
        total += share * feature_map[:, y, x]
    return total


def trilinear(volume: Tensor, x: float, y: float, z: float) -> Tensor:  # [n, n, n, m] -> [m]
    """Corners from -1 to 1; beyond them the border's value."""
    n, total = len(volume), torch.zeros(volume.shape[-1], dtype=volume.dtype)
    at = [min(max((c + 1) / 2 * (n - 1), 0), n - 1) for c in (x, y, z)]
    for corner in itertools.product(*({int(c), min(int(c) + 1, n - 1)} for c in at)):
        share = math.prod(max(0.0, 1 - abs(a - b)) for a, b in zip(at, corner, strict=True))
        total += share * volume[corner]
    return total


def plain_sample(field: FeatureField, refs: References, origin, direction, t):
    """Feature [C], colour [3] and density of one place, one reference after the other."""
    place = origin + t * direction
    read, says, outlines = [], [], []
    for r in range(len(refs.features)):
        R, shift = refs.T_camera_world[r, :3, :3], refs.T_camera_world[r, :3, 3]
        there = R @ place + shift
        pixel = refs.K[r] @ there
        u, v = (pixel[:2] / pixel[2]).tolist()
        h, w = SIZE
        if there[2] <= 0 or not (0 <= u <= w and 0 <= v <= h):
            outlines.append(1.0)
            continue
        eye, towards = R @ origin + shift, R @ F.normalize(direction, dim=0)
        ray = torch.cat([towards, torch.linalg.cross(eye, towards)])
        blocks = refs.features[r].split(WIDTH // 2)
        normed = torch.cat(
            [F.layer_norm(b.movedim(0, -1), (WIDTH // 2,)).movedim(-1, 0) for b in blocks]
        )
        finer = F.interpolate(normed[None], scale_factor=2, mode="bilinear")[0]
        seen = field.feature(bilinear(finer, 2 * u, 2 * v))
        seen = seen + field.detail(bilinear(refs.details[r], 2 * u, 2 * v))
        outlines.append(float(bilinear(refs.masks[r][None], 3 * u, 3 * v)))
        given = seen + field.place(encoded(there, field.PLACE)) + field.ray(encoded(ray, field.RAY))
        view = seen + field.view(F.silu(given))
        read.append(view)
        says.append(field.say(F.silu(view)) + field.towards * (there @ towards / there.norm()))
    if not read:
        return torch.zeros(OUTPUTS).double(), torch.zeros(3).double(), 0.0
    share = torch.softmax(torch.cat(says), 0)
    mean = sum(s * view for s, view in zip(share, read, strict=True))
    spread = sum(s * (view - mean) ** 2 for s, view in zip(share, read, strict=True))
    joined = field.mean(mean) + field.spread(spread) + field.where(encoded(place, field.WHERE))
    joined = joined + field.kept(trilinear(field.volume, *(place / field.reach).tolist()))
    least = sorted(outlines)
    votes = [least[0], least[min(1, len(least) - 1)], sum(least) / len(least)]
    hull = field.hull(4 * torch.tensor(votes, dtype=torch.float64) - 2)
    joined = field.trunk(F.silu(joined + hull))
    head = field.head(mean + joined)
    return field.out(mean + joined), head[1:].sigmoid(), float(head[0].exp())


def plain_ray(field: FeatureField, refs: References, origin, direction, edges):
    """Feature, colour, opacity and expected depth of one ray."""
    passed, feature, color, depth = 1.0, 0.0, 0.0, 0.0
    for near, far in itertools.pairwise(edges.tolist()):
        t = (near + far) / 2
        found, rgb, density = plain_sample(field, refs, origin, direction, t)
        stopped = passed * (1 - math.exp(-density * (far - near) * float(direction.norm())))
        feature, color, depth = (
            feature + stopped * found,
            color + stopped * rgb,
            depth + stopped * t,
        )
        passed -= stopped
    opacity = 1 - passed
    return feature + passed * field.background, color, opacity, depth / max(opacity, 1e-12)


def test_equals_plain_loops_over_rays_samples_and_references():
    field, refs = random_field(), references(3)
    # One reference looks past most of the subject, so that places are seen by all, some and none.
    refs.K[1, 0, 2] += 2.2
    got = look(field, refs)
    rays = camera_rays(*cameras(TARGET), SIZE)
    for n, token in itertools.product(range(2), range(0, SIZE[0] * SIZE[1], 2)):
        y, x = divmod(token, SIZE[1])
        feature, rgb, alpha, depth = plain_ray(
            field, refs, rays.origins[n, 0], rays.directions[n, token], got.edges[n, token]
        )
        torch.testing.assert_close(got.features[n, :, y, x], feature, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(got.rgb[n, :, y, x], rgb, rtol=1e-9, atol=1e-10)
        assert abs(float(got.alpha[n, y, x]) - alpha) < 1e-10
        assert abs(float(got.depth[n, y, x]) - depth) < 1e-8
    assert 0.1 < got.alpha.mean() < 0.95  # neither empty nor a wall


def test_order_of_references_does_not_matter():
    field, refs = random_field(), references(5)
    order = [3, 0, 4, 2, 1]
    turned = refs.select(torch.tensor(order))
    a, b = look(field, refs), look(field, turned)
    torch.testing.assert_close(a.features, b.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 200])
def test_any_number_of_references(count):
    got = look(random_field(), references(count))
    assert got.features.isfinite().all() and got.depth.isfinite().all()
    assert got.alpha.max() > 0.1


def test_repeating_a_reference_changes_nothing():
    field, refs = random_field(), references(1)
    twice = References(*(torch.cat([part, part]) for part in vars(refs).values()))
    torch.testing.assert_close(
        look(field, refs).features, look(field, twice).features, rtol=0, atol=1e-12
    )


def test_chunks_and_recomputing_change_neither_picture_nor_gradient(monkeypatch):
    refs = references(3)
    results = []
    for chunk, kept in ((None, 1000), (5, 1000), (1, 1000), (5, 1)):
        monkeypatch.setattr(feature_field, "KEPT", kept)
        field = random_field().requires_grad_(True).train()
        features = refs.features.clone().requires_grad_(True)
        given = replace(refs, features=features)
        generator = torch.Generator().manual_seed(5)
        got = look(field, given, ring(1, start=0.4), chunk=chunk, generator=generator)
        (got.features.sin().sum() + got.rgb.sum() + got.depth.square().sum()).backward()
        results.append([got.features, got.depth, features.grad, field.place.weight.grad])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_of_features_and_parameters():
    field, refs = random_field(samples=3), references(2)
    rig = ring(1, start=0.3)
    names = [
        "feature.weight",
        "view.bias",
        "say.weight",
        "spread.weight",
        "towards",
        "hull.weight",
        "kept.weight",
        "head.weight",
        "background",
    ]
    given = [field.get_parameter(name).clone().requires_grad_(True) for name in names]

    def rendered(features, *parameters):
        for name, parameter in zip(names, parameters, strict=True):
            layer, _, kind = name.rpartition(".")
            # Not as nn.Parameter, which would be a leaf of its own.
            field.get_submodule(layer)._parameters[kind] = parameter
        got = look(field, replace(refs, features=features), rig)
        return got.features.sum((2, 3)), got.rgb.sum(), got.depth.sum(), got.alpha.sum()

    features = refs.features.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(rendered, (features, *given), fast_mode=True)


def test_finer_rays_follow_what_one_ray_a_token_found():
    """Each of four rays in a token has the bins of its token's ray."""
    field, refs = random_field(), references(2)
    coarse = look(field, refs)
    (K, T), (h, w) = cameras(TARGET), SIZE
    fine = field.render(
        refs, K * torch.tensor([2.0, 2.0, 1.0])[:, None], T, (2 * h, 2 * w), earlier=coarse
    )
    bins = importance_edges(coarse.edges, coarse.weights, SAMPLES).view(2, h, w, -1)
    edges = fine.edges.view(2, 2 * h, 2 * w, -1)
    for y, x in itertools.product(range(2 * h), range(2 * w)):
        assert torch.equal(edges[:, y, x], bins[:, y // 2, x // 2])


def test_an_outline_votes_and_one_fault_is_seen_as_such():
    shares = torch.tensor([[0.9, 0.0, 1.0, 0.7], [0.0, 0.1, 0.2, 0.1]])
    got = outline_votes(shares)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.7, 0.65], [0.0, 0.1, 0.1]]))
    torch.testing.assert_close(outline_votes(shares[:, :1]), shares[:, :1].expand(-1, 3))


def test_without_outlines_all_may_be_the_subject():
    field, refs = random_field(), references(3)
    without = look(field, replace(refs, masks=None))
    white = look(field, replace(refs, masks=torch.ones_like(refs.masks)))
    torch.testing.assert_close(without.features, white.features, rtol=0, atol=1e-12)


# What a field of known density shows


def chords(rig: Rig, radius: float) -> Tensor:  # [N, h, w] length of the way through a ball
    """By the distance of the ray from the origin, not by where it enters."""
    rays = camera_rays(*cameras(rig), SIZE)
    away = torch.linalg.cross(rays.origins.expand_as(rays.directions), rays.directions)
    square = (away.norm(dim=-1) / rays.directions.norm(dim=-1)).square()
    return (2 * (radius**2 - square).clamp(min=0).sqrt()).view(-1, *SIZE)


def test_a_fresh_field_is_a_grey_ball_of_fog():
    """Density 1 a unit everywhere in the ball: alpha = 1 - exp(-chord), colour 0.5 alpha."""
    field = fresh(reach=0.25)
    got = look(field, references(4))
    fog = 1 - torch.exp(-chords(TARGET, 0.25))
    assert 0.2 < fog.max() < 0.4 and (fog == 0).any()
    torch.testing.assert_close(got.alpha, fog, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.rgb, 0.5 * fog[:, None].expand(-1, 3, -1, -1))


def test_importance_samples_find_the_depth_of_a_thin_shell():
    """A ball of colour 1 and great density in empty space: its surface's depth is analytic."""
    radius, thick = 0.13, 400.0
    rays = camera_rays(*cameras(TARGET), SIZE)
    between = span(rays, 0.4)

    def rendered(edges: Tensor) -> tuple[Tensor, Tensor]:
        t = places_in(edges)
        places = rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]
        density = thick * (places.norm(dim=-1) < radius)
        weights = ray_weights(
            density, edges.diff(dim=-1) * rays.directions.norm(dim=-1, keepdim=True)
        )
        return weights, median_depth(edges, weights)

    surface = span(rays, radius)
    hit = (surface.diff(dim=-1)[..., 0] * rays.directions.norm(dim=-1)) > 0.1
    assert hit.sum() >= 3
    edges = even_edges(between, 24)
    weights, coarse = rendered(edges)
    _, fine = rendered(importance_edges(edges, weights, 24))
    errors = [(d - surface[..., 0])[hit].abs().mean() for d in (coarse, fine)]
    assert errors[0] < 0.8 / 24  # half a bin and the shell's own depth
    assert errors[1] < 0.5 * errors[0]


def test_importance_bins_hold_equal_weight():
    edges = even_edges(torch.tensor([[[1.0, 2.0]]]).double(), 4)
    weights = torch.tensor([[[0.0, 0.6, 0.2, 0.0]]], dtype=torch.float64)
    got = importance_edges(edges, weights, 8)[0, 0]
    share = UNIFORM_SHARE / 4 + (1 - UNIFORM_SHARE) * torch.tensor([0.0, 0.75, 0.25, 0.0]).double()
    below = F.pad(share.cumsum(0), (1, 0))
    # The distribution read at the new edges, by plain linear interpolation.
    for i, t in enumerate(got.tolist()):
        bin_ = min(int((t - 1) * 4 + 1e-9), 3)
        assert abs(below[bin_] + ((t - 1) * 4 - bin_) * share[bin_] - i / 8) < 1e-9
    nothing = importance_edges(edges, torch.zeros_like(weights), 4)
    torch.testing.assert_close(nothing, edges)


def test_a_wall_hides_what_is_behind():
    lengths = torch.full((4,), 0.1).double()
    weights = ray_weights(torch.tensor([0.0, 10.0, 1e6, 10.0]).double(), lengths)
    expected = [0, 1 - math.exp(-1), math.exp(-1), 0]
    torch.testing.assert_close(weights, torch.tensor(expected).double())


def test_a_camera_that_looks_away_sees_the_background():
    away = TARGET.T_camera_world.double().clone()
    turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])).double()
    field = random_field().requires_grad_(True)
    got = field.render(references(3), TARGET.K.double(), turn @ away, SIZE)
    assert (got.alpha == 0).all() and (got.rgb == 0).all()
    assert (got.depth == 0).all() and (got.median_depth == 0).all()
    torch.testing.assert_close(
        got.features, field.background[None, :, None, None].expand_as(got.features)
    )
    (got.features.sum() + got.depth.sum() + got.alpha.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in field.parameters())


def test_a_camera_inside_the_ball_looks_from_where_it_stands():
    K, T = cameras(ring(1))
    T[0, :3, 3] = torch.tensor([0.0, 0.0, 0.1])  # in front of the middle, by 0.1
    rays = camera_rays(K, T, SIZE)
    near, far = span(rays, REACH)[0].unbind(-1)
    ends = rays.origins[0] + far[:, None] * rays.directions[0]
    assert (near == 0).all() and (far > 0).all()
    torch.testing.assert_close(ends.norm(dim=-1), torch.full_like(far, REACH))


def test_references_that_look_away_show_nothing():
    refs = references(2)
    turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])).double()
    got = look(random_field(), replace(refs, T_camera_world=turn @ refs.T_camera_world))
    assert (got.alpha == 0).all() and got.features.isfinite().all()


def test_jitter_obeys_its_seed_and_stays_in_its_bins():
    field, refs = random_field(), references(2)
    first, again, other = (
        look(field, refs, generator=torch.Generator().manual_seed(seed)).features
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    edges = even_edges(span(camera_rays(*cameras(TARGET), SIZE), REACH), SAMPLES)
    places = places_in(edges, torch.Generator().manual_seed(1))
    assert (places >= edges[..., :-1]).all() and (places <= edges[..., 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_its_geometry_is_not_touched(dtype):
    field, refs = random_field().float(), references(3)
    refs = References(*(part.float() for part in vars(refs).values()))
    cams = [c.float() for c in cameras(TARGET)]
    full = field.render(refs, *cams, SIZE)
    low = replace(refs, features=refs.features.to(dtype))
    half = field.to(dtype).render(low, *cams, SIZE)
    assert half.features.dtype == dtype and half.alpha.dtype == torch.float32
    assert torch.equal(full.edges, half.edges)
    assert (half.alpha - full.alpha).abs().max() < 0.05
    error = (half.features.float() - full.features).square().mean() / full.features.square().mean()
    assert error.sqrt() < 0.05


# Injection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_injection_changes_nothing_to_the_bit(dtype):
    x, rendered = (draw(2, 12, WIDTH, seed=s).to(dtype) for s in (1, 2))
    assert torch.equal(Injection(WIDTH).to(dtype)(x, 100 * rendered), x)


def test_injection_is_the_published_linear_layer():
    """x <- Linear(2C -> C)([x, rendered]), begun at [identity, 0]."""
    injection = Injection(WIDTH).double()
    weight, bias = draw(WIDTH, 2 * WIDTH, seed=4), draw(WIDTH, seed=5)
    with torch.no_grad():
        injection.change.weight.copy_(weight)
        injection.change.bias.copy_(bias)
    x, rendered = (draw(2, 12, WIDTH, seed=s) for s in (1, 2))
    whole = weight + torch.cat([torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)], 1)
    torch.testing.assert_close(
        injection(x, rendered), F.linear(torch.cat([x, rendered], -1), whole, bias)
    )


# The subject's space


def test_axes_meet_at_the_origin_and_the_farthest_camera_is_at_1():
    rig = ring(6)
    T = rig.T_camera_world.double()
    eyes = -(T[:, :3, :3].mT @ T[:, :3, 3:])[..., 0]
    centre = torch.tensor([2.0, -1.0, 5.0]).double()
    stretched = eyes * torch.linspace(2.0, 3.5, 6).double()[:, None] + centre
    T[:, :3, 3:] = -T[:, :3, :3] @ stretched[..., None]
    space = subject_space(T)
    torch.testing.assert_close(space.centre, centre)
    assert abs(space.scale - 3.5) < 1e-5
    got = space.normalised(T)
    torch.testing.assert_close(got[:, :2, 3], torch.zeros(6, 2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(got[:, 2, 3], torch.linspace(2.0, 3.5, 6).double() / 3.5)
    # A point of the world and its place in the subject's space fall on the same pixel.
    point = torch.tensor([2.3, -0.8, 5.1]).double()
    here = T[:, :3, :3] @ point + T[:, :3, 3]
    there = got[:, :3, :3] @ ((point - centre) / space.scale) + got[:, :3, 3]
    torch.testing.assert_close(here / space.scale, there)


def test_cameras_without_a_common_subject_are_refused():
    T = ring(4).T_camera_world.clone()
    T[:, :3, 3] = torch.tensor([0.0, 0.0, -2.0])  # the middle lies behind all
    with pytest.raises(ValueError, match="'references' look away from each other"):
        subject_space(T)


def test_reach_is_what_the_pictures_show():
    rig = ring(3, size=(40, 30))
    tall = math.tan(math.radians(20))  # the longer side, from the middle, at distance 1
    assert abs(visible_reach(rig.K, rig.T_camera_world, (40, 30)) - tall) < 1e-4
    close = rig.T_camera_world.clone()
    close[0, 2, 3] = 0.3
    assert abs(visible_reach(rig.K, close, (40, 30)) - 0.95 * 0.3) < 1e-4


def test_references_of_another_model_are_refused():
    refs = references(2)
    wider = replace(refs, features=refs.features.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="12 features a token.*made for 6.*another model"):
        look(random_field(), wider)


def test_references_need_a_camera_each():
    refs = references(3)
    with pytest.raises(ValueError, match="3 feature maps.*one camera for each"):
        References(refs.features, refs.K[:2], refs.T_camera_world)


# Learning


def painted_ball(rig: Rig, radius: float = 0.2) -> tuple[Tensor, Tensor]:  # [N, 4, h, w]
    """A ball in empty space whose colour is a function of the place on it: premultiplied, alpha."""
    fine = rig.resized(4 * rig.width, 4 * rig.height)
    size = (fine.height, fine.width)
    rays = camera_rays(fine.K, fine.T_camera_world, size)
    passed = span(rays, radius)
    hit = (passed.diff(dim=-1) > 0).float()
    x, y, z = ((rays.origins + passed[..., :1] * rays.directions) / radius).unbind(-1)
    color = torch.stack([(3 * x).sin(), (3 * z + 2 * y).sin(), (4 * y + x).cos()], -1)
    picture = torch.cat([(0.5 + 0.4 * color) * hit, hit], -1)
    picture = F.avg_pool2d(picture.view(len(rig), *size, 4).movedim(-1, 1), 4)
    return picture[:, :3], picture[:, 3]


def test_learns_to_show_a_painted_ball_from_unseen_cameras():
    """From 4 of 6 pictures, nearer to the truth than the nearest of all 6 by 2 dB."""
    size, width = (8, 8), 16
    rig, unseen = ring(6, size), ring(6, size, start=math.pi / 6)
    (color, alpha), (true_color, true_alpha) = painted_ball(rig), painted_ball(unseen)
    mixed = torch.einsum("ck,nkhw->nchw", draw(width, 3, seed=9).float(), color)
    generator = torch.Generator().manual_seed(0)
    reach = visible_reach(rig.K, rig.T_camera_world, size)
    field = FeatureField(width, 16, reach, samples=12, generator=generator)
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)

    def seen(chosen, cameras: Rig, generator=None):
        cams = rig.K[chosen], rig.T_camera_world[chosen]
        chosen_refs = References(mixed[chosen], *cams, masks=alpha[chosen])
        return field.render(
            chosen_refs, cameras.K, cameras.T_camera_world, size, generator=generator
        )

    for _ in range(120):
        order = torch.randperm(6, generator=generator).tolist()
        targets, others = order[:2], order[2:6]
        got = seen(others, rig.select(targets), generator)
        loss = 50 * F.mse_loss(got.rgb, color[targets]) + 10 * F.mse_loss(got.alpha, alpha[targets])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        got = seen([0, 2, 3, 5], unseen)
    nearest = torch.cdist(unseen.centers, rig.centers).argmin(1)
    errors = [F.mse_loss(rgb, true_color) for rgb in (got.rgb, color[nearest])]
    assert 10 * math.log10(errors[1] / errors[0]) > 2
    assert (got.alpha - true_alpha).abs().mean() < 0.035
