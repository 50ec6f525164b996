"""The device's rates: what is written of them, and what a failure leaves."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench import device, rates, roofline

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a rate means little and takes no time."""
    monkeypatch.setattr(rates, "BUFFER", {"cpu": 2**20})
    monkeypatch.setattr(rates, "LARGEST", {"cpu": 512})
    monkeypatch.setattr(rates, "WARM_UP_S", {"cpu": 1e-3})


def written(folder: Path) -> dict[str, Any]:
    rates.write(folder / "rates.json", {"script": "rates", "code": "abc"})
    return json.loads((folder / "rates.json").read_text("utf-8"))


def test_the_rates_of_a_device_are_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a fork of a process that has used OpenMP's threads may hang in its next product
    monkeypatch.setattr(rates, "isolated", lambda work, died, shared: work())
    found = written(tmp_path)
    name = device.describe(CPU)["device"]
    assert set(found["rates"]) == {name} and found["status_reason"] is None
    assert found["provenance"]["device"] == name and found["provenance"]["code"] == "abc"
    assert set(found["rates"][name]["matmul"]) == set(rates.DTYPES)
    for rate, unit in [
        (found["rates"][name]["copy"], "bytes"),
        *((m, "flops") for m in found["rates"][name]["matmul"].values()),
    ]:
        assert 0 < rate[f"{unit}_per_s_low"] <= rate[f"{unit}_per_s"] <= rate[f"{unit}_per_s_high"]
        assert rate["repeats"] == rates.REPEATS
    read = roofline.read_rates(tmp_path / "rates.json")[str(name)]
    assert read.copy_bytes_per_s == found["rates"][name]["copy"]["bytes_per_s"]
    assert read.matmul_flops_per_s["float32"] == found["rates"][name]["matmul"]["float32"]["flops_per_s"]


def test_beside_a_gpu_the_libraries_of_the_run_are_imported_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(rates, "isolated", lambda work, died, shared: None)
    monkeypatch.setattr(rates.warm, "begin", lambda: begun.append(1))
    for driver in (tmp_path / "none", tmp_path):
        monkeypatch.setattr(rates, "DRIVER", driver)
        rates.write(tmp_path / "rates.json", {})
    assert begun == [1]


def test_a_rate_is_the_amount_over_the_median_time() -> None:
    found = rates._rate("bytes", 100, [1.0, 4.0, 2.0])
    assert found == {"bytes_per_s": 50, "bytes_per_s_low": 25, "bytes_per_s_high": 100, "repeats": 3}


def test_a_slow_dtype_gets_smaller_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "PRODUCT_S", 0.0)
    assert rates.measure(CPU)["matmul"]["float32"]["size"] == 256
    monkeypatch.setattr(rates, "PRODUCT_S", 60.0)
    assert rates.measure(CPU)["matmul"]["float32"]["size"] == 512


@pytest.mark.parametrize("death", ["error", "signal"])
def test_a_failure_leaves_its_reason_and_no_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str) -> None:
    def fail(_: Any) -> None:
        if death == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")

    monkeypatch.setattr(rates, "measure", fail)
    found = written(tmp_path)
    assert found["rates"] == {} and roofline.read_rates(tmp_path / "rates.json") == {}
    assert ("SIGKILL" if death == "signal" else "OutOfMemoryError: tried to allocate") in found["status_reason"]


def test_no_rates_where_none_were_measured(tmp_path: Path) -> None:
    assert roofline.read_rates(tmp_path / "rates.json") == {}
