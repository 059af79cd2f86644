"""The InceptionV3 features of FID and the Inception score."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusion_cli.data import Dataset
from diffusion_cli.metrics.features.base import FeatureBatch, Features, check_channels
from diffusion_cli.metrics.features.weights import content_of, locate, published, read, wrong_weights
from diffusion_cli.system.downloads import WebFile

SIZE = 299
Resize = Literal["tensorflow", "pytorch", "clean"]
RESIZES: dict[Resize, str] = {
    "tensorflow": "bilinear to 299x299, not antialiased, as TensorFlow 1 and torch-fidelity",
    "pytorch": "bilinear to 299x299, not antialiased, pixels centred, as pytorch-fid",
    "clean": "bicubic to 299x299, antialiased, as Pillow and clean-fid",
}


class InceptionFeatures(Features):
    """InceptionV3 of the original FID: the network of torch-fidelity, rearranged to run faster.

    Gives 2048 features, 1008 logits without bias, and as `spatial` the 2023 features of sFID (the first 7 channels of
    the 17x17 maps `mixed_6/conv`). One channel is repeated to three.

    Args:
        dataset: dataset with the shape of the images.
        cache_dir: unused.
        device: device of the network.
        weights: file of torch-fidelity's weights; None: download it once to torch's download folder.
        resize: resizing to 299x299, which changes distances: `tensorflow` as in torch-fidelity, `pytorch` as in
            pytorch-fid, `clean` as in clean-fid.
        precision: fp32 equals torch-fidelity to 1e-6, bf16 to about 1e-2; the protocol records it.

    Raises:
        UsageError: the file is missing and cannot be downloaded, is not a file of these weights, or images have
            neither 1 nor 3 channels.

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
        check_channels(self.name, dataset)
        instead = "" if dataset.num_classes is None else "features=classifier"
        path = locate(weights, _published_weights(), "features.weights", "features=inception", instead)
        content = content_of(path, "features.weights")
        self.digest = hashlib.sha256(content).hexdigest()
        self.device, self.precision = device, precision
        self.way: Resize = resize
        self.resize = RESIZES[resize]
        self.chunk = 16 if device.type == "cpu" else 64  # 16 images fit into CPU caches
        network = fold_batch_norm(load_network(path, content))
        self.head = network.fc.weight.to(device, copy=True)  # stays float32
        # The children are in forward order; the last two are pooling and the output layer.
        *blocks, _, _ = network.children()
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network.to(device, self.dtype, memory_format=torch.channels_last)
        below = blocks.index(network.Mixed_6d)
        self.lower, self.upper = nn.Sequential(*blocks[:below]), nn.Sequential(*blocks[below:])
        self.mixed_6_conv = network.Mixed_6d.branch1x1

    @classmethod
    def downloads(cls, settings: Mapping[str, Any]) -> list[WebFile]:
        return [_published_weights()] if settings["weights"] is None else []

    def extract(self, images: Tensor) -> FeatureBatch:
        x = prepared(images, self.way).expand(-1, 3, -1, -1)
        x = self.lower(x.to(self.dtype, memory_format=torch.channels_last))
        spatial = (
            self.mixed_6_conv(x)[:, :7].float().permute(0, 2, 3, 1).flatten(1)
        )  # in the order of published statistics
        features = self.upper(x).float().mean(dim=(2, 3))
        return FeatureBatch(features, features @ self.head.T, spatial)


def _published_weights() -> WebFile:
    """Return the weights that torch-fidelity publishes."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return published(URL_INCEPTION_V3, size=95_628_359)


def prepared(images: Tensor, resize: Resize) -> Tensor:
    """Convert uint8 images [B, C, H, W] to network inputs, float32 [B, C, 299, 299] in about [-1, 1]."""
    x = images.float()
    if resize == "pytorch":
        return F.interpolate(x / 255, (SIZE, SIZE), mode="bilinear", align_corners=False).mul_(2).sub_(1)
    if resize == "clean":
        x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp_(0, 255)
    else:
        x = resized(x, SIZE)
    return x.sub_(128).div_(128)


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images [B, C, H, W] to [B, C, size, size], bit for bit as TensorFlow 1 and torch-fidelity.

    Pixel i of the result is interpolated at i H / size. Columns are resized before rows, so that at most H rows are
    interpolated.
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
    """Return the pixels before and after each of `size` points along `length` pixels, and the weight of the latter."""
    place = torch.arange(size, dtype=like.dtype, device=like.device) * torch.tensor(length / size)
    before = place.long()
    return before, (before + 1).clamp(max=length - 1), place - before


def fold_batch_norm(network: Any) -> Any:
    """Fold each batch norm into the convolution before it, and return the network."""
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d

    for block in network.modules():
        if isinstance(block, BasicConv2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.add_module("bn", nn.Identity())
    return network


def load_network(path: Path, content: bytes) -> Any:
    """Return torch-fidelity's InceptionV3 with weights from the content of a file, read as tensors only."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity would unpickle any file, so it gets a new file of the verified tensors.
    trusted = io.BytesIO()
    torch.save(read(content, path, "features.weights"), trusted)
    trusted.seek(0)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=trusted
        )
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise wrong_weights(path, "features.weights", error) from error
