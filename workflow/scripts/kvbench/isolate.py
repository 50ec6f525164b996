"""A measurement in a process of its own, so that even its death becomes a row."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

_ASKED_TO_STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def isolated(work: Callable[[], None], died: Callable[[str], None]) -> None:
    """Run ``work`` in a forked child; if a signal that nobody sent on purpose kills it, call ``died`` with a reason.

    Call it before torch is imported: the fork is then free, and the parent stays small enough to outlive the
    kernel's out-of-memory killer. An interrupt or a scheduler's time limit ends both and leaves no row.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os._exit(_finished(work))

    def stop(number: int, _: FrameType | None) -> None:
        os.kill(child, number)
        os.waitpid(child, 0)
        os._exit(128 + number)

    for asked in _ASKED_TO_STOP:
        signal.signal(asked, stop)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in _ASKED_TO_STOP:
            sys.exit(128 + number)
        hint = " (most likely out of host memory)" if number == signal.SIGKILL else ""
        died(f"killed by {signal.Signals(number).name}{hint}")
    elif os.WEXITSTATUS(status):
        sys.exit(os.WEXITSTATUS(status))


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
