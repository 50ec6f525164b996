"""Intervals and tests for paired observations that come in documents.

Observations of one document are alike, so what is resampled or flipped is whole documents. Two variants that were
shown the same things are compared observation by observation. Every seed is fixed: the same data give the same digits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
SEED = 4387
RESAMPLES = 2000
FLIPS = 9999
BATCH = 200
"""Resamples held in memory at a time."""

Bounds = tuple[float | None, float | None]
Floats = NDArray[np.float64]
NONE: Bounds = (None, None)


def _same(mean: Floats) -> Floats:
    return mean


def mean_interval(values: ArrayLike, documents: ArrayLike, of: Callable[[Floats], Floats] = _same) -> Bounds:
    """Interval of the mean over all observations: BCa bootstrap over documents.

    Parameters
    ----------
    values : one number an observation.
    documents : which document each comes from.
    of : a smooth function of the mean, `np.exp` for a perplexity ratio from log ratios.

    Returns
    -------
    Low and high; (None, None) for fewer than two documents.

    Source: Field & Welsh, Bootstrapping clustered data, JRSS B 2007 (the cluster bootstrap); Efron, Better bootstrap
    confidence intervals, JASA 1987 (BCa).
    """
    sums, counts = _sums(values, documents)
    return _bootstrap((sums, counts), lambda s, c, axis: of(s.sum(axis) / c.sum(axis)))


def difference_interval(
    values: ArrayLike, others: ArrayLike, documents: ArrayLike, of: Callable[[Floats], Floats] = _same
) -> Bounds:
    """Interval of ``of(mean of values) − of(mean of others)``, paired and resampled as in `mean_interval`."""
    sums, counts = _sums(values, documents)
    other, _ = _sums(others, documents)

    def statistic(s: Floats, o: Floats, c: Floats, axis: int) -> Floats:
        return of(s.sum(axis) / c.sum(axis)) - of(o.sum(axis) / c.sum(axis))

    return _bootstrap((sums, other, counts), statistic)


def share_interval(scores: ArrayLike, documents: ArrayLike) -> Bounds:
    """Interval of a share: Wilson's where each document gave one observation, else the bootstrap over documents.

    Where all observations agree, nothing shows that documents differ and a bootstrap would be certain: then too it is
    Wilson's. Observations that are right in part are left to the bootstrap.

    Parameters
    ----------
    scores : 1 for right, 0 for wrong, in between for right in part; one an observation.
    """
    values, count = np.asarray(scores, dtype=float), _count(documents)
    agree = values.min() == values.max()
    if np.isin(values, (0, 1)).all() and (count == len(values) or (count > 1 and agree)):
        return _wilson(int(values.sum()), len(values))
    return mean_interval(values, documents)


def share_difference_interval(scores: ArrayLike, others: ArrayLike, documents: ArrayLike) -> Bounds:
    """Interval of the difference of two paired shares: the bootstrap over documents.

    Where no pair differs, or all do from right to wrong, a bootstrap would be certain; then it goes as far as Wilson's
    bound lets the share of pairs that differ go.
    """
    values, other = np.asarray(scores, dtype=float), np.asarray(others, dtype=float)
    differences = set((values - other).tolist())
    if len(differences) > 1 or _count(documents) < 2 or not differences <= {-1.0, 0.0, 1.0}:
        return difference_interval(values, other, documents)
    least, most = _wilson(0, len(values))[1], _wilson(len(values), len(values))[0]
    return {0.0: (-least, least), 1.0: (most, 1.0), -1.0: (-1.0, -most)}[differences.pop()]


def quantile(values: ArrayLike, q: float) -> float:
    """The least value that at least a share ``q`` of the values does not exceed."""
    return float(np.quantile(np.asarray(values, dtype=float), q, method="inverted_cdf"))


def quantile_interval(values: ArrayLike, documents: ArrayLike, q: float) -> Bounds:
    """Interval of `quantile`: percentile bootstrap over documents (BCa's jackknife is not consistent for quantiles)."""
    return _bootstrap_documents(documents, [_quantile_of(values, documents, q)])


def quantile_difference_interval(values: ArrayLike, others: ArrayLike, documents: ArrayLike, q: float) -> Bounds:
    """Interval of the difference of two quantiles over the same resampled documents."""
    return _bootstrap_documents(documents, [_quantile_of(values, documents, q), _quantile_of(others, documents, q)])


def flip_test(differences: ArrayLike, documents: ArrayLike) -> float | None:
    """Two-sided p of paired differences: the signs of whole documents are flipped, all ways or ``FLIPS`` of them.

    Exact where the differences of a document are as likely to point one way as the other. Fewer than six documents
    cannot give p < 0.05. None for fewer than two.

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, section 3.2.
    """
    from scipy.stats import permutation_test

    sums, _ = _sums(differences, documents)
    if len(sums) < 2:
        return None
    found = permutation_test(
        (sums,),
        lambda s, axis: s.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=BATCH * 10,
        rng=np.random.default_rng(SEED),
    )
    return float(min(found.pvalue, 1.0))


def mcnemar(hits: ArrayLike, others: ArrayLike) -> float:
    """Exact McNemar p of the hypothesis that of the pairs that differ as many are hits here as there.

    Source: McNemar, Psychometrika 1947; the exact form is the binomial test of the discordant pairs.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    first, second = np.asarray(hits, dtype=bool), np.asarray(others, dtype=bool)
    table = [[int((a & b).sum()) for b in (second, ~second)] for a in (first, ~first)]
    return float(test(table, exact=True).pvalue)


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's adjusted p values of one family of tests; None stays None and does not count.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 1979.
    """
    from statsmodels.stats.multitest import multipletests

    known = [p for p in p_values if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1].tolist() if known else [])
    return [None if p is None else float(next(adjusted)) for p in p_values]


def _wilson(hits: int, count: int) -> tuple[float, float]:
    """Source: Wilson, JASA 1927."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(hits, count, alpha=1 - LEVEL, method="wilson")
    return max(float(low), 0.0), min(float(high), 1.0)


def _count(documents: ArrayLike) -> int:
    return len(np.unique(np.asarray(documents, dtype=str)))


def _codes(documents: ArrayLike) -> NDArray[np.int64]:
    return np.unique(np.asarray(documents, dtype=str), return_inverse=True)[1]


def _sums(values: ArrayLike, documents: ArrayLike) -> tuple[Floats, Floats]:
    """Sum and count of each document's observations."""
    codes = _codes(documents)
    sums = np.bincount(codes, np.asarray(values, dtype=float)).astype(float)
    return sums, np.bincount(codes).astype(float)


def _bootstrap(columns: tuple[Floats, ...], statistic: Callable[..., Floats]) -> Bounds:
    """BCa bootstrap of a statistic of columns that have one number a document."""
    from scipy.stats import bootstrap

    if len(columns[0]) < 2:
        return NONE
    point = float(statistic(*columns, axis=-1))
    with np.errstate(all="ignore"):
        found = _quiet(
            lambda: bootstrap(
                columns,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=RESAMPLES,
                confidence_level=LEVEL,
                rng=np.random.default_rng(SEED),
            )
        )
    low, high = found.confidence_interval
    if np.isnan(low) or np.isnan(high):  # every resample says the same, or the jackknife does
        low, high = _percentiles(found.bootstrap_distribution)
    return min(float(low), point), max(float(high), point)


def _quiet(call: Callable[[], Any]) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of the degenerate intervals that are handled here
        return call()


def _percentiles(distribution: Floats) -> tuple[float, float]:
    low, high = np.quantile(distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _bootstrap_documents(documents: ArrayLike, of: list[Callable[[NDArray[np.int64]], Floats]]) -> Bounds:
    """Percentile bootstrap of ``of[0]``, or of ``of[0] − of[1]``, functions of how often each document was drawn."""
    count = _count(documents)
    if count < 2:
        return NONE
    rng = np.random.default_rng(SEED)
    parts = []
    for begin in range(0, RESAMPLES, BATCH):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(BATCH, RESAMPLES - begin))
        found = [function(times) for function in of]
        parts.append(found[0] - found[1] if len(found) > 1 else found[0])
    return _percentiles(np.concatenate(parts))


def _quantile_of(values: ArrayLike, documents: ArrayLike, q: float) -> Callable[[NDArray[np.int64]], Floats]:
    """The quantile of the observations, each as often as its document was drawn ([resamples, documents])."""
    numbers = np.asarray(values, dtype=float)
    order = np.argsort(numbers, kind="stable")
    ordered, codes = numbers[order], _codes(documents)[order]

    def of(times: NDArray[np.int64]) -> Floats:
        reached = times[:, codes].cumsum(1, dtype=np.int32)
        return ordered[(reached < q * reached[:, -1:]).sum(1)]

    return of
