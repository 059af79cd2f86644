"""One-dimensional signals from arrays and files, or synthetic electrocardiograms."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffusion_cli.data.array import VAL_FRACTION
from diffusion_cli.data.base import Split, shuffled_mask, split_rows, spread
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import RULES
from diffusion_cli.data.file_set import FileSet, Labels
from diffusion_cli.data.groups import KEY as GROUP_KEY
from diffusion_cli.data.groups import Groups
from diffusion_cli.data.heartbeats import CLASSES, HIGH, LOW, heartbeats
from diffusion_cli.data.label_tables import TABLES
from diffusion_cli.data.labels import check_own_labels, read
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.signal_array import SignalArray, read_signal_array
from diffusion_cli.data.signal_decoder import SignalDecoder
from diffusion_cli.errors import UsageError, counted
from diffusion_cli.formats import Range
from diffusion_cli.formats.range_check import LOOKED_AT, MOST_CUT
from diffusion_cli.formats.ranged import ranges
from diffusion_cli.formats.signal import SUFFIXES, Signal, SignalContent, read_signal
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.untrusted import reason

BUILT_IN_LENGTH = 256
"""Length of the built-in signals, two seconds."""


class Signals(FileSet[SignalDecoder]):
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
        group: groups of files, as in `Folder`, or an array [N] of a .npz; None: each signal by itself.

    Raises:
        UsageError: the path is missing or has no signals, or floating-point signals have no range. `load` raises it
            for files that cannot be used.
    """

    noun = "signals"

    def __init__(
        self,
        data_dir: str,
        rules: int = RULES,
        *,
        path: str | None = None,
        length: Annotated[int, Field(ge=2, le=10**7)] | None = None,
        range: Range | list[Range] | None = None,
        labels: Labels = "auto",
        size: Annotated[int, Field(ge=1, le=10**7)] = 5000,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None,
        group: str | None = None,
    ) -> None:
        fraction = VAL_FRACTION if val_fraction is None else val_fraction
        super().__init__(data_dir, rules, path, labels, group, fraction)
        self.array: SignalArray | None = None
        if self.path is None:
            self.choose_built_in("heartbeats", size, CLASSES)
            self.shape = (1, length or BUILT_IN_LENGTH)
            self._use(_form("float32", 1, range or [LOW, HIGH], None, ""))
        elif self.path.suffix in (".npy", ".npz"):
            self._choose_array(self.path, length, range)
            self._split_array(val_fraction is None)
        else:
            self.choose_files(SUFFIXES, other=TABLES)
            first = _first_signal(self.path, self.files)
            self.shape = _cut((len(first.values), first.values.shape[1]), length)
            self._use(_form(first.dtype, self.shape[0], range, first.rate, _extent([first.values])))

    def _use(self, form: Signal) -> None:
        self.form, self.decoder = form, SignalDecoder(form, self.shape)

    def remarks(self) -> list[str]:
        return [*super().remarks(), *self._clipped_files()]

    def _clipped_files(self) -> list[str]:
        """Return a remark that names the files with values outside the range, or that little of it is used."""
        if self.path is None or self.array is not None:
            return []
        decoder, images = self.decoder, FileImages(self.path, self.files, None, self.decoder)
        few = {*spread(len(self.files), min(len(self.files), LOOKED_AT)).tolist()}
        clipped: dict[str, float] = {}
        kept: list[np.ndarray] = []
        for row, name in enumerate(
            ProgressBar(self.files, desc="checking signals", unit="signal", delay=2.0)
        ):
            with suppress(ValueError, OSError):  # reported together where they are loaded
                values = decoder.values(*images.contents(row))
                share = decoder.form.share_clipped(values)
                clipped |= {name: share} if share > MOST_CUT else {}
                kept += [values] if row in few else []
        if not clipped:
            return _remark(decoder.form, kept) if kept else []
        first = max(clipped, key=clipped.__getitem__)
        others = (
            f" and over {MOST_CUT:.0%} of {counted(len(clipped) - 1, 'other file')}"
            if len(clipped) > 1
            else ""
        )
        return [decoder.form.range_remark(f"clips {clipped[first]:.0%} of the values of {first}{others}")]

    def load(self, split: Split) -> MemoryImages:
        return self.in_memory(split)

    def stream(self, split: Split) -> MemoryImages | FileImages:
        if self.array is None:
            return super().stream(split)
        rows = split_rows(self.is_val, self.val_fraction, split)
        return MemoryImages(
            self.array.samples(rows, self.decoder), None if self.labels is None else self.labels[rows]
        )

    def built_in(self, rows: list[int]) -> Tensor:
        made = [self.decoder.form.samples(heartbeats(row, self.shape[1])[None]) for row in rows]
        return torch.stack(made) if made else torch.empty(0, *self.shape)

    def _choose_array(self, path: Path, length: int | None, given: Range | list[Range] | None) -> None:
        check_own_labels(self._of_files, "an array")
        if not path.is_file():
            raise UsageError(
                "dataset.path", self.given, "no such file", "give a NumPy file, a folder or a ZIP archive"
            )
        try:
            array = self.array = read_signal_array(path)
            few = array.values(spread(array.number, min(array.number, LOOKED_AT)))
        except Exception as error:  # the parsers of ZIP and NumPy headers raise errors of many types
            raise UsageError("dataset.path", self.given, reason(error)) from error
        self.name, self.shape = path.stem, _cut(array.shape, length)
        self._use(_form(array.dtype, self.shape[0], given, None, _extent([*few])))
        if self._of_files == "auto":
            self.class_names, self.labels = array.class_names, array.labels
        channels, size = array.shape
        if channels > size:
            self._remarks.append(
                f"dataset.path={self.given}: the array is read as {array.number} signals of {channels} channels and "
                f"length {size}; if this is wrong, save [N,C,L]"
            )
        self._remarks += _remark(self.decoder.form, [*few])

    def _split_array(self, marked: bool) -> None:
        """Split an array by its groups, its marks or at random."""
        array, group = self.array, self._of_groups
        assert array is not None
        marks = array.val if marked else None
        if group is not None and marks is not None:
            problem = f"conflicts with the validation signals that {array.path.name} marks"
            remedy = "leave it out, or set dataset.val_fraction to split anew"
            raise UsageError(GROUP_KEY, group, problem, remedy)
        if group is not None:
            self.use_groups(Groups.of_column(group, array.columns, self.val_fraction))
        elif marks is not None:
            self.val_fraction, self.is_val = float(marks.mean()), marks
        else:
            self.is_val = shuffled_mask(array.number, self.val_fraction)


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
