"""The search for what fits, against memories of any shape."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from kvbench import capacity, engines, methods
from kvbench.errors import Unsupported


@given(
    fits=st.integers(0, 5000),
    curve=st.floats(0.5, 2.0),
    fixed=st.floats(0, 0.9),
    limit=st.none() | st.integers(1, 6000),
)
def test_the_largest_is_found_to_its_resolution(fits: int, curve: float, fixed: float, limit: int | None) -> None:
    total, tries = 10**9, []

    def peak(size: int) -> int | None:
        tries.append(size)
        return int(total * (fixed + (1 - fixed) * (size / fits) ** curve)) if size <= fits else None

    found = capacity.largest(peak, total, limit)
    best = fits if limit is None else min(fits, limit)
    assert found <= best <= found + max(1, int(found * capacity.RESOLUTION))
    assert limit is None or limit > fits or found == limit, "a limit that fits is found itself"
    assert len(set(tries)) == len(tries), "a size was tried twice"
    assert len(tries) < 40
    assert limit is None or max(tries) <= limit


def test_memory_that_grows_in_proportion_takes_a_few_tries() -> None:
    tries = []

    def peak(size: int) -> int | None:
        tries.append(size)
        return 16 * 2**30 + size * 2**28 if size <= 250 else None

    assert 246 <= capacity.largest(peak, 80 * 2**30, None) <= 250
    assert len(tries) <= 8


def test_a_cpu_is_refused() -> None:
    with pytest.raises(Unsupported, match="searched on a GPU"):
        capacity.search(tiny.model(), methods.Dense(), capacity.Shape(1, 8, 2), engines.Hf())


def test_a_search_begins_where_it_is_told() -> None:
    def peaks(fits: int, tries: list[int]) -> Any:
        def peak(size: int) -> int | None:
            tries.append(size)
            return size * 2**20 if size <= fits else None

        return peak

    tries: list[int] = []
    assert 97 <= capacity.largest(peaks(100, tries), 2**27, None, 16) <= 100 and min(tries) == 16
    tries.clear()
    assert capacity.largest(peaks(5, tries), 2**27, None, 16) == 5 and tries[0] == 16
    assert capacity.largest(peaks(100, []), 2**27, 10, 16) == 10
    assert capacity.largest(peaks(100, []), 2**27, 0, 16) == 0
