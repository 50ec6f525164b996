"""A job that dies leaves a row; a job that is told to stop does not; forked here or from the run's warm server."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbench import isolate, warm

LIBRARY = {"PYTHONPATH": str(Path(isolate.__file__).parents[1])}

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


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves a socket's the room that it needs."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(params=["own fork", "warm server"])
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of a job; the server of all of them is that of this process."""
    run = {} if request.param == "own fork" else {"KVBENCH_RUN": str(os.getpid())}
    return {key: value for key, value in os.environ.items() if key != "KVBENCH_RUN"} | run


def start(folder: Path, body: str, env: dict[str, str]) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM.format(here=str(folder), body=body))
    env = env | LIBRARY
    return subprocess.Popen([sys.executable, str(program)], stdout=-1, stderr=-1, text=True, env=env)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL (most likely out of host memory)"),
        ("os.abort()", "killed by SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    ],
)
def test_death_by_a_signal_is_a_row(tmp_path: Path, env: dict[str, str], body: str, reason: str) -> None:
    job = start(tmp_path, body, env)
    out, _ = job.communicate(timeout=120)
    assert (job.returncode, out) == (0, "after\n")
    assert (tmp_path / "row").read_text() == reason


def test_an_exception_is_a_failed_job_with_its_traceback(tmp_path: Path, env: dict[str, str]) -> None:
    job = start(tmp_path, "raise ValueError('why')", env)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 1 and "ValueError: why" in err and not (tmp_path / "row").exists()


def test_an_exit_status_is_passed_on(tmp_path: Path, env: dict[str, str]) -> None:
    job = start(tmp_path, "sys.exit(3)", env)
    job.communicate(timeout=120)
    assert job.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_job_ends_its_child_and_leaves_no_row(tmp_path: Path, env: dict[str, str], number: int) -> None:
    job = start(tmp_path, "time.sleep(60)", env)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    job.send_signal(number)
    job.communicate(timeout=120)
    assert job.returncode == 128 + number and not (tmp_path / "row").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_job_of_a_warm_server_finds_its_libraries_imported_and_its_own_settings(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    body = f"Path({str(seen)!r}).write_text(repr(('torch' in sys.modules, os.getcwd(), sys.argv[1:])))"
    env = dict(os.environ) | {"KVBENCH_RUN": str(os.getpid())}
    start(tmp_path, body, env).communicate(timeout=120)
    assert seen.read_text() == repr((True, str(Path.cwd()), []))


def test_a_client_that_is_killed_takes_its_child_along(tmp_path: Path) -> None:
    env = dict(os.environ) | {"KVBENCH_RUN": str(os.getpid())}
    job = start(tmp_path, "time.sleep(60)", env)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    job.kill()
    job.wait()
    child = int((tmp_path / "pid").read_text())
    for _ in range(500):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("the child lives on")


def test_without_a_server_a_job_forks_by_itself(tmp_path: Path) -> None:
    env = dict(os.environ) | {"KVBENCH_RUN": str(os.getpid()), "TMPDIR": str(tmp_path / ("x" * 120))}
    (tmp_path / ("x" * 120)).mkdir()  # too long a path for a socket
    start(tmp_path, "sys.exit(0)", env).communicate(timeout=120)
    assert (tmp_path / "pid").exists()


def test_work_that_is_not_shared_starts_no_server(tmp_path: Path) -> None:
    env = dict(os.environ) | {"KVBENCH_RUN": str(os.getpid()), "TMPDIR": str(tmp_path)}
    program = "from kvbench.isolate import isolated; isolated(lambda: print('done'), died=print, shared=False)"
    made = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert made.stdout == "done\n" and not list(tmp_path.iterdir())


def test_a_server_that_was_started_before_there_was_a_job_serves_the_first(tmp_path: Path, short: Path) -> None:
    env = dict(os.environ) | {"KVBENCH_RUN": str(os.getpid()), "TMPDIR": str(short)}
    begin = [sys.executable, "-c", "from kvbench import warm; warm.begin(); warm.begin()"]
    subprocess.run(begin, env=env | LIBRARY, check=True, timeout=60)
    (listening,) = (path for path in short.iterdir() if path.is_socket())
    before = listening.stat().st_ino
    start(tmp_path, "Path(sys.argv[0] + '.seen').write_text(str('torch' in sys.modules))", env).communicate(timeout=120)
    assert (tmp_path / "program.py.seen").read_text() == "True"
    assert listening.stat().st_ino == before


def test_without_a_run_no_server_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(warm.RUN, raising=False)
    monkeypatch.setattr(warm.tempfile, "gettempdir", lambda: str(tmp_path))
    warm.begin()
    assert not list(tmp_path.iterdir())


def test_a_client_that_dies_in_the_middle_takes_no_other_along(tmp_path: Path, short: Path) -> None:
    env = dict(os.environ) | {"KVBENCH_RUN": str(os.getpid()), "TMPDIR": str(short)}
    job = start(tmp_path, "time.sleep(3); Path(sys.argv[0] + '.done').touch()", env)
    while not (tmp_path / "pid").exists():
        time.sleep(0.02)
    (listening,) = (path for path in short.iterdir() if path.is_socket())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(listening))
        socket.send_fds(client, [(100).to_bytes(8, "big")], [1, 2])
        client.sendall(b"{")
    job.communicate(timeout=120)
    assert job.returncode == 0 and (tmp_path / "program.py.done").exists()
