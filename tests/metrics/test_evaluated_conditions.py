"""Metrics of a model on real images: the conditions of these images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, ImageCondition
from diffusion_cli.data.conditioned import image_conditioned, text_conditioned
from diffusion_cli.data.sources import ColumnSource
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import (
    EvaluatedModel,
    FlowLikelihood,
    Inversion,
    ModelMetric,
    VariationalBound,
    base,
    conditions_of,
)
from diffusion_cli.runs.load import LoadedDenoiser
from helpers.conditions import AGE, SPECIES, TEXT, Captioned, LetterEncoder, grey_model, letters
from helpers.metrics import CPU, Held, pixels
from helpers.translation import Shades, model_of

METRICS = [FlowLikelihood(rtol=0.1, atol=0.1), VariationalBound(), Inversion(steps=2)]
SCHEDULE = Cosine(num_timesteps=5)


def subject(conditions: Conditions, dataset=None, names=("0", "1")) -> EvaluatedModel:
    info = SimpleNamespace(config=SimpleNamespace(condition=None), class_names=names)
    model: Any = SimpleNamespace(denoiser=SimpleNamespace(conditions=conditions), info=info)
    return EvaluatedModel(model, dataset or Captioned(), Path(), CPU, 0, 4, False, "fp32")


def heard(metric: ModelMetric, model: LoadedDenoiser, dataset, folder: Path) -> list[Condition]:
    """The conditions of each batch in its first call of the network, in a measurement with batches of two."""
    calls: list[Condition] = []
    network = model.denoiser.network
    network.register_forward_pre_hook(lambda _, given: calls.append(given[2]))
    metric.measure(EvaluatedModel(model, dataset, folder, CPU, 0, 2, False, "fp32"))
    return [
        call for before, call in zip([Condition(), *calls], calls, strict=False) if not same(call, before)
    ]


def same(first: Condition, second: Condition) -> bool:
    return [*first.values] == [*second.values] and all(
        torch.equal(value.nan_to_num(-9), second.values[name].nan_to_num(-9))
        for name, value in first.values.items()
    )


def joined(found: list[Condition], name: str) -> Tensor:
    return Condition.cat(found).values[name]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_a_model_gets_the_captions_and_attributes_of_the_images(tmp_path, metric):
    model = grey_model(SCHEDULE, Conditions(attributes=(AGE,), text=TEXT))
    dataset = text_conditioned(Captioned(), LetterEncoder())
    found = heard(metric, model, dataset, tmp_path)
    assert [len(each) for each in found] == [2, 2, 1]
    assert joined(found, "age").nan_to_num(-9).tolist() == [10, 20, -9, 40, 50]
    texts = joined(found, "text")
    assert texts[0].tolist() in letters(["a", "frog"]).tolist()
    assert texts[1:].tolist() == letters(["dog", "", "it's", "me"]).tolist()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_a_model_gets_the_condition_images_of_the_images(tmp_path, metric):
    condition = {"of": "noise", "noise_sigma": 0.2, "noise_augmentation": 0.1}
    dataset = image_conditioned(Shades(""), ImageCondition(**condition))
    found = heard(metric, model_of(SCHEDULE, **condition), dataset, tmp_path)
    images, rows = dataset.load("val"), torch.arange(10)
    expected = images.condition(rows, images[rows] / 127.5 - 1)
    assert expected is not None
    assert torch.equal(joined(found, "image"), expected.values["image"])


def test_images_of_single_values_are_measured_alike_in_any_batch(tmp_path):
    """The likelihood of an image depends on its own conditions alone."""
    model = grey_model(SCHEDULE, Conditions(attributes=(AGE,), text=TEXT))
    dataset = text_conditioned(Captioned(), LetterEncoder())
    found = [
        VariationalBound().measure(
            EvaluatedModel(model, dataset, tmp_path / str(size), CPU, 0, size, False, "fp32")
        )
        for size in (1, 5)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].value == pytest.approx(found[1].value, rel=1e-6)


def test_images_that_lack_conditions_of_the_model_are_refused():
    conditions = Conditions(attributes=(AGE, SPECIES), text=TEXT)
    line = r"^dataset=held: has no species or text of the model, on which it is conditioned; use the"
    with pytest.raises(UsageError, match=line):
        subject(conditions).load("val")
    years = AGE.model_copy(update={"kind": "category", "values": ("10", "20")})
    with pytest.raises(UsageError, match=r"^dataset=held: has no age of the model"):
        subject(Conditions(attributes=(years,))).load("val")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_the_conditions_of_a_split_are_checked_once(tmp_path, monkeypatch, metric):
    checked = []
    monkeypatch.setattr(base, "lacking", lambda *given: checked.append(given) or [])
    model = grey_model(SCHEDULE, Conditions(attributes=(AGE,)))
    assert len(heard(metric, model, Captioned(), tmp_path)) == 3
    assert len(checked) == 1


def test_other_classes_than_those_of_the_model_are_refused():
    images = Captioned().load("val")
    _, y = subject(Conditions.of(2)).batch(images, torch.tensor([3, 2]))
    assert y is not None
    assert y.values["label"].tolist() == [1, 0]
    with pytest.raises(UsageError, match=r"^dataset=held: has other classes than the model; use the dataset"):
        subject(Conditions.of(2), names=("cat", "dog")).load("val")
    without = subject(Conditions.of(2), Held(pixels(3, 0), pixels(3, 0)), names=("cat", "dog"))
    assert without.batch(without.load("val"), torch.tensor([0]))[1] is None
    assert subject(Conditions(), names=("cat", "dog")).batch(images, torch.tensor([0]))[1] is None


def test_other_attributes_and_captions_are_other_results_and_classes_alone_have_the_same_record():
    images, older = (Captioned(*ages).load("val") for ages in ((1, 2, 3, 4, 5), (1, 2, 3, 4, 6)))
    with_age = subject(Conditions(attributes=(AGE,)))
    assert with_age.identity(images) != with_age.identity(older)
    assert subject(Conditions.of(2)).identity(images) == {"images_sha256": images.digest()}
    text = Conditions(text=TEXT)
    one, other = Captioned(), Captioned()
    other.texts = (*other.texts[:-1], ("you",))
    records = [
        subject(text, dataset).identity(dataset.load("val"))
        for dataset in (
            text_conditioned(each, LetterEncoder()) for each in (one, other, one, Captioned(1, 2, 3, 4, 5))
        )
    ]
    assert records[0] != records[1]
    assert records[0] == records[2] == records[3]  # ages are no conditions of this model


def test_a_label_that_is_a_number_is_a_condition_of_the_model():
    label = AttributeDescription(name="label", kind="number", low=0, high=9)
    dataset = Captioned()
    dataset.attributes = (label,)
    images = dataset.load("val").with_conditions({"label": ColumnSource(torch.arange(5.0))})
    _, y = subject(Conditions(attributes=(label,)), dataset).batch(images, torch.tensor([4, 1]))
    assert y is not None
    assert y.values["label"].tolist() == [4, 1]


def test_stored_results_depend_on_the_captions_of_their_split():
    conditions, metrics = Conditions(text=TEXT), [Inversion(steps=2), VariationalBound(split="train")]

    def identity(*texts: tuple[str, ...]) -> dict[str, Any]:
        dataset = Captioned()
        dataset.texts = (*dataset.texts[: 5 - len(texts)], *texts)
        return conditions_of(metrics, subject(conditions, text_conditioned(dataset, LetterEncoder())))

    assert sorted(identity()["conditions"]) == ["train", "val"]
    assert identity() == identity(("me",)) != identity(("you",))
    assert conditions_of(metrics, subject(Conditions.of(2))) == {}
    assert conditions_of([], subject(conditions)) == {}
