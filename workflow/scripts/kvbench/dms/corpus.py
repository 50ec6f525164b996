"""Token sequences of one length to retrofit a model on, and others, of other texts, to judge it on.

``conversations``
    the dataset's conversations, whole, laid end to end and cut into pieces that do not overlap: most are shorter than a
    sequence, and what is left of a long one would be lost. What is held out is one conversation a piece.
``own``
    the model's own answers to the dataset's first messages, sampled.
a file's path
    its text, cut into pieces that do not overlap.

With each comes some prose, so that a model is not changed for one kind of text alone.

What is held out comes first: the first texts in rank order (a file's first characters) are those that other stages
measure on too. A conversation of which a part is held out, or that repeats a stretch of what is, is left out of the
training: ShareGPT holds long conversations in parts, and some more than once. A part of a book that no training sees is
held out besides.
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvbench import book, conversations, tables, workload
from kvbench.dms import prose
from kvbench.dms.overlap import Seen
from kvbench.errors import UserError
from kvbench.options import CONTINUATION

HELD_OUT = 24
"""Sequences of a corpus that are held out, at most."""
CHARACTERS_AT_ONCE = 1_000_000
PROMPTS_AT_ONCE = 64

SCHEMA = pa.schema(
    [("split", pa.string()), ("corpus", pa.string()), ("document", pa.string()), ("input_ids", pa.list_(pa.int32()))]
)


@dataclass(frozen=True)
class Request:
    """What a retrofit reads.

    Attributes
    ----------
    text : ``conversations``, ``own`` or the path of a UTF-8 file.
    tokens : of a sequence.
    sequences : to train on, at most, the prose among them.
    prose : share of what is trained on that is prose, below 1.
    prose_from : kinds of prose, as `prose.texts` takes them.
    held_out : share of the texts that is not trained on.
    seed : of the model's own answers.
    """

    text: str
    tokens: int
    sequences: int
    held_out: float
    prose: float
    prose_from: Collection[str]
    seed: int

    @property
    def prose_sequences(self) -> int:
        """How many of the sequences are prose, at most."""
        return round(self.sequences * self.prose)


@dataclass(frozen=True)
class Sequence:
    """Token ids, of ``tokens`` to train on (split ``train``) or `CONTINUATION` more to judge on (``held_out``)."""

    split: str
    corpus: str
    document: str
    input_ids: list[int]


@dataclass(frozen=True)
class Corpus:
    """A corpus as the training takes it.

    Attributes
    ----------
    train : int32 [sequences, tokens].
    reading : int64 [one pass], which of them a pass reads: each once, but prose as often as its share wants.
    held_out : for each corpus int32 [sequences, tokens + `CONTINUATION`].
    about : what made it.
    """

    train: np.ndarray
    reading: np.ndarray
    held_out: dict[str, np.ndarray]
    about: dict[str, Any]


def collect(
    tokenizer: Any, request: Request, prompts: Path | None, dataset: Path | None, load: Callable[[], Any]
) -> list[Sequence]:
    """The sequences of a corpus, those held out among them.

    Parameters
    ----------
    prompts, dataset : prompts.parquet and the manifest of its dataset; not needed for a file.
    load : gives the model; called only where its own text is wanted.

    Raises
    ------
    UserError : nothing is long enough.
    """
    if request.text not in ("conversations", "own"):
        found = _of_file(tokenizer, Path(request.text), request)
    elif prompts is None or dataset is None:
        raise UserError(f"a corpus of {request.text} needs prompts and their dataset", "Name both")
    elif request.text == "own":
        found = _own(load(), tokenizer, prompts, request)
    else:
        found = _of_conversations(tokenizer, prompts, dataset, request)
    more = book.pieces(tokenizer, request.tokens, prose.texts(request.prose_from))
    found += [Sequence("train", "prose", text, ids) for text, ids in islice(more, request.prose_sequences)]
    judged = book.pieces(tokenizer, request.tokens + CONTINUATION, book.chapters())
    found += [Sequence("held_out", "book", chapter, ids) for chapter, ids in islice(judged, HELD_OUT)]
    for split in ("train", "held_out"):
        if not any(each.split == split and each.corpus not in ("book", "prose") for each in found):
            raise UserError(
                f"of the text {request.text!r}, nothing is long enough for a sequence of {request.tokens} tokens"
                f" ({split})",
                "Lower tokens of the retrofit, or give it more text",
            )
    return found


class _Taken:
    """Sequences as they are found, until there are as many as wanted."""

    def __init__(self, request: Request, texts: int) -> None:
        self.request = request
        self.first_trained = request.held_out * texts
        self.found: dict[str, list[Sequence]] = {"train": [], "held_out": []}
        self.left: list[int] = []
        self.left_of = ""
        self.apart: set[str] = set()
        self.judged: set[str] = set()

    def split(self, row: dict[str, Any]) -> str:
        """Which split a prompt's conversation belongs to; "" where another part of it is held out."""
        whole = conversations.whole(str(row["conversation_id"]))
        if row["rank"] < self.first_trained:
            self.apart.add(whole)
            return "held_out"
        return "" if whole in self.apart else "train"

    def missing(self, split: str) -> int:
        request = self.request
        wanted = HELD_OUT if split == "held_out" else request.sequences - request.prose_sequences
        return wanted - len(self.found[split])

    def full(self, split: str) -> bool:
        return self.missing(split) <= 0

    def length(self, split: str) -> int:
        return self.request.tokens + CONTINUATION * (split == "held_out")

    def add(self, split: str, corpus: str, document: str, ids: list[int]) -> None:
        """Cut ids into pieces; of a conversation that is held out, one piece is enough."""
        size, whole = self.length(split), conversations.whole(document)
        once = split == "held_out" and corpus != "file"
        for start in range(0, len(ids) - size + 1, size):
            if self.full(split) or (once and whole in self.judged):
                return
            self.judged.add(whole)
            self.found[split].append(Sequence(split, corpus, document, ids[start : start + size]))

    def lay(self, corpus: str, document: str, ids: list[int]) -> None:
        """Lay ids behind what is left of the texts before, and cut all that fills pieces to train on.

        A piece's document is the one that it begins with.
        """
        size, laid = self.length("train"), self.left + ids
        for start in range(0, len(laid) - size + 1, size):
            if self.full("train"):
                return
            begins_with = self.left_of if start < len(self.left) else document
            self.found["train"].append(Sequence("train", corpus, begins_with, laid[start : start + size]))
        rest = len(laid) - len(laid) % size
        self.left_of = self.left_of if rest < len(self.left) else document
        self.left = laid[rest:]

    @property
    def all(self) -> list[Sequence]:
        return self.found["train"] + self.found["held_out"]


def _of_conversations(tokenizer: Any, prompts: Path, dataset: Path, request: Request) -> list[Sequence]:
    taken = _Taken(request, pq.ParquetFile(prompts).metadata.num_rows)
    texts = workload.conversation_texts(tokenizer, prompts, dataset)
    seen, left_out, begins = Seen(), 0, workload.common_beginning(tokenizer)
    while not taken.full("train") and (batch := list(islice(texts, PROMPTS_AT_ONCE))):
        wanted = [(taken.split(row), str(row["conversation_id"]), text) for row, text in batch if text]
        for (split, document, _), ids in zip(wanted, _ids(tokenizer, [text for *_, text in wanted]), strict=True):
            if split == "held_out":
                taken.add(split, "conversations", document, ids)
                seen.add(ids[begins:])
            elif split == "train" and not seen.overlaps(ids[begins:]):
                taken.lay("conversations", document, ids)
            else:
                left_out += 1
    print(f"{left_out} conversations are left out: parts or repetitions of those that are held out", flush=True)
    return taken.all


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    special = not tokenizer.chat_template  # a template brings its own
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def _of_file(tokenizer: Any, path: Path, request: Request) -> list[Sequence]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no text: {error}", "Name a UTF-8 file") from error
    taken, border = _Taken(request, len(text)), int(request.held_out * len(text))
    for split, part in (("held_out", text[:border]), ("train", text[border:])):
        for start in range(0, len(part), CHARACTERS_AT_ONCE):
            if taken.full(split):
                break
            some = part[start : start + CHARACTERS_AT_ONCE]
            ids = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            taken.add(split, "file", path.name, ids)
    return taken.all


def _own(model: Any, tokenizer: Any, prompts: Path, request: Request) -> list[Sequence]:
    taken = _Taken(request, pq.ParquetFile(prompts).metadata.num_rows)
    waiting: dict[str, list[tuple[str, list[int]]]] = {"held_out": [], "train": []}

    def answer(split: str) -> None:
        """Let the model answer those that wait."""
        some, waiting[split] = waiting[split], []
        texts = sample(model, [ids for _, ids in some], taken.length(split), request.seed + len(taken.all))
        for (document, _), ids in zip(some, texts, strict=True):
            taken.add(split, "own", document, ids)

    texts = ((taken.split(row), row, text) for row, text in workload.first_message_texts(tokenizer, prompts))
    for split, row, text in (each for each in texts if each[0]):
        if text and not taken.full(split):
            ids = _ids(tokenizer, [text])[0]
            if len(ids) <= request.tokens // 2:
                waiting[split].append((str(row["conversation_id"]), ids))
        if waiting[split] and len(waiting[split]) >= min(PROMPTS_AT_ONCE, taken.missing(split)):
            answer(split)
        if taken.full("train"):
            break
    for split in ("held_out", "train"):
        if waiting[split] and not taken.full(split):
            answer(split)
    return taken.all


def sample(model: Any, prompts: list[list[int]], tokens: int, seed: int) -> list[list[int]]:
    """Prompts and the model's answers, drawn from its own distribution, of exactly ``tokens`` ids together.

    The end of an answer is never drawn, so that each has its length.
    """
    import torch
    from transformers import GenerationConfig

    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    torch.manual_seed(seed)
    new = tokens - shortest
    # settings of our own: those that a checkpoint brings may penalise or cut what its distribution has
    plain = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
        eos_token_id=model.generation_config.eos_token_id,
    )  # fmt: skip
    before, model.generation_config = model.generation_config, plain
    try:
        written = model.generate(ids, attention_mask=mask)[:, longest:].tolist()
    finally:
        model.generation_config = before
    return [(row + new)[:tokens] for row, new in zip(prompts, written, strict=True)]


def write(sequences: list[Sequence], path: Path, about: dict[str, Any]) -> None:
    """Write a corpus as Parquet, one row a sequence."""
    tables.write(path, pa.Table.from_pylist([asdict(each) for each in sequences], SCHEMA), about)


def load(path: Path) -> Corpus:
    """Read a corpus.

    Raises
    ------
    UserError : it is missing, or no corpus.
    """
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} holds no corpus: {error}", "Run the rule that makes it again") from error
    split, corpora = table["split"].to_numpy(), table["corpus"].to_numpy()

    def ids(rows: np.ndarray) -> np.ndarray:
        chosen = table["input_ids"].combine_chunks().take(pa.array(np.flatnonzero(rows)))
        return chosen.flatten().to_numpy().reshape(int(rows.sum()), -1).copy()  # Arrow's own may not be written to

    held_out, is_prose = split == "held_out", corpora[split == "train"] == "prose"
    judged = {name: ids(held_out & (corpora == name)) for name in dict.fromkeys(corpora[held_out])}
    about = tables.provenance_of(path)
    return Corpus(ids(split == "train"), _reading(is_prose, about["prose"]), judged, about)


def _reading(is_prose: np.ndarray, share: float) -> np.ndarray:
    """`Corpus.reading`, from which sequences are prose."""
    own, some = np.flatnonzero(~is_prose), np.flatnonzero(is_prose)
    return np.concatenate([own, np.resize(some, round(len(own) * share / (1 - share)) if len(some) else 0)])
