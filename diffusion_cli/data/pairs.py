"""Pairs of images: a target, which the model generates, and a source, which it is conditioned on."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.data.attributes import Chosen
from diffusion_cli.data.base import Dataset, Images, Split
from diffusion_cli.data.captions import Source
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import RULES
from diffusion_cli.data.folder import Folder
from diffusion_cli.data.image_sources import PairedImages
from diffusion_cli.data.labels import composed, read
from diffusion_cli.data.masks import mask_files
from diffusion_cli.data.survey import headers_of
from diffusion_cli.data.text_tables import read_table
from diffusion_cli.data.volume_decoder import VolumeDecoder
from diffusion_cli.errors import FormatError, UsageError, examples
from diffusion_cli.formats import Range
from diffusion_cli.formats.volume import read_volume

COLUMNS = ("source", "target")
OF_SOURCE = {
    "dataset.path": "dataset.source",
    "dataset.range": "dataset.source_range",
    "dataset.channels": "dataset.source_channels",
}
"""Keys of the sources, by those of a folder alone."""
GivenRange = Range | list[Range] | Literal["window"] | None


class Pairs(Dataset):
    """Pairs of image files: targets in one folder or ZIP archive, sources of the same names in another.

    A source has the name of its target up to the suffix; see `Folder` for the files and formats of each side. Classes,
    attributes and captions are those of the targets. Both sides are cropped and resized to one size. Their proportions
    must agree within one pixel. A table (.csv) with the columns `source` and `target` pairs files by other names, below
    its folder; a source may have several targets, which are all for training or all for validation. The names of the
    sources decide which, without a table those of the targets.

    Args:
        data_dir: folder of downloaded datasets, for the copy of a URL.
        rules: version of the rules that convert files to images; see `Folder`.
        path: folder or .zip of the targets, or its URL, or the table.
        source: folder or .zip of the sources, or its URL; None: as the table states.
        resolution: size N for NxN images, or [H, W], or [D, H, W] for volumes.
        channels: number of channels of the targets.
        source_channels: number of channels of the sources; None: as of the targets.
        range: values of the targets that become -1 and 1; see `Folder`.
        source_range: values of the sources that become -1 and 1; None: for volumes as `range`, for images the whole
            range of their bit depth.
        depth: `auto`: as in the first file of each side; 8: reduce to 8 bits.
        labels: source of the classes; see `Folder`.
        label: columns that a model is conditioned on; see `Folder`.
        captions: source of the captions; see `Folder`.
        background: colour behind transparent pixels of 8-bit images.
        flip: whether training may flip both images of a pair horizontally; None: as in `Folder`.
        val_fraction: fraction of the pairs for validation, in [0, 1).
        group: groups of targets that stay in one split; see `Folder`.
        in_memory: whether to decode all images once and keep them in memory; None: if they fit.
        num_workers: worker processes that read images from disk.

    Raises:
        UsageError: as `Folder`, for either side; an image has no partner; or the table is malformed. Reading raises it
            for pairs with other proportions.
    """

    def __init__(
        self,
        data_dir: str,
        rules: int = RULES,
        *,
        path: str,
        source: str | None = None,
        resolution: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=3)],
        channels: PositiveInt = 3,
        source_channels: PositiveInt | None = None,
        range: Range | list[Range] | Literal["window"] | None = None,
        source_range: Range | list[Range] | Literal["window"] | None = None,
        depth: Literal["auto", 8] = "auto",
        labels: Literal["auto", "folders", "csv", "none"] = "auto",
        label: Chosen = None,
        captions: Source = "auto",
        background: Literal["white", "black"] = "white",
        flip: bool | None = None,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        group: str | None = None,
        in_memory: bool | None = None,
        num_workers: NonNegativeInt = 4,
    ) -> None:
        super().__init__(data_dir)
        places = _places(path, source)
        both: dict[str, Any] = {
            "resolution": resolution,
            "depth": depth,
            "background": background,
            "in_memory": in_memory,
        }
        self.targets = Folder(
            data_dir, rules, places.targets,
            path=places.path, channels=channels, range=range, labels=labels, label=label, captions=captions,
            flip=flip, val_fraction=val_fraction, group=group, num_workers=num_workers, **both,
        )  # fmt: skip
        if source_range is None and isinstance(self.targets.decoder, VolumeDecoder):
            source_range = range
        self._keys = OF_SOURCE if source else {**OF_SOURCE, "dataset.path": "dataset.path"}
        with self._about_sources():
            self.sources = Folder(
                data_dir, rules, places.sources,
                path=places.source, channels=source_channels or channels, range=source_range, labels="none",
                captions="none", flip=False, val_fraction=0.0, num_workers=num_workers, **both,
            )  # fmt: skip
        self.partners = self._by_table(places.partners) if places.partners else self._by_name(places.source)
        if places.partners:
            self._split_by_sources(group)
        self.num_groups = self.targets.num_groups
        self.name = Path(path).stem if source is None else self.targets.name
        self.shape, self.form, self.rules = self.targets.shape, self.targets.form, self.targets.rules
        self.class_names, self.missing_classes = self.targets.class_names, self.targets.missing_classes
        self.attributes = self.targets.attributes
        self.captions, self.missing_captions = self.targets.captions, self.targets.missing_captions
        self.flip, self.flips_captioned = self.targets.flip, self.targets.flips_captioned
        self.num_workers = num_workers
        self.condition_channels = self.sources.shape[0]

    def _by_table(self, partners: Mapping[str, str]) -> dict[str, str]:
        """Return the source of each target by a table of composed names."""
        named = {composed(name): name for name in self.sources.files}
        return {name: named[partners[composed(name)]] for name in self.targets.files}

    def _split_by_sources(self, group: str | None) -> None:
        """Keep the targets of a source in one split; UsageError if they are in several groups."""
        sources = [self.partners[name] for name in self.targets.files]
        if self.targets.groups is None:
            self.targets.split_names = sources
            return
        group_of = dict(zip(sources, self.targets.groups.names, strict=True))
        if several := [
            source
            for source, name in zip(sources, self.targets.groups.names, strict=True)
            if group_of[source] != name
        ]:
            problem = f"the targets of {examples([*dict.fromkeys(several)])} are in several groups"
            raise UsageError("dataset.group", group, problem, "give all targets of a source one group")

    def _by_name(self, source: str) -> dict[str, str]:
        """Return the source of each target by names without suffix; UsageError for an image without a partner."""
        targets, sources = self.targets.files, self.sources.files
        try:
            found = mask_files(targets, sources, "source")
        except FormatError as error:
            raise UsageError("dataset.source", source, str(error)) from error
        if rest := sorted({*sources} - {*found}):
            problem = f"has no target for {examples(rest)}"
            raise UsageError(
                "dataset.source", source, problem, "add targets with their names, or remove them"
            )
        return dict(zip(targets, found, strict=True))

    @contextmanager
    def _about_sources(self) -> Iterator[None]:
        """Turn the keys of errors about a folder into those of the sources."""
        try:
            yield
        except UsageError as error:
            raise error.renamed(self._keys) from error

    def load(self, split: Split) -> Images:
        targets, sources = self._files(split)
        beside = partial(sources.loaded, self.targets.in_memory)
        images = targets.loaded(self.targets.in_memory)
        return images.with_conditions({**images.conditions, IMAGE: PairedImages(beside)})

    def stream(self, split: Split) -> Images:
        targets, sources = self._files(split)
        return targets.with_conditions({**targets.conditions, IMAGE: PairedImages(sources)})

    def _files(self, split: Split) -> tuple[FileImages, FileImages]:
        targets = self.targets.stream(split)
        names = [self.partners[name] for name in targets.names]
        return targets, _Sources(self.sources, names, targets, self._keys["dataset.path"])

    def remarks(self) -> list[str]:
        remarks = [*self.targets.remarks(), *_renamed(self.sources.remarks(), self._keys["dataset.path"])]
        return [*dict.fromkeys(remarks)]  # by a table, both sides may lie in one folder


class _Places(NamedTuple):
    """Where targets and sources lie."""

    path: str
    source: str
    targets: frozenset[str] | None = None
    """Names of the targets below `path`; None: all files."""
    sources: frozenset[str] | None = None
    partners: Mapping[str, str] | None = None
    """The source of each target; None: by names."""


def _places(path: str, source: str | None) -> _Places:
    """Return the places of the images; UsageError unless there are sources, or a table that is well formed."""
    if not path.lower().endswith(".csv"):
        if source is None:
            remedy = "give their folder or .zip, or a .csv with the columns source and target as dataset.path"
            raise UsageError("dataset.source", None, "the images need sources", remedy)
        return _Places(path, source)
    if source is not None:
        raise UsageError("dataset.source", source, f"conflicts with the table {path}", "leave it out")
    table = Path(path).expanduser()
    try:
        partners = _partners(read(table.parent, table.name))
    except FormatError as error:
        raise UsageError("dataset.path", path, str(error), error.remedy) from error
    root = str(table.parent)
    return _Places(root, root, frozenset(partners), frozenset(partners.values()), partners)


def _partners(data: bytes) -> dict[str, str]:
    """Return the source of each target of a table; FormatError unless each target has one row."""
    table = read_table(data, "pairs.csv", COLUMNS)
    if len(table.columns) < len(COLUMNS):
        start = ",".join(table.header)[:80]
        problem = (
            f"needs a header line with one column source and one column target, but begins with {start!r}"
        )
        raise FormatError(problem, "add 'source,target'")
    rows = zip(*(table.columns[name] for name in COLUMNS), strict=True)
    named = [(composed(source), composed(target)) for source, target in rows]
    if empty := [", ".join(row) for row in named if not all(row)]:
        raise FormatError(f"has an empty cell in {examples(empty)}", "complete these rows")
    if repeated := [name for name, count in Counter(target for _, target in named).items() if count > 1]:
        raise FormatError(f"has more than one row for {examples(repeated)}", "keep one row per target")
    return {target: source for source, target in named}


def _renamed(remarks: list[str], key: str) -> Iterator[str]:
    """Yield remarks about the sources with the key of their place; a smaller source is no reason for one."""
    for line in remarks:
        if not line.startswith("dataset.resolution="):
            yield line.replace("dataset.path=", f"{key}=", 1)


class _Sources(FileImages):
    """The sources of some targets; the first read of a row in each process compares the proportions of the pair."""

    def __init__(self, folder: Folder, names: list[str], targets: FileImages, key: str) -> None:
        super().__init__(folder.path, names, None, folder.decoder, key, folder.parts)
        self.targets = targets
        self._compared: set[int] = set()

    def contents(self, row: int) -> list[bytes]:
        contents = super().contents(row)
        if row in self._compared:
            return contents
        sizes = _volume_size if len(self.shape) == 4 else _image_size
        own, other = sizes(contents), sizes(self.targets.contents(row))
        if own and other and not same_proportions(own, other):
            found, wanted = (" x ".join(map(str, reversed(size))) for size in (own, other))
            problem = f"has {found} pixels, and its target {self.targets.title(row)} {wanted}"
            raise FormatError(f"{problem}; crop them to the same proportions")
        self._compared.add(row)
        return contents

    def prepare(self) -> None:
        super().prepare()
        self.targets.prepare()


def same_proportions(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether two sizes differ by a scale alone, within one pixel of the larger image."""
    within = max(*one, *other)
    return all(abs(one[i] * other[j] - one[j] * other[i]) < within for i in range(len(one)) for j in range(i))


def _image_size(contents: list[bytes]) -> tuple[int, ...] | None:
    """Return height and width of an image file; None for a broken one, which is reported where it is decoded."""
    return next((header.size for header in headers_of([("", contents[0])])), None)


def _volume_size(contents: list[bytes]) -> tuple[int, ...] | None:
    """Return depth, height and width of a volume; None for a broken one."""
    try:
        return read_volume(*contents).values.shape[1:]
    except ValueError:
        return None
