"""The texts that a variant answers with: greedy, the end of sequence honoured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvbench.cache import cache_bytes, full_cache_bytes
from kvbench.decode import generate
from kvbench.errors import Unsupported
from kvbench.methods import Dense


@dataclass(frozen=True)
class Limits:
    """How many prompts, how long an answer, and where a prompt is cut (tokens)."""

    count: int
    new_tokens: int
    max_prompt_tokens: int


def one_by_one(model: Any, tokenizer: Path, method: Dense, prompts: Path, limits: Limits) -> list[dict[str, Any]]:
    """Answer each prompt alone, so that no pad is scored, kept or attended to.

    A prompt that the method refuses (shorter than its window, say) has the status ``unsupported`` and no text.

    Parameters
    ----------
    prompts : prompts.parquet; the first ``limits.count`` rows are answered.
    """
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(tokenizer)
    stop = end_ids(model, tok)
    answered = []
    for row in tqdm(_first(prompts, limits.count), desc="outputs", unit="prompt", mininterval=1.0):
        ids = torch.tensor([encode(tok, row["prompt"])[: limits.max_prompt_tokens]], device=model.device)
        try:
            decoded = generate(model, ids, method, limits.new_tokens, stop=stop)
        except Unsupported as error:
            answered.append(row | {"prompt_tokens": ids.shape[1], "status": "unsupported", "status_reason": str(error)})
            continue
        tokens = decoded.tokens[0].tolist()
        simulated = method.compresses and not _freed(model, decoded.cache, ids.shape[1] + len(tokens) - 1)
        answered.append(row | {"prompt_tokens": ids.shape[1], "simulated": simulated} | _answer(tok, tokens, stop))
    return answered


def as_the_article(model: Any, tokenizer: Path, method: Dense, prompts: Path, limits: Limits) -> list[dict[str, Any]]:
    """Answer all prompts in one left-padded batch through transformers' ``generate``, no chat template.

    Source: the article's ``generate_text_samples``. Presses read the pads as tokens here, so a compressed answer
    may differ from the same prompt's alone; this exists to show what the article saw.
    """
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(tokenizer)
    tok.padding_side, tok.pad_token = "left", tok.eos_token
    rows = _first(prompts, limits.count)
    texts = [row["prompt"] for row in rows]
    inputs = tok(texts, return_tensors="pt", padding=True, truncation=True, max_length=limits.max_prompt_tokens)
    inputs = {key: value.to(model.device) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad(), method.everywhere(model):
        generated = model.generate(
            **inputs,
            max_new_tokens=limits.new_tokens,
            pad_token_id=tok.pad_token_id,
            eos_token_id=tok.eos_token_id,
            do_sample=False,
        )
    new = generated[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = inputs["attention_mask"].sum(1).tolist()
    stop = {tok.eos_token_id}
    return [
        row | {"prompt_tokens": length} | _answer(tok, tokens, stop)
        for row, length, tokens in zip(rows, lengths, new, strict=True)
    ]


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt as a user's message in the model's chat template, or as plain text where it has none."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    message = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every id that ends a sequence: the generation config's (often several) and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _answer(tokenizer: Any, tokens: list[int], stop: set[int]) -> dict[str, Any]:
    """An answer up to its end of sequence, which counts as a token and is not part of the text."""
    end = next((i for i, token in enumerate(tokens) if token in stop), None)
    kept = tokens if end is None else tokens[: end + 1]
    return {
        "text": tokenizer.decode(kept, skip_special_tokens=True),
        "token_ids": kept,
        "new_tokens": len(kept),
        "stop_reason": "length" if end is None else "eos",
    }


def _freed(model: Any, cache: Any, tokens: int) -> bool:
    return cache_bytes(cache).allocated < full_cache_bytes(model.config, 1, tokens, model.dtype.itemsize)


def _first(prompts: Path, count: int) -> list[dict[str, Any]]:
    import pyarrow.dataset as ds

    columns = ["rank", "conversation_id", "prompt"]
    return list(ds.dataset(prompts).head(count, columns=columns, batch_size=max(count, 1)).to_pylist())
