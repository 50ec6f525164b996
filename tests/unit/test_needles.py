"""Retrieval samples: the same in every run, what they say they are, and of the right length in any tokenizer."""

from collections import Counter
from functools import cache
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyrun
from kvbench import book, haystack, needles
from kvbench.errors import Unsupported
from kvbench.needles import Point, quiz, score

TASKS = ["needle", "multikey", "variables", "words"]
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def point(task: str, tokens: int = 512, depth: float = 0.5) -> Point:
    return Point(task, tokens, None if task == "words" else depth)


def plain(asked: Point, sample: int) -> tuple[Any, ...]:
    """A sample as values that can be compared, with the beginning of its endless text."""
    made = quiz(asked, sample)
    return (*(value for name, value in vars(made).items() if name != "text"), list(islice(made.text, 40)))


@cache
def tokenizer(template: str | None) -> Any:
    """A byte-level tokenizer of 2,000 pieces, trained on a chapter; without a template it puts a token first."""
    from tokenizers import processors

    fast = tinyrun.tokenizer([book.chapters()[0].text], 2000)
    fast.chat_template = template
    if template is None:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return fast


def find(ids: list[int], part: list[int]) -> int:
    (place,) = [i for i in range(len(ids)) if ids[i : i + len(part)] == part]
    return place


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_the_same_in_every_run_and_no_two_are_alike(task: str) -> None:
    made = plain(point(task), 3)
    assert made == plain(point(task), 3)
    others = [plain(point(task), 4), plain(point(task, 1024), 3)]
    others += [plain(point(task, depth=0.25), 3)] if task != "words" else []
    assert all(made != other for other in others)


@pytest.mark.parametrize(
    ("task", "document", "expected"),
    [
        ("needle", "CHAPTER 9. The Sermon.", ["2550266"]),
        ("multikey", "CHAPTER 42. The Whiteness of The Whale.", ["8281154"]),
        ("variables", "CHAPTER 7. The Chapel.", ["NORTH", "YARROW", "LINEN"]),
        ("words", "CHAPTER 23. The Lee Shore.", ["land"]),
    ],
)
def test_samples_stay_what_they_were(task: str, document: str, expected: list[str]) -> None:
    made = quiz(point(task), 0)
    assert (made.document, made.expected) == (document, expected)


def test_every_task_is_asked_at_every_length_and_depth() -> None:
    request = {"tasks": ["needle", "words"], "prompt_tokens": [512, 1024], "depths": [0.0, 1.0]}
    assert needles.points(request) == [
        Point("needle", 512, 0.0), Point("needle", 512, 1.0), Point("needle", 1024, 0.0), Point("needle", 1024, 1.0),
        Point("words", 512, None), Point("words", 1024, None),
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["needle", "multikey"])
def test_the_answer_repeats_the_fact_that_is_asked_for(task: str) -> None:
    for sample in range(20):
        made = quiz(point(task), sample)
        ((depth, fact),) = [(depth, fact) for depth, fact in made.facts if fact.startswith(made.answer_prefix)]
        assert fact == made.answer_prefix + made.answer == f"{made.answer_prefix} {made.expected[0]}."
        assert depth == 0.5 and len(made.expected[0]) == 7
        key = made.answer_prefix.split()[-2]
        assert f" {key} " in made.question
        assert len({fact.split()[-3] for _, fact in made.facts}) == {"needle": 1, "multikey": 4}[task]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_chain_is_in_order_about_its_depth_and_unlike_the_example(depth: float) -> None:
    for sample in range(20):
        made = quiz(point("variables", depth=depth), sample)
        first, second, third = made.expected
        value = made.facts[0][1].split()[-1]
        lines = [f"VAR {first} = {value}", f"VAR {second} = VAR {first}.", f"VAR {third} = VAR {second}."]
        assert [fact for _, fact in made.facts] == lines
        assert [place for place, _ in made.facts] == [0.75 * depth, 0.75 * depth + 0.125, 0.75 * depth + 0.25]
        assert not any(f"VAR {name}" in made.instruction for name in made.expected)
        asked = f"Answer: 3 variables are assigned the value {value.rstrip('.')}: "
        assert made.answer_prefix + made.answer == f"{asked}VAR {first}, VAR {second}, VAR {third}."


def test_one_word_is_a_fifth_of_the_list_and_no_other_comes_near() -> None:
    for sample in range(20):
        made = quiz(point("words"), sample)
        (common, most), (_, next_most) = Counter(islice(made.text, 1000)).most_common(2)
        assert common == f" {made.expected[0]}," and most == 200
        assert next_most <= 800 // 100


def test_prose_is_the_book_from_a_random_sentence_on() -> None:
    whole = " ".join(" ".join(chapter.text.split()) for chapter in book.chapters())
    chapters = {chapter.name: " ".join(chapter.text.split()) for chapter in book.chapters()}
    documents = set()
    for sample in range(40):
        made = quiz(point("needle"), sample)
        first = next(made.text)
        assert first.strip() in chapters[made.document]
        assert first + "".join(islice(made.text, 20)) in f" {whole} {whole}"
        documents.add(made.document)
    assert len(documents) > 20


@pytest.mark.parametrize(
    ("expected", "answer", "share"),
    [
        (["1234567"], " 1234567.", 1),
        (["1234567"], " 12345678.", 0),
        (["1234567"], " 123456", 0),
        (["1234567"], "", 0),
        (["PEARL", "KITE"], " Pearl, VAR PEARLS", 0.5),
        (["PEARL", "KITE"], "kite and pearl", 1),
        (["a.b"], "axb", 0),
    ],
)
def test_an_answer_is_scored_by_whole_words(expected: list[str], answer: str, share: float) -> None:
    assert score(expected, answer) == share


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TASKS),
    st.sampled_from(DEPTHS),
    st.integers(500, 1500),
    st.integers(0, 10**6),
    st.sampled_from([None, tinyrun.TEMPLATE]),
)
def test_a_prompt_has_its_length_to_the_token(
    task: str, depth: float, tokens: int, sample: int, template: str | None
) -> None:
    tok, asked = tokenizer(template), point(task, tokens, depth)
    made = haystack.prompt(tok, quiz(asked, sample), tokens)
    assert len(made.context) + len(made.question) == tokens
    given_words = quiz(asked, sample)
    whole = tok.decode(made.context)
    places = [whole.index(fact) for _, fact in given_words.facts]
    assert places == sorted(places)
    assert given_words.instruction in whole and given_words.question not in whole
    rest = tok.decode(made.question)
    assert given_words.question in rest and rest.endswith(given_words.answer_prefix)
    assert (made.context + made.question).count(tok.bos_token_id) == (1 if template is None else 2)
    assert made.new_tokens == len(tok(given_words.answer, add_special_tokens=False)["input_ids"]) + 4


@pytest.mark.parametrize("sample", range(10))
def test_a_fact_lies_where_it_is_asked_to(sample: int) -> None:
    tok, tokens = tokenizer(tinyrun.TEMPLATE), 800

    def placed(depth: float) -> tuple[int, int, int]:
        """Where the fact begins and ends, and the length of the context."""
        asked = quiz(point("needle", tokens, depth), sample)
        context = haystack.prompt(tok, asked, tokens).context
        fact = tok(f" {asked.facts[0][1]}", add_special_tokens=False)["input_ids"]
        return find(context, fact), find(context, fact) + len(fact), len(context)

    begin = placed(0.0)[0]
    at_once = haystack.prompt(tok, quiz(point("needle", tokens, 0.0), sample), tokens)
    assert tok.decode(at_once.context[:begin]).endswith("afterwards.\n\n")
    assert placed(1.0)[1] == placed(1.0)[2]
    for depth in (0.25, 0.5, 0.75):
        start, end, length = placed(depth)
        text = length - begin - (end - start)
        assert abs((start - begin) / text - depth) < 0.12


def test_the_text_is_whole_but_for_its_beginning_and_the_facts() -> None:
    tok = tokenizer(tinyrun.TEMPLATE)
    asked = quiz(point("multikey", 900), 1)
    context = tok.decode(haystack.prompt(tok, asked, 900).context)
    for _, fact in asked.facts:
        context = context.replace(f" {fact}", "", 1)
    text = context.split("afterwards.\n\n")[1]
    whole = " ".join(" ".join(chapter.text.split()) for chapter in book.chapters())
    assert len(text) > 1000 and text in f" {whole} {whole}"


def test_a_prompt_without_room_is_unsupported_with_the_numbers() -> None:
    with pytest.raises(Unsupported, match=r"^128 tokens have no room for a text: instruction, facts and question take"):
        haystack.prompt(tokenizer(None), quiz(point("variables"), 0), 128)
