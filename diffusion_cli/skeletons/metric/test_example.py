"""The metric `example` is a difference of means."""

from types import SimpleNamespace
from typing import Any

import diffusion_cli as diffuse
import torch
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.metrics.base import SampleBatch

diffuse.allow_plugins("example_package")
BLACK, WHITE = (torch.full((5, 1, 4, 4), value, dtype=torch.uint8) for value in (0, 255))


def value(real: torch.Tensor, *batches: torch.Tensor, **settings: bool) -> Any:
    images = MemoryImages(real, None)
    seen: Any = SimpleNamespace(real=SimpleNamespace(images=lambda: images, protocol=dict))
    state = diffuse.option("metric", "example", **settings).init_state(seen)
    for batch in batches:
        state.update(SampleBatch(batch, None, seen))
    (found,) = state.compute()
    return found.value


def test_it_is_zero_for_the_real_images_themselves() -> None:
    assert value(WHITE, WHITE, WHITE) == 0


def test_it_is_the_difference_of_the_means() -> None:
    assert value(WHITE, WHITE, BLACK) == 0.5
    assert value(WHITE, WHITE, BLACK, absolute=False) == -0.5
