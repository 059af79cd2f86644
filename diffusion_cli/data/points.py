"""Point clouds from files, or sampled from analytic surfaces."""

import zlib
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.lib.format import MAGIC_PREFIX
from pydantic import Field, PositiveFloat
from torch import Tensor

from diffusion_cli.data.array import array_of
from diffusion_cli.data.base import Split
from diffusion_cli.data.file_names import RULES
from diffusion_cli.data.file_set import FileSet, Labels
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.shapes import SHAPES, shape_points
from diffusion_cli.errors import FormatError
from diffusion_cli.formats.mesh import SUFFIXES as MESHES
from diffusion_cli.formats.mesh import mesh_type, read_mesh
from diffusion_cli.formats.ply import read_ply
from diffusion_cli.formats.point_cloud import PointCloud
from diffusion_cli.system.untrusted import reason

FIRST_SUFFIXES = (".npy", ".ply")
"""Suffixes that versions 1 and 2 of the data rules read."""
SUFFIXES = (*FIRST_SUFFIXES, *MESHES)


class Points(FileSet["PointDecoder"]):
    """Point clouds [3, num_points]; the points have no order.

    With a `path`, these are all files of `SUFFIXES` in the folder or ZIP archive, at any depth, see `PointDecoder`,
    with classes as in `Folder`. Without a path, they are `size` clouds on five kinds of surfaces, see `shape_points`,
    which are the classes. All clouds are held in memory.

    Args:
        data_dir: folder of downloaded datasets, for the copy of a URL.
        rules: version of the rules that convert files to point clouds.
        path: folder or .zip file, or its URL; None: built-in shapes.
        num_points: points per cloud.
        radius: coordinate that becomes 1; None: scale each cloud to the unit ball.
        labels: source of the classes, as in `Folder`; for built-in shapes `auto` or `none`.
        size: number of built-in shapes.
        val_fraction: fraction of the clouds for validation, in [0, 1).
        group: groups of files, as in `Folder`; None: each file by itself.

    Raises:
        UsageError: the path is missing, not an archive, or has no point clouds; or requested labels are missing.
            `load` raises it for files that cannot be used.
    """

    noun = "point clouds"
    skips_figures = False  # as in earlier versions

    def __init__(
        self,
        data_dir: str,
        rules: int = RULES,
        *,
        path: str | None = None,
        num_points: Annotated[int, Field(ge=1, le=10**6)] = 256,
        radius: PositiveFloat | None = None,
        labels: Labels = "auto",
        size: Annotated[int, Field(ge=1, le=10**7)] = 5000,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        group: str | None = None,
    ) -> None:
        super().__init__(data_dir, rules, path, labels, group, val_fraction)
        self.decoder = PointDecoder(num_points, radius)
        self.shape = self.decoder.shape
        self.form = PointCloud(radius=radius or 1.0)
        if self.path is None:
            self.choose_built_in("shapes", size, SHAPES)
        else:
            self.choose_files(FIRST_SUFFIXES if rules < 3 else SUFFIXES)

    def load(self, split: Split) -> MemoryImages:
        return self.in_memory(split)

    def built_in(self, rows: list[int]) -> Tensor:
        made = [self.decoder.scaled(shape_points(row, self.decoder.num_points)) for row in rows]
        points = np.array(made, np.float32).reshape(-1, *reversed(self.shape))
        return torch.from_numpy(points).transpose(1, 2).contiguous()


class PointDecoder(NamedTuple):
    """Decodes .npy files of [N, 3], .ply files and the vertices of meshes to float32 [3, num_points] in [-1, 1].

    Of the N >= num_points points of a file, a hash of the file selects a random subset. Coordinates are divided by
    `radius`; with None, each cloud is shifted and scaled so that the centre of its bounding box is at 0 and the
    farthest point at distance 1.
    """

    num_points: int
    radius: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the arrays, [3, num_points]."""
        return 3, self.num_points

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays, float32."""
        return np.dtype(np.float32)

    def __call__(self, data: bytes) -> np.ndarray:
        """Return the points; FormatError if the file is malformed, has too few points, or exceeds the radius."""
        points = _points(data)
        if len(points) < self.num_points:
            raise FormatError(f"has {len(points)} points, fewer than dataset.num_points={self.num_points}")
        taken = np.random.RandomState(zlib.crc32(data)).permutation(len(points))[: self.num_points]
        return self.scaled(points)[taken].T.astype(np.float32)

    def scaled(self, points: np.ndarray) -> np.ndarray:
        """Return the points [N, 3] of a cloud, shifted and scaled."""
        if self.radius is None:
            points = points - (points.min(0) + points.max(0)) / 2
            return points / (np.linalg.norm(points, axis=1).max() or 1.0)
        farthest = np.abs(points).max()
        if farthest > self.radius:
            raise FormatError(
                f"has coordinates up to {farthest:.6g}, beyond dataset.radius={self.radius:g}; increase it, or set null"
            )
        return points / self.radius


def _points(data: bytes) -> np.ndarray:
    """Return the points of a file, float64 [N, 3]."""
    if data.startswith(b"ply"):
        return read_ply(data)
    if data.startswith(MAGIC_PREFIX):  # its numbers may contain the bytes of a mesh
        return _rows(data)
    kind = mesh_type(data)
    return _rows(data) if kind is None else read_mesh(data, kind)


def _rows(data: bytes) -> np.ndarray:
    try:
        points = array_of(data)
    except Exception as error:  # NumPy's parser raises errors of many types for damaged headers
        raise FormatError(reason(error)) from error
    if points.ndim != 2 or points.shape[1] != 3:
        raise FormatError(f"has shape {points.shape}; expected (N, 3)")
    if not np.isfinite(points).all():
        raise FormatError("has coordinates that are not finite")
    return points.astype(np.float64)
