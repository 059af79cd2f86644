"""Decoder from the bytes of a signal file to an array of fixed shape."""

from typing import NamedTuple

import numpy as np

from diffusion_cli.errors import FormatError
from diffusion_cli.formats import Shape
from diffusion_cli.formats.signal import Signal


class SignalDecoder(NamedTuple):
    """Decodes files of one signal to float32 [C, L] in [-1, 1]: the first L values of each channel."""

    form: Signal
    shape: Shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays, float32."""
        return np.dtype(np.float32)

    def __call__(self, data: bytes) -> np.ndarray:
        """Return the signal; FormatError as `values`."""
        return self.form.samples(self.values(data)).numpy()

    def values(self, data: bytes) -> np.ndarray:
        """Return the values [C, L] in the units of the file.

        Raises FormatError if the file is malformed, too short, has another number of channels, or has real values in
        place of integers or the reverse, which probably have other units.
        """
        held, (channels, length) = self.form.content(data), self.shape
        values = held.values
        self.check_dtype(held.dtype)
        if len(values) != channels:
            raise FormatError(f"has {len(values)} channels; expected {channels}")
        if values.shape[1] < length:
            raise FormatError(f"has {values.shape[1]} values per channel, fewer than the length of {length}")
        return values[:, :length]

    def check_dtype(self, dtype: str) -> None:
        """Raise FormatError for integers in place of real values, or the reverse."""
        if (dtype == "int16") != (self.form.dtype == "int16"):
            raise FormatError(f"has {dtype} values; expected {self.form.dtype}, as in the dataset")
