"""What the numbers of quality allow one to say, by rules that are the same for every variant.

A metric's verdict, for a variant against its baseline over the same observations:

collapsed
    the share of collapsed texts is at least half above the baseline's, and the test's p alone is below 0.05: at
    least six texts fell where the baseline's did not, more if any did the other way (metric `collapsed` only). Holm's
    correction would take more texts than one reads; half of them is what guards against chance among many variants.
worse, better
    the 95% interval of the difference excludes 0, and the test's p is below 0.05 after Holm's correction over the
    variants of the model.
indistinguishable
    the interval covers 0 *and* lies within the metric's margin on both sides, from at least 6 documents. Covering 0
    alone only says that too little was measured.
unknown
    none of these: more observations would tell.

There is no verdict on a retrieval task that the baseline itself fails: it has nothing to lose.

Everything compressed has a KL divergence above 0, as has the uncompressed cache itself in another batch shape or
dtype. Distribution metrics are therefore compared with that noise floor, the greater of the two, not with 0.

A variant's overall verdict: `collapsed` if its texts have; else `worse` if any metric that decides is worse;
`indistinguishable` only if all are; `better` if some are better and the rest indistinguishable; else `unknown`. Of the
metric `collapsed`, an `unknown` does not count here: ten texts can show a collapse, and not that there is none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["indistinguishable", "worse", "better", "collapsed", "unknown"]

ALPHA = 0.05
LEAST_DOCUMENTS = 6
"""Below this no two-sided test of documents can reach 0.05: 2 × 0.5⁵ is 0.06."""
COLLAPSED_SHARE = 0.5


@dataclass(frozen=True)
class Metric:
    """A metric of quality, and how its observations are summed up and judged.

    Attributes
    ----------
    name : as in quality.parquet.
    column : the observation that it sums up.
    kind : `mean`; `share` of observations that are right; `ratio`, exp of the mean; `p99`, the 99th percentile.
    test : `flip` (signs of documents), `mcnemar`, or None.
    better : which way is better; None where neither is.
    margin : a difference that does not matter, in the metric's unit; None: no verdict.
    buckets : whether it is also given by distance from the prefix's end.
    """

    name: str
    column: str
    kind: Literal["mean", "share", "ratio", "p99"] = "mean"
    test: Literal["flip", "mcnemar", None] = "flip"
    better: Literal["lower", "higher", None] = None
    margin: float | None = None
    buckets: bool = False


DISTRIBUTION = (
    Metric("kl_mean", "kl", better="lower", margin=0.01, buckets=True),  # nats
    Metric("kl_dense", "kl_dense"),  # nats; of what a method does to the weights alone
    Metric("kl_p99", "kl", "p99", None, "lower"),
    Metric("top1_agreement", "agrees", "share", "flip", "higher", 0.01),
    Metric("perplexity_ratio", "log_ratio", "ratio", "flip", "lower", 0.01),
)
RETRIEVAL = (
    Metric("retrieval_accuracy", "correct", "share", "mcnemar", "higher", 0.05),
    Metric("retrieval_score", "score", "share", "flip", "higher", 0.05),
)
TEXT = (
    Metric("rouge_l", "rouge_l", better="higher"),
    Metric("chrf", "chrf", better="higher"),
    Metric("common_prefix_tokens", "common_prefix_tokens", better="higher"),
    Metric("first_divergence", "first_divergence", better="higher"),
    Metric("rep_4", "rep_4", better="lower"),
    Metric("distinct_2", "distinct_2"),
    Metric("outside_scripts", "outside_scripts", better="lower"),
    Metric("length_ratio", "length_ratio"),
    Metric("collapsed", "collapsed", "share", "mcnemar", "lower", 0.05),
)
METRICS = {metric.name: metric for metric in DISTRIBUTION + RETRIEVAL + TEXT}

DECIDES = ("kl_mean", "top1_agreement", "perplexity_ratio", "retrieval_accuracy", "collapsed")
"""The metrics behind a variant's overall verdict, each over all corpora, a whole task, or all texts."""


def of_metric(row: Mapping[str, Any]) -> Verdict | None:
    """Verdict of a row of quality.parquet; None where the row is no comparison or the metric has no margin.

    Parameters
    ----------
    row : with ``metric``, ``status``, ``is_baseline``, ``documents``, ``baseline_value``, ``difference`` and its ends,
        ``p`` and ``p_holm``.
    """
    metric = METRICS[row["metric"]]
    if metric.margin is None or row["status"] != "ok" or row["is_baseline"]:
        return None
    if metric in RETRIEVAL and row["baseline_value"] is not None and row["baseline_value"] <= metric.margin:
        return None
    low, high = row["difference_low"], row["difference_high"]
    if low is None or high is None:
        return "unknown"
    if metric.name == "collapsed" and row["difference"] >= COLLAPSED_SHARE and row["p"] < ALPHA:
        return "collapsed"
    if (low > 0 or high < 0) and row["p_holm"] is not None and row["p_holm"] < ALPHA:
        return "better" if (low > 0) == (metric.better == "higher") else "worse"
    within = -metric.margin <= low <= 0 <= high <= metric.margin
    return "indistinguishable" if within and row["documents"] >= LEAST_DOCUMENTS else "unknown"


def overall(rows: Iterable[Mapping[str, Any]]) -> Verdict:
    """A variant's verdict from the rows of the metrics that decide."""
    found = set()
    for row in rows:
        verdict = row["verdict"] if row["status"] == "ok" else "unknown"
        if verdict is not None and not (row["metric"] == "collapsed" and verdict == "unknown"):
            found.add(verdict)
    if "collapsed" in found:
        return "collapsed"
    if "worse" in found:
        return "worse"
    if found == {"indistinguishable"}:
        return "indistinguishable"
    return "better" if "better" in found and found <= {"better", "indistinguishable"} else "unknown"
