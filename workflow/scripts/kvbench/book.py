"""Real prose that comes with kvbench, so that text that no dataset holds is at hand everywhere.

A part of Moby-Dick, which is measured on and which nothing is trained on; and, to train on, addresses of presidents and
books of fiction.
Public domain; where they come from is said beside them, in ``book/LICENSE.md``.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

DATA = ("book",)


@dataclass(frozen=True)
class Chapter:
    """A chapter, an address or a book of fiction.

    Attributes
    ----------
    name : its heading ("CHAPTER 1. Loomings.", "ADDRESS 1790. George Washington", "BOOK 1816. Emma, by Jane Austen").
    text : its paragraphs, an empty line between.
    """

    name: str
    text: str


@cache
def chapters() -> list[Chapter]:
    """Moby-Dick's chapters in its order; a chapter is the unit of text that others are independent of."""
    return _parts("moby-dick.txt", "CHAPTER")


@cache
def addresses() -> list[Chapter]:
    """The addresses, by year."""
    return _parts("addresses.txt", "ADDRESS")


@cache
def fiction() -> list[Chapter]:
    """The books of fiction, whole, by year."""
    return _parts("fiction.txt", "BOOK")


def prose(names: Collection[str]) -> list[Chapter]:
    """What there is to train on, of the kinds that are named: ``addresses``, ``fiction``."""
    kinds = {"addresses": addresses, "fiction": fiction}
    return [part for name, parts in kinds.items() if name in names for part in parts()]


def _parts(file: str, kind: str) -> list[Chapter]:
    whole = (Path(__file__).parent / "book" / file).read_text("utf-8")
    parts = re.split(rf"^({kind} \d+\. .*)$", whole, flags=re.M)[1:]
    return [Chapter(name, text.strip()) for name, text in zip(parts[::2], parts[1::2], strict=True)]


def pieces(tokenizer: Any, tokens: int, chapters: list[Chapter]) -> Iterator[tuple[str, list[int]]]:
    """(chapter, ids) of exactly ``tokens`` tokens each, none overlapping: a piece of every chapter, then another."""
    start = list(tokenizer("")["input_ids"])  # what the tokenizer puts before any text
    step = tokens - len(start)

    def cut(text: str) -> list[list[int]]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [start + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]

    rest: list[tuple[str, list[list[int]]]] = []
    for chapter in chapters:
        first, *others = cut(chapter.text) or [[]]
        rest.append((chapter.name, others))
        if first:
            yield chapter.name, first
    for layer in zip_longest(*(others for _, others in rest)):
        yield from ((name, ids) for (name, _), ids in zip(rest, layer, strict=True) if ids)
