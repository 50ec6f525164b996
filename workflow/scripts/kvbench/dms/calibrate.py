"""Untrained heads that evict a wanted share: speed and bytes of DMS on any model, its text meaning nothing."""

from typing import Any

import torch

from kvbench.dms import evict
from kvbench.dms.attention import ATTENTION
from kvbench.dms.evict import SCALE, Heads
from kvbench.errors import UserError


def share(factor: float, tokens: int, window: int) -> float:
    """The share of tokens to keep outside the window, so that of ``tokens`` one in ``factor`` is kept in all.

    Raises
    ------
    UserError : the window alone holds more than that.
    """
    readable = window + 1
    if tokens < factor * readable:
        raise UserError(
            f"a window of {window} tokens is more than 1/{factor:g} of {tokens}", "Ask for a longer prompt or less"
        )
    return (tokens / factor - readable) / (tokens - readable)


@torch.no_grad()
def random_heads(model: Any, window: int, keep: float, sample: torch.Tensor, seed: int = 0) -> Heads:
    """Heads with random weights; each one's bias is set so that it keeps a share of a sample's tokens.

    One pass sets them all, layer after layer, so each sees what it will see: the layers below evict already.

    Parameters
    ----------
    keep : share of tokens that a head does not mark, 0 to 1.
    sample : int64 [batch, tokens], like what the heads will run on.
    """
    about = {"trained": "no: random, calibrated"}
    heads = Heads(*evict.sizes(model.config), window, about).requires_grad_(False)
    heads.weight.normal_(generator=torch.Generator().manual_seed(seed))
    heads.to(model.device)

    def fit(module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        layer = module.layer_idx
        parts = kwargs["hidden_states"].flatten(0, 1).split(8192)
        logits = torch.cat([heads.logits(layer, part[None])[0] for part in parts], -1)
        heads.bias[layer] -= logits.quantile(keep, -1) / SCALE

    hooks = [layer.self_attn.register_forward_pre_hook(fit, with_kwargs=True) for layer in model.model.layers]
    try:
        with evict.attached(model, heads, ATTENTION):
            model(sample, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return heads
