"""What trained eviction is worth in time and memory on one GPU: random weights, random heads calibrated to a share.

Prints a Markdown row for each engine and method: TTFT, TPOT with its spread, decode throughput, and the cache's bytes
after the prompt. The baseline runs in the same process.
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
from kvbench.cache import cache_bytes
from kvbench.decode import prefill
from kvbench.dms import calibrate, evict
from kvbench.loading import load_model

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="Qwen/Qwen3-8B", help="an architecture that `random` knows")
    parser.add_argument("--engine", nargs="+", default=["graph", "compile"])
    parser.add_argument("--workload", default="8x16384", help="batch x prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--factor", type=float, default=8, help="one token in so many is kept, the window's included")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda:0")
    with tempfile.TemporaryDirectory() as folder:
        source = {"random": options.shapes, "seed": 0}
        manifest = sources.fetch_model("shapes", source, Path(folder) / "manifest.json")
        model = load_model(manifest, "auto", "sdpa", device).model
        rows, tokens = map(int, options.workload.split("x"))
        ids = torch.randint(10, model.config.vocab_size, (rows, tokens), device=device)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
        print("| engine | method | TTFT s | TPOT ms (least to most) | tokens/s | live GiB | allocated GiB | peak GiB |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        batch = measure.Batch(ids, None, options.new_tokens, 0)
        for name in options.engine:  # the baseline first: heads stay attached
            row(model, batch, methods.Dense(), "none", name, options.repeats)
        keep = calibrate.share(options.factor, tokens, options.window)
        evict.save(calibrate.random_heads(model, options.window, keep, ids[:1]), Path(folder))
        dms = methods.build({"dms": {"adapter": folder}})
        for name in options.engine:
            row(model, batch, dms, f"DMS {options.factor:g}x, window {options.window}", name, options.repeats)


def row(model: Any, batch: measure.Batch, method: Any, label: str, name: str, repeats: int) -> None:
    """Measure one method in one engine and print its row."""
    with torch.no_grad():
        _, cache = prefill(model, batch.input_ids, method)
        held = cache_bytes(cache)
        del cache
    engine = engines.engine(name, batch.input_ids.device)
    runs = list(measure.generation_standard(model, batch, method, measure.Effort(repeats, 2), engine))
    tpot = sorted(run["tpot_s"] for run in runs)
    print(
        f"| {name} | {label} | {median(run['ttft_s'] for run in runs):.3f} | {median(tpot) * 1e3:.2f}"
        f" ({tpot[0] * 1e3:.2f} to {tpot[-1] * 1e3:.2f}) | {median(run['decode_tokens_per_s'] for run in runs):,.0f}"
        f" | {held.live / GIB:.3f} | {held.allocated / GIB:.3f} | {runs[0]['peak_generation_bytes'] / GIB:.2f} |",
        flush=True,
    )
    del engine
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
