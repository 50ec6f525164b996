"""What the benchmarks of decoding share: where kvbench lies, their arguments, the model and its batch."""

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).parents[1] / "workflow" / "scripts"))

import torch
import transformers

from kvbench import cells, measure, sources
from kvbench import device as devices
from kvbench.loading import Loaded, load_model
from kvbench.manifest import load_manifest


def arguments(description: str | None, engines: list[str]) -> argparse.ArgumentParser:
    """The arguments of both; ``engines`` are the default ones."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", default="Qwen/Qwen3-8B", help="an architecture that `random` knows")
    parser.add_argument("--manifest", type=Path, help="a model's manifest, instead of random weights")
    parser.add_argument("--engine", nargs="+", default=engines)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=6, help="at least; twice as many at most")
    return parser


def load(options: argparse.Namespace) -> Loaded:
    """The model that the arguments name, on the first GPU if there is one."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if options.manifest is not None:
        return load_model(load_manifest(options.manifest), "auto", "sdpa", device)
    with tempfile.TemporaryDirectory() as folder:
        source = {"random": options.shapes, "seed": 0}
        return load_model(sources.fetch_model("shapes", source, Path(folder, "manifest.json")), "auto", "sdpa", device)


def setting(model: Any) -> str:
    """Device, driver, versions and dtype, for the line above a table."""
    about = devices.describe(model.device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{about['device']}, driver {about['driver']}, {versions}, {str(model.dtype).removeprefix('torch.')}"


def random_batch(model: Any, workload: str, new_tokens: int, seed: int) -> measure.Batch:
    """Random ids for a workload, which is rows x prompt tokens."""
    rows, tokens = map(int, workload.split("x"))
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = torch.randint(10, model.config.vocab_size, (rows, tokens), device=model.device, generator=generator)
    return measure.Batch(ids, None, new_tokens, 0)


def effort(repeats: int, device: torch.device) -> measure.Effort:
    """So many repeats and up to twice as many, until the interval is as narrow as the pipeline wants it."""
    return measure.Effort(repeats, 2 * repeats, cells.AUTO_SHARE[device.type], max_warmup_runs=3)


def release(device: torch.device) -> None:
    """Give back what a measurement that is over still holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
