"""Attention over a prompt in which evictions are already obeyed.

Whether query q reads key t depends on the mark of t and on q − t alone, and the marks are known before a layer's
attention. So a head's keys are sorted into kept ones and marked ones, and a block of queries reads the kept ones before
it and, of the marked ones, those within the window: what is evicted costs nothing. At 16k tokens, a window of 512 and
one token in eight kept, that is a fifth of the keys of causal attention. (FlexAttention with a mask for each head was
the other choice: marked keys lie between kept ones, so it could skip no block and would read every key.)
"""

from typing import Any

import torch
from torch.nn import functional

from kvbench.dms.evict import LayerInput, shifted, visible
from kvbench.dms.partition import Partition

CHUNK = 256
"""Queries whose mask is made at once where no kernel is at hand."""
TOKENS = 8192
"""Tokens whose eviction is decided at once: the heads work in float32, and a prompt's input is large."""


@torch.no_grad()
def marks(given: LayerInput) -> torch.Tensor:
    """Tokens of a prompt marked for eviction, bool [batch, KV heads, tokens]; the last one is not judged yet."""
    rows, tokens, _ = given.hidden.shape
    parts = given.hidden.flatten(0, 1).split(TOKENS)
    logits = torch.cat([given.heads.logits(given.layer, part[None])[0] for part in parts], -1)
    return shifted(logits.view(-1, rows, tokens).transpose(0, 1)) > 0


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    marked: torch.Tensor,
    parts: Partition,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Attention of a whole prompt under evictions.

    Parameters
    ----------
    query : [batch, heads, tokens, head_dim].
    keys, values : [batch, KV heads, tokens, head_dim].
    marked : bool [batch, KV heads, tokens]; ``parts`` is its partition.

    Returns
    -------
    [batch, tokens, heads, head_dim].
    """
    if query.is_cuda:
        from kvbench.dms import kernels

        return kernels.sparse_prefill(query, keys, values, parts, window, scale)
    return attend_masked(query, keys, values, marked, window, scale)


def attend_masked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, marked: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """The same by masks, for a chunk of queries at a time, so that memory stays bounded."""
    rows, heads, tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    grouped: Any = query.reshape(rows, kv_heads, group, tokens, head_dim)
    out = query.new_empty(rows, tokens, heads, head_dim)
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        queries = torch.arange(start, end, device=query.device)
        mask = visible(marked[..., :end], window, queries)[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
        part = functional.scaled_dot_product_attention(
            grouped[:, :, :, start:end].flatten(2, 3), keys[:, :, :end], values[:, :, :end], attn_mask=mask, scale=scale
        )
        out[:, start:end] = part.reshape(rows, heads, end - start, head_dim).transpose(1, 2)
    return out
