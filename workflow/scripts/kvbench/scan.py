"""One reading of a ShareGPT file under the rules of a selection: what each record is, and the kept texts on disk.

A big file is read in parts, a process each. Where a part begins is guessed and then proved: the part before it must
end at that very byte. If it does not, or a part cannot be read, the rest is read again in one piece.
"""

import multiprocessing
import os
import signal
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from struct import Struct
from typing import Any, Literal

from kvbench.errors import UserError
from kvbench.sharegpt import Problem, Records, find_record, read_role, read_texts

Selection = Literal["article", "human_first"]

HUMAN_ROLES = frozenset({"human", "user"})
NO_ASSISTANT_ROLES = HUMAN_ROLES | {"system", "developer", "tool", "function"}
EXAMPLES_PER_KIND = 5

# A smaller part is not worth a process, and more processes are not worth their memory.
PART_BYTES = 32 << 20
MOST_PARTS = 8

# What is known of a kept conversation, in the order of the numbers of a `Part`.
NUMBERS = (
    "source_index", "prompt_chars", "completion_chars", "turns", "conversation_chars",
    "prompt_bytes", "completion_bytes",
)  # fmt: skip
_PACK = Struct(f"{len(NUMBERS)}q").pack


class Absent(Enum):
    """Stands for an id that a record does not have."""

    ID = "absent"


@dataclass(frozen=True)
class Rules:
    """How to select: least characters a text, seed of the shuffle, largest share of malformed records in [0, 1]."""

    selection: Selection
    seed: int
    min_chars: int
    max_malformed_share: float


@dataclass
class Part:
    """What one process read.

    ``ids``, ``drawn`` (1 if it takes part in the shuffle) and ``kept`` (1 if it is kept too) have a row for every
    record that is an object. ``numbers`` has `NUMBERS` for each conversation kept, ``roles`` who spoke first in it;
    the file ``texts`` has its prompt and its completion, one conversation's after the other's.
    """

    texts: Path
    reached: int = 0
    truncated: bool = False
    bytes_left_out: int = 0
    read: int = 0
    two_messages: int = 0
    readable: int = 0
    ids: list[Any] = field(default_factory=list)
    drawn: bytearray = field(default_factory=bytearray)
    kept: bytearray = field(default_factory=bytearray)
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    roles: list[str | None] = field(default_factory=list)
    malformed: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def note(self, problem: Problem, identity: Any) -> None:
        """Count a malformed record, the one being read, and keep it as an example if its kind has few."""
        self.malformed[problem.kind] += 1
        if self.malformed[problem.kind] <= EXAMPLES_PER_KIND:
            shown = identity if identity is None or isinstance(identity, str) else repr(identity)
            shown = shown and shown.encode("utf-8", "backslashreplace").decode()
            self.examples.append({"kind": problem.kind, "index": self.read, "id": shown, "detail": problem.detail})


@contextmanager
def scan(path: Path, rules: Rules, folder: Path) -> Iterator[Callable[[], list[Part]]]:
    """Start to read the file; the function given waits for the parts, which follow one another and hold all of it.

    Parameters
    ----------
    folder : for the texts.

    Raises
    ------
    UserError : see `Records`.
    """
    starts = _guess_starts(path)
    if len(starts) == 1:
        yield lambda: [scan_part(path, rules, folder / "0")]
        return
    # Forked, so that a process starts in milliseconds and shares what is imported.
    forking = multiprocessing.get_context("fork")
    processes, results = [], []
    # A signal that ends the job waits until all have started: halfway, a process would be left behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        for number, (start, stop) in enumerate(pairwise([*starts, None])):
            receiver, sender = forking.Pipe(duplex=False)
            arguments = (sender, path, rules, folder / str(number), start, stop)
            processes.append(forking.Process(target=_send_part, args=arguments, daemon=True))
            processes[-1].start()
            sender.close()
            results.append(receiver)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        yield lambda: _collect(path, rules, folder, starts, results)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collect(
    path: Path, rules: Rules, folder: Path, starts: list[int | None], results: "list[Connection[Any, Any]]"
) -> list[Part]:
    """The parts as far as each begins where the one before ends, and then the rest in one piece."""
    parts: list[Part] = []
    for start, result in zip(starts, results, strict=True):
        part = _receive(result) if not parts or parts[-1].reached == start else None
        if part is None:
            reached = parts[-1].reached if parts else None
            read = sum(part.read for part in parts)
            return [*parts, scan_part(path, rules, folder / "rest", reached, first_index=read)]
        parts.append(part)
    return parts


def scan_part(
    path: Path, rules: Rules, texts: Path, start: int | None = None, stop: int | None = None, first_index: int = 0
) -> Part:
    """Read the records from byte ``start`` on (None: the beginning) that begin before ``stop``; see `Records`."""
    part, records = Part(texts), Records(path, start, stop, first_index)
    with open(texts, "wb", buffering=1 << 18) as spool:
        for record in records:
            found, problem = read_texts(record)
            if problem:
                part.note(problem, record.get("id") if isinstance(record, dict) else None)
            if isinstance(record, dict) and _classify(part, record, found, rules):
                prompt, completion = found[0].encode(), found[1].encode()
                chars = sum(map(len, found))
                numbers = part.read, len(found[0]), len(found[1]), len(found), chars, len(prompt), len(completion)
                part.numbers.frombytes(_PACK(*numbers))  # which is faster than to extend it
                spool.write(prompt)
                spool.write(completion)
            part.read += 1
    part.reached, part.truncated, part.bytes_left_out = records.reached, records.truncated, records.bytes_left_out
    return part


def _classify(part: Part, record: dict[str, Any], texts: list[str], rules: Rules) -> bool:
    """Add a row for the record, whose readable texts are given; whether it is kept."""
    conversation = record.get("conversations")
    two_messages = isinstance(conversation, list) and len(conversation) >= 2
    readable = len(texts) >= 2
    # A malformed record keeps its place in the article's shuffle, so that it moves no other.
    drawn = two_messages if rules.selection == "article" else readable and _is_question_and_answer(record)
    kept = drawn and readable and len(texts[0]) >= rules.min_chars and len(texts[1]) >= rules.min_chars
    part.two_messages += two_messages
    part.readable += readable
    part.ids.append(record.get("id", Absent.ID))
    part.drawn.append(drawn)
    part.kept.append(kept)
    if kept:
        part.roles.append(read_role(record, 0))
    return kept


def _is_question_and_answer(record: dict[str, Any]) -> bool:
    return read_role(record, 0) in HUMAN_ROLES and read_role(record, 1) not in NO_ASSISTANT_ROLES | {None}


def _guess_starts(path: Path) -> list[int | None]:
    """Where the parts begin: None for the first, then what look like beginnings of records, evenly apart."""
    starts: list[int | None] = [None]
    records = Records(path)
    for _ in islice(records, 1):
        size = path.stat().st_size
        parts = min(MOST_PARTS, os.cpu_count() or 1, size // PART_BYTES)
        if records.between.startswith(b"}") and "fork" in multiprocessing.get_all_start_methods():
            guesses = (find_record(path, size * part // parts, records.between) for part in range(1, parts))
            starts += sorted({guess for guess in guesses if guess is not None})
    return starts


def _send_part(
    sender: "Connection[Any, Any]", path: Path, rules: Rules, texts: Path, start: int | None, stop: int | None
) -> None:
    """Send a part; None if it cannot be read: it may begin inside a record, and does not know its first's number."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        sender.send(scan_part(path, rules, texts, start, stop))
    except UserError:
        sender.send(None)


def _receive(result: "Connection[Any, Any]") -> Part | None:
    """A process's part; None if it sent none, or was killed before."""
    try:
        return result.recv()
    except EOFError:
        return None
