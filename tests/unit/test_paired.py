"""The statistics against slow references written another way."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench import paired

numbers = st.floats(-50, 50).map(lambda x: round(x, 3))
some_documents = st.lists(st.lists(numbers, min_size=1, max_size=4), min_size=2, max_size=8)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def flat(documents: list[list[float]]) -> tuple[list[float], list[str]]:
    values = [value for document in documents for value in document]
    return values, [f"d{i}" for i, document in enumerate(documents) for _ in document]


@settings(max_examples=40, deadline=None)
@given(some_documents)
def test_the_interval_of_a_mean_holds_it_and_lies_within_the_documents_means(documents: list[list[float]]) -> None:
    values, names = flat(documents)
    low, high = paired.mean_interval(values, names)
    means = [sum(document) / len(document) for document in documents]
    assert low is not None and high is not None
    assert min(means) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(means) + 1e-9


@settings(max_examples=20, deadline=None)
@given(some_documents)
def test_the_names_of_documents_do_not_decide(documents: list[list[float]]) -> None:
    values, names = flat(documents)
    assert paired.mean_interval(values, names) == paired.mean_interval(values, [f"x{name}" for name in names])


def slow_bootstrap(documents: list[list[float]], draws: int = 4000) -> tuple[float, float]:
    """Percentile bootstrap over documents, one resample after the other."""
    rng = np.random.default_rng(1)
    means = []
    for _ in range(draws):
        drawn = [documents[i] for i in rng.integers(len(documents), size=len(documents))]
        means.append(np.mean([value for document in drawn for value in document]))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_it_agrees_with_a_slow_bootstrap_where_nothing_is_skewed() -> None:
    rng = np.random.default_rng(0)
    documents = [list(rng.normal(rng.normal(), 1, size=5)) for _ in range(60)]
    values, names = flat(documents)
    assert paired.mean_interval(values, names) == pytest.approx(slow_bootstrap(documents), abs=0.03)
    low, high = paired.mean_interval(values, names)
    alone = paired.mean_interval(values, [str(i) for i in range(len(values))])
    assert high - low > 1.3 * (alone[1] - alone[0])  # as if independent, the interval would be too narrow


def test_intervals_of_skewed_documents_cover_the_true_mean() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(100):
        documents = [list(level * rng.exponential(size=6)) for level in rng.exponential(size=40)]
        low, high = paired.mean_interval(*flat(documents))
        covered += low <= 1 <= high
    assert covered >= 0.88 * 100


def test_the_interval_of_a_ratio_is_that_of_the_logarithm() -> None:
    rng = np.random.default_rng(3)
    values, names = flat([list(rng.normal(0.2, 0.1, size=3)) for _ in range(30)])
    plain, ratio = paired.mean_interval(values, names), paired.mean_interval(values, names, np.exp)
    assert ratio == pytest.approx((math.exp(plain[0]), math.exp(plain[1])), rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(some_documents, numbers)
def test_a_shift_of_everything_is_the_difference_exactly(documents: list[list[float]], shift: float) -> None:
    values, names = flat(documents)
    moved = [value + shift for value in values]
    assert paired.difference_interval(moved, values, names) == pytest.approx((shift, shift), abs=1e-6)


def test_one_document_tells_nothing() -> None:
    same = ["d"] * 3
    assert paired.mean_interval([1, 2, 3], same) == (None, None)
    assert paired.difference_interval([1, 2, 3], [0, 0, 0], same) == (None, None)
    assert paired.share_interval([1, 1, 1], same) == (None, None)
    assert paired.share_difference_interval([1, 1, 0], [1, 1, 0], same) == (None, None)
    assert paired.quantile_interval([1, 2, 3], same, 0.99) == (None, None)
    assert paired.flip_test([1, 2, 3], same) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.data())
def test_wilson_is_where_the_score_test_turns(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    low, high = paired.share_interval([i < hits for i in range(count)], [str(i) for i in range(count)])
    share = hits / count
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.959964, abs=1e-4)
    assert low - 1e-12 <= share <= high + 1e-12


def test_a_share_of_documents_with_many_observations_is_resampled_by_document() -> None:
    hits, names = flat([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0], [1, 0, 1, 1]])
    clustered = paired.share_interval(hits, names)
    alone = paired.share_interval(hits, [str(i) for i in range(len(hits))])
    assert clustered[1] - clustered[0] > alone[1] - alone[0]


def test_nothing_is_certain_because_all_agreed() -> None:
    names = [str(i // 5) for i in range(50)]
    assert paired.share_interval([True] * 50, names) == pytest.approx((0.92865, 1), abs=1e-5)
    assert paired.share_interval([False] * 50, names) == pytest.approx((0, 0.07135), abs=1e-5)
    same = paired.share_difference_interval([True] * 50, [True] * 50, names)
    assert same == pytest.approx((-0.07135, 0.07135), abs=1e-5)
    lost = paired.share_difference_interval([False] * 50, [True] * 50, names)
    assert lost == pytest.approx((-1, -0.92865), abs=1e-5)
    won = paired.share_difference_interval([True] * 50, [False] * 50, names)
    assert won == pytest.approx((0.92865, 1), abs=1e-5)


def test_what_is_right_in_part_is_resampled() -> None:
    scores, names = [0.5, 1.0, 0.25, 0.75, 0.5, 1.0], list("abcdef")
    assert paired.share_interval(scores, names) == paired.mean_interval(scores, names)
    ones = [1.0] * 6
    assert paired.share_difference_interval(scores, ones, names) == paired.difference_interval(scores, ones, names)


@settings(max_examples=60, deadline=None)
@given(some_documents, st.floats(0.01, 0.99))
def test_a_quantile_is_the_least_value_that_reaches_its_share(documents: list[list[float]], q: float) -> None:
    values, names = flat(documents)
    found = paired.quantile(values, q)
    assert found in values
    assert np.mean([value <= found for value in values]) >= q - 1e-9
    assert np.mean([value < found for value in values]) < q + 1e-9
    low, high = paired.quantile_interval(values, names, q)
    assert min(values) <= low <= high <= max(values)
    assert paired.quantile_difference_interval(values, values, names, q) == (0, 0)


def test_resampled_quantiles_are_those_of_the_drawn_documents() -> None:
    documents = [[1.0, 5.0], [2.0, 2.0, 9.0], [3.0]]
    of = paired._quantile_of(*flat(documents), 0.5)
    for drawn in itertools.product(range(3), repeat=3):
        times = np.bincount(drawn, minlength=3)[None]
        assert of(times)[0] == paired.quantile([v for i in drawn for v in documents[i]], 0.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=8))
def test_the_flip_test_is_exact_for_few_documents(sums: list[int]) -> None:
    means = [
        sum(s * v for s, v in zip(signs, sums, strict=True)) for signs in itertools.product([1, -1], repeat=len(sums))
    ]
    above, below = (np.mean([side * m >= side * sum(sums) for m in means]) for side in (1, -1))
    expected = min(1.0, 2 * min(above, below))
    assert paired.flip_test(sums, [str(i) for i in range(len(sums))]) == pytest.approx(expected)


def test_the_flip_test_flips_documents_and_not_observations() -> None:
    assert paired.flip_test([1.0] * 30, ["a"] * 15 + ["b"] * 15) == pytest.approx(0.5)
    assert paired.flip_test([1.0] * 30, [str(i) for i in range(30)]) < 0.001


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ(outcomes: list[tuple[bool, bool]]) -> None:
    here = sum(a and not b for a, b in outcomes)
    there = sum(b and not a for a, b in outcomes)
    tail = sum(math.comb(here + there, k) for k in range(min(here, there) + 1)) / 2 ** (here + there)
    assert paired.mcnemar(*zip(*outcomes, strict=True)) == pytest.approx(min(1.0, 2 * tail))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_holm_steps_down(p_values: list[float | None]) -> None:
    adjusted = paired.holm(p_values)
    known = sorted(p for p in p_values if p is not None)
    for p, found in zip(p_values, adjusted, strict=True):
        if p is None:
            assert found is None
            continue
        steps = [(len(known) - rank) * other for rank, other in enumerate(known) if other <= p]
        assert found == pytest.approx(min(1.0, max(steps)))
