"""The pipeline's tables as the figures and the report read them."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from kvbench.errors import UserError
from kvbench.words import Row

CELL_COLUMNS = [
    "model",
    "method",
    "variant",
    "workload",
    "batch_size",
    "prompt_tokens",
    "new_tokens",
    "engine",
    "protocol",
    "device",
    "status",
]
OUTPUT_COLUMNS = ["model", "method", "status", "rank", "prompt", "way", "text"]

# The figures' inks; the report swaps them for its own, which follow dark mode.
INK, MUTED, FAINT, PAPER = "#1f2328", "#59636e", "#eff2f5", "#ffffff"
INKS = {INK: "var(--ink)", MUTED: "var(--muted)", FAINT: "var(--faint)", PAPER: "var(--paper)"}

BASELINE_COLOUR = "#8b949e"
# Okabe and Ito's colours that read on white and on black, told apart with any colour vision.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def read_rows(path: str | Path, required: Sequence[str] = CELL_COLUMNS) -> list[Row]:
    """Rows of a Parquet file as dicts; null and NaN are None.

    Raises
    ------
    UserError : the file is missing, no Parquet, or lacks a required column.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing", "Run the pipeline so that it is made") from error
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file: {error}", "Delete it and run again") from error
    lacking = [column for column in required if column not in table.column_names]
    if lacking:
        raise UserError(f"{path} lacks the columns {', '.join(lacking)}", "Delete it and run again")
    return [{key: _present(value) for key, value in row.items()} for row in table.to_pylist()]


def _present(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def unique(values: Iterable[Any]) -> list[Any]:
    """Distinct values that are not None, in order of first appearance."""
    return [value for value in dict.fromkeys(values) if value is not None]


def is_baseline(row: Row, rows: Sequence[Row]) -> bool:
    """Whether other rows are compared with this one, or it is called so."""
    labels = {other.get("baseline") for other in rows} - {None}
    return row["variant"] in labels if labels else row["method"] == "baseline"


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The measured row that ``row`` is compared with: of its own model if there is one, else of another's."""
    label = row.get("baseline")
    if label is None or is_baseline(row, rows):
        return None
    candidates = [
        other
        for other in rows
        if other["variant"] == label and other.get("workload") == row.get("workload") and other is not row
    ]
    candidates.sort(key=lambda other: other["model"] != row["model"])
    return candidates[0] if candidates and candidates[0]["status"] == "ok" else None


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """Method to colour: grey for baselines, the same colour for a method in every figure of a run."""
    methods = unique(row["method"] for row in rows)
    grey = {row["method"] for row in rows if is_baseline(row, rows)}
    coloured = [method for method in methods if method not in grey]
    chosen = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(coloured)}
    return chosen | dict.fromkeys(grey, BASELINE_COLOUR)


def device(rows: Sequence[Row]) -> str:
    """The device of the first row that names one; a cell that failed early does not."""
    return str(next((row["device"] for row in rows if row.get("device")), ""))
