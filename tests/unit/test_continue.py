"""Reading a continuation after a compressed cache: at once as step by step, and from the right positions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from kvbench import masks, methods
from kvbench.decode import continue_from, generate, prefill

HALF = {"compression_ratio": 0.5}
SNAP = {"press": "SnapKVPress", "args": HALF}
KNORM = {"press": "KnormPress", "args": HALF}
PRUNING = [
    {"press": name, "args": HALF}
    for name in (
        "KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress", "TOVAPress", "KeyDiffPress",
        "LagKVPress", "PyramidKVPress", "RandomPress",
    )
]  # fmt: skip
WRAPPED = [
    {"press": "CriticalKVPress", "args": {"press": SNAP}},
    {"press": "ComposedPress", "args": {"presses": [KNORM, KNORM]}},
    {"press": "ChunkPress", "args": {"press": KNORM, "chunk_length": 30}},
    {"press": "KeyRerotationPress", "args": {"press": KNORM}},
    {"press": "PerLayerCompressionPress", "args": {"press": KNORM, "compression_ratios": [0.2, 0.5, 0.8]}},
]
MASKING = [
    {"press": "AdaKVPress", "args": {"press": SNAP}},
    {"press": "AdaKVPress", "args": {"press": KNORM, "alpha_safeguard": 0.0}},
    {"press": "DMSPress", "args": {"press": {"press": "KnormPress", "args": {}}, "threshold": -0.5}},
]
SPECS = [*PRUNING, *WRAPPED, *MASKING]


def name(spec: dict[str, Any]) -> str:
    return str(spec["press"])


def compressed(model: Any, ids: torch.Tensor, spec: dict[str, Any]) -> tuple[Any, methods.Dense, int]:
    method = methods.build(spec)
    _, cache = prefill(model, ids, method)
    return cache, method, method.next_position(ids.shape[1], cache)


def stepwise(model: Any, cache: Any, ids: torch.Tensor, position: int) -> torch.Tensor:
    """Token after token in kvpress's own way, with keys overwritten where they are hidden."""
    with torch.no_grad():
        steps = [
            model(ids[:, i : i + 1], position_ids=torch.tensor([[position + i]]), past_key_values=cache).logits
            for i in range(ids.shape[1])
        ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_one_pass_equals_step_by_step(spec: dict[str, Any]) -> None:
    model, ids, more = tiny.model(), tiny.ids(2, 140), tiny.ids(2, 12, seed=1)
    cache, method, position = compressed(model, ids, spec)
    assert masks.hides(model) == (spec in MASKING)
    at_once = continue_from(model, cache, more, method, position)
    cache, _, position = compressed(model, ids, spec)
    assert torch.allclose(at_once, stepwise(model, cache, more, position), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(71, 160), st.integers(1, 3), st.integers(1, 12), st.integers(0, 10**6))
def test_a_continuation_in_two_parts_is_the_same(
    spec: dict[str, Any], tokens: int, rows: int, more: int, seed: int
) -> None:
    model, ids, after = tiny.model(), tiny.ids(rows, tokens, seed), tiny.ids(rows, more + 1, seed + 1)
    cache, method, position = compressed(model, ids, spec)
    whole = continue_from(model, cache, after, method, position)
    cache, method, position = compressed(model, ids, spec)
    first = continue_from(model, cache, after[:, :more], method, position)
    rest = continue_from(model, cache, after[:, more:], method, position + more)
    assert torch.allclose(whole, torch.cat([first, rest], 1), atol=1e-5)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3"])
def test_after_a_whole_cache_it_is_the_models_own_forward(architecture: str) -> None:
    model, ids = tiny.model(architecture), tiny.ids(2, 60)
    cache, method, position = compressed(model, ids[:, :45], {})
    with torch.no_grad():
        expected = model(ids).logits[:, 45:]
    assert torch.allclose(continue_from(model, cache, ids[:, 45:], method, position), expected, atol=1e-5)


@pytest.mark.parametrize("spec", [*SPECS, {}], ids=lambda s: s.get("press", "none"))
def test_its_argmax_is_what_generate_writes(spec: dict[str, Any]) -> None:
    model, ids, method = tiny.model(), tiny.ids(1, 140), methods.build(spec)
    tokens = generate(model, ids, method, 10).tokens
    cache, method, position = compressed(model, ids, spec)
    logits = continue_from(model, cache, tokens[:, :-1], method, position)
    assert logits.argmax(-1).tolist() == tokens[:, 1:].tolist()


def test_a_press_that_acts_while_decoding_goes_step_by_step() -> None:
    args = {"base_press": {"press": "KnormPress", "args": {}}, "compression_interval": 4, "target_size": 60}
    model, ids, more = tiny.model(), tiny.ids(2, 80), tiny.ids(2, 9, seed=1)
    cache, method, position = compressed(model, ids, {"press": "DecodingPress", "args": args})
    logits = continue_from(model, cache, more, method, position)
    assert cache.get_seq_length() == 61  # pruned at steps 4 and 8, one step after it
    again, _, _ = compressed(model, ids, {})
    with method.decoding(model):
        assert torch.equal(logits, stepwise(model, again, more, 80))


@pytest.mark.parametrize("press", ["DecodingPress", "CAMPress"])
def test_a_press_forgets_the_sequence_before(press: str) -> None:
    args = {"base_press": {"press": "KnormPress", "args": {}}, "compression_interval": 3, "target_size": 60}
    model, method, more = tiny.model(), methods.build({"press": press, "args": args}), tiny.ids(1, 20, seed=9)
    read = []
    for ids in (tiny.ids(1, 80, seed=1), tiny.ids(1, 300, seed=2), tiny.ids(1, 80, seed=1)):
        _, cache = prefill(model, ids, method)
        read.append(continue_from(model, cache, more, method, ids.shape[1]))
    assert torch.equal(read[0], read[2])


def test_eager_attention_gets_masks_of_its_own_form() -> None:
    model, ids, more = tiny.model(), tiny.ids(2, 100), tiny.ids(2, 8, seed=1)
    spec = WRAPPED[-1]
    cache, method, position = compressed(model, ids, spec)
    sdpa = continue_from(model, cache, more, method, position)
    model.set_attn_implementation("eager")
    try:
        cache, method, position = compressed(model, ids, spec)
        assert torch.allclose(continue_from(model, cache, more, method, position), sdpa, atol=1e-5)
    finally:
        model.set_attn_implementation("sdpa")


def test_what_a_layer_hides_can_be_set_aside() -> None:
    model, ids = tiny.model(), tiny.ids(1, 100)
    cache, _, _ = compressed(model, ids, MASKING[0])
    layer = masks.attention_layers(model)[0]
    assert masks.readable(layer, cache.layers[0].keys).float().mean() == 0.5
    with masks.nothing_hidden(model):
        assert not masks.hides(model)
        assert masks.readable(layer, cache.layers[0].keys).all()
    assert masks.hides(model)
    prefill(model, ids, methods.Dense())
    assert not masks.hides(model)


def test_no_hook_is_left_behind() -> None:
    model = tiny.model()
    cache, method, position = compressed(model, tiny.ids(1, 100), MASKING[0])
    continue_from(model, cache, tiny.ids(1, 5), method, position)
    assert not any(layer._forward_pre_hooks for layer in masks.attention_layers(model))
