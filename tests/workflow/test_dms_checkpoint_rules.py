"""A DMS checkpoint from the hub to the report, by a stand-in of both; and the environment that its jobs run in."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import test_hub
from runner import ROOT, snakemake

import dms_checkpoint as standin
import tinyrun

hub = test_hub.hub  # a fixture

CONDA = """#!/bin/sh
case "$1" in
    info) echo '{"conda_prefix": "/opt/conda", "platform": "linux-64", "conda_version": "24.7.1"}';;
    config) echo '{"get": {"channel_priority": "strict"}}';;
    *) echo "conda 24.7.1";;
esac
"""


@pytest.fixture
def served(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint on a hub, and flash-attn's stand-in where jobs find it."""
    folder = standin.save(tmp_path / "checkpoint")
    repository = test_hub.Repo({path.name: path.read_bytes() for path in folder.iterdir()})
    hub.repos[f"models/{standin.REPOSITORY}"] = repository
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("PYTHONPATH", str(standin.PACKAGES), prepend=":")


def config(folder: Path, **changes: Any) -> Path:
    pinned = {"revision": standin.REVISION}
    made = tinyrun.make(folder)  # its model lends the tokenizer
    models = tinyrun.config(folder)["models"] | {
        "dms": {"source": {"hub": standin.REPOSITORY} | pinned, "base": "tiny", "trust_remote_code": True}
    }
    methods = {"baseline": "none", "dms-8x": {"dms": {"checkpoint": standin.REPOSITORY} | pinned}}
    assert made == tinyrun.make(folder, models=models, methods=methods, **changes)
    return made


def rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


@pytest.mark.parametrize("protocol", ["standard", "article"])
def test_from_the_hub_to_the_report(served: None, tmp_path: Path, protocol: str) -> None:
    made = config(
        tmp_path,
        protocol={"name": protocol, "repeats": 1, "max_repeats": 1, "max_warmup_runs": 1},
        workloads={"chat": {"batch_size": 2, "prompt_tokens": standin.WINDOW + 14, "new_tokens": 4}},
    )
    done = snakemake(ROOT, tmp_path, made)
    assert done.status == 0 and "Not measured" not in done.output, done.output[-3000:]
    results = tmp_path / "results"
    (cell,) = [row for row in rows(results / "stats.parquet") if row["method"] == "dms-8x"]
    assert (cell["status"], cell["engine"]) == ("ok", "hf")
    assert cell["kv_cache_bytes"] <= cell["kv_cache_full_bytes"] < cell["kv_cache_allocated_bytes"]
    if protocol == "standard":  # in the article's, few first messages are longer than the window
        assert cell["kv_cache_bytes"] < cell["kv_cache_full_bytes"] and cell["simulated"] is False
    for stage in ("outputs", "quality", "retrieval"):
        found = rows(results / stage / "dms" / "dms-8x.parquet")
        assert found and {row["status"] for row in found} == {"ok"}, stage
    ways = {row["way"] for row in rows(results / "outputs" / "dms" / "dms-8x.parquet")}
    assert ways == ({"alone", "batch"} if protocol == "article" else {"alone"})
    facts = json.loads((results / "models" / "dms" / "manifest.json").read_text())
    assert facts["tokenizer"] == str(tmp_path / "model") and facts["revision"] == standin.REVISION


def test_its_jobs_run_in_an_environment_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conda = tmp_path / "bin" / "conda"
    conda.parent.mkdir()
    conda.write_text(CONDA)
    conda.chmod(0o755)
    monkeypatch.setenv("PATH", str(conda.parent), prepend=":")

    def environments(variant: str) -> set[str]:
        files = [f"results/{stage}/{variant}.parquet" for stage in ("outputs", "quality", "retrieval")]
        files += [f"results/prefill/{variant}/article.json", f"results/generation/{variant}/article.parquet"]
        asked = ("--sdm", "conda", "--dry-run", "--", *files)
        done = snakemake(ROOT, tmp_path, ROOT / "config" / "article.yaml", *asked)
        assert done.status == 0, done.output
        found = [line for line in done.output.splitlines() if line.startswith("Conda environment")]
        return {line.split("envs/")[1].split()[0] for line in found}

    assert environments("qwen3-8b/baseline") == {"analysis.yaml", "gpu.yaml"}
    assert environments("qwen3-8b-dms/dms-8x") == {"analysis.yaml", "gpu.yaml", "dms.yaml"}
