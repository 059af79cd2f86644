"""Embeddings of attributes, texts and condition images, and their missing values."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.condition_embedding import (
    ConditionEmbedding,
    NumberEmbedding,
    TextEmbedding,
    with_image,
)
from diffusion_cli.networks.layers import attend
from helpers.networks import close, randomised

AGE = AttributeDescription(name="age", kind="number", low=0.0, high=96.0)
SPECIES = AttributeDescription(name="species", kind="category", values=("cat", "frog", "newt"))
GLASSES = AttributeDescription(name="glasses", kind="yes_no", values=("no", "yes"))
TOKENS = TextDescription(length=6, vocabulary=20, width=8, depth=2, heads=2)
FEATURES = TextDescription(length=6, features=5, width=8)
ALL = Conditions(attributes=(AGE, SPECIES, GLASSES), text=TOKENS)
NAN = float("nan")


def embedding(conditions: Conditions = ALL) -> ConditionEmbedding:
    return randomised(ConditionEmbedding(conditions, 16)).double().eval()


def values(**changes: Tensor) -> Condition:
    given = {
        "age": torch.tensor([3.0, 50.0, 96.0]),
        "species": torch.tensor([0, 1, 2]),
        "glasses": torch.tensor([1, 0, 1]),
        "text": torch.tensor([[1, 2, 3], [4, 5, -1], [19, -1, -1]]),
    }
    return Condition(given | changes)


def test_each_value_changes_the_vector():
    embed, like = embedding(), torch.zeros(3)
    whole, _ = embed(values(), like)
    assert whole is not None
    for name in ("age", "species", "glasses", "text"):
        other, _ = embed(values().rows(torch.tensor([1, 2, 0])).replaced({name: values().values[name]}), like)
        without, _ = embed(values().dropped([name]), like)
        assert other is not None
        assert without is not None
        assert ((other - whole).abs().amax(1) > 1e-3).all()
        assert ((without - whole).abs().amax(1) > 1e-3).all()


def test_values_that_are_absent_are_missing():
    embed, like = embedding(), torch.zeros(3)
    for name in ALL.names:
        absent = Condition({key: value for key, value in values().values.items() if key != name})
        close(embed(absent, like)[0], embed(values().dropped([name]), like)[0])


def test_embeddings_of_a_mixed_batch_equal_those_of_single_images():
    embed = embedding()
    mixed = values(
        age=torch.tensor([NAN, 50.0, NAN]),
        species=torch.tensor([0, -1, 2]),
        text=torch.tensor([[1, 2, 3], [-1, -1, -1], [19, -1, -1]]),
    )
    together, tokens = embed(mixed, torch.zeros(3))
    assert tokens is not None
    for i in range(3):
        alone, own = embed(mixed.rows(torch.tensor([i])), torch.zeros(1))
        close(alone[0], together[i])
        close(own.vectors[0][own.given[0]], tokens.vectors[i][tokens.given[i]])


def test_gradients_are_finite_where_values_are_missing():
    embed = embedding(Conditions(attributes=(AGE, SPECIES), text=FEATURES))
    condition = Condition({
        "age": torch.tensor([NAN, 3.0]),
        "species": torch.tensor([-1, 1]),
        "text": torch.tensor([[[NAN] * 5, [NAN] * 5], [[1.0] * 5, [NAN] * 5]]),
    })  # fmt: skip
    vector, tokens = embed(condition, torch.zeros(2))
    (vector.sum() + tokens.vectors.sum()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in embed.parameters())


def test_values_of_the_whole_range_have_distinct_embeddings():
    number = NumberEmbedding(20.0, 30.0, 16)
    number.mlp = nn.Sequential(nn.Identity())  # the features
    number.missing = nn.Parameter(torch.zeros(13))
    features = number(torch.tensor([20.0, 21.0, 25.0, 29.0, 29.9, 30.0]), torch.zeros(6))
    assert all((one - other).norm() > 0.1 for one, other in combinations(features, 2))
    close(features[0, [0, 1, 7]], torch.tensor([-1.0, -1.0, 0.0]), 1e-6)  # s = -1, sin(-pi / 2), cos(-pi / 2)
    close(features[2], torch.tensor([0.0, *[0.0] * 6, *[1.0] * 6]), 1e-6)


def test_an_attribute_of_one_value_is_finite():
    number = NumberEmbedding(5.0, 5.0, 16)
    assert number(torch.tensor([5.0, NAN]), torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize("text", [TOKENS, FEATURES], ids=["tokens", "features"])
def test_padding_changes_nothing(text):
    embed = randomised(TextEmbedding(text, 16)).double().eval()
    short = torch.tensor([[1, 2, 3]]) if text.vocabulary else torch.randn(1, 3, 5)
    padded = Condition.cat([Condition({"text": short}), Condition({"text": short.repeat_interleave(2, 1)})])
    plain, tokens = embed(short, torch.zeros(1))
    both, longer = embed(padded.values["text"], torch.zeros(2))
    close(both[:1], plain)
    close(longer.vectors[:1, :4], tokens.vectors)
    assert longer.given.tolist() == [[True] * 4 + [False] * 3, [True] * 7]


def test_the_order_of_words_matters():
    embed = randomised(TextEmbedding(TOKENS, 16)).double().eval()
    vectors, _ = embed(torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.zeros(2))
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3


def test_words_are_initially_as_different_as_random_vectors():
    wide = TextDescription(length=6, vocabulary=20, width=64, depth=3, heads=2)
    torch.manual_seed(0)
    _, tokens = TextEmbedding(wide, 16)(torch.tensor([[1, 2, 3], [1, 4, 3]]), torch.zeros(2))
    one, other = tokens.vectors
    cosines = torch.nn.functional.cosine_similarity(one, other).tolist()
    # The position is the same, so that half of the variance is.
    assert [round(cosine, 3) for cosine in cosines[:2] + cosines[3:]] == [1.0, 1.0, 1.0]
    assert 0.2 < cosines[2] < 0.8


def test_a_text_longer_than_described_is_refused():
    with pytest.raises(ValueError, match="a text of 7 tokens, but the network reads 6"):
        TextEmbedding(TOKENS, 16)(torch.ones(1, 7, dtype=torch.int64), torch.zeros(1))


def test_heads_divide_the_width_of_tokens():
    with pytest.raises(UsageError, match=r"text.heads=3: does not divide text.width=8; use a divisor"):
        TextEmbedding(TextDescription(length=4, vocabulary=9, width=8, heads=3), 16)


def test_weights_are_named_by_attribute():
    """Attributes of other names or kinds never share weights."""
    odd = AttributeDescription(name="eye.colour (left)", kind="yes_no", values=("no", "yes"))
    embed = ConditionEmbedding(Conditions(attributes=(odd, AGE, SPECIES)), 4)
    assert [*embed.attributes] == ["yes_no_eye%2e;colour%20;%28;left%29;", "number_age", "category_species"]


def test_the_class_is_not_embedded_here():
    label = Conditions.of(3).attributes
    assert [*ConditionEmbedding(Conditions(attributes=(*label, AGE)), 4).attributes] == ["number_age"]
    number = AttributeDescription(name="label", kind="number", low=0.0, high=1.0)
    assert [*ConditionEmbedding(Conditions(attributes=(number,)), 4).attributes] == ["number_label"]


def test_a_condition_image_follows_the_noised_one():
    x, image = torch.randn(3, 2, 4, 4), torch.rand(3, 1, 4, 4)
    image[1] = NAN
    image[2, :, 0, 0] = NAN
    joined = with_image(x, image, 1)
    assert torch.equal(joined[:, :2], x)
    assert torch.equal(joined[0, 2:], torch.cat([image[0], torch.ones(1, 4, 4)]))
    assert torch.equal(joined[1:2], with_image(x[1:2], None, 1))
    assert joined[1, 2:].abs().max() == 0
    assert joined[2, 2:, 0, 0].tolist() == [0.0, 0.0]
    assert joined[2, 3].sum() == 15


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 2, 4, 4), (3, 1, 2, 2)])
def test_a_condition_image_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"condition images of shape .*, but the network expects \[3, 1, 4, 4\]"
    ):
        with_image(torch.zeros(3, 2, 4, 4), torch.zeros(shape), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_excluded_keys_have_no_weight(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4).to(dtype)
    given = torch.tensor([[True, False, True, False, False], [True] * 5])
    out = attend(q, k, v, given=given)
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    close(out[:1], attend(q[:1], k[:1, :, [0, 2]], v[:1, :, [0, 2]]), tolerance)
    close(out[1:], attend(q[1:], k[1:], v[1:]), tolerance)
