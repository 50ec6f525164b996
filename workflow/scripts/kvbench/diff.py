"""Two texts side by side: where they part, and which words they still share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

# Scripts without spaces between words count a character as a word.
SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"\s*(?:[{SPACELESS}]|[^\W{SPACELESS}]+|[^\w\s])|\s+")

LONGEST = 2000  # words compared; matching is quadratic
ALIKE = 0.25  # below this share of common words a word-by-word diff is only confetti


@dataclass(frozen=True)
class Segment:
    """A stretch of text: in both texts, only in the new one, or only in the base."""

    kind: Literal["both", "added", "removed"]
    text: str


@dataclass(frozen=True)
class TextDiff:
    """A text against its base.

    ``prefix`` is what both begin with, in whole words; ``segments`` is the rest, in reading order.
    ``words`` counts the words of the prefix, ``shared`` is the share of words in common (0 to 1).
    """

    prefix: str
    segments: tuple[Segment, ...]
    words: int
    shared: float

    @property
    def equal(self) -> bool:
        """Whether the two texts are the same."""
        return not self.segments


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, each with the white space before it; joined they are the text again."""
    return _WORD.findall(text)


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading elements that two sequences share."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def compare_texts(base: str, text: str) -> TextDiff:
    """Diff ``text`` against ``base`` word by word, after the words with which both begin."""
    before, after = split_words(base), split_words(text)
    start = common_prefix(before, after)
    rest_before, rest_after = before[start:], after[start:]
    matched, segments = _segments(rest_before, rest_after)
    longest = max(len(before), len(after))
    return TextDiff(
        prefix="".join(after[:start]),
        segments=tuple(segments),
        words=start,
        shared=(start + matched) / longest if longest else 1.0,
    )


def _segments(before: list[str], after: list[str]) -> tuple[int, list[Segment]]:
    """Words in common and the segments; of texts too unlike only the new one is given, in one piece."""
    short_before, short_after = before[:LONGEST], after[:LONGEST]
    matcher = SequenceMatcher(None, short_before, short_after, autojunk=False)
    matched = sum(block.size for block in matcher.get_matching_blocks())
    segments: list[Segment] = []
    if matched >= ALIKE * max(len(short_before), len(short_after), 1):
        for tag, a_start, a_end, b_start, b_end in matcher.get_opcodes():
            if tag == "equal":
                segments.append(Segment("both", "".join(short_after[b_start:b_end])))
                continue
            segments.append(Segment("removed", "".join(short_before[a_start:a_end])))
            segments.append(Segment("added", "".join(short_after[b_start:b_end])))
        segments.append(Segment("removed", "".join(before[LONGEST:])))
        segments.append(Segment("added", "".join(after[LONGEST:])))
    else:
        segments = [Segment("added", "".join(after)) if after else Segment("removed", "".join(before))]
    return matched, [segment for segment in segments if segment.text]
