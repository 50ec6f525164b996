"""A budget in kept tokens: from whatever prompt, that many are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.utils import compute_n_kept
from transformers import DynamicCache

import tiny
from kvbench import methods
from kvbench.decode import generate, prefill
from kvbench.kept import kept_tokens

EXACT = ["KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress", "TOVAPress", "LagKVPress"]


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_ratio_outlasts_every_rounding(kept: int, tokens: int) -> None:
    ratio = methods.ratio_that_keeps(kept, tokens)
    assert compute_n_kept(tokens, ratio) == round(tokens * (1 - ratio)) == min(kept, tokens)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(EXACT), st.integers(1, 150), st.lists(st.integers(66, 140), min_size=1, max_size=3))
def test_exactly_that_many_are_kept_of_one_prompt_after_another(press: str, kept: int, lengths: list[int]) -> None:
    spec = {"press": press, "args": {}, "kept_tokens": kept}
    method = methods.build(spec)
    for tokens in lengths:
        _, cache = prefill(tiny.model(), tiny.ids(2, tokens), method)
        assert [layer.keys.shape[2] for layer in cache.layers] == [min(kept, tokens)] * 3
        assert kept_tokens(spec, tokens) == min(kept, tokens)


def test_a_budget_is_shared_out_over_layers_where_the_press_does_so() -> None:
    method = methods.build({"press": "PyramidKVPress", "args": {"window_size": 8, "beta": 2}, "kept_tokens": 40})
    _, cache = prefill(tiny.model(), tiny.ids(1, 120), method)
    kept = [layer.keys.shape[2] for layer in cache.layers]
    assert sum(kept) == 3 * 40 and len(set(kept)) == 3


@pytest.mark.parametrize("wrapper", ["AdaKVPress", "CriticalKVPress", "KeyRerotationPress"])
def test_a_wrapped_presss_ratio_is_set_through_its_wrapper(wrapper: str) -> None:
    inner = {"press": "SnapKVPress", "args": {}}
    ratio = {"press": "SnapKVPress", "args": {"compression_ratio": 0.5}}
    budget = methods.build({"press": wrapper, "args": {"press": inner}, "kept_tokens": 50})
    half = methods.build({"press": wrapper, "args": {"press": ratio}})
    ids = tiny.ids(1, 100)
    assert (
        generate(tiny.model(), ids, budget, 8).tokens.tolist() == generate(tiny.model(), ids, half, 8).tokens.tolist()
    )


def test_a_short_prompt_keeps_everything_and_is_answered_as_by_the_baseline() -> None:
    method = methods.build({"press": "SnapKVPress", "args": {}, "kept_tokens": 60})
    for tokens in (60, 5):  # 5 are fewer than its window, which it need not look at
        dense = generate(tiny.model(), tiny.ids(1, tokens), methods.Dense(), 8).tokens.tolist()
        assert generate(tiny.model(), tiny.ids(1, tokens), method, 8).tokens.tolist() == dense


def test_the_articles_generate_keeps_the_budget_and_leaves_no_hook() -> None:
    model, cache = tiny.model(), DynamicCache()
    method = methods.build({"press": "KnormPress", "args": {}, "kept_tokens": 30})
    with torch.no_grad(), method.everywhere(model):
        model.generate(tiny.ids(2, 90), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.layers[0].keys.shape[2] == 30 + 4
    assert not model._forward_pre_hooks
