"""Retrieval tasks after RULER (arXiv 2404.06654): facts hidden in a long text, and a question that needs them.

Common to all, and other than in RULER: the text is a part of Moby-Dick, not essays or one line repeated; a fact lies
at the depth that is asked for, not at a random one; and the answer's first words, which the model is given, repeat
those of the fact, so that a base or a small model goes on with the value. Every sample is drawn from a seed of its
own, so it is the same for every method and model.

``needle``
    One fact, RULER's single needle: "One of the special magic numbers for garden is: 1234567." Instruction, fact,
    seven digits and question are RULER's; its keys are two words with a hyphen, ours are one plain noun.
``multikey``
    Four such facts with four keys, RULER's multi-key needle: one is asked for and lies at the depth; the others lie
    anywhere.
``variables``
    A chain of assignments, RULER's variable tracking: "VAR CEDAR = 12345. VAR PEARL = VAR CEDAR." Instruction,
    question, values and one solved example before the text are RULER's. Its chain has four hops and names of random
    letters by default, ours two hops and words: SmolLM2-135M, for one, loses longer chains without any compression.
    The chain begins at the depth's place in the first three quarters of the text and spreads over a quarter.
``words``
    A list in which one word is far commoner than any other, RULER's common words: there ten words appear ten times as
    often as the rest of a numbered list; here one is a fifth of a list without numbers, since small models name one
    word and take numbers for words. The words are those of one chapter. It has no depth.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise
from typing import Any

from kvbench import book

KEYS = (
    "apple bridge candle desert eagle forest garden harbor island jungle kitchen lemon market needle ocean palace queen"
    " river silver temple valley window winter yellow castle copper dragon engine finger guitar hammer iron jacket"
).split()
NAMES = (
    "AMBER BIRCH CEDAR DELTA EMBER FLINT GROVE HAZEL IVORY JADE KITE LINEN MAPLE NORTH OLIVE PEARL QUARTZ RAVEN SLATE"
    " TULIP UMBER VIOLET WHEAT YARROW"
).split()
NEEDLES = 4
HOPS = 2
CHAIN_SPREAD = 0.25
WORDS_FOR_ONE = 5
"""The common word is one of so many."""


@dataclass(frozen=True)
class Point:
    """What samples are alike in: task, length of the prompt in tokens, and depth (0 the text's beginning, 1 its end).

    ``depth`` is None where a task has none.
    """

    task: str
    prompt_tokens: int
    depth: float | None


@dataclass(frozen=True)
class Quiz:
    """A sample in words.

    Attributes
    ----------
    document : what the text is taken from, or begins in.
    text : endless pieces of text, as many of which are taken as fit.
    facts : (depth, sentence), in the order in which they come.
    answer_prefix : the first words of the answer, which the model is given.
    answer : the words after them.
    expected : what of the answer is scored.
    """

    document: str
    instruction: str
    text: Iterator[str]
    facts: list[tuple[float, str]]
    question: str
    answer_prefix: str
    answer: str
    expected: list[str]


def points(request: dict[str, Any]) -> list[Point]:
    """The points that a config's ``quality.retrieval`` asks for: every task at every length and depth."""
    return [
        Point(task, tokens, depth)
        for task in request["tasks"]
        for tokens in request["prompt_tokens"]
        for depth in ([None] if task == "words" else request["depths"])
    ]


def quiz(point: Point, sample: int) -> Quiz:
    """A sample by its number, the same in every run."""
    draw = random.Random(f"{point.task}/{point.prompt_tokens}/{point.depth}/{sample}")
    if point.depth is None:
        return _words(draw)
    return {"needle": _needle, "multikey": _multikey, "variables": _variables}[point.task](draw, point.depth)


def score(expected: Sequence[str], answer: str) -> float:
    """Share of the expected strings that an answer has as whole words, in any case and order.

    RULER's ``string_match_all``, which also finds them inside other words.
    """
    return sum(bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.I)) for text in expected) / len(expected)


def _needle(draw: random.Random, depth: float, others: int = 0) -> Quiz:
    document, text = _prose(draw)
    keys = draw.sample(KEYS, others + 1)
    values = [str(draw.randint(1_000_000, 9_999_999)) for _ in keys]
    depths = [depth, *(draw.random() for _ in range(others))]
    said = [f"One of the special magic numbers for {key} is:" for key in keys]
    facts = [f"{words} {value}." for words, value in zip(said, values, strict=True)]
    return Quiz(
        document,
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about"
        " the number afterwards.",
        text,
        sorted(zip(depths, facts, strict=True)),
        f"What is the special magic number for {keys[0]} mentioned in the provided text?",
        said[0],
        f" {values[0]}.",
        values[:1],
    )


def _multikey(draw: random.Random, depth: float) -> Quiz:
    return _needle(draw, depth, NEEDLES - 1)


def _variables(draw: random.Random, depth: float) -> Quiz:
    document, text = _prose(draw)
    names = draw.sample(NAMES, 2 * (HOPS + 1))
    shown, asked = names[: HOPS + 1], names[HOPS + 1 :]
    values = draw.sample(range(10_000, 100_000), 2)
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    question, prefix, answer = _chain_question(shown, values[0])
    example = f"{' '.join(_chain(shown, values[0]))}\n\n{question}\n{prefix}{answer}"
    start = (1 - CHAIN_SPREAD) * depth
    facts = [(start + CHAIN_SPREAD * i / HOPS, line) for i, line in enumerate(_chain(asked, values[1]))]
    instruction = f"{task}\n\n{example}\n\n{task}"
    return Quiz(document, instruction, text, facts, *_chain_question(asked, values[1]), asked)


def _chain(names: list[str], value: int) -> list[str]:
    hops = [f"VAR {to} = VAR {of}." for of, to in pairwise(names)]
    return [f"VAR {names[0]} = {value}.", *hops]


def _chain_question(names: list[str], value: int) -> tuple[str, str, str]:
    """Question, the answer's first words, and the rest of it."""
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f"Answer: {len(names)} variables are assigned the value {value}: VAR",
        f" {', VAR '.join(names)}.",
    )


def _words(draw: random.Random) -> Quiz:
    chapter = draw.choice([chapter for chapter in book.chapters() if len(_vocabulary(chapter)) >= 100])
    common, *rest = draw.sample(_vocabulary(chapter), len(_vocabulary(chapter)))
    return Quiz(
        chapter.name,
        "Below is a list of words. In this list, one word appears more often than the others. Memorize the word that"
        " appears most often.",
        _list(draw, common, rest),
        [],
        "Question: What is the most common word in the above list?",
        "Answer: The word that appears most often in the above list is",
        f' "{common}".',
        [common],
    )


def _list(draw: random.Random, common: str, rest: list[str]) -> Iterator[str]:
    for first in count(0, WORDS_FOR_ONE - 1):
        block = [rest[(first + i) % len(rest)] for i in range(WORDS_FOR_ONE - 1)]
        block.insert(draw.randrange(WORDS_FOR_ONE), common)
        yield from (f" {word}," for word in block)


@cache
def _vocabulary(chapter: book.Chapter) -> list[str]:
    """Lower-case words of a chapter, of middling length, in the alphabet's order."""
    return sorted(set(re.findall(r"\b[a-z]{4,9}\b", chapter.text)))


def _prose(draw: random.Random) -> tuple[str, Iterator[str]]:
    """A chapter's name, and sentences from a random one of it on; after the book's last comes its first."""
    sentences = _sentences()
    start = draw.randrange(len(sentences))
    return sentences[start][0], (f" {sentences[i % len(sentences)][1]}" for i in count(start))


@cache
def _sentences() -> list[tuple[str, str]]:
    """(chapter, sentence) of the whole book; a semicolon ends one too, since this book's are long."""
    ends = r"(?<=[.!?;])\s+|(?<=[.!?;][\"”’')])\s+"
    return [
        (chapter.name, " ".join(sentence.split()))
        for chapter in book.chapters()
        for sentence in re.split(ends, chapter.text)
    ]
