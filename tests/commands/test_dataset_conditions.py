"""Conditions of samples in evaluations: those of the images of the dataset."""

from dataclasses import replace
from pathlib import Path
from shutil import make_archive

import pytest
import torch

from diffusion_cli.commands import dataset_conditions, sample_conditions
from diffusion_cli.commands.dataset_conditions import refuse_chosen, with_conditions_of
from diffusion_cli.commands.eval import _keep_record
from diffusion_cli.commands.outputs import claim
from diffusion_cli.commands.samples import ModelSamples, given_samples
from diffusion_cli.commands.trained import LoadedModel, prepare
from diffusion_cli.conditions import AttributeDescription, Conditions
from diffusion_cli.config import SampleConfig, load
from diffusion_cli.data import Dataset, LearnedText
from diffusion_cli.data.captions import CaptionTable
from diffusion_cli.data.image_rows import ImageRows
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.sources import ColumnSource
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import Report
from helpers.conditions import AGE, SPECIES, TEXT, LetterEncoder, grey_model, letters

CACHE = Path()


class Aged(Dataset):
    """Six images in each split; that of row n has the age 10 n, 100 more in validation, and every second is a frog."""

    name, shape, class_names, flip = "aged", (1, 8, 8), None, False

    def __init__(self, attributes=(AGE, SPECIES), val=6):
        super().__init__("")
        self.attributes, self.val = attributes, val

    def load(self, split):
        count = self.val if split == "val" else 6
        rows = torch.arange(count)
        values = {"age": 10.0 * rows + 100 * (split == "val"), "species": rows % 2}
        pixels = (rows[:, None, None, None] * 20).expand(-1, 1, 8, 8).to(torch.uint8)
        return MemoryImages(pixels, None).with_conditions(
            {attribute.name: ColumnSource(values[attribute.name]) for attribute in self.attributes}
        )


@pytest.fixture
def model(schedules, tmp_path, monkeypatch):
    """A function from descriptions of conditions to a model that is ready for sampling."""
    monkeypatch.setattr(sample_conditions, "_encoder", lambda *_: letters)

    def build(conditions, *words):
        config = load("sample", ["steps=2", *words])
        assert isinstance(config, SampleConfig)
        return prepare(config.sampling, tmp_path, grey_model(schedules["cosine"], conditions))

    return build


def test_samples_have_the_conditions_of_validation_images(model):
    trained, note = with_conditions_of(Aged(), model(Conditions(attributes=(AGE, SPECIES))), CACHE)
    assert note == "conditions: those of aged/val"
    samples = ModelSamples(trained, range(7), None)
    told = samples.condition_of(range(6))
    assert told is not None
    assert sorted(told.values["age"].tolist()) == [100, 110, 120, 130, 140, 150]
    assert told.values["age"].tolist() != sorted(told.values["age"].tolist())
    assert ((told.values["age"] / 10) % 2).tolist() == told.values["species"].tolist()
    images, labels = samples.batch(range(6))
    grey = images.float().mean((1, 2, 3)) / 127.5 - 1
    expected = (0.01 * told.values["age"] + 0.1 * told.values["species"]).clamp(max=1)
    torch.testing.assert_close(grey, expected, rtol=0, atol=0.01)
    assert labels is None
    again = samples.condition_of([6])
    assert again is not None
    assert again.values["age"] == told.values["age"][0]


def test_the_record_names_the_images_and_their_values(model):
    own = model(Conditions(attributes=(AGE, SPECIES)))
    records = [
        with_conditions_of(dataset, own, CACHE)[0].record["conditions"]
        for dataset in (Aged(), Aged(val=5), Aged())
    ]
    assert records[0]["images"] == "aged/val"
    assert records[0] == records[2]
    assert records[0]["sha256"] != records[1]["sha256"]


def test_without_validation_images_those_of_training_count(model):
    trained, note = with_conditions_of(Aged(val=0), model(Conditions(attributes=(AGE,))), CACHE)
    assert note == "conditions: those of aged/train"
    assert isinstance(trained.condition, ImageRows)
    ages = trained.condition.get("age")
    assert ages is not None
    assert sorted(ages.tolist()) == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    "attributes", [(AGE,), (AGE, SPECIES.model_copy(update={"values": ("frog", "cat")}))]
)
def test_values_are_spread_if_the_images_lack_an_attribute(model, attributes):
    own = model(Conditions(attributes=(AGE, SPECIES)))
    trained, note = with_conditions_of(Aged(attributes), own, CACHE)
    assert trained is own
    assert note == "conditions: spread evenly, because aged/val has no species of the model"


def test_texts_and_images_of_other_data_are_refused(model):
    with pytest.raises(
        UsageError, match=r"^dataset=aged: has no captions, but the model is conditioned on them"
    ):
        with_conditions_of(Aged(), model(Conditions(attributes=(AGE,), text=TEXT)), CACHE)
    translator = model(Conditions(image=1), "label=none")
    with pytest.raises(UsageError, match=r"^dataset=aged: has no condition images"):
        with_conditions_of(Aged(), translator, CACHE)
    with pytest.raises(UsageError, match=r"^dataset=aged: has no validation images"):
        with_conditions_of(Aged(val=0), translator, CACHE)
    with pytest.raises(UsageError, match=r"^label: the model is conditioned on images, so that"):
        refuse_chosen(translator)


def test_conditions_without_images_read_no_pixels(monkeypatch):
    images = Aged().load("val")
    monkeypatch.setattr(type(images), "__getitem__", lambda *_: pytest.fail("read pixels"))
    assert ImageRows(images, torch.tensor([2, 0])).rows(torch.tensor([0, 1])).values["age"].tolist() == [
        120,
        100,
    ]


def test_rows_have_the_condition_of_their_image():
    images = Aged().load("val")
    rows = ImageRows(images, torch.tensor([4, 2, 0]))
    assert len(rows) == 3
    assert rows.rows(torch.tensor([2, 0])).values["age"].tolist() == [100, 140]
    ages = rows.get("age")
    assert ages is not None
    assert ages.tolist() == [140, 120, 100]
    assert rows.get("label") is None


def test_rows_name_the_texts_and_attributes_of_their_images():
    images = Aged().load("val")
    captions = [(), ("a frog", "a green frog"), *[("a cat",)] * (len(images) - 2)]
    encoder = LearnedText(width=8, heads=2, length=8).fitted(["a green frog", "a cat"], torch.device("cpu"))
    images = images.with_conditions({**images.conditions, "text": encoder.source(captions, CACHE)})
    found = ImageRows(images, torch.tensor([2, 0, 1, 2])).values(torch.arange(1, 4), [AGE])
    assert [row["age"] for row in found] == [100, 110, 120]
    assert "text" not in found[0]
    assert found[1]["text"] in captions[1]
    assert found[2]["text"] == "a cat"


@pytest.mark.parametrize(
    "label",
    [
        AttributeDescription(name="label", kind="number", low=0, high=3),
        AttributeDescription(name="label", kind="yes_no", values=("no", "yes")),
    ],
)
def test_a_label_that_is_no_class_gives_samples_no_classes(model, label):
    own = model(Conditions(attributes=(SPECIES, label)), "label={species: frog, label: 1}")
    told = own.condition.get("label")
    assert told is not None
    assert told.tolist() == [1]
    assert own.labels is None
    images = MemoryImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    images = images.with_conditions({"label": ColumnSource(torch.tensor([1, 0, 1, 0]))})
    samples = ModelSamples(replace(own, condition=ImageRows(images, torch.arange(4))), range(4), None)
    assert not samples.labelled
    assert samples.batch(range(4))[1] is None


class Captioned(Aged):
    """Such images with a caption each, but the second."""

    def load(self, split):
        images = super().load(split)
        images.captions = CaptionTable.of([(f"{row}",) if row != 1 else () for row in range(len(images))])
        return images


def test_samples_have_the_captions_of_the_images(model, monkeypatch):
    monkeypatch.setattr(dataset_conditions, "load_text_encoder", lambda *_: LetterEncoder())
    trained, _ = with_conditions_of(Captioned((AGE,)), model(Conditions(attributes=(AGE,), text=TEXT)), CACHE)
    samples = ModelSamples(trained, range(2, 9), None)
    condition, texts = samples.condition_of(range(7)), samples.texts_of(range(7))
    assert samples.has_texts
    assert condition is not None
    assert texts is not None
    rows = [int(age - 100) // 10 for age in condition.values["age"].tolist()]
    assert texts == [str(row) if row != 1 else None for row in rows]
    assert texts[6] == texts[0]
    without, _ = with_conditions_of(Aged((AGE,)), model(Conditions(attributes=(AGE,))), CACHE)
    assert not ModelSamples(without, range(3), None).has_texts


def test_samples_of_prompts_have_them(model):
    trained = model(Conditions(attributes=(AGE,), text=TEXT), "prompt=[ab,c]", "label.age=[1,2]")
    samples = ModelSamples(trained, range(5, 9), None)
    assert samples.has_texts
    assert samples.texts_of(range(4)) == ["c", "ab", "c", "ab"]


def kept(trained: LoadedModel, folder: Path, seeds: range) -> ModelSamples:
    """Samples that an evaluation keeps in a folder."""
    samples = ModelSamples(trained, seeds, folder)
    claim(folder, trained.record, trained.model)
    with samples.writer:
        samples.batch(range(len(seeds)))
    _keep_record(samples, Report([], []))
    return samples


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_kept_samples_have_the_captions_and_attributes_of_the_images(model, monkeypatch, tmp_path, suffix):
    monkeypatch.setattr(dataset_conditions, "load_text_encoder", lambda *_: LetterEncoder())
    conditions = Conditions(attributes=(AGE, SPECIES), text=TEXT)
    trained, _ = with_conditions_of(Captioned(), model(conditions), CACHE)
    samples = kept(trained, tmp_path / "kept", range(2, 9))
    path = Path(
        make_archive(str(tmp_path / "kept"), "zip", tmp_path / "kept") if suffix else tmp_path / "kept"
    )
    given = given_samples(path, Captioned(), None)
    assert given.has_texts
    assert given.texts_of(range(7)) == samples.texts_of(range(7))
    for one, other in ((given, samples), (given_samples(path, Captioned((AGE,)), 7), samples)):
        found, expected = one.condition_of(range(7)), other.condition_of(range(7))
        assert found is not None
        assert expected is not None
        for name, values in found.values.items():
            assert values.tolist() == expected.values[name].tolist()


def test_some_of_the_kept_samples_have_captions(model, monkeypatch, tmp_path):
    monkeypatch.setattr(dataset_conditions, "load_text_encoder", lambda *_: LetterEncoder())
    trained, _ = with_conditions_of(Captioned((AGE,)), model(Conditions(attributes=(AGE,), text=TEXT)), CACHE)
    samples = kept(trained, tmp_path, range(1))
    with (tmp_path / "labels.csv").open("a") as file:
        file.writelines(f"{number:06}.png,20,{'a' * 100}\n" for number in range(1, 1000))
    assert given_samples(tmp_path, Captioned((AGE,)), None).texts_of([0]) == samples.texts_of([0])


def test_kept_samples_without_their_table_have_no_captions(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dataset_conditions, "load_text_encoder", lambda *_: LetterEncoder())
    trained, _ = with_conditions_of(Captioned((AGE,)), model(Conditions(attributes=(AGE,), text=TEXT)), CACHE)
    kept(trained, tmp_path, range(4))
    table = tmp_path / "labels.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]))
    given = given_samples(tmp_path, Captioned((AGE,)), None)
    assert given.texts_of([3]) is None
    line = f"diffuse: samples={tmp_path}: 1 sample without captions and attributes: labels.csv has no row for"
    assert f"{line} '000003.png'\n" in capsys.readouterr().err
    table.write_text("file,age\n000000.png,old\n")
    assert not given_samples(tmp_path, Captioned((AGE,)), None).has_texts
    line = f"diffuse: samples={tmp_path}: no captions and attributes: labels.csv has 'old' in the column age"
    assert line in capsys.readouterr().err
    table.unlink()
    assert not given_samples(tmp_path, Captioned((AGE,)), None).has_texts
    assert "captions" not in capsys.readouterr().err
