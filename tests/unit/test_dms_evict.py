"""Eviction heads: the rule, their file, how they attach, and heads calibrated to a share."""

import copy
from pathlib import Path

import pytest
import torch

import dms_reference
import tiny
from kvbench.dms import adapter, calibrate, evict, layout
from kvbench.dms.attention import ATTENTION
from kvbench.dms.cache import CompactCache
from kvbench.errors import Unsupported, UserError


def test_visible_is_causal_and_drops_marked_keys_after_the_window() -> None:
    marks = torch.tensor([[[True, False, True, False, False]]])
    seen = evict.visible(marks, 1, torch.arange(5))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 1],
    ]


def test_a_token_is_judged_by_the_next_one() -> None:
    logits = torch.tensor([[[9.0, -1.0, 2.0, -3.0]]])
    assert (evict.shifted(logits) > 0).tolist() == [[[False, True, False, False]]]


def test_zero_heads_evict_nothing_and_change_nothing() -> None:
    model, ids = dms_reference.model("Llama"), tiny.ids(2, 40)
    expected = model(ids).logits
    made = evict.Heads(*evict.sizes(model.config), window=4)
    with torch.no_grad(), evict.attached(model, made, ATTENTION):
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_logits_have_a_gradient_and_any_scale_of_the_input_decides_alike() -> None:
    made, hidden = dms_reference.heads(0.5, 4).requires_grad_(True), torch.randn(2, 7, 64)
    logits = made.logits(1, hidden)
    assert logits.shape == (2, 2, 7) and logits.dtype == torch.float32
    torch.testing.assert_close(made.logits(1, 50 * hidden), logits)
    logits.sum().backward()
    assert made.weight.grad is not None and bool(made.weight.grad[1].any()) and not bool(made.weight.grad[0].any())


def test_a_file_keeps_heads_window_and_origin(tmp_path: Path) -> None:
    made = dms_reference.heads(0.5, 17)
    made.about = {"base_model": "x/y", "base_revision": "0" * 40, "compression_ratio": "4"}
    evict.save(made, tmp_path)
    found = evict.load(tmp_path)
    assert found.window == 17 and found.about == made.about
    assert torch.equal(found.weight, made.weight) and torch.equal(found.bias, made.bias)


def test_what_is_no_adapter_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no {evict.FILE} in"):
        evict.load(tmp_path)
    (tmp_path / evict.FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        evict.load(tmp_path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / evict.FILE)
    with pytest.raises(UserError, match="does not hold eviction heads"):
        evict.load(tmp_path)


def test_heads_for_another_model_are_refused(tmp_path: Path) -> None:
    evict.save(evict.Heads(30, 3, 576, 64), tmp_path)
    with pytest.raises(Unsupported, match="30 layers × 3 KV heads × 576 hidden"):
        adapter.load(tiny.model("Llama"), tmp_path)
    with pytest.raises(Unsupported, match="phi3"):
        evict.attach(tiny.model("Phi3"), evict.Heads(3, 2, 64, 8))
    with pytest.raises(UserError, match="window"):
        evict.Heads(3, 2, 64, 0)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_a_lora_is_merged_into_the_weights(architecture: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = copy.deepcopy(tiny.model(architecture)), tiny.ids(1, 30)
    before = model(ids).logits
    targets = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(0)
    trained = get_peft_model(copy.deepcopy(tiny.model(architecture)), LoraConfig(r=2, target_modules=targets))
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.2)
    expected = trained(ids).logits
    trained.save_pretrained(tmp_path)
    evict.save(dms_reference.heads(0.5, 8), tmp_path)
    heads = adapter.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert heads.window == 8 and not torch.allclose(expected, before, atol=1e-3)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_half_a_lora_is_refused(tmp_path: Path) -> None:
    evict.save(dms_reference.heads(0.5, 8), tmp_path)
    (tmp_path / layout.LORA_CONFIG).write_text("{}")
    with pytest.raises(UserError, match="other half"):
        adapter.load(dms_reference.model("Llama"), tmp_path)


def test_random_heads_keep_the_share_they_are_calibrated_to() -> None:
    model, ids, window = dms_reference.model("Qwen3"), tiny.ids(3, 400), 20
    keep = calibrate.share(5, 400, window)
    heads = calibrate.random_heads(model, window, keep, ids)
    cache = CompactCache(window)
    with torch.no_grad(), evict.attached(model, heads, ATTENTION):
        model(ids, past_key_values=cache, use_cache=True)
    assert cache.kept_fraction() == pytest.approx(1 / 5, rel=0.05)
    for layer in cache.layers:
        by_head = layer.lengths.float().mean(0) / 400
        assert by_head.tolist() == pytest.approx([1 / 5] * 2, rel=0.15)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_a_share_that_the_window_exceeds_is_refused() -> None:
    assert calibrate.share(8, 16384, 512) == pytest.approx(0.0967, abs=1e-3)
    with pytest.raises(UserError, match="window of 512"):
        calibrate.share(8, 1024, 512)
