"""Projection of Gaussians in one pass, for CPUs where numba is installed.

The same definition as `projected` in `rasterize_splats.py`, which is the reference; its gradients are
written by hand. Autograd would take a hundred passes over all Gaussians, which for many Gaussians on
a small picture is more work than compositing them. Reads and writes float32, reckons in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rasterize_splats import Lens, Projected
from .rasterize_splats_numba import _arrays
from .splats import Splats


def projected(splats: Splats, lens: Lens, T: Tensor, low_pass: float) -> Projected:
    parts = splats.means, splats.rotations, splats.log_scales
    return Projected(*_Project.apply(lens, T, low_pass, *parts))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lens, T, low_pass, *parts):
        ctx.save_for_backward(*parts)
        pose = T.detach().double().numpy()
        ctx.camera = lens.focal, lens.middle, lens.held(), pose, float(low_pass)
        N = len(parts[0])
        found = [np.empty((N, count), np.float32) for count in (2, 3, 2, 1, 3)]
        _project(*_arrays(*parts), *ctx.camera, *found)
        centers, conics, variances, depths, normals = map(torch.from_numpy, found)
        ctx.mark_non_differentiable(variances)
        return centers, conics, variances, depths[:, 0], normals

    @staticmethod
    @once_differentiable
    def backward(ctx, to_centers, to_conics, _, to_depths, to_normals):
        parts = _arrays(*ctx.saved_tensors)
        pulls = _arrays(to_centers, to_conics, to_depths, to_normals)
        found = [np.empty_like(part) for part in parts]
        _slopes(*parts, *ctx.camera, *pulls, *found)
        return None, None, None, *map(torch.from_numpy, found)


@njit(nogil=True, error_model="numpy", inline="always")
def _seen(mean, quat, log_scale, T, A, M):
    """Place in the camera's frame, and the quaternion of length 1 and its former length. Into A [3, 3]
    the Gaussian's axes in that frame, into M the same with its scales' lengths."""
    px = T[0, 0] * mean[0] + T[0, 1] * mean[1] + T[0, 2] * mean[2] + T[0, 3]
    py = T[1, 0] * mean[0] + T[1, 1] * mean[1] + T[1, 2] * mean[2] + T[1, 3]
    pz = T[2, 0] * mean[0] + T[2, 1] * mean[1] + T[2, 2] * mean[2] + T[2, 3]
    w, x, y, z = np.float64(quat[0]), np.float64(quat[1]), np.float64(quat[2]), np.float64(quat[3])
    length = math.sqrt(max(w * w + x * x + y * y + z * z, 1e-30))
    w, x, y, z = w / length, x / length, y / length, z / length
    for i in range(3):
        a, b, c = T[i, 0], T[i, 1], T[i, 2]
        A[i, 0] = (
            a * (1 - 2 * (y * y + z * z)) + b * (2 * (x * y + w * z)) + c * (2 * (x * z - w * y))
        )
        A[i, 1] = (
            a * (2 * (x * y - w * z)) + b * (1 - 2 * (x * x + z * z)) + c * (2 * (y * z + w * x))
        )
        A[i, 2] = (
            a * (2 * (x * z + w * y)) + b * (2 * (y * z - w * x)) + c * (1 - 2 * (x * x + y * y))
        )
        for j in range(3):
            M[i, j] = A[i, j] * math.exp(log_scale[j])
    return px, py, pz, w, x, y, z, length


@njit(nogil=True, error_model="numpy", inline="always")
def _facing(px, py, pz, log_scale, A):
    """The shortest axis, and which of its ends faces the camera: 1 or -1."""
    k = 0
    for j in range(1, 3):
        k = j if log_scale[j] < log_scale[k] else k
    return k, -1.0 if A[0, k] * px + A[1, k] * py + A[2, k] * pz > 0 else 1.0


@njit(nogil=True, error_model="numpy")
def _project(
    means, rotations, log_scales, focal, middle, held, T, low_pass,
    centers, conics, variances, depths, normals,
):  # fmt: skip
    A, M = np.empty((3, 3)), np.empty((3, 3))
    for n in range(len(means)):
        px, py, pz, _, _, _, _, _ = _seen(means[n], rotations[n], log_scales[n], T, A, M)
        X, Y = px / pz, py / pz
        centers[n, 0], centers[n, 1] = focal[0] * X + middle[0], focal[1] * Y + middle[1]
        X = min(max(X, held[0][0]), held[0][1])
        Y = min(max(Y, held[1][0]), held[1][1])
        u0, u1, u2 = M[0, 0] - X * M[2, 0], M[0, 1] - X * M[2, 1], M[0, 2] - X * M[2, 2]
        v0, v1, v2 = M[1, 0] - Y * M[2, 0], M[1, 1] - Y * M[2, 1], M[1, 2] - Y * M[2, 2]
        k, m = focal[0] / pz, focal[1] / pz
        xx = k * k * (u0 * u0 + u1 * u1 + u2 * u2)
        yy = m * m * (v0 * v0 + v1 * v1 + v2 * v2)
        xy = k * m * (u0 * v0 + u1 * v1 + u2 * v2)
        a, b, c = u1 * v2 - u2 * v1, u2 * v0 - u0 * v2, u0 * v1 - u1 * v0
        determinant = k * k * m * m * (a * a + b * b + c * c)
        determinant += low_pass * (xx + yy) + low_pass * low_pass
        xx, yy = xx + low_pass, yy + low_pass
        conics[n, 0], conics[n, 1] = yy / determinant, -xy / determinant
        conics[n, 2] = xx / determinant
        variances[n, 0], variances[n, 1], depths[n, 0] = xx, yy, pz
        axis, sign = _facing(px, py, pz, log_scales[n], A)
        for i in range(3):
            normals[n, i] = sign * A[i, axis]


@njit(nogil=True, error_model="numpy")
def _slopes(
    means, rotations, log_scales, focal, middle, held, T, low_pass,
    to_centers, to_conics, to_depths, to_normals, to_means, to_rotations, to_log_scales,
):  # fmt: skip
    A, M, D, Q = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    u, v = np.empty(3), np.empty(3)
    for n in range(len(means)):
        px, py, pz, w, x, y, z, length = _seen(means[n], rotations[n], log_scales[n], T, A, M)
        X, Y = px / pz, py / pz
        heldX, heldY = min(max(X, held[0][0]), held[0][1]), min(max(Y, held[1][0]), held[1][1])
        k, m = focal[0] / pz, focal[1] / pz
        xx, xy, yy = low_pass, 0.0, low_pass
        for j in range(3):
            u[j], v[j] = k * (M[0, j] - heldX * M[2, j]), m * (M[1, j] - heldY * M[2, j])
            xx, xy, yy = xx + u[j] * u[j], xy + u[j] * v[j], yy + v[j] * v[j]
        a, b, c = u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]
        determinant = a * a + b * b + c * c + low_pass * (xx + yy - low_pass)
        p, q, r = yy / determinant, -xy / determinant, xx / determinant
        # Of an inverse P of S: dS = -P dP P.
        g, h, i_ = to_conics[n, 0], 0.5 * to_conics[n, 1], to_conics[n, 2]
        to_xx = -(p * p * g + 2 * p * q * h + q * q * i_)
        to_xy = -2 * (p * q * g + (p * r + q * q) * h + q * r * i_)
        to_yy = -(q * q * g + 2 * q * r * h + r * r * i_)
        to_X, to_Y = 0.0, 0.0
        to_z = np.float64(to_depths[n])
        for j in range(3):
            to_u, to_v = 2 * to_xx * u[j] + to_xy * v[j], 2 * to_yy * v[j] + to_xy * u[j]
            D[0, j], D[1, j] = k * to_u, m * to_v
            D[2, j] = -heldX * k * to_u - heldY * m * to_v
            to_X -= k * to_u * M[2, j]
            to_Y -= m * to_v * M[2, j]
            to_z -= (to_u * u[j] + to_v * v[j]) / pz
        to_X = (to_X if heldX == X else 0.0) + focal[0] * to_centers[n, 0]
        to_Y = (to_Y if heldY == Y else 0.0) + focal[1] * to_centers[n, 1]
        to_x, to_y, to_z = to_X / pz, to_Y / pz, to_z - (to_X * X + to_Y * Y) / pz
        axis, sign = _facing(px, py, pz, log_scales[n], A)
        for j in range(3):
            to_means[n, j] = T[0, j] * to_x + T[1, j] * to_y + T[2, j] * to_z
            scale = math.exp(log_scales[n, j])
            to_log_scales[n, j] = D[0, j] * M[0, j] + D[1, j] * M[1, j] + D[2, j] * M[2, j]
            for i in range(3):
                D[i, j] = D[i, j] * scale + (sign * to_normals[n, i] if j == axis else 0.0)
        for i in range(3):
            for j in range(3):
                Q[i, j] = T[0, i] * D[0, j] + T[1, i] * D[1, j] + T[2, i] * D[2, j]
        turn_x, turn_y, turn_z = Q[2, 1] - Q[1, 2], Q[0, 2] - Q[2, 0], Q[1, 0] - Q[0, 1]
        xy, xz, yz = Q[0, 1] + Q[1, 0], Q[0, 2] + Q[2, 0], Q[1, 2] + Q[2, 1]
        to_w = 2 * (x * turn_x + y * turn_y + z * turn_z)
        to_x = 2 * (w * turn_x - 2 * x * (Q[1, 1] + Q[2, 2]) + y * xy + z * xz)
        to_y = 2 * (w * turn_y + x * xy - 2 * y * (Q[0, 0] + Q[2, 2]) + z * yz)
        to_z = 2 * (w * turn_z + x * xz + y * yz - 2 * z * (Q[0, 0] + Q[1, 1]))
        along = w * to_w + x * to_x + y * to_y + z * to_z
        to_rotations[n, 0], to_rotations[n, 1] = (
            (to_w - w * along) / length,
            (to_x - x * along) / length,
        )
        to_rotations[n, 2], to_rotations[n, 3] = (
            (to_y - y * along) / length,
            (to_z - z * along) / length,
        )
