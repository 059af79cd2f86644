"""Masks of an edit: image files, volumes, or folders and ZIP archives of them, matched with the inputs by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.commands.inputs import (
    Complete,
    FileContent,
    Grid,
    Input,
    contents,
    is_archive,
    raise_problems,
    refuse_shape,
    show_remarks,
)
from diffusion_cli.data import central_part, file_names, resized_region
from diffusion_cli.data.labels import read as entry
from diffusion_cli.data.listing import ends_in
from diffusion_cli.data.masks import decoder_of_run, mask_files
from diffusion_cli.editing.restore import described
from diffusion_cli.errors import FormatError, Problem, UsageError
from diffusion_cli.formats import HighDepthImage, Shape
from diffusion_cli.formats.files import SUFFIXES as PICTURES
from diffusion_cli.formats.files import flattened, opened
from diffusion_cli.formats.signal import read_signal
from diffusion_cli.formats.volume import SUFFIXES as VOLUMES
from diffusion_cli.formats.volume import read_volume
from diffusion_cli.system.untrusted import reason

MOST_OF_A_COLOUR = 0.1  # largest fraction of the opaque pixels of a photograph with one colour
ELEMENTS = {1: "values", 2: "pixels", 3: "voxels"}
FARTHEST = 0.5  # largest distance of the voxels of a mask from those of its volume, in sides of a voxel


class MaskUse(NamedTuple):
    """What masks are for."""

    key: str
    """Key of their path."""
    marked: str
    """Word for the marked region in remarks."""
    paths: str
    """Valid values of the key."""
    may_be_empty: bool = False
    of_one: bool = False
    """Whether a mask file is of one input, instead of all."""


PAINTED = MaskUse(
    "edit.mask",
    "painted",
    "give a mask file, a folder or ZIP of masks, a box [left,top,right,bottom], or centre",
)
ANOMALOUS = MaskUse(
    "edit.truth", "anomalous", "give a folder or ZIP of masks with the names of the inputs", True, True
)


class MaskFile(NamedTuple):
    """Content of a mask file."""

    region: Tensor
    """Marked region, bool [L], [H, W] or [D, H, W]."""
    affine: list[list[float]] | None
    """Affine matrix of the voxel positions of a NIfTI file."""
    remark: str
    """How the mask was read, with `{}` for the word of its use."""


def read_masks(path: str, given: Sequence[Input], sizes: Sequence[int], use: MaskUse = PAINTED) -> Tensor:
    """Return the marked regions, bool [1 or N, 1, *sizes]: one per input, or one for all.

    A mask of the size of its input file is cropped and resized as the input was: a pixel is marked if some part of it
    is. Other masks must have the size of the model. An image applies to each slice of a volume.

    Args:
        path: mask file for all inputs, or a folder or ZIP archive with one mask per input, of the same name.
        given: the N inputs.
        sizes: sizes of the model's images, [H, W] or [D, H, W].
        use: what the masks are for.

    Raises:
        UsageError: for a missing or unreadable mask, one of another size, or an empty one if it may not be; it names
            each file.
    """
    folder, names = _matched(Path(path).expanduser(), given, path, use)
    regions: list[Tensor] = []
    lines: list[Problem] = []
    masks: Counter[str] = Counter()
    shares: dict[str, list[float]] = {}
    last: tuple[str, MaskFile] | None = None
    with contents(folder) as content:
        for name, item in zip(names, given, strict=True):
            try:
                if last is None or last[0] != name:
                    last = name, read_mask(content(name), name, len(sizes))
                    masks[last[1].remark] += 1
                regions.append(_fitted(last[1], item, sizes, use.may_be_empty))
                shares.setdefault(last[1].remark, []).append(float(regions[-1].double().mean()))
            except (ValueError, OSError) as error:
                lines.append(Problem(use.key, folder / name, reason(error)))
    raise_problems(list(dict.fromkeys(lines)))
    for remark, found in shares.items():
        shown = f" ({masks[remark]} masks)" if masks[remark] > 1 else ""
        share = f"{100 * sum(found) / len(found):.3g} % of the {ELEMENTS[len(sizes)]}"
        show_remarks([f"{use.key}={path}: {remark.format(use.marked)}{shown}, {share}"])
    stacked = torch.stack(regions)[:, None]
    return stacked[:1] if (stacked == stacked[:1]).all() else stacked


def _matched(path: Path, given: Sequence[Input], shown: str, use: MaskUse) -> tuple[Path, list[str]]:
    """Return a folder or archive, and the name in it of the mask of each input."""
    if not path.exists():
        raise UsageError(use.key, shown, "does not exist", use.paths)
    if not (path.is_dir() or is_archive(path)):
        if use.of_one and len(given) > 1:
            raise UsageError(use.key, shown, f"is one mask for {len(given)} inputs", use.paths)
        return Path(), [str(path)] * len(given)
    files = [item.file for item in given if item.file is not None]
    if len(files) < len(given):
        raise UsageError(
            use.key, shown, "masks of a folder are matched with input files by name",
            "give input files, or one mask file",
        )  # fmt: skip
    try:
        return path, mask_files(files, _files(path, use.key, (*PICTURES, *VOLUMES)))
    except FormatError as error:
        raise UsageError(use.key, shown, str(error)) from error


def completion(
    path: str | None, node: Mapping[str, Any], rules: int, form: HighDepthImage, shape: Shape, fit: bool
) -> Complete:
    """Return a function that reads photos with their masks, for a model trained with `dataset.masks`.

    Args:
        path: folder or ZIP archive of masks with the names of the photos; None if unknown.
        node: configuration node of the run's dataset.
        rules: version of its rules.
        form: format of photo and mask together.
        shape: shape of the model's images, [C + 1, H, W].
        fit: whether to crop and resize photos and masks of other sizes.
    """
    place = None if path is None else Path(path).expanduser()
    masks = [] if place is None or not place.exists() else _files(place, "dataset.masks", PICTURES)

    def complete(data: bytes, file: str) -> FileContent:
        if place is None:
            raise FormatError(
                "has no mask channel, with which the model was trained; "
                "set dataset.masks to a folder of masks with the names of the inputs"
            )
        try:
            (name,) = mask_files([file], masks)
        except FormatError as error:
            raise FormatError(f"dataset.masks={place} {error}") from error
        mask = entry(place, name)
        decoder = decoder_of_run(node, rules, form, shape, data, mask)
        sizes = decoder.image.size(data)
        grid = Grid(sizes, None)
        if sizes != shape[1:]:
            grid = grid._replace(part=central_part(sizes, shape[1:]))
            refuse_shape((shape[0] - 1, *sizes), [decoder.image.shape], fit, "crop and resize it")
        return FileContent(torch.from_numpy(decoder(data, mask)), form, grid, decoder.original(data, mask))

    return complete


def _files(path: Path, key: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the names of the masks in a folder or archive."""
    return [name for name in file_names(path, key) if ends_in(PurePosixPath(name), suffixes)]


def read_mask(data: bytes, name: str, dimensions: int = 2) -> MaskFile:
    """Return the content of a mask file.

    An image is white (128 or more) in the marked region, on a black or transparent background. In a photograph, the
    transparent part is the marked region, as in other programs. A volume or signal is not 0 in the marked region.

    Args:
        data: content of the file.
        name: name of the file, which ends with the suffix of a volume or image.
        dimensions: 3 to read volumes too, 2 for images only, or 1 for signals.

    Raises:
        FormatError: the file cannot be read, or the meaning of its transparent part is ambiguous.
    """
    if dimensions == 1:
        values = read_signal(data).values
        if len(values) > 1:
            raise FormatError(f"has {len(values)} channels; a mask has one")
        return MaskFile(torch.from_numpy(values[0] != 0), None, "values other than 0 are {}")
    if dimensions == 3 and name.lower().endswith(VOLUMES):
        held = read_volume(data)
        if len(held.values) > 1:
            raise FormatError(f"has {len(held.values)} channels; a mask has one")
        affine = None if held.spacing is None else held.header.affine
        return MaskFile(torch.from_numpy(held.values[0] != 0), affine, "voxels other than 0 are {}")
    image = opened(data)
    white = np.array(flattened(image, 1, "black", srgb=False)) >= 128
    if not image.has_transparency_data:
        return MaskFile(torch.from_numpy(white), None, "white is {}")
    whole = np.array(image.convert("RGBA"))
    erased = whole[..., 3] < 128
    if erased.all() or not erased.any():
        return MaskFile(torch.from_numpy(white), None, "white is {}")
    opaque = whole[~erased][:, :3]
    if _is_white_on_black(opaque):
        return MaskFile(torch.from_numpy(white), None, "the white part is {}, not the transparent part")
    if not _is_photograph(opaque):
        raise FormatError(
            "the meaning of its transparent part is ambiguous; "
            "save the mask as black and white without transparency"
        )
    return MaskFile(torch.from_numpy(erased), None, "the transparent part is {}, whatever its colours")


def _is_white_on_black(colours: np.ndarray) -> bool:
    """Return whether colours, uint8 [N, 3], are all white or black, with at least one white."""
    white, black = (colours == 255).all(1), (colours == 0).all(1)
    return bool(white.any() and (white | black).all())


def _is_photograph(colours: np.ndarray) -> bool:
    """Return whether each colour, uint8 [N, 3], covers less than a tenth of the pixels."""
    _, counts = np.unique(
        colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32), return_counts=True
    )
    return bool(counts.max() < MOST_OF_A_COLOUR * len(colours))


def _fitted(mask: MaskFile, item: Input, sizes: Sequence[int], may_be_empty: bool) -> Tensor:
    """Return the marked region of an input, bool [*sizes]; FormatError if it is of another size, or empty."""
    region, grid = mask.region, item.grid
    axes = slice(len(sizes) - region.dim(), None)  # an image has no depth
    own = sizes if grid is None else grid.sizes
    if not (region.any() or may_be_empty):
        raise FormatError(
            f"has no {_marked(mask)}, so there is nothing to generate; mark the region to generate"
            + (" in white (128 to 255)" if region.dim() == 2 else "")
        )
    if grid is not None and tuple(region.shape) == tuple(own[axes]):
        _check_position(mask, grid)
        if grid.part is not None:
            region = resized_region(region, grid.part[axes], sizes[axes])
    elif tuple(region.shape) != tuple(sizes[axes]):
        one = "" if tuple(own) == tuple(sizes) else f", and the file {item.file} {described(own)}"
        raise FormatError(
            f"has {described(region.shape)} {ELEMENTS[len(sizes)]}, but the images have {described(sizes)}{one}; "
            "give a mask of the same size"
        )
    if not (region.any() or may_be_empty):
        raise FormatError(
            f"has its {_marked(mask)} outside the central part that fit=true keeps; crop the input yourself"
        )
    return region.expand(*sizes)


def _marked(mask: MaskFile) -> str:
    return {1: "value other than 0", 2: "white pixel", 3: "voxel other than 0"}[mask.region.dim()]


def _check_position(mask: MaskFile, grid: Grid) -> None:
    """Raise FormatError if the voxels of a mask lie elsewhere than those of its volume."""
    if mask.affine is None or grid.affine is None:
        return
    volume = np.array(grid.affine)
    ends = np.array(
        [[w, h, d, 1] for d in (0, grid.sizes[0]) for h in (0, grid.sizes[1]) for w in (0, grid.sizes[2])]
    )
    apart = np.linalg.norm(ends @ (volume - np.array(mask.affine)).T, axis=1).max()
    side = np.linalg.norm(volume[:, :3], axis=0).min()
    if apart > FARTHEST * side:
        raise FormatError(
            f"lies up to {apart / side:.3g} voxels away from its volume by its affine; resample it to the volume"
        )
