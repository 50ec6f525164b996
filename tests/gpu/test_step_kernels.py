"""The kernels of a decode step give what transformers' operations give: in float32 closely, in bfloat16 to rounding."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import step_reference
import tiny
from kvbench.fused import Fused
from kvbench.packed import ATTENTION, PackedCache, PackedLayer, attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 4e-2, "rtol": 1.6e-2}}
NO_WORSE = {torch.float32: 2.0, torch.bfloat16: 1.05}
"""How far from the exact results the kernels may be, on average, as a multiple of what transformers' operations are."""
EPS = 1e-6


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def weight(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.rand(size, device="cuda").add(0.5).to(dtype)


def layer(rows: int, kv_heads: int, dim: int, kept: int, dtype: torch.dtype) -> PackedLayer:
    return PackedLayer(randn(rows, kv_heads, kept, dim, dtype=dtype), 48, SimpleNamespace())


def wide(given: Any) -> Any:
    """The same numbers in float64, in tuples too."""
    if isinstance(given, tuple):
        return tuple(map(wide, given))
    return given.double() if isinstance(given, torch.Tensor) else given


def same(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> None:
    for mine, theirs, true in zip(found, expected, exact, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE[mine.dtype])
        errors = [float((one.double() - true).abs().mean()) for one in (mine, theirs)]
        assert errors[0] <= NO_WORSE[mine.dtype] * errors[1] + 1e-9


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3), (8, 4)])
def test_heads_are_normed_rotated_and_stored(
    kv_heads: int, group: int, dim: int, rows: int, normed: bool, dtype: torch.dtype
) -> None:
    from kvbench import step_kernels

    torch.manual_seed(0)
    product = randn(rows, 1, (group + 2) * kv_heads * dim, dtype=dtype)
    angles = randn(rows, 1, dim, dtype=torch.float32)
    turn = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (weight(dim, dtype), weight(dim, dtype), EPS) if normed else None
    found = step_kernels.rotate(product, turn, kv_heads, norms, None)
    plain = step_reference.rotate(product, turn, kv_heads, norms, None)
    same(found, plain, step_reference.rotate(wide(product), wide(turn), kv_heads, wide(norms), None))
    assert found[0].is_contiguous() and found[1].is_contiguous()
    for kept, step in ((1, 0), (16, 7), (29, 18)):
        at = torch.tensor([step], device="cuda")
        mine, theirs = (layer(rows, kv_heads, dim, kept, dtype) for _ in range(2))
        stored = step_kernels.rotate(product, turn, kv_heads, norms, (mine, at))
        assert stored[1] is mine.keys and stored[2] is mine.values and torch.equal(stored[0], found[0])
        expected = step_reference.rotate(product, turn, kv_heads, norms, (theirs, at))
        for one, other, new in zip(stored[1:], expected[1:], found[1:], strict=True):
            assert torch.equal(one[:, :, [kept + step]], new)
            one[:, :, kept + step], other[:, :, kept + step] = 0, 0
            assert torch.equal(one, other)  # and nothing else was touched


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("rows", "size"), [(1, 96), (3, 1024), (64, 12288)])
def test_gates_are_opened(rows: int, size: int, dtype: torch.dtype) -> None:
    from kvbench import step_kernels

    torch.manual_seed(0)
    product = 4 * randn(rows, 1, 2 * size, dtype=dtype)
    product[0, 0, :3] = torch.tensor([-200.0, 0.0, 200.0])
    same([step_kernels.gate(product)], [step_reference.gate(product)], [step_reference.gate(wide(product))])


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 96), (3, 896), (64, 4096)])
def test_sums_are_normed(rows: int, size: int, dtype: torch.dtype) -> None:
    from kvbench import step_kernels

    torch.manual_seed(0)
    hidden, added = 9 * randn(rows, 1, size, dtype=dtype), randn(rows, 1, size, dtype=dtype)
    scale = weight(size, dtype)
    found = step_kernels.add_norm(hidden, added, scale, EPS)
    exact = wide(found[0]), step_reference.norm(wide(found[0]), wide(scale), EPS)
    same(found, step_reference.add_norm(hidden, added, scale, EPS), exact)
    assert torch.equal(found[0], hidden + added)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_steps_of_the_model_are_its_own(architecture: str) -> None:
    model, ids = tiny.model.__wrapped__(architecture).cuda(), tiny.ids(3, 40).cuda()
    with torch.no_grad():
        expected = model(ids).logits[:, 30:]
        cache = PackedCache(model(ids[:, :30]).past_key_values, 10)
        fused, found = Fused(model), []
        with attention(model, ATTENTION), fused.norms_applied(), fused.kernels_applied():
            for place in range(30, 40):
                cache.admit()
                position = torch.full((3, 1), place, device="cuda")
                given = {"cache_position": cache.step, "past_key_values": cache, "packed": cache}
                found.append(model(ids[:, place : place + 1], position_ids=position, **given).logits)
                cache.step.add_(1)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_step_does_not_wait_for_the_device() -> None:
    from kvbench import step_kernels

    dtype = torch.bfloat16
    turn = randn(2, 1, 64, dtype=dtype), randn(2, 1, 64, dtype=dtype)
    into = layer(2, 2, 64, 9, dtype), torch.zeros(1, dtype=torch.long, device="cuda")
    product, hidden, scale = randn(2, 1, 512, dtype=dtype), randn(2, 1, 64, dtype=dtype), weight(64, dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_kernels.rotate(product, turn, 2, (scale, scale, EPS), into)
        step_kernels.gate(product)
        step_kernels.add_norm(hidden, hidden, scale, EPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
