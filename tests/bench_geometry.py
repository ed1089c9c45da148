"""Speed and memory of the geometry stage beside its peers: `python tests/bench_geometry.py`.

The peers need `pip install open3d kornia numba`; what is missing is left out with a line.

Method
- Scene: one frame of 512x512 whose every pixel is a point (262,144): a synthetic performer before a
  round wall, drawn into 8 cameras of a closed orbit of 512x512.
- Speed: all contenders run in turn in one process, on as many threads as torch has
  (OMP_NUM_THREADS); after a warm-up round the median of the repeats counts. A call draws all 8
  views; "ms a view" is an eighth of it, "Mpv/s" million points x views a second. "best" is the
  quickest call and "busy" the median of processor time, all threads together: other work on the
  machine delays the one, hardly the other (of an accelerator "busy" says nothing). A contender that
  has used up its seconds sits out the remaining rounds. The cloud lies on the device before the
  clock starts, except in the row "main memory".
- What each delivers differs and is named. Ours: colour, normals, three-state visibility and depth,
  with splats that close the surface; as the pack draws by default (the fastest way installed), and
  in plain torch. Back-warping is no renderer: it is given the true depth of every target view.
- Floor: the bytes that must move at least once for our pictures, through the bandwidth that this
  machine shows when torch copies a tensor larger than its caches (bytes read + bytes written;
  copying takes its turn among the contenders). A view reads every point's position and radius (16
  bytes), clears and reads a z-buffer of depth and index (8 bytes a pixel each way), writes it at
  least once where something is drawn, reads colour, normal, confidence and position of every drawn
  pixel's winner (40 bytes) and writes the pictures. Transforming points twice, writing a pixel more
  than once, waiting for scattered reads: all of that is ours to lose.
- Holes: the depth map's pixels, joined to triangles where the pack joins them (no depth jump, not
  grazing) and drawn exactly, say where a surface is. Inside of it (a pixel off its outline),
  "empty" is what a contender left blank and "through" where it shows something further behind
  (by more than the depth jump), as shares of the surface's pixels over the 8 views, at the clip's
  focal length and at twice that.
- Depth -> points: one picture of 512x512. Ours also masks, drops grazing points, measures radii and
  centres the performer; kornia's two functions leave dense maps.
- Scale: 8 views x 49 frames x 512x512 of a dancing performer's cloud with its far side, in a
  process of its own. Memory is the peak above what was resident when the cloud was there and one
  frame had been drawn; the pictures themselves are part of it, and named. On CUDA the allocator's
  peak is printed too; clip and pictures lie in main memory there, as in the nodes.
"""

import argparse
import ctypes
import functools
import math
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import in_comfyui
import numpy as np
import torch
from torch import Tensor

SIZE, VIEWS, FRAMES = 512, 8, 49
FOV, DISTANCE = math.radians(35), 4.1
"""The cameras' field of view and distance from the performer (metres): 60,000 points a frame."""
WALL, WALL_AXIS = 1.6, 1.1
"""The round wall's radius, and how far its axis stands before the performer's; metres."""
BUDGET = 20.0
"""Seconds of timed calls after which a slow contender sits out."""


def load_pack() -> None:
    """The pack as `turnaround`; everybody gets the threads that the environment gives torch."""
    threads = torch.get_num_threads()
    # Before numba is imported: starting, it sets OpenMP's threads, torch's too, to its own number.
    os.environ["NUMBA_NUM_THREADS"] = str(threads)
    warnings.filterwarnings("ignore", "The TBB threading layer")  # numba takes another
    in_comfyui._load("turnaround_tests", in_comfyui.HERE / "conftest.py")
    torch.set_num_threads(threads)


def ours(points, rig, **how):
    """The one place where the pack draws; `how`: device and backend, by default the fastest."""
    from turnaround.models.geometry import COMPILING, fastest_backend, render_conditions

    # As for a long clip: a single frame would not be worth numba's compiling.
    device = how.get("device", points.positions.device)
    how.setdefault("backend", fastest_backend(device, COMPILING))
    return render_conditions(points, rig, **how)


# The scene


@dataclass(frozen=True)
class Scene:
    """One frame seen by the source camera, and the same as points."""

    points: object
    """OrientedPoints, one a pixel, in the order of the pixels."""
    color: Tensor
    """[3, H, W] 0..1."""
    depth: Tensor
    """[H, W] metres."""
    faces: Tensor
    """[M, 3] int64: triangles of neighbouring points that belong to one surface."""


class Drawn(NamedTuple):
    """What a contender made of the views."""

    color: Tensor | np.ndarray  # any layout
    depth: Tensor | None  # [V, H, W] metres, 0 = nothing
    filled: Tensor | None = None  # [V, H, W] bool, where there is no depth to tell


def orbit(device: torch.device, zoom: float = 1.0):
    from turnaround.models.cameras import orbit_angles, orbit_rig

    angles = orbit_angles(VIEWS, 0.0, 2 * math.pi, 0.0)
    rig = orbit_rig(*angles, DISTANCE, FOV, SIZE, SIZE)
    K = rig.K * rig.K.new_tensor([zoom, zoom, 1.0])
    K[:, :2, 2] = rig.K[:, :2, 2]
    return on(replace(rig, K=K), device)


def on(rig, device: torch.device):
    return replace(rig, K=rig.K.to(device), T_camera_world=rig.T_camera_world.to(device))


def moved(points, device: torch.device):
    tensors = {k: v.to(device) for k, v in vars(points).items() if isinstance(v, Tensor)}
    return replace(points, **tensors, source=on(points.source, device))


def source_camera():
    return orbit(torch.device("cpu")).select([0])


def dancer(frames: int) -> Tensor:  # [F, H, W] metres, 0 = background
    """Exact depth of a synthetic performer before the source camera."""
    from turnaround.models.performer import draw_appearance, pose_performer, render_geometry

    camera = source_camera()
    posed = pose_performer("kira", "dance_a", torch.arange(frames) / 16, draw_appearance(7))
    return torch.stack(
        [
            render_geometry(posed, f, camera.K[0], camera.T_camera_world[0], SIZE, SIZE)[0]
            for f in range(frames)
        ]
    )


def colors_of(points: Tensor) -> Tensor:  # [F, 3, H, W] -> same, 0..1
    """A soft pattern, so that colours differ between neighbours."""
    return 0.5 + 0.5 * torch.sin(points * 9 + torch.tensor([0.0, 2.0, 4.0])[:, None, None])


def full_frame(device: torch.device) -> Scene:
    from turnaround.models import points as pack

    camera = source_camera()
    K = camera.K[0]
    rays = pack.unproject_depth(torch.ones(1, SIZE, SIZE), K)[0]
    # The far side of an upright cylinder: x² + (z - axis)² = WALL², x = rays[0] z.
    a, axis = rays[0].square() + 1, DISTANCE - WALL_AXIS
    wall = (axis + (axis**2 - a * (axis**2 - WALL**2)).sqrt()) / a
    body = dancer(1)[0]
    depth = torch.where(body > 0, body, wall)[None]
    points = pack.unproject_depth(depth, K)
    normals = pack.normals_from_depth(points, depth > 0, float(K[0, 0]))
    cosine = -(normals * torch.nn.functional.normalize(points, dim=1)).sum(1)
    color = colors_of(points)

    def rows(picture: Tensor) -> Tensor:  # [1, C, H, W] -> [N, C]
        return picture[0].flatten(1).T.contiguous()

    offsets = torch.tensor([0, SIZE * SIZE])
    radii = depth / K[0, 0] / 2 / cosine.clamp(min=0.35)
    centre = torch.tensor([0.0, 0.0, DISTANCE])
    cloud = pack.OrientedPoints(
        rows(points) - centre, rows(normals), rows(color), radii.flatten(),
        cosine.clamp(0.01, 1).flatten(), offsets, camera,
    )  # fmt: skip
    return Scene(
        moved(cloud, device),
        color[0].to(device),
        depth[0].to(device),
        joined_triangles(
            depth[0],
            cosine[0] > pack.GRAZING_COSINE,
            pack.edge_jump(float(K[0, 0])),
        ).to(device),
    )


def joined_triangles(depth: Tensor, steady: Tensor, jump: float) -> Tensor:  # [M, 3]
    """Two triangles between four neighbouring pixels, without those across depth jumps."""
    index = torch.arange(SIZE * SIZE).view(SIZE, SIZE)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    faces = torch.cat([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)]).view(-1, 3)
    corners = depth.flatten()[faces]
    whole = corners.amax(1) - corners.amin(1) < jump * corners.amin(1)
    return faces[whole & steady.flatten()[faces].all(1)]


def true_depth(scene: Scene, rig) -> Tensor:  # [V, H, W] metres, 0 = no surface
    from turnaround.models.rasterize_mesh import rasterize_mesh

    cameras = zip(rig.K, rig.T_camera_world, strict=True)
    return torch.stack(
        [
            rasterize_mesh(
                scene.points.positions @ T[:3, :3].T + T[:3, 3], scene.faces, K, SIZE, SIZE
            ).depth
            for K, T in cameras
        ]
    )


# The contenders: each draws all views of the rig


def draw_ours(scene: Scene, rig, **how) -> Drawn:
    made = ours(scene.points, rig, **how)
    return Drawn(made.partial, made.depth[:, 0])


def draw_from_cpu(scene: Scene, rig, points) -> Drawn:
    """As the nodes do: cloud and pictures lie in main memory, the accelerator only draws."""
    made = ours(points, on(rig, torch.device("cpu")), device=rig.K.device)
    return Drawn(made.partial, made.depth[:, 0])


def draw_open3d(scene: Scene, rig) -> Drawn:
    import open3d
    import open3d.core as o3c

    K = rig.K.double()
    K[:, :2, 2] -= 0.5  # Open3D's pixel centres are whole numbers
    cloud = open3d.t.geometry.PointCloud(o3c.Tensor.from_numpy(scene.points.positions.numpy()))
    cloud.point.colors = o3c.Tensor.from_numpy(scene.points.colors.numpy())
    images = [
        cloud.project_to_rgbd_image(
            SIZE, SIZE, o3c.Tensor(K), o3c.Tensor(T), depth_scale=1.0, depth_max=100.0
        )
        for K, T in zip(K.numpy(), rig.T_camera_world.double().numpy(), strict=True)
    ]
    depth = [torch.from_numpy(image.depth.as_tensor().numpy()[..., 0]) for image in images]
    return Drawn(
        np.stack([image.color.as_tensor().numpy() for image in images]), torch.stack(depth)
    )


def draw_kornia(scene: Scene, rig, depth: Tensor) -> Drawn:
    from kornia.geometry.depth import warp_frame_depth

    to_source = torch.eye(4, device=depth.device)
    to_source[2, 3] = DISTANCE
    K = rig.K.clone()
    K[:, :2, 2] -= 0.5  # kornia's pixel centres are whole numbers
    transforms = to_source @ torch.linalg.inv(rig.T_camera_world)
    views = [
        warp_frame_depth(scene.color[None], depth[v][None, None], transforms[v][None], K[v][None])
        for v in range(VIEWS)
    ]
    return Drawn(torch.cat(views), depth)


def project(scene: Scene, K: Tensor, T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel coordinates and depths [N] of all points."""
    x, y, z = (scene.points.positions @ T[:3, :3].T + T[:3, 3]).unbind(1)
    z = z.clamp(min=0.02)
    return x / z * K[0, 0] + K[0, 2], y / z * K[1, 1] + K[1, 2], z


def draw_torch_scatter(scene: Scene, rig) -> Drawn:
    """The plain way: one pixel a point, the nearest wins by scatter-min of (depth, index)."""
    colors, depths = [], []
    order = torch.arange(len(scene.points.positions), device=rig.K.device)
    empty = torch.iinfo(torch.int64).max
    for K, T in zip(rig.K, rig.T_camera_world, strict=True):
        u, v, z = project(scene, K, T)
        inside = (u >= 0) & (u < SIZE) & (v >= 0) & (v < SIZE)
        place = torch.where(inside, v.long() * SIZE + u.long(), SIZE * SIZE)
        keys = torch.full((SIZE * SIZE + 1,), empty, device=z.device)
        keys.scatter_reduce_(0, place, (z.view(torch.int32).long() << 32) | order, "amin")
        keys = keys[:-1]
        drawn, winner = keys != empty, keys & 0xFFFFFFFF
        winner = torch.where(drawn, winner, 0)
        colors.append(torch.where(drawn[:, None], scene.points.colors[winner], 0.5))
        depths.append(torch.where(drawn, z[winner], 0.0))
    return Drawn(torch.stack(colors), torch.stack(depths).view(VIEWS, SIZE, SIZE))


def draw_forward_warp(scene: Scene, rig) -> Drawn:
    """Every point is shared between four pixels; nearer ones weigh exponentially more."""
    colors, weights = [], []
    for K, T in zip(rig.K, rig.T_camera_world, strict=True):
        u, v, z = project(scene, K, T)
        u, v = u - 0.5, v - 0.5
        left, top = u.floor(), v.floor()
        far = torch.log1p(z)
        near = torch.exp(-50 * far / far.max())
        rows = torch.cat([scene.points.colors, torch.ones_like(z)[:, None]], 1)
        sums = rows.new_zeros((SIZE + 2) * (SIZE + 2), 4)  # a rim for what falls outside
        for dx in (0, 1):
            for dy in (0, 1):
                x, y = left + dx, top + dy
                share = (1 - (u - x).abs()) * (1 - (v - y).abs()) * near
                x, y = (x + 1).clamp(0, SIZE + 1).long(), (y + 1).clamp(0, SIZE + 1).long()
                sums.index_add_(0, y * (SIZE + 2) + x, rows * share[:, None])
        sums = sums.view(SIZE + 2, SIZE + 2, 4)[1:-1, 1:-1]
        weights.append(sums[..., 3])
        # Weights are as small as e^-50, far below any epsilon.
        colors.append(
            torch.where(sums[..., 3:] > 0, sums[..., :3] / sums[..., 3:].clamp(min=1e-30), 0.5)
        )
    return Drawn(torch.stack(colors), None, torch.stack(weights) > 0)


@functools.cache
def numba_kernel() -> Callable:
    import numba

    @numba.njit(parallel=True, fastmath=True)
    def draw(positions, colors, K, T, depth, color):
        V, H, W = depth.shape
        for v in numba.prange(V):
            fx, fy, cx, cy = K[v, 0, 0], K[v, 1, 1], K[v, 0, 2], K[v, 1, 2]
            t, nearest = T[v], depth[v]
            winner = np.full((H, W), -1, np.int32)
            nearest[:] = 1e30
            for i in range(len(positions)):
                x, y, z = positions[i, 0], positions[i, 1], positions[i, 2]
                away = t[2, 0] * x + t[2, 1] * y + t[2, 2] * z + t[2, 3]
                if away < 0.02:
                    continue
                u = (t[0, 0] * x + t[0, 1] * y + t[0, 2] * z + t[0, 3]) / away * fx + cx
                w = (t[1, 0] * x + t[1, 1] * y + t[1, 2] * z + t[1, 3]) / away * fy + cy
                if u < 0 or w < 0 or u >= W or w >= H:
                    continue
                if away < nearest[int(w), int(u)]:
                    nearest[int(w), int(u)] = away
                    winner[int(w), int(u)] = i
            for r in range(H):
                for c in range(W):
                    i = winner[r, c]
                    if i < 0:
                        nearest[r, c] = 0
                    for k in range(3):
                        color[v, r, c, k] = colors[i, k] if i >= 0 else np.float32(0.5)

    return draw


def draw_numba(scene: Scene, rig) -> Drawn:
    """A fused z-buffer, one pixel a point, a view a thread."""
    kernel = numba_kernel()
    depth = torch.empty(VIEWS, SIZE, SIZE)
    color = torch.empty(VIEWS, SIZE, SIZE, 3)
    cloud = (scene.points.positions, scene.points.colors)
    kernel(*(t.numpy() for t in (*cloud, rig.K, rig.T_camera_world, depth, color)))
    return Drawn(color, depth)


def draw_pytorch3d(scene: Scene, rig) -> Drawn:
    from pytorch3d.renderer import PointsRasterizationSettings, PointsRasterizer
    from pytorch3d.structures import Pointclouds
    from pytorch3d.utils import cameras_from_opencv_projection

    cloud = Pointclouds(points=[scene.points.positions])
    # A pixel is 2 / SIZE wide there; a radius of one pixel.
    settings = PointsRasterizationSettings((SIZE, SIZE), radius=2 / SIZE, points_per_pixel=1)
    size = torch.tensor([[SIZE, SIZE]], device=rig.K.device)
    colors, depths = [], []
    for K, T in zip(rig.K, rig.T_camera_world, strict=True):
        camera = cameras_from_opencv_projection(T[None, :3, :3], T[None, :3, 3], K[None], size)
        found = PointsRasterizer(camera, settings)(cloud)
        index = found.idx[0, ..., 0].long()
        drawn = index >= 0
        colors.append(torch.where(drawn[..., None], scene.points.colors[index.clamp(min=0)], 0.5))
        depths.append(torch.where(drawn, found.zbuf[0, ..., 0], 0.0))
    return Drawn(torch.stack(colors), torch.stack(depths))


OURS, OPEN3D, KORNIA = "Turnaround", "Open3D project_to_rgbd", "kornia back-warping"
ALL_OF_IT = "colour, normals, visibility, depth; splats"


def contenders(scene: Scene, truth: Tensor) -> dict[str, tuple[Callable, str]]:
    """What draws on the scene's device, and what comes out."""
    found = {OURS: (draw_ours, ALL_OF_IT)}
    found[f"{OURS}, plain torch"] = functools.partial(draw_ours, backend="torch"), ALL_OF_IT
    if truth.device.type == "cpu":
        found[OPEN3D] = draw_open3d, "colour, depth; 1 px"
        found["numba fused z-buffer"] = draw_numba, "colour, depth; 1 px"
    else:
        points = moved(scene.points, torch.device("cpu"))
        found[f"{OURS}, main memory"] = functools.partial(draw_from_cpu, points=points), ALL_OF_IT
        print("  Open3D and numba: left out, they draw on the CPU only")
    return found | {
        "torch scatter z-buffer": (draw_torch_scatter, "colour, depth; 1 px"),
        KORNIA: (functools.partial(draw_kornia, depth=truth), "colour; is given the depth"),
        "torch forward warp": (draw_forward_warp, "colour; bilinear, 2x2 px"),
        "PyTorch3D rasterizer": (draw_pytorch3d, "colour, depth; radius 1 px"),
    }


# Measuring


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Taken(NamedTuple):
    """Seconds of a way."""

    median: float
    best: float
    busy: float


def seconds_of(way: Callable) -> tuple[float, float]:
    """On the clock, and of the processor."""
    synchronize()
    start, busy = time.perf_counter(), time.process_time()
    way()
    synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def race(ways: dict[str, Callable], repeats: int) -> dict[str, Taken]:
    """Time the ways in turn; one that can't run here is left out, with the reason."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    for name, way in ways.items():
        try:
            way()
            seconds[name] = []
        except ImportError as missing:
            print(f"  {name}: left out, {missing.name} is not installed")
        except Exception as error:  # of a broken or changed peer: the others still count
            print(f"  {name}: left out, {type(error).__name__}: {error}")
    for _ in range(repeats):
        for name, taken in seconds.items():
            if sum(clock for clock, _ in taken) < BUDGET:
                taken.append(seconds_of(ways[name]))
    columns = {name: list(zip(*taken, strict=True)) for name, taken in seconds.items()}
    return {
        name: Taken(statistics.median(clock), min(clock), statistics.median(busy))
        for name, (clock, busy) in columns.items()
    }


COPIED = 2**27
"""Numbers in the tensor whose copy shows the bandwidth: 512 MiB, more than any cache holds."""


def floor_bytes(scene: Scene, rig) -> float:
    """Bytes a view that must move at least once (see the method above)."""
    made = ours(scene.points, rig)
    outputs = sum(t.numel() * t.element_size() for t in vars(made).values()) / VIEWS
    pixels, drawn = SIZE * SIZE, (made.visibility > 0).sum().item() / VIEWS
    return 16 * len(scene.points.positions) + 2 * 8 * pixels + (8 + 40) * drawn + outputs


def holes(drawn: Drawn, truth: Tensor) -> tuple[float, float | None]:
    """Shares of the surface's pixels that are empty, and that show something behind it."""
    from turnaround.models.points import EDGE_JUMP, erode

    inside = erode(truth > 0, 1)
    depth = None if drawn.depth is None else drawn.depth.to(truth.device)
    filled = drawn.filled if depth is None else depth > 0
    empty = (inside & ~filled).sum() / inside.sum()
    if depth is None:
        return empty.item(), None
    through = inside & (depth > truth * (1 + EDGE_JUMP))
    return empty.item(), (through.sum() / inside.sum()).item()


def compare_views(scene: Scene, device: torch.device, repeats: int) -> None:
    rigs = orbit(device), orbit(device, zoom=2)
    truths = [true_depth(scene, rig) for rig in rigs]
    field = contenders(scene, truths[0])
    ways = {name: functools.partial(draw, scene, rigs[0]) for name, (draw, _) in field.items()}
    block = torch.ones(COPIED, device=device)
    target = torch.zeros_like(block)
    results = race({**ways, "copy": lambda: target.copy_(block)}, repeats)
    copy = results.pop("copy")
    print(
        f"{'':24} ms a view   best   busy   Mpv/s  empty  through  empty 2x  through 2x  pictures"
    )
    for name, taken in results.items():
        draw, outputs = field[name]
        shares = [None] * 4
        if name != KORNIA:  # its depth is the truth itself
            pairs = zip(rigs, truths, strict=True)
            shares = [s for rig, truth in pairs for s in holes(draw(scene, rig), truth)]
        text = ["-" if share is None else f"{100 * share:.2f}%" for share in shares]
        points = len(scene.points.positions) * VIEWS / taken.median / 1e6
        median, best, busy = (1000 * seconds / VIEWS for seconds in taken)
        print(
            f"{name:24} {median:9.2f} {best:6.2f} {busy:6.2f} {points:7.1f} "
            f"{text[0]:>6} {text[1]:>8} {text[2]:>9} {text[3]:>11}  {outputs}"
        )
    if OURS in results:
        compare_goals(results, copy, floor_bytes(scene, rigs[0]))


def compare_goals(results: dict[str, Taken], copy: Taken, floor: float) -> None:
    """Our time beside the floor's (bytes a view) and Open3D's: on the clock, and of processors."""
    mine, copied = results[OURS], 2 * COPIED * 4  # bytes
    speed, share = copied / copy.median, floor * VIEWS / copied
    print(
        f"floor: {floor / 1e6:.1f} MB a view at {speed / 1e9:.1f} GB/s = "
        f"{floor / speed * 1000:.3f} ms a view; ours takes {mine.median / copy.median / share:.1f} "
        f"x that, {mine.busy / copy.busy / share:.1f} x busy (goal: 3)"
    )
    if OPEN3D in results:
        peer = results[OPEN3D]
        print(
            f"ours takes {mine.median / peer.median:.2f} x Open3D's time, "
            f"{mine.busy / peer.busy:.2f} x busy (goal: 1)"
        )


def compare_points(scene: Scene, repeats: int) -> None:
    from turnaround.models.points import points_from_depth

    color, depth = scene.color[None], scene.depth[None]
    K = scene.points.source.K[0].to(depth.device)

    def kornia_3d() -> None:
        from kornia.geometry.depth import depth_to_3d

        depth_to_3d(depth[:, None], K[None])

    def kornia_normals() -> None:
        from kornia.geometry.depth import depth_to_normals

        depth_to_normals(depth[:, None], K[None])

    everywhere = torch.ones_like(depth)
    ways = {
        "Turnaround points_from_depth": lambda: points_from_depth(
            color, depth, everywhere, K, far_side=False
        ),
        "kornia depth_to_3d": kornia_3d,
        "kornia depth_to_normals": kornia_normals,
    }
    print(f"\n{'depth -> points':30} pictures/s")
    for name, taken in race(ways, repeats).items():
        print(f"{name:30} {1 / taken.median:10.1f}")


# Scale


def dancing_cloud(frames: int):
    """The clouds of a clip, as the pack makes them from depth and mask."""
    from turnaround.models.points import points_from_depth, unproject_depth

    K = source_camera().K[0]
    depth = dancer(frames)
    colors = colors_of(unproject_depth(depth, K))
    return points_from_depth(colors, depth, (depth > 0).float(), K)


def resident(name: str) -> float:
    """A line of /proc/self/status in bytes: VmRSS = resident now, VmHWM = its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}.")


def start_counting(device: torch.device) -> float | None:
    """Set the peaks back and return the bytes resident; None where this system can't tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory must not be there to be used again
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def scale(frames: int, device: torch.device) -> None:
    """In a fresh process: draw a whole clip, as the nodes do, and say what it took."""
    load_pack()
    how = {} if device.type == "cpu" else {"device": device}
    with torch.inference_mode():
        rig = orbit(torch.device("cpu"))
        ours(dancing_cloud(1), rig, **how)
        cloud = dancing_cloud(frames)
        baseline = start_counting(device)
        kept = []
        taken, busy = seconds_of(lambda: kept.append(ours(cloud, rig, **how)))
        peak = None if baseline is None else resident("VmHWM") - baseline
    pictures = sum(t.numel() * t.element_size() for t in vars(kept[0]).values())
    points = len(cloud.positions)
    print(
        f"\n{VIEWS} views x {frames} frames x {SIZE}x{SIZE}, "
        f"{points / frames:,.0f} points a frame: "
        f"{taken:.2f} s ({busy:.2f} s busy), {VIEWS * frames / taken:.1f} pictures/s, "
        f"{points * VIEWS / taken / 1e6:.1f} Mpv/s"
    )
    told = "not told by this system" if peak is None else f"{peak / 1e9:.2f} GB"
    print(
        f"peak memory {told} above the cloud ({cloud.get_ram_usage() / 1e9:.2f} GB), "
        f"{pictures / 1e9:.2f} GB of it the pictures; goal: below 1.5 GB"
    )
    if device.type == "cuda":
        print(f"peak CUDA memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [s.partition(":")[2].strip() for s in lines.splitlines() if s.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the geometry stage.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 repeats; 9 frames at scale")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: leave --device out")
    device, repeats = torch.device(chosen.device), 3 if chosen.quick else chosen.repeats
    load_pack()
    print(
        f"{machine(device)}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"torch {torch.__version__}\n"
        f"{SIZE * SIZE:,} points into {VIEWS} views of {SIZE}x{SIZE}; median of {repeats} rounds, "
        "all in turn after a warm-up\n"
        "best: quickest round; busy: processor time; empty, through: shares of the surface's "
        "pixels left\nblank, or showing something behind it, at the clip's focal length and at "
        "twice that"
    )
    with torch.inference_mode():
        scene = full_frame(device)
        compare_views(scene, device, repeats)
        compare_points(scene, repeats)
    worker = multiprocessing.get_context("spawn").Process(
        target=scale, args=(9 if chosen.quick else FRAMES, device)
    )
    worker.start()
    worker.join()
    raise SystemExit(worker.exitcode)


if __name__ == "__main__":
    main()
