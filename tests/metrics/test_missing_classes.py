"""Metrics and the feature classifier for images of which some have no class."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffusion_cli.data import Batch
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.metrics import ClassifierScore, FeatureBatch, LPIPSDistance
from diffusion_cli.metrics.base import SampleBatch
from diffusion_cli.metrics.clip_score import CLIPScoreState, prompts_of_classes
from diffusion_cli.metrics.features.classifier_training import Recipe, accuracy, class_loss
from diffusion_cli.metrics.lpips import DiversityState
from helpers.metrics import CPU, Held, Projection, measured, pixels

RECIPE = Recipe(
    dim=8, width=4, classes=3, steps=3, batch_size=6, learning_rate=0.01, shift=1, seed=0, flip=False
)


def batch(labels: Tensor) -> Batch:
    return Batch(0, torch.zeros(len(labels), 1, 8, 8), None, torch.arange(len(labels)), labels)


def test_the_loss_is_a_mean_over_images_with_a_class():
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, -1, 2, 1, -1, 1])
    there = labels >= 0
    torch.testing.assert_close(
        class_loss(outputs, batch(labels)), cross_entropy(outputs[there], labels[there])
    )
    whole = torch.tensor([0, 1, 2, 1, 0, 1])
    assert torch.equal(class_loss(outputs, batch(whole)), cross_entropy(outputs, whole))
    class_loss(outputs, batch(torch.full((6,), -1))).backward()
    assert outputs.grad is not None
    assert torch.equal(outputs.grad, torch.zeros_like(outputs))


def test_the_accuracy_is_that_of_images_with_a_class():
    images = pixels(12, 0)
    labels = torch.arange(12) % 3
    network = RECIPE.train(MemoryImages(images, labels.where(torch.arange(12) % 4 > 0, -1)), CPU)
    there = torch.arange(12) % 4 > 0
    expected = accuracy(network, MemoryImages(images[there], labels[there]), CPU)
    assert accuracy(network, MemoryImages(images, labels.where(there, -1)), CPU) == expected
    assert accuracy(network, MemoryImages(images, torch.full((12,), -1)), CPU) is None


def test_class_accuracy_skips_samples_without_a_class(tmp_path):
    data, images = Held(pixels(20, 0), pixels(10, 1), classes=3), pixels(12, 2)
    logits = Projection().extract(images).logits
    assert logits is not None
    labels = logits.argmax(1)
    labels[:4] = (labels[:4] + 1) % 3
    labels[[1, 2, 5]] = -1
    report = measured({"classifier": ClassifierScore()}, Projection(), images, data, tmp_path, labels)
    (found,) = [result for result in report.results if result.name == "class_accuracy"]
    assert found.value == 7 / 9
    assert found.details["labelled"] == 9


class Difference(LPIPSDistance):
    """The mean difference of images, in the place of LPIPS."""

    def __init__(self) -> None:
        pass

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return (first.float() - second.float()).abs().flatten(1).mean(1)


def test_pairs_of_one_class_have_no_samples_without_a_class():
    state = DiversityState(Difference())
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    labels = torch.tensor([-1, 0, -1, 0, 1, 1])
    state.update(SampleBatch(images, labels, FeatureBatch(torch.empty(0), None)))
    assert torch.cat(state.values).tolist() == [2, 1]


def test_prompts_are_those_of_samples_with_a_class():
    state = CLIPScoreState(partial(prompts_of_classes, torch.eye(2)), {})
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, -1, 1])
    state.update(SampleBatch(torch.empty(3, 1, 1, 1), labels, FeatureBatch(features, None)))
    (found,) = state.compute()
    assert (found.value, found.details["images"]) == (100, 2)
