"""Tables of the Hugging Face library `datasets` with a column of images, and perhaps one of classes."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import torch
from torch import Tensor

from diffusion_cli.data.array import MOST_CLASSES
from diffusion_cli.data.attributes import Column, chosen_columns
from diffusion_cli.data.captions import CAPTION_COLUMNS, ReadCaptions, numbered_captions
from diffusion_cli.data.labels import in_order
from diffusion_cli.data.table_files import Origin, origin
from diffusion_cli.errors import FormatError, MachineError, UsageError, counted, examples
from diffusion_cli.system.files import CANNOT_WRITE
from diffusion_cli.system.locks import locked
from diffusion_cli.system.untrusted import reason

if TYPE_CHECKING:
    import datasets

BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
"""Readers of the library for files, by suffix."""
STREAMS = "streams"
"""Folder in `data_dir` of images that were streamed."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
SAVED = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` writes, for one split and for several."""


class Source(NamedTuple):
    """The place of a dataset, and how the library reads it; see `HuggingFace`."""

    path: str
    name: str | None
    revision: str | None
    builder: str | None
    image: str | None
    label: str | None
    caption: str | None
    max_images: int | None
    streams: Path | None
    """Folder of streamed images; None: the dataset is downloaded as a whole."""

    def rows(self, key: str, split: str) -> "datasets.Dataset":
        """Return the rows of a split, with all columns; UsageError as `HuggingFace`."""
        data = self._read(key, split)
        if len(data) == 0:
            raise UsageError(key, split, "has no images", "choose another split")
        return data if self.max_images is None else data.select(range(min(self.max_images, len(data))))

    def has_classes(self, data: "datasets.Dataset") -> bool:
        """Return whether the column `label` of the rows, or the only one with class names, has classes."""
        if self.label is None or self.label not in data.features:
            return True
        dtype = str(getattr(data.features[self.label], "dtype", ""))
        return not dtype.startswith(("float", "bool", "decimal"))

    def columns(self, data: "datasets.Dataset", kinds: Mapping[str, Any]) -> dict[str, Column]:
        """Return the chosen columns of rows; UsageError if one is missing."""
        there = {
            name: Column([], tuple(feature.names) if hasattr(feature, "names") else None)
            for name, feature in data.features.items()
            if not isinstance(feature, library().Image)
        }
        chosen = chosen_columns(there, kinds, source_name(self.path))
        data = data.select_columns([*chosen])
        return {name: Column(data[:][name], column.names) for name, column in chosen.items()}

    def table(
        self,
        key: str,
        split: str,
        data: "datasets.Dataset",
        *,
        classes: bool = True,
        class_names: tuple[str, ...] | None = None,
    ) -> "Table":
        """Return the images of the rows of a split; UsageError as `HuggingFace`.

        Args:
            key: configuration key of the split, for errors.
            split: name of the split.
            data: its rows.
            classes: whether to read classes.
            class_names: classes of the training split; None: as found.
        """
        image = self._image_column(data.features)
        label = self._label_column(data.features) if classes else _Label(None)
        names, labels, missing = None, None, label.missing
        if label.name is not None:
            values = data.select_columns([label.name])[:][label.name]
            feature = data.features[label.name]
            try:
                names, labels = numbered(values, getattr(feature, "names", None), class_names)
            except FormatError as error:
                raise UsageError("dataset.label", label.name, str(error)) from error
            if labels is None:
                missing = f"the labels of {key}={split} are hidden"
        caption = self._caption_column(data.features)
        captions = None if caption is None else CaptionColumn(data.select_columns([caption]), caption)
        with self._reported(key, split):
            data = data.select_columns([image]).cast_column(image, library().Image(decode=False))
        names = names if labels is not None else None
        return Table(split, data, image, labels, names, missing, self.origin(), captions)

    def origin(self) -> Origin:
        """Return the places of the dataset's own files."""
        from huggingface_hub import constants

        config = library().config
        caches = config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH
        return origin(self.path, map(Path, (*caches, constants.HF_HUB_CACHE)))

    def _read(self, key: str, split: str) -> "datasets.Dataset":
        """Return all rows and columns of a split."""
        if self.streams is None:
            return self._opened(key, split, streaming=False)
        settings = repr((self.path, self.name, self.revision, self.builder, split, self.max_images))
        folder = self.streams / sha256(settings.encode()).hexdigest()[:16]
        if not _finished(folder):
            with locked(folder):  # one process downloads, the others wait
                if not _finished(folder):
                    self._download(folder, key, split)
        with self._reported(key, split):
            return library().concatenate_datasets(
                [library().Dataset.from_file(str(file)) for file in _finished(folder)]
            )

    def _download(self, folder: Path, key: str, split: str) -> None:
        """Store the first rows of a split, with all columns, in a folder."""
        features = self.stream(key, split).features
        with self._reported(key, split):
            # The library hashes the arguments, so they are plain data: it cannot hash every stream.
            library().Dataset.from_generator(
                _rows,
                features=features,
                gen_kwargs={"source": self, "key": key, "split": split},
                cache_dir=str(folder),
            )

    def stream(self, key: str, split: str) -> Any:
        """Return the first rows of a split as a stream, with the bytes or paths of images."""
        stream = self._opened(key, split, streaming=True).take(self.max_images)
        if stream.features is None:
            problem = "this dataset has no column types"
            raise UsageError("dataset.streaming", True, problem, "set dataset.streaming=false")
        if isinstance(stream, library().Dataset):  # of save_to_disk
            stream = stream.to_iterable_dataset()
        return stream.decode(False)  # neither images nor sounds, which may name files elsewhere

    def _is_remote(self) -> bool:
        """Whether the dataset is a URL or on the Hub."""
        return "://" in self.path or not (
            Path(self.path).expanduser().exists() or set(self.path) & set("*?[")
        )

    def _opened(self, key: str, split: str, streaming: bool) -> Any:
        where = Path(self.path).expanduser()
        is_pattern = "://" not in self.path and bool(set(self.path) & set("*?["))
        is_file = where.is_file() or is_pattern or "://" in self.path
        if is_pattern and not fsspec.filesystem("file").glob(str(where)):
            raise UsageError("dataset.path", self.path, "no file has such a name", "correct the pattern")
        is_hub = not is_file and not where.is_dir()
        for name, value in {"name": self.name, "revision": self.revision}.items():
            if value is not None and is_file | (name == "revision" and not is_hub):
                raise UsageError(f"dataset.{name}", value, "applies to datasets of the Hub", "leave it out")
        if is_hub and not HUB_NAME.fullmatch(self.path):
            raise UsageError(
                "dataset.path",
                self.path,
                "no such file or folder",
                "give one, or a name on the Hub: owner/name",
            )
        if is_hub and self.builder is not None:
            raise UsageError("dataset.builder", self.builder, "applies to files and folders", "leave it out")
        if any((where / name).is_file() for name in SAVED):
            return self._saved(where, key, split)
        settings: dict[str, Any] = {"split": split, "streaming": streaming}
        path = str(where) if where.exists() else self.path
        if is_file:
            builder = self.builder or BUILDERS.get(Path(self.path).suffix.lower())
            if builder is None:
                raise UsageError(
                    "dataset.path", self.path, "not a .parquet, .tar or .arrow file", "set dataset.builder"
                )
            settings |= {"path": builder, "data_files": {split.partition("[")[0]: path}}
        elif self.builder is not None:
            settings |= {"path": self.builder, "data_dir": str(where.resolve())}
        else:
            settings |= {"path": path, "name": self.name, "revision": self.revision}
        with self._reported(key, split):
            return library().load_dataset(**settings)

    def _saved(self, folder: Path, key: str, split: str) -> "datasets.Dataset":
        """Return a split in a folder of `save_to_disk`."""
        with self._reported(key, split):
            saved = library().load_from_disk(str(folder))
        splits = {str(saved.split or split): saved} if isinstance(saved, library().Dataset) else dict(saved)
        if split not in splits:
            raise UsageError(key, split, "no such split", f"choose from {', '.join(splits)}")
        return splits[split]

    def _image_column(self, features: "datasets.Features") -> str:
        images = [name for name, feature in features.items() if isinstance(feature, library().Image)]
        if self.image is not None:
            if self.image not in features:
                raise UsageError(
                    "dataset.image", self.image, "no such column", f"choose from {_listed(features)}"
                )
            return self.image
        if len(images) != 1:
            problem = "there are several columns of images" if images else "there is no column of images"
            raise UsageError("dataset.image", None, problem, f"choose from {_listed(images or features)}")
        return images[0]

    def _label_column(self, features: "datasets.Features") -> "_Label":
        if self.label is not None:
            if self.label not in features:
                raise UsageError(
                    "dataset.label", self.label, "no such column", f"choose from {_listed(features)}"
                )
            return _Label(self.label)
        found = [name for name, feature in features.items() if isinstance(feature, library().ClassLabel)]
        if len(found) == 1:
            return _Label(found[0])
        some = f"the columns {_listed(found)} have classes" if found else "no column has the type ClassLabel"
        return _Label(None, f"{some}; name one with dataset.label")

    def _caption_column(self, features: "datasets.Features") -> str | None:
        if self.caption is None:
            return next((name for name in CAPTION_COLUMNS if _is_text(features.get(name))), None)
        if self.caption not in features:
            problem = "no such column"
            raise UsageError("dataset.caption", self.caption, problem, f"choose from {_listed(features)}")
        if not _is_text(features[self.caption]):
            texts = [name for name, feature in features.items() if _is_text(feature)]
            problem = "has no texts"
            remedy = f"choose from {_listed(texts)}" if texts else "leave it out"
            raise UsageError("dataset.caption", self.caption, problem, remedy)
        return self.caption

    @contextmanager
    def _reported(self, key: str, split: str) -> Iterator[None]:
        """Report errors of the library in one line, with the key that they are about."""
        # These log each attempt without a network, and errors that are raised too.
        loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        bars = not library().are_progress_bars_disabled()
        if bars and not self._is_remote():  # downloads show their progress
            library().disable_progress_bars()
        try:
            yield
        except UsageError:
            raise
        except Exception as error:  # of many types: of the library, of Arrow, of archives, of the network
            raise self._reason(error, key, split) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                library().enable_progress_bars()

    def _reason(self, error: Exception, key: str, split: str) -> Exception:
        first: BaseException = error
        while first.__cause__ is not None:  # the library wraps errors of files
            first = first.__cause__
        if isinstance(first, UsageError):
            return first
        if isinstance(first, OSError) and first.errno in CANNOT_WRITE:
            return MachineError(f"{first}; free some space, or set HF_HOME to a folder on another disk")
        text = str(error)
        if isinstance(error, ConnectionError) or "Couldn't reach" in text:
            problem = "no such file or folder here, and the Hugging Face Hub cannot be reached for a dataset"
            home = library().config.HF_CACHE_HOME
            remedy = (
                f"run diffuse data fetch with a network and copy {home}, or give a folder of save_to_disk"
            )
            return UsageError("dataset.path", self.path, problem, remedy)
        named = ", ".join(re.findall(r"'([^']+)'", text.partition("[")[2]))
        if text.startswith("Unknown split"):
            return UsageError(key, split, "no such split", f"choose from {named}")
        if text.startswith(("Config name is missing", "BuilderConfig")):
            problem = (
                "the dataset has several configurations" if self.name is None else "no such configuration"
            )
            return UsageError("dataset.name", self.name, problem, f"choose from {named}")
        return UsageError("dataset.path", self.path, f"cannot be read ({reason(first)})")


class _Label(NamedTuple):
    """Column of the classes, or the reason why there is none."""

    name: str | None
    missing: str = ""


class CaptionColumn(NamedTuple):
    """The captions of a split; can be pickled."""

    data: "datasets.Dataset"
    column: str

    def read(self) -> ReadCaptions:
        """Return the captions of each image; UsageError if no image has one."""
        return numbered_captions(
            self.data[:][self.column], "dataset.caption", self.column, "choose another column"
        )


class Table(NamedTuple):
    """The images of a split; can be pickled."""

    split: str
    data: "datasets.Dataset"
    image: str
    """Column of the images."""
    labels: Tensor | None
    """Class of each image, int64 [N], or None without classes."""
    class_names: tuple[str, ...] | None
    missing_classes: str
    origin: Origin
    """Places of image files that the table names."""
    captions: "CaptionColumn | None" = None

    def content(self, row: int) -> bytes:
        """Return the bytes of an image file; FormatError or OSError if it cannot be read."""
        return self.origin.content(self.data[row][self.image])


def numbered(
    values: list[Any], names: list[str] | None, among: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Tensor | None]:
    """Return the class names of a column, and the labels, int64 [N]; None if all are hidden.

    Args:
        values: integers, or texts.
        names: names of the classes 0..K - 1, if the column has them.
        among: class names of the training split; None: as found.

    Raises:
        FormatError: the values are not classes, or not among these.
    """
    hidden = [row for row, value in enumerate(values) if value is None or (names is not None and value == -1)]
    if len(hidden) == len(values):
        return among or (), None
    if hidden:
        raise FormatError(f"has no class for {counted(len(hidden), 'image')}, for example image {hidden[0]}")
    if all(isinstance(value, str) for value in values):
        found = among or tuple(in_order(set(values)))
        number = {name: label for label, name in enumerate(found)}
        if other := sorted(set(values) - number.keys()):
            raise FormatError(f"has other classes in the validation split: {examples(other)}")
        return found, torch.tensor([number[value] for value in values])
    if not all(isinstance(value, int) for value in values):
        raise FormatError(f"has values such as {values[0]!r:.80}; classes are integers or texts")
    if min(values) < 0 or max(values) >= MOST_CLASSES:
        raise FormatError(
            f"has the labels {min(values)} to {max(values)}; must be in 0 to {MOST_CLASSES - 1}"
        )
    found = tuple(names) if names is not None else among or tuple(map(str, range(max(values) + 1)))
    if among is not None and found != among:
        raise FormatError("has other classes in the validation split")
    if max(values) >= len(found):
        raise FormatError(f"has the value {max(values)}, and there are {len(found)} classes")
    return found, torch.tensor(values, dtype=torch.int64)


def class_remarks(name: str, feature: Any, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return a line about the classes of a named column; integers without names of classes may be numbers."""
    line = f"dataset.label: {name}: {len(class_names)} classes"
    if not hasattr(feature, "names") and "int" in str(getattr(feature, "dtype", "")):
        line += f", one for each integer; dataset.label={{{name}: number}} makes it a number"
    return (line,)


def library() -> ModuleType:
    """Import `datasets`; UsageError with the install command if missing."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UsageError(
            "dataset",
            "huggingface",
            "needs the package datasets",
            "install it: pip install 'diffuse-cli[hf]'",
        ) from error
    return datasets


def _rows(source: Source, key: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield the first rows of a split with the bytes of all images."""
    stream = source.stream(key, split)
    images = [name for name, feature in stream.features.items() if isinstance(feature, library().Image)]
    origin = source.origin()
    for row in stream:
        yield row | {name: {"bytes": origin.content(row[name]), "path": None} for name in images}


def _finished(folder: Path) -> list[Path]:
    """Return the complete files of a stream; the library writes them into a folder `.incomplete` first."""
    files = sorted(folder.rglob("*.arrow"))
    return [file for file in files if not any(part.endswith(".incomplete") for part in file.parts)]


def _is_text(feature: Any) -> bool:
    """Return whether a column has texts, or lists of texts."""
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _listed(names: Any) -> str:
    return ", ".join(names)


def source_name(path: str) -> str:
    """Return the name of a dataset in tables and file names: of the last part of its path that has letters."""
    parts = [part for part in Path(path).parts if not set(part) & set("*?[")]
    return Path(parts[-1]).stem if parts else "images"
