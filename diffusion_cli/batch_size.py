"""How many images are sampled at a time: as many as the free memory holds and, on a CPU, as help."""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from diffusion_cli.data.memory import free_memory
from diffusion_cli.diffusion.guidance import Guided
from diffusion_cli.errors import UsageError
from diffusion_cli.generate import SamplingPipeline, labels_of, uncompiled
from diffusion_cli.system.distributed import started
from diffusion_cli.system.precision import autocast, device_of

MOST = 512
SHARE = 0.8  # of the free memory that is filled
WORTH = 1.05  # more images at a time are no use unless they raise the rate by so much
PATIENCE = 4.0  # seconds of trials on a CPU

ONEDNN = "could not create a primitive"
"""Its words when memory ran out, and from then on whatever memory there is."""
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED", ONEDNN)
"""The words of libraries whose errors have no type of their own."""

Call = Callable[[int], None]
"""Calls the network once on so many images, and waits for it."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device, or the CPU, has no memory left."""
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
        traceback.clear_frames(error.__traceback__)  # which hold all that was in memory
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
    """The largest power of two, up to `most` and MOST, that fits; on a CPU up to where the rate rises no more.

    Raises torch's OutOfMemoryError where one image does not fit.
    """
    most = 2 ** int(math.log2(max(1, min(most, MOST))))
    return _fit(call, most, device) if device.type == "cuda" else _help(call, most)


def _fit(call: Call, most: int, device: torch.device) -> int:
    """What fits a GPU: reckoned from the peaks of two small calls, then tried."""
    call(1)  # takes what stays: kernels, and room for libraries
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
    torch.cuda.empty_cache()  # a compiled network's graphs have memory of their own
    return size


def _peak(call: Call, count: int, device: torch.device) -> int:
    """Bytes that a call takes at most."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(count)
    return torch.cuda.max_memory_allocated(device) - before


def _help(call: Call, most: int) -> int:
    """What fits and helps a CPU, doubled as long as it does; a few seconds at most."""
    end = time.perf_counter() + PATIENCE
    call(1)  # the first is slower
    size, seconds = 1, _seconds(call, 1)
    while 2 * size <= most and time.perf_counter() + 3 * seconds < end:
        before = _most_held()
        doubled = _seconds(call, 2 * size)
        if 2 * seconds < WORTH * doubled:
            break
        size, seconds = 2 * size, doubled
        grown = _most_held() - before  # by the half of what the call takes, and the next takes twice that
        if 4 * grown * started().local_world > SHARE * free_memory():
            break
    return size


def _seconds(call: Call, count: int) -> float:
    """Of a call, the better of two if they are so short that others disturb them."""
    found = []
    while not found or (len(found) < 2 and found[0] < 0.2):
        start = time.perf_counter()
        call(count)
        found.append(time.perf_counter() - start)
    return min(found)


def _most_held() -> int:
    """Bytes of memory that this process has held at most."""
    import resource  # of POSIX

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def network_call(pipeline: SamplingPipeline, *, each: int, gradient: bool) -> Call:
    """Return a call as sampling makes it at a guided time, of `each` images a result, differentiated or not."""
    model, device, times = pipeline.model, pipeline.device, pipeline.times[:-1]
    guidance, schedule = pipeline.guidance, model.denoiser.schedule
    active = [t for t in times if isinstance(guidance, Guided) and guidance.active(schedule, t)]

    def call(count: int) -> None:
        denoise = pipeline.denoise(labels_of(range(each * count), pipeline.labels, device))
        with torch.set_grad_enabled(gradient), autocast(device, pipeline.precision), uncompiled(model):
            x = torch.zeros(each * count, *model.space.shape, device=device, requires_grad=gradient)
            x0 = denoise(x, [*active, times[0]][0]).x0
            if gradient:
                torch.autograd.grad(model.space.decode(x0).sum(), x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
