"""Answers: each prompt as if it were alone, and beside it what the article's padded batch makes of it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tiny
import tinyrun
from kvbench import answers, methods, sources
from kvbench.decode import generate
from kvbench.manifest import load_manifest
from kvbench.tokenizer import load_tokenizer

HALF = {"compression_ratio": 0.5}
KNORM = {"press": "KnormPress", "args": HALF}
LIMITS = answers.Limits(count=4, new_tokens=6, max_prompt_tokens=60)
TEXTS = [
    "a press throws most of it away",
    "it writes again",
    "it writes again",
    "the cache keeps what it has read " * 9,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and prompts: two of the same length, one longer than the limit, one that is not asked for."""
    path = tmp_path_factory.mktemp("answers")
    tinyrun.save_model(path)
    sources.fetch_model("tiny", {"path": str(path)}, path / "manifest.json")
    rows = [{"rank": i, "conversation_id": f"c{i}", "prompt": text} for i, text in enumerate([*TEXTS, "more"])]
    pq.write_table(pa.Table.from_pylist(rows), path / "prompts.parquet")
    return path


def answer(how: Any, folder: Path, spec: dict[str, Any]) -> list[dict[str, Any]]:
    manifest = load_manifest(folder / "manifest.json")
    found: list[dict[str, Any]] = how(tiny.model(), manifest, methods.build(spec), folder / "prompts.parquet", LIMITS)
    return found


def of(rows: list[dict[str, Any]], way: str) -> list[Any]:
    assert [row["rank"] for row in rows if row["way"] == way] == [0, 1, 2, 3]
    return [row.get("token_ids") for row in rows if row["way"] == way]


def test_each_prompt_is_answered_as_if_it_were_alone(folder: Path) -> None:
    tokenizer = load_tokenizer(load_manifest(folder / "manifest.json"))
    rows = answer(answers.alone, folder, KNORM)
    for row, tokens in zip(rows, of(rows, "alone"), strict=True):
        ids = answers.encode(tokenizer, row["prompt"])[:60]
        decoded = generate(tiny.model(), torch.tensor([ids]), methods.build(KNORM), 6)
        assert tokens == decoded.tokens[0].tolist() and row["prompt_tokens"] == len(ids)
        assert row["text"] == tokenizer.decode(tokens) and row["stop_reason"] == "length" and not row["simulated"]


def test_the_articles_batch_changes_a_compressed_answer_and_not_the_baselines(folder: Path) -> None:
    dense, knorm = answer(answers.both_ways, folder, {}), answer(answers.both_ways, folder, KNORM)
    assert of(dense, "batch") == of(dense, "alone")
    pairs = list(zip(of(knorm, "batch"), of(knorm, "alone"), strict=True))
    assert [batch == alone for batch, alone in pairs] == [False, False, False, True]  # the longest has no pad


@pytest.mark.parametrize(
    ("spec", "batch", "alone"),
    [
        ({"press": "ChunkKVPress", "args": {"press": KNORM}}, ["unsupported"] * 4, [None] * 4),
        ({"press": "SnapKVPress", "args": HALF | {"window_size": 32}}, [None] * 4, [*["unsupported"] * 3, None]),
    ],
    ids=["wrong in a batch", "too short alone"],
)
def test_what_one_way_refuses_the_other_still_answers(
    folder: Path, spec: dict[str, Any], batch: list[str | None], alone: list[str | None]
) -> None:
    rows = answer(answers.both_ways, folder, spec)
    assert [row.get("status") for row in rows] == batch + alone
    assert all(row["status_reason"] for row in rows if "status" in row)


def test_a_method_that_frees_nothing_is_simulated(folder: Path) -> None:
    masks = {"press": "AdaKVPress", "args": {"press": KNORM}}
    assert all(row["simulated"] for row in answer(answers.alone, folder, masks))
