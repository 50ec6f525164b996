"""The report's section on quality: its tables, figures and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kvbench import quality_words, svg, verdicts, words
from kvbench.results import INKS, colours
from kvbench.scores import CORPORA, STAGES, TASKS, Scores
from kvbench.verdicts import METRICS
from kvbench.words import Row

FIGURES = {
    "kl-by-kept-fraction": "KL divergence by kept fraction",
    "kl-by-distance": "KL divergence by distance from the prefix’s end",
    "retrieval": "What is still found, by length and depth",
}


@dataclass(frozen=True)
class Column:
    """A figure of the tables: a metric over a slice, its heading, and how it is written.

    ``kind`` is `nats`, `share` (percent), `ratio`, `score` (0 to 1), `count` (so many of n) or `tokens`.
    """

    metric: str
    part: str
    title: str
    unit: str
    kind: str


@dataclass(frozen=True)
class Change:
    """A difference in words, from what, and how it is judged (`better`, `worse` or "")."""

    against: str
    text: str
    judged: str = ""


def section(scores: Scores, config: Mapping[str, Any], plots: Sequence[str]) -> dict[str, Any]:
    """What the template of the section shows, by name."""
    main, corpora, texts = _main(scores), _corpora(scores), _texts(scores)
    return {
        "measured": scores.measured,
        "settings": _settings(scores, config),
        "findings": quality_words.findings(scores),
        "table": _table(scores, main),
        "corpora": _table(scores, corpora),
        "texts": _table(scores, texts),
        "evidence": [line for variant in scores.variants for line in _evidence(scores, variant)],
        "figures": [
            (title, Markup(svg.inline(path, name, INKS)))
            for name, title in FIGURES.items()
            for path in plots
            if Path(path).stem == name and _drawn(scores, name)
        ],
        "rule": {
            "alpha": verdicts.ALPHA,
            "documents": verdicts.LEAST_DOCUMENTS,
            "collapsed": f"{100 * verdicts.COLLAPSED_SHARE:.0f}",
            "margins": {name: METRICS[name].margin for name in verdicts.DECIDES},
        },
    }


def _drawn(scores: Scores, figure: str) -> bool:
    """Whether a figure shows anything."""
    return bool(any(scores.points(task) for task in scores.tasks) if figure == "retrieval" else scores.corpora)


def _main(scores: Scores) -> list[Column]:
    """The columns of the first table, those that anything came out for."""
    columns = [
        Column("kl_mean", "all", "KL", "mean, nats", "nats"),
        Column("kl_dense", "all", "KL, nothing evicted", "mean, nats", "nats"),
        Column("kl_p99", "all", "KL", "99th percentile, nats", "nats"),
        Column("top1_agreement", "all", "Top-1 agreement", "%", "share"),
        Column("perplexity_ratio", "all", "Perplexity", "ratio to the full cache’s", "ratio"),
        *(Column("retrieval_accuracy", task, TASKS[task], "% right", "share") for task in scores.tasks),
        Column("rouge_l", "outputs", "ROUGE-L", "against the baseline’s texts", "score"),
        Column("chrf", "outputs", "chrF", "against the baseline’s texts", "score"),
        Column("collapsed", "outputs", "Collapsed", "texts", "count"),
        Column("rouge_l", "outputs/batch", "ROUGE-L", "padded batch", "score"),
        Column("collapsed", "outputs/batch", "Collapsed", "texts, padded batch", "count"),
    ]
    return _known(scores, columns)


def _corpora(scores: Scores) -> list[Column]:
    columns = [
        Column(metric, corpus, title, CORPORA[corpus], kind)
        for corpus in scores.corpora
        for metric, title, kind in (
            ("kl_mean", "KL, nats", "nats"),
            ("top1_agreement", "Top-1, %", "share"),
            ("perplexity_ratio", "Perplexity ratio", "ratio"),
        )
    ]
    return _known(scores, columns)


def _texts(scores: Scores) -> list[Column]:
    columns = [
        Column("common_prefix_tokens", "outputs", "Common beginning", "tokens, mean", "tokens"),
        Column("first_divergence", "outputs", "First divergence", "token, mean of those that part", "tokens"),
        Column("rep_4", "outputs", "rep-4", "share of 4-grams that repeat", "score"),
        Column("distinct_2", "outputs", "distinct-2", "different bigrams over all", "score"),
        Column("outside_scripts", "outputs", "Outside scripts", "% of letters", "share"),
        Column("length_ratio", "outputs", "Length", "ratio to the baseline’s", "ratio"),
    ]
    return _known(scores, columns)


def _known(scores: Scores, columns: Sequence[Column]) -> list[Column]:
    return [
        column
        for column in columns
        if any(scores.row(variant["variant"], column.metric, column.part) for variant in scores.variants)
    ]


def _table(scores: Scores, columns: Sequence[Column]) -> dict[str, Any]:
    """Headings and rows; empty where no column has a figure."""
    palette = colours(scores.variants)
    rows = [_line(scores, variant, columns, palette[variant["method"]]) for variant in scores.variants]
    return {"columns": columns, "rows": rows if columns else []}


def _line(scores: Scores, variant: Row, columns: Sequence[Column], colour: str) -> dict[str, Any]:
    name = str(variant["variant"])
    gaps = scores.gaps(name)
    rows = [scores.row(name, column.metric, column.part) for column in columns]
    kept = variant["kept_fraction"]
    verdict = quality_words.verdict_words(scores, variant)
    return {
        "label": variant["variant"],
        "colour": colour,
        "baseline": scores.is_baseline(variant),
        "simulated": bool(variant.get("simulated")),
        "verdict": verdict,
        "judged": _judged(variant["verdict"]),
        "kept": f"{100 * kept:.3g}%" if kept is not None else "–",
        "kept_sort": "" if kept is None else repr(kept),
        "cells": [
            _cell(column, row, scores.gap(name, column.metric, column.part) or gaps.get(STAGES[column.metric]))
            for column, row in zip(columns, rows, strict=True)
        ],
    }


def _judged(verdict: str | None) -> str:
    """The class of a verdict's colour."""
    return {"worse": "worse", "collapsed": "worse", "better": "better"}.get(verdict or "", "")


def _cell(column: Column, row: Row | None, gap: Row | None) -> dict[str, Any]:
    """One figure with its interval and its differences, or why there is none."""
    if row is None:
        why = words.STATUS_WORDS.get(gap["status"], str(gap["status"])) if gap else ""
        return {"value": "–", "why": why, "sort": "", "interval": "", "exact": "", "changes": []}
    interval = ""
    if row["low"] is not None and row["high"] is not None:
        low, high = (_written(column, row[end]) for end in ("low", "high"))
        interval = f"{low} to {high}{'%' if column.kind == 'count' else ''}" if low != high else ""
    return {
        "value": quality_words.count_words(row) if column.kind == "count" else _written(column, row["value"]),
        "why": "noise floor" if row["reference"] in ("batch", "dtype") and row["metric"] == "kl_mean" else "",
        "sort": repr(row["value"]),
        "interval": interval,
        "exact": f"{row['value']!r} over {row['n']:,} observations of {row['documents']:,} documents",
        "changes": _changes(column, row),
    }


def _changes(column: Column, row: Row) -> list[Change]:
    """Differences from the baseline and from the random control; in parentheses where the interval covers 0."""
    found = []
    for name, against in (("difference", "baseline"), ("control_difference", "random")):
        value = row.get(name)
        if value is None:
            continue
        low, high = (row.get(f"{name.removesuffix('_difference')}_{end}") for end in ("low", "high"))
        text = _signed(column, value)
        clear = low is not None and high is not None and (low > 0 or high < 0)
        judged = _judged(row["verdict"]) if against == "baseline" else ""
        found.append(Change(against, text if clear else f"({text})", judged))
    return found


def _written(column: Column, value: float) -> str:
    match column.kind:
        case "nats":
            return quality_words.nats(value)
        case "share":
            return f"{100 * value:.1f}"
        case "count":
            return f"{100 * value:.0f}"
        case "tokens":
            return words.number(value)
    return f"{value:.3f}"


def _signed(column: Column, value: float) -> str:
    """With its sign, and in points where the column is a share."""
    return _with_sign(column, value) + (" points" if column.kind in ("share", "count") else "")


def _with_sign(column: Column, value: float) -> str:
    size = _written(column, abs(value))
    return f"{'±' if not size.strip('0.') else '−' if value < 0 else '+'}{size}"


def _evidence(scores: Scores, variant: Row) -> list[dict[str, Any]]:
    """What a variant's verdict rests on, a line a metric."""
    lines = []
    for row in quality_words.deciding(scores, variant):
        if row["difference"] is None:
            continue
        column = Column(row["metric"], row["slice"], "", "", KINDS[row["metric"]])
        p, unit = row["p_holm"], "%" if column.kind == "share" else ""
        lines.append(
            {
                "label": variant["variant"],
                "figure": quality_words.figure_name(row),
                "value": _written(column, quality_words.beside_baseline(row)) + unit,
                "base": _written(column, row["baseline_value"]) + unit,
                "difference": _signed(column, row["difference"]),
                "interval": _between(column, row["difference_low"], row["difference_high"]),
                "p": "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
                "p_sort": "" if p is None else repr(p),
                "control": "–" if row["control_difference"] is None else _signed(column, row["control_difference"]),
                "control_interval": _between(column, row["control_low"], row["control_high"]),
                "verdict": quality_words.VERDICTS.get(row["verdict"] or "", "no verdict"),
                "judged": _judged(row["verdict"]),
            }
        )
    return lines


KINDS = {
    "kl_mean": "nats",
    "top1_agreement": "share",
    "perplexity_ratio": "ratio",
    "retrieval_accuracy": "share",
    "collapsed": "share",
}


def _between(column: Column, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_with_sign(column, low)} to {_signed(column, high)}"


def _settings(scores: Scores, config: Mapping[str, Any]) -> list[str]:
    """What was done, from the config, in sentences."""
    quality = config.get("quality") or {}
    retrieval, said = quality.get("retrieval") or {}, []
    if quality.get("windows") and scores.corpora:
        corpora = words.listing([CORPORA[corpus] for corpus in scores.corpora])
        said.append(
            f"A prefix of {quality['prefix_tokens']:,} tokens is compressed, and the {quality['continuation_tokens']:,}"
            f" tokens after it are read with the full cache and with the compressed one, in up to"
            f" {quality['windows']:,} windows each of {corpora}; a window is of one conversation or chapter alone, cut"
            " wherever in its text so many tokens end."
        )
    if retrieval.get("samples") and any(scores.points(task) for task in scores.tasks):
        tokens = words.listing([f"{length:,}" for length in retrieval["prompt_tokens"]])
        aware = "is part" if retrieval["query_aware"] else "is no part"
        said.append(
            f"Facts are hidden in prompts of {tokens} tokens at {len(retrieval['depths'])} depths,"
            f" {retrieval['samples']:,} samples each; the question {aware} of what is compressed."
        )
    return said
