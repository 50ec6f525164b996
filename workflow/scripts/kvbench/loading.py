"""A checkpoint from its manifest onto a device."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kvbench.manifest import Manifest, check_manifest_files


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and what it took: seconds of load, bytes of weights."""

    model: Any
    load_s: float
    weights_bytes: int


def load_model(manifest: Manifest, dtype: str, attention: str, device: torch.device) -> Loaded:
    """Load a model in evaluation mode.

    Parameters
    ----------
    dtype : ``auto`` (float32 on a CPU, the checkpoint's own on a GPU) or a torch dtype's name.
    attention : transformers' name of the attention kernel.

    Raises
    ------
    UserError : files of the manifest are gone.
    torch.OutOfMemoryError : the weights do not fit.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    check_manifest_files(manifest)
    start = time.perf_counter()
    config = AutoConfig.from_pretrained(manifest.path, trust_remote_code=manifest.trust_remote_code)
    wanted = _dtype(dtype, config, device)
    if "random" in manifest.source:
        torch.manual_seed(manifest.source["seed"])
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            manifest.path,
            dtype=wanted,
            attn_implementation=attention,
            trust_remote_code=manifest.trust_remote_code,
            device_map=device if device.type == "cuda" else None,
        )
    model.eval()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Loaded(model, time.perf_counter() - start, _weights_bytes(model))


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else config.dtype or torch.bfloat16


def _weights_bytes(model: Any) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())
