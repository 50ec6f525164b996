"""What a run costs around its measurements: seconds of each part of each job, and of a run with nothing to do."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow" / "scripts"))

from kvbench import files, tables

ROOT = Path(__file__).parents[1]


def main() -> None:
    run(timed=False)
    print(f"{'job':58} {'wall':>7} {'import':>7} {'load':>7} {'measure':>8} {'rest':>7}   seconds")
    for row in sorted(rows(ROOT / "results")):
        print(row)
    print(f"a run with nothing to do: {run(timed=True):.2f} s")


def run(timed: bool) -> float:
    """Seconds of a run of the default config; only a second one has nothing to do."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--resources", "gpu=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or (timed and "Nothing to be done" not in done.stdout + done.stderr):
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - start


def rows(results: Path) -> list[str]:
    """A line for each job on the device: its wall time by Snakemake's benchmark, its parts by its own clock."""
    found = []
    for benchmark in (results / "benchmarks").rglob("*.tsv"):
        job = benchmark.relative_to(results / "benchmarks").with_suffix("")
        header, values = (line.split("\t") for line in benchmark.read_text().splitlines()[:2])
        wall = float(values[header.index("s")])
        facts = facts_of(results / job)
        parts = [facts.get(name) for name in ("import_s", "load_s", "work_s")]
        if all(part is not None for part in parts):
            cells = f"{parts[0]:7.2f} {parts[1]:7.2f} {parts[2]:8.2f} {wall - sum(parts):7.2f}"
        else:
            cells = " " * 32
        found.append(f"{job!s:58} {wall:7.2f} {cells}")
    return found


def facts_of(job: Path) -> dict[str, float]:
    """What a job's result says of the time it took; empty for a job that runs no model."""
    record, table = Path(f"{job}.json"), Path(f"{job}.parquet")
    if record.exists():
        return dict(files.read_json(record).get("provenance", {}))
    if table.exists() and pq.read_schema(table).metadata:
        return tables.provenance_of(table)
    return {}


if __name__ == "__main__":
    main()
