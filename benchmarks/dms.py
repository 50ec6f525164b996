"""What trained eviction is worth in time and memory on one device, without training: random heads keep a wanted share.

Prints a Markdown row for each engine and method: TTFT, TPOT with its noise, decode throughput, the cache's bytes after
the prompt, and the peak of a generation. The baseline runs in the same process, before the heads are attached.
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

from kvbench import cells, engines, measure, methods, nvml, sources
from kvbench import device as devices
from kvbench.cache import cache_bytes
from kvbench.dms import calibrate, evict
from kvbench.intervals import noise
from kvbench.loading import load_model
from kvbench.manifest import load_manifest

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="Qwen/Qwen3-8B", help="an architecture that `random` knows")
    parser.add_argument("--manifest", type=Path, help="a model's manifest, instead of random weights")
    parser.add_argument("--engine", nargs="+", default=["graph", "compile"])
    parser.add_argument("--workload", default="8x16384", help="batch x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--factor", type=float, default=8, help="one token in so many is kept, the window's included")
    parser.add_argument("--repeats", type=int, default=6, help="at least; twice as many at most")
    options = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        loaded_from = options.manifest or Path(folder) / "manifest.json"
        if options.manifest is None:
            sources.fetch_model("shapes", {"random": options.shapes, "seed": 0}, loaded_from)
        model = load_model(load_manifest(loaded_from), "auto", "sdpa", device).model
        rows, tokens = map(int, options.workload.split("x"))
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.randint(10, model.config.vocab_size, (rows, tokens), device=device, generator=generator)
        about = devices.describe(device)
        print(f"{about['device']}, torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
        print(f"{model.dtype}, {options.workload} + {options.new_tokens}\n")
        print("| engine | method | TTFT s | TPOT ms | ± | tokens/s | live GiB | allocated GiB | peak GiB |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        batch = measure.Batch(ids, None, options.new_tokens, 0)
        for name in options.engine:
            row(model, batch, methods.Dense(), "none", name, options.repeats)
        keep = calibrate.share(options.factor, tokens, options.window)
        evict.save(calibrate.random_heads(model, options.window, keep, ids[:1]), Path(folder))
        dms = methods.build({"dms": {"adapter": folder}})
        for name in options.engine:
            row(model, batch, dms, f"DMS {options.factor:g}, window {options.window}", name, options.repeats)


def row(model: Any, batch: measure.Batch, method: Any, label: str, name: str, repeats: int) -> None:
    """Measure one method in one engine and print its row."""
    device = batch.input_ids.device
    engine, watch = engines.engine(name, device), nvml.Watch(nvml.connect(device))
    held = cache_bytes(engine.prefill(model, batch.input_ids, method)[1])
    effort = measure.Effort(repeats, 2 * repeats, cells.AUTO_SHARE[device.type], max_warmup_runs=3)
    runs = measure.generation_standard(model, batch, method, effort, engine, watch)["repeats"]
    tpot = [run["tpot_s"] for run in runs]
    spread, peak = noise(tpot), runs[0]["peak_generation_bytes"]
    found = [
        f"{median(run['ttft_s'] for run in runs):.3f}",
        f"{1e3 * median(tpot):.2f}",
        "" if spread is None else f"{100 * spread:.2f}%",
        f"{median(run['decode_tokens_per_s'] for run in runs):,.0f}",
        f"{held.live / GIB:.3f}",
        f"{held.allocated / GIB:.3f}",
        "" if peak is None else f"{peak / GIB:.2f}",
    ]
    print(f"| {name} | {label} | {' | '.join(found)} |", flush=True)
    del engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
