"""Output folders of images. A manifest records their settings, so that other images are not overwritten."""

import csv
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_cli import __version__
from diffusion_cli.commands.sample_files import SampleFiles
from diffusion_cli.conditions.rows import Row, are_rows
from diffusion_cli.config import differing, flatten
from diffusion_cli.data import LABEL_COLUMNS, LABELS_CSV
from diffusion_cli.data.class_shares import are_shares, labels_in_turn
from diffusion_cli.errors import NO_VALUE, FormatError, Problem, UsageError, format_value
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.runs.manifest import (
    MANIFEST,
    RECORDS,
    add_record,
    create,
    merge,
    read_records,
    record_files,
    replacing,
    write_json,
)
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.files import writing
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.seeding import seed_ranges
from diffusion_cli.system.temporary_files import is_temporary, remove_abandoned
from diffusion_cli.system.untrusted import (
    IMAGE_FORMATS,
    LONGEST_MANIFEST,
    MOST_IN_MANIFEST,
    from_json,
    read,
    reason,
)

PICTURES = frozenset(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
"""Suffixes that name a picture, in lower case."""
FLAT = {"layout": "flat"}
"""Layout of the files of a manifest that names none."""
_adding = threading.Lock()


def named_folder(output: str) -> Path:
    """Return the folder of `output=`; UsageError for a new folder with the suffix of a picture."""
    path = Path(output)
    if path.suffix.lower() in PICTURES and not path.is_dir():
        remedy = f"leave {path.suffix} out: output={path.with_suffix('')}"
        raise UsageError("output", output, "names a picture, but the results are a folder", remedy)
    return path


def claim(output: Path, settings: dict[str, Any], model: LoadedDenoiser) -> dict[str, Any]:
    """Return the manifest of a folder, and create it for a new folder.

    Raises UsageError if the folder contains other files, or images made with other settings.
    """
    if output.exists() and not output.is_dir():
        raise UsageError("output", output, "is a file", "give a folder")
    own_folder(output)
    with writing(output / MANIFEST):
        output.mkdir(parents=True, exist_ok=True)
    # List the folder before checking for the manifest, because other tasks may create it now.
    there, old_records = list(output.iterdir()), record_files(output)
    if not (output / MANIFEST).is_file():
        if not all(map(_is_internal, there)):
            raise UsageError(
                "output", output, "is not empty and has no manifest.json", "choose another folder"
            )
        for record in old_records:
            record.unlink(missing_ok=True)
        create(output, _new_manifest(settings, model))
    manifest = read_manifest(output)
    _refuse_other_settings(output, manifest, settings)
    remove_abandoned(*(Path(folder) for folder, _, _ in os.walk(output)))
    return manifest


def _is_internal(path: Path) -> bool:
    """Return whether a path is a record, a temporary file, or a file of NFS."""
    return path.name == RECORDS or path.name.startswith(".nfs") or is_temporary(path)


def _new_manifest(settings: dict[str, Any], model: LoadedDenoiser) -> dict[str, Any]:
    return {
        "settings": settings,
        "step": model.step,
        "model": model.info.config.model_dump(),
        "versions": {"diffuse": __version__, "torch": torch.__version__},
    }


def _refuse_other_settings(output: Path, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
    before, now = (FLAT | flatten(each) for each in (manifest["settings"], settings))
    if keys := differing(before, now):
        raise UsageError.several(
            [
                *(
                    Problem(
                        key,
                        brief(now.get(key)),
                        f"the images in {output} were made with {brief(before.get(key))}",
                    )
                    for key in keys
                ),
                Problem(
                    "output", output, "contains images made with other settings", "choose another folder"
                ),
            ]
        )


def read_manifest(output: Path) -> dict[str, Any]:
    """Return the manifest of a folder, merged with the records of all tasks; UsageError if one is damaged."""
    return _merged(output, _read(output / MANIFEST))


def _merged(output: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    records = read_records(output)
    for path, record in records.items():
        try:
            _checked({"settings": {}, "versions": {}} | record)
        except (ValueError, TypeError) as error:
            raise UsageError(path, NO_VALUE, reason(error), "remove it, or choose another output=") from error
    return merge(manifest, *records.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        return parsed(read(path, LONGEST_MANIFEST))
    except ValueError as error:
        raise UsageError(
            path, NO_VALUE, f"is not a manifest of diffuse ({reason(error)})", "choose another output="
        ) from error


def parsed(content: bytes) -> dict[str, Any]:
    """Parse a manifest; FormatError for invalid content."""
    return _checked(migrated(from_json(content, LONGEST_MANIFEST, MOST_IN_MANIFEST)))


def _checked(manifest: Any) -> dict[str, Any]:
    if not isinstance(manifest, dict):
        raise FormatError("is not a JSON object")
    settings, results = manifest.get("settings"), manifest.get("results", {})
    if not isinstance(settings, dict) or not isinstance(manifest.get("versions"), dict):
        raise FormatError("has no settings or no versions")
    labels = [0] if settings.get("labels") is None else settings["labels"]
    if labels == []:
        raise FormatError("labels must not be empty")
    if not isinstance(labels, list) or not all(type(n) is int and 0 <= n < 2**32 for n in labels):
        raise FormatError("labels must be whole numbers in [0, 2^32)")
    shares = settings.get("label_shares")
    if shares is not None and not are_shares(shares, len(labels)):
        raise FormatError("label_shares must be one positive whole number per label")
    conditions = settings.get("conditions")
    if not isinstance(conditions, dict | None) and not are_rows(conditions):
        raise FormatError("conditions must be mappings of names to texts and numbers")
    seed_ranges(manifest.get("seeds", []))
    for key, number in (
        ("step", manifest.get("step", 0)),
        ("network_calls", manifest.get("network_calls", 0)),
    ):
        if type(number) is not int or number < 0:
            raise FormatError(f"{key} must be a non-negative whole number")
    if not isinstance(results, dict) or not all(map(_is_result, results.values())):
        raise FormatError("results must map names to numbers")
    return manifest


def _is_result(numbers: Any) -> bool:
    return isinstance(numbers, dict) and all(isinstance(number, int | float) for number in numbers.values())


def brief(value: Any) -> str:
    """Return a value in the syntax of the command line, cut to 80 characters."""
    text = format_value(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def keep_seeds(output: Path, seeds: range) -> None:
    """Add the seeds of images in the folder to the manifest, as ranges [first, last]."""
    _add(output, {"seeds": [[seeds[0], seeds[-1]]]})


def keep_labels(
    files: SampleFiles,
    class_names: Sequence[str],
    values: Callable[[Sequence[int]], list[Row]] | None = None,
) -> None:
    """Write the classes or conditions of all samples in the folder to `labels.csv`, as `dataset=folder` reads it.

    Seeds and conditions come from the manifest, which includes those of other tasks. Seeds without a file are skipped.
    Without conditions, no table is written.

    Args:
        files: the samples of a folder.
        class_names: names of the classes.
        values: returns the values of the samples of seeds, if the manifest has only a digest of them.
    """
    output = files.folder
    while True:
        manifest = read_manifest(output)
        seeds = [*files.there(seed_ranges(manifest.get("seeds", [])))]
        if values is None:
            columns, cells = _table(manifest["settings"], class_names)
            turn = seeds
        else:
            columns, cells = _cells_of(values(seeds))
            turn = range(len(seeds))
        if not cells:
            return
        rows = (
            (files.name(seed), *cells[place % len(cells)]) for seed, place in zip(seeds, turn, strict=True)
        )
        with (
            replacing(output, LABELS_CSV) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])
        if read_manifest(output) == manifest:  # otherwise, another task may have written an older table
            return


def _table(
    settings: Mapping[str, Any], class_names: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns of `labels.csv`, and the cells of consecutive samples, repeated; none without conditions."""
    rows = settings.get("conditions")
    if not isinstance(rows, list):
        labels = labels_in_turn(settings)
        return LABEL_COLUMNS, [(class_names[label],) for label in labels or []]
    return _cells_of(rows)


def _cells_of(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns of `labels.csv` for values of samples, and their cells; none if no sample has a value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [tuple(_cell(row.get(name)) for name in names) for row in rows]
    return (LABEL_COLUMNS[0], *names), cells if names else []


def _cell(value: str | float | None) -> str:
    """Return a value as text; a missing one is empty, and a whole number has no fraction."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def sampled_seeds(files: SampleFiles) -> Iterator[int]:
    """Yield the seeds of the images in a folder in ascending order, from its manifest and its files."""
    return files.there(seed_ranges(read_manifest(files.folder).get("seeds", [])))


def keep_calls(output: Path, calls: int) -> None:
    """Record the network calls of an image in the manifest, which stores the maximum over images.

    Call it before writing the image, so that every image in the folder is covered by the record.
    """
    _add(output, {"network_calls": calls})


def recorded_calls(output: Path) -> int:
    """Return the maximum of the network calls over the images of a folder; 0 if not recorded."""
    return read_manifest(output).get("network_calls", 0)


def keep_results(output: Path, results: dict[str, dict[str, float]]) -> None:
    """Add the errors of results to the manifest, after their images are written."""
    _add(output, {"results": results})


def _add(output: Path, additions: dict[str, Any]) -> None:
    """Add to the record of this process, and write the merged manifest."""
    with _adding:  # writer threads call this concurrently
        manifest = read_manifest(output)
        if merge(manifest, additions) != manifest:
            add_record(output, additions)
        _publish(output)


def _publish(output: Path) -> None:
    """Write the merged manifest, and repeat if another task has added a record meanwhile."""
    while True:
        on_disk = _read(output / MANIFEST)
        manifest = _merged(output, on_disk)
        if manifest == on_disk:
            return
        with replacing(output, MANIFEST) as temporary:
            write_json(temporary, manifest)
