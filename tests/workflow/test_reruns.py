"""What reruns, and what does not: one run of everything, then one change at a time, undone after it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runner import Done, copy_workflow, snakemake

import tinyrun

pytestmark = pytest.mark.xdist_group("reruns")

EVERYTHING = {
    "fetch_model": 1, "fetch_dataset": 1, "prompts": 1, "workload": 1, "prefill": 2, "generation": 2, "outputs": 2,
    "windows": 1, "quality": 2, "retrieval": 2, "device_rates": 1, "plan": 1, "stats": 1, "quality_stats": 1, "bars": 1,
    "roofline": 1, "quality_plots": 3, "report": 1,
}  # fmt: skip
KVBENCH = "workflow/scripts/kvbench"


@dataclass(frozen=True)
class Run:
    workflow: Path
    folder: Path

    def plan(self, **changes: Any) -> dict[str, int]:
        """Jobs that would run now, under a changed config."""
        done = self.call("--dry-run", **changes)
        assert done.status == 0, done.output
        return done.jobs

    def call(self, *arguments: str, **changes: Any) -> Done:
        return snakemake(self.workflow, self.folder, tinyrun.make(self.folder, **changes), *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    finished = Run(copy_workflow(tmp_path_factory.mktemp("workflow")), tmp_path_factory.mktemp("run"))
    done = finished.call()
    assert done.status == 0, done.output
    assert done.jobs == EVERYTHING
    assert (finished.folder / "results/report.html").stat().st_size > 10_000
    return finished


def test_a_second_run_does_nothing(run: Run) -> None:
    done = run.call()
    assert done.status == 0 and "Nothing to be done" in done.output


def edited(run: Run, name: str, edit: Callable[[str], str]) -> dict[str, int]:
    """Jobs that would run after an edit of a file, which is undone."""
    path = run.workflow / name
    before = path.read_text("utf-8")
    path.write_text(edit(before), "utf-8")
    try:
        assert edit(before) != before
        return run.plan()
    finally:
        path.write_text(before, "utf-8")


def statement(text: str) -> str:
    return text + "\nADDED = 1\n"


DRAWING = {"bars": 1, "roofline": 1, "report": 1}
JUDGING = {"windows": 1, "quality": 2}
JUDGED = {"quality_stats": 1, "quality_plots": 3, "report": 1}
DEVICE = {"prefill": 2, "generation": 2, "outputs": 2, "retrieval": 2} | JUDGING | JUDGED
AFTER = {"stats": 1} | DRAWING


@pytest.mark.parametrize(
    ("module", "jobs"),
    [
        ("plots", {"bars": 1, "report": 1}),
        ("quality_plots", {"quality_plots": 3, "report": 1}),
        ("report", {"report": 1}),
        ("roofline_plot", {"roofline": 1, "report": 1}),
        ("stats", AFTER),
        ("rates", {"device_rates": 1} | AFTER),
        ("answers", {"outputs": 2, "retrieval": 2} | JUDGED),
        ("distribution", {"quality": 2} | JUDGED),
        ("verdicts", JUDGED),
        ("measure", {"prefill": 2, "generation": 2} | AFTER),
        ("decode", DEVICE | AFTER),
        ("prompts", EVERYTHING | {"fetch_model": 0, "fetch_dataset": 0, "device_rates": 0, "retrieval": 0, "plan": 0}),
        ("config", {}),
    ],
)
def test_an_edited_module_reruns_the_rules_that_can_reach_it(run: Run, module: str, jobs: dict[str, int]) -> None:
    assert edited(run, f"{KVBENCH}/{module}.py", statement) == {rule: n for rule, n in jobs.items() if n}


@pytest.mark.parametrize("name", [f"{KVBENCH}/decode.py", f"{KVBENCH}/files.py", "workflow/scripts/measure.py"])
def test_a_comment_reruns_nothing(run: Run, name: str) -> None:
    assert edited(run, name, lambda text: text + "\n# a comment\n") == {}


def test_a_template_redraws_the_report(run: Run) -> None:
    name = next((run.workflow / KVBENCH / "templates").iterdir()).name
    assert edited(run, f"{KVBENCH}/templates/{name}", lambda text: text + "\n") == {"report": 1}


@pytest.mark.parametrize(
    "name", ["Snakefile", "workflow/rules/measure.smk", f"{KVBENCH}/decode.py", "workflow/scripts/measure.py"]
)
def test_a_touched_file_reruns_nothing(run: Run, name: str) -> None:
    (run.workflow / name).touch()
    assert run.plan() == {}


def test_a_touched_dataset_with_the_same_bytes_reruns_nothing(run: Run) -> None:
    (run.folder / "chats.json").touch()
    assert run.plan() == {}


def test_a_fresh_checkout_reruns_nothing(run: Run) -> None:
    for path in run.workflow.rglob("*"):
        path.touch()
    assert run.plan() == {}


def knorm(ratio: float) -> dict[str, Any]:
    return {"press": "KnormPress", "args": {"compression_ratio": ratio}}


ONE = {"prefill": 1, "generation": 1, "outputs": 1, "quality": 1, "retrieval": 1} | JUDGED


def test_an_edited_press_argument_reruns_that_variant_only(run: Run) -> None:
    assert run.plan(methods={"baseline": "none", "knorm-0.5": knorm(0.6)}) == ONE | {"plan": 1} | AFTER


def test_an_added_variant_is_all_that_runs(run: Run) -> None:
    methods = {"baseline": "none", "knorm-0.5": knorm(0.5), "knorm-0.7": knorm(0.7)}
    assert run.plan(methods=methods) == ONE | {"plan": 1} | AFTER


def test_the_order_of_keys_reruns_nothing_that_measures(run: Run) -> None:
    methods = {"knorm-0.5": {"args": {"compression_ratio": 0.5}, "press": "KnormPress"}, "baseline": "none"}
    assert not set(run.plan(methods=methods)) & {"prefill", "generation", "outputs", "quality"}


def test_a_changed_dataset_reruns_what_comes_of_it(run: Run) -> None:
    import json

    path = run.folder / "chats.json"
    before = path.read_text("utf-8")
    path.write_text(json.dumps(tinyrun.chats(seed=1)), "utf-8")
    try:
        assert run.plan()["fetch_dataset"] == 1
    finally:
        path.write_text(before, "utf-8")


def test_a_search_for_what_fits_measures_nothing_again(run: Run) -> None:
    protocol = tinyrun.config(run.folder)["protocol"] | {"capacity": True}
    assert run.plan(protocol=protocol) == {"capacity": 2, "plan": 1} | AFTER | JUDGED


def test_a_file_that_loading_does_not_read_reruns_nothing(run: Run) -> None:
    for name in (".DS_Store", "notes.md"):
        (run.folder / "model" / name).write_text("nothing")
    try:
        assert run.plan() == {}
    finally:
        for name in (".DS_Store", "notes.md"):
            (run.folder / "model" / name).unlink()


def test_shapes_that_change_are_fetched_again(run: Run) -> None:
    name = f"{KVBENCH}/shapes/Qwen--Qwen3-0.6B.json"
    assert edited(run, name, lambda text: text.replace("{", "{ ", 1))["fetch_model"] == 1
