"""One body's motion with another body's shape (stage: two BODYs of one mesh -> BODY).

DiffPerformer takes the pose of a driving clip and the shape of the reference from a parametric body
model. Bodies here are meshes without parameters, so both are read off the triangles: what brings a
triangle of the template to the body is a stretch, then a turn (polar decomposition). Over a clip,
stretches are the build and turns the pose, so the one body's mean stretch is exchanged for the
other's, and the triangles are joined again by least squares over their edges (deformation transfer:
Sumner, Popović 2004; its cotangent form: Botsch et al. 2006). Between the pack's performers it takes
four fifths to a fifth of the difference away: what two builds differ by in turns is not seen.

Frame: world of the pack (x right, y down, z forward, metres).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .body import Body


def reshaped(body: Body, reference: Body) -> Body:
    """`body` in motion, built like `reference` (any pose, one frame or more).

    Steps are as long as the new build makes them: the root's way is scaled about the ground under
    the clip's middle, so that soles stay on the ground. Raises ValueError when the two are not the
    same mesh."""
    if not torch.equal(body.faces.cpu(), reference.faces.cpu()):
        raise ValueError(
            f"'reference' has {reference.rest.shape[0]} vertices and {len(reference.faces)} "
            f"triangles, 'body' {body.rest.shape[0]} and {len(body.faces)}, or they are joined "
            "otherwise: both must come from the same kind of source."
        )
    faces, rest = body.faces, body.rest.double()
    driven = _gradients(rest, body.vertices.double(), faces)
    own = _stretches(driven).mean(0)
    wanted = _stretches(_gradients(rest, reference.vertices.double(), faces)).mean(0)
    weld, first = _welded(rest)
    built = _joined(rest[first], weld[faces], driven @ _inverse(own) @ wanted)[:, weld]
    vertices = _placed(built, body.vertices.double())
    return replace(body, vertices=vertices.to(body.vertices), colors=None, neutral=None)


def _welded(rest: Tensor) -> tuple[Tensor, Tensor]:  # [N] number of the place, [n] one vertex each
    """Vertices at the same place of the template are one: files cut meshes along texture seams."""
    _, first, weld = np.unique(
        rest.cpu().numpy().round(6), axis=0, return_index=True, return_inverse=True
    )
    return torch.from_numpy(weld.reshape(-1)).to(rest.device), torch.from_numpy(first).to(
        rest.device
    )


def _frames_of(vertices: Tensor, faces: Tensor) -> Tensor:  # [..., N, 3] -> [..., M, 3, 3]
    """Two edges and the normal of every triangle, as columns."""
    a, b, c = (vertices[..., faces[:, i], :] for i in range(3))
    normal = torch.linalg.cross(b - a, c - a)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()
    return torch.stack([b - a, c - a, normal], -1)


def _gradients(rest: Tensor, vertices: Tensor, faces: Tensor) -> Tensor:  # [F, M, 3, 3]
    """What brings every triangle of the template to the body; the identity for flat ones."""
    frames = _frames_of(rest, faces)
    flat = torch.linalg.det(frames).abs() < 1e-18
    eye = torch.eye(3, dtype=rest.dtype, device=rest.device)
    frames = torch.where(flat[:, None, None], eye, frames)
    found = _frames_of(vertices, faces) @ _inverse(frames)
    usable = ~flat & (torch.linalg.det(found) > 1e-6)
    return torch.where(usable[..., None, None], found, eye)


def _inverse(matrices: Tensor) -> Tensor:  # [..., 3, 3]
    """By cross products: many times faster than a solver for so small ones."""
    a, b, c = matrices.unbind(-1)
    rows = torch.stack(
        [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -2
    )
    return rows / (a * rows[..., 0, :]).sum(-1)[..., None, None]


def _stretches(matrices: Tensor) -> Tensor:  # [..., 3, 3], turn @ stretch = matrix
    """Polar decomposition by Higham's iteration: the mean of a matrix and its inverse transpose,
    until they are one, is its turn."""
    turn = matrices
    for _ in range(10):
        turn = (turn + _inverse(turn).mT) / 2
    stretch = turn.mT @ matrices
    return (stretch + stretch.mT) / 2


def _edges(rest: Tensor, faces: Tensor) -> tuple[np.ndarray, ...]:
    """Edges i, j with their weights and the triangle that each belongs to, [E] each.

    Half the cotangent of the angle across, kept positive. Parts that hang nowhere (eyes, teeth) are
    tied to the nearest place of the largest part."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    points, corners = rest.cpu().numpy(), faces.cpu().numpy()
    i, j, weight = [], [], []
    for k in range(3):
        a, b, across = (corners[:, (k + n) % 3] for n in range(3))
        u, v = points[a] - points[across], points[b] - points[across]
        area = np.linalg.norm(np.cross(u, v), axis=1).clip(1e-12)
        weight.append(((u * v).sum(1) / area / 2).clip(0.02, 10))
        i.append(a)
        j.append(b)
    triangle = [np.arange(len(corners))] * 3
    i, j, weight, triangle = map(np.concatenate, (i, j, weight, triangle))
    links = coo_matrix((np.ones(len(i)), (i, j)), shape=(len(points),) * 2)
    _, part = connected_components(links, directed=False)
    main = part == np.bincount(part).argmax()
    loose = np.flatnonzero(~main)
    if len(loose):
        anchors = np.flatnonzero(main)
        near = anchors[cKDTree(points[anchors]).query(points[loose])[1]]
        owner = np.zeros(len(points), np.int64)
        owner[corners] = np.arange(len(corners))[:, None]
        i, j = np.concatenate([i, loose]), np.concatenate([j, near])
        weight = np.concatenate([weight, np.full(len(loose), 0.1)])
        triangle = np.concatenate([triangle, owner[near]])
    return i, j, weight, triangle


def _joined(rest: Tensor, faces: Tensor, wanted: Tensor) -> Tensor:  # [F, M, 3, 3] -> [F, N, 3]
    """Vertices whose edges are those of the template, changed as wanted, as nearly as can be; the
    first one stays where it is."""
    from scipy.sparse import coo_matrix, identity
    from scipy.sparse.linalg import splu

    i, j, weight, triangle = _edges(rest, faces)
    N = len(rest)
    ends, starts = np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])
    values = np.concatenate([weight, weight, -weight, -weight])
    # A little of the identity: without it, nothing says where the whole is.
    matrix = coo_matrix((values, (ends, starts)), shape=(N, N)) + 1e-9 * identity(N)
    solver = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0)
    i, j, triangle = (torch.from_numpy(n) for n in (i, j, triangle))
    edges = torch.from_numpy(weight)[:, None] * (rest[i] - rest[j]).cpu()
    result = []
    for change in wanted.cpu():
        pulled = torch.einsum("eab,eb->ea", change[triangle], edges)
        sums = torch.zeros(N, 3, dtype=rest.dtype).index_add_(0, i, pulled)
        sums.index_add_(0, j, -pulled)
        found = torch.from_numpy(solver.solve(sums.numpy()))
        result.append(found - found[0])
    return torch.stack(result).to(rest.device)


def _placed(built: Tensor, before: Tensor) -> Tensor:  # [F, N, 3] twice -> [F, N, 3]
    """The built body where the other was, its way as much longer as it is larger."""
    middle, goal = built.mean(1, keepdim=True), before.mean(1, keepdim=True)
    size = ((built - middle).square().sum() / (before - goal).square().sum()).sqrt()
    ground = goal.mean(0)
    ground[..., 1] = before[..., 1].amax()
    centred = built - middle + ground + size * (goal - ground)
    # Soles of another build: the lowest place of the clip stands on the same ground.
    centred[..., 1] += before[..., 1].amax() - centred[..., 1].amax()
    return centred
