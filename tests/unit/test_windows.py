"""Windows: of the right lengths, from the right texts, each document once before any twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tiny
import tinyrun
from kvbench import book, window_table, windows, workload
from kvbench.decode import generate
from kvbench.errors import Unsupported, UserError
from kvbench.methods import Dense
from kvbench.windows import Request

ALL = ["own", "conversations", "book"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's tokenizer, chats, their prompts and their manifest."""
    return tinyrun.with_prompts(tmp_path_factory.mktemp("windows"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


Make = Callable[..., list[window_table.Window]]


@pytest.fixture
def make(folder: Path, tokenizer: Any) -> Make:
    def run(corpora: list[str], count: int = 3, prefix: int = 40, more: int = 6) -> list[window_table.Window]:
        request = Request(corpora, count, prefix, more)
        return windows.windows(tokenizer, folder / "prompts.parquet", folder / "dataset.json", request, tiny.model)

    return run


def test_every_corpus_has_as_many_windows_of_the_right_lengths(make: Make) -> None:
    made = make(ALL)
    assert [(window.corpus, window.window) for window in made] == [(c, i) for c in ALL for i in range(3)]
    assert {len(window.prefix_ids) for window in made} == {40}
    assert {len(window.continuation_ids) for window in made} == {7}  # the last is only predicted
    chats = [window.document for window in made if window.corpus != "book"]
    assert len(set(chats)) == 6


def test_a_models_own_text_is_what_it_writes(make: Make, folder: Path, tokenizer: Any) -> None:
    import torch

    rows = workload.equal_prompts(tokenizer, folder / "prompts.parquet", folder / "dataset.json", 40, 3)
    for window, row in zip(make(["own"]), rows, strict=True):
        assert (window.prefix_ids, window.document) == (row.input_ids, row.conversation_id)
        written = generate(tiny.model(), torch.tensor([row.input_ids]), Dense(), 7).tokens[0].tolist()
        assert window.continuation_ids == written


def test_conversations_are_cut_from_their_beginnings(make: Make, tokenizer: Any) -> None:
    chats = {chat["id"]: chat["conversations"] for chat in tinyrun.chats()}
    for window in make(["conversations"]):
        names = {"human": "user", "gpt": "assistant"}
        turns = [{"role": names[m["from"]], "content": m["value"]} for m in chats[window.document]]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert window.prefix_ids + window.continuation_ids == ids[:47]


def test_the_book_gives_every_chapter_once_before_any_twice(make: Make, tokenizer: Any) -> None:
    chapters = {chapter.name: chapter.text for chapter in book.chapters()}
    made = make(["book"], count=70, prefix=300, more=20)
    assert [window.document for window in made[:63]] == list(chapters)
    assert len({window.document for window in made[63:]}) == 7
    for window in (made[0], made[63]):
        text = tokenizer.decode(window.prefix_ids + window.continuation_ids)
        assert chapters[window.document].count(text) == 1
    assert made[0].document == made[63].document and made[0].prefix_ids != made[63].prefix_ids


def test_a_tokenizer_that_begins_every_text_begins_every_window(folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder / "model")
    begin = other.bos_token_id
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    request = Request(["book"], 65, 100, 9)
    made = windows.windows(other, folder / "prompts.parquet", folder / "dataset.json", request, tiny.model)
    assert all(window.prefix_ids[0] == begin and begin not in window.prefix_ids[1:] for window in made)


def test_a_corpus_that_is_too_small_is_an_error_that_says_so(make: Make) -> None:
    for corpus in ("own", "conversations"):
        with pytest.raises(UserError, match=rf"corpus {corpus}, \d+ texts .*windows: 100 .*Lower quality.windows"):
            make([corpus], count=100)
    with pytest.raises(UserError, match="corpus book, "):
        make(["book"], count=1, prefix=10**6)


def test_no_model_is_loaded_for_other_texts(folder: Path, tokenizer: Any) -> None:
    request = Request(["conversations", "book"], 1, 40, 6)
    found = windows.windows(tokenizer, folder / "prompts.parquet", folder / "dataset.json", request, lambda: 1 / 0)
    assert len(found) == 2


def test_windows_survive_their_file(make: Make, tmp_path: Path) -> None:
    made = make(ALL)
    window_table.write(tmp_path / "w.parquet", made, "ok", None, {})
    assert window_table.load(tmp_path / "w.parquet") == made
    assert pq.read_schema(tmp_path / "w.parquet").names == window_table.SCHEMA.names


def test_a_file_without_windows_says_why(tmp_path: Path) -> None:
    window_table.write(tmp_path / "w.parquet", [], "unsupported", "no text", {})
    with pytest.raises(Unsupported, match="no text"):
        window_table.load(tmp_path / "w.parquet")
    (tmp_path / "w.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="holds no windows"):
        window_table.load(tmp_path / "w.parquet")
