"""The rates of a real GPU are those of its kind, and take seconds."""

import time

import pytest
import torch

from kvbench import rates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_rates_are_in_order() -> None:
    torch.zeros(1, device="cuda")
    start = time.perf_counter()
    found = rates.measure(torch.device("cuda:0"))
    print(f"{torch.cuda.get_device_name()}: {time.perf_counter() - start:.1f} s, {found}")
    assert found["copy"]["bytes_per_s"] > 1e11
    matmul = {name: rate["flops_per_s"] for name, rate in found["matmul"].items()}
    assert matmul["bfloat16"] > matmul["float32"] > 1e12
