"""A job on the device, from files to files: load, run, and turn whatever happens into rows.

Out of memory, a method that cannot run as asked and a failure are results: the job writes a row with the status and
its reason, and the run goes on.
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvbench import tables
from kvbench.errors import Unsupported, UserError, cli
from kvbench.isolate import isolated
from kvbench.provenance import versions


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
    """A model on its device, and the method to run on it."""

    model: Any
    manifest: Any
    method: Any


def run(job: Job, work: Callable[[dict[str, Any]], Any], write: Callable[..., None]) -> None:
    """Do the work on a device of its own in a process of its own, and write what came of it.

    Parameters
    ----------
    work : does it, given the facts of the job, to which it may add; returns the result.
    write : called with status, its reason (None when ok), the facts, and the result (None when not ok).
    """
    known = job.provenance | {"variant": job.variant, "protocol": job.protocol, "loading": job.loading}

    def child() -> None:
        begun = time.perf_counter()
        # whether a cell fits should be told by its bytes, not by how the runs before it cut up the memory
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        from kvbench import device as devices

        imported = time.perf_counter() - begun
        facts = known | {"versions": versions(), "import_s": imported, "load_s": 0.0}
        with devices.exclusive() as device:
            facts |= devices.describe(device) | {"torch_device": str(device)}
            begun = time.perf_counter()
            status, reason, result = attempt(lambda: work(facts))
            elapsed = time.perf_counter() - begun
            facts["work_s"] = elapsed - facts["load_s"] - (facts["import_s"] - imported)
        if reason is not None:
            print(f"{job.output}: {status}: {reason}", flush=True)
        write(status, reason, facts, result)

    isolated(
        lambda: cli(child),
        died=lambda reason: write("failed", reason, known | {"versions": versions()}, None),
    )


def rows_writer(job: Job, schema: pa.Schema, about: dict[str, Any] | None = None) -> Callable[..., None]:
    """The ``write`` of `run` for a job whose result is rows: each under the variant's names and the job's status.

    Without a result, one row says why.

    Parameters
    ----------
    schema : of the file; a row's own status goes before the job's.
    about : added to the facts that the file carries.
    """

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[dict[str, Any]] | None) -> None:
        overall = {key: job.variant[key] for key in ("model", "method")} | {"status": status, "status_reason": reason}
        rows = [overall | row for row in (result if result is not None else [{}])]
        tables.write(job.output, pa.Table.from_pylist(rows, schema), facts | (about or {}))

    return write


def attempt(work: Callable[[], Any]) -> tuple[str, str | None, Any]:
    """Status, reason (None when ok) and result (None when not ok) of a piece of work; a `UserError` goes through."""
    from kvbench.device import ran_out

    try:
        return "ok", None, work()
    except Unsupported as error:
        return "unsupported", str(error), None
    except UserError:
        raise
    except Exception as error:  # whatever a method, a model or a kernel raises is this cell's result
        if ran_out(error):
            return "oom", _first_line(error) or "out of memory", None
        return _failed(error)


def _failed(error: Exception) -> tuple[str, str, None]:
    traceback.print_exception(error)
    return "failed", f"{type(error).__name__}: {_first_line(error)}", None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:500]


def ready(job: Job, facts: dict[str, Any]) -> Ready:
    """Load the job's model and build its method; what is known of them goes into the facts."""
    begun = time.perf_counter()
    import torch

    from kvbench import methods
    from kvbench.architecture import describe
    from kvbench.loading import load_model
    from kvbench.manifest import load_manifest

    manifest = load_manifest(job.manifest)
    facts |= {
        "model_revision": manifest.revision,
        "model_files": {f["path"]: f["sha256"] for f in manifest.files},
    }
    method = methods.build(job.variant["spec"])
    facts["import_s"] += time.perf_counter() - begun
    device = torch.device(facts["torch_device"])
    with method.loading(manifest):
        loaded = load_model(manifest, job.loading["dtype"], job.loading["attention"], device)
    facts |= {
        "load_s": loaded.load_s,
        "load_state": loaded.load_state,
        "weights_bytes": loaded.weights_bytes,
        "dtype": str(loaded.model.dtype),
        "model_config": describe(loaded.model.config),
    }
    facts |= {"engine": "hf", "attention": loaded.model.config._attn_implementation}
    return Ready(loaded.model, manifest, method)


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
