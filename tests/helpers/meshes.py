"""Meshes of trimesh as triangles, files and closed forms of their distances."""

from typing import Any

import numpy as np
import trimesh

from diffusion_cli.formats.mesh import Triangles


def grid(size: int) -> np.ndarray:
    """Voxels [S, S, S, 3] around the middle of a grid."""
    return np.moveaxis(np.indices((size, size, size)), 0, -1) - (size - 1) / 2


def in_voxels(solid: trimesh.Trimesh, size: int) -> Triangles:
    """A mesh around 0, in the middle of a grid."""
    return Triangles(np.asarray(solid.vertices) + (size - 1) / 2, np.asarray(solid.faces))


def exported(kind: str, scene: trimesh.Scene | trimesh.Trimesh) -> bytes:
    data = scene.export(file_type=kind)
    assert data is not None
    return data.encode() if isinstance(data, str) else bytes(data)  # pyright: ignore[reportArgumentType]


def as_trimesh(triangles: Triangles, **options: Any) -> trimesh.Trimesh:
    return trimesh.Trimesh(triangles.vertices, triangles.faces, process=False, **options)


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.RandomState(seed).standard_normal((3, 3)))[0]


def rotated(solid: trimesh.Trimesh, seed: int = 0) -> trimesh.Trimesh:
    turned = solid.copy()
    turned.vertices = np.asarray(solid.vertices) @ rotation(seed).T
    return turned


def joined(first: trimesh.Trimesh, second: trimesh.Trimesh) -> trimesh.Trimesh:
    faces = np.concatenate([first.faces, np.asarray(second.faces) + len(first.vertices)])
    return trimesh.Trimesh(np.concatenate([first.vertices, second.vertices]), faces, process=False)
