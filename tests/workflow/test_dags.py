"""Configs that cannot run here still give the right jobs with the right inputs."""

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from runner import ROOT, Done, snakemake

import tinyrun

pytestmark = pytest.mark.xdist_group("dags")

CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.yaml"))


@cache
def plan(name: str) -> Done:
    """What a config that comes with kvbench would run, with its commands."""
    with tempfile.TemporaryDirectory() as folder:
        return snakemake(ROOT, Path(folder), ROOT / "config" / name, "--dry-run", "--printshellcmds")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_that_comes_with_kvbench_gives_a_plan(name: str) -> None:
    done = plan(name)
    assert done.status == 0, done.output
    assert done.jobs["report"] == 1


def test_the_articles_experiment() -> None:
    done = plan("article.yaml")
    assert done.status == 0, done.output
    assert done.jobs == {
        "fetch_model": 2, "fetch_dataset": 1, "prompts": 1, "workload": 1, "prefill": 3, "generation": 3,
        "outputs": 3, "windows": 1, "quality": 3, "retrieval": 3, "device_rates": 1, "plan": 1, "stats": 1,
        "quality_stats": 1, "bars": 1, "roofline": 1, "quality_plots": 3, "report": 1,
    }  # fmt: skip
    commands = [
        line.partition("Shell command: ")[2] for line in done.output.splitlines() if "Shell command: kvbench" in line
    ]

    def command(*words: str) -> str:
        (found,) = [line for line in commands if all(word in line for word in words)]
        return found

    base = command("kvbench fetch model --name qwen3-8b ")
    assert "b968826d9c46dd6066d109eabc6255188de91218" in base and "trust-remote-code" not in base
    dms = command("kvbench fetch model --name qwen3-8b-dms ")
    assert "da1535fc3bfb52fa340eca692a7e4e650f98838d" in dms and "--trust-remote-code" in dms
    assert "--tokenizer-from results/models/qwen3-8b/manifest.json" in dms
    data = command("kvbench fetch dataset")
    assert "192ab2185289094fc556ec8ce5ce1e8e587154ca" in data and "35f0e213ce091ed9b9" in data
    assert "--selection article --seed 4387 --min-chars 10" in command("kvbench prompts ")
    batch = command("kvbench workload ")
    assert "--batch-size 64 --prompt-tokens 1024 --new-tokens 100 --padding article" in batch
    for method, model in (("baseline", "qwen3-8b"), ("knorm-0.8", "qwen3-8b"), ("dms-8x", "qwen3-8b-dms")):
        for stage, suffix in (("prefill", "json"), ("generation", "parquet")):
            job = command(f"kvbench measure {stage}", f"results/{stage}/{model}/{method}/article.{suffix}")
            assert f"--manifest results/models/{model}/manifest.json" in job
            assert "--workload results/workloads/qwen3-8b/article.parquet" in job  # the same token ids for all three
        texts = command("kvbench outputs ", f"results/outputs/{model}/{method}.parquet")
        assert "--count 10 --new-tokens 100 --max-prompt-tokens 1024" in texts
    assert '"compression_ratio":0.8' in command("kvbench measure generation", "knorm-0.8")
    judged = command("kvbench quality ", "results/quality/qwen3-8b-dms/dms-8x.parquet")
    assert "--windows results/windows/qwen3-8b.parquet --original results/models/qwen3-8b/manifest.json" in judged
    assert "--plan results/plan.json" in command("kvbench quality_stats ", "--output results/quality.parquet")


def test_what_the_config_leaves_out_of_quality_is_not_run(tmp_path: Path) -> None:
    nothing = {"windows": 0, "retrieval": {"samples": 0}}
    config = tinyrun.make(tmp_path, quality=nothing, outputs={"prompts": 0})
    jobs = snakemake(ROOT, tmp_path, config, "--dry-run").jobs
    left_out = {"windows", "quality", "retrieval", "outputs", "quality_plots"}
    assert jobs["quality_stats"] == 1 and not left_out & jobs.keys()
    jobs = snakemake(ROOT, tmp_path, tinyrun.make(tmp_path), "--dry-run", "--until", "quality_stats").jobs
    assert jobs == {
        "fetch_model": 1, "fetch_dataset": 1, "prompts": 1, "outputs": 2, "windows": 1, "quality": 2, "retrieval": 2,
        "plan": 1, "quality_stats": 1,
    }  # fmt: skip


def test_random_weights_have_no_figures_of_quality() -> None:
    jobs = plan("shapes.yaml").jobs
    assert jobs["quality_stats"] == jobs["report"] == 1 and "quality_plots" not in jobs


@pytest.mark.parametrize(("entry", "more"), [("Snakefile", {}), ("workflow/Snakefile", {"everything": 1})])
def test_both_entries_give_the_default_configs_jobs(tmp_path: Path, entry: str, more: dict[str, int]) -> None:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / entry), "--cores", "1", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Done(0, done.stdout + done.stderr).jobs == plan("config.yaml").jobs | more


def test_the_workflow_as_a_module_of_another(tmp_path: Path) -> None:
    config = tinyrun.make(tmp_path)
    (tmp_path / "Snakefile").write_text(
        f"""
configfile: {str(config)!r}

module kvbench:
    snakefile: {str(ROOT / "workflow/Snakefile")!r}
    config: config

use rule * from kvbench

rule mine:
    input: "results/report.html"
    default_target: True
"""
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout + done.stderr


def test_a_bad_config_ends_with_its_error_before_any_job(tmp_path: Path) -> None:
    config = tinyrun.make(tmp_path, methods={"x": {"press": "KnormPres"}})
    done = snakemake(ROOT, tmp_path, config)
    assert done.status != 0
    assert "kvpress has no press 'KnormPres'; did you mean 'KnormPress'?" in done.last_line
    assert not (tmp_path / "results").exists()
