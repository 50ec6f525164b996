"""The prompts' table: kept conversations put in the order of their ids, shuffled, and written as Parquet."""

import io
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.errors import UserError
from kvbench.files import atomic
from kvbench.scan import NUMBERS, Absent, Part
from kvbench.sharegpt import Number
from kvbench.tables import KEY

ROWS_PER_GROUP = 2048

SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("conversation_id", pa.string()),
        ("source_index", pa.int64()),
        ("first_role", pa.string()),
        ("prompt", pa.large_string()),
        ("completion", pa.large_string()),
        ("prompt_chars", pa.int64()),
        ("completion_chars", pa.int64()),
        ("turns", pa.int32()),
        ("conversation_chars", pa.int64()),
    ]
)

_spell = json.JSONEncoder(default=lambda number: float(number.text)).encode


def write_prompts(path: Path, parts: list[Part], seed: int, output: Path, metadata: dict[str, Any]) -> int:
    """Write what was kept of the file ``path``, in `draw_order`; how many that is. Nothing is written for none.

    Parameters
    ----------
    metadata : stored as JSON under the schema's key ``kvbench``.

    Raises
    ------
    UserError : the ids cannot be sorted, or the disk is full.
    """
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what is freed
    ids = [identity for part in parts for identity in part.ids]
    drawn = np.concatenate([np.frombuffer(part.drawn, dtype=np.bool_) for part in parts])
    kept = np.concatenate([np.frombuffer(part.kept, dtype=np.bool_) for part in parts])
    order = draw_order(ids, drawn, seed, path)
    order = order[kept[order]]
    if len(order):
        number_among_kept = np.cumsum(kept) - 1
        with atomic(output) as temporary:
            _write(_tables(parts, ids, order, number_among_kept[order]), temporary, metadata)
    return len(order)


def draw_order(ids: list[Any], drawn: np.ndarray, seed: int, path: Path) -> np.ndarray:
    """Positions of the records drawn, sorted by id and shuffled, as pandas 2 orders them.

    pandas sorts an object column with an unstable algorithm, so the order among equal ids follows from that
    algorithm on the same column, and from nothing else. Text ids stay an object column, which pandas sorts with
    NumPy's quicksort and samples with a permutation of NumPy's: so they need no pandas. It turns other ids, and
    text that spells numbers, into other types: those go through pandas itself, which gets nothing but ids.

    Parameters
    ----------
    ids : as a `Part` has them.
    drawn : bool, of the same length.

    Raises
    ------
    UserError : pandas cannot read or compare the ids.
    """
    (places,) = np.nonzero(drawn)
    if all(type(identity) is str for identity in ids) and not all(map(_spells_number, ids)):
        column = np.empty(len(ids), dtype=object)
        column[:] = ids
        places = places[column[places].argsort(kind="quicksort")]
        return places[np.random.RandomState(seed).choice(len(places), size=len(places), replace=False)]
    import pandas as pd

    try:
        frame = pd.read_json(io.StringIO(f"[{','.join(map(_id_object, ids))}]"))
        frame.index = pd.RangeIndex(len(ids))
        frame = frame.reindex(columns=["id"])[drawn]
        return frame.sort_values(by="id").sample(frac=1, random_state=seed).index.to_numpy()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The ids in {path} cannot be sorted: {error}", "Make them all text, or all integers below 2^63"
        ) from error


def _tables(parts: list[Part], ids: list[Any], places: np.ndarray, order: np.ndarray) -> Iterator[pa.Table]:
    """Tables of `SCHEMA`, a row group each, of the conversations at ``order`` among those kept, ``places`` in ids."""
    known = _known(parts)
    kept = [len(part.roles) for part in parts]
    files = np.repeat(np.arange(len(parts)), kept)
    roles = [role for part in parts for role in part.roles]
    with ExitStack() as stack:
        spools = [stack.enter_context(open(part.texts, "rb")) for part in parts]
        descriptors = np.array([spool.fileno() for spool in spools])[files]
        for first in range(0, len(order), ROWS_PER_GROUP):
            rows = order[first : first + ROWS_PER_GROUP]
            numbers = {name: column[rows] for name, column in known.items()}
            columns: dict[str, Any] = {name: _integers(column) for name, column in numbers.items()}
            columns["rank"] = _integers(np.arange(first, first + len(rows)))
            identities = (ids[place] for place in places[first : first + ROWS_PER_GROUP].tolist())
            columns["conversation_id"] = _strings([_text_of_id(identity) for identity in identities])
            columns["first_role"] = _strings([roles[row] for row in rows.tolist()])
            spans = (numbers[name] for name in ("start", "prompt_bytes", "completion_bytes"))
            columns["prompt"], columns["completion"] = _texts(descriptors[rows], *spans)
            yield pa.Table.from_arrays([columns[each.name].cast(each.type) for each in SCHEMA], schema=SCHEMA)


def _known(parts: list[Part]) -> dict[str, np.ndarray]:
    """`NUMBERS` of all conversations kept, and ``start``, the byte in its part's texts where each one's begin."""
    arrays = [np.frombuffer(part.numbers, dtype=np.int64).reshape(-1, len(NUMBERS)).T for part in parts]
    known = dict(zip(NUMBERS, np.concatenate(arrays, axis=1), strict=True))
    known["source_index"] += np.repeat(_before([part.read for part in parts]), [len(part.roles) for part in parts])
    sizes = [array[NUMBERS.index("prompt_bytes")] + array[NUMBERS.index("completion_bytes")] for array in arrays]
    known["start"] = np.concatenate([np.cumsum(size) - size for size in sizes])
    return known


def _texts(
    descriptors: np.ndarray, starts: np.ndarray, prompt_bytes: np.ndarray, completion_bytes: np.ndarray
) -> tuple[pa.LargeStringArray, pa.LargeStringArray]:
    """Prompts and completions, which lie one after the other from ``starts`` on, read straight into Arrow's buffers."""
    offsets = [np.concatenate(([0], np.cumsum(sizes))) for sizes in (prompt_bytes, completion_bytes)]
    prompts, completions = (np.empty(each[-1], dtype=np.uint8) for each in offsets)
    into = prompts.data, completions.data
    spans = zip(descriptors.tolist(), starts.tolist(), *(pairwise(each.tolist()) for each in offsets), strict=True)
    for descriptor, start, (first, end), (second, last) in spans:
        os.preadv(descriptor, (into[0][first:end], into[1][second:last]), start)
    return _string_array(offsets[0], prompts), _string_array(offsets[1], completions)


# Arrow's own conversions import pandas to look at their argument, which takes longer than all of them.
def _string_array(offsets: np.ndarray, data: np.ndarray) -> pa.LargeStringArray:
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))


def _integers(numbers: np.ndarray) -> pa.Int64Array:
    return pa.Int64Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def _strings(texts: list[str | None]) -> pa.LargeStringArray:
    encoded = [(text or "").encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    valid = np.packbits([text is not None for text in texts], bitorder="little")
    buffers = (pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)), pa.py_buffer(valid))
    return pa.LargeStringArray.from_buffers(len(texts), *buffers)


def _before(lengths: list[int]) -> np.ndarray:
    """How many come before each part."""
    return np.cumsum([0, *lengths[:-1]])


def _write(tables: Iterator[pa.Table], path: Path, metadata: dict[str, Any]) -> None:
    schema = SCHEMA.with_metadata({KEY: json.dumps(metadata, sort_keys=True).encode()})
    # Texts neither repeat nor sort, so that dictionaries and statistics of them only cost.
    numbers = [each.name for each in SCHEMA if each.type not in (pa.string(), pa.large_string())]
    with pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=["first_role"], write_statistics=numbers
    ) as writer:
        for table in _ahead(tables):
            writer.write_table(table)


def _ahead(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, the next one gathered while one is compressed."""
    iterator = iter(tables)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, None)
        while (table := future.result()) is not None:
            future = pool.submit(next, iterator, None)
            yield table


def _spells_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _id_object(identity: Any) -> str:
    """The id alone as a JSON object, in the file's own spelling where that can matter."""
    return "{}" if identity is Absent.ID else f'{{"id":{_spelled(identity)}}}'


def _text_of_id(identity: Any) -> str | None:
    """An id as text: itself, or as JSON spells it; None where there is none."""
    if identity is Absent.ID or identity is None or isinstance(identity, str):
        return identity if isinstance(identity, str) else None
    return _spelled(identity)


def _spelled(value: Any) -> str:
    """A value that `Records` read as JSON: numbers exactly as in the file, except inside arrays and objects."""
    if isinstance(value, Number):
        return value.text
    return _spell(value)
