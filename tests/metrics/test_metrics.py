"""Metrics: reference numbers, closed forms, one streaming pass, caches, and what is refused."""

import errno
import hashlib
import json
import urllib.error
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from diffusion_cli.config import CONF
from diffusion_cli.data import Dataset, Digits, ExternalImages, Images, NoDataset, spread
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import (
    ClassifierFeatures,
    ClassifierScore,
    DatasetReference,
    DensityCoverage,
    FeatureBatch,
    FeatureExtractors,
    Features,
    FeatureView,
    FrechetDistance,
    GivenSamples,
    GrowingRows,
    InceptionFeatures,
    InceptionScore,
    KernelDistance,
    Memorization,
    Moments,
    PrecisionRecall,
    RealImages,
    Report,
    Result,
    Rows,
    SampleBatch,
    append_history,
    auto_features,
    evaluate,
    frechet_distance,
    gaussian_mmd,
    history_table,
    inception_score,
    polynomial_mmd,
    read_history,
    unlike,
)
from diffusion_cli.metrics.features import shipped
from diffusion_cli.metrics.features.classifier_training import FeatureClassifier, Recipe, accuracy
from diffusion_cli.metrics.features.inception import prepared, resized
from diffusion_cli.metrics.neighbours import nearest, within
from diffusion_cli.runs.weights import digest
from diffusion_cli.system.files import writing

CPU = torch.device("cpu")


def option(name: str) -> dict:
    node = yaml.safe_load((CONF / "features" / f"{name}.yaml").read_text())
    return {key: value for key, value in node.items() if key != "_target_"}


QUICK = option("classifier") | {"steps": 20, "width": 8}


class Held(Dataset):
    """Two splits given as tensors."""

    def __init__(self, train: Tensor, val: Tensor, classes: int | None = None) -> None:
        super().__init__("")
        self.name, self.flip = "held", False
        self.shape = (train.shape[1], train.shape[2], train.shape[3])
        self.class_names = None if classes is None else tuple(map(str, range(classes)))
        self.splits = {"train": train, "val": val}

    def load(self, split) -> Images:
        pixels = self.splits[split]
        labels = None if self.num_classes is None else torch.arange(len(pixels)) % self.num_classes
        return MemoryImages(pixels, labels)


class Projection(Features):
    """A fixed linear map of pixels; it remembers how many images it was shown."""

    name, resize, note, device = "projection", "none", "", CPU
    dim, classes = 5, 3
    digest = "0" * 64

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(64, self.dim + self.classes, generator=generator) / 64
        self.seen = 0

    def extract(self, images: Tensor) -> FeatureBatch:
        self.seen += len(images)
        values = images.flatten(1).float() @ self.matrix
        return FeatureBatch(values[:, : self.dim], values[:, self.dim :])


def pixels(count: int, seed: int, high: int = 256) -> Tensor:
    return torch.randint(
        high, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def number(value: float | None) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def moments_of(features: Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


def distance(first: Tensor, second: Tensor) -> float:
    a, b = moments_of(first), moments_of(second)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def covariance(dim: int, seed: int) -> Tensor:
    root = torch.randn(dim, 2 * dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / dim


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(
        torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]


# --- The Frechet distance ------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64])
def test_frechet_distance_of_full_rank_equals_the_reference(reference, agree, dim) -> None:
    arrays = reference("metrics")
    value = number(distance(arrays[f"fake_d{dim}"], arrays[f"real_d{dim}"]))
    agree(f"metrics/fid_d{dim}_exact", value, arrays[f"fid_d{dim}_exact"], 1e-9, relative=True)
    assert arrays[f"fid_d{dim}"].numpy() == pytest.approx(
        float(value), rel=1e-9
    )  # six published implementations


@pytest.mark.parametrize(("case", "count"), [("both", 20), ("n2", 2)])
def test_frechet_distance_of_too_few_samples_is_exact(reference, case, count) -> None:
    arrays = reference("metrics")
    fake, real = arrays["fake_d64_first20"][:count], arrays["real_d64_first20"][:count]
    assert distance(fake, real) == pytest.approx(float(arrays[f"fid_degenerate_{case}_exact"]), rel=1e-11)


def test_frechet_distance_to_itself_is_zero_and_never_negative(reference) -> None:
    arrays = reference("metrics")
    for name in ("real_d16", "real_d64_first20"):  # the second has no full rank
        assert 0 <= distance(arrays[name], arrays[name]) < 1e-11


def test_frechet_distance_of_diagonal_gaussians(reference) -> None:
    mu1, mu2, var1, var2 = reference("metrics")["fid_analytic_inputs"]
    value = frechet_distance(mu1, var1.diag(), mu2, var2.diag())
    assert value == pytest.approx(float(reference("metrics")["fid_analytic"]), rel=1e-13)


def test_frechet_distance_of_commuting_covariances() -> None:
    """In a common basis the distance is |mu1 - mu2|^2 + sum (sqrt(l1) - sqrt(l2))^2."""
    dim, basis = 12, rotation(12)
    first, second = torch.rand(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    second[:3] = 0  # a singular covariance
    mu = torch.linspace(-1, 2, dim, dtype=torch.float64)
    expected = mu.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    sigmas = [basis @ values.diag() @ basis.T for values in (first, second)]
    value = frechet_distance(mu, sigmas[0], torch.zeros_like(mu), sigmas[1])
    assert value == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_is_symmetric_and_blind_to_a_common_rotation() -> None:
    dim, basis = 10, rotation(10)
    mu1, mu2 = torch.randn(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigma1, sigma2 = covariance(dim, 4), covariance(dim, 5)
    value = frechet_distance(mu1, sigma1, mu2, sigma2)
    rotated = frechet_distance(basis @ mu1, basis @ sigma1 @ basis.T, basis @ mu2, basis @ sigma2 @ basis.T)
    assert value > 1
    assert rotated == pytest.approx(value, rel=1e-12)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(value, rel=1e-12)


# --- Moments ------------------------------------------------------------


def test_moments_taken_in_pieces_equal_those_of_the_whole() -> None:
    values = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)) + 1e3
    streamed = Moments(6)
    for part in values.split([1, 299, 0, 699, 1]):
        streamed.update(part)
    whole = values.double().numpy()
    assert streamed.n == 1000
    assert streamed.mean.numpy() == pytest.approx(whole.mean(0), rel=1e-14)
    assert streamed.covariance.numpy() == pytest.approx(np.cov(whole, rowvar=False), rel=1e-10, abs=1e-12)


def test_merging_moments_is_associative_and_blind_to_order() -> None:
    parts = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).split([10, 20, 30])

    def merged(order: list[int]) -> Moments:
        total = Moments(4)
        for index in order:
            total.merge(moments_of(parts[index]))
        return total

    pair = moments_of(parts[1])
    pair.merge(moments_of(parts[2]))
    nested = moments_of(parts[0])
    nested.merge(pair)
    for other in (merged([0, 1, 2]), merged([2, 0, 1])):
        assert other.n == nested.n == 60
        assert torch.allclose(other.mean, nested.mean, rtol=0, atol=1e-14)
        assert torch.allclose(other.covariance, nested.covariance, rtol=0, atol=1e-14)


def test_saved_moments_come_back_and_go_on(tmp_path) -> None:
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    moments_of(values[:30]).save(tmp_path / "m.npz")
    loaded = Moments.load(tmp_path / "m.npz", 3)
    loaded.update(values[30:])
    assert torch.allclose(loaded.covariance, moments_of(values).covariance, rtol=1e-12)
    with pytest.raises(ValueError, match="4 features"):
        Moments.load(tmp_path / "m.npz", 4)


# --- The Inception score ------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b"])
def test_inception_score_equals_the_reference(reference, agree, case) -> None:
    arrays = reference("metrics")
    logits = arrays[f"is_logits_{case}"]
    found = torch.tensor(inception_score(logits, 10), dtype=torch.float64)
    agree(
        f"metrics/is_{case}_splits10_shuffle1",
        found,
        arrays[f"is_{case}_splits10_shuffle1"],
        1e-12,
        relative=True,
    )
    assert inception_score(logits, 1) == pytest.approx((float(arrays[f"is_{case}_one"]), 0), rel=1e-12)


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(20, 7), 4) == pytest.approx((1, 0), abs=1e-12)
    sure = 1e4 * torch.eye(7).repeat(5, 1)  # so sure that other probabilities are zero in float64
    assert inception_score(sure, 1)[0] == pytest.approx(7, rel=1e-12)
    assert inception_score(sure[:1].repeat(9, 1), 3) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_refuses_more_splits_than_samples() -> None:
    with pytest.raises(ValueError, match=r"splits=10: exceeds the 9 samples"):
        inception_score(torch.zeros(9, 3), 10)


# --- Evaluation ------------------------------------------------------------


METRICS = {
    "fid": FrechetDistance(reference_distance=True, infinity=0, bootstrap=0),
    "is": InceptionScore(splits=4),
}
DATA = Held(pixels(200, 0), pixels(40, 1, high=200))


class Through(FeatureExtractors):
    """Networks with a given one as the chosen one."""

    def __init__(self, features: Features, dataset: Dataset, cache_dir: Path) -> None:
        super().__init__({}, dataset, cache_dir, CPU)
        self.chosen = features

    def classifier(self) -> Features:
        return self.chosen


def measured(
    metrics,
    features: Features,
    images: Tensor,
    dataset: Dataset,
    cache_dir: Path,
    labels: Tensor | None = None,
    split: Literal["train", "val"] = "train",
    stats: str | None = None,
    batch_size: int = 33,
    made: dict | None = None,
    **settings,
) -> Report:
    """What an evaluation of images finds."""
    given = ExternalImages(MemoryImages(images, labels), dataset.class_names if labels is not None else None)
    return evaluate(
        metrics,
        Through(features, dataset, cache_dir),
        GivenSamples(given, dataset.class_names, made or {}, "samples"),
        DatasetReference(dataset, split=split, stats=stats),
        batch_size=batch_size,
        **settings,
    ).report


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
        def batch(self, numbers):
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


def real_images(features: Features, cache_dir: Path, dataset: Dataset = DATA) -> RealImages:
    return RealImages(DatasetReference(dataset, split="train", stats=None), features, cache_dir)


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["moments", "features"])
def test_damaged_statistics_are_made_anew_with_one_line(tmp_path, capsys, kind, share) -> None:
    def known() -> Tensor:
        real = real_images(features, tmp_path)
        return real.moments().covariance if kind == "moments" else real.rows()[:]

    features = Projection()
    expected = known()
    (file,) = tmp_path.glob(f"{kind}-*.np[yz]") if kind == "moments" else tmp_path.glob("features-*.npy")
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)
    again = known()
    assert capsys.readouterr().err.startswith(f"diffuse: {file}: is damaged (")
    assert torch.equal(again, expected)
    seen = features.seen
    known()
    assert features.seen == seen


def test_features_of_an_earlier_version_are_used_and_checked_from_then_on(tmp_path, capsys) -> None:
    features = Projection()
    expected = real_images(features, tmp_path).rows()[:]
    (sums,) = tmp_path.glob("*.crc32")
    sums.unlink()
    assert torch.equal(real_images(features, tmp_path).rows()[:], expected)
    assert (features.seen, capsys.readouterr().err) == (200, "")
    content = bytearray((file := next(tmp_path.glob("features-*.npy"))).read_bytes())
    content[-2] ^= 64
    file.write_bytes(content)
    assert torch.equal(real_images(features, tmp_path).rows()[:], expected)
    assert "differs from its checksum" in capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_cache_changes_no_number_and_stops_nothing(tmp_path, capsys, monkeypatch, room) -> None:
    samples = pixels(50, 2)
    metrics = {"fid": METRICS["fid"], "kid": KernelDistance(subsets=3, subset_size=20, seed=0)}
    wanted = measured(metrics, Projection(), samples, DATA, tmp_path / "room")
    left = room

    class Disk(FileIO):
        def __init__(self, **_) -> None:
            super().__init__(tmp_path / "file", "w+")

        def write(self, data) -> int:
            nonlocal left
            taken = min(left, len(data))
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= taken
            return super().write(data[:taken])

    monkeypatch.setattr("diffusion_cli.metrics.rows.tempfile.TemporaryFile", Disk)
    monkeypatch.setattr("diffusion_cli.system.cache.atomic_write", refused)
    monkeypatch.setattr("diffusion_cli.metrics.rows.atomic_write", refused)
    monkeypatch.setattr("diffusion_cli.metrics.moments.atomic_write", refused)
    found = measured(metrics, Projection(), samples, DATA, tmp_path / "cache")
    assert found.results == wanted.results
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("diffuse: ") and "No space left on device" in line for line in lines)


@contextmanager
def refused(path: Path) -> Iterator[Path]:
    with writing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    yield path


def test_features_of_an_earlier_version_are_found_by_their_content(tmp_path) -> None:
    reference, again = DatasetReference(DATA, split="val", stats=None), Projection()
    RealImages(reference, Projection(), tmp_path).moments()
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / file.name.replace("-val-", "-held_out-"))
    assert "-held_out-" in next(tmp_path.iterdir()).name
    RealImages(reference, again, tmp_path).moments()
    assert again.seen == 0


def test_statistics_are_kept_apart_by_images_weights_and_precision(tmp_path) -> None:
    features = Projection()
    real_images(features, tmp_path).moments()
    real_images(features, tmp_path, Held(pixels(200, 7), pixels(40, 1))).moments()
    assert features.seen == 400
    real_images(features, tmp_path, Held(pixels(200, 7), pixels(40, 1), classes=2)).moments()
    assert features.seen == 400  # labels are not looked at
    features.digest = "1" * 64
    real_images(features, tmp_path).moments()
    assert features.seen == 600
    features.precision = "bf16"
    real_images(features, tmp_path).moments()
    assert features.seen == 800


def test_rows_come_back_in_the_order_they_were_taken_in(tmp_path) -> None:
    values = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0))
    rows = GrowingRows(3, tmp_path)
    for part in values.split([1, 4999, 4000]):
        rows.append(part.double())
    assert list(tmp_path.iterdir()) == []  # the file has no name, and goes with the object
    order = np.random.RandomState(0).permutation(9000)
    assert torch.equal(torch.cat(list(rows.blocks())), values)
    assert torch.equal(torch.cat(list(rows.blocks(order))), values[order])
    rows.save(tmp_path / "rows.npy")
    assert torch.equal(Rows(np.load(tmp_path / "rows.npy", mmap_mode="r"))[:], values)


# --- Kernel distances ------------------------------------------------------------


def array_rows(features: Tensor) -> Rows:
    return Rows(features.float().numpy())


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize(
    ("name", "subsets", "size", "seed"), [("s20x100_seed2020", 20, 100, 2020), ("s10x250_seed7", 10, 250, 7)]
)
def test_kernel_distance_equals_the_reference(
    reference, agree, tmp_path, dim, name, subsets, size, seed
) -> None:
    arrays = reference("metrics")
    seen = AsSeen(arrays[f"fake_d{dim}"], arrays[f"real_d{dim}"])
    (found,) = KernelDistance(subsets=subsets, subset_size=size, seed=seed).init_state(seen).compute()
    mean, std = arrays[f"kid_d{dim}_{name}"]
    agree(f"metrics/kid_d{dim}_{name}", number(found.value), mean, 1e-12)
    agree(f"metrics/kid_d{dim}_{name}_std", number(found.details["std"]), std, 1e-12)


@pytest.mark.parametrize("dim", [16, 64])
def test_polynomial_mmd_of_whole_sets_equals_the_reference(reference, agree, dim) -> None:
    arrays = reference("metrics")
    fake, real = arrays[f"fake_d{dim}"], arrays[f"real_d{dim}"]
    for name, x in (("kid_full", real), ("kid_equal", real[:400])):
        agree(f"metrics/{name}_d{dim}", number(polynomial_mmd(fake, x)), arrays[f"{name}_d{dim}"], 1e-12)


def test_the_standard_error_of_the_kernel_distance_is_its_spread() -> None:
    """Over independent sets: the error given for one of them is the deviation of the estimates."""
    values, errors = [], []
    for seed in range(100):
        x = torch.randn(2, 80, 4, generator=torch.Generator().manual_seed(seed)).double()
        (found,) = (
            KernelDistance(subsets=20, subset_size=40, seed=seed)
            .init_state(AsSeen(x[0], 1.3 * x[1] + 0.5))
            .compute()
        )
        values.append(found.value)
        errors.append(found.details["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_gaussian_mmd_is_that_of_its_definition_and_zero_for_equal_sets() -> None:
    x, y = (torch.randn(30, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def k(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(-(p - b).double().square().sum(1) / (2 * 1.5**2)).exp() for p in a]).mean()

    expected = float(k(x, x) + k(y, y) - 2 * k(x, y))
    assert gaussian_mmd(array_rows(x), array_rows(y), 1.5, CPU) == pytest.approx(expected, rel=1e-6)
    assert gaussian_mmd(array_rows(x), array_rows(x), 1.5, CPU) == pytest.approx(0, abs=1e-14)


# --- Neighbours ------------------------------------------------------------


class AsSeen(FeatureView):
    """Features of samples and of real images that are there already."""

    def __init__(self, samples: Tensor, real: Tensor, other: Tensor | None = None) -> None:
        self.network = Projection()
        self.network.dim = samples.shape[1]
        self._samples = array_rows(samples)
        given = ExternalImages(
            MemoryImages(torch.empty(len(samples), 1, 1, 1, dtype=torch.uint8), None), None
        )
        self.samples = GivenSamples(given, None, {}, "samples")
        self.real = RealRows(real, other)

    def rows(self) -> Rows:
        return self._samples


class RealRows(RealImages):
    def __init__(self, real: Tensor, other: Tensor | None) -> None:
        self._parts = {"images": real, "other": other}
        self.reference = DatasetReference(
            Held(pixels(9, 0), pixels(9 if other is not None else 0, 1)), split="train", stats=None
        )

    def rows(self, part="images") -> Rows:
        return array_rows(self._parts[part])

    def moments(self, part="images", count=None, stream="features") -> Moments:
        return moments_of(self._parts[part][:count])


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


# --- Extrapolation and intervals ------------------------------------------------------------


def test_the_distance_at_infinity_comes_nearer_to_that_of_the_distributions() -> None:
    """Of N(0, I) and N(m, I) in 20 dimensions it is |m|^2; with 400 samples it is more."""
    metric = FrechetDistance(reference_distance=False, infinity=15, bootstrap=0)
    finite, infinite = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        real, fake = (
            torch.randn(200000, 20, generator=generator),
            torch.randn(400, 20, generator=generator) + 0.1,
        )
        measurement = metric.init_state(AsSeen(fake, real))
        measurement.update(SampleBatch(pixels(400, 0), None, FeatureBatch(fake, None)))
        (found,) = measurement.compute()
        assert found.value is not None
        finite.append(found.value)
        infinite.append(found.details["at_infinity"])
    assert np.mean(finite) > 0.4
    assert np.mean(infinite) == pytest.approx(0.2, abs=0.06)


def test_the_interval_holds_the_expected_distance_nearly_always() -> None:
    metric = FrechetDistance(reference_distance=False, infinity=0, bootstrap=60)
    real = torch.randn(50000, 4, generator=torch.Generator().manual_seed(99))
    found = []
    for seed in range(40):
        fake = 1.2 * torch.randn(150, 4, generator=torch.Generator().manual_seed(seed)) + 0.3
        measurement = metric.init_state(AsSeen(fake, real))
        measurement.update(SampleBatch(pixels(150, 0), None, FeatureBatch(fake, None)))
        found += measurement.compute()
    expected = np.mean([finding.value for finding in found])
    inside = [finding.details["low"] < expected < finding.details["high"] for finding in found]
    assert 0.8 <= np.mean(inside) <= 1
    errors = [finding.details["standard_error"] for finding in found]
    assert np.mean(errors) == pytest.approx(np.std([finding.value for finding in found]), rel=0.3)


@pytest.mark.parametrize(("key", "value"), [("infinity", 2), ("bootstrap", 5)])
def test_too_few_points_or_resamples_are_refused(key, value) -> None:
    with pytest.raises(ValueError, match=rf"metric.fid.{key}={value}: is too small"):
        FrechetDistance(**{"reference_distance": False, "infinity": 0, "bootstrap": 0, key: value})


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
    picture = evaluation.pictures["memorization"]
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


# --- The classifier ------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits("", val_fraction=0.2, flip=False)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> tuple[ClassifierFeatures, Path]:
    cache_dir = tmp_path_factory.mktemp("cache")
    return ClassifierFeatures(digits, cache_dir, CPU, **option("classifier")).prepare(), cache_dir


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


# --- Inception ------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """The path where the weights would lie, on a machine without them and without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def test_without_weights_and_network_the_error_says_what_to_put_where(offline) -> None:
    with pytest.raises(UsageError) as caught:
        InceptionFeatures(DATA, Path(), CPU, weights=None, resize="tensorflow", precision="fp32")
    message = str(caught.value)
    for part in ("no network", offline.name, str(offline), "github.com/toshas/torch-fidelity/releases"):
        assert part in message
    assert "\n" not in message


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_weights_file_runs_no_code(tmp_path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "mark"
    torch.save({"fc.weight": Malicious(mark)}, path)
    with pytest.raises(ValueError, match=r"features.weights=.*weights.pth: does not have the weights"):
        inception(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the danger was real
    assert mark.exists()


def png_folder(folder: Path, images: Tensor) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return str(folder)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory) -> Path:
    """A file of random weights, as the published ones cannot be had here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Theirs

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(Theirs, "load_state_dict", lambda self, state: None)
        network = Theirs("random", ["2048"], str(folder / "empty.pth"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, torch.nn.BatchNorm2d):
                for name in ("weight", "running_var"):
                    module.state_dict()[name].uniform_(0.7, 1.3)
    network.fc.weight.mul_(100)  # for a score that is not all but 1
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


def inception(weights: Path, precision: Literal["fp32", "bf16"] = "fp32") -> InceptionFeatures:
    return InceptionFeatures(
        DATA, Path(), CPU, weights=str(weights), resize="tensorflow", precision=precision
    )


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (7, 13), (299, 299), (400, 301)])
def test_images_are_resized_bit_for_bit_as_torch_fidelity_does(size) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(resized(images, 299), theirs)


@pytest.mark.parametrize("size", [32, 400])
def test_images_are_prepared_as_clean_fid_and_pytorch_fid_do(size) -> None:
    images = torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    pillow = torch.tensor(
        np.array([[np.asarray(Image.fromarray(plane.float().numpy()).resize((299, 299), Image.Resampling.BICUBIC))
                   for plane in image] for image in images])
    )  # fmt: skip
    assert (prepared(images, "clean") - (pillow.clamp(0, 255) - 128) / 128).abs().max() < 1e-4
    scaled = torch.nn.functional.interpolate(images / 255, (299, 299), mode="bilinear") * 2 - 1
    assert torch.equal(prepared(images, "pytorch"), scaled)


@pytest.mark.slow
def test_inception_features_equal_those_of_torch_fidelity(random_inception) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Theirs

    images = pixels(6, 0).view(2, 3, 8, 8)
    theirs = Theirs("random", ["2048", "logits_unbiased"], str(random_inception))
    maps = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: maps.update(mixed_6_conv=out))
    features, logits = theirs(images)
    expected = (features, logits, maps["mixed_6_conv"][:, :7].permute(0, 2, 3, 1).flatten(1))
    exact = inception(random_inception)(images)
    rough = inception(random_inception, "bf16")(images)
    for ours, rounded, reference in zip(exact, rough, expected, strict=True):
        assert ours is not None
        assert rounded is not None
        assert ours.dtype == rounded.dtype == torch.float32
        assert (ours - reference).norm() / reference.norm() < 5e-6
        assert 1e-4 < (rounded - reference).norm() / reference.norm() < 3e-2


@pytest.mark.slow
def test_inception_numbers_equal_those_of_torch_fidelity(tmp_path, random_inception) -> None:
    import torch_fidelity

    weights = random_inception
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (16, 3, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (16, 3, 16, 16), generator=generator)
    samples, real = (colours + noise).clamp(0, 255).to(torch.uint8).split(8)
    features = inception(weights)
    metrics = {
        "fid": FrechetDistance(reference_distance=True, infinity=0, bootstrap=0),
        "is": InceptionScore(splits=3),
    }
    report = measured(metrics, features, samples, Held(real, real), tmp_path, batch_size=5, force=True)
    theirs = torch_fidelity.calculate_metrics(
        input1=png_folder(tmp_path / "samples", samples),
        input2=png_folder(tmp_path / "real", real),
        fid=True,
        isc=True,
        isc_splits=3,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(weights),
    )
    assert theirs["inception_score_mean"] > 1.1
    ours = {result.name: result.value for result in report.results}
    # With fewer samples than features, torch-fidelity takes square roots of rounding errors; ours is exact.
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    first, second = (features(images).features.double() for images in (samples, real))
    cross = (first - first.mean(0)) @ (second - second.mean(0)).T / 7
    shift = (first.mean(0) - second.mean(0)).square().sum()
    exact = shift + first.var(0).sum() + second.var(0).sum() - 2 * torch.linalg.svdvals(cross).sum()
    assert ours["fid"] == pytest.approx(float(exact), rel=1e-7)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert report.results[1].details["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-4)

    gray = samples[:2, :1]
    assert torch.equal(features(gray).features, features(gray.repeat(1, 3, 1, 1)).features)


# --- The record ------------------------------------------------------------


def test_history_grows_and_is_never_clobbered(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    first, second, third = (Report([Result("fid", value, {}, {})], []).to_dict() for value in (1.5, 2.5, 3.5))
    append_history(path, first)
    append_history(path, second)
    assert read_history(path) == [first, second]
    for content in ("[{", '{"value": 1}', "[1]", "[{}]", '[{"results": [{"name": "x"}], "notes": []}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"metrics.json: is not"):
            append_history(path, third)
        assert path.read_text() == content
    path.unlink()
    with pytest.raises(ValueError, match="JSON"):
        append_history(path, {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_entries_added_at_the_same_time_are_all_kept(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    entries = [Report([Result("fid", float(value), {}, {})], []).to_dict() for value in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: append_history(path, entry), entries))
    assert sorted(entry["results"][0]["value"] for entry in read_history(path)) == list(range(60))


def test_samples_of_other_classes_or_weights_are_unlike() -> None:
    """Where both are known; another sampler is what one compares."""
    about = {"weights": "ema", "labels": [0, 1], "steps": 5, "precision": "fp32", "clip_x0": True}
    for change, expected in (
        ({"weights": "raw"}, ["sampling.weights"]),
        ({"labels": [3]}, ["sampling.labels"]),
        ({"labels": None, "steps": 9}, []),
        ({"label_shares": [19, 1]}, ["sampling.label_shares"]),
        ({"label_shares": [19, 1], "labels": None}, []),
        ({"precision": "bf16"}, ["sampling.precision"]),
        ({"clip_x0": False}, ["sampling.clip_x0"]),
        ({"precision": None, "clip_x0": None}, []),
    ):
        assert unlike({"sampling": about}, {"sampling": about | change}) == expected


def history_of(value: float, sampling: dict | None, **protocol) -> list[dict]:
    made = {} if sampling is None else {"sampling": sampling}
    return [Report([Result("fid", value, {}, {"samples": 9, **made, **protocol})], []).to_dict()]


DDIM = {
    "sampler": {"_target_": "diffusion_cli.samplers.DDIM", "eta": 0.0},
    "steps": 50,
    "precision": "fp32",
    "run": "a",
}
UNIPC = DDIM | {"sampler": {"_target_": "diffusion_cli.samplers.UniPC", "order": 3}, "run": "b"}


def test_a_table_marks_every_difference_of_sampling() -> None:
    rows = history_table({"a": history_of(1, DDIM), "b": history_of(2, UNIPC)}, force=False).splitlines()
    assert rows == ["| run | sampler | fid |", "|---|---|---|", "| a | DDIM | 1 |", "| b | UniPC | 2 |"]
    noisy = DDIM | {"sampler": DDIM["sampler"] | {"eta": 1.0}, "steps": 20, "lossy": {"JPEG": 9}}
    rows = history_table({"a": history_of(1, DDIM), "b": history_of(2, noisy)}, force=False).splitlines()
    assert rows[0] == "| run | sampler.eta | steps | lossy.JPEG | fid |"
    assert rows[3] == "| b | 1.0 | 20 | 9 | 2 |"
    assert rows[2] == "| a | 0.0 | 50 | none | 1 |"


def test_a_table_refuses_another_precision_or_clipping_unless_forced() -> None:
    for key, value in (("precision", "bf16"), ("clip_x0", False)):
        both = {
            "a": history_of(1, DDIM | {"clip_x0": True}),
            "b": history_of(2, DDIM | {"clip_x0": True, key: value}),
        }
        with pytest.raises(ValueError, match=rf"fid of a and b: sampling\.{key}\).*set force=true"):
            history_table(both, force=False)
        rows = history_table(both, force=True).splitlines()
        assert rows[0] == f"| run | {key} | fid |"
        assert rows[3].endswith("| 2* |")


def test_a_table_marks_only_what_differs_for_one_name_and_reads_old_protocols() -> None:
    other = Report([Result("bound", 3, {}, {"model": {"weights": "ema", "precision": "fp32"}})], []).to_dict()
    quick = DDIM | {"precision": "bf16"}
    rows = history_table(
        {"a": [*history_of(1, quick), other], "b": history_of(2, quick)}, force=False
    ).splitlines()
    assert rows[0] == "| run | fid | bound |"
    old = history_table(
        {"a": history_of(1, {"steps": 50}), "b": history_of(2, DDIM), "c": history_of(3, None)}, False
    )
    assert old.splitlines()[0] == "| run | fid |"
    models = [history_of(1, None, model={"weights": weights}) for weights in ("ema", "raw")]
    with pytest.raises(ValueError, match=r"model\.weights"):
        history_table({"a": models[0], "b": models[1]}, force=False)


def test_protocols_are_unlike_by_how_they_measure_not_by_what(tmp_path) -> None:
    protocols = []
    for count, steps, splits in ((100, 10, 4), (100, 20, 4), (90, 10, 5)):
        metrics = {"is": InceptionScore(splits=splits)}
        report = measured(metrics, Projection(), pixels(count, 2), DATA, tmp_path, made={"steps": steps})
        protocols.append(report.results[0].protocol)
    assert unlike(protocols[0], protocols[1]) == []
    assert unlike(protocols[0], protocols[2]) == ["samples", "splits"]
    assert unlike({"split": "val", "model": {"step": 1}}, {"split": "train", "model": {"step": 2}}) == [
        "split"
    ]
