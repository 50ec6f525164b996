"""The jobs of a cell: its prefill and its generation, from files to files."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from kvbench import files, jobs, tables
from kvbench.jobs import Job

GENERATION = pa.schema(
    [
        ("repeat", pa.int32()),
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("ttft_s", pa.float64()),
        ("tpot_s", pa.float64()),
        ("decode_tokens_per_s", pa.float64()),
        ("prefill_tokens_per_s", pa.float64()),
        ("article_tokens_per_s", pa.float64()),
        ("total_s", pa.float64()),
        ("token_times_s", pa.list_(pa.float64())),
        ("peak_generation_bytes", pa.int64()),
        ("peak_decode_bytes", pa.int64()),
        ("reserved_bytes", pa.int64()),
        ("kv_cache_end_bytes", pa.int64()),
        ("tokens_sha256", pa.string()),
        ("warmup_runs", pa.int32()),
    ]
)


def prefill(job: Job, workload: Path) -> None:
    """Measure a cell's prefill and write its JSON record."""

    def work(facts: dict[str, Any]) -> dict[str, Any]:
        ready, batch = jobs.ready(job, facts), _batch(workload, facts)
        from kvbench import measure

        ready.method.check(ready.model, len(batch.input_ids))
        run = measure.prefill_article if job.protocol["name"] == "article" else measure.prefill_standard
        return run(ready.model, batch, ready.method, _effort(job))

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
        ready, batch = jobs.ready(job, facts), _batch(workload, facts)
        from kvbench import engines, measure

        ready.method.check(ready.model, len(batch.input_ids))
        if job.protocol["name"] == "article":
            return list(measure.generation_article(ready.model, batch, ready.method, _effort(job)))
        engine = engines.engine(job.protocol["engine"], batch.input_ids.device)
        facts["engine"] = engine.name
        return list(measure.generation_standard(ready.model, batch, ready.method, _effort(job), engine))

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[dict[str, Any]] | None) -> None:
        rows = [row | {"repeat": i} for i, row in enumerate(result or [{}])]
        rows = [row | {"status": status, "status_reason": reason} for row in rows]
        tables.write(job.output, pa.Table.from_pylist(rows, GENERATION), facts)

    jobs.run(job, work, write)


def _batch(path: Path, facts: dict[str, Any]) -> Any:
    import torch

    from kvbench import batch
    from kvbench.measure import Batch

    loaded = batch.load(path)
    facts |= {"workload": tables.provenance_of(path), "workload_sha256": files.sha256(path)}
    ids, mask = loaded.arrays()
    device = facts["torch_device"]
    on_device = None if mask is None else torch.from_numpy(mask).to(device)
    return Batch(torch.from_numpy(ids).to(device), on_device, loaded.new_tokens, loaded.pad_token_id)


def _effort(job: Job) -> Any:
    from kvbench.measure import Effort

    return Effort(job.protocol["repeats"], job.protocol["max_warmup_runs"])
