"""Exact signed distances of random solids: the built-in signed distance volumes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion_cli.data.shapes import Stream
from diffusion_cli.system.seeding import mix


class Solid(NamedTuple):
    """A solid around 0."""

    distance: Callable[[np.ndarray], np.ndarray]
    """Signed distances [...] of points [..., 3], negative inside."""
    radius: float
    """Distance of the farthest point from 0."""


def box_distance(points: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return the signed distances of points [..., 3] to a box with the corners -half and half (half: [3])."""
    beyond = np.abs(points) - half
    return np.linalg.norm(beyond.clip(min=0), axis=-1) + beyond.max(-1).clip(max=0)


def capsule_distance(points: np.ndarray, half: float, radius: float) -> np.ndarray:
    """Return the signed distances to all within `radius` of the segment of z from -half to half."""
    nearest = points[..., 2].clip(-half, half)
    return np.linalg.norm(points - nearest[..., None] * np.array([0, 0, 1]), axis=-1) - radius


def cone_distance(points: np.ndarray, half: float, radius: float) -> np.ndarray:
    """Return the signed distances to a cone about z with its base at z = -half and its tip at z = half."""
    rim, z = np.hypot(points[..., 0], points[..., 1]), points[..., 2]
    side = np.array([-radius, 2 * half])  # from the rim of the base to the tip
    along = (((rim - radius) * side[0] + (z + half) * side[1]) / (side @ side)).clip(0, 1)
    to_side = np.hypot(rim - radius - along * side[0], z + half - along * side[1])
    to_base = np.hypot((rim - radius).clip(min=0), z + half)
    inside = (z > -half) & (rim * side[1] < (half - z) * radius)
    distance = np.minimum(to_side, to_base)
    return np.where(inside, -distance, distance)


def cylinder_distance(points: np.ndarray, half: float, radius: float) -> np.ndarray:
    """Return the signed distances to a cylinder about z from z = -half to z = half."""
    flat = np.stack([np.hypot(points[..., 0], points[..., 1]), points[..., 2]], -1)
    return box_distance(flat, np.array([radius, half]))


def torus_distance(points: np.ndarray, ring: float, tube: float) -> np.ndarray:
    """Return the signed distances to a flat torus of ring radius `ring` and tube radius `tube`."""
    return np.hypot(np.hypot(points[..., 0], points[..., 1]) - ring, points[..., 2]) - tube


def box(draw: Stream) -> Solid:
    half = draw.uniform(0.4, 1, 3)
    return Solid(lambda points: box_distance(points, half), float(np.linalg.norm(half)))


def capsule(draw: Stream) -> Solid:
    half, radius = draw.uniform(0.5, 1.2), draw.uniform(0.4, 0.8)
    return Solid(lambda points: capsule_distance(points, half, radius), half + radius)


def cone(draw: Stream) -> Solid:
    half, radius = draw.uniform(0.6, 1.2), draw.uniform(0.7, 1.2)
    return Solid(lambda points: cone_distance(points, half, radius), float(np.hypot(half, radius)))


def cylinder(draw: Stream) -> Solid:
    half, radius = draw.uniform(0.3, 1.2), draw.uniform(0.4, 1)
    return Solid(lambda points: cylinder_distance(points, half, radius), float(np.hypot(half, radius)))


def sphere(draw: Stream) -> Solid:
    return Solid(lambda points: np.linalg.norm(points, axis=-1) - 1, 1.0)


def torus(draw: Stream) -> Solid:
    tube = draw.uniform(0.25, 0.5)
    return Solid(lambda points: torus_distance(points, 1.0, tube), 1 + tube)


SOLIDS: dict[str, Callable[[Stream], Solid]] = {
    "box": box, "capsule": capsule, "cone": cone, "cylinder": cylinder, "sphere": sphere, "torus": torus,
}  # fmt: skip


def solid_distances(number: int, size: int, reach: float) -> np.ndarray:
    """Return the signed distances of solid `number`, in voxels, at the voxels of a grid, float64 [S, S, S].

    The class is `number` modulo the number of SOLIDS. Proportions, size (the farthest point is 0.6 to 1 times `reach`
    away) and rotation are random.

    Args:
        number: number of the solid.
        size: voxels S along each axis; the solid is around their middle.
        reach: largest distance of its points from there, in voxels.
    """
    draw = Stream(mix("solid", number) % 2**32)
    solid = [*SOLIDS.values()][number % len(SOLIDS)](draw)
    scale = draw.uniform(0.6, 1) * reach / solid.radius
    rotation = np.linalg.qr(draw.standard_normal((3, 3)))[0]
    points = np.moveaxis(np.indices((size, size, size)), 0, -1) - (size - 1) / 2
    return solid.distance(points @ rotation / scale) * scale
