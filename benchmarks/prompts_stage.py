"""The prompts stage against the article's pandas code: time, peak memory and the list itself.

Both run in a process of their own on the same generated ShareGPT-shaped file; process start, imports and, for the
stage, writing the Parquet file are in its time. Exits 1 if the stage misses its bar or the lists differ.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
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
FOREIGN = """können größer naïve déjà señor привет мир который 你好 世界 これは こんにちは 안녕하세요 😀 🚀 ∑ π — “quoted”""".split()


@dataclass(frozen=True)
class Run:
    """One process: wall time in s, peak resident set in MB (10^6 bytes), and a digest of its prompts."""

    seconds: float
    megabytes: float
    prompts: str


def generate(path: Path, megabytes: int, seed: int = 0) -> None:
    """Write a ShareGPT-shaped JSON file of about ``megabytes`` 10^6 bytes: 225 conversations a megabyte.

    Text lengths follow the ShareGPT file's: medians of 82 characters for a human and 1,245 for the assistant.
    A third of the conversations begin with the assistant, some ids repeat and some conversations are too short.
    """
    draw = random.Random(seed)
    texts = {
        "human": [_text(draw, draw.lognormvariate(4.4, 1.3)) for _ in range(20_000)],
        "gpt": [_text(draw, max(20.0, draw.gauss(1250, 650))) for _ in range(20_000)],
    }
    conversations, turn_pairs = 225 * megabytes, 2 * 4.45
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("[")
        for index in range(conversations):
            # About one id in a hundred is the one before again.
            number = index - (draw.random() < 0.01)
            identity = f"{hashlib.md5(str(number // 3).encode()).hexdigest()[:7]}_{number % 3}"
            turns = 0 if draw.random() < 0.01 else 2 + int(draw.expovariate(1 / (turn_pairs - 5.4)))
            roles = ("gpt", "human") if draw.random() < 1 / 3 else ("human", "gpt")
            messages = ({"from": role, "value": draw.choice(texts[role])} for role in _alternate(roles, turns))
            record = {"id": identity, "conversations": list(messages)}
            stream.write(",\n" * bool(index) + json.dumps(record, indent=2))
        stream.write("]\n")


def digest(prompts: Iterable[str]) -> str:
    """Number of prompts and SHA-256 of all, each with its length."""
    state, number = hashlib.sha256(), 0
    for number, prompt in enumerate(prompts, 1):
        state.update(b"%d:" % len(prompt) + prompt.encode())
    return f"{number:,} prompts, {state.hexdigest()[:16]}"


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
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(output).iter_batches(columns=["prompt"])
    return Run(run.seconds, run.megabytes, digest(text for batch in batches for text in batch["prompt"].to_pylist()))


def _run(command: list[str], ready: str | None) -> Run:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if ready is not None and process.stdout.readline().strip() == ready:
            seconds = time.perf_counter() - start
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if ready is None:
            seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{command[1]} exited with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit / 1e6, output.strip())


def _text(draw: random.Random, characters: float) -> str:
    words = draw.choices(FOREIGN if draw.random() < 0.02 else WORDS, k=max(1, int(characters / 5.6)))
    for place in range(draw.randrange(20), len(words), 25):
        words[place] += draw.choice(("\n", "\n\n", '."', ":\n- ", " — "))
    return " ".join(words)


def _alternate(roles: tuple[str, str], turns: int) -> list[str]:
    return [roles[turn % 2] for turn in range(turns)]


def _manifest(path: Path) -> dict[str, object]:
    return {
        "kind": "dataset", "name": "generated", "source": {"path": str(path)}, "revision": None, "path": str(path.absolute().parent),
        "files": [{"path": path.name, "bytes": path.stat().st_size, "sha256": ""}], "licence": None,
        "fetched": "1970-01-01T00:00:00Z",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400, help="size of the generated file (default: %(default)s)")
    parser.add_argument("--file", type=Path, help="a ShareGPT file to use instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = options.file or folder / "generated.json"
        if not options.file:
            generate(path, options.megabytes)
        article, stage = run_article(path), run_stage(path, folder)
        size = path.stat().st_size / 1e6
    time_share, memory_share = stage.seconds / article.seconds, stage.megabytes / article.megabytes
    same = stage.prompts == article.prompts
    print(f"prompts stage on {size:.0f} MB, {stage.prompts}")
    print(f"{'':16}{'seconds':>10}{'peak MB':>10}")
    for label, run in (("article, pandas", article), ("kvbench", stage)):
        print(f"{label:16}{run.seconds:>10.2f}{run.megabytes:>10.0f}")
    print(f"{'share':16}{time_share:>10.3f}{memory_share:>10.3f}")
    print(f"{'bar':16}{TIME_BAR:>10.3f}{MEMORY_BAR:>10.3f}")
    print(f"lists equal: {'yes' if same else 'no'}")
    sys.exit(not (same and time_share <= TIME_BAR and memory_share <= MEMORY_BAR))


if __name__ == "__main__":
    main()
