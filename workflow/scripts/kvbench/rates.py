"""What a device does at best: bytes copied within its memory a second, and operations of a dense matrix product."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from kvbench import files, warm
from kvbench.errors import cli
from kvbench.isolate import isolated
from kvbench.provenance import versions

DTYPES = ("float32", "bfloat16", "float16")

BUFFER = {"cuda": 2**31, "cpu": 2**29}
"""Bytes of a copy's source, and of its target: many times what caches hold."""

LARGEST = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the largest matrices."""

WARM_UP_S = {"cuda": 0.2, "cpu": 0.1}
"""Clocks rise, and pages are touched, before anything is measured."""

PRODUCT_S = 0.15
"""A matrix product may take so long; smaller matrices are taken where the dtype is slow."""

REPEATS = 7

DRIVER = Path("/dev/nvidiactl")
"""Where there is an NVIDIA GPU."""


def write(output: Path, provenance: dict[str, Any]) -> None:
    """Measure a device's rates in a process of its own and write them as JSON: ``rates`` by the device's name.

    Whatever fails leaves no rates and its reason in ``status_reason``: what is derived from them is then unknown, and
    the measurements go on without.
    """

    def record(rates: dict[str, Any], reason: str | None, facts: dict[str, Any]) -> None:
        known = provenance | {"versions": versions()} | facts
        files.write_json(output, {"rates": rates, "status_reason": reason, "provenance": known})

    def child() -> None:
        from kvbench import device as devices

        with devices.exclusive() as device:
            facts = devices.describe(device)
            try:
                record({str(facts["device"]): measure(device)}, None, facts)
            except (RuntimeError, MemoryError) as error:  # torch's own OutOfMemoryError is a RuntimeError
                record({}, f"{type(error).__name__}: {str(error)[:500]}", facts)

    if DRIVER.exists():  # the measurements' libraries are imported meanwhile; on a CPU that would slow what is measured
        warm.begin()
    isolated(lambda: cli(child), died=lambda reason: record({}, reason, {}), shared=False)


def measure(device: Any) -> dict[str, Any]:
    """Rates of a device, each with the least and the most of its repeats.

    Parameters
    ----------
    device : torch.device.

    Returns
    -------
    ``copy`` has ``bytes_per_s``, where a byte read and the byte written are two, with ``bytes_per_s_low`` and
    ``bytes_per_s_high``, ``buffer_bytes`` and ``repeats``. ``matmul`` has for each dtype ``flops_per_s`` likewise,
    where a multiply-add is two operations, and the matrices' ``size``. float32 is as torch multiplies it by default,
    without TF32.
    """
    return {"copy": _copy(device), "matmul": {name: _matmul(device, name) for name in DTYPES}}


def _copy(device: Any) -> dict[str, Any]:
    import torch

    size = BUFFER[device.type]
    source = torch.empty(size // 4, dtype=torch.float32, device=device).fill_(1.0)  # touches every page
    target = torch.empty_like(source)
    times = _times(device, lambda: target.copy_(source))
    return _rate("bytes", 2 * size, times) | {"buffer_bytes": size}


def _matmul(device: Any, name: str) -> dict[str, Any]:
    import torch

    def product(size: int) -> Callable[[], Any]:
        # a layer multiplies with its weights transposed; random numbers, since zeros draw less power
        rows, weights = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(rows)
        return lambda: torch.mm(rows, weights.t(), out=out)

    size, step = 256, product(256)
    while size < LARGEST[device.type]:
        # a product of matrices twice as large takes at most eight times as long
        doublings = int(math.log2(max(1.0, PRODUCT_S / min(_runs(device, step, 2)))) / 3)
        if doublings < 1:
            break
        size = min(LARGEST[device.type], size << doublings)
        step = product(size)
    return _rate("flops", 2 * size**3, _times(device, step)) | {"size": size}


def _times(device: Any, step: Callable[[], Any]) -> list[float]:
    """Seconds of each repeat, warm."""
    warm = 0.0
    while warm < WARM_UP_S[device.type]:
        warm += sum(_runs(device, step, 2))
    return _runs(device, step, REPEATS)


def _runs(device: Any, step: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of ``count`` runs."""
    from kvbench import device as devices

    clock = devices.clock(device)
    clock.mark()
    for _ in range(count):
        step()
        clock.mark()
    times = clock.times()
    return [after - before for before, after in itertools.pairwise(times)]


def _rate(unit: str, amount: int, times: list[float]) -> dict[str, Any]:
    return {
        f"{unit}_per_s": amount / median(times),
        f"{unit}_per_s_low": amount / max(times),
        f"{unit}_per_s_high": amount / min(times),
        "repeats": len(times),
    }
