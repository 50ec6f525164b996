"""Triton kernels of a DMS model: attention of a prompt under evictions, and of one token over a paged cache.

Import it only where there is a CUDA device: Triton is part of torch's CUDA builds alone. All kernels accumulate in
float32 with the running maximum of online softmax (arXiv 1805.02867), as FlashAttention does (arXiv 2205.14135); a step
splits the keys as Flash-Decoding does.
"""

import torch
import triton
import triton.language as tl

from kvbench.dms.evict import OFFSET, SCALE
from kvbench.dms.layer import BLOCK, UNIT, ceil_div
from kvbench.dms.partition import Partition

SPLIT = 256
"""Keys that one program of a step reads at most."""
TILE = 64
"""Keys that it reads at once."""
MERGED = 32
"""Splits that are merged at once."""
LOG2E = 1.4426950408889634  # exp(x) is exp2(x · log2 e), and exp2 is one instruction


@triton.jit
def _fold(acc, top, total, query, keys, values, seen, scale):
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
def _prefill(
    query, keys, values, order, before, out, tokens, window, scale,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: the kept keys before it, then the marked keys within the window."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * block  # the longest first
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    ragged = row * (heads // group) + head // group
    order += ragged * tokens
    before += ragged * (tokens + 1)
    keys += row * key_row + head // group * key_head
    values += row * value_row + head // group * value_head
    position = first + tl.arange(0, block)
    near = tl.arange(0, tile)
    lane = tl.arange(0, dim)
    inside = (position < tokens)[:, None]
    query += row * query_row + head * query_head + position[:, None].to(tl.int64) * query_token + lane[None, :]
    q = tl.load(query, mask=inside, other=0.0)
    acc = tl.zeros([block, dim], tl.float32)
    top = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    last = tl.minimum(first + block, tokens)
    oldest = tl.maximum(first - window, 0)
    kept = tl.load(before + tokens)
    all_read = tl.load(before + first + 1) // tile * tile
    some_read = tl.load(before + last)
    marked = kept + oldest - tl.load(before + oldest)
    marked_end = kept + last - some_read
    for start in range(0, all_read, tile):
        at = tl.load(order + start + near).to(tl.int64)
        k = tl.load(keys + at[:, None] * key_token + lane[None, :])
        v = tl.load(values + at[:, None] * value_token + lane[None, :])
        acc, top, total = _fold(acc, top, total, q, k, v, None, scale)
    for start in range(all_read, some_read, tile):
        at = tl.load(order + start + near, mask=start + near < some_read, other=tokens).to(tl.int64)
        real = (at < tokens)[:, None]
        k = tl.load(keys + at[:, None] * key_token + lane[None, :], mask=real, other=0.0)
        v = tl.load(values + at[:, None] * value_token + lane[None, :], mask=real, other=0.0)
        acc, top, total = _fold(acc, top, total, q, k, v, at[None, :] <= position[:, None], scale)
    for start in range(marked, marked_end, tile):
        at = tl.load(order + start + near, mask=start + near < marked_end, other=tokens).to(tl.int64)
        real = (at < tokens)[:, None]
        k = tl.load(keys + at[:, None] * key_token + lane[None, :], mask=real, other=0.0)
        v = tl.load(values + at[:, None] * value_token + lane[None, :], mask=real, other=0.0)
        age = position[:, None] - at[None, :]
        acc, top, total = _fold(acc, top, total, q, k, v, (age >= 0) & (age <= window), scale)
    place = ((row * tokens + position[:, None]) * heads + head) * dim + lane[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def sparse_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: Partition, window: int, scale: float
) -> torch.Tensor:
    """`prefill.attend` by kernel; head_dim is a power of two from 16 on."""
    rows, heads, tokens, dim = query.shape
    wide = query.itemsize > 2  # float32 takes twice the registers
    block, tile = (32, 32) if wide else (128, 64)
    out = query.new_empty(rows, tokens, heads, dim)
    _prefill[triton.cdiv(tokens, block), rows * heads](
        query, keys, values, parts.order, parts.before, out, tokens, window, scale * LOG2E,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        heads=heads, group=heads // keys.shape[1], dim=dim, block=block, tile=tile,
        num_warps=8 if dim >= 128 else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
    return out


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
            acc, top, total = _fold(acc, top, total, q, k, v, seen, scale)
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


@triton.jit
def _append(
    new_keys, new_values, hidden, weight, bias, anchor, table, lengths, ring, free, position, value_offset, width,
    size, ring_size, gain, offset, value_row, value_head,
    heads: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, unit: tl.constexpr, size_padded: tl.constexpr,
):  # fmt: skip
    """Store the new token of one head in its slot, and keep the books as `Layer.append` does."""
    ragged = tl.program_id(0)
    number = tl.arange(0, size_padded)
    x = tl.load(hidden + ragged // heads * size + number, mask=number < size, other=0.0).to(tl.float32)
    w = tl.load(weight + ragged % heads * size + number, mask=number < size, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)
    evict = (tl.sum(x * w, 0) / norm + tl.load(bias + ragged % heads)) * gain - offset > 0
    now = tl.load(position + ragged)
    length = tl.load(lengths + ragged)
    reused = tl.load(free + ragged)
    slot = tl.where(reused >= 0, reused, length)
    ring += ragged * ring_size
    judged = tl.load(ring + (now - 1) % ring_size)
    judged = tl.where(evict, -1 - judged, judged)
    # with a window of 1 the token judged now is the next to leave, and its entry is not stored yet
    leaving = tl.where(ring_size == 2, judged, tl.load(ring + (now + 1) % ring_size))
    tl.store(ring + (now - 1) % ring_size, judged)
    tl.store(ring + now % ring_size, slot.to(tl.int32))
    tl.store(free + ragged, tl.where(leaving < 0, -1 - leaving, -1).to(tl.int64))
    tl.store(lengths + ragged, tl.where(reused >= 0, length, length + 1))
    tl.store(position + ragged, now + 1)
    lane = tl.arange(0, dim)
    at = tl.load(table + ragged * width + slot // block) * unit + slot % block * dim + lane
    tl.store(anchor + at, tl.load(new_keys + ragged * dim + lane))
    value = new_values + ragged // heads * value_row + ragged % heads * value_head
    tl.store(anchor + at + value_offset, tl.load(value + lane))


def attend_paged(
    query: torch.Tensor,
    anchor: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    value_offset: int,
    scale: float,
) -> torch.Tensor:
    """`ragged.attend_paged` by kernel."""
    none = lengths
    return _attend(query, none, none, anchor, table, lengths, none, value_offset, scale, new=False)


def step(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    anchor: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    ring: torch.Tensor,
    free: torch.Tensor,
    position: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`attention.step`: attend to what is readable and to the new token, then store it."""
    _, heads, _, dim = keys.shape
    # values may be a slice of a product over all projections; the others come from arithmetic and have no gaps
    query, keys, hidden = (part.contiguous() for part in (query, keys, hidden))
    offset = BLOCK * dim
    out = _attend(query, keys, values, anchor, table, lengths, free, offset, scale, new=True)
    _append[(lengths.numel(),)](
        keys, values, hidden, weight, bias, anchor, table, lengths, ring, free, position, offset, table.shape[-1],
        hidden.shape[-1], ring.shape[-1], SCALE, OFFSET, *values.stride()[:2],
        heads=heads, dim=dim, block=BLOCK, unit=UNIT // anchor.itemsize,
        size_padded=triton.next_power_of_2(hidden.shape[-1]),
    )  # fmt: skip
    return out


def _attend(
    query: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    anchor: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    free: torch.Tensor,
    value_offset: int,
    scale: float,
    new: bool,
) -> torch.Tensor:
    width, dim = table.shape[-1], query.shape[-1]
    heads, splits = lengths.numel(), ceil_div(width * BLOCK, SPLIT)
    group = query.shape[0] * query.shape[1] // heads
    partial = torch.empty(heads, splits, group, dim, dtype=torch.float32, device=query.device)
    tops = torch.empty(2, heads, splits, group, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    _split[heads, splits](
        query, new_keys, new_values, anchor, table, lengths, free, partial, tops[0], tops[1], value_offset, width,
        splits, scale * LOG2E, *new_values.stride()[:2],
        heads=lengths.shape[-1], group=group, group_padded=max(triton.next_power_of_2(group), 16), dim=dim, block=BLOCK,
        unit=UNIT // anchor.itemsize, size=SPLIT, tile=TILE, new=new, num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge[heads, group](
        partial, tops[0], tops[1], out, splits,
        group=group, dim=dim, padded=triton.next_power_of_2(splits), some=MERGED,
    )  # fmt: skip
    return out
