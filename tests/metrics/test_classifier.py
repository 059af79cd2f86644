"""Features of a classifier: shipped, trained, cached and chosen by features=auto."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_cli.data import Digits, ExternalImages, Images
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import (
    ClassifierFeatures,
    ClassifierScore,
    DatasetReference,
    FeatureExtractors,
    FrechetDistance,
    GivenSamples,
    KernelDistance,
    Report,
    auto_features,
    evaluate,
    history_table,
)
from diffusion_cli.metrics.features import shipped
from diffusion_cli.metrics.features.classifier_training import FeatureClassifier, Recipe, accuracy
from diffusion_cli.system.tensors import digest
from helpers.metrics import DATA, METRICS, Held, Projection, measured, option, pixels

CPU = torch.device("cpu")
QUICK = option("classifier") | {"steps": 20, "width": 8}


# --- The classifier ------------------------------------------------------------


def test_the_classifier_knows_unseen_digits(trained, digits) -> None:
    features, _ = trained
    val = digits.load("val")
    predicted = features(val[torch.arange(len(val))]).logits.argmax(1)
    accuracy = (predicted == val.labels).float().mean().item()
    assert accuracy >= 0.99
    assert features.val_accuracy == pytest.approx(accuracy)


@pytest.fixture
def untrained(monkeypatch) -> list[Recipe]:
    """The recipes that are asked for; each gives the initial network at once, in the place of training."""
    asked = []

    def initial(recipe: Recipe, images: Images, device: torch.device) -> FeatureClassifier:
        asked.append(recipe)
        return recipe.initial(images.shape[0]).eval()

    monkeypatch.setattr(Recipe, "train", initial)
    return asked


def test_a_trained_classifier_is_taken_from_the_cache(digits, tmp_path, untrained) -> None:
    features, again = (ClassifierFeatures(digits, tmp_path, CPU, **QUICK).prepare() for _ in range(2))
    assert len(untrained) == 1
    assert again.digest == features.digest
    assert again.val_accuracy == features.val_accuracy
    images = digits.load("train")[torch.arange(9)]
    assert torch.equal(again(images).features, features(images).features)


INDEX = json.loads(shipped.INDEX.read_text())


def test_an_interrupted_classifier_says_that_it_starts_again(digits, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ClassifierFeatures(digits, tmp_path, CPU, **QUICK).prepare()
    line = "the feature classifier is saved once it is trained; its training starts again"
    assert capsys.readouterr().err == f"diffuse: {line}\n"


def test_shipped_classifiers_are_small_accurate_and_intact() -> None:
    assert [row["file"] for row in INDEX] == [
        "digits-0.safetensors", "digits-1.safetensors", "digits-2.safetensors", "mnist-0.safetensors"
    ]  # fmt: skip
    files = [shipped.FOLDER / row["file"] for row in INDEX]
    assert {*files, shipped.INDEX} == set(shipped.FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 1.2e6
    for row, file in zip(INDEX, files, strict=True):
        weights = shipped.shipped(Recipe(**row["recipe"]), row["train_sha256"], row["val_sha256"])
        assert weights is not None
        assert weights.val_accuracy == row["val_accuracy"] >= 0.99
        network = Recipe(**row["recipe"]).initial(1)
        network.load_state_dict(weights.state)
        assert digest(network.state_dict()) == row["features_digest"]
        assert row["licence"] == "Apache-2.0"
        assert row["data_licence"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == row["sha256"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_classifier_of_digits_is_shipped_for_three_seeds(digits, tmp_path, untrained, seed) -> None:
    features = ClassifierFeatures(digits, tmp_path, CPU, **option("classifier") | {"seed": seed}).prepare()
    row = INDEX[seed]
    assert features.digest == row["features_digest"]
    assert features.val_accuracy == row["val_accuracy"]
    assert accuracy(features.network, digits.load("val"), CPU) == row["val_accuracy"]
    assert "shipped" in features.note
    assert untrained == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["seed", "flip", "val_fraction", "one label", "one pixel"])
def test_a_shipped_classifier_is_for_exactly_its_recipe_and_images(
    digits, tmp_path, untrained, change
) -> None:
    """Its own name does not make a dataset that of the classifier, and neither do almost all of the images."""
    data, settings = Digits("", val_fraction=0.2, flip=change == "flip"), option("classifier")
    if change == "seed":
        settings["seed"] = 3
    if change == "val_fraction":
        data.val_fraction = 0.1
    if change in ("one label", "one pixel"):
        train = digits.load("train")
        images, labels = train[torch.arange(len(train))].clone(), train.labels.clone()
        if change == "one label":
            labels[0] = (labels[0] + 1) % 10
        else:
            images[0, 0, 0, 0] ^= 1
        data.load = lambda split: MemoryImages(images, labels) if split == "train" else digits.load(split)
    features = ClassifierFeatures(data, tmp_path, CPU, **settings).prepare()
    assert len(untrained) == 1
    assert features.digest not in [row["features_digest"] for row in INDEX]
    assert "trained here" in features.note


def test_equal_images_under_another_name_take_the_shipped_classifier(digits, tmp_path, untrained) -> None:
    data = Digits("", val_fraction=0.2, flip=False)
    data.name = "mine"
    data.load = lambda split: (
        digits.load(split) if split == "train" else MemoryImages(pixels(9, 0), torch.arange(9))
    )
    features = ClassifierFeatures(data, tmp_path, CPU, **option("classifier")).prepare()
    assert features.digest == INDEX[0]["features_digest"]
    assert features.val_accuracy == accuracy(features.network, data.load("val"), CPU)
    assert features.val_accuracy != INDEX[0]["val_accuracy"]
    assert untrained == []


def test_a_damaged_shipped_classifier_is_refused(digits, tmp_path, monkeypatch) -> None:
    content = bytearray((shipped.FOLDER / INDEX[0]["file"]).read_bytes())
    content[-1] ^= 1
    (tmp_path / INDEX[0]["file"]).write_bytes(content)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(
        ValueError, match=r"features=classifier: .*digits-0.safetensors is damaged; reinstall"
    ):
        ClassifierFeatures(digits, tmp_path, CPU, **option("classifier")).prepare()


def test_the_script_writes_what_is_then_shipped(tmp_path, monkeypatch) -> None:
    import train_classifiers

    monkeypatch.setattr(
        train_classifiers, "recipe", lambda data, seed: replace(Recipe(**INDEX[0]["recipe"]), steps=2)
    )
    data = Held(pixels(40, 0), pixels(9, 1), classes=10)
    with pytest.raises(ValueError, match=r"held, seed 5: validation accuracy .* is below 0.99"):
        train_classifiers.train(data, 5, "none", tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(train_classifiers, "LEAST_ACCURACY", 0)
    row = train_classifiers.train(data, 5, "none", tmp_path)
    assert row.keys() == INDEX[0].keys()
    (tmp_path / "index.json").write_text(json.dumps([row]))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped, "INDEX", tmp_path / "index.json")
    features = ClassifierFeatures(data, tmp_path, CPU, **option("classifier") | {"steps": 2}).prepare()
    assert (features.digest, features.val_accuracy) == (row["features_digest"], row["val_accuracy"])
    assert "shipped" in features.note


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads of torch, on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_threads_change_neither_weights_nor_features(trained, digits, tmp_path, two_threads) -> None:
    images = digits.load("val")[torch.arange(359)]
    many, many_seen = ClassifierFeatures(digits, tmp_path / "two", CPU, **QUICK).prepare(), trained[0](images)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one, one_seen = ClassifierFeatures(digits, tmp_path / "one", CPU, **QUICK).prepare(), trained[0](images)
    assert many.digest == one.digest
    error = (many_seen.features - one_seen.features).norm() / one_seen.features.norm()
    assert error < 1e-6


def test_numbers_of_unlike_classifiers_are_not_compared(digits, tmp_path) -> None:
    """As of two seeds of the recipe, or of a classifier trained by an earlier release."""
    val = digits.load("val")
    images = val[torch.arange(len(val))]
    histories = {}
    for seed in (0, 1):
        features = ClassifierFeatures(
            digits, tmp_path, CPU, **option("classifier") | {"seed": seed}
        ).prepare()
        report = measured({"fid": METRICS["fid"]}, features, images, digits, tmp_path)
        histories[f"seed {seed}"] = [report.to_dict()]
    with pytest.raises(ValueError, match=r"different protocols .*features"):
        history_table(histories, force=False)


def test_classifier_features_do_not_depend_on_the_batch(trained, digits) -> None:
    images = digits.load("train")[torch.arange(9)]
    whole = trained[0](images).features
    alone = torch.cat([trained[0](image[None]).features for image in images])
    assert torch.allclose(alone, whole, rtol=1e-4, atol=1e-5)


def test_an_evaluation_with_the_classifier_says_what_its_numbers_are(trained, digits, tmp_path) -> None:
    features, _ = trained
    val = digits.load("val")
    images, labels = val[torch.arange(len(val))], val.labels.clone()
    labels[: len(labels) // 2] = (labels[: len(labels) // 2] + 1) % 10
    made = {"sampler": "ddim", "steps": 50}
    metrics = METRICS | {"classifier": ClassifierScore()}
    report = measured(metrics, features, images, digits, tmp_path, labels, made=made)
    by_name = {result.name: result for result in report.results}
    assert list(by_name) == ["frechet_classifier", "is_classifier", "class_accuracy", "class_entropy"]
    assert by_name["class_accuracy"].value == pytest.approx(0.5, abs=0.02)
    assert by_name["class_accuracy"].details["on_real_val"] == features.val_accuracy
    assert by_name["frechet_classifier"].details["ratio_to_reference"] == pytest.approx(1, abs=1e-6)
    assert by_name["class_entropy"].details["entropy_of_classes"] == pytest.approx(np.log(10), abs=0.02)
    for result in report.results:
        assert result.protocol["features"]["digest"] == features.digest
        assert result.protocol["sampling"] == made | {"pixels_sha256": val.pixel_digest()}
    for word in ("frechet_classifier", "reference_distance", "equal_size_ratio", "not of Inception"):
        assert word in report.table()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_entropies_are_those_of_their_definition(tmp_path) -> None:
    features, samples = Projection(), pixels(30, 2)
    (result,) = measured({"classifier": ClassifierScore()}, features, samples, DATA, tmp_path).results
    logits = features(samples).logits
    assert logits is not None
    p = logits.double().softmax(1)
    assert result.value == pytest.approx(float(torch.special.entr(p).sum(1).mean()), rel=1e-6)
    expected = float(torch.special.entr(p.mean(0)).sum())
    assert result.details == pytest.approx({"entropy_of_classes": expected, "most": np.log(3)}, rel=1e-6)


def test_equal_training_gives_equal_weights_and_leaves_random_numbers_alone(digits, tmp_path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = ClassifierFeatures(digits, tmp_path / "a", CPU, **QUICK).prepare()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = ClassifierFeatures(digits, tmp_path / "b", CPU, **QUICK).prepare()
    other = ClassifierFeatures(digits, tmp_path / "b", CPU, **QUICK | {"seed": 1}).prepare()
    assert first.digest == second.digest != other.digest


def test_a_damaged_classifier_is_trained_anew_with_one_line(digits, tmp_path, capsys) -> None:
    expected = ClassifierFeatures(digits, tmp_path, CPU, **QUICK).prepare().digest
    (file,) = tmp_path.glob("classifier-*.pt")
    content = file.read_bytes()
    saved = torch.load(file, weights_only=True)
    saved["state"]["head.bias"][0] += 1
    torch.save(saved, tmp_path / "other.pt")
    saved["state"]["head.bias"] = torch.zeros(1).expand(2**40)  # which would be digested for hours
    torch.save(saved, tmp_path / "large.pt")
    others = [(tmp_path / name).read_bytes() for name in ("other.pt", "large.pt")]
    for damaged in (content[: len(content) // 2], b"", *others):
        file.write_bytes(damaged)
        assert ClassifierFeatures(digits, tmp_path, CPU, **QUICK).prepare().digest == expected
        assert f"diffuse: {file}: is damaged (" in capsys.readouterr().err
        assert torch.load(file, weights_only=True)["digest"] == expected


def test_the_classifier_takes_other_sizes_and_colours(tmp_path) -> None:
    colour = pixels(60, 0)[:, :, :5, :7].expand(-1, 3, -1, -1)
    features = ClassifierFeatures(
        Held(colour, colour[:0], classes=4), tmp_path, CPU, **QUICK | {"steps": 1}
    ).prepare()
    assert features(colour[:2]).features.shape == (2, QUICK["dim"])
    logits = features(colour[:2]).logits
    assert logits is not None
    assert logits.shape == (2, 4)
    assert features.classes == 4
    assert features.val_accuracy is None


def test_an_accuracy_on_few_validation_images_is_marked(tmp_path) -> None:
    images = pixels(60, 0)
    for count, marked in ((19, True), (20, False)):
        data = Held(images[count:], images[:count], classes=4)
        features = ClassifierFeatures(data, tmp_path, CPU, **QUICK | {"steps": 1}).prepare()
        assert (f" of only {count} images" in features.note) == marked


# --- The choice of features ------------------------------------------------------------


def test_auto_holds_the_same_values_as_the_options_it_chooses_from() -> None:
    assert option("auto") == option("inception") | option("classifier")


def test_auto_takes_a_classifier_for_gray_images_and_says_so(digits, tmp_path) -> None:
    features = auto_features(
        digits, tmp_path, CPU, weights=None, resize="tensorflow", precision="fp32", **QUICK
    ).prepare()
    assert features.name == "classifier"
    assert "features=auto" in features.note
    with pytest.raises(ValueError, match=r"features=auto: held .* no classes.*features=inception"):
        auto_features(DATA, tmp_path, CPU, weights=None, resize="tensorflow", precision="fp32", **QUICK)


def test_no_classifier_is_trained_for_an_evaluation_that_is_refused(digits, tmp_path, monkeypatch) -> None:
    def trained_in_vain(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Recipe, "train", trained_in_vain)
    networks = FeatureExtractors(
        {"_target_": "diffusion_cli.metrics.ClassifierFeatures", **QUICK}, digits, tmp_path, CPU
    )
    for metric, line in (
        (
            FrechetDistance(reference_distance=True, infinity=0, bootstrap=0),
            r"num_samples=5: 5 images are fewer than the",
        ),
        (KernelDistance(subsets=2, subset_size=6, seed=0), r"metric.kid.subset_size=6: must be at least 2"),
    ):
        given = ExternalImages(MemoryImages(digits.load("train")[torch.arange(5)], None), None)
        samples, reference = (
            GivenSamples(given, None, {}, "samples"),
            DatasetReference(digits, split="train", stats=None),
        )
        with pytest.raises(ValueError, match=line):
            evaluate({"metric": metric}, networks, samples, reference, batch_size=5)


def test_auto_takes_inception_for_colour_images(tmp_path) -> None:
    colour = pixels(9, 0).expand(-1, 3, -1, -1)
    with pytest.raises(UsageError, match=r"features.weights=nowhere.pth: no such file"):
        auto_features(
            Held(colour, colour, classes=3),
            tmp_path,
            CPU,
            weights="nowhere.pth",
            resize="tensorflow",
            precision="fp32",
            **QUICK,
        )


def test_the_classifier_refuses_images_without_classes_or_pixels(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"features=classifier: held has no classes"):
        ClassifierFeatures(DATA, tmp_path, CPU, **QUICK).prepare()
    real = Held(pixels(9, 0).float(), pixels(9, 0).float(), classes=2)
    with pytest.raises(ValueError, match="uint8"):
        ClassifierFeatures(real, tmp_path, CPU, **QUICK).prepare()
