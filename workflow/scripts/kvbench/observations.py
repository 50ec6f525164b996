"""What a variant's jobs observed, as frames that line up with its baseline's, and how they are sliced."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from kvbench import conversations, text_metrics
from kvbench.diff import common_prefix
from kvbench.verdicts import DISTRIBUTION, RETRIEVAL, TEXT, Metric

EDGES = (16, 64, 128)
"""Where buckets of distance from the prefix's end stop, in tokens; they go on doubling."""


@dataclass(frozen=True)
class Observed:
    """What one job observed.

    Attributes
    ----------
    status, reason : of the job; the frame is empty unless it is ``ok``.
    frame : one row an observation, under an index that is the same for all variants; columns ``document``,
        ``slice`` (a corpus, a task, a way of answering), ``part`` (a bucket, a point; null where there is none) and one
        a metric.
    kept : mean live bytes over full bytes after compression; None where that was not measured.
    simulated : whether no byte was freed.
    gaps : status and reason by name, for the slices and parts of an ``ok`` job that did not come out.
    """

    status: str
    reason: str | None
    frame: pd.DataFrame
    kept: float | None
    simulated: bool | None
    gaps: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Observations that are summed up to one number.

    Attributes
    ----------
    level : `whole` or `part`; the tests of one level are one family.
    rows : bool, one a row of the frame.
    """

    name: str
    level: str
    rows: np.ndarray[Any, np.dtype[np.bool_]]


def distribution(path: Path) -> dict[str, Observed]:
    """A quality job's file by reference: ``full`` for compressed caches, the noise floors for an uncompressed one."""
    table = pq.read_table(path).to_pandas()
    return {
        str(reference): _tokens(rows) for reference, rows in table.fillna({"reference": "full"}).groupby("reference")
    }


def _tokens(table: pd.DataFrame) -> Observed:
    ok = table[table["status"] == "ok"]
    if ok.empty:
        return _nothing(table)
    ok = ok.assign(
        document=ok["corpus"] + "/" + ok["document"],
        log_ratio=ok["nll"] - ok["nll_full"],
        slice=ok["corpus"],
        part=_buckets(ok["distance"].to_numpy()),
    )
    return _observed(ok, ["corpus", "window", "distance"], DISTRIBUTION)


def retrieval(path: Path) -> Observed:
    """A retrieval job's file; a part is a point: task/prompt tokens/depth."""
    table = pq.read_table(path).to_pandas()
    if not (table["status"] == "ok").any():
        return _nothing(table)
    depth = [f"/{depth:g}" if pd.notna(depth) else "" for depth in table["depth"]]
    table = table.assign(
        slice=table["task"], part=table["task"] + "/" + table["prompt_tokens"].astype(int).astype(str) + depth
    )
    ok, lacking = table[table["status"] == "ok"], table[table["status"] != "ok"]
    lacking = pd.concat([lacking[~lacking["task"].isin(ok["task"])].assign(part=lambda rows: rows["task"]), lacking])
    gaps = {row.part: (row.status, row.status_reason) for row in lacking.itertuples()}
    return replace(_observed(ok, ["part", "sample"], RETRIEVAL), gaps=gaps)


def texts(path: Path, baseline: Path | None) -> Observed:
    """An outputs job's file, each text compared with the baseline's answer to the same prompt, got the same way."""
    rows = _answers(path)
    if not rows:
        return _nothing(pq.read_table(path).to_pandas())
    references = _answers(baseline) if baseline is not None else {}
    compared = [_compared(row, references.get(key)) for key, row in rows.items()]
    return _observed(pd.DataFrame(compared), ["slice", "rank"], TEXT)


def slices(frame: pd.DataFrame, metric: Metric) -> Iterator[Slice]:
    """What a metric is summed up over.

    A distribution: everything, each corpus, and some metrics by distance. Retrieval: each task and each point. Texts:
    each way of answering.
    """
    if metric in DISTRIBUTION:
        yield Slice("all", "whole", np.ones(len(frame), dtype=bool))
    for name in frame["slice"].unique():
        yield Slice(str(name), "corpus" if metric in DISTRIBUTION else "whole", (frame["slice"] == name).to_numpy())
    if metric in RETRIEVAL:
        for name in frame["part"].unique():
            yield Slice(str(name), "part", (frame["part"] == name).to_numpy())
    if metric.buckets:
        for name in frame["part"].unique():
            rows = (frame["part"] == name).to_numpy()
            yield Slice(f"all/{name}", "part", rows)
            for corpus in frame["slice"].unique():
                yield Slice(f"{corpus}/{name}", "part", rows & (frame["slice"] == corpus).to_numpy())


def _observed(rows: pd.DataFrame, index: list[str], metrics: tuple[Metric, ...]) -> Observed:
    columns = dict.fromkeys(["document", "slice", "part"] + [metric.column for metric in metrics])
    kept = rows["kept_fraction"].mean() if "kept_fraction" in rows else None
    simulated = rows["simulated"].dropna()
    return Observed(
        status="ok",
        reason=None,
        frame=rows.set_index(index, drop=False, verify_integrity=True)[list(columns)],
        kept=None if kept is None or pd.isna(kept) else float(kept),
        simulated=bool(simulated.any()) if len(simulated) else None,
    )


def _nothing(table: pd.DataFrame) -> Observed:
    first = table.iloc[0] if len(table) else {"status": "failed", "status_reason": "the job left no row"}
    return Observed(str(first["status"]), first["status_reason"], pd.DataFrame(), None, None)


def _buckets(distance: np.ndarray[Any, Any]) -> list[str]:
    """`1-16`, `17-64`, `65-128`, `129-256` …; the last ends where the continuations do."""
    longest = int(distance.max())
    edges = list(EDGES)
    while edges[-1] < longest:
        edges.append(edges[-1] * 2)
    starts = [1, *(edge + 1 for edge in edges)]
    names = [f"{start}-{min(edge, longest)}" for start, edge in zip(starts, edges, strict=False)]
    return [names[i] for i in np.searchsorted(edges, distance)]


def _answers(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Answers that came out, by way and rank; a file without ways has each prompt alone."""
    rows = pq.read_table(path).to_pylist()
    return {(row.get("way") or "alone", row["rank"]): row for row in rows if row["status"] == "ok"}


def _compared(row: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """One text's metrics; those that need the baseline's text are null without it or for the baseline itself."""
    text, tokens = row["text"] or "", row["token_ids"]
    other = (reference["text"] or "") if reference is not None else None
    known = {
        "rank": row["rank"],
        "document": conversations.whole(row["conversation_id"] or str(row["rank"])),
        "slice": "outputs" if (row.get("way") or "alone") == "alone" else f"outputs/{row['way']}",
        "part": None,
        "simulated": row["simulated"],
        "rep_4": text_metrics.repetition(tokens, 4),
        "distinct_2": text_metrics.distinct(tokens, 2),
        "outside_scripts": text_metrics.outside_scripts(text, text_metrics.scripts(row["prompt"])),
        "collapsed": text_metrics.collapsed(text, tokens, row["prompt"], other),
    }
    against = dict.fromkeys(("rouge_l", "chrf", "common_prefix_tokens", "first_divergence", "length_ratio"))
    if reference is None or other is None:
        return known | against
    others = reference["token_ids"]
    return known | {
        "rouge_l": text_metrics.rouge_l(text, other),
        "chrf": text_metrics.chrf(text, other),
        "common_prefix_tokens": common_prefix(tokens, others),
        "first_divergence": text_metrics.first_divergence(tokens, others),
        "length_ratio": len(tokens) / len(others) if others else None,
    }
