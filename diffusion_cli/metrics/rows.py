"""Feature vectors or pixels of many images, stored on disk."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.system.cache import write_checksums
from diffusion_cli.system.files import atomic_write, writing
from diffusion_cli.system.untrusted import printable

BLOCK = 4096  # vectors per read


class Rows:
    """Vectors [N, dim], float32 unless stated otherwise, in an array that may be memory-mapped."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @property
    def array(self) -> np.ndarray:
        """All vectors as an array."""
        return self._array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: np.ndarray | slice) -> Tensor:
        """Return vectors by index or slice."""
        return torch.from_numpy(np.array(self.array[index]))

    def blocks(self, order: np.ndarray | None = None) -> Iterator[Tensor]:
        """Yield all vectors, or those of indices `order`, in blocks."""
        count = len(self) if order is None else len(order)
        for first in range(0, count, BLOCK):
            part = slice(first, min(first + BLOCK, count))
            yield self[part if order is None else order[part]]


class GrowingRows(Rows):
    """Vectors of one dtype, appended to an unnamed temporary file in `folder`.

    If the folder is not writable, or the disk is full, the vectors are kept in memory.
    """

    def __init__(self, dim: int, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.dim, self.folder, self.dtype = dim, folder, dtype
        self._count = 0
        self._held: list[np.ndarray] | None = None
        super().__init__(torch.empty(0, dim, dtype=dtype).numpy())
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            self._hold(error)

    @property
    def array(self) -> np.ndarray:
        if len(self._array) < self._count:
            if self._held is not None:
                self._held = [np.concatenate(self._held)]
                self._array = self._held[0]
            else:
                self._array = np.memmap(self._file, self._array.dtype, "r", shape=(self._count, self.dim))
        return self._array

    def append(self, vectors: Tensor) -> None:
        """Append vectors [B, dim] of any dtype on any device."""
        values = vectors.detach().to("cpu", self.dtype).contiguous().numpy()
        assert values.shape[1:] == (self.dim,), values.shape
        if self._held is None:
            try:
                with writing(self.folder):
                    self._write(values)
            except OSError as error:
                self._hold(error)
        if self._held is not None:
            self._held.append(values.copy())
        self._count += len(values)

    def _write(self, values: np.ndarray) -> None:
        data = values.reshape(-1).view(np.uint8).data
        while data:
            data = data[self._file.write(data) :]

    def _hold(self, error: OSError) -> None:
        """Keep the vectors in memory from now on."""
        print(f"diffuse: {printable(str(error))}; features are kept in memory", file=sys.stderr)
        self._held = [np.array(self.array)]

    def save(self, path: Path) -> None:
        """Write all vectors as .npy with checksums, atomically."""
        with atomic_write(path) as temporary:
            with temporary.open("wb") as file:
                descr = np.lib.format.dtype_to_descr(self.array.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": (self._count, self.dim)}
                np.lib.format.write_array_header_1_0(file, header)
                for block in self.blocks():
                    file.write(block.numpy().data)
            write_checksums(temporary, path)
