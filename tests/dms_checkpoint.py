"""A stand-in for NVIDIA's DMS checkpoint: a tiny Qwen3 that brings code with that one's names, shapes and manners.

Its code is of this repository's own making (`tests/standin`), and so is `flash_attn` beside it, what the checkpoint
decodes with, in plain torch.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import tiny
from kvbench.manifest import Manifest, load_manifest

STANDIN = Path(__file__).parent / "standin"
PACKAGES = STANDIN / "packages"
"""Folder to put on the path of what runs the checkpoint."""

REPOSITORY, REVISION = "nvidia/tiny-dms", "0123456789abcdef0123456789abcdef01234567"
SPEC = {"dms": {"checkpoint": REPOSITORY, "revision": REVISION, "adapter": None, "retrofit": None}}
WINDOW = 256  # no smaller than a block
BLOCK = 256
POOL = 2048
"""Tokens a row and head for which blocks are taken ahead."""

CODE = ("configuration_qwen3_dms", "modeling_qwen3_dms", "dms_attention", "dms_cache")
SIZES = tiny.SIZES | {"head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 1024}


def save(folder: Path, **changes: Any) -> Path:
    """Write the checkpoint's files, without a tokenizer; ``changes`` replace keys of its config."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, rope_theta=5000.0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    written = SIZES | {
        "architectures": ["Qwen3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_qwen3_dms.Qwen3Config",
            "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLM",
        },
        "model_type": "qwen3",
        "rope_theta": 5000.0,
        "torch_dtype": "bfloat16",
        "dms_window_size": WINDOW,
        "dms_cr": 8,
    }
    del written["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(written | changes))
    for name in CODE:
        shutil.copy2(STANDIN / "qwen3_dms" / f"{name}.py", folder)
    return folder


def manifest(folder: Path, **changes: Any) -> Manifest:
    """What fetching it would have written; ``changes`` replace its entries."""
    from kvbench import files

    names = ["config.json", "model.safetensors", *(f"{name}.py" for name in CODE)]
    found = [{"path": n, "bytes": (folder / n).stat().st_size, "sha256": files.sha256(folder / n)} for n in names]
    files.write_json(
        folder / "manifest.json",
        {
            "kind": "model",
            "name": "tiny-dms",
            "source": {"hub": REPOSITORY, "revision": REVISION},
            "revision": REVISION,
            "path": ".",
            "files": found,
            "licence": None,
            "fetched": "2026-01-01T00:00:00Z",
            "context": SIZES["max_position_embeddings"],
            "architecture": "Qwen3ForCausalLM",
            "trust_remote_code": True,
        }
        | changes,
    )
    return load_manifest(folder / "manifest.json")
