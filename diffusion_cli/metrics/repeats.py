"""Repeats of an evaluation on samples of other seeds: the mean of the numbers, and their standard deviation."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from diffusion_cli.metrics.protocol import Report, Result
from diffusion_cli.metrics.samples import Samples

DEVIATION = "standard_deviation"
OF_ONE_REPEAT = ("low", "high", "standard_error")
"""Details that are the interval and the error of one repeat, and not those of the mean."""


class Part(Samples):
    """Samples number first, ..., first + count - 1 of others, as number 0, ..., count - 1."""

    def __init__(self, samples: Samples, first: int, count: int) -> None:
        self.samples, self.rows = samples, range(first, first + count)
        self.shape, self.class_names, self.labelled = samples.shape, samples.class_names, samples.labelled

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return self.samples.batch([self.rows[number] for number in numbers])

    def protocol(self) -> dict[str, Any]:
        return self.samples.protocol()


def parts(samples: Samples, repeats: int) -> list[Samples]:
    """Return the samples of each repeat: as many parts of equal size, in order."""
    count = len(samples) // repeats
    return [samples if repeats == 1 else Part(samples, place * count, count) for place in range(repeats)]


def averaged(reports: Sequence[Report]) -> Report:
    """Return the mean of each number over the reports of all repeats, with the standard deviation of one repeat.

    The details of a result become their means, beside the number of each repeat. A number that a repeat lacks is
    left out, and so are the interval and the error of a repeat: those of the mean are smaller.
    """
    if len(reports) == 1:
        return reports[0]
    found = [{result.name: result for result in report.results} for report in reports]
    names = [name for name in found[0] if all(name in results for results in found)]
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    return Report([_mean([results[name] for results in found]) for name in names], list(notes))


def _mean(results: Sequence[Result]) -> Result:
    values = [result.value for result in results]
    details: dict[str, float] = {DEVIATION: stdev(values), "repeats": len(results)}
    details |= {f"repeat_{place}": value for place, value in enumerate(values)}
    for key in [key for key in results[0].details if key not in OF_ONE_REPEAT]:
        numbers = [result.details[key] for result in results if key in result.details]
        if len(numbers) == len(results):
            details[key] = numbers[0] if len(set(numbers)) == 1 else fmean(numbers)
    first = results[0]
    digests = [result.protocol["sampling"]["pixels_sha256"] for result in results]
    sampling = {**first.protocol["sampling"], "repeats": len(results), "pixels_sha256": digests}
    return Result(first.name, fmean(values), details, {**first.protocol, "sampling": sampling})
