"""Point clouds."""

import math
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.base import STRICT, SampleFormat, Shape, SurfacePoints
from diffusion_cli.formats.ply import read_ply, write_ply

STEPS = (
    2**20
)  # quantization levels of a coordinate per unit: 1/16 of the float32 resolution at 1, so that files are exact
SIDE = 96  # pixels per side of a preview
FITS = 1.25  # largest visible distance from the centre
AZIMUTH, ELEVATION = math.radians(-60), math.radians(25)  # direction of view
FAR, NEAR = (205.0, 215.0, 240.0), (15.0, 30.0, 110.0)  # colours, on white
DOT = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]


@dataclass(frozen=True, config=STRICT)
class PointCloud(SampleFormat):
    """N points x, y, z, [3, N], stored as binary PLY.

    Coordinates are stored as multiples of radius / 2^20. Previews are parallel projections with z upwards; nearer
    points are darker.

    Args:
        radius: coordinate in files that corresponds to 1 in samples.
    """

    kind: ClassVar[str] = "points"
    ordered: ClassVar[bool] = False
    has_surface: ClassVar[bool] = True
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @property
    def suffix(self) -> str:
        return ".ply"

    @property
    def half_range(self) -> float:
        return self.radius

    @property
    def note(self) -> str:
        return f"previews of the points, {SIDE} x {SIDE} pixels from one side"

    def quantize(self, x: Tensor) -> Tensor:
        return x.float().clamp(-1, 1).mul(STEPS).round().div(STEPS)

    def write(self, sample: Tensor, path: Path) -> None:
        write_ply(sample.T.double().mul(self.radius).numpy(), path)

    def read(self, data: bytes, shape: Shape) -> Tensor:
        """Return the points of a PLY file; FormatError if their number is not `shape[1]`, or one exceeds the radius."""
        points = torch.from_numpy(read_ply(data)).T / self.radius
        if tuple(points.shape) != shape:
            raise FormatError(f"has {points.shape[1]} points; expected {shape[1]}")
        if points.abs().max() > 1 + 1 / STEPS:
            raise FormatError(f"has points outside -{self.radius:g} to {self.radius:g}")
        return self.quantize(points)

    def surface_points(self, sample: Tensor, count: int, seed: int) -> SurfacePoints:
        """Return a random subset of the points."""
        order = torch.randperm(sample.shape[1], generator=torch.Generator().manual_seed(seed))
        return SurfacePoints(sample.T[order[:count]])

    def to_rgb(self, samples: Tensor) -> Tensor:
        right, up, near = projected(samples.float())
        across = ((right / FITS + 1) * SIDE / 2).long()
        down = ((1 - up / FITS) * SIDE / 2).long()
        # The nearest point per pixel, as 1 to 2; 0 for none.
        depth = samples.new_zeros(len(samples), (SIDE + 2) ** 2, dtype=torch.float32)
        nearness = 1 + ((near / FITS + 1) / 2).clamp(0, 1)
        for i, j in DOT:
            row, column = (down + i + 1).clamp(0, SIDE + 1), (across + j + 1).clamp(0, SIDE + 1)
            depth.scatter_reduce_(1, row * (SIDE + 2) + column, nearness, "amax")
        depth = depth.view(-1, 1, SIDE + 2, SIDE + 2)[..., 1:-1, 1:-1]
        far, colour = (depth.new_tensor(colour).view(3, 1, 1) for colour in (FAR, NEAR))
        return torch.where(depth > 0, far + (colour - far) * (depth - 1), 255.0).round().to(torch.uint8)

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        return 3, SIDE, SIDE


def projected(points: Tensor, azimuth: float = AZIMUTH) -> tuple[Tensor, Tensor, Tensor]:
    """Return the offsets of points [B, 3, N] to the right, upwards and to the front of a view, [B, N] each."""
    x, y, z = points.unbind(1)
    right = x * -math.sin(azimuth) + y * math.cos(azimuth)
    front = x * math.cos(azimuth) + y * math.sin(azimuth)
    up = z * math.cos(ELEVATION) - front * math.sin(ELEVATION)
    return right, up, z * math.sin(ELEVATION) + front * math.cos(ELEVATION)
