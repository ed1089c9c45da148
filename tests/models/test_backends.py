"""The compiled rasterisers draw the pictures of the torch one.

Triton needs no card here: its interpreter runs the same kernels on a CPU. It must be chosen before
triton is imported, so those tests run in a process of their own.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from turnaround.models.cameras import Rig, intrinsics, orbit_rig
from turnaround.models.geometry import Look, render_conditions
from turnaround.models.points import points_from_depth, unproject_depth

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOV, RADIUS, DISTANCE = math.radians(30), 0.5, 3.0
LOOKS = [
    Look(),
    Look("blanked", "drawn", "world", "per camera", "white"),
    Look("kept", "drawn", "source camera", "per point", "black"),
]


def crowd(size, swell):
    """Two frames: a closed ball, and the same with splats from a tenth to `swell` times the size."""
    K = intrinsics(FOV, size, size)
    rays = unproject_depth(torch.ones(1, size, size), K)[0]
    a, b = rays.square().sum(0), rays[2] * DISTANCE
    inner = (b * b - a * (DISTANCE**2 - RADIUS**2)).clamp(min=0)
    depth = torch.where(inner > 0, (b - inner.sqrt()) / a, 0.0)[None]
    colors = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ball = points_from_depth(colors, depth, (depth > 0).float(), K)
    N = len(ball.radii)
    swollen = replace(ball, radii=ball.radii * torch.linspace(0.1, swell, N))
    parts = {
        name: torch.cat([getattr(ball, name), getattr(swollen, name)])
        for name in ("positions", "normals", "colors", "radii", "confidences")
    }
    return replace(ball, frame_offsets=torch.tensor([0, N, 2 * N]), **parts)


def cameras(size):
    """From the front, the side, behind, and from inside the ball."""
    turns = torch.tensor([math.radians(a) for a in (0, 75, 180)])
    around = orbit_rig(turns, torch.zeros(3), DISTANCE, FOV, size, size)
    inside = torch.eye(4)
    inside[2, 3] = 0.45
    return Rig(
        torch.cat([around.K, around.K[:1]]),
        torch.cat([around.T_camera_world, inside[None]]),
        size,
        size,
    )


def check(backend, look, source, target, swell):
    points, rig = crowd(source, swell), cameras(target)
    a, b = (render_conditions(points, rig, look, backend=name) for name in (backend, "torch"))
    assert all((view > 0).any() for view in b.visibility) and (b.visibility[0] == 255).any()
    # A few splats lie so that rounding moves them over a pixel's border.
    for name in ("partial", "normals", "visibility"):
        away = (getattr(a, name).float() - getattr(b, name).float()).abs() > 1
        assert away.float().mean() < 2e-3, name
    assert ((a.depth - b.depth).abs() > 1e-5).float().mean() < 2e-3


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.ground)
def test_numba_draws_what_torch_draws(look):
    pytest.importorskip("numba")
    check("numba", look, 24, 64, 12)


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, see below")
@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.ground)
def test_triton_draws_what_torch_draws(look):
    check("triton", look, 9, 14, 4)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_kernels_in_its_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "triton_draws"]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "..." in ran.stdout, ran.stdout[-3000:]


POINTERS = {
    "keys": "*i64", "frame": "*i64", "rgb": "*i32", "front": "*u8", "partial": "*u8",
    "colors": "*u8", "state": "*u8",
}  # fmt: skip
NUMBERS = {
    "N": "i32", "width": "i32", "height": "i32", "size": "i32", "total": "i32", "focal": "fp32",
}  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("generation", [80, 120])
def test_triton_kernels_compile_for_cards_of_creators(generation):
    """From the first cards with bfloat16 to the newest; a compiler needs none of them."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from turnaround.models import rasterize_triton as kernels

    constants = {
        "NEAR": 0.02, "MAX_RADIUS": 6, "LEAST_REACH": 0.7072, "BLOCK": 256, "PER_POINT": True,
        "EMPTY": kernels.EMPTY, "SHOW_BACK": False, "BLANK": True, "GROUND": 128,
    }  # fmt: skip
    for kernel in (kernels._splat, kernels._shade):
        names = kernel.arg_names
        types = {n: NUMBERS.get(n) or POINTERS.get(n, "*fp32") for n in names if n not in constants}
        types |= {n: "constexpr" for n in names if n in constants}
        given = {(names.index(n),): value for n, value in constants.items() if n in names}
        source = ASTSource(kernel, signature=types, constexprs=given)
        assert triton.compile(source, target=GPUTarget("cuda", generation, 32)).asm["cubin"]
