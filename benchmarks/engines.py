"""Decode engines side by side on one device, in one process: a checkpoint, or random weights of named shapes.

Prints a Markdown row for each workload, engine and method: TTFT with its MFU, TPOT with its noise and MBU, decode
throughput, and on a GPU joules a token. The order is random by a seed, so that a device that warms up favours none.
"""

import random
from statistics import median
from typing import Any

import decoding  # first: it says where kvbench lies
import torch

from kvbench import architecture, energy, engines, limits, measure, methods, nvml, rates, roofline
from kvbench.errors import Unsupported
from kvbench.intervals import noise

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "KnormPress 0.8": {"press": "KnormPress", "args": {"compression_ratio": 0.8}},
}


def main() -> None:
    parser = decoding.arguments(__doc__, ["hf", "graph", "compile"])
    parser.add_argument("--workload", nargs="+", default=["64x1024"], help="batch x prompt tokens")
    parser.add_argument("--energy", action="store_true", help="joules a token too, 11 seconds a row")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the token ids")
    options = parser.parse_args()
    loaded = decoding.load(options)
    device, dtype = loaded.model.device, str(loaded.model.dtype).removeprefix("torch.")
    known = roofline.Rates.of(rates.measure(device))
    print(f"{decoding.setting(loaded.model)}, weights {loaded.weights_bytes / 2**30:.2f} GiB")
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
        decoding.release(device)


def cell(loaded: Any, workload: str, name: str, spec: Any, options: Any, known: roofline.Rates) -> str:
    """The measured columns of a row, or why there are none."""
    model, device = loaded.model, loaded.model.device
    batch = decoding.random_batch(model, workload, options.new_tokens, options.seed)
    method, effort = methods.build(spec), decoding.effort(options.repeats, device)
    engine, watch = engines.engine(name, device), nvml.Watch(nvml.connect(device))
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
            f"{len(batch.input_ids) / tpot:,.0f}",
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
