"""A retrofit in the workflow: what measures it waits for it, and sees when it changes."""

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from runner import ROOT, snakemake

import tinyrun
from kvbench.dms import evict

SETTINGS: dict[str, Any] = {
    "model": "tiny", "window": 6, "cr": 3.0, "lora_rank": 2, "steps": 12, "batch_size": 3, "tokens": 48,
    "head_learning_rate": 5e-3, "evaluations": 1, "checkpoint_steps": 5,
}  # fmt: skip
METHODS = {"baseline": "none", "mine": {"dms": {"retrofit": "tiny-3x"}}}
TRAINED = "results/retrofit/tiny-3x"


def test_training_measuring_and_the_figure(tmp_path: Path) -> None:
    config = tinyrun.make(tmp_path, methods=METHODS, retrofits={"tiny-3x": SETTINGS})
    measured = "results/prefill/tiny/mine/short.json"
    wanted = [measured, "results/plots/retrofit-tiny-3x.svg"]
    done = snakemake(ROOT, tmp_path, config, "--", *wanted)
    assert done.status == 0, done.output
    assert done.jobs["retrofit"] == done.jobs["corpus"] == done.jobs["training_curve"] == 1
    curve = pq.read_table(tmp_path / TRAINED / "curve.parquet").to_pylist()
    assert {row["corpus"] for row in curve} == {"train", "conversations", "book"}
    assert (tmp_path / TRAINED / "adapter" / "README.md").is_file()
    assert (tmp_path / TRAINED / "checkpoints" / "cr-2" / evict.FILE).is_file()
    assert not (tmp_path / TRAINED / "resume").exists()
    assert '"status": "ok"' in (tmp_path / measured).read_text("utf-8")
    assert snakemake(ROOT, tmp_path, config, "--dry-run", "--", *wanted).jobs == {}
    tinyrun.make(tmp_path, methods=METHODS, retrofits={"tiny-3x": SETTINGS | {"seed": 1}})
    again = snakemake(ROOT, tmp_path, config, "--dry-run", "--", *wanted).jobs
    assert {"retrofit", "training_curve", "prefill"} <= again.keys()


def test_every_measurement_of_a_retrofit_waits_for_it(tmp_path: Path) -> None:
    config = tinyrun.make(tmp_path, methods=METHODS, retrofits={"tiny-3x": SETTINGS})
    done = snakemake(ROOT, tmp_path, config, "--dry-run")
    assert done.status == 0, done.output
    jobs = re.findall(r"^rule (\w+):\n    input: (.*)\n    output: (.*)$", done.output, re.M)
    waiting = {rule for rule, needed, made in jobs if f"{TRAINED}/adapter" in needed and "/mine" in made}
    assert waiting == {"prefill", "generation", "outputs", "quality", "retrieval"}


def test_only_a_models_own_text_takes_a_device(tmp_path: Path) -> None:
    texts = {"tiny-own": "own", "tiny-chats": "conversations", "tiny-file": {"path": "config.yaml"}}
    retrofits = {name: SETTINGS | {"text": text} for name, text in texts.items()}
    config = tinyrun.make(tmp_path, methods={"baseline": "none"}, retrofits=retrofits)
    done = snakemake(ROOT, tmp_path, config, "--dry-run")
    assert done.jobs["own_corpus"] == 1 and done.jobs["corpus"] == 2 and done.jobs["retrofit"] == 3, done.output
    jobs = re.findall(
        r"^rule (\w*corpus):\n    input: (.*)\n    output: (.*)\n(?:.*\n)*?    resources: (.*)$", done.output, re.M
    )
    assert {made: ("gpu=1" in given, "prompts/" in needed) for _, needed, made, given in jobs} == {
        "results/retrofit/tiny-own/corpus.parquet": (True, True),
        "results/retrofit/tiny-chats/corpus.parquet": (False, True),
        "results/retrofit/tiny-file/corpus.parquet": (False, False),
    }
