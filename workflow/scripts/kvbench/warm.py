"""A process that has imported the libraries, from which the jobs of a run on this machine are forked.

Importing torch, transformers and kvpress takes seconds, and a run has a job for each measurement. The first job starts
this server; it imports what all of them need, touches no device, and forks one child a job, which runs the job's own
command line. First-party code is imported in the child, so an edit is never missed. The server ends with the run.

Run as a script it is the server; it imports nothing of ours.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RUN = "KVBENCH_RUN"
"""Environment variable with the process id of the run that a job belongs to; without it there is no server."""

CHILD = "KVBENCH_CHILD"
"""Environment variable that tells a job that it is the forked child already."""

IDLE_S = 120.0
"""A server without work ends after this, or with its run."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent dies."""

LIBRARIES = ("torch", "transformers.models.auto.modeling_auto", "kvpress", "pyarrow.parquet", "tqdm")
"""What the jobs on a device import before they can begin."""

READ_AT_IMPORT = (
    *("OMP_", "MKL_", "KMP_", "OPENBLAS_", "NUMEXPR_", "CUDA_", "NVIDIA_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_"),
    *("TRITON", "PYTHON", "LD_"),
)
"""Beginnings of the variables that libraries read when they are imported: jobs that differ in one need two servers."""


def run_again(started: Callable[[int], None]) -> int | None:
    """Run this process's own command line in a child of the run's server, and wait for its end.

    Parameters
    ----------
    started : called with the child's process id.

    Returns
    -------
    The child's wait status; None where there is no server and the caller must do the work itself.
    """
    if not os.environ.get(RUN):
        return None
    try:
        connection = _connection()
    except OSError:
        return None
    with connection:
        try:
            job = {"argv": sys.argv, "cwd": str(Path.cwd()), "env": dict(os.environ)}
            payload = json.dumps(job).encode()
            socket.send_fds(connection, [len(payload).to_bytes(8, "big")], [1, 2])
            connection.sendall(payload)
            answers = connection.makefile("r")
            child = int(answers.readline())
        except (OSError, ValueError):  # it died before it had begun: nothing was done
            return None
        started(child)
        status = answers.readline()
    return int(status) if status else signal.SIGKILL  # a server that is killed takes its children with it


def begin() -> None:
    """Start this run's server, if there is none, so that it has imported when the first job comes."""
    if os.environ.get(RUN):
        with contextlib.suppress(OSError):
            _connection().close()


def _connection() -> socket.socket:
    """A connection to the server of this run, which is started if there is none."""
    path = _path()
    with open(f"{path}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two jobs that start at once start one server
        try:
            return _connected(path)
        except (FileNotFoundError, ConnectionRefusedError):
            _start(path)
            return _connected(path)


def _path() -> Path:
    """Where the server of this run listens: one for each interpreter and each environment that imports depend on."""
    seen = {key: value for key, value in os.environ.items() if key.startswith(READ_AT_IMPORT)}
    key = json.dumps([sys.executable, os.environ[RUN], sorted(seen.items())])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"kvbench-{os.getuid()}-{name}")


def _connected(path: Path) -> socket.socket:
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} is another user's")
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _start(path: Path) -> None:
    """Start a server and wait until it listens, which it does before it imports."""
    path.unlink(missing_ok=True)
    read, write = os.pipe()
    # -P: the folder of this file must not shadow libraries; a session of its own: Ctrl-C is for the jobs
    command = [sys.executable, "-P", __file__, str(path), os.environ[RUN], str(write)]
    with open(os.devnull, "r+b") as nothing:
        subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, pass_fds=[write], start_new_session=True
        )
    os.close(write)
    os.read(read, 1)
    os.close(read)


class Server:
    """Accepts jobs, forks a child for each, and tells how it ended."""

    def __init__(self, path: Path, run: int) -> None:
        self.path, self.run = path, run
        self.socket = socket.socket(socket.AF_UNIX)
        os.umask(0o077)  # no other user may send jobs
        self.socket.bind(str(path))
        self.socket.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.socket, selectors.EVENT_READ)
        self.jobs: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Until the run has ended, or nothing has come for `IDLE_S`, and no child is left."""
        last = time.monotonic()
        while self.jobs or (_alive(self.run) and time.monotonic() - last < IDLE_S):
            for key, _ in self.selector.select(0.02 if self.jobs else 1.0):
                if key.fileobj is self.socket:
                    with contextlib.suppress(OSError):  # a client that died in the middle is no job
                        self.begin(self.socket.accept()[0])
                else:
                    self.gone(key.data)
            self.reap()
            last = time.monotonic() if self.jobs else last
        for path in (self.path, Path(f"{self.path}.lock")):
            path.unlink(missing_ok=True)

    def begin(self, connection: socket.socket) -> None:
        """Fork a child for the job that a connection brings, if it brings one."""
        header, fds, _, _ = socket.recv_fds(connection, 8, 2)
        if not header:
            connection.close()
            return
        job = json.loads(_exactly(connection, int.from_bytes(header, "big")))
        child = os.fork()
        if child == 0:
            for other in (self.socket, connection, *self.jobs.values()):
                other.close()
            with contextlib.suppress(AttributeError):  # no child outlives a server that is killed
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _become(job, fds)
        for fd in fds:
            os.close(fd)
        connection.sendall(f"{child}\n".encode())
        self.jobs[child] = connection
        self.selector.register(connection, selectors.EVENT_READ, child)

    def gone(self, child: int) -> None:
        """Its client has been killed: so is the child."""
        self.selector.unregister(self.jobs[child])
        os.kill(child, signal.SIGKILL)

    def reap(self) -> None:
        """Tell the clients of children that have ended."""
        for child in list(self.jobs):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                connection = self.jobs.pop(child)
                with contextlib.suppress(KeyError):
                    self.selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(f"{status}\n".encode())
                connection.close()


def _exactly(connection: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        part = connection.recv(length - len(found))
        if not part:
            raise ConnectionError("a job that ends in the middle")
        found += part
    return found


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _become(job: dict[str, object], fds: list[int]) -> None:
    """Be the job's process: its streams, folder, environment and arguments; never returns."""
    status = 1
    try:
        for place, fd in enumerate(fds, start=1):
            os.dup2(fd, place)
            os.close(fd)
        os.chdir(str(job["cwd"]))
        os.environ.clear()
        os.environ.update(job["env"], **{CHILD: "1"})  # type: ignore[call-overload]
        sys.argv = list(job["argv"])  # type: ignore[call-overload]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _import() -> None:
    """What the jobs on the device need; no device may be touched, or its driver would not work in a child."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in LIBRARIES:
        importlib.import_module(name)


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]), int(sys.argv[2]))
    os.close(int(sys.argv[3]))
    _import()
    server.serve()
