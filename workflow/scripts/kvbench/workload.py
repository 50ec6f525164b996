"""Prompts and a model's tokenizer to token ids: the same batch for every method of that model.

``padding: none``
    rows of equal length: the first prompts in rank order that have ``prompt_tokens`` tokens or more, cut to exactly
    that. Where too few first messages are long enough, whole conversations fill the batch, in rank order again.
    The chat template is applied where the tokenizer has one.
``padding: article``
    the first prompts of the list as the article takes them: no chat template, cut at ``prompt_tokens``, of unequal
    length, to be padded with the end-of-sequence token on the tokenizer's own side.

A model without a tokenizer gets seeded random ids.
"""

import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvbench import tables
from kvbench.batch import Padding
from kvbench.errors import UserError
from kvbench.files import read_json
from kvbench.manifest import Manifest, check_manifest_files, load_manifest
from kvbench.scan import HUMAN_ROLES
from kvbench.sharegpt import Records, read_role, read_texts
from kvbench.tokenizer import load_tokenizer

ROWS_AT_ONCE = 256
# Conversations held in memory at once, in characters.
CHARACTERS_AT_ONCE = 16_000_000
UTF8_BYTES_PER_CHARACTER = 4

SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("conversation_id", pa.string()),
        ("source_index", pa.int64()),
        ("text_from", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Request:
    """What a workload asks for: rows, tokens a row, tokens to generate, and how rows are made equal."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    padding: Padding
    seed: int


@dataclass(frozen=True)
class Row:
    """One row of a batch; ``conversation_id`` and ``source_index`` are None for random ids."""

    input_ids: list[int]
    text_from: str
    conversation_id: str | None = None
    source_index: int | None = None


def run(
    model_manifest: Path, prompts: Path | None, dataset_manifest: Path | None, request: Request, output: Path,
    provenance: dict[str, Any],
) -> None:  # fmt: skip
    """Make a workload and write it.

    Raises
    ------
    UserError : the workload does not fit the model's context, or there are too few prompts of its length.
    """
    model = load_manifest(model_manifest)
    wanted = request.prompt_tokens + request.new_tokens
    if model.context is not None and wanted > model.context:
        raise UserError(
            f"{request.prompt_tokens} prompt and {request.new_tokens} new tokens are {wanted}, more than the context "
            f"of {model.name}, {model.context} tokens",
            "Lower prompt_tokens or new_tokens of the workload",
        )
    if model.tokenizer is None:
        rows, about = _random(model, request)
    elif prompts is None:
        raise UserError(f"A workload for {model.name} needs prompts", "Name them with --prompts")
    else:
        rows, about = _tokenized(model, prompts, dataset_manifest, request)
    fields = vars(request) | about | {"model": model.name, "revision": model.revision}
    _write(rows, output, fields | provenance)
    lengths = [len(row.input_ids) for row in rows]
    sources = ", ".join(f"{sum(row.text_from == each for row in rows)} {each}" for each in _distinct(rows))
    print(f"{len(rows)} rows of {min(lengths)} to {max(lengths)} tokens ({sources})")


def _random(model: Manifest, request: Request) -> tuple[list[Row], dict[str, Any]]:
    """Seeded random ids; of lengths from a 16th of the longest for padding as the article's."""
    config = read_json(model.path / "config.json")
    draw = np.random.default_rng(request.seed)
    shortest = max(1, request.prompt_tokens // 16) if request.padding == "article" else request.prompt_tokens
    lengths = draw.integers(shortest, request.prompt_tokens, request.batch_size, endpoint=True)
    lengths[draw.integers(request.batch_size)] = request.prompt_tokens
    rows = [Row(draw.integers(config["vocab_size"], size=length).tolist(), "random") for length in lengths]
    eos = _eos_token_ids(model, config.get("eos_token_id"))
    about = {"padding_side": "left", "pad_token_id": eos[0] if eos else 0, "eos_token_ids": eos, "chat_template": False}
    return rows, about


def _tokenized(
    model: Manifest, prompts: Path, dataset_manifest: Path | None, request: Request
) -> tuple[list[Row], dict[str, Any]]:
    tokenizer = load_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {model.name} has no end-of-sequence token", "Set eos_token in it")
    if request.padding == "article":
        rows, templated = _first_prompts(tokenizer, prompts, request), False
    else:
        rows, templated = _long_prompts(tokenizer, prompts, dataset_manifest, request), bool(tokenizer.chat_template)
    return rows, {
        "padding_side": tokenizer.padding_side,
        "pad_token_id": tokenizer.eos_token_id,
        "eos_token_ids": _eos_token_ids(model, tokenizer.eos_token_id),
        "chat_template": templated,
        "tokenization_s": _tokenization_s(tokenizer, rows),
    }


def _tokenization_s(tokenizer: Any, rows: list[Row]) -> float:
    """Seconds that the batch's texts take to become ids; no part of TTFT here, though a server's user waits for it."""
    texts = tokenizer.batch_decode([row.input_ids for row in rows])
    start = time.perf_counter()
    tokenizer(texts, add_special_tokens=False, verbose=False)
    return time.perf_counter() - start


def _first_prompts(tokenizer: Any, prompts: Path, request: Request) -> list[Row]:
    """The article's batch."""
    first = list(islice(_prompts(prompts), request.batch_size))
    if len(first) < request.batch_size:
        raise UserError(
            f"{prompts} has {len(first)} prompts, {request.batch_size} are needed",
            "Lower batch_size of the workload, or use a larger dataset",
        )
    texts = [prompt["prompt"] for prompt in first]
    ids = tokenizer(texts, truncation=True, max_length=request.prompt_tokens)["input_ids"]
    return [_row(row, prompt, "first_message") for row, prompt in zip(ids, first, strict=True)]


def _long_prompts(tokenizer: Any, prompts: Path, dataset_manifest: Path | None, request: Request) -> list[Row]:
    rows = equal_prompts(tokenizer, prompts, dataset_manifest, request.prompt_tokens, request.batch_size)
    if len(rows) < request.batch_size:
        first_messages = sum(row.text_from == "first_message" for row in rows)
        raise UserError(
            f"Of {prompts}, {first_messages} first messages and {len(rows) - first_messages} more whole conversations "
            f"have {request.prompt_tokens} tokens or more, {request.batch_size} are needed",
            "Lower prompt_tokens or batch_size of the workload, or use a larger dataset",
        )
    return rows


def equal_prompts(tokenizer: Any, prompts: Path, dataset_manifest: Path | None, tokens: int, count: int) -> list[Row]:
    """Up to ``count`` rows of exactly ``tokens`` tokens: first messages of as many or more, then whole conversations.

    Parameters
    ----------
    prompts : prompts.parquet.
    dataset_manifest : manifest of its dataset; without one there are no whole conversations.
    """
    messages = ((prompt, [("user", prompt["prompt"])]) for prompt in _prompts(prompts))
    rows = list(islice(_long(tokenizer, messages, tokens, "first_message"), count))
    if len(rows) < count and dataset_manifest is not None:
        taken = {row.source_index for row in rows}
        more = whole_conversations(tokenizer, prompts, dataset_manifest, tokens, taken)
        rows += islice(more, count - len(rows))
    return rows


def whole_conversations(
    tokenizer: Any, prompts: Path, dataset_manifest: Path, tokens: int, taken: Container[int | None]
) -> Iterator[Row]:
    """Beginnings of exactly ``tokens`` tokens of the conversations that have as many, in rank order.

    Parameters
    ----------
    taken : the ``source_index`` of conversations to leave out.
    """
    dataset = load_manifest(dataset_manifest)
    check_manifest_files(dataset)
    shortest = tokens / UTF8_BYTES_PER_CHARACTER
    left = [
        prompt
        for prompt in _prompts(prompts, text=False)
        if prompt["source_index"] not in taken and prompt["turns"] > 1 and prompt["conversation_chars"] >= shortest
    ]
    return _long(tokenizer, _conversations(dataset.file, left), tokens, "conversation")


def conversation_texts(tokenizer: Any, prompts: Path, dataset_manifest: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Whole conversations, in rank order: a prompt's row, and the text of all messages."""
    dataset = load_manifest(dataset_manifest)
    check_manifest_files(dataset)
    for prompt, messages in _conversations(dataset.file, list(_prompts(prompts, text=False))):
        yield prompt, _render(tokenizer, messages)


def common_beginning(tokenizer: Any) -> int:
    """How many tokens every conversation begins with, by the chat template: a system prompt, say."""
    one, other = (tokenizer(_render(tokenizer, [("user", text)]))["input_ids"] for text in ("a", "b"))
    return next((i for i, (mine, its) in enumerate(zip(one, other, strict=False)) if mine != its), 0)


def first_message_texts(tokenizer: Any, prompts: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """First messages in rank order: a prompt's row, and the message as the model is asked it."""
    for prompt in _prompts(prompts):
        yield prompt, _render(tokenizer, [("user", prompt["prompt"])])


def _long(
    tokenizer: Any, candidates: Iterable[tuple[dict[str, Any], list[tuple[str, str]]]], tokens: int, text_from: str
) -> Iterator[Row]:
    """Rows of exactly ``tokens`` tokens of those candidates (a prompt's row, its messages) that have as many."""
    iterator = iter(candidates)
    special = not tokenizer.chat_template
    # A token takes a byte of text at least; the tokenizer may add some of its own.
    added = tokenizer.num_special_tokens_to_add() + 1 if special else 0
    while batch := list(islice(iterator, ROWS_AT_ONCE)):
        texts = [(prompt, _render(tokenizer, messages)) for prompt, messages in batch]
        texts = [(prompt, text) for prompt, text in texts if len(text.encode()) + added >= tokens]
        if texts:
            # Not verbose: a text longer than the context is cut below.
            encoded = tokenizer([text for _, text in texts], add_special_tokens=special, verbose=False)["input_ids"]
            for (prompt, _), ids in zip(texts, encoded, strict=True):
                if len(ids) >= tokens:
                    yield _row(ids[:tokens], prompt, text_from)


def _render(tokenizer: Any, messages: list[tuple[str, str]]) -> str:
    """The text of a conversation: through the chat template if there is one; "" where the template refuses it."""
    if not tokenizer.chat_template:
        return "\n\n".join(text for _, text in messages)
    from jinja2 import TemplateError

    turns = [{"role": role, "content": text} for role, text in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return ""


def _prompts(path: Path, text: bool = True) -> Iterator[dict[str, Any]]:
    """The prompts in rank order, without their text where it is not needed."""
    columns = ["rank", "conversation_id", "source_index", "turns", "conversation_chars"] + ["prompt"] * text
    for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE, columns=columns):
        yield from batch.to_pylist()


def _conversations(path: Path, prompts: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """The messages of the prompts' conversations, in the prompts' order, in bounded memory.

    The file is read once for as many of them as fit in memory, which is all that a batch needs.
    """
    while prompts:
        characters = np.cumsum([prompt["conversation_chars"] for prompt in prompts])
        number = max(1, int(np.searchsorted(characters, CHARACTERS_AT_ONCE)))
        some, prompts = prompts[:number], prompts[number:]
        wanted = {prompt["source_index"] for prompt in some}
        found: dict[int, list[tuple[str, str]]] = {}
        for index, record in enumerate(Records(path)):
            if index in wanted:
                found[index] = _messages(record)
                if len(found) == len(wanted):
                    break
        yield from ((prompt, found[prompt["source_index"]]) for prompt in some)


def _messages(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of a conversation, with the roles of chat templates."""
    texts, _ = read_texts(record)
    roles = [read_role(record, number) for number in range(len(texts))]
    names = ["user" if role in HUMAN_ROLES else "system" if role == "system" else "assistant" for role in roles]
    return list(zip(names, texts, strict=True))


def _row(ids: list[int], prompt: dict[str, Any], text_from: str) -> Row:
    return Row(ids, text_from, prompt["conversation_id"], prompt["source_index"])


def _eos_token_ids(model: Manifest, default: int | list[int] | None) -> list[int]:
    """Ids that end a sequence: the generation config's if the model has one, else the default."""
    path = model.path / "generation_config.json"
    found = read_json(path).get("eos_token_id", default) if path.exists() else default
    return [] if found is None else found if isinstance(found, list) else [found]


def _distinct(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.text_from for row in rows))


def _write(rows: list[Row], path: Path, about: dict[str, Any]) -> None:
    columns = {
        "row": range(len(rows)),
        "conversation_id": [row.conversation_id for row in rows],
        "source_index": [row.source_index for row in rows],
        "text_from": [row.text_from for row in rows],
        "prompt_tokens": [len(row.input_ids) for row in rows],
        "input_ids": [row.input_ids for row in rows],
    }
    tables.write(path, pa.table(columns, schema=SCHEMA), about)
