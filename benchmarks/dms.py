"""What trained eviction is worth in time and memory on one device, without training: random heads keep a wanted share.

Prints a Markdown row for each engine and method: TTFT, TPOT with its noise, decode throughput, the cache's bytes after
the prompt, and the peak of a generation. The baseline runs in the same process, before the heads are attached.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import decoding  # first: it says where kvbench lies

from kvbench import engines, measure, methods, nvml
from kvbench.cache import cache_bytes
from kvbench.dms import calibrate, evict
from kvbench.intervals import noise

GIB = 2**30


def main() -> None:
    parser = decoding.arguments(__doc__, ["graph", "compile"])
    parser.add_argument("--workload", default="8x16384", help="batch x prompt tokens")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--factor", type=float, default=8, help="one token in so many is kept, the window's included")
    options = parser.parse_args()
    model = decoding.load(options).model
    batch = decoding.random_batch(model, options.workload, options.new_tokens, seed=0)
    print(f"{decoding.setting(model)}, {options.workload} + {options.new_tokens}\n")
    print("| engine | method | TTFT s | TPOT ms | ± | tokens/s | live GiB | allocated GiB | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.engine:
        row(model, batch, methods.Dense(), "none", name, options.repeats)
    keep = calibrate.share(options.factor, batch.input_ids.shape[1], options.window)
    with tempfile.TemporaryDirectory() as folder:
        evict.save(calibrate.random_heads(model, options.window, keep, batch.input_ids[:1]), Path(folder))
        dms = methods.build({"dms": {"adapter": folder}})
        for name in options.engine:
            row(model, batch, dms, f"DMS {options.factor:g}, window {options.window}", name, options.repeats)


def row(model: Any, batch: measure.Batch, method: Any, label: str, name: str, repeats: int) -> None:
    """Measure one method in one engine and print its row."""
    device = batch.input_ids.device
    engine, watch = engines.engine(name, device), nvml.Watch(nvml.connect(device))
    held = cache_bytes(engine.prefill(model, batch.input_ids, method)[1])
    effort = decoding.effort(repeats, device)
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
    decoding.release(device)


if __name__ == "__main__":
    main()
