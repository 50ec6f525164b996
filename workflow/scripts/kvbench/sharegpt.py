"""Read a ShareGPT JSON array record by record, in memory that does not grow with the file."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kvbench.errors import UserError

CHUNK_BYTES = 1 << 20
SHAPE = 'A ShareGPT file is a JSON array of {"id": …, "conversations": [{"from": …, "value": …}, …]}'

_GAP = re.compile(r"[ \t\n\r]*")
_NEXT_RECORD = re.compile(r'[ \t\n\r]*,[ \t\n\r]*(\{[ \t\n\r]*"[^"\\]*")')
# What a value cut off in the middle leaves behind at the place where the decoder gives up.
_CUT = re.compile(
    r"[ \t\n\r]*(?:-|-?I\w{0,6}|Na?|n|nul?|t|tru?|f|fal?|fals|[.eE][+-]?|\\u[0-9a-fA-F]{0,4}|\\)?[ \t\n\r]*"
)


@dataclass(frozen=True, slots=True)
class Number:
    """A JSON number as the file spells it, so that no digit is lost on the way."""

    text: str


class Message(NamedTuple):
    """One message of a conversation; ``role`` is None where the file names none."""

    role: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a record, or its conversation from some message on, cannot be read."""

    kind: str
    detail: str


class Records:
    """The records of a JSON array one by one, in memory of one record and a chunk.

    It reads what pandas reads: NaN, control characters and lone surrogates too. Numbers come as `Number`.
    After the last record, ``truncated`` says whether the file ends before its array does, and ``bytes_left_out``
    how many bytes of an unfinished record were left.

    Parameters
    ----------
    start : byte offset of a record to begin with; 0 for the beginning of the array.
    index : number of the first record, for messages.

    Raises
    ------
    UserError : the file is missing, empty, not UTF-8, no JSON array, or broken before its end
        (named by record and byte offset).
    """

    def __init__(self, path: Path, start: int = 0, index: int = 0) -> None:
        self.path = path
        self.truncated = False
        self.bytes_left_out = 0
        # Not strict: control characters inside strings are read as they are.
        decoder = json.JSONDecoder(parse_int=Number, parse_float=Number, strict=False)
        self._scan = decoder.scan_once  # type: ignore[attr-defined]
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0  # in _text
        self._start = self.bytes_read = start  # of the file, up to the end of _text
        self._ended = False
        self._index = index  # of the record being read

    def __iter__(self) -> Iterator[Any]:
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self._start)
                if self._start == 0:
                    self._open_array(stream)
                    if self._peek(stream) == "]":
                        return self._close(stream)
                yield from self._values(stream)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"{self.path} is no file to read", "Fetch the dataset again") from error

    def next_record(self) -> tuple[int, bytes] | None:
        """Where the record after the last one begins, in bytes, and what is between them.

        That is all from the last ``}`` to the first key; None where the text read so far does not hold it.
        """
        match = _NEXT_RECORD.match(self._text, self._position)
        if match is None or self._text[self._position - 1] != "}":
            return None
        return self._offset(match.start(1)), self._text[self._position - 1 : match.end()].encode()

    def _open_array(self, stream: BinaryIO) -> None:
        first = self._peek(stream)
        if first == "\ufeff":
            self._position += 1
            first = self._peek(stream)
        if first == "[":
            self._position += 1
            return
        if first == "":
            raise UserError(f"{self.path} is empty", "Fetch the dataset again, or point the config at another file")
        if first == "{":
            raise UserError(
                f"{self.path} holds an object where an array of conversations should be",
                f"{SHAPE}; JSON Lines become one with `jq -s . in.jsonl > out.json`",
            )
        raise UserError(f"{self.path} is no JSON array: it begins with {first!r}", SHAPE)

    def _values(self, stream: BinaryIO) -> Iterator[Any]:
        while True:
            self._peek(stream)  # past the gap: the decoder takes none
            found = self._value(stream)
            if found is None:
                return self._truncate()
            yield found[0]
            self._index += 1
            follows = self._peek(stream)
            if follows == "]":
                self._position += 1
                return self._close(stream)
            if follows == "":
                return self._truncate()
            if follows != ",":
                raise self._broken("Expecting ',' or ']' between records", self._position)
            self._position += 1

    def _value(self, stream: BinaryIO) -> tuple[Any] | None:
        """Read the value at the position; None when the file ends inside it."""
        while True:
            try:
                value, end = self._scan(self._text, self._position)
                # A number at the very end of the text may go on in the next chunk.
                if end < len(self._text) or self._ended:
                    self._position = end
                    return (value,)
            except StopIteration as error:
                self._refuse_unless_cut("Expecting value", error.value)
            except json.JSONDecodeError as error:
                self._refuse_unless_cut(error.msg, error.pos)
            except RecursionError as error:
                raise self._broken("Nested too deeply", self._position) from error
            if self._ended:
                return None
            self._read(stream)

    def _refuse_unless_cut(self, message: str, position: int) -> None:
        """Raise unless an end of the text inside a value explains why the decoder stopped there."""
        cut_string = message.startswith("Unterminated string")
        cut_escape = message.startswith("Invalid \\u") and len(self._text) - position <= len("\\u1234")
        if not (cut_string or cut_escape or _CUT.fullmatch(self._text, position)):
            raise self._broken(message, position)

    def _peek(self, stream: BinaryIO) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            self._position = _GAP.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read(stream)

    def _read(self, stream: BinaryIO) -> None:
        """Drop what was read and append the next chunk: as long as what is left, so that big records cost O(n)."""
        left = self._text[self._position :]
        data = stream.read(max(CHUNK_BYTES, len(left)))
        self._ended = not data
        pending = len(self._decoder.getstate()[0])
        try:
            self._text = left + self._decoder.decode(data)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 at byte {self.bytes_read + error.start}",
                "Convert it, for example with `iconv -f LATIN1 -t UTF-8`, or unpack it if it is an archive",
            ) from error
        self.bytes_read += len(data) + pending - len(self._decoder.getstate()[0])
        self._position = 0

    def _offset(self, position: int) -> int:
        """Byte offset in the file of a position in the text."""
        return self.bytes_read - len(self._text[position:].encode())

    def _truncate(self) -> None:
        self.truncated = True
        half_a_character = len(self._decoder.getstate()[0])
        self.bytes_left_out = self.bytes_read + half_a_character - self._offset(self._position)

    def _close(self, stream: BinaryIO) -> None:
        if self._peek(stream) or self._decoder.getstate()[0]:
            raise self._broken("Something follows the end of the array", self._position)

    def _broken(self, message: str, position: int) -> UserError:
        return UserError(
            f"{self.path} is broken JSON in record {self._index}, at byte {self._offset(position)}: {message}",
            "Fetch the file again, or mend that record",
        )


def read_messages(record: Any) -> tuple[list[Message], Problem | None]:
    """The messages of a record up to the first that cannot be read, and what is wrong with that one.

    A text or id that UTF-8 cannot hold (a lone surrogate) counts as unreadable.
    """
    if not isinstance(record, dict):
        return [], Problem("record_not_an_object", f"it is {_kind(record)}")
    identity = record.get("id")
    if isinstance(identity, str) and not _storable(identity):
        return [], Problem("lone_surrogate", "its id has half a surrogate pair")
    if "conversations" not in record:
        return [], Problem("conversations_missing", f"its keys are {', '.join(record) or 'none'}")
    conversation = record["conversations"]
    if not isinstance(conversation, list):
        return [], Problem("conversations_not_a_list", f"it is {_kind(conversation)}")
    messages: list[Message] = []
    for number, message in enumerate(conversation):
        try:
            text = message["value"]
        except (KeyError, TypeError):
            text = None
        if type(text) is not str or not (text.isascii() or _storable(text)):
            return messages, _message_problem(message, number)
        role = message.get("from")
        messages.append(Message(role if isinstance(role, str) and _storable(role) else None, text))
    return messages, None


def _storable(text: str) -> bool:
    """Whether UTF-8 can hold the text: it has no lone surrogate."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _message_problem(message: Any, number: int) -> Problem:
    if not isinstance(message, dict):
        return Problem("message_not_an_object", f"message {number} is {_kind(message)}")
    if "value" not in message:
        return Problem("value_missing", f"message {number} has no value")
    if not isinstance(message["value"], str):
        return Problem("value_not_a_string", f"the value of message {number} is {_kind(message['value'])}")
    return Problem("lone_surrogate", f"the value of message {number} has half a surrogate pair")


def _kind(value: Any) -> str:
    """What JSON calls the value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
