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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kvbench.conversations import MISSING, Batch, Conversations
from kvbench.errors import UserError
from kvbench.files import atomic, write_json
from kvbench.sharegpt import SHAPE, Number, Problem
from kvbench.sources import check_manifest_files, load_manifest

Selection = Literal["article", "human_first"]

HUMAN_ROLES = frozenset({"human", "user"})
OTHER_ROLES = frozenset({"system", "tool", "function", "developer"})
TWO_MESSAGES = "at least 2 messages"
HUMAN_FIRST = "a human first, an assistant second"
EXAMPLES_PER_KIND = 5
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

    def note(self, problem: Problem, index: int, conversation_id: str | None) -> None:
        """Count a malformed record, and keep it as an example if its kind has few."""
        self.malformed[problem.kind] += 1
        if self.malformed[problem.kind] <= EXAMPLES_PER_KIND:
            shown = conversation_id and conversation_id.encode("utf-8", "backslashreplace").decode()
            example = {"kind": problem.kind, "index": index, "id": shown, "detail": problem.detail}
            self.malformed_examples.append(example)


class Candidates:
    """Texts spooled to an unnamed file, and what is known about them in memory: no text stays there."""

    NUMBERS = ("source_index", "prompt_chars", "completion_chars", "turns", "conversation_chars")
    SPANS = ("start", "prompt_bytes", "completion_bytes")

    def __init__(self, spool: IO[bytes]) -> None:
        self.spool = spool
        self.ids: list[str | None] = []
        self._known: list[pa.Table] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, batch: Batch, rows: np.ndarray) -> None:
        """Take the conversations of the batch at the positions ``rows``: of two readable messages or more."""
        columns = batch.columns.take(rows)
        prompts, completions = columns["prompt"].combine_chunks(), columns["completion"].combine_chunks()
        both = pc.binary_join_element_wise(prompts, completions, "")
        _, offsets, data = both.buffers()
        starts = np.frombuffer(offsets, dtype=np.int32)[: len(both)].astype(np.int64) + self._end
        if data is not None:
            self._end += self.spool.write(data)
        lengths = (pc.binary_length(texts).cast(pa.int64()) for texts in (prompts, completions))
        self._known.append(
            columns.drop_columns(["prompt", "completion"])
            .append_column("source_index", pa.array(batch.source_index[rows]))
            .append_column("start", pa.array(starts))
            .append_column("prompt_bytes", next(lengths))
            .append_column("completion_bytes", next(lengths))
        )
        self.ids.extend(_text_of_id(batch.ids[row]) for row in rows.tolist())

    def tables(self, order: np.ndarray) -> Iterator[pa.Table]:
        """The candidates at the positions ``order`` as tables of `SCHEMA`, a row group each."""
        self.spool.flush()
        known = pa.concat_tables(self._known).combine_chunks()
        for first in range(0, len(order), ROWS_PER_GROUP):
            rows = order[first : first + ROWS_PER_GROUP]
            part = known.take(rows)
            prompts, completions = self._texts(*(part[name].to_numpy() for name in self.SPANS))
            columns = {name: part[name] for name in (*self.NUMBERS, "first_role")} | {
                "rank": np.arange(first, first + len(rows)),
                "conversation_id": [self.ids[row] for row in rows.tolist()],
                "prompt": prompts,
                "completion": completions,
            }
            yield pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)

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
        order = found[draw_order(ids, drawn, rules.seed, path)]
        order = order[order >= 0]
        if not len(order):
            raise _no_prompts(path, counts)
        with atomic(output) as temporary:
            _write(candidates.tables(order), temporary, metadata)
    return counts


def _scan(path: Path, rules: Rules, counts: Counts, candidates: Candidates) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Read the file once.

    Returns
    -------
    ids : of every record that is an object.
    drawn : bool, whether each takes part in the shuffle.
    found : for each, its number among the candidates, or -1.
    """
    ids: list[Any] = []
    drawn, found = [], []
    passed: Counter[str] = Counter()
    conversations = Conversations(path)
    for batch in conversations:
        for problem, index, identity in batch.problems:
            counts.note(problem, index, _text_of_id(identity))
        steps = _steps(batch.columns, rules)
        passed.update({step: int(mask.sum()) for step, mask in steps.items()})
        # A malformed record keeps its place in the article's shuffle, so that it moves no other.
        drawn.append(steps[TWO_MESSAGES if rules.selection == "article" else HUMAN_FIRST])
        (rows,) = np.nonzero(list(steps.values())[-1])
        places = np.full(len(batch.ids), -1)
        places[rows] = np.arange(len(candidates), len(candidates) + len(rows))
        found.append(places)
        ids.extend(batch.ids)
        candidates.add(batch, rows)
    counts.conversations_read = conversations.read
    counts.truncated, counts.bytes_left_out = conversations.truncated, conversations.bytes_left_out
    counts.steps = [{"step": "read", "kept": conversations.read}]
    counts.steps += [{"step": step, "kept": kept} for step, kept in passed.items()]
    return ids, np.concatenate(drawn), np.concatenate(found)


def _steps(columns: pa.Table, rules: Rules) -> dict[str, np.ndarray]:
    """For each step in order, which records pass it and all before it."""

    def holds(condition: pa.ChunkedArray) -> np.ndarray:
        return condition.fill_null(False).to_numpy().astype(bool)

    steps = {TWO_MESSAGES: holds(pc.greater_equal(columns["messages"], 2))}
    passed = steps["first 2 messages readable"] = holds(pc.greater_equal(columns["turns"], 2))
    if rules.selection == "human_first":
        asked = pc.is_in(columns["first_role"], pa.array(sorted(HUMAN_ROLES)))
        other = pc.is_in(columns["second_role"], pa.array(sorted(HUMAN_ROLES | OTHER_ROLES)))
        answered = pc.and_(pc.is_valid(columns["second_role"]), pc.invert(other))
        passed = steps[HUMAN_FIRST] = passed & holds(asked) & holds(answered)
    shorter = pc.min_element_wise(columns["prompt_chars"], columns["completion_chars"])
    name = f"prompt and completion of at least {rules.min_chars} characters"
    steps[name] = passed & holds(pc.greater_equal(shorter, rules.min_chars))
    return steps


def draw_order(ids: list[Any], drawn: np.ndarray, seed: int, path: Path) -> np.ndarray:
    """Positions of the records drawn, sorted by id and shuffled, as pandas 2 orders them.

    pandas sorts an object column with an unstable algorithm, so the order among equal ids follows from that
    algorithm on the same column, and from nothing else. Text ids stay an object column, which pandas sorts with
    NumPy's quicksort and samples with a permutation of NumPy's: so they need no pandas. It turns other ids, and
    text that spells numbers, into other types: those go through pandas itself, which gets nothing but ids.

    Parameters
    ----------
    ids : as `Batch` has them.
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
        for table in tables:
            writer.write_table(table)


def _string_array(texts: Sequence[bytes], lengths: np.ndarray) -> pa.LargeStringArray:
    """An Arrow array of UTF-8 texts without a Python string each."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def _spells_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _id_object(identity: Any) -> str:
    """The id alone as a JSON object, in the file's own spelling where that can matter."""
    return "{}" if identity is MISSING else f'{{"id":{_spelled(identity)}}}'


def _text_of_id(identity: Any) -> str | None:
    """An id as text: itself, or as JSON spells it; None where there is none."""
    if identity is MISSING or identity is None or isinstance(identity, str):
        return identity if isinstance(identity, str) else None
    return _spelled(identity)


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
