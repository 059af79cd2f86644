"""Alternating comparisons (A B A B ...) with medians and ratios, relative to ceilings measured in the same run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from diffusion_cli.system.precision import FORMATS

Cells = tuple[str, ...]

LONG_ENOUGH = 0.5  # least seconds of a round, reached by repetition


@dataclass(frozen=True)
class Table:
    """A table for people, with the data behind it for programs."""

    caption: str
    head: Cells
    rows: list[Cells]
    measured: dict[str, Any]
    """All rounds, in seconds unless the key states otherwise, and what they were compared with."""

    def with_column(self, head: str, cells: Sequence[str]) -> "Table":
        """Return the table with one more column."""
        rows = [(*row, cell) for row, cell in zip(self.rows, cells, strict=True)]
        return replace(self, head=(*self.head, head), rows=rows)

    def markdown(self) -> str:
        """Return the caption and the table as Markdown."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "\n".join([self.caption, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


class Contestant(NamedTuple):
    """A contestant of a race."""

    name: str
    once: Callable[[], float]
    """Runs the contestant once, and returns the seconds."""
    images: int
    """Images per run."""
    flops: int = 0
    """Nominal floating-point operations per run."""
    precision: str = "fp32"


def timed(
    function: Callable[[], object],
    device: torch.device,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], float]:
    """Return a function that returns the mean seconds of consecutive calls of another."""

    def once() -> float:
        start = clock()
        for _ in range(repeats):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / repeats

    return once


def paced(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Return `timed` after a warm-up, with enough calls for a round of sufficient length."""
    timed(function, device)()
    return timed(function, device, max(1, round(LONG_ENOUGH / timed(function, device)())))


def race(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the results of each function in alternating rounds."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, once in contestants.items():
            results[name].append(once())
    return results


def raced(
    caption: str,
    contestants: Sequence[Contestant],
    rounds: int,
    ceilings: Mapping[str, Callable[[], float]] | None = None,
) -> Table:
    """Compare contestants with the first one, and with the ceiling of each precision, measured in every round."""
    runs = {each.name: each.once for each in contestants}
    results = race({**runs, **(ceilings or {})}, rounds)
    return compared(caption, contestants, results, {name: max(results[name]) for name in ceilings or {}})


def compared(
    caption: str,
    contestants: Sequence[Contestant],
    results: Mapping[str, Sequence[float]],
    ceilings: Mapping[str, float],
) -> Table:
    """Return the table of medians, speed relative to the first, and the fraction of the ceiling."""
    head = ("", "ms", "images/s", f"times as fast as {contestants[0].name}")
    first = contestants[0].images / median(results[contestants[0].name])
    rows: list[Cells] = []
    for each in contestants:
        seconds = median(results[each.name])
        rate = each.images / seconds
        cells = (each.name, f"{1000 * seconds:.4g}", f"{rate:.4g}", f"{rate / first:.2f}")
        if ceilings:
            share = each.flops / seconds / ceilings[each.precision]
            cells += (f"{each.flops / seconds / 1e9:.4g}", f"{100 * share:.0f} %")
        rows.append(cells)
    if ceilings:
        head += ("GFLOP/s", "of the ceiling")
        said = ", ".join(f"{name} {ceiling / 1e9:.4g}" for name, ceiling in ceilings.items())
        caption += f" Ceiling, GFLOP/s: {said}."
    measured = {
        each.name: {
            "seconds": list(results[each.name]),
            "images": each.images,
            "flops": each.flops,
            "precision": each.precision,
        }
        for each in contestants
    }
    return Table(caption, head, rows, {"contestants": measured, "ceilings": dict(ceilings)})


class NetworkClock:
    """Adds up the seconds within calls of a network."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device, self.seconds, self.start = device, 0.0, 0.0
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end)

    def __deepcopy__(self, memo: object) -> "NetworkClock":
        return self  # includes the calls of a copy of the network

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self, module: nn.Module, inputs: object) -> None:
        self.start = self._now()

    def _end(self, module: nn.Module, inputs: object, output: object) -> None:
        self.seconds += self._now() - self.start


def flops(function: Callable[[], object]) -> int:
    """Return the floating-point operations of convolutions, products and attention in a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ceilings(device: torch.device, short: bool = False) -> dict[str, Callable[[], float]]:
    """Return the functions that measure the ceiling of each precision."""
    return {precision: partial(ceiling, device, precision, short) for precision in ("fp32", "bf16")}


def ceiling(device: torch.device, precision: str, short: bool = False) -> float:
    """Return the FLOP/s of the fastest of several convolutions, in either layout, and a matrix product, forward.

    In fp32 with torch's defaults: on GPUs, convolutions use TF32. A `short` measurement on a CPU takes small arrays,
    because a processor that emulates bf16 would need minutes for the large ones.
    """
    on_gpu, dtype = device.type == "cuda", FORMATS.get(precision, torch.float32)
    if on_gpu:
        n, shapes = 8192, ((128, 256, 32), (512, 256, 16))
    elif short:
        n, shapes = 128, ((8, 32, 8),)
    else:
        n, shapes = 2048, ((8, 256, 16), (16, 256, 16), (8, 128, 32))
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    candidates: list[tuple[int, Callable[[], Tensor]]] = [(2 * n**3, partial(torch.mm, a, b))]
    for batch, channels, size in shapes:
        for layout in (torch.contiguous_format, torch.channels_last):
            x, weight = (
                torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout)
                for shape in ((batch, channels, size, size), (channels, channels, 3, 3))
            )
            work = 2 * batch * size**2 * channels**2 * 9
            candidates.append((work, partial(conv2d, x, weight, padding=1)))
    with torch.inference_mode():
        return max(work / _settled(function, device) for work, function in candidates)


def bandwidth(device: torch.device) -> float:
    """Return the memory bandwidth in bytes/s of a copy of 256 MB, read and written."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _settled(partial(target.copy_, source), device)


def _settled(function: Callable[[], object], device: torch.device) -> float:
    once = timed(function, device, 10 if device.type == "cuda" else 1)
    once()
    return median(once() for _ in range(3))


def in_a_row(numbers: Sequence[float]) -> str:
    """Return rounds as a table cell."""
    return " ".join(f"{number:.3g}" for number in numbers)
