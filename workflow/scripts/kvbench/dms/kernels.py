"""Triton kernels of a DMS model: attention of a prompt under evictions, and the books of a new token.

Import it only where there is a CUDA device: Triton is part of torch's CUDA builds alone.
"""

import torch
import triton
import triton.language as tl

from kvbench import split_kernels
from kvbench.dms.evict import OFFSET, SCALE
from kvbench.dms.partition import Partition
from kvbench.ragged import BLOCK, UNIT
from kvbench.split_kernels import LOG2E, fold


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
        acc, top, total = fold(acc, top, total, q, k, v, None, scale)
    for start in range(all_read, some_read, tile):
        at = tl.load(order + start + near, mask=start + near < some_read, other=tokens).to(tl.int64)
        real = (at < tokens)[:, None]
        k = tl.load(keys + at[:, None] * key_token + lane[None, :], mask=real, other=0.0)
        v = tl.load(values + at[:, None] * value_token + lane[None, :], mask=real, other=0.0)
        acc, top, total = fold(acc, top, total, q, k, v, at[None, :] <= position[:, None], scale)
    for start in range(marked, marked_end, tile):
        at = tl.load(order + start + near, mask=start + near < marked_end, other=tokens).to(tl.int64)
        real = (at < tokens)[:, None]
        k = tl.load(keys + at[:, None] * key_token + lane[None, :], mask=real, other=0.0)
        v = tl.load(values + at[:, None] * value_token + lane[None, :], mask=real, other=0.0)
        age = position[:, None] - at[None, :]
        acc, top, total = fold(acc, top, total, q, k, v, (age >= 0) & (age <= window), scale)
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
    out = split_kernels.attend(query, anchor, table, lengths, offset, scale, (keys, values, free))
    _append[(lengths.numel(),)](
        keys, values, hidden, weight, bias, anchor, table, lengths, ring, free, position, offset, table.shape[-1],
        hidden.shape[-1], ring.shape[-1], SCALE, OFFSET, *values.stride()[:2],
        heads=heads, dim=dim, block=BLOCK, unit=UNIT // anchor.itemsize,
        size_padded=triton.next_power_of_2(hidden.shape[-1]),
    )  # fmt: skip
    return out
