"""The least that prefill and decode must do, in closed form, and how near to it a device can come.

An operation is a floating-point multiplication or addition, so a multiply-add is two. Only matrix products are
counted: norms, biases, rotary embeddings, softmax, activations, argmax and whatever a compression method computes are
not. Bytes are those that must cross the device's memory: weights once, keys and values once. Activations could stay on
the chip and are not counted. Both are lower bounds, so the time that follows from them is the least that is possible.

Source: Williams, Waterman & Patterson, Roofline: an insightful visual performance model for multicore architectures,
CACM 52(4), 2009.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvbench import files
from kvbench.architecture import Architecture
from kvbench.errors import Unsupported


@dataclass(frozen=True)
class Work:
    """What must be done: bytes moved, and floating-point operations."""

    bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Rates:
    """What a device does.

    Attributes
    ----------
    copy_bytes_per_s : bytes read and written by a copy within its memory, a second.
    matmul_flops_per_s : operations of a large dense matrix product a second, by dtype (``bfloat16``).
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: Mapping[str, float]

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> Self:
        """The medians of what `rates.measure` found."""
        matmul = {dtype: found["flops_per_s"] for dtype, found in measured["matmul"].items()}
        return cls(measured["copy"]["bytes_per_s"], matmul)


def read_rates(path: Path) -> dict[str, Rates]:
    """The rates of each device by its name, as `rates.write` left them; none where nothing was measured."""
    measured = files.read_json(path)["rates"] if path.exists() else {}
    return {name: Rates.of(rates) for name, rates in measured.items()}


def prefill(model: Architecture, batch: int, tokens: int, itemsize: int) -> Work:
    """A whole prompt for each sequence, up to the first new token.

    Bytes: the weights once (of an untied embedding table only the rows that the prompt reads, at most one a token), and
    the prompt's keys and values written once. Operations: every token through every projection; for each head the
    tokens × (tokens + 1) / 2 pairs of a query and a key that causal attention joins, in both of its products; and the
    logits of the last position of each sequence.

    Raises
    ------
    Unsupported : sliding windows that the prompt outgrows, or weights that are not known in closed form.
    """
    _check_window(model, tokens)
    pairs = tokens * (tokens + 1) / 2
    moved = _weights_read(model, batch * tokens) + batch * tokens * model.kv_elements
    done = batch * (tokens * model.projections + model.embedding + _attention(model, pairs))
    return Work(moved * itemsize, 2 * done)


def decode_step(model: Architecture, batch: int, cached: float, itemsize: int) -> Work:
    """One new token for each sequence.

    Bytes: the weights once (of an untied embedding table only the batch's rows; a tied one is read whole, as the output
    projection), the cached keys and values read, the new token's written. Operations: the projections, the logits, and
    attention over the cached tokens and the new one.

    Parameters
    ----------
    cached : tokens in the cache for each KV head of each sequence and layer, before the step; their mean where they
        differ, since both counts are linear in them.

    Raises
    ------
    Unsupported : sliding windows that the cache outgrows, or weights that are not known in closed form.
    """
    _check_window(model, cached + 1)
    moved = _weights_read(model, batch) + batch * (cached + 1) * model.kv_elements
    done = batch * (model.projections + model.embedding + _attention(model, cached + 1))
    return Work(moved * itemsize, 2 * done)


def mean_decode_step(
    model: Architecture, batch: int, kept: float, new_tokens: int, itemsize: int, growth: float = 1.0
) -> Work:
    """The mean of a generation's decode steps.

    N new tokens are N − 1 steps; step i, from 0, finds ``kept`` + ``growth`` × i tokens cached, which is
    ``kept`` + ``growth`` × (N − 2) / 2 in the mean.

    Parameters
    ----------
    growth : tokens by which a KV head's cache grows in a step: 1 where nothing is evicted while decoding.
    """
    return decode_step(model, batch, kept + growth * (new_tokens - 2) / 2, itemsize)


def _check_window(model: Architecture, tokens: float) -> None:
    if model.window is not None and tokens > model.window:
        raise Unsupported(f"{tokens:.0f} tokens outgrow the model's sliding window of {model.window}")


def _weights_read(model: Architecture, tokens: int) -> int:
    rows = 0 if model.tied else min(tokens, model.vocabulary) * model.hidden
    return model.projections + model.vectors + model.embedding + rows


def _attention(model: Architecture, pairs: float) -> float:
    """Multiply-adds of attention: queries with keys, and weights with values."""
    return 2 * model.layers * model.heads * model.head_dim * pairs


def fastest(work: Work, rates: Rates, dtype: str) -> float:
    """Seconds that the work takes at best: moving its bytes or doing its operations, whichever takes longer."""
    return max(work.bytes / rates.copy_bytes_per_s, work.flops / rates.matmul_flops_per_s[dtype])


def mbu(work: Work, seconds: float, rates: Rates) -> float:
    """Model bandwidth utilisation: bytes that must move, over the time it took and the measured copy bandwidth.

    A copy is half writes. Where reads alone are faster, as on many CPUs, this can exceed 1 by as much.
    """
    return work.bytes / seconds / rates.copy_bytes_per_s


def mfu(work: Work, seconds: float, rates: Rates, dtype: str) -> float:
    """Model FLOPs utilisation: operations that must be done, over the time it took and the measured matmul rate."""
    return work.flops / seconds / rates.matmul_flops_per_s[dtype]
