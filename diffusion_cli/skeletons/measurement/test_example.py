"""The measurement `example` is linear."""

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")
SHAPE = (1, 8, 8)


def test_the_adjoint_has_the_same_inner_products() -> None:
    operator = diffuse.option("measurement", "example", SHAPE)
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    y = operator(x)
    v = torch.randn_like(y)
    torch.testing.assert_close((y * v).sum(), (x * operator.adjoint(v)).sum())
