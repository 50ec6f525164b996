"""What a run's figures of quality allow one to say, in words."""

from collections.abc import Iterable, Sequence

from kvbench import words
from kvbench.findings import Finding
from kvbench.scores import FLOORS, TASKS, Scores
from kvbench.verdicts import DECIDES, METRICS
from kvbench.words import Row

VERDICTS = {
    "indistinguishable": "indistinguishable",
    "better": "better",
    "worse": "worse",
    "collapsed": "collapsed",
    "unknown": "not decided",
}
_FIGURES = {
    "kl_mean": "KL",
    "top1_agreement": "top-1 agreement",
    "perplexity_ratio": "perplexity",
    "collapsed": "collapsed texts",
}
_SAID = ("kl_mean", "retrieval_accuracy")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def nats(value: float) -> str:
    """Three digits; two and a power of ten below a thousandth: 0.0489 and 1.1 × 10⁻⁹."""
    if value == 0 or abs(value) >= 0.001:
        return words.number(value)
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPTS)}"


def percent(share: float) -> str:
    """A share in whole percent; 0 and 100 only where none or all is meant."""
    inner = min(max(round(100 * share), 1), 99)
    return f"{inner if 0 < share < 1 else round(100 * share)}"


def figure_name(row: Row) -> str:
    """What a deciding figure is called within a sentence."""
    return TASKS[row["slice"]].lower() if row["metric"] == "retrieval_accuracy" else _FIGURES[row["metric"]]


def count_words(row: Row) -> str:
    """``5 of 6`` from a share of observations."""
    return f"{round(row['value'] * row['n'])} of {row['n']}"


def beside_baseline(row: Row) -> float:
    """A variant's figure over the observations that its baseline has too, which is what is compared."""
    return float(row["value"] if row["difference"] is None else row["baseline_value"] + row["difference"])


def verdict_words(scores: Scores, variant: Row) -> str:
    """A variant's verdict in one or two words; what became of it where there is none."""
    if scores.is_baseline(variant):
        return "baseline"
    if variant["status"] != "ok":
        return words.STATUS_WORDS.get(variant["status"], str(variant["status"]))
    return VERDICTS.get(variant["verdict"] or "", "no verdict")


def tally_words(scores: Scores) -> str:
    """How many variants got which verdict; "" where nothing was judged."""
    found = [row["verdict"] for row in scores.variants if row["verdict"] is not None]
    names = {
        "indistinguishable": "indistinguishable from the baseline",
        "better": "better than it",
        "worse": "worse",
        "collapsed": "collapsed",
        "unknown": "not decided",
    }
    variants = f"{len(found)} variant{'s' if len(found) != 1 else ''}"
    return f"Quality of {variants}: {words.counts(found, names)}." if found else ""


def price(scores: Scores, variant: str) -> str:
    """What a variant's speed or size costs, as the end of a sentence; "" where nothing was judged."""
    row = next((row for row in scores.variants if row["variant"] == variant), None)
    if row is None or row["verdict"] is None or (row["verdict"] == "unknown" and not _evidence(scores, row)):
        return ""
    start = {
        "collapsed": "its texts collapsed",
        "worse": "worse than the baseline in quality",
        "better": "better than the baseline in quality",
        "indistinguishable": "indistinguishable from the baseline in quality",
        "unknown": "whether that costs quality is not decided",
    }[row["verdict"]]
    return f"; {start}{_evidence(scores, row)}"


def _evidence(scores: Scores, variant: Row) -> str:
    """Texts where they collapsed, KL, the task on which most is lost, and what else is clear where these are not."""
    rows = [row for row in deciding(scores, variant) if row["verdict"] == variant["verdict"]]
    clear = variant["verdict"] in ("better", "worse") and not any(row["metric"] in _SAID for row in rows)
    others = [figure_name(row) for row in rows] if clear else []
    texts = _collapsed(scores, variant) if variant["verdict"] == "collapsed" else ""
    said = _joined([texts, _kl(scores, variant), _retrieval(scores, variant), *others])
    return f" ({said})" if said else ""


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)


def _kl(scores: Scores, variant: Row) -> str:
    value = scores.value(variant["variant"], "kl_mean", "all")
    return f"KL {nats(value)} nats" if value is not None else ""


def _retrieval(scores: Scores, variant: Row) -> str:
    """The task on which most is lost; one without a baseline, or that it fails, says nothing."""
    found = [scores.row(variant["variant"], "retrieval_accuracy", task) for task in scores.tasks]
    judged = [
        row
        for row in found
        if row is not None and row["verdict"] is not None and None not in (row["value"], row["baseline_value"])
    ]
    if not judged:
        return ""
    worst = min(judged, key=lambda row: float(row["difference"] or 0.0))
    name = TASKS[worst["slice"]].lower()
    return f"{name} {percent(beside_baseline(worst))}% against {percent(worst['baseline_value'])}%"


def _collapsed(scores: Scores, variant: Row) -> str:
    row = scores.row(variant["variant"], "collapsed", "outputs")
    if row is None or row["baseline_value"] is None:
        return ""
    return f"{count_words(row)}, and {round(row['baseline_value'] * row['n'])} of the baseline’s"


def findings(scores: Scores) -> list[Finding]:
    """Which variants are as good as the baseline, which are not, and how they stand to pruning at random."""
    judged = {verdict: _by_kl(scores, verdict) for verdict in VERDICTS}
    found = [
        ("Indistinguishable from the baseline", _named(scores, judged["indistinguishable"])),
        ("Better than the baseline", _named(scores, judged["better"])),
        ("Worse than the baseline", _named(scores, judged["worse"])),
        ("Collapsed texts", _named(scores, judged["collapsed"])),
        ("Not decided", _open(scores, judged["unknown"])),
        ("Against pruning at random", "; ".join(_against_random(scores))),
        ("Changed weights", "; ".join(_changed(scores))),
        ("Noise floor", "; ".join(_noise(scores))),
        ("Too hard for the baseline", ", ".join(_failed(scores))),
        ("Without figures", "; ".join(_gaps(scores))),
    ]
    return [Finding(about, f"{text.rstrip('.')}.") for about, text in found if text]


def _by_kl(scores: Scores, verdict: str) -> list[Row]:
    """The variants with a verdict, the least KL first."""
    found = [row for row in scores.variants if row["verdict"] == verdict]
    return sorted(found, key=lambda row: scores.value(row["variant"], "kl_mean", "all") or 0.0)


def _named(scores: Scores, variants: Sequence[Row]) -> str:
    """Each variant with what its verdict rests on."""
    return "; ".join(_name(row) + _evidence(scores, row) for row in variants)


def _name(variant: Row) -> str:
    return f"{variant['variant']}{' (simulated)' if variant.get('simulated') else ''}"


def deciding(scores: Scores, variant: Row) -> list[Row]:
    """The rows that decide on a variant."""
    slices = {"retrieval_accuracy": scores.tasks, "collapsed": ["outputs"]}
    found = [scores.row(variant["variant"], metric, part) for metric in DECIDES for part in slices.get(metric, ["all"])]
    return [row for row in found if row is not None]


def _open(scores: Scores, variants: Sequence[Row]) -> str:
    """Each variant with what is not decided, or did not come out."""
    texts = []
    for variant in variants:
        rows = [
            row for row in deciding(scores, variant) if row["verdict"] == "unknown" and row["metric"] != "collapsed"
        ]
        few = [figure_name(row) for row in rows if row["difference"] is not None]
        alone = [figure_name(row) for row in rows if row["difference"] is None]
        reasons = [f"too few observations: {', '.join(few)}"] if few else []
        reasons += [f"nothing to compare with: {', '.join(alone)}"] if alone else []
        reasons += [f"no {stage}" for stage in scores.gaps(variant["variant"])]
        texts.append(f"{_name(variant)} ({'; '.join(reasons)})" if reasons else _name(variant))
    return ", ".join(texts)


def _against_random(scores: Scores) -> list[str]:
    """How variants stand to the control that keeps as many tokens, by the interval of each difference alone."""
    told: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}
    for variant in scores.variants:
        ways: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
        for row in deciding(scores, variant):
            if row["control_low"] is not None and row["metric"] in _SAID:
                ways[_way(row)].append(figure_name(row))
        key = tuple((f"{way} {variant['control']}", tuple(names)) for way, names in ways.items() if names)
        if key:
            told.setdefault(key, []).append(_name(variant))
    return [
        f"{words.listing(names)}: {', '.join(f'{way} in {words.listing(list(figures))}' for way, figures in key)}"
        for key, names in told.items()
    ]


def _way(row: Row) -> str:
    low, high = row["control_low"], row["control_high"]
    if low <= 0 <= high:
        return "not told apart from"
    return "ahead of" if (low > 0) == (METRICS[row["metric"]].better == "higher") else "behind"


def _changed(scores: Scores) -> list[str]:
    """What variants with weights of their own cost before anything is evicted."""
    phrases = []
    for variant in scores.variants:
        dense, evicting = (scores.value(variant["variant"], metric, "all") for metric in ("kl_dense", "kl_mean"))
        if dense is not None and evicting is not None:
            phrases.append(
                f"{_name(variant)} has a KL to the original of {nats(dense)} nats with nothing evicted,"
                f" {nats(evicting)} as it runs"
            )
    return phrases


def _noise(scores: Scores) -> list[str]:
    """The uncompressed cache's KL against itself, and how far above it the nearest variant lies."""
    phrases = []
    for variants in scores.families().values():
        for variant in variants:
            floors = scores.floors(variant["variant"], "all")
            if not floors:
                continue
            texts = [f"{nats(row['value'])} nats in {FLOORS[row['reference']]}" for row in floors]
            said = f"{_name(variant)} against itself has a KL of {words.listing(texts)}"
            costs = {
                other["variant"]: value
                for other in variants
                if other is not variant and (value := scores.value(other["variant"], "kl_mean", "all")) is not None
            }
            greatest = max(float(row["value"]) for row in floors)
            if costs and greatest > 0:
                least = min(costs, key=lambda label: costs[label])
                times = words.number(costs[least] / greatest, 2)
                said += f"; the least of the others, {least}’s, is {times} times the greater of these"
            phrases.append(said)
    return phrases


def _failed(scores: Scores) -> list[str]:
    """Tasks that a baseline fails, on which there is no verdict."""
    margin = METRICS["retrieval_accuracy"].margin or 0.0
    return [
        f"{TASKS[task].lower()} ({percent(value)}% right for {variant['variant']})"
        for variant in scores.variants
        if scores.is_baseline(variant)
        for task in scores.tasks
        if (value := scores.value(variant["variant"], "retrieval_accuracy", task)) is not None and value <= margin
    ]


def _gaps(scores: Scores) -> list[str]:
    """What did not come out and why, variants with the same reason together."""
    told: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for variant in scores.variants:
        reasons: dict[tuple[str, str], list[str]] = {}
        for stage, row in scores.gaps(variant["variant"]).items():
            key = str(row["status"]), str(row.get("status_reason") or "no reason recorded")
            reasons.setdefault(key, []).append(stage)
        for (status, reason), stages in reasons.items():
            told.setdefault((status, reason, tuple(stages)), []).append(variant["variant"])
    return [
        f"{words.listing(list(stages))} of {_all_of(labels, scores)}:"
        f" {words.STATUS_WORDS.get(status, status)}, {words.shorten(reason, 200)}"
        for (status, reason, stages), labels in told.items()
    ]


def _all_of(labels: list[str], scores: Scores) -> str:
    return "every variant" if len(labels) == len(scores.variants) > 1 else words.listing(labels)
