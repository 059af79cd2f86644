"""One-dimensional signals in a NumPy file."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.data.array import (
    CLASS_NAMES,
    LABEL_KEYS,
    MARKS,
    class_names,
    opened_array,
    read_header,
    read_labels,
    read_marks,
    read_texts,
    read_values,
)
from diffusion_cli.data.attributes import Column, chosen_columns
from diffusion_cli.data.base import row_chunks
from diffusion_cli.data.signal_decoder import SignalDecoder
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats.signal import Numbers
from diffusion_cli.system.untrusted import Archive, reason

SIGNAL_KEYS = ("signals", "arr_0", "x")


class SignalArray(NamedTuple):
    """Properties and small arrays of a NumPy file of signals."""

    path: Path
    key: str | None
    """Name of the array of signals in a .npz."""
    dtype: str
    number: int
    shape: tuple[int, int]
    """Channels and length."""
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    val: np.ndarray | None = None
    """True for signals of the validation split, bool [N]; None if the file marks none."""
    others: tuple[str, ...] = ()
    """Names of the other arrays of a .npz, such as groups."""

    def columns(self, names: Iterable[str]) -> dict[str, Column]:
        """Return arrays [N] by name; UsageError if one is missing or has another shape."""
        columns = chosen_columns(
            {name: Column([]) for name in self.others}, dict.fromkeys(names), self.path.name
        )
        try:
            return {name: Column(read_values(self.path, name, self.number)) for name in columns}
        except Exception as error:  # the parsers of ZIP and NumPy headers raise errors of many types
            raise UsageError("dataset.path", self.path, reason(error)) from error

    def values(self, rows: Tensor) -> np.ndarray:
        """Return rows in the numbers of the file, [B, C, L]."""
        return opened_array(self.path, self.key)[rows.numpy()].reshape(len(rows), *self.shape)

    def samples(self, rows: Tensor, decoder: SignalDecoder) -> Tensor:
        """Return rows as stored samples, cut to the length; UsageError if one has values that are not finite."""
        form, shape = decoder
        array = opened_array(self.path, self.key).reshape(-1, *self.shape)
        found = torch.empty(len(rows), *shape)
        for places in row_chunks(len(rows), f"reading {self.path.name}"):
            try:
                found[places] = form.samples(array[rows[places].numpy()][:, :, : shape[1]])
            except FormatError as error:
                named = f"one of the signals {rows[places].tolist()[:9]} {error}"
                raise UsageError(self.path, NO_VALUE, named, "repair or remove it") from error
        return found


def read_signal_array(path: Path) -> SignalArray:
    """Return the properties of a .npy or .npz of signals; FormatError, or an error of a parser, if malformed."""
    if path.suffix == ".npy":
        return SignalArray(path, None, *_layout(path, None))
    with Archive(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.entries]
        names = read_texts(archive) if CLASS_NAMES in held else None
    key = next((key for key in SIGNAL_KEYS if key in held), None)
    if key is None:
        raise FormatError(
            f"has the arrays {', '.join(held[:10])}; the signals must be named {', '.join(SIGNAL_KEYS)}"
        )
    dtype, number, shape = _layout(path, key)
    labels_key = next((key for key in LABEL_KEYS if key in held), None)
    labels = None if labels_key is None else read_labels(path, labels_key)
    return SignalArray(
        path, key, dtype, number, shape, labels,
        None if labels is None else class_names(labels, number, names),
        read_marks(path, MARKS, number) if MARKS in held else None,
        tuple(name for name in held if name not in (key, labels_key, CLASS_NAMES, MARKS)),
    )  # fmt: skip


def _layout(path: Path, key: str | None) -> tuple[str, int, tuple[int, int]]:
    """Return dtype, number and shape [C, L] of the signals, from the header of their array."""
    shape, dtype, *_ = read_header(path, key)
    if len(shape) not in (2, 3) or 0 in shape or dtype.name not in Numbers.__args__:
        raise FormatError(
            f"has {dtype} of shape {shape}; signals are [N,L] or [N,C,L] of {', '.join(Numbers.__args__)}"
        )
    return dtype.name, shape[0], (1 if len(shape) == 2 else shape[1], shape[-1])
