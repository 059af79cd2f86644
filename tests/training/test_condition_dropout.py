"""Which conditions a training step drops: all of an image together, and each one alone."""

import math
from types import SimpleNamespace

import pytest
import torch

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.conditions.condition import is_missing
from diffusion_cli.data import Batch
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import Simple
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.training.module import DenoisingModule
from diffusion_cli.training.optimizers import Optimization
from helpers import checkpoint_info

COUNT = 4000
AGE, SIZE = (AttributeDescription(name=name, kind="number", low=0.0, high=9.0) for name in ("age", "size"))


class Listener(torch.nn.Module):
    """A network that records the conditions that it gets."""

    takes_conditions = True

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.conditions, self.num_classes = conditions, conditions.num_classes
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.heard: list[Condition] = []

    def forward(self, x, c_noise, y=None):
        assert y is not None
        self.heard.append(y)
        return self.bias * x


def heard(
    conditions: Conditions, values: dict[str, torch.Tensor], world: int = 1, **dropout: float
) -> list[Condition]:
    """The conditions that the network gets in a step, by process."""
    found = []
    for rank in range(world):
        network = Listener(conditions)
        schedule = Cosine()
        module = DenoisingModule(
            Denoiser(network, schedule, Eps()),
            Simple(**dropout),
            Uniform(),
            Pixels((1, 1, 1)),
            Optimization(
                {"_target_": "torch.optim.SGD"}, {"_target_": "diffusion_cli.training.ConstantRate"}, 1.0
            ),
            seed=0,
            info=checkpoint_info(),
        )
        place = {"accumulate_grad_batches": 1, "world_size": world, "global_rank": rank, "global_step": 0}
        module.trainer = SimpleNamespace(**place)  # pyright: ignore[reportAttributeAccessIssue]
        mine = torch.arange(COUNT).tensor_split(world)[rank]
        condition = Condition(values).rows(mine)
        module.training_step(Batch(0, torch.zeros(len(mine), 1, 1, 1), condition, mine), 0)
        found += network.heard
    return found


def shares(condition: Condition) -> dict[str, float]:
    age, size = (condition.values[name].isnan() for name in ("age", "size"))
    together = (age & size).double().mean().item()
    return {"age": age.double().mean().item(), "size": size.double().mean().item(), "both": together}


VALUES = {"age": torch.arange(COUNT).float(), "size": -torch.arange(COUNT).float()}
BOTH = Conditions(attributes=(AGE, SIZE))


def test_conditions_are_dropped_together_and_alone_at_their_rates():
    (condition,) = heard(BOTH, VALUES, label_dropout=0.2, single_dropout=0.1)
    found, error = shares(condition), 3 * 0.5 / COUNT**0.5
    assert found["age"] == pytest.approx(0.2 + 0.8 * 0.1, abs=error)
    assert found["size"] == pytest.approx(0.2 + 0.8 * 0.1, abs=error)
    assert found["both"] == pytest.approx(0.2 + 0.8 * 0.1**2, abs=error)
    kept = ~condition.values["age"].isnan()
    assert torch.equal(condition.values["age"][kept], VALUES["age"][kept])


def test_a_lone_condition_is_only_dropped_by_the_rate_of_all():
    (condition,) = heard(Conditions(attributes=(AGE,)), VALUES, label_dropout=0.0, single_dropout=0.5)
    assert not condition.values["age"].isnan().any()


def test_processes_drop_the_same_as_one():
    (whole,) = heard(BOTH, VALUES, label_dropout=0.2, single_dropout=0.1)
    joined = Condition.cat(heard(BOTH, VALUES, world=2, label_dropout=0.2, single_dropout=0.1))
    for name, value in whole.values.items():
        assert torch.equal(value.nan_to_num(-1e9), joined.values[name].nan_to_num(-1e9))


def test_a_dropped_condition_drops_no_other():
    """Each value of each kind is missing as a whole or unchanged, independently of the others."""
    text = TextDescription(length=3, vocabulary=9, width=8, depth=1, heads=2)
    rich = Conditions(attributes=(*Conditions.of(4).attributes, AGE), image=1, text=text)
    numbers = torch.arange(COUNT)
    values = {
        "label": numbers % 4, "age": numbers.float(), "image": torch.rand(COUNT, 1, 2, 2),
        "text": torch.stack([numbers % 9, (numbers + 1) % 9, torch.full((COUNT,), 8)], dim=1),
    }  # fmt: skip
    (condition,) = heard(rich, values, label_dropout=0.0, single_dropout=0.2)
    dropped = {}
    for name, value in condition.values.items():
        missing = is_missing(value).flatten(1) if value.ndim > 1 else is_missing(value)[:, None]
        dropped[name] = missing.all(1)
        assert torch.equal(missing.any(1), dropped[name])
        assert torch.equal(value[~dropped[name]], values[name][~dropped[name]])
    number = torch.stack([*dropped.values()]).sum(0)
    for count in range(5):
        expected = math.comb(4, count) * 0.2**count * 0.8 ** (4 - count)
        error = 4 * (expected * (1 - expected) / COUNT) ** 0.5
        assert (number == count).double().mean().item() == pytest.approx(expected, abs=error)


def test_nothing_is_dropped_without_rates():
    (condition,) = heard(BOTH, VALUES, label_dropout=0.0, single_dropout=0.0)
    assert all(torch.equal(condition.values[name], VALUES[name]) for name in VALUES)
