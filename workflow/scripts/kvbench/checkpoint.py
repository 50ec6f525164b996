"""What a checkpoint's folder holds: the files that loading reads, and what its config.json says."""

import json
from pathlib import Path
from typing import Any

from kvbench import files
from kvbench.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.jinja", "*.model")
CODE = "*.py"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def describe(folder: Path, label: str) -> dict[str, Any]:
    """``context`` (tokens) and ``architecture`` (class name) by config.json; ``label`` names it in errors.

    Raises
    ------
    UserError : there is no config.json, or it is not a causal language model's.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{label} holds no config.json", "Name a checkpoint that save_pretrained wrote")
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{label}: config.json is no JSON object", "Name a checkpoint that save_pretrained wrote")
    text = config.get("text_config") or config
    context = text.get("max_position_embeddings") or text.get("n_positions")
    architectures = config.get("architectures")
    if context is not None and not isinstance(context, int):
        raise UserError(f"{label}: config.json has a context of {context!r}", "Give max_position_embeddings a number")
    if not context or not architectures:
        lacking = "architectures" if context else "max_position_embeddings"
        raise UserError(f"{label}: config.json has no {lacking}", "Name a causal language model's checkpoint")
    return {"context": int(context), "architecture": str(architectures[0])}


def check_remote_code(folder: Path, label: str, *, trusted: bool, hub: bool) -> None:
    """Refuse a checkpoint that brings its own code, unless it is trusted and its commit pins that code.

    Raises
    ------
    UserError : config.json or tokenizer_config.json has an auto_map that may not run.
    """
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        code = files.read_json(path).get("auto_map") if path.exists() else None
        if not code:
            continue
        cause = f"{label}: {name} has auto_map, so loading it would run Python code that comes with it"
        if not hub:
            remedy = "Remove auto_map if transformers knows the architecture itself, or use its hub repository"
            raise UserError(cause, remedy)
        if not trusted:
            raise UserError(cause, "Read that code, then set `trust_remote_code: true` for this model")
        if "--" in json.dumps(code):
            cause = f"{label}: auto_map in {name} takes code from another repository, which no revision pins"
            raise UserError(cause, "Name a repository that holds its code itself")


def shards(folder: Path) -> list[str]:
    """Names of the weight files, as the index or the one-file convention has it; they may be missing."""
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    index = files.read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{folder / INDEX} has no weight_map", "Fetch the checkpoint's index anew, or delete it")
    return sorted(set(index["weight_map"].values()))


def needed(folder: Path, label: str, *, code: bool, weights: bool) -> list[str]:
    """Sorted names of the files that loading reads, relative to ``folder``.

    Raises
    ------
    UserError : weights are wanted and missing.
    """
    beside = (path.name for pattern in BESIDE_WEIGHTS for path in folder.glob(pattern))
    names = {name for name in beside if name != "manifest.json"}
    if code:
        names |= {str(path.relative_to(folder)) for path in folder.rglob(CODE)}
    if weights:
        names |= set(_present_shards(folder, label))
    return sorted(names)


def _present_shards(folder: Path, label: str) -> list[str]:
    wanted = shards(folder)
    missing = [name for name in wanted if not (folder / name).exists()]
    if not missing:
        return wanted
    if missing == [WEIGHTS]:
        remedy = f"Name a checkpoint in safetensors, as {WEIGHTS} or as shards with {INDEX}"
        raise UserError(f"{label} holds no {WEIGHTS}", remedy)
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    cause = f"{label}: {INDEX} names {missing[0]}{more}, not there"
    raise UserError(cause, "Complete the checkpoint, or name another")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer of any kind."""
    return any((folder / name).exists() for name in TOKENIZERS)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in the folder has a chat template."""
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and bool(files.read_json(config).get("chat_template"))
