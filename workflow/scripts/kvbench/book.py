"""Real prose that comes with kvbench, so that text that no dataset holds is at hand everywhere: a part of Moby-Dick.

Public domain; where it comes from is said beside it, in ``book/LICENSE.md``.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = ("book",)


@dataclass(frozen=True)
class Chapter:
    """A chapter: ``name`` is its heading ("CHAPTER 1. Loomings."), ``text`` its paragraphs, an empty line between."""

    name: str
    text: str


@cache
def chapters() -> list[Chapter]:
    """The chapters in the book's order; a chapter is the unit of text that others are independent of."""
    whole = (Path(__file__).parent / "book" / "moby-dick.txt").read_text("utf-8")
    parts = re.split(r"^(CHAPTER \d+\. .*)$", whole, flags=re.M)[1:]
    return [Chapter(name, text.strip()) for name, text in zip(parts[::2], parts[1::2], strict=True)]
