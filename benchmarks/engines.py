"""Decode engines side by side on one GPU, in one process: Qwen3-8B's shapes with random weights.

Prints a Markdown row for each engine, workload and method: TTFT, TPOT with its spread, decode throughput, and the
share of the device's copy bandwidth that reading the weights and the kept cache at that speed takes.
"""

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1] / "workflow" / "scripts"))

import torch
import transformers

from kvbench import engines, measure, methods, sources
from kvbench.cache import full_cache_bytes
from kvbench.errors import Unsupported
from kvbench.loading import load_model

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "KnormPress 0.8": {"press": "KnormPress", "args": {"compression_ratio": 0.8}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="Qwen/Qwen3-8B", help="an architecture that `random` knows")
    parser.add_argument("--engine", nargs="+", default=["hf", "graph", "compile"])
    parser.add_argument("--workload", nargs="+", default=["64x1024"], help="batch x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda:0")
    with tempfile.TemporaryDirectory() as folder:
        source = {"random": options.shapes, "seed": 0}
        manifest = sources.fetch_model("shapes", source, Path(folder) / "manifest.json")
        loaded = load_model(manifest, "auto", "sdpa", device)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s, weights {loaded.weights_bytes / 2**30:.2f} GiB\n")
    print("| workload | engine | method | TTFT s | TPOT ms (least to most) | tokens/s | bytes a step, share of copy |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.workload:
        rows, tokens = map(int, name.split("x"))
        ids = torch.randint(10, loaded.model.config.vocab_size, (rows, tokens), device=device)
        batch = measure.Batch(ids, None, options.new_tokens, 0)
        for engine in options.engine:
            for method, spec in METHODS.items():
                print(
                    f"| {name} | {engine} | {method} | {cells(loaded, batch, spec, engine, options, bandwidth)} |",
                    flush=True,
                )
                gc.collect()
                torch.cuda.empty_cache()


def cells(loaded: Any, batch: measure.Batch, spec: Any, name: str, options: Any, bandwidth: float) -> str:
    """The measured columns of a row, or why there are none."""
    engine = engines.engine(name, batch.input_ids.device)
    effort = measure.Effort(options.repeats, max_warmup_runs=2)
    try:
        runs = list(measure.generation_standard(loaded.model, batch, methods.build(spec), effort, engine))
    except (torch.OutOfMemoryError, Unsupported) as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    tpot = sorted(run["tpot_s"] for run in runs)
    embedding = loaded.model.get_input_embeddings().weight.nbytes  # a step reads a row of it for each sequence
    # on average half of the new tokens have joined the cache
    joined = full_cache_bytes(
        loaded.model.config, len(batch.input_ids), batch.new_tokens // 2, loaded.model.dtype.itemsize
    )
    step_bytes = loaded.weights_bytes - embedding + runs[0]["kv_cache_end_bytes"] - joined
    share = step_bytes / median(tpot) / bandwidth
    return (
        f"{median(run['ttft_s'] for run in runs):.3f} | {median(tpot) * 1e3:.2f} ({tpot[0] * 1e3:.2f} to"
        f" {tpot[-1] * 1e3:.2f}) | {median(run['decode_tokens_per_s'] for run in runs):,.0f} | {share:.2f}"
    )


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 4 GiB, the median of 10."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / median(times[3:])


if __name__ == "__main__":
    main()
