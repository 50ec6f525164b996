"""A checkpoint from its manifest onto a device."""

import ctypes
import mmap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kvbench.manifest import Manifest, check_manifest_files

WARM_SHARE = 0.9
"""Share of the weights' pages in memory from which on a load counts as warm."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and what it took.

    Attributes
    ----------
    load_s : seconds from files to the device.
    load_state : ``warm`` if the system had the files in memory before, ``cold`` if not; None for random weights and
        where it does not say.
    weights_bytes : bytes of the parameters, each storage once.
    """

    model: Any
    load_s: float
    load_state: str | None
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
    state = None if "random" in manifest.source else _state(manifest.path)
    start = time.perf_counter()
    config = AutoConfig.from_pretrained(manifest.path, trust_remote_code=manifest.trust_remote_code)
    if not hasattr(config, "pad_token_id"):  # a checkpoint's own code reads it, and transformers 5 no longer sets it
        config.pad_token_id = None
    wanted = _dtype(dtype, config, device)
    if "random" in manifest.source:
        torch.manual_seed(manifest.source["seed"])
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            manifest.path,
            config=config,
            dtype=wanted,
            attn_implementation=attention,
            trust_remote_code=manifest.trust_remote_code,
            device_map=device if device.type == "cuda" else None,
        )
    model.eval()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Loaded(model, time.perf_counter() - start, state, _weights_bytes(model))


def _state(folder: Path) -> str | None:
    """Whether the weights' files are in the page cache, by mincore(2)."""
    pages = [_resident(path) for path in folder.glob("*.safetensors")]
    if not pages or not all(len(of_file) for of_file in pages):
        return None
    return "warm" if np.concatenate(pages).mean() >= WARM_SHARE else "cold"


def _resident(path: Path) -> Any:
    """For each page of a file whether it is in memory; empty where that cannot be told."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        content = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), ctypes.c_void_p(pages.ctypes.data)
        )
        del content  # a map with a view on it cannot be closed
    return pages[:0] if failed else pages & 1


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else config.dtype or torch.bfloat16


def _weights_bytes(model: Any) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())
