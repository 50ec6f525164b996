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
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.errors import UserError
from kvbench.files import atomic, write_json
from kvbench.sharegpt import SHAPE, Message, Number, Problem, Records, read_messages
from kvbench.sources import check_manifest_files, load_manifest

Selection = Literal["article", "human_first"]

HUMAN_ROLES = frozenset({"human", "user"})
OTHER_ROLES = frozenset({"system", "tool", "function", "developer"})
EXAMPLES_PER_KIND = 5
ROWS_PER_GROUP = 4096

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


@dataclass(frozen=True)
class Rules:
    """How to select: least characters a text, seed of the shuffle, largest share of malformed records in [0, 1]."""

    selection: Selection
    seed: int
    min_chars: int
    max_malformed_share: float


@dataclass
class Counts:
    """What each step kept, and what could not be read; the prompts' counts manifest is made of it."""

    conversations_read: int = 0
    truncated: bool = False
    bytes_left_out: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    malformed: Counter[str] = field(default_factory=Counter)
    malformed_examples: list[dict[str, Any]] = field(default_factory=list)

    def step(self, name: str, kept: int) -> None:
        """Record that ``kept`` conversations passed the step ``name``."""
        self.steps.append({"step": name, "kept": kept})

    def note(self, problem: Problem, index: int, conversation_id: str | None) -> None:
        """Count a malformed record, and keep it as an example if its kind has few."""
        self.malformed[problem.kind] += 1
        if self.malformed[problem.kind] <= EXAMPLES_PER_KIND:
            shown = conversation_id and conversation_id.encode("utf-8", "backslashreplace").decode()
            example = {"kind": problem.kind, "index": index, "id": shown, "detail": problem.detail}
            self.malformed_examples.append(example)


class Candidates:
    """Texts spooled to an unnamed file, and numbers about them in one array: no text stays in memory."""

    NUMBERS = ("source_index", "prompt_chars", "completion_chars", "turns", "conversation_chars")
    SPANS = ("start", "prompt_bytes", "completion_bytes")

    def __init__(self, spool: IO[bytes]) -> None:
        self.spool = spool
        self.ids: list[str | None] = []
        self.roles: list[str | None] = []
        self._numbers = array("q")
        self._end = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, source_index: int, conversation_id: str | None, messages: list[Message]) -> None:
        """Take a conversation of two readable messages or more."""
        chars = [len(text) for _, text in messages]
        prompt, completion = messages[0].text.encode(), messages[1].text.encode()
        numbers = source_index, chars[0], chars[1], len(chars), sum(chars), self._end, len(prompt), len(completion)
        self._numbers.extend(numbers)
        self._end += self.spool.write(prompt) + self.spool.write(completion)
        self.ids.append(conversation_id)
        self.roles.append(messages[0].role)

    def tables(self, order: np.ndarray) -> Iterator[pa.Table]:
        """The candidates at the positions ``order`` as tables of `SCHEMA`, a row group each."""
        self.spool.flush()
        names = (*self.NUMBERS, *self.SPANS)
        numbers = np.frombuffer(self._numbers, dtype=np.int64).reshape(-1, len(names))
        for first in range(0, len(order), ROWS_PER_GROUP):
            rows = order[first : first + ROWS_PER_GROUP]
            columns: dict[str, Any] = dict(zip(names, numbers[rows].T, strict=True))
            columns["rank"] = np.arange(first, first + len(rows))
            columns["conversation_id"] = [self.ids[row] for row in rows]
            columns["first_role"] = [self.roles[row] for row in rows]
            columns["prompt"], columns["completion"] = self._texts(*(columns[name] for name in self.SPANS))
            yield pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)

    def _texts(
        self, starts: np.ndarray, prompt_bytes: np.ndarray, completion_bytes: np.ndarray
    ) -> tuple[pa.LargeStringArray, pa.LargeStringArray]:
        """Prompts and completions, which lie one after the other from ``starts`` on."""
        spool, prompts, completions = self.spool.fileno(), [], []
        for start, prompt, completion in zip(
            starts.tolist(), prompt_bytes.tolist(), completion_bytes.tolist(), strict=True
        ):
            both = os.pread(spool, prompt + completion, start)
            prompts.append(both[:prompt])
            completions.append(both[prompt:])
        return _string_array(prompts, prompt_bytes), _string_array(completions, completion_bytes)


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
    write_json(counts_path, about | asdict(counts))
    cut = f", cut off: {counts.bytes_left_out:,} bytes of an unfinished record left out" if counts.truncated else ""
    print(f"{dataset.file.name}: {counts.conversations_read:,} conversations{cut}")
    for step in counts.steps[1:]:
        print(f"{step['kept']:>10,}  {step['step']}")
    for kind, number in counts.malformed.items():
        print(f"{number:>10,}  malformed: {kind}")


def select(path: Path, output: Path, rules: Rules, metadata: dict[str, Any]) -> Counts:
    """Write the prompts of the ShareGPT file ``path`` to the Parquet file ``output``.

    Parameters
    ----------
    metadata : stored as JSON under the schema's key ``kvbench``.

    Returns
    -------
    What each step kept.

    Raises
    ------
    UserError : the file cannot be read (see `Records`), too many records are malformed, the ids cannot be
        sorted, or no prompt is left.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output.parent) as spool:
        counts, candidates = Counts(), Candidates(spool)
        ids, drawn, found = _scan(path, rules, counts, candidates)
        _refuse_too_many_malformed(path, counts, rules.max_malformed_share)
        places = draw_order(ids, np.frombuffer(drawn, dtype=np.bool_), rules.seed, path)
        candidate_of = np.frombuffer(found, dtype=np.int64)[places]
        order = candidate_of[candidate_of >= 0]
        if not len(order):
            raise _no_prompts(path, counts)
        with atomic(output) as temporary:
            _write(candidates.tables(order), temporary, metadata)
    return counts


def _scan(
    path: Path, rules: Rules, counts: Counts, candidates: Candidates
) -> tuple[list[str], bytearray, "array[int]"]:
    """Read every record once.

    Returns
    -------
    ids : of every record that is an object, one JSON object each that holds its id alone.
    drawn : for each, 1 if it takes part in the shuffle.
    found : for each, its number among the candidates, or -1.
    """
    ids: list[str] = []
    drawn, found = bytearray(), array("q")
    two_messages = readable = human_first = 0
    records = Records(path)
    for index, record in enumerate(records):
        counts.conversations_read += 1
        messages, problem = read_messages(record)
        if problem:
            counts.note(problem, index, _conversation_id(record))
        if not isinstance(record, dict):
            continue
        long_enough = isinstance(record.get("conversations"), list) and len(record["conversations"]) >= 2
        answered = _is_question_and_answer(messages)
        # A malformed record keeps its place in the article's shuffle, so that it moves no other.
        takes_part = long_enough if rules.selection == "article" else answered
        kept = takes_part and _are_long(messages, rules.min_chars)
        ids.append(_id_object(record))
        drawn.append(takes_part)
        found.append(len(candidates) if kept else -1)
        if kept:
            candidates.add(index, _conversation_id(record), messages)
        two_messages += long_enough
        readable += len(messages) >= 2
        human_first += answered
    counts.truncated, counts.bytes_left_out = records.truncated, records.bytes_left_out
    counts.step("read", counts.conversations_read)
    counts.step("at least 2 messages", two_messages)
    counts.step("first 2 messages readable", readable)
    if rules.selection == "human_first":
        counts.step("a human first, an assistant second", human_first)
    counts.step(f"prompt and completion of at least {rules.min_chars} characters", len(candidates))
    return ids, drawn, found


def draw_order(ids: list[str], drawn: np.ndarray, seed: int, path: Path) -> np.ndarray:
    """Positions of the records drawn, sorted by id and shuffled, as pandas orders them.

    pandas sorts an object column with an unstable algorithm and types the ids when it reads them, so the order
    among equal ids follows from its own calls on the same column, and from nothing else. Only ids go through it.

    Parameters
    ----------
    ids : a JSON object for each record, with its id alone or empty.
    drawn : bool, of the same length.

    Raises
    ------
    UserError : pandas cannot read or compare the ids.
    """
    import pandas as pd

    try:
        frame = pd.read_json(io.StringIO(f"[{','.join(ids)}]"))
        frame.index = pd.RangeIndex(len(ids))
        frame = frame.reindex(columns=["id"])[drawn]
        return frame.sort_values(by="id").sample(frac=1, random_state=seed).index.to_numpy()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The ids in {path} cannot be sorted: {error}",
            "Make them all text, or all integers below 2^64",
        ) from error


def _write(tables: Iterator[pa.Table], path: Path, metadata: dict[str, Any]) -> None:
    schema = SCHEMA.with_metadata({b"kvbench": json.dumps(metadata, sort_keys=True).encode()})
    # Texts neither repeat nor sort, so that dictionaries and statistics of them only cost.
    numbers = [each.name for each in SCHEMA if each.type not in (pa.string(), pa.large_string())]
    with pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=["first_role"], write_statistics=numbers
    ) as writer:
        for table in tables:
            writer.write_table(table)


def _string_array(texts: Sequence[bytes], lengths: np.ndarray) -> pa.LargeStringArray:
    """An Arrow array of UTF-8 texts without a Python string each."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def _are_long(messages: list[Message], min_chars: int) -> bool:
    return len(messages) >= 2 and len(messages[0].text) >= min_chars and len(messages[1].text) >= min_chars


def _is_question_and_answer(messages: list[Message]) -> bool:
    if len(messages) < 2 or messages[0].role not in HUMAN_ROLES:
        return False
    return messages[1].role is not None and messages[1].role not in HUMAN_ROLES | OTHER_ROLES


def _id_object(record: dict[str, Any]) -> str:
    """The record's id alone as a JSON object, in the file's own spelling where that can matter."""
    return f'{{"id":{_spelled(record["id"])}}}' if "id" in record else "{}"


def _conversation_id(record: Any) -> str | None:
    """A record's id as text: itself, or as JSON spells it; None where there is none."""
    identity = record.get("id") if isinstance(record, dict) else None
    return identity if identity is None or isinstance(identity, str) else _spelled(identity)


def _spelled(value: Any) -> str:
    """A value that `Records` read as JSON: numbers exactly as in the file, except inside arrays and objects."""
    if isinstance(value, Number):
        return value.text
    return _spell(value)


def _refuse_too_many_malformed(path: Path, counts: Counts, largest_share: float) -> None:
    malformed = sum(counts.malformed.values())
    if malformed <= largest_share * counts.conversations_read:
        return
    kinds = ", ".join(f"{kind} {number}" for kind, number in counts.malformed.most_common())
    first = counts.malformed_examples[0]
    raise UserError(
        f"{path} has {malformed:,} malformed records of {counts.conversations_read:,}, more than the share of "
        f"{largest_share:g} allowed ({kinds}; the first is record {first['index']}, id {first['id']}: {first['detail']})",
        f"{SHAPE}. Mend the records, or raise dataset.max_malformed_share",
    )


def _no_prompts(path: Path, counts: Counts) -> UserError:
    steps = ", ".join(f"{step['step']}: {step['kept']:,}" for step in counts.steps)
    cut = " (the file is cut off)" if counts.truncated else ""
    return UserError(
        f"No prompt is left of {path}{cut} ({steps})",
        "Lower dataset.min_chars, or use dataset.selection: article if the first messages are not a human's",
    )
