"""Every engine gives the tokens of transformers' own greedy generate, for every press that frees bytes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from kvbench import engines, methods, packed
from kvbench.cache import cache_bytes
from kvbench.decode import generate
from kvbench.errors import Unsupported

HALF = {"compression_ratio": 0.5}
PRESSES = [
    "KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress", "TOVAPress", "KeyDiffPress",
    "PyramidKVPress", "RandomPress",
]  # fmt: skip
ARCHITECTURES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3"]


def method(press: str | None) -> methods.Dense:
    seeded = {"seed": 0} if press == "RandomPress" else {}
    return methods.build({"press": press, "args": HALF | seeded} if press else {})


def decode(name: str, model: Any, ids: torch.Tensor, press: str | None, new_tokens: int) -> list[list[int]]:
    engine = engines.engine(name, ids.device)
    return run(engine, model, ids, press, new_tokens)


def run(engine: engines.Engine, model: Any, ids: torch.Tensor, press: str | None, new_tokens: int) -> list[list[int]]:
    def nothing(_: Any = None) -> None:
        return None

    return engine.generate(model, ids, method(press), new_tokens, nothing, nothing).tokens.tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("press", [None, *PRESSES])
def test_the_packed_step_equals_the_dynamic_cache(architecture: str, press: str | None) -> None:
    model, ids = tiny.model(architecture), tiny.ids(3, 90)
    expected = generate(model, ids, method(press), 12).tokens.tolist()
    assert decode("graph", model, ids, press, 12) == expected
    assert decode("hf", model, ids, press, 12) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_packed_step_equals_transformers_own_generate(architecture: str) -> None:
    model, ids = tiny.model(architecture), tiny.ids(2, 60)
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False)[:, 60:].tolist()
    assert decode("graph", model, ids, None, 20) == theirs


@settings(max_examples=30, deadline=None)
@given(st.integers(65, 140), st.integers(1, 4), st.integers(2, 20), st.sampled_from(PRESSES), st.integers(0, 10**6))
def test_any_shape(tokens: int, rows: int, new_tokens: int, press: str, seed: int) -> None:
    model, ids = tiny.model(), tiny.ids(rows, tokens, seed)
    expected = generate(model, ids, method(press), new_tokens).tokens.tolist()
    assert decode("graph", model, ids, press, new_tokens) == expected


def test_buffers_are_used_again_and_leave_no_trace_of_the_run_before() -> None:
    model, engine = tiny.model(), engines.engine("graph", torch.device("cpu"))
    first = run(engine, model, tiny.ids(2, 80, 1), "KnormPress", 10)
    run(engine, model, tiny.ids(2, 80, 2), "KnormPress", 10)
    assert run(engine, model, tiny.ids(2, 80, 1), "KnormPress", 10) == first
    longer = run(engine, model, tiny.ids(2, 80, 1), "KnormPress", 30)  # more room, new buffers
    assert longer == generate(model, tiny.ids(2, 80, 1), method("KnormPress"), 30).tokens.tolist()
    other = run(engine, model, tiny.ids(2, 120, 3), "KnormPress", 10)  # other shapes, new buffers
    assert other == generate(model, tiny.ids(2, 120, 3), method("KnormPress"), 10).tokens.tolist()


def test_live_bytes_are_those_of_the_dynamic_cache() -> None:
    model, ids = tiny.model(), tiny.ids(2, 80)
    engine = engines.engine("graph", ids.device)
    ours = engine.generate(model, ids, method("KnormPress"), 7, lambda: None, lambda _: None).cache
    theirs = generate(model, ids, method("KnormPress"), 7).cache
    assert cache_bytes(ours).live == cache_bytes(theirs).live
    assert cache_bytes(ours).allocated >= cache_bytes(ours).live


def test_ragged_heads_equal_each_head_alone() -> None:
    """Heads that keep different numbers of tokens read theirs and no slot beyond."""
    rows, heads, kept, head_dim, new = 2, 2, 9, 8, 5
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(rows, heads, kept, head_dim, generator=draw) for _ in range(2))
    lengths = torch.tensor([[9, 4], [1, 7]])
    layer = type("Layer", (), {"keys": keys.clone(), "values": values.clone()})
    cache = packed.PackedCache(type("Cache", (), {"layers": [layer]}), new, [lengths])
    module = type("Module", (), {"layer_idx": 0})
    grown = [[(keys[r, h, : lengths[r, h]], values[r, h, : lengths[r, h]]) for h in range(heads)] for r in range(rows)]
    for _ in range(new):
        key, value = (torch.randn(rows, heads, 1, head_dim, generator=draw) for _ in range(2))
        query = torch.randn(rows, 2 * heads, 1, head_dim, generator=draw)
        cache.admit()
        out, _weights = packed.attend(module, query, *cache.update(key, value, 0), None, packed=cache)
        cache.step.add_(1)
        for r in range(rows):
            for h in range(heads):
                k, v = grown[r][h]
                k, v = torch.cat([k, key[r, h]]), torch.cat([v, value[r, h]])
                grown[r][h] = (k, v)
                for q in (2 * h, 2 * h + 1):
                    alone = torch.softmax(query[r, q] @ k.T / head_dim**0.5, -1) @ v
                    torch.testing.assert_close(out[r, 0, q], alone[0])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"press": "AdaKVPress", "args": {"press": {"press": "SnapKVPress", "args": HALF}}}, "masks keys"),
        (
            {
                "press": "DecodingPress",
                "args": {"base_press": {"press": "KnormPress"}, "compression_interval": 4, "target_size": 50},
            },
            "while decoding",
        ),
    ],
    ids=["masking", "decoding"],
)
def test_what_a_packed_cache_cannot_hold_is_unsupported(spec: dict[str, Any], reason: str) -> None:
    engine = engines.engine("graph", torch.device("cpu"))
    with pytest.raises(Unsupported, match=reason):
        engine.generate(tiny.model(), tiny.ids(1, 90), methods.build(spec), 5, lambda: None, lambda _: None)


def test_sliding_windows_are_unsupported() -> None:
    import transformers

    config = transformers.MistralConfig(**tiny.SIZES, sliding_window=32)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(Unsupported, match="sliding-window"):
        packed.check(model)


def test_the_model_gets_its_own_attention_back() -> None:
    model = tiny.model()
    decode("graph", model, tiny.ids(1, 70), None, 3)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("name", "device", "engine"), [("auto", "cuda", "graph"), ("auto", "cpu", "hf")])
def test_auto(name: str, device: str, engine: str) -> None:
    assert engines.engine(name, torch.device(device)).name == engine


def test_the_compiled_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiler(step, backend="eager", **options))
    counters.clear()
    model, ids = tiny.model("Qwen3"), tiny.ids(2, 40)
    assert decode("compile", model, ids, "KnormPress", 6) == decode("hf", model, ids, "KnormPress", 6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
