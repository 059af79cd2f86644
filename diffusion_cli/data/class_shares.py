"""Class shares: how many generated images each class gets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST = 10**7  # largest sum of the shares, the length of one period of labels
ERRORS = 4  # standard errors; larger differences are not due to chance


def label_settings(counts: Sequence[int]) -> dict[str, list[int]]:
    """Return the sampling settings for class shares proportional to `counts`, the number of images of each class.

    `labels` are the classes that have images. `label_shares` are the images of each label among every
    sum(label_shares) images, in lowest terms; this key is absent for equal shares.
    """
    labels = [label for label, count in enumerate(counts) if count]
    factor = max(math.gcd(*counts), math.ceil(sum(counts) / MOST))
    shares = [max(counts[label] // factor, 1) for label in labels]
    return {"labels": labels} | ({"label_shares": shares} if len(set(shares)) > 1 else {})


def are_shares(value: Any, number: int) -> bool:
    """Return whether a value, possibly from an untrusted file, is a valid `label_shares` for `number` labels."""
    return (
        isinstance(value, list)
        and len(value) == number
        and all(type(share) is int and share > 0 for share in value)
        and sum(value) <= MOST
    )


def labels_in_turn(settings: Mapping[str, Any]) -> list[int] | None:
    """Return the labels of images 0, 1, ..., one period to be repeated forever; None for images without labels.

    `settings` are those of `label_settings`. Copy j of n of a label is placed at (j + 1/2) / n, and the labels are
    sorted by place, so that any N consecutive images have the shares of the whole up to a few images. Equal shares
    give the labels in turn. Source: the divisor method of Sainte-Lague (Balinski and Young 1982).
    """
    labels = settings.get("labels")
    shares = settings.get("label_shares")
    if labels is None or shares is None:
        return labels
    places = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
    order = np.repeat(labels, shares)[np.argsort(places, kind="stable")]
    return order.tolist()


def differing_shares(
    counts: Sequence[int], wanted: Sequence[int], names: Sequence[str]
) -> tuple[str, float, float] | None:
    """Return the class that differs most from its wanted share, and both shares; None if chance explains it.

    `counts` and `wanted` are the numbers of images of each class. A difference is significant above `ERRORS`
    standard errors of sum(counts) independent images, plus two images.
    """
    number, total = sum(counts), sum(wanted)
    found: list[tuple[float, str, float, float]] = []
    for name, count, images in zip(names, counts, wanted, strict=True):
        share, expected = count / number, images / total
        error = math.sqrt(expected * (1 - expected) / number)
        if abs(share - expected) > ERRORS * error + 2 / number:
            found.append((abs(share - expected), name, share, expected))
    return max(found)[1:] if found else None
