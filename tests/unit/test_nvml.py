"""Clocks, heat and throttling, read from a stand-in for NVML; no GPU here answers."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbench.nvml import Nvml, Watch, connect


class Api:
    """The part of pynvml that is used, with settable answers."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.clock, self.heat, self.reasons, self.thermal_ns, self.millijoules = 1980, 50, 0, 0, 1000
        self.processes: list[Any] = []

    def nvmlDeviceGetClockInfo(self, _: Any, kind: int) -> int:  # noqa: N802
        return self.clock if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetTemperature(self, *_: Any) -> int:  # noqa: N802
        return self.heat

    def nvmlDeviceGetPowerUsage(self, _: Any) -> int:  # noqa: N802
        return 350_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: Any) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetViolationStatus(self, _: Any, policy: int) -> Any:  # noqa: N802
        assert policy == 1
        return SimpleNamespace(violationTime=self.thermal_ns)

    def nvmlDeviceGetTotalEnergyConsumption(self, _: Any) -> int:  # noqa: N802
        if self.millijoules < 0:
            raise self.NVMLError
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, _: Any) -> list[Any]:  # noqa: N802
        return self.processes


def watched(*reasons: int, heated: bool = False) -> dict[str, Any]:
    api = Api()
    watch = Watch(Nvml(api, None))
    watch.begin()
    for bits in reasons:
        api.reasons = bits
        watch.look()
        api.clock -= 10
    api.thermal_ns = 5 if heated else 0
    return watch.end()


def test_a_run_has_its_clocks_heat_and_power() -> None:
    assert watched(0, 0, 0) == {
        "sm_clock_mhz": 1970,
        "memory_clock_mhz": 2619,
        "temperature_c": 50,
        "power_w": 350,
        "slowed_by": None,
        "throttled": False,
    }


def test_a_power_cap_is_told_and_heat_repeats_the_run() -> None:
    assert watched(0, 0x4)["slowed_by"] == "power cap"
    assert watched(0, 0x4)["throttled"] is False
    assert watched(0x1)["slowed_by"] is None  # idle: the run had ended
    assert watched(0x4, 0x40)["slowed_by"] == "power cap, hardware thermal slowdown"
    assert watched(0x40)["throttled"] is True
    assert watched(0, heated=True)["throttled"] is True


def test_what_a_card_does_not_answer_is_not_known() -> None:
    api = Api()
    gpu = Nvml(api, None)
    assert gpu.joules() == 1.0 and gpu.process_bytes() is None
    api.millijoules = -1
    assert gpu.joules() is None


def test_its_own_process_is_found() -> None:
    import os

    api = Api()
    api.processes = [SimpleNamespace(pid=-1, usedGpuMemory=5), SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)]
    assert Nvml(api, None).process_bytes() == 7


def test_without_a_gpu_nothing_is_said() -> None:
    assert connect(torch.device("cpu")) is None
    watch = Watch(None)
    watch.begin()
    watch.look()
    assert watch.end() == {"throttled": None}


def test_without_the_package_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert connect(torch.device("cuda:0")) is None
