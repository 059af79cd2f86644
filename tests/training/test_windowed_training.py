"""Training on random windows of images."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_cli.conditions import Condition
from diffusion_cli.data import Batch
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import Simple
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.networks import UNet
from diffusion_cli.networks.tiles import coordinates
from diffusion_cli.training.module import DenoisingModule
from diffusion_cli.training.windows import random_windows
from helpers import checkpoint_info
from helpers.networks import SMALL, close, randomised

COUNT, SHAPE = 8, (1, 12, 16)


def places(sizes) -> torch.Tensor:
    """Images whose pixels are their own coordinates, [1, ndim, *sizes]."""
    return coordinates(torch.tensor([[-1.0, 1.0] * len(sizes)]), sizes)


@pytest.mark.parametrize(
    ("sizes", "window"), [((12, 16), (8, 8)), ((6, 16), (8, 8)), ((9, 10, 11), (4, 5, 6))]
)
def test_windows_are_parts_of_their_images_at_their_positions(sizes, window):
    images = places(sizes).repeat(50, *[1] * (len(sizes) + 1))
    u = torch.rand(50, len(sizes), generator=torch.Generator().manual_seed(0))
    found, condition = random_windows(images, Condition({"image": 2 * images}), window, u)
    tile = tuple(map(min, zip(sizes, window, strict=True)))
    assert found.shape == (50, len(sizes), *tile)
    assert len({tuple(each.flatten().tolist()) for each in found}) > 5
    where = condition.get("position")
    assert where is not None
    close(coordinates(where, tile), found, 1e-6)
    assert torch.equal(condition.values["image"], 2 * found)


def test_all_positions_occur_and_those_at_the_border_most():
    u = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    found, _ = random_windows(places((24,)).repeat(4000, 1, 1), None, (8,), u)
    counts = found[:, 0, 0].unique(return_counts=True)[1]
    assert len(counts) == 17
    assert counts[[0, -1]].min() > 1.5 * counts[1:-1].max()
    assert counts[1:-1].min() > 0.6 * counts[1:-1].max()


class Recorder(Simple):
    """An objective that keeps what it gets."""

    def __call__(self, model, x0, y, t, eps):
        self.seen = x0, y, eps
        return super().__call__(model, x0, y, t, eps)


def seen(number: int = 0, rows: slice = slice(COUNT), **place: int):
    torch.manual_seed(0)
    network = randomised(UNet(SHAPE, None, **SMALL, window=[8, 8], window_overlap=2))
    made = DenoisingModule(
        Denoiser(network, Cosine(), Eps()), objective := Recorder(), Uniform(), Pixels(SHAPE), None,  # pyright: ignore
        seed=0, info=checkpoint_info(),
    )  # fmt: skip
    alone = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    made.trainer = SimpleNamespace(**{**alone, **place})  # pyright: ignore[reportAttributeAccessIssue]
    images = 2 * torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0)) - 1
    batch = Batch(number, images, None, torch.arange(COUNT)).part(torch.arange(COUNT)[rows])
    made.training_step(batch, 0).backward()
    assert all(weight.grad is not None for weight in network.parameters())
    x0, y, eps = objective.seen
    assert y is not None
    assert x0.shape == eps.shape == (len(batch.images), 1, 8, 8)
    return x0, y.values["position"], eps


def test_the_windows_of_a_step_do_not_depend_on_the_number_of_processes():
    whole = seen()
    halves = [
        seen(rows=half, world_size=2, global_rank=rank) for rank, half in enumerate((slice(4), slice(4, 8)))
    ]
    parts = [
        seen(number, half, accumulate_grad_batches=2) for number, half in enumerate((slice(4), slice(4, 8)))
    ]
    for split in (halves, parts):
        for whole_values, *values in zip(whole, *split, strict=True):
            assert torch.equal(torch.cat(values), whole_values)
    assert not torch.equal(seen(number=1)[1], whole[1])


@pytest.mark.parametrize("label_dropout", [0.0, 1.0])
def test_dropped_conditions_leave_the_position(label_dropout):
    torch.manual_seed(0)
    options = SMALL | {"window": [8, 8], "window_overlap": 2, "class_conditional": True}
    network = randomised(UNet(SHAPE, 3, **options))
    made = DenoisingModule(
        Denoiser(network, Cosine(), Eps()), objective := Recorder(label_dropout=label_dropout), Uniform(),
        Pixels(SHAPE), None, seed=0, info=checkpoint_info(),  # pyright: ignore
    )  # fmt: skip
    place = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    made.trainer = SimpleNamespace(**place)  # pyright: ignore[reportAttributeAccessIssue]
    labels = Condition({"label": torch.arange(COUNT) % 3})
    loss = made.training_step(Batch(0, torch.rand(COUNT, *SHAPE), labels, torch.arange(COUNT)), 0)
    assert loss.isfinite()
    _, y, _ = objective.seen
    assert y is not None
    assert bool((y.values["label"] < 0).all()) == bool(label_dropout)
    assert y.values["position"].isfinite().all()
    assert y.dropped().values["position"].isfinite().all()  # of the weak prediction of guided teachers


def test_a_trial_of_memory_has_windows():
    network = UNet(SHAPE, None, **SMALL, window=[8, 8], window_overlap=2)
    sizes = []
    network.stem.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    made = DenoisingModule(
        Denoiser(network, Cosine(), Eps()), Simple(), Uniform(), Pixels(SHAPE), None,  # pyright: ignore
        seed=0, info=checkpoint_info(),
    )  # fmt: skip
    made.trial(torch.zeros(3, *SHAPE)).backward()
    assert sizes == [(8, 8)]
