"""Images at a time: as many as fit and help, found with a device and a clock that are made up."""

import pytest
import torch

from diffusion_cli import batch_size as capacity
from diffusion_cli.batch_size import images_that_fit
from diffusion_cli.system.distributed import ProcessInfo

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20


class Clock:
    """A CPU that takes `fixed` seconds a call and `each` an image, and `bytes_each` bytes of memory an image."""

    def __init__(
        self, monkeypatch, fixed: float, each: float, bytes_each: int = MIB, free: int = 1 << 40
    ) -> None:
        self.now, self.held, self.calls = 0.0, 0, []
        self.fixed, self.each, self.bytes_each = fixed, each, bytes_each
        monkeypatch.setattr(capacity.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(capacity, "peak_memory", lambda: self.held)
        monkeypatch.setattr(capacity, "free_memory", lambda: free)

    def __call__(self, count: int) -> None:
        self.calls.append(count)
        self.now += self.fixed + self.each * count
        self.held = max(self.held, self.bytes_each * count)


@pytest.mark.parametrize(
    ("fixed", "each", "most", "size"),
    [
        (1e-3, 1e-3, 512, 16),  # 32 images take 1.94 times as long as 16, and 16 took 1.89 times as long as 8
        (1e-2, 1e-5, 10**6, 512),
        (1e-2, 1e-5, 100, 64),
        (0.0, 1e-3, 512, 1),
        (1e-2, 1e-5, 1, 1),
    ],
)
def test_a_cpu_is_given_no_more_than_helps(monkeypatch, fixed, each, most, size):
    assert images_that_fit(Clock(monkeypatch, fixed, each), most, CPU) == size


def test_trials_on_a_slow_cpu_end_in_time(monkeypatch):
    clock = Clock(monkeypatch, 0.5, 1e-3)
    assert images_that_fit(clock, 512, CPU) == 8
    assert clock.now < capacity.PATIENCE


def test_a_cpu_is_not_filled(monkeypatch):
    clock = Clock(monkeypatch, 1e-2, 1e-5, bytes_each=100 * MIB, free=2000 * MIB)
    size = images_that_fit(clock, 512, CPU)
    assert 100 * MIB * max(clock.calls) <= capacity.SHARE * 2000 * MIB
    assert size == 16


class Memory:
    """A GPU with `free` bytes. An image takes `each` bytes, and twice as many from `more` images on."""

    def __init__(self, monkeypatch, free: int, each: int, more: int = 10**9) -> None:
        self.free, self.each, self.more, self.peak, self.calls = free, each, more, 0, []
        for name in ("memory_allocated", "memory_reserved", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda device: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.free))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def __call__(self, count: int) -> None:
        self.calls.append(count)
        self.peak = 7 * MIB + self.each * count * (2 if count >= self.more else 1)
        if self.peak > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("free", "most", "more", "size"),
    [(1 << 40, 1000, 10**9, 512), (1 << 40, 100, 10**9, 64), (1000, 512, 10**9, 64), (1000, 512, 64, 32)],
)
def test_a_gpu_is_given_what_fits_as_tried(monkeypatch, free, most, more, size):
    memory = Memory(monkeypatch, free * MIB, 10 * MIB, more)
    assert images_that_fit(memory, most, GPU) == size
    assert memory.calls[-1] == size
    assert len(memory.calls) <= 5


def test_processes_that_share_a_gpu_share_its_memory(monkeypatch):
    memory = Memory(monkeypatch, 1000 * MIB, 10 * MIB)
    alone = images_that_fit(memory, 512, GPU)
    monkeypatch.setattr(capacity, "started", lambda: ProcessInfo(0, 4, 0, 4))
    assert images_that_fit(memory, 512, GPU) == alone // 4
