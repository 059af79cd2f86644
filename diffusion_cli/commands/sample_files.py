"""Files of samples in an output folder: beside each other, or in one folder for each class."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.data.listing import CLASS_FOLDERS
from diffusion_cli.errors import NO_VALUE, UsageError

RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9]|__macosx)(\..*)?", re.IGNORECASE)
"""Names that Windows refuses, or that readers of datasets skip."""
LONGEST = 60  # characters of a class in the name of its folder, at most 240 bytes


@dataclass(frozen=True)
class SampleFiles:
    """Names of the samples in a folder, which depend on the seed alone."""

    folder: Path
    suffix: str
    """Suffix of the files."""
    classes: tuple[str, ...] = ()
    """Folders of the classes of consecutive seeds, repeated; empty: all files are beside each other."""

    def name(self, seed: int) -> str:
        """Return the file of the sample of a seed, relative to the folder, with `/`."""
        name = f"{seed:06d}{self.suffix}"
        return f"{CLASS_FOLDERS}/{self.classes[seed % len(self.classes)]}/{name}" if self.classes else name

    def path(self, seed: int) -> Path:
        """Return the path of the sample of a seed."""
        return self.folder / self.name(seed)

    def there(self, ranges: Sequence[range]) -> Iterator[int]:
        """Yield the seeds in ascending ranges that have a file.

        It lists the files rather than the ranges, because a damaged manifest may record billions of seeds.
        """
        folders = [self.folder / CLASS_FOLDERS / name for name in dict.fromkeys(self.classes)] or [
            self.folder
        ]
        files = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
        stems = (path.name.removesuffix(self.suffix) for path in files)
        numbers = (int(stem) for stem in stems if re.fullmatch(r"[0-9]{6,10}", stem))
        there = sorted(seed for seed in set(numbers) if self.path(seed).is_file())
        for seeds in ranges:
            yield from there[bisect_left(there, seeds.start) : bisect_left(there, seeds.stop)]


def class_folders(trained: LoadedModel) -> tuple[str, ...]:
    """Return the folders of the classes of consecutive seeds, repeated; UsageError for samples without classes."""
    names, labels = trained.model.info.class_names, trained.labels
    if names is None or trained.rows is not None or not (trained.model.num_classes or labels):
        remedy = "use a class-conditional model, or leave layout out"
        raise UsageError("layout", "imagefolder", "the model has no classes", remedy)
    if labels is None:
        raise UsageError(
            "label", NO_VALUE, "layout=imagefolder needs a class for each image", "use label=all"
        )
    folders = folder_names(names)
    return tuple(folders[label] for label in labels)


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a different folder for each class: its name, without characters that some file systems refuse.

    Other characters become `_`. Names that would differ only in case end with the index of their class.
    """
    found: list[str] = []
    taken: set[str] = set()
    for index, name in enumerate(names):
        safe = re.sub(r"[^\w .,()+&'-]", "_", name)[:LONGEST].lstrip().rstrip(" .")
        safe = re.sub(r"^\.", "_", safe) or "class"
        folder = f"_{safe}" if RESERVED.fullmatch(safe) else safe
        while folder.casefold() in taken:
            folder = f"{folder}-{index}"
        taken.add(folder.casefold())
        found.append(folder)
    return found
