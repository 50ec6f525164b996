"""A job on the device, from files to files: load, run, and turn whatever happens into rows.

Out of memory, a method that cannot run as asked and a failure are results: the job writes a row with the status and
its reason, and the run goes on.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvbench import files, tables
from kvbench.errors import Unsupported, UserError, cli
from kvbench.isolate import isolated
from kvbench.provenance import versions

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

OUTPUTS = pa.schema(
    [
        ("model", pa.string()),
        ("method", pa.string()),
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("rank", pa.int64()),
        ("conversation_id", pa.string()),
        ("prompt", pa.large_string()),
        ("prompt_tokens", pa.int32()),
        ("text", pa.large_string()),
        ("token_ids", pa.list_(pa.int32())),
        ("new_tokens", pa.int32()),
        ("stop_reason", pa.string()),
        ("simulated", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Job:
    """What a job on the device is told.

    Attributes
    ----------
    variant : ``{"model", "method", "spec"}``, the spec as `methods.build` takes it. A job does not know its label in
        the report: that may change when others join the run, and this result does not.
    protocol : ``{"name", "engine", "repeats", "max_warmup_runs"}``.
    loading : ``{"dtype", "attention"}``.
    provenance : what the Snakefile knows of the job; the device and the versions are added here.
    """

    manifest: Path
    variant: dict[str, Any]
    protocol: dict[str, Any]
    loading: dict[str, str]
    provenance: dict[str, Any]
    output: Path


@dataclass(frozen=True)
class Ready:
    """A model on its device, the method, and what is known of both so far."""

    model: Any
    manifest: Any
    method: Any
    facts: dict[str, Any]


def prefill(job: Job, workload: Path) -> None:
    """Measure a cell's prefill and write its JSON record."""

    def work(facts: dict[str, Any]) -> dict[str, Any]:
        from kvbench import measure

        ready, batch = _ready(job, facts), _batch(workload, facts)
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

    _run(job, work, write)


def generation(job: Job, workload: Path) -> None:
    """Measure a cell's generation and write one row a repeat."""

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        from kvbench import measure

        ready, batch = _ready(job, facts), _batch(workload, facts)
        ready.method.check(ready.model, len(batch.input_ids))
        run = measure.generation_article if job.protocol["name"] == "article" else measure.generation_standard
        return list(run(ready.model, batch, ready.method, _effort(job)))

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[dict[str, Any]] | None) -> None:
        rows = [row | {"repeat": i} for i, row in enumerate(result or [{}])]
        rows = [row | {"status": status, "status_reason": reason} for row in rows]
        tables.write(job.output, pa.Table.from_pylist(rows, GENERATION), facts)

    _run(job, work, write)


def outputs(job: Job, prompts: Path, count: int, new_tokens: int, max_prompt_tokens: int) -> None:
    """Write a variant's answers to the first ``count`` prompts, one row a prompt."""

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        from kvbench import answers
        from kvbench.manifest import load_manifest

        if load_manifest(job.manifest).tokenizer is None:
            raise Unsupported("random weights have no tokenizer, and their text would mean nothing")
        ready = _ready(job, facts)
        ready.method.check(ready.model, 1)
        limits = answers.Limits(count, new_tokens, max_prompt_tokens)
        answer = answers.as_the_article if job.protocol["name"] == "article" else answers.one_by_one
        return answer(ready.model, ready.manifest.tokenizer, ready.method, prompts, limits)

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[dict[str, Any]] | None) -> None:
        names = {key: job.variant[key] for key in ("model", "method")}
        overall = {"status": status, "status_reason": reason}
        rows = [names | overall | row for row in (result if result is not None else [{}])]
        tables.write(job.output, pa.Table.from_pylist(rows, OUTPUTS), facts)

    _run(job, work, write)


def _run(job: Job, work: Callable[[dict[str, Any]], Any], write: Callable[..., None]) -> None:
    """Do the work on a device of its own in a process of its own, and write what came of it."""
    known = job.provenance | {"variant": job.variant, "protocol": job.protocol, "loading": job.loading}

    def child() -> None:
        begun = time.perf_counter()
        from kvbench import device as devices

        imported = time.perf_counter() - begun
        facts = known | {"versions": versions(), "import_s": imported, "load_s": 0.0}
        with devices.exclusive() as device:
            facts |= devices.describe(device) | {"torch_device": str(device)}
            begun = time.perf_counter()
            status, reason, result = _attempt(lambda: work(facts))
            elapsed = time.perf_counter() - begun
            facts["work_s"] = elapsed - facts["load_s"] - (facts["import_s"] - imported)
        if reason is not None:
            print(f"{job.output}: {status}: {reason}", flush=True)
        write(status, reason, facts, result)

    isolated(
        lambda: cli(child),
        died=lambda reason: write("failed", reason, known | {"versions": versions()}, None),
    )


def _attempt(work: Callable[[], Any]) -> tuple[str, str | None, Any]:
    import torch

    try:
        return "ok", None, work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        return "oom", _first_line(error) or "out of memory", None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch's CPU allocator says it
            return _failed(error)
        return "oom", _first_line(error), None
    except Unsupported as error:
        return "unsupported", str(error), None
    except UserError:
        raise
    except Exception as error:  # whatever a method, a model or a kernel raises is this cell's result
        return _failed(error)


def _failed(error: Exception) -> tuple[str, str, None]:
    traceback.print_exception(error)
    return "failed", f"{type(error).__name__}: {_first_line(error)}", None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:500]


def _ready(job: Job, facts: dict[str, Any]) -> Ready:
    begun = time.perf_counter()
    import torch

    from kvbench import methods
    from kvbench.loading import load_model
    from kvbench.manifest import load_manifest

    manifest = load_manifest(job.manifest)
    facts |= {
        "model_revision": manifest.revision,
        "model_files": {f["path"]: f["sha256"] for f in manifest.files},
    }
    method = methods.build(job.variant["spec"])
    facts["import_s"] += time.perf_counter() - begun
    loaded = load_model(manifest, job.loading["dtype"], job.loading["attention"], torch.device(facts["torch_device"]))
    facts |= {
        "load_s": loaded.load_s,
        "weights_bytes": loaded.weights_bytes,
        "dtype": str(loaded.model.dtype),
    }
    facts |= {"engine": "hf", "attention": loaded.model.config._attn_implementation}
    return Ready(loaded.model, manifest, method, facts)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every job on the device; structured ones are JSON objects."""
    parser.add_argument("--manifest", required=True, type=Path, help="the model's manifest")
    for name in ("variant", "protocol", "loading", "provenance"):
        parser.add_argument(f"--{name}", required=True, type=_object, help="a JSON object")
    parser.add_argument("--output", required=True, type=Path)


def from_arguments(args: argparse.Namespace) -> Job:
    """The job that `add_arguments` describes."""
    return Job(args.manifest, args.variant, args.protocol, args.loading, args.provenance, args.output)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is no JSON object")
    return value
