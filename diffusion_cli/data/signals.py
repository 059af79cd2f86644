"""One-dimensional signals from arrays and files, or synthetic electrocardiograms."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffusion_cli.data.array import (
    CLASS_NAMES,
    LABEL_KEYS,
    MARKS,
    VAL_FRACTION,
    class_names,
    opened_array,
    read_header,
    read_labels,
    read_marks,
    read_texts,
)
from diffusion_cli.data.base import (
    Dataset,
    Split,
    named_mask,
    named_remarks,
    row_chunks,
    shuffled_mask,
    split_rows,
    spread,
    too_few,
)
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import RULES, file_names, ignored_files, source_name
from diffusion_cli.data.heartbeats import CLASSES, HIGH, LOW, heartbeats
from diffusion_cli.data.labels import LABELS_CSV, built_in_classes, check_own_labels, class_labels, read
from diffusion_cli.data.listing import visible_name
from diffusion_cli.data.memory import GENERATED, MemoryImages
from diffusion_cli.data.signal_decoder import SignalDecoder
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats import Range
from diffusion_cli.formats.range_check import LOOKED_AT
from diffusion_cli.formats.ranged import ranges
from diffusion_cli.formats.signal import SUFFIXES, Numbers, Signal, SignalContent, read_signal
from diffusion_cli.system.remote import local_copy
from diffusion_cli.system.untrusted import Archive, reason

SIGNAL_KEYS = ("signals", "arr_0", "x")
BUILT_IN_LENGTH = 256
"""Length of the built-in signals, two seconds."""


class Signals(Dataset):
    """Signals [C, L] of a .npy or .npz file, of a folder or ZIP archive with one signal per file, or built-in ones.

    An array is [N, L] or [N, C, L] of float32, float64 or int16. A .npz has it as `signals`, `arr_0` or `x`, and
    optionally `labels` (or `arr_1`, `y`), `class_names` and `val`, as in `Array`. Files are .npy, CSV or 16-bit WAV,
    see `Signal`, at any depth, with classes as in `Folder`. Without a path, the signals are those of `heartbeats`.
    All signals are held in memory.

    Args:
        data_dir: folder of downloaded datasets, for the copy of a URL.
        rules: version of the rules that list files.
        path: file, folder or .zip, or its URL; None: built-in signals.
        length: values per channel, the first ones of longer signals; None: those of the array or of the first file, or
            256 for built-in signals.
        range: [low, high], the values that become -1 and 1, or one pair per channel; None: the whole range of int16,
            or -1.5 to 2 for built-in signals.
        labels: source of the classes of files, as in `Folder`; for others `auto` or `none`.
        size: number of built-in signals.
        val_fraction: fraction of the signals for validation, in [0, 1); None: as marked in the file, or 0.1.

    Raises:
        UsageError: the path is missing or has no signals, or floating-point signals have no range. `load` raises it
            for files that cannot be used.
    """

    flip = False

    def __init__(
        self,
        data_dir: str,
        rules: int = RULES,
        *,
        path: str | None = None,
        length: Annotated[int, Field(ge=2, le=10**7)] | None = None,
        range: Range | list[Range] | None = None,
        labels: Literal["auto", "folders", "csv", "none"] = "auto",
        size: Annotated[int, Field(ge=1, le=10**7)] = 5000,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None,
    ) -> None:
        super().__init__(data_dir)
        self.rules = rules
        self.class_names: tuple[str, ...] | None = None
        self.labels: Tensor | None = None
        self.val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
        self.path = None if path is None else local_copy(path, self.data_dir)
        self.files: list[str] = []
        self.array: SignalArray | None = None
        self._remarks: list[str] = []
        if self.path is None:
            self._choose_built_in(size, length, range, labels)
        elif self.path.suffix in (".npy", ".npz"):
            self._choose_array(self.path, path, length, range, labels, marked=val_fraction is None)
        else:
            self._choose_files(self.path, path, length, range, labels)

    @property
    def decoder(self) -> SignalDecoder:
        """Decoder of the files of the signals."""
        assert isinstance(self.form, Signal)
        return SignalDecoder(self.form, self.shape)

    def remarks(self) -> list[str]:
        if self.array is None:
            return [*self._remarks, *named_remarks(self.files, self.val_fraction)]
        no_val = self.val_fraction > 0 and not self.is_val.any()
        return [*self._remarks, *([too_few(len(self.is_val), self.val_fraction)] if no_val else [])]

    def load(self, split: Split) -> MemoryImages:
        rows = split_rows(self.is_val, self.val_fraction, split)
        labels = None if self.labels is None else self.labels[rows]
        if self.array is not None:
            return MemoryImages(self.array.samples(rows, self.decoder), labels)
        if self.path is not None:
            files = [self.files[row] for row in rows.tolist()]
            return FileImages(self.path, files, labels, self.decoder).in_memory()
        made = [self.decoder.form.samples(heartbeats(row, self.shape[1])[None]) for row in rows.tolist()]
        return MemoryImages(torch.stack(made) if made else torch.empty(0, *self.shape), labels, GENERATED)

    def _choose_built_in(
        self, size: int, length: int | None, given: Range | list[Range] | None, labels: str
    ) -> None:
        self.class_names, self.labels = built_in_classes(size, labels, CLASSES, "built-in signals")
        self.name, self.files = "heartbeats", [f"{number:06d}" for number in range(size)]
        self.shape = (1, length or BUILT_IN_LENGTH)
        self.form = _form("float32", 1, given or [LOW, HIGH], None, "")
        self.is_val = named_mask(self.files, self.val_fraction)

    def _choose_array(
        self, path: Path, given: str | None, length: int | None, range_: Range | list[Range] | None, labels: str,
        *, marked: bool,
    ) -> None:  # fmt: skip
        check_own_labels(labels, "an array")
        if not path.is_file():
            raise UsageError(
                "dataset.path", given, "no such file", "give a NumPy file, a folder or a ZIP archive"
            )
        try:
            array = self.array = read_signal_array(path)
            few = array.values(spread(array.number, min(array.number, LOOKED_AT)))
        except Exception as error:  # the parsers of ZIP and NumPy headers raise errors of many types
            raise UsageError("dataset.path", given, reason(error)) from error
        self.name, self.shape = path.stem, _cut(array.shape, length)
        self.form = _form(array.dtype, self.shape[0], range_, None, _extent([*few]))
        if labels == "auto":
            self.class_names, self.labels = array.class_names, array.labels
        if marked and array.val is not None:
            self.val_fraction, self.is_val = float(array.val.mean()), array.val
        else:
            self.is_val = shuffled_mask(array.number, self.val_fraction)
        channels, size = array.shape
        if channels > size:
            self._remarks.append(
                f"dataset.path={given}: the array is read as {array.number} signals of {channels} channels and length "
                f"{size}; if this is wrong, save [N,C,L]"
            )
        self._remarks += _remark(self.decoder.form, [*few])

    def _choose_files(
        self, path: Path, given: str | None, length: int | None, range_: Range | list[Range] | None,
        labels: Literal["auto", "folders", "csv", "none"],
    ) -> None:  # fmt: skip
        self.name, names = source_name(path), file_names(path, rules=self.rules, given=given)
        self.files = signal_files(names, given)
        self._remarks = ignored_files(path, names, "dataset.path", SUFFIXES)
        first = _first_signal(path, self.files)
        self.shape = _cut((len(first.values), first.values.shape[1]), length)
        self.form = _form(first.dtype, self.shape[0], range_, first.rate, _extent([first.values]))
        self._remarks += _remark(self.decoder.form, [first.values])
        self.is_val = named_mask(self.files, self.val_fraction)
        classes = class_labels(path, names, self.files, labels, self.rules)
        self.class_names, self.labels = classes.names, classes.labels
        self.missing_classes = classes.missing
        self._remarks += classes.remarks


class SignalArray(NamedTuple):
    """Properties and small arrays of a NumPy file of signals."""

    path: Path
    key: str | None
    """Name of the array of signals in a .npz."""
    dtype: str
    number: int
    shape: tuple[int, int]
    """Channels and length."""
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    val: np.ndarray | None
    """True for signals of the validation split, bool [N]; None if the file marks none."""

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
        return SignalArray(path, None, *_layout(path, None), labels=None, class_names=None, val=None)
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
    )  # fmt: skip


def _layout(path: Path, key: str | None) -> tuple[str, int, tuple[int, int]]:
    """Return dtype, number and shape [C, L] of the signals, from the header of their array."""
    shape, dtype, *_ = read_header(path, key)
    if len(shape) not in (2, 3) or 0 in shape or dtype.name not in Numbers.__args__:
        raise FormatError(
            f"has {dtype} of shape {shape}; signals are [N,L] or [N,C,L] of {', '.join(Numbers.__args__)}"
        )
    return dtype.name, shape[0], (1 if len(shape) == 2 else shape[1], shape[-1])


def signal_files(names: Sequence[str], given: str | Path | None, key: str = "dataset.path") -> list[str]:
    """Return the names of files of signals, sorted, without tables of labels; UsageError if there are none."""
    found = [
        name
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
        and visible_name(PurePosixPath(name))
        and not name.lower().endswith(LABELS_CSV)
    ]
    if not found:
        raise UsageError(key, given, "has no signals", f"expected files with {' '.join(SUFFIXES)}")
    return found


def _first_signal(path: Path, files: Sequence[str]) -> SignalContent:
    """Return the first signal that can be read; UsageError if none can."""
    problem: Exception | None = None
    for name in files:
        try:
            return read_signal(read(path, name))
        except (ValueError, OSError) as error:
            problem = problem or error
    assert problem is not None
    raise UsageError(
        "dataset.path", path, f"{files[0]} {reason(problem)}", "repair or remove it"
    ) from problem


def _cut(shape: tuple[int, int], length: int | None) -> tuple[int, int]:
    channels, size = shape
    if length is not None and length > size:
        raise UsageError(
            "dataset.length", length, f"the signals have only {size} values", "use a smaller length"
        )
    return channels, length or size


def _form(
    dtype: str, channels: int, given: Range | list[Range] | None, rate: int | None, extent: str
) -> Signal:
    """Return the format of signals; UsageError without a range, unless they are int16."""
    if given is None and dtype != "int16":
        remedy = f"give [low,high] of all signals{extent}"
        raise UsageError("dataset.range", None, "floating-point signals need a range", remedy)
    if given is None:
        limits = np.iinfo(np.int16)
        given = [float(limits.min), float(limits.max)]
    low, high = ranges(given, channels)
    return Signal(dtype, low, high, ".npy" if rate is None else ".wav", rate)  # pyright: ignore[reportArgumentType]


def _extent(signals: Sequence[np.ndarray]) -> str:
    """Return the extent of the values of the first signals, for the remedy of a missing range."""
    low, high = min(each.min() for each in signals), max(each.max() for each in signals)
    which = "the first has" if len(signals) == 1 else f"{len(signals)} of them have"
    return f"; {which} values from {low:g} to {high:g}"


def _remark(form: Signal, signals: Sequence[np.ndarray]) -> list[str]:
    found = form.remark(signals)
    return [] if found is None else [found]
