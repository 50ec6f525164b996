"""A job that dies leaves a row; a job that is told to stop does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from kvbench.isolate import isolated
def work():
    Path({here!r}, "pid").write_text(str(os.getpid()))
    {body}
isolated(work, died=lambda reason: Path({here!r}, "row").write_text(reason))
print("after")
"""


def start(folder: Path, body: str) -> subprocess.Popen[str]:
    program = PROGRAM.format(here=str(folder), body=body)
    return subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL (most likely out of host memory)"),
        ("os.abort()", "killed by SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    ],
)
def test_death_by_a_signal_is_a_row(tmp_path: Path, body: str, reason: str) -> None:
    job = start(tmp_path, body)
    out, _ = job.communicate(timeout=30)
    assert (job.returncode, out) == (0, "after\n")
    assert (tmp_path / "row").read_text() == reason


def test_an_exception_is_a_failed_job_with_its_traceback(tmp_path: Path) -> None:
    job = start(tmp_path, "raise ValueError('why')")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 1 and "ValueError: why" in err and not (tmp_path / "row").exists()


def test_an_exit_status_is_passed_on(tmp_path: Path) -> None:
    job = start(tmp_path, "sys.exit(3)")
    job.communicate(timeout=30)
    assert job.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_job_ends_its_child_and_leaves_no_row(tmp_path: Path, number: int) -> None:
    job = start(tmp_path, "time.sleep(60)")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    job.send_signal(number)
    job.communicate(timeout=30)
    assert job.returncode == 128 + number and not (tmp_path / "row").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
