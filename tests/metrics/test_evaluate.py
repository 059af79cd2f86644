"""One pass over samples and real images for all metrics, and the images that it refuses."""

import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.data import ExternalImages, NoDataset, spread
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import (
    DatasetReference,
    FeatureBatch,
    FeatureExtractors,
    FrechetDistance,
    GivenSamples,
    KernelDistance,
    Memorization,
    Metric,
    MetricState,
    MetricValue,
    PrecisionRecall,
    SampleBatch,
    evaluate,
)
from diffusion_cli.samplers import unreported
from helpers.metrics import DATA, METRICS, Held, Projection, Through, distance, measured, moments_of, pixels

CPU = torch.device("cpu")


def test_one_pass_over_samples_and_real_images_serves_all_metrics(tmp_path) -> None:
    features = Projection()
    samples = pixels(100, 2)
    metrics = METRICS | {
        "kid": KernelDistance(subsets=3, subset_size=20, seed=0),
        "precision_recall": PrecisionRecall(k=3),
        "memorization": Memorization(pairs=4),
    }
    report = measured(metrics, features, samples, DATA, tmp_path)
    assert [result.name for result in report.results] == [
        "frechet_projection",
        "is_projection",
        "kid_projection",
        "precision_projection",
        "recall_projection",
        "memorization_projection",
    ]
    assert features.seen == 100 + 200 + 40
    again = measured(metrics, features, samples, DATA, tmp_path, batch_size=100)
    assert features.seen == 340 + 100  # the features of real images were kept
    for first, second in zip(report.results, again.results, strict=True):
        assert second.value == pytest.approx(first.value, rel=1e-6)
        assert second.protocol == first.protocol


class Brightness(Metric, MetricState):
    """The mean of all pixels, without features."""

    uses_features = False

    def check(self, count, seen, force) -> list[str]:
        return []

    def init_state(self, seen) -> MetricState:
        self.values: list[Tensor] = []
        return self

    def update(self, batch: SampleBatch) -> None:
        self.values.append(batch.images.double())

    def compute(self) -> list[MetricValue]:
        return [MetricValue("brightness", float(torch.cat(self.values).mean()))]


def test_a_metric_without_features_builds_no_feature_network(tmp_path) -> None:
    samples = GivenSamples(ExternalImages(MemoryImages(pixels(50, 2), None), None), None, {}, "samples")
    # Building the network of an empty node would fail.
    networks, reference = FeatureExtractors({}, DATA, tmp_path, CPU), DatasetReference(DATA)
    (result,) = evaluate(
        {"brightness": Brightness()}, networks, samples, reference, batch_size=33
    ).report.results
    assert result.value == pytest.approx(float(pixels(50, 2).double().mean()))
    assert result.protocol["features"]["name"] == "pixels"
    both = measured(METRICS | {"brightness": Brightness()}, Projection(), pixels(50, 2), DATA, tmp_path)
    assert both.results[-1].value == result.value


def test_the_numbers_beside_the_distance_are_what_their_names_say(tmp_path) -> None:
    features, samples = Projection(), pixels(100, 2, high=250)
    result = measured(METRICS, features, samples, DATA, tmp_path).results[0]
    train, val = (features(DATA.splits[name]).features for name in ("train", "val"))
    seen = features(samples).features
    reference_distance, rows = distance(val, train), spread(100, 80)
    sets = [distance(seen[rows[first::2]], train) for first in (0, 1)]
    equal = (sets[0] + sets[1]) / 2
    assert result.value == pytest.approx(distance(seen, train), rel=1e-5)
    assert result.details == pytest.approx(
        {
            "reference_distance": reference_distance,
            "reference_distance_images": 40,
            "ratio_to_reference": distance(seen, train) / reference_distance,
            "equal_size_images": 40,
            "equal_size_sets": 2,
            "equal_size_distance": equal,
            "equal_size_deviation": abs(sets[0] - sets[1]) / 2**0.5,
            "equal_size_reference": reference_distance,
            "equal_size_ratio": equal / reference_distance,
        },
        rel=1e-5,
    )
    assert result.protocol["samples"] == 100
    assert result.protocol["reference"]["images"] == 200


def test_fewer_samples_than_validation_are_matched_by_as_many_real_images(tmp_path) -> None:
    features, samples = Projection(), pixels(10, 2)
    details = measured({"fid": METRICS["fid"]}, features, samples, DATA, tmp_path).results[0].details
    spread = DATA.splits["val"][::4]
    train = features(DATA.splits["train"]).features
    assert details["reference_distance_images"] == 40
    assert details["equal_size_images"] == 10
    assert details["equal_size_reference"] == pytest.approx(
        distance(features(spread).features, train), rel=1e-5
    )


def test_real_validation_images_as_samples_have_ratio_one(tmp_path) -> None:
    report = measured(METRICS, Projection(), DATA.splits["val"], DATA, tmp_path)
    details = report.results[0].details
    assert details["ratio_to_reference"] == pytest.approx(1, abs=1e-6)
    assert details["equal_size_ratio"] == pytest.approx(1, abs=1e-6)


def test_the_validation_split_can_be_the_reference(tmp_path) -> None:
    metric = FrechetDistance(reference_distance=False, infinity=0, bootstrap=0)
    images = DATA.splits["val"]
    result = measured({"fid": metric}, Projection(), images, DATA, tmp_path, split="val").results[0]
    assert result.value == pytest.approx(0, abs=1e-9)
    assert result.details == {}
    assert result.protocol["reference"]["name"] == "held/val"


def test_published_statistics_take_the_place_of_the_images(tmp_path) -> None:
    features, samples = Projection(), pixels(100, 2)
    moments = moments_of(features(DATA.splits["train"]).features)
    path = tmp_path / "stats.npz"
    np.savez(path, mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    metrics, nothing = {"fid": METRICS["fid"]}, NoDataset("samples", (1, 8, 8))
    expected = measured(metrics, features, samples, DATA, tmp_path).results[0]
    seen = features.seen
    report = measured(metrics, features, samples, nothing, tmp_path, stats=str(path))
    assert report.results[0].value == pytest.approx(expected.value, rel=1e-9)
    assert features.seen == seen + 100
    assert set(report.results[0].protocol["reference"]) == {"stats", "sha256"}
    with pytest.raises(ValueError, match=r"reference=dataset: no real images"):
        measured(metrics, features, samples, nothing, tmp_path)
    np.savez(path, mu=moments.mean.numpy()[:3], sigma=moments.covariance.numpy())
    with pytest.raises(ValueError, match=r"reference.stats=.*has \(3,\) features, but the network has 5"):
        measured(metrics, features, samples, nothing, tmp_path, stats=str(path))
    for sigma, wrong in (
        (moments.covariance * float("nan"), "finite"),
        (-moments.covariance, "not a covariance"),
    ):
        np.savez(path, mu=moments.mean.numpy(), sigma=sigma.numpy())
        with pytest.raises(ValueError, match=rf"reference.stats=.*{wrong}"):
            measured(metrics, features, samples, nothing, tmp_path, stats=str(path))
    np.savez(path, mean=moments.mean.numpy())
    with pytest.raises(ValueError, match=r"reference.stats=.*has the arrays mean, but not mu and sigma"):
        measured(metrics, features, samples, nothing, tmp_path, stats=str(path))
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED
    ) as archive:  # a megabyte with a header that claims a terabyte
        for key in ("mu", "sigma"):
            header = (
                repr({"descr": "<f8", "fortran_order": False, "shape": (2**37,)}).ljust(117).encode() + b"\n"
            )
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00\x76\x00" + header + bytes(2**20))
    with pytest.raises(
        ValueError, match=r"reference.stats=.*too few for an array \(137438953472,\) of float64"
    ):
        measured(metrics, features, samples, nothing, tmp_path, stats=str(path))


def test_too_few_samples_are_refused_before_any_is_made(tmp_path) -> None:
    class Never(GivenSamples):
        def batch(self, numbers, advance=unreported):
            raise AssertionError("a sample was made although it could be known that they are too few")

    samples = Never(ExternalImages(MemoryImages(pixels(5, 2), None), None), None, {}, "samples")
    networks, reference = (
        Through(Projection(), DATA, tmp_path),
        DatasetReference(DATA, split="train", stats=None),
    )
    with pytest.raises(ValueError, match=r"num_samples=5: .* 6 .* 5 features of projection; raise"):
        evaluate(METRICS, networks, samples, reference, batch_size=9)


def test_too_few_samples_can_be_forced_with_a_warning(tmp_path) -> None:
    metrics = {"fid": METRICS["fid"]}
    report = measured(metrics, Projection(), pixels(5, 2), DATA, tmp_path, force=True)
    assert any("num_samples=5" in note and "biased" in note for note in report.notes)
    assert "num_samples=5" in report.table()
    assert report.results[0].details["images_needed"] == 6
    with pytest.raises(ValueError, match="num_samples=1"):
        measured(metrics, Projection(), pixels(1, 2), DATA, tmp_path, force=True)


def test_features_without_class_scores_have_no_inception_score_but_what_else_they_say(tmp_path) -> None:
    class Wordless(Projection):
        name, classes, precision, chunk = "wordless", 0, "bf16", 20

        def extract(self, images: Tensor) -> FeatureBatch:
            return FeatureBatch(images.flatten(1).float() @ self.matrix, None, images.flatten(1).float())

    features, samples = Wordless(), pixels(50, 2)
    seen = features(samples)
    assert seen.logits is None
    assert seen.spatial is not None
    assert torch.equal(seen.spatial, samples.flatten(1).float())
    with pytest.raises(ValueError, match=r"metric=is: .*features=wordless has none; use features=inception"):
        measured(METRICS, features, samples, DATA, tmp_path)
    report = measured({"fid": METRICS["fid"]}, features, samples, DATA, tmp_path)
    assert report.results[0].protocol["features"]["precision"] == "bf16"


def test_a_reference_of_too_few_images_is_refused(tmp_path) -> None:
    tiny = Held(pixels(4, 0), pixels(3, 1))
    with pytest.raises(ValueError, match=r"reference=held/train: 4 images .* 6"):
        measured(METRICS, Projection(), pixels(50, 2), tiny, tmp_path)


def test_too_few_samples_and_real_images_are_named_together_with_a_way_that_works(tmp_path) -> None:
    tiny, samples = Held(pixels(4, 0), pixels(3, 1)), pixels(5, 2)
    with pytest.raises(UsageError) as refused:
        measured(METRICS, Projection(), samples, tiny, tmp_path)
    few, small = refused.value.lines
    assert few.startswith("num_samples=5: 5 images are fewer than the 6 ")
    assert small.startswith("reference=held/train: 4 images are fewer than the 6 ")
    assert "metric=kid metric.kid.subset_size=2 instead of fid, or set force=true" in small
    with pytest.raises(
        UsageError, match="must be at least 2 and at most 4, the number of images of held/train; use 2"
    ):
        measured({"kid": KernelDistance(subset_size=5)}, Projection(), samples, tiny, tmp_path)
    report = measured({"kid": KernelDistance(subset_size=2)}, Projection(), samples, tiny, tmp_path)
    assert "standard_error" in report.results[0].details


def test_without_validation_images_there_is_no_floor_and_a_note(tmp_path) -> None:
    alone = Held(pixels(50, 0), pixels(0, 1))
    report = measured(METRICS, Projection(), pixels(50, 2), alone, tmp_path)
    assert report.results[0].details == {}
    assert any("no reference distance" in note for note in report.notes)


def test_samples_of_another_shape_or_kind_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"dataset=held: .*\(1, 8, 8\).*\(3, 8, 8\)"):
        measured(METRICS, Projection(), pixels(50, 2).expand(-1, 3, -1, -1), DATA, tmp_path)
    with pytest.raises(ValueError, match="uint8"):
        measured(METRICS, Projection(), pixels(50, 2).float(), DATA, tmp_path)
