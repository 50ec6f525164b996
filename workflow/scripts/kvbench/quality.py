"""The job of a variant's quality by distribution, from files to files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kvbench import files, jobs, tables, window_table
from kvbench.jobs import Job

QUALITY = pa.schema(
    [
        ("model", pa.string()),
        ("method", pa.string()),
        ("status", pa.string()),
        ("status_reason", pa.string()),
        ("reference", pa.string()),
        ("corpus", pa.string()),
        ("document", pa.string()),
        ("window", pa.int32()),
        ("distance", pa.int32()),
        ("kl", pa.float64()),
        ("kl_dense", pa.float64()),
        ("agrees", pa.bool_()),
        ("nll_full", pa.float64()),
        ("nll", pa.float64()),
        ("kept_fraction", pa.float64()),
        ("simulated", pa.bool_()),
    ]
)


def quality(job: Job, windows: Path, original: Path | None) -> None:
    """Write what a variant's compression does to the distribution of the next token, one row a token.

    The uncompressed method has nothing to be compared with but itself: in another batch shape and in another dtype,
    the noise floor. A method that changes the weights is compared with the model before that, as it compresses (``kl``)
    and with nothing compressed (``kl_dense``).

    Parameters
    ----------
    windows : the windows to judge it on.
    original : manifest of the model that the variant's model is a retrofit of, whose full cache is then the reference.
    """

    def work(facts: dict[str, Any]) -> list[dict[str, Any]]:
        chosen = window_table.load(windows)
        facts |= {"windows": tables.provenance_of(windows), "windows_sha256": files.sha256(windows)}
        ready = jobs.ready(job, facts)
        from kvbench import distribution

        if original is not None:
            reference = _load(job, original, job.loading["dtype"], ready.model.device)
            return list(distribution.against_full(ready.model, ready.method, chosen, reference))
        if ready.method.compresses:
            return list(distribution.against_full(ready.model, ready.method, chosen))
        other, missing = _other_dtype(job, ready.model)
        return [*distribution.noise(ready.model, other, chosen), *missing]

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[dict[str, Any]] | None) -> None:
        overall = {key: job.variant[key] for key in ("model", "method")} | {"status": status, "status_reason": reason}
        tables.write(job.output, pa.concat_tables([_table(overall | part) for part in result or [{}]]), facts)

    jobs.run(job, work, write)


def _other_dtype(job: Job, model: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The same model in another dtype; where it does not fit beside it, none and a row that says so."""
    import torch

    try:
        dtype = "bfloat16" if model.dtype == torch.float32 else "float32"
        return _load(job, job.manifest, dtype, model.device), []
    except torch.OutOfMemoryError as error:
        reason = str(error).split("\n")[0]
        return None, [{"reference": "dtype", "status": "oom", "status_reason": reason}]


def _load(job: Job, manifest: Path, dtype: str, device: Any) -> Any:
    from kvbench.loading import load_model
    from kvbench.manifest import load_manifest

    return load_model(load_manifest(manifest), dtype, job.loading["attention"], device).model


def _table(columns: dict[str, Any]) -> pa.Table:
    """A table of columns, each an array or one value for all rows."""
    rows = max((len(value) for value in columns.values() if isinstance(value, np.ndarray)), default=1)
    return pa.table(
        [
            pa.array(value, field.type) if isinstance(value, np.ndarray) else pa.array([value] * rows, field.type)
            for field, value in ((field, columns.get(field.name)) for field in QUALITY)
        ],
        schema=QUALITY,
    )
