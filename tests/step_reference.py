"""What `kvbench.step_kernels` computes, by the operations that transformers has for it; on any device."""

import torch
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from kvbench.packed import PackedLayer


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    high = x if x.dtype == torch.float64 else x.float()
    scaled = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def rotate(
    product: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    into: tuple[PackedLayer, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, dim = len(product), position_embeddings[0].shape[-1]
    heads = product.shape[-1] // dim - 2 * kv_heads
    query, keys, values = product.view(rows, -1, dim)[:, :, None].split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        query_weight, key_weight, eps = norms
        query, keys = norm(query, query_weight, eps), norm(keys, key_weight, eps)
    query, keys = apply_rotary_pos_emb(query, keys, *position_embeddings)
    if into is None:
        return query, keys, values
    layer, step = into
    layer.keys.index_copy_(2, step + layer.kept, keys)
    layer.values.index_copy_(2, step + layer.kept, values)
    return query, layer.keys, layer.values


def gate(product: torch.Tensor) -> torch.Tensor:
    opening, gated = product.chunk(2, -1)
    return functional.silu(opening) * gated


def add_norm(
    hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = hidden + added
    return total, norm(total, weight, eps)
