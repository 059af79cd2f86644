"""Groups of images, such as the scans of one patient, each on one side of a split."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_cli.data.attributes import KEY as LABEL_KEY
from diffusion_cli.data.attributes import Column, category_name, plain_cell
from diffusion_cli.data.base import Split, named_mask
from diffusion_cli.data.label_tables import file_columns
from diffusion_cli.data.labels import composed
from diffusion_cli.data.series import dicom_files, patient_ids
from diffusion_cli.errors import UsageError, counted, examples

KEY = "dataset.group"
PATIENT = "PatientID"
"""Value of `dataset.group` for the patients in the headers of DICOM files."""
FIRST_FOLDER = "'([^/]+)/'"
"""Pattern of the first folder, for messages."""
COMPLETE = "complete the column"
ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
"""Zeros before a number."""
FAR = 2.0
"""Ratio of the odds of the validation share to those of `val_fraction` above which a remark states the share."""


class Groups(NamedTuple):
    """The group of each image; a hash of its name decides on which side of the split all its images are."""

    option: str
    """Value of `dataset.group`."""
    names: list[str]
    """Group of each image."""
    val_fraction: float

    @classmethod
    def of(
        cls,
        option: str,
        found: Sequence[str | None],
        val_fraction: float,
        title: Callable[[int], str],
        remedy: str = COMPLETE,
    ) -> "Groups":
        """Return the groups of images.

        Args:
            option: value of `dataset.group`.
            found: group of each image; None or empty without one.
            val_fraction: fraction of the images for validation, in [0, 1).
            title: returns the name of a row for errors.
            remedy: what to do about images without a group.

        Raises:
            UsageError: images have no group, or all are in one group and some are wanted for validation.
        """
        names = [name for name in found if name]
        if missing := [row for row, name in enumerate(found) if not name]:
            shown = examples([title(row) for row in missing])
            raise UsageError(
                KEY, option, f"{counted(len(missing), 'image')} without a group: {shown}", remedy
            )
        groups = cls(option, names, val_fraction)
        if val_fraction > 0 and len({*names}) == 1:
            problem = f"all {len(names)} images are in one group, {names[0]!r:.80}, which cannot be split"
            raise UsageError(KEY, option, problem, "choose other groups, or set dataset.val_fraction=0")
        return groups

    @classmethod
    def of_column(
        cls, option: str, columns: Callable[[dict[str, None]], Mapping[str, Column]], val_fraction: float
    ) -> "Groups":
        """Return the groups in a column.

        Args:
            option: name of the column, the value of `dataset.group`.
            columns: returns the columns of some names, as `chosen_columns`.
            val_fraction: fraction of the images for validation, in [0, 1).

        Raises:
            UsageError: there is no such column, or as `of`.
        """
        try:
            column = columns({option: None})[option]
        except UsageError as error:
            raise error.renamed({LABEL_KEY: KEY}) from error
        return cls.of(option, names_in(column), val_fraction, "image {}".format)

    def is_val(self) -> np.ndarray:
        """Return which images are for validation, bool [N]."""
        return named_mask(self.names, self.val_fraction)

    def counts(self) -> dict[Split, int]:
        """Return the number of groups in each split."""
        is_val = self.is_val()
        val = {name for name, chosen in zip(self.names, is_val.tolist(), strict=True) if chosen}
        return {"train": len({*self.names}) - len(val), "val": len(val)}

    def _alike(self) -> list[str]:
        """Return two names that differ only by case or by zeros before a number; empty without such names."""
        known: dict[str, str] = {}
        for name in dict.fromkeys(self.names):
            if (other := known.setdefault(ZEROS.sub("", name.casefold()), name)) != name:
                return [other, name]
        return []

    def remarks(self) -> list[str]:
        """Return remarks about groups of one image, names that may be of one group, and the share for validation."""
        share, wanted, counts = float(self.is_val().mean()), self.val_fraction, self.counts()
        total = sum(counts.values())
        lines = []
        if total == len(self.names):
            lines.append(f"{KEY}={self.option}: each of the {total} images is a group of its own")
        if alike := self._alike():
            named = " and ".join(f"{name!r:.80}" for name in alike)
            lines.append(
                f"{KEY}={self.option}: {named} are different groups; if they are one, name them alike"
            )
        # Images without any for validation have the remark of `named_remarks`.
        ratio = share * (1 - wanted) / (wanted * (1 - share)) if share > 0 else 1.0
        if not 1 / FAR <= ratio <= FAR:
            lines.append(
                f"{KEY}={self.option}: {counts['val']} of {total} groups are for validation, with {share:.3g} of the "
                f"images, not {wanted}; groups are few or unequal, and another dataset.val_fraction chooses others"
            )
        return lines


def names_in(column: Column) -> list[str | None]:
    """Return the group in each cell of a column; None for a missing one."""
    cells = map(plain_cell, column.cells)
    if column.names is not None:
        return [column.names[cell] if isinstance(cell, int) and cell >= 0 else None for cell in cells]
    return [None if cell is None else category_name(cell) for cell in cells]


class FileGroups(NamedTuple):
    """Groups of image files, before files that cannot be decoded are left out."""

    option: str
    names: list[str | None]
    """Group of each file; None or empty without one."""
    remedy: str
    """What to do about files without a group."""

    @classmethod
    def of(
        cls, path: Path, names: list[str], files: Sequence[str], parts: Mapping[str, list[str]], option: str
    ) -> "FileGroups":
        """Return the groups of files.

        Args:
            path: the folder or archive.
            names: all files below `path`.
            files: names of the images or volumes.
            parts: files of each name that stands for several.
            option: a regular expression with one group in parentheses, which is searched in the name of each file,
                relative to `path`; the name of a column; or `PatientID` for that of DICOM headers.

        Raises:
            UsageError: the expression is invalid or has another number of groups, or as `file_columns`.
        """
        own = [parts.get(name, [name])[0] for name in files]
        if "(" in option:
            return cls(option, _matched(option, own), "correct the pattern, or move them away")
        if option == PATIENT and dicom_files(path, own[:1]):
            remedy = f"use a pattern of their names, such as {FIRST_FOLDER} for the first folder"
            return cls(option, [*patient_ids(path, own)], remedy)
        try:
            column = file_columns(path, names, [*files], {option: None})[option]
        except UsageError as error:
            (problem,) = error.problems
            if problem.key != LABEL_KEY:
                raise
            remedy = f"{problem.remedy}; or use a pattern such as {FIRST_FOLDER} for the first folder"
            raise UsageError(KEY, option, problem.problem, remedy) from error
        return cls(option, names_in(column), COMPLETE)

    def split(self, val_fraction: float, files: Sequence[str]) -> Groups:
        """Return the groups of the files, which are all that are left; UsageError as `Groups.of`."""
        return Groups.of(self.option, self.names, val_fraction, files.__getitem__, self.remedy)

    def kept(self, rows: Sequence[int]) -> "FileGroups":
        """Return the groups of some of the files."""
        return self._replace(names=[self.names[row] for row in rows])


def _matched(pattern: str, files: Sequence[str]) -> list[str | None]:
    """Return what the group of a pattern matches in each name; None where it matches nothing."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(KEY, pattern, f"not a regular expression ({error})", "correct it") from error
    if compiled.groups != 1:
        problem = f"has {counted(compiled.groups, 'part')} in parentheses, not 1"
        raise UsageError(
            KEY, pattern, problem, r"put the name of the group into ( and ), others into (?: and )"
        )
    found = (compiled.search(composed(name)) for name in files)
    return [None if match is None else match[1] for match in found]
