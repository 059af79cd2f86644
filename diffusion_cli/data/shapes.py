"""Random points on analytic surfaces: the built-in point clouds."""

from collections.abc import Callable

import numpy as np

from diffusion_cli.system.seeding import mix

Stream = np.random.RandomState
"""Random generator; NumPy guarantees that its stream never changes."""


def sphere(draw: Stream, count: int) -> np.ndarray:
    points = draw.standard_normal((count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def cube(draw: Stream, count: int) -> np.ndarray:
    points = draw.uniform(-1, 1, (count, 3))
    points[np.arange(count), draw.randint(3, size=count)] = draw.choice([-1.0, 1.0], count)
    return points


def cylinder(draw: Stream, count: int) -> np.ndarray:
    """Return points on a cylinder of radius 1 about z with height 1 to 3, including its caps."""
    height = draw.uniform(1, 3)
    on_side = draw.uniform(size=count) < height / (height + 1)  # area 2 pi h of the side, 2 pi of the caps
    rim = np.where(on_side, 1.0, np.sqrt(draw.uniform(size=count)))
    z = np.where(on_side, draw.uniform(-1, 1, count), draw.choice([-1.0, 1.0], count)) * height / 2
    return _turned(draw, rim, z)


def cone(draw: Stream, count: int) -> np.ndarray:
    """Return points on a cone about z of base radius 1 and height 1 to 3, including its base."""
    height = draw.uniform(1, 3)
    slope = np.hypot(1, height)
    on_side = draw.uniform(size=count) < slope / (slope + 1)  # area pi s of the side, pi of the base
    rim = np.sqrt(draw.uniform(size=count))
    return _turned(draw, rim, np.where(on_side, height * (0.5 - rim), -height / 2))


def torus(draw: Stream, count: int) -> np.ndarray:
    """Return points on a flat torus of ring radius 1 and tube radius 0.25 to 0.5."""
    tube = draw.uniform(0.25, 0.5)
    angle = draw.uniform(0, 2 * np.pi, count)
    # The area is proportional to 1 + tube cos(angle): reflect the excess points of the inner half outwards.
    inward = draw.uniform(size=count) > (1 + tube * np.cos(angle)) / 2
    angle = np.where(inward, np.pi - angle, angle)
    return _turned(draw, 1 + tube * np.cos(angle), tube * np.sin(angle))


SHAPES: dict[str, Callable[[Stream, int], np.ndarray]] = {
    "cone": cone, "cube": cube, "cylinder": cylinder, "sphere": sphere, "torus": torus,
}  # fmt: skip


def shape_points(number: int, count: int) -> np.ndarray:
    """Return points of cloud `number`, float64 [count, 3], uniform on a surface within the unit ball.

    The class is `number` modulo the number of SHAPES. Proportions, size (distance of the farthest point, 0.5 to 1)
    and rotation about z are random.
    """
    draw = Stream(mix("shape", number) % 2**32)
    points = [*SHAPES.values()][number % len(SHAPES)](draw, count)
    turn, size = draw.uniform(0, 2 * np.pi), draw.uniform(0.5, 1)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return points @ rotation.T * (size / np.linalg.norm(points, axis=1).max())


def _turned(draw: Stream, rim: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return points at distances `rim` from the z axis and heights `z`, at random angles."""
    around = draw.uniform(0, 2 * np.pi, len(rim))
    return np.stack([rim * np.cos(around), rim * np.sin(around), z], axis=1)
