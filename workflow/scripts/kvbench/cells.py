"""The jobs of a cell: its prefill and its generation, from files to files."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvbench import files, jobs, tables
from kvbench.jobs import Job, Ready

SIZES = ("batch_size", "prompt_tokens", "new_tokens")

NOT_TRIED = "not tried"
"""How the reason of a cell begins that was left out because a smaller one had not fitted."""

AUTO_SHARE = {"cuda": 0.01, "cpu": 0.05}
"""How wide an interval of a median may be where the config leaves it open, as a share of the median."""

GENERATION = pa.schema(
    [
        ("repeat", pa.int32()),
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("ttft_s", pa.float64()),
        ("tpot_s", pa.float64()),
        ("itl_p50_s", pa.float64()),
        ("itl_p99_s", pa.float64()),
        ("decode_tokens_per_s", pa.float64()),
        ("prefill_tokens_per_s", pa.float64()),
        ("article_tokens_per_s", pa.float64()),
        ("total_s", pa.float64()),
        ("token_times_s", pa.list_(pa.float64())),
        ("peak_generation_bytes", pa.int64()),
        ("peak_decode_bytes", pa.int64()),
        ("reserved_bytes", pa.int64()),
        ("kv_cache_end_bytes", pa.int64()),
        ("kept_fraction_end", pa.float64()),
        ("simulated", pa.bool_()),
        ("tokens_sha256", pa.string()),
        ("warmup_runs", pa.int32()),
        ("sm_clock_mhz", pa.float64()),
        ("memory_clock_mhz", pa.float64()),
        ("temperature_c", pa.float64()),
        ("power_w", pa.float64()),
        ("slowed_by", pa.string()),
        ("throttled", pa.bool_()),
    ]
)


def prefill(job: Job, workload: Path) -> None:
    """Measure a cell's prefill and write its JSON record."""

    def work(facts: dict[str, Any]) -> dict[str, Any]:
        ready, batch, effort = _begin(job, facts, workload)
        from kvbench import engines, measure

        if job.protocol["name"] == "article":
            return measure.prefill_article(ready.model, batch, ready.method, effort)
        engine = engines.engine(job.protocol["engine"], batch.input_ids.device)
        facts["engine"] = engine.name
        record = measure.prefill_standard(ready.model, batch, ready.method, effort, engine, _watch(batch))
        _must_be_as_counted(job, ready.model, batch, record["repeats"][-1]["kv_cache_bytes"])
        return record

    def write(status: str, reason: str | None, facts: dict[str, Any], result: dict[str, Any] | None) -> None:
        record = {
            "status": status,
            "status_reason": reason,
            "repeats": [],
            **(result or {}),
            "provenance": facts,
        }
        files.write_json(job.output, record)

    jobs.run(job, work, write)


def generation(job: Job, workload: Path) -> None:
    """Measure a cell's generation and write one row a repeat."""

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        ready, batch, effort = _begin(job, facts, workload)
        from kvbench import energy, measure

        if job.protocol["name"] == "article":
            return list(measure.generation_article(ready.model, batch, ready.method, effort)["repeats"])
        engine, watch = _engine(job.protocol["engine"], ready, facts), _watch(batch)
        measured = measure.generation_standard(ready.model, batch, ready.method, effort, engine, watch)
        facts |= {"process_bytes": measured["process_bytes"]}
        facts["stopping"] = {"share": effort.share, "settled": measured["settled"]}
        if job.protocol["energy"]:
            facts["energy_j_per_token"] = energy.per_token(ready.model, batch, ready.method, engine, watch.gpu)
        return list(measured["repeats"])

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[dict[str, Any]] | None) -> None:
        rows = [row | {"repeat": i} for i, row in enumerate(result or [{}])]
        rows = [row | {"status": status, "status_reason": reason} for row in rows]
        tables.write(job.output, pa.Table.from_pylist(rows, GENERATION), facts)

    jobs.run(job, work, write)


def capacity(job: Job, workload: Path) -> None:
    """Search the largest batch and the longest prompt of a cell's variant and write what was found."""

    def work(facts: dict[str, Any]) -> dict[str, Any]:
        from kvbench import capacity

        facts["workload"] = sizes = tables.provenance_of(workload)
        shape = capacity.Shape(*(sizes[name] for name in SIZES))
        ready = jobs.ready(job, facts)
        # compiling a step for every size would take minutes, and the captured one needs the same buffers
        name = "graph" if job.protocol["engine"] == "compile" else job.protocol["engine"]
        return capacity.search(ready.model, ready.method, shape, _engine(name, ready, facts))

    def write(status: str, reason: str | None, facts: dict[str, Any], result: dict[str, Any] | None) -> None:
        record = {"status": status, "status_reason": reason, "provenance": facts}
        files.write_json(job.output, record | (result or {}))

    jobs.run(job, work, write)


def _begin(job: Job, facts: dict[str, Any], workload: Path) -> tuple[Ready, Any, Any]:
    """What a cell that is worth a try needs: the model and a method that takes its rows, the batch, the effort."""
    sizes = tables.provenance_of(workload)
    _must_be_tried(job, facts, sizes)
    facts["workload"] = sizes
    ready, batch = jobs.ready(job, facts), _batch(workload, facts)
    ready.method.check(ready.model, len(batch.input_ids))
    return ready, batch, _effort(job, batch)


def _engine(name: str, ready: Ready, facts: dict[str, Any]) -> Any:
    """An engine by its name; it and the attention kernels that run with it are added to the facts."""
    from kvbench import engines

    engine = engines.engine(name, ready.model.device)
    facts |= {"engine": engine.name, "attention": _kernels(facts["attention"], ready.method, engine)}
    return engine


def _kernels(own: str, method: Any, engine: Any) -> str:
    """Which attention kernels a cell runs: the model's ``own``, an engine's for decode, or a method's for both."""
    if method.attention is not None:
        return str(method.attention)
    return own if engine.attention is None else f"{own}, decode {engine.attention}"


def _must_be_tried(job: Job, facts: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Refuse a cell when one of the same variant that is no larger has run out of memory on such a device.

    Raises
    ------
    MemoryError : which cell that was.
    """
    for file in sorted(set(job.output.parent.glob(f"*{job.output.suffix}")) - {job.output}):
        status, reason, known = _outcome(file)
        alike = all(known.get(key) == facts[key] for key in ("variant", "loading", "protocol", "device", "code"))
        other = known.get("workload") or {}
        if status != "oom" or not alike or reason.startswith(NOT_TRIED) or not other:
            continue
        if all(other[name] <= sizes[name] for name in SIZES):
            raise MemoryError(f"{NOT_TRIED}: {file.stem}, which is no larger, ran out of memory on this device")


def _must_be_as_counted(job: Job, model: Any, batch: Any, live_bytes: int) -> None:
    """Fail the cell where its cache has other bytes than its kept tokens should take, in closed form."""
    from kvbench import architecture, kept

    config, (rows, tokens) = architecture.describe(model.config), batch.input_ids.shape
    kept.check_cache(live_bytes, config, job.variant["spec"], rows, tokens, model.dtype.itemsize)


def _outcome(file: Path) -> tuple[str, str, dict[str, Any]]:
    """Status, reason and facts of a cell's file; either kind."""
    if file.suffix == ".json":
        record = files.read_json(file)
        return record["status"], record["status_reason"] or "", record["provenance"]
    first = pq.read_table(file, columns=["status", "status_reason"]).slice(0, 1).to_pylist()[0]
    return first["status"], first["status_reason"] or "", tables.provenance_of(file)


def _batch(path: Path, facts: dict[str, Any]) -> Any:
    import torch

    from kvbench import batch
    from kvbench.measure import Batch

    loaded = batch.load(path)
    facts["workload_sha256"] = files.sha256(path)
    ids, mask = loaded.arrays()
    device = facts["torch_device"]
    on_device = None if mask is None else torch.from_numpy(mask).to(device)
    return Batch(torch.from_numpy(ids).to(device), on_device, loaded.new_tokens, loaded.pad_token_id)


def _effort(job: Job, batch: Any) -> Any:
    from kvbench.measure import Effort

    how = job.protocol
    share = how["interval_share"]
    if share == "auto":
        share = AUTO_SHARE[batch.input_ids.device.type]
    return Effort(how["repeats"], how["max_repeats"], share, how["max_warmup_runs"])


def _watch(batch: Any) -> Any:
    from kvbench import nvml

    return nvml.Watch(nvml.connect(batch.input_ids.device))
