"""A retrieval sample in a model's tokens, of exactly the length that is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

from kvbench.errors import Unsupported
from kvbench.needles import Quiz

PIECES_AT_ONCE = 32
LEAST_TEXT = 32
"""Fewer tokens of text than this hide nothing."""
SPARE_TOKENS = 4
"""How many tokens longer than the right one an answer may be."""
_TEXT = "\0"


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt in two parts, and how many tokens the model may answer with.

    Attributes
    ----------
    context : instruction and text, up to the question.
    question : the rest: the question, and the first words of the answer.
    """

    context: list[int]
    question: list[int]
    new_tokens: int


def prompt(tokenizer: Any, quiz: Quiz, prompt_tokens: int) -> Prompt:
    """Fill a prompt with as much text as fits, and put each fact between the two pieces nearest to its depth.

    The text is cut at its beginning, which may be within a word, so that the prompt has the length to the token. Parts
    are encoded apart, as a server does whose cache of the text is there before the question.

    Parameters
    ----------
    prompt_tokens : tokens of context and question together.

    Raises
    ------
    Unsupported : there is no room for a text.
    """
    before, question = _frame(tokenizer, quiz)
    facts = [(depth, _encode(tokenizer, [f" {fact}"])[0]) for depth, fact in quiz.facts]
    rest = len(before) + len(question) + sum(len(ids) for _, ids in facts)
    if rest + LEAST_TEXT > prompt_tokens:
        raise Unsupported(
            f"{prompt_tokens} tokens have no room for a text: instruction, facts and question take {rest}, and a text"
            f" {LEAST_TEXT} at least"
        )
    text = _hide(facts, _fill(tokenizer, quiz.text, prompt_tokens - rest))
    answer = len(_encode(tokenizer, [quiz.answer])[0])
    return Prompt(before + text, question, answer + SPARE_TOKENS)


def _frame(tokenizer: Any, quiz: Quiz) -> tuple[list[int], list[int]]:
    """What comes before the text and after it, in the chat template if there is one."""
    message = f"{quiz.instruction}\n\n{_TEXT}\n\n{quiz.question}"
    if tokenizer.chat_template is None:
        before, after = f"{message}\n{quiz.answer_prefix}".split(_TEXT)
        return list(tokenizer(before)["input_ids"]), _encode(tokenizer, [after])[0]
    chat = [{"role": "user", "content": message}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, after = f"{rendered}{quiz.answer_prefix}".split(_TEXT)
    return _encode(tokenizer, [before])[0], _encode(tokenizer, [after])[0]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def _fill(tokenizer: Any, text: Iterator[str], tokens: int) -> list[list[int]]:
    """Ids of consecutive pieces, ``tokens`` together: whole ones but for the first."""
    pieces: list[list[int]] = []
    while (length := sum(map(len, pieces))) < tokens:
        for ids in _encode(tokenizer, list(islice(text, PIECES_AT_ONCE))):
            if length < tokens:
                pieces.append(ids)
                length += len(ids)
    cut = length - tokens
    while len(pieces[0]) <= cut:
        cut -= len(pieces.pop(0))
    pieces[0] = pieces[0][cut:]
    return pieces


def _hide(facts: list[tuple[float, list[int]]], pieces: list[list[int]]) -> list[int]:
    places = list(accumulate((len(ids) for ids in pieces), initial=0))
    before: list[list[int]] = [[] for _ in places]
    for depth, fact in facts:
        nearest = min(range(len(places)), key=lambda i: abs(places[i] - depth * places[-1]))
        before[nearest] += fact
    return [token for fact, ids in zip(before, [*pieces, []], strict=True) for token in fact + ids]
