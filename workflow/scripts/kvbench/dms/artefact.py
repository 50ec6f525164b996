"""What a retrofit leaves: a folder with the trained weights, and a card that says what they are by measured values."""

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvbench.dms import evict, layout
from kvbench.dms.student import Student
from kvbench.options import CONTINUATION

CARD = "README.md"

MEASURED = {
    "kl": "KL, evicting",
    "kl_off": "KL, not evicting",
    "top1_agreement": "top-1 agreement, evicting",
    "kept_fraction": "tokens kept",
}


def save(student: Student, folder: Path, about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write heads, the change of the weights in bfloat16 (a LoRA in peft's format, or the whole model), and the card.

    Parameters
    ----------
    about : what is known of its making: ``base`` (a manifest's facts), ``settings``, ``corpus``, ``steps``,
        ``seconds``, ``device``, ``versions``.
    rows : what was measured, one for each corpus.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = about["base"]
    student.heads.about = {
        "base_model": base["name"],
        "base_source": json.dumps(base["source"], sort_keys=True),
        "base_revision": str(base["revision"]),
        "base_sha256": json.dumps(base["weights"], sort_keys=True),
        "steps": str(about["steps"]),
        "seed": str(about["settings"]["seed"]),
        "kept_fraction": json.dumps({row["corpus"]: round(row["kept_fraction"], 4) for row in rows}),
    }
    evict.save(student.heads, folder)
    if student.lora is not None:
        _save_lora(student.lora, folder, base)
    if about["settings"]["whole_model"]:
        _save_whole(student.model, folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    (folder / CARD).write_text(card(about, rows, sizes), "utf-8")


def _save_lora(lora: Any, folder: Path, base: dict[str, Any]) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # with "auto", the hub is asked whether the embedding has changed
    trained = get_peft_model_state_dict(lora, save_embedding_layers=False)
    tensors = {name: _stored(value) for name, value in trained.items()}
    save_file(tensors, folder / layout.LORA, metadata={"format": "pt"})
    config = copy.copy(lora.peft_config["default"])
    config.base_model_name_or_path = base["source"].get("hub", base["name"])
    config.revision = base["revision"]
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    config.save_pretrained(str(folder))


def _save_whole(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: _stored(value) for name, value in model.named_parameters()}
    save_file(tensors, folder / layout.WHOLE, metadata={"format": "pt"})


def _stored(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.bfloat16).contiguous()


def card(about: dict[str, Any], rows: Sequence[dict[str, Any]], sizes: dict[str, int]) -> str:
    """The model card, Markdown with the front matter of a model hub."""
    base, settings = about["base"], about["settings"]
    parts = [
        _front_matter(base),
        f"# DMS for {base['name']}",
        f"Eviction heads{_change(settings)} that let {base['name']} keep a part of its KV cache, decided token by token"
        " and head by head while it reads and writes (dynamic memory sparsification, arXiv 2506.05345). A token that is"
        f" marked stays readable for {settings['window']} more tokens, and then its key and value are gone.",
        "## What it costs, and what it saves",
        _measured(rows),
        f"On texts that it was not trained on: prefixes of {settings['tokens']} tokens, and the {CONTINUATION} tokens"
        " after each, predicted by the base model with its full cache and by this one. KL(base ‖ this) is in nats a"
        " token, its mean; *not evicting* is what the change of the weights costs by itself. *Tokens kept* are those"
        f" of the prefix that a cache holds after it, the window of {settings['window'] + 1} included, so a longer"
        " prefix keeps a smaller share.",
        "## What it is for",
        _base_words(base),
        _table(("file", "bytes"), [(f"`{name}`", f"{size:,}") for name, size in sizes.items()]),
        "In a config of kvbench, for a model of that source: `methods: {dms: {dms: {adapter: <this folder>}}}`.",
        "## How it was made",
        _table(("", ""), _making(about)),
        "Trained to agree with its own base model: KL of the base's distributions to those under soft evictions, and a"
        " penalty as long as fewer tokens are evicted than asked; what is asked grows linearly.",
        "## Limits",
        "It was judged by the distribution of the next token on the texts above, not on tasks, and not on texts longer"
        " than those. What the base model does wrong, it does wrong too.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: dict[str, Any]) -> str:
    lines = ["library_name: peft", "tags: [dms, kv-cache, kvbench]"]
    if "hub" in base["source"]:
        lines.insert(0, f"base_model: {base['source']['hub']}")
    if base["licence"]:
        lines.insert(0, f"license: {base['licence']}")
    return "\n".join(["---", *lines, "---"])


def _change(settings: dict[str, Any]) -> str:
    if settings["whole_model"]:
        return " and changed weights"
    return f" and a LoRA of rank {settings['lora_rank']}" if settings["lora_rank"] else ""


def _measured(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ("corpus", *MEASURED.values()), [(row["corpus"], *(f"{row[key]:.4f}" for key in MEASURED)) for row in rows]
    )


def _base_words(base: dict[str, Any]) -> str:
    source = ", ".join(f"{key} `{value}`" for key, value in base["source"].items())
    hashes = ", ".join(f"`{name}` {digest}" for name, digest in base["weights"].items())
    return (
        f"The base model is {base['name']}: {source}, revision `{base['revision']}`, licence"
        f" {base['licence'] or 'not stated'}. SHA-256 of its weights: {hashes}."
    )


def _making(about: dict[str, Any]) -> list[tuple[str, str]]:
    corpus = about["corpus"]
    settings = {f"`{name}`": value for name, value in about["settings"].items() if value is not None}
    made = {
        "steps done": about["steps"],
        "seconds": round(about["seconds"]),
        "device": about["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "text": corpus["text"],
        "sequences": f"{corpus['train']} of {about['settings']['tokens']} tokens",
    }
    return [(name, ", ".join(v) if isinstance(v, list) else str(v)) for name, v in (made | settings).items()]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
