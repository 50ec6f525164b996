"""What a variant answers to questions about a text whose cache it has compressed."""

from collections.abc import Sequence
from typing import Any

import torch

from kvbench.answers import end_ids
from kvbench.decode import answer, prefill
from kvbench.haystack import Prompt
from kvbench.kept import kept
from kvbench.methods import Dense
from kvbench.rows import equal_lengths, until_end


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
    for group in equal_lengths([(len(first), len(rest)) for first, rest in parts], method):
        first, rest = (torch.tensor([parts[i][part] for i in group], device=model.device) for part in (0, 1))
        new_tokens = max(prompts[i].new_tokens for i in group)
        _, cache = prefill(model, first, method)
        state = kept(model, cache, *first.shape)
        position = method.next_position(first.shape[1], cache)
        tokens = answer(model, cache, rest, method, position, new_tokens, stop)
        if method.acts_while_decoding:
            state = kept(model, cache, len(group), first.shape[1] + rest.shape[1] + tokens.shape[1] - 1)
        for i, row in zip(group, tokens.tolist(), strict=True):
            own = until_end(row[: prompts[i].new_tokens], stop)
            text = tokenizer.decode(own, skip_special_tokens=True)
            found[i] = {"answer": text, "kept_fraction": state.fraction, "simulated": state.simulated}
    return found


def _parts(prompt: Prompt, query_aware: bool) -> tuple[list[int], list[int]]:
    """What is compressed, and what is read after it."""
    if not query_aware:
        return prompt.context, prompt.question
    return prompt.context + prompt.question[:-1], prompt.question[-1:]
