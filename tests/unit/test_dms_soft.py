"""Soft evictions: between plain attention and the rule, and a gradient for what decides."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kvbench.dms import evict, soft

SHAPES = {
    "rows": st.integers(1, 2),
    "kv_heads": st.integers(1, 2),
    "group": st.integers(1, 3),
    "tokens": st.integers(1, 24),
    "window": st.integers(1, 30),
    "seed": st.integers(0, 10**6),
}


def drawn(rows: int, kv_heads: int, group: int, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    query = torch.randn(rows, kv_heads * group, tokens, 8)
    return query, torch.randn(rows, kv_heads, tokens, 8), torch.randn(rows, kv_heads, tokens, 8)


@settings(deadline=None, max_examples=60)
@given(**SHAPES)
def test_an_eviction_for_good_is_the_rule(
    rows: int, kv_heads: int, group: int, tokens: int, window: int, seed: int
) -> None:
    query, keys, values = drawn(rows, kv_heads, group, tokens, seed)
    marks = torch.rand(rows, kv_heads, tokens) < 0.6
    penalties = soft.Penalties(torch.where(marks, soft.EVICTED, 0.0), window)
    found, _ = soft.attend(None, query, keys, values, scaling=0.3, soft=penalties)
    mask = evict.visible(marks, window, torch.arange(tokens))
    keys, values, mask = (part.repeat_interleave(group, 1) for part in (keys, values, mask))
    expected = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(**SHAPES)
def test_without_penalties_or_within_the_window_it_is_plain_attention(
    rows: int, kv_heads: int, group: int, tokens: int, window: int, seed: int
) -> None:
    query, keys, values = drawn(rows, kv_heads, group, tokens, seed)
    plain, _ = soft.attend(None, query, keys, values)
    for penalties in (
        soft.Penalties(torch.zeros(rows, kv_heads, tokens), window),
        soft.Penalties(torch.full((rows, kv_heads, tokens), soft.EVICTED), tokens),
    ):
        found, _ = soft.attend(None, query, keys, values, soft=penalties)
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def test_penalties_are_what_stays_of_a_token() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 9, 6), 0.1 * torch.randn(3, 6), torch.randn(3) * 0.02
    evicted, penalty = soft.gates(hidden, weight, bias, torch.tensor(0.5))
    decided = evict.shifted(evict.decide(hidden, weight, bias))
    exact = torch.sigmoid(decided.double() / 0.5)
    torch.testing.assert_close(evicted, exact.float())
    torch.testing.assert_close(penalty, torch.log1p(-exact).clamp(min=soft.FLOOR).float(), atol=1e-4, rtol=1e-4)
    assert evicted[..., -1].tolist() == [[0.0] * 3] * 2  # the last token is not judged yet
    assert penalty.min() >= soft.FLOOR


def test_what_decides_has_a_gradient() -> None:
    query, keys, values = drawn(1, 2, 2, 12, 0)
    hidden = torch.randn(1, 12, 6, requires_grad=True)
    weight, bias = torch.zeros(2, 6, requires_grad=True), torch.zeros(2, requires_grad=True)
    _, penalty = soft.gates(hidden, weight, bias + 0.05, torch.tensor(0.3))
    out, _ = soft.attend(None, query, keys, values, soft=soft.Penalties(penalty, 3))
    out.square().sum().backward()
    assert bool(weight.grad.any()) and bool(bias.grad.any())  # type: ignore[union-attr]


def test_kernels_are_for_powers_of_two() -> None:
    assert [size for size in range(1, 300) if soft.fits_kernel(size)] == [16, 32, 64, 128, 256]
