"""What a run found, in sentences that its intervals support."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from kvbench import words
from kvbench.diff import TextDiff
from kvbench.results import baseline_of, device, unique
from kvbench.words import Comparison, Row


@dataclass(frozen=True)
class Compared:
    """A text against its baseline's: the diff, and how many leading tokens agree (None: not comparable)."""

    difference: TextDiff
    tokens: int | None


@dataclass(frozen=True)
class TextTally:
    """One variant's outputs against its baseline's.

    ``way`` is how both were answered, "" where the run knows one way only. ``tokens`` is the median length of the
    common beginning, in tokens; None where the two variants' tokenizers may differ. ``shared`` is the mean share of
    words in common, ``collapsed`` counts texts.
    """

    model: str
    variant: str
    way: str
    baseline: str
    prompts: int
    equal: int
    tokens: float | None
    words: float
    shared: float
    collapsed: int


@dataclass(frozen=True)
class Finding:
    """One sentence about one quantity on one workload."""

    about: str
    text: str


def headline(rows: Sequence[Row], tallies: Sequence[TextTally], prices: Mapping[str, str]) -> str:
    """The run in one or two sentences; a difference is named only where the intervals do not overlap.

    Parameters
    ----------
    prices : what a variant costs in quality, by its label, as the end of a sentence; where that was not judged, how
        many of its texts are the baseline's stands instead.
    """
    measured = [row for row in rows if row["status"] == "ok"]
    if not measured:
        found = [str(row["status"]) for row in rows]
        names = {status: words.STATUS_WORDS.get(status, status) for status in found}
        return f"Nothing was measured: {words.counts(found, names) or 'no cells'}."
    pairs = [(row, base) for row in measured if (base := baseline_of(row, rows)) is not None]
    if not pairs:
        return f"{len(measured)} cells measured, none of them with a baseline to compare with."
    fastest = _best(pairs, "more")
    smallest = _best(pairs, "less", "kv_cache_bytes")

    def price(row: Row) -> str:
        return prices.get(str(row["variant"])) or _quality(row, tallies)

    sentences = [_faster(*fastest, rows, price) if fastest else _none_faster(pairs)]
    if smallest is None:
        sentences.append("No variant frees a byte of the cache.")
    elif fastest is None or _key(smallest[0]) != _key(fastest[0]):
        row, _, change = smallest
        sentences.append(
            f"No variant cuts the cache more than {_name(row)} ({change.words}{_where(row, rows)}){price(row)}."
        )
    return " ".join(sentences)


def verdict_counts(rows: Sequence[Row]) -> str:
    """How many comparisons of throughput came out which way."""
    verdicts = [
        change.verdict
        for row in rows
        if (change := words.compare(row, baseline_of(row, rows), words.throughput_column(row))) is not None
    ]
    names = {
        "more": "faster than the baseline",
        "less": "slower",
        "indistinguishable": "indistinguishable from it",
        "unknown": "with too few repeats to judge by",
        "elsewhere": "measured on another device or under another protocol",
    }
    cells = f"{len(verdicts)} comparison{'s' if len(verdicts) != 1 else ''} of throughput"
    judged = {*verdicts} - {"unknown", "elsewhere"}
    rule = " Two cells differ only where their intervals do not overlap." if judged else ""
    return f"{cells}: {words.counts(verdicts, names)}.{rule}" if verdicts else ""


def _faster(row: Row, base: Row, change: Comparison, rows: Sequence[Row], price: Callable[[Row], str]) -> str:
    cache = words.compare(row, base, "kv_cache_bytes")
    return (
        f"{_name(row)} decodes {change.words} tokens a second than the baseline"
        f"{_where(row, rows)}, with {_cache_words(cache)}{price(row)}."
    )


def _cache_words(cache: Comparison | None) -> str:
    if cache is None:
        return "a cache that was not measured"
    return "no less cache" if cache.verdict == "equal" else f"{cache.words} cache"


def _none_faster(pairs: Sequence[tuple[Row, Row]]) -> str:
    changes = [words.compare(row, base, words.throughput_column(row)) for row, base in pairs]
    verdicts = {change.verdict for change in changes if change is not None}
    if not verdicts:
        return "No throughput was measured beside a baseline’s."
    if verdicts == {"elsewhere"}:
        return "Baselines were measured on another device or under another protocol: no speeds can be compared."
    if verdicts <= {"unknown", "elsewhere"}:
        return "Too few runs a cell: no difference in speed can be told from noise."
    return "No variant decodes clearly faster than its baseline."


def _best(
    pairs: Sequence[tuple[Row, Row]], verdict: str, column: str | None = None
) -> tuple[Row, Row, Comparison] | None:
    """The pair with the largest clear change in one direction; throughput when no column is named."""
    changes = [
        (row, base, change)
        for row, base in pairs
        if (change := words.compare(row, base, column or words.throughput_column(row))) is not None
        and change.verdict == verdict
    ]
    return max(changes, key=lambda item: abs(item[2].percent or 0), default=None)


def _key(row: Row) -> tuple[str, str]:
    return str(row["model"]), str(row["variant"])


def _name(row: Row) -> str:
    return f"{row['variant']}{' (simulated)' if row.get('simulated') else ''}"


def _where(row: Row, rows: Sequence[Row]) -> str:
    return f" on {row['workload']}" if len(unique(other["workload"] for other in rows)) > 1 else ""


def _quality(row: Row, tallies: Sequence[TextTally]) -> str:
    """How many texts are the baseline's, where nothing else says what the change costs."""
    for tally in tallies:
        if (tally.model, tally.variant) == _key(row) and tally.prompts:
            count = "none" if tally.equal == 0 else f"{tally.equal}"
            return f"; {count} of its {tally.prompts} texts equals the baseline’s"
    return "; its texts were not compared"


def workload_findings(rows: Sequence[Row], workload: str) -> list[Finding]:
    """Throughput, TTFT, cache, memory and what fits of every variant of a workload against its baseline."""
    cells = [row for row in rows if row["workload"] == workload]
    measured = [row for row in cells if row["status"] == "ok"]
    pairs = [(row, base) for row in measured if (base := baseline_of(row, rows)) is not None]
    findings = []
    columns = (words.throughput_column(cells[0]), "ttft_s", "kv_cache_bytes", "peak_generation_bytes")
    for column in columns:
        groups = _groups(pairs, column)
        if groups:
            name = words.QUANTITIES[column].name(device(cells))
            findings.append(Finding(name, "; ".join(groups) + "."))
    fitting = "; ".join(_fitting(row, baseline_of(row, rows)) for row in measured if row.get("largest_batch"))
    achieved = "; ".join(_achieved(row) for row in measured if row.get("window"))
    return findings + [Finding(about, f"{said}.") for about, said in (("Fits", fitting), ("Kept", achieved)) if said]


def _fitting(row: Row, base: Row | None) -> str:
    """What of a workload's kind the device holds with a method."""

    def count(column: str, unit: str = "") -> str:
        change = words.compare(row, base, column)
        beside = f" ({change.words})" if change is not None and change.verdict != "elsewhere" else ""
        return f"{words.quantity(column, row[column])}{unit}{beside}"

    return (
        f"{_name(row)} a batch of {count('largest_batch')},"
        f" or {row['batch_size']} prompts of {count('longest_prompt_tokens', ' tokens')}"
    )


def _achieved(row: Row) -> str:
    """What a method with a window came to, whatever was asked of it."""
    names = ("window", "block_size", "kept_fraction", "kept_fraction_end", "kv_compression_factor")
    said = {name: words.quantity(name, row.get(name)) for name in names}
    blocks = f" and blocks of {said['block_size']}" if row.get("block_size") else ""
    end = f", and {said['kept_fraction_end']} at the last token" if row.get("kept_fraction_end") is not None else ""
    return (
        f"{_name(row)} keeps {said['kept_fraction']} of the prompt’s cache, a compression of"
        f" {said['kv_compression_factor']}{end}; its window has {said['window']}{blocks}"
    )


def _groups(pairs: Sequence[tuple[Row, Row]], column: str) -> list[str]:
    """Clear changes by size, then what cannot be told apart, then what has no interval."""
    changes = [
        (row, change)
        for row, base in pairs
        if (change := words.compare(row, base, column)) is not None and change.percent is not None
    ]
    changes.sort(key=lambda item: -(item[1].percent or 0))
    named = {
        verdict: [f"{_name(row)} {change.words}" for row, change in changes if change.verdict == verdict]
        for verdict in ("more", "less", "unknown", "elsewhere")
    }
    alike = [_name(row) for row, change in changes if change.verdict == "indistinguishable"]
    same = [_name(row) for row, change in changes if change.verdict == "equal"]
    phrases = [
        ", ".join(named["more"]),
        ", ".join(reversed(named["less"])),
        f"the same as the baseline: {words.listing(same)}" if same else "",
        f"indistinguishable from the baseline: {words.listing(alike)}" if alike else "",
        f"perhaps noise, too few repeats: {', '.join(named['unknown'])}" if named["unknown"] else "",
        f"against a baseline on another device: {', '.join(named['elsewhere'])}" if named["elsewhere"] else "",
    ]
    return [phrase for phrase in phrases if phrase]


def missing(rows: Sequence[Row], results: str) -> list[dict[str, str]]:
    """Cells without numbers: which, why, and what would bring them."""
    return [
        {
            "label": str(row["variant"]),
            "workload": str(row["workload"]),
            "status": words.STATUS_WORDS.get(row["status"], str(row["status"])),
            "reason": str(row.get("status_reason") or "no reason recorded"),
            "remedy": _remedy(row, results),
            "command": "" if row["status"] == "unsupported" else _retry(row, results),
        }
        for row in rows
        if row["status"] != "ok"
    ]


def _remedy(row: Row, results: str) -> str:
    if row["status"] == "unsupported":
        return "No rerun changes this: choose another method, workload or model."
    if row["status"] == "oom":
        return (
            "Lower batch_size or prompt_tokens of the workload, or use a device with more memory."
            " To try the same again, delete its files and run the workflow as before:"
        )
    log = f"{results}/logs/generation/{row['model']}/{row['method']}/{row['workload']}.log"
    return f"The log is {log}. Mend the cause, then delete the cell’s files and run the workflow as before:"


def _retry(row: Row, results: str) -> str:
    folder = f"{row['model']}/{row['method']}/{row['workload']}"
    return f"rm -f {results}/prefill/{folder}.json {results}/generation/{folder}.parquet"


def padding_words(parted: Sequence[tuple[str, int, int]]) -> str:
    """What padding prompts into one batch did to the texts.

    Parameters
    ----------
    parted : a variant's label, how many of its texts differ from the same prompt's alone, and of how many.
    """
    counts = [f"{differ} of {texts} for {label}" for label, differ, texts in parted if texts]
    return (
        f"Texts of the padded batch that differ from the same prompt’s alone: {words.listing(counts)}."
        if counts
        else ""
    )


def tally(model: str, variant: str, way: str, baseline: str, compared: Sequence[Compared], fallen: int) -> TextTally:
    """Sum up one variant's texts, so many of them fallen into collapse; ``compared`` has at least one."""
    tokens = [pair.tokens for pair in compared if pair.tokens is not None]
    return TextTally(
        model=model,
        variant=variant,
        way=way,
        baseline=baseline,
        prompts=len(compared),
        equal=sum(pair.difference.equal for pair in compared),
        tokens=median(tokens) if len(tokens) == len(compared) else None,
        words=median(pair.difference.words for pair in compared),
        shared=sum(pair.difference.shared for pair in compared) / len(compared),
        collapsed=fallen,
    )
