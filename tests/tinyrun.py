"""A whole run in seconds: a tiny random model with a tokenizer of its own, made-up chats, and a config for them."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from kvbench import prompts, sources
from kvbench.scan import Rules

WORDS = "the cache keeps what a model has read and a press throws most of it away again before it writes".split()
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def chats(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations in ShareGPT's form; every third begins with the assistant."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def conversation(i: int) -> dict[str, Any]:
        roles = ["gpt", "human"] if i % 3 == 0 else ["human", "gpt"]
        return {
            "id": f"chat{i:03}",
            "conversations": [{"from": role, "value": text(5, 90)} for role in roles * 2],
        }

    return [conversation(i) for i in range(count)]


def tokenizer(texts: list[str], pieces: int) -> Any:
    """A byte-level tokenizer of ``pieces`` pieces trained on texts, with `TEMPLATE`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    trained.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def save_model(folder: Path) -> None:
    """A Llama of 3 layers with random weights and a tokenizer trained on the chats' words."""
    import tiny

    tokenizer([" ".join(WORDS)] * 20, 310).save_pretrained(folder)
    model = tiny.model()
    model.save_pretrained(folder)


def config(folder: Path) -> dict[str, Any]:
    """The smallest config that reaches every stage."""
    return {
        "results": "results",
        "dataset": {"name": "chats", "source": {"path": str(folder / "chats.json")}},
        "models": {"tiny": {"source": {"path": str(folder / "model")}}},
        "methods": {
            "baseline": "none",
            "knorm-0.5": {"press": "KnormPress", "args": {"compression_ratio": 0.5}},
        },
        "workloads": {"short": {"batch_size": 2, "prompt_tokens": 24, "new_tokens": 4}},
        "protocol": {"repeats": 2, "max_warmup_runs": 1},
        "outputs": {"prompts": 2, "new_tokens": 4, "max_prompt_tokens": 400},
        "quality": {
            "windows": 2,
            "prefix_tokens": 24,
            "continuation_tokens": 4,
            "retrieval": {"tasks": ["needle"], "samples": 2, "prompt_tokens": [440], "depths": [0.5]},
        },
    }


def make(folder: Path, **changes: Any) -> Path:
    """Write model, chats and config into a folder; returns the config's path. ``changes`` replace its keys."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_model(folder / "model")
        (folder / "chats.json").write_text(json.dumps(chats()), "utf-8")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(folder) | changes, sort_keys=False), "utf-8")
    return path


def with_prompts(folder: Path) -> Path:
    """`make`, and its chats' prompts (``prompts.parquet``) and manifest (``dataset.json``); returns the folder."""
    make(folder)
    sources.fetch_dataset("chats", {"path": str(folder / "chats.json")}, folder / "dataset.json")
    prompts.select(folder / "chats.json", folder / "prompts.parquet", Rules("human_first", 1, 1, 0.0), {})
    return folder
