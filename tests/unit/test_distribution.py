"""What compression does to the next token's distribution, against plain and slow ways to count it."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dms_reference
import tiny
from kvbench import distribution, masks, methods
from kvbench.decode import continue_from, prefill, prefill_both
from kvbench.errors import Unsupported
from kvbench.kept import kept
from kvbench.methods import Dense
from kvbench.window_table import Window, batches, rows_at_once

HALF = {"compression_ratio": 0.5}
SNAP = {"press": "SnapKVPress", "args": HALF}
KNORM = {"press": "KnormPress", "args": HALF}
RANDOM = {"press": "RandomPress", "args": HALF | {"seed": 0}}
CRITICAL = {"press": "CriticalKVPress", "args": {"press": SNAP}}
SHARING = [
    *(
        {"press": name, "args": HALF}
        for name in (
            "KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress", "TOVAPress", "KeyDiffPress",
            "LagKVPress", "PyramidKVPress", "LeverageScorePress", "CURPress",
        )
    ),
    RANDOM,
    {"press": "ThinKPress", "args": {"key_channel_compression_ratio": 0.5}},
    CRITICAL,
    {"press": "ComposedPress", "args": {"presses": [SNAP, KNORM]}},
    {"press": "KeyRerotationPress", "args": {"press": KNORM}},
    {"press": "MergingPress", "args": {"press": SNAP}},
    {"press": "PerLayerCompressionPress", "args": {"press": KNORM, "compression_ratios": [0.2, 0.5, 0.8]}},
    {"press": "AdaKVPress", "args": {"press": SNAP}},
    {"press": "DMSPress", "args": {"press": {"press": "KnormPress", "args": {}}, "threshold": -0.5}},
]  # fmt: skip
# The first goes on from other positions; the others draw, by hand from elsewhere.
UNLIKE = {"KeyRerotationPress", "RandomPress", "LeverageScorePress"}
DECODING = {
    "press": "DecodingPress",
    "args": {
        "base_press": {"press": "KnormPress", "args": {}},
        "compression_interval": 3,
        "target_size": 40,
    },
}


def name(spec: dict[str, Any]) -> str:
    return str(spec["press"])


def windows(count: int, prefix: int, more: int, seed: int = 0) -> list[Window]:
    ids = tiny.ids(count, prefix + more + 1, seed).tolist()
    return [Window("book", f"chapter {i}", i, row[:prefix], row[prefix:]) for i, row in enumerate(ids)]


def by_hand(model: Any, window: Window, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Two prefills, token after token, one vocabulary entry after another."""
    from transformers import DynamicCache

    press = methods.build_press(spec)
    full, cache = DynamicCache(), DynamicCache()
    prefix = torch.tensor([window.prefix_ids])
    with torch.no_grad():
        model(prefix, past_key_values=full)
        with press(model):
            model(prefix, past_key_values=cache)
        for i, (token, after) in enumerate(zip(window.continuation_ids[:-1], window.continuation_ids[1:], strict=True)):
            where = {"position_ids": torch.tensor([[prefix.shape[1] + i]])}
            # what is hidden is hidden on the modules, so the full cache is read without it
            with masks.nothing_hidden(model):
                first = model(torch.tensor([[token]]), past_key_values=full, **where).logits[0, 0]
            second = model(torch.tensor([[token]]), past_key_values=cache, **where).logits[0, 0]
            p, q = ([math.exp(x) for x in (v - v.max()).double().tolist()] for v in (first, second))
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            yield {
                "distance": i + 1,
                "kl": math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
                "agrees": p.index(max(p)) == q.index(max(q)),
                "nll_full": -math.log(p[after]),
                "nll": -math.log(q[after]),
            }


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([spec for spec in SHARING if spec["press"] not in UNLIKE]),
    st.integers(1, 3),
    st.integers(70, 100),
    st.integers(1, 6),
    st.integers(0, 10**6),
)
def test_it_equals_a_plain_count(spec: dict[str, Any], count: int, prefix: int, more: int, seed: int) -> None:
    model, chosen = tiny.model(), windows(count, prefix, more, seed)
    found = list(distribution.against_full(model, methods.build(spec), chosen))
    assert [part["document"] for part in found] == [window.document for window in chosen]
    for part, window in zip(found, chosen, strict=True):
        expected = list(by_hand(model, window, spec))
        assert part["distance"].tolist() == [row["distance"] for row in expected]
        for column in ("kl", "nll_full", "nll"):
            assert part[column] == pytest.approx([row[column] for row in expected], abs=2e-5)
        assert part["agrees"].tolist() == [row["agrees"] for row in expected]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(2, 40), st.floats(0.1, 30), st.integers(0, 10**6))
def test_comparing_logits_equals_a_loop_over_them(tokens: int, vocabulary: int, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    full, other = (torch.randn(tokens, vocabulary, generator=draw) * scale for _ in range(2))
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    found = distribution.compare(full, other, targets)
    for i in range(tokens):
        p, q = ([math.exp(x - max(v)) for x in v] for v in (full[i].double().tolist(), other[i].double().tolist()))
        p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
        assert found["kl"][i] == pytest.approx(kl, rel=1e-9, abs=1e-9)
        assert found["nll"][i] == pytest.approx(-math.log(q[int(targets[i])]), abs=1e-9)
        assert found["nll_full"][i] == pytest.approx(-math.log(p[int(targets[i])]), abs=1e-9)
        assert bool(found["agrees"][i]) == (p.index(max(p)) == q.index(max(q)))
    assert (found["kl"] >= 0).all()
    same = distribution.compare(full, full, targets)
    assert not same["kl"].any() and same["agrees"].all() and (same["nll"] == same["nll_full"]).all()


@pytest.mark.parametrize("spec", SHARING, ids=name)
def test_one_prefill_gives_both_caches_to_the_bit(spec: dict[str, Any]) -> None:
    model, ids, method = tiny.model(), tiny.ids(2, 140), methods.build(spec)
    assert method.shares_prefill
    full, compressed = prefill_both(model, ids, method)
    hidden = [masks.readable(*pair) for pair in zip(masks.attention_layers(model), layer_keys(compressed), strict=True)]
    _, alone = prefill(model, ids, methods.build(spec))
    again = [masks.readable(*pair) for pair in zip(masks.attention_layers(model), layer_keys(alone), strict=True)]
    _, dense = prefill(model, ids, Dense())
    for one, two in ((full, dense), (compressed, alone)):
        for a, b in zip(one.layers, two.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert all(torch.equal(a, b) for a, b in zip(hidden, again, strict=True))


def layer_keys(cache: Any) -> list[torch.Tensor]:
    return [layer.keys for layer in cache.layers]


def test_reading_on_after_one_cache_leaves_the_other_alone() -> None:
    model, ids, more = tiny.model(), tiny.ids(2, 100), tiny.ids(2, 7, seed=1)
    full, compressed = prefill_both(model, ids, methods.build(KNORM))
    before = [keys.clone() for keys in layer_keys(full)]
    continue_from(model, compressed, more, methods.build(KNORM), 100)
    assert all(torch.equal(a, b) for a, b in zip(before, layer_keys(full), strict=True))
    assert full.get_seq_length() == 100 and compressed.get_seq_length() == 57


@pytest.mark.parametrize(
    "spec",
    [
        {"press": "KVzipPress", "args": HALF},
        {"press": "FinchPress", "args": HALF},
        {"press": "KVgradPress", "args": HALF},
        {"press": "PrefillDecodingPress", "args": {"prefilling_press": KNORM}},
        {"press": "ComposedPress", "args": {"presses": [KNORM, {"press": "FinchPress", "args": HALF}]}},
        DECODING,
    ],
    ids=name,
)
def test_presses_with_a_forward_pass_of_their_own_get_two(spec: dict[str, Any]) -> None:
    assert not methods.build(spec).shares_prefill


def test_a_prefill_of_its_own_gives_the_same_as_a_shared_one() -> None:
    model, chosen, own, shared = tiny.model(), windows(3, 90, 6), methods.build(SNAP), methods.build(SNAP)
    own.shares_prefill = False
    for a, b in zip(
        distribution.against_full(model, own, chosen), distribution.against_full(model, shared, chosen), strict=True
    ):
        assert (a["kl"] == b["kl"]).all() and (a["nll_full"] == b["nll_full"]).all()


def test_a_press_that_acts_while_decoding_is_judged_at_every_step() -> None:
    model = tiny.model()
    (part,) = distribution.against_full(model, methods.build(DECODING), windows(1, 80, 12))
    assert not part["kl"][:3].any() or part["kl"][:3].max() < 1e-9  # it prunes after the third step
    assert (part["kl"][3:] > 1e-4).all()
    assert part["kept_fraction"] == pytest.approx(40 / 92)
    assert not part["simulated"]


def test_the_noise_floor() -> None:
    model, chosen = tiny.model(), windows(5, 80, 8)
    found = list(distribution.noise(model, copy.deepcopy(model).to(torch.bfloat16), chosen))
    assert [part["reference"] for part in found] == ["batch"] * 5 + ["dtype"] * 5
    assert all((part["kept_fraction"], part["simulated"]) == (1.0, False) for part in found)
    shape, dtype = (
        np.concatenate([part["kl"] for part in found if part["reference"] == reference])
        for reference in ("batch", "dtype")
    )
    press = np.concatenate([part["kl"] for part in distribution.against_full(model, methods.build(SNAP), chosen)])
    assert shape.max() < 1e-10
    assert 0 < dtype.mean() < press.mean() / 10


def test_one_window_has_a_noise_floor_too() -> None:
    (single,) = distribution.noise(tiny.model(), None, windows(1, 60, 8))
    assert single["reference"] == "batch" and single["kl"].max() < 1e-10 and single["agrees"].all()


def test_a_retrofit_is_compared_with_its_original() -> None:
    original, model, chosen = tiny.model(), copy.deepcopy(tiny.model()), windows(2, 80, 5)
    same = list(distribution.against_full(model, methods.build(KNORM), chosen, original))
    plain = list(distribution.against_full(original, methods.build(KNORM), chosen))
    assert all((a["kl"] == b["kl"]).all() for a, b in zip(same, plain, strict=True))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    (part, _) = distribution.against_full(model, Dense(), chosen, original)
    assert part["kl"].min() > 0 and part["kept_fraction"] == 1.0


def test_a_method_that_changes_the_weights_is_compared_with_the_model_before(tmp_path: Path) -> None:
    heads, chosen = dms_reference.heads(0.3, 12), windows(3, 80, 6)
    changed = dms_reference.adapter(tmp_path, heads)
    method, model = methods.build({"dms": {"adapter": str(tmp_path)}}), copy.deepcopy(tiny.model())
    found = list(distribution.against_full(model, method, chosen))
    assert torch.equal(model.lm_head.weight, tiny.model().lm_head.weight)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, tiny.model().model.layers[0].mlp.up_proj.weight)
    for window, part in zip(chosen, found, strict=True):
        ids = torch.tensor([window.prefix_ids + window.continuation_ids[:-1]])
        with torch.no_grad():
            original, dense = tiny.model()(ids).logits[0, 80:], changed(ids).logits[0, 80:]
        evicting = dms_reference.Reference(changed, heads, ids).logits[0, 80:]
        after = torch.tensor(window.continuation_ids[1:])
        expected = distribution.compare(original, evicting, after)
        for column in ("kl", "nll", "nll_full"):
            assert part[column] == pytest.approx(expected[column], abs=1e-5)
        assert part["kl_dense"] == pytest.approx(distribution.compare(original, dense, after)["kl"], abs=1e-5)
        assert part["kl_dense"].mean() > 1e-4 and 0 < part["kept_fraction"] < 0.9 and not part["simulated"]


def test_weights_that_stay_have_no_figure_of_their_change() -> None:
    (part,) = distribution.against_full(tiny.model(), methods.build(KNORM), windows(1, 60, 4))
    assert part["kl_dense"] is None


@pytest.mark.parametrize(
    ("spec", "fraction", "simulated"),
    [
        ({}, 1.0, False),
        (KNORM, 0.5, False),
        ({"press": "KnormPress", "args": {"compression_ratio": 0.75}}, 0.25, False),
        ({"press": "KnormPress", "args": {"compression_ratio": 0.0}}, 1.0, False),
        ({"press": "AdaKVPress", "args": {"press": SNAP}}, 0.5, True),
        ({"press": "ThinKPress", "args": {"key_channel_compression_ratio": 0.5}}, 0.75, True),
        (
            {
                "press": "ComposedPress",
                "args": {"presses": [KNORM, {"press": "ThinKPress", "args": {"key_channel_compression_ratio": 0.5}}]},
            },
            0.375,
            False,
        ),
    ],
    ids=str,
)
def test_what_is_kept_is_counted_on_the_cache(spec: dict[str, Any], fraction: float, simulated: bool) -> None:
    model, method = tiny.model(), methods.build(spec)
    _, cache = prefill(model, tiny.ids(2, 100), method)
    state = kept(model, cache, 2, 100)
    assert state.fraction == pytest.approx(fraction)
    assert state.simulated == simulated


@pytest.mark.parametrize(
    "spec", [{"press": "ChunkKVPress", "args": {"press": SNAP, "chunk_length": 10}}, RANDOM, CRITICAL], ids=name
)
def test_a_window_is_judged_as_if_it_were_alone(spec: dict[str, Any]) -> None:
    model, chosen = tiny.model(), windows(3, 100, 4)
    for part, window in zip(distribution.against_full(model, methods.build(spec), chosen), chosen, strict=True):
        (alone,) = distribution.against_full(model, methods.build(spec), [window])
        assert (part["kl"] == alone["kl"]).all()


def test_what_a_method_refuses_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="window"):
        list(distribution.against_full(tiny.model(), methods.build(SNAP), windows(2, 30, 4)))


def test_batches_hold_every_window_once() -> None:
    chosen = windows(7, 20, 2)
    assert [len(batch) for batch in batches(chosen, 3)] == [3, 3, 1]
    assert [window for batch in batches(chosen, 3) for window in batch] == chosen
    assert rows_at_once("cpu", 288) == 14 and rows_at_once("cuda", 1152) == 14 and rows_at_once("cpu", 10**6) == 1
