"""The conversations of a ShareGPT file as columns: in parallel where it is plain, record by record where it is not."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from kvbench.sharegpt import Problem, Records, read_messages

BLOCK_BYTES = 1 << 20
MISSING = object()

# What a record's columns are; texts and roles are null where there are not two messages to read.
COLUMNS = pa.schema(
    [
        ("messages", pa.int64()),  # in the list, readable or not
        ("turns", pa.int64()),  # readable, up to the first that is not
        ("first_role", pa.string()),
        ("second_role", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_chars", pa.int64()),
        ("completion_chars", pa.int64()),
        ("conversation_chars", pa.int64()),
    ]
)
_MESSAGE = pa.struct([("from", pa.string()), ("value", pa.string())])
_PLAIN = pj.ParseOptions(
    explicit_schema=pa.schema([("id", pa.string()), ("conversations", pa.list_(_MESSAGE))]),
    newlines_in_values=True,
    unexpected_field_behavior="ignore",
)
_ONE_BLOCK = pj.ReadOptions(use_threads=False, block_size=1 << 30)


@dataclass
class Batch:
    """Some records in the file's order.

    ``ids`` are their values as `Records` gives them, or `MISSING`; ``source_index`` their places in the array.
    Records that are no object have no row. ``problems`` are (problem, place, id) of what cannot be read.
    """

    ids: list[Any]
    source_index: np.ndarray
    columns: pa.Table
    problems: list[tuple[Problem, int, Any]] = field(default_factory=list)


class Conversations:
    """The conversations of the ShareGPT array at ``path``, in batches.

    Blocks that end where a record seems to end are parsed by Arrow in threads. It takes a block only if it is
    a sequence of whole records, each plain (text ids, a list of messages with texts, nothing null); so what it takes
    is exact, and any other block is read again by `Records`, which decides about everything else. After the last
    batch ``read``, ``truncated`` and ``bytes_left_out`` are set.

    Raises
    ------
    UserError : see `Records`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read = 0
        self.truncated = False
        self.bytes_left_out = 0

    def __iter__(self) -> Iterator[Batch]:
        start: tuple[int, bytes] | None = (0, b"")
        patience = 1  # blocks to read one by one: doubled each time that Arrow refuses one
        with ThreadPoolExecutor(pa.cpu_count()) as pool:
            while start is not None:
                offset, between = start
                if between:
                    before = offset
                    for columns, ids, offset in _parsed(pool, self.path, offset, between):
                        yield Batch(ids, np.arange(self.read, self.read + len(ids)), columns)
                        self.read += len(ids)
                    patience = 1 if offset - before > 8 * BLOCK_BYTES else 2 * patience
                records = Records(self.path, offset, self.read)
                start = yield from self._one_by_one(records, offset + patience * BLOCK_BYTES if between else 0)
        self.truncated, self.bytes_left_out = records.truncated, records.bytes_left_out

    def _one_by_one(self, records: Records, until: int) -> Generator[Batch, None, tuple[int, bytes] | None]:
        """Yield batches up to the byte ``until`` or further; return where the next record begins, if one does."""
        rows = _Rows()
        for record in records:
            rows.add(record, self.read)
            self.read += 1
            if rows.characters > BLOCK_BYTES:
                yield rows.batch()
                rows = _Rows()
            if records.bytes_read >= until and (start := records.next_record()):
                yield rows.batch()
                return start
        yield rows.batch()
        return None


class _Rows:
    """Gather records into a `Batch`."""

    def __init__(self) -> None:
        self._ids: list[Any] = []
        self._indices: list[int] = []
        self._rows: list[tuple[Any, ...]] = []
        self._problems: list[tuple[Problem, int, Any]] = []
        self.characters = 0

    def add(self, record: Any, index: int) -> None:
        messages, problem = read_messages(record)
        identity = record.get("id", MISSING) if isinstance(record, dict) else MISSING
        if problem:
            self._problems.append((problem, index, identity))
        if not isinstance(record, dict):
            return
        listed = record.get("conversations")
        number = len(listed) if isinstance(listed, list) else 0
        chars = [len(message.text) for message in messages]
        row: tuple[Any, ...] = (None,) * 6
        if len(messages) >= 2:
            (first, prompt), (second, completion) = messages[:2]
            row = first, second, prompt, completion, chars[0], chars[1]
        self._ids.append(identity)
        self._indices.append(index)
        self._rows.append((number, len(messages), *row, sum(chars)))
        self.characters += sum(chars[:2])

    def batch(self) -> Batch:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(COLUMNS)
        arrays = [pa.array(column, type=each.type) for column, each in zip(columns, COLUMNS, strict=True)]
        table = pa.table(arrays, schema=COLUMNS)
        return Batch(self._ids, np.array(self._indices, dtype=np.int64), table, self._problems)


def _parsed(
    pool: ThreadPoolExecutor, path: Path, offset: int, between: bytes
) -> Iterator[tuple[pa.Table, list[str], int]]:
    """Columns and ids of the plain blocks from ``offset`` on, each with the offset where the next record begins."""
    waiting: deque[tuple[Future[tuple[pa.Table, list[str]] | None], int]] = deque()
    blocks = _blocks(path, offset, between)
    while True:
        for block, end in blocks:
            waiting.append((pool.submit(_parse, block, between), end))
            if len(waiting) > pa.cpu_count():
                break
        if not waiting:
            return
        future, end = waiting.popleft()
        parsed = future.result()
        if parsed is None:
            return
        yield *parsed, end


def _blocks(path: Path, offset: int, between: bytes) -> Iterator[tuple[bytes, int]]:
    """Cut the file after the last ``}`` of a ``between`` in each chunk; with each block, where the next one begins."""
    inside = between.index(b"{")
    with open(path, "rb") as stream:
        stream.seek(offset)
        text = b""
        while chunk := stream.read(BLOCK_BYTES):
            text += chunk
            end = text.rfind(between)
            if end >= 0:
                offset += end + inside
                yield text[: end + 1], offset
                text = text[end + inside :]
            elif len(text) > 64 * BLOCK_BYTES:
                return


def _parse(block: bytes, between: bytes) -> tuple[pa.Table, list[str]] | None:
    """Columns and ids of a block of records parted by ``between``; None if Arrow cannot take it as it is.

    Without their commas, records are a sequence of JSON values. A comma inside a record is needed there, so that
    Arrow refuses the block if one was taken away; and where it finds one record more than commas were taken away,
    no comma is missing between two.
    """
    apart = between.replace(b",", b" ", 1)
    try:
        if not block.isascii():
            block.decode()
        table = pj.read_json(pa.BufferReader(block.replace(between, apart)), _ONE_BLOCK, _PLAIN)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        return None
    if table.num_rows != block.count(between) + 1:
        return None
    table = table.combine_chunks()
    ids, conversations = (table[name].chunk(0) for name in ("id", "conversations"))
    messages = conversations.values
    roles, texts = messages.field("from"), messages.field("value")
    if ids.null_count or conversations.null_count or messages.null_count or texts.null_count:
        return None
    try:
        for array in (ids, roles, texts):
            array.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return _columns(conversations.offsets.to_numpy().astype(np.int64), roles, texts), ids.to_pylist()


def _columns(offsets: np.ndarray, roles: pa.Array, texts: pa.Array) -> pa.Table:
    """`COLUMNS` of conversations whose messages lie between ``offsets``."""
    chars = pc.utf8_length(texts).to_numpy().astype(np.int64)
    ends = np.concatenate(([0], np.cumsum(chars)))
    turns = np.diff(offsets)
    first = pa.array(offsets[:-1], mask=turns < 2)
    second = pa.array(offsets[:-1] + 1, mask=turns < 2)
    lengths = pa.array(chars)
    columns = (
        turns, turns, roles.take(first), roles.take(second), texts.take(first), texts.take(second),
        lengths.take(first), lengths.take(second), ends[offsets[1:]] - ends[offsets[:-1]],
    )  # fmt: skip
    return pa.table(columns, schema=COLUMNS)
