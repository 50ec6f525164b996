"""Two jobs never measure on one device at once."""

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvbench import device

JOB = """
import sys, time
from kvbench.device import exclusive
with exclusive():
    start = time.monotonic(); time.sleep(0.5); print(start, time.monotonic())
"""


def test_jobs_take_turns() -> None:
    jobs = [subprocess.Popen([sys.executable, "-c", JOB], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    spans = sorted(tuple(map(float, job.communicate(timeout=120)[0].split())) for job in jobs)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(spans))


def test_a_killed_job_leaves_no_lock() -> None:
    job = subprocess.Popen([sys.executable, "-c", JOB.replace("0.5", "60; print('held', flush=True)")])
    time.sleep(0.1)
    job.kill()
    job.wait()
    with device.exclusive() as free:
        assert free.type in ("cpu", "cuda")


def test_resident_memory_is_reset_and_grows_with_what_is_touched() -> None:
    memory = device.ResidentMemory()
    memory.reset()
    before = memory.peak()
    held = torch.ones(50 * 2**20)
    after = memory.peak()
    assert before is not None and after is not None
    assert after - before >= 0.9 * held.nbytes
    del held
    memory.reset()
    assert (memory.peak() or 0) < after


def test_a_cpu_is_named_with_its_threads() -> None:
    named = device.describe(torch.device("cpu"))
    assert named["device"] == f"cpu: {device._cpu_name()} ({torch.get_num_threads()} threads)"


def test_clock_counts_from_its_first_mark() -> None:
    clock = device.clock(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    times = clock.times()
    assert times[0] == 0 and times == sorted(times)


def test_a_job_works_on_the_gpu_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(device, "_lock_file", lambda name: tmp_path / name)
    with device.exclusive() as first, device.exclusive() as second:
        assert (str(first), str(second)) == ("cuda:0", "cuda:1")
    assert current == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_who_says_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert device.ran_out(error) is expected
