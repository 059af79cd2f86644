"""Classifier-free guidance with a scale for each condition, on Gaussians with exact scores."""

import pytest
import torch
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.guidance import Dropouts, NoGuidance
from diffusion_cli.diffusion.parameterizations import X0, Eps
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import DiT
from helpers.gaussians import JointGaussian, moments_given, noised_moments
from helpers.guidance import cfg
from helpers.networks import randomised

F64 = torch.float64
T = torch.tensor(0.4, dtype=F64)
BOTH = {"age": torch.tensor([2.0]), "size": torch.tensor([0.5])}
ALL = Condition({**BOTH, "image": torch.tensor([0.5, -0.4, 0.8, 0.1]).view(1, 1, 2, 2)})


@pytest.fixture
def denoiser() -> Denoiser:
    network = JointGaussian()
    return Denoiser(network, network.schedule, X0())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


def score(denoiser: Denoiser, x: Tensor, weights: list[tuple[float, Condition]]) -> Tensor:
    """The score of the product of densities of x_t to these powers, a Gaussian."""
    precision, shift = torch.zeros(4, 4, dtype=F64), torch.zeros(4, dtype=F64)
    for weight, condition in weights:
        mean, covariance = noised_moments(denoiser.schedule, T, moments_given(condition))
        precision += weight * covariance.inverse()
        shift += weight * covariance.inverse() @ mean
    mean = torch.linalg.solve(precision, shift)
    return ((mean - x.flatten(1)) @ precision).view_as(x)


def only(*names: str) -> Condition:
    return ALL.dropped([name for name in ALL.values if name not in names])


CHAINS = {
    "one scale": ({"scale": 3.0}, [(-2.0, only()), (3.0, ALL)]),
    "each its own": (
        {"scale": 1.5, "scales": {"image": 4.0, "age": 2.0}},
        [(-3.0, only()), (2.0, only("image")), (0.5, only("image", "age")), (1.5, ALL)],
    ),
    "the other order": (
        {"scale": 1.5, "scales": {"age": 2.0, "image": 4.0}},
        [(-1.0, only()), (-2.0, only("age")), (2.5, only("image", "age")), (1.5, ALL)],
    ),
    "first off": ({"scale": 3.0, "scales": {"size": 1.0}}, [(-2.0, only("size")), (3.0, ALL)]),
    "last off": ({"scale": 1.0, "scales": {"age": 5.0}}, [(-4.0, only()), (4.0, only("age")), (1.0, ALL)]),
    "neighbours alike": (
        {"scale": 2.0, "scales": {"age": 2.0, "size": 2.0}},
        [(-1.0, only()), (2.0, ALL)],
    ),
    "without the last": ({"scale": 0.0, "scales": {"age": 2.0}}, [(-1.0, only()), (2.0, only("age"))]),
}


@pytest.mark.parametrize(("options", "weights"), CHAINS.values(), ids=CHAINS)
def test_the_guided_score_is_that_of_a_product_of_densities(denoiser, x, options, weights):
    guided = cfg(**options)(denoiser, ALL.repeat_interleave(3))(x, T)
    torch.testing.assert_close(guided.score, score(denoiser, x, weights))


@pytest.mark.parametrize(("options", "weights"), CHAINS.values(), ids=CHAINS)
def test_one_call_evaluates_the_sides_that_differ(denoiser, x, options, weights):
    cfg(**options)(denoiser, ALL.repeat_interleave(3))(x, T)
    sides = len(weights) + (
        options.get("scale") == 0.0
    )  # the variance and the rescaling are those of all conditions
    assert denoiser.network.batches == [3 * sides]


@pytest.mark.parametrize("options", [
    {"scale": 1.0},
    {"scale": 1.0, "scales": {"age": 1.0, "image": 1.0}},
    {"scale": 7.0, "scales": {"age": 1.0, "size": 1.0, "image": 1.0}},
    {"scale": 1.0, "scales": {"size": 1.0}, "rescale": 0.7},
])  # fmt: skip
def test_scales_of_one_are_no_guidance_to_the_bit(denoiser, x, options):
    y = ALL.repeat_interleave(3)
    guided, plain = cfg(**options)(denoiser, y)(x, T), NoGuidance()(denoiser, y)(x, T)
    assert torch.equal(guided.x0, plain.x0)
    assert torch.equal(guided.eps, plain.eps)
    assert denoiser.network.batches == [3, 3]


def test_a_missing_value_has_no_guidance(denoiser, x):
    """Images of one batch with other missing values are guided as alone."""
    rows = [only("age"), only("image"), only()]
    mixed = Condition.cat(rows)
    guidance = cfg(2.0, scales={"image": 4.0})
    together = guidance(denoiser, mixed)(x, T).x0
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i : i + 1], guidance(denoiser, row)(x[i : i + 1], T).x0)
    torch.testing.assert_close(together[2:], denoiser(x[2:], T, None).x0)


def test_a_negative_condition_takes_the_place_of_a_missing_one(denoiser, x):
    guidance, y = cfg(3.0), Condition(BOTH).repeat_interleave(3)
    guidance.negative = Condition({"age": torch.tensor([-1.0])})
    guided = guidance(denoiser, y)(x, T)
    expected = score(denoiser, x, [(-2.0, guidance.negative), (3.0, Condition(BOTH))])
    torch.testing.assert_close(guided.score, expected)
    one = cfg(1.0)
    one.negative = guidance.negative
    assert torch.equal(one(denoiser, y)(x, T).x0, denoiser(x, T, y).x0)


@pytest.mark.parametrize("options", [
    {"scale": 3.0}, {"scale": 1.0}, {"scale": 4.0, "scales": {"image": 1.0}},
    {"scale": 4.0, "scales": {"age": 1.0}}, {"scale": 1.0, "scales": {"age": 4.0}},
    {"scale": 1.0, "scales": {"image": 4.0}}, {"scale": 5.0, "scales": {"age": 1.0, "size": 1.0, "image": 1.0}},
])  # fmt: skip
def test_a_negative_value_acts_unless_it_is_said_to_be_ignored(denoiser, x, options):
    y, guidance, plain = ALL.repeat_interleave(3), cfg(**options), cfg(**options)
    guidance.negative = Condition({"image": 1 - ALL.values["image"]})
    same = torch.allclose(guidance(denoiser, y)(x, T).x0, plain(denoiser, y)(x, T).x0)
    assert guidance.ignores_negative("image", denoiser.conditions.names) == same


def test_a_negative_value_without_a_positive_one_leads_only_away(denoiser, x):
    """As a negative prompt for images without a prompt."""
    y, image = Condition(BOTH).repeat_interleave(3), only("image").values["image"]
    guidance = cfg(3.0)
    guidance.negative = Condition({"image": image})
    expected = score(denoiser, x, [(-2.0, only("image")), (3.0, Condition(BOTH))])
    torch.testing.assert_close(guidance(denoiser, y)(x, T).score, expected)
    chain = cfg(3.0, scales={"age": 2.0})
    chain.negative = guidance.negative
    weights = [(-1.0, only("image")), (-1.0, only("image", "age")), (3.0, Condition(BOTH))]
    torch.testing.assert_close(chain(denoiser, y)(x, T).score, score(denoiser, x, weights))


def test_the_sides_are_built_once_for_all_steps(denoiser, x, monkeypatch):
    joined, cat = [], Condition.cat
    monkeypatch.setattr(Condition, "cat", staticmethod(lambda parts: joined.append(parts) or cat(parts)))
    guidance = cfg(3.0, scales={"age": 2.0})
    guidance.negative = Condition({"image": only("image").values["image"]})
    denoise = guidance(denoiser, ALL.repeat_interleave(3))
    first, again = denoise(x, T), denoise(x, T)
    assert len(joined) == 1
    assert torch.equal(first.x0, again.x0)


def test_values_that_all_images_miss_cost_no_call(denoiser, x):
    y = only("image").repeat_interleave(3)
    guided = cfg(3.0, scales={"image": 2.0})(denoiser, y)(x, T)
    torch.testing.assert_close(guided.score, score(denoiser, x, [(-1.0, only()), (2.0, only("image"))]))
    assert denoiser.network.batches == [6]


def test_images_without_any_value_are_those_of_no_guidance(denoiser, x):
    y = only().repeat_interleave(3)
    guided = cfg(3.0, scales={"age": 2.0})(denoiser, y)(x, T)
    torch.testing.assert_close(guided.x0, denoiser(x, T, None).x0)


def test_a_longer_negative_text_is_joined_by_padding():
    from diffusion_cli.conditions import Conditions, TextDescription

    text = Conditions(text=TextDescription(length=6, vocabulary=9, width=8, depth=1, heads=2))
    network = randomised(DiT((1, 4, 4), text, hidden_size=16, depth=1, num_heads=2)).double().eval()
    denoiser = Denoiser(network, JointGaussian().schedule, Eps())
    x = torch.randn(2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = Condition({"text": torch.tensor([[1, 2], [3, -1]])})
    negative = Condition({"text": torch.tensor([[4, 5, 6, 7, 8]])})
    guidance = cfg(3.0)
    guidance.negative = negative
    weak, strong = denoiser(x, T, negative.repeat_interleave(2)).eps, denoiser(x, T, y).eps
    torch.testing.assert_close(guidance(denoiser, y)(x, T).eps, weak + 3 * (strong - weak))


def test_rescaling_restores_the_deviation_with_all_conditions(denoiser, x):
    y = ALL.repeat_interleave(3)
    guided = cfg(4.0, scales={"age": 6.0}, rescale=1.0)(denoiser, y)(x, T)
    deviation = denoiser(x, T, y).x0.flatten(1).std(1)  # F is x_0
    torch.testing.assert_close(guided.x0.flatten(1).std(1), deviation)


@pytest.mark.parametrize(("options", "dropouts", "given", "words"), [
    ({"scales": {"agee": 2.0}}, (0.1, 0.1), ["age"],
     "guidance.scales.agee=2.0: the model has no condition of this name; choose from age, size, image"),
    ({"scales": {"age": 2.0}}, (0.1, 0.1), ["size"],
     "guidance.scales.age=2.0: no value of age is given; give one, or leave the scale out"),
    ({"scale": 3.0, "scales": {"age": 2.0}}, (0.1, 0.0), ["age", "size"],
     r"guidance.scales=.*: the model was trained with objective.single_dropout=0"),
    ({}, (0.0, 0.0), ["age"], "guidance=cfg: the model was trained with objective.label_dropout=0"),
    ({}, (0.1, 0.0), [], "label: guidance=cfg needs a value of age or size or image; name one, or use guidance=none"),
])  # fmt: skip
def test_scales_that_a_model_cannot_have_are_refused(denoiser, options, dropouts, given, words):
    with pytest.raises(UsageError, match=words):
        cfg(**({"scale": 2.0} | options)).check(denoiser, Dropouts(*dropouts), given)


def test_one_scale_for_all_needs_no_single_dropout(denoiser):
    cfg(2.0, scales={"age": 2.0}).check(denoiser, Dropouts(0.1, 0.0), ["age", "size", "image"])
    cfg(2.0, scales={"age": 3.0}).check(denoiser, Dropouts(0.1, 0.0), ["age"])
    cfg(1.0).check(denoiser, Dropouts(0.0, 0.0), ["age"])
