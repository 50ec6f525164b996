"""The prompts stage against the article's pandas code: time, peak memory and the list itself.

Both run in processes of their own on the same generated ShareGPT-shaped file, in turns, and the fastest run of each
counts; process start, imports and, for the stage, writing the Parquet file are in its time. The stage reads with
several processes: its memory is the most that all of them held at once, pages that they share counted once. Exits 1
if the lists differ.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

STAGE = Path(__file__).parents[1] / "workflow" / "scripts" / "prompts.py"
SEED, MIN_CHARS = 4387, 10
TIME_BAR, MEMORY_BAR = 1 / 4, 1 / 8

# The article's code, line for line, then a digest of its list.
ARTICLE = f"""
import sys
import pandas as pd
df = pd.read_json(sys.argv[1])
valid_convs = df[df["conversations"].apply(lambda x: len(x) >= 2)]
sorted_convs = valid_convs.sort_values(by="id")
shuffled_convs = sorted_convs.sample(frac=1, random_state={SEED}).reset_index(drop=True)
all_prompts = []
for _, data in shuffled_convs.iterrows():
    prompt = data["conversations"][0]["value"]
    completion = data["conversations"][1]["value"]
    if len(prompt) >= {MIN_CHARS} and len(completion) >= {MIN_CHARS}:
        all_prompts.append(prompt)
print("ready", flush=True)
sys.path.insert(0, sys.argv[2])
from prompts_stage import digest
print(digest(all_prompts))
"""

WORDS = """the of to and a in is it you that for on are with as this be or have from can your by not but at an we will
more one about use time data model value return list which other there their if do how then each make way like into
import function class def print self error string number table market customer strategy content product design team
system process information development management performance application C:\\temp can\'t don\'t""".split()
FOREIGN = "können größer naïve déjà señor привет мир который 你好 世界 これは 안녕하세요 😀 🚀 ∑ π — “quoted”".split()


@dataclass(frozen=True)
class Run:
    """One process and its children: wall and CPU time in s, peak memory in MB (10^6 bytes), a digest of its prompts."""

    seconds: float
    cpu_seconds: float
    megabytes: float
    prompts: str


def generate(path: str, megabytes: int, seed: int = 0) -> None:
    """Write a ShareGPT-shaped JSON file of about ``megabytes`` 10^6 bytes: 225 conversations a megabyte.

    Text lengths follow the ShareGPT file's: medians of 82 characters for a human and 1,245 for the assistant.
    A third of the conversations begin with the assistant, some ids repeat and some conversations are too short.
    """
    draw = random.Random(seed)
    texts = {
        "human": [_text(draw, draw.lognormvariate(4.4, 1.3)) for _ in range(20_000)],
        "gpt": [_text(draw, max(20.0, draw.gauss(1250, 650))) for _ in range(20_000)],
    }
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("[")
        for index in range(225 * megabytes):
            # About one id in a hundred is the one before again.
            number = index - (draw.random() < 0.01)
            identity = f"{hashlib.md5(str(number // 3).encode()).hexdigest()[:7]}_{number % 3}"
            turns = 0 if draw.random() < 0.01 else 2 + int(draw.expovariate(1 / 4.1))
            roles = ("gpt", "human") if draw.random() < 1 / 3 else ("human", "gpt")
            messages = ({"from": role, "value": draw.choice(texts[role])} for role in _alternate(roles, turns))
            record = {"id": identity, "conversations": list(messages)}
            stream.write(",\n" * bool(index) + json.dumps(record, indent=2))
        stream.write("]\n")


def digest(prompts: Iterable[str]) -> str:
    """Number of prompts and SHA-256 of all, each with its length."""
    state, count = hashlib.sha256(), 0
    for prompt in prompts:
        state.update(b"%d:" % len(prompt) + prompt.encode())
        count += 1
    return f"{count:,} prompts, {state.hexdigest()[:16]}"


def run_article(path: Path) -> Run:
    """Time the article's code up to its finished list."""
    return _run([sys.executable, "-c", ARTICLE, str(path), str(Path(__file__).parent)], "ready")


def run_stage(path: Path, folder: Path) -> Run:
    """Time the stage's own command line from start to exit, then read the list it wrote."""
    manifest, output = folder / "manifest.json", folder / "prompts.parquet"
    manifest.write_text(json.dumps(_manifest(path)), "utf-8")
    options = {
        "manifest": manifest, "selection": "article", "seed": SEED, "min-chars": MIN_CHARS,
        "max-malformed-share": 0, "provenance": "{}", "output": output, "counts": folder / "prompts.json",
    }  # fmt: skip
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run = _run([sys.executable, str(STAGE), *arguments], None)
    return replace(run, prompts=_elsewhere("digest_of", str(output)))


def digest_of(output: str) -> str:
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(output).iter_batches(columns=["prompt"])
    return digest(text for batch in batches for text in batch["prompt"].to_pylist())


def _elsewhere(function: str, *arguments: object) -> str:
    """Call a function of this module in another process: a child's peak begins with what its parent holds."""
    code = f"import prompts_stage; print(prompts_stage.{function}(*{arguments!r}))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def _run(command: list[str], ready: str | None) -> Run:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        peak = Peak(process.pid)
        if ready is not None and process.stdout.readline().strip() == ready:
            seconds = time.perf_counter() - start
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if ready is None:
            seconds = time.perf_counter() - start
        peak.join()
    if process.returncode:
        sys.exit(f"exit status {process.returncode} of {command[:2]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_utime + usage.ru_stime, max(usage.ru_maxrss * unit, peak.bytes) / 1e6, output.strip())


class Peak(threading.Thread):
    """Watches how much memory a process and its children hold together, shared pages counted once (Linux)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.bytes = pid, 0
        self.start()

    def run(self) -> None:
        while Path(f"/proc/{self.pid}/smaps_rollup").exists():
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
            try:
                pids = [str(self.pid), *children.read_text().split()]
                self.bytes = max(self.bytes, sum(map(_proportional_bytes, pids)))
            except OSError:
                return
            time.sleep(0.02)


def _proportional_bytes(pid: str) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def _text(draw: random.Random, characters: float) -> str:
    """Words of about so many characters: 7 texts in 100 are not all ASCII, as in the ShareGPT file."""
    foreign, dashes = draw.random() < 0.02, draw.random() < 0.05
    words = draw.choices(FOREIGN if foreign else WORDS, k=max(1, int(characters / 5.6)))
    for place in range(draw.randrange(20), len(words), 25):
        words[place] += draw.choice(("\n", "\n\n", '."', ":\n- ", " — " if dashes else " - "))
    return " ".join(words)


def _alternate(roles: tuple[str, str], turns: int) -> list[str]:
    return [roles[turn % 2] for turn in range(turns)]


def _manifest(path: Path) -> dict[str, object]:
    return {
        "kind": "dataset", "name": "generated", "source": {"path": str(path)}, "revision": None, "licence": None,
        "path": str(path.absolute().parent), "fetched": "1970-01-01T00:00:00Z",
        "files": [{"path": path.name, "bytes": path.stat().st_size, "sha256": ""}],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400, help="size of the generated file (default: %(default)s)")
    parser.add_argument("--file", type=Path, help="a ShareGPT file to use instead")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = (options.file or folder / "generated.json").absolute()
        if not options.file:
            _elsewhere("generate", str(path), options.megabytes)
        runs = [(run_article(path), run_stage(path, folder)) for _ in range(options.runs)]
        size = path.stat().st_size / 1e6
    article, stage = (min(each, key=lambda run: run.seconds) for each in zip(*runs, strict=True))
    time_share, memory_share = stage.seconds / article.seconds, stage.megabytes / article.megabytes
    same = len({run.prompts for pair in runs for run in pair}) == 1
    print(f"prompts stage on {size:.0f} MB, {stage.prompts}")
    print(f"{'':16}{'seconds':>10}{'peak MB':>10}{'CPU s':>10}")
    for label, run in (("article, pandas", article), ("kvbench", stage)):
        print(f"{label:16}{run.seconds:>10.2f}{run.megabytes:>10.0f}{run.cpu_seconds:>10.2f}")
    print(f"{'share':16}{time_share:>10.3f}{memory_share:>10.3f}{stage.cpu_seconds / article.cpu_seconds:>10.3f}")
    print(f"{'at most':16}{TIME_BAR:>10.3f}{MEMORY_BAR:>10.3f}")
    print(f"{'':16}{_verdict(time_share, TIME_BAR):>10}{_verdict(memory_share, MEMORY_BAR):>10}")
    print(f"lists equal: {'yes' if same else 'no'} ({os.cpu_count()} cores)")
    sys.exit(not same)


def _verdict(share: float, bar: float) -> str:
    return "met" if share <= bar else "missed"


if __name__ == "__main__":
    main()
