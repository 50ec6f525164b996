"""Our decode loop gives the tokens that transformers' own greedy generate gives, with and without compression."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from kvbench import methods
from kvbench.decode import generate, prefill
from kvbench.errors import Unsupported

HALF = {"compression_ratio": 0.5}
SCORERS = [
    "KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress", "TOVAPress", "KeyDiffPress",
    "LagKVPress", "PyramidKVPress",
]  # fmt: skip
WRAPPED = [
    {"press": "CriticalKVPress", "args": {"press": {"press": "SnapKVPress", "args": HALF}}},
    {"press": "ComposedPress", "args": {"presses": [{"press": "KnormPress", "args": HALF}] * 2}},
    {"press": "AdaKVPress", "args": {"press": {"press": "SnapKVPress", "args": HALF}}},
]
SPECS = [{"press": name, "args": HALF} for name in SCORERS] + WRAPPED


def reference(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[:, ids.shape[1] :]


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3"])
def test_dense_equals_transformers(architecture: str) -> None:
    model, ids = tiny.model(architecture), tiny.ids(3, 50)
    assert generate(model, ids, methods.Dense(), 20).tokens.tolist() == reference(model, ids, 20).tolist()


def by_hand(model: Any, ids: torch.Tensor, spec: dict[str, Any], new_tokens: int) -> list[int]:
    """kvpress's own way: prefill under the press, then step by step with explicit positions."""
    from transformers import DynamicCache

    cache, press, found = DynamicCache(), methods.build_press(spec), []
    with torch.no_grad():
        with press(model):
            logits = model(ids, past_key_values=cache).logits
        for i in range(new_tokens):
            found.append(int(logits[0, -1].argmax()))
            position = torch.tensor([[ids.shape[1] + i]])
            logits = model(torch.tensor([[found[-1]]]), past_key_values=cache, position_ids=position).logits
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["press"])
def test_a_press_equals_kvpress_used_by_hand(spec: dict[str, Any]) -> None:
    model, ids = tiny.model(), tiny.ids(1, 150)
    assert generate(model, ids, methods.build(spec), 12).tokens[0].tolist() == by_hand(model, ids, spec, 12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCORERS), st.integers(70, 130), st.integers(2, 4), st.integers(0, 10**6))
def test_a_batch_of_equal_lengths_equals_its_rows_alone(press: str, tokens: int, rows: int, seed: int) -> None:
    model, ids, spec = tiny.model(), tiny.ids(rows, tokens, seed), {"press": press, "args": HALF}
    together = generate(model, ids, methods.build(spec), 6).tokens.tolist()
    assert together == [generate(model, row[None], methods.build(spec), 6).tokens[0].tolist() for row in ids]


def test_marks_count_new_tokens_and_one_before() -> None:
    marks: list[int] = []
    generate(tiny.model(), tiny.ids(2, 30), methods.Dense(), 7, mark=lambda: marks.append(1))
    assert len(marks) == 8


def test_an_end_of_sequence_ends_a_row_and_is_kept() -> None:
    model, ids = tiny.model(), tiny.ids(1, 40)
    free = generate(model, ids, methods.Dense(), 20).tokens[0].tolist()
    end = free[5]
    stopped = generate(model, ids, methods.Dense(), 20, stop={end}).tokens[0].tolist()
    assert stopped == free[: free.index(end) + 1]


def test_only_the_last_logits_are_computed() -> None:
    shapes: list[torch.Size] = []
    model = tiny.model()
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    prefill(model, tiny.ids(2, 40), methods.Dense())
    hook.remove()
    assert shapes == [(2, 1, tiny.SIZES["vocab_size"])]


def test_a_press_leaves_no_hook_behind() -> None:
    model = tiny.model()
    generate(model, tiny.ids(1, 80), methods.build({"press": "KnormPress", "args": HALF}), 4)
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_a_rerotating_press_goes_on_from_the_compressed_length() -> None:
    spec = {"press": "KeyRerotationPress", "args": {"press": {"press": "KnormPress", "args": HALF}}}
    method = methods.build(spec)
    _, cache = prefill(tiny.model(), tiny.ids(1, 80), method)
    assert method.next_position(80, cache) == 40
    assert methods.build({"press": "KnormPress", "args": HALF}).next_position(80, cache) == 80


@pytest.mark.parametrize(
    ("spec", "rows", "reason"),
    [
        (
            {"press": "ChunkKVPress", "args": {"press": {"press": "KnormPress", "args": HALF}}},
            2,
            "first row's chunks",
        ),
        ({"press": "SimLayerKVPress", "args": {}}, 2, "average over the batch"),
        (
            {"press": "CriticalAdaKVPress", "args": {"press": {"press": "SnapKVPress", "args": HALF}}},
            2,
            "adds up the rows' budgets",
        ),
        ({"press": "KVzipPress", "args": HALF}, 2, "one sequence"),
        ({"press": "ObservedAttentionPress", "args": HALF}, 1, "attention: eager"),
    ],
    ids=lambda v: v["press"] if isinstance(v, dict) else str(v),
)
def test_what_would_be_wrong_is_refused(spec: dict[str, Any], rows: int, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        methods.build(spec).check(tiny.model(), rows)


def test_a_prompt_shorter_than_a_presss_window_is_unsupported_with_its_reason() -> None:
    method = methods.build({"press": "SnapKVPress", "args": HALF})
    with pytest.raises(Unsupported, match="SnapKVPress refuses this input: .*window"):
        generate(tiny.model(), tiny.ids(1, 20), method, 4)


def test_a_press_on_sliding_layers_is_refused_before_they_are_full() -> None:
    model, method = tiny.sliding(32), methods.build({"press": "KnormPress", "args": HALF})
    assert generate(model, tiny.ids(1, 20), methods.Dense(), 30).tokens.shape == (1, 30)
    assert generate(model, tiny.ids(1, 20), method, 12).tokens.shape == (1, 12)
    for tokens, new in ((20, 13), (40, 2)):
        with pytest.raises(Unsupported, match="sliding window of 32 tokens"):
            generate(model, tiny.ids(1, tokens), method, new)
    with pytest.raises(Unsupported, match="sliding window"):
        prefill(model, tiny.ids(1, 32), method)


def test_layers_of_unequal_length_decode_under_eager_attention_too() -> None:
    ids, method = tiny.ids(2, 90), methods.build({"press": "PyramidKVPress", "args": HALF})
    expected = generate(tiny.model(), ids, method, 12).tokens
    eager = deepcopy(tiny.model())
    eager.set_attn_implementation("eager")
    assert generate(eager, ids, method, 12).tokens.tolist() == expected.tolist()
