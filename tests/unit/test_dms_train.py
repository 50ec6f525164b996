"""Training: the original stays, the model learns, what is asked is done, and a run goes on as if nothing had been."""

import copy
import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dms_reference
import tiny
from kvbench.dms import evict, train
from kvbench.dms.attention import ATTENTION
from kvbench.dms.cache import CompactCache
from kvbench.dms.corpus import Corpus
from kvbench.dms.judge import divergence, judge
from kvbench.dms.student import Student
from kvbench.dms.train import Trainer, asked, batch_rows, rate
from kvbench.errors import Unsupported, UserError
from kvbench.options import CONTINUATION, Retrofit

WINDOW, TOKENS = 6, 48


def nothing(*_: Any) -> None:
    return None


def wanted(**changes: Any) -> Retrofit:
    given = {
        "model": "tiny", "window": WINDOW, "cr": 3.0, "lora_rank": 2, "steps": 24, "batch_size": 3, "tokens": TOKENS,
        "head_learning_rate": 6e-3, "evaluations": 3, "checkpoint_steps": 10,
    }  # fmt: skip
    return Retrofit(**given | changes)


def student(settings: Retrofit, architecture: str = "Llama") -> Student:
    model = copy.deepcopy(tiny.model(architecture))
    return Student(model, settings.window, settings.lora_rank, settings.whole_model, settings.seed)


def corpus() -> Corpus:
    """Tokens drawn at random."""
    draw = np.random.default_rng(0)

    def sequences(count: int, tokens: int) -> np.ndarray:
        return draw.integers(1, 300, (count, tokens)).astype(np.int32)

    return Corpus(sequences(200, TOKENS), np.arange(200), {"held": sequences(4, TOKENS + CONTINUATION)}, {})


def trainer(settings: Retrofit, made: Student | None = None, keep: Any = nothing, save: Any = nothing) -> Trainer:
    return Trainer(made or student(settings), corpus(), settings, keep, save, time.perf_counter())


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 5))
def test_every_sequence_comes_once_before_any_comes_twice(size: int, count: int, seed: int) -> None:
    steps = math.ceil(3 * count / size)
    read = np.concatenate([batch_rows(step, size, count, seed) for step in range(steps)])
    for turn in range(3):
        assert Counter(read[turn * count : (turn + 1) * count].tolist()) == Counter(range(count))
    assert np.array_equal(batch_rows(2, size, count, seed), batch_rows(2, size, count, seed))


@given(st.integers(1, 5000), st.floats(1.5, 12), st.floats(0.1, 1))
def test_what_is_asked_grows_and_the_rate_rises_and_falls(steps: int, cr: float, ramp: float) -> None:
    settings = wanted(cr=cr, ramp=ramp, tokens=1024)
    factors = [asked(settings, step, steps) for step in range(steps + 1)]
    assert factors == sorted(factors) and factors[0] == 1 and factors[-1] == pytest.approx(cr)
    rates = [rate(step, steps) for step in range(steps)]
    assert all(0 < one <= 1 for one in rates)
    if steps >= 100:
        assert max(rates) == 1 and rates[0] < 1 and rates[-1] == pytest.approx(0, abs=0.02)


@given(st.integers(2, 5000), st.floats(0.1, 1), st.floats(0.01, 1), st.floats(0.01, 1))
def test_evictions_harden_after_the_ramp(steps: int, ramp: float, first: float, last: float) -> None:
    settings = wanted(ramp=ramp, temperature=first, last_temperature=last)
    found = [train.temperature(settings, step, steps) for step in range(steps)]
    soft = [one for step, one in enumerate(found) if step <= ramp * steps]
    assert soft == pytest.approx([first] * len(soft)) and found == sorted(found, reverse=last < first)
    if ramp * steps <= steps - 2:
        assert found[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    "kind", [{}, {"lora_rank": None}, {"lora_rank": None, "whole_model": True}], ids=["lora", "heads", "whole"]
)
def test_the_original_stays_while_the_model_learns(kind: dict[str, Any]) -> None:
    settings = wanted(head_learning_rate=1e-2, **kind)
    made, ids = student(settings), tiny.ids(2, 30)
    expected = tiny.model()(ids).logits
    running = trainer(settings, made)
    before = {name: value.detach().clone() for name, value in made.trained.items()}
    running.run()
    torch.testing.assert_close(made.original.head(made.teach(ids)), expected, atol=1e-5, rtol=1e-4)
    changed = made.net.head(made.ignore(ids))
    assert torch.allclose(changed, expected, atol=1e-5) == (kind == {"lora_rank": None})
    moved = [name for name, value in made.trained.items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    last = [row for row in running.rows if row["corpus"] == "held"][-1]
    assert last["step"] == 24 and last["kept_fraction"] < 0.55 and last["kl"] > 0
    assert (last["kl_off"] == pytest.approx(0, abs=1e-9)) == (kind == {"lora_rank": None})


def test_the_divergence_falls_where_everything_is_evicted() -> None:
    settings = wanted(steps=60, batch_size=8, head_learning_rate=1e-9, learning_rate=3e-3, lora_rank=8, dense_share=0.0)
    model = copy.deepcopy(tiny.model())
    with torch.no_grad():
        for layer in model.model.layers:  # what it looks back for, it can miss
            for part in (layer.self_attn.v_proj, layer.self_attn.o_proj):
                part.weight.mul_(8)
    made = Student(model, WINDOW, settings.lora_rank, False, 0)
    made.heads.bias.data.fill_(0.2)
    running = trainer(settings, made)
    running.run()
    held = [row["kl"] for row in running.rows if row["corpus"] == "held"]
    assert held[-1] < 0.85 * held[0]


def test_judging_obeys_the_rule_and_counts_what_a_cache_keeps() -> None:
    settings = wanted(lora_rank=None)
    made, ids, prefix = student(settings), tiny.ids(3, 90), 70
    heads = dms_reference.heads(0.4, WINDOW)
    made.heads.load_state_dict(heads.state_dict())
    model = dms_reference.model("Llama")
    expected = dms_reference.Reference(model, heads, ids)
    assert expected.clear()
    hidden, kept = made.obey(ids, prefix)
    torch.testing.assert_close(made.net.head(hidden), expected.logits, atol=2e-5, rtol=1e-4)
    cache = CompactCache(WINDOW)
    with torch.no_grad(), evict.attached(model, heads, ATTENTION):
        model(ids[:, :prefix], past_key_values=cache, use_cache=True)
    assert kept == pytest.approx(cache.kept_fraction(), abs=1e-6)
    verdict = judge(made, ids, prefix, 2)
    full = model(ids).logits[:, prefix:].detach()
    found = expected.logits[:, prefix:]
    assert verdict.kl == pytest.approx(float(divergence(full, found).mean()), rel=1e-3)
    assert verdict.top1_agreement == pytest.approx(float((full.argmax(-1) == found.argmax(-1)).float().mean()))
    assert verdict.kept_fraction == pytest.approx(kept, abs=1e-6) and verdict.kl_off == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_gradients_are_the_same_where_memory_is_saved(architecture: str) -> None:
    settings, found = wanted(), []
    for saves in (False, True):
        running = trainer(settings, student(settings, architecture))
        running.student.heads.bias.data.fill_(0.04)
        if saves:
            running.student.save_memory()
        running.optimizer.step = nothing  # type: ignore[method-assign]
        running._train()
        found.append([value.grad for value in running.student.trained.values()])
    assert any(bool(grad.any()) for grad in found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_without_evictions_get_no_penalty() -> None:
    made, ids = student(wanted()), tiny.ids(3, 30)
    made.heads.bias.data.fill_(0.2)
    hidden, evicted = made.learn(ids, torch.tensor(0.3), torch.tensor(1))
    plain = made.ignore(ids)
    torch.testing.assert_close(hidden[0], plain[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(hidden[1], plain[1], atol=1e-3) and bool((evicted[..., :-1] > 0.9).all())


@pytest.mark.parametrize(
    ("size", "share", "each"), [(4, 0.125, {0, 1}), (8, 0.125, {1}), (3, 0.0, {0}), (5, 0.5, {2, 3})]
)
def test_the_share_of_rows_without_evictions_is_that_of_all_steps(size: int, share: float, each: set[int]) -> None:
    found = [train.whole_rows(step, size, share) for step in range(200)]
    assert set(found) == each and sum(found) == round(200 * size * share)


def test_a_run_that_stopped_goes_on_to_the_same_end() -> None:
    settings, states = wanted(), []
    whole = trainer(settings, save=lambda state: states.append(copy.deepcopy(state)))
    whole.run()
    assert [state["step"] for state in states] == [10, 20]
    again = trainer(settings)
    again.restore(states[0])
    again.run()
    for name, value in whole.student.trained.items():
        assert torch.equal(value, again.student.trained[name]), name

    def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert timeless(again.rows) == timeless(whole.rows) and again.seconds > states[0]["seconds"]


def test_milestones_are_kept_when_they_are_passed_and_the_end_always() -> None:
    kept: list[tuple[float | None, float]] = []
    settings = wanted(cr=5.0)
    trainer(settings, keep=lambda factor, rows: kept.append((factor, rows[0]["asked_compression"]))).run()
    assert [factor for factor, _ in kept] == [2.0, 4.0, None]
    assert all(factor is None or factor <= at for factor, at in kept) and kept[-1][1] == 5.0


def test_a_run_that_ends_where_it_would_save_leaves_no_state_that_lacks_the_end() -> None:
    states: list[int] = []
    trainer(wanted(steps=20), save=lambda state: states.append(state["step"])).run()
    assert states == [10]


def test_milestones_that_a_shortened_run_leaps_over_are_kept() -> None:
    kept: list[float | None] = []
    settings = wanted(cr=5.0, steps=10**6, max_seconds=1e-3, batch_size=1, evaluations=1)
    trainer(settings, keep=lambda factor, rows: kept.append(factor)).run()
    assert kept == [2.0, 4.0, None]


def test_what_is_judged_is_what_will_be_saved() -> None:
    made = student(wanted())
    weights = {name: torch.randn_like(value) for name, value in made.trained.items()}
    for name, value in made.trained.items():
        value.data.copy_(weights[name])
    with made.rounded():
        for name, value in made.trained.items():
            heads = name.startswith("heads.")
            assert torch.equal(value, weights[name] if heads else weights[name].bfloat16().float())
    assert all(torch.equal(value, weights[name]) for name, value in made.trained.items())


def test_out_of_memory_costs_time_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    running = trainer(wanted(steps=3))
    train_once, calls = running._train, []

    def scarce() -> Any:
        calls.append(running.student.net.saves_memory)
        if not running.student.net.saves_memory:
            raise torch.OutOfMemoryError("no room")
        return train_once()

    monkeypatch.setattr(running, "_train", scarce)
    running.run()
    assert calls == [False, True, True, True]
    monkeypatch.setattr(running, "_train", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        running._attempt()


def test_a_run_is_shortened_to_what_its_seconds_allow() -> None:
    running = trainer(wanted(steps=10**6, max_seconds=1e-3, batch_size=1, evaluations=1))
    running.run()
    assert running.steps == running.step == train.TIMED[1] + 1
    assert asked(running.settings, running.step, running.steps) == 3.0


def test_a_divergence_that_is_no_number_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"diverged at step \d+.*learning_rate"):
        trainer(wanted(learning_rate=1e30, steps=40, lora_rank=2)).run()


def test_an_architecture_that_dms_does_not_know_is_refused() -> None:
    with pytest.raises(Unsupported, match="phi3"):
        student(wanted(), "Phi3")
