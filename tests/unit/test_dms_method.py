"""DMS in every engine: the tokens of the rule, step by step, and bytes that are freed."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dms_reference
import tiny
from kvbench import engines, measure, methods, rows
from kvbench.cache import cache_bytes, full_cache_bytes
from kvbench.decode import generate, prefill
from kvbench.dms import evict
from kvbench.dms.method import Dms
from kvbench.errors import Unsupported
from kvbench.kept import kept
from kvbench.nvml import Watch

WINDOW = 12


def nothing(_: Any = None) -> None:
    return None


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    evict.save(dms_reference.heads(0.3, WINDOW), tmp_path)
    return tmp_path


def method(adapter: Path, **options: Any) -> methods.Dense:
    return methods.build({"dms": {"adapter": str(adapter), "checkpoint": None, "revision": None, **options}})


def by_the_rule(model: Any, ids: torch.Tensor, new_tokens: int, threshold: float = 0.0) -> list[list[int]]:
    """Greedy tokens, each from a forward pass over the whole sequence."""
    heads, found = dms_reference.heads(0.3, WINDOW), ids
    for _ in range(new_tokens):
        logits = dms_reference.Reference(model, heads, found, threshold).logits
        found = torch.cat([found, logits[:, -1:].argmax(-1)], 1)
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_hf_and_graph_decode_by_the_rule(architecture: str, adapter: Path) -> None:
    model, ids = copy.deepcopy(tiny.model(architecture)), tiny.ids(3, 60)
    expected = by_the_rule(model, ids, 30)
    assert generate(model, ids, method(adapter), 30).tokens.tolist() == expected
    dms = method(adapter)
    for name in ("hf", "graph"):
        engine = engines.engine(name, ids.device)
        assert engine.generate(model, ids, dms, 30, nothing, nothing).tokens.tolist() == expected
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("threshold", "keeps_more"), [(60.0, True), (-60.0, False)])
def test_a_threshold_evicts_what_has_a_logit_above_it(threshold: float, keeps_more: bool, adapter: Path) -> None:
    model, ids, plain = copy.deepcopy(tiny.model()), tiny.ids(3, 90), dms_reference.heads(0.3, WINDOW)
    expected = dms_reference.Reference(model, plain, ids, threshold)
    tokens = by_the_rule(model, ids, 20, threshold)
    _, usual = prefill(copy.deepcopy(model), ids, method(adapter))
    dms = method(adapter, threshold=threshold)
    _, cache = prefill(model, ids, dms)
    assert expected.clear() and (cache.kept_fraction() > usual.kept_fraction()) is keeps_more
    for layer, marked in zip(cache.layers, expected.marks, strict=True):
        assert layer.lengths.tolist() == evict.visible(marked, WINDOW, torch.tensor([89])).sum((2, 3)).tolist()
    assert isinstance(dms, Dms)
    found = dms_reference.Reference(copy.deepcopy(tiny.model()), dms.heads(model), ids)
    for marked, logits in zip(found.marks, expected.decisions, strict=True):
        assert torch.equal(marked[..., :-1], logits[..., 1:] > threshold)
    for name in ("hf", "graph"):
        engine = engines.engine(name, ids.device)
        assert engine.generate(model, ids, dms, 20, nothing, nothing).tokens.tolist() == tokens


def test_buffers_are_used_again_and_leave_no_trace_of_the_run_before(adapter: Path) -> None:
    model, dms = copy.deepcopy(tiny.model()), method(adapter)
    engine = engines.engine("graph", torch.device("cpu"))
    assert isinstance(engine, engines.Packed)

    def run(seed: int, tokens: int, new_tokens: int) -> list[list[int]]:
        ids = tiny.ids(2, tokens, seed)
        return engine.generate(model, ids, dms, new_tokens, nothing, nothing).tokens.tolist()

    first = run(1, 80, 25)
    state = engine.state
    run(2, 80, 25)
    assert run(1, 80, 25) == first and engine.state is state
    assert run(1, 80, 45)[0][:25] == first[0]  # more room, new buffers
    other = tiny.ids(2, 120, 3)
    assert run(3, 120, 10) == generate(model, other, dms, 10).tokens.tolist()


def test_decoding_once_more_is_as_much_work_and_stays_in_its_blocks(adapter: Path) -> None:
    model, dms, ids = copy.deepcopy(tiny.model()), method(adapter), tiny.ids(2, 80, 1)
    engine = engines.engine("graph", ids.device)
    first = engine.generate(model, ids, dms, 90, nothing, nothing)
    for _ in range(3):
        assert engine.again() == 89
        for layer in first.cache.layers:
            assert bool((layer.lengths <= 16 * layer.blocks).all()) and bool((layer.position == 80 + 89).all())
    assert engine.generate(model, ids, dms, 90, nothing, nothing).tokens.tolist() == first.tokens.tolist()


def test_prompts_of_different_lengths_get_the_tokens_that_each_gets_alone(adapter: Path) -> None:
    model, dms = copy.deepcopy(tiny.model("Qwen3")), method(adapter)
    prompts = [tiny.ids(1, tokens, tokens)[0].tolist() for tokens in (5, 70, 33, 70, 140)]
    found = rows.generate_rows(model, prompts, dms, 25)
    for prompt, answer in zip(prompts, found, strict=True):
        assert isinstance(answer, rows.Row)
        assert [answer.tokens] == by_the_rule(model, torch.tensor([prompt]), 25)


def test_bytes_are_freed_and_what_was_achieved_is_told(adapter: Path) -> None:
    model, ids, dms = copy.deepcopy(tiny.model()), tiny.ids(2, 400), method(adapter)
    _, cache = prefill(model, ids, dms)
    full, measured = full_cache_bytes(model.config, 2, 400, 4), cache_bytes(cache)
    assert measured.live < measured.allocated < full / 2
    facts = dms.facts(cache)
    assert facts["window"] == WINDOW and facts["compression_factor"] == pytest.approx(full / measured.live)
    assert facts["kept_fraction"] == pytest.approx(kept(model, cache, 2, 400).fraction)
    assert methods.Dense().facts(cache) == {}


@pytest.mark.parametrize("name", ["hf", "graph"])
def test_a_cell_records_what_was_kept_after_the_prompt_and_at_the_end(name: str, adapter: Path) -> None:
    model, dms, effort = copy.deepcopy(tiny.model()), method(adapter), measure.Effort(1, 1, 0.9, 1)
    batch, engine = measure.Batch(tiny.ids(2, 200), None, 40, 0), engines.engine(name, torch.device("cpu"))
    (before,) = measure.prefill_standard(model, batch, dms, effort, engine, Watch(None))["repeats"]
    (after,) = measure.generation_standard(model, batch, dms, effort, engine, Watch(None))["repeats"]
    assert before["kept_fraction"] == before["facts"]["kept_fraction"] < 0.5 and before["facts"]["window"] == WINDOW
    assert before["kept_fraction"] == pytest.approx(before["kv_cache_bytes"] / before["kv_cache_full_bytes"])
    full = full_cache_bytes(model.config, 2, 200 + 39, 4)
    assert after["kept_fraction_end"] == pytest.approx(after["kv_cache_end_bytes"] / full)
    assert before["simulated"] is after["simulated"] is False
    (dense,) = measure.generation_standard(tiny.model(), batch, methods.Dense(), effort, engine, Watch(None))["repeats"]
    assert "kept_fraction_end" not in dense


def test_a_prompt_within_the_window_has_nothing_to_evict_and_simulates_nothing(adapter: Path) -> None:
    model, dms = copy.deepcopy(tiny.model()), method(adapter)
    prompts = [tiny.ids(1, tokens, tokens)[0].tolist() for tokens in (3, WINDOW + 1)]
    batch, effort = measure.Batch(tiny.ids(1, WINDOW + 1), None, 4, 0), measure.Effort(1, 1, 0.9, 1)
    engine = engines.engine("hf", torch.device("cpu"))
    for answer in rows.generate_rows(model, prompts, dms, 4):
        assert isinstance(answer, rows.Row) and not answer.simulated
    (before,) = measure.prefill_standard(model, batch, dms, effort, engine, Watch(None))["repeats"]
    assert (before["kept_fraction"], before["simulated"]) == (1.0, False)
    assert before["kv_cache_allocated_bytes"] > before["kv_cache_full_bytes"]


def test_the_articles_way_is_unsupported(adapter: Path) -> None:
    with pytest.raises(Unsupported, match="article"):
        method(adapter).everywhere(tiny.model())


def test_an_adapter_of_other_weights_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = evict.Heads(3, 2, 64, 8, {"base_sha256": json.dumps({"model.safetensors": "a" * 64})})
    evict.save(heads, tmp_path)
    for digest, said in (("a" * 64, False), ("b" * 64, True)):
        manifest = SimpleNamespace(name="tiny", files=[{"path": "model.safetensors", "sha256": digest}])
        with methods.build({"dms": {"adapter": str(tmp_path)}}).loading(manifest):
            assert ("trained on other weights than those of tiny" in capsys.readouterr().out) is said
