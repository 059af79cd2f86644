"""Truncated signed distances of closed meshes on a grid."""

from typing import Any

import numpy as np

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.mesh import Triangles

LONGEST = 1.0  # edge of a piece of a triangle, in voxels
MOST_PIECES = 4 * 10**6
NEIGHBOURS = 16
"""Number of pieces that are compared for each voxel, those with the nearest centres."""
OFFSETS = (1.3e-5, 2.9e-5)  # of the rays from the voxels, so that none meets an edge of an aligned mesh
MOST_PAIRS = 2**19  # of voxels and pieces at once


def closed(mesh: Triangles) -> Triangles:
    """Return a mesh in voxels as a closed surface whose triangles have one orientation.

    Equal vertices are merged, and triangles without an area and repeated ones are left out.

    Raises:
        FormatError: some edge does not belong to exactly two triangles.
    """
    import trimesh  # slow import

    found: Any = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    found.merge_vertices(merge_tex=True, merge_norm=True)
    found.update_faces(found.unique_faces())
    found.update_faces(found.nondegenerate_faces())
    if len(found.faces) == 0:
        raise FormatError("has no triangles with an area")
    _, uses = np.unique(found.edges_sorted, axis=0, return_counts=True)
    if (uses != 2).any():
        raise FormatError(
            f"is not watertight ({int((uses != 2).sum())} of {len(uses)} edges do not belong to two triangles)"
        )
    if not found.is_winding_consistent:
        trimesh.repair.fix_winding(found)
    return Triangles(np.asarray(found.vertices, np.float64), np.asarray(found.faces, np.int64))


def signed_distances(mesh: Triangles, size: int, truncation: float) -> np.ndarray:
    """Return the signed distances of the voxels of a grid to a closed mesh, negative inside, in voxels.

    Points are inside if the winding number of the surface around them is not 0, by the majority of rays along the
    three axes. Distances are those to the nearest of the pieces of triangles with the `NEIGHBOURS` nearest centres.

    Args:
        mesh: a mesh of `closed`, with vertices in voxels; voxel i has the coordinate i.
        size: voxels S along each axis.
        truncation: largest distance.

    Returns:
        Distances in [-truncation, truncation], float32 [S, S, S], along x, y and z.

    Raises:
        FormatError: the surface is too large or complex for its resolution.
    """
    pieces = _divided(mesh.vertices[mesh.faces])
    inside = sum((_winding(pieces, size, axis) != 0).astype(np.int8) for axis in range(3)) >= 2
    distances = _distances(pieces, size, truncation)
    return np.where(inside, -distances, distances).astype(np.float32)


def _divided(triangles: np.ndarray) -> np.ndarray:
    """Return triangles [F, 3, 3] halved across their longest edges until these are at most LONGEST."""
    done, count = [], 0
    while len(triangles):
        lengths = np.linalg.norm(triangles - np.roll(triangles, -1, axis=1), axis=2)
        long = lengths.max(1) > LONGEST
        done.append(triangles[~long])
        triangles, lengths = triangles[long], lengths[long]
        count += len(done[-1])
        if count + 2 * len(triangles) > MOST_PIECES:
            raise FormatError("has too many or too large triangles; simplify it")
        rows, first = np.arange(len(triangles)), lengths.argmax(1)
        a, b, c = (triangles[rows, (first + turn) % 3] for turn in range(3))
        middle = (a + b) / 2
        triangles = np.concatenate([np.stack([a, middle, c], 1), np.stack([middle, b, c], 1)])
    return np.concatenate(done)


def _winding(pieces: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Return the winding number around each voxel, int [S, S, S], by the pieces on a ray along an axis."""
    crossings = np.zeros((size + 1, size, size), np.int32)
    along, flat = pieces[..., axis], np.delete(pieces, axis, 2) - OFFSETS
    low = np.ceil(flat.min(1)).astype(int)
    for step in np.ndindex(2, 2):  # a piece is not wider than a voxel
        ray = low + step
        kept = ((ray <= flat.max(1)) & (ray >= 0) & (ray < size)).all(1)
        offset = flat[kept] - ray[kept][:, None]
        u, v = np.moveaxis(offset, 2, 0)
        weights = np.roll(u, -1, 1) * np.roll(v, -2, 1) - np.roll(u, -2, 1) * np.roll(v, -1, 1)
        area = weights.sum(1)
        hit = ((weights > 0).all(1) & (area > 0)) | ((weights < 0).all(1) & (area < 0))
        place = (weights[hit] * along[kept][hit]).sum(1) / area[hit]
        before = np.ceil(place).clip(0, size).astype(int)  # number of voxels before the crossing
        np.add.at(crossings, (before, *ray[kept][hit].T), np.sign(area[hit]).astype(np.int32))
    beyond = np.cumsum(crossings[:0:-1], axis=0)[::-1]
    return np.moveaxis(beyond, 0, axis)


def _distances(pieces: np.ndarray, size: int, truncation: float) -> np.ndarray:
    """Return the distance of each voxel to the nearest piece, at most `truncation`, float64 [S, S, S]."""
    from scipy.spatial import KDTree  # slow import

    centres = pieces.mean(1)
    reach = float(np.linalg.norm(pieces - centres[:, None], axis=2).max())
    tree = KDTree(centres)
    voxels = np.indices((size, size, size)).reshape(3, -1).T.astype(np.float64)
    best = np.full(len(voxels), truncation)
    near, which = tree.query(voxels, NEIGHBOURS, distance_upper_bound=truncation + reach)
    row, column = np.nonzero(near < truncation + reach)
    for some in np.array_split(np.arange(len(row)), len(row) // MOST_PAIRS + 1):
        found = _to_triangles(voxels[row[some]], pieces[np.asarray(which)[row[some], column[some]]])
        np.minimum.at(best, row[some], found)
    return best.reshape(size, size, size)


def _to_triangles(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Return the distance of each point [N, 3] to its triangle [N, 3, 3]."""
    edges = np.roll(triangles, -1, 1) - triangles
    offset = points[:, None] - triangles
    share = (offset * edges).sum(2) / np.maximum((edges * edges).sum(2), 1e-300)
    nearest = offset - share.clip(0, 1)[..., None] * edges
    squares = (nearest * nearest).sum(2).min(1)
    normal = np.cross(edges[:, 0], edges[:, 1])
    above = (np.cross(edges, offset) * normal[:, None]).sum(2)
    height = (offset[:, 0] * normal).sum(1) ** 2 / np.maximum((normal * normal).sum(1), 1e-300)
    return np.sqrt(np.where((above >= 0).all(1) & (normal != 0).any(1), height, squares))
