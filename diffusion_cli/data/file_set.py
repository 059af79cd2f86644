"""Base class of datasets with one sample per file, or with built-in samples."""

from abc import abstractmethod
from collections.abc import Collection
from typing import ClassVar, Generic, Literal, TypeVar

import numpy as np
from torch import Tensor

from diffusion_cli.data.base import Dataset, Split, named_mask, split_rows, too_few
from diffusion_cli.data.decoding import FileDecoder
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import file_names, ignored_files, image_files, own_images, source_name
from diffusion_cli.data.groups import KEY as GROUP_KEY
from diffusion_cli.data.groups import FileGroups, Groups
from diffusion_cli.data.labels import built_in_classes, class_labels
from diffusion_cli.data.memory import GENERATED, MemoryImages
from diffusion_cli.data.unreadable import Unreadable
from diffusion_cli.errors import UsageError
from diffusion_cli.system.remote import local_copy

DecoderT = TypeVar("DecoderT", bound=FileDecoder)
Labels = Literal["auto", "folders", "csv", "none"]
"""Source of the classes of files, as in `Folder`."""


class FileSet(Dataset, Generic[DecoderT]):
    """Samples in the files of a folder or ZIP archive, at any depth, or built-in samples, each with a number.

    A hash of its name or number, or of its group's name, decides whether a sample is for validation.

    Args:
        data_dir: folder of downloaded datasets, for the copy of a URL.
        rules: version of the rules that select and convert files.
        path: folder or .zip file, or its URL; None: built-in samples.
        labels: source of the classes.
        group: groups of files, as in `Folder`; None: each file by itself.
        val_fraction: fraction of the samples for validation, in [0, 1).
    """

    flip = False
    noun: ClassVar[str]
    """What the samples are, in the plural, for messages."""
    skips_figures: ClassVar[bool] = True
    """Whether files that this program wrote besides samples are skipped."""
    decoder: DecoderT
    """Decoder of the files."""

    def __init__(
        self, data_dir: str, rules: int, path: str | None, labels: Labels, group: str | None, val_fraction: float
    ) -> None:  # fmt: skip
        super().__init__(data_dir)
        self.rules, self.given, self.val_fraction = rules, path, val_fraction
        self.path = None if path is None else local_copy(path, self.data_dir)
        self.files: list[str] = []
        self.class_names: tuple[str, ...] | None = None
        self.labels: Tensor | None = None
        self.groups: Groups | None = None
        self.is_val = np.zeros(0, bool)
        self._of_files: Labels = labels
        self._of_groups = group
        self._skipped: Unreadable | None = None
        self._remarks: list[str] = []

    def choose_built_in(self, name: str, size: int, kinds: Collection[str]) -> None:
        """Choose built-in samples, whose kinds take turns.

        Raises UsageError if options of files are set.
        """
        if self._of_groups is not None:
            raise UsageError(GROUP_KEY, self._of_groups, "applies to files", "leave it out")
        self.name, self.files = name, [f"{number:06d}" for number in range(size)]
        self.class_names, self.labels = built_in_classes(size, self._of_files, kinds, f"built-in {name}")
        self.is_val = named_mask(self.files, self.val_fraction)

    def choose_files(
        self, suffixes: tuple[str, ...], unreadable: Literal["error", "skip"] = "error",
        other: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Choose the files with some suffixes, and their classes and groups.

        Args:
            suffixes: suffixes of the files.
            unreadable: `error`, or `skip` files that the decoder cannot read, which it reads all for this.
            other: file names of tables that have one of the suffixes.

        Raises:
            UsageError: there are no such files, or requested classes or groups are missing.
        """
        path = self.path
        assert path is not None
        self.name, names = source_name(path), file_names(path, rules=self.rules, given=self.given)
        choose = own_images if self.skips_figures else image_files
        try:
            candidates = [name for name in names if name.rpartition("/")[2].lower() not in other]
            self.files = choose(path, candidates, "dataset.path", suffixes, self.given)
        except UsageError as error:
            expected = f"expected files with {' '.join(suffixes)}"
            raise UsageError("dataset.path", self.given, f"has no {self.noun}", expected) from error
        self._remarks = ignored_files(path, names, "dataset.path", suffixes)
        classes = class_labels(path, names, self.files, self._of_files, self.rules)
        self.class_names, self.labels = classes.names, classes.labels
        self.missing_classes = classes.missing
        self._remarks += classes.remarks
        groups = None
        if self._of_groups is not None:
            groups = FileGroups.of(path, names, self.files, {}, self._of_groups)
        if unreadable == "skip":
            kept = self._skip_unreadable(FileImages(path, self.files, None, self.decoder))
            groups = None if groups is None else groups.kept(kept)
        self.is_val = named_mask(self.files, self.val_fraction)
        if groups is not None:
            self.use_groups(groups.split(self.val_fraction, self.files))

    def use_groups(self, groups: Groups) -> None:
        """Split the samples by their groups."""
        self.groups, self.num_groups, self.is_val = groups, groups.counts(), groups.is_val()

    def _skip_unreadable(self, images: FileImages) -> list[int]:
        """Leave out the files that cannot be decoded, and return the rows that are left; UsageError if none is."""
        self._skipped = Unreadable.of(images, self.data_dir, images.state())
        kept = [row for row, name in enumerate(self.files) if name not in self._skipped.reasons]
        if not kept:
            first = self._skipped.reasons[self.files[0]]
            problem = f"none of the {len(self.files)} {self.noun} is usable ({first})"
            raise UsageError("dataset.path", self.given, problem, "repair them")
        self.files = [self.files[row] for row in kept]
        self.labels = None if self.labels is None else self.labels[kept]
        return kept

    def remarks(self) -> list[str]:
        no_val = self.val_fraction > 0 and not self.is_val.any()
        return [
            *(self._skipped.remarks(f"dataset.path={self.path}") if self._skipped else []),
            *self._remarks,
            *([too_few(len(self.is_val), self.val_fraction)] if no_val else []),
            *(self.groups.remarks() if self.groups else []),
        ]

    def stream(self, split: Split) -> MemoryImages | FileImages:
        rows = split_rows(self.is_val, self.val_fraction, split)
        labels = None if self.labels is None else self.labels[rows]
        if self.path is None:
            return MemoryImages(self.built_in(rows.tolist()), labels, GENERATED)
        return FileImages(self.path, [self.files[row] for row in rows.tolist()], labels, self.decoder)

    def in_memory(self, split: Split) -> MemoryImages:
        """Return one split, all decoded; UsageError for files that cannot be used."""
        images = self.stream(split)
        return images if isinstance(images, MemoryImages) else images.in_memory()

    @abstractmethod
    def built_in(self, rows: list[int]) -> Tensor:
        """Return built-in samples by number, [len(rows), *shape]."""
