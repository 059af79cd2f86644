"""Repeats of an evaluation with other seeds: means and standard deviations."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.metrics.protocol import Report, Result
from diffusion_cli.metrics.samples import Samples
from diffusion_cli.samplers import Advance, unreported

DEVIATION = "standard_deviation"
OF_ONE_REPEAT = ("low", "high", "standard_error")
"""Details that are an interval or error of a single repeat, not of the mean."""


class Part(Samples):
    """Samples first, ..., first + count - 1 of another set, renumbered from 0."""

    def __init__(self, samples: Samples, first: int, count: int) -> None:
        self.samples, self.rows = samples, range(first, first + count)
        self.shape, self.class_names, self.labelled = samples.shape, samples.class_names, samples.labelled
        self.attributes, self.has_texts = samples.attributes, samples.has_texts
        self.form = samples.form

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int], advance: Advance = unreported) -> tuple[Tensor, Tensor | None]:
        found = self.samples.batch([self.rows[number] for number in numbers], advance)
        self.latest = self.samples.latest
        return found

    def condition_of(self, numbers: Sequence[int]) -> Condition | None:
        return self.samples.condition_of([self.rows[number] for number in numbers])

    def texts_of(self, numbers: Sequence[int]) -> list[str | None] | None:
        return self.samples.texts_of([self.rows[number] for number in numbers])

    def originals(self, numbers: Sequence[int]) -> Tensor | None:
        return self.samples.originals([self.rows[number] for number in numbers])

    def protocol(self) -> dict[str, Any]:
        return self.samples.protocol()


def parts(samples: Samples, repeats: int) -> list[Samples]:
    """Split samples into `repeats` consecutive parts of equal size."""
    count = len(samples) // repeats
    return [samples if repeats == 1 else Part(samples, place * count, count) for place in range(repeats)]


def averaged(reports: Sequence[Report]) -> Report:
    """Return the mean of each value over repeats, with the standard deviation of a single repeat.

    Details are averaged too, and the value of each repeat is added. Values that some repeat lacks are omitted, as are
    intervals and errors of single repeats.
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
