"""The profiles as Snakemake reads them, and the environments beside them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted(path.parent.name for path in (ROOT / "profiles").glob("*/config.yaml"))
CLUSTERS = [name for name in PROFILES if name != "default"]

# Two measurements that would run side by side if nothing limited the GPU, and a file too big for Snakemake's
# own checksum limit of 1 MB.
TOY = """
rule all:
    input: "prefill.txt", "generation.txt"

rule prefill:
    input: "prompts.bin"
    output: "prefill.txt"
    threads: 8
    resources: gpu=1, mem_mb=100, runtime=5
    shell: "date +%s.%N > {output}; sleep 1; date +%s.%N >> {output}"

use rule prefill as generation with:
    output: "generation.txt"
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the toy workflow, its input, and the repository's profiles beside it."""
    (tmp_path / "Snakefile").write_text(TOY)
    (tmp_path / "prompts.bin").write_bytes(bytes(3_000_000))
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    return tmp_path


def snakemake(folder: Path, *arguments: str) -> str:
    """Run Snakemake in a folder; returns what it printed, whether it succeeded or not."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    return done.stdout


def load(name: str) -> dict[str, object]:
    return yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())


def held_the_gpu_in_turn(folder: Path) -> bool:
    (a_start, a_end), (b_start, b_end) = (
        map(float, (folder / f"{rule}.txt").read_text().split()) for rule in ("prefill", "generation")
    )
    return a_end <= b_start or b_end <= a_start


def test_default_loads_by_itself_and_measures_one_at_a_time(toy: Path) -> None:
    printed = snakemake(toy, "--cores", "16")
    assert "Using workflow specific profile profiles/default" in printed
    assert held_the_gpu_in_turn(toy), printed


def test_the_command_line_replaces_the_limit(toy: Path) -> None:
    snakemake(toy, "--cores", "16", "--resources", "gpu=2")
    assert not held_the_gpu_in_turn(toy)


def test_a_touched_file_reruns_nothing_and_a_changed_one_does(toy: Path) -> None:
    snakemake(toy)
    later = time.time() + 10
    os.utime(toy / "prompts.bin", (later, later))
    assert "Nothing to be done" in snakemake(toy, "--dry-run")

    (toy / "prompts.bin").write_bytes(bytes(2_999_999) + b"x")
    os.utime(toy / "prompts.bin", (later, later))
    assert "Updated input files: prompts.bin" in snakemake(toy, "--dry-run")


@pytest.mark.parametrize("name", CLUSTERS)
def test_snakemake_parses_each_cluster_profile(toy: Path, name: str) -> None:
    profile = load(name)
    plugins = [f"snakemake_executor_plugin_{profile['executor']}"]
    arguments = ["--workflow-profile", f"profiles/{name}", "--dry-run"]
    if storage := profile.get("default-storage-provider"):
        plugins.append(f"snakemake_storage_plugin_{storage}")
        # A rule without inputs: a dry run asks the bucket for inputs, and there is no bucket.
        (toy / "Snakefile").write_text(TOY.replace('    input: "prompts.bin"\n', ""))
        arguments += ["--default-storage-prefix", f"{storage}://bucket/kvbench", "--max-inventory-time", "0"]
    for plugin in plugins:
        if importlib.util.find_spec(plugin) is None:
            pytest.skip(f"{plugin} is not installed")
    printed = snakemake(toy, *arguments)
    assert "unrecognized arguments" not in printed
    assert re.search(r"generation +1", printed) and re.search(r"prefill +1", printed), printed
    for resource in profile["default-resources"]:  # type: ignore[attr-defined]
        assert f"{resource}=" in printed, resource


@pytest.mark.parametrize("name", PROFILES)
def test_every_key_is_an_option_of_snakemake_or_of_its_plugin(toy: Path, name: str) -> None:
    profile = load(name)
    executor = profile.get("executor", "local")
    options = set(re.findall(r"--[a-z][a-z0-9-]+", snakemake(toy, "--help")))
    if importlib.util.find_spec(f"snakemake_executor_plugin_{executor}") is None:
        options |= {f"--{key}" for key in profile if key.startswith(f"{executor}-")}
    assert {f"--{key}" for key in profile} <= options


@pytest.mark.parametrize("name", PROFILES)
def test_every_key_has_its_reason(name: str) -> None:
    lines = (ROOT / "profiles" / name / "config.yaml").read_text().splitlines()
    first_of_block = [i for i, line in enumerate(lines) if re.match(r"[a-z]", line) and not lines[i - 1]]
    assert not [lines[i] for i in first_of_block if not lines[i + 1].startswith("  #")]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_profile_repeats_what_it_replaces(name: str) -> None:
    default, cluster = load("default"), load(name)
    per_machine = {"cores", "resources"}
    assert {key: cluster.get(key) for key in default.keys() - per_machine} == {
        key: value for key, value in default.items() if key not in per_machine
    }


def test_lsf_asks_for_a_gpu_wherever_a_rule_does() -> None:
    rules = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    on_the_gpu = {
        re.split(r"[: ]", block)[0]
        for block in re.split(r"^(?:rule|use rule \w+ as) ", rules, flags=re.MULTILINE)[1:]
        if "gpu=" in block
    }
    assert set(load("lsf")["set-resources"]) == on_the_gpu  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["gpu", "analysis", "eval"])
def test_environments_pin_what_the_lock_pins(name: str) -> None:
    lock = {
        normal(package): version.split("+")[0]
        for package, version in re.findall(
            r"^([\w.-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE
        )
    }
    *_, pip = yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text())["dependencies"]
    pins = dict(re.split(r" *== *", pin) for pin in pip["pip"])
    assert pins == {package: lock.get(normal(package)) for package in pins}


def normal(package: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", package).lower()
