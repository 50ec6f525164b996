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
    ordered, outside = sorted(values), left_out(n)
    return ordered[outside], ordered[n - 1 - outside]


def left_out(n: int) -> int:
    """How many of ``n`` values `interval` leaves out at each end."""
    outside, tail = 0, 0.5**n
    while tail + comb(n, outside + 1) * 0.5**n <= 0.025:
        outside += 1
        tail += comb(n, outside) * 0.5**n
    return outside


def by_chance(n: int, m: int) -> float:
    """Probability that the intervals of ``n`` and of ``m`` values of one continuous distribution do not overlap.

    The upper end of one is below the lower end of the other where, in the order of all values, so few of the other's
    come before it: a hypergeometric sum. Where both are full ranges it is 2 / C(n + m, n).
    """
    if 0 in (n, m):
        return 1.0
    return min(1.0, _below(n, m) + _below(m, n))


def _below(n: int, m: int) -> float:
    upper = n - left_out(n)  # the place of the upper end among its own
    ways = sum(comb(upper - 1 + i, i) * comb(n - upper + m - i, m - i) for i in range(left_out(m) + 1))
    return ways / comb(n + m, n)


def noise(values: list[float]) -> float | None:
    """How far the 95% interval of the median reaches to its wider side, as a share of the median; None if unknown."""
    low, high = interval(values)
    if low is None or high is None:
        return None
    middle = median(values)
    return max(high - middle, middle - low) / middle if middle else None
