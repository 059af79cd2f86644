"""Signed distance volumes, whose samples are meshes."""

import math
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.lib.format import MAGIC_PREFIX
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.base import STRICT, SampleFormat, Shape, SurfacePoints
from diffusion_cli.formats.mesh import SUFFIXES as MESHES
from diffusion_cli.formats.mesh import Triangles, read_triangles
from diffusion_cli.formats.mesh_distance import closed, signed_distances
from diffusion_cli.formats.point_cloud import AZIMUTH
from diffusion_cli.formats.surface import SIDE, Surface, glb, marching_cubes, picture
from diffusion_cli.formats.volume import read_volume
from diffusion_cli.system.files import write_npy

SUFFIXES = (".ply", *MESHES)
"""Suffixes of meshes."""
MARGIN = 2
"""Voxels on each side of the cube that a mesh leaves free."""
ROUNDING = 1e-6  # of coordinates in float32
TURNS = 12  # views of an animation
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class SignedDistance(SampleFormat):
    """Truncated signed distances [1, S, S, S] along x, y and z, negative inside, stored as .npy and as a mesh in GLB.

    A value is `clamp(d / truncation, -1, 1)` for the distance d in voxels, in float16. The mesh is the surface at level
    0. Voxel i has the coordinate `(2 i + 1 - S) / (S - 2 MARGIN) half_side` in the mesh. Previews are parallel
    projections of the surface with z upwards.

    Args:
        truncation: largest distance in voxels, which becomes 1.
        half_side: largest coordinate of meshes in files; None: each mesh is centred and scaled to 1.
    """

    has_surface: ClassVar[bool] = True
    kind: ClassVar[str] = "signed_distance"
    suffixes_beside: ClassVar[tuple[str, ...]] = (".glb",)
    truncation: Positive
    half_side: Positive | None

    @property
    def suffix(self) -> str:
        return ".npy"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (self.suffix, *SUFFIXES)

    @property
    def half_range(self) -> float:
        return 1.0

    @property
    def note(self) -> str:
        return f"previews of the surfaces, {SIDE} x {SIDE} pixels from one side"

    def quantize(self, x: Tensor) -> Tensor:
        return x.float().clamp(-1, 1).half().float()

    def write(self, sample: Tensor, path: Path) -> None:
        write_npy(path, sample.numpy().astype(np.float16))

    def beside(self, sample: Tensor) -> dict[str, bytes]:
        return {".glb": glb(self.surface(sample))}

    def surface(self, sample: Tensor) -> Surface:
        """Return the surface of a stored sample [1, S, S, S] in the coordinates of files."""
        (vertices, faces), normals = marching_cubes(sample[0].numpy())
        return Surface(Triangles(self._from_voxels(vertices, sample.shape[-1]), faces), normals)

    def surface_points(self, sample: Tensor, count: int, seed: int) -> SurfacePoints:
        """Return points that are uniform on the surface, in units of half the cube without its margin."""
        (vertices, faces), _ = self.surface(sample)
        if not len(faces):
            return SurfacePoints(torch.empty(0, 3), 0.0, False)
        corners = vertices[faces] / (self.half_side or 1.0)
        first, second, third = np.moveaxis(corners, 1, 0)
        draw = np.random.RandomState(seed % 2**32)
        areas = np.linalg.norm(np.cross(second - first, third - first), axis=1)
        chosen = draw.choice(len(faces), count, p=areas / areas.sum())
        far, along = np.sqrt(draw.uniform(size=(count, 1))), draw.uniform(size=(count, 1))
        points = (1 - far) * first[chosen] + far * ((1 - along) * second[chosen] + along * third[chosen])
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
        _, uses = np.unique(edges, axis=0, return_counts=True)
        volume = float((first * np.cross(second, third)).sum() / 6)
        return SurfacePoints(torch.from_numpy(points).float(), volume, bool((uses == 2).all()))

    def read(self, data: bytes, shape: Shape) -> Tensor:
        """Return the volume of a .npy or a mesh.

        Raises:
            FormatError: the volume has another shape, or the mesh is not watertight or has no voxel inside.
        """
        if not data.startswith(MAGIC_PREFIX):
            volume = self.quantize(torch.from_numpy(self._distances(read_triangles(data), shape[-1])))
            if not (volume < 0).any():
                raise FormatError(
                    "is so thin that no voxel is inside; increase dataset.resolution, or thicken it"
                )
            return volume
        values = read_volume(data).values
        if values.shape != tuple(shape):
            raise FormatError(f"has shape {values.shape}; expected {tuple(shape)}")
        if np.abs(values).max() > 1:
            raise FormatError("has values outside [-1, 1], so these are no truncated distances")
        return self.quantize(torch.from_numpy(values))

    def _distances(self, mesh: Triangles, size: int) -> np.ndarray:
        """Return the values of a mesh in a file, [1, S, S, S]; FormatError if it cannot be converted."""
        used = mesh.vertices[np.unique(mesh.faces)]
        middle = (used.min(0) + used.max(0)) / 2 if self.half_side is None else 0.0
        reach = float(np.abs(used - middle).max())
        if self.half_side is not None and reach > self.half_side * (1 + ROUNDING):
            raise FormatError(
                f"has coordinates up to {reach:.6g}, beyond dataset.half_side={self.half_side:g}; increase it, "
                "or set null"
            )
        scale = (size / 2 - MARGIN) / (self.half_side or reach or 1.0)
        vertices = (mesh.vertices - middle) * scale + (size - 1) / 2
        return (
            signed_distances(closed(Triangles(vertices, mesh.faces)), size, self.truncation)[None]
            / self.truncation
        )

    def _from_voxels(self, vertices: np.ndarray, size: int) -> np.ndarray:
        """Return coordinates in voxels in those of files."""
        return (vertices - (size - 1) / 2) / (size / 2 - MARGIN) * (self.half_side or 1.0)

    def to_rgb(self, samples: Tensor) -> Tensor:
        return torch.stack([picture(sample[0]) for sample in samples.cpu()]).to(samples.device)

    def frames(self, samples: Tensor) -> Tensor:
        """Return views of each sample all around, uint8 [B, TURNS, 3, SIDE, SIDE]."""
        angles = [AZIMUTH + 2 * math.pi * turn / TURNS for turn in range(TURNS)]
        views = [torch.stack([picture(sample[0], angle) for angle in angles]) for sample in samples.cpu()]
        return torch.stack(views).to(samples.device)

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        return 3, SIDE, SIDE
