"""Triton kernels of attention under soft evictions, forward and backward, without a matrix of scores in memory.

Import it only where there is a CUDA device. The penalty of a key is one number for all queries past the window, so its
gradient is a sum down a column of the scores, which the program that owns the column holds: no atomic addition, and the
same bits on every run. (FlexAttention was the other choice: the gradient of what a ``score_mod`` captures is added
atomically, score by score.)

Source: FlashAttention-2 (arXiv 2307.08691), here with a bias on far keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x · log2 e), and exp2 is one instruction


@triton.jit
def _rows(start, row_stride, head_stride, token_stride, row, head, position, lane):
    """Addresses of some tokens of one head, [tokens, head_dim]."""
    base = start + row.to(tl.int64) * row_stride + head * head_stride
    return base + position[:, None].to(tl.int64) * token_stride + lane[None, :]


@triton.jit
def _scores(query, keys, penalty, position, at, window, scale, full: tl.constexpr):
    """Base-2 scores [queries, keys]; ``full``: every key is past the window of every query."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if full:
        return scores + penalty[None, :]
    age = position[:, None] - at[None, :]
    scores += tl.where(age > window, penalty[None, :], 0.0)
    return tl.where(age >= 0, scores, float("-inf"))


@triton.jit
def _forward_tile(
    acc, top, total, q, keys, values, penalty, key_row, key_head, key_token, value_row, value_head, value_token,
    row, kv, position, at, lane, tokens, window, scale, full: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to a running softmax."""
    real = (at < tokens)[:, None]
    k = tl.load(_rows(keys, key_row, key_head, key_token, row, kv, at, lane), mask=real, other=0.0)
    v = tl.load(_rows(values, value_row, value_head, value_token, row, kv, at, lane), mask=real, other=0.0)
    pen = tl.load(penalty + at, mask=at < tokens, other=0.0) * LOG2E
    scores = _scores(q, k, pen, position, at, window, scale, full)
    highest = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - highest)
    weights = tl.exp2(scores - highest[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, highest, total


@triton.jit
def _forward(
    query, keys, values, penalty, out, sums, tokens, window, scale,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head; ``sums`` gets the base-2 logarithm of each query's sum of weights."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * block  # the longest first
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv = head // group
    position, near, lane = first + tl.arange(0, block), tl.arange(0, tile), tl.arange(0, dim)
    inside = position < tokens
    penalty += (row * (heads // group) + kv) * tokens
    at = _rows(query, query_row, query_head, query_token, row, head, position, lane)
    q = tl.load(at, mask=inside[:, None], other=0.0)
    acc = tl.zeros([block, dim], tl.float32)
    top = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    far = tl.maximum(first - window, 0) // tile * tile  # keys before it are past the window of the whole block
    for start in range(0, far, tile):
        acc, top, total = _forward_tile(
            acc, top, total, q, keys, values, penalty, key_row, key_head, key_token, value_row, value_head,
            value_token, row, kv, position, start + near, lane, tokens, window, scale, full=True,
        )  # fmt: skip
    for start in range(far, tl.minimum(first + block, tokens), tile):
        acc, top, total = _forward_tile(
            acc, top, total, q, keys, values, penalty, key_row, key_head, key_token, value_row, value_head,
            value_token, row, kv, position, start + near, lane, tokens, window, scale, full=False,
        )  # fmt: skip
    place = ((row * tokens + position[:, None]).to(tl.int64) * heads + head) * dim + lane[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(sums + (row * heads + head) * tokens + position, top + tl.log2(total), mask=inside)


@triton.jit
def _backward_keys(
    query, keys, values, penalty, up, sums, inner, down_keys, down_values, down_penalty, tokens, window, scale,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys of one KV head, over all queries of its group that see it."""
    first = tl.program_id(0) * block
    kv_heads: tl.constexpr = heads // group
    row, kv = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    at, near, lane = first + tl.arange(0, block), tl.arange(0, tile), tl.arange(0, dim)
    real = at < tokens
    k = tl.load(_rows(keys, key_row, key_head, key_token, row, kv, at, lane), mask=real[:, None], other=0.0)
    v = tl.load(_rows(values, value_row, value_head, value_token, row, kv, at, lane), mask=real[:, None], other=0.0)
    pen = tl.load(penalty + tl.program_id(1) * tokens + at, mask=real, other=0.0) * LOG2E
    dk = tl.zeros([block, dim], tl.float32)
    dv = tl.zeros([block, dim], tl.float32)
    dpen = tl.zeros([block], tl.float32)
    for member in range(group):
        head = kv * group + member
        for start in range(first // tile * tile, tokens, tile):
            position = start + near
            inside = position < tokens
            some = _rows(query, query_row, query_head, query_token, row, head, position, lane)
            q = tl.load(some, mask=inside[:, None], other=0.0)
            # gradients are laid out [batch, tokens, heads, head_dim], as transformers has it
            some = _rows(up, tokens * heads * dim, dim, heads * dim, row, head, position, lane)
            do = tl.load(some, mask=inside[:, None], other=0.0)
            number = (row * heads + head) * tokens + position
            total = tl.load(sums + number, mask=inside, other=0.0)
            mean = tl.load(inner + number, mask=inside, other=0.0)
            age = position[None, :] - at[:, None]
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            scores += tl.where(age > window, pen[:, None], 0.0)
            weights = tl.where((age >= 0) & inside[None, :], tl.exp2(scores - total[None, :]), 0.0)
            dv += tl.dot(weights.to(do.dtype), do, input_precision="ieee")
            ds = weights * (tl.dot(v, tl.trans(do), input_precision="ieee") - mean[None, :])
            dpen += tl.sum(tl.where(age > window, ds, 0.0), 1)
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    some = _rows(down_keys, tokens * kv_heads * dim, dim, kv_heads * dim, row, kv, at, lane)
    tl.store(some, (dk * (scale / LOG2E)).to(down_keys.dtype.element_ty), mask=real[:, None])
    some = _rows(down_values, tokens * kv_heads * dim, dim, kv_heads * dim, row, kv, at, lane)
    tl.store(some, dv.to(down_values.dtype.element_ty), mask=real[:, None])
    tl.store(down_penalty + tl.program_id(1) * tokens + at, dpen, mask=real)


@triton.jit
def _backward_queries(
    query, keys, values, penalty, up, sums, inner, down_query, tokens, window, scale,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * block
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv = head // group
    position, near, lane = first + tl.arange(0, block), tl.arange(0, tile), tl.arange(0, dim)
    inside = position < tokens
    penalty += (row * (heads // group) + kv) * tokens
    some = _rows(query, query_row, query_head, query_token, row, head, position, lane)
    q = tl.load(some, mask=inside[:, None], other=0.0)
    some = _rows(up, tokens * heads * dim, dim, heads * dim, row, head, position, lane)
    do = tl.load(some, mask=inside[:, None], other=0.0)
    number = (row * heads + head) * tokens + position
    total = tl.load(sums + number, mask=inside, other=0.0)
    mean = tl.load(inner + number, mask=inside, other=0.0)
    dq = tl.zeros([block, dim], tl.float32)
    for start in range(0, tl.minimum(first + block, tokens), tile):
        at = start + near
        real = (at < tokens)[:, None]
        k = tl.load(_rows(keys, key_row, key_head, key_token, row, kv, at, lane), mask=real, other=0.0)
        v = tl.load(_rows(values, value_row, value_head, value_token, row, kv, at, lane), mask=real, other=0.0)
        pen = tl.load(penalty + at, mask=at < tokens, other=0.0) * LOG2E
        weights = tl.exp2(_scores(q, k, pen, position, at, window, scale, full=False) - total[:, None])
        ds = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - mean[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    some = _rows(down_query, tokens * heads * dim, dim, heads * dim, row, head, position, lane)
    dq *= scale / LOG2E
    tl.store(some, dq.to(down_query.dtype.element_ty), mask=inside[:, None])


def _sizes(query: torch.Tensor, keys: torch.Tensor) -> dict[str, Any]:
    return {"heads": query.shape[1], "group": query.shape[1] // keys.shape[1], "dim": query.shape[-1]}


def _blocks(query: torch.Tensor, backward: bool) -> dict[str, Any]:
    """How much of the scores a program holds at once, by what fits in a multiprocessor's registers."""
    if query.itemsize > 2:
        return {"block": 32, "tile": 32, "num_warps": 4, "num_stages": 1}
    wide = query.shape[-1] > 64
    if backward:
        return {"block": 64, "tile": 64, "num_warps": 8 if wide else 4, "num_stages": 2}
    return {"block": 128, "tile": 64, "num_warps": 8 if wide else 4, "num_stages": 3}


def _lines(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same with a token's numbers of a head next to each other, as the kernels read them."""
    return tuple(part if part.stride(-1) == 1 else part.contiguous() for part in parts)


def _gradients(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, penalty: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for them: [batch, heads, tokens, head_dim], laid out as [batch, tokens, heads, head_dim]."""

    def room(part: torch.Tensor) -> torch.Tensor:
        rows, heads, tokens, dim = part.shape
        return part.new_empty(rows, tokens, heads, dim).transpose(1, 2)

    return room(query), room(keys), room(values), penalty.new_empty(penalty.shape)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, penalty: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """`soft.attend_biased` by kernel, differentiable; head_dim is a power of two from 16 on.

    Parameters
    ----------
    query : [batch, heads, tokens, head_dim]; keys, values [batch, KV heads, tokens, head_dim].
    penalty : float32 [batch, KV heads, tokens], finite.

    Returns
    -------
    [batch, tokens, heads, head_dim].
    """
    return forward(query, keys, values, penalty, window, scale)[0]


@torch.library.custom_op("kvbench::dms_soft", mutates_args=())
def forward(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, penalty: torch.Tensor, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`, and the base-2 logarithm of each query's sum of weights, float32 [batch, heads, tokens]."""
    rows, heads, tokens, dim = query.shape
    query, keys, values = _lines(query, keys, values)
    out = query.new_empty(rows, tokens, heads, dim)
    sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
    blocks = _blocks(query, backward=False)
    _forward[triton.cdiv(tokens, blocks["block"]), rows * heads](
        query, keys, values, penalty.contiguous(), out, sums, tokens, window, scale * LOG2E.value,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], **_sizes(query, keys), **blocks,
    )  # fmt: skip
    return out, sums


@forward.register_fake
def _(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, penalty: torch.Tensor, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, tokens, dim = query.shape
    return query.new_empty(rows, tokens, heads, dim), query.new_empty(rows, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("kvbench::dms_soft_backward", mutates_args=())
def backward(
    up: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    penalty: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys, values and penalties; ``up`` is that of the output."""
    rows, heads, tokens, _ = query.shape
    inner = (up.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    found = _gradients(query, keys, values, penalty)
    query, keys, values = _lines(query, keys, values)
    blocks, sizes = _blocks(query, backward=True), _sizes(query, keys)
    grid = triton.cdiv(tokens, blocks["block"])
    strides = (*query.stride()[:3], *keys.stride()[:3], *values.stride()[:3])
    read = (query, keys, values, penalty.contiguous(), up.contiguous(), sums, inner)
    _backward_keys[grid, rows * keys.shape[1]](
        *read, *found[1:], tokens, window, scale * LOG2E.value, *strides, **sizes, **blocks
    )
    _backward_queries[grid, rows * heads](
        *read, found[0], tokens, window, scale * LOG2E.value, *strides, **sizes, **blocks
    )
    return found


@backward.register_fake
def _(
    up: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, penalty: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gradients(query, keys, values, penalty)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, up: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*backward(up, *ctx.saved_tensors, ctx.window, ctx.scale), None, None)


forward.register_autograd(_differentiate, setup_context=_keep)
