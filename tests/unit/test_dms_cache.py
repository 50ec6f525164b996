"""A compact cache through prompt and steps gives the logits of a plain forward pass under the eviction rule."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dms_reference
import tiny
from kvbench.cache import cache_bytes
from kvbench.dms import evict
from kvbench.dms.attention import ATTENTION
from kvbench.dms.cache import CompactCache, join
from kvbench.dms.partition import Partition
from kvbench.errors import Unsupported

ARCHITECTURES = ["Llama", "Qwen2", "Qwen3", "Mistral"]
KEPT = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])


def prompt(model: Any, made: evict.Heads, ids: torch.Tensor) -> tuple[torch.Tensor, CompactCache]:
    cache = CompactCache(made.window)
    with torch.no_grad(), evict.attached(model, made, ATTENTION):
        return model(ids, past_key_values=cache, use_cache=True).logits, cache


def steps(model: Any, made: evict.Heads, cache: CompactCache, ids: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Logits of given tokens fed one by one; ``first`` are the rows' positions, int64 [batch]."""
    found = []
    with torch.no_grad(), evict.attached(model, made, ATTENTION):
        for i in range(ids.shape[1]):
            cache.reserve()
            position = (first + i)[:, None]
            found.append(model(ids[:, i : i + 1], position_ids=position, past_key_values=cache).logits)
    return torch.cat(found, 1)


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    keep=KEPT,
    window=st.integers(1, 40),
    tokens=st.integers(1, 90),
    new=st.integers(1, 40),
    rows=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_prompt_and_steps_equal_the_rule(
    architecture: str, keep: float, window: int, tokens: int, new: int, rows: int, seed: int
) -> None:
    model, made, ids = (
        dms_reference.model(architecture),
        dms_reference.heads(keep, window, seed),
        tiny.ids(rows, tokens + new, seed),
    )
    expected = dms_reference.Reference(model, made, ids)
    assume(expected.clear())
    logits, cache = prompt(model, made, ids[:, :tokens])
    torch.testing.assert_close(logits, expected.logits[:, :tokens], atol=2e-5, rtol=1e-4)
    holds_what_is_readable(cache, [evict.shifted(part[..., :tokens]) > 0 for part in expected.decisions])
    first = torch.full((rows,), tokens)
    found = steps(model, made, cache, ids[:, tokens:], first)
    torch.testing.assert_close(found, expected.logits[:, tokens:], atol=2e-5, rtol=1e-4)
    holds_what_is_readable(cache, expected.marks)


def holds_what_is_readable(cache: CompactCache, marks: list[torch.Tensor]) -> None:
    """By the last query, in blocks that have a slot for each."""
    for layer, marked in zip(cache.layers, marks, strict=True):
        last = torch.tensor([marked.shape[-1] - 1])
        readable = evict.visible(marked, cache.window, last).sum(-1)[..., 0]
        assert layer.lengths.tolist() == readable.tolist()
        assert bool((layer.lengths <= layer.blocks * 16).all())


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=3),
    keep=KEPT,
    window=st.integers(1, 30),
    new=st.integers(1, 30),
    seed=st.integers(0, 10**6),
)
def test_rows_of_different_lengths_equal_each_alone(
    lengths: list[int], keep: float, window: int, new: int, seed: int
) -> None:
    model, made = dms_reference.model("Llama"), dms_reference.heads(keep, window, seed)
    rows = [tiny.ids(1, length + new, seed + i) for i, length in enumerate(lengths)]
    expected = [dms_reference.Reference(model, made, ids) for ids in rows]
    assume(all(one.clear() for one in expected))
    together = join([prompt(model, made, ids[:, :-new])[1] for ids in rows])
    new_ids = torch.cat([ids[:, -new:] for ids in rows])
    found = steps(model, made, together, new_ids, torch.tensor(lengths))
    alone = torch.cat([one.logits[:, -new:] for one in expected])
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)


def long_cache(tokens: int, keep: float, window: int, rows: int = 2, head_dim: int = 64) -> CompactCache:
    """Two layers' random keys under random marks, stored without a model."""
    draw = torch.Generator().manual_seed(0)
    cache = CompactCache(window)
    for _ in range(2):
        keys = torch.randn(rows, 2, tokens, head_dim, generator=draw)
        share = torch.tensor([keep / 2, keep * 3 / 2])[:, None]  # heads differ
        marks = torch.rand(rows, 2, tokens, generator=draw) > share
        cache.take(keys, -keys, Partition.of(marks))
    return cache


@pytest.mark.parametrize("tokens", [4096, 8192])
@pytest.mark.parametrize(("keep", "window"), [(0.1, 64), (0.1, 256), (0.25, 64), (0.5, 512)])
def test_allocated_is_within_15_percent_of_live(tokens: int, keep: float, window: int) -> None:
    cache = long_cache(tokens, keep, window)
    cache.pack(200)
    for step in range(200):
        measured = cache_bytes(cache)
        assert measured.live < measured.allocated <= 1.15 * measured.live
        cache.reserve()
        decide(cache, keep, step)


def decide(cache: CompactCache, keep: float, seed: int) -> None:
    """A step of random keys and decisions."""
    draw = torch.Generator().manual_seed(seed)
    for layer in cache.layers:
        key = torch.randn(*layer.lengths.shape, 1, layer.chunks[0].shape[-1], generator=draw)
        layer.append(key, -key, torch.rand(layer.lengths.shape, generator=draw) > keep)


def test_growth_moves_no_token_and_evicted_slots_are_used_again() -> None:
    cache = long_cache(600, 0.2, 64)
    layer = cache.layers[0]
    before, marked, chunk = layer.lengths.clone(), (layer.ring < 0).sum(-1), layer.chunks[0]
    for step in range(300):
        cache.reserve()
        decide(cache, 1.0, step)  # no new token is marked
    assert layer.chunks[0] is chunk and len(layer.chunks) > 1
    assert bool(marked.all()) and torch.equal(layer.lengths, before + 300 - marked)
    keys, values = layer.read()
    filled = torch.arange(keys.shape[2]) < layer.lengths[..., None]
    torch.testing.assert_close(keys[filled], -values[filled])


@pytest.mark.parametrize("keep", [0.1, 1.0])
def test_a_packed_cache_keeps_the_tensors_that_a_graph_would_hold(keep: float) -> None:
    cache = long_cache(512, keep, 100)
    cache.pack(150)
    held = [[layer.table, *layer.books()] for layer in cache.layers]
    for step in range(150):
        cache.reserve()
        decide(cache, keep, step)
    for before, layer in zip(held, cache.layers, strict=True):
        assert all(a is b for a, b in zip(before, [layer.table, *layer.books()], strict=True))
    other = long_cache(512, keep / 2, 100)
    assert cache.fits(other)
    cache.fill(other)
    for before, layer, new in zip(held, cache.layers, other.layers, strict=True):
        assert all(a is b for a, b in zip(before, [layer.table, *layer.books()], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(layer.books(), new.books(), strict=True))


def test_live_bytes_are_what_is_kept() -> None:
    cache = long_cache(500, 0.3, 32)
    kept = sum(int(layer.lengths.sum()) for layer in cache.layers)
    assert cache_bytes(cache).live == kept * 2 * 64 * 4
    assert cache.kept_fraction() == kept / (2 * 2 * 2 * 500)


def test_a_second_prompt_is_refused() -> None:
    model, made = dms_reference.model("Llama"), dms_reference.heads(0.5, 8)
    _, cache = prompt(model, made, tiny.ids(1, 20))
    with pytest.raises(Unsupported, match="one prompt"), evict.attached(model, made, ATTENTION):
        model(tiny.ids(1, 5), past_key_values=cache)
