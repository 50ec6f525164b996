"""One number for many observations, with its interval, and how it differs from others of the same things."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvbench import paired
from kvbench.observations import Slice
from kvbench.paired import Bounds, Floats
from kvbench.verdicts import Metric

Row = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """A variant's observations beside its baseline's and its control's, row by row; None where there is none."""

    mine: pd.DataFrame
    baseline: pd.DataFrame | None
    control: pd.DataFrame | None


@dataclass(frozen=True)
class Pairs:
    """Observations that two variants both have."""

    values: Floats
    others: Floats
    documents: NDArray[np.str_]


def summary(metric: Metric, part: Slice, compared: Compared) -> Row | None:
    """One number with its interval, and its differences with theirs; None where nothing was observed."""
    values = _column(compared.mine, metric, part)
    documents = compared.mine["document"].to_numpy()[part.rows]
    there = ~np.isnan(values)
    if not there.any():
        return None
    low, high = _interval(metric, values[there], documents[there])
    row = {
        "value": _value(metric, values[there]),
        "low": low,
        "high": high,
        "n": int(there.sum()),
        "documents": len(set(documents[there])),
    }
    baseline = _pairs(values, _column(compared.baseline, metric, part), documents)
    control = _pairs(values, _column(compared.control, metric, part), documents)
    return row | _against_baseline(metric, baseline) | _against_control(metric, control)


def _column(frame: pd.DataFrame | None, metric: Metric, part: Slice) -> Floats:
    """The observations of a slice, NaN where there is none."""
    if frame is None:
        return np.full(int(part.rows.sum()), np.nan)
    return frame[metric.column].astype(float).to_numpy()[part.rows]


def _pairs(values: Floats, others: Floats, documents: NDArray[np.str_]) -> Pairs | None:
    both = ~np.isnan(values) & ~np.isnan(others)
    return Pairs(values[both], others[both], documents[both]) if both.any() else None


def _against_baseline(metric: Metric, pairs: Pairs | None) -> Row:
    if pairs is None:
        return dict.fromkeys(("baseline_value", "difference", "difference_low", "difference_high", "p"))
    low, high = _difference_interval(metric, pairs)
    baseline = _value(metric, pairs.others)
    return {
        "baseline_value": baseline,
        "difference": _value(metric, pairs.values) - baseline,
        "difference_low": low,
        "difference_high": high,
        "p": _p(metric, pairs),
    }


def _against_control(metric: Metric, pairs: Pairs | None) -> Row:
    if pairs is None:
        return dict.fromkeys(("control_difference", "control_low", "control_high"))
    low, high = _difference_interval(metric, pairs)
    difference = _value(metric, pairs.values) - _value(metric, pairs.others)
    return {"control_difference": difference, "control_low": low, "control_high": high}


def _value(metric: Metric, values: Floats) -> float:
    if metric.kind == "p99":
        return paired.quantile(values, 0.99)
    return float(np.exp(values.mean()) if metric.kind == "ratio" else values.mean())


def _interval(metric: Metric, values: Floats, documents: NDArray[np.str_]) -> Bounds:
    match metric.kind:
        case "share":
            return paired.share_interval(values, documents)
        case "p99":
            return paired.quantile_interval(values, documents, 0.99)
        case "ratio":
            return paired.mean_interval(values, documents, np.exp)
    return paired.mean_interval(values, documents)


def _difference_interval(metric: Metric, pairs: Pairs) -> Bounds:
    columns = (pairs.values, pairs.others, pairs.documents)
    match metric.kind:
        case "share":
            return paired.share_difference_interval(*columns)
        case "p99":
            return paired.quantile_difference_interval(*columns, 0.99)
        case "ratio":
            return paired.difference_interval(*columns, np.exp)
    return paired.difference_interval(*columns)


def _p(metric: Metric, pairs: Pairs) -> float | None:
    if metric.test is None:
        return None
    if metric.test == "mcnemar":
        return paired.mcnemar(pairs.values, pairs.others)
    return paired.flip_test(pairs.values - pairs.others, pairs.documents)
