"""Windows of a model's token ids: its own greedy text, whole conversations, and a book.

``own``
    the first prompts of exactly ``prefix_tokens`` tokens, and what the uncompressed model writes after them.
``conversations``
    the beginnings of other conversations, whole: what people and another model wrote.
``book``
    a part of Moby-Dick: one window of every chapter before a second of any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kvbench import book, conversations, jobs, window_table, workload
from kvbench.errors import Unsupported, UserError
from kvbench.jobs import Job
from kvbench.manifest import Manifest, load_manifest
from kvbench.tokenizer import load_tokenizer
from kvbench.window_table import Window

NO_TEXT = "random weights have no tokenizer, and what they predict would mean nothing"


@dataclass(frozen=True)
class Request:
    """Which corpora, how many windows of each, and their sizes in tokens."""

    corpora: list[str]
    windows: int
    prefix_tokens: int
    continuation_tokens: int


def make(job: Job, prompts: Path | None, dataset: Path | None, request: Request) -> None:
    """Make a model's windows and write them; every variant of the model is judged on the same.

    Parameters
    ----------
    prompts, dataset : prompts.parquet and the manifest of its dataset; not needed for random weights.
    """

    def work(facts: dict[str, Any]) -> list[Window]:
        manifest = load_manifest(job.manifest)
        if manifest.tokenizer is None or prompts is None or dataset is None:
            raise Unsupported(NO_TEXT)
        _check_context(manifest, request)
        return windows(load_tokenizer(manifest), prompts, dataset, request, lambda: jobs.ready(job, facts).model)

    def write(status: str, reason: str | None, facts: dict[str, Any], result: list[Window] | None) -> None:
        window_table.write(job.output, result or [], status, reason, facts | {"windows": vars(request)})

    jobs.run(job, work, write)


def _check_context(manifest: Manifest, request: Request) -> None:
    tokens = request.prefix_tokens + request.continuation_tokens
    if manifest.context is not None and tokens > manifest.context:
        raise UserError(
            f"{request.prefix_tokens} prefix and {request.continuation_tokens} continuation tokens are {tokens}, more"
            f" than the context of {manifest.name}, {manifest.context} tokens",
            "Lower quality.prefix_tokens or quality.continuation_tokens",
        )


def windows(tokenizer: Any, prompts: Path, dataset: Path, request: Request, load: Callable[[], Any]) -> list[Window]:
    """Windows of every corpus asked for; no conversation is in two of them.

    Parameters
    ----------
    load : gives the model; called only where its own text is wanted.

    Raises
    ------
    UserError : a corpus has too few texts of that length.
    """
    found: list[Window] = []
    taken: set[int | None] = set()
    if "own" in request.corpora:
        rows = workload.equal_prompts(tokenizer, prompts, dataset, request.prefix_tokens, request.windows)
        _check_count("own", len(rows), request)
        taken = {row.source_index for row in rows}
        found += _own(load(), rows, request)
    tokens = request.prefix_tokens + request.continuation_tokens + 1
    if "conversations" in request.corpora:
        others = workload.whole_conversations(tokenizer, prompts, dataset, tokens, taken)
        texts = [(_document(row), row.input_ids) for row in islice(others, request.windows)]
        found += _cut("conversations", texts, request)
    if "book" in request.corpora:
        found += _cut("book", list(islice(book.pieces(tokenizer, tokens, book.chapters()), request.windows)), request)
    return found


def _own(model: Any, rows: list[workload.Row], request: Request) -> list[Window]:
    """Prompts and the model's greedy text after them, of forced length."""
    import torch

    from kvbench.decode import generate
    from kvbench.methods import Dense

    written: list[list[int]] = []
    at_once = window_table.rows_at_once(model.device.type, request.prefix_tokens + request.continuation_tokens)
    for start in range(0, len(rows), at_once):
        ids = torch.tensor([row.input_ids for row in rows[start : start + at_once]], device=model.device)
        written += generate(model, ids, Dense(), request.continuation_tokens + 1).tokens.tolist()
    return [
        Window("own", _document(row), number, row.input_ids, text)
        for number, (row, text) in enumerate(zip(rows, written, strict=True))
    ]


def _document(row: workload.Row) -> str:
    """What a window is of: parts of one conversation are not independent."""
    return conversations.whole(str(row.conversation_id))


def _cut(corpus: str, texts: list[tuple[str, list[int]]], request: Request) -> list[Window]:
    _check_count(corpus, len(texts), request)
    return [
        Window(corpus, document, number, ids[: request.prefix_tokens], ids[request.prefix_tokens :])
        for number, (document, ids) in enumerate(texts)
    ]


def _check_count(corpus: str, count: int, request: Request) -> None:
    if count < request.windows:
        raise UserError(
            f"Of the corpus {corpus}, {count} texts are long enough, quality.windows: {request.windows} are needed",
            "Lower quality.windows, quality.prefix_tokens or quality.continuation_tokens, or use a larger dataset",
        )
