"""Results of an edit of volumes, in the geometry of their input files."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.data.resampling import Placement, resampled
from diffusion_cli.formats import Volume
from diffusion_cli.formats.dicom_derived import derivable, derived_series, stored_numbers, values_of
from diffusion_cli.formats.volume import FileAxes, Held, read_volume
from diffusion_cli.system.files import atomic_write, new_folder
from diffusion_cli.system.untrusted import read

if TYPE_CHECKING:
    from pydicom import Dataset

SLICE = "{:03d}.dcm"
"""Name of the file of a slice in the folder of a series."""


class InputVolume(NamedTuple):
    """The file of an input volume, in whose geometry its result is written."""

    files: Callable[[], Sequence[bytes]]
    """Reads the content of the files again, because many volumes may be larger than the memory."""
    axes: FileAxes
    place: Placement | None
    """Places of the voxels of the model among those of the file; None for the same voxels."""
    headers: "tuple[Dataset, ...]"
    """Elements of the slices of a DICOM series, in their order; empty for a result in NIfTI."""
    sha256: str
    """Hash of the files, on whose headers and voxels the result depends."""

    @classmethod
    def of(
        cls, files: Callable[[], Sequence[bytes]], held: Held, place: Placement | None
    ) -> "InputVolume | None":
        """Return the volume of NIfTI or DICOM files; None for files without positions.

        Args:
            files: reads the content of the files.
            held: volume in them.
            place: places of the voxels of the model; None for the same voxels.
        """
        if held.axes is None:
            return None
        content, order = files(), held.axes.order
        headers = derivable([content[number] for number in order])
        hashed = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in content)).hexdigest()
        return cls(files, held.axes, place, tuple(headers), hashed)

    def written(self, output: Path, name: str, suffix: str) -> list[Path]:
        """Return the existing files of the result; none if some of a series are missing."""
        if not self.headers:
            single = output / f"{name}{suffix}"
            return [single] if single.is_file() else []
        slices = [output / name / SLICE.format(number) for number in range(len(self.headers))]
        return slices if all(map(Path.is_file, slices)) else []

    def read(self, files: Sequence[Path], form: Volume) -> Tensor:
        """Return a result in the voxels of the model, as stored, [C, D, H, W]; FormatError for damaged files."""
        values = read_volume(*map(read, files)).values
        if self.place is not None:
            values = resampled(values, self.place, form.low)
        return form.scaled(torch.from_numpy(values))

    def result(self, form: Volume, sample: Tensor, known: Tensor | None, description: str) -> "VolumeResult":
        """Return the result in the voxels of the file.

        Voxels outside the field of the model keep their values, and so do those that no painted voxel of the model
        touches. Others are interpolated linearly.

        Args:
            form: format of the model.
            sample: the edited volume in [-1, 1], [C, D, H, W].
            known: voxels of the model that are not painted, bool [1, D, H, W]; None if all are.
            description: how the result was made.
        """
        original = read_volume(*self.files()).original
        given = original.values
        values, painted = form.values(sample), None if known is None else ~known.cpu().numpy()
        if self.place is not None:
            back = self.place.inverse(given.shape[1:])
            values = resampled(values, back, np.nan)
            painted = None if painted is None else resampled(painted.astype(np.float64), back, 0.0) > 0
        kept = np.isnan(values) if painted is None else np.isnan(values) | ~painted
        values = np.where(kept, given, values)
        if self.headers:
            stored, numbers, clipped = self._in_slices(values)
        else:
            stored, numbers, clipped = form.rounded(values), [], form.clipped(values)
            if not np.array_equal(stored[kept], given[kept]):
                form = replace(form, **original.numbers)
                stored, clipped = form.rounded(values), form.clipped(values)
        errors = None if known is None or self.place is not None else np.where(kept, stored - values, 0.0)
        return VolumeResult(self, form, stored, numbers, errors, clipped, description)

    def _in_slices(self, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], int]:
        """Return values as the slices of the series can store them, their numbers, and how many were clipped."""
        in_file, numbers, clipped = self.axes.in_file(values)[..., 0], [], 0
        stored = np.empty_like(in_file)
        for place, header in enumerate(self.headers):
            each, beyond = stored_numbers(header, in_file[:, :, place].T)
            stored[:, :, place] = values_of(header, each).T
            numbers.append(each)
            clipped += beyond
        return self.axes.upright(stored[..., None]), numbers, clipped


class VolumeResult(NamedTuple):
    """A result in the geometry of its input file."""

    volume: InputVolume
    form: Volume
    """Format of a NIfTI file."""
    values: np.ndarray
    """Values as stored, in RAS+ axes, float64 [C, D, H, W]."""
    numbers: list[np.ndarray]
    """Numbers of the slices of a DICOM series; empty for NIfTI."""
    errors: np.ndarray | None
    """Differences from the known values of the file, and 0 elsewhere; None if there are none, or after resampling."""
    clipped: int
    """Number of values beyond those that the file can store."""
    description: str

    def save(self, output: Path, name: str) -> None:
        """Write the result below a folder, atomically: one file, or a folder of slices."""
        if not self.numbers:
            with atomic_write(output / f"{name}{self.form.suffix}") as temporary:
                self.form.write_in(self.volume.axes, self.values, temporary)
            return
        with new_folder(output / name, replace=True) as folder:
            files = derived_series(self.volume.headers, self.numbers, self.description)
            for number, data in enumerate(files):
                (folder / SLICE.format(number)).write_bytes(data)
