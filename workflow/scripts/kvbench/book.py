"""A part of Moby-Dick, so that text that no dataset holds is at hand everywhere to measure on.

Nothing is trained on it. Public domain; where it comes from is said beside it, in ``book/LICENSE.md``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

DATA = ("book",)


@dataclass(frozen=True)
class Chapter:
    """A chapter, or another text that stands for itself.

    Attributes
    ----------
    name : its heading ("CHAPTER 1. Loomings.").
    text : its paragraphs, an empty line between.
    """

    name: str
    text: str


@cache
def chapters() -> list[Chapter]:
    """Moby-Dick's chapters in its order; a chapter is the unit of text that others are independent of."""
    return read(Path(__file__).parent / "book" / "moby-dick.txt", "CHAPTER")


def read(path: Path, kind: str) -> list[Chapter]:
    """The texts of a file, each under a heading of the kind, a number, and its name."""
    parts = re.split(rf"^({kind} \d+\. .*)$", path.read_text("utf-8"), flags=re.M)[1:]
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
