"""The quality jobs' files of a run, made up: a baseline with its noise floors, and variants of every fate.

Its methods are those of `report_fixture`, with a random control beside them. What each shows:

baseline                the noise floors
expected-attention-0.5  no worse than the noise floor
snapkv-0.5              clearly worse, less so than the random control at the same kept fraction
random-0.5              the control of all that keep half
knorm-0.8               collapsed
adakv-snapkv-0.5        simulated: frees no byte; out of memory in retrieval
finch-0.5               unsupported, failed and unsupported
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import report_fixture
from report_fixture import MODEL

from kvbench import outputs as outputs_job
from kvbench import quality as quality_job
from kvbench import retrieval as retrieval_job
from kvbench import window_table

METHODS = [*report_fixture.METHODS[:3], "random-0.5", *report_fixture.METHODS[3:]]
SPECS: dict[str, Any] = {
    "baseline": "none",
    "knorm-0.8": {"press": "KnormPress", "args": {"compression_ratio": 0.8}},
    "snapkv-0.5": {"press": "SnapKVPress", "args": {"compression_ratio": 0.5}},
    "random-0.5": {"press": "RandomPress", "args": {"compression_ratio": 0.5, "seed": 0}},
    "adakv-snapkv-0.5": {
        "press": "AdaKVPress",
        "args": {"press": {"press": "SnapKVPress", "args": {"compression_ratio": 0.5}}},
    },
    "expected-attention-0.5": {"press": "ExpectedAttentionPress", "args": {"compression_ratio": 0.5}},
    "finch-0.5": {"press": "FinchPress", "args": {"compression_ratio": 0.5}},
}
KEPT = {
    "knorm-0.8": 0.201,
    "snapkv-0.5": 0.5,
    "random-0.5": 0.502,
    "expected-attention-0.5": 0.498,
    "adakv-snapkv-0.5": 0.5,
}
# mean KL in nats, top-1 agreement, mean rise of the negative log-likelihood, chance of a right answer
COST = {
    "batch": (1e-9, 1.0, 0.0, 0.98),
    "dtype": (1e-4, 0.998, 0.0, 0.98),
    "knorm-0.8": (0.9, 0.55, 0.6, 0.03),
    "snapkv-0.5": (0.05, 0.93, 0.03, 0.7),
    "random-0.5": (0.3, 0.8, 0.2, 0.3),
    "adakv-snapkv-0.5": (0.02, 0.96, 0.015, 0.9),
    "expected-attention-0.5": (1e-4, 0.998, 0.0, 0.98),
}
CORPORA = {"own": 6, "conversations": 10, "book": 10}
PREFIX_TOKENS, CONTINUATION_TOKENS = 64, 24
TASKS = ("needle", "multikey", "variables", "words")
PROMPT_TOKENS, DEPTHS, SAMPLES = (512, 1024), (0.0, 0.5, 1.0), 40

GARBLED = ["the cache keeps what " * 12, "and of the press", "قطة من", "fox over the " * 30, "``` ```", ""]
LOOPS = {2: "قطة " * 40, 4: "\x00\x07\u202e gnp.exe " * 12, 5: "Nothing. " * 20}
SHORT = {"Name a river.": "The Seine.", "A tree?": "The lime.", "A bird?": "A wren.", "A stone?": "Slate, it splits."}
PROMPTS = [*report_fixture.PROMPTS, *SHORT]
Row = dict[str, Any]


def windows() -> list[Row]:
    """Rows of windows.parquet; two windows a document."""
    return [
        {
            "corpus": corpus,
            "window": window,
            "document": f"{corpus}-{window // 2}",
            "prefix_ids": list(range(PREFIX_TOKENS)),
            "continuation_ids": list(range(CONTINUATION_TOKENS)),
            "status": "ok",
        }
        for corpus, count in CORPORA.items()
        for window in range(count)
    ]


def _names(method: str, status: str = "ok", reason: str | None = None) -> Row:
    return {"model": MODEL, "method": method, "status": status, "status_reason": reason}


def _shape(method: str) -> Row:
    simulated = None if method == "baseline" else method.startswith("adakv")
    return {"kept_fraction": KEPT.get(method, 1.0), "simulated": simulated}


def quality(method: str) -> list[Row]:
    """Rows of quality/<model>/<method>.parquet; KL falls with the distance from the prefix's end."""
    if method == "finch-0.5":
        return [_names(method, "unsupported", "FinchPress needs a delimiter")]
    references = ("batch", "dtype") if method == "baseline" else ("full",)
    return [row for reference in references for row in _tokens(method, reference)]


def _tokens(method: str, reference: str) -> list[Row]:
    kl, agreement, rise, _ = COST[method if reference == "full" else reference]
    text, noise = np.random.default_rng(1), np.random.default_rng(len(method) + len(reference))
    rows = []
    for window in windows():
        hard, level = text.gamma(4, 0.25), noise.gamma(8, 1 / 8)
        for distance in range(1, CONTINUATION_TOKENS + 1):
            nll = text.exponential(2.0) * hard
            rows.append(
                _names(method)
                | {key: window[key] for key in ("corpus", "window", "document")}
                | _shape(method)
                | {
                    "reference": reference,
                    "distance": distance,
                    "kl": kl * level * noise.exponential() * 1.5 / (1 + distance / CONTINUATION_TOKENS),
                    "agrees": bool(noise.random() < agreement),
                    "nll_full": nll,
                    "nll": nll + rise * level + kl * noise.normal(),
                }
            )
    return rows


def retrieval(method: str) -> list[Row]:
    """Rows of retrieval/<model>/<method>.parquet; the middle of the text is the hardest place."""
    if method == "finch-0.5":
        return [_names(method, "failed", "RuntimeError: shape '[1, 0]' is invalid")]
    if method == "adakv-snapkv-0.5":
        return [_names(method, "oom", "CUDA out of memory")]
    luck = np.random.default_rng(5)  # the same for every method: what one misses, a better one may not
    points = [(t, n, d) for t in TASKS for n in PROMPT_TOKENS for d in (DEPTHS if t != "words" else (None,))]
    return [
        _sample(method, task, tokens, depth, sample, luck.random())
        for task, tokens, depth in points
        for sample in range(SAMPLES)
    ]


def _sample(method: str, task: str, tokens: int, depth: float | None, sample: int, luck: float) -> Row:
    chance = COST["dtype" if method == "baseline" else method][3] ** (2 if depth == 0.5 else 1)
    correct = luck < chance
    expected = ["4711"] if task in ("needle", "multikey") else ["whale", "ship", "sea"]
    found = expected if correct else expected[1:]
    return (
        _names(method)
        | _shape(method)
        | {
            "task": task,
            "prompt_tokens": tokens,
            "depth": depth,
            "sample": sample,
            "document": f"chapter {sample % 10}",
            "expected": expected,
            "answer": " ".join(found) + "." if found else "I do <b>not</b> know.",
            "score": len(found) / len(expected),
            "correct": correct,
            "query_aware": False,
        }
    )


def outputs(method: str) -> list[Row]:
    """Rows of outputs/<model>/<method>.parquet: those of `report_fixture`, more of them loops, and the control's.

    Ten prompts in all, so that a collapse is clear; to the last four all but knorm answer alike.
    """
    rows = report_fixture.outputs("snapkv-0.5" if method == "random-0.5" else method)
    if method != "finch-0.5":
        rows += [_short(rows[0] | {"method": method}, prompt) for prompt in SHORT]
    made = {"random-0.5": dict(enumerate(GARBLED)), "knorm-0.8": LOOPS}.get(method, {})
    for row in rows:
        text = made.get(row["rank"])
        if text is not None:
            row |= {"method": method, "text": text, "token_ids": [sum(word.encode()) for word in text.split()]}
    return [row | {"way": "alone"} for row in rows]


def _short(row: Row, prompt: str) -> Row:
    """A short answer; knorm's goes round."""
    rank, text = PROMPTS.index(prompt), SHORT[prompt]
    text = text if row["method"] != "knorm-0.8" else " ".join([text] * 30)
    about = {"rank": rank, "conversation_id": f"c{rank}", "prompt": prompt, "prompt_tokens": len(prompt.split())}
    tokens = [sum(word.encode()) for word in text.split()]
    return row | about | {"text": text, "token_ids": tokens, "new_tokens": len(tokens), "stop_reason": "eos"}


def plan(**quality_config: Any) -> Row:
    """plan.json: the variants' cells, and what of the resolved config the statistics ask for."""
    cells = [{"model": MODEL, "method": m, "variant": m, "baseline": "baseline"} for m in METHODS]
    retrieval_config = {
        "tasks": list(TASKS),
        "samples": SAMPLES,
        "prompt_tokens": list(PROMPT_TOKENS),
        "depths": list(DEPTHS),
        "query_aware": False,
    }
    config = report_fixture.CONFIG | {
        "methods": SPECS,
        "quality": {
            "windows": max(CORPORA.values()),
            "prefix_tokens": PREFIX_TOKENS,
            "continuation_tokens": CONTINUATION_TOKENS,
            "corpora": list(CORPORA),
            "retrieval": retrieval_config,
        }
        | quality_config,
    }
    return {"config": config, "protocol": config["protocol"], "cells": cells}


def parquet(rows: list[Row], schema: pa.Schema, path: Path) -> Path:
    """Write rows as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def write(folder: Path) -> dict[str, list[Path]]:
    """Write windows, quality, retrieval and outputs of every method under a results folder; paths by stage."""

    def file(stage: str, method: str) -> Path:
        return folder / stage / MODEL / f"{method}.parquet"

    return {
        "windows": [parquet(windows(), window_table.SCHEMA, folder / f"windows/{MODEL}.parquet")],
        "quality": [parquet(quality(method), quality_job.QUALITY, file("quality", method)) for method in METHODS],
        "retrieval": [
            parquet(retrieval(method), retrieval_job.RETRIEVAL, file("retrieval", method)) for method in METHODS
        ],
        "outputs": [parquet(outputs(method), outputs_job.OUTPUTS, file("outputs", method)) for method in METHODS],
    }
