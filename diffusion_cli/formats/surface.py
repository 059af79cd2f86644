"""Surfaces of signed distance volumes: marching cubes, GLB files and previews."""

import json
import math
import struct
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.formats.mesh import Triangles
from diffusion_cli.formats.point_cloud import AZIMUTH, projected

SIDE = 96  # pixels per side of a preview
FITS = 1.25  # largest visible distance from the centre
LEAST = 2.0**-11
"""Smallest size of a distance at a voxel; a surface through a voxel would have triangles without an area."""
LIGHT = (-0.4, 0.6, 0.7)  # direction to the right, upwards and to the front
DARK, BRIGHT = (15.0, 25.0, 80.0), (200.0, 215.0, 245.0)  # colours, on white
FLOAT, UINT32, ATTRIBUTES, INDICES = 5126, 5125, 34962, 34963  # numbers of glTF


class Surface(NamedTuple):
    """Triangles of a surface, with normals."""

    triangles: Triangles
    """Triangles, anticlockwise if seen from outside."""
    normals: np.ndarray
    """Outward unit normals of the vertices, float64 [V, 3]."""


def require_marching_cubes() -> None:
    """Raise UsageError with the install command if scikit-image is missing."""
    if find_spec("skimage") is None:
        raise UsageError(
            "dataset", NO_VALUE, "meshes need scikit-image", "install it: pip install 'diffuse-cli[meshes]'"
        )


def marching_cubes(volume: np.ndarray) -> Surface:
    """Return the surface at level 0 of signed distances [S, S, S], in voxels; voxel i has the coordinate i.

    What lies beyond the volume counts as outside, so that the surface is closed: each edge has two triangles. It has
    no triangles if no value is negative.

    Raises:
        UsageError: scikit-image is not installed.

    Source: Lorensen & Cline 1987.
    """
    require_marching_cubes()
    from skimage import measure  # optional

    values = np.pad(volume.astype(np.float32), 1, constant_values=1.0)
    values = np.where(np.abs(values) < LEAST, np.where(values < 0, -LEAST, LEAST), values)
    if values.min() > 0:
        return Surface(Triangles(np.empty((0, 3)), np.empty((0, 3), np.int64)), np.empty((0, 3)))
    vertices, faces, inward, _ = measure.marching_cubes(values, 0.0, method="lorensen")
    return Surface(
        Triangles(vertices.astype(np.float64) - 1, faces.astype(np.int64)), -inward.astype(np.float64)
    )


def glb(surface: Surface) -> bytes:
    """Return a surface as a GLB file, with a scene of one mesh with normals; an empty scene without triangles.

    Source: the glTF 2.0 specification of the Khronos Group.
    """
    (vertices, faces), normals = surface
    scene: dict[str, object] = {
        "asset": {"version": "2.0", "generator": "diffuse"},
        "scene": 0,
        "scenes": [{}],
    }
    data = b""
    if len(faces):
        points = vertices.astype("<f4")
        parts = [points.tobytes(), normals.astype("<f4").tobytes(), faces.astype("<u4").tobytes()]
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        data = b"".join(parts)
        vector = {"componentType": FLOAT, "count": len(points), "type": "VEC3"}
        limits = {"min": points.min(0).tolist(), "max": points.max(0).tolist()}
        scene |= {
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1}, "indices": 2}]}],
            "buffers": [{"byteLength": len(data)}],
            "bufferViews": [
                {"buffer": 0, "byteOffset": start, "byteLength": len(part), "target": target}
                for start, part, target in zip(starts, parts, (ATTRIBUTES, ATTRIBUTES, INDICES), strict=False)
            ],
            "accessors": [
                {"bufferView": 0, **vector, **limits},
                {"bufferView": 1, **vector},
                {"bufferView": 2, "componentType": UINT32, "count": faces.size, "type": "SCALAR"},
            ],
        }
    text = json.dumps(scene).encode()
    chunks = [(b"JSON", text + b" " * (-len(text) % 4)), *([(b"BIN\0", data)] if data else [])]
    body = b"".join(struct.pack("<I", len(chunk)) + name + chunk for name, chunk in chunks)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def picture(volume: Tensor, azimuth: float = AZIMUTH) -> Tensor:
    """Return a shaded view of the surface at level 0 of signed distances [S, S, S], uint8 [3, SIDE, SIDE].

    It is a parallel projection, with z upwards, of a disc for each edge of the grid that the surface crosses.
    """
    points, normals = _discs(F.pad(volume.float()[None, None], (1,) * 6, value=1.0)[0, 0])
    right, up, near = (each[0] for each in projected(points.T[None], azimuth))
    facing = torch.stack([each[0] for each in projected(normals.T[None], azimuth)])
    pixel = 2 * FITS / SIDE
    radius = 2.0 / len(volume)  # a voxel
    reach = math.ceil(radius / pixel)
    across, down = (right + FITS) / pixel, (FITS - up) / pixel
    depth = volume.new_full((SIDE * SIDE,), -math.inf, dtype=torch.float32)
    shade = depth.new_zeros(SIDE * SIDE)
    light = torch.tensor(LIGHT) / math.hypot(*LIGHT)
    bright = (facing * light[:, None]).sum(0).clamp(min=0)
    seen = facing[2] > 0.05
    steps = torch.cartesian_prod(torch.arange(-reach, reach + 1), torch.arange(-reach, reach + 1))
    row, column = down.long() + steps[:, :1], across.long() + steps[:, 1:]
    x, y = (column + 0.5 - across) * pixel, (down - row - 0.5) * pixel
    z = -(facing[0] * x + facing[1] * y) / facing[2].clamp(min=0.05)
    inside = (
        (x * x + y * y + z * z <= radius**2)
        & seen
        & (row >= 0)
        & (row < SIDE)
        & (column >= 0)
        & (column < SIDE)
    )
    place = (row * SIDE + column)[inside]
    height = (near + z)[inside]
    depth.scatter_reduce_(0, place, height, "amax")
    top = height >= depth[place] - radius / 2  # the discs of one surface overlap: their mean is smooth
    count = torch.zeros_like(shade).index_add_(0, place[top], torch.ones_like(height[top]))
    shade.index_add_(0, place[top], bright.expand_as(z)[inside][top])
    shade = shade / count.clamp(min=1)
    dark, light_colour = (torch.tensor(colour).view(3, 1) for colour in (DARK, BRIGHT))
    colours = torch.where(count > 0, dark + (light_colour - dark) * shade, 255.0)
    return colours.round().to(torch.uint8).view(3, SIDE, SIDE)


def _discs(volume: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the edges of a padded grid cross level 0, and the unit normals there, [M, 3] each.

    Points are in the cube [-1, 1]^3 of the grid without the padding.
    """
    size = len(volume)
    gradient = torch.stack(torch.gradient(volume), -1)
    points, normals = [], []
    for axis in range(3):
        first, second = volume.narrow(axis, 0, size - 1), volume.narrow(axis, 1, size - 1)
        crossed = (first < 0) != (second < 0)
        share = (first / (first - second))[crossed][:, None]
        place = crossed.nonzero().float()
        place[:, axis] += share[:, 0]
        points.append(place)
        low, high = (gradient.narrow(axis, start, size - 1)[crossed] for start in (0, 1))
        normals.append(low + (high - low) * share)
    return (torch.cat(points) - size / 2 + 0.5) * (2 / (size - 2)), F.normalize(torch.cat(normals), dim=1)
