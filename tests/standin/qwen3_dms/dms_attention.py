"""Attention of the stand-in: a prompt under a mask of evictions, a new token over the blocks that are kept."""

from typing import Any

import torch
from flash_attn import flash_attn_with_kvcache
from torch.nn import functional

from .dms_cache import DMSCache


def dms_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decisions: torch.Tensor,
    mask: torch.Tensor | None,
    layer_idx: int,
    cache: DMSCache,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """Outputs [batch, heads, tokens, head_dim]; the head of token t+1 decides about token t."""
    if queries.shape[2] == 1:
        return _step(queries, keys, values, decisions, layer_idx, cache, scaling)
    tokens = queries.shape[2]
    real = torch.ones(len(keys), tokens, dtype=torch.bool, device=keys.device)
    if mask is not None:
        assert mask.ndim == 4 and mask.dtype == torch.bool, "sdpa's mask"
        real = mask[:, 0, -1, -tokens:].expand(len(keys), -1)
    out, padded = torch.zeros_like(queries), [torch.zeros_like(x) for x in (keys, values, decisions)]
    for row, kept in enumerate(real):
        own = [x[row : row + 1, :, kept] for x in (queries, keys, values, decisions)]
        out[row, :, kept] = _prompt(*own, scaling, window)[0]
        for x, left in zip(own[1:], padded, strict=True):
            left[row, :, tokens - int(kept.sum()) :] = x[0]
    lengths = real.sum(-1)[:, None].expand(-1, keys.shape[1])
    _update(cache, layer_idx, padded[0], padded[1], padded[2], lengths, tokens)
    return out


def _prompt(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decisions: torch.Tensor,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """A token marked by its successor is read by the queries at most ``window`` after it."""
    tokens, group = queries.shape[2], queries.shape[1] // keys.shape[1]
    evicted = functional.pad(decisions[:, :, 1:], (0, 1)).bool()
    at = torch.arange(tokens, device=keys.device)
    distance = at[:, None] - at
    read = (distance >= 0) & ~(evicted[:, :, None] & (distance > window))
    keys, values, read = (x.repeat_interleave(group, 1) for x in (keys, values, read))
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=read, scale=scaling)


def _step(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decisions: torch.Tensor,
    layer_idx: int,
    cache: DMSCache,
    scaling: float,
) -> torch.Tensor:
    _update(cache, layer_idx, keys, values, decisions, None, 1)
    layer, (rows, heads, _one, head_dim) = cache[layer_idx], queries.shape
    folded = queries.reshape(rows * keys.shape[1], 1, heads // keys.shape[1], head_dim)
    out = flash_attn_with_kvcache(
        folded,
        layer.key_blocks,
        layer.value_blocks,
        cache_seqlens=layer.cache_seq_lengths,
        causal=True,
        softmax_scale=scaling,
        block_table=layer.block_table,
    )
    return out.reshape(rows, heads, 1, head_dim)


def _update(
    cache: DMSCache,
    layer_idx: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    decisions: torch.Tensor,
    lengths: Any,
    tokens: int,
) -> None:
    about = {"eviction_info": decisions, "sequence_lengths": lengths, "cumulative_length": tokens}
    cache.update(keys, values, layer_idx, about)
