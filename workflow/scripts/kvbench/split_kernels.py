"""Triton kernels of one token's attention over heads of different lengths, split as Flash-Decoding splits it.

Import it only where there is a CUDA device: Triton is part of torch's CUDA builds alone. Sums are float32, with the
running maximum of online softmax (arXiv 1805.02867), as FlashAttention has it (arXiv 2205.14135).
"""

import torch
import triton
import triton.language as tl

from kvbench.ragged import BLOCK, UNIT

SPLIT = 256
"""Keys that one program reads at most."""
TILE = 64
"""Keys that it reads at once."""
MERGED = 32
"""Splits that are merged at once."""
LOG2E = 1.4426950408889634  # exp(x) is exp2(x · log2 e), and exp2 is one instruction


@triton.jit
def fold(acc, top, total, query, keys, values, seen, scale):
    """Add some keys to a running softmax in base 2; ``seen`` says which query reads which of them, None that all do."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    base = highest
    if seen is not None:
        base = tl.where(highest == float("-inf"), 0.0, highest)  # where nothing was seen so far
    shrink = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, highest, total


@triton.jit
def _split(
    query, new_keys, new_values, anchor, table, lengths, free, partial, tops, totals, value_offset, width, splits,
    scale, value_row, value_head,
    heads: tl.constexpr, group: tl.constexpr, group_padded: tl.constexpr, dim: tl.constexpr, block: tl.constexpr,
    unit: tl.constexpr, size: tl.constexpr, tile: tl.constexpr, new: tl.constexpr,
):  # fmt: skip
    """The queries of one group over one split of a head's slots; ``new`` adds a token that is not yet stored."""
    ragged, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + ragged).to(tl.int32)
    start = split * size
    member = tl.arange(0, group_padded)
    lane = tl.arange(0, dim)
    near = tl.arange(0, tile)
    acc = tl.zeros([group_padded, dim], tl.float32)
    top = tl.full([group_padded], float("-inf"), tl.float32)
    total = tl.zeros([group_padded], tl.float32)
    part = (ragged * splits + split) * group + member
    if start < length:
        asked = query + (ragged * group + member[:, None]) * dim + lane[None, :]
        q = tl.load(asked, mask=(member < group)[:, None], other=0.0)
        skipped = -1
        if new:
            skipped = tl.load(free + ragged).to(tl.int32)
            key = tl.load(new_keys + ragged * dim + lane).to(tl.float32)
            value = new_values + ragged // heads * value_row + ragged % heads * value_head
            value = tl.load(value + lane).to(tl.float32)
            mine = split == 0
            top = tl.where(mine, tl.sum(q.to(tl.float32) * key[None, :], 1) * scale, top)
            total = tl.where(mine, 1.0, total)
            acc = tl.where(mine, value[None, :], acc)
        for place in range(start, tl.minimum(start + size, length), tile):
            slot = place + near
            real = slot < length
            address = tl.load(table + ragged * width + slot // block, mask=real, other=0)
            at = (address * unit + slot % block * dim)[:, None] + lane[None, :]
            k = tl.load(anchor + at, mask=real[:, None], other=0.0)
            v = tl.load(anchor + at + value_offset, mask=real[:, None], other=0.0)
            seen = (real & (slot != skipped))[None, :]
            acc, top, total = fold(acc, top, total, q, k, v, seen, scale)
        tl.store(partial + part[:, None] * dim + lane[None, :], acc, mask=(member < group)[:, None])
    tl.store(tops + part, top, mask=member < group)
    tl.store(totals + part, total, mask=member < group)


@triton.jit
def _merge(
    partial, tops, totals, out, splits,
    group: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    """The splits of one query head, weighted by what they saw."""
    ragged, member = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, dim)
    every = tl.arange(0, padded)
    highest = tl.max(
        tl.load(tops + (ragged * splits + every) * group + member, mask=every < splits, other=float("-inf")), 0
    )
    acc = tl.zeros([dim], tl.float32)
    total = 0.0
    for first in range(0, splits, some):
        split = first + tl.arange(0, some)
        part = (ragged * splits + split) * group + member
        top = tl.load(tops + part, mask=split < splits, other=float("-inf"))
        seen = top > float("-inf")  # the others wrote no result
        weight = tl.exp2(top - highest)
        total += tl.sum(tl.load(totals + part, mask=seen, other=0.0) * weight, 0)
        parts = tl.load(partial + part[:, None] * dim + lane[None, :], mask=seen[:, None], other=0.0)
        acc += tl.sum(parts * weight[:, None], 0)
    tl.store(out + (ragged * group + member) * dim + lane, (acc / total).to(out.dtype.element_ty))


def attend(
    query: torch.Tensor,
    anchor: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    value_offset: int,
    scale: float,
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`ragged.attend_paged`; with ``new`` also to a token that is not stored yet.

    Parameters
    ----------
    new : its keys and values, [batch, KV heads, 1, head_dim], and int64 [batch, KV heads] the slot whose token it takes
        the place of, −1 for none.
    """
    new_keys, new_values, free = new or (lengths, lengths, lengths)
    width, dim = table.shape[-1], query.shape[-1]
    heads, splits = lengths.numel(), triton.cdiv(width * BLOCK, SPLIT)
    group = query.shape[0] * query.shape[1] // heads
    partial = torch.empty(heads, splits, group, dim, dtype=torch.float32, device=query.device)
    tops = torch.empty(2, heads, splits, group, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    _split[heads, splits](
        query, new_keys, new_values, anchor, table, lengths, free, partial, tops[0], tops[1], value_offset, width,
        splits, scale * LOG2E, *new_values.stride()[:2],
        heads=lengths.shape[-1], group=group, group_padded=max(triton.next_power_of_2(group), 16), dim=dim, block=BLOCK,
        unit=UNIT // anchor.itemsize, size=SPLIT, tile=TILE, new=new is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge[heads, group](
        partial, tops[0], tops[1], out, splits,
        group=group, dim=dim, padded=triton.next_power_of_2(splits), some=MERGED,
    )  # fmt: skip
    return out
