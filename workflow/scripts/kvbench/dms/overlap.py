"""Texts that say the same thing over a stretch: what a model is judged on must not have been trained on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GRAM = 24
"""Tokens that are compared at once: two texts with a common stretch of ``2 * GRAM - 1`` tokens are found."""

Hashes = NDArray[np.uint64]


class Seen:
    """The stretches of texts that were added, as hashes."""

    def __init__(self) -> None:
        self._waiting: list[Hashes] = []
        self._sorted: Hashes = np.empty(0, dtype=np.uint64)

    def add(self, ids: Sequence[int]) -> None:
        """Remember every stretch of a text."""
        self._waiting.append(_hashes(ids, 1))

    def overlaps(self, ids: Sequence[int]) -> bool:
        """Whether a text has a stretch in common with any that was added."""
        if self._waiting:
            self._sorted = np.unique(np.concatenate([self._sorted, *self._waiting]))
            self._waiting = []
        asked = _hashes(ids, GRAM)
        if not len(asked) or not len(self._sorted):
            return False
        places = np.minimum(np.searchsorted(self._sorted, asked), len(self._sorted) - 1)
        return bool((self._sorted[places] == asked).any())


def _hashes(ids: Sequence[int], stride: int) -> Hashes:
    """A polynomial hash, modulo 2⁶⁴, of the `GRAM` tokens from every ``stride``-th on."""
    tokens = np.asarray(ids, dtype=np.uint64)
    if len(tokens) < GRAM:
        return np.empty(0, dtype=np.uint64)
    powers = np.full(GRAM, 0x9E3779B97F4A7C15, dtype=np.uint64).cumprod(dtype=np.uint64)
    grams = np.lib.stride_tricks.sliding_window_view(tokens, GRAM)[::stride]
    found: Hashes = ((grams + np.uint64(1)) * powers).sum(-1, dtype=np.uint64)
    return found
