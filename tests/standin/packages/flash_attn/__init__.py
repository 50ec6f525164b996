"""Stands in for flash-attn, of which the checkpoint needs one function; in plain torch, on any device."""

from typing import Any

import torch
from torch.nn import functional


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: Any = None,
    v: Any = None,
    *,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """One query a sequence over its blocks: [sequences, 1, heads, head_dim] over [blocks, block size, 1, head_dim]."""
    assert k is None and v is None and causal and q.shape[1] == 1
    blocks = -(-int(cache_seqlens.max()) // k_cache.shape[1])
    table = block_table[:, :blocks].clamp(min=0).long()
    keys, values = (cache[table].flatten(1, 2)[:, :, 0] for cache in (k_cache, v_cache))
    read = torch.arange(keys.shape[1], device=q.device) < cache_seqlens[:, None]
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys[:, None], values[:, None], attn_mask=read[:, None, None], scale=softmax_scale
    )
    return out.transpose(1, 2)
