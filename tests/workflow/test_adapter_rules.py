"""An adapter through every stage: what its variant's files say, and what makes it run again."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from runner import ROOT, Done, snakemake

import dms_reference
import tinyrun
from kvbench.dms import evict, layout

pytestmark = pytest.mark.xdist_group("adapter")

METHODS = {
    "baseline": "none",
    "knorm-0.5": {"press": "KnormPress", "args": {"compression_ratio": 0.5}},
    "dms": {"dms": {"adapter": "adapters/mine"}},
}
WINDOW = 8
OWN = {"prefill": 2, "generation": 2, "outputs": 1, "quality": 1, "retrieval": 1}
AFTER = {"stats": 1, "quality_stats": 1, "bars": 2, "roofline": 1, "quality_plots": 3, "report": 1}


@dataclass(frozen=True)
class Run:
    folder: Path

    def call(self, *arguments: str, **changes: Any) -> Done:
        workloads = {
            "short": {"batch_size": 2, "prompt_tokens": WINDOW, "new_tokens": 4},
            "long": {"batch_size": 2, "prompt_tokens": 60, "new_tokens": 20},
        }
        config = tinyrun.make(self.folder, **{"methods": METHODS, "workloads": workloads} | changes)
        return snakemake(ROOT, self.folder, config, *arguments)

    def plan(self, **changes: Any) -> dict[str, int]:
        done = self.call("--dry-run", **changes)
        assert done.status == 0, done.output
        return done.jobs

    def rows(self, name: str) -> list[dict[str, Any]]:
        return list(pq.read_table(self.folder / "results" / name).to_pylist())

    @property
    def adapter(self) -> Path:
        return self.folder / "adapters/mine"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("run"))
    dms_reference.adapter(made.adapter, dms_reference.heads(0.3, WINDOW))
    done = made.call()
    assert done.status == 0, done.output
    return made


def test_cells_tell_what_was_kept(run: Run) -> None:
    cells = {(row["method"], row["workload"]): row for row in run.rows("stats.parquet")}
    assert {row["status"] for row in cells.values()} == {"ok"} and not any(row["simulated"] for row in cells.values())
    short, long = cells["dms", "short"], cells["dms", "long"]
    assert (short["kept_fraction"], short["window"]) == (1.0, WINDOW)  # nothing has left the window
    assert long["kept_fraction"] == pytest.approx(1 / long["kv_compression_factor"]) and long["kept_fraction"] < 0.7
    assert 0.2 < long["kept_fraction_end"] < 0.7
    assert cells["knorm-0.5", "long"]["kept_fraction"] == 0.5 and cells["knorm-0.5", "long"]["window"] is None
    assert cells["baseline", "long"]["kept_fraction"] == 1.0
    assert f"its window has {WINDOW} tokens" in (run.folder / "results/report.html").read_text("utf-8")


def test_quality_is_against_the_model_before_the_adapter(run: Run) -> None:
    mine, press = (run.rows(f"quality/tiny/{name}.parquet") for name in ("dms", "knorm-0.5"))
    key = ("corpus", "window", "distance")
    full = {tuple(row[k] for k in key): row["nll_full"] for row in press}
    assert len(mine) == len(full) == 2 * 3 * 4
    for row in mine:
        assert row["nll_full"] == pytest.approx(full[tuple(row[k] for k in key)], abs=1e-5)
        assert row["kl"] > 0 and row["kl_dense"] > 0 and row["kept_fraction"] < 1 and not row["simulated"]
    assert {row["kl_dense"] for row in press} == {None}
    (summed,) = [r for r in run.rows("quality.parquet") if (r["metric"], r["slice"]) == ("kl_dense", "all")]
    assert summed["variant"] == "dms" and summed["n"] == 24 and summed["verdict"] is None
    assert "KL, nothing evicted" in (run.folder / "results/report.html").read_text("utf-8")


def test_answers_and_texts_come_out_at_every_length(run: Run) -> None:
    texts, answers = run.rows("outputs/tiny/dms.parquet"), run.rows("retrieval/tiny/dms.parquet")
    assert len({row["prompt_tokens"] for row in texts}) == len(texts) == 2 and len(answers) == 2
    for row in texts + answers:
        assert row["status"] == "ok" and row["simulated"] is False
    assert all(row["kept_fraction"] < 0.7 and row["answer"] for row in answers)
    assert all(row["new_tokens"] > 0 for row in texts)


def test_nothing_else_reruns(run: Run) -> None:
    assert run.plan() == {}
    (run.adapter / "README.md").write_text("a card")
    for path in run.adapter.iterdir():
        path.touch()
    assert run.plan() == {}


@pytest.mark.parametrize("name", [layout.HEADS, layout.LORA, layout.LORA_CONFIG])
def test_another_file_reruns_its_variant_only(run: Run, name: str) -> None:
    path, kept = run.adapter / name, run.folder / "kept"
    shutil.copy2(path, kept)
    if name == layout.LORA_CONFIG:
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"lora_alpha": 3}), "utf-8")
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, (0, 0))  # as old as one that was unpacked
    try:
        assert run.plan() == OWN | AFTER
    finally:
        kept.replace(path)
    assert run.plan() == {}


def test_an_adapter_of_another_place_reruns_its_variant_only(run: Run) -> None:
    mine, kept = run.adapter, run.folder / "kept"
    mine.replace(kept)
    evict.save(dms_reference.heads(0.5, WINDOW), mine)
    try:
        assert run.plan() == OWN | AFTER
    finally:
        shutil.rmtree(mine)
        kept.replace(mine)


def test_a_threshold_reaches_the_method_and_reruns_its_variant_only(run: Run) -> None:
    moved = {"dms": {"adapter": "adapters/mine", "threshold": 60.0}}
    assert run.plan(methods=METHODS | {"dms": moved}) == OWN | AFTER | {"plan": 1}
    done = run.call("--", "results/prefill/tiny/more/long.json", methods=METHODS | {"more": moved})
    assert done.status == 0 and done.jobs == {"prefill": 1}, done.output
    made = [run.folder / f"results/prefill/tiny/{name}/long.json" for name in ("dms", "more")]
    usual, more = (json.loads(path.read_text("utf-8"))["repeats"][0]["kept_fraction"] for path in made)
    assert more > usual + 0.05 and '"threshold": 60.0' in made[1].read_text("utf-8")
    assert run.plan() == {}


def test_a_missing_file_is_one_error_before_any_job(run: Run) -> None:
    path = run.adapter / layout.LORA_CONFIG
    kept = path.replace(run.folder / "kept")
    try:
        done = run.call()
        assert done.status != 0 and "without its other half" in done.last_line and done.jobs == {}
        assert "methods.dms.dms.adapter" in done.last_line
    finally:
        kept.replace(path)
