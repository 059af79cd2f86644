"""First weights of networks with conditions that the source lacks, or has in another form."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.networks import DiT, UNet
from diffusion_cli.training.initialization import Fitted, InitialWeights, fit
from helpers.networks import SMALL, close, inputs, randomised

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS: dict[str, tuple[type, dict[str, Any]]] = {
    "unet": (UNet, SMALL),
    "unet_patch2": (UNet, {**SMALL, "attention_resolutions": [], "patch_size": 2}),
    "dit": (DiT, {"hidden_size": 12, "depth": 1, "num_heads": 2}),
}
AGE = AttributeDescription(name="age", kind="number", low=0.0, high=96.0)
TEXT = TextDescription(length=5, vocabulary=4, width=8, depth=1, heads=2)


def species(*values: str) -> AttributeDescription:
    return AttributeDescription(name="species", kind="category", values=values)


def network(name: str, given: Conditions, *, trained: bool = True) -> Any:
    kind, options = NETWORKS[name]
    torch.manual_seed(1)
    made: nn.Module = kind((2, 8, 8), given, **options, class_conditional=bool(given.attributes))
    return (randomised(made) if trained else made).double().eval()


def fitted(target: Any, source: Any, changed: Mapping[str, str] | None = None) -> Fitted:
    names = [str(number) for number in range(3)] if source.num_classes else None
    weights = InitialWeights(
        state=source.state_dict(), channels=2, learns_variance=False, num_classes=source.num_classes,
        class_names=names, conditions=source.conditions,
    )  # fmt: skip
    return fit(target, weights, 2, names, changed or {})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_more_conditions_starts_as_the_source_of_classes(name):
    source = network(name, Conditions.of(3))
    rich = Conditions(attributes=(*Conditions.of(3).attributes, AGE, species("cat")), image=1, text=TEXT)
    target = network(name, rich, trained=False)
    result = fitted(target, source)
    (x, c_noise), y = inputs(), torch.tensor([0, 1, 2])
    given = Condition({
        "label": y, "image": torch.rand(3, 1, 8, 8), "text": torch.tensor([[1, 2], [3, -1], [-1, -1]]),
        "age": torch.tensor([1.0, 50.0, torch.nan]), "species": torch.tensor([0, -1, 0]),
    })  # fmt: skip
    close(target(x, c_noise, given), source(x, c_noise, y))
    assert len(result.adapted) == 1
    assert result.taken == len(source.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_conditions_keep_all_weights(name):
    given = Conditions(
        attributes=(*Conditions.of(3).attributes, AGE, species("cat", "frog")), image=1, text=TEXT
    )
    source, target = network(name, given), network(name, given, trained=False)
    result = fitted(target, source)
    assert (result.fresh, result.adapted) == ([], [])
    state = target.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())


def test_an_input_layer_of_other_patches_is_new():
    given = Conditions(image=1)
    source, target = network("unet_patch2", given), network("unet", given, trained=False)
    first = f"{target.outer_layers[0]}.weight"
    before = target.state_dict()[first].clone()
    assert first in fitted(target, source).fresh
    assert torch.equal(target.state_dict()[first], before)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_the_image_keeps_the_weights_of_the_data(name):
    source, target = network(name, Conditions(image=1)), network(name, Conditions(), trained=False)
    fitted(target, source)
    (x, c_noise) = inputs()
    close(target(x, c_noise), source(x, c_noise, None))


def test_categories_are_matched_by_the_names_of_their_values():
    source = network("unet", Conditions(attributes=(species("cat", "frog", "newt"),)))
    target = network("unet", Conditions(attributes=(species("newt", "dog", "cat"),)), trained=False)
    table = "condition_embedding.attributes.category_species.table.weight"
    before = target.state_dict()[table].clone()
    result = fitted(target, source)
    mine, theirs = target.state_dict()[table], source.state_dict()[table]
    assert torch.equal(mine[[0, 2, 3]], theirs[[2, 0, 3]])
    assert torch.equal(mine[1], before[1])
    assert result.fresh == [f"{table} (2 of 3 classes taken by name: newt, cat)"]


CHANGED = {
    "age": ("condition_embedding.attributes.number_age.mlp.", ("0.weight", "0.bias", "2.weight", "2.bias")),
    "text": ("condition_embedding.text.read.tokens.", ("weight",)),
}


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_condition_with_another_meaning_in_the_source_starts_at_random(name, changed):
    given = Conditions(attributes=(AGE,), image=1, text=TEXT)
    source, target = network(name, given), network(name, given, trained=False)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    result = fitted(target, source, {changed: "other"})
    prefix, others = CHANGED[changed]
    assert result.fresh == [f"{prefix}{tensor} (other)" for tensor in others]
    assert result.taken == result.total - len(others)
    for key, value in target.state_dict().items():
        expected = before if key.startswith(prefix) else source.state_dict()
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", NETWORKS)
def test_another_condition_image_of_the_same_size_has_no_weights_of_the_source(name):
    source, target = network(name, Conditions(image=1)), network(name, Conditions(image=1), trained=False)
    result = fitted(target, source, {"image": "condition.of=edges in the source"})
    (entry,) = result.fresh
    assert entry.startswith(f"{target.outer_layers[0]}.")
    assert entry.endswith("weight (condition.of=edges in the source)")
    (x, c_noise), image = inputs(), torch.rand(3, 1, 8, 8)
    close(target(x, c_noise, Condition({"image": image})), source(x, c_noise, None))


def test_tables_of_other_conditions_are_not_taken_for_classes():
    """A table of 4 tokens has as many rows as one of 3 classes and the null class."""
    given = Conditions(attributes=Conditions.of(3).attributes, text=TEXT)
    source, target = network("unet", given), network("unet", given, trained=False)
    names = ["2", "1", "0"]
    weights = InitialWeights(
        state=source.state_dict(), channels=2, learns_variance=False, num_classes=3,
        class_names=["0", "1", "2"], conditions=given,
    )  # fmt: skip
    fit(target, weights, 2, names)
    tokens = "condition_embedding.text.read.tokens.weight"
    assert torch.equal(target.state_dict()[tokens], source.state_dict()[tokens])
    rows = target.state_dict()["class_embedding.weight"]
    assert torch.equal(rows[:3], source.state_dict()["class_embedding.weight"][:3].flip(0))


@pytest.mark.parametrize("patch", [1, 2])
def test_windows_begin_as_the_network_of_the_whole_image(patch):
    options = {**SMALL, "attention_resolutions": [], "patch_size": patch}

    def made(*, image: int | None = None, **changes: Any) -> Any:
        conditions = Conditions(image=image)
        return randomised(UNet((2, 8, 8), conditions, **options, **changes)).double().eval()

    whole, windowed = made(), made(window=[8, 8], window_overlap=2)
    (x, c_noise), image = inputs(), torch.rand(3, 1, 8, 8)
    assert fitted(windowed, whole).adapted == ["stem.weight"]
    close(windowed(x, c_noise), whole(x, c_noise))
    source = made(window=[8, 8], window_overlap=2)
    trained = source(x, c_noise)
    assert not torch.allclose(trained, whole(x, c_noise), atol=1e-3)
    conditional = made(image=1, window=[8, 8], window_overlap=2)
    assert fitted(conditional, source).fresh == []
    close(conditional(x, c_noise, Condition({"image": image})), trained)
    without_coordinates = made()
    assert fitted(without_coordinates, source).fresh == []
    assert torch.equal(without_coordinates.stem.weight, source.stem.weight[:, : 2 * patch**2])
