"""A variant's answers: over what its method kept, as each prompt alone gives them, scored into rows."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import DynamicCache

import dms_reference
import tiny
import tinyrun
from kvbench import book, haystack, jobs, methods, needles, recall, retrieval, sources
from kvbench.dms import evict
from kvbench.haystack import Prompt
from kvbench.needles import Point

HALF = {"compression_ratio": 0.5}
KNORM = {"press": "KnormPress", "args": HALF}
SNAP = {"press": "SnapKVPress", "args": HALF}
RANDOM = {"press": "RandomPress", "args": HALF | {"seed": 0}}
ADAKV = {"press": "AdaKVPress", "args": {"press": SNAP}}
PYRAMID = {"press": "PyramidKVPress", "args": HALF}
ROTATED = {"press": "KeyRerotationPress", "args": {"press": KNORM}}
CHUNK = {"press": "ChunkKVPress", "args": {"press": KNORM}}
CRITICAL = {"press": "CriticalAdaKVPress", "args": {"press": SNAP}}
SIMLAYER = {"press": "SimLayerKVPress", "args": {"lazy_threshold": 0.5, "n_recent": 40}}
DECODING = {
    "press": "DecodingPress",
    "args": {"base_press": {"press": "KnormPress", "args": {}}, "compression_interval": 3, "target_size": 40},
}
SPECS = {"dense": {}, "knorm": KNORM, "snap": SNAP, "random": RANDOM, "adakv": ADAKV, "pyramid": PYRAMID,
         "rotated": ROTATED, "chunk": CHUNK, "critical-adakv": CRITICAL, "simlayer": SIMLAYER}  # fmt: skip
REQUEST = {"tasks": ["needle"], "samples": 3, "prompt_tokens": [400], "depths": [0.5], "query_aware": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tinyrun.tokenizer([book.chapters()[0].text], 310)


def prompts(shapes: list[tuple[int, int]]) -> list[Prompt]:
    """Prompts of random ids, each with the lengths of its context and question."""
    ids = [tiny.ids(1, first + rest, seed)[0].tolist() for seed, (first, rest) in enumerate(shapes)]
    return [Prompt(row[:first], row[first:], 6) for row, (first, _) in zip(ids, shapes, strict=True)]


def by_hand(model: Any, tokenizer: Any, spec: dict[str, Any], first: list[int], rest: list[int], count: int) -> str:
    """kvpress's own way: the context under the press, then the question and the answer token by token."""
    cache, tokens, fed = DynamicCache(), [], list(rest)
    method = methods.build(spec)
    with torch.no_grad():
        with method.prefill(model):
            model(torch.tensor([first]), past_key_values=cache)
        position = method.next_position(len(first), cache)
        while len(tokens) < count:
            step = torch.tensor([[fed.pop(0)]])
            logits = model(step, past_key_values=cache, position_ids=torch.tensor([[position]])).logits
            position += 1
            if not fed:
                tokens.append(int(logits[0, -1].argmax()))
                fed.append(tokens[-1])
    stop = tokenizer.eos_token_id
    return str(tokenizer.decode(tokens[: tokens.index(stop)] if stop in tokens else tokens, skip_special_tokens=True))


@pytest.mark.parametrize("name", SPECS)
def test_an_answer_follows_the_question_over_what_was_kept(tokenizer: Any, name: str) -> None:
    model, asked = tiny.model(), prompts([(150, 20)])
    (found,) = recall.answers(model, tokenizer, methods.build(SPECS[name]), asked, query_aware=False)
    assert found["answer"] == by_hand(model, tokenizer, SPECS[name], asked[0].context, asked[0].question, 6)


@pytest.mark.parametrize("name", ["dense", "knorm", "snap", "adakv"])
def test_query_aware_the_question_is_compressed_too(tokenizer: Any, name: str) -> None:
    model, asked = tiny.model(), prompts([(150, 20)])
    (found,) = recall.answers(model, tokenizer, methods.build(SPECS[name]), asked, query_aware=True)
    whole = asked[0].context + asked[0].question
    assert found["answer"] == by_hand(model, tokenizer, SPECS[name], whole[:-1], whole[-1:], 6)


def test_uncompressed_it_is_transformers_own_answer(tokenizer: Any) -> None:
    model, asked = tiny.model(), prompts([(150, 20), (120, 10)])
    found = recall.answers(model, tokenizer, methods.Dense(), asked, query_aware=False)
    for prompt, answer in zip(asked, found, strict=True):
        ids = torch.tensor([prompt.context + prompt.question])
        new = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        assert answer["answer"] == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", SPECS)
def test_many_prompts_give_each_the_answer_that_it_has_alone(tokenizer: Any, name: str) -> None:
    model, method = tiny.model(), methods.build(SPECS[name])
    asked = prompts([(150, 20), (140, 20), (150, 20), (150, 21), (140, 20)])
    together = recall.answers(model, tokenizer, method, asked, query_aware=False)
    assert together == [recall.answers(model, tokenizer, method, [one], query_aware=False)[0] for one in asked]


@pytest.mark.parametrize(
    ("spec", "kept", "simulated"),
    [({}, 1.0, False), (KNORM, 0.5, False), (ADAKV, 0.5, True), (DECODING, 40 / 175, False)],
    ids=["dense", "knorm", "adakv", "decoding"],
)
def test_what_was_kept_is_measured(tokenizer: Any, spec: dict[str, Any], kept: float, simulated: bool) -> None:
    method = methods.build(spec)
    (found,) = recall.answers(tiny.model(), tokenizer, method, prompts([(150, 20)]), query_aware=False)
    assert found["kept_fraction"] == pytest.approx(kept, abs=0.02)
    assert found["simulated"] is simulated


def test_dms_answers_over_its_own_cache_by_the_rule(tokenizer: Any, tmp_path: Path) -> None:
    heads, model, ids = dms_reference.heads(0.3, 12), copy.deepcopy(tiny.model()), tiny.ids(2, 160)
    evict.save(heads, tmp_path)
    method = methods.build({"dms": {"adapter": str(tmp_path), "checkpoint": None, "revision": None}})
    asked = [Prompt(row[:145], row[145:], 6) for row in ids.tolist()]
    for row, found in zip(ids, recall.answers(model, tokenizer, method, asked, query_aware=False), strict=True):
        whole = row[None]
        for _ in range(6):
            logits = dms_reference.Reference(copy.deepcopy(tiny.model()), heads, whole).logits
            whole = torch.cat([whole, logits[:, -1:].argmax(-1)], 1)
        assert found["answer"] == tokenizer.decode(whole[0, 160:], skip_special_tokens=True)
        assert 0.1 < found["kept_fraction"] < 0.9 and not found["simulated"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny model with a tokenizer, as the fetch stage leaves it."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sources.fetch_model("tiny", {"path": str(folder)}, folder / "manifest.json")
    return folder / "manifest.json"


@pytest.fixture(autouse=True)
def _here_and_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job runs in this process, on the CPU, and waits for no other."""
    monkeypatch.setattr(jobs, "isolated", lambda work, died: work())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run(manifest: Path, folder: Path, spec: dict[str, Any], **request: Any) -> list[dict[str, Any]]:
    """Rows of a job."""
    variant = {"model": "tiny", "method": "m", "spec": spec}
    job = jobs.Job(manifest, variant, {}, {"dtype": "auto", "attention": "sdpa"}, {}, folder / "rows.parquet")
    retrieval.retrieval(job, REQUEST | request)
    table = pq.read_table(job.output)
    assert table.schema.equals(retrieval.RETRIEVAL, check_metadata=False)
    return list(table.to_pylist())


def test_a_row_says_what_was_asked_and_found(manifest: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = run(manifest, tmp_path, KNORM, depths=[0.0, 1.0])
    assert [(row["task"], row["prompt_tokens"], row["depth"], row["sample"]) for row in rows] == [
        ("needle", 400, depth, sample) for depth in (0.0, 1.0) for sample in range(3)
    ]
    for row in rows:
        quiz = needles.quiz(Point("needle", 400, row["depth"]), row["sample"])
        assert (row["document"], row["expected"], row["status"]) == (quiz.document, quiz.expected, "ok")
        prompt = haystack.prompt(tokenizer, quiz, 400)
        (alone,) = recall.answers(tiny.model(), tokenizer, methods.build(KNORM), [prompt], query_aware=False)
        assert row["answer"] == alone["answer"] and row["kept_fraction"] == alone["kept_fraction"]
        assert row["score"] == needles.score(row["expected"], row["answer"]) and row["correct"] == (row["score"] == 1)


def test_every_method_gets_the_same_samples(manifest: Path, tmp_path: Path) -> None:
    def samples(spec: dict[str, Any]) -> list[Any]:
        keys = ("task", "prompt_tokens", "depth", "sample", "document", "expected", "query_aware")
        return [[row[key] for key in keys] for row in run(manifest, tmp_path, spec)]

    assert samples({}) == samples(SNAP) == samples(RANDOM)


def test_a_point_that_cannot_be_run_is_one_row_and_the_others_go_on(manifest: Path, tmp_path: Path) -> None:
    rows = run(manifest, tmp_path, {}, prompt_tokens=[128, 400, 508], tasks=["needle"])
    assert [row["status"] for row in rows] == ["unsupported", "ok", "ok", "ok", "unsupported"]
    assert "128 tokens have no room for a text" in rows[0]["status_reason"]
    assert "the model's context is 512" in rows[-1]["status_reason"]
    assert rows[-1]["prompt_tokens"] == 508 and rows[-1]["sample"] is None and rows[-1]["answer"] is None


def test_a_method_that_refuses_the_model_is_one_row(manifest: Path, tmp_path: Path) -> None:
    (row,) = run(manifest, tmp_path, {"press": "ObservedAttentionPress", "args": HALF})
    assert row["status"] == "unsupported" and "attention: eager" in row["status_reason"] and row["task"] is None


def test_random_weights_retrieve_nothing(tmp_path: Path) -> None:
    sources.fetch_model("random", {"random": "Qwen/Qwen3-0.6B", "seed": 0}, tmp_path / "manifest.json")
    (row,) = run(tmp_path / "manifest.json", tmp_path, {})
    assert row["status"] == "unsupported" and row["status_reason"].startswith("random weights have no tokenizer")
