"""Parquet files that say what made them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.files import atomic

KEY = b"kvbench"
"""Where a file's provenance lies in its schema metadata, as JSON."""


def write(path: str | Path, table: pa.Table, provenance: dict[str, Any]) -> None:
    """Write a table atomically (zstd), with its provenance in the schema's metadata."""
    described = table.replace_schema_metadata(
        (table.schema.metadata or {}) | {KEY: json.dumps(provenance, sort_keys=True, ensure_ascii=False)}
    )
    with atomic(path) as temporary:
        pq.write_table(described, temporary, compression="zstd")


def provenance_of(path: str | Path) -> dict[str, Any]:
    """The provenance of a file; empty if it carries none."""
    return json.loads((pq.read_schema(path).metadata or {}).get(KEY, b"{}"))


def machine_of(path: str | Path) -> dict[str, Any]:
    """Of a file's provenance, the versions, device and driver of the job that wrote it, as far as it knew them."""
    facts = provenance_of(path)
    return {name: facts[name] for name in ("versions", "device", "driver") if name in facts}
