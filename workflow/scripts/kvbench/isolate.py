"""A measurement in a process of its own, so that even its death becomes a row."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from kvbench import warm

_ASKED_TO_STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def isolated(work: Callable[[], None], died: Callable[[str], None], shared: bool = True) -> None:
    """Run ``work`` in a forked child; if a signal that nobody sent on purpose kills it, call ``died`` with a reason.

    Call it before torch is imported: the fork is then free, and the parent stays small enough to outlive the
    kernel's out-of-memory killer. Within a run the child comes from the run's `warm` server, where the script starts
    anew and gets here again; work that needs few of the libraries is done sooner without, by ``shared=False``. An
    interrupt or a scheduler's time limit ends both and leaves no row.
    """
    if os.environ.get(warm.CHILD):
        work()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    asked: list[int] = []

    def pass_on(child: int) -> None:
        def stop(number: int, _: FrameType | None) -> None:
            asked.append(number)
            with suppress(ProcessLookupError):
                os.kill(child, number)

        for number in _ASKED_TO_STOP:
            signal.signal(number, stop)

    status = warm.run_again(pass_on) if shared else None
    if status is None:
        status = _forked(work, pass_on)
    if asked:
        sys.exit(128 + asked[0])
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in _ASKED_TO_STOP:
            sys.exit(128 + number)
        hint = " (most likely out of host memory)" if number == signal.SIGKILL else ""
        died(f"killed by {signal.Signals(number).name}{hint}")
    elif os.WEXITSTATUS(status):
        sys.exit(os.WEXITSTATUS(status))


def _forked(work: Callable[[], None], started: Callable[[int], None]) -> int:
    """Wait status of a child of our own that has done the work."""
    child = os.fork()
    if child == 0:
        os._exit(_finished(work))
    started(child)
    return os.waitpid(child, 0)[1]


def _finished(work: Callable[[], None]) -> int:
    """Exit status of ``work``, with Python's own tail (traceback, flushed streams) that `os._exit` would skip."""
    try:
        work()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
