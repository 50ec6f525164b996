"""Bytes are counted on tensors, whatever the structure that holds them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig

import tiny
from kvbench import decode, methods
from kvbench.architecture import windows
from kvbench.cache import CacheBytes, cache_bytes, full_cache_bytes

SHAPE = (2, 3, 10, 4)  # batch, heads, tokens, head_dim
EACH = 2 * 3 * 10 * 4 * 4  # bytes of one float32 tensor


def tensor() -> torch.Tensor:
    return torch.ones(SHAPE)


def layered() -> Any:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(tensor(), tensor(), layer)
    return cache


@pytest.mark.parametrize(
    "cache",
    [
        layered(),
        SimpleNamespace(key_cache=[tensor(), tensor()], value_cache=[tensor(), tensor()]),
        SimpleNamespace(key_cache=[tensor(), tensor(), None], value_cache=[tensor(), tensor(), None]),
        ((tensor(), tensor()), (tensor(), tensor())),
        [tensor(), [tensor(), None], (tensor(), (tensor(),))],
    ],
    ids=["layers", "legacy", "legacy with gaps", "tuples", "nested"],
)
def test_every_structure(cache: Any) -> None:
    assert cache_bytes(cache) == CacheBytes(4 * EACH, 4 * EACH)


def test_a_paged_cache_has_live_tokens_in_blocks_that_are_allocated_ahead() -> None:
    blocks = torch.zeros(16, 8, 4, dtype=torch.bfloat16)
    layer = SimpleNamespace(
        key_blocks=blocks,
        value_blocks=blocks.clone(),
        cache_seq_lengths=torch.tensor([5, 7, 0]),
        head_dim=4,
        dtype=torch.bfloat16,
    )
    empty = SimpleNamespace(
        key_blocks=None, value_blocks=None, cache_seq_lengths=None, head_dim=4, dtype=torch.bfloat16
    )
    assert cache_bytes(SimpleNamespace(layers=[layer, empty])) == CacheBytes(2 * 12 * 4 * 2, 2 * 16 * 8 * 4 * 2)


def test_one_tensor_in_two_places_is_counted_once() -> None:
    shared = tensor()
    assert cache_bytes([(shared, shared), (shared, tensor())]) == CacheBytes(2 * EACH, 2 * EACH)


def test_a_view_keeps_its_whole_storage_allocated() -> None:
    kept = tensor()[:, :, :5]
    assert cache_bytes([kept]) == CacheBytes(EACH // 2, EACH)


def test_two_views_of_one_storage_are_two_live_tensors_in_one_allocation() -> None:
    both = tensor()
    assert cache_bytes([both[:1], both[1:]]) == CacheBytes(EACH, EACH)


def test_an_unknown_structure_is_an_error_not_a_zero() -> None:
    with pytest.raises(TypeError, match="no cache structure"):
        cache_bytes(object())


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3"])
def test_the_closed_form_equals_what_a_dense_cache_takes(architecture: str) -> None:
    model, cache = tiny.model(architecture), DynamicCache()
    with torch.no_grad():
        model(tiny.ids(2, 37), past_key_values=cache)
    assert cache_bytes(cache).live == full_cache_bytes(model.config, 2, 37, 4)


def test_the_articles_byte_counts() -> None:
    from transformers import Qwen3Config

    qwen = Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    assert full_cache_bytes(qwen, 64, 1024, 2) == 9.0 * 2**30
    assert full_cache_bytes(qwen, 64, 204, 2) == 1.79296875 * 2**30


@pytest.mark.parametrize("tokens", [10, 15, 16, 40])
def test_the_uncompressed_cache_of_a_sliding_window_holds_the_window(tokens: int) -> None:
    model = tiny.sliding(16)
    _, cache = decode.prefill(model, tiny.ids(2, tokens), methods.Dense())
    assert cache_bytes(cache).live == full_cache_bytes(model.config, 2, tokens, 4)


def test_layers_of_two_kinds_are_counted_each_by_its_own() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=8,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    assert windows(config) == [8, None, 8]
    assert full_cache_bytes(config, 1, 20, 2) == 2 * 2 * 4 * (7 + 20 + 7) * 2
