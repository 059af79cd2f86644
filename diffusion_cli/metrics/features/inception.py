"""The InceptionV3 network of the published FID and Inception scores."""

import hashlib
import io
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusion_cli.data import Dataset
from diffusion_cli.metrics.features.base import FeatureBatch, Features, check_channels
from diffusion_cli.metrics.features.weights import content_of, locate, read, wrong_weights

SIZE = 299
Resize = Literal["tensorflow", "pytorch", "clean"]
RESIZES: dict[Resize, str] = {
    "tensorflow": "bilinear to 299x299, not antialiased, as TensorFlow 1 and torch-fidelity",
    "pytorch": "bilinear to 299x299, not antialiased, pixels centred, as pytorch-fid",
    "clean": "bicubic to 299x299, antialiased, as Pillow and clean-fid",
}


class InceptionFeatures(Features):
    """InceptionV3 of the original FID: torch-fidelity's layers and numbers, rearranged to run faster.

    2048 features; 1008 logits without their bias; and as `spatial` the 2023 numbers of sFID, the first 7
    channels of the 17x17 maps `mixed_6/conv`. `weights` is a file of torch-fidelity's weights; null looks in
    torch's download folder, and fetches them there once. One channel is repeated to three. In `precision`
    fp32 features equal those of torch-fidelity to 1e-6; in bf16 to about 1e-2, and so the protocol says which.
    Distances by another `resize` are other numbers: `pytorch` gives those of pytorch-fid, which scales pixels otherwise
    too, `clean` those of clean-fid.

    Raises UsageError if the file is missing and cannot be fetched, if it contains anything but the weights of this
    network, or if images have neither 1 nor 3 channels.

    Source: Heusel et al. 2017 (FID); Salimans et al. 2016 (Inception score); Nash et al. 2021 (sFID).
    """

    name = "inception"
    dim = 2048
    classes = 1008
    spatial_dim = 7 * 17 * 17
    note = ""

    def __init__(
        self,
        dataset: Dataset,
        cache_dir: Path,
        device: torch.device,
        *,
        weights: str | None = None,
        resize: Resize = "tensorflow",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        check_channels(self.name, dataset)
        path = locate(weights, URL_INCEPTION_V3, "features.weights")
        content = content_of(path, "features.weights")
        self.digest = hashlib.sha256(content).hexdigest()
        self.device, self.precision = device, precision
        self.way: Resize = resize
        self.resize = RESIZES[resize]
        self.chunk = 16 if device.type == "cpu" else 64  # 16 stay in a CPU's caches
        network = fold_batch_norm(load_network(path, content))
        self.head = network.fc.weight.to(device, copy=True)  # stays float32
        # torch-fidelity's blocks, in the order that they are applied in; the last two are the mean and the head.
        *blocks, _, _ = network.children()
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network.to(device, self.dtype, memory_format=torch.channels_last)
        below = blocks.index(network.Mixed_6d)
        self.lower, self.upper = nn.Sequential(*blocks[:below]), nn.Sequential(*blocks[below:])
        self.mixed_6_conv = network.Mixed_6d.branch1x1

    def extract(self, images: Tensor) -> FeatureBatch:
        x = prepared(images, self.way).expand(-1, 3, -1, -1)
        x = self.lower(x.to(self.dtype, memory_format=torch.channels_last))
        spatial = (
            self.mixed_6_conv(x)[:, :7].float().permute(0, 2, 3, 1).flatten(1)
        )  # as published statistics have them
        features = self.upper(x).float().mean(dim=(2, 3))
        return FeatureBatch(features, features @ self.head.T, spatial)


def prepared(images: Tensor, resize: Resize) -> Tensor:
    """uint8 images [B, C, H, W] as the network takes them, float32 [B, C, 299, 299] in about [-1, 1]."""
    x = images.float()
    if resize == "pytorch":
        return F.interpolate(x / 255, (SIZE, SIZE), mode="bilinear", align_corners=False).mul_(2).sub_(1)
    if resize == "clean":
        x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp_(0, 255)
    else:
        x = resized(x, SIZE)
    return x.sub_(128).div_(128)


def resized(images: Tensor, size: int) -> Tensor:
    """Images [B, C, H, W] as [B, C, size, size], bit for bit as TensorFlow 1 and torch-fidelity resize.

    Pixel i of the result is taken at i H / size of the image, between the two pixels there. Rows are put
    together after columns, so that no more than H of them are interpolated.
    """
    columns, rows = images.shape[3], images.shape[2]
    left, right, weight = neighbours(columns, size, images)
    wide = images[..., left]
    wide += (images[..., right] - wide) * weight
    top, bottom, weight = neighbours(rows, size, images)
    tall = wide[:, :, top]
    tall += (wide[:, :, bottom] - tall) * weight[:, None]
    return tall


def neighbours(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and after each of `size` points along `length` pixels, and the weight of the latter."""
    place = torch.arange(size, dtype=like.dtype, device=like.device) * torch.tensor(length / size)
    before = place.long()
    return before, (before + 1).clamp(max=length - 1), place - before


def fold_batch_norm(network: Any) -> Any:
    """The network with each batch norm multiplied into the convolution before it."""
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d

    for block in network.modules():
        if isinstance(block, BasicConv2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.add_module("bn", nn.Identity())
    return network


def load_network(path: Path, content: bytes) -> Any:
    """torch-fidelity's InceptionV3 with the weights that a file holds, read as tensors and nothing else."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles whatever file it is given, so it is given what was just read, written anew.
    trusted = io.BytesIO()
    torch.save(read(content, path, "features.weights"), trusted)
    trusted.seek(0)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=trusted
        )
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise wrong_weights(path, "features.weights", error) from error
