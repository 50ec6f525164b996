"""Evictions that are still soft, so that a retrofit can learn them, and the attention that obeys them.

A head's logit ℓ about a token, at a temperature τ, evicts it by α = σ(ℓ / τ). To queries within the window the token is
there whole; to later ones its attention score is lower by −log(1 − α). At α = 0 that is plain attention, at α = 1 the
rule of `evict`.

Source: arXiv 2506.05345, section 3.2. There ℓ has logistic noise. Here it has none: a model that learns under noise is
less good under the rule itself, and a temperature that falls takes decisions away from the middle as well.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench.dms import evict
from kvbench.ragged import fits_kernel

ATTENTION = "kvbench_dms_soft"
"""Name under which the attention is registered with transformers."""

FLOOR = -30.0
"""Least penalty of a soft eviction; below it a score counts for nothing, and a gradient for less."""

EVICTED = -1e4
"""Penalty of an eviction for good: its weight is 0 in float32, and no score is infinite."""


class Penalties(NamedTuple):
    """What an attention function finds in its keyword ``soft``.

    Attributes
    ----------
    scores : float32 [batch, KV heads, tokens], what is added to the score of each key that is older than the window.
    """

    scores: torch.Tensor
    window: int


def gates(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each token is evicted, by a layer's head.

    Parameters
    ----------
    hidden : the attention's input, [batch, tokens, hidden].
    weight, bias : of the layer's head, [KV heads, hidden] and [KV heads].
    temperature : a scalar.

    Returns
    -------
    α and log(1 − α), float32 [batch, KV heads, tokens]; the last token is not judged yet, and stays.
    """
    logits = evict.shifted(evict.decide(hidden, weight, bias)) / temperature
    return logits.sigmoid(), functional.logsigmoid(-logits).clamp(min=FLOOR)


def attend(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    soft: Penalties | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of whole sequences, with penalties or without; differentiable.

    Parameters
    ----------
    query : [batch, heads, tokens, head_dim]; keys and values [batch, KV heads, tokens, head_dim]. Under autocast they
        are taken in the dtype of the values, which rotary embeddings have not touched.

    Returns
    -------
    [batch, tokens, heads, head_dim], and no weights.
    """
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if soft is None:
        out = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
    elif query.is_cuda and fits_kernel(query.shape[-1]):
        from kvbench.dms import soft_kernels

        return soft_kernels.attend(query, keys, values, soft.scores, soft.window, scale), None
    else:
        out = attend_biased(query, keys, values, soft, scale)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


def attend_biased(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, soft: Penalties, scale: float
) -> torch.Tensor:
    """The plain form, by a bias of [batch, heads, tokens, tokens]; the result is [batch, heads, tokens, head_dim]."""
    group, tokens = query.shape[1] // keys.shape[1], query.shape[2]
    position = torch.arange(tokens, device=query.device)
    age = position[:, None] - position
    bias = torch.where(age > soft.window, soft.scores[:, :, None], 0.0).masked_fill(age < 0, float("-inf"))
    bias, keys, values = (part.repeat_interleave(group, 1) for part in (bias.to(query.dtype), keys, values))
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
