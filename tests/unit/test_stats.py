"""The tables: medians, intervals, and rows for what was not measured."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from kvbench import cells, intervals, limits, stats, tables

CELL = {
    "model": "m", "method": "knorm", "variant": "knorm", "baseline": "baseline", "workload": "w",
    "batch_size": 2, "prompt_tokens": 10, "new_tokens": 5,
}  # fmt: skip
FACTS = {"engine": "hf", "device": "cpu: x (2 threads)", "attention": "sdpa", "load_s": 1.0}


def plan(protocol: str = "standard", **cell: Any) -> dict[str, Any]:
    return {"cells": [CELL | cell], "protocol": {"name": protocol}}


def write(
    folder: Path, generation: list[dict[str, Any]], prefill: dict[str, Any], facts: dict[str, Any] | None = None
) -> None:
    (folder / "prefill/m/knorm").mkdir(parents=True)
    (folder / "prefill/m/knorm/w.json").write_text(json.dumps(prefill))
    rows = [{"repeat": i, "status": "ok"} | row for i, row in enumerate(generation)]
    tables.write(
        folder / "generation/m/knorm/w.parquet", pa.Table.from_pylist(rows, cells.GENERATION), FACTS | (facts or {})
    )


def prefill(status: str = "ok", reason: str | None = None, **repeat: Any) -> dict[str, Any]:
    cache = {
        "kv_cache_bytes": 100,
        "kv_cache_allocated_bytes": 120,
        "kv_cache_full_bytes": 200,
        "ttft_s": 1.0,
        "kept_fraction": 0.5,
        "simulated": False,
    }
    repeats = [cache | repeat] * 3 if status == "ok" else []
    return {"status": status, "status_reason": reason, "repeats": repeats}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_the_interval_is_that_of_the_sign_test(values: list[float]) -> None:
    low, high = intervals.interval(values)
    n, ordered = len(values), sorted(values)
    if n == 1:
        assert (low, high) == (None, None)
    elif n < 6:
        assert (low, high) == (ordered[0], ordered[-1])
    else:
        k = int(binom.ppf(0.025, n, 0.5))
        outside = k if binom.cdf(k, n, 0.5) <= 0.025 else k - 1
        assert (low, high) == (ordered[outside], ordered[n - 1 - outside])


def test_a_cell_is_the_median_of_its_repeats(tmp_path: Path) -> None:
    write(tmp_path, [{"ttft_s": t, "kv_cache_end_bytes": 150} for t in (3.0, 1.0, 2.0)], prefill())
    measurements, (row,) = stats.merge(plan(), tmp_path)
    assert [m["ttft_s"] for m in measurements] == [3.0, 1.0, 2.0]
    assert (row["ttft_s"], row["ttft_s_low"], row["ttft_s_high"], row["repeats"]) == (2.0, 1.0, 3.0, 3)
    assert (row["kv_cache_bytes"], row["kv_cache_allocated_bytes"], row["kv_compression_factor"]) == (
        100,
        120,
        2.0,
    )
    assert row["simulated"] is False and row["baseline"] == "baseline" and row["mbu"] is None


def test_throttled_repeats_are_kept_apart(tmp_path: Path) -> None:
    runs = [{"ttft_s": 1.0, "tpot_s": 0.1, "throttled": False}] * 2
    runs += [{"ttft_s": 9.0, "tpot_s": 0.9, "throttled": True, "slowed_by": "hardware thermal slowdown"}]
    write(tmp_path, runs, prefill())
    measurements, (row,) = stats.merge(plan(), tmp_path)
    assert len(measurements) == 3
    assert (row["ttft_s"], row["ttft_s_high"], row["repeats"], row["throttled_repeats"]) == (1.0, 1.0, 2, 1)
    assert row["slowed_by"] == "hardware thermal slowdown" and row["tpot_noise"] == 0.0


def test_a_cell_that_was_throttled_throughout_still_has_its_numbers(tmp_path: Path) -> None:
    write(tmp_path, [{"ttft_s": 9.0, "throttled": True}] * 3, prefill())
    row = stats.merge(plan(), tmp_path)[1][0]
    assert (row["ttft_s"], row["repeats"], row["throttled_repeats"]) == (9.0, 3, 3)


def test_energy_is_that_of_its_own_windows_and_capacity_what_was_searched(tmp_path: Path) -> None:
    write(tmp_path, [{"ttft_s": 1.0}], prefill(), {"energy_j_per_token": [3.0, 1.0, 2.0]})
    (tmp_path / "capacity/m/knorm").mkdir(parents=True)
    found = {"status": "ok", "largest_batch": 96, "longest_prompt_tokens": 4096}
    (tmp_path / "capacity/m/knorm/w.json").write_text(json.dumps(found))
    asked = plan()
    asked["protocol"]["capacity"] = True
    row = stats.merge(asked, tmp_path)[1][0]
    assert [row[f"energy_j_per_token{end}"] for end in ("", "_low", "_high")] == [2.0, 1.0, 3.0]
    assert (row["largest_batch"], row["longest_prompt_tokens"]) == (96, 4096)


@pytest.mark.parametrize(
    ("prompt", "end", "simulated"), [(True, None, True), (True, False, False), (False, True, True)]
)
def test_what_the_last_token_finds_decides_whether_a_method_is_simulated(
    tmp_path: Path, prompt: bool, end: bool | None, simulated: bool
) -> None:
    write(tmp_path, [{"ttft_s": 1.0, "simulated": end}] * 2, prefill(simulated=prompt))
    repeats, (row,) = stats.merge(plan(), tmp_path)
    assert row["simulated"] is simulated and {repeat["simulated"] for repeat in repeats} == {simulated}


def test_what_a_method_says_of_its_cache_is_carried(tmp_path: Path) -> None:
    facts = {"window": 64, "block_size": 16, "kept_fraction": 0.3, "compression_factor": 3.3}
    write(tmp_path, [{"ttft_s": 1.0, "kept_fraction_end": 0.25}], prefill(kept_fraction=0.3, facts=facts))
    outputs = {name: tmp_path / f"{name}.x" for name in ("measurements", "stats", "csv")}
    stats.write(plan(), tmp_path, outputs, {})
    for name in ("measurements", "stats"):
        (row,) = pq.read_table(outputs[name]).to_pylist()
        assert (row["window"], row["block_size"]) == (64, 16)
        assert (row["kept_fraction"], row["kept_fraction_end"]) == (0.3, 0.25)


@pytest.mark.parametrize("stage", ["prefill", "generation"])
def test_what_was_not_measured_is_a_row_with_nulls(tmp_path: Path, stage: str) -> None:
    bad = {"status": "oom", "status_reason": "tried to allocate 9 GiB"}
    write(
        tmp_path,
        [bad if stage == "generation" else {}],
        prefill(**({"status": "oom", "reason": bad["status_reason"]} if stage == "prefill" else {})),
    )
    outputs = {name: tmp_path / f"{name}.x" for name in ("measurements", "stats", "csv")}
    stats.write(plan(), tmp_path, outputs, {})
    (row,) = pq.read_table(outputs["stats"]).to_pylist()
    assert (row["status"], row["status_reason"], row["repeats"]) == ("oom", bad["status_reason"], 0)
    assert row["ttft_s"] is None and row["energy_j_per_token"] is None
    assert stats.missing(outputs["stats"]) == ["knorm on w: oom: tried to allocate 9 GiB"]


@pytest.mark.parametrize(("protocol", "peak", "ends"), [("standard", 30.0, (10, 30)), ("article", 10.0, (None, None))])
def test_the_prefills_peak_is_that_of_its_own_repeats(
    tmp_path: Path, protocol: str, peak: float, ends: tuple[int | None, int | None]
) -> None:
    record = prefill()
    record["repeats"] = [record["repeats"][0] | {"peak_prefill_bytes": value} for value in (10, 20, 30)]
    write(tmp_path, [{"total_s": 6.0}] * 6, record)
    repeats, (row, *_) = stats.merge(plan(protocol), tmp_path)
    assert [each["peak_prefill_bytes"] for each in repeats] == [10, 20, 30, 30, 30, 30]
    assert row["peak_prefill_bytes"] == peak
    assert (row["peak_prefill_bytes_low"], row["peak_prefill_bytes_high"]) == ends


def test_the_article_divides_all_tokens_by_a_difference_of_two_runs(tmp_path: Path) -> None:
    record = prefill()
    record["repeats"][0] = record["repeats"][0] | {"ttft_s": 2.0}
    write(tmp_path, [{"total_s": total} for total in (6.0, 3.0, 2.0)], record)
    row = stats.merge(plan("article"), tmp_path)[1][0]
    assert row["article_tokens_per_s"] == 2 * 5 / (6.0 - 2.0)  # its first, cold run
    assert row["article_warm_tokens_per_s"] == 7.5  # the median of 10/2 and 10/1
    assert row["ttft_s"] == 2.0 and row["decode_tokens_per_s"] is None


QWEN2 = {
    "model_type": "qwen2", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 10,
}  # fmt: skip
TOKEN = 2 * 2 * 4 * 4
"""Bytes of the keys and values of one token of the two sequences."""


KNORM = {"press": "KnormPress", "args": {"compression_ratio": 0.5}}


def limited(
    folder: Path, protocol: str = "standard", device: str = "cpu: x (2 threads)", spec: dict[str, Any] = KNORM
) -> dict[str, Any]:
    """Stats of a cell that keeps 5 of 10 tokens, on a device whose rates are known under a name."""
    cache = {"kv_cache_bytes": 5 * TOKEN, "kv_cache_allocated_bytes": 5 * TOKEN, "kv_cache_full_bytes": 10 * TOKEN}
    repeats = [{"ttft_s": t, "tpot_s": t, "total_s": 9.0, "kv_cache_end_bytes": 9 * TOKEN} for t in (2.0, 1.0, 4.0)]
    known = {"model_config": QWEN2, "dtype": "torch.float32", "weights_bytes": 4 * PARAMETERS}
    known["variant"] = {"spec": spec}
    write(folder, repeats, prefill(**cache), known)
    measured = {"copy": {"bytes_per_s": 1e3}, "matmul": {"float32": {"flops_per_s": 1e5}}}
    (folder / "device").mkdir()
    (folder / "device/rates.json").write_text(json.dumps({"rates": {device: measured}}))
    return stats.merge(plan(protocol), folder)[1][0]


PARAMETERS = 8 * (2 * 8 + 2 * 4 + 3 * 16) + (2 * 8 + 8 + 2 * 4) + 8 + 2 * 80


def test_every_repeat_is_held_against_the_limits(tmp_path: Path) -> None:
    row = limited(tmp_path)
    cached = 5 + (5 - 2) / 2
    step = 4 * (PARAMETERS - 80 + 2 * 8) + (cached + 1) * TOKEN
    assert row["decode_step_bytes"] == step and row["fastest_tpot_s"] == step / 1e3
    assert (row["mbu"], row["mbu_low"], row["mbu_high"]) == (step / 2e3, step / 4e3, step / 1e3)
    assert row["mfu"] == row["prefill_flops"] / 2e5 and row["fastest_ttft_s"] == row["prefill_bytes"] / 1e3
    assert (row["copy_bytes_per_s"], row["matmul_flops_per_s"], row["dtype"]) == (1e3, 1e5, "torch.float32")


def test_what_dms_skips_of_a_prefill_has_no_count(tmp_path: Path) -> None:
    row = limited(tmp_path, spec={"dms": {"adapter": "somewhere"}})
    assert row["mfu"] is None and row["fastest_ttft_s"] is None and row["prefill_flops"] is None
    assert row["mbu"] is not None and row["fastest_tpot_s"] is not None


@pytest.mark.parametrize("other", [{"protocol": "article"}, {"device": "another"}], ids=["article", "device"])
def test_limits_are_null_where_they_are_not_known(tmp_path: Path, other: dict[str, str]) -> None:
    row = limited(tmp_path, **other)
    assert row["status"] == "ok"
    assert {row[name] for name in ["mbu", "mbu_low", "mfu", *limits.COLUMNS]} == {None}


def test_the_contract_of_the_columns() -> None:
    assert (
        stats.STATS.names[:28]
        == (
            "model method variant workload batch_size prompt_tokens new_tokens engine protocol device status"
            " status_reason repeats simulated ttft_s tpot_s decode_tokens_per_s prefill_tokens_per_s"
            " article_tokens_per_s kv_cache_bytes kv_cache_allocated_bytes kv_cache_full_bytes kv_compression_factor"
            " peak_prefill_bytes peak_generation_bytes mbu mfu energy_j_per_token"
        ).split()
    )
    assert {f"{name}_{end}" for name in stats.MEASURED for end in ("low", "high")} < set(stats.STATS.names)
