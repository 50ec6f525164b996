"""Bytes and operations in closed form, held against real models, real caches and a count one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from kvbench import architecture, cache, decode, kept, limits, methods, presses, roofline
from kvbench.architecture import Architecture
from kvbench.errors import Unsupported
from kvbench.roofline import Rates, Work

SHAPES = sorted((Path(architecture.__file__).parent / "shapes").glob("*.json"))
ARCHITECTURES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Phi3")
QWEN = Architecture.of(json.loads((SHAPES[0].parent / "Qwen--Qwen3-8B.json").read_text()))
LLAMA_TIED = tiny.SIZES | {"model_type": "llama", "tie_word_embeddings": True}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def elements(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_parameters_of_the_shapes_that_come_with_kvbench(path: Path) -> None:
    sizes = json.loads(path.read_text())
    model = on_meta(transformers.AutoConfig.for_model(**sizes))
    assert Architecture.of(sizes).parameters == elements(model)
    assert Architecture.of(architecture.describe(model.config)) == Architecture.of(sizes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_of_every_architecture(name: str) -> None:
    model = tiny.model(name)
    assert Architecture.of(architecture.describe(model.config)).parameters == elements(model)
    assert Architecture.of(json.loads(model.config.to_json_string())).parameters == elements(model)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(ARCHITECTURES),
    layers=st.integers(1, 3),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([8, 20]),
    tied=st.booleans(),
    biases=st.booleans(),
)
def test_parameters_of_any_sizes(
    name: str, layers: int, heads: tuple[int, int], head_dim: int, tied: bool, biases: bool
) -> None:
    sizes = tiny.SIZES | {
        "num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "hidden_size": 8 * heads[0], "tie_word_embeddings": tied, "sliding_window": None,
    }  # fmt: skip
    # the others derive it from the hidden size, or have no biases to ask for
    sizes |= {"head_dim": head_dim} if name in ("Llama", "Qwen3", "Mistral") else {}
    sizes |= {"attention_bias": biases} if name in ("Llama", "Qwen3") else {}
    sizes |= {"mlp_bias": biases} if name == "Llama" else {}
    config = getattr(transformers, f"{name}Config")(**sizes)
    assert Architecture.of(architecture.describe(config)).parameters == elements(on_meta(config))


def test_what_cannot_be_counted_says_why() -> None:
    sizes = tiny.SIZES | {"model_type": "gemma3_text", "head_dim": 16}
    with pytest.raises(Unsupported, match="gemma3_text are not known in closed form"):
        _ = Architecture.of(sizes).parameters
    with pytest.raises(Unsupported, match="no model_type, hidden_size"):
        Architecture.of({"num_hidden_layers": 2})
    slides = Architecture.of(tiny.SIZES | {"model_type": "mistral", "sliding_window": 64})
    assert roofline.prefill(slides, 1, 64, 2).flops > 0
    with pytest.raises(Unsupported, match="65 tokens outgrow"):
        roofline.decode_step(slides, 1, 64, 2)
    unused = Architecture.of(tiny.SIZES | {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False})
    assert unused.window is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """torch counts a prefill's attention without the causal half and multiplies whole vectors with the projections."""
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = tiny.model(name), tiny.ids(2, 24)
    sizes = Architecture.of(architecture.describe(model.config))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.set_attn_implementation("eager")
        _, past = decode.prefill(model, ids, methods.Dense())
        prefill = counter.get_total_flops()
        model(ids[:, :1], past_key_values=past, position_ids=torch.tensor([[24]]))
        step = counter.get_total_flops() - prefill
        model.set_attn_implementation("sdpa")
    rotary = 2 * (sizes.head_dim // 2)  # transformers computes the angles as a matrix product, one a position
    whole = 4 * 2 * sizes.layers * sizes.heads * sizes.head_dim * 24 * 24
    causal = 4 * 2 * sizes.layers * sizes.heads * sizes.head_dim * 24 * 25 / 2
    assert roofline.prefill(sizes, 2, 24, 4).flops == prefill - 24 * rotary - whole + causal
    assert roofline.decode_step(sizes, 2, 24, 4).flops == step - rotary


def test_the_bytes_of_qwen3_8b() -> None:
    step = roofline.decode_step(QWEN, 64, 1024, 2)
    weights = 2 * (QWEN.parameters - QWEN.vocabulary * QWEN.hidden)
    assert 2 * QWEN.kv_elements == 147_456
    assert step.bytes == weights + 2 * 64 * 4096 + 64 * 1025 * 147_456
    assert roofline.decode_step(QWEN, 64, 204, 2).bytes - step.bytes == -64 * 820 * 147_456


def test_a_tied_embedding_is_read_once_and_whole() -> None:
    tied = Architecture.of(LLAMA_TIED)
    apart = Architecture.of(LLAMA_TIED | {"tie_word_embeddings": False})
    assert roofline.decode_step(tied, 3, 0, 4).bytes == 4 * (tied.parameters + 3 * tied.kv_elements)
    assert roofline.decode_step(apart, 3, 0, 4).bytes - roofline.decode_step(tied, 3, 0, 4).bytes == 4 * 3 * 64
    most = roofline.prefill(apart, 30, 30, 4).bytes - roofline.prefill(tied, 30, 30, 4).bytes
    assert most == 4 * apart.embedding  # a table has no more rows than it has


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 300), st.integers(2, 60), st.sampled_from([2, 4]), st.floats(0, 1))
def test_the_mean_step_is_the_mean_of_all_steps(
    batch: int, cached: int, new: int, itemsize: int, growth: float
) -> None:
    steps = [roofline.decode_step(QWEN, batch, cached + growth * i, itemsize) for i in range(new - 1)]
    mean = roofline.mean_decode_step(QWEN, batch, cached, new, itemsize, growth)
    assert mean.bytes == pytest.approx(sum(step.bytes for step in steps) / len(steps), rel=1e-12)
    assert mean.flops == pytest.approx(sum(step.flops for step in steps) / len(steps), rel=1e-12)


def test_a_prompt_is_its_tokens_one_after_the_other() -> None:
    """Causal attention joins the same pairs whether a prompt is read at once or token by token."""
    steps = sum(roofline.decode_step(QWEN, 3, i, 2).flops for i in range(50))
    logits = 49 * 3 * 2 * QWEN.embedding
    assert roofline.prefill(QWEN, 3, 50, 2).flops == steps - logits


@given(st.floats(1, 1e15), st.floats(1, 1e18), st.floats(1e-6, 1e3))
def test_the_fastest_time_reaches_one_of_the_limits(moved: float, done: float, slower: float) -> None:
    rates = Rates(3e12, {"bfloat16": 7e14})
    work = Work(moved, done)
    least = roofline.fastest(work, rates, "bfloat16")
    reached = roofline.mbu(work, least, rates), roofline.mfu(work, least, rates, "bfloat16")
    assert max(reached) == pytest.approx(1)
    assert roofline.mbu(work, least * (1 + slower), rates) < reached[0]


SCORERS = [
    name
    for name in sorted(presses.catalogue())
    if presses.is_plain_scorer(name) and name not in presses.ABSTRACT | {"ExpectedAttentionStatsPress"}
]
HUB = {"KVzapPress", "QFilterPress"}  # their weights are on the hub


@pytest.mark.parametrize("name", [name for name in SCORERS if name not in HUB])
@pytest.mark.parametrize(
    ("tokens", "how"),
    [
        (90, {"args": {"compression_ratio": 0.0}}),
        (101, {"args": {"compression_ratio": 0.3}}),
        (101, {"args": {"compression_ratio": 0.8}}),
        (70, {"args": {"compression_ratio": 0.99}}),
        (101, {"kept_tokens": 67}),
        (90, {"kept_tokens": 100}),
    ],
)
def test_the_caches_of_scoring_presses_are_as_counted(name: str, tokens: int, how: dict[str, Any]) -> None:
    model = tiny.model()
    model.set_attn_implementation("eager" if name == "ObservedAttentionPress" else "sdpa")
    spec = {"press": name, **how}
    _, left = decode.prefill(model, tiny.ids(2, tokens), methods.build(spec))
    model.set_attn_implementation("sdpa")
    kept.check_cache(cache.cache_bytes(left).live, architecture.describe(model.config), spec, 2, tokens, 4)


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(0, 0.9999))
def test_kept_tokens_are_rounded_as_kvpress_rounds(tokens: int, ratio: float) -> None:
    from kvpress.utils import compute_n_kept

    spec = {"press": "KnormPress", "args": {"compression_ratio": ratio}}
    assert kept.kept_tokens(spec, tokens) == compute_n_kept(tokens, ratio)


KNORM = {"press": "KnormPress", "args": {"compression_ratio": 0.5}}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, 100),
        (KNORM, 50),
        ({"press": "KnormPress"}, 100),
        ({"press": "KnormPress", "kept_tokens": 30}, 30),
        ({"press": "PyramidKVPress", "kept_tokens": 30}, None),
        ({"press": "PyramidKVPress", "args": {"compression_ratio": 0.5}}, None),
        ({"press": "CriticalKVPress", "args": {"press": KNORM}}, None),
        ({"press": "AdaKVPress", "args": {"press": KNORM}}, None),
        ({"press": "DecodingPress", "args": {"base_press": KNORM}}, None),
        ({"press": "ThinKPress", "args": {"key_channel_compression_ratio": 0.5}}, None),
        ({"dms": {"adapter": "x"}}, None),
    ],
)
def test_what_a_method_keeps(spec: dict[str, Any], expected: int | None) -> None:
    assert kept.kept_tokens(spec, 100) == expected


def test_who_decides_how_many_tokens_are_kept_is_read_as_python_reads_it() -> None:
    import kvpress

    scorer = kvpress.ScorerPress
    inherits = {
        name
        for name, kind in vars(kvpress).items()
        if isinstance(kind, type)
        and issubclass(kind, scorer)
        and not isinstance(vars(kind).get("compression_ratio"), property)
        and all(getattr(kind, part) is getattr(scorer, part) for part in ("compress", "forward_hook", "__call__"))
    }
    assert {name for name in presses.catalogue() if presses.is_plain_scorer(name)} == inherits


def test_a_cache_that_differs_from_its_count_is_an_error() -> None:
    config = tiny.SIZES | {"model_type": "llama"}
    token = Architecture.of(config).kv_elements * 4
    kept.check_cache(2 * 50 * token, config, KNORM, 2, 100, 4)
    for wrong in (2 * 50 * token - 1, 2 * 51 * token):
        with pytest.raises(RuntimeError, match=f"{wrong} bytes where"):
            kept.check_cache(wrong, config, KNORM, 2, 100, 4)
    kept.check_cache(7, config, {"press": "AdaKVPress", "args": {"press": KNORM}}, 2, 100, 4)
    kept.check_cache(7, config | {"sliding_window": 100}, KNORM, 2, 100, 4)
    kept.check_cache(7, {"model_type": "other"}, {}, 2, 100, 4)


DEVICE = "NVIDIA H100 80GB HBM3"
RATES = {DEVICE: Rates(3e12, {"bfloat16": 7e14})}
CELL = {"batch_size": 8, "prompt_tokens": 1000, "new_tokens": 11}
TOKEN = 8 * 147_456


def facts(**changes: Any) -> dict[str, Any]:
    config = json.loads((SHAPES[0].parent / "Qwen--Qwen3-8B.json").read_text())
    known = {"model_config": config, "dtype": "torch.bfloat16", "device": DEVICE, "variant": {"spec": KNORM}}
    return known | {"weights_bytes": 2 * QWEN.parameters} | changes


def held(live: int, end: int | None, simulated: bool = False) -> dict[str, Any]:
    return {
        "kv_cache_bytes": live, "kv_cache_end_bytes": end, "kv_cache_full_bytes": 1000 * TOKEN, "simulated": simulated,
    }  # fmt: skip


def test_a_cells_limits_follow_from_its_measured_cache() -> None:
    found = limits.of_cell(CELL, held(300 * TOKEN, 310 * TOKEN), facts(), RATES)
    assert found is not None and found.decode == roofline.decode_step(QWEN, 8, 304.5, 2)
    values = found.of_repeat(2.0, 0.01)
    assert list(values) == [*limits.COLUMNS, "mfu", "mbu"]
    assert values["mbu"] == values["decode_step_bytes"] / 0.01 / 3e12
    assert values["mfu"] == values["prefill_flops"] / 2.0 / 7e14
    assert values["fastest_tpot_s"] == values["mbu"] * 0.01
    assert values["fastest_ttft_s"] == values["mfu"] * 2.0


def test_a_simulated_method_reads_the_whole_cache() -> None:
    found = limits.of_cell(CELL, held(300 * TOKEN, 1010 * TOKEN, simulated=True), facts(), RATES)
    assert found is not None and found.decode == roofline.decode_step(QWEN, 8, 1004.5, 2)


@pytest.mark.parametrize("end", [None, 309 * TOKEN])
def test_a_cache_that_shrinks_while_decoding_has_no_closed_form(end: int | None) -> None:
    found = limits.of_cell(CELL, held(300 * TOKEN, end), facts(), RATES)
    assert found is not None and found.decode is None
    values = found.of_repeat(2.0, 0.01)
    assert values["mbu"] is None and values["fastest_tpot_s"] is None and values["mfu"] is not None


def test_dms_evicts_evenly_while_decoding() -> None:
    dms = facts(variant={"spec": {"dms": {"adapter": "x"}}})
    found = limits.of_cell(CELL, held(300 * TOKEN, 304 * TOKEN), dms, RATES)
    assert found is not None and found.decode is not None
    assert found.decode.bytes == pytest.approx(roofline.decode_step(QWEN, 8, 301.8, 2).bytes, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "another"},
        {"dtype": "torch.float32"},
        {"weights_bytes": QWEN.parameters},
        {"model_config": {"model_type": "other"}},
        {"model_config": facts()["model_config"] | {"model_type": "gemma3_text"}},
        {"model_config": facts()["model_config"] | {"sliding_window": 512, "use_sliding_window": True}},
    ],
    ids=["device", "dtype", "quantized", "no sizes", "kind", "window"],
)
def test_what_is_not_known_is_null(changes: dict[str, Any]) -> None:
    assert limits.of_cell(CELL, held(300 * TOKEN, 310 * TOKEN), facts(**changes), RATES) is None
