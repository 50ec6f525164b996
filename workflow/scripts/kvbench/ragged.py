"""Attention of one new token a row over a paged cache whose heads hold different numbers of tokens."""

import torch
from torch.nn import functional

BLOCK = 16
"""Tokens in a block."""
UNIT = 64
"""Bytes that block addresses are counted in; blocks of any model and dtype are whole multiples of it."""


def attend_padded(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """The plain form, over heads padded to the longest.

    Parameters
    ----------
    query : [batch, heads, 1, head_dim]; the heads of a group share a KV head.
    keys, values : [batch, KV heads, longest, head_dim].
    lengths : int64 [batch, KV heads], how many of its keys a head reads.

    Returns
    -------
    [batch, heads, 1, head_dim].
    """
    folded = query.view(*keys.shape[:2], -1, query.shape[-1])
    mask = torch.arange(keys.shape[2], device=keys.device) < lengths[:, :, None, None]
    return functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale).reshape(
        query.shape
    )


def attend_paged(
    query: torch.Tensor,
    anchor: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    value_offset: int,
    scale: float,
) -> torch.Tensor:
    """Split-KV attention over blocks anywhere in memory; reads what is live and nothing else. CUDA only.

    Every program reads the same number of keys at most, so that one long head among short ones still spreads over the
    device; a second kernel merges the parts. Shapes alone set the grid, so a captured launch serves any lengths.

    Parameters
    ----------
    query : [batch, heads, 1, head_dim].
    anchor : the tensor from which addresses are counted; any of the keys' dtype.
    table : int64 [batch, KV heads, blocks]: where each block of 16 keys lies, in units of 64 bytes from the anchor.
    lengths : int64 [batch, KV heads].
    value_offset : elements from a key to its value.

    Returns
    -------
    [batch, heads, 1, head_dim]; accumulated in float32.
    """
    from kvbench import split_kernels

    return split_kernels.attend(query, anchor, table, lengths, value_offset, scale)


def fits_kernel(head_dim: int) -> bool:
    """Whether the fused kernels can take heads of this size."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0
