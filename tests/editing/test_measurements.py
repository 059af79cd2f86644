"""Laws of measurements: their adjoints, and systems of equations with them."""

import pytest
import torch

from diffusion_cli.conditions.operators import BlockMean, LinearMeasurement, Luma, Mask
from helpers.editing import F64, matrix_of, noise

HALF = torch.arange(64).view(1, 1, 8, 8) % 3 == 0


class Mixing(LinearMeasurement):
    """A dense matrix."""

    def __init__(self, matrix):
        super().__init__((1, 4, 4))
        self.matrix = matrix

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T.to(x)


MEASUREMENTS = {
    "mask": (Mask(HALF), (1, 8, 8)),
    "luma": (Luma(), (3, 4, 4)),
    "blocks": (BlockMean(4), (1, 8, 8)),
    "blocks of a volume": (BlockMean(2), (1, 2, 4, 2)),
    "matrix": (Mixing(noise(7, 16)), (1, 4, 4)),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_adjoint_is_that_of_the_inner_products(name):
    operator, shape = MEASUREMENTS[name]
    u = noise(3, *shape, seed=1)
    y = operator(u)
    v = noise(*y.shape, seed=2)
    torch.testing.assert_close((y * v).sum(), (u * operator.adjoint(v)).sum())


@pytest.mark.parametrize(("prior", "variance"), [(1.0, 0.1), (0.3, 0.0), (2.0, 1e-4)])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_system_is_solved_as_by_its_matrix(name, prior, variance):
    operator, shape = MEASUREMENTS[name]
    matrix = matrix_of(operator, shape)
    b = operator(noise(3, *shape, seed=1))
    v = operator.solve(b, prior, variance)
    spread = prior * matrix @ matrix.T + variance * torch.eye(len(matrix), dtype=F64)
    torch.testing.assert_close(v.flatten(1) @ spread, b.flatten(1), rtol=1e-4, atol=1e-4)


def test_the_solution_of_an_image_does_not_depend_on_the_others():
    operator = Mixing(noise(7, 16))
    b = torch.cat([noise(2, 7), 1e3 * noise(1, 7, seed=1), torch.zeros(1, 7, dtype=F64)])
    levels = torch.tensor([1e-3, 0.1, 1.0, 0.1], dtype=F64)[:, None]
    together = operator.solve(b, 1.0, levels)
    alone = [operator.solve(b[[place]], 1.0, levels[[place]]) for place in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_a_picture_shows_what_was_measured():
    operator = Mixing(torch.linalg.qr(noise(16, 7)).Q.T)
    y = operator(noise(2, 1, 4, 4))
    torch.testing.assert_close(operator(operator.picture(y)), y / 1.01)
