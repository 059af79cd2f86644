"""Checks of parts of plugins before they are used: what they lack is one line, not wrong numbers."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_cli.config import is_allowed
from diffusion_cli.config.values import Node
from diffusion_cli.data import Dataset, Images
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.guidance import Guidance
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Shape

ATTRIBUTES = ("name", "shape", "class_names", "flip")
LOOKED_AT = 16
"""Images of each split that are looked at."""
FORMER = ("label_dropout", "labelled")
"""Names of the arguments of `Guidance.check` in earlier versions, where one number and one truth value came."""
LARGEST = 10.0
"""Largest absolute value of real-valued images, which should be in about [-1, 1]."""


def check_attributes(node: Node, dataset: Dataset) -> None:
    """Raise UsageError if a dataset of a plugin lacks an attribute that training reads."""
    if is_allowed(node["_target_"]):
        lacking = [name for name in ATTRIBUTES if not hasattr(dataset, name)]
        if lacking:
            raise _wrong("dataset", node, f"lacks {' and '.join(lacking)}", "set them as in Dataset")


def check_images(node: Node, dataset: Dataset, splits: Sequence[Images]) -> None:
    """Raise UsageError if the images or labels of a dataset of a plugin are not what its attributes say."""
    if not is_allowed(node["_target_"]):
        return
    for images in splits:
        if not isinstance(images, Images):
            problem = f"load returns {type(images).__name__}, not Images"
            raise _wrong("dataset", node, problem, "return MemoryImages(pixels, labels)")
        if not len(images):
            continue
        pixels = images[torch.arange(min(len(images), LOOKED_AT), device=images.device)]
        if pixels.dtype not in (torch.uint8, torch.float32):
            kind = str(pixels.dtype).removeprefix("torch.")
            raise _wrong("dataset", node, f"images are {kind}", "return uint8, or float32 in [-1, 1]")
        if tuple(pixels.shape[1:]) != tuple(dataset.shape):
            problem = f"images have the shape {list(pixels.shape[1:])}, not shape={list(dataset.shape)}"
            raise _wrong("dataset", node, problem, "correct shape, [C, H, W]")
        if pixels.dtype == torch.float32 and pixels.abs().max() > LARGEST:
            problem = f"float32 images have values up to {pixels.abs().max().item():.4g}"
            raise _wrong("dataset", node, problem, "scale them to [-1, 1], or return uint8")
        _check_labels(node, dataset, images)


def _check_labels(node: Node, dataset: Dataset, images: Images) -> None:
    labels, classes = images.labels, dataset.num_classes
    if classes is None or labels is None:
        if (classes is None) != (labels is None):
            problem = "has labels but no class_names" if classes is None else "has class_names but no labels"
            raise _wrong("dataset", node, problem, "give both or neither")
        return
    fits = labels.dtype == torch.int64 and tuple(labels.shape) == (len(images),)
    if not fits or not ((labels >= 0) & (labels < classes)).all():
        problem = f"labels are not int64 [{len(images)}] in 0..{classes - 1}"
        raise _wrong("dataset", node, problem, "number the classes from 0, in the order of class_names")


def check_network(node: Node, network: nn.Module, shape: Shape) -> None:
    """Raise UsageError if the output of a denoising network of a plugin has not the shape of its input.

    A network that cannot run on one image on the CPU is not checked. Weights and random numbers stay as they are.
    """
    if not is_allowed(node["_target_"]) or getattr(network, "task", Denoiser.task) != Denoiser.task:
        return
    if not hasattr(network, "num_classes"):
        remedy = "set it to the number of classes that y may have, or to None"
        raise _wrong("model", node, "lacks num_classes", remedy)
    y = None if network.num_classes is None else torch.zeros(1, dtype=torch.int64)
    training = network.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = network.eval()(torch.zeros(1, *shape), torch.ones(1), y)
    except Exception:  # kernels for GPUs only, for example; training shows any other error with its place
        return
    finally:
        network.train(training)
    wanted = {(1, *shape), (1, 2 * shape[0], *shape[1:])}  # the second with the variance head
    if not isinstance(output, Tensor) or tuple(output.shape) not in wanted:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        problem = f"its output for images {[1, *shape]} is {found}"
        raise _wrong("model", node, problem, "return a tensor of the shape of x")


def check_guidance(node: Node, guidance: Guidance) -> None:
    """Raise UsageError if the `check` of a guidance of a plugin has the arguments of earlier versions."""
    former = [name for name in inspect.signature(guidance.check).parameters if name in FORMER]
    if former:
        problem = f"its check takes {' and '.join(former)}, as in earlier versions"
        raise _wrong(
            "guidance", node, problem, "define check(self, denoiser, dropouts, given) as in Guidance"
        )


def _wrong(group: str, node: Node, problem: str, remedy: str) -> UsageError:
    return UsageError(f"{group}._target_", node["_target_"], problem, remedy)
