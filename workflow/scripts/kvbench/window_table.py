"""The windows on which compression is judged, as a file: a prefix to compress and a continuation to predict."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvbench import tables
from kvbench.errors import Unsupported, UserError

SCHEMA = pa.schema(
    [
        ("corpus", pa.string()),
        ("document", pa.string()),
        ("window", pa.int32()),
        ("prefix_ids", pa.list_(pa.int32())),
        ("continuation_ids", pa.list_(pa.int32())),
        ("status", pa.string()),
        ("status_reason", pa.string()),
    ]
)
# Prefix and continuation tokens of all rows of a batch together, by kind of device.
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Window:
    """A window of token ids.

    Attributes
    ----------
    document : what it was taken from; windows of one document are not independent.
    window : its number in its corpus.
    continuation_ids : one more than are read: the last is only predicted.
    """

    corpus: str
    document: str
    window: int
    prefix_ids: list[int]
    continuation_ids: list[int]


def write(path: Path, windows: Sequence[Window], status: str, reason: str | None, provenance: dict[str, Any]) -> None:
    """Write windows, one a row; without any, one row that says why."""
    overall = {"status": status, "status_reason": reason}
    rows = [asdict(window) | overall for window in windows] or [overall]
    tables.write(path, pa.Table.from_pylist(rows, SCHEMA), provenance)


def load(path: Path) -> list[Window]:
    """Read windows.

    Raises
    ------
    Unsupported : the file says why there are none.
    UserError : the file is missing or holds no windows.
    """
    try:
        rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} holds no windows: {error}", "Run the rule that makes it again") from error
    for row in rows:
        if row.pop("status") != "ok":
            raise Unsupported(row["status_reason"])
        del row["status_reason"]
    return [Window(**row) for row in rows]


def batches(windows: Sequence[Window], rows: int) -> list[Sequence[Window]]:
    """The windows in their order, ``rows`` at a time."""
    return [windows[start : start + rows] for start in range(0, len(windows), rows)]


def rows_at_once(device: str, tokens: int) -> int:
    """Rows of ``tokens`` tokens that a batch may have on a kind of device ("cpu", "cuda")."""
    return max(1, TOKENS_AT_ONCE[device] // tokens)
