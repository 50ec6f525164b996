"""Runs the workflow on a copy of the repository, so that a test may edit the code."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PARTS = ["Snakefile", "config", "profiles", "envs", "workflow"]


@dataclass(frozen=True)
class Done:
    """How a Snakemake call ended."""

    status: int
    output: str

    @property
    def jobs(self) -> dict[str, int]:
        """How many jobs of each rule were run or, in a dry run, would be; without `all`."""
        table = re.search(r"^job +count\n-+ +-+\n(.*?)^total", self.output, re.M | re.S)
        rows = re.findall(r"^(\w+) +(\d+)$", table.group(1), re.M) if table else []
        return {rule: int(count) for rule, count in rows if rule != "all"}

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return [line for line in self.output.splitlines() if line.strip()][-1]


def copy_workflow(folder: Path) -> Path:
    """A copy of what makes the workflow."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / part)
    return folder


def snakemake(workflow: Path, folder: Path, config: Path, *arguments: str) -> Done:
    """Call Snakemake on a workflow's copy in a working folder."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(workflow / "Snakefile"), "--cores", "2"]
    # tiny models need no more than a thread, and a job of one leaves room for another
    command += ["--max-threads", "1", "--resources", "gpu=1", "--configfile", str(config), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    return Done(done.returncode, done.stdout + done.stderr)
