"""The jobs of a retrofit: what they leave, going on after a kill, and errors before any work."""

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

import tiny
import tinyrun
from conftest import SCRIPTS
from kvbench import jobs, retrofit, sources, tables
from kvbench.dms import adapter, corpus, evict
from kvbench.dms.corpus import Sequence
from kvbench.dms.judge import judge
from kvbench.dms.student import Student
from kvbench.errors import Unsupported, UserError
from kvbench.manifest import load_manifest
from kvbench.methods import build
from kvbench.options import CONTINUATION, Retrofit

TOKENS = 48
SETTINGS = {
    "model": "tiny", "window": 6, "cr": 3.0, "lora_rank": 2, "steps": 30, "batch_size": 3, "tokens": TOKENS,
    "head_learning_rate": 3e-3, "evaluations": 2, "checkpoint_steps": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's manifest, and a corpus of random tokens."""
    where = tmp_path_factory.mktemp("retrofit")
    tinyrun.save_model(where / "model")
    sources.fetch_model("tiny", {"path": str(where / "model")}, where / "model.json")
    draw = np.random.default_rng(0)

    def some(split: str, name: str, count: int, tokens: int) -> list[Sequence]:
        return [Sequence(split, name, str(i), draw.integers(1, 300, tokens).tolist()) for i in range(count)]

    found = some("train", "conversations", 50, TOKENS) + some("held_out", "conversations", 4, TOKENS + CONTINUATION)
    found += some("held_out", "book", 3, TOKENS + CONTINUATION)
    corpus.write(found, where / "corpus.parquet", {"text": "conversations", "train": 50, "held_out": 7, "prose": 0.0})
    return where


def job(folder: Path, output: Path) -> jobs.Job:
    variant = {"model": "tiny", "method": "none", "spec": {}}
    return jobs.Job(folder / "model.json", variant, {}, {"dtype": "auto", "attention": "sdpa"}, {}, output)


@pytest.fixture
def train(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train in this process, with a lock of its own; returns the folder of what came of it."""
    monkeypatch.setattr(jobs, "isolated", lambda work, died: work())
    monkeypatch.setattr(jobs, "cli", lambda main: main())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(place: str = "made", **changes: Any) -> Path:
        settings = Retrofit(**SETTINGS | changes)
        retrofit.train(job(folder, tmp_path / place / "curve.parquet"), folder / "corpus.parquet", settings)
        return tmp_path / place

    return run


def contents(folder: Path) -> dict[str, Any]:
    """What lies in a retrofit's folder, without seconds: tensors, their metadata, and the LoRA's settings."""
    found: dict[str, Any] = {"curve": pq.read_table(folder / "curve.parquet").drop_columns("seconds").to_pylist()}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).view(torch.uint8).tolist() for name in file.keys()}  # noqa: SIM118
            found[str(path.relative_to(folder))] = tensors, file.metadata()
    for path in folder.rglob("adapter_config.json"):
        found[str(path.relative_to(folder))] = json.loads(path.read_text())
    return found


def command(folder: Path, output: Path) -> list[str]:
    given: dict[str, Any] = {
        "--manifest": folder / "model.json", "--corpus": folder / "corpus.parquet", "--output": output,
        "--variant": json.dumps({"model": "tiny", "method": "none", "spec": {}}), "--protocol": "{}",
        "--loading": '{"dtype": "auto", "attention": "sdpa"}', "--provenance": "{}", "--settings": json.dumps(SETTINGS),
    }  # fmt: skip
    return [sys.executable, str(SCRIPTS / "retrofit.py"), *(str(part) for pair in given.items() for part in pair)]


def test_a_killed_run_goes_on_to_the_very_files_of_one_that_was_not(train: Any, folder: Path, tmp_path: Path) -> None:
    whole, output = train(), tmp_path / "killed" / "curve.parquet"
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = subprocess.Popen(command(folder, output), start_new_session=True, env=environment, stdout=-1, stderr=-1)
    state = output.parent / "resume" / "state.pt"
    while running.poll() is None and not state.exists():
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert state.exists() and not output.exists()
    done = subprocess.run(command(folder, output), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout and not state.exists()
    expected = contents(whole)
    assert len(expected) == 7  # the curve, the adapter's three files, and those of the checkpoint at CR 2
    assert contents(output.parent) == expected


@pytest.mark.parametrize(
    "kind", [{}, {"lora_rank": None}, {"lora_rank": None, "whole_model": True}], ids=["lora", "heads", "whole"]
)
def test_the_artefact_is_what_was_judged(kind: dict[str, Any], train: Any, folder: Path) -> None:
    made = train(**kind)
    last = [row for row in pq.read_table(made / "curve.parquet").to_pylist() if row["step"] == 30]
    loaded = copy.deepcopy(tiny.model())
    dms = build({"dms": {"adapter": str(made / "adapter")}})
    heads = dms.heads(loaded)  # type: ignore[attr-defined]
    assert heads.about["base_model"] == "tiny" and "model.safetensors" in heads.about["base_sha256"]
    reference = Student(copy.deepcopy(tiny.model()), 6, None, False, 0)
    again = Student(loaded, 6, None, False, 0)
    again.original = reference.original
    again.heads.load_state_dict(heads.state_dict())
    for name, ids in corpus.load(folder / "corpus.parquet").held_out.items():
        row = next(row for row in last if row["corpus"] == name)
        verdict = judge(again, torch.from_numpy(ids).long(), TOKENS, 4)
        for key, value in vars(verdict).items():
            assert row[key] == pytest.approx(value, rel=1e-2, abs=1e-6), key


def test_the_card_and_the_heads_say_what_was_measured(train: Any, folder: Path) -> None:
    made = train(lora_rank=2)
    card = (made / "adapter" / "README.md").read_text("utf-8")
    rows = [row for row in pq.read_table(made / "curve.parquet").to_pylist() if row["step"] == 30]
    for row in rows:
        if row["corpus"] != "train":
            cells = (f"{row[key]:.4f}" for key in ("kl", "kl_off", "top1_agreement", "kept_fraction"))
            assert f"| {row['corpus']} | {' | '.join(cells)} |" in card
    digest = load_manifest(folder / "model.json").files
    assert all(entry["sha256"] in card for entry in digest if entry["path"].endswith("safetensors"))
    assert "| `cr` | 3.0 |" in card and "| `prose_from` | addresses, fiction |" in card
    assert card.startswith("---\n") and "cpu: " in card
    about = evict.load(made / "adapter").about
    kept = {row["corpus"]: round(row["kept_fraction"], 4) for row in rows if row["corpus"] != "train"}
    assert json.loads(about["kept_fraction"]) == kept
    small = sum(path.stat().st_size for path in (made / "adapter").glob("*.safetensors"))
    assert small < 40_000


def test_a_state_of_other_settings_is_left_aside(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train("one", checkpoint_steps=29)
    torch.save({"key": "another"}, _touched(whole.parent / "two" / "resume" / "state.pt"))
    again = train("two", checkpoint_steps=29)
    assert "other settings" in capsys.readouterr().out
    assert contents(again) == contents(whole)
    assert not (again / "resume").exists() and (again / "checkpoints" / "cr-2").is_dir()


def _touched(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 480}, "more than the context of tiny, 512 tokens"),
        ({"tokens": 50}, "has sequences of 48 tokens"),
        ({"batch_size": 51}, "fewer than the 51 of one step"),
        ({"learning_rate": 1e30, "steps": 40}, "diverged"),
    ],
)
def test_what_cannot_be_trained_is_said(changes: dict[str, Any], words: str, train: Any) -> None:
    with pytest.raises(UserError, match=words):
        train(**changes)


def test_out_of_memory_is_an_error_with_its_remedy(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(jobs, "ready", full)
    with pytest.raises(UserError, match=r"retrofit of tiny: oom: CUDA out of memory\. Lower the retrofit's batch_size"):
        train()


def test_a_corpus_job_counts_what_it_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _touched(tmp_path / "texts" / "mine.txt")
    text.write_text("the cache keeps what a model has read. " * 300, "utf-8")
    settings = Retrofit(**SETTINGS | {"text": {"path": str(text)}, "steps": 2, "held_out": 0.3})
    monkeypatch.setattr("kvbench.book.pieces", lambda tokenizer, tokens, _: iter([("CHAPTER", [1] * tokens)] * 3))
    output = tmp_path / "corpus.parquet"
    retrofit.make_corpus(job(folder, output), settings, None, None)
    assert "6 sequences of 48 tokens to train on" in capsys.readouterr().out
    about = tables.provenance_of(output)
    assert about["text"] == str(text) and about["train"] == 6 and corpus.load(output).train.shape == (6, TOKENS)


def test_weights_of_another_model_are_refused(train: Any) -> None:
    made = train(lora_rank=None, whole_model=True)
    other = copy.deepcopy(tiny.model("Qwen3"))  # its heads have the same sizes, and it has norms that they have not
    with pytest.raises(Unsupported, match="weights of another model"):
        adapter.load(other, made / "adapter")


def test_what_dms_could_not_run_is_not_trained(folder: Path, tmp_path: Path, train: Any) -> None:
    tiny.sliding(200).save_pretrained(tmp_path / "sliding")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, tmp_path / "sliding" / name)
    before = (folder / "model.json").read_bytes()
    try:
        sources.fetch_model("tiny", {"path": str(tmp_path / "sliding")}, folder / "model.json")
        with pytest.raises(UserError, match="sliding-window layers"):
            train()
    finally:
        (folder / "model.json").write_bytes(before)
    assert not (tmp_path / "made" / "resume").exists()


def test_a_run_that_ends_before_its_curve_is_written_keeps_its_checkpoints(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, write = train("whole"), retrofit.tables.write
    monkeypatch.setattr(retrofit.tables, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.setattr(retrofit.tables, "write", write)
    assert contents(train()) == contents(whole)


def test_a_state_of_other_code_is_not_gone_on_from(folder: Path, tmp_path: Path) -> None:
    from kvbench.dms.run import Run

    def key(code: str) -> str:
        made = dataclasses.replace(job(folder, tmp_path / "curve.parquet"), provenance={"code": code})
        manifest = load_manifest(folder / "model.json")
        return Run(made, manifest, folder / "corpus.parquet", Retrofit(**SETTINGS), {"dtype": "torch.float32"})._key()

    assert key("a") == key("a") != key("b")
