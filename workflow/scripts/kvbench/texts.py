"""The variants' outputs, prompt by prompt, each set against its baseline's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbench import text_metrics
from kvbench.diff import Segment, common_prefix, compare_texts
from kvbench.findings import Compared, TextTally, padding_words, tally
from kvbench.words import STATUS_WORDS, Row

PROMPTS_SHOWN = 50
CHARACTERS_SHOWN = 20_000

STOPPED = {"eos": "ended by itself", "length": "cut at the set length"}
WAYS = {"batch": "padded batch", "alone": "alone"}

# What would be invisible, or would turn the text around it: shown by name instead.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")

Variant = tuple[str, str]
Key = tuple[str, str, str]  # model, method, way


@dataclass(frozen=True)
class Card:
    """One variant's text for one prompt, as the report shows it.

    ``distance`` is how far the text is from the baseline's: the share of words not in common, and 1 more if it
    collapsed and the baseline's did not; 0 where it is not compared.
    """

    variant: str
    kind: str  # baseline, equal, differs, alone, missing
    note: str
    prefix: str
    segments: tuple[Segment, ...]
    facts: str
    simulated: bool
    collapsed: bool
    distance: float


@dataclass(frozen=True)
class Prompt:
    """A prompt with the cards of all variants that answered it."""

    rank: int
    text: str
    facts: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Texts:
    """Everything the report says about outputs.

    ``padding`` is what a padded batch did to the texts, in words; "" where there was none.
    """

    prompts: tuple[Prompt, ...]
    total: int
    variants: tuple[str, ...]
    tallies: tuple[TextTally, ...]
    padding: str
    missing: tuple[tuple[str, str], ...]


def visible(text: str) -> str:
    """Control and direction characters by name: a null byte is ␀, U+202E is ⟦U+202E⟧."""
    return _UNSEEN.sub(_picture, text.replace("\r\n", "\n"))


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"⟦U+{code:04X}⟧"


def clip(text: str) -> str:
    """A text as long as a page can bear, saying how much was left off."""
    left = len(text) - CHARACTERS_SHOWN
    return text if left <= 0 else f"{text[:CHARACTERS_SHOWN]}\n… {left:,} more characters"


def collect(outputs: Sequence[Row], rows: Sequence[Row], tokenizers: Mapping[str, str]) -> Texts:
    """Group ``outputs`` by prompt and compare each variant with its baseline.

    ``rows`` are the stats, which name each variant's baseline and their order. ``tokenizers`` maps a model to
    what identifies its tokenizer: tokens are compared where that agrees.
    """
    labels = {_variant(row): str(row["variant"]) for row in rows}
    answered: dict[Key, dict[int, Row]] = {}
    missing = []
    for row in outputs:
        name = labels.setdefault(_variant(row), str(row["method"]))
        if row.get("rank") is None:
            missing.append((name, _reason(row)))
        else:
            answered.setdefault((*_variant(row), str(row["way"])), {})[row["rank"]] = row
    base = _baselines(rows, labels, answered)
    models, listed = list(dict.fromkeys(model for model, _ in labels)), list(labels)
    order = sorted(answered, key=lambda key: (models.index(key[0]), key in base, listed.index(key[:2])))
    several = len({way for _, _, way in answered}) > 1
    names = {key: f"{labels[key[:2]]}, {WAYS[key[2]]}" if several else labels[key[:2]] for key in order}
    ranks = sorted({rank for texts in answered.values() for rank in texts})
    pairs = {
        (key, rank): _against(answered[key][rank], _reference(key, rank, base, answered), tokenizers)
        for key in order
        for rank in answered[key]
    }
    fallen = {(key, rank): _collapsed(answered[key][rank], key, rank, base, answered) for key, rank in pairs}
    prompts = []
    for rank in ranks[:PROMPTS_SHOWN]:
        keys = [key for key in order if rank in answered[key]]
        row = answered[keys[0]][rank]
        cards = [
            _card(
                *(names[key], answered[key][rank], pairs[key, rank], key in base.values()),
                *(fallen[key, rank], fallen.get((base.get(key, key), rank), False)),
            )
            for key in keys
        ]
        prompts.append(Prompt(rank, clip(row.get("prompt") or ""), _prompt_facts(row, cards), tuple(cards)))
    tallies = [
        tally(
            *(key[0], labels[key[:2]], WAYS[key[2]] if several else "", labels[base[key][:2]]),
            compared,
            sum(fallen[key, rank] for rank in answered[key] if pairs[key, rank]),
        )
        for key in order
        if (compared := [pair for rank in answered[key] if (pair := pairs[key, rank])])
    ]
    padding = padding_words([(labels[key[:2]], *_parted(key, answered)) for key in order if key[2] == "batch"])
    return Texts(tuple(prompts), len(ranks), tuple(names.values()), tuple(tallies), padding, tuple(missing))


def _variant(row: Row) -> Variant:
    return str(row["model"]), str(row["method"])


def _parted(key: Key, answered: Mapping[Key, Mapping[int, Row]]) -> tuple[int, int]:
    """How many of a variant's texts in a batch differ from the same prompt's alone, and of how many."""
    alone = answered.get((key[0], key[1], "alone"), {})
    both = [(row, alone[rank]) for rank, row in answered[key].items() if rank in alone]
    both = [(batch, own) for batch, own in both if batch["status"] == own["status"] == "ok"]
    return sum(batch["text"] != own["text"] for batch, own in both), len(both)


def _reason(row: Row) -> str:
    status = STATUS_WORDS.get(row["status"], str(row["status"]))
    return f"{status}: {row.get('status_reason') or 'no reason recorded'}"


def _baselines(rows: Sequence[Row], labels: Mapping[Variant, str], answered: Mapping[Key, Any]) -> dict[Key, Key]:
    """Each variant's baseline, answered the same way, where both have texts; labels are unique within a run."""
    by_label = {label: variant for variant, label in labels.items()}
    bases = {_variant(row): by_label.get(str(row.get("baseline"))) for row in rows}
    found = {}
    for model, method, way in answered:
        base = bases.get((model, method))
        if base is not None and base != (model, method) and (*base, way) in answered:
            found[model, method, way] = (*base, way)
    return found


def _reference(key: Key, rank: int, base: Mapping[Key, Key], answered: Mapping[Key, Mapping[int, Row]]) -> Row | None:
    row = answered[base[key]].get(rank) if key in base else None
    return row if row and row["status"] == "ok" else None


def _against(row: Row, reference: Row | None, tokenizers: Mapping[str, str]) -> Compared | None:
    """A text set against its baseline's; tokens are compared where both models have the same tokenizer."""
    if reference is None or row["status"] != "ok":
        return None
    same = all(model in tokenizers for model in (row["model"], reference["model"]))
    same = same and tokenizers[row["model"]] == tokenizers[reference["model"]]
    mine, other = row.get("token_ids"), reference.get("token_ids")
    same = same or row["model"] == reference["model"]
    return Compared(
        compare_texts(reference.get("text") or "", row.get("text") or ""),
        common_prefix(mine, other) if same and mine is not None and other is not None else None,
    )


def _collapsed(
    row: Row, key: Key, rank: int, base: Mapping[Key, Key], answered: Mapping[Key, Mapping[int, Row]]
) -> bool:
    """Whether a text collapsed, by the rule of quality.parquet."""
    if row["status"] != "ok" or row.get("token_ids") is None:
        return False
    reference = _reference(key, rank, base, answered)
    other = (reference.get("text") or "") if reference else None
    return text_metrics.collapsed(row.get("text") or "", row["token_ids"], row.get("prompt") or "", other)


def _prompt_facts(row: Row, cards: Sequence[Card]) -> str:
    tokens, fallen = row.get("prompt_tokens"), sum(card.collapsed for card in cards)
    parts = [
        f"{tokens:,} tokens" if tokens is not None else "",
        f"{fallen} of {len(cards)} texts collapsed" if fallen else "",
    ]
    return " · ".join(part for part in parts if part)


def _card(
    variant: str, row: Row, compared: Compared | None, is_baseline: bool, fallen: bool, baseline_fallen: bool
) -> Card:
    text = row.get("text") or ""
    kind, note, prefix = "alone", "no baseline to compare with", text
    segments: tuple[Segment, ...] = ()
    if row["status"] != "ok":
        kind, note = "missing", _reason(row)
    elif is_baseline:
        kind, note = "baseline", "baseline"
    elif compared is not None:
        difference = compared.difference
        kind = "equal" if difference.equal else "differs"
        note = "equal to the baseline" if difference.equal else _parting(row, compared)
        prefix, segments = difference.prefix, difference.segments
    return Card(
        variant=variant,
        kind=kind,
        note=note,
        prefix=clip(prefix),
        segments=tuple(Segment(part.kind, clip(part.text)) for part in segments),
        facts=_facts(row),
        simulated=bool(row.get("simulated")),
        collapsed=fallen,
        distance=0.0 if compared is None else 1 - compared.difference.shared + (fallen and not baseline_fallen),
    )


def _parting(row: Row, compared: Compared) -> str:
    if compared.tokens is None:
        count = compared.difference.words
        return f"parts after {count:,} words" if count else "parts at the first word"
    length = len(row["token_ids"])
    if compared.tokens == length:
        return f"stops after token {length:,}, where the baseline goes on" if length else "empty"
    return f"parts at token {compared.tokens + 1:,} of {length:,}"


def _facts(row: Row) -> str:
    tokens, stopped = row.get("new_tokens"), row.get("stop_reason") or ""
    parts = [f"{tokens:,} tokens" if tokens is not None else "", STOPPED.get(stopped, stopped)]
    return ", ".join(part for part in parts if part)
