"""Decode engines side by side on one device, in one process: a checkpoint, or random weights of named shapes.

Prints a Markdown row for each workload, engine and method: TTFT with its MFU, TPOT with its noise and MBU, decode
throughput, and on a GPU joules a token. The order is random by a seed, so that a device that warms up favours none.
"""

import argparse
import gc
import os
import random
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1] / "workflow" / "scripts"))

import torch
import transformers

from kvbench import architecture, cells, energy, engines, limits, measure, methods, nvml, rates, roofline, sources
from kvbench import device as devices
from kvbench.errors import Unsupported
from kvbench.intervals import noise
from kvbench.loading import load_model
from kvbench.manifest import load_manifest

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "KnormPress 0.8": {"press": "KnormPress", "args": {"compression_ratio": 0.8}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="Qwen/Qwen3-8B", help="an architecture that `random` knows")
    parser.add_argument("--manifest", type=Path, help="a model's manifest, instead of random weights")
    parser.add_argument("--engine", nargs="+", default=["hf", "graph", "compile"])
    parser.add_argument("--workload", nargs="+", default=["64x1024"], help="batch x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=6, help="at least; twice as many at most")
    parser.add_argument("--energy", action="store_true", help="joules a token too, 11 seconds a row")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the token ids")
    options = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        source = {"random": options.shapes, "seed": 0}
        loaded_from = options.manifest or Path(folder) / "manifest.json"
        if options.manifest is None:
            sources.fetch_model("shapes", source, loaded_from)
        loaded = load_model(load_manifest(loaded_from), "auto", "sdpa", device)
    known = roofline.Rates.of(rates.measure(device))
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    about = devices.describe(device)
    print(f"{about['device']}, driver {about['driver']}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {dtype}, weights {loaded.weights_bytes / 2**30:.2f} GiB")
    print(
        f"copy {known.copy_bytes_per_s / 1e12:.3f} TB/s, matmul {known.matmul_flops_per_s[dtype] / 1e12:.1f} TFLOP/s\n"
    )
    print("| workload | engine | method | TTFT s | MFU | TPOT ms | ± | tokens/s | MBU | fastest TPOT ms | J/token |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    order = [(w, e, m) for w in options.workload for e in options.engine for m in METHODS]
    random.Random(options.seed).shuffle(order)
    for workload, engine, method in order:
        found = cell(loaded, workload, engine, METHODS[method], options, known)
        print(f"| {workload} | {engine} | {method} | {found} |", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def cell(loaded: Any, workload: str, name: str, spec: Any, options: Any, known: roofline.Rates) -> str:
    """The measured columns of a row, or why there are none."""
    model, device = loaded.model, loaded.model.device
    rows, tokens = map(int, workload.split("x"))
    generator = torch.Generator(device).manual_seed(options.seed)
    ids = torch.randint(10, model.config.vocab_size, (rows, tokens), device=device, generator=generator)
    batch, method = measure.Batch(ids, None, options.new_tokens, 0), methods.build(spec)
    engine, watch = engines.engine(name, device), nvml.Watch(nvml.connect(device))
    share = cells.AUTO_SHARE[device.type]
    effort = measure.Effort(options.repeats, 2 * options.repeats, share, max_warmup_runs=3)
    try:
        runs = measure.generation_standard(model, batch, method, effort, engine, watch)["repeats"]
        joules = energy.per_token(model, batch, method, engine, watch.gpu) if options.energy else None
    except (torch.OutOfMemoryError, Unsupported) as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    work = cell_limits(loaded, batch, method, runs[0], known)
    tpot, ttft = (median(run[key] for run in runs) for key in ("tpot_s", "ttft_s"))
    reached = work.of_repeat(ttft, tpot)
    spread = noise([run["tpot_s"] for run in runs])
    return " | ".join(
        [
            f"{ttft:.3f}",
            f"{reached['mfu']:.2f}",
            f"{1e3 * tpot:.2f}",
            "" if spread is None else f"{100 * spread:.2f}%",
            f"{rows * 1 / tpot:,.0f}",
            f"{reached['mbu']:.2f}",
            f"{1e3 * reached['fastest_tpot_s']:.2f}",
            "" if joules is None else f"{median(joules):.3f}",
        ]
    )


def cell_limits(loaded: Any, batch: measure.Batch, method: Any, run: Any, known: roofline.Rates) -> limits.Limits:
    """What the cell must do by count, from the bytes that its cache really held."""
    model = loaded.model
    rows, tokens = batch.input_ids.shape
    shape = architecture.Architecture.of(architecture.describe(model.config))
    token_bytes = rows * shape.kv_elements * model.dtype.itemsize
    end = run["kv_cache_end_bytes"]
    cache = {
        "kv_cache_bytes": end - (batch.new_tokens - 1) * token_bytes,
        "kv_cache_full_bytes": tokens * token_bytes,
        "kv_cache_end_bytes": end,
        "simulated": False,
    }
    facts = {
        "model_config": architecture.describe(model.config),
        "dtype": str(model.dtype),
        "weights_bytes": loaded.weights_bytes,
        "device": "here",
    }
    sizes = {"batch_size": rows, "prompt_tokens": tokens, "new_tokens": batch.new_tokens}
    found = limits.of_cell(sizes, cache, facts, {"here": known})
    assert found is not None
    return found


if __name__ == "__main__":
    main()
