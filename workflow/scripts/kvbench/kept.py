"""What a method leaves of a cache: how many bytes it must be by count, and what of it a model can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvbench import masks, presses
from kvbench.architecture import Architecture
from kvbench.cache import cache_bytes, full_cache_bytes
from kvbench.errors import Unsupported


@dataclass(frozen=True)
class Kept:
    """What is left of a cache.

    Attributes
    ----------
    fraction : bytes of the keys and values that can be read, of those of the uncompressed cache.
    simulated : whether something is hidden or zeroed, and not a byte freed. A method that finds nothing to evict, in a
        prompt that is shorter than its window, hides nothing.
    """

    fraction: float
    simulated: bool


def kept_tokens(spec: Mapping[str, Any], tokens: int) -> int | None:
    """Tokens that a method leaves in the cache of each KV head after a prompt; None where that is not known.

    Known are no method at all, and presses that score tokens and keep the best of each head by one
    ``compression_ratio`` or a budget. Wrappers, and presses with a budget of their own for a layer or a head, are not.

    Parameters
    ----------
    spec : as `methods.build` takes it.

    Source: kvpress 0.5.5, ``presses/scorer_press.py`` and ``compute_n_kept`` in ``utils.py``, which truncates.
    """
    if not spec:
        return tokens
    if "press" not in spec or not presses.is_plain_scorer(spec["press"]):
        return None
    if spec.get("kept_tokens") is not None:
        return min(int(spec["kept_tokens"]), tokens)
    ratio = (spec.get("args") or {}).get("compression_ratio", 0.0)
    return max(1, int(tokens * (1 - ratio)))


def expected_cache_bytes(
    config: Mapping[str, Any], spec: Mapping[str, Any], batch: int, tokens: int, itemsize: int
) -> int | None:
    """Live bytes of the cache that a method leaves, in closed form; None where its kept tokens are not known.

    They are not where `kept_tokens` knows none, where a sliding window keeps fewer or is left out by a press, or where
    the config lacks a size.

    Parameters
    ----------
    config : as `architecture.Architecture.of` takes it.
    spec : the method, as `methods.build` takes it.
    batch, tokens : sequences, and tokens of each prompt.
    """
    kept = kept_tokens(spec, tokens)
    try:
        model = Architecture.of(config)
    except Unsupported:
        return None
    if kept is None or (model.window is not None and (spec or tokens >= model.window)):
        return None
    return model.kv_elements * batch * kept * itemsize


def check_cache(
    measured: int, config: Mapping[str, Any], spec: Mapping[str, Any], batch: int, tokens: int, itemsize: int
) -> None:
    """Hold the measured live bytes of a cache against `expected_cache_bytes`, where that gives a count.

    Raises
    ------
    RuntimeError : the two differ, so one of them is wrong and no number of this cell can be trusted.
    """
    expected = expected_cache_bytes(config, spec, batch, tokens, itemsize)
    if expected is not None and measured != expected:
        raise RuntimeError(
            f"the cache takes {measured} bytes where the method's kept tokens take {expected}: either count is wrong"
        )


def kept(model: Any, cache: Any, rows: int, tokens: int) -> Kept:
    """Measure a cache after its compression.

    Parameters
    ----------
    rows, tokens : sequences in the cache, and tokens read so far in each.
    """
    full = full_cache_bytes(model.config, rows, tokens, model.dtype.itemsize)
    live = cache_bytes(cache).live
    unread = sum(
        _unread_bytes(layer, kept)
        for layer, kept in zip(masks.attention_layers(model), cache.layers, strict=False)
        if torch.is_tensor(getattr(kept, "keys", None))
    )
    return Kept((live - unread) / full, bool(unread) and live >= full)


def _unread_bytes(layer: Any, kept: Any) -> int:
    """Bytes of hidden tokens, and of key channels that are zero for every token of a row and head."""
    head_dim = kept.keys.shape[3]
    seen = masks.readable(layer, kept.keys)
    hidden = int((~seen).sum()) * 2 * head_dim
    # counted, not compared, so that nothing of the keys' size is made beside them
    zero = torch.linalg.vector_norm(kept.keys, ord=0, dim=2) == 0
    zeroed = int((zero.sum(-1) * seen.sum(-1)).sum())
    return (hidden + zeroed) * int(kept.keys.element_size())
