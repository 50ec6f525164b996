"""A workload's batch of token ids, as every job on the device reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.errors import UserError
from kvbench.tables import KEY

Padding = Literal["none", "article"]


@dataclass(frozen=True)
class Workload:
    """A batch of token ids, unpadded; ``pad_token_id`` and ``padding_side`` say how to pad it."""

    rows: list[list[int]]
    padding: Padding
    padding_side: Literal["left", "right"]
    pad_token_id: int
    eos_token_ids: list[int]
    chat_template: bool
    prompt_tokens: int
    new_tokens: int

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Token ids, int64 [rows, longest row], and the attention mask of that shape; None if all rows are equal."""
        lengths = [len(row) for row in self.rows]
        ids = np.full((len(lengths), max(lengths)), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(self.rows):
            place = slice(None, len(row)) if self.padding_side == "right" else slice(-len(row), None)
            ids[number, place] = row
            mask[number, place] = 1
        return ids, None if min(lengths) == max(lengths) else mask


def load(path: Path) -> Workload:
    """Read a workload.

    Raises
    ------
    UserError : the file is missing or no workload.
    """
    try:
        table = pq.read_table(path, columns=["input_ids"])
        about = json.loads(table.schema.metadata[KEY])
        return Workload(
            rows=table["input_ids"].to_pylist(),
            **{name: about[name] for name in Workload.__dataclass_fields__ if name != "rows"},
        )
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise UserError(f"{path} is no workload: {error}", "Run the rule that makes it again") from error
