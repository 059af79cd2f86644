"""Any number of vectors, on disk: what a metric needs of every single image does not have to fit in memory."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # vectors read at a time


class Rows:
    """Vectors float32 [N, dim], in an array that may be mapped from a file."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @property
    def array(self) -> np.ndarray:
        """All vectors."""
        return self._array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: np.ndarray | slice) -> Tensor:
        """Some of the vectors by number or slice."""
        return torch.from_numpy(np.array(self.array[index]))

    def blocks(self, order: np.ndarray | None = None) -> Iterator[Tensor]:
        """All vectors, or those of these numbers, some at a time."""
        count = len(self) if order is None else len(order)
        for first in range(0, count, BLOCK):
            part = slice(first, min(first + BLOCK, count))
            yield self[part if order is None else order[part]]


class GrowingRows(Rows):
    """Vectors appended batch by batch to a file without a name in `folder`, which is gone with the object."""

    def __init__(self, dim: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dim = dim
        self._count = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        super().__init__(np.empty((0, dim), np.float32))

    @property
    def array(self) -> np.ndarray:
        if len(self._array) < self._count:
            self._file.flush()
            self._array = np.memmap(self._file, np.float32, "r", shape=(self._count, self.dim))
        return self._array

    def append(self, vectors: Tensor) -> None:
        """Take in vectors [B, dim] of any type, on any device."""
        values = vectors.detach().to("cpu", torch.float32)
        assert values.shape[1:] == (self.dim,), values.shape
        self._file.write(values.contiguous().numpy().data)
        self._count += len(values)

    def write(self, file: Any) -> None:
        """Write all vectors as .npy to an open file."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._count, self.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in self.blocks():
            file.write(block.numpy().data)
