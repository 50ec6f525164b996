"""The attention of a DMS model, for prompts and for single tokens, registered with transformers."""

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench import ragged
from kvbench.dms import prefill
from kvbench.dms.cache import CompactCache
from kvbench.dms.evict import LayerInput
from kvbench.dms.layer import Layer, anchor
from kvbench.dms.partition import Partition
from kvbench.errors import Unsupported

ATTENTION = "kvbench_dms"
"""Name under which it is registered."""


def attend(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    dms: LayerInput | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention under evictions: of a prompt, which is then stored without them, or of the next token.

    Parameters
    ----------
    query : [batch, heads, tokens, head_dim]; keys and values of the same tokens, [batch, KV heads, tokens, head_dim].
    dms : what `evict.attach` hands in; without a cache in it, a prompt is attended to and not stored.

    Returns
    -------
    [batch, tokens, heads, head_dim], and no weights.

    Raises
    ------
    Unsupported : a second prompt on a cache that has one.
    """
    assert dms is not None, "eviction heads are not attached"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache: CompactCache | None = dms.cache
    if cache is None or not cache.holds(dms.layer):
        marked = prefill.marks(dms)
        parts = Partition.of(marked)
        out = prefill.attend(query, keys, values, marked, parts, dms.heads.window, scale)
        if cache is not None:
            cache.take(keys, values, parts)
        return out, None
    if query.shape[2] != 1:
        raise Unsupported("a DMS cache takes one prompt and then single tokens")
    step = _step_on_device if query.is_cuda else _step_on_host
    return step(query, keys, values, dms, cache.layers[dms.layer], scale).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


@torch.compiler.disable  # heads are padded to the longest, so shapes follow the data
def _step_on_host(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dms: LayerInput, layer: Layer, scale: float
) -> torch.Tensor:
    layer.append(keys, values, dms.logits()[..., 0] > 0)
    return ragged.attend_padded(query, *layer.read(), layer.lengths, scale)


def _step_on_device(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dms: LayerInput, layer: Layer, scale: float
) -> torch.Tensor:
    heads = dms.heads
    return step(
        query,
        keys,
        values,
        dms.hidden,
        heads.weight[dms.layer],
        heads.bias[dms.layer],
        anchor(keys),
        layer.table,
        *layer.books(),
        scale,
    )


@torch.library.custom_op("kvbench::dms_step", mutates_args=("lengths", "ring", "free", "position"))
def step(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    anchor: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    ring: torch.Tensor,
    free: torch.Tensor,
    position: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One token's eviction decision, storage and attention, on CUDA; opaque to torch.compile.

    The blocks are written through their addresses, of which torch knows nothing; all that reads them is this operator.
    Arguments are those of `Layer` and `Heads`; ``hidden`` is [batch, 1, hidden].

    Returns
    -------
    [batch, heads, 1, head_dim].
    """
    from kvbench.dms import kernels

    return kernels.step(query, keys, values, hidden, weight, bias, anchor, table, lengths, ring, free, position, scale)


@step.register_fake
def _(query: torch.Tensor, *_args: Any) -> torch.Tensor:
    return torch.empty_like(query)
