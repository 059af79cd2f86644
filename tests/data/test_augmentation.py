"""Random transforms of images and their parameters."""

import math

import pytest
import torch
from torch import Tensor

from diffusion_cli.data import EDMAugmentation

OFF = {"x_flip": False, "y_flip": False, "scale": 0.0, "rotation": 0.0, "anisotropy": 0.0, "translation": 0.0}
EVERYTHING = [1, 1, 0.7, math.cos(2) - 1, math.sin(2), 0.6, -0.9, 0.4, -0.3]


def images(count: int = 1, sizes: tuple[int, int] = (8, 8)) -> Tensor:
    return 2 * torch.rand(count, 3, *sizes, generator=torch.Generator().manual_seed(0)) - 1


def parameters(**changes: float) -> Tensor:
    """Parameters of one image, 0 unless given."""
    names = ["x_flip", "y_flip", "scale", "cos", "sin", "along", "across", "right", "down"]
    assert changes.keys() <= {*names}
    return torch.tensor([[changes.get(name, 0.0) for name in names]])


def drawn(count: int = 20_000, **options: float) -> Tensor:
    return EDMAugmentation(**options).draw(count, torch.Generator().manual_seed(0))  # pyright: ignore


@pytest.mark.parametrize(("changes", "expected"), [
    ({"x_flip": 1}, lambda x: x.flip(3)),
    ({"y_flip": 1}, lambda x: x.flip(2)),
    ({"cos": -1, "sin": 1}, lambda x: x.rot90(-1, (2, 3))),
    ({"cos": -2}, lambda x: x.flip(2, 3)),
    ({"right": 2}, lambda x: torch.cat([x[..., :2].flip(3), x[..., :-2]], 3)),
    ({"down": -1}, lambda x: torch.cat([x[..., 1:, :], x[..., -1:, :]], 2)),
    ({"x_flip": 1, "cos": -1, "sin": 1}, lambda x: x.flip(3).rot90(-1, (2, 3))),
    ({"cos": -1, "sin": 1, "right": 1},
     lambda x: torch.cat([(y := x.rot90(-1, (2, 3)))[..., :1], y[..., :-1]], 3)),
], ids=lambda value: ",".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_flips_quarter_turns_and_whole_shifts_are_exact(changes, expected):
    """A shift by 0.125 of 8 pixels is one pixel, and reflects the border."""
    x = images()
    torch.testing.assert_close(EDMAugmentation()(x, parameters(**changes)), expected(x), rtol=0, atol=1e-5)


def test_shifts_are_relative_to_width_and_height():
    x = images(sizes=(4, 16))
    shifted = EDMAugmentation(translation=0.25)(x, parameters(right=1, down=1))
    torch.testing.assert_close(shifted[..., 1:, 4:], x[..., :-1, :-4], rtol=0, atol=1e-5)


def blob(x: Tensor, y: Tensor) -> Tensor:
    return 2 * torch.exp(-((x - 0.2) ** 2) / 0.05 - (y + 0.1) ** 2 / 0.1) - 1


@pytest.mark.parametrize("row", [
    [0, 0, 1.5, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, math.cos(0.7) - 1, math.sin(0.7), 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1.5, 0, 0],
    [0, 0, -1.0, math.cos(2) - 1, math.sin(2), 0.5, 0.8, 0.3, -0.5],
])  # fmt: skip
def test_a_smooth_function_is_that_of_the_source_positions(row):
    """The error in an image of 32 pixels is at most 2 % of its range, except where the border is reflected."""
    augmentation, size = EDMAugmentation(), 32
    ticks = (torch.arange(size, dtype=torch.float64) + 0.5) / (size / 2) - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    ((a, b, c), (d, e, f)) = augmentation.source_positions(torch.tensor([row]), (size, size))[0]
    made = augmentation(blob(x, y)[None, None].float(), torch.tensor([row]).float())
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    inside = torch.maximum(source_x.abs(), source_y.abs()) < 1
    assert inside.double().mean() > 0.5
    torch.testing.assert_close(
        made[0, 0].double()[inside], blob(source_x, source_y)[inside], rtol=0, atol=0.04
    )


def square(row: Tensor, sizes: tuple[int, int] = (8, 8)) -> Tensor:
    """Matrices [3, 3] that map positions of the result to those of the image."""
    affine = EDMAugmentation().source_positions(row, sizes)[0]
    return torch.cat([affine, affine.new_tensor([[0, 0, 1]])])


def test_transforms_act_in_the_order_of_their_parameters():
    whole = torch.tensor([EVERYTHING])
    parts = []
    for columns in ([2], [3, 4], [5, 6], [7, 8]):
        part = torch.zeros(1, 9)
        part[:, columns] = whole[:, columns]
        parts.append(square(part, (6, 10)))
    torch.testing.assert_close(square(whole, (6, 10)), torch.linalg.multi_dot(parts))


@pytest.mark.parametrize(("one", "inverse"), [
    ({"scale": 0.8}, {"scale": -0.8}),
    ({"cos": math.cos(1) - 1, "sin": math.sin(1)}, {"cos": math.cos(1) - 1, "sin": -math.sin(1)}),
    ({"along": 0.8, "across": -0.3}, {"along": -0.8, "across": 0.3}),
    ({"right": 0.8, "down": -0.3}, {"right": -0.8, "down": 0.3}),
])  # fmt: skip
def test_opposite_parameters_undo_a_transform(one, inverse):
    product = square(parameters(**one)) @ square(parameters(**inverse))
    torch.testing.assert_close(product, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0])
def test_an_anisotropic_scaling_doubles_one_axis_and_halves_the_other(angle):
    r = math.radians(angle)
    row = 5 * parameters(along=math.cos(2 * r), across=math.sin(2 * r))
    linear = square(row)[:2, :2]  # anisotropy 0.2: 2^(0.2 * 5) = 2
    axis = torch.tensor([math.cos(r), math.sin(r)], dtype=torch.float64)
    torch.testing.assert_close(linear @ axis, axis / 2)
    across = torch.stack([-axis[1], axis[0]])
    torch.testing.assert_close(linear @ across, 2 * across)


def test_one_image_at_a_time_gives_the_same_images():
    x, rows = images(5), drawn(5, probability=0.7)
    one_by_one = [EDMAugmentation()(x[n : n + 1], rows[n : n + 1]) for n in range(5)]
    assert torch.equal(EDMAugmentation()(x, rows), torch.cat(one_by_one))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_number_format_of_the_training_does_not_change_the_images(precision):
    x, transforms = images(4, (64, 64)), drawn(4, probability=1.0)
    with torch.autocast("cpu", precision):
        rounded = EDMAugmentation()(x, transforms)
    assert torch.equal(rounded, EDMAugmentation()(x, transforms))


def test_images_keep_the_range_of_their_channels():
    x, rows = images(50), drawn(50, probability=1.0)
    made = EDMAugmentation()(x, rows)
    assert (made.amin((2, 3)) >= x.amin((2, 3))).all()
    assert (made.amax((2, 3)) <= x.amax((2, 3))).all()


def test_images_without_a_transform_are_unchanged_to_the_last_bit():
    x, rows = images(2), torch.tensor([[0.0] * 9, EVERYTHING])
    made = EDMAugmentation()(x, rows)
    assert torch.equal(made[0], x[0])
    assert not torch.equal(made[1], x[1])
    assert not drawn(probability=0.0).any()


def test_each_transform_has_its_probability_and_unit_strength():
    rows = drawn(probability=0.3)
    shares = (rows != 0).double().mean(0).tolist()
    assert shares == pytest.approx([0.5, 0.15, *[0.3] * 4, 0.15, 0.3, 0.3], abs=0.02)
    every = drawn(probability=1.0).double()
    assert every[:, [2, 7, 8]].std(0).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    assert every[:, 5:7].norm(dim=1).square().mean().item() == pytest.approx(1, abs=0.05)
    angles = torch.atan2(every[:, 4], 1 + every[:, 3])
    quantiles = angles.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert (quantiles / math.pi).tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=0.03)
    turned = drawn(probability=1.0, rotation=10.0)
    assert turned[:, 4].abs().max().item() == pytest.approx(math.sin(math.radians(10)), rel=1e-3)
    assert turned[:, 3].min().item() == pytest.approx(math.cos(math.radians(10)) - 1, rel=1e-3)


COLUMNS = {
    "x_flip": [0], "y_flip": [1], "scale": [2], "rotation": [3, 4], "anisotropy": [5, 6], "translation": [7, 8],
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_a_transform_that_is_left_out_changes_no_other(name):
    rows, columns = drawn(500, probability=0.5), COLUMNS[name]
    rows[:, columns] = 0
    assert torch.equal(drawn(500, probability=0.5, **{name: OFF[name]}), rows)
