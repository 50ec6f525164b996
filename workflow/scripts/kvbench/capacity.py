"""What fits: the largest batch and the longest prompt that a device holds with a method, found by running them."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvbench import engines
from kvbench.device import ran_out
from kvbench.errors import Unsupported
from kvbench.methods import Dense

RESOLUTION = 1 / 64
"""The search ends when what does not fit is no more than this share above what does."""

USABLE = 0.97
"""Share of a device's memory that peaks of live tensors can come near to; the rest is the context's and the gaps'."""

PROMPT_STEP = 64
"""Prompts grow by a multiple of this many tokens."""


@dataclass(frozen=True)
class Shape:
    """Batch size, prompt tokens and new tokens of a generation."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


def search(model: Any, method: Dense, shape: Shape, engine: engines.Engine) -> dict[str, Any]:
    """The largest batch at a workload's prompt length, and the longest prompt at its batch size.

    Each try is a whole generation of seeded random ids in one batch, so the prefill's activations count as they do in
    the workload itself. Memory for a try is taken anew: nothing is kept from the one before.

    Raises
    ------
    Unsupported : on a CPU, whose memory is shared with everything else on the machine.
    """
    if model.device.type != "cuda":
        raise Unsupported("capacity is searched on a GPU; a CPU's memory is shared with all else on the machine")
    total = torch.cuda.get_device_properties(model.device).total_memory
    longest = model.config.get_text_config().max_position_embeddings - shape.new_tokens

    def batch(rows: int) -> int | None:
        return _peak(model, method, Shape(rows, shape.prompt_tokens, shape.new_tokens), engine)

    def prompt(steps: int) -> int | None:
        return _peak(model, method, Shape(shape.batch_size, steps * PROMPT_STEP, shape.new_tokens), engine)

    method.check(model, shape.batch_size)
    # from the workload's own length, since a press may refuse prompts that are shorter than its window
    start = math.ceil(shape.prompt_tokens / PROMPT_STEP)
    tokens = largest(prompt, total, longest // PROMPT_STEP, start) * PROMPT_STEP
    return {
        "largest_batch": largest(batch, total, None) if _batches(model, method) else 1,
        "longest_prompt_tokens": tokens,
        "longest_prompt_limit": "context" if tokens + PROMPT_STEP > longest else "memory",
        "memory_bytes": total,
    }


def largest(peak: Callable[[int], int | None], total: int, limit: int | None, start: int = 1) -> int:
    """The largest size that fits, to `RESOLUTION`; the limit itself where that fits; 0 if not even 1 does.

    Peaks grow nearly in proportion to size, so each next try is where the last two peaks that fitted say that memory
    ends; where that is no help, halfway.

    Parameters
    ----------
    peak : runs a size, and returns its peak memory in bytes, or None if it does not fit.
    total : the device's memory in bytes.
    limit : the largest size that makes sense, or None.
    start : the first size to try.
    """
    fitted: list[tuple[int, int]] = []
    too_large = limit + 1 if limit is not None else None
    size = start if limit is None else max(1, min(start, limit))
    while too_large is None or size < too_large:
        found = peak(size)
        if found is None:
            too_large = size
        else:
            fitted.append((size, found))
        low = fitted[-1][0] if fitted else 0
        if too_large is None or too_large - low > max(1, int(low * RESOLUTION)):
            size = _next(fitted, total, low, too_large)
        elif limit is None or too_large <= limit or low == limit:
            break
        else:
            size = limit  # nothing has failed yet: only a try of the limit tells whether it or the memory ends this
    return fitted[-1][0] if fitted else 0


def _next(fitted: list[tuple[int, int]], total: int, low: int, too_large: int | None) -> int:
    """A size above the largest that fitted and below the least that did not."""
    margin = max(1, int(low * RESOLUTION))
    guess = 2 * low
    if len(fitted) > 1 and fitted[-1][1] > fitted[-2][1]:
        (size, bytes_), (before, bytes_before) = fitted[-1], fitted[-2]
        guess = size + int((total * USABLE - bytes_) * (size - before) / (bytes_ - bytes_before))
    if too_large is None:
        return max(guess, low + 2 * margin)
    if not low < guess < too_large:
        guess = (low + too_large) // 2
    return min(max(guess, low + margin), too_large - margin)


def _peak(model: Any, method: Dense, shape: Shape, engine: engines.Engine) -> int | None:
    """Peak bytes of one generation, or None if the device has not enough."""
    torch.cuda.reset_peak_memory_stats(model.device)
    fits = _fits(model, method, shape, engine)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated(model.device) if fits else None


def _fits(model: Any, method: Dense, shape: Shape, engine: engines.Engine) -> bool:
    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator(model.device).manual_seed(0)
    try:
        ids = torch.randint(
            vocabulary, (shape.batch_size, shape.prompt_tokens), generator=generator, device=model.device
        )
        engine.generate(model, ids, method, shape.new_tokens, lambda: None, lambda _: None)
        torch.cuda.synchronize(model.device)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return False
    return True


def _batches(model: Any, method: Dense) -> bool:
    """Whether a method can run on more than one row."""
    try:
        method.check(model, 2)
    except Unsupported:
        return False
    return True
