"""A retrofit's text: of one length, no text on both sides, and none twice."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
import tinyrun
from kvbench import book, conversations, workload
from kvbench.dms import corpus, overlap, prose
from kvbench.dms.corpus import HELD_OUT, Request, Sequence
from kvbench.errors import UserError
from kvbench.options import CONTINUATION

TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's tokenizer, chats, their prompts and their manifest."""
    return tinyrun.with_prompts(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


Make = Callable[..., list[Sequence]]


@pytest.fixture
def make(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Make:
    chapters = book.chapters()[:3]
    monkeypatch.setattr(book, "chapters", lambda: chapters)

    def run(
        text: str,
        sequences: int = 30,
        held_out: float = 0.25,
        tokens: int = TOKENS,
        prose: float = 0.0,
        prose_from: Collection[str] = ("addresses",),
    ) -> list[Sequence]:
        request = Request(text, tokens, sequences, held_out, prose, prose_from, 0)
        return corpus.collect(tokenizer, request, folder / "prompts.parquet", folder / "dataset.json", tiny.model)

    return run


def opened(folder: Path) -> tuple[Any, Path, Path]:
    """What `workload.conversation_texts` takes."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model"), folder / "prompts.parquet", folder / "dataset.json"


def split(made: list[Sequence]) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
    """Those to train on, those held out of the same texts, and the book's."""
    return (
        [each for each in made if each.split == "train"],
        [each for each in made if each.split == "held_out" and each.corpus != "book"],
        [each for each in made if each.corpus == "book"],
    )


@pytest.mark.parametrize(("text", "tokens"), [("conversations", TOKENS), ("own", 200)])
def test_first_texts_are_held_out_and_none_is_on_both_sides(text: str, tokens: int, make: Make, folder: Path) -> None:
    train, held_out, judged = split(make(text, 8, tokens=tokens))
    assert len(train) == 8 and held_out and 0 < len(judged) <= HELD_OUT
    assert {len(each.input_ids) for each in train} == {tokens}
    assert {len(each.input_ids) for each in held_out + judged} == {tokens + CONTINUATION}
    order = pq.read_table(folder / "prompts.parquet")["conversation_id"].to_pylist()
    border = len(order) // 4
    assert {each.document for each in train} <= set(order[border:])
    assert {each.document for each in held_out} <= set(order[:border])
    assert len({each.document for each in held_out}) == len(held_out)


def test_a_part_or_a_repetition_of_what_is_held_out_is_not_trained_on(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = pq.read_table(folder / "prompts.parquet")["conversation_id"].to_pylist()
    border = len(order) // 4
    texts = list(workload.conversation_texts(*opened(folder)))
    part, again, last = (texts[border + i][0] for i in range(3))
    renamed = {order[0]: "QWJhYvA_0", part["conversation_id"]: "QWJhYvA_13"}

    def changed(*_: Any) -> Iterator[tuple[dict[str, Any], str]]:
        for row, text in texts:
            name = row["conversation_id"]
            # the second is the first held-out text again, with another beginning
            said = f"Say it once more. {texts[0][1]}" if name == again["conversation_id"] else text
            yield row | {"conversation_id": renamed.get(name, name)}, said

    monkeypatch.setattr(corpus.workload, "conversation_texts", changed)
    train, held_out, _ = split(make("conversations", 1000))
    assert "QWJhYvA_0" in {each.document for each in held_out}
    named = {each.document for each in train}
    assert named.isdisjoint({"QWJhYvA_13", again["conversation_id"]}) and last["conversation_id"] in named


@given(
    st.lists(st.integers(0, 9), min_size=60, max_size=120),
    st.lists(st.integers(10, 19), max_size=60),
    st.lists(st.integers(10, 19), max_size=60),
    st.integers(0, 20),
)
def test_a_common_stretch_is_found_wherever_it_lies(
    text: list[int], before: list[int], after: list[int], start: int
) -> None:
    seen = overlap.Seen()
    assert not seen.overlaps(text)
    seen.add(text)
    stretch = text[start : start + 2 * overlap.GRAM - 1]
    if len(stretch) == 2 * overlap.GRAM - 1:
        assert seen.overlaps(before + stretch + after)
    assert not seen.overlaps(before + after)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("QWJhYvA_13", "QWJhYvA"), ("QWJhYvA", "QWJhYvA"), ("user_13", "user_13"), ("QWJhYvA_13_2", "QWJhYvA_13_2")],
)
def test_a_part_is_of_its_conversation(name: str, expected: str) -> None:
    assert conversations.whole(name) == expected


def test_conversations_are_laid_end_to_end_and_cut(make: Make, tokenizer: Any, folder: Path) -> None:
    chats = {chat["id"]: chat["conversations"] for chat in tinyrun.chats()}
    train, *_ = split(make("conversations", 10**6))
    names = {"human": "user", "gpt": "assistant"}
    order = pq.read_table(folder / "prompts.parquet")["conversation_id"].to_pylist()
    laid: list[int] = []
    owners: list[str] = []
    for document in order[len(order) // 4 + bool(len(order) % 4) :]:
        turns = [{"role": names[m["from"]], "content": m["value"]} for m in chats[document]]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        laid, owners = laid + ids, owners + [document] * len(ids)
    starts = range(0, len(laid) - TOKENS + 1, TOKENS)
    assert [each.input_ids for each in train] == [laid[at : at + TOKENS] for at in starts]
    assert [each.document for each in train] == [owners[at] for at in starts]


def test_a_models_own_answers_begin_with_what_it_is_asked_and_are_drawn_again_alike(make: Make, tokenizer: Any) -> None:
    chats = {chat["id"]: chat["conversations"] for chat in tinyrun.chats()}
    made = make("own", 3, 0.1, 200)
    assert made == make("own", 3, 0.1, 200)
    for each in split(made)[0]:
        asked = [{"role": "user", "content": chats[each.document][0]["value"]}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert each.input_ids[: len(ids)] == ids and len(each.input_ids) == 200


def test_prompts_of_a_batch_do_not_see_their_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = tiny.ids(1, 12)[0].tolist(), tiny.ids(1, 5, 1)[0].tolist()
    # drawing the likeliest token tells what a row sees
    monkeypatch.setattr(torch, "multinomial", lambda probs, num_samples: probs.argmax(-1, keepdim=True))
    together = corpus.sample(tiny.model(), [short, long], 20, 3)
    assert together == [corpus.sample(tiny.model(), [row], 20, 3)[0] for row in (short, long)]
    assert together[0][:5] == short and together[1][:12] == long
    assert [len(row) for row in together] == [20, 20]


def test_a_file_is_cut_and_its_beginning_held_out(make: Make, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"{number} {tinyrun.WORDS[number % 15]}" for number in range(3000)), "utf-8")
    train, held_out, _ = split(make(str(path), 50))
    assert {each.document for each in train + held_out} == {"mine.txt"}
    text = path.read_text("utf-8")
    ids = tokenizer(text[len(text) // 4 :], add_special_tokens=False)["input_ids"]
    assert [each.input_ids for each in train] == [ids[at : at + TOKENS] for at in range(0, 50 * TOKENS, TOKENS)]
    assert held_out[0].input_ids == tokenizer(text, add_special_tokens=False)["input_ids"][: TOKENS + CONTINUATION]


def test_what_is_written_is_read(make: Make, tmp_path: Path) -> None:
    made = make("conversations")
    corpus.write(made, tmp_path / "corpus.parquet", {"text": "conversations", "prose": 0.0})
    found = corpus.load(tmp_path / "corpus.parquet")
    train, held_out, judged = split(made)
    assert np.array_equal(found.train, [each.input_ids for each in train]) and found.about["text"] == "conversations"
    assert list(found.held_out) == ["conversations", "book"]
    assert np.array_equal(found.held_out["conversations"], [each.input_ids for each in held_out])
    assert np.array_equal(found.held_out["book"], [each.input_ids for each in judged])


def test_prose_is_read_as_often_as_its_share_wants(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = prose.addresses()[:1]
    assert addresses[0].name == "ADDRESS 1790. George Washington"
    short = [book.Chapter(addresses[0].name, addresses[0].text[:200])]
    monkeypatch.setattr(prose, "addresses", lambda: short)
    made = make("conversations", 20, prose=0.4)
    pieces = [each.input_ids for each in made if each.corpus == "prose"]
    assert 1 < len(pieces) < 8  # all there is, and less than the share of a pass
    assert {each.document for each in made if each.corpus == "prose"} == {addresses[0].name}
    corpus.write(made, tmp_path / "corpus.parquet", {"prose": 0.4})
    found = corpus.load(tmp_path / "corpus.parquet")
    read = [found.train[row].tolist() in pieces for row in found.reading]
    assert len(read) == 20 and sum(read) == 8
    counts = [found.reading.tolist().count(row) for row in range(len(found.train))]
    assert set(counts[:12]) == {1} and max(counts[12:]) - min(counts[12:]) <= 1


def test_the_kinds_of_prose_that_are_asked_for_are_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("addresses", "fiction"):
        short = [book.Chapter(part.name, part.text[:2000]) for part in getattr(prose, name)()]
        monkeypatch.setattr(prose, name, lambda short=short: short)

    def kinds(*names: str) -> set[str]:
        made = make("conversations", 400, tokens=200, prose=0.5, prose_from=names)
        return {each.document.split()[0] for each in made if each.corpus == "prose"}

    assert kinds("addresses") == {"ADDRESS"}
    assert kinds("fiction") == {"BOOK"}
    assert kinds("fiction", "addresses") == {"ADDRESS", "BOOK"}


def test_too_little_text_is_said(make: Make, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="'conversations', nothing is long enough for a sequence of 5000 tokens"):
        make("conversations", tokens=5000)
    with pytest.raises(UserError, match=r"held_out"):
        make("conversations", held_out=0.001, tokens=250)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is no text"):
        make(str(tmp_path / "bytes.txt"))
    with pytest.raises(UserError, match="needs prompts"):
        corpus.collect(tokenizer, Request("own", 8, 1, 0.5, 0.0, ["addresses"], 0), None, None, tiny.model)
    with pytest.raises(UserError, match="holds no corpus"):
        corpus.load(tmp_path / "none.parquet")
