"""Points on the surfaces of bodies that formulas describe, the built-in set of point sets."""

from collections.abc import Callable

import numpy as np

from diffusion_cli.system.seeding import mix

Stream = np.random.RandomState
"""NumPy guarantees its numbers for ever."""


def sphere(draw: Stream, count: int) -> np.ndarray:
    points = draw.standard_normal((count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def cube(draw: Stream, count: int) -> np.ndarray:
    points = draw.uniform(-1, 1, (count, 3))
    points[np.arange(count), draw.randint(3, size=count)] = draw.choice([-1.0, 1.0], count)
    return points


def cylinder(draw: Stream, count: int) -> np.ndarray:
    """Of radius 1 about z, half to one and a half times as high as wide."""
    height = draw.uniform(1, 3)
    on_side = draw.uniform(size=count) < height / (height + 1)  # 2 pi h beside 2 pi
    rim = np.where(on_side, 1.0, np.sqrt(draw.uniform(size=count)))
    z = np.where(on_side, draw.uniform(-1, 1, count), draw.choice([-1.0, 1.0], count)) * height / 2
    return _turned(draw, rim, z)


def cone(draw: Stream, count: int) -> np.ndarray:
    """Of radius 1 at its base below, half to one and a half times as high as wide."""
    height = draw.uniform(1, 3)
    slope = np.hypot(1, height)
    on_side = draw.uniform(size=count) < slope / (slope + 1)  # pi s beside pi
    rim = np.sqrt(draw.uniform(size=count))
    return _turned(draw, rim, np.where(on_side, height * (0.5 - rim), -height / 2))


def torus(draw: Stream, count: int) -> np.ndarray:
    """Of a tube a quarter to a half as thick as its ring is wide, lying flat."""
    tube = draw.uniform(0.25, 0.5)
    angle = draw.uniform(0, 2 * np.pi, count)
    # The area grows as 1 + tube cos(angle): what is too much of the inner half goes to the outer.
    inward = draw.uniform(size=count) > (1 + tube * np.cos(angle)) / 2
    angle = np.where(inward, np.pi - angle, angle)
    return _turned(draw, 1 + tube * np.cos(angle), tube * np.sin(angle))


SHAPES: dict[str, Callable[[Stream, int], np.ndarray]] = {
    "cone": cone, "cube": cube, "cylinder": cylinder, "sphere": sphere, "torus": torus,
}  # fmt: skip


def shape_points(number: int, count: int) -> np.ndarray:
    """Points of set `number`, float64 [count, 3], uniform on a surface within the unit ball.

    Its class is `number` modulo the number of SHAPES. Proportions, the size (the farthest a body reaches: 0.5 to 1)
    and the turn about z are drawn.
    """
    draw = Stream(mix("shape", number) % 2**32)
    points = [*SHAPES.values()][number % len(SHAPES)](draw, count)
    turn, size = draw.uniform(0, 2 * np.pi), draw.uniform(0.5, 1)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return points @ rotation.T * (size / np.linalg.norm(points, axis=1).max())


def _turned(draw: Stream, rim: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Points at distances `rim` from the z axis and heights z, anywhere around it."""
    around = draw.uniform(0, 2 * np.pi, len(rim))
    return np.stack([rim * np.cos(around), rim * np.sin(around), z], axis=1)
