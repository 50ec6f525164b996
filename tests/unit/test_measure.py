"""When repeats end, and which of them count."""

import hashlib
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from kvbench import decode, energy, engines, measure, methods
from kvbench.intervals import noise
from kvbench.measure import Effort
from kvbench.nvml import Watch


def repeat(times: list[float], effort: Effort, throttled: list[bool] | None = None) -> dict[str, Any]:
    values, slow = cycle(times), cycle(throttled or [False])
    return measure._until_settled(lambda: {"t": next(values), "throttled": next(slow)}, ("t",), effort, "runs")


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=20), st.integers(1, 12), st.floats(0.001, 0.5))
def test_repeats_end_at_the_asked_precision_or_at_the_cap(times: list[float], least: int, share: float) -> None:
    measured = repeat(times, Effort(least, 30, share, 1))
    taken = [record["t"] for record in measured["repeats"]]
    assert least <= len(taken) <= 30
    wide = (noise(taken) or 0) > share
    assert measured["settled"] is not wide
    assert len(taken) == 30 or not wide
    if len(taken) > least:
        assert (noise(taken[:-1]) or 0) > share, "one run more than needed"


def test_a_throttled_run_is_marked_and_another_takes_its_place() -> None:
    measured = repeat([1.0], Effort(6, 30, 0.01, 1), [True, False])
    assert [record["throttled"] for record in measured["repeats"]].count(False) == 6
    hopeless = repeat([1.0], Effort(6, 9, 0.01, 1), [True])
    assert len(hopeless["repeats"]) == 9 and not hopeless["settled"]


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(i) for i in range(1, 100)]
    assert (measure._percentile(values, 50), measure._percentile(values, 99)) == (50.0, 99.0)
    assert measure._percentile([7.0], 99) == 7.0


@pytest.mark.parametrize("name", ["hf", "graph"])
def test_a_generation_has_every_latency(name: str) -> None:
    batch = measure.Batch(tiny.ids(2, 40), None, 5, 0)
    engine = engines.engine(name, torch.device("cpu"))
    done = measure.generation_standard(tiny.model(), batch, methods.Dense(), Effort(3, 3, 0.9, 1), engine, Watch(None))
    for row in done["repeats"]:
        times = row["token_times_s"]
        assert len(times) == 5 and times == sorted(times)
        assert row["itl_p50_s"] <= row["itl_p99_s"] <= times[-1] - times[0]
        assert row["tpot_s"] == pytest.approx((times[-1] - times[0]) / 4)
    assert len({row["tokens_sha256"] for row in done["repeats"]}) == 1
    assert energy.per_token(tiny.model(), batch, methods.Dense(), engine, None) is None


def test_a_packed_engine_can_decode_the_same_again() -> None:
    engine, model = engines.engine("graph", torch.device("cpu")), tiny.model()
    assert engine.again() is None  # nothing was decoded yet
    first = engine.generate(model, tiny.ids(2, 40), methods.Dense(), 6, lambda: None, lambda _: None)
    assert engine.again() == 5
    assert isinstance(engine, engines.Packed) and engine.state is not None
    assert engine.state.tokens.tolist() == first.tokens.tolist()
    assert engines.engine("hf", torch.device("cpu")).again() is None


def test_in_the_articles_way_an_unpadded_prompt_may_hold_the_paddings_id() -> None:
    model, ids = tiny.model(), tiny.ids(2, 30)
    before = model.generation_config.to_dict()
    batch = measure.Batch(ids, None, 6, int(ids[0, 12]))
    (run,) = measure.generation_article(model, batch, methods.Dense(), Effort(1, 1, 0.05, 1))["repeats"]
    model.generation_config.update(**before)
    tokens = decode.generate(model, ids, methods.Dense(), 6).tokens
    assert run["tokens_sha256"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
