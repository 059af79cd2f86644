"""Attributes and captions in packed files of images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch

from diffusion_cli.conditions import AttributeDescription, Conditions
from diffusion_cli.conditions.condition import IMAGE, LABEL, TEXT
from diffusion_cli.data.attributes import Column
from diffusion_cli.data.base import Dataset, Images
from diffusion_cli.data.captions import NoCaptionsError, ReadCaptions, Texts, numbered_captions
from diffusion_cli.data.text_tables import json_lines
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.system.untrusted import (
    LONGEST_MANIFEST,
    LONGEST_TEXT,
    MOST_IN_MANIFEST,
    Archive,
    from_json,
    reason,
)

ATTRIBUTES = "attributes.json"
"""Entry with the names, types and classes of the attributes."""
VALUES = "attributes/"
"""Start of the names of the arrays with the values of the attributes."""
CAPTIONS = "captions.jsonl"
"""Entry with the captions: for each image an object with a list `text`."""


class PackedConditions(NamedTuple):
    """What a dataset's images have beside pixels and classes, of both splits one after the other."""

    attributes: Mapping[AttributeDescription, np.ndarray]
    """Values of the attributes: float32 [N], or the number of the class, int64 [N], -1 for a missing one."""
    captions: Texts | None
    """Captions of the images; None without."""

    @classmethod
    def of(cls, dataset: Dataset, splits: Sequence[Images], labels: np.ndarray | None) -> "PackedConditions":
        """Return what the splits of a dataset have.

        Args:
            dataset: the dataset.
            splits: its splits.
            labels: class of each image, int64 [N], -1 for a missing one; None without classes.

        Raises:
            UsageError: the images have other conditions, or captions that cannot be read.
        """
        names = {attribute.name for attribute in dataset.attributes}
        if rest := sorted({name for images in splits for name in images.conditions} - names):
            shown = "condition images" if rest == [IMAGE] else f"the conditions {', '.join(rest)}"
            problem = f"{dataset.name} has {shown}, which cannot be packed"
            raise UsageError("dataset", NO_VALUE, problem, "train without packing")
        found: dict[AttributeDescription, np.ndarray] = {}
        for attribute in dataset.attributes:
            if not (attribute.name == LABEL and attribute.kind == "category"):
                found[attribute] = _values(attribute.name, splits)
        own = LABEL in {attribute.name for attribute in found}
        if dataset.class_names and labels is not None and (labels < 0).any() and not own:
            classes = AttributeDescription(name=LABEL, kind="category", values=dataset.class_names)
            found[classes] = labels
        return cls(found, _captions(splits))

    def write(self, archive: ZipFile) -> None:
        """Write the entries that describe the attributes and that have the captions."""
        if self.attributes:
            stored = [attribute.model_dump() for attribute in self.attributes]
            archive.writestr(ZipInfo(ATTRIBUTES), json.dumps(stored))  # fixed date, for equal bytes
        if self.captions is not None:
            with archive.open(ZipInfo(CAPTIONS), "w", force_zip64=True) as file:
                for texts in self.captions:
                    file.write(json.dumps({TEXT: texts}).encode() + b"\n")

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the values of the attributes by the names of their arrays."""
        return {array_name(attribute.name): values for attribute, values in self.attributes.items()}


def _values(name: str, splits: Sequence[Images]) -> np.ndarray:
    parts = []
    for images in splits:
        rows = torch.arange(len(images))
        parts.append(images.conditions[name].values(rows, rows, None))
    return torch.cat(parts).cpu().numpy()


def _captions(splits: Sequence[Images]) -> Texts | None:
    """Return the captions of the splits, one after the other; None if no split has any."""
    found = [_texts(images) for images in splits]
    if not any(found):
        return None
    return [texts for images, each in zip(splits, found, strict=True) for texts in each or [()] * len(images)]


def _texts(images: Images) -> Texts | None:
    try:
        return None if images.captions is None else images.captions.texts
    except NoCaptionsError:
        return None


def array_name(attribute: str) -> str:
    """Return the name of the array of an attribute, which differs from those of other arrays."""
    return VALUES + quote(attribute, safe="")


def packed_attributes(archive: Archive) -> tuple[AttributeDescription, ...]:
    """Return the packed attributes; FormatError, or an error of a parser, if malformed."""
    if ATTRIBUTES not in archive.entries:
        return ()
    stored = from_json(archive.read(ATTRIBUTES, LONGEST_MANIFEST), LONGEST_MANIFEST, MOST_IN_MANIFEST)
    try:
        attributes = tuple(AttributeDescription(**each) for each in stored)
        return Conditions(attributes=attributes).attributes
    except (TypeError, ValueError) as error:
        raise FormatError(f"has a damaged entry {ATTRIBUTES}; pack it again") from error


def packed_column(attribute: AttributeDescription, values: np.ndarray, count: int) -> Column:
    """Return the cells of a packed attribute; FormatError if there are not `count`, or one is no class."""
    is_number = attribute.kind == "number"
    fits = (
        values.dtype.kind == "f"
        if is_number
        else values.dtype.kind == "i" and (values < len(attribute.values)).all()
    )
    if values.shape != (count,) or not fits:
        raise FormatError(f"has a damaged attribute {attribute.name}; pack it again")
    if attribute.kind == "yes_no":
        return Column([None if number < 0 else number == 1 for number in values.tolist()])
    return Column(values.tolist(), None if is_number else attribute.values)


def read_packed_captions(path: Path, count: int) -> ReadCaptions:
    """Return the captions of the `count` images of a packed file.

    Raises:
        UsageError: they are malformed.
    """
    try:
        with Archive(path) as archive, archive.open(CAPTIONS) as file:
            lines = iter(lambda: file.readline(LONGEST_TEXT + 1), b"")
            cells = json_lines(lines, (TEXT,)).columns.get(TEXT, [])
        if len(cells) != count:
            raise FormatError(f"has captions of {len(cells)} images, not of {count}; pack it again")
    except Exception as error:  # the parsers of ZIP raise errors of many types
        raise UsageError("dataset.path", path, reason(error)) from error
    return numbered_captions(cells, "dataset.path", path, "pack it again")
