"""What a variant answers to questions about a text whose cache it has compressed."""

from collections.abc import Sequence
from typing import Any

import torch

from kvbench import masks
from kvbench.answers import end_ids
from kvbench.decode import answer, prefill
from kvbench.haystack import Prompt
from kvbench.kept import Kept, kept
from kvbench.methods import Dense
from kvbench.rows import equal_lengths, tokens_at_once, until_end


def answers(
    model: Any, tokenizer: Any, method: Dense, prompts: Sequence[Prompt], query_aware: bool
) -> list[dict[str, Any]]:
    """Answer prompts, each as if it were alone.

    The context is compressed; the question follows over what was kept, and the answer after it. Query-aware, the
    question is compressed too, all but the prompt's last token: no token of an answer is predicted from the full cache.

    Returns
    -------
    ``answer``, ``kept_fraction`` and ``simulated`` of each prompt.

    Raises
    ------
    Unsupported : the method refuses a prompt.
    """
    stop = end_ids(model, tokenizer)
    parts = [_parts(prompt, query_aware) for prompt in prompts]
    found: list[dict[str, Any]] = [{} for _ in prompts]
    for group in equal_lengths([(len(first), len(rest)) for first, rest in parts], Dense(), tokens_at_once(model)):
        first, rest = (torch.tensor([parts[i][part] for i in group], device=model.device) for part in (0, 1))
        longest = max(prompts[i].new_tokens for i in group)
        for i, (tokens, state) in zip(group, _batch(model, method, first, rest, longest, stop), strict=True):
            text = tokenizer.decode(until_end(tokens[: prompts[i].new_tokens], stop), skip_special_tokens=True)
            found[i] = {"answer": text, "kept_fraction": state.fraction, "simulated": state.simulated}
    return found


def _parts(prompt: Prompt, query_aware: bool) -> tuple[list[int], list[int]]:
    """What is compressed, and what is read after it."""
    if not query_aware:
        return prompt.context, prompt.question
    return prompt.context + prompt.question[:-1], prompt.question[-1:]


def _batch(
    model: Any, method: Dense, first: torch.Tensor, rest: torch.Tensor, new_tokens: int, stop: set[int]
) -> list[tuple[list[int], Kept]]:
    """New tokens of each row and what was kept of its cache; ``first`` and ``rest`` are [rows, tokens]."""
    cache = _compressed(model, method, first)
    if cache is None:
        rows = zip(first.split(1), rest.split(1), strict=True)
        return [found for row in rows for found in _batch(model, method, *row, new_tokens, stop)]
    state = kept(model, cache, *first.shape)
    position = method.next_position(first.shape[1], cache)
    tokens = answer(model, cache, rest, method, position, new_tokens, stop)
    if method.acts_while_decoding:
        state = kept(model, cache, len(first), first.shape[1] + rest.shape[1] + tokens.shape[1] - 1)
    return [(row, state) for row in tokens.tolist()]


def _compressed(model: Any, method: Dense, ids: torch.Tensor) -> Any:
    """The cache of prompts, each compressed as if it were alone; None where their caches cannot be one."""
    if method.rows_are_independent or len(ids) == 1:
        return prefill(model, ids, method)[1]
    if method.acts_while_decoding:
        return None
    caches = []
    for row in ids.split(1):
        caches.append(prefill(model, row, method)[1])
        if masks.hides(model):
            return None  # what is hidden of a row is noted on the model, where the next row's takes its place
    layers = list(zip(*(cache.layers for cache in caches), strict=True))
    if any(len({row.keys.shape for row in layer}) > 1 for layer in layers):
        return None
    for first, *others in layers:
        first.keys = torch.cat([first.keys, *(row.keys for row in others)])
        first.values = torch.cat([first.values, *(row.values for row in others)])
    return caches[0]
