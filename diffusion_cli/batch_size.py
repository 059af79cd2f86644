"""The automatic batch size of sampling: the largest that fits in memory and, on a CPU, raises the rate."""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from diffusion_cli.diffusion.guidance import Guided
from diffusion_cli.errors import UsageError
from diffusion_cli.generate import SamplingPipeline, rows_in_turn, uncompiled
from diffusion_cli.system.distributed import started
from diffusion_cli.system.machine import free_memory, peak_memory
from diffusion_cli.system.precision import autocast, device_of

MOST = 512
SHARE = 0.8  # of the free memory that may be used
WORTH = 1.05  # smallest gain in rate that justifies a doubled batch
PATIENCE = 4.0  # seconds of trials on a CPU

ONEDNN = "could not create a primitive"
"""oneDNN's error when memory runs out; afterwards it persists even with free memory."""
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED", ONEDNN)
"""Messages of out-of-memory errors that have no exception type."""

Call = Callable[[int], None]
"""Runs the network once on a number of images, and waits for the result."""


def ran_out(error: BaseException) -> bool:
    """Return whether an error is an out-of-memory error of a device or the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


@contextmanager
def advise_batch_size(batch_size: int | Literal["auto"], device: str) -> Iterator[None]:
    """Turn an out-of-memory error in sampling into a UsageError about the batch size."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they reference the tensors in memory
        if batch_size == "auto":
            remedy = "set a number smaller than the one found"
        elif batch_size > 1:
            remedy = f"try batch_size={batch_size // 2}, or auto"
        else:
            remedy = "one image does not fit; use a device with more memory, or precision=bf16"
        raise UsageError(
            "batch_size", batch_size, f"{device_of(device).type} is out of memory", remedy
        ) from None


def images_that_fit(call: Call, most: int, device: torch.device) -> int:
    """Return the largest power of two that fits, at most `most` and MOST.

    On a CPU it stops doubling when the rate no longer rises.

    Raises torch's OutOfMemoryError if one image does not fit.
    """
    most = 2 ** int(math.log2(max(1, min(most, MOST))))
    return _fit(call, most, device) if device.type == "cuda" else _help(call, most)


def _fit(call: Call, most: int, device: torch.device) -> int:
    """Return the size that fits a GPU, estimated from the peaks of two small calls and then tried."""
    call(1)  # allocates what stays: kernels and library workspaces
    small, large = (_peak(call, count, device) for count in (1, 2))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    sharing = math.ceil(started().local_world / torch.cuda.device_count())
    free = SHARE * (torch.cuda.mem_get_info(device)[0] + unused) / sharing
    size = most
    while size > 1:
        if large + (size - 2) * (large - small) <= free:
            try:
                call(size)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            else:
                break
        size //= 2
    torch.cuda.empty_cache()  # the graphs of a compiled network use a separate pool
    return size


def _peak(call: Call, count: int, device: torch.device) -> int:
    """Return the peak memory of a call, in bytes."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(count)
    return torch.cuda.max_memory_allocated(device) - before


def _help(call: Call, most: int) -> int:
    """Return the size for a CPU, doubled while it fits and raises the rate, within a few seconds."""
    end = time.perf_counter() + PATIENCE
    call(1)  # the first is slower
    size, seconds = 1, _seconds(call, 1)
    while 2 * size <= most and time.perf_counter() + 3 * seconds < end:
        before = peak_memory()
        doubled = _seconds(call, 2 * size)
        if 2 * seconds < WORTH * doubled:
            break
        size, seconds = 2 * size, doubled
        grown = peak_memory() - before  # half of the call's memory; the next call needs 4 times this
        if 4 * grown * started().local_world > SHARE * free_memory():
            break
    return size


def _seconds(call: Call, count: int) -> float:
    """Return the seconds of a call; of two calls if short, the smaller, against noise of other processes."""
    found = []
    while not found or (len(found) < 2 and found[0] < 0.2):
        start = time.perf_counter()
        call(count)
        found.append(time.perf_counter() - start)
    return min(found)


def network_call(pipeline: SamplingPipeline, *, each: int, gradient: bool) -> Call:
    """Return a call of the network as in sampling at a guided time.

    Args:
        pipeline: the model and its settings.
        each: images per result.
        gradient: whether the call is differentiated.
    """
    model, device, times = pipeline.model, pipeline.device, pipeline.times[:-1]
    guidance, schedule = pipeline.guidance, model.denoiser.schedule
    active = [t for t in times if isinstance(guidance, Guided) and guidance.active(schedule, t)]

    def call(count: int) -> None:
        denoise = pipeline.denoise(rows_in_turn(range(each * count), pipeline.condition, device))
        with torch.set_grad_enabled(gradient), autocast(device, pipeline.precision), uncompiled(model):
            x = torch.zeros(each * count, *model.space.shape, device=device, requires_grad=gradient)
            x0 = denoise(x, [*active, times[0]][0]).x0
            if gradient:
                torch.autograd.grad(model.space.decode(x0).sum(), x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
