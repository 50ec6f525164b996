"""How a generated text compares with the baseline's, and what is wrong with it by itself."""

import re
from collections.abc import Hashable, Sequence
from functools import cache

from kvbench.diff import SPACELESS, common_prefix

_WORD = re.compile(rf"[{SPACELESS}]|[^\W_{SPACELESS}]+")
_STUTTER = re.compile(r"(.{1,20}?)\1{9,}", re.DOTALL)
LOOPS = 0.4
FOREIGN = 0.1

_NO_SCRIPT = {"Zyyy", "Zinh"}  # digits, punctuation, emoji: common to all scripts, or taken from the letter before
_UNREADABLE = "\ufffd"
_BROKEN = "Zzzz"
_WITH_HAN = {"Hira", "Kana", "Bopo", "Hang"}  # scripts that are written among Han characters


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; where a script has no spaces, each character is a word.

    On ASCII text these are the tokens of rouge-score (without its stemmer), which drops all other letters.
    """
    return _WORD.findall(text.lower())


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L, the F1 of the longest common subsequence of words, 0 to 1; 1 where neither has a word.

    Source: Lin, ROUGE: a package for automatic evaluation of summaries, 2004, with β = 1.
    """
    from rapidfuzz.distance import LCSseq

    ours, theirs = words(text), words(reference)
    if not ours and not theirs:
        return 1.0
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))


def chrf(text: str, reference: str) -> float:
    """Sentence chrF (character n-grams up to 6, β = 2) as sacrebleu's, but 0 to 1; 1 where both are blank.

    Source: Popović, chrF: character n-gram F-score for automatic MT evaluation, 2015.
    """
    from sacrebleu.metrics.chrf import CHRF

    if not text.strip() and not reference.strip():
        return 1.0
    return float(CHRF().sentence_score(text, [reference]).score) / 100


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Place of the first token that is not the reference's, counted from 1; None where all are."""
    shared = common_prefix(tokens, reference)
    return None if shared == len(tokens) == len(reference) else shared + 1


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float | None:
    """rep-n: the share of n-grams that repeat an earlier one, 0 to 1; None for fewer than n tokens.

    Source: Welleck et al., Neural text generation with unlikelihood training, 2020 (seq-rep-n).
    """
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(tokens: Sequence[Hashable], n: int = 2) -> float | None:
    """distinct-n: different n-grams over all n-grams, 0 to 1; None for fewer than n tokens.

    Source: Li et al., A diversity-promoting objective function for neural conversation models, 2016.
    """
    repeated = repetition(tokens, n)
    return None if repeated is None else 1 - repeated


def scripts(text: str) -> set[str]:
    """Unicode scripts of a text's characters (ISO 15924 codes), without those that all scripts share."""
    found = {script(character) for character in text} - _NO_SCRIPT
    return found | {"Hani"} if found & _WITH_HAN else found


@cache
def script(character: str) -> str:
    """Script of one character: `Latn`, `Cyrl`, `Zyyy` for common ones; `Zzzz` for one that stands for broken bytes."""
    from fontTools import unicodedata

    return _BROKEN if character == _UNREADABLE else unicodedata.script(character)


def outside_scripts(text: str, allowed: set[str]) -> float:
    """Share of a text's characters, of those that have a script, whose script is not among the allowed, 0 to 1.

    Broken bytes have none that is allowed, but for those at the end, where a text may be cut within a character.
    """
    found = [code for character in text.rstrip(_UNREADABLE) if (code := script(character)) not in _NO_SCRIPT]
    return sum(code not in allowed for code in found) / len(found) if found else 0.0


def collapsed(text: str, tokens: Sequence[int], prompt: str, reference: str | None = None) -> bool:
    """Whether a text shows by its form alone that the model has lost its way; one of these signs is enough.

    loops
        at least 0.4 of its 4-grams of tokens repeat an earlier one (rep-4).
    stutters
        the same 1 to 20 characters, a letter among them, stand ten times or more in a row.
    scripts
        more than 0.1 of its letters are of scripts that neither prompt nor reference uses (Latin is always allowed),
        or broken bytes.
    blank
        it has no word, and the reference has.

    A fluent text about something else is none of these: divergence and retrieval show that. A small model also loops
    with its cache whole, so a share of collapsed texts means something only beside the baseline's. Of 140 answers of
    SmolLM2-135M judged by eye (tests/data), the rule marks 76 of the 77 that collapsed and none of the 39 healthy
    ones; of 3,000 ShareGPT replies cut at 96 and 300 tokens it marks 5 and 26, lists and tables mostly.

    Parameters
    ----------
    tokens : the text's token ids.
    reference : the baseline's text for the same prompt, if there is one.
    """
    allowed = (scripts(prompt) | scripts(reference or "") | {"Latn"}) - {_BROKEN}
    return (
        (repetition(tokens, 4) or 0.0) >= LOOPS
        or _stutters(text)
        or outside_scripts(text, allowed) > FOREIGN
        or (not words(text) and bool(words(reference or "")))
    )


def _stutters(text: str) -> bool:
    return any(any(c.isalpha() for c in match[1]) for match in _STUTTER.finditer(text))
