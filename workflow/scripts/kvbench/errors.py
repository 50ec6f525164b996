"""The one kind of error a user sees, and how a command line ends with it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right.

    Parameters
    ----------
    cause : what is wrong, naming the file or key.
    remedy : what to do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        self.cause = cause.rstrip(". ")
        self.remedy = remedy.rstrip(". ")
        super().__init__(f"{self.cause}. {self.remedy}.")


class Unsupported(Exception):
    """A cell that cannot be run as asked; its text becomes the cell's ``status_reason``."""


def cli(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a `UserError` becomes the last line of stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
