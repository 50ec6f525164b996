"""The bytes of a KV cache, counted on its tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvbench.architecture import describe, kv_shape, windows


@dataclass(frozen=True)
class CacheBytes:
    """What a cache takes.

    Attributes
    ----------
    live : bytes of the keys and values of kept tokens.
    allocated : bytes of the storages behind them, each storage once; what the allocator cannot give to others.
    """

    live: int
    allocated: int


def cache_bytes(cache: Any) -> CacheBytes:
    """Measure a cache of any of five structures.

    Parameters
    ----------
    cache : our packed or compact one (which knows its ``live_bytes``), DMS paged (``layers`` with ``key_blocks`` and
        ``cache_seq_lengths``), layered (``layers`` with ``keys`` and ``values``, as transformers' own), legacy
        (``key_cache`` and ``value_cache`` lists), or nested tuples and lists of tensors.

    Raises
    ------
    TypeError : the structure is none of these; a size of 0 would be a lie.
    """
    layers = getattr(cache, "layers", None)
    if layers and hasattr(layers[0], "key_blocks"):
        return _paged_bytes(layers)
    if layers is not None:
        measured = _tensor_bytes(tensor for layer in layers for tensor in _layer_tensors(layer))
        return CacheBytes(cache.live_bytes(), measured.allocated) if hasattr(cache, "live_bytes") else measured
    if hasattr(cache, "key_cache") and hasattr(cache, "value_cache"):
        return _tensor_bytes(_tensors_in([cache.key_cache, cache.value_cache]))
    if isinstance(cache, list | tuple):
        return _tensor_bytes(_tensors_in(cache))
    raise TypeError(f"{type(cache).__name__} is no cache structure whose bytes can be counted")


def full_cache_bytes(config: Any, batch_size: int, tokens: int, itemsize: int) -> int:
    """Bytes that an uncompressed cache takes, in closed form.

    Keys and values × batch × KV heads × tokens of all layers × head_dim × itemsize. A layer with a sliding window holds
    one token less than the window at most, as transformers' ``DynamicSlidingWindowLayer`` does.

    Parameters
    ----------
    config : a transformers config (the text part of a multimodal one).
    """
    heads, head_dim = kv_shape(describe(config))
    kept = sum(tokens if window is None else min(tokens, window - 1) for window in windows(config))
    return 2 * batch_size * heads * kept * head_dim * itemsize


def _paged_bytes(layers: list[Any]) -> CacheBytes:
    """NVIDIA's DMS cache: kept tokens per row and head, in blocks that are allocated ahead."""
    live = 0
    for layer in layers:
        if layer.cache_seq_lengths is not None:
            live += 2 * int(layer.cache_seq_lengths.sum()) * layer.head_dim * layer.dtype.itemsize
    blocks = (t for layer in layers for t in (layer.key_blocks, layer.value_blocks) if t is not None)
    return CacheBytes(live, _tensor_bytes(blocks).allocated)


def _layer_tensors(layer: Any) -> Iterable[torch.Tensor]:
    # a quantized layer keeps its packed tokens beside the window that is still in full precision; ``tensors`` are all
    # that a compact layer holds
    names = ("keys", "values", "_quantized_keys", "_quantized_values", "tensors")
    return _tensors_in([getattr(layer, name, None) for name in names])


def _tensors_in(value: Any) -> Iterable[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _tensor_bytes(tensors: Iterable[torch.Tensor]) -> CacheBytes:
    live, storages, seen = 0, {}, set()
    for tensor in tensors:
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        storage = tensor.untyped_storage()
        if view in seen and tensor.numel():
            continue
        seen.add(view)
        live += tensor.numel() * tensor.element_size()
        storages[storage.data_ptr()] = storage.nbytes()
    return CacheBytes(live, sum(storages.values()))
