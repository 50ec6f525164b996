"""Which kept tokens a layer may read: what simulated compression hides, and layers that keep unequal numbers.

Presses that only simulate compression leave the cache whole and note the hidden keys on each attention module;
kvpress then overwrites those keys with one that no query of the step attends to. Here the same keys are masked, which
is exact for any number of queries at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


def attention_layers(model: Any) -> list[Any]:
    """The attention modules of a model, in the order of its cache's layers."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim")]


def hides(model: Any) -> bool:
    """Whether any layer hides keys that its cache still holds."""
    return any(_hidden(layer) is not None for layer in attention_layers(model))


@contextmanager
def nothing_hidden(model: Any) -> Iterator[None]:
    """Context in which every layer reads all that its cache holds; what was hidden is hidden again after it."""
    layers = attention_layers(model)
    before = [_hidden(layer) for layer in layers]
    try:
        for layer in layers:
            layer.masked_key_indices = None
        yield
    finally:
        for layer, hidden in zip(layers, before, strict=True):
            layer.masked_key_indices = hidden


def readable(layer: Any, keys: torch.Tensor) -> torch.Tensor:
    """Which kept tokens an attention module may read.

    Parameters
    ----------
    keys : [batch, KV heads, kept tokens, head_dim], those of its cache.

    Returns
    -------
    bool [batch, KV heads, kept tokens].
    """
    seen = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    if (hidden := _hidden(layer)) is not None:
        seen[tuple(index.to(keys.device) for index in hidden)] = False
    return seen


def one_is_wrong(model: Any, cache: Any) -> bool:
    """Whether transformers' one mask does not fit a step of one token: eager attention adds it as it is."""
    if model.config._attn_implementation != "eager":
        return False
    return len({layer.keys.shape[2] for layer in cache.layers if torch.is_tensor(getattr(layer, "keys", None))}) > 1


@contextmanager
def each_its_own(model: Any, cache: Any, queries: int) -> Iterator[None]:
    """Context of a forward pass of ``queries`` tokens in which each layer gets the causal mask of its own kept tokens.

    transformers makes one mask, of the first layer's length. Where all layers keep equally many tokens and hide none,
    that is the right one and is left alone.
    """
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    if len(lengths) == 1 and not hides(model):
        yield
        return
    hooks = [
        layer.register_forward_pre_hook(
            partial(_give, mask=_mask(model, layer, kept.keys, queries)), with_kwargs=True, prepend=True
        )
        for layer, kept in zip(attention_layers(model), cache.layers, strict=True)
    ]
    try:
        with nothing_hidden(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _give(_: Any, args: Any, kwargs: dict[str, Any], mask: torch.Tensor | None) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"attention_mask": mask}


def _mask(model: Any, layer: Any, keys: torch.Tensor, queries: int) -> torch.Tensor | None:
    """Mask of a layer, [batch or 1, attention heads or 1, queries, kept tokens + queries]; True where one may read."""
    attention = model.config._attn_implementation
    if "flash" in attention:
        return None  # its causal mask ends at the last key, whatever the layer's length
    kept = keys.shape[2]
    mask = torch.ones(queries, kept + queries, dtype=torch.bool, device=keys.device).tril(kept)[None, None]
    if _hidden(layer) is not None:
        seen = readable(layer, keys).repeat_interleave(layer.num_key_value_groups, dim=1)
        mask = mask.repeat(*seen.shape[:2], 1, 1)
        mask[..., :kept] &= seen[:, :, None]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=keys.dtype, device=keys.device).masked_fill(~mask, torch.finfo(keys.dtype).min)


def _hidden(layer: Any) -> Any:
    return getattr(layer, "masked_key_indices", None)
