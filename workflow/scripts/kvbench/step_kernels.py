"""Triton kernels of what a decode step does between attention and its products with weights.

Import it only where there is a CUDA device: Triton is part of torch's CUDA builds alone. Arithmetic is float32 and what
is stored is rounded once, where transformers' operations round after each: in bfloat16 results are nearer to the exact
ones than theirs, and in float32 the same but for the last bits.
"""

import torch
import triton
import triton.language as tl

from kvbench.packed import PackedLayer

BLOCK = 1024
"""Numbers of an MLP's middle that one program takes."""


@triton.jit
def _turned(low, high, weight, cos, sin, eps, half: tl.constexpr, normed: tl.constexpr):
    """The two halves of a head, normed if it has a norm, and rotated: each is the other's imaginary part."""
    lane = tl.arange(0, half)
    dtype = low.dtype
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    if normed:
        scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * half) + eps)
        low *= scale * tl.load(weight + lane).to(tl.float32)
        high *= scale * tl.load(weight + half + lane).to(tl.float32)
    low_cos = tl.load(cos + lane).to(tl.float32)
    high_cos = tl.load(cos + half + lane).to(tl.float32)
    low_sin = tl.load(sin + lane).to(tl.float32)
    high_sin = tl.load(sin + half + lane).to(tl.float32)
    return (low * low_cos - high * low_sin).to(dtype), (high * high_cos + low * high_sin).to(dtype)


@triton.jit(do_not_specialize=["kept"])
def _rotate(
    product, cos, sin, query_weight, key_weight, query, keys, values, step, eps, kept, slots,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, normed: tl.constexpr, stored: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query or a key is rotated, and a value moved, to where attention reads it."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = dim // 2
    lane = tl.arange(0, half)
    source = product + (row * (heads + 2 * kv_heads) + head) * dim + lane
    low = tl.load(source)
    high = tl.load(source + half)
    cos += row * dim
    sin += row * dim
    slot = kept.to(tl.int64)
    if stored:
        slot += tl.load(step)
    place = ((row * kv_heads + (head - heads) % kv_heads) * slots + slot) * dim + lane
    if head < heads:
        real, imaginary = _turned(low, high, query_weight, cos, sin, eps, half, normed)
        asked = query + (row * heads + head) * dim + lane
        tl.store(asked, real)
        tl.store(asked + half, imaginary)
    elif head < heads + kv_heads:
        real, imaginary = _turned(low, high, key_weight, cos, sin, eps, half, normed)
        tl.store(keys + place, real)
        tl.store(keys + place + half, imaginary)
    else:
        tl.store(values + place, low)
        tl.store(values + place + half, high)


def rotate(
    product: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    into: tuple[PackedLayer, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token's queries, keys and values from the product of all three, ready for attention.

    Parameters
    ----------
    product : contiguous [batch, 1, (heads + 2 · KV heads) · head_dim]; the queries come first, then keys, then values.
    position_embeddings : cosines and sines, each contiguous [batch, 1, head_dim], as transformers' ``rotate_half``
        wants them.
    norms : where queries and keys have RMS norms a head: both weights [head_dim], and what is added to the variance.
    into : the layer in whose slots keys and values are stored, and the step that they belong to, int64 [1]; None
        leaves them for the caller to store.

    Returns
    -------
    Queries, [batch, heads, 1, head_dim], contiguous. With ``into`` all slots of keys and values, [batch, KV heads,
    slots, head_dim]; else those of the token, [batch, KV heads, 1, head_dim], keys contiguous, values a view of
    ``product``.
    """
    (rows, _, width), dim = product.shape, position_embeddings[0].shape[-1]
    heads = width // dim - 2 * kv_heads
    query = product.new_empty(rows, heads, 1, dim)
    if into is None:
        keys = product.new_empty(rows, kv_heads, 1, dim)
        values = product[..., -kv_heads * dim :].view(rows, 1, kv_heads, dim).transpose(1, 2)
        kept, step = 0, product  # neither the step nor values are touched
    else:
        layer, step = into
        keys, values, kept = layer.keys, layer.values, layer.kept
    query_weight, key_weight, eps = norms or (product, product, 0.0)
    _rotate[rows, heads + (kv_heads if into is None else 2 * kv_heads)](
        product, *position_embeddings, query_weight, key_weight, query, keys, values, step, eps, kept, keys.shape[2],
        heads=heads, kv_heads=kv_heads, dim=dim, normed=norms is not None, stored=into is not None, num_warps=1,
    )  # fmt: skip
    return query, keys, values


@triton.jit
def _gate(product, out, size, block: tl.constexpr):
    """Some of a row's gates, through SiLU, times what they gate."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < size
    product += row * 2 * size + place
    gate = tl.load(product, mask=inside, other=0.0).to(tl.float32)
    gated = tl.load(product + size, mask=inside, other=0.0)
    opened = gate / (1 + tl.exp(-gate)) * gated.to(tl.float32)
    tl.store(out + row * size + place, opened.to(gated.dtype), mask=inside)


def gate(product: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second half: contiguous [batch, 1, 2 · size] to [batch, 1, size]."""
    rows, _, width = product.shape
    out = product.new_empty(rows, 1, width // 2)
    _gate[triton.cdiv(width // 2, BLOCK), rows](product, out, width // 2, block=BLOCK, num_warps=4)
    return out


@triton.jit
def _add_norm(hidden, added, weight, total, normed, eps, size, padded: tl.constexpr):
    """One row's sum, and the sum's RMS norm."""
    row = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, padded)
    inside = lane < size
    x = tl.load(hidden + row + lane, mask=inside, other=0.0)
    dtype = x.dtype
    x = (x.to(tl.float32) + tl.load(added + row + lane, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    tl.store(total + row + lane, x, mask=inside)
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / size + eps) * tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + lane, x.to(dtype), mask=inside)


def add_norm(
    hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual sum and its RMS norm.

    Parameters
    ----------
    hidden, added : contiguous [batch, 1, hidden].
    weight : of the norm, [hidden].
    eps : what is added to the variance.

    Returns
    -------
    The sum and the normed sum, [batch, 1, hidden] both.
    """
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    rows, _, size = hidden.shape
    padded = triton.next_power_of_2(size)
    _add_norm[(rows,)](
        hidden, added, weight, total, normed, eps, size, padded=padded, num_warps=min(max(padded // 512, 1), 16)
    )
    return total, normed
