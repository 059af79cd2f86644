"""Class shares: how often each class comes among the images of a class-conditional model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST = 10**7  # the sum of the shares, which is the length of their order
ERRORS = 4  # standard errors by which shares differ more than by chance


def label_settings(counts: Sequence[int]) -> dict[str, list[int]]:
    """Return the settings of images in the shares of `counts`, the number of images of each class 0, 1, ...

    `labels` are the classes that have images. `label_shares` are the images of each label among every
    sum(label_shares) images, in lowest terms; equal shares have no such key.
    """
    labels = [label for label, count in enumerate(counts) if count]
    factor = max(math.gcd(*counts), math.ceil(sum(counts) / MOST))
    shares = [max(counts[label] // factor, 1) for label in labels]
    return {"labels": labels} | ({"label_shares": shares} if len(set(shares)) > 1 else {})


def are_shares(value: Any, number: int) -> bool:
    """Return whether a value, which may come from an untrusted file, is the `label_shares` of a number of labels."""
    return (
        isinstance(value, list)
        and len(value) == number
        and all(type(share) is int and share > 0 for share in value)
        and sum(value) <= MOST
    )


def labels_in_turn(settings: Mapping[str, Any]) -> list[int] | None:
    """Return the labels that images 0, 1, ... get, to be repeated without end; None for images without labels.

    `settings` are those of `label_settings`. Copy j of n of a label has the place (j + 1/2) / n, and the labels are
    sorted by place: any N images in a row have the shares of the whole to within a few images. Equal shares are
    the labels in turn. Source: the divisor method of Sainte-Lague (Balinski and Young 1982).
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
    """Return the class whose share differs most from the wanted one, with both shares; None for differences by chance.

    `counts` and `wanted` are the numbers of images of each class; a difference counts from `ERRORS` standard
    errors of sum(counts) independent images, and two images, on.
    """
    number, total = sum(counts), sum(wanted)
    found: list[tuple[float, str, float, float]] = []
    for name, count, images in zip(names, counts, wanted, strict=True):
        share, expected = count / number, images / total
        error = math.sqrt(expected * (1 - expected) / number)
        if abs(share - expected) > ERRORS * error + 2 / number:
            found.append((abs(share - expected), name, share, expected))
    return max(found)[1:] if found else None
