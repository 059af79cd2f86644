"""Images in a folder or ZIP archive of image files."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import Conditions
from diffusion_cli.data import survey
from diffusion_cli.data.attributes import Attributes, Chosen, Column, attributes, kinds_of
from diffusion_cli.data.base import (
    Dataset,
    Images,
    Split,
    named_mask,
    named_remarks,
    split_rows,
    spread,
)
from diffusion_cli.data.captions import CaptionFiles, CaptionTable, Source
from diffusion_cli.data.decoding import (
    HighDepthDecoder,
    ImageDecoder,
    image_decoder,
)
from diffusion_cli.data.encoded import range_remarks
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import (
    RULES,
    file_names,
    ignored_files,
    image_files,
    mask_names,
    own_images,
    source_name,
    volume_files,
)
from diffusion_cli.data.groups import FileGroups, Groups
from diffusion_cli.data.label_tables import file_columns
from diffusion_cli.data.labels import class_labels, composed
from diffusion_cli.data.labels import read as entry
from diffusion_cli.data.masks import MaskedDecoder, divided, mask_files, masked_decoder
from diffusion_cli.data.resampling import KEY as SPACING_KEY
from diffusion_cli.data.resampling import Placement, simple_itk, spacing_of
from diffusion_cli.data.unreadable import Unreadable
from diffusion_cli.data.volume_decoder import VolumeDecoder, order_remarks, placement
from diffusion_cli.errors import FormatError, UsageError, class_name, examples
from diffusion_cli.formats import (
    Dicom,
    Range,
    Uint8Image,
    Volume,
    has_own_numbers,
)
from diffusion_cli.formats.dicom import SUFFIXES as SCANS
from diffusion_cli.formats.dicom_reader import is_dicom
from diffusion_cli.formats.files import FIRST_SUFFIXES
from diffusion_cli.formats.files import SUFFIXES as PICTURES
from diffusion_cli.formats.pixel_readers import read_numbers
from diffusion_cli.formats.range_check import LOOKED_AT
from diffusion_cli.formats.ranged import Finite
from diffusion_cli.formats.volume import SUFFIXES as VOLUMES
from diffusion_cli.formats.volume import Held, read_volume
from diffusion_cli.system.remote import local_copy
from diffusion_cli.system.untrusted import reason

First = TypeVar("First")
Side = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Folder(Dataset):
    """Image files of `file_names.SUFFIXES` in a folder or ZIP archive, at any depth, resized to one size.

    Links are followed, also out of the folder, and every real folder is visited once. Archives are read in place.
    Hidden files, `__MACOSX` and figures that this program wrote are skipped. A hash of its name, or of its group's,
    decides whether an image is for validation, so it stays in its split when files are added or removed.

    Classes, by `labels`:

    - `folders`: the first-level folders (of the deepest folder that contains all images), in alphabetical order. All
      images must lie in two or more of them.
    - `csv`: the distinct labels of `labels.csv`, in numeric order if all are integers, else in alphabetical order.
      The file is UTF-8 and lies at the top, or in another folder that contains all images; the topmost is used. It
      has a header line, and one row per image with the columns `file` (relative to its folder, with `/`) and `label`.
    - `none`: no classes.
    - `auto`: `csv` if there is such a file, else `folders` if they give classes, else `none`.

    With `label`, the images have the attributes of these columns of `label_tables.TABLES` instead; see `attributes`.

    Captions, by `captions`, are read when a model is trained on them:

    - `txt`: each line of the UTF-8 file with the image's name and the suffix `.txt`, beside the image.
    - `table`: the column `text` or `caption` of tables `metadata.csv`, `metadata.jsonl`, `labels.csv` or
      `labels.jsonl` in any folder. The column `file_name` or `file` names images relative to the table. Several rows
      of an image, or a list in JSON, are several captions.
    - `none`: no captions.
    - `auto`: `table` if there is such a column, else `txt`.

    See `ImageDecoder` for 8-bit images, `HighDepthImage` for other depths, ranges and channels, `VolumeDecoder` for
    volumes and `MaskedDecoder` for masks. The first file determines the format.

    Args:
        data_dir: folder of downloaded datasets, for the copy of a URL.
        rules: version of the rules that convert files to images; a run keeps the version that it was started with.
        only: names of the files to read, relative to `path`; None: all.
        path: folder or .zip file, or its URL.
        masks: folder of masks (in an archive: a folder inside it), which become an additional channel; for 2D
            images except DICOM.
        resolution: size N for NxN images, or [H, W], or [D, H, W] for volumes.
        channels: number of channels without masks.
        range: [low, high], the values that become -1 and 1, or one pair per channel; `window`: the display window
            of the first DICOM file; None: the whole range of an integer dtype. Volumes need it.
        depth: `auto`: as in the first file; 8: reduce to 8 bits.
        labels: source of the classes.
        label: columns that a model is conditioned on: names, or types by name; None: the classes by `labels`.
        captions: source of the captions.
        background: colour behind transparent pixels of 8-bit images.
        spacing: sides of the voxels of a volume along D, H and W, or one for all, in mm: volumes are resampled to
            these, and cropped or filled around their centre to the resolution; None: cropped and resized as they are.
        fill: value in `range` of voxels outside a volume resampled to the spacing; None: the low end of `range`.
        flip: whether training may flip images horizontally; None: yes, except for DICOM, volumes, images with
            attributes besides the class, and models of captions.
        val_fraction: fraction of the images for validation, in [0, 1).
        group: groups of images that stay in one split: a column of a table, a regular expression with the group's
            name in parentheses, searched in the path of a file below `path`, or `PatientID` of DICOM headers; None:
            each image by itself.
        unreadable: `error`, or `skip` files that cannot be decoded. They are found by decoding all images once, before
            the first use, and listed in `data_dir`.
        in_memory: whether to decode all images once and keep them in memory; None: if they fit.
        num_workers: worker processes that read images from disk.

    Raises:
        UsageError: the path is missing, not an archive, or has no images; requested labels or columns are missing; or
            a table does not match the images. Reading raises it for files that cannot be decoded.
    """

    def __init__(
        self,
        data_dir: str,
        rules: int = RULES,
        only: Collection[str] | None = None,
        *,
        path: str,
        masks: str | None = None,
        resolution: PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=3)],
        channels: PositiveInt = 3,
        range: Range | list[Range] | Literal["window"] | None = None,
        depth: Literal["auto", 8] = "auto",
        labels: Literal["auto", "folders", "csv", "none"] = "auto",
        label: Chosen = None,
        captions: Source = "auto",
        background: Literal["white", "black"] = "white",
        spacing: Side | Annotated[list[Side], Field(min_length=3, max_length=3)] | None = None,
        fill: Finite | None = None,
        flip: bool | None = None,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        group: str | None = None,
        unreadable: Literal["error", "skip"] = "error",
        in_memory: bool | None = None,
        num_workers: NonNegativeInt = 4,
    ) -> None:
        super().__init__(data_dir)
        self.given, self.path = path, local_copy(path, self.data_dir)
        self.name = source_name(self.path)
        self.val_fraction = val_fraction
        self.in_memory = in_memory
        self.num_workers = num_workers
        sizes = resolution if isinstance(resolution, list) else [resolution, resolution]
        if len(sizes) == 3 and masks is not None:
            raise UsageError("dataset.masks", masks, "not supported for volumes", "leave it out")
        if len(sizes) == 3 and depth != "auto":
            raise UsageError("dataset.depth", depth, "not supported for volumes", "leave it out")
        if spacing is not None and len(sizes) == 2:
            raise UsageError(
                SPACING_KEY, spacing, "applies to volumes", "set dataset.resolution=[depth,height,width]"
            )
        if fill is not None and spacing is None:
            raise UsageError("dataset.fill", fill, f"has no effect without {SPACING_KEY}", "leave it out")
        if spacing is not None:
            simple_itk()
        self.spacing = spacing
        self.rules = rules
        self.unreadable = unreadable
        self._skipped: Unreadable | None = None
        self.split_names: list[str] | None = None  # of each file, which decide its split; None: its own
        self.parts: dict[str, list[str]] = {}  # files of a row, if it has several: image and mask, or slices
        self._volume_remarks: list[str] = []
        ignored: list[str] = []
        localizers: list[str] = []
        names = file_names(self.path, rules=rules, given=path)
        self.only = only
        if len(sizes) == 3:
            found, localizers = volume_files(self.path, names, path, self.data_dir)
            self.files = self._named([*found])
            self.parts = {name: found[name] for name in self.files}
            if localizers:
                count = "1 localizer is" if len(localizers) == 1 else f"{len(localizers)} localizers are"
                ignored = [f"dataset.path={path}: {count} skipped, such as {localizers[0]}"]
            self.form, self.decoder = self._volumes(sizes, channels, range, fill)
        elif masks is None:
            self.files = self._chosen(names)
            self.decoder = self._images((channels, sizes[0], sizes[1]), range, depth, background)
            self.form = self.decoder.form if isinstance(self.decoder, HighDepthDecoder) else Uint8Image()
        else:
            beside, names, ignored = mask_names(self.path, masks, names, self._pictures)
            self.files = self._chosen(names)
            own, labelled = divided(range, channels)
            decoder = self._images((channels, sizes[0], sizes[1]), own, depth, background)
            self.decoder = self._masked(masks, beside, decoder, labelled)
            self.form = self.decoder.form
        self.has_masks = masks is not None
        read_too = VOLUMES if len(sizes) == 3 else (*self._pictures, *SCANS)
        chosen = {*self.files, *localizers}.union(*self.parts.values())
        rest = [name for name in names if name not in chosen]
        self._passed_over = [*ignored_files(self.path, rest, "dataset.path", read_too), *ignored]
        self.shape = self.decoder.shape
        self.chosen: Attributes | None = None
        self.labels: Tensor | None = None
        self.groups: Groups | None = None
        groups = None if group is None else FileGroups.of(self.path, names, self.files, self.parts, group)
        columns: dict[str, Column] = {}
        if label is None:
            classes = class_labels(self.path, names, self.files, labels, rules)
            self.class_names, self.labels = classes.names, classes.labels
            self.missing_classes, self._class_remarks = classes.missing, classes.remarks
        else:
            columns = self._columns(names, label, labels)
        if unreadable == "skip":
            kept = self._skip_unreadable()
            columns = {name: Column([column.cells[row] for row in kept]) for name, column in columns.items()}
            groups = None if groups is None else groups.kept(kept)
        if groups is not None:
            self.groups = groups.split(val_fraction, self.files)
            self.split_names, self.num_groups = self.groups.names, self.groups.counts()
        if label is not None:
            self._choose(columns, label)
        # Anatomy is not symmetric, and attributes and captions may name left and right.
        self.flips_captioned = flip is not None or rules < 4
        undirected = rules < 4 or Conditions(attributes=self.attributes).only_classes
        by_default = undirected and not isinstance(self.form, Dicom | Volume)
        self.flip = by_default if flip is None else flip
        texts = CaptionFiles(self.path, names, self.files, captions, path)
        self.missing_captions = texts.missing()
        self.captions = not self.missing_captions
        self._texts = CaptionTable(texts.read)

    def _columns(self, names: list[str], label: Chosen, labels: str) -> dict[str, Column]:
        """Return the chosen columns of the images."""
        if labels in ("folders", "none"):
            raise UsageError("dataset.labels", labels, "contradicts dataset.label", "leave one of them out")
        return file_columns(self.path, names, self.files, kinds_of(label))

    def _choose(self, columns: dict[str, Column], label: Chosen) -> None:
        """Set the attributes and the classes."""
        train = self._rows("train")
        self.chosen = attributes(columns, kinds_of(label), train, self.files.__getitem__)
        self.class_names, self.labels = self.chosen.class_names, self.chosen.labels
        self.attributes, self.missing_classes = self.chosen.descriptions, self.chosen.missing_classes
        self._class_remarks = self.chosen.remarks

    def _rows(self, split: Split) -> Tensor:
        """Return the rows of a split, int64."""
        names = self.split_names or self.files
        return split_rows(named_mask(names, self.val_fraction), self.val_fraction, split)

    def _skip_unreadable(self) -> list[int]:
        """Leave out the files that cannot be decoded, and return the rows that are left; UsageError if none is."""
        images = FileImages(self.path, self.files, None, self.decoder, parts=self.parts)
        self._skipped = Unreadable.of(images, self.data_dir, images.state())
        titles = [images.title(row) for row in range(len(images))]
        kept = [row for row, title in enumerate(titles) if title not in self._skipped.reasons]
        if not kept:
            first = f"{titles[0]}: {self._skipped.reasons[titles[0]]}"
            raise UsageError(
                "dataset.path", self.given, f"none of the {len(self.files)} files is readable ({first})"
            )
        self.files = [self.files[row] for row in kept]
        self.labels = None if self.labels is None else self.labels[kept]
        return kept

    def _chosen(self, names: list[str]) -> list[str]:
        """Return the names that are images by the rules, sorted."""
        choose = image_files if self.rules == 1 else own_images
        return self._named(choose(self.path, names, "dataset.path", (*self._pictures, *SCANS), self.given))

    def _named(self, files: list[str]) -> list[str]:
        """Return the files that `only` names; UsageError if one of them is missing."""
        if self.only is None:
            return files
        wanted = {composed(name) for name in self.only}
        found = {composed(name): name for name in files}
        if missing := sorted(wanted - found.keys()):
            problem = f"has no image {examples(missing)}"
            raise UsageError("dataset.path", self.given, problem, "add the files, or correct their names")
        return [name for name in files if composed(name) in wanted]

    @property
    def _pictures(self) -> tuple[str, ...]:
        return FIRST_SUFFIXES if self.rules == 1 else PICTURES

    def _images(
        self,
        shape: tuple[int, int, int],
        given: Range | list[Range] | Literal["window"] | None,
        depth: Literal["auto", 8],
        background: Literal["white", "black"],
    ) -> ImageDecoder | HighDepthDecoder:
        first = b""  # unreadable files are reported together, where pixels are read
        with suppress(ValueError, OSError):
            first = self._first_readable(self.files, self._content)
        try:
            return image_decoder(first, shape, given, depth, background, self.rules)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(
                "dataset.path", self.given, f"cannot use {self.files[0]} ({reason(error)})"
            ) from error

    def _masked(
        self,
        given: str,
        beside: dict[str, str],
        decoder: ImageDecoder | HighDepthDecoder,
        range: Range | None,
    ) -> MaskedDecoder:
        """Return the decoder with masks, and set the files of images and masks."""
        if isinstance(decoder, HighDepthDecoder) and isinstance(decoder.form, Dicom):
            raise UsageError(
                "dataset.masks",
                given,
                "not supported for DICOM",
                "leave it out, or convert the images to TIFF",
            )
        try:
            masks = [beside[name] for name in mask_files(self.files, list(beside))]
            self.parts = {name: [name, mask] for name, mask in zip(self.files, masks, strict=True)}
            return masked_decoder(decoder, self._first_readable(masks, self._content), range)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError("dataset.masks", given, str(error)) from error

    def _volumes(
        self,
        sizes: list[int],
        channels: int,
        range: Range | list[Range] | Literal["window"] | None,
        fill: float | None,
    ) -> tuple[Volume, VolumeDecoder]:
        low, high = range if isinstance(range, list) and len(range) == 2 else (None, None)
        if not (isinstance(low, float | int) and isinstance(high, float | int) and low < high):
            raise UsageError(
                "dataset.range",
                range,
                "volumes need the values [low,high] that become -1 and 1",
                "set it, as in [-1000,1000]",
            )

        target = spacing_of(self.spacing, low if fill is None else fill)
        if fill is not None and not low <= fill <= high:
            raise UsageError(
                "dataset.fill",
                fill,
                f"lies outside dataset.range=[{low:g},{high:g}], to which values are clipped",
                "use a value in the range",
            )

        def volume(name: str) -> tuple[Held, Placement]:
            held = read_volume(*[entry(self.path, part) for part in self.parts[name]])
            try:
                return held, placement(held, sizes, target)
            except ValueError as error:
                raise UsageError(SPACING_KEY, self.spacing, f"{name} {reason(error)}") from error

        try:
            held, place = self._first_readable(self.files, volume)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError("dataset.path", self.given, f"{self.files[0]}: {reason(error)}") from error
        affine = place.affine(held.header.affine)
        form = Volume(low=float(low), high=float(high), **held.header._replace(affine=affine)._asdict())
        clipped = form.remark([held.values])
        self._volume_remarks = [*order_remarks(held, sizes, target), *([clipped] if clipped else [])]
        return form, VolumeDecoder(form, (channels, *sizes), None if target else held.spacing, target)

    def _content(self, name: str) -> bytes:
        """Return the bytes of a picture; FormatError if it cannot be decoded and such files are skipped."""
        data = entry(self.path, name)
        if self.unreadable == "skip" and not _is_whole(data):
            raise FormatError(f"{name} cannot be decoded")
        return data

    def _first_readable(self, names: list[str], read: Callable[[str], First]) -> First:
        """Return what `read` makes of the first file; of the first that it can read, if unreadable ones are skipped.

        If it can read none, its error is that of the first file.
        """
        for name in names if self.unreadable == "skip" else []:
            with suppress(ValueError, OSError):
                return read(name)
        return read(names[0])

    def load(self, split: Split) -> Images:
        return self.stream(split).loaded(self.in_memory)

    def remarks(self) -> list[str]:
        return [
            *(self._skipped.remarks(f"dataset.path={self.path}") if self._skipped else []),
            *self._passed_over,
            *self._volume_remarks,
            *self._class_remarks,
            *named_remarks(self.split_names or self.files, self.val_fraction),
            *(self.groups.remarks() if self.groups else []),
            *self._header_remarks(),
            *range_remarks(self.decoder, self._few()),
        ]

    def _header_remarks(self) -> list[str]:
        key, is_volume = f"dataset.path={self.path}", isinstance(self.form, Volume)
        first = [self.parts.get(name, [name])[0] for name in self.files]
        if is_volume and first[0].lower().endswith(VOLUMES):
            return []
        found = survey.headers(self.path, first)
        val = {first[row] for row in self._rows("val").tolist()}
        patients = [] if self.groups else survey.patient_remarks(key, found, val)
        if is_volume:
            return patients
        decoder = self.decoder.image if isinstance(self.decoder, MaskedDecoder) else self.decoder
        lines = survey.remarks(
            key,
            found,
            len(self.files),
            decoder.shape[1:],
            own_numbers=isinstance(decoder, HighDepthDecoder) and has_own_numbers(decoder.form),
            profiles=self.rules > 1,
        )
        return [*lines, *patients]

    def _few(self) -> Iterator[bytes]:
        """Yield the readable ones of a few evenly spaced files."""
        for row in spread(len(self.files), min(len(self.files), LOOKED_AT)).tolist():
            with suppress(ValueError, OSError):  # reported with the other broken files, where pixels are read
                yield entry(self.path, self.files[row])

    def stream(self, split: Split) -> "FileImages":
        rows = self._rows(split)
        files = [self.files[row] for row in rows.tolist()]
        labels = None if self.labels is None else self.labels[rows]
        images = FileImages(self.path, files, labels, self.decoder, parts=self.parts)
        images.captions = self._texts.rows(rows) if self.captions else None
        return images if self.chosen is None else images.with_conditions(self.chosen.sources(rows))


def _is_whole(data: bytes) -> bool:
    """Return whether the first frame of a picture can be decoded; of DICOM, whether it is such a file."""
    try:
        return is_dicom(data) or bool(read_numbers(data).size)
    except ValueError:
        return False


OF_FILES = ("Folder", "Meshes", "Pairs", "Points", "Signals")
"""Datasets whose files are chosen and converted by rules with a version."""


def with_rules(node: Mapping[str, Any], rules: int) -> dict[str, Any]:
    """Return a dataset's configuration node with the version of the rules that a run was started with."""
    return {**node, "rules": rules} if class_name(node) in OF_FILES else dict(node)
