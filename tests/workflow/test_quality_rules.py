"""Windows and quality as rules: what they write for every kind of method, and what makes them run again."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from runner import copy_workflow, snakemake

import tinyrun
from kvbench import tables, window_table

pytestmark = pytest.mark.xdist_group("quality")

HALF = {"compression_ratio": 0.5}
KNORM = {"press": "KnormPress", "args": HALF}
METHODS = {
    "baseline": "none",
    "knorm-0.5": KNORM,
    "masks": {"press": "AdaKVPress", "args": {"press": KNORM}},
    # a prefix of 24 tokens is shorter than SnapKV's window
    "refuses": {"press": "SnapKVPress", "args": HALF},
}
SHAPES = "shapes"
VARIANTS = [{"model": "tiny", "method": method} for method in METHODS] + [{"model": SHAPES, "method": "knorm-0.5"}]
TARGETS = [f"results/quality/{v['model']}/{v['method']}.parquet" for v in VARIANTS]
KVBENCH = "workflow/scripts/kvbench"
CORPORA = ["own", "conversations", "book"]


@dataclass(frozen=True)
class Run:
    workflow: Path
    folder: Path

    def call(self, *arguments: str, **changes: Any) -> Any:
        models = {"tiny": {"source": {"path": str(self.folder / "model")}}}
        models[SHAPES] = {"source": {"random": "Qwen/Qwen3-0.6B"}}
        config = {"models": models, "methods": METHODS, "variants": VARIANTS} | changes
        return snakemake(self.workflow, self.folder, tinyrun.make(self.folder, **config), *arguments, "--", *TARGETS)

    def plan(self, **changes: Any) -> dict[str, int]:
        done = self.call("--dry-run", **changes)
        assert done.status == 0, done.output
        return dict(done.jobs)

    def rows(self, model: str, method: str) -> list[dict[str, Any]]:
        return pq.read_table(self.folder / f"results/quality/{model}/{method}.parquet").to_pylist()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(copy_workflow(tmp_path_factory.mktemp("workflow")), tmp_path_factory.mktemp("run"))
    done = made.call()
    assert done.status == 0, done.output
    assert done.jobs == {"fetch_model": 2, "fetch_dataset": 1, "prompts": 1, "windows": 2, "quality": 5}
    return made


def test_a_press_has_one_row_a_token(run: Run) -> None:
    rows = run.rows("tiny", "knorm-0.5")
    assert {(row["model"], row["method"], row["status"], row["reference"]) for row in rows} == {
        ("tiny", "knorm-0.5", "ok", "full")
    }
    assert Counter(row["corpus"] for row in rows) == dict.fromkeys(CORPORA, 2 * 4)
    assert Counter(row["distance"] for row in rows) == dict.fromkeys(range(1, 5), 6)
    assert all(row["kl"] > 0 and row["nll"] > 0 and row["nll_full"] > 0 for row in rows)
    assert {(row["kept_fraction"], row["simulated"]) for row in rows} == {(0.5, False)}
    assert {(row["kept_fraction"], row["simulated"]) for row in run.rows("tiny", "masks")} == {(0.5, True)}


def test_every_variant_is_judged_on_the_same_windows(run: Run) -> None:
    chosen = window_table.load(run.folder / "results/windows/tiny.parquet")
    expected = {(window.corpus, window.document, window.window) for window in chosen}
    for method in ("baseline", "knorm-0.5", "masks"):
        assert {(r["corpus"], r["document"], r["window"]) for r in run.rows("tiny", method)} == expected
    same = [[row["nll_full"] for row in run.rows("tiny", method)] for method in ("knorm-0.5", "masks")]
    assert same[0] == pytest.approx(same[1], abs=1e-5)


def test_the_baseline_is_the_noise_floor(run: Run) -> None:
    rows = run.rows("tiny", "baseline")
    assert Counter(row["reference"] for row in rows) == {"batch": 24, "dtype": 24}
    assert {row["kept_fraction"] for row in rows} == {1.0}
    noise = {r: [row["kl"] for row in rows if row["reference"] == r] for r in ("batch", "dtype")}
    press = [row["kl"] for row in run.rows("tiny", "knorm-0.5")]
    assert max(noise["batch"]) < 1e-10
    assert 0 < sum(noise["dtype"]) < sum(press) / 10


@pytest.mark.parametrize(
    ("model", "method", "status", "reason"),
    [
        ("tiny", "refuses", "unsupported", "window size"),
        (SHAPES, "knorm-0.5", "unsupported", "random weights have no tokenizer"),
    ],
)
def test_what_cannot_be_judged_is_one_row_with_its_reason(
    run: Run, model: str, method: str, status: str, reason: str
) -> None:
    (row,) = run.rows(model, method)
    assert (row["model"], row["method"], row["status"]) == (model, method, status)
    assert reason in row["status_reason"]
    assert row["kl"] is None and row["reference"] is None


def test_the_files_say_what_made_them(run: Run) -> None:
    made = tables.provenance_of(run.folder / "results/quality/tiny/knorm-0.5.parquet")
    assert made["windows"]["windows"] == {
        "corpora": CORPORA, "windows": 2, "prefix_tokens": 24, "continuation_tokens": 4,
    }  # fmt: skip
    assert made["variant"]["spec"] == KNORM
    assert {"script", "code", "windows_sha256", "versions", "device", "model_files"} <= made.keys()


def edited(run: Run, name: str, edit: Callable[[str], str]) -> dict[str, int]:
    """Jobs that would run after an edit of a file, which is undone."""
    path = run.workflow / name
    before = path.read_text("utf-8")
    path.write_text(edit(before), "utf-8")
    try:
        return run.plan()
    finally:
        path.write_text(before, "utf-8")


ALL = {"windows": 2, "quality": 5}


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("book/moby-dick.txt", ALL),
        ("dms/prose/fiction.txt", {}),
        ("windows.py", ALL),
        ("workload.py", ALL),
        ("decode.py", ALL),
        ("distribution.py", {"quality": 5}),
        ("kept.py", {"quality": 5}),
        ("measure.py", {}),
    ],
)
def test_an_edit_reruns_what_reads_it(run: Run, name: str, jobs: dict[str, int]) -> None:
    assert edited(run, f"{KVBENCH}/{name}", lambda text: text + "\nADDED = 1\n") == jobs


def test_nothing_else_reruns(run: Run) -> None:
    assert run.plan() == {}
    assert run.plan(outputs={"prompts": 1, "new_tokens": 2, "max_prompt_tokens": 400}, protocol={"repeats": 7}) == {}


def test_another_press_argument_reruns_that_variant_only(run: Run) -> None:
    other = METHODS | {"knorm-0.5": {"press": "KnormPress", "args": {"compression_ratio": 0.6}}}
    assert run.plan(methods=other) == {"quality": 2}  # on two models


def test_other_windows_rerun_all(run: Run) -> None:
    assert run.plan(quality={"windows": 3, "prefix_tokens": 24, "continuation_tokens": 4}) == ALL
