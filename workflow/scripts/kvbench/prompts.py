"""ShareGPT conversations to a shuffled list of prompts: filter, sort by id, shuffle, filter by length.

Two selections share that order of steps:

``article``
    every conversation of at least two messages, whoever speaks first. The list equals, record for record,
    what ``pd.read_json``, ``sort_values(by="id")`` and ``sample(frac=1, random_state=seed)`` give on the file.
``human_first``
    only those whose first message is a human's (`HUMAN_ROLES`) and whose second is an assistant's, which is
    any role but a human's, the system's or a tool's: then the prompt is a question and the completion its answer.

A text counts as long enough from ``min_chars`` characters (code points) on, prompt and completion both.
"""

import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.errors import UserError
from kvbench.files import atomic, write_json
from kvbench.manifest import check_manifest_files, load_manifest
from kvbench.scan import NUMBERS, SPANS, Absent, Part, Rules, scan
from kvbench.sharegpt import SHAPE, Number

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


def run(manifest_path: Path, output: Path, counts_path: Path, rules: Rules, provenance: dict[str, Any]) -> None:
    """Select the prompts of a fetched dataset and write them, and the counts manifest beside them.

    Raises
    ------
    UserError : see `select`.
    """
    dataset = load_manifest(manifest_path)
    check_manifest_files(dataset)
    inputs = {"dataset": dataset.name, "revision": dataset.revision, "files": dataset.files, **asdict(rules)}
    counts = select(dataset.file, output, rules, inputs | provenance)
    about = {"dataset": dataset.name, "selection": rules.selection, "seed": rules.seed, "file": dataset.file.name}
    write_json(counts_path, about | counts)
    cut = f", cut off: {counts['bytes_left_out']:,} bytes of an unfinished record left out"
    print(f"{dataset.file.name}: {counts['conversations_read']:,} conversations{cut if counts['truncated'] else ''}")
    for step in counts["steps"][1:]:
        print(f"{step['kept']:>10,}  {step['step']}")
    for kind, number in counts["malformed"].items():
        print(f"{number:>10,}  malformed: {kind}")


def select(path: Path, output: Path, rules: Rules, metadata: dict[str, Any]) -> dict[str, Any]:
    """Write the prompts of the ShareGPT file ``path`` to the Parquet file ``output``.

    Parameters
    ----------
    metadata : stored as JSON under the schema's key ``kvbench``.

    Returns
    -------
    The counts: records read, what each step kept, what is malformed, and whether the file is cut off.

    Raises
    ------
    UserError : the file cannot be read (see `Records`), too many records are malformed, the ids cannot be
        sorted, or no prompt is left.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        parts = scan(path, rules, Path(folder))
        counts = _counts(parts, rules)
        _refuse_too_many_malformed(path, counts, rules.max_malformed_share)
        ids = [identity for part in parts for identity in part.ids]
        drawn = np.concatenate([np.frombuffer(part.drawn, dtype=np.bool_) for part in parts])
        kept = _joined([np.frombuffer(part.kept, dtype=np.int64) for part in parts], [len(p.roles) for p in parts])
        order = kept[draw_order(ids, drawn, rules.seed, path)]
        order = order[order >= 0]
        if not len(order):
            raise _no_prompts(path, counts)
        with atomic(output) as temporary:
            _write(_tables(parts, ids, order), temporary, metadata)
    return counts


def _counts(parts: list[Part], rules: Rules) -> dict[str, Any]:
    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    steps = {
        "read": total("read"),
        "at least 2 messages": total("two_messages"),
        "first 2 messages readable": total("readable"),
    }
    if rules.selection == "human_first":
        steps["a human first, an assistant second"] = total("human_first")
    steps[f"prompt and completion of at least {rules.min_chars} characters"] = sum(len(part.roles) for part in parts)
    malformed: Counter[str] = sum((part.malformed for part in parts), Counter())
    before = _before([part.read for part in parts])
    return {
        "conversations_read": total("read"),
        "truncated": parts[-1].truncated,
        "bytes_left_out": parts[-1].bytes_left_out,
        "steps": [{"step": step, "kept": kept} for step, kept in steps.items()],
        "malformed": dict(malformed),
        "malformed_examples": [
            example | {"index": example["index"] + first}
            for part, first in zip(parts, before, strict=True)
            for example in part.examples
        ],
    }


def _tables(parts: list[Part], ids: list[Any], order: np.ndarray) -> Iterator[pa.Table]:
    """The kept conversations at the positions ``order`` as tables of `SCHEMA`, a row group each."""
    numbers = np.concatenate([part.table() for part in parts])
    kept = [len(part.roles) for part in parts]
    numbers[:, NUMBERS.index("source_index")] += np.repeat(_before([part.read for part in parts]), kept)
    numbers[:, NUMBERS.index("row")] += np.repeat(_before([len(part.ids) for part in parts]), kept)
    files = np.repeat(np.arange(len(parts)), kept)
    roles = [role for part in parts for role in part.roles]
    with ExitStack() as stack:
        spools = [stack.enter_context(open(part.texts, "rb")) for part in parts]
        descriptors = np.array([spool.fileno() for spool in spools])[files]
        for first in range(0, len(order), ROWS_PER_GROUP):
            rows = order[first : first + ROWS_PER_GROUP]
            known = dict(zip((*NUMBERS, *SPANS), numbers[rows].T, strict=True))
            columns: dict[str, Any] = {name: _integers(column) for name, column in known.items()}
            columns["rank"] = _integers(np.arange(first, first + len(rows)))
            columns["conversation_id"] = _strings([_text_of_id(ids[row]) for row in known["row"].tolist()])
            columns["first_role"] = _strings([roles[row] for row in rows.tolist()])
            columns["prompt"], columns["completion"] = _texts(descriptors[rows], *(known[name] for name in SPANS))
            yield pa.Table.from_arrays([columns[each.name].cast(each.type) for each in SCHEMA], schema=SCHEMA)


def _texts(
    descriptors: np.ndarray, starts: np.ndarray, prompt_bytes: np.ndarray, completion_bytes: np.ndarray
) -> tuple[pa.LargeStringArray, pa.LargeStringArray]:
    """Prompts and completions, which lie one after the other from ``starts`` on, read straight into Arrow's buffers."""
    offsets = [np.concatenate(([0], np.cumsum(sizes))) for sizes in (prompt_bytes, completion_bytes)]
    prompts, completions = (np.empty(each[-1], dtype=np.uint8) for each in offsets)
    into = memoryview(prompts), memoryview(completions)
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


def _joined(places: list[np.ndarray], lengths: list[int]) -> np.ndarray:
    """Places in each of some lists, -1 for none, as places in the lists joined."""
    return np.concatenate(
        [np.where(some < 0, some, some + first) for some, first in zip(places, _before(lengths), strict=True)]
    )


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


def _write(tables: Iterator[pa.Table], path: Path, metadata: dict[str, Any]) -> None:
    schema = SCHEMA.with_metadata({b"kvbench": json.dumps(metadata, sort_keys=True).encode()})
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


def _refuse_too_many_malformed(path: Path, counts: dict[str, Any], largest_share: float) -> None:
    kinds, read = counts["malformed"], counts["conversations_read"]
    malformed = sum(kinds.values())
    if malformed <= largest_share * read:
        return
    first = counts["malformed_examples"][0]
    raise UserError(
        f"{path} has {malformed:,} malformed records of {read:,}, more than the share of {largest_share:g} allowed "
        f"({', '.join(f'{kind} {number:,}' for kind, number in kinds.items())}; "
        f"the first is record {first['index']}, id {first['id']}: {first['detail']})",
        f"{SHAPE}. Mend the records, or raise dataset.max_malformed_share",
    )


def _no_prompts(path: Path, counts: dict[str, Any]) -> UserError:
    steps = ", ".join(f"{step['step']}: {step['kept']:,}" for step in counts["steps"])
    cut = " (the file is cut off)" if counts["truncated"] else ""
    return UserError(
        f"No prompt is left of {path}{cut} ({steps})",
        "Lower dataset.min_chars, or use dataset.selection: article if the first messages are not a human's",
    )
