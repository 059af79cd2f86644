"""Input images of a command: files, or images of the run's dataset."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion_cli.commands.edit_volumes import InputVolume
from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import IMAGE, LABEL
from diffusion_cli.data import (
    Dataset,
    Images,
    VolumeDecoder,
    center_crop_resize,
    central_part,
    file_names,
    placement,
    quantized,
    sample_files,
    spread,
    survey,
    to_model_range,
)
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import ignored_files
from diffusion_cli.data.labels import read as entry
from diffusion_cli.data.listing import MANIFEST, manifests, stem
from diffusion_cli.data.resampling import Spacing
from diffusion_cli.data.series import series
from diffusion_cli.editing import LargerShapes
from diffusion_cli.errors import NO_VALUE, FormatError, Problem, UsageError
from diffusion_cli.formats import (
    HighDepthImage,
    Original,
    RangedImage,
    SampleFormat,
    Shape,
    Signal,
    Uint8Image,
    ValueFormat,
    Volume,
    has_own_numbers,
)
from diffusion_cli.formats.files import flattened, is_gray, opened
from diffusion_cli.formats.pixel_readers import read_numbers
from diffusion_cli.formats.volume import Held, read_volume
from diffusion_cli.runs.migrate import result_name
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.untrusted import Archive, printable, read, reason

MOST_LINES = 10
LONGEST = 200  # bytes of a name
ROUNDING = 1e-6  # half ranges by which a value may lie outside the range without being clipped
OTHER_SPLITS = {"valid": "val", "validation": "val", "test": "val", "training": "train"}
"""Our splits by common names of splits."""
RESERVED = (
    "after",
    "before",
    "grid",
    "grid.png",
    "maps",
    "strip",
    "strip.png",
)  # names that results must not have


class Grid(NamedTuple):
    """The pixels or voxels of an input file before `fit`."""

    sizes: tuple[int, ...]
    """Height and width, or depth, height and width."""
    part: Sequence[tuple[float, float]] | None
    """Start and length, along each axis, of the part that `fit` resizes to the size of the model; None: no `fit`."""
    affine: list[list[float]] | None = None
    """Affine matrix of the voxel positions in a NIfTI file, [3, 4]."""


class Input(NamedTuple):
    """An input image."""

    name: str
    """Unique name for its output files."""
    pixels: Tensor
    """Image as stored, [C, H, W]."""
    form: SampleFormat | None = None
    """Format of its result; None for the format of the model."""
    file: str | None = None
    """Name of its file, relative to the folder or archive that was given; None without a file."""
    grid: Grid | None = None
    """Its pixels before `fit`; None without a file."""
    original: Original | None = None
    """Values of its file, if `pixels` lack some of them by clipping or rounding; None after resizing."""
    clipped: tuple[int, float] = (0, 0.0)
    """Number of values of its file outside the range, and the most by which they are outside."""
    condition: Condition | None = None
    """Its conditions in its dataset, one row; None for files."""
    former_name: str | None = None
    """Name for its output files in earlier versions; None if it is the same."""
    volume: InputVolume | None = None
    """Its file, in whose geometry the result is written; None for files without positions, and for images."""


class FileContent(NamedTuple):
    """Content of an input file."""

    pixels: Tensor
    """Image as stored, [C, H, W]."""
    form: SampleFormat
    """Format of its result."""
    grid: Grid | None = None
    """Its pixels before `fit`."""
    original: Original | None = None
    """Values of the file before clipping and resizing; None if they are not clipped."""
    volume: InputVolume | None = None
    """The file of a volume with positions."""


Complete = Callable[[bytes, str], FileContent]
"""Reads an image and its mask as channels, by the content and name of the image."""


def show_remarks(lines: Iterable[str]) -> None:
    """Print remarks about data on rank 0."""
    for line in lines if Distributed().is_main else ():
        print(printable(f"diffuse: {line}"), file=sys.stderr)


def real_images(
    dataset: Dataset, split: str, count: int | None, conditions: Collection[str] = ()
) -> list[Input]:
    """Return `count` images spread evenly over the `train` or `val` split, or all for None.

    Args:
        dataset: the dataset.
        split: `train` or `val`.
        count: number of images, or None.
        conditions: names of the conditions that the inputs get, if the images have them.
    """
    images, rows = _spread_rows(dataset, split, count)
    stored = images[rows.to(images.device)].cpu()
    known = _conditions(images, rows, stored, conditions)
    pixels = quantized(stored, dataset.form)
    return [
        Input(
            result_name(split, row),
            image,
            **_lost(image, dataset.form, images.original(row)),
            volume=_volume_of(images, row),
            condition=None if known is None else known.rows(torch.tensor([place])),
        )
        for place, (row, image) in enumerate(zip(rows.tolist(), pixels, strict=True))
    ]


def _conditions(images: Images, rows: Tensor, stored: Tensor, names: Collection[str]) -> Condition | None:
    """Return some conditions of rows, stored as images, on the CPU; None if the images have none of them."""
    pixels = to_model_range(stored) if IMAGE in names else torch.empty(0)
    values = {
        name: source.values(rows, pixels, None) for name, source in images.conditions.items() if name in names
    }
    if LABEL in names and LABEL not in values and images.labels is not None:
        values[LABEL] = images.labels[rows.to(images.labels.device)].cpu()
    return Condition(values) if values else None


def conditioned_images(
    dataset: Dataset, split: str, count: int | None, conditions: Collection[str] = ()
) -> list[Input]:
    """Return images as `real_images`, float32 with the channels of their condition images after their own."""
    images, rows = _spread_rows(dataset, split, count)
    pixels = to_model_range(images[rows.to(images.device)])
    condition = images.condition(rows.to(images.device), pixels)
    assert condition is not None
    both = torch.cat([pixels, condition.values[IMAGE]], 1).cpu()
    others = {name: value for name, value in condition.values.items() if name in conditions and name != IMAGE}
    return [
        Input(
            result_name(split, row),
            image,
            condition=Condition(others).rows(torch.tensor([place])) if others else None,
        )
        for place, (row, image) in enumerate(zip(rows.tolist(), both, strict=True))
    ]


def _spread_rows(dataset: Dataset, split: str, count: int | None) -> tuple[Images, Tensor]:
    """Return a split of a dataset, and `count` of its rows, evenly spread; UsageError for an empty split."""
    images = dataset.stream("train" if split == "train" else "val")
    if not len(images):
        raise UsageError("input", split, f"{dataset.name} has no images in this split", "give image files")
    if count is not None and count > len(images):
        show_remarks([f"num_images={count}: input={split} has only {len(images)}"])
    return images, spread(len(images), len(images) if count is None else min(count, len(images)))


def _lost(pixels: Tensor, form: SampleFormat, original: Original | None) -> dict[str, Any]:
    """Return the fields `original` and `clipped` of an input."""
    if original is None or not isinstance(form, ValueFormat):
        return {}
    beyond = form.beyond(original.values)
    clipped = int((beyond > ROUNDING * form.half_range).sum()), float(beyond.max())
    resized = original.resampled or original.values.shape != tuple(pixels.shape)
    if resized or np.array_equal(form.rounded(form.values(pixels)), original.values):
        return {"clipped": clipped}
    return {"original": original, "clipped": clipped}


def read_input(
    given: str | list[str],
    shapes: list[Shape],
    fit: bool,
    count: int | None,
    form: SampleFormat,
    *,
    mask_path: str | None = None,
    complete: Complete | None = None,
    spacing: Spacing | None = None,
) -> list[Input]:
    """Return the images of a file, a folder, a ZIP archive or a list of files.

    Args:
        given: file, folder, archive or list of files.
        shapes: accepted shapes.
        fit: center-crop, resize and convert images to the first of the shapes.
        count: largest number of images, or None.
        form: format of the samples of the model.
        mask_path: path of masks; files in a folder of masks below the given folder are no images.
        complete: reads files that lack the channel of their masks; None for models without such a channel.
        spacing: sides of the voxels of the model; None: those of volumes may be any.

    Raises:
        UsageError: for images of another format or shape; it names each file.
    """
    path, names, parts = _listed(given, form, mask_path)
    names = names[:count]
    if isinstance(form, Uint8Image | HighDepthImage):
        found = survey.headers(path, names)
        show_remarks(survey.remarks("input", found, len(names), own_numbers=has_own_numbers(form)))
    images: list[Input] = []
    lines: list[Problem] = []
    erased: list[str] = []
    with contents(path) as content:
        paths = [PurePosixPath(name) for name in names]
        for file, name, former in zip(
            names,
            _names(paths, stem, _folders(paths, stem)),
            _names(paths, lambda path: path.stem),
            strict=True,
        ):
            try:
                data, *slices = (content(part) for part in parts.get(file, [file]))
                if complete is not None and len(read_numbers(data)) < shapes[0][0]:
                    held = complete(data, file)
                elif isinstance(form, Volume):
                    again = _reader(path, parts.get(file, [file]))
                    held = _volume(read_volume(data, *slices), again, shapes, fit, form, spacing)
                else:
                    held = _decoded(data, shapes, fit, form)
                lost = _lost(held.pixels, held.form, held.original)
                own = None if former == name else former
                images.append(
                    Input(
                        name,
                        held.pixels,
                        held.form,
                        file,
                        held.grid,
                        **lost,
                        former_name=own,
                        volume=held.volume,
                    )
                )
                erased += [file] if isinstance(form, Uint8Image) and _is_erased(data) else []
            except (ValueError, OSError) as error:
                lines.append(Problem("input", path / file, reason(error)))
    raise_problems(lines)
    if erased and mask_path is None:
        place = path if path != Path() else erased[0]
        named = ", ".join(erased[:3]) + (", ..." if len(erased) > 3 else "")
        show_remarks(
            [f"input: transparent parts become white in {named}; edit=inpaint edit.mask={place} paints them"]
        )
    if len({image.pixels.shape for image in images}) > 1:
        sizes = " and ".join(dict.fromkeys(described(image.pixels.shape) for image in images))
        raise UsageError(
            "input", given, f"the images differ in size: {sizes}", "give images of one size, or set fit=true"
        )
    return images


def _is_erased(data: bytes) -> bool:
    """Return whether an image has pixels that are more transparent than opaque."""
    image = opened(data)
    return image.has_transparency_data and bool((np.asarray(image.convert("RGBA"))[..., 3] < 128).any())


def raise_problems(lines: list[Problem]) -> None:
    """Raise UsageError with the first problems, and the number of the others; nothing without a problem."""
    if lines:
        rest = len(lines) - MOST_LINES
        more = [Problem(lines[0].key, NO_VALUE, f"and {rest} more")] if rest > 0 else []
        raise UsageError.several([*lines[:MOST_LINES], *more])


def is_archive(path: Path) -> bool:
    """Return whether a path is a ZIP archive, by its suffix."""
    return path.suffix.lower() == ".zip" and path.is_file()


@contextmanager
def contents(path: Path) -> Iterator[Callable[[str], bytes]]:
    """Yield a function that returns the content of a file, by its name in a folder or ZIP archive."""
    if path.is_dir():
        yield lambda name: _content(path / name)
    else:
        with Archive(path) as archive:
            yield archive.read


def _listed(
    given: str | list[str], form: SampleFormat, mask_path: str | None
) -> tuple[Path, list[str], dict[str, list[str]]]:
    """Return a folder or archive, the names of the images in it, and the files of each DICOM series.

    For a list of files, the folder is the working folder.
    """
    files = [Path(file).expanduser() for file in ([given] if isinstance(given, str) else given)]
    path = files[0]
    if len(files) > 1 or not (path.is_dir() or is_archive(path)):
        return Path(), [str(file) for file in files], {}
    inside = _but_results(file_names(path, "input"))
    if mask_path is not None and path.is_dir():
        masks = Path(mask_path).expanduser().resolve()
        if masks != path.resolve():
            inside = [name for name in inside if masks not in (path.resolve() / name).parents]
    own = any(name.lower().endswith(form.suffixes) for name in inside)
    if isinstance(form, Volume) and not own and (parts := series(path, inside).volumes):
        return path, [*parts], parts
    names = sample_files(path, inside, form, "input")
    if manifests([name for name in inside if name == MANIFEST], lambda name: entry(path, name)):
        names = [name for name in names if "/" not in name]
        if not names:
            raise UsageError(
                "input", path, "contains only subfolders of image series", "give one of the subfolders"
            )
    show_remarks(ignored_files(path, inside, "input", form.suffixes))
    return path, names, {}


def _content(file: Path) -> bytes:
    if not file.is_file():
        split = OTHER_SPLITS.get(str(file))
        split = f", or input={split} for images of the run's dataset" if split else ""
        raise FormatError(f"is not a file; give an image, a folder or a list of images{split}")
    return read(file)


def _decoded(data: bytes, shapes: list[Shape], fit: bool, form: SampleFormat) -> FileContent:
    if not form.ordered:
        return FileContent(form.read(data, shapes[0]), form)
    if isinstance(form, Signal):
        return _signal(data, shapes, fit, form)
    if not isinstance(form, RangedImage):
        return _bytes(data, shapes, fit, form)
    sample = form.decode(data)
    grid = Grid(tuple(sample.shape[1:]), None)
    if tuple(sample.shape) not in shapes:
        grid = grid._replace(part=central_part(sample.shape[1:], shapes[0][1:]))
        refuse_shape(tuple(sample.shape), shapes, fit and len(sample) == shapes[0][0], "crop and resize it")
        sample = center_crop_resize(sample, form, shapes[0])
    return FileContent(sample, form, grid, form.original(data))


def _signal(data: bytes, shapes: list[Shape], fit: bool, form: Signal) -> FileContent:
    original = form.original(data)
    shape, (channels, length) = original.values.shape, shapes[0]
    if shape not in shapes:
        cut = shape[0] == channels and shape[1] > length
        refuse_shape(shape, shapes, fit and cut, "keep its first values" if cut else "convert it")
        original = original._replace(values=original.values[:, :length])
    return FileContent(form.samples(original.values), form, None, original)


def _reader(path: Path, names: Sequence[str]) -> Callable[[], list[bytes]]:
    """Return a function that reads files in a folder or archive."""

    def files() -> list[bytes]:
        with contents(path) as content:
            return [content(name) for name in names]

    return files


def _volume_of(images: Images, row: int) -> InputVolume | None:
    """Return the file of a volume of a dataset, if it has positions."""
    if not isinstance(images, FileImages) or not isinstance(images.decoder, VolumeDecoder):
        return None
    decoder = images.decoder
    if decoder.form.file == ".npy":
        return None
    held = read_volume(*images.contents(row))
    place = placement(held, decoder.shape[1:], decoder.target)
    return InputVolume.of(
        lambda: images.contents(row), held, None if place.is_identity(held.values.shape[1:]) else place
    )


def _volume(
    held: Held,
    files: Callable[[], list[bytes]],
    shapes: list[Shape],
    fit: bool,
    form: Volume,
    spacing: Spacing | None,
) -> FileContent:
    shape, (_, *wanted) = held.values.shape, shapes[0]
    affine = None if held.spacing is None else held.header.affine
    if shape in shapes and held.spacing is None:
        spacing = None
    place = placement(held, wanted, spacing)
    grid = Grid(shape[1:], place.block, affine)
    own, original = place, held.original
    if shape in shapes and (spacing is None or set(place.step) == {1.0}):
        sample, own, grid = form.scaled(torch.from_numpy(held.values)), None, grid._replace(part=None)
    else:
        if shape in shapes and not fit:
            found, trained = (
                " x ".join(f"{side:.4g}" for side in each)
                for each in (held.spacing or (), spacing.sides[::-1] if spacing else ())
            )
            raise FormatError(f"has a voxel spacing of {found}, and the model of {trained}; set fit=true")
        refuse_shape(shape, shapes, fit and len(held.values) == shapes[0][0], "crop and resize it")
        if spacing is None and held.spacing is not None and form.file != ".npy":
            _check_proportions(held.spacing, form)
        sample = form.quantize(VolumeDecoder(form, shapes[0], None, spacing).decoded(held))
        affine, original = affine and place.affine(affine), original._replace(resampled=True)
    volume = None if form.file == ".npy" else InputVolume.of(files, held, own)
    return FileContent(sample, replace(form, affine=affine) if affine else form, grid, original, volume)


def _check_proportions(spacing: Sequence[float], form: Volume) -> None:
    """Raise FormatError unless the sides of voxels have the proportions of those of the model, by 1 %."""
    trained = np.linalg.norm(np.array(form.affine)[:, :3], axis=0)
    ratios = np.array(spacing) / trained
    if ratios.max() > 1.01 * ratios.min():
        found, wanted = (" x ".join(f"{side:.4g}" for side in each) for each in (spacing, trained))
        raise FormatError(
            f"has a voxel spacing of {found}, which is not proportional to {wanted}, that of the model; "
            "resample it to these proportions"
        )


def refuse_shape(shape: Shape, shapes: list[Shape], fit: bool, remedy: str) -> None:
    """Raise FormatError for an image of another shape, unless `fit` is true."""
    if not fit:
        wanted = " or ".join(map(described, shapes))
        wanted += " or larger" if isinstance(shapes, LargerShapes) else ""
        able = shape[0] == shapes[0][0] or remedy.endswith("convert it")
        raise FormatError(
            f"is {described(shape)}, but must be {wanted}; convert it"
            + (f", or set fit=true to {remedy}" if able else "")
        )


def _bytes(data: bytes, shapes: list[Shape], fit: bool, form: SampleFormat) -> FileContent:
    image = opened(data)
    channels = 1 if is_gray(image) else 3
    shape = (channels, image.height, image.width)
    grid = Grid(shape[1:], None)
    if shape not in shapes:
        grid = grid._replace(part=_fitted_part(shape[1:], shapes[0][1:]))
        refuse_shape(shape, shapes, fit, "crop, resize and convert it")
        channels, height, width = shapes[0]
        image = ImageOps.fit(flattened(image, channels, "white"), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(flattened(image, channels, "white")))
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
    return FileContent(pixels, form, grid)


def _fitted_part(sizes: Sequence[int], wanted: Sequence[int]) -> list[tuple[float, float]]:
    """Return start and length, by rows and by columns, of the part that `ImageOps.fit` resizes."""
    scale = min(have / want for have, want in zip(sizes, wanted, strict=True))
    return [((have - scale * want) / 2, scale * want) for have, want in zip(sizes, wanted, strict=True)]


def described(shape: Sequence[int]) -> str:
    """Return a shape as text, such as 64 x 32 gray (width x height)."""
    channels, *sizes = shape
    colours = {1: "gray", 3: "colour"}.get(channels, f"of {channels} channels")
    return f"{' x '.join(str(size) for size in reversed(sizes))} {colours}"


def _but_results(names: list[str]) -> list[str]:
    """Return the names of a folder's files, except those in subfolders with a manifest of `diffuse`."""
    written = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == "manifest.json"}
    written -= {PurePosixPath()}
    return [name for name in names if written.isdisjoint(PurePosixPath(name).parents)]


def _folders(files: Sequence[PurePosixPath], stem: Callable[[PurePosixPath], str]) -> list[str]:
    """Return the beginnings of the names of files if stems are equal: their folders but common ones, as cats-."""
    if len(set(map(stem, files))) == len(files):
        return [""] * len(files)
    inside = [file.parent.parts for file in files]
    levels = [len(set(level)) > 1 for level in zip(*inside, strict=False)]
    same = levels.index(True) if True in levels else len(levels)
    return ["".join(f"{part}-" for part in parts[same:] if part not in ("/", "..")) for parts in inside]


def _names(
    files: Sequence[PurePosixPath], stem: Callable[[PurePosixPath], str], folders: Sequence[str] = ()
) -> list[str]:
    """Return unique names of files: folder and stem, or file name if equal, with a number if these are equal too."""
    folders = folders or [""] * len(files)
    pairs = [(folder + stem(file), folder + file.name) for folder, file in zip(folders, files, strict=True)]
    stems = Counter(short for short, _ in pairs)
    names = [short if stems[short] == 1 else long for short, long in pairs]
    again = Counter([*names, *RESERVED])
    return [name if again[name] == 1 else f"{row:05d}_{name}" for row, name in enumerate(names)]


def shortened(name: str) -> str:
    """Return a name of at most 200 bytes; a longer name is cut and gets a digest."""
    if len(name.encode()) <= LONGEST:
        return name
    end = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"{name.encode()[: LONGEST - 11].decode(errors='ignore')}-{end}"
