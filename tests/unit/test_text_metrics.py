"""Texts against texts, by values known from elsewhere and by slow references; and which of real answers collapsed."""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import text_metrics

short = st.lists(st.sampled_from("abc"), max_size=9)
token_ids = st.lists(st.integers(0, 4), max_size=25)


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [  # rouge-score 0.1.2, rougeL, without its stemmer
        ("the cat was on a mat", "the cat sat on the mat", 0.6666666666666666),
        ("a quick fox jumps over dogs", "The quick brown fox_jumps, over 2 dogs!", 0.7142857142857143),
        ("testing", "testing one two", 0.5),
        ("its a dogs life", "It's a dog's life", 0.4),
        ("b", "a", 0.0),
    ],
)
def test_rouge_l_is_that_of_rouge_score_on_ascii(text: str, reference: str, f1: float) -> None:
    assert text_metrics.rouge_l(text, reference) == pytest.approx(f1)


def longest_common(first: list[str], second: list[str]) -> int:
    @cache
    def length(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        return 1 + length(i + 1, j + 1) if first[i] == second[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@given(short, short)
def test_rouge_l_is_f1_of_the_longest_common_subsequence(ours: list[str], theirs: list[str]) -> None:
    common = longest_common(ours, theirs)
    expected = 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0
    assert text_metrics.rouge_l(" ".join(ours), ", ".join(theirs)) == pytest.approx(expected)


def test_words_of_every_script_count() -> None:
    assert text_metrics.words("Ça va? 北京很大。 Кот-кит, 2_b") == [
        "ça",
        "va",
        "北",
        "京",
        "很",
        "大",
        "кот",
        "кит",
        "2",
        "b",
    ]
    assert text_metrics.rouge_l("кот у моря", "кот спит у моря") == pytest.approx(6 / 7)
    assert text_metrics.rouge_l("...", "") == 1


@given(st.text(max_size=12))
def test_a_text_is_most_like_itself(text: str) -> None:
    assert text_metrics.rouge_l(text, text) == 1
    assert text_metrics.chrf(text, text) == pytest.approx(1)


def slow_chrf(text: str, reference: str) -> float:
    """Popović's chrF2 over the orders that either text is long enough for."""
    ours, theirs = ("".join(each.split()) for each in (text, reference))
    precisions, recalls = [], []
    for n in range(1, 7):
        mine, other = (Counter(each[i : i + n] for i in range(len(each) - n + 1)) for each in (ours, theirs))
        if mine and other:
            common = (mine & other).total()
            precisions.append(common / mine.total())
            recalls.append(common / other.total())
    if not precisions or not sum(precisions) + sum(recalls):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r)


@given(st.text("ab c", min_size=1, max_size=15), st.text("ab c", min_size=1, max_size=15))
def test_chrf_is_popovics(text: str, reference: str) -> None:
    if text.strip() and reference.strip():
        assert text_metrics.chrf(text, reference) == pytest.approx(slow_chrf(text, reference), abs=1e-6)


@given(token_ids, token_ids)
def test_first_divergence_is_the_first_place_where_a_token_differs(ours: list[int], theirs: list[int]) -> None:
    found = text_metrics.first_divergence(ours, theirs)
    if found is None:
        assert ours == theirs
    else:
        assert ours[: found - 1] == theirs[: found - 1]
        assert ours[found - 1 : found] != theirs[found - 1 : found]


@given(token_ids, st.integers(1, 5))
def test_repetition_and_distinct_share_the_n_grams_between_them(tokens: list[int], n: int) -> None:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = sum(gram in grams[:i] for i, gram in enumerate(grams))
    if not grams:
        assert text_metrics.repetition(tokens, n) is text_metrics.distinct(tokens, n) is None
    else:
        assert text_metrics.repetition(tokens, n) == pytest.approx(repeated / len(grams))
        assert text_metrics.distinct(tokens, n) == pytest.approx(1 - repeated / len(grams))


@pytest.mark.parametrize(
    ("text", "prompt", "share"),
    [
        ("Paris, 2 cafés! 🚀", "What is it?", 0.0),
        ("abc где", "english", 0.5),
        ("東京にある", "東京はどこ", 0.0),
        ("東京", "どこ", 0.0),  # Japanese is written with Han characters too
        ("どこ", "东京", 1.0),
        ("o\ufffd\ufffdk", "english", 0.5),  # what stands for broken bytes is of no script
        ("ok\ufffd", "english", 0.0),  # cut within a character
        ("12 + 3 = 15", "1 + 2", 0.0),
        ("", "english", 0.0),
    ],
)
def test_characters_outside_the_prompts_scripts(text: str, prompt: str, share: float) -> None:
    assert text_metrics.outside_scripts(text, text_metrics.scripts(prompt)) == share


ANSWERS = json.loads((Path(__file__).parent.parent / "data/answers.json").read_text("utf-8"))


def judged(label: str) -> list[tuple[dict[str, Any], bool]]:
    baseline = {answer["rank"]: answer["text"] for answer in ANSWERS["answers"] if answer["method"] == "baseline"}

    def rule(answer: dict[str, Any]) -> bool:
        rank = answer["rank"]
        return text_metrics.collapsed(answer["text"], answer["token_ids"], ANSWERS["prompts"][rank], baseline[rank])

    return [(answer, rule(answer)) for answer in ANSWERS["answers"] if answer["label"] == label]


def test_no_healthy_answer_of_a_real_model_is_called_collapsed() -> None:
    found = judged("healthy")
    assert len(found) == 39
    assert [(answer["method"], answer["rank"]) for answer, collapsed in found if collapsed] == []


def test_nearly_every_collapsed_answer_of_a_real_model_is_found() -> None:
    found = judged("collapsed")
    assert len(found) == 77
    missed = [(answer["method"], answer["rank"]) for answer, collapsed in found if not collapsed]
    assert missed == [("knorm-0.9", 6)]  # it counts years: no four tokens repeat


def test_methods_are_told_apart_by_their_share_of_collapsed_answers() -> None:
    shares = Counter(
        answer["method"] for label in ("healthy", "unclear", "collapsed") for answer, found in judged(label) if found
    )
    assert shares["random-0.9"] == 20
    assert shares["keydiff-0.95"] >= 16 and shares["knorm-0.9"] >= 15
    assert max(shares["baseline"], shares["expected-attention-0.5"], shares["streaming-llm-0.5"]) <= 8


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("The capital cycl ýboot 爰录音 爰录音", "The capital is Paris."),
        ("Yes " + "na" * 12, "Yes."),
        (" ... \n", "Yes."),
        ("a\ufffdb\ufffdc", "Yes."),
        ("a\ufffdb\ufffdc", "Yes, and \ufffd"),  # cut within a character
    ],
)
def test_signs_other_than_loops(text: str, reference: str) -> None:
    assert text_metrics.collapsed(text, [], "What is it?", reference)


@pytest.mark.parametrize(
    ("text", "prompt", "reference"),
    [
        ("东京", "Translate into Chinese: Tokyo", "東京"),  # the reference answers in it too
        ("Tokyo", "东京用英语怎么说", None),
        ("", "Say nothing.", ""),
        ("=" * 40, "Draw a line.", None),
        ("100000000000000", "Ten to the fourteenth?", None),
    ],
)
def test_what_is_no_collapse(text: str, prompt: str, reference: str | None) -> None:
    assert not text_metrics.collapsed(text, [], prompt, reference)
