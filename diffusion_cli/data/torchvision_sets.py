"""Published datasets that torchvision downloads, verifies and reads."""

import socket
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusion_cli.data.base import Dataset, Split
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.system.downloads import STALL, WebFile
from diffusion_cli.system.locks import locked


class _Published(Dataset):
    """Dataset of torchvision with a training and a test set; the test set is the validation split."""

    source: str
    """Name of the class in torchvision.datasets."""
    sizes: tuple[int, ...]
    """Bytes of the files that torchvision downloads."""
    files: str
    """Files to fetch by hand for use without a network."""

    def load(self, split: Split) -> MemoryImages:
        from torchvision import datasets  # slow import

        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(STALL)
        try:
            source = getattr(datasets, self.source)
            # One process downloads, the others wait for it.
            with locked(Path(self.data_dir) / self.source):
                data = source(str(self.data_dir), train=split == "train", download=True)
        except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(
                "data_dir",
                self.data_dir,
                f"cannot read or download {self.name} ({reason})",
                f"on a machine with a network, get {self.files} in {self.folder()}, or run diffuse data fetch "
                f"dataset={self.name} data_dir={self.data_dir}",
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        return MemoryImages(self.pixels(data.data), torch.as_tensor(data.targets, dtype=torch.int64))

    def downloads(self) -> list[WebFile]:
        return [
            WebFile(url, self.folder() / url.rpartition("/")[2], f"md5 {md5}", size, self.folder() / unpacked)
            for (url, md5, unpacked), size in zip(self.archives(), self.sizes, strict=True)
        ]

    @abstractmethod
    def archives(self) -> list[tuple[str, str, str]]:
        """Return URL, MD5 and the name once unpacked of each file that torchvision downloads."""

    @abstractmethod
    def folder(self) -> Path:
        """Return the folder of the files."""

    @abstractmethod
    def pixels(self, data: Any) -> Tensor:
        """Convert torchvision's array of all images to uint8 [N, C, H, W]."""


class MNIST(_Published):
    """70,000 handwritten digits, 28x28 gray, 10,000 of them for validation (LeCun et al. 1998).

    Args:
        data_dir: folder of downloaded datasets.
        size: 28, or 32 with a black border of two pixels, for networks with more than two downsamplings.
        flip: whether training may flip images horizontally.
    """

    name = "mnist"
    source = "MNIST"
    sizes = (9_912_422, 28_881, 1_648_877, 4_542)
    files = "the four *-ubyte.gz files of https://ossci-datasets.s3.amazonaws.com/mnist/ and gunzip them"
    class_names = tuple("0123456789")

    def __init__(self, data_dir: str, *, size: Literal[28, 32] = 32, flip: bool = False) -> None:
        super().__init__(data_dir)
        self.shape = (1, size, size)
        self.flip = flip

    def archives(self) -> list[tuple[str, str, str]]:
        from torchvision import datasets  # slow import

        source = getattr(datasets, self.source)
        return [
            (f"{source.mirrors[0]}{name}", md5, name.removesuffix(".gz")) for name, md5 in source.resources
        ]

    def folder(self) -> Path:
        return self.data_dir / self.source / "raw"

    def pixels(self, data: Tensor) -> Tensor:
        border = (self.shape[1] - data.shape[1]) // 2
        return pad(data[:, None], [border] * 4)


class FashionMNIST(MNIST):
    """70,000 images of clothes, 28x28 gray, 10,000 of them for validation (Xiao et al. 2017).

    Args:
        data_dir: folder of downloaded datasets.
        size: 28, or 32 with a black border of two pixels, for networks with more than two downsamplings.
        flip: whether training may flip images horizontally.
    """

    name = "fashion_mnist"
    source = "FashionMNIST"
    sizes = (26_421_880, 29_515, 4_422_102, 5_148)
    files = (
        "the four *-ubyte.gz files of http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/ "
        "and gunzip them"
    )
    class_names = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )

    def __init__(self, data_dir: str, *, size: Literal[28, 32] = 32, flip: bool = False) -> None:
        super().__init__(data_dir, size=size, flip=flip)


class CIFAR10(_Published):
    """60,000 colour photographs, 32x32, 10,000 of them for validation (Krizhevsky 2009).

    Args:
        data_dir: folder of downloaded datasets.
        flip: whether training may flip images horizontally.
    """

    name = "cifar10"
    source = "CIFAR10"
    sizes = (170_498_071,)
    files = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz and unpack it"
    shape = (3, 32, 32)
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )

    def __init__(self, data_dir: str, *, flip: bool = True) -> None:
        super().__init__(data_dir)
        self.flip = flip

    def archives(self) -> list[tuple[str, str, str]]:
        from torchvision import datasets  # slow import

        source = datasets.CIFAR10
        return [(source.url, source.tgz_md5, source.base_folder)]

    def folder(self) -> Path:
        return self.data_dir

    def pixels(self, data: Any) -> Tensor:
        return torch.from_numpy(data).permute(0, 3, 1, 2).contiguous()
