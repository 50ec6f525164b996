"""Prose to train on, so that a retrofit does not read one kind of text alone.

Addresses of presidents and books of fiction. They lie apart from what is measured on (`kvbench.book`), so that a result
does not depend on them. Public domain; where they come from is said beside them, in ``prose/LICENSE.md``.
"""

from collections.abc import Collection
from functools import cache
from pathlib import Path

from kvbench import book
from kvbench.book import Chapter

DATA = ("prose",)
FOLDER = Path(__file__).parent / "prose"


@cache
def addresses() -> list[Chapter]:
    """The addresses, by year ("ADDRESS 1790. George Washington")."""
    return book.read(FOLDER / "addresses.txt", "ADDRESS")


@cache
def fiction() -> list[Chapter]:
    """The books of fiction, whole, by year ("BOOK 1816. Emma, by Jane Austen")."""
    return book.read(FOLDER / "fiction.txt", "BOOK")


def texts(kinds: Collection[str]) -> list[Chapter]:
    """Those of the kinds that are named: ``addresses``, ``fiction``."""
    known = {"addresses": addresses, "fiction": fiction}
    return [text for kind, some in known.items() if kind in kinds for text in some()]
