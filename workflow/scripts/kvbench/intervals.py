"""How sure a median is."""

from math import comb
from statistics import median


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """A distribution-free 95% interval of the median: order statistics of the sign test.

    Fewer than 6 values cannot give 95%: then it is their full range, which covers the median with probability
    1 − 2^(1−n). One value has no interval.

    Source: Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, section 3.6.
    """
    n = len(values)
    if n < 2:
        return None, None
    ordered, outside, tail = sorted(values), 0, 0.5**n
    while tail + comb(n, outside + 1) * 0.5**n <= 0.025:
        outside += 1
        tail += comb(n, outside) * 0.5**n
    return ordered[outside], ordered[n - 1 - outside]


def noise(values: list[float]) -> float | None:
    """How far the 95% interval of the median reaches to its wider side, as a share of the median; None if unknown."""
    low, high = interval(values)
    if low is None or high is None:
        return None
    middle = median(values)
    return max(high - middle, middle - low) / middle if middle else None
