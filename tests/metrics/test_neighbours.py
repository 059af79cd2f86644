"""Precision, recall, density, coverage and memorization."""

import pytest
import torch
from torch import Tensor

from diffusion_cli.data import ExternalImages
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.metrics import (
    DatasetReference,
    DensityCoverage,
    GivenSamples,
    Memorization,
    PrecisionRecall,
    evaluate,
)
from diffusion_cli.metrics.neighbours import nearest, within
from helpers.metrics import AsSeen, Held, Projection, Through, array_rows, measured, number, pixels

CPU = torch.device("cpu")


# --- Neighbours ------------------------------------------------------------

TIES = (
    "ties",
    lambda a: torch.cat([a["fake_d16"][:50], a["real_d16"][:50], a["real_d16"][:50]]),
    lambda a: a["real_d16"],
)
SETS = [
    ("d16", lambda a: a["fake_d16"], lambda a: a["real_d16"]),
    ("d64", lambda a: a["fake_d64"], lambda a: a["real_d64"]),
    TIES,
    ("grid", lambda a: a["grid_fake"], lambda a: a["grid_real"]),
]


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(("name", "fake", "real"), SETS, ids=[case[0] for case in SETS])
def test_precision_recall_density_and_coverage_equal_the_reference(
    reference, agree, name, fake, real, k
) -> None:
    """Counts are exact, ties too: torch-fidelity counts the rim in, prdc does not."""
    arrays = reference("metrics")
    seen = AsSeen(fake(arrays), real(arrays))
    found = [
        *PrecisionRecall(k=k).init_state(seen).compute(),
        *DensityCoverage(k=k).init_state(seen).compute(),
    ]
    precision, recall, density, coverage = (number(finding.value) for finding in found)
    agree(
        f"metrics/pr_tf_{name}_k{k}", torch.stack([precision, recall]), arrays[f"pr_tf_{name}_k{k}"][:2], 1e-7
    )
    agree(
        f"metrics/prdc_{name}_k{k}", torch.stack([density, coverage]), arrays[f"prdc_{name}_k{k}"][2:], 1e-12
    )


def test_neighbours_do_not_depend_on_blocks(monkeypatch) -> None:
    x, y = (
        torch.randn(50, 3, generator=torch.Generator().manual_seed(seed)).round(decimals=1) for seed in (0, 1)
    )
    whole = nearest(array_rows(x), array_rows(y), 4, CPU, "")[0]
    counts = within(array_rows(x), array_rows(y), whole[:, 2], False, CPU, "")
    monkeypatch.setattr("diffusion_cli.metrics.rows.BLOCK", 7)
    assert torch.equal(nearest(array_rows(x), array_rows(y), 4, CPU, "")[0], whole)
    for one, other in zip(
        counts, within(array_rows(x), array_rows(y), whole[:, 2], False, CPU, ""), strict=True
    ):
        assert torch.equal(one, other)
    brute = torch.stack([(p.double() - y.double()).square().sum(1).sort().values[:4] for p in x])
    assert torch.equal(whole, brute)


# --- Memorization ------------------------------------------------------------


def test_a_planted_training_image_is_found_among_a_thousand(digits, trained, tmp_path) -> None:
    features, _ = trained
    train, val = digits.load("train"), digits.load("val")
    noise = torch.randint(-24, 25, (1000, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    others = val[torch.arange(1000) % len(val)]
    samples = (others + noise).clamp(0, 255).to(torch.uint8)
    samples[617] = train[torch.tensor([1234])][0]
    evaluation = evaluate(
        {"memorization": Memorization(pairs=3)},
        Through(features, digits, tmp_path),
        GivenSamples(ExternalImages(MemoryImages(samples, None), None), None, {}, "samples"),
        DatasetReference(digits, split="train", stats=None),
        batch_size=250,
    )
    (result,) = evaluation.report.results
    assert result.details["copies"] == 1
    assert result.value >= 0.001
    picture = evaluation.pictures["memorization"].rows
    made, training = picture  # a row of samples above a row of training images, the nearest pair first
    assert torch.equal(made[0], samples[617])
    assert [torch.equal(*pair) for pair in zip(made, training, strict=True)] == [True, False, False]


def test_real_validation_images_are_not_memorized(digits, trained, tmp_path) -> None:
    images = digits.load("val")[torch.arange(359)]
    (result,) = measured(
        {"memorization": Memorization(pairs=2)}, trained[0], images, digits, tmp_path
    ).results
    assert (result.value, result.details["copies"], result.details["median_distance_ratio"]) == (0, 0, 1)


def test_validation_copies_of_training_images_hide_no_copy(tmp_path) -> None:
    train = pixels(50, 0)
    data = Held(train, torch.cat([train[:2], pixels(20, 1)]))
    samples = torch.cat([pixels(30, 2), train[7:8]])
    report = measured({"memorization": Memorization(pairs=2)}, Projection(), samples, data, tmp_path)
    assert report.results[0].details["copies"] == 1
    assert any("2 images of held/val also are training images" in note for note in report.notes)


def test_the_picture_names_the_distance_of_each_pair_and_few_real_images_are_noted() -> None:
    """On a line: 17 samples at 0.1, 0.2, ... from the only training images; real images are 2 apart at least."""
    samples = column([number / 10 for number in range(1, 18)])
    seen = AsSeen(samples, column([0.0, 100.0]), column([2.0, 3.0]))
    (found,) = Memorization().init_state(seen).compute()
    picture = found.pictures["memorization"]
    assert [len(words) for words in picture.columns] == [16, 1]
    assert picture.columns[0][:2] == ("0.1", "0.2")
    assert picture.columns[1] == ("1.7",)
    assert picture.title == "feature distance of each pair; smallest of real images: 2"
    assert "memorization: rough, because only 2 real images are compared" in found.notes


def column(values: list[float]) -> Tensor:
    return torch.tensor(values)[:, None]


@pytest.mark.parametrize(
    ("other", "value", "ratio"),
    [(None, 1 / 2, 0.5), ([0.0, 1.4, 5.0, 6.0], 1 / 4, 1.25)],
    ids=["no validation images", "validation images"],
)
def test_samples_are_set_against_images_that_are_not_memorized(other, value, ratio) -> None:
    """On a line. Without validation images each training image is compared with the others, not with itself."""
    train, samples = column([0.0, 1.0, 3.0]), column([0.25, 1.5, 5.0, 6.0])
    seen = AsSeen(samples, train, None if other is None else column(other))
    (found,) = Memorization(pairs=1).init_state(seen).compute()
    assert found.value == value
    assert found.details["copies"] == 0
    assert found.details["median_distance_ratio"] == pytest.approx(ratio)
