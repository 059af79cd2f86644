"""Selection of the files of a folder or archive that count as images."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import PurePosixPath
from typing import Any

from diffusion_cli.system.untrusted import LONGEST_MANIFEST, MOST_IN_MANIFEST, from_json

MANIFEST = "manifest.json"
LAST = "checkpoints/last.ckpt"
CLASS_FOLDERS = "images"
"""Folder of the class folders of samples with `layout=imagefolder`, which contains nothing else."""
SEED = re.compile(r"\d{6,}\.(?!gif$).+")  # file name of a sample
NO_IMAGES = frozenset((
    ".bib", ".caption", ".cfg", ".conf", ".css", ".csv", ".db", ".doc", ".docx", ".htm", ".html", ".ini",
    ".ipynb", ".js", ".json", ".jsonl", ".lock", ".log", ".m", ".md", ".md5", ".odt", ".pdf", ".py",
    ".r", ".rst", ".sh", ".sha256", ".sql", ".sqlite", ".tex", ".toml", ".tsv", ".txt", ".url", ".xls",
    ".xlsx", ".xml", ".yaml", ".yml",
))  # fmt: skip
"""Suffixes of files that are clearly not images."""
NO_IMAGE_NAMES = frozenset(("license", "readme", "dicomdir", "makefile", "copying", "notice", "version"))
SHOWN = 8  # suffixes listed in a remark

Read = Callable[[str], bytes]
"""Returns the content of a file by name; raises FormatError if it cannot be read."""


def passed_over(key: str, names: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    """Return a remark that counts the names that may be images but have none of the suffixes; empty without any."""
    rest = (PurePosixPath(name) for name in names if not name.lower().endswith((*suffixes, "/")))
    counts = Counter(path.suffix.lower() for path in rest if may_be_image(path))
    if not counts:
        return []
    by_count = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{suffix or 'without a suffix'} {count}" for suffix, count in by_count[:SHOWN]]
    shown += ["..."] if len(counts) > SHOWN else []
    total = counts.total()
    files = "1 file is" if total == 1 else f"{total} files are"
    return [f"{key}: {files} skipped: {', '.join(shown)}; convert images among them to {suffixes[0]}"]


def may_be_image(path: PurePosixPath) -> bool:
    """Return whether a name is visible, and not clearly that of another kind of file."""
    if path.suffix:
        return visible_name(path) and path.suffix.lower() not in NO_IMAGES
    return visible_name(path) and path.name.lower() not in NO_IMAGE_NAMES


def manifests(names: Iterable[str], read: Read) -> dict[str, dict[str, Any]]:
    """Return the manifests written by this program among `names`, by folder name with a final `/`, or empty."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if not f"/{name}".endswith(f"/{MANIFEST}") or not visible_name(PurePosixPath(name)):
            continue
        try:
            content = from_json(read(name), LONGEST_MANIFEST, MOST_IN_MANIFEST)
        except ValueError:  # damaged, or of another program
            continue
        if not isinstance(content, dict):
            continue
        parts = (content.get("settings"), content.get("versions"), content.get("results", {}))
        if all(isinstance(part, dict) for part in parts):
            found[name.removesuffix(MANIFEST)] = content
    return found


def without_pictures(chosen: list[str], names: Collection[str], read: Read) -> list[str]:
    """Return the chosen names without grids, strips and other figures that this program wrote.

    In a folder with a manifest, the images are the samples, or the results of an edit. In the folder of a training
    run, they are those in subfolders with a manifest.
    """
    results = manifests(names, read)
    runs = {name.removesuffix(LAST) for name in names if f"/{name}".endswith(f"/{LAST}")}
    if not results and not runs:
        return chosen

    def counts(name: str) -> bool:
        parents = [f"{parent}/" if parent.name else "" for parent in PurePosixPath(name).parents]
        own = next((parent for parent in parents if parent in results or parent in runs), None)
        if own is None:
            return True
        return own in results and is_result(name.removeprefix(own), results[own])

    return [name for name in chosen if counts(name)]


def is_result(name: str, manifest: dict[str, Any]) -> bool:
    """Return whether a name in a folder with a manifest is a sample, the result of an edit, or part of its series."""
    if "edit" not in manifest["settings"]:
        if manifest["settings"].get("layout") != "imagefolder":
            return SEED.fullmatch(name) is not None
        first, *rest = name.split("/")
        return first == CLASS_FOLDERS and len(rest) == 2 and SEED.fullmatch(rest[1]) is not None
    edited, (first, *rest) = manifest.get("results", {}), name.split("/")
    if rest:
        return first in edited and re.fullmatch(r"\d{3,}\..+", "/".join(rest)) is not None
    return not name.endswith(".gif") and any(name[: at.start()] in edited for at in re.finditer(r"\.", name))


def stem(name: PurePosixPath) -> str:
    """Return the last part of a name without its suffix, such as .png or .nii.gz."""
    return name.name[: -len(".nii.gz")] if name.name.lower().endswith(".nii.gz") else name.stem


def ends_in(name: PurePosixPath, suffixes: tuple[str, ...]) -> bool:
    """Return whether a name has one of the suffixes and is not hidden."""
    return name.name.lower().endswith(suffixes) and visible_name(name)


def visible_name(name: PurePosixPath) -> bool:
    """Return whether no part of a name is hidden, or a metadata folder of macOS."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
