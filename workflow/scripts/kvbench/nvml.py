"""What the driver knows of a GPU: clocks, temperature, power, energy, what slows it down, and who holds its memory.

Through NVML (nvidia-ml-py). Where there is none, on a CPU or another vendor's GPU, nothing is known or said.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of the clocks' event reasons that slow a busy GPU down (nvml.h, nvmlClocksEventReasons)."""

ABNORMAL = 0x8 | 0x20 | 0x40 | 0x80
"""Those that say the machine cannot hold its speed. A power cap is not among them: a large prefill runs into it."""

THERMAL_POLICY = 1
"""NVML_PERF_POLICY_THERMAL: the driver sums the time in which heat lowered the clocks."""


@dataclass(frozen=True)
class Sample:
    """One look at a GPU: MHz, degrees Celsius, watts, and the bits of `REASONS`."""

    sm_clock_mhz: int
    memory_clock_mhz: int
    temperature_c: int
    power_w: float
    reasons: int


class Nvml:
    """One GPU as NVML sees it."""

    def __init__(self, api: Any, handle: Any) -> None:
        self.api, self.handle = api, handle

    def sample(self) -> Sample:
        """Look once; about a millisecond of host time."""
        api, gpu = self.api, self.handle
        return Sample(
            api.nvmlDeviceGetClockInfo(gpu, api.NVML_CLOCK_SM),
            api.nvmlDeviceGetClockInfo(gpu, api.NVML_CLOCK_MEM),
            api.nvmlDeviceGetTemperature(gpu, api.NVML_TEMPERATURE_GPU),
            api.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            api.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
        )

    def joules(self) -> float | None:
        """Energy that the GPU has taken since the driver was loaded; the counter moves every 0.1 s or so."""
        return self._asked(lambda: self.api.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3)

    def thermal_s(self) -> float | None:
        """Seconds in which heat has lowered the clocks, since the driver was loaded."""
        return self._asked(
            lambda: self.api.nvmlDeviceGetViolationStatus(self.handle, THERMAL_POLICY).violationTime / 1e9
        )

    def process_bytes(self) -> int | None:
        """Memory that this process holds on the GPU, the CUDA context included; None in a container that hides it."""

        def found() -> int | None:
            processes = self.api.nvmlDeviceGetComputeRunningProcesses(self.handle)
            return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)

        return self._asked(found)

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self.api.NVMLError:  # not every card and container answers every question
            return None


def connect(device: Any) -> Nvml | None:
    """The driver's view of a torch device; None where there is no NVML."""
    if device.type != "cuda":
        return None
    import torch

    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # by its UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's
        gpu = Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
        gpu.sample()
    except pynvml.NVMLError:
        return None
    return gpu


@dataclass
class Watch:
    """Samples of one run, taken while the host waits for the device anyway."""

    gpu: Nvml | None
    samples: list[Sample] = field(default_factory=list)
    thermal_before: float | None = None

    def begin(self) -> None:
        """Before the run."""
        self.samples = []
        self.thermal_before = self.gpu.thermal_s() if self.gpu else None

    def look(self) -> None:
        """During it."""
        if self.gpu:
            self.samples.append(self.gpu.sample())

    def end(self) -> dict[str, Any]:
        """After it: clocks, temperature and power; what slowed the GPU; whether the run is to be repeated for it."""
        if not self.samples or self.gpu is None:
            return {"throttled": None}
        bits = 0
        for sample in self.samples:
            bits |= sample.reasons
        after = self.gpu.thermal_s()
        heated = after is not None and self.thermal_before is not None and after > self.thermal_before
        names = [name for bit, name in REASONS.items() if bits & bit]
        return {
            "sm_clock_mhz": median(s.sm_clock_mhz for s in self.samples),
            "memory_clock_mhz": median(s.memory_clock_mhz for s in self.samples),
            "temperature_c": max(s.temperature_c for s in self.samples),
            "power_w": sum(s.power_w for s in self.samples) / len(self.samples),
            "slowed_by": ", ".join(names) or None,
            "throttled": bool(bits & ABNORMAL) or heated,
        }
