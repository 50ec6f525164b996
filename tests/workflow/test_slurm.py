"""profiles/slurm on a real Slurm of one node with a made-up GPU; opt in with KVBENCH_SLURM=1, as root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyrun

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(
        os.environ.get("KVBENCH_SLURM") != "1", reason="set KVBENCH_SLURM=1 to start a Slurm on this machine"
    ),
]

# Two jobs that ask for the one GPU say when they held it, and what Slurm was asked for; two that do not.
TWO_MEASUREMENTS = """
localrules: all

rule all:
    input: expand("{name}.txt", name=["a", "b", "free"])

rule measurement:
    output: "{name,a|b}.txt"
    threads: 8
    resources: gpu=1, mem_mb=3000, runtime=7
    shell:
        "date +%s.%N > {output}; sleep 2; date +%s.%N >> {output};"
        "scontrol --oneliner show job $SLURM_JOB_ID >> {output};"
        "echo devices=$CUDA_VISIBLE_DEVICES >> {output}"

rule free:
    output: "free.txt"
    shell: "scontrol --oneliner show job $SLURM_JOB_ID > {output}"
"""

# What the profile cannot know of this cluster: it keeps no accounts, so the queue tells a job's state, and its disk
# is local.
HERE = ["--slurm-status-command", "squeue", "--slurm-no-account", "--latency-wait", "5"]

# The plugin waits 10 s longer each time it asked too early: so ask when most of these jobs have ended.
FIRST_LOOK_S = "12"


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """A running cluster, as the environment whose commands reach it."""
    folder = Path(tempfile.mkdtemp(prefix="kvbench-slurm-"))
    try:
        subprocess.run([CLUSTER, "up", folder], check=True)
        yield {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    finally:
        subprocess.run([CLUSTER, "down", folder], check=True)
        shutil.rmtree(folder)


def snakemake(environment: dict[str, str], folder: Path, *arguments: str | Path) -> str:
    """Run Snakemake with profiles/slurm in a folder; returns what it printed."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--workflow-profile",
        ROOT / "profiles" / "slurm",
        "--directory",
        folder,
    ]
    done = subprocess.run(
        [*command, *HERE, "--slurm-init-seconds-before-status-checks", FIRST_LOOK_S, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_rules_become_slurm_jobs(slurm: dict[str, str], tmp_path: Path) -> None:
    snakefile = tmp_path / "Snakefile"
    snakefile.write_text(TWO_MEASUREMENTS)
    snakemake(slurm, tmp_path, "--snakefile", snakefile)

    (a_start, a_end, a_job, devices), (b_start, b_end, *_) = (
        (tmp_path / f"{name}.txt").read_text().splitlines() for name in "ab"
    )
    assert "TresPerJob=gres:gpu:1" in a_job
    assert "CPUs/Task=8" in a_job and "TimeLimit=00:07:00" in a_job and re.search(r"MinMemoryNode=3000M?\b", a_job)
    assert devices == "devices=0"
    assert float(a_end) <= float(b_start) or float(b_end) <= float(a_start), "both held the GPU at once"

    free = (tmp_path / "free.txt").read_text()
    assert "gpu" not in free.split("TRES=")[1].split()[0] and "TimeLimit=01:00:00" in free
    assert re.search(r"MinMemoryNode=8000M?\b", free)


def test_the_pipeline_runs_on_slurm(slurm: dict[str, str], tmp_path: Path) -> None:
    config = tinyrun.make(tmp_path / "tiny", methods={"baseline": "none"})
    arguments: list[str | Path] = ["--snakefile", ROOT / "Snakefile", "--configfile", config]
    printed = snakemake(slurm, tmp_path, *arguments)
    assert "has been submitted with SLURM jobid" in printed
    assert (tmp_path / "results" / "report.html").stat().st_size > 0
    assert "Nothing to be done" in snakemake(slurm, tmp_path, *arguments)
