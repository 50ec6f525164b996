"""The texts that a variant answers with: greedy, the end of sequence honoured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbench.errors import Unsupported
from kvbench.manifest import Manifest
from kvbench.methods import Dense
from kvbench.rows import generate_rows, unpadded, until_end
from kvbench.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Limits:
    """How many prompts, how long an answer, and where a prompt is cut (tokens)."""

    count: int
    new_tokens: int
    max_prompt_tokens: int


def alone(model: Any, manifest: Manifest, method: Dense, prompts: Path, limits: Limits) -> list[dict[str, Any]]:
    """Answer each prompt as if it were alone, so that no pad is scored, kept or attended to.

    A prompt that the method refuses (shorter than its window, say) has the status ``unsupported`` and no text.

    Parameters
    ----------
    prompts : prompts.parquet; the first ``limits.count`` rows are answered.
    """
    tok = load_tokenizer(manifest)
    rows = _first(prompts, limits.count)
    ids = [encode(tok, row["prompt"])[: limits.max_prompt_tokens] for row in rows]
    answers = _alone(model, tok, method, ids, limits.new_tokens, end_ids(model, tok))
    return [row | answer for row, answer in zip(rows, answers, strict=True)]


def both_ways(model: Any, manifest: Manifest, method: Dense, prompts: Path, limits: Limits) -> list[dict[str, Any]]:
    """Answer the prompts as the article does, in one left-padded batch, and the same token ids alone.

    Source: the article's ``generate_text_samples``: no chat template, the tokenizer's own end of sequence. Presses
    read the pads as tokens in the batch, so that its texts show the padding's doing beside the press's.
    """
    tok = load_tokenizer(manifest)
    tok.padding_side, tok.pad_token = "left", tok.eos_token
    rows = _first(prompts, limits.count)
    texts = [row["prompt"] for row in rows]
    inputs = tok(texts, return_tensors="pt", padding=True, truncation=True, max_length=limits.max_prompt_tokens)
    ids, stop = unpadded(inputs["input_ids"], inputs["attention_mask"]), {tok.eos_token_id}
    try:
        new = _padded(model, tok, method, inputs, limits.new_tokens)
        together = [_answer(tok, until_end(tokens, stop), stop) for tokens in new]
    except Unsupported as error:
        together = [_refused(error)] * len(rows)
    padded = [{"way": "batch", "prompt_tokens": len(own)} | answer for own, answer in zip(ids, together, strict=True)]
    answers = padded + _alone(model, tok, method, ids, limits.new_tokens, stop)
    return [row | answer for row, answer in zip(rows + rows, answers, strict=True)]


def _padded(model: Any, tokenizer: Any, method: Dense, inputs: Any, new_tokens: int) -> list[list[int]]:
    """New tokens of a padded batch through transformers' ``generate``, with the method's hooks on throughout."""
    width = inputs["input_ids"].shape[1]
    method.check(model, len(inputs["input_ids"]))
    with torch.no_grad(), method.everywhere(model):
        generated = model.generate(
            **{key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")},
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            do_sample=False,
        )
    return list(generated[:, width:].tolist())


def _alone(
    model: Any, tokenizer: Any, method: Dense, prompts: list[list[int]], new_tokens: int, stop: set[int]
) -> list[dict[str, Any]]:
    """The answer to each prompt, given as token ids."""
    answers = []
    for prompt, row in zip(prompts, generate_rows(model, prompts, method, new_tokens, stop), strict=True):
        about = {"way": "alone", "prompt_tokens": len(prompt)}
        if isinstance(row, Unsupported):
            answers.append(about | _refused(row))
        else:
            answers.append(about | {"simulated": row.simulated} | _answer(tokenizer, row.tokens, stop))
    return answers


def _refused(error: Unsupported) -> dict[str, Any]:
    return {"status": "unsupported", "status_reason": str(error)}


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
    """An answer from its tokens; the end of sequence counts as one and is not part of the text."""
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens,
        "new_tokens": len(tokens),
        "stop_reason": "eos" if tokens[-1] in stop else "length",
    }


def _first(prompts: Path, count: int) -> list[dict[str, Any]]:
    import pyarrow.dataset as ds

    columns = ["rank", "conversation_id", "prompt"]
    return list(ds.dataset(prompts).head(count, columns=columns, batch_size=max(count, 1)).to_pylist())
