"""From the jobs' files to the tables: every repeat in one, every cell with medians and intervals in the other."""

from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvbench import files, limits, tables
from kvbench.intervals import interval, noise
from kvbench.roofline import Rates, read_rates

MEASURED = (
    "ttft_s tpot_s decode_tokens_per_s prefill_tokens_per_s article_tokens_per_s kv_cache_bytes"
    " kv_cache_allocated_bytes kv_cache_full_bytes kv_compression_factor peak_prefill_bytes peak_generation_bytes"
    " mbu mfu energy_j_per_token"
).split()
"""Columns that have an interval beside them; what was not measured is null."""

_NAMES = ["model", "method", "variant", "workload"]
_SHAPE = ["batch_size", "prompt_tokens", "new_tokens"]
_HOW = ["engine", "protocol", "device"]
_KIND = {
    **dict.fromkeys(_SHAPE, pa.int64()),
    "repeats": pa.int64(),
    "repeat": pa.int64(),
    "simulated": pa.bool_(),
}

_CONDITIONS = ["sm_clock_mhz", "temperature_c", "power_w", "reserved_bytes", "reserved_prefill_bytes"]
"""What the device was like in a cell's runs: their median."""

_KEPT = ["kept_fraction", "kept_fraction_end"]
"""Share of the uncompressed cache's bytes that can be read: after the prompt; after the last token, if that differs."""

_FACTS = ["window", "block_size"]
"""What a method says of its own cache, in tokens."""

_ONCE = ["weights_bytes", "process_bytes", "import_s", "load_s", "work_s", "tokenization_s"]
"""What a job tells once."""

_EXTRA = [
    *("total_s", "itl_p50_s", "itl_p99_s", "peak_decode_bytes", "kv_cache_end_bytes", "memory_clock_mhz"),
    *_CONDITIONS,
    *_ONCE,
]

STATS = pa.schema(
    [(name, _KIND.get(name, pa.string())) for name in _NAMES + _SHAPE + _HOW]
    + [
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("repeats", pa.int64()),
        ("simulated", pa.bool_()),
    ]
    + [(name, pa.float64()) for name in MEASURED]
    + [(f"{name}_{end}", pa.float64()) for name in MEASURED for end in ("low", "high")]
    + [("baseline", pa.string()), ("attention", pa.string()), ("article_warm_tokens_per_s", pa.float64())]
    + [
        (name, pa.float64())
        for latency in ("itl_p50_s", "itl_p99_s")
        for name in (latency, f"{latency}_low", f"{latency}_high")
    ]
    + [
        ("ttft_noise", pa.float64()),
        ("tpot_noise", pa.float64()),
        ("interval_share", pa.float64()),
        ("settled", pa.bool_()),
    ]
    + [("throttled_repeats", pa.int64()), ("throttled", pa.bool_()), ("slowed_by", pa.string())]
    + [(name, pa.float64()) for name in _CONDITIONS + _ONCE]
    + [("load_state", pa.string())]
    + [("largest_batch", pa.int64()), ("longest_prompt_tokens", pa.int64())]
    + [("dtype", pa.string()), *((name, pa.float64()) for name in limits.COLUMNS)]
    + [*((name, pa.float64()) for name in _KEPT), *((name, pa.int64()) for name in _FACTS)]
)

MEASUREMENTS = pa.schema(
    [(name, _KIND.get(name, pa.string())) for name in _NAMES + _SHAPE + _HOW]
    + [
        ("repeat", pa.int64()),
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("simulated", pa.bool_()),
    ]
    + [(name, pa.float64()) for name in MEASURED + _EXTRA]
    + [
        ("warmup_runs", pa.int64()),
        ("throttled", pa.bool_()),
        ("slowed_by", pa.string()),
        ("attention", pa.string()),
        ("dtype", pa.string()),
        ("tokens_sha256", pa.string()),
    ]
    + [*((name, pa.float64()) for name in _KEPT), *((name, pa.int64()) for name in _FACTS)]
    + [("token_times_s", pa.list_(pa.float64()))]
)

Row = dict[str, Any]


def merge(plan: dict[str, Any], folder: Path) -> tuple[list[Row], list[Row]]:
    """Read every cell's files and return the rows of measurements and of stats.

    Parameters
    ----------
    plan : ``cells``, each with model, method, variant, baseline, workload and its sizes; and ``protocol``.
    folder : the results folder that holds ``prefill``, ``generation`` and ``device/rates.json``.
    """
    rates = read_rates(folder / "device" / "rates.json")
    measurements, stats = [], []
    for cell in plan["cells"]:
        repeats, facts = _repeats(cell, plan["protocol"], folder, rates)
        measurements += repeats
        stats.append(_summary(cell, repeats, facts) | _capacity(cell, plan["protocol"], folder))
    return measurements, stats


def write(plan: dict[str, Any], folder: Path, outputs: dict[str, Path], provenance: dict[str, Any]) -> None:
    """Write measurements.parquet, stats.parquet and stats.csv (``outputs`` by these stems)."""
    import pyarrow.csv

    measurements, stats = merge(plan, folder)
    provenance = provenance | _machine(plan, folder)
    tables.write(outputs["measurements"], pa.Table.from_pylist(measurements, MEASUREMENTS), provenance)
    table = pa.Table.from_pylist(stats, STATS)
    tables.write(outputs["stats"], table, provenance)
    with files.atomic(outputs["csv"]) as temporary:
        pyarrow.csv.write_csv(table, temporary)


def _machine(plan: dict[str, Any], folder: Path) -> Row:
    """What the first cell's job ran on; every cell of a run has the same but for a change since."""
    cell = plan["cells"][0]
    return tables.machine_of(folder / "generation" / cell["model"] / cell["method"] / f"{cell['workload']}.parquet")


def _repeats(cell: Row, protocol: Row, folder: Path, rates: dict[str, Rates]) -> tuple[list[Row], Row]:
    """One row a repeat: generation joined with the prefill job's cache bytes, peak and (article) times; job's facts."""
    variant = Path(cell["model"], cell["method"])
    prefill = files.read_json(folder / "prefill" / variant / f"{cell['workload']}.json")
    file = folder / "generation" / variant / f"{cell['workload']}.parquet"
    generation, facts = pq.read_table(file).to_pylist(), tables.provenance_of(file)
    bad = next((r for r in (generation[0], prefill) if r["status"] != "ok"), None)
    known = {name: cell[name] for name in _NAMES + _SHAPE} | {
        "engine": facts.get("engine"),
        "protocol": protocol["name"],
        "device": facts.get("device"),
        "status": bad["status"] if bad else "ok",
        "status_reason": bad["status_reason"] if bad else None,
        "attention": facts.get("attention"),
        "dtype": facts.get("dtype"),
    }
    known |= {name: facts.get(name) for name in _ONCE}
    known["tokenization_s"] = facts.get("workload", {}).get("tokenization_s")
    cache = _cache(prefill["repeats"][-1] if prefill["repeats"] else {})
    end = generation[0].get("kv_cache_end_bytes")
    if generation[0].get("simulated") is not None:  # it acts while decoding, so what holds is what it came to
        cache["simulated"] = generation[0]["simulated"]
    measured = protocol["name"] == "standard" and bad is None
    limit = limits.of_cell(cell, cache | {"kv_cache_end_bytes": end}, facts, rates) if measured else None
    return [
        known
        | cache
        | _peak(row, prefill["repeats"])
        | _timed(row, prefill["repeats"], protocol["name"], cell)
        | (limit.of_repeat(row["ttft_s"], row["tpot_s"]) if limit else {})
        | {"repeat": row["repeat"]}
        for row in generation
    ], facts


def _cache(record: Row) -> Row:
    """Cache bytes and their ratio, as the prefill left them, and what its method says of them."""
    full, live, allocated = (record.get(f"kv_cache_{kind}bytes") for kind in ("full_", "", "allocated_"))
    return {
        "kv_cache_bytes": live,
        "kv_cache_allocated_bytes": allocated,
        "kv_cache_full_bytes": full,
        "kv_compression_factor": full / live if full and live else None,
        "reserved_prefill_bytes": record.get("reserved_prefill_bytes"),
        "simulated": record.get("simulated"),
        "kept_fraction": record.get("kept_fraction"),
        **{name: record.get("facts", {}).get(name) for name in _FACTS},
    }


def _peak(row: Row, prefills: list[Row]) -> Row:
    """The peak of the prefill in the same place, the last where generations went on for longer."""
    place = min(row["repeat"] or 0, len(prefills) - 1)
    return {"peak_prefill_bytes": prefills[place].get("peak_prefill_bytes") if prefills else None}


def _timed(row: Row, prefills: list[Row], protocol: str, cell: Row) -> Row:
    timed = {key: value for key, value in row.items() if key not in ("status", "status_reason", "repeat", "simulated")}
    if protocol == "article" and row["total_s"] is not None and len(prefills) > row["repeat"]:
        # two runs are timed and subtracted, and N tokens divided by the time of N−1 steps: the article's way
        timed["ttft_s"] = prefills[row["repeat"]]["ttft_s"]
        decode_s = row["total_s"] - timed["ttft_s"]
        tokens = cell["batch_size"] * cell["new_tokens"]
        timed["article_tokens_per_s"] = tokens / decode_s if decode_s > 0 else None
    return timed


def _summary(cell: Row, repeats: list[Row], facts: Row) -> Row:
    """A cell's medians and intervals, over the repeats in which the device held its speed (all, if it never did)."""
    first = repeats[0]
    steady = [r for r in repeats if not r.get("throttled")] or repeats
    about = ["status", "status_reason", "simulated", "attention", "dtype"]
    row = {key: first.get(key) for key in [*_NAMES, *_SHAPE, *_HOW, *about, *limits.COLUMNS, *_KEPT, *_FACTS]}
    row["baseline"] = cell["baseline"] if cell["baseline"] != cell["variant"] else None
    row["repeats"] = len(steady) if first["status"] == "ok" else 0
    cold = first["protocol"] == "article"
    for name in [*MEASURED, "itl_p50_s", "itl_p99_s"]:
        values = _values(steady, name)
        if name == "energy_j_per_token":
            values = facts.get(name) or []
        # the article runs once and cold: its number is the first run's, and the warm ones stand apart
        row[name] = None if not values else values[0] if cold and name in _COLD else median(values)
        row[f"{name}_low"], row[f"{name}_high"] = (None, None) if cold and name in _COLD else interval(values)
    warm = _values(repeats[1:], "article_tokens_per_s")
    row["article_warm_tokens_per_s"] = median(warm) if cold and warm else None
    return row | _conditions(repeats, steady, facts)


def _capacity(cell: Row, protocol: Row, folder: Path) -> Row:
    if not protocol.get("capacity"):
        return {}
    found = files.read_json(folder / "capacity" / cell["model"] / cell["method"] / f"{cell['workload']}.json")
    return {name: found.get(name) for name in ("largest_batch", "longest_prompt_tokens")}


def _conditions(repeats: list[Row], steady: list[Row], facts: Row) -> Row:
    """How far to trust a cell: its noise and stopping rule, and what the device was like."""
    stopping = facts.get("stopping", {})
    row = {
        "ttft_noise": noise(_values(steady, "ttft_s")),
        "tpot_noise": noise(_values(steady, "tpot_s")),
        "interval_share": stopping.get("share"),
        "settled": stopping.get("settled"),
        "throttled_repeats": sum(bool(r.get("throttled")) for r in repeats),
        "throttled": any(r.get("throttled") for r in steady),
        "slowed_by": ", ".join(sorted({r["slowed_by"] for r in repeats if r.get("slowed_by")})) or None,
        "load_state": facts.get("load_state"),
    }
    row |= {name: repeats[0].get(name) for name in _ONCE}
    return row | {name: median(found) if (found := _values(steady, name)) else None for name in _CONDITIONS}


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


_COLD = {"ttft_s", "article_tokens_per_s", "peak_prefill_bytes", "peak_generation_bytes"}


def missing(stats: Path) -> list[str]:
    """One line for each cell that was not measured, with its reason; what a run prints at its end."""
    columns = ["variant", "workload", "status", "status_reason"]
    rows = pq.read_table(stats, columns=columns).to_pylist()
    return [
        f"{row['variant']} on {row['workload']}: {row['status']}: {row['status_reason']}"
        for row in rows
        if row["status"] != "ok"
    ]
