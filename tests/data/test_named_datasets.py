"""Digits, MNIST, CIFAR-10 and the Gaussian mixture."""

import hashlib
import math
import pickle
import socket
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from diffusion_cli.data import CIFAR10, MNIST, Digits, FashionMNIST, GaussianMixture
from diffusion_cli.errors import UsageError
from helpers.data import labels_of

RNG = np.random.default_rng(0)


def test_digits_are_those_of_scikit_learn_split_once():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    dataset = Digits("", val_fraction=0.2, flip=False)
    splits = [dataset.load("train"), dataset.load("val")]
    assert [len(images) for images in splits] == [1438, 359]
    found = sorted(
        (int(label), image.tobytes())
        for images in splits
        for label, image in zip(labels_of(images), images[torch.arange(len(images))].numpy(), strict=True)
    )
    expected = np.rint(255 * values / 16).astype(np.uint8)
    assert found == sorted(
        (int(label), image.tobytes()) for label, image in zip(labels, expected, strict=True)
    )
    # Frozen on purpose: another split would put validation images of older runs into training.
    assert splits[1].digest()[:16] == "83493fb0b8bf54ef"


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST: two zero bytes, type 8 (unsigned byte), rank, the sizes big-endian, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()
    )


@pytest.mark.parametrize(("kind", "name"), [(MNIST, "MNIST"), (FashionMNIST, "FashionMNIST")])
def test_mnist_files_are_read_and_padded(tmp_path, kind, name):
    from torchvision import datasets

    images, labels = {}, {}
    for split, prefix, count in (("train", "train", 5), ("val", "t10k", 3)):
        images[split] = RNG.integers(1, 256, (count, 28, 28), dtype=np.uint8)
        labels[split] = RNG.integers(0, 10, count, dtype=np.uint8)
        write_idx(tmp_path / name / "raw" / f"{prefix}-images-idx3-ubyte", images[split])
        write_idx(tmp_path / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels[split])
    for split in ("train", "val"):
        published = kind(str(tmp_path), size=28, flip=False).load(split)
        np.testing.assert_array_equal(published.pixels[:, 0].numpy(), images[split])
        np.testing.assert_array_equal(published.labels.numpy(), labels[split])
        padded = kind(str(tmp_path), size=32, flip=False)
        np.testing.assert_array_equal(
            padded.load(split).pixels[:, 0].numpy(), np.pad(images[split], ((0, 0), (2, 2), (2, 2)))
        )
        assert padded.shape == (1, 32, 32)
    known = [text.split(" - ")[0] for text in getattr(datasets, name).classes]
    assert list(padded.class_names) == known


def test_cifar10_files_are_read(tmp_path, monkeypatch):
    from torchvision import datasets

    images = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    names = ["train_1", "train_2", "test"]
    entries = {
        name: {"data": images[2 * k : 2 * k + 2].reshape(2, -1), "labels": [k, 9 - k]}
        for k, name in enumerate(names)
    }
    entries["meta"] = {"label_names": list("abcdefghij")}
    sums = {}
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, entry in entries.items():
        data = pickle.dumps(entry)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    # The real loading code, with our files for the published ones.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in names[:2]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": sums["meta"]}
    )
    dataset = CIFAR10(str(tmp_path), flip=True)
    train, val = dataset.load("train"), dataset.load("val")
    np.testing.assert_array_equal(train.pixels.numpy(), images[:4])
    assert labels_of(train).tolist() == [0, 9, 1, 8]
    np.testing.assert_array_equal(val.pixels.numpy(), images[4:])
    assert labels_of(val).tolist() == [2, 7]


@pytest.mark.parametrize(
    ("dataset", "place"),
    [
        (lambda path: MNIST(path, size=32, flip=False), "MNIST/raw"),
        (lambda path: FashionMNIST(path, size=32, flip=False), "FashionMNIST/raw"),
        (lambda path: CIFAR10(path, flip=True), "cifar-10-python.tar.gz"),
    ],
)
def test_without_a_network_one_line_says_what_to_fetch(tmp_path, monkeypatch, dataset, place):
    waits = []

    def offline(*_, **__):
        waits.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    before = socket.getdefaulttimeout()
    with pytest.raises(UsageError, match=r"^data_dir=.*no network.*get .*https?://.*") as caught:
        dataset(str(tmp_path)).load("train")
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(wait is not None for wait in waits)  # a firewall that swallows packets must not hang us
    assert socket.getdefaulttimeout() is before is None


def test_a_damaged_mnist_file_is_no_traceback(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"MNIST/raw/{prefix}-images-idx3-ubyte", np.zeros((5, 28, 28), np.uint8))
        write_idx(tmp_path / f"MNIST/raw/{prefix}-labels-idx1-ubyte", np.zeros(5, np.uint8))
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    for size in (2000, 3, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UsageError, match=r"data_dir=.*cannot read or download mnist"):
            MNIST(str(tmp_path), size=32, flip=False).load("train")


def test_the_density_is_that_of_torch_distributions(mixture):
    x_t = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for alpha, sigma in ((1.0, 0.0), (0.8, 0.6), (0.1, 2.0)):
        stds = (alpha**2 * mixture.stds**2 + sigma**2).sqrt()
        components = Independent(Normal(alpha * mixture.means, stds[:, None].expand(-1, 4)), 1)
        expected = MixtureSameFamily(Categorical(mixture.weights), components).log_prob(x_t.flatten(1))
        assert_close(mixture.log_prob(x_t, alpha, sigma), expected)
        conditional = components.log_prob(x_t.flatten(1)[:, None])
        for label in range(3):
            assert_close(mixture.log_prob(x_t, alpha, sigma, label), conditional[:, label])


def test_the_denoiser_obeys_tweedies_formula(mixture):
    x_t = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for alpha, sigma in ((0.8, 0.6), (0.1, 2.0)):
        for label in (None, 1):
            expected = (x_t + sigma**2 * mixture.score(x_t, alpha, sigma, label)) / alpha
            assert_close(mixture.denoise(x_t, alpha, sigma, label), expected)


def test_every_point_may_have_its_own_noise_level_and_label(mixture):
    x = torch.randn(3, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = torch.linspace(0.1, 1, 15, dtype=torch.float64).reshape(3, 5)
    sigma = (1 - 0.9 * alpha**2).sqrt()
    label = torch.arange(15).reshape(3, 5) % 3
    for method in (mixture.log_prob, mixture.score, mixture.denoise):
        together = method(x, alpha, sigma, label)
        for i in range(3):
            for j in range(5):
                alone = method(x[i, j], alpha[i, j].item(), sigma[i, j].item(), label[i, j].item())
                assert_close(together[i, j], alone)


def test_the_score_is_the_gradient_of_the_density(mixture):
    x = torch.randn(
        20, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    for alpha, sigma in ((1.0, 0.0), (0.8, 0.6), (0.1, 2.0)):
        for label in (None, 2):
            (gradient,) = torch.autograd.grad(mixture.log_prob(x, alpha, sigma, label).sum(), x)
            assert_close(mixture.score(x, alpha, sigma, label), gradient)


def test_density_and_posterior_mean_agree_with_quadrature():
    means, stds, weights = [-0.7, 0.4], [0.2, 0.1], [3.0, 1.0]
    line = GaussianMixture(
        "", means=[[m] for m in means], stds=stds, weights=weights, shape=[1, 1, 1], size=1, seed=0
    )
    prior = MixtureSameFamily(
        Categorical(torch.tensor(weights, dtype=torch.float64)),
        Normal(torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64)),
    )
    x0 = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)
    joint = (prior.log_prob(x0) + Normal(0.7 * x0, 0.5).log_prob(x_t[:, None])).exp()  # [x_t, x0]
    density = torch.trapezoid(joint, x0)
    points = x_t.reshape(-1, 1, 1, 1)
    assert_close(line.log_prob(points, 0.7, 0.5), density.log(), rtol=1e-9, atol=1e-9)
    posterior_mean = torch.trapezoid(joint * x0, x0) / density
    assert_close(line.denoise(points, 0.7, 0.5).flatten(), posterior_mean, rtol=1e-9, atol=1e-9)


def test_drawn_points_have_the_moments_of_the_mixture(mixture):
    size = 40000
    drawn = GaussianMixture(
        "",
        means=mixture.means.tolist(),
        stds=mixture.stds.tolist(),
        weights=mixture.weights.tolist(),
        shape=[1, 2, 2],
        size=size,
        seed=7,
    )
    images, val = drawn.load("train"), drawn.load("val")
    points = images[torch.arange(size)].double().flatten(1)
    scale = drawn.covariance().diagonal().sqrt()
    assert ((points.mean(0) - drawn.mean().flatten()).abs() < 5 * scale / math.sqrt(size)).all()
    error = (points.T.cov() - drawn.covariance()).abs() / (scale[:, None] * scale)
    assert (error < 5 * 2 / math.sqrt(size)).all()
    frequency = labels_of(images).bincount() / size
    assert ((frequency - drawn.weights).abs() < 5 * 0.5 / math.sqrt(size)).all()
    inside = points[images.labels == 1] - drawn.means[1]
    assert_close(inside.std(), drawn.stds[1], rtol=0.05, atol=0)
    assert images.digest() == drawn.load("train").digest()
    assert images.digest() != val.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": [[0.0], [1.0, 2.0]]}, "every mean needs 1"),
        ({"stds": [1.0]}, r"dataset\.stds=\[1\.0\]: must be 2"),
        ({"weights": [1.0, 0.0]}, r"dataset\.weights=.*positive"),
        ({"shape": [1, 1]}, r"dataset\.shape=\[1, 1\]"),
    ],
)
def test_a_mixture_that_does_not_add_up_is_refused(changes, message):
    arguments = {
        "means": [[0.0], [1.0]],
        "stds": [1.0, 1.0],
        "weights": [1.0, 1.0],
        "shape": [1, 1, 1],
        "size": 1,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        GaussianMixture("", **(arguments | changes))
