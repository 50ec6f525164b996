"""What compressing a prefix does to the distribution of the tokens after it.

A prefix is read and its cache compressed; then a continuation is read, teacher-forced, after the full cache and after
the compressed one, and the two predictions at each token are compared. What is full is always the original's: where a
method changes the weights, the model is heard before that, and once more, changed, with nothing compressed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kvbench import masks, window_table
from kvbench.decode import continue_from, prefill, prefill_both
from kvbench.kept import Kept, kept
from kvbench.methods import Dense
from kvbench.window_table import Window

# In float64 a distribution over 150,000 tokens takes 1.2 MB.
POSITIONS_AT_ONCE = 64

Columns = dict[str, Any]
"""Rows of one window as columns: an array of one value a token, or one value for all."""


def compare(full: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """Compare two predictions of the same tokens, in float64.

    Parameters
    ----------
    full, other : logits [tokens, vocabulary].
    targets : the tokens that come next, int64 [tokens].

    Returns
    -------
    ``kl``, KL(full ‖ other) in nats; ``agrees``, whether both rank the same token first; ``nll_full`` and ``nll``,
    minus the log-probability of the token that comes next; each [tokens].
    """
    parts = [
        _compare(*some)
        for some in zip(*(each.split(POSITIONS_AT_ONCE) for each in (full, other, targets)), strict=True)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compare(full: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    log_full, log_other = full.double().log_softmax(-1), other.double().log_softmax(-1)
    # not negative but for rounding
    kl = (log_full.exp() * (log_full - log_other)).sum(-1).clamp(min=0)
    found = {
        "kl": kl,
        "agrees": full.argmax(-1) == other.argmax(-1),
        "nll_full": -log_full.gather(-1, targets[:, None])[:, 0],
        "nll": -log_other.gather(-1, targets[:, None])[:, 0],
    }
    return {name: value.cpu().numpy() for name, value in found.items()}


def against_full(model: Any, method: Dense, windows: Sequence[Window], original: Any = None) -> Iterator[Columns]:
    """Compare a method's cache with the original's full one, window by window.

    Parameters
    ----------
    original : the model whose full cache is compared with, where that is another than ``model``.

    Returns
    -------
    Of each window the columns of `compare`; where the method changes the weights also ``kl_dense``,
    KL(original ‖ changed model) with the full cache of both.

    Raises
    ------
    Unsupported : the method refuses the windows.
    """
    rows = _rows_at_once(model, method, windows)
    before = _before(original or model, windows, rows) if method.changes_model else None
    method.check(model, rows)
    for batch in _progress(windows, rows, "quality"):
        prefix, read, after = _ids(batch, model.device)
        if before is not None:
            full = next(before).to(model.device)
            dense, (_, cache) = _logits(model, prefix, read), prefill(model, prefix, method)
        else:
            full, cache = _full_and_compressed(model, original, method, prefix, read)
            dense = None
        state = kept(model, cache, *prefix.shape)
        logits = continue_from(model, cache, read, method, method.next_position(prefix.shape[1], cache))
        if method.acts_while_decoding:
            state = kept(model, cache, len(batch), prefix.shape[1] + read.shape[1])
        yield from _columns(batch, "full", state, full, logits, after, dense)


def _before(model: Any, windows: Sequence[Window], rows: int) -> Iterator[torch.Tensor]:
    """What a model predicts with its full cache, a batch at a time, in host memory.

    All of it is there before anything changes the model: at a vocabulary of 152,000, 39 MB a window of 128 tokens in
    bfloat16.
    """
    batches = [_ids(batch, model.device) for batch in _progress(windows, rows, "original")]
    return iter([_logits(model, prefix, read).cpu() for prefix, read, _ in batches])


def _full_and_compressed(
    model: Any, original: Any, method: Dense, prefix: torch.Tensor, read: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """What is predicted with the full cache, [rows, tokens, vocabulary], and the compressed cache of the prefix."""
    if original is not None:
        return _logits(original, prefix, read), prefill(model, prefix, method)[1]
    full_cache, cache = prefill_both(model, prefix, method)
    with masks.nothing_hidden(model):
        return continue_from(model, full_cache, read, Dense(), prefix.shape[1]), cache


def noise(model: Any, other: Any, windows: Sequence[Window]) -> Iterator[Columns]:
    """Compare the full cache with itself: a batch of windows with each of them alone, and with another dtype.

    Parameters
    ----------
    other : the same model in another dtype; None where it cannot be had.
    """
    for batch in _progress(windows, _rows_at_once(model, Dense(), windows), "quality"):
        prefix, read, after = _ids(batch, model.device)
        full = _logits(model, prefix, read)
        # a batch of one is compared with a batch of two
        copies = 1 if len(batch) > 1 else 2
        rows = [
            _logits(model, first.repeat(copies, 1), then.repeat(copies, 1))[:1]
            for first, then in zip(prefix.split(1), read.split(1), strict=True)
        ]
        yield from _columns(batch, "batch", Kept(1.0, False), full, torch.cat(rows), after)
        if other is not None:
            yield from _columns(batch, "dtype", Kept(1.0, False), full, _logits(other, prefix, read), after)


def _logits(model: Any, prefix: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    _, cache = prefill(model, prefix, Dense())
    return continue_from(model, cache, read, Dense(), prefix.shape[1])


def _columns(
    batch: Sequence[Window],
    reference: str,
    state: Kept,
    full: torch.Tensor,
    other: torch.Tensor,
    after: torch.Tensor,
    dense: torch.Tensor | None = None,
) -> Iterator[Columns]:
    for row, window in enumerate(batch):
        yield {
            "reference": reference,
            "corpus": window.corpus,
            "document": window.document,
            "window": window.window,
            "kept_fraction": state.fraction,
            "simulated": state.simulated,
            "distance": np.arange(1, len(after[row]) + 1),
            **compare(full[row], other[row], after[row]),
            "kl_dense": None if dense is None else compare(full[row], dense[row], after[row])["kl"],
        }


def _ids(batch: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefixes, the tokens read after them, and the token that comes after each of those; int64 [rows, tokens]."""
    prefix = torch.tensor([window.prefix_ids for window in batch], device=device)
    continuation = torch.tensor([window.continuation_ids for window in batch], device=device)
    return prefix, continuation[:, :-1], continuation[:, 1:]


def _progress(windows: Sequence[Window], rows: int, what: str) -> Iterator[Sequence[Window]]:
    with tqdm(total=len(windows), desc=what, unit="window", mininterval=1.0) as bar:
        for batch in window_table.batches(windows, rows):
            yield batch
            bar.update(len(batch))


def _rows_at_once(model: Any, method: Dense, windows: Sequence[Window]) -> int:
    """As many rows as fit in a batch, or one where a row in company would not get the cache that it gets alone."""
    tokens = len(windows[0].prefix_ids) + len(windows[0].continuation_ids)
    return window_table.rows_at_once(model.device.type, tokens) if method.rows_are_independent else 1
