"""The device that a job measures on: chosen, locked, named, and its memory watched."""

import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch


@contextmanager
def exclusive() -> Iterator[torch.device]:
    """Yield a device that no other kvbench job on this machine uses; wait for one if all are taken.

    Snakemake counts GPUs but assigns none, so two jobs that run at once would both measure on device 0. A CPU is
    one device: two jobs on it would slow each other.
    """
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    while True:
        for name in names:
            lock = open(_lock_file(name), "a")  # noqa: SIM115 - closed below, and by the kernel if the job dies
            try:
                # with one device there is nothing to choose: block instead of asking again
                fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if len(names) > 1 else 0))
            except BlockingIOError:
                lock.close()
                continue
            try:
                if name != "cpu":  # events, streams, graphs and Triton's launches go to the current device
                    torch.cuda.set_device(name)
                yield torch.device(name)
            finally:
                lock.close()
            return
        time.sleep(1.0)


def _lock_file(name: str) -> Path:
    """One file for a physical device: by its UUID, as CUDA_VISIBLE_DEVICES renumbers devices."""
    identity = str(torch.cuda.get_device_properties(name).uuid) if name.startswith("cuda") else "cpu"
    return Path(tempfile.gettempdir(), f"kvbench-{os.getuid()}-{identity}.lock")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's allocators, the driver, a library or Triton may say it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def describe(device: torch.device) -> dict[str, str | None]:
    """Name and driver of a device; a CPU's name carries the threads in use, since they set its speed."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "driver": _driver()}
    return {"device": f"cpu: {_cpu_name()} ({torch.get_num_threads()} threads)", "driver": None}


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class MemoryMeter(Protocol):
    """Peak memory in bytes since `reset`; None where it cannot be told."""

    def reset(self) -> None: ...

    def peak(self) -> int | None: ...

    def reserved(self) -> int | None: ...


class CudaMemory:
    """The caching allocator's own count: bytes of live tensors, and of segments held from the driver."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def reserved(self) -> int | None:
        return torch.cuda.max_memory_reserved(self.device)


class ResidentMemory:
    """A process's peak resident set, which Linux lets it reset (``/proc/self/clear_refs``, value 5: proc(5))."""

    def __init__(self) -> None:
        self.resettable = True

    def reset(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.resettable = False

    def peak(self) -> int | None:
        if not self.resettable:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None

    def reserved(self) -> int | None:
        return None


def memory_meter(device: torch.device) -> MemoryMeter:
    """What counts the peak memory of a device."""
    return CudaMemory(device) if device.type == "cuda" else ResidentMemory()


class Clock(Protocol):
    """Marks moments without making the host wait; `times` gives seconds since the first mark.

    While `times` waits for the device, and once at its end, it calls ``look``.
    """

    def mark(self) -> None: ...

    def times(self, look: Callable[[], None] = ...) -> list[float]: ...


LOOK_S = 0.05
"""Pause between two looks at a device that is still at work."""


def _nothing() -> None:
    return None


class CudaClock:
    """Device events, read only after the last one has passed."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def times(self, look: Callable[[], None] = _nothing) -> list[float]:
        while not self.events[-1].query():
            look()
            time.sleep(LOOK_S)
        look()
        return [self.events[0].elapsed_time(event) / 1e3 for event in self.events]


class HostClock:
    """The host's monotonic clock, for a device that computes in step with it."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def mark(self) -> None:
        self.moments.append(time.perf_counter())

    def times(self, look: Callable[[], None] = _nothing) -> list[float]:
        look()
        return [moment - self.moments[0] for moment in self.moments]


def clock(device: torch.device) -> Clock:
    """A new clock for one run on a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
