"""Read a ShareGPT JSON array record by record, in memory that does not grow with the file."""

import codecs
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from kvbench.errors import UserError

# A chunk and what is made of it fit into a core's cache; a record of many chunks is read like an unfamiliar one.
CHUNK_BYTES = 1 << 17
MOST_BYTES = 1 << 20
WINDOW_BYTES = 1 << 16
SHAPE = 'A ShareGPT file is a JSON array of {"id": …, "conversations": [{"from": …, "value": …}, …]}'

# What orjson makes of an id exactly; it rounds other numbers.
_EXACT = {str, int, bool, type(None)}

_GAP = re.compile(rb"[ \t\n\r]*")
_NEXT_RECORD = re.compile(rb'[ \t\n\r]*,[ \t\n\r]*(\{[ \t\n\r]*"[^"\\]*")')
# What a value cut off in the middle leaves behind at the place where the decoder gives up.
_CUT = re.compile(r"[ \t\n\r]*(?:-|-?I\w{0,6}|Na?|nu?l?|tr?u?|fa?l?s?|[.eE][+-]?)?[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Number:
    """A JSON number as the file spells it, so that no digit is lost on the way."""

    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a record, or its conversation from some message on, cannot be read."""

    kind: str
    detail: str


class Records:
    """The records of a JSON array one by one, in memory of a record and a chunk.

    It reads what pandas reads: NaN, control characters and lone surrogates too. In an id, a number that is no integer
    of 64 bits comes as `Number`.

    The standard library's decoder knows where a value ends. Where what follows the last record occurs again, the
    bytes up to there go to orjson, which is faster: if they are whole values with commas between, those are the
    records. All records of a chunk are tried at once, then one by one, and the decoder reads what orjson does not
    read like it. After the last record, ``truncated`` says whether the file ends before its array does,
    ``bytes_left_out`` how many bytes of an unfinished record were left, and ``reached`` where reading ended.

    Parameters
    ----------
    start : byte offset of a record to begin with; None for the beginning of the array.
    stop : no record is read that begins at this byte offset or later.
    index : number of the first record, for messages.

    Raises
    ------
    UserError : the file is missing, empty, not UTF-8, no JSON array, or broken before its end
        (named by record and byte offset).
    """

    def __init__(self, path: Path, start: int | None = None, stop: int | None = None, index: int = 0) -> None:
        self.path = path
        self.truncated = False
        self.bytes_left_out = 0
        self.between = b""  # from the last `}` of a record to the first key of the next, as last seen
        self._start, self._stop, self._index = start, sys.maxsize if stop is None else stop, index
        # Not strict: control characters inside strings are read as they are.
        decoder = json.JSONDecoder(parse_int=Number, parse_float=Number, strict=False)
        self._scan = decoder.scan_once  # type: ignore[attr-defined]
        self._data = b""
        self._position = 0  # in _data
        self._offset = start or 0  # of _data in the file
        self._ended = False
        self._together = True  # no record in _data has yet kept orjson from reading all at once

    @property
    def reached(self) -> int:
        """Byte offset of what is read next."""
        return self._offset + self._position

    def __iter__(self) -> Iterator[Any]:
        try:
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(self._offset)
                if self._start is None:
                    self._open_array(stream)
                    if self._peek(stream) == b"]":
                        return self._close(stream)
                yield from self._values(stream)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"{self.path} is no file to read", "Fetch the dataset again") from error

    def _open_array(self, stream: BinaryIO) -> None:
        self._peek(stream)
        if self._data.startswith(codecs.BOM_UTF8):
            self._position = len(codecs.BOM_UTF8)
        first = self._peek(stream)
        if first == b"[":
            self._position += 1
        elif first == b"":
            raise UserError(f"{self.path} is empty", "Fetch the dataset again, or point the config at another file")
        elif first == b"{":
            raise UserError(
                f"{self.path} holds an object where an array of conversations should be",
                f"{SHAPE}; JSON Lines become one with `jq -s . in.jsonl > out.json`",
            )
        else:
            self._decode(WINDOW_BYTES)
            raise UserError(f"{self.path} is no JSON array: it begins with {first!r}", SHAPE)

    def _values(self, stream: BinaryIO) -> Iterator[Any]:
        while True:
            yield from self._familiar(stream)
            self._peek(stream)  # past the gap: the decoder takes none
            if self.reached >= self._stop:
                return
            found = self._value(stream)
            if found is None:
                return self._truncate()
            if following := _NEXT_RECORD.match(self._data, self._position):
                self.between = self._data[self._position - 1 : following.end()]
            yield found[0]
            self._index += 1
            follows = self._peek(stream)
            if follows == b"]":
                return self._close(stream)
            if follows == b"":
                return self._truncate()
            if follows != b",":
                raise self._broken("Expecting ',' or ']' between records", self._position)
            self._position += 1

    def _familiar(self, stream: BinaryIO) -> Iterator[Any]:
        """The records from the position on that end as the last one did, up to one that orjson cannot read."""
        between = self.between
        if not between.startswith(b"}"):
            return
        inside = between.index(b"{")
        self._position = _GAP.match(self._data, self._position).end()  # type: ignore[union-attr]
        while True:
            data, limit = self._data, self._stop - self._offset
            find = data.rfind if self._together else data.find
            end = find(between, self._position, limit - inside + len(between)) + 1
            if end:
                values = _load(data[self._position : end])
                if values is not None:
                    yield from values
                    self._index += len(values)
                    self._position = end - 1 + inside
                elif self._together:
                    self._together = False
                else:
                    return
            elif self._together and not self._ended and len(data) < min(limit, self._position + MOST_BYTES):
                self._read(stream, CHUNK_BYTES)
            else:
                return

    def _value(self, stream: BinaryIO) -> tuple[Any] | None:
        """Read the value at the position; None when the file ends inside it."""
        size = WINDOW_BYTES
        while True:
            text = self._decode(size)
            whole = self._ended and self._position + size >= len(self._data)
            try:
                value, end = self._scan(text, 0)
                # A number at the very end of the text may go on after it.
                if end < len(text) or whole:
                    self._position += len(text[:end].encode())
                    return (value,)
            except StopIteration as error:
                self._refuse_unless_cut("Expecting value", text, error.value)
            except json.JSONDecodeError as error:
                self._refuse_unless_cut(error.msg, text, error.pos)
            except RecursionError as error:
                raise self._broken("Nested too deeply", self._position) from error
            if whole:
                return None
            # Twice as much each time, so that a big record costs O(n).
            size *= 2
            while len(self._data) - self._position < size and not self._ended:
                self._read(stream, size)

    def _decode(self, size: int) -> str:
        """The text of ``size`` bytes from the position on, less an unfinished character at their end."""
        try:
            return codecs.utf_8_decode(self._data[self._position : self._position + size], "strict", False)[0]
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 at byte {self.reached + error.start}",
                "Convert it, for example with `iconv -f LATIN1 -t UTF-8`, or unpack it if it is an archive",
            ) from error

    def _refuse_unless_cut(self, message: str, text: str, position: int) -> None:
        """Raise unless an end of the text inside a value explains why the decoder stopped there."""
        cut_string = message.startswith("Unterminated string")
        cut_escape = message.startswith("Invalid \\u") and len(text) - position <= len("\\u1234")
        if not (cut_string or cut_escape or _CUT.fullmatch(text, position)):
            raise self._broken(message, self._position + len(text[:position].encode()))

    def _peek(self, stream: BinaryIO) -> bytes:
        """The next byte that is no white space, or b"" at the end of the file."""
        while True:
            self._position = _GAP.match(self._data, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._data) or self._ended:
                return self._data[self._position : self._position + 1]
            self._read(stream, CHUNK_BYTES)

    def _read(self, stream: BinaryIO, size: int) -> None:
        """Drop what was read and append the next chunk."""
        chunk = stream.read(max(CHUNK_BYTES, size))
        self._ended = not chunk
        self._together = True
        self._offset += self._position
        self._data = self._data[self._position :] + chunk
        self._position = 0

    def _truncate(self) -> None:
        self.truncated = True
        self.bytes_left_out = len(self._data) - self._position

    def _close(self, stream: BinaryIO) -> None:
        self._position += 1
        if self._peek(stream):
            raise self._broken("Something follows the end of the array", self._position)

    def _broken(self, message: str, position: int) -> UserError:
        return UserError(
            f"{self.path} is broken JSON in record {self._index}, at byte {self._offset + position}: {message}",
            "Fetch the file again, or mend that record",
        )


def _load(text: bytes) -> list[Any] | None:
    """The objects in the text, which has commas between them; None if orjson does not read them like the decoder."""
    try:
        values = orjson.loads(b"[%b]" % text)
        return values if {type(value.get("id")) for value in values} <= _EXACT else None
    except (orjson.JSONDecodeError, AttributeError):
        return None


def find_record(path: Path, offset: int, between: bytes) -> int | None:
    """Byte offset of what looks like the beginning of a record at ``offset`` or later: the ``{`` of a ``between``."""
    with open(path, "rb") as stream:
        stream.seek(offset)
        data = b""
        while chunk := stream.read(CHUNK_BYTES):
            data = data[-len(between) :] + chunk
            if (found := data.find(between)) >= 0:
                return stream.tell() - len(data) + found + between.index(b"{")
    return None


def read_texts(record: Any) -> tuple[list[str], Problem | None]:
    """The texts of a record's messages up to the first that cannot be read, and what is wrong with that one.

    A text or id that UTF-8 cannot hold (a lone surrogate) counts as unreadable.
    """
    if not isinstance(record, dict):
        return [], Problem("record_not_an_object", f"it is {_kind(record)}")
    identity = record.get("id")
    if isinstance(identity, str) and not (identity.isascii() or _storable(identity)):
        return [], Problem("lone_surrogate", "its id has half a surrogate pair")
    if "conversations" not in record:
        return [], Problem("conversations_missing", f"its keys are {', '.join(record) or 'none'}")
    conversation = record["conversations"]
    if not isinstance(conversation, list):
        return [], Problem("conversations_not_a_list", f"it is {_kind(conversation)}")
    try:
        texts = [message["value"] for message in conversation]
        if all(map(_storable, filterfalse(str.isascii, texts))):
            return texts, None
    except (KeyError, TypeError):
        pass
    problems = (_message_problem(message, number) for number, message in enumerate(conversation))
    number, problem = next((number, problem) for number, problem in enumerate(problems) if problem)
    return [message["value"] for message in conversation[:number]], problem


def read_role(record: dict[str, Any], number: int) -> str | None:
    """Who speaks in a readable message, equal names as one object; None where the file has no text for it."""
    role = record["conversations"][number].get("from")
    return sys.intern(role) if isinstance(role, str) and (role.isascii() or _storable(role)) else None


def _storable(text: str) -> bool:
    """Whether UTF-8 can hold the text: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _message_problem(message: Any, number: int) -> Problem | None:
    if not isinstance(message, dict):
        return Problem("message_not_an_object", f"message {number} is {_kind(message)}")
    if "value" not in message:
        return Problem("value_missing", f"message {number} has no value")
    if not isinstance(message["value"], str):
        return Problem("value_not_a_string", f"the value of message {number} is {_kind(message['value'])}")
    if not _storable(message["value"]):
        return Problem("lone_surrogate", f"the value of message {number} has half a surrogate pair")
    return None


def _kind(value: Any) -> str:
    """What JSON calls the value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
