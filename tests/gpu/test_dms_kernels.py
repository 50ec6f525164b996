"""DMS on a GPU: its kernels give what the plain forms give, and its steps need no word from the host."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import dms_reference
import tiny
from kvbench import engines, methods, ragged
from kvbench.cache import cache_bytes
from kvbench.dms import evict, prefill
from kvbench.dms.cache import CompactCache
from kvbench.dms.layer import anchor
from kvbench.dms.partition import Partition
from kvbench.ragged import BLOCK, UNIT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [  # rows, KV heads, group, tokens, head_dim, window, kept
    (1, 1, 1, 1, 16, 3, 0.5),
    (1, 1, 1, 33, 16, 1, 0.5),
    (2, 2, 2, 700, 64, 5, 0.3),
    (1, 2, 3, 1000, 128, 40, 0.1),
    (1, 1, 4, 65, 32, 200, 0.0),
    (2, 8, 4, 2100, 128, 512, 0.1),
    (1, 2, 2, 900, 64, 90, 1.0),
]
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 1e-2, "rtol": 2e-2}}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def marked(rows: int, heads: int, tokens: int, keep: float) -> torch.Tensor:
    found = torch.rand(rows, heads, tokens, device="cuda") > keep
    found[..., -1] = False
    return found


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_prompts_kernel_equals_the_masks(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    from kvbench.dms import kernels

    rows, heads, group, tokens, dim, window, keep = shape
    torch.manual_seed(0)
    # the layouts that transformers hands in
    query = randn(rows, tokens, heads * group, dim, dtype=dtype).transpose(1, 2)
    keys, values = randn(rows, heads, tokens, dim, dtype=dtype), randn(rows, tokens, heads, dim, dtype=dtype)
    marks, scale = marked(rows, heads, tokens, keep), dim**-0.5
    values = values.transpose(1, 2)
    expected = prefill.attend_masked(query.float(), keys.float(), values.float(), marks, window, scale)
    found = kernels.sparse_prefill(query, keys, values, Partition.of(marks), window, scale)
    torch.testing.assert_close(found.float(), expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_equals_the_plain_form(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    from kvbench.dms import kernels

    rows, heads, group, tokens, dim, window, keep = shape
    torch.manual_seed(0)
    keys, values = randn(rows, heads, tokens, dim, dtype=dtype), randn(rows, heads, tokens, dim, dtype=dtype)
    parts = Partition.of(marked(rows, heads, tokens, keep))
    plain, fast = CompactCache(window), CompactCache(window)
    for cache in (plain, fast):
        cache.take(keys, values, parts)
    made = evict.Heads(1, heads, 96, window).cuda()
    made.weight.data.normal_()
    for _ in range(80):
        query, hidden = randn(rows, heads * group, 1, dim, dtype=dtype), randn(rows, 1, 96, dtype=dtype)
        key = randn(rows, heads, 1, dim, dtype=dtype)
        value = randn(rows, 1, 3 * heads, dim, dtype=dtype)[:, :, heads : 2 * heads].transpose(1, 2)
        plain.reserve()
        fast.reserve()
        slow, layer = plain.layers[0], fast.layers[0]
        slow.append(key, value, made.logits(0, hidden)[..., 0] > 0)
        read = [part.float() for part in slow.read()]
        expected = ragged.attend_padded(query.float(), *read, slow.lengths, dim**-0.5)
        arguments = (hidden, made.weight[0], made.bias[0], anchor(key), layer.table, *layer.books(), dim**-0.5)
        found = kernels.step(query, key, value, *arguments)
        torch.testing.assert_close(found.float(), expected, **CLOSE[dtype])
        for mine, theirs in zip(layer.books(), slow.books(), strict=True):
            assert torch.equal(mine, theirs)
    found = ragged.attend_paged(query, anchor(key), layer.table, layer.lengths, BLOCK * dim, dim**-0.5)
    torch.testing.assert_close(found.float(), expected, **CLOSE[dtype])


def test_the_paged_kernel_reads_any_layout_of_blocks() -> None:
    """A plain packed cache too: keys [batch, heads, slots, dim], values in a tensor of their own."""
    rows, heads, slots, dim = 2, 2, 640, 64
    storage = randn(2, rows, heads, slots, dim)
    keys, values = storage
    query, lengths = randn(rows, 4, 1, dim), torch.tensor([[640, 3], [257, 512]], device="cuda")
    first = (keys.data_ptr() - anchor(keys).data_ptr()) // UNIT
    size = BLOCK * dim * keys.itemsize // UNIT
    table = first + size * torch.arange(rows * heads * slots // BLOCK, device="cuda").view(rows, heads, -1)
    found = ragged.attend_paged(query, anchor(keys), table, lengths, keys.numel(), dim**-0.5)
    torch.testing.assert_close(
        found, ragged.attend_padded(query, keys, values, lengths, dim**-0.5), **CLOSE[torch.float32]
    )


@pytest.mark.parametrize("name", ["hf", "graph", "compile"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_every_engine_decodes_by_the_rule(architecture: str, name: str, tmp_path: Path) -> None:
    heads = dms_reference.heads(0.3, 12)
    evict.save(heads, tmp_path)
    model, dms = copy.deepcopy(tiny.model(architecture)).cuda(), methods.build({"dms": {"adapter": str(tmp_path)}})
    engine = engines.engine(name, torch.device("cuda"))
    for seed in (0, 1):  # the second run replays the first one's graph over another prompt's blocks
        ids = expected = tiny.ids(3, 90, seed).cuda()
        for _ in range(30):
            logits = dms_reference.Reference(model, heads.cuda(), expected).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        found = engine.generate(model, ids, dms, 30, lambda: None, lambda _: None)
        assert found.tokens.tolist() == expected[:, 90:].tolist()


def test_a_step_does_not_wait_for_the_device() -> None:
    keys = randn(2, 2, 300, 64)
    cache = CompactCache(64)
    cache.take(keys, keys, Partition.of(marked(2, 2, 300, 0.3)))
    layer, made = cache.layers[0], evict.Heads(1, 2, 96, 64).cuda()
    cache.reserve()
    from kvbench.dms.attention import step

    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            query, key, hidden = randn(2, 4, 1, 64), randn(2, 2, 1, 64), randn(2, 1, 96)
            step(query, key, key, hidden, made.weight[0], made.bias[0], anchor(key), layer.table, *layer.books(), 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_allocated_is_within_15_percent_of_live_at_qwens_shapes() -> None:
    cache = CompactCache(256)
    for _ in range(2):
        keys = randn(2, 8, 4096, 128, dtype=torch.bfloat16)
        cache.take(keys, keys, Partition.of(marked(2, 8, 4096, 0.1)))
    cache.reserve()
    measured = cache_bytes(cache)
    assert measured.live < measured.allocated <= 1.15 * measured.live
