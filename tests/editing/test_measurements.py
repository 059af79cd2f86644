"""Laws of measurements: their adjoints, and systems of equations with them."""

import math

import numpy as np
import pytest
import torch

from diffusion_cli.conditions.operators import BlockMean, LinearMeasurement, Luma, Mask
from diffusion_cli.editing import CT, MRI, Clipping, GaussianFilter, MotionFilter, RadialMRI
from diffusion_cli.errors import UsageError
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
    "gaussian": (GaussianFilter((2, 5, 6), sigma=1.3), (2, 5, 6)),
    "motion": (MotionFilter((2, 5, 6), length=3.5, angle=20.0), (2, 5, 6)),
    "motion of a volume": (MotionFilter((1, 2, 4, 5), length=2.0), (1, 2, 4, 5)),
    "ct": (CT((1, 6, 6), angles=5), (1, 6, 6)),
    "ct of a volume": (CT((1, 2, 4, 6), angles=3, arc=90.0), (1, 2, 4, 6)),
    "mri of real images": (MRI((1, 6, 8), acceleration=2.0, centre=0.25), (1, 6, 8)),
    "mri of complex images": (MRI((2, 6, 8), acceleration=2.0), (2, 6, 8)),
    "radial mri of a volume": (RadialMRI((2, 2, 4, 5), spokes=2), (2, 2, 4, 5)),
    "matrix": (Mixing(noise(7, 16)), (1, 4, 4)),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_adjoint_is_that_of_the_inner_products(name):
    operator, shape = MEASUREMENTS[name]
    u = noise(3, *shape, seed=1)
    y = operator(u)
    v = noise(*y.shape, seed=2)
    torch.testing.assert_close((y * v).sum(), (u * operator.adjoint(v)).sum())


@pytest.mark.parametrize(("prior", "variance"), [(1.0, 0.1), (0.3, 0.01), (2.0, 1e-4)])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_system_is_solved_as_by_its_matrix(name, prior, variance):
    operator, shape = MEASUREMENTS[name]
    matrix = matrix_of(operator, shape)
    y = operator(noise(3, *shape, seed=1))
    y = y + 0.1 * noise(*y.shape, seed=2)  # not in the range of the matrix
    x = operator.regularized_inverse(y, prior, variance).flatten(1)
    back = y.flatten(1) @ matrix
    spread = prior * matrix.T @ matrix + variance * torch.eye(matrix.shape[1], dtype=F64)
    torch.testing.assert_close(x @ spread, back, rtol=1e-4, atol=1e-4 * float(back.abs().max()))


@pytest.mark.parametrize("name", ["mask", "luma", "blocks", "mri of complex images", "matrix"])
def test_an_exact_measurement_is_solved_by_its_pseudo_inverse(name):
    operator, shape = MEASUREMENTS[name]
    y = operator(noise(3, *shape, seed=1))
    image = operator.regularized_inverse(y, 1.0, 0.0)
    torch.testing.assert_close(operator(image), y, rtol=1e-4, atol=1e-4)
    exact = y.flatten(1) @ torch.linalg.pinv(matrix_of(operator, shape)).T
    torch.testing.assert_close(image.flatten(1), exact, rtol=1e-4, atol=1e-4)


def test_the_solution_of_an_image_does_not_depend_on_the_others():
    operator = Mixing(noise(7, 16))
    b = torch.cat([noise(2, 7), 1e3 * noise(1, 7, seed=1), torch.zeros(1, 7, dtype=F64)])
    levels = torch.tensor([1e-3, 0.1, 1.0, 0.1], dtype=F64)[:, None, None, None]
    together = operator.regularized_inverse(b, 1.0, levels)
    alone = [operator.regularized_inverse(b[[place]], 1.0, levels[[place]]) for place in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_a_picture_shows_what_was_measured():
    operator = Mixing(torch.linalg.qr(noise(16, 7)).Q.T)
    y = operator(noise(2, 1, 4, 4))
    torch.testing.assert_close(operator(operator.picture(y)), y / 1.01)


# --- Blur ------------------------------------------------------------


def test_filters_keep_a_constant_and_the_sum_of_an_inner_point():
    point = torch.zeros(1, 1, 25, 25, dtype=F64)
    point[..., 12, 12] = 1
    for operator in (
        GaussianFilter((1, 25, 25), sigma=1.5),
        MotionFilter((1, 25, 25), length=8.0, angle=30.0),
    ):
        torch.testing.assert_close(operator(torch.ones_like(point)), torch.ones_like(point))
        torch.testing.assert_close(operator(point).sum(), torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0])
def test_a_motion_has_the_moments_of_a_uniform_line(angle):
    """Variance L^2 / 12 along the direction, and that of a pixel across it; rows point downwards."""
    length, place = 10.0, torch.arange(31, dtype=F64) - 15
    point = (place[:, None] ** 2 + place**2 == 0).to(F64)[None, None]
    image = MotionFilter((1, 31, 31), length=length, angle=angle)(point)[0, 0]
    x, y = place[None], -place[:, None]
    turn = math.radians(angle)
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    assert float((image * along).sum()) == pytest.approx(0, abs=1e-12)
    assert float((image * along**2).sum()) == pytest.approx(length**2 / 12, abs=0.3)
    assert float((image * across**2).sum()) < 0.3


# --- CT ------------------------------------------------------------


def bump(size, row, column, width):
    """A Gaussian of integral 1 with its centre at an offset from the middle pixel, [1, 1, size, size]."""
    place = torch.arange(size, dtype=F64) - size // 2
    squares = (place[:, None] - row) ** 2 + (place - column) ** 2
    return (torch.exp(-squares / (2 * width**2)) / (2 * math.pi * width**2))[None, None]


@pytest.mark.parametrize("size", [64, 65])
def test_projections_of_a_gaussian_are_gaussians(size):
    """At the place `column cos - row sin`, with the same width and mass."""
    angles, row, column, width = 12, 7.0, -4.0, 4.0
    y = size * CT((1, size, size), angles=angles)(bump(size, row, column, width))[0, 0]
    assert torch.allclose(y.sum(-1), torch.ones(angles, dtype=F64), atol=3e-4)
    place = torch.arange(y.shape[-1], dtype=F64) - y.shape[-1] // 2
    turn = torch.pi * torch.arange(angles, dtype=F64)[:, None] / angles
    middle = column * turn.cos() - row * turn.sin()
    exact = torch.exp(-((place - middle) ** 2) / (2 * width**2)) / math.sqrt(2 * math.pi) / width
    assert float((y - exact).abs().max()) < 0.03 * float(exact.max())
    torch.testing.assert_close((y * place).sum(-1, keepdim=True), middle, atol=1e-3, rtol=0)


def test_projections_at_right_angles_are_sums_of_columns_and_rows():
    image = noise(1, 1, 5, 5)
    y = 5 * CT((1, 5, 5), angles=2)(image)[0, 0]
    torch.testing.assert_close(y[0, 2:7], image[0, 0].sum(0))
    torch.testing.assert_close(y[1, 2:7].flip(0), image[0, 0].sum(1))


@pytest.mark.parametrize("size", [32, 33])
def test_projections_are_those_of_scikit_image(size):
    transform = pytest.importorskip("skimage.transform")
    image = np.random.default_rng(0).uniform(-1, 1, (size, size))
    theirs = transform.radon(image, np.arange(7) * 120 / 7, circle=False)
    mine = size * CT((1, size, size), angles=7, arc=120.0)(torch.from_numpy(image)[None, None])[0, 0]
    np.testing.assert_allclose(mine.numpy().T, theirs, atol=1e-6)


# --- MRI ------------------------------------------------------------


def test_a_complete_k_space_keeps_norms_and_white_noise_outside_is_unmeasured():
    whole = MRI((2, 8, 6), acceleration=1.0)
    x = noise(3, 2, 8, 6)
    torch.testing.assert_close(whole(x).square().sum(), x.square().sum())
    torch.testing.assert_close(whole.adjoint(whole(x)), x)
    partial = RadialMRI((2, 8, 6), spokes=2)
    y = partial(x)
    torch.testing.assert_close(partial(partial.adjoint(y)), y)


@pytest.mark.parametrize("size", [16, 17])
def test_measured_frequencies_include_the_lowest_ones(size):
    columns = torch.fft.fftshift(MRI((1, size, size), acceleration=4.0, centre=3 / size).sampled)
    assert columns[0].sum() == 4
    assert (columns == columns[0]).all()
    assert columns[0, size // 2 - 1 : size // 2 + 2].all()
    spokes = torch.fft.fftshift(RadialMRI((1, size, size), spokes=4).sampled)
    centre = size // 2
    assert spokes[centre].all()
    assert spokes[:, centre].all()
    assert spokes[centre + 3, centre + 3]
    assert not spokes[centre + 5, centre + 2]
    means = [MRI((1, 8, size), acceleration=4.0)(torch.ones(1, 1, 8, size, dtype=F64)).abs().amax()]
    assert float(means[0]) == pytest.approx(math.sqrt(8 * size))


def test_k_space_needs_one_or_two_channels():
    with pytest.raises(UsageError, match="1 channel, or 2 for complex values, but the model's have 3"):
        MRI((3, 8, 8))


def test_clipping_is_that_of_values_times_the_gain():
    x = torch.tensor([[-0.8, -0.25, 0.0, 0.4, 0.9]])
    assert Clipping((1, 1, 5), gain=2.0)(x).tolist()[0] == pytest.approx([-1.0, -0.5, 0.0, 0.8, 1.0])


@pytest.mark.parametrize("measurement", [CT, MRI, RadialMRI, MotionFilter])
def test_signals_have_no_such_measurements(measurement):
    with pytest.raises(UsageError, match=r"^measurement=\w+: needs images or volumes"):
        measurement((1, 64))


def test_noise_that_no_image_explains_stays_small():
    """Conjugate frequencies of real images have independent noise; in float32, and at alpha = 0."""
    operator = MRI((1, 16, 16))
    x = noise(2, 1, 16, 16).float()
    y = operator(x)
    y = y + 0.02 * noise(*y.shape, seed=1).float()
    for level in (0.0, 1e-12, 1e-6):
        image = operator.regularized_inverse(y, 1.0, level)
        assert image.abs().max() < 2 * x.abs().max()
        assert (operator(image) - y).square().mean().sqrt() < 0.03
